"""Workers that are processes of a Dask cluster, on this machine or anywhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

import distributed
from distributed.scheduler import KilledWorker

from slidecube.cluster.clusters import Opened, open_cluster
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.malloc import keep_freed_memory
from slidecube.cluster.resources import Profile
from slidecube.cluster.runner import Outcome, TaskFunction, TaskResult, TileTask, failed

_LOOK_S = 1.0  # how often the scheduler is asked who is there
_GATHER_S = (
    20.0  # results are small; one that went down with its worker is waited for by the scheduler for ever
)
_CLOSE_S = 10.0  # after a worker was killed, closing hangs now and then


class DaskPool:
    """The workers of a Dask cluster, each with at most one task.

    Each task is placed on a worker by us and not by the scheduler: when a worker dies it is clear with which tile, and
    nothing waits behind a tile that takes long. The scheduler keeps nothing that a run needs.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._opened: Opened | None = None
        self._in_work: dict[str, tuple[Any, TileTask]] = {}
        self._ended: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._there: dict[str, str] = {}
        self._looked = 0.0
        self._alone_since: float | None = None
        self._shunned: dict[str, str] = {}
        self._folders: dict[str, str] = {}  # of each process its own: an address may be used again

    @property
    def address(self) -> str:
        """Address of the dashboard."""
        return str(self._opened.client.dashboard_link) if self._opened is not None else ""

    def workers(self) -> Mapping[str, str]:
        """Addresses and names of the workers that the scheduler knows."""
        if time.monotonic() - self._looked >= _LOOK_S or not self._there:
            self._look()
        return self._there

    def start(self, worker: str, function: TaskFunction, task: TileTask) -> None:
        """Give a worker a task."""
        key = f"{task.stage}-{task.layer}-{task.epoch}-{task.tile}-{task.key}-{os.urandom(4).hex()}"
        future = self._client.submit(_run, function, task, key=key, pure=False, retries=0, workers=[worker])
        self._in_work[worker] = (future, task)
        future.add_done_callback(lambda ended: self._ended.put((worker, ended)))

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return the attempts that ended, those of workers that are gone among them."""
        ended = set[str]()
        try:
            while not ended or not self._ended.empty():
                worker, future = self._ended.get(timeout=timeout_s)
                if worker in self._in_work and future.key == self._in_work[worker][0].key:
                    ended.add(worker)  # or else it was given up
        except Empty:
            self._look()
            ended = set(self._in_work) - set(self._there)  # a scheduler waits for them for ever
        return [self._outcome(worker) for worker in ended]

    def end(self, worker: str) -> None:
        """Kill a worker's process by its nanny; without one it is left alone and gets nothing more.

        Nobody waits for that: what does not answer for minutes would hold up the other workers.
        """
        self._shunned[worker] = self._folders.get(worker, "")
        self._there.pop(worker, None)
        threading.Thread(target=_kill, args=(self._client, worker), daemon=True).start()
        self._ended.put((worker, self._in_work[worker][0]))

    def give_up(self, *, patience_s: float | None) -> None:
        """Wait for the tasks in work, and let go of those that take longer; None = as long as it takes."""
        futures = [future for future, _ in self._in_work.values()]
        self._in_work.clear()
        if patience_s != 0:
            with self._client.as_current(), suppress(TimeoutError):
                distributed.wait(futures, timeout=patience_s)
        self._client.cancel([future for future in futures if not future.done()], force=True)

    def __enter__(self) -> Self:
        """Start the cluster, or connect to it."""
        self._opened = open_cluster(self._profile)
        self._alone_since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what was started, by force when it does not end in time: what a run has done stays done."""
        if self._opened is not None:
            self._opened.close(_CLOSE_S)

    @property
    def _client(self) -> Any:
        assert self._opened is not None
        return self._opened.client

    def _look(self) -> None:
        """Ask the scheduler who is there, and the cluster for who is missing."""
        assert self._opened is not None
        info = _known_to_scheduler(self._client)
        self._looked = time.monotonic()
        if info is None:
            return
        self._folders = {address: about["local_directory"] for address, about in info.items()}
        # another process at an address, where a site fixes the port, is another worker
        self._shunned = {
            address: folder
            for address, folder in self._shunned.items()
            if self._folders.get(address, folder) == folder
        }
        self._there = {
            address: str(about["name"]) for address, about in info.items() if address not in self._shunned
        }
        if self._there:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = self._looked
        self._opened.ask_for_missing(len(self._there))
        patience_s = self._opened.patience_s
        if self._alone_since is not None and self._looked - self._alone_since > patience_s:
            raise ClusterError(
                f"Not one of {self._profile.workers} workers is there, and none came in {patience_s:.0f} s; "
                f"{self._opened.remedy}"
            )

    def _outcome(self, worker: str) -> Outcome:
        future, task = self._in_work.pop(worker)
        result = None if worker in self._shunned else _result(future, task)
        if result is None:
            self._there.pop(worker, None)
            self._client.cancel([future], force=True)
        future.release()
        return Outcome(worker=worker, result=result)


def _known_to_scheduler(client: Any) -> Mapping[str, Any] | None:
    """Ask a scheduler for its workers; None when it was not heard this once.

    A client's own `scheduler_info` is no answer: every other second it is overwritten, in another thread, by one that
    lists no workers, and all of them would be taken for dead with the tiles they hold.
    """

    async def ask() -> dict[str, Any]:
        if client.scheduler is None:
            raise OSError("the connection is closed")
        identity: dict[str, Any] = await client.scheduler.identity(n_workers=-1)
        return identity

    try:
        workers: dict[str, Any] = client.sync(ask)["workers"]
    except (OSError, TimeoutError) as error:
        if client.status == "running":
            return None
        if client.status == "connecting":  # it has let go of all that was in work, and waits for a scheduler
            return {}
        raise ClusterError(
            f"The Dask scheduler does not answer any more ({' '.join(str(error).split())}); run the same command: "
            "what is done stays done"
        ) from None
    return workers


def _run(function: TaskFunction, task: TileTask) -> TaskResult:
    """Run a task in a worker process."""
    keep_freed_memory()
    return function(task)


def _result(future: Any, task: TileTask) -> TaskResult | None:
    """Result of a future, None when its worker died."""
    try:
        if future.status == "finished":
            found: TaskResult = future.result(timeout=_GATHER_S)
            return found
        error = future.exception(timeout=_GATHER_S) if future.status == "error" else None
    except (OSError, distributed.CancelledError, TimeoutError):  # it died with the result
        return None
    if error is None or isinstance(error, KilledWorker):
        return None
    return failed(task, error)


def _kill(client: Any, worker: str) -> None:
    with suppress(Exception):  # it is gone, or the client is
        client.run(_kill_process, workers=[worker], nanny=True, on_error="ignore")


def _kill_process(dask_worker: Any) -> None:
    os.kill(dask_worker.pid, signal.SIGKILL)
