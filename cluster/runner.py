"""Runners: a function over tasks, somewhere.

A runner knows "a task with a key and a function" and nothing of tiles. Results never travel through it: the function
writes to the store and returns a record of a few hundred bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

from slidecube.cluster.resources import Profile

Status = Literal["done", "empty", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileTask:
    """One piece of work: a stage of a layer (or of an epoch's detection) on one tile, and the key that says which."""

    stage: str
    layer: str
    epoch: str
    tile: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What became of a task: a value, never an exception.

    seconds : wall time; peak_mem_gb : of the process; bytes : written; reason : one line when empty or failed
    scene_reads : scenes of which pixels were read
    """

    task: TileTask
    status: Status
    seconds: float = 0.0
    peak_mem_gb: float = 0.0
    bytes: int = 0
    scene_reads: int = 0
    reason: str = ""


TaskFunction = Callable[[TileTask], TaskResult]
Results = Generator[TaskResult, None, None]


class Runner(Protocol):
    """Maps a function over tasks with a bounded number of them in flight.

    `run` yields one result a task as they finish, in any order. The function itself turns its failures into results;
    what it still raises, and the death of a worker, become failed results too. Closing the generator early gives up
    what has not begun, and waits for what has or ends it.
    """

    @property
    def address(self) -> str:
        """Where to look at it: a dashboard's address, or "" when there is none."""
        ...

    def run(self, function: TaskFunction, tasks: Iterable[TileTask]) -> Results:
        """Yield the results of all tasks."""
        ...

    def __enter__(self) -> Self:
        """Start what needs starting."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        ...


class ThreadsRunner:
    """Tasks in this process: one after another, or `workers` at once on threads. Nothing to start."""

    address = ""

    def __init__(self, profile: Profile) -> None:
        self._workers = profile.workers

    def run(self, function: TaskFunction, tasks: Iterable[TileTask]) -> Results:
        """Yield the results of all tasks; see `Runner`."""
        if self._workers == 1:
            yield from (_guarded(function, task) for task in tasks)
            return
        waiting = deque(tasks)
        pool = ThreadPoolExecutor(self._workers)
        running: set[Future[TaskResult]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < self._workers:
                    running.add(pool.submit(_guarded, function, waiting.popleft()))
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        """Nothing to start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to stop."""


def failed(task: TileTask, error: BaseException) -> TaskResult:
    """Result of a task whose function raised."""
    return TaskResult(task=task, status="failed", reason=" ".join(f"{type(error).__name__}: {error}".split()))


def _guarded(function: TaskFunction, task: TileTask) -> TaskResult:
    try:
        return function(task)
    except Exception as error:  # noqa: BLE001  one task must not end the others
        return failed(task, error)


def open_runner(profile: Profile) -> Runner:
    """Make the runner of a profile; Dask is imported only when it is asked for."""
    if profile.runner == "dask-local":
        from slidecube.cluster.dask import DaskRunner  # noqa: PLC0415

        return DaskRunner(profile)
    return ThreadsRunner(profile)
