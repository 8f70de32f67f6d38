"""One contract over all runners: threads alone, threads in pairs, and Dask's worker processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import cloudpickle
import psutil
import pytest

from slidecube.cluster import dask
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import Profile, Resources
from slidecube.cluster.runner import TaskResult, TileTask, open_runner

cloudpickle.register_pickle_by_value(sys.modules[__name__])

RUNNERS = {
    "one thread": ("threads", 1),
    "two threads": ("threads", 2),
    "two processes": ("dask-local", 2),
}


def open_named(name):
    kind, workers = RUNNERS[name]
    worker = Resources(cpus=1, mem_gb=2.0)
    return open_runner(Profile(name=kind, runner=kind, workers=workers, worker=worker))


@pytest.fixture(scope="module", params=RUNNERS)
def runner(request):
    with open_named(request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def processes():
    with open_named("two processes") as opened:
        yield opened


def tasks(n: int) -> list[TileTask]:
    return [TileTask(stage="cube", layer="la", epoch="", tile=f"r000c{i:03d}", key=f"k{i}") for i in range(n)]


def done(task: TileTask) -> TaskResult:
    return TaskResult(task=task, status="done", bytes=int(task.tile[-3:]))


def run(runner, function, tasks):
    # a lambda goes to the workers by value: they cannot import a test
    return runner.run(lambda task: function(task), tasks)  # noqa: PLW0108


class Noted:
    """Does a task after it has left a file; some tasks misbehave."""

    def __init__(self, folder: Path, *, how: str = "", bad: str = "k3", seconds: float = 0.0) -> None:
        self.folder, self.how, self.bad, self.seconds = folder, how, bad, seconds

    def __call__(self, task: TileTask) -> TaskResult:
        (self.folder / f"{task.key}-{time.monotonic_ns()}").touch()
        time.sleep(self.seconds)
        if task.key == self.bad and self.how == "raise":
            raise ValueError("a bad\n  tile")
        if task.key == self.bad and self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.key == self.bad and self.how == "die once" and len(list(self.folder.glob("k3-*"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return done(task)

    def begun(self, key: str = "k*") -> int:
        return len(list(self.folder.glob(f"{key}-*")))


def test_every_task_has_one_result(runner):
    found = list(run(runner, done, tasks(23)))

    assert sorted(found, key=lambda r: r.task.tile) == [done(task) for task in tasks(23)]


def test_a_runner_runs_again_and_takes_no_tasks_and_any_iterable(runner):
    assert list(run(runner, done, [])) == []
    assert len(list(run(runner, done, iter(tasks(3))))) == 3


def test_what_a_task_raises_is_a_value(runner, tmp_path):
    found = {r.task.key: r for r in run(runner, Noted(tmp_path, how="raise"), tasks(8))}

    assert found.pop("k3") == TaskResult(task=tasks(8)[3], status="failed", reason="ValueError: a bad tile")
    assert {r.status for r in found.values()} == {"done"}
    assert len(found) == 7


def test_few_tasks_are_in_flight(runner, tmp_path):
    """A slow reader of results holds the tasks back: a nation's tiles are never all begun."""
    noted = Noted(tmp_path)
    with closing(run(runner, noted, tasks(40))) as results:
        next(results)
        time.sleep(0.5)

        assert 1 <= noted.begun() <= 1 + 2 * 2  # one is done, a worker holds at most two
        assert len(list(results)) == 39


def test_closing_early_begins_nothing_more(runner, tmp_path):
    noted = Noted(tmp_path, seconds=0.05)
    with closing(run(runner, noted, tasks(40))) as results:
        next(results)
    time.sleep(0.2)  # a process that was at work comes to its end
    begun = noted.begun()
    time.sleep(0.3)

    assert noted.begun() == begun <= 6
    assert len(list(run(runner, done, tasks(2)))) == 2


def test_an_error_of_the_reader_comes_through(runner):
    def read() -> None:
        with closing(run(runner, done, tasks(9))) as results:
            for _ in results:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()


def test_a_tile_that_kills_its_workers_fails_alone(processes, tmp_path):
    """Beside it others lie on the same worker; they must not be failed with it."""
    noted = Noted(tmp_path, how="die")
    found = {r.task.key: r for r in run(processes, noted, tasks(9))}

    assert found.pop("k3").reason.startswith("the worker died 3 times on this tile")
    assert noted.begun("k3") == 3
    assert [r.status for r in found.values()] == ["done"] * 8


def test_a_worker_that_dies_once_costs_nothing(processes, tmp_path):
    noted = Noted(tmp_path, how="die once")
    found = list(run(processes, noted, tasks(6)))

    assert [r.status for r in found] == ["done"] * 6
    assert noted.begun("k3") == 2


def test_workers_that_never_come_back_are_not_waited_for(monkeypatch):
    """A task that no worker can even read ends them for good."""
    monkeypatch.setattr(dask, "_NO_WORKERS_S", 2.0)
    with (
        open_named("two processes") as opened,
        pytest.raises(ClusterError, match="none came back in 2 s; start with `slidecube doctor`"),
    ):
        list(opened.run(done, tasks(4)))


@pytest.mark.parametrize("name", RUNNERS)
def test_closing_leaves_no_process_no_thread_and_no_scratch(name, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(psutil.Process().children(recursive=True))
    with open_named(name) as opened:
        assert len(list(run(opened, done, tasks(3)))) == 3
        assert opened.address.startswith("http://127.0.0.1:") == (name == "two processes")
    new = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(
        [p for p in new if "resource_tracker" not in " ".join(p.cmdline())], timeout=5
    )

    assert not alive
    assert not list(tmp_path.glob("slidecube-dask-*"))


def test_the_scratch_of_a_killed_driver_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone, ours, others = (
        tmp_path / n for n in ("slidecube-dask-4194300-x", f"slidecube-dask-{os.getpid()}-y", "z")
    )
    for folder in (gone, ours, others):
        (folder / "inside").mkdir(parents=True)
    with open_named("two processes"):
        pass

    assert (gone.exists(), ours.exists(), others.exists()) == (False, True, True)
