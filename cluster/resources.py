"""What a worker has."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

import psutil

from slidecube.cluster.errors import ClusterError


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

    name : of the file in `profiles/`; runner : "threads" or "dask-local"; workers : tiles in work at once
    worker : resources of each
    """

    name: str
    runner: str
    workers: int
    worker: Resources


def cores() -> int:
    """Cores that this process may use, as its affinity says, not as the machine counts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_profile(
    name: str,
    *,
    workers: int | None = None,
    threads_per_worker: int | None = None,
    mem_gb: float | None = None,
) -> Profile:
    """Read a profile and fill in what it leaves open from this machine.

    Raises ClusterError for an unknown name.
    """
    folder = resources.files("slidecube.cluster") / "profiles"
    known = sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))
    if name not in known:
        raise ClusterError(f"No cluster profile {name!r}; profiles: {', '.join(known)}")
    table: dict[str, Any] = tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
    n = workers or table.get("workers") or (cores() if table["runner"] == "dask-local" else 1)
    # threads of one tile = cores / workers, never more: two tiles with two threads each were 21 times slower
    threads = threads_per_worker or table.get("threads_per_worker") or max(1, cores() // n)
    memory = mem_gb or table.get("mem_gb") or round(0.8 * psutil.virtual_memory().total / 1e9 / n, 1)
    return Profile(
        name=name, runner=table["runner"], workers=n, worker=Resources(cpus=threads, mem_gb=memory)
    )
