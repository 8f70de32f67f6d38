"""Progress as it is told to a log and to a terminal."""

from __future__ import annotations

import io
import re

import pytest

from slidecube.pipeline import progress as progress_module
from slidecube.pipeline.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def told(say: io.StringIO) -> list[tuple[int, int]]:
    """Percentages and counts of the lines."""
    text = say.getvalue()
    assert "\r" not in text
    assert not text or text.endswith("\n")
    found = [re.fullmatch(r" *\w+: +(\d+)% (\d+)/\d+ tiles \[.*\]", line) for line in text.splitlines()]
    assert all(found), text
    return [(int(line[1]), int(line[2])) for line in found if line]


def test_a_log_holds_a_line_at_each_tenth(clock):
    with progress(say := io.StringIO(), desc="cube", unit="tile", total=1000) as bar:
        for _ in range(1000):
            bar.update()
    assert told(say) == [(10 * k, 100 * k) for k in range(1, 11)]


def test_a_log_holds_a_line_a_minute_where_a_tenth_takes_longer(clock):
    with progress(say := io.StringIO(), desc="cube", unit="tile", total=1000) as bar:
        for _ in range(90):
            clock[0] += 2.0
            bar.update()
    assert told(say) == [(3, 30), (6, 60), (9, 90)]
    assert "[03:00<30:20,  2.00s/tile]" in say.getvalue()


def test_what_was_done_before_an_end_is_told(clock):
    say = io.StringIO()

    def work() -> None:
        with progress(say, desc="cube", unit="tile", total=1000) as bar:
            bar.update(7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert told(say) == [(1, 7)]


def test_nothing_is_said_before_the_work_begins(clock):
    with progress(say := io.StringIO(), desc="train", unit="tile") as bar:
        assert not say.getvalue()
        bar.reset(4)
        bar.update(4)
    assert told(say) == [(100, 4)]
    with progress(say := io.StringIO(), desc="train", unit="tile"):
        pass
    assert not say.getvalue()


def test_a_terminal_has_a_bar():
    with progress(say := Terminal(), desc="cube", unit="tile", total=3) as bar:
        bar.update(3)
    assert say.getvalue().count("\r") > 1
    assert say.getvalue().count("\n") == 1
