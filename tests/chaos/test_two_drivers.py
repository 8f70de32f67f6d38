"""Several drivers on one workspace: one works; who was believed dead and wakes up does no harm."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOON = """
import sys
from slidecube.pipeline import cli, lock
lock.SILENT_S = 3.0  # in place of 20: the test waits as long
cli.main(sys.argv[1:])
"""


def test_started_at_once(desk_in, tmp_path, witness):
    """One of them works, and the other one is refused by one line; nobody hurts anybody."""
    desk = desk_in(tmp_path / "desk", **witness.settings)
    drivers = [desk.start("run", desk.toml, "--quiet") for _ in range(2)]
    said = [driver.communicate(timeout=180) for driver in drivers]

    # on a busy machine the one may be through before the other one asks
    assert sorted(driver.returncode for driver in drivers) in ([0, 1], [0, 0]), said
    for driver, (_, err) in zip(drivers, said, strict=True):
        if driver.returncode == 1:
            assert len(err.splitlines()) == 1
            assert "is in use by run" in err
    witness.assert_whole(desk)


@contextlib.contextmanager
def frozen_elsewhere(desk, tasks: int):
    """A driver on what it takes for another machine, which freezes in mid-tile with all it started."""
    slidecube = Path(sys.executable).with_name("slidecube")
    words = f"hostname elsewhere && exec {slidecube} run {desk.toml} --quiet"
    driver = subprocess.Popen(
        ["unshare", "--uts", "sh", "-c", words],
        text=True,
        cwd=desk.folder,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        while sum(e["event"] == "task" for e in desk.events()) < tasks:
            if driver.poll() is not None:
                _, err = driver.communicate()
                if "unshare" in err:
                    pytest.skip(f"a host name of its own is not permitted here: {err.strip()}")
                raise AssertionError(err)
            time.sleep(0.01)
        os.killpg(driver.pid, signal.SIGSTOP)
        yield driver
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


@pytest.mark.parametrize(
    ("tasks", "wakes", "profile"),
    [
        (2, "meanwhile", "threads"),
        *(
            pytest.param(tasks, wakes, profile, marks=pytest.mark.slow)
            for tasks in (1, 6, 11)
            for wakes in ("meanwhile", "afterwards")
            for profile in ("threads", "dask-local")
        ),
    ],
)
def test_a_zombie_wakes_up(desk_in, tmp_path, witness, tasks, wakes, profile):
    """Its workspace was taken over: what it had in work is not written, counted or told, and it says why."""
    desk = desk_in(tmp_path / "desk", cluster=witness.cluster(profile), **witness.settings)
    with frozen_elsewhere(desk, tasks) as zombie:
        told = len(desk.events())
        with subprocess.Popen(
            [sys.executable, "-c", SOON, "run", str(desk.toml), "--quiet"], cwd=desk.folder, text=True
        ) as successor:
            if wakes == "meanwhile":
                while len(desk.events()) <= told + 3 and successor.poll() is None:
                    time.sleep(0.01)
            else:
                successor.wait(180)
            os.killpg(zombie.pid, signal.SIGCONT)
            _, err = zombie.communicate(timeout=180)
            assert successor.wait(180) == 0

    assert zombie.returncode == 2, err
    said = [line for line in err.splitlines() if line.startswith("slidecube: ")]
    assert len(said) == 1
    assert "was taken over by another driver" in said[0]
    assert "Traceback" not in err
    witness.assert_whole(desk)
