"""Which drivers of a workspace are at work, as far as it can be seen from here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from slidecube.pipeline.lock import BEAT_S, SILENT_S, alive, elsewhere, read_locks
from slidecube.pipeline.storage import Place, modified_s

_BEATS = 3
"""So many beats are waited for, where a lock's time says that its driver is silent: clocks of machines differ."""


@dataclass(slots=True)
class _Seen:
    """A heartbeat as it was seen last; since_s : when it began to be this one, by our monotonic clock."""

    beat: tuple[str, int]
    since_s: float
    silent: bool = False


class Drivers:
    """Drivers of a workspace over one look, or many.

    Of one on this machine the process is there or not. Of one elsewhere the heartbeat tells: it changes, or it was the
    same for `SILENT_S` of ours, or its file is as old and nothing comes while a few beats are waited for.
    """

    def __init__(self) -> None:
        self._held: dict[Place, dict[str, Any]] = {}
        self._seen: dict[Place, _Seen] = {}

    def look(self, folder: Place) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the locks of drivers at work, and of silent ones, these with their "silent_s".

        folder : of the locks. Takes a few seconds where an old lock of another machine is seen first.
        """
        known = set(self._seen)
        new = set(self._read(folder)) - known
        doubtful = {place: age_s for place in new if (age_s := _doubt(place)) is not None}
        deadline_s = time.monotonic() + _BEATS * BEAT_S
        while doubtful.keys() & self._seen.keys() and time.monotonic() < deadline_s:
            time.sleep(BEAT_S / 4)
            for place in self._read(folder):  # it beats
                doubtful.pop(place, None)
        for place in doubtful.keys() & self._seen.keys():
            self._seen[place].silent = True
            self._seen[place].since_s -= doubtful[place]
        now_s, at_work, silent = time.monotonic(), list[dict[str, Any]](), list[dict[str, Any]]()
        for place, lock in self._held.items():
            seen = self._seen.get(place)
            if seen is not None and (seen.silent or now_s - seen.since_s > SILENT_S):
                silent.append({**lock, "silent_s": round(now_s - seen.since_s)})
            else:
                at_work.append(lock)
        return at_work, silent

    def _read(self, folder: Place) -> list[Place]:
        """Read the locks; returns those elsewhere whose heartbeat is another one than before."""
        self._held = {place: lock for place, lock in read_locks(folder).items() if alive(lock)}
        beats = {p: (lock["token"], lock["beat"]) for p, lock in self._held.items() if elsewhere(lock)}
        changed = [p for p, beat in beats.items() if p not in self._seen or self._seen[p].beat != beat]
        self._seen = {place: seen for place, seen in self._seen.items() if place in beats}
        self._seen |= {place: _Seen(beat=beats[place], since_s=time.monotonic()) for place in changed}
        return changed


def _doubt(place: Place) -> float | None:
    """Seconds since a lock was written; None where that is lately, and so by somebody at work.

    A time to come tells of a clock ahead of ours, and nothing else.
    """
    written_s = modified_s(place)
    age_s = 0.0 if written_s is None else time.time() - written_s
    return max(age_s, 0.0) if abs(age_s) > SILENT_S else None
