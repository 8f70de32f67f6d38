"""The Dask runner: worker processes on this machine, a bounded window of tasks, one record back from each."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import dask
from distributed import Client, LocalCluster, WorkerPlugin, as_completed
from distributed.scheduler import KilledWorker

from slidecube.cluster.resources import Profile
from slidecube.cluster.runner import TaskFunction, TaskResult, TileTask

_IN_FLIGHT_PER_WORKER = 2  # one running, one waiting: a worker never idles, and Ctrl-C loses little


class _DieWithDriver(WorkerPlugin):
    """A worker whose driver was killed must not go on writing: the kernel ends it too (Linux)."""

    def setup(self, worker: Any) -> None:
        del worker
        try:
            import ctypes  # noqa: PLC0415

            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        except (OSError, AttributeError):  # not Linux: distributed's own watch on the parent's pipe remains
            return


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
        self._scratch = tempfile.TemporaryDirectory(prefix="slidecube-dask-", ignore_cleanup_errors=True)
        memory = int(self._profile.worker.mem_gb * 1e9)
        with dask.config.set(
            {
                "distributed.scheduler.allowed-failures": 2,
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
        self._client.register_plugin(_DieWithDriver())
        return self

    def run(self, function: TaskFunction, tasks: Iterable[TileTask]) -> Iterator[TaskResult]:
        """Yield the results of all tasks; see `Runner`."""
        assert self._client is not None
        waiting = deque(tasks)
        by_key: dict[str, TileTask] = {}
        running = as_completed(raise_errors=False)

        def submit() -> None:
            task = waiting.popleft()
            key = f"{task.stage}-{task.layer}-{task.epoch}-{task.tile}-{task.key}-{os.urandom(4).hex()}"
            by_key[key] = task
            running.add(self._client.submit(function, task, key=key, pure=False, retries=0))  # type: ignore[union-attr]

        for _ in range(min(len(waiting), self._profile.workers * _IN_FLIGHT_PER_WORKER)):
            submit()
        for future in running:
            task = by_key.pop(future.key)
            yield _result(future, task)
            future.release()
            if waiting:
                submit()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the workers."""
        if self._client is not None:
            self._client.close()
        if self._cluster is not None:
            self._cluster.close(timeout=10)
        if self._scratch is not None:
            self._scratch.cleanup()


def _result(future: Any, task: TileTask) -> TaskResult:
    if future.status == "finished":
        found: TaskResult = future.result()
        return found
    error = future.exception() if future.status == "error" else None
    if isinstance(error, KilledWorker):
        reason = "the worker died on this tile three times, most likely out of memory; raise mem_gb or lower workers"
    else:
        reason = f"{type(error).__name__}: {error}" if error is not None else f"the task was {future.status}"
    return TaskResult(task=task, status="failed", reason=" ".join(reason.split()))
