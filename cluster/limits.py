"""Memory and cores that this process may use, as the system, its affinity and its control groups say.

A container, a job of a batch system and a service are held by control groups, which the totals of the machine know
nothing of: memory beyond a group's limit ends the process, and threads beyond its quota wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

_MEMORY = ("memory.max", "memory.high", "memory.limit_in_bytes")  # version 2, and version 1
_USED = ("memory.current", "memory.usage_in_bytes")
_CACHE = ("inactive_file", "total_inactive_file")  # is given back when memory is asked for


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: of its affinity, and the whole ones of its groups' quotas.

    root : of the file system with `proc` and `sys`
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for group in _groups("cpu", root) if (quota := _quota(group)) is not None]
    return max(1, int(min([usable, *quotas])))


def memory_gb(root: Path = Path("/")) -> float:
    """Memory that this process may use: the machine's, or less where a group says so."""
    limits = [limit for group in _groups("memory", root) if (limit := _limit(group)) is not None]
    return min([psutil.virtual_memory().total, *limits]) / 1e9


def free_memory_gb(root: Path = Path("/")) -> float:
    """What of it is free now, in the machine and in each group with a limit."""
    free = [psutil.virtual_memory().available]
    for group in _groups("memory", root):
        limit, used = _limit(group), _first(group, _USED)
        if limit is not None and used is not None:
            free.append(limit - used + _cached(group))
    return max(0, min(free)) / 1e9


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the groups that hold this process, from its own up to the outermost that can be seen."""
    held = _held(root)
    for mount, inside, options in _mounts(root):
        name = held.get(controller if controller in options else "")
        if name is None:
            continue
        below = name.relative_to(inside) if name.is_relative_to(inside) else PurePosixPath("..")
        if ".." in below.parts:  # a container is shown its own group as the outermost, by a name from outside
            below = PurePosixPath()
        yield from (root / mount.relative_to("/") / part for part in (below, *below.parents))


def _held(root: Path) -> dict[str, PurePosixPath]:
    """Name of this process's group by controller, and by "" where one group holds it for all (version 2)."""
    held = dict[str, PurePosixPath]()
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        held |= {controller: PurePosixPath(name) for controller in controllers.split(",")}
    return held


def _mounts(root: Path) -> Iterator[tuple[PurePosixPath, PurePosixPath, list[str]]]:
    """Where groups are shown: the folder, the group that it shows, and its options, none in version 2."""
    for line in _lines(root / "proc/self/mountinfo"):
        about, _, system = line.partition(" - ")
        kind, options = system.split()[0], system.split()[-1].split(",")
        if kind in {"cgroup", "cgroup2"}:
            inside, folder = about.split()[3:5]
            yield PurePosixPath(folder), PurePosixPath(inside), options if kind == "cgroup" else []


def _limit(group: Path) -> int | None:
    limits = [limit for name in _MEMORY if (limit := _first(group, (name,))) is not None]
    return min(limits, default=None)


def _quota(group: Path) -> float | None:
    """Cores a group may use, None when all."""
    with suppress(IndexError, ValueError, ZeroDivisionError):
        quota, period = _lines(group / "cpu.max")[0].split()
        return int(quota) / int(period)  # "max" is no number
    quota_us, period_us = _first(group, ("cpu.cfs_quota_us",)), _first(group, ("cpu.cfs_period_us",))
    return quota_us / period_us if quota_us is not None and period_us and quota_us > 0 else None


def _cached(group: Path) -> int:
    stat = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat"))
    return next((int(stat[name]) for name in reversed(_CACHE) if name in stat), 0)


def _first(group: Path, names: tuple[str, ...]) -> int | None:
    """Number in the first of some files that is there and holds one."""
    for name in names:
        with suppress(IndexError, ValueError):
            return int(_lines(group / name)[0])
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux, or not for us to read
        return []
