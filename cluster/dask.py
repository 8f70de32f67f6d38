"""The Dask runner: worker processes on this machine, a bounded window of tasks, one record back from each."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

import dask
import psutil
from distributed import Client, LocalCluster, WorkerPlugin
from distributed.scheduler import KilledWorker

from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import Profile
from slidecube.cluster.runner import Results, TaskFunction, TaskResult, TileTask, failed

_IN_FLIGHT_PER_WORKER = 2  # one running, one waiting: a worker never idles, and Ctrl-C loses little


_LONE_ATTEMPTS = 2
_CLOSE_S = 10.0  # after a worker was killed, closing hangs now and then
_NO_WORKERS_S = 60.0  # starting one takes seconds, and half a minute on a busy machine
_SCRATCH = "slidecube-dask-"


class _DieWithDriver(WorkerPlugin):
    """A worker whose driver was killed must not go on writing: the kernel ends it too (Linux)."""

    def __init__(self, driver: int) -> None:
        self._driver = driver

    def setup(self, worker: Any) -> None:
        del worker
        try:
            import ctypes  # noqa: PLC0415

            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        except (OSError, AttributeError):  # not Linux: distributed's own watch on the parent's pipe remains
            return
        if os.getppid() != self._driver:  # it died before we asked
            os._exit(1)


class DaskRunner:
    """Tasks on a `LocalCluster` of single-threaded-by-Dask worker processes."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._cluster: LocalCluster | None = None
        self._client: Client | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def address(self) -> str:
        """Address of the dashboard."""
        return str(self._client.dashboard_link) if self._client is not None else ""

    def __enter__(self) -> Self:
        """Start the workers."""
        _remove_stale_scratch()
        self._scratch = tempfile.TemporaryDirectory(
            prefix=f"{_SCRATCH}{os.getpid()}-", ignore_cleanup_errors=True
        )
        memory = int(self._profile.worker.mem_gb * 1e9)
        with dask.config.set(
            {
                "distributed.scheduler.allowed-failures": 0,  # `run` tries again, and knows better with whom
                "distributed.worker.memory.spill": False,
                "distributed.worker.memory.target": False,
                # a tile's own ceiling was projected before the run; pausing a worker that holds one would only wait
                "distributed.worker.memory.pause": False,
                "distributed.worker.memory.terminate": 0.98,
            }
        ):
            self._cluster = LocalCluster(
                n_workers=self._profile.workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=memory,
                dashboard_address="127.0.0.1:0",
                host="127.0.0.1",
                local_directory=self._scratch.name,
                silence_logs=logging.ERROR,
            )
            self._client = Client(self._cluster)
        self._client.register_plugin(_DieWithDriver(os.getpid()))
        return self

    def run(self, function: TaskFunction, tasks: Iterable[TileTask]) -> Results:
        """Yield the results of all tasks; see `Runner`."""
        suspects = []
        for task, result in self._each(function, tasks, self._profile.workers * _IN_FLIGHT_PER_WORKER):
            if result is None:
                suspects.append(task)
            else:
                yield result
        # which of the tasks that a worker held when it died was the cause shows when each is tried alone
        for task in suspects:
            results = (r for _ in range(_LONE_ATTEMPTS) for _, r in self._each(function, [task], 1))
            yield next((r for r in results if r is not None), _killed(task))

    def _each(
        self, function: TaskFunction, tasks: Iterable[TileTask], width: int
    ) -> Generator[tuple[TileTask, TaskResult | None], None, None]:
        """Yield each task with its result, None where its worker died; so many are in flight at once."""
        assert self._client is not None
        client, waiting = self._client, deque(tasks)
        in_flight: dict[Any, TileTask] = {}
        finished: SimpleQueue[Any] = SimpleQueue()

        def submit() -> None:
            task = waiting.popleft()
            key = f"{task.stage}-{task.layer}-{task.epoch}-{task.tile}-{task.key}-{os.urandom(4).hex()}"
            future = client.submit(function, task, key=key, pure=False, retries=0)
            in_flight[future] = task
            future.add_done_callback(finished.put)

        try:
            for _ in range(min(len(waiting), width)):
                submit()
            while in_flight:
                future = self._next(finished)
                if future.status in (
                    "pending",
                    "lost",
                ):  # its worker died with the result: done anew elsewhere
                    future.add_done_callback(finished.put)
                    continue
                task = in_flight.pop(future)
                result = _result(future, task)
                future.release()
                if waiting:
                    submit()
                yield task, result
        finally:
            if in_flight:  # given up in the middle: what has not begun shall not begin
                client.cancel(list(in_flight), force=True)

    def _next(self, finished: SimpleQueue[Any]) -> Any:
        """Wait for a finished future, but not for workers that never come back."""
        scheduler: Any = self._cluster.scheduler  # type: ignore[union-attr]
        alone_since = time.monotonic()
        while True:
            try:
                return finished.get(timeout=1.0)
            except Empty:
                if scheduler.workers:
                    alone_since = time.monotonic()
            if time.monotonic() - alone_since > _NO_WORKERS_S:
                raise ClusterError(
                    f"All {self._profile.workers} workers ended and none came back in {_NO_WORKERS_S:.0f} s; "
                    "start with `slidecube doctor`, raise mem_gb, or use profile 'threads'"
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the workers, by force when they do not end in time: what a run has done stays done."""
        pids = [] if self._cluster is None else [nanny.pid for nanny in self._cluster.workers.values()]
        try:
            if self._client is not None:
                self._client.close(timeout=_CLOSE_S)
            if self._cluster is not None:
                self._cluster.close(timeout=_CLOSE_S)
        except TimeoutError:
            for pid in filter(None, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        finally:
            if self._scratch is not None:
                self._scratch.cleanup()


def _result(future: Any, task: TileTask) -> TaskResult | None:
    """Result of a finished future, None when its worker died."""
    if future.status == "finished":
        found: TaskResult = future.result()
        return found
    error = future.exception() if future.status == "error" else None
    if isinstance(error, KilledWorker):
        return None
    if error is not None:
        return failed(task, error)
    return TaskResult(task=task, status="failed", reason=f"the task was {future.status} by Dask")


def _killed(task: TileTask) -> TaskResult:
    reason = (
        f"the worker died {1 + _LONE_ATTEMPTS} times on this tile, the last times alone, most likely out of memory; "
        "raise mem_gb or lower workers"
    )
    return TaskResult(task=task, status="failed", reason=reason)


def _remove_stale_scratch() -> None:
    """Remove the scratch folders of killed drivers, as far as they are ours."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        pid = folder.name.removeprefix(_SCRATCH).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
