"""One driver a workspace: a lock with a heartbeat, and a fence for what a dead driver left running."""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from slidecube.pipeline.errors import IncompleteError, PipelineError
from slidecube.pipeline.storage import Place, create, read_tagged, release, swap

BEAT_S = 2.0
SILENT_S = 20.0
"""A driver on another machine whose beat has not changed for so long is taken for dead; clocks are not compared."""

_FIELDS = {"token", "run", "host", "machine", "pid", "started", "beat", "running"}


class Lock:
    """The right to write into a workspace.

    A second driver is refused while the first one lives. A dead one is taken over: at once when it ran on this
    machine (its process is gone), after `SILENT_S` without a heartbeat when it ran elsewhere. Work that a dead driver
    left running is fenced: `holds` says no to its token before it writes.
    """

    def __init__(self, folder: Place, *, run: str) -> None:
        self.path = folder / "driver.json"
        self.token = secrets.token_hex(8)
        self._run = run
        self._beat = 0
        self._running = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Take the lock; raises PipelineError when another driver holds it."""
        silent_since, seen = time.monotonic(), None
        while True:
            found = read_tagged(self.path)
            other = None if found is None else _parsed(found[0])
            if other is None or _dead(other) is True:
                if self._take(found):
                    break
                continue  # another driver was faster
            if _dead(other) is False:
                raise PipelineError(
                    f"Workspace {self.path.parent.parent} is in use by run {other['run']!r} "
                    f"(process {other['pid']} on {other['host']}); wait for it, or stop it"
                )
            beat = (other["token"], other["beat"])
            if beat != seen:  # on another machine: only its heartbeat tells
                if seen is not None:
                    raise PipelineError(
                        f"Workspace {self.path.parent.parent} is in use by run {other['run']!r} on host "
                        f"{other['host']}; wait for it, or stop it"
                    )
                seen, silent_since = beat, time.monotonic()
            if time.monotonic() - silent_since > SILENT_S:
                if self._take(found):
                    break
                continue
            time.sleep(BEAT_S / 2)
        self._thread = threading.Thread(target=self._keep, name="slidecube-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        found = read_tagged(self.path)
        if found is not None and self._mine(found[0]):
            release(self.path, found[1])

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

    def _keep(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                found = read_tagged(self.path)
                if found is None or not self._mine(found[0]):
                    return  # taken over: whoever did believed us dead, and our tasks are fenced
                self._beat += 1
                swap(self.path, self._content(), found[1])
            except OSError:  # a full disk must not end the run here: the tile that meets it says so
                continue

    def _take(self, found: tuple[bytes, str] | None) -> bool:
        """Write the lock over what was found; returns whether nobody was faster."""
        if isinstance(self.path, Path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for stale in self.path.parent.glob(f".{self.path.name}.*.partial"):  # of a killed driver
                stale.unlink(missing_ok=True)
        if found is None:
            return create(self.path, self._content())
        return swap(self.path, self._content(), found[1])

    def _mine(self, content: bytes) -> bool:
        held = _parsed(content)
        return held is not None and held["token"] == self.token

    def _content(self) -> bytes:
        me = psutil.Process()
        return json.dumps(
            {
                "token": self.token,
                "run": self._run,
                "host": socket.gethostname(),
                "machine": _machine(),
                "pid": me.pid,
                "started": me.create_time(),
                "beat": self._beat,
                "running": self._running,
            }
        ).encode()


def read_lock(path: Place) -> dict[str, Any] | None:
    """Read who holds a lock, None when nobody does or when the file is damaged."""
    found = read_tagged(path)
    return None if found is None else _parsed(found[0])


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
    if lock["host"] != socket.gethostname() or lock["machine"] != _machine():
        return None
    try:
        process = psutil.Process(lock["pid"])
        # a process number is used again; the time of its start tells the two apart
        same = abs(process.create_time() - lock["started"]) < 5 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
    return not same


@lru_cache(maxsize=1)
def _machine() -> str:
    """Say in which space process numbers mean something: containers and reboots share a host's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""
