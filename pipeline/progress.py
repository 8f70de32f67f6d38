"""Progress of a stage: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from typing import Any, Self, TextIO

from tqdm import tqdm

_LINE_EVERY_S = 60.0
_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} {unit}s [{elapsed}<{remaining}, {rate_fmt}]"


def progress(say: TextIO, *, desc: str, unit: str, total: int | None = None) -> Any:
    """Make a bar or lines, by what `say` is, with tqdm's `n`, `total`, `update` and `reset`.

    total : None where it shows when the work begins; nothing is said before
    """
    desc = f"{desc:>6}"
    if not say.isatty():
        return _Lines(say, desc=desc, unit=unit, total=total)
    return tqdm(
        file=say,
        desc=desc,
        unit=unit,
        total=total,
        mininterval=0.2,
        maxinterval=1.0,
        dynamic_ncols=True,
        delay=0 if total is not None else 1e-9,
    )


class _Lines:
    """A whole line at each tenth, after each minute, and at the end: a bar is one endless line in a file."""

    def __init__(self, say: TextIO, *, desc: str, unit: str, total: int | None) -> None:
        self._say, self._desc, self._unit = say, desc, unit
        self.reset(total)

    def reset(self, total: int | None) -> None:
        """Begin, with so much to do."""
        self.total, self.n = total, 0
        self._began = self._said_at = time.monotonic()
        self._said = 0

    def update(self, n: int = 1) -> None:
        """Tell that so much more is done."""
        self.n += n
        tenths = 10 * self.n // self.total > 10 * self._said // self.total if self.total else False
        if tenths or time.monotonic() - self._said_at >= _LINE_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        self._said, self._said_at = self.n, time.monotonic()
        gone_s = self._said_at - self._began
        line = tqdm.format_meter(
            self.n, self.total or self.n, gone_s, prefix=self._desc, unit=self._unit, bar_format=_LINE
        )
        print(line, file=self._say, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.n > self._said:
            self._tell()
