"""Events: what happened in a run, one JSON a line, written by the driver alone."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import secrets
from collections.abc import Iterator
from typing import Any

from slidecube.pipeline.storage import ObjectPath, Place, matching, write_atomic


def write_event(path: Place, event: str, **fields: Any) -> None:
    """Append an event; a full disk takes none, and the task that meets it says so itself."""
    now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False)
    if isinstance(path, ObjectPath):
        write_atomic(path / f"{now}-{secrets.token_hex(4)}.jsonl", line + "\n")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():  # a killed driver, or a full disk, may have left half a line
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def read_events(path: Place) -> Iterator[dict[str, Any]]:
    """Yield the events of a file, in order, without the halves of lines that a killed driver left."""
    if isinstance(path, ObjectPath):
        for part in matching(path, "*.jsonl"):
            yield json.loads(part.read_text())
        return
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"time", "event"} <= set(event):
            yield event


def unfinished(path: Place) -> tuple[set[str], str]:
    """Tell what the runs of a plan told of, and since when one of them did not end.

    Returns the keys of the tasks, and ISO text of whole seconds, "" when the last run ended or there was none.
    """
    told: set[str] = set()
    started = ""
    for event in read_events(path):
        if event["event"] == "run_started":
            started = started or event["time"][: len("2026-01-01T00:00:00")]
        elif event["event"] == "task":
            told.add(event["key"])
        elif event["event"] == "run_ended":
            started = ""
    return told, started
