"""Kubernetes: the resources of a run, out of a profile.

Two ways: a driver's Job that lets the Dask operator start its workers, and, without the operator, one Job a stage whose
pods take a shard each. All of it is plain data; what sends it is `kubectl`, or dask-kubernetes in `clusters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import Profile

Manifest = dict[str, Any]

_BESIDE_GB = 2.0
"""Memory in a pod beside its worker's: the nanny, and in a stage's pod the driver, which holds the plan."""

_GPU = "nvidia.com/gpu"
_USER = 10001  # of the image, see deploy/Dockerfile
_SCRATCH = "/tmp"  # noqa: S108  an emptyDir of the pod's own: the image's root is read-only
_CONFIG = "/etc/slidecube"

_SCHEDULER_PORT, _SCHEDULER_HTTP, _WORKER_HTTP, _WORKER_PORT, _NANNY_PORT = range(8786, 8791)
_API_SERVER_PORTS = (443, 6443)  # a policy sees the port behind the service `kubernetes`
_NODE_DNS = "169.254.20.10/32"  # a cache of names on the node itself, which no selector of pods finds
_RETRIES = 6
_DRAINED = 75
"""Exit code of what ended early because it was told to; the same command goes on."""

STAGES = ("plan", "cube", "fit", "detect", "mosaic")
"""Jobs of the way without the operator, each begun when the one before it is complete."""

_SHARDED = ("cube", "detect")


def cluster_spec(profile: Profile, settings: Mapping[str, Any] | None = None) -> Manifest:
    """DaskCluster resource of a profile: a scheduler, and workers of one task at a time, one a pod.

    settings : of Dask, for all of its pods
    Raises ClusterError when the profile names no image.
    """
    env = [*_settings(settings or {}), *_home()]
    name = profile.options["name"]
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": _metadata(profile, name),
        "spec": {
            "worker": {"replicas": profile.workers, "spec": _pod(profile, _worker(profile, env))},
            "scheduler": {"spec": _pod(profile, _scheduler(profile, env)), "service": _service(name)},
        },
    }


def run_job(profile: Profile) -> Manifest:
    """Job of the driver, which starts the cluster, runs `run.toml` on it, and ends it."""
    container = _slidecube(profile, ("run", f"{_CONFIG}/run.toml", "--profile", f"{_CONFIG}/profile.toml"))
    pod = _pod(profile, container, token=True) | {"volumes": [_scratch(profile), _config(profile)]}
    return _job(profile, "run", pod)


def stage_job(profile: Profile, stage: str, *, plan: str = "") -> Manifest:
    """Job of one stage, without the operator; where a stage has shards, one pod a shard.

    stage : of `STAGES`; plan : that the stages after it go on with: their pods search for nothing
    """
    shards = profile.options["shards"] or profile.workers
    gpus = profile.worker.gpus if stage == "detect" else 0
    arguments = [stage, f"{_CONFIG}/run.toml"]
    if stage != "plan":
        arguments += ["--plan", plan]
    if stage in _SHARDED:
        arguments += ["--shard", f"$(JOB_COMPLETION_INDEX)/{shards}"]  # from 0, as ours
    if stage != "plan":
        arguments += ["--profile", f"{_CONFIG}/{'gpu' if gpus else 'cpu'}.toml"]
    pod = _pod(profile, _slidecube(profile, arguments, gpus=gpus))
    pod["volumes"] = [_scratch(profile), _config(profile, f"{profile.options['name']}-stages")]
    job = _job(profile, stage, pod)
    if stage in _SHARDED:
        # one shard that cannot be done does not stop the others
        del job["spec"]["backoffLimit"]
        job["spec"] |= {
            "completionMode": "Indexed",
            "completions": shards,
            "parallelism": min(shards, profile.workers),
            "backoffLimitPerIndex": _RETRIES,
        }
    return job


def stage_profiles(profile: Profile) -> Manifest:
    """ConfigMap of the profiles by which a stage runs inside its pod: on its CPUs, or on its GPUs.

    The worker is a process of its own: a tile that runs out of memory or time costs itself, not the shard.
    """
    texts = {"cpu.toml": _inside(profile, "dask-local", 1)}
    if profile.worker.gpus:
        texts["gpu.toml"] = _inside(profile, "dask-cuda", profile.worker.gpus)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(profile, f"{profile.options['name']}-stages"),
        "data": texts,
    }


def _inside(profile: Profile, runner: str, workers: int) -> str:
    worker = profile.worker
    deadline = f"deadline_min = {profile.deadline_min:g}\n" if profile.deadline_min else ""
    return (
        f'# inside one pod of a stage\nrunner = "{runner}"\nworkers = {workers}\n'
        f"threads_per_worker = {max(1, worker.cpus // workers)}\nmem_gb = {worker.mem_gb / workers:g}\n{deadline}"
    )


def network_policies(profile: Profile) -> list[Manifest]:
    """NetworkPolicies: Dask's ports among the run's own pods; out to names, catalogues and object stores."""
    options = profile.options
    own = {"podSelector": {"matchLabels": _labels(profile)}}
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "dask-kubernetes-operator"}},
    }
    dask = [{"protocol": "TCP", "port": _SCHEDULER_PORT, "endPort": _NANNY_PORT}]
    return [
        _policy(
            profile,
            options["name"],
            _labels(profile),
            ingress=[
                {"from": [own], "ports": dask},
                # it asks the scheduler which workers to retire, and whether it is idle
                {"from": [operator], "ports": _tcp(_SCHEDULER_PORT, _SCHEDULER_HTTP)},
            ],
            egress=[
                {"to": [own], "ports": dask},
                {
                    "to": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": _NODE_DNS}}],
                    "ports": [{"protocol": "UDP", "port": 53}, *_tcp(53)],
                },
                {"ports": _tcp(*options["egress_ports"])},
            ],
        ),
        _policy(
            profile,
            f"{options['name']}-driver",
            _labels(profile, "run"),
            egress=[{"ports": _tcp(*_API_SERVER_PORTS)}],
        ),
    ]


def access(profile: Profile) -> list[Manifest]:
    """Service account and role of the driver: it makes the cluster, watches its pods, and sets their number."""
    name = f"{profile.options['name']}-driver"
    look = ["get", "list", "watch"]
    group = "rbac.authorization.k8s.io"
    dask = ["daskclusters", "daskworkergroups", "daskworkergroups/scale", "daskautoscalers"]
    role = {
        "apiVersion": f"{group}/v1",
        "kind": "Role",
        "metadata": _metadata(profile, name),
        "rules": [
            {
                "apiGroups": ["kubernetes.dask.org"],
                "resources": dask,
                "verbs": [*look, "create", "patch", "delete"],
            },
            {"apiGroups": [""], "resources": ["pods", "pods/log", "services", "events"], "verbs": look},
            {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": look},
        ],
    }
    subject = {
        "kind": "ServiceAccount",
        "name": profile.options["service_account"] or "default",
        "namespace": profile.options["namespace"],
    }
    binding = {
        "apiVersion": f"{group}/v1",
        "kind": "RoleBinding",
        "metadata": _metadata(profile, name),
        "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
        "subjects": [subject],
    }
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(profile, profile.options["service_account"]),
    }
    return [account, role, binding] if profile.options["service_account"] else [role, binding]


def manifests(
    profile: Profile, settings: Mapping[str, Any] | None = None, *, plan: str = ""
) -> dict[str, str]:
    """YAML texts of all resources by path, in the order in which they are applied.

    The two ways exclude each other, so the stages lie in a folder below, into which `kubectl apply -f` does not look.

    settings : of Dask, for the pods of its cluster; plan : of the stages: while it has no name, only its own is written
    Raises ClusterError when the profile is not for Kubernetes, or names no image.
    """
    if profile.runner != "dask-kubernetes":
        raise ClusterError(
            f"Profile {profile.name!r} is of runner {profile.runner!r}; manifests are made of a profile whose runner "
            'is "dask-kubernetes", such as one that begins with extends = "kubernetes"'
        )
    resources = {
        "setup": [*access(profile), *network_policies(profile), stage_profiles(profile)],
        "cluster": [cluster_spec(profile, settings)],
        "run": [run_job(profile)],
        **{
            f"stages/{n}-{stage}": [stage_job(profile, stage, plan=plan)]
            for n, stage in enumerate(STAGES, start=1)
            if plan or stage == "plan"
        },
    }
    return {
        f"{name}.yaml": yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)
        for name, documents in resources.items()
    }


class _Dumper(yaml.SafeDumper):
    """Writes what stands in two places twice, and texts line by line: people read it."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _worker(profile: Profile, env: list[Manifest]) -> Manifest:
    arguments = [
        "worker",
        "--nthreads=1",  # one tile at a time; its threads are the pod's CPUs
        "--nworkers=1",
        f"--memory-limit={int(profile.worker.mem_gb * 1e9)}",
        f"--local-directory={_SCRATCH}",
        "--name=$(DASK_WORKER_NAME)",
        f"--worker-port={_WORKER_PORT}",
        f"--nanny-port={_NANNY_PORT}",
        f"--dashboard-address=:{_WORKER_HTTP}",
    ]
    return {
        **_container(profile, "worker", gpus=profile.worker.gpus),
        "command": ["dask"],
        "args": arguments,
        "env": env,
        "ports": [{"name": "http", "containerPort": _WORKER_HTTP}],
        "readinessProbe": _health(period_s=15, failures=4),
        # a tile may hold the interpreter for minutes; the runner's deadline ends it sooner than this does
        "livenessProbe": _health(period_s=60, failures=20),
    }


def _scheduler(profile: Profile, env: list[Manifest]) -> Manifest:
    # not part of the command: whoever connects to a cluster that is there already looks for its scheduler's `args`
    arguments = [
        "scheduler",
        f"--port={_SCHEDULER_PORT}",
        f"--dashboard-address=:{_SCHEDULER_HTTP}",
    ]
    return {
        **_container(profile, "scheduler", amounts=_amounts(cpus=1, mem_gb=2.0)),
        "command": ["dask"],
        "args": arguments,
        "env": env,
        "ports": [
            {"name": "comm", "containerPort": _SCHEDULER_PORT},
            {"name": "http", "containerPort": _SCHEDULER_HTTP},
        ],
        "readinessProbe": _health(period_s=5, failures=3),
        "livenessProbe": _health(period_s=30, failures=6),
    }


def _service(name: str) -> Manifest:
    # names by which dask-kubernetes asks; the operator's definition takes no number for a target
    ports = (("tcp-comm", _SCHEDULER_PORT, "comm"), ("http-dashboard", _SCHEDULER_HTTP, "http"))
    return {
        "type": "ClusterIP",
        "selector": {"dask.org/cluster-name": name, "dask.org/component": "scheduler"},
        "ports": [
            {"name": key, "protocol": "TCP", "port": port, "targetPort": target}
            for key, port, target in ports
        ],
    }


def _slidecube(profile: Profile, arguments: Iterable[str], *, gpus: int = 0) -> Manifest:
    """Container of our own command, which is told to end early before it is made to."""
    wait_s = profile.options["drain_s"] - 30
    return {
        **_container(profile, "slidecube", gpus=gpus),
        "args": list(arguments),
        "env": _home(),
        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", f"kill -USR1 1; sleep {wait_s}"]}}},
    }


def _container(
    profile: Profile,
    name: str,
    *,
    gpus: int = 0,
    amounts: dict[str, str] | None = None,
) -> Manifest:
    options, worker = profile.options, profile.worker
    amounts = amounts or _amounts(cpus=worker.cpus, mem_gb=worker.mem_gb + _BESIDE_GB, gpus=gpus)
    amounts["ephemeral-storage"] = f"{options['scratch_gb']:g}G"
    container: Manifest = {
        "name": name,
        "image": _image(profile),
        "resources": {"requests": amounts, "limits": amounts},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "scratch", "mountPath": _SCRATCH}],
    }
    if name == "slidecube":
        container["volumeMounts"].append({"name": "config", "mountPath": _CONFIG, "readOnly": True})
    if options["secret"]:
        container["envFrom"] = [{"secretRef": {"name": options["secret"]}}]
    return container


def _pod(profile: Profile, container: Manifest, *, token: bool = False) -> Manifest:
    """Spec of a pod; token : it may ask the API server."""
    options = profile.options
    pod: Manifest = {
        "automountServiceAccountToken": token,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": options["drain_s"],
        "containers": [container],
        "volumes": [_scratch(profile)],
    }
    if options["service_account"]:
        pod["serviceAccountName"] = options["service_account"]
    if options["node_selector"]:
        pod["nodeSelector"] = dict(options["node_selector"])
    if _GPU in container["resources"]["limits"]:
        # nodes with GPUs are often kept free of all else by this taint
        pod["tolerations"] = [{"key": _GPU, "operator": "Exists", "effect": "NoSchedule"}]
    return pod


def _job(profile: Profile, verb: str, pod: Manifest) -> Manifest:
    """Job of a verb: what ended early or lost its node goes on, whatever else failed is tried again a few times."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(profile, f"{profile.options['name']}-{verb}"),
        "spec": {
            "backoffLimit": _RETRIES,
            "podReplacementPolicy": "Failed",  # two of one shard would stand in each other's way
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "Ignore",
                        "onExitCodes": {
                            "containerName": "slidecube",
                            "operator": "In",
                            "values": [_DRAINED],
                        },
                    },
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                ]
            },
            "ttlSecondsAfterFinished": 7 * 86400,
            "template": {
                "metadata": {"labels": _labels(profile, verb)},
                "spec": {"restartPolicy": "Never", **pod},
            },
        },
    }


def _policy(profile: Profile, name: str, labels: dict[str, str], **rules: list[Manifest]) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(profile, name),
        "spec": {
            "podSelector": {"matchLabels": labels},
            "policyTypes": [direction.capitalize() for direction in rules],
            **rules,
        },
    }


def _metadata(profile: Profile, name: str) -> Manifest:
    return {
        "name": name,
        "namespace": profile.options["namespace"],
        "labels": {
            "app.kubernetes.io/name": "slidecube",
            "app.kubernetes.io/instance": profile.options["name"],
        },
    }


def _labels(profile: Profile, verb: str = "") -> dict[str, str]:
    """Labels of the pods of a run: the operator gives its own the first one."""
    labels = {"dask.org/cluster-name": profile.options["name"]}
    return {**labels, "app.kubernetes.io/component": verb} if verb else labels


def _image(profile: Profile) -> str:
    image: str = profile.options["image"]
    if not image:
        raise ClusterError(
            f"Profile {profile.name!r} names no image; build deploy/Dockerfile, push it to your registry, and set "
            'image in the [kubernetes] table of a TOML that begins with extends = "kubernetes"'
        )
    return image


def _amounts(*, cpus: int, mem_gb: float, gpus: int = 0) -> dict[str, str]:
    amounts = {"cpu": str(cpus), "memory": f"{round(mem_gb * 1000)}M"}
    return amounts | ({_GPU: str(gpus)} if gpus else {})


def _health(*, period_s: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": period_s,
        "timeoutSeconds": min(period_s, 10),
        "failureThreshold": failures,
    }


def _scratch(profile: Profile) -> Manifest:
    return {"name": "scratch", "emptyDir": {"sizeLimit": f"{profile.options['scratch_gb']:g}G"}}


def _config(profile: Profile, *more: str) -> Manifest:
    names = (f"{profile.options['name']}-run", *more)
    return {"name": "config", "projected": {"sources": [{"configMap": {"name": name}} for name in names]}}


def _home() -> list[Manifest]:
    return [{"name": "HOME", "value": _SCRATCH}]  # where libraries keep their caches


def _settings(settings: Mapping[str, Any]) -> list[Manifest]:
    """Dask's settings as it reads them from the environment."""
    return [
        {"name": "DASK_" + key.upper().replace(".", "__").replace("-", "_"), "value": str(value)}
        for key, value in settings.items()
    ]


def _tcp(*ports: int) -> list[Manifest]:
    return [{"protocol": "TCP", "port": port} for port in ports]
