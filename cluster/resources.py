"""Profiles: where a run works, how wide, and what each worker has."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
from pydantic import Field

from slidecube.cluster import limits
from slidecube.cluster.errors import ClusterError

Kind = Literal[
    "threads", "dask-local", "dask-cuda", "dask-address", "dask-jobqueue", "dask-kubernetes", "array"
]
System = Literal["slurm", "pbs", "lsf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one worker may use.

    cpus : threads of one tile; mem_gb : memory of one worker process; gpus : devices; time_min : walltime, 0 = none
    """

    cpus: int
    mem_gb: float
    gpus: int = 0
    time_min: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Where and how wide a run is.

    name : of its file; runner : what starts the workers; workers : tiles in work at once; worker : resources of each
    deadline_min : how long one tile may take, None = as long as it likes
    backend, dtype : by which networks detect where [detect] leaves it open, "" = its own defaults
    options : of the runner's own table in the file, such as [jobqueue]
    """

    name: str
    runner: str
    workers: int
    worker: Resources
    deadline_min: float | None = None
    backend: str = ""
    dtype: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


class _Table(pydantic.BaseModel):
    """A table of a profile: unknown keys are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class JobQueue(_Table):
    """Dask workers as jobs of a batch system."""

    system: System
    queue: str = ""
    account: str = ""
    interface: str = ""
    scratch: str = ""
    logs: str = ""
    wait_min: float = Field(60.0, gt=0)
    prologue: tuple[str, ...] = ()
    directives: tuple[str, ...] = ()


class Kubernetes(_Table):
    """A run as pods: of the Dask operator, or without Dask as one Job a stage.

    name : of the cluster, and before the names of all else; image : with slidecube and dask-kubernetes in it
    secret : whose entries become environment variables, such as an object store's keys
    scratch_gb : of each pod's own disk; egress_ports : of catalogues and object stores
    shards : pods of a stage without Dask, 0 = as many as workers; drain_s : that a pod may take to end
    """

    name: str = Field("slidecube", pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")
    image: str = ""
    namespace: str = "default"
    service_account: str = ""
    secret: str = ""
    node_selector: dict[str, str] = Field(default_factory=dict)
    wait_min: float = Field(15.0, gt=0)
    scratch_gb: float = Field(20.0, gt=0)
    egress_ports: tuple[int, ...] = (443,)
    shards: int = Field(0, ge=0)
    drain_s: int = Field(300, ge=60)


class StageRequest(_Table):
    """What one job of a stage asks for.

    runner : of its workers, "" = processes on its CPUs or, where it has GPUs, one a GPU
    """

    cpus: int = Field(4, ge=1)
    mem_gb: float = Field(16.0, gt=0)
    gpus: int = Field(0, ge=0)
    time_min: int = Field(240, ge=1)
    shards: int = Field(1, ge=1)
    at_once: int = Field(0, ge=0)
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    directives: tuple[str, ...] = ()
    runner: Literal["", "threads", "dask-local", "dask-cuda"] = ""


class Array(_Table):
    """A long run as arrays of jobs, each of which takes its share of the tiles.

    max_array_size : of the site, when its scheduler does not tell; drain_s : before the walltime nothing new is begun
    max_restarts : how often a job that met its walltime is queued again; prologue : lines of shell before the work
    command : words that start slidecube on a node, such as a container's; () = as it is installed here
    scratch : folder for temporary files on a node's own disk, "" = its TMPDIR; the shell's variables may stand in it
    """

    system: Literal["slurm", "pbs"]
    max_array_size: int = Field(1000, ge=1)
    drain_s: int = Field(300, ge=10)
    max_restarts: int = Field(50, ge=0)
    prologue: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    scratch: str = ""
    cube: StageRequest = Field(default_factory=StageRequest)
    fit: StageRequest = Field(default_factory=StageRequest)
    detect: StageRequest = Field(default_factory=StageRequest)
    mosaic: StageRequest = Field(default_factory=StageRequest)


class ProfileFile(_Table):
    """What a profile's TOML holds."""

    extends: str = ""
    runner: Kind
    workers: int | None = Field(None, ge=1)
    threads_per_worker: int | None = Field(None, ge=1)
    mem_gb: float | None = Field(None, gt=0)
    gpus: int = Field(0, ge=0)
    time_min: int = Field(0, ge=0)
    deadline_min: float | None = Field(240.0, gt=0)
    address: str = ""
    wait_min: float = Field(10.0, gt=0)
    backend: Literal["", "torch", "compile", "onnx"] = ""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    jobqueue: JobQueue | None = None
    kubernetes: Kubernetes | None = None
    array: Array | None = None

    @pydantic.model_validator(mode="after")
    def _whole(self) -> ProfileFile:
        for runner, key in _OWN_TABLE.items():
            if (self.runner == runner) != bool(getattr(self, key)):
                what = "is missing" if self.runner == runner else f"is of runner {runner!r} alone"
                raise ValueError(f"{key} {what}, and this profile's runner is {self.runner!r}")
        return self

    @pydantic.field_validator("address")
    @classmethod
    def _address(cls, text: str) -> str:
        if text and not _ADDRESS.fullmatch(text):
            raise ValueError(
                "not the address of a scheduler; allowed: tcp://host:port, such as tcp://10.0.0.5:8786"
            )
        return text


_ADDRESS = re.compile(r"((tcp|tls|wss?|ucxx?)://)?([\w.-]+|\[[\w:.%]+\]):[0-9]{1,5}")
_OWN_TABLE = {
    "dask-address": "address",
    "dask-jobqueue": "jobqueue",
    "dask-kubernetes": "kubernetes",
    "array": "array",
}
_ELSEWHERE = ("dask-address", "dask-jobqueue", "dask-kubernetes")


def profiles() -> dict[str, Path]:
    """Profiles by name with their files: those that come with slidecube, and the user's own, which win."""
    folders = [Path(str(resources.files("slidecube.cluster"))) / "profiles", own_profiles()]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def own_profiles() -> Path:
    """Folder of the user's own profiles."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "slidecube" / "profiles"


def load_profile(
    name: str,
    *,
    base: Path | None = None,
    workers: int | None = None,
    threads_per_worker: int | None = None,
    mem_gb: float | None = None,
) -> Profile:
    """Read a profile and fill in what it leaves open from this machine, as far as this process may use it.

    name : of a profile, or the path of a TOML, from the folder `base`
    workers, threads_per_worker, mem_gb : in place of the profile's
    Raises ClusterError for an unknown name, an unreadable file, and a key or value that is not allowed.
    """
    file = read_profile(name, base=base)
    n = workers or file.workers or (limits.cores() if file.runner == "dask-local" else _gpus(file) or 1)
    elsewhere = file.runner in _ELSEWHERE
    # threads of one tile = cores / workers, never more: two tiles with two threads each were 21 times slower
    threads = (
        threads_per_worker or file.threads_per_worker or (1 if elsewhere else max(1, limits.cores() // n))
    )
    here_gb = round(0.8 * limits.memory_gb() / n, 1)
    memory = mem_gb or file.mem_gb or (4.0 if elsewhere else here_gb)
    own = _OWN_TABLE.get(file.runner, "")
    table = getattr(file, own) if own else None
    options = {"address": table, "wait_min": file.wait_min} if own == "address" else {}
    if isinstance(table, pydantic.BaseModel):
        options = table.model_dump()
    return Profile(
        name=name,
        runner=file.runner,
        workers=n,
        worker=Resources(cpus=threads, mem_gb=memory, gpus=file.gpus, time_min=file.time_min),
        deadline_min=file.deadline_min,
        backend=file.backend,
        dtype=file.dtype,
        options=options,
    )


def read_profile(name: str, *, base: Path | None = None) -> ProfileFile:
    """Read and check a profile's file, with what it extends."""
    path, table = _tables(name, base, ())
    try:
        return ProfileFile.model_validate(table)
    except pydantic.ValidationError as error:
        raise ClusterError(f"Profile {path}: {_refusal(error)}") from None


def _tables(name: str, base: Path | None, seen: tuple[Path, ...]) -> tuple[Path, dict[str, Any]]:
    """Tables of a profile over those of the one that it extends."""
    path = _find(name, base)
    if path in seen:
        raise ClusterError(f"Profile {path} extends itself; name another one in extends")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ClusterError(f"Profile {path} cannot be read: {' '.join(str(error).split())}") from None
    below = table.get("extends")
    if not isinstance(below, str) or not below:
        return path, table
    return path, _merged(_tables(below, path.parent, (*seen, path))[1], table)


def _find(name: str, base: Path | None) -> Path:
    if name.endswith(".toml"):
        path = (base or Path.cwd()) / Path(name).expanduser()
        if not path.is_file():
            raise ClusterError(
                f"No profile file {path}; name a TOML, or one of {', '.join(sorted(profiles()))}"
            )
        return path.resolve()
    known = profiles()
    if name not in known:
        raise ClusterError(
            f"No cluster profile {name!r}; profiles: {', '.join(sorted(known))}; your own are TOML files in "
            f"{own_profiles()}, or named by their path"
        )
    return known[name]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key: value for key, value in below.items() if key not in above} | above
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            both[key] = _merged(below[key], value)
    return both


def _refusal(error: pydantic.ValidationError) -> str:
    """Say in one line what is wrong with the first key."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "it"
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}; allowed: {', '.join(_allowed(first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "literal_error" and first["loc"] == ("runner",):
        return f"runner: got {first['input']!r}; allowed: {', '.join(get_args(Kind))}"
    got = f", got {first['input']!r}" if not isinstance(first["input"], dict) else ""
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{got}"


def _allowed(where: tuple[int | str, ...]) -> list[str]:
    kind: type[pydantic.BaseModel] = ProfileFile
    for part in where:
        annotation = kind.model_fields[str(part)].annotation
        inner = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type)]
        kind = next(t for t in inner if issubclass(t, pydantic.BaseModel))
    return list(kind.model_fields)


def _gpus(file: ProfileFile) -> int | None:
    """GPUs that this machine shows, for one worker each."""
    if file.runner != "dask-cuda":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return len([device for device in visible.split(",") if device.strip()])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or None
