"""One driver a workspace: a lock with a heartbeat, and a fence for what a dead driver left running."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from slidecube.pipeline.errors import IncompleteError, PipelineError
from slidecube.pipeline.storage import write_atomic

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

    def __init__(self, folder: Path, *, run: str) -> None:
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
            with guard(self.path.with_name("guard")):
                other = read_lock(self.path)
                if other is None or _dead(other) is True:
                    self._take()
                    break
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
                with guard(self.path.with_name("guard")):
                    if read_lock(self.path) == other:
                        self._take()
                        break
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
        with guard(self.path.with_name("guard")):
            if holds(self.path, self.token):
                self.path.unlink(missing_ok=True)

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
                with guard(self.path.with_name("guard")):
                    if not holds(self.path, self.token):
                        return  # taken over: whoever did believed us dead, and our tasks are fenced
                    self._beat += 1
                    self._write()
            except OSError:  # a full disk must not end the run here: the tile that meets it says so
                continue

    def _take(self) -> None:
        for stale in self.path.parent.glob(f".{self.path.name}.*.partial"):  # of a killed driver
            stale.unlink(missing_ok=True)
        self._write()

    def _write(self) -> None:
        me = psutil.Process()
        write_atomic(
            self.path,
            json.dumps(
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
            ),
        )


def read_lock(path: Path) -> dict[str, Any] | None:
    """Read who holds a lock, None when nobody does or when the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and set(found) >= _FIELDS else None


def holds(path: Path, token: str) -> bool:
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


@contextmanager
def guard(path: Path) -> Iterator[None]:
    """Exclusive hold for the moment of looking and writing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
