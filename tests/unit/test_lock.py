"""The lock of a workspace: one driver, a dead one is taken over, and what it left running is fenced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from slidecube.pipeline import lock as lock_module
from slidecube.pipeline import storage
from slidecube.pipeline.errors import IncompleteError, InUseError, PipelineError
from slidecube.pipeline.lock import Lock, Shard, alive, born_s, holds, read_lock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_S", 0.05)
    monkeypatch.setattr(lock_module, "SILENT_S", 0.4)


def foreign(folder: Path, **changes: object) -> dict[str, object]:
    """Write the lock of another driver."""
    folder.mkdir(exist_ok=True)
    lock = {
        "token": "other",
        "run": "hokkaido-1",
        "shard": "",
        "job": "",
        "restarts": 0,
        "host": lock_module.socket.gethostname(),
        "machine": storage.pid_space(),
        "pid": os.getpid(),
        "started": born_s(os.getpid()),
        "beat": 3,
        "running": 1,
        "dashboard": "",
    } | changes
    (folder / "driver.json").write_text(json.dumps(lock))
    return lock


def test_one_driver_at_a_time_and_the_lock_is_given_back(tmp_path):
    with Lock(tmp_path / "locks", run="a-1") as first:
        assert holds(first.path, first.token)
        assert alive(read_lock(first.path))
        with pytest.raises(PipelineError, match=rf"in use by run 'a-1' \(process {os.getpid()} on "):
            Lock(tmp_path / "locks", run="b-1").__enter__()
        assert holds(first.path, first.token), "the refused one must not harm the first"
    assert not first.path.exists()
    with Lock(tmp_path / "locks", run="b-1"):
        pass


def test_the_lock_is_given_back_after_an_error(tmp_path):
    def fail() -> None:
        with Lock(tmp_path, run="a"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not (tmp_path / "driver.json").exists()


def test_the_heart_beats_and_says_what_runs(tmp_path, quick):
    with Lock(tmp_path, run="a") as lock:
        lock.set_running(3)
        deadline = time.monotonic() + 5
        while (found := read_lock(lock.path))["beat"] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)

        assert found["beat"] >= 3
        assert found["running"] == 3


def test_a_dead_driver_of_this_machine_is_taken_over_at_once(tmp_path):
    died = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    foreign(tmp_path, pid=int(died.stdout))
    began = time.monotonic()
    with Lock(tmp_path, run="a") as lock:
        assert holds(lock.path, lock.token)
    assert time.monotonic() - began < 1


def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    foreign(tmp_path)
    with pytest.raises(PipelineError, match="in use"):
        Lock(tmp_path, run="a").__enter__()
    foreign(tmp_path, started=born_s(os.getpid()) - 3600)
    with Lock(tmp_path, run="a") as lock:
        assert holds(lock.path, lock.token)


@pytest.mark.parametrize("elsewhere", [{"host": "node-7"}, {"machine": "another container"}])
def test_a_silent_driver_elsewhere_is_taken_over_after_a_while(tmp_path, quick, elsewhere):
    foreign(tmp_path, pid=1, **elsewhere)
    began = time.monotonic()
    with Lock(tmp_path, run="a") as lock:
        assert holds(lock.path, lock.token)
    assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize("sign", [{"beat": 4}, {"token": "a third"}])
def test_a_driver_elsewhere_that_shows_life_is_left_alone(tmp_path, quick, monkeypatch, sign):
    other = foreign(tmp_path, host="node-7")
    naps = []

    def sleep(_: float) -> None:
        naps.append(1)
        foreign(tmp_path, **{**other, **sign})

    monkeypatch.setattr(lock_module.time, "sleep", sleep)
    with pytest.raises(PipelineError, match="in use by run 'hokkaido-1' \\(host node-7\\); wait for it"):
        Lock(tmp_path, run="a").__enter__()

    assert len(naps) == 1
    assert read_lock(tmp_path / "driver.json") == {**other, **sign}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"token": "x"}', "null"])
def test_a_damaged_lock_is_nobodys(tmp_path, text):
    (tmp_path / "driver.json").write_text(text)

    assert read_lock(tmp_path / "driver.json") is None
    assert not holds(tmp_path / "driver.json", "x")
    with Lock(tmp_path, run="a") as lock:
        assert holds(lock.path, lock.token)


def test_who_was_taken_over_is_fenced_and_takes_nothing_back(tmp_path, quick):
    with Lock(tmp_path, run="a") as lock:
        lock.require()
        other = foreign(tmp_path)  # someone believed us dead

        assert not holds(lock.path, lock.token)
        with pytest.raises(IncompleteError, match="was taken over by another driver"):
            lock.require()
        time.sleep(0.3)
        assert read_lock(lock.path) == other, "our heart must not beat over the other's"
    assert read_lock(tmp_path / "driver.json") == other, "nor may we give back what is not ours"


def test_left_over_temporary_files_of_a_dead_driver_go(tmp_path):
    (tmp_path / ".driver.json.0123.partial").write_text("{")
    (tmp_path / "mine.partial").write_text("")
    with Lock(tmp_path, run="a"):
        assert sorted(p.name for p in tmp_path.glob("*.partial")) == ["mine.partial"]
        assert not list(tmp_path.glob(".driver*.partial"))


def test_a_full_disk_does_not_stop_the_heart(tmp_path, quick, monkeypatch):
    with Lock(tmp_path, run="a") as lock:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(lock_module, "swap", full)
            time.sleep(0.2)
        beat = read_lock(lock.path)["beat"]
        deadline = time.monotonic() + 5
        while read_lock(lock.path)["beat"] == beat and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_lock(lock.path)["beat"] > beat


@pytest.fixture
def process(tmp_path):
    """A process whose name holds what ends a name in the system's table."""
    named = tmp_path / "a) S 1 (b"
    shutil.copy(shutil.which("sleep"), named)
    with subprocess.Popen([named, "60"]) as process:
        yield process
        process.kill()


def test_when_a_process_was_born(process):
    """By the machine's own clock, which nobody sets: as psutil says, less the time of day of the machine's start."""
    assert born_s(process.pid) == pytest.approx(
        psutil.Process(process.pid).create_time() - psutil.boot_time(), abs=0.05
    )
    assert born_s(os.getpid()) < born_s(process.pid) < time.clock_gettime(time.CLOCK_BOOTTIME) + 0.05
    process.kill()
    process.wait()
    with pytest.raises(psutil.NoSuchProcess):
        born_s(process.pid)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_makes_nobody_another_process(tmp_path, monkeypatch, hours):
    """The kernel then tells another time of day at which the machine started, by which psutil tells all others."""
    with Lock(tmp_path, run="a") as lock:
        boot_s = psutil.boot_time() + 3600 * hours
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_s)
        monkeypatch.setattr(psutil._pslinux, "BOOT_TIME", boot_s, raising=False)
        monkeypatch.setattr(time, "time", lambda: boot_s + time.clock_gettime(time.CLOCK_BOOTTIME))
        assert alive(read_lock(lock.path))
        with pytest.raises(PipelineError, match="in use by run 'a'"):
            Lock(tmp_path, run="b").__enter__()


def test_of_many_that_start_together_one_gets_it_and_the_others_are_told(tmp_path):
    for n in range(15):
        folder, got, told = tmp_path / str(n), [], []
        start, end = threading.Barrier(8), threading.Barrier(8)

        def contend(folder=folder, got=got, told=told, start=start, end=end):
            start.wait()
            try:
                with Lock(folder, run="a-1") as lock:
                    got.append(lock.token)
                    end.wait()
                    return
            except Exception as error:  # noqa: BLE001  anything else is what is looked for
                told.append(type(error))
            end.wait()

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) <= 1  # two that see each other may both step back
        assert set(told) == {InUseError}
        assert len(got) + len(told) == 8


def shard(index: int, count: int = 2, stage: str = "cube") -> Shard:
    return Shard(stage=stage, index=index, count=count)


def test_shards_of_one_plan_go_side_by_side_and_of_two_plans_not(tmp_path):
    with Lock(tmp_path, run="a-1", shard=shard(0)):
        with (
            Lock(tmp_path, run="a-1", shard=shard(1)),
            Lock(tmp_path, run="a-1", shard=shard(0, 3, "detect")),
        ):
            pass
        for other in (shard(1), shard(0, 3, "detect")):
            with pytest.raises(InUseError, match="in use by shard 0/2 of cube of run 'a-1'"):
                Lock(tmp_path, run="b-1", shard=other).__enter__()
        with pytest.raises(InUseError):
            Lock(tmp_path, run="a-1", shard=shard(1, 3)).__enter__()


def test_who_waits_gets_it_when_it_is_free(tmp_path, quick):
    with Lock(tmp_path, run="a-1"):
        thread = threading.Thread(
            target=lambda: Lock(tmp_path, run="b-1", patience_s=10).__enter__().__exit__(None, None, None)
        )
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(InUseError), Lock(tmp_path, run="a-1"):
        Lock(tmp_path, run="b-1", patience_s=0.2).__enter__()


def test_a_lock_that_speaks_again_while_it_is_taken_over_stays(tmp_path, quick, monkeypatch):
    """It was silent for long enough and its successor is about to remove it."""
    foreign(tmp_path, host="elsewhere")
    (tmp_path / "driver.json").rename(tmp_path / "shard-cube-0of2.json")
    take = Lock._take

    def wakes(self, found, silent):
        lock = json.loads((tmp_path / "shard-cube-0of2.json").read_text())
        (tmp_path / "shard-cube-0of2.json").write_text(json.dumps(lock | {"beat": lock["beat"] + 1}))
        return take(self, found, silent)

    monkeypatch.setattr(Lock, "_take", wakes)
    with pytest.raises(InUseError, match="host elsewhere"):
        Lock(tmp_path, run="a-1").__enter__()
    assert (tmp_path / "shard-cube-0of2.json").exists()
    assert not (tmp_path / "driver.json").exists()


def test_a_lock_says_where_the_workers_can_be_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_S", 0.05)
    with Lock(tmp_path / "locks", run="a-1") as lock:
        lock.set_dashboard("http://127.0.0.1:8787/status")
        deadline = time.monotonic() + 10
        while not read_lock(lock.path)["dashboard"] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert read_lock(lock.path)["dashboard"] == "http://127.0.0.1:8787/status"
