"""A disk that is full in mid-run, at one file or another, and then has room again."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

import pytest

MIB = 2**20


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def used(folder: Path) -> int:
    """Bytes that the files of a folder take on a small disk."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*"))


def assert_told_of_the_disk(outcome) -> None:
    assert outcome.code == 2, outcome
    assert "No space left on device" in outcome.refusal or "is full" in outcome.refusal
    assert "free some space" in outcome.refusal


@pytest.mark.parametrize(
    "shares",
    [(0.02, 0.3, 0.8), pytest.param([n / 40 for n in range(1, 40)], marks=pytest.mark.slow)],
    ids=["some", "many"],
)
def test_full_again_and_again_and_room_is_made(desk_in, witness, command, small_disk, shares):
    """A little more room each time: it is met by the plan, by arrays, records, events, products, the lock."""
    resize(small_disk, 64 * MIB)
    desk = desk_in(small_disk / "desk", **witness.settings)
    around = used(small_disk)
    whole = used(witness.desk.workspace)
    met = 0
    for share in shares:
        resize(small_disk, around + int(share * whole))
        before = witness.records(desk) if desk.workspace.exists() else {}
        outcome = command("run", desk.toml, "--quiet")
        if outcome.code == 0:  # a file under a temporary name takes room that the whole does not
            break
        met += 1
        assert_told_of_the_disk(outcome)
        assert {name: witness.records(desk).get(name) for name in before} == before
    assert met >= len(shares) * 0.8
    kept = witness.records(desk)
    resize(small_disk, 64 * MIB)

    assert command("run", desk.toml, "--quiet").code == 0

    now = witness.records(desk)
    assert {name: now[name] for name in kept} == kept, "a finished tile was done again"
    witness.assert_whole(desk)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [0, 1, 5, 9])
def test_somebody_else_fills_it_below_workers(desk_in, witness, small_disk, tasks):
    """The workers meet it, and the driver tells; the heart of its lock goes on as soon as there is room."""
    resize(small_disk, 64 * MIB)
    desk = desk_in(small_disk / "desk", cluster=witness.cluster("dask-local"), **witness.settings)
    driver = desk.start("run", desk.toml, "--quiet")
    while sum(e["event"] in {"task", "stage_started"} for e in desk.events()) <= tasks:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    assert shutil.disk_usage(small_disk).free < 4096
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 2, (out, err)
    assert "is full" in err or "No space left on device" in err
    assert "Traceback" not in err
    kept = witness.records(desk)
    filler.unlink()

    last = desk.cli("run", desk.toml, "--quiet")

    assert last.code == 0, last
    assert {name: witness.records(desk)[name] for name in kept} == kept, "a finished tile was done again"
    witness.assert_whole(desk)
