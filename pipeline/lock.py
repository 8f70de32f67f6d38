"""Who may write into a workspace: locks with a heartbeat, and a fence for what a dead driver left running.

A driver holds the workspace alone. The shards of a stage hold it side by side, each by a lock of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from slidecube.pipeline.errors import IncompleteError, InUseError, PipelineError
from slidecube.pipeline.storage import Place, create, guard, names, pid_space, read_tagged, release, swap

BEAT_S = 2.0
SILENT_S = 20.0
"""A driver on another machine whose beat has not changed for so long is taken for dead; clocks are not compared."""

_FIELDS = {
    "token",
    "run",
    "shard",
    "job",
    "restarts",
    "host",
    "machine",
    "pid",
    "started",
    "beat",
    "running",
    "dashboard",
}


DRIVER = "driver.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One of the parts into which the tiles of a stage are dealt.

    index : from 0; count : of all
    """

    stage: str
    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count} of {self.stage}"

    @property
    def slug(self) -> str:
        """Name for files."""
        return f"{self.stage}-{self.index}of{self.count}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job of a batch system that may be started again, and how often it was: an earlier start of it is gone."""

    name: str = ""
    restarts: int = 0


class Lock:
    """The right to write into a workspace.

    A second driver is refused while the first one lives, and so is the same shard twice, a driver beside shards,
    and shards of another number or another run: those may hold another list of scenes for the same tile. A dead one
    is taken over: at once when it ran on this machine (its process is gone) or when its batch system has started
    its job again, after `SILENT_S` without a heartbeat when it ran elsewhere. Work that a dead driver left running
    is fenced: `holds` says no to its token before it writes.
    """

    def __init__(
        self,
        folder: Place,
        *,
        run: str,
        shard: Shard | None = None,
        job: Job | None = None,
        patience_s: float = 0.0,
    ) -> None:
        """Prepare a lock. patience_s : how long to wait for one that somebody holds who is alive."""
        self.path = folder / (DRIVER if shard is None else f"shard-{shard.slug}.json")
        self.token = secrets.token_hex(8)
        self._run = run
        self._shard = shard
        self._job = job or Job()
        self._patience_s = patience_s
        self._beat = 0
        self._running = 0
        self._dashboard = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Take the lock; raises InUseError when somebody else holds the workspace."""
        until = time.monotonic() + self._patience_s
        while True:
            try:
                self._acquire()
                break
            except InUseError:
                if time.monotonic() >= until:
                    raise
            time.sleep(BEAT_S / 2)
        self._thread = threading.Thread(target=self._keep, name="slidecube-heartbeat", daemon=True)
        self._thread.start()
        return self

    def _acquire(self) -> None:
        seen: dict[Place, tuple[tuple[str, int], float]] = {}  # whose beat, and since when it is the same
        while True:
            found = read_tagged(self.path)
            others = self._in_the_way()
            now = time.monotonic()
            for path, (other, _) in others.items():
                beat = (other["token"], other["beat"])
                earlier, since = seen.setdefault(path, (beat, now))
                if beat != earlier:
                    raise InUseError(self._refusal(other))
                if now - since <= SILENT_S:
                    break
            else:
                if self._take(found, {path: tag for path, (_, tag) in others.items()}):
                    return
                continue  # another driver was faster
            time.sleep(BEAT_S / 2)

    def _in_the_way(self) -> dict[Place, tuple[dict[str, Any], str]]:
        """Locks that exclude ours and are not known to be dead, with their tags.

        Of those on other machines only the heartbeat tells. Raises InUseError when one is alive for certain.
        """
        folder, found = self.path.parent, {}
        for name in names(folder):
            if name != DRIVER and not (name.startswith("shard-") and name.endswith(".json")):
                continue
            tagged = read_tagged(folder / name)
            other = None if tagged is None else _parsed(tagged[0])
            if tagged is None or other is None or not self._excludes(name, other):
                continue
            dead = self._started_again(other) or _dead(other)
            if dead is False:
                raise InUseError(self._refusal(other))
            if dead is None:
                found[folder / name] = (other, tagged[1])
        return found

    def _excludes(self, name: str, other: dict[str, Any]) -> bool:
        """Tell whether a lock excludes ours: its own, a driver's, for a driver everyone's."""
        if other["token"] == self.token:
            return False
        if name in {DRIVER, self.path.name} or self._shard is None or other["run"] != self._run:
            return True
        same_stage = name.startswith(f"shard-{self._shard.stage}-")
        return same_stage and not name.endswith(f"of{self._shard.count}.json")

    def _started_again(self, other: dict[str, Any]) -> bool:
        """Tell whether a lock is of an earlier start of our own job."""
        return bool(self._job.name) and (
            other["job"] == self._job.name and other["restarts"] < self._job.restarts
        )

    def _refusal(self, other: dict[str, Any]) -> str:
        shard = f"shard {other['shard']} of " * bool(other["shard"])
        host = f"host {other['host']}" if elsewhere(other) else f"process {other['pid']} on {other['host']}"
        return (
            f"Workspace {self.path.parent.parent} is in use by {shard}run {other['run']!r} ({host}); wait for it, or "
            "stop it"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._give_back()

    def require(self) -> None:
        """Raise IncompleteError when the lock was taken over: nothing may be written any more."""
        if not holds(self.path, self.token):
            raise IncompleteError(
                f"Workspace {self.path.parent.parent} was taken over by another driver, which believed this one dead; "
                "let that one finish, or run the same command after it"
            )

    def set_running(self, n: int) -> None:
        """Say how many tasks are in work; written with the next beat."""
        self._running = n

    def set_dashboard(self, address: str) -> None:
        """Say where the workers can be watched; written with the next beat."""
        self._dashboard = address

    def _keep(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                found = read_tagged(self.path)
                if found is None or not self._mine(found[0]):
                    return  # taken over: whoever did believed us dead, and our tasks are fenced
                self._beat += 1
                swap(self.path, self._content(), found[1])
            except (OSError, PipelineError):
                continue  # a full disk or a frozen neighbour must not end the run here: the tile that meets it says so

    def _take(self, found: tuple[bytes, str] | None, silent: Mapping[Place, str]) -> bool:
        """Write the lock over what was found; returns whether nobody was faster.

        silent : locks of drivers that are believed dead, with their tags: one that speaks again meanwhile stays
        """
        if isinstance(self.path, Path):
            with guard(self.path):  # who writes holds it, too
                for stale in self.path.parent.glob(f".{self.path.name}.*.partial"):  # of a killed driver
                    stale.unlink(missing_ok=True)
        for path, tag in silent.items():
            if path != self.path:
                release(path, tag)
        if not (create(self.path, self._content()) if found is None else self._swap(found[1])):
            return False
        try:
            # a shard and a driver write two files: who was first shows only now
            others = [other for path, (other, _) in self._in_the_way().items() if path != self.path]
        except InUseError:
            self._give_back()
            raise
        if others:
            self._give_back()
            raise InUseError(self._refusal(others[0]))
        return True

    def _swap(self, tag: str) -> bool:
        return swap(self.path, self._content(), tag)

    def _give_back(self) -> None:
        found = read_tagged(self.path)
        if found is not None and self._mine(found[0]):
            release(self.path, found[1])

    def _mine(self, content: bytes) -> bool:
        held = _parsed(content)
        return held is not None and held["token"] == self.token

    def _content(self) -> bytes:
        pid = os.getpid()
        return json.dumps(
            {
                "token": self.token,
                "run": self._run,
                "shard": "" if self._shard is None else str(self._shard),
                "job": self._job.name,
                "restarts": self._job.restarts,
                "host": socket.gethostname(),
                "machine": pid_space(),
                "pid": pid,
                "started": born_s(pid),
                "beat": self._beat,
                "running": self._running,
                "dashboard": self._dashboard,
            }
        ).encode()


def read_lock(path: Place) -> dict[str, Any] | None:
    """Read who holds a lock, None when nobody does or when the file is damaged."""
    found = read_tagged(path)
    return None if found is None else _parsed(found[0])


def read_locks(folder: Place) -> dict[Place, dict[str, Any]]:
    """Read the locks of a driver and of shards by their files; damaged ones hold nothing."""
    places = [folder / name for name in names(folder) if name.endswith(".json")]
    return {place: lock for place in places if (lock := read_lock(place)) is not None}


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) and set(found) >= _FIELDS else None


def holds(path: Place, token: str) -> bool:
    """Tell whether a token still holds a lock: the fence before every write."""
    found = read_lock(path)
    return found is not None and found["token"] == token


def alive(lock: dict[str, Any] | None) -> bool:
    """Tell whether the driver of a lock is at work, as far as this machine can know."""
    return lock is not None and _dead(lock) is not True


def _dead(lock: dict[str, Any]) -> bool | None:
    """True or False for a driver of this machine, None for one elsewhere."""
    if elsewhere(lock):
        return None
    try:
        process = psutil.Process(lock["pid"])
        # a process number is used again; the time of its start tells the two apart
        same = abs(born_s(process.pid) - lock["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
    return not same


def born_s(pid: int) -> float:
    """Seconds from the machine's start to that of a process.

    psutil adds the time of day at which the machine started, which moves when the clock is set: a driver would take a
    living one for another process of the same number, and its workspace.
    Raises psutil.NoSuchProcess when there is none.
    """
    stat = Path(f"/proc/{pid}/stat")
    try:
        ticks = stat.read_bytes().rpartition(b")")[2].split()[19]  # the name before it may hold anything
    except (FileNotFoundError, ProcessLookupError):
        return float(psutil.Process(pid).create_time())  # not Linux, or gone
    return int(ticks) / os.sysconf("SC_CLK_TCK")


def elsewhere(lock: dict[str, Any]) -> bool:
    """Tell whether the driver of a lock runs where this machine cannot look: on another one, or in a container."""
    return bool(lock["host"] != socket.gethostname() or lock["machine"] != pid_space())
