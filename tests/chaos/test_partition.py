"""The network between the scheduler and its workers is cut in mid-run, in namespaces of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture
def switch(servers):
    """Two networks and a switch."""
    module = servers("switch")
    try:
        with module.switch() as made:
            yield made
    except module.NetworkMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def site(servers, switch, tmp_path):
    """A scheduler on the left, workers on the right."""
    left, right = switch.left, switch.right
    with servers("dask_site").DaskSite(
        tmp_path / "site",
        host=left.address,
        worker_host=right.address,
        inside=left.enter,
        outside=right.enter,
    ) as site:
        site.until_there()
        yield site


def begin(desk, before: list[str]) -> subprocess.Popen[str]:
    """Start a driver on the left."""
    with (desk.folder / "driver.log").open("a") as log:
        slidecube = str(Path(sys.executable).with_name("slidecube"))
        words = [*before, slidecube, "run", str(desk.toml), "--quiet"]
        return subprocess.Popen(
            words, text=True, cwd=desk.folder, start_new_session=True, stdout=log, stderr=log
        )


def until(met, driver, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not met():
        assert driver.poll() is None, driver.returncode
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@pytest.mark.parametrize("seconds", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_cut_off_in_mid_run(desk_in, tmp_path, witness, switch, site, seconds):
    """For a moment nobody notices; for longer, workers may be given up, and what both sides did counts once."""
    desk = desk_in(tmp_path / "desk", cluster=witness.cluster(str(site.profile)), **witness.settings)
    driver = begin(desk, switch.left.enter)
    try:
        until(lambda: any(e["event"] == "task" for e in desk.events()), driver)
        switch.turn("down")
        told = len(desk.events())
        time.sleep(seconds)
        assert driver.poll() is None, "it was through before it was cut off: the test tests nothing"
        assert len(desk.events()) <= told + 2, "what a worker did came through"
        switch.turn("up")
        replaced = []
        while driver.poll() is None:
            replaced += site.mend()
            time.sleep(0.1)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)

    log = (desk.folder / "driver.log").read_text()
    assert driver.returncode == 0, log + site.log()
    print(f"{seconds} s: replaced {replaced}, retries {[e for e in desk.events() if e['event'] == 'retry']}")
    if seconds < 10:
        assert replaced == []
        assert not [e for e in desk.events() if e["event"] == "retry"]
    witness.assert_whole(desk)
