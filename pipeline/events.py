"""Events: what happened in a run, one JSON a line, written by the driver alone."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from slidecube.pipeline.storage import ObjectPath, Place, below, matching, read_many, write_atomic

GIVEN_UP = frozenset({"worker", "deadline"})
"""Faults of a task that its driver gave up while a worker may go on with it."""

_LINES, _EVERY_S = 500, 2.0
"""Lines of an object of events in a bucket, and how often it is written."""


_kept: dict[Path, list[str]] = {}
"""Lines that a full disk did not take: they are written before the next one, when there is room."""


def write_event(path: Place, event: str, **fields: Any) -> None:
    """Append an event; a full disk takes none now, and the task that meets it says so itself."""
    now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False)
    if isinstance(path, ObjectPath):
        _segment_of(path).add(line, at_once=event != "task")
        return
    lines = _kept.setdefault(path, [])
    lines.append(line)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while lines:
            _append(path, lines[0])
            del lines[0]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _append(path: Path, line: str) -> None:
    with path.open("a+b") as file:
        if file.tell():  # a killed driver, or a full disk, may have left half a line
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


class _Segment:
    """Events of this process in a bucket, which cannot append: an object of some lines after another.

    The one in work is written again with each line that must not be lost, and every few seconds. Tasks that were not
    told when a driver is killed are told by the next one, from their records.
    """

    def __init__(self, folder: ObjectPath) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.place = folder
        self.written_s = 0.0
        self.lock = threading.Lock()

    def add(self, line: str, *, at_once: bool) -> None:
        with self.lock:
            if not self.lines:
                # numbered, not timed: the clock may have been set back since the driver before us
                last = max((path.name for path in matching(self.folder, "*.jsonl")), default="0")
                number = int(last.partition("-")[0]) + 1
                self.place = self.folder / f"{number:08d}-{secrets.token_hex(4)}.jsonl"
            self.lines.append(f"{line}\n")
            full = len(self.lines) >= _LINES
            if at_once or full or time.monotonic() - self.written_s > _EVERY_S:
                write_atomic(self.place, "".join(self.lines))
                self.written_s = time.monotonic()
            if full:
                self.lines = []


@lru_cache(maxsize=16)
def _segment_of(path: ObjectPath) -> _Segment:
    return _Segment(path)


def read_events(path: Place) -> Iterator[dict[str, Any]]:
    """Yield the events of a file, in order, without the halves of lines that a killed driver left."""
    contents = read_many(matching(path, "*.jsonl")) if isinstance(path, ObjectPath) else read_many([path])
    lines = (
        line for content in contents for line in (content or b"").decode("utf-8", "replace").splitlines()
    )
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"time", "event"} <= set(event):
            yield event


def event_files(folder: Place, run: str) -> list[Place]:
    """List the files of a run's events, of its drivers and of its shards. folder : of all events."""
    found = {below(path, folder).split("/")[0] for path in matching(folder, "*.jsonl", "*/*.jsonl")}
    return [folder / name for name in sorted(found) if name.startswith(f"{run}.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """Drivers of a run whose work may not have been told.

    begun : drivers since the run last came to its end; suspects : those, and all that gave up a task before that end
    told : of the suspects, (driver, key of a task, whether it was finished)
    """

    begun: frozenset[str]
    suspects: frozenset[str]
    told: frozenset[tuple[str, str, bool]]


def unfinished(path: Place) -> Unfinished:
    """Tell which drivers may have left work of which nothing was told.

    A task that is given up with its worker may be finished by it all the same, until the driver's end.
    """
    told, begun, gave_up = set[tuple[str, str, bool]](), set[str](), set[str]()
    for event in read_events(path):
        if event["event"] == "run_started":
            begun.add(event["driver"])
        elif event["event"] == "task":
            finished = event["status"] != "failed"
            told.add((event["driver"], event["key"], finished))
            if event["fault"] in GIVEN_UP:
                gave_up.add(event["driver"])
        elif event["event"] == "run_ended":  # which told first what those before it could not
            told = {entry for entry in told if entry[0] in gave_up}
            begun.clear()
    return Unfinished(begun=frozenset(begun), suspects=frozenset(begun | gave_up), told=frozenset(told))
