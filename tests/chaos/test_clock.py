"""The clock is set by an hour, back and forth, between two drivers and below a living one.

Only the time of day: what counts seconds from the machine's start goes on, as it does when a real clock is set.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOUR_S = 3600


class Clock:
    """The time of day of all processes that are started from here on; `set` changes it for those that run, too."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.set(0)

    def set(self, seconds: int) -> None:
        """Set it so far off."""
        partial = self.file.with_suffix(".new")
        partial.write_text(f"{seconds:+d}")
        partial.replace(self.file)

    def told(self) -> float:
        """Seconds by which a process that starts now is off."""
        said = subprocess.run(
            [sys.executable, "-c", "import time; print(time.time())"],
            capture_output=True,
            text=True,
            check=True,
        )
        return float(said.stdout) - time.time()


@pytest.fixture
def clock(tmp_path, monkeypatch) -> Clock:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip("libfaketime, by which a test sets the clock of processes, is not on this machine")
    clock = Clock(tmp_path / "clock")
    for name, value in {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock.file),
        "FAKETIME_CACHE_DURATION": "1",  # seconds until a change of the file is noticed
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for seconds in (HOUR_S, -HOUR_S, 0):
        clock.set(seconds)
        assert clock.told() == pytest.approx(seconds, abs=5)
    return clock


def after_tasks(desk, driver, n: int) -> None:
    """Wait until a driver has told of so many tasks more."""
    before = sum(e["event"] == "task" for e in desk.events())
    deadline = time.monotonic() + 120
    while sum(e["event"] == "task" for e in desk.events()) < before + n:
        assert driver.poll() is None, "it was through before the clock was set: the test tests nothing"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status(desk) -> dict:
    """What is said of a run, by a process of its own: it makes sense, whatever the clock did."""
    said = desk.cli("status", desk.workspace, "--json")
    assert said.code == 0, said
    found = json.loads(said.out)
    assert all(pace > 0 for pace in found["pace"].values())
    assert found["minutes_left"] is None or found["minutes_left"] >= 0
    return found


def assert_refused(desk, driver) -> None:
    """A living driver keeps its workspace, and is said to be at work."""
    os.kill(driver.pid, signal.SIGSTOP)  # in no hurry
    try:
        second, state = desk.cli("run", desk.toml, "--quiet"), status(desk)
    finally:
        os.kill(driver.pid, signal.SIGCONT)
    assert second.code == 1
    assert f"process {driver.pid}" in second.refusal
    assert state["running"] == state["run"]
    assert state["drivers"] == 1


def kill(driver) -> None:
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()


def assert_whole(desk, witness) -> None:
    witness.assert_whole(desk)
    assert len({e["time"][:13] for e in desk.events()}) >= 3, "the clock was not set"


@pytest.mark.slow
def test_set_below_a_driver_and_again_before_its_successor(desk_in, tmp_path, witness, clock):
    desk = desk_in(tmp_path / "desk", **witness.settings)
    driver, _ = witness.started(desk)
    after_tasks(desk, driver, 2)
    clock.set(HOUR_S)
    assert_refused(desk, driver)
    after_tasks(desk, driver, 3)
    kill(driver)
    clock.set(-HOUR_S)

    assert desk.cli("run", desk.toml, "--quiet").code == 0

    assert_whole(desk, witness)


@pytest.mark.slow
@pytest.mark.parametrize("jumps", [(HOUR_S, -HOUR_S), (-HOUR_S, HOUR_S)])
def test_set_between_killed_drivers_and_their_successors(desk_in, tmp_path, witness, clock, jumps):
    desk = desk_in(tmp_path / "desk", **witness.settings)
    for seconds in jumps:
        driver, _ = witness.started(desk)
        after_tasks(desk, driver, 3)
        kill(driver)
        clock.set(seconds)
        state = status(desk)
        assert state["running"] is None
        assert not state["complete"]

    assert desk.cli("run", desk.toml, "--quiet").code == 0

    assert_whole(desk, witness)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["threads", "dask-local"])
def test_set_below_a_living_driver(desk_in, tmp_path, witness, clock, profile):
    """Nobody takes its workspace, and what it does counts once."""
    desk = desk_in(tmp_path / "desk", cluster=witness.cluster(profile), **witness.settings)
    driver, _ = witness.started(desk)
    for seconds in (HOUR_S, -HOUR_S):
        after_tasks(desk, driver, 2)
        clock.set(seconds)
        assert_refused(desk, driver)
    assert driver.wait(120) == 0

    assert_whole(desk, witness)
