"""Kubernetes: a Dask cluster as the operator's resource, out of a profile."""

from __future__ import annotations

from typing import Any

from dask_kubernetes.operator import make_cluster_spec

from slidecube.cluster.resources import Profile


def cluster_spec(profile: Profile) -> dict[str, Any]:
    """DaskCluster resource of a profile."""
    options, worker = profile.options, profile.worker
    amounts = {"cpu": str(worker.cpus), "memory": f"{worker.mem_gb:g}G"}
    if worker.gpus:
        amounts["nvidia.com/gpu"] = str(worker.gpus)
    spec: dict[str, Any] = make_cluster_spec(
        name="slidecube",
        image=options["image"],
        n_workers=profile.workers,
        resources={"requests": amounts, "limits": amounts},
        worker_command="dask-worker --nthreads 1",
    )
    spec["metadata"]["namespace"] = options["namespace"]
    return spec
