"""Events: what happened in a run, one JSON a line, written by the driver alone."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_event(path: Path, event: str, **fields: Any) -> None:
    """Append an event; a full disk takes none, and the task that meets it says so itself."""
    now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False)
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


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a file, in order, without the halves of lines that a killed driver left."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"time", "event"} <= set(event):
            yield event


def unfinished(path: Path) -> tuple[set[str], str]:
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
