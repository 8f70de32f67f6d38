"""One contract over all runners: threads alone, threads in pairs, and Dask's worker processes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import cloudpickle
import dask
import distributed
import numpy as np
import psutil
import pytest
import torch

from slidecube.cluster import clusters
from slidecube.cluster.dask import DaskPool
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.faults import RETRIES, Retry, fault_of
from slidecube.cluster.pools import open_runner
from slidecube.cluster.resources import Profile, Resources
from slidecube.cluster.runner import HOPELESS, Runner, TaskResult, TileTask
from slidecube.cluster.threads import ThreadsPool, threads_at_work

cloudpickle.register_pickle_by_value(sys.modules[__name__])

RUNNERS = {
    "one thread": ("threads", 1),
    "two threads": ("threads", 2),
    "two processes": ("dask-local", 2),
    "two at an address": ("dask-address", 2),
}
QUICK = {
    fault: Retry(attempts=retry.attempts, first_wait_s=0.02, longest_wait_s=0.1)
    for fault, retry in RETRIES.items()
}


@pytest.fixture(scope="module")
def address(servers, tmp_path_factory):
    """A cluster that somebody else started: its nannies start a worker again however long that takes."""
    with servers("dask_site").DaskSite(tmp_path_factory.mktemp("site") / "site") as site:
        site.until_there()
        yield site.address


def profile_of(name, request):
    kind, workers = RUNNERS[name]
    options = {"address": request.getfixturevalue("address")} if kind == "dask-address" else {}
    worker = Resources(cpus=1, mem_gb=2.0)
    return Profile(name=kind, runner=kind, workers=workers, worker=worker, options=options)


def opened(profile, **policy):
    pool = ThreadsPool(profile.workers) if profile.runner == "threads" else DaskPool(profile)
    return Runner(pool, retries=QUICK, **policy)


@pytest.fixture(scope="module", params=RUNNERS)
def runner(request):
    with opened(profile_of(request.param, request)) as runner:
        yield runner


@pytest.fixture(scope="module", params=["two processes", "two at an address"])
def processes(request):
    with opened(profile_of(request.param, request)) as runner:
        yield runner


@pytest.fixture
def nobody_left_behind(tmp_path):
    """Let hanging threads end: the command line leaves a process at once that has some, and this one is pytest's."""
    yield
    shutil.rmtree(tmp_path)
    until = time.monotonic() + 10
    while threads_at_work() and time.monotonic() < until:
        time.sleep(0.01)
    assert not threads_at_work()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tasks(n: int) -> list[TileTask]:
    return [TileTask(stage="cube", layer="la", epoch="", tile=f"r000c{i:03d}", key=f"k{i}") for i in range(n)]


def done(task: TileTask) -> TaskResult:
    return TaskResult(task=task, status="done", bytes=int(task.tile[-3:]))


def run(runner, function, tasks, **how):
    # a lambda goes to the workers by value: they cannot import a test
    return runner.run(lambda task: function(task), tasks, **how)  # noqa: PLW0108


class Noted:
    """Does a task after it has left a file; some tasks misbehave, by a script of their attempts."""

    def __init__(
        self, folder: Path, *, script: dict[str, list[str]] | None = None, seconds: float = 0.0
    ) -> None:
        self.folder, self.script, self.seconds = folder, script or {}, seconds

    def __call__(self, task: TileTask) -> TaskResult:
        name = f"{task.key}-{task.attempt}-{os.getpid()}-{int(task.last)}-{time.monotonic_ns()}"
        (self.folder / name).touch()
        time.sleep(self.seconds)
        script = self.script.get(task.key, [])
        how = script[min(task.attempt, len(script)) - 1] if script else ""
        if how == "raise":
            raise ValueError("a bad\n  tile")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while how == "hang" and self.folder.exists():  # threads cannot be killed, see `nobody_left_behind`
            time.sleep(0.05)
        if how:
            return TaskResult(task=task, status="failed", reason=f"{how} {task.attempt}", fault=how)
        return done(task)

    def begun(self, key: str = "k*") -> int:
        return len(list(self.folder.glob(f"{key}-*")))

    def attempts(self, key: str) -> list[list[str]]:
        return sorted(path.name.split("-")[1:4] for path in self.folder.glob(f"{key}-*"))


def test_every_task_has_one_result(runner):
    found = list(run(runner, done, tasks(23)))

    assert sorted(found, key=lambda r: r.task.tile) == [done(task) for task in tasks(23)]


def test_a_runner_runs_again_and_takes_no_tasks_and_any_iterable(runner):
    assert list(run(runner, done, [])) == []
    assert len(list(run(runner, done, iter(tasks(3))))) == 3


def test_what_a_task_raises_is_a_value(runner, tmp_path):
    found = {r.task.key: r for r in run(runner, Noted(tmp_path, script={"k3": ["raise"]}), tasks(8))}

    assert found.pop("k3") == TaskResult(
        task=tasks(8)[3], status="failed", reason="ValueError: a bad tile", fault="bug"
    )
    assert {r.status for r in found.values()} == {"done"}
    assert len(found) == 7


@pytest.mark.parametrize("fault", ["transient", "throttled", "expired"])
def test_a_passing_fault_is_tried_again_and_told(runner, tmp_path, fault):
    noted, told = Noted(tmp_path, script={"k1": [fault, fault, ""]}), []
    found = {r.task.key: r for r in run(runner, noted, tasks(4), tell=told.append)}

    assert {r.status for r in found.values()} == {"done"}
    assert found["k1"].task.attempt == 3
    assert [(r.task.key, r.fault, r.reason) for r in told] == [("k1", fault, f"{fault} {n}") for n in (1, 2)]
    assert [a[0] for a in noted.attempts("k1")] == ["1", "2", "3"]


def test_the_last_attempt_knows_that_it_is_the_last(runner, tmp_path):
    """Then a tile may do without a scene, which it would rather have waited for."""
    noted = Noted(tmp_path, script={"k0": ["transient", "throttled", "transient", ""]})
    (found,) = run(runner, noted, tasks(1))

    assert found.status == "done"
    assert [(n, last) for n, _, last in noted.attempts("k0")] == [
        ("1", "0"),
        ("2", "0"),
        ("3", "0"),
        ("4", "1"),
    ]


@pytest.mark.parametrize(
    ("fault", "attempts"),
    [("transient", 4), ("memory", 2), ("disk", 1), ("fenced", 1), ("data", 1), ("bug", 1)],
)
def test_each_fault_has_its_number_of_attempts(runner, tmp_path, fault, attempts):
    noted = Noted(tmp_path, script={"k2": [fault]})
    found = {r.task.key: r for r in run(runner, noted, tasks(4))}

    assert (found["k2"].status, found["k2"].fault, found["k2"].reason) == (
        "failed",
        fault,
        f"{fault} {attempts}",
    )
    assert noted.begun("k2") == attempts
    assert noted.begun() == 3 + attempts


def test_a_waiting_task_keeps_nobody_waiting(runner, tmp_path):
    noted = Noted(tmp_path, script={"k0": ["transient", ""]})
    slow = {**QUICK, "transient": Retry(attempts=2, first_wait_s=1.0, longest_wait_s=1.0)}
    same_pool = Runner(runner._pool, retries=slow)
    order = [r.task.key for r in run(same_pool, noted, tasks(6))]

    assert order[-1] == "k0"


def test_one_task_a_worker_is_in_work(runner, tmp_path):
    """A slow reader of results holds the tasks back: a nation's tiles are never all begun."""
    noted = Noted(tmp_path)
    with closing(run(runner, noted, tasks(40))) as results:
        next(results)
        time.sleep(0.5)

        assert 1 <= noted.begun() <= 1 + 2
        assert len(list(results)) == 39


def test_closing_early_begins_nothing_more_and_waits_for_what_has_begun(runner, tmp_path):
    noted = Noted(tmp_path, seconds=0.05)
    with closing(run(runner, noted, tasks(40))) as results:
        next(results)
    begun = noted.begun()
    time.sleep(0.3)

    assert noted.begun() == begun <= 4
    assert len(list(run(runner, done, tasks(2)))) == 2


def test_draining_ends_what_is_in_work_and_begins_nothing(request, tmp_path):
    for name in RUNNERS:
        folder = tmp_path / name
        folder.mkdir()
        noted = Noted(folder, seconds=0.1)
        with opened(profile_of(name, request)) as runner:
            results = run(runner, noted, tasks(40))
            found = [next(results)]
            runner.drain()
            found += list(results)

            assert noted.begun() == len(found) <= 4
            assert {r.status for r in found} == {"done"}
            assert list(run(runner, noted, tasks(3))) == []


def test_an_error_of_the_reader_comes_through(runner):
    def read() -> None:
        with closing(run(runner, done, tasks(9))) as results:
            for _ in results:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()


def test_where_nothing_works_the_rest_is_left_alone(runner, tmp_path):
    every = {f"k{i}": ["data"] for i in range(200)}
    noted, found = Noted(tmp_path, script=every), []
    with pytest.raises(ClusterError, match=f"{HOPELESS} tiles failed one after another.*the last: data 1"):
        found.extend(run(runner, noted, tasks(200)))
    assert noted.begun() <= HOPELESS + 3


def test_what_failed_in_an_earlier_run_says_nothing_of_the_rest(runner, tmp_path):
    bad = HOPELESS + 5
    noted = Noted(tmp_path, script={f"k{i}": ["data"] for i in range(bad)})
    wanted = [dataclasses.replace(task, suspect=i < bad) for i, task in enumerate(tasks(bad + 9))]

    found = list(run(runner, noted, wanted))

    assert Counter(r.status for r in found) == {"failed": bad, "done": 9}


def test_a_tile_that_kills_its_workers_is_given_up_and_fails_alone(processes, tmp_path):
    noted = Noted(tmp_path, script={"k3": ["die"]})
    found = {r.task.key: r for r in run(processes, noted, tasks(9))}

    poison = found.pop("k3")
    assert poison.fault == "worker"
    assert poison.reason.startswith("its worker died 3 times, each time alone with this tile")
    assert noted.begun("k3") == 3
    assert len({pid for _, pid, _ in noted.attempts("k3")}) == 3
    assert [r.status for r in found.values()] == ["done"] * 8
    assert noted.begun() == 8 + 3, "nobody beside it was begun twice"


def test_a_worker_that_dies_once_costs_one_attempt(processes, tmp_path):
    noted, told = Noted(tmp_path, script={"k3": ["die", ""]}), []
    found = list(run(processes, noted, tasks(6), tell=told.append))

    assert [r.status for r in found] == ["done"] * 6
    assert noted.begun("k3") == 2
    assert [(r.task.key, r.fault) for r in told] == [("k3", "worker")]


def test_a_worker_that_dies_with_its_result(monkeypatch, tmp_path, request):
    """The scheduler places the task on the same worker again, which never comes: nobody may wait for that."""
    monkeypatch.setattr("slidecube.cluster.dask._GATHER_S", 2.0)
    noted = Noted(tmp_path, script={})
    with DaskPool(profile_of("two processes", request)) as pool:
        while not pool.workers():
            time.sleep(0.05)
        worker = next(iter(pool.workers()))
        (task,) = tasks(1)
        pool.start(worker, lambda task: noted(task), task)  # noqa: PLW0108
        future, _ = pool._in_work[worker]
        while future.status != "finished":
            time.sleep(0.05)
        (pid,) = [int(pid) for _, pid, _ in noted.attempts("k0")]
        os.kill(pid, signal.SIGKILL)
        while future.status == "finished":
            time.sleep(0.05)
        future._state.status = "finished"
        ended = []
        while not ended:
            ended = pool.wait(0.1)

    assert [(outcome.worker, outcome.result) for outcome in ended] == [(worker, None)]


class DiesOnce(distributed.WorkerPlugin):
    """Kills the first worker that is given it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, worker) -> None:
        (self.folder / f"{os.getpid()}").touch()
        if len(list(self.folder.iterdir())) == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_as_it_starts_does_not_end_the_run(monkeypatch, tmp_path, request):
    monkeypatch.setattr(clusters, "_DieWithDriver", lambda _: DiesOnce(tmp_path))
    with opened(profile_of("two processes", request)) as runner:
        found = list(run(runner, done, tasks(6)))

    assert [r.status for r in found] == ["done"] * 6
    assert len(list(tmp_path.iterdir())) >= 2


def test_a_cluster_that_does_not_start_is_tried_again_and_then_one_line(monkeypatch, request):
    """Dask says so where a worker dies before it has told its address."""
    begun = []

    def dies(*args, **kwargs):
        begun.append(kwargs["local_directory"])
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr(clusters, "LocalCluster", dies)
    with (
        pytest.raises(ClusterError, match=r"do not start \(Nanny failed to start.\); .* `slidecube doctor`"),
        opened(profile_of("two processes", request)),
    ):
        pass
    assert len(begun) == 3
    assert not [folder for folder in begun if Path(folder).exists()]


def test_a_worker_whose_nanny_gave_up_comes_again(monkeypatch, tmp_path, request):
    monkeypatch.setitem(clusters.DASK_SETTINGS, "distributed.deploy.lost-worker-timeout", "50ms")
    monkeypatch.setattr(clusters, "_ASK_AGAIN_S", 1.0)
    with DaskPool(profile_of("two processes", request)) as pool:
        while len(pool.workers()) < 2:
            time.sleep(0.05)
        lost = next(iter(pool.workers()))
        pool.start(lost, lambda task: os.kill(os.getpid(), signal.SIGKILL), *tasks(1))
        while not pool.wait(0.1):
            pass
        until = time.monotonic() + 60
        while len(pool.workers()) < 2 or lost in pool.workers():
            assert time.monotonic() < until, "one worker is left for the rest of the run"
            time.sleep(0.05)


@pytest.mark.usefixtures("nobody_left_behind")
@pytest.mark.parametrize("name", RUNNERS)
def test_an_overdue_tile_loses_its_worker(name, request, tmp_path):
    """A process is killed, a thread can only be left behind; the others go on either way."""
    noted = Noted(tmp_path, script={"k1": ["hang"], "k2": ["hang", ""]})
    # a new process imports for some seconds where much else is at work, and its first tile waits for that
    deadline_s = 1.0 if "thread" in name else 10.0
    with opened(profile_of(name, request), deadline_s=deadline_s) as runner:
        found = {r.task.key: r for r in run(runner, noted, tasks(6))}

    assert found["k1"].fault == "deadline"
    assert found.pop("k1").reason.startswith("not done after ")
    assert {r.status for r in found.values()} == {"done"}, found
    assert noted.begun("k1") == noted.begun("k2") == 2
    pids = {int(pid) for key in ("k1", "k2") for n, pid, _ in noted.attempts(key) if n == "1"}
    left = [os.getpid()] * ("thread" in name)
    until = time.monotonic() + 30  # nobody waits for the end of a process
    while [pid for pid in pids if psutil.pid_exists(pid)] != left:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert threads_at_work() or "thread" not in name


def test_a_worker_that_comes_back_to_its_address_is_at_work_again(tmp_path):
    """On Kubernetes a port is fixed: whose process was killed for a deadline has the address of its successor."""
    noted = Noted(tmp_path, script={"k0": ["hang", ""]})
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        worker_port=free_port(),
        dashboard_address="127.0.0.1:0",
        host="127.0.0.1",
    ) as cluster:
        one = Profile(
            name="a",
            runner="dask-address",
            workers=1,
            worker=Resources(cpus=1, mem_gb=1),
            options={"address": cluster.scheduler_address, "wait_min": 0.5},
        )
        with opened(one, deadline_s=10.0) as runner:
            found = list(run(runner, noted, tasks(3)))

    assert [result.status for result in found] == ["done"] * 3
    assert noted.begun("k0") == 2


@pytest.mark.slow
def test_a_frozen_worker_does_not_hold_up_the_other(tmp_path, monkeypatch):
    """Nobody waits for the end of an overdue one."""
    monkeypatch.setattr("slidecube.cluster.dask._kill", lambda *_: time.sleep(30))
    noted = Noted(tmp_path, script={"k0": ["hang", ""]}, seconds=0.1)
    profile = Profile(name="d", runner="dask-local", workers=2, worker=Resources(cpus=1, mem_gb=1))
    with opened(profile, deadline_s=8.0) as runner:
        began = {}
        for result in run(runner, noted, tasks(90)):
            began[result.task.key] = time.monotonic()
        longest = max(np.diff(sorted(began.values())))

    assert len(began) == 90
    assert longest < 20


@pytest.mark.usefixtures("nobody_left_behind")
@pytest.mark.parametrize("name", ["one thread", "two threads", "two processes"])
def test_what_hangs_is_not_waited_for_beyond_its_deadline(name, request, tmp_path):
    noted = Noted(tmp_path, script={"k0": ["hang"]})
    with opened(profile_of(name, request), deadline_s=8.0) as runner:
        results = run(runner, noted, tasks(40))
        if name != "one thread":
            next(results)
        threading.Timer(1.0, runner.drain).start()
        began = time.monotonic()
        results.close() if name != "one thread" else list(results)
        assert time.monotonic() - began < 40


@pytest.mark.usefixtures("nobody_left_behind")
def test_an_interrupted_reader_leaves_threads_behind_and_does_not_wait(tmp_path):
    noted = Noted(tmp_path, script={"k0": ["hang"]})
    with opened(Profile(name="t", runner="threads", workers=1, worker=Resources(cpus=1, mem_gb=1))) as runner:
        threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt), closing(run(runner, noted, tasks(2))) as results:
            next(results)
        assert time.monotonic() - began < 10


def test_workers_that_never_come_are_not_waited_for():
    with distributed.LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", host="127.0.0.1") as nobody:
        lonely = Profile(
            name="a",
            runner="dask-address",
            workers=1,
            worker=Resources(cpus=1, mem_gb=1),
            options={"address": nobody.scheduler_address, "wait_min": 1 / 60},
        )
        with opened(lonely) as runner, pytest.raises(ClusterError, match="none came in 1 s; start some with"):
            list(runner.run(done, tasks(4)))


LOSES_ITS_SCHEDULER = """
import os, signal, sys, time
from slidecube.cluster.dask import DaskPool
from slidecube.cluster.resources import Profile, Resources

options = {"address": sys.argv[1], "wait_min": 1.0}
worker = Resources(cpus=1, mem_gb=1)
with DaskPool(Profile(name="a", runner="dask-address", workers=1, worker=worker, options=options)) as pool:
    os.kill(int(sys.argv[2]), signal.SIGKILL)
    while pool._client.status != "connecting":
        time.sleep(0.02)
"""


def test_a_lost_scheduler_leaves_no_traceback(servers, tmp_path):
    """A client that is closed while it looks for its scheduler logs its own end as an error."""
    with servers("dask_site").DaskSite(tmp_path / "site", workers=1) as site:
        command = [sys.executable, "-c", LOSES_ITS_SCHEDULER, site.address, str(site.scheduler.pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_scheduler_that_is_not_there_is_one_line(monkeypatch):
    profile = Profile(
        name="a",
        runner="dask-address",
        workers=1,
        worker=Resources(cpus=1, mem_gb=1),
        options={"address": "tcp://127.0.0.1:9"},
    )
    monkeypatch.setattr(clusters, "_CONNECT_S", 1.0)
    with pytest.raises(ClusterError, match=r"No Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        open_runner(profile).__enter__()


def test_workers_that_are_there_are_never_missed(request):
    """What Dask's client keeps of its scheduler lists no workers, and comes between whenever it likes."""
    with (
        dask.config.set({"distributed.client.scheduler-info-interval": "1ms"}),
        opened(profile_of("two processes", request)) as runner,
    ):
        pool = runner._pool
        until = time.monotonic() + 60
        while len(pool.workers()) < 2:
            assert time.monotonic() < until
        for _ in range(1000):
            pool._look()
            assert len(pool._there) == 2


def test_a_scheduler_that_dies_and_does_not_come_back_is_one_line(monkeypatch, servers, tmp_path):
    monkeypatch.setattr(clusters, "_CONNECT_S", 2.0)
    with servers("dask_site").DaskSite(tmp_path / "site") as site:
        site.until_there()
        profile = Profile(
            name="a",
            runner="dask-address",
            workers=2,
            worker=Resources(cpus=1, mem_gb=1),
            options={"address": site.address},
        )

        with opened(profile) as runner:
            results = run(runner, Noted(tmp_path, seconds=0.2), tasks(500))
            next(results)
            site.scheduler.kill()
            with pytest.raises(ClusterError, match=r"does not answer any more .* what is done stays done"):
                list(results)


@pytest.mark.parametrize("name", ["one thread", "two threads", "two processes"])
def test_closing_leaves_no_process_no_thread_and_no_scratch(name, request, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, threads = set(psutil.Process().children(recursive=True)), set(threading.enumerate())
    with opened(profile_of(name, request)) as runner:
        assert len(list(run(runner, done, tasks(3)))) == 3
        assert runner.address.startswith("http://127.0.0.1:") == (name == "two processes")
    new = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(
        [p for p in new if "resource_tracker" not in " ".join(p.cmdline())], timeout=5
    )

    assert not alive
    assert not list(tmp_path.glob("slidecube-dask-*"))
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith("slidecube-worker"):
            thread.join(5)
            assert not thread.is_alive()


def test_the_scratch_of_a_killed_driver_is_removed(request, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone, ours, others = (
        tmp_path / n for n in ("slidecube-dask-4194300-x", f"slidecube-dask-{os.getpid()}-y", "z")
    )
    for folder in (gone, ours, others):
        (folder / "inside").mkdir(parents=True)
    with opened(profile_of("two processes", request)):
        pass

    assert (gone.exists(), ours.exists(), others.exists()) == (False, True, True)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (OSError(28, "No space left on device"), "disk"),
        (OSError(5, "Input/output error"), "transient"),
        (ConnectionResetError(), "transient"),
        (TimeoutError(), "transient"),
        (OSError(24, "Too many open files"), "transient"),
        (OSError(23, "Too many open files in system"), "transient"),
        (MemoryError(), "memory"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory"),
        (RuntimeError("no kernel image is available"), "bug"),
        (FileNotFoundError(2, "no such file"), "bug"),
        (ValueError("?"), "bug"),
    ],
)
def test_the_class_of_an_error(error, fault):
    assert fault_of(error) == fault


def test_memory_that_torch_does_not_get_is_no_bug():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert fault_of(refused.value) == "memory"


def test_waits_grow_up_to_the_longest_and_differ():
    retry = Retry(attempts=9, first_wait_s=2.0, longest_wait_s=10.0)
    for attempt, longest in ((1, 2.0), (2, 4.0), (3, 8.0), (4, 10.0), (9, 10.0)):
        waits = {retry.wait_s(attempt) for _ in range(50)}
        assert all(longest / 2 <= wait <= longest for wait in waits)
        assert len(waits) > 1
