"""How fast a run goes: tiles a minute out of its last events, and when it will be through at that pace."""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slidecube.pipeline.storage import Place, matching, read_many

WINDOW_S = 15 * 60
"""Over so long the pace is taken: a tile takes minutes, and a nation's weather of queues changes within the hour."""

_TAIL_BYTES = 1 << 20
_TAIL_OBJECTS = 12
"""So much is read of a driver's events, in a bucket by objects of at most 500 lines: thousands of tiles."""


def pace(folder: Place, run: str, *, now: dt.datetime | None = None) -> dict[str, float]:
    """Tiles a minute by stage over the last `WINDOW_S`, of a run and all its shards; {} when nothing was done.

    folder : of the events; now : UTC
    """
    now = now or dt.datetime.now(dt.UTC)
    first, counts = now, Counter[str]()
    for event in _latest(folder, run):
        when = dt.datetime.fromisoformat(event["time"])
        if not 0 <= (now - when).total_seconds() <= WINDOW_S:  # of the future, when the clock was set back
            continue
        if event["event"] in {"task", "stage_started"}:
            first = min(first, when)
        if event["event"] == "task" and event["status"] != "failed":
            counts[event["stage"]] += 1
    minutes = max((now - first).total_seconds(), 1.0) / 60
    return {stage: round(n / minutes, 2) for stage, n in counts.items()}


def _latest(folder: Place, run: str) -> Iterator[dict[str, Any]]:
    """Yield the last events of a run's files; of a nation's the whole would take long to read."""
    for path in matching(folder, f"{run}*.jsonl"):
        if path.name.removeprefix(run)[0] != ".":
            continue
        for line in _tail(path):
            try:
                event = json.loads(line)
            except ValueError:  # cut in half, by us or by a killed driver
                continue
            if isinstance(event, dict) and {"time", "event"} <= set(event):
                yield event


def _tail(path: Place) -> list[str]:
    if not isinstance(path, Path):
        newest = matching(path, "*.jsonl")[-_TAIL_OBJECTS:]
        contents = b"\n".join(content or b"" for content in read_many(newest))
        return contents.decode("utf-8", errors="replace").splitlines()
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace").splitlines()
