"""A probe of a cluster profile: start it, run a small piece of real work on its workers, and say what there is."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata

import numpy as np
import xarray as xr

from slidecube.cluster.limits import cores, memory_gb
from slidecube.cluster.pools import open_runner
from slidecube.cluster.resources import Profile
from slidecube.cluster.runner import TaskResult, TileTask
from slidecube.models.predict import predict
from slidecube.models.zoo import build_model
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.tile import peak_rss_gb

_SIDE_PX = 512
_PATIENCE = 8
"""Probes a worker: the first to come must not take all while the others start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One worker, as it describes itself.

    host, pid : where it runs; cores : that it may use; memory_gb : of its host; gpus : devices that it is shown
    slidecube : version; seconds : for the detection of a synthetic block of 512 px
    """

    host: str
    pid: int
    cores: int
    memory_gb: float
    gpus: str
    slidecube: str
    seconds: float


def probe(profile: Profile) -> Iterator[Found]:
    """Start a profile's workers and yield each one, as soon as it has done its probe.

    Raises ClusterError when the profile cannot be started or no worker comes.
    """
    seen: set[tuple[str, int]] = set()
    tasks = [
        TileTask(stage="probe", layer="", epoch="", tile=f"p{i:04d}", key=str(i))
        for i in range(profile.workers * _PATIENCE)
    ]
    with open_runner(replace(profile, deadline_min=10)) as runner:
        for result in runner.run(_probe, tasks):
            if result.status == "failed":
                raise PipelineError(
                    f"A worker of profile {profile.name!r} cannot do the probe: {result.reason}"
                )
            found = Found(**json.loads(result.reason))
            if (found.host, found.pid) not in seen:
                seen.add((found.host, found.pid))
                yield found
            if len(seen) == (1 if profile.runner == "threads" else profile.workers):
                return


def _probe(task: TileTask) -> TaskResult:
    """Detect landslides by `rdndvi` in noise, and describe the worker."""
    began = time.monotonic()
    random = np.random.default_rng(0)
    model = build_model("rdndvi", threshold=None, min_area_m2=None, parameters={})
    names = model.card.inputs.names
    planes = {name: (("y", "x"), random.random((_SIDE_PX, _SIDE_PX), np.float32)) for name in names}
    predict(model, xr.Dataset(planes))["probability"].to_numpy()
    seconds = time.monotonic() - began
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cores": cores(),
        "memory_gb": round(memory_gb(), 1),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "slidecube": metadata.version("slidecube"),
        "seconds": round(seconds, 3),
    }
    return TaskResult(
        task=task,
        status="done",
        seconds=seconds,
        peak_mem_gb=round(peak_rss_gb(), 3),
        reason=json.dumps(about),
    )
