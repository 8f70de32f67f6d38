"""The runner: a function over tasks, somewhere, until each is done or given up.

A runner knows "a task with a key and a function" and nothing of tiles. Results never travel through it: the function
writes to the store and returns a record of a few hundred bytes. Where tasks run is a `Pool`; what is tried again, when
and on which worker is decided here, once for all pools.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Protocol, Self

from slidecube.cluster.errors import ClusterError
from slidecube.cluster.faults import PASSING, RETRIES, Fault, Retry, fault_of

Status = Literal["done", "empty", "failed"]

HOPELESS = 25
"""Tasks that fail one after another before the rest is left alone: nothing works then, and a nation is a long list."""

_LOOK_S = 1.0  # how often deadlines and new workers are looked for while nothing happens


@dataclass(frozen=True, slots=True, kw_only=True)
class TileTask:
    """One piece of work: a stage of a layer (or of an epoch's detection) on one tile, and the key that says which.

    attempt : which one it is, from 1; last : True when a passing fault will not be tried again
    suspect : it failed in an earlier run, and its failing again says nothing of the others
    """

    stage: str
    layer: str
    epoch: str
    tile: str
    key: str
    attempt: int = field(default=1, compare=False)
    last: bool = field(default=True, compare=False)
    suspect: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What became of a task: a value, never an exception.

    seconds : wall time; peak_mem_gb : of the process; bytes : written; reason : one line when empty or failed
    scene_reads : scenes of which pixels were read; fault : class of what failed
    """

    task: TileTask
    status: Status
    seconds: float = 0.0
    peak_mem_gb: float = 0.0
    bytes: int = 0
    scene_reads: int = 0
    reason: str = ""
    fault: Fault | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one attempt ended: the result, or None when the worker died with it."""

    worker: str
    result: TaskResult | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried:
    """An attempt that failed and is followed by another one, for whoever keeps the events."""

    task: TileTask
    fault: Fault
    reason: str
    worker: str
    wait_s: float


TaskFunction = Callable[[TileTask], TaskResult]
Results = Generator[TaskResult, None, None]
Tell = Callable[[Retried], None]


class Pool(Protocol):
    """Workers, each of which holds at most one task at a time.

    A worker is known by its address; one that comes back after its death has another one. Its name is that of the
    place, such as a host: a task that failed there is tried elsewhere first.
    """

    @property
    def address(self) -> str:
        """Where to look at it: a dashboard's address, or "" when there is none."""
        ...

    def workers(self) -> Mapping[str, str]:
        """Addresses of the workers that are there now, with their names; raises ClusterError when none will come."""
        ...

    def start(self, worker: str, function: TaskFunction, task: TileTask) -> None:
        """Give a worker a task."""
        ...

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return the attempts that ended, at least one unless the time is over."""
        ...

    def end(self, worker: str) -> None:
        """End a worker whose task is overdue; an outcome without result follows."""
        ...

    def give_up(self, *, patience_s: float | None) -> None:
        """Let go of the tasks in work: wait so long for them, None = as long as it takes, and leave the others."""
        ...

    def __enter__(self) -> Self:
        """Start what needs starting."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        ...


@dataclass(slots=True)
class _InWork:
    """A task on a worker."""

    task: TileTask
    name: str
    since: float
    overdue: bool = False


@dataclass(slots=True)
class _Queue:
    """Tasks that wait: the first attempts in their order, later ones from a time on."""

    fresh: deque[TileTask]
    later: list[tuple[float, int, TileTask]] = field(default_factory=list)
    failed_on: dict[TileTask, set[str]] = field(default_factory=dict)
    faults: dict[TileTask, dict[Fault, int]] = field(default_factory=dict)
    _count: int = 0

    def __bool__(self) -> bool:
        return bool(self.fresh or self.later)

    def again(self, task: TileTask, wait_s: float) -> None:
        self._count += 1
        heapq.heappush(self.later, (time.monotonic() + wait_s, self._count, task))

    def take(self, name: str, names: set[str]) -> TileTask | None:
        """Take a task for a worker of a name, of those of `names`; one that failed here goes elsewhere if it can."""
        now, passed, found = time.monotonic(), [], None
        while self.later and self.later[0][0] <= now and found is None:
            entry = heapq.heappop(self.later)
            failed = self.failed_on.get(entry[2], set())
            if name in failed and names - failed:
                passed.append(entry)
            else:
                found = entry[2]
        for entry in passed:
            heapq.heappush(self.later, entry)
        return found if found is not None or not self.fresh else self.fresh.popleft()

    def forget(self, task: TileTask) -> None:
        self.failed_on.pop(task, None)
        self.faults.pop(task, None)


class Runner:
    """Maps a function over tasks with one task a worker in work.

    `run` yields one result a task as they finish, in any order. The function itself turns its failures into results;
    what it still raises, the death of a worker and a missed deadline become failed results, too. Results of a fault
    that is worth it are tried again; see `RETRIES`. Closing the generator early gives up what has not begun, and waits
    for what has, but not after `leave`.
    """

    def __init__(
        self, pool: Pool, *, deadline_s: float | None = None, retries: Mapping[Fault, Retry] = RETRIES
    ) -> None:
        self._pool = pool
        self._deadline_s = deadline_s
        self._retries = retries
        self._draining = threading.Event()
        self._leaving = False

    @property
    def address(self) -> str:
        """Where to look at it: a dashboard's address, or "" when there is none."""
        return self._pool.address

    def drain(self) -> None:
        """Begin nothing more; what is in work comes to its end. May be called from a signal handler."""
        self._draining.set()

    @property
    def draining(self) -> bool:
        """True after `drain`."""
        return self._draining.is_set()

    def leave(self) -> None:
        """Wait for nothing when the results are closed: whoever reads them was interrupted and is on the way out."""
        self._leaving = True

    def __enter__(self) -> Self:
        """Start the workers."""
        self._pool.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop them."""
        self._pool.__exit__(kind, error, trace)

    def run(
        self,
        function: TaskFunction,
        tasks: Iterable[TileTask],
        *,
        tell: Tell | None = None,
        hopeless: int = HOPELESS,
    ) -> Results:
        """Yield the results of all tasks; those that were not begun when it was drained are left out.

        tell : told of every attempt that is followed by another one
        hopeless : tasks that may not fail in a row, those not counted that failed in an earlier run
        Raises ClusterError when so many fail in a row while others wait, or when no worker is left.
        """
        queue, in_work, in_a_row = _Queue(deque(tasks)), dict[str, _InWork](), 0
        try:
            while self._fill(queue, in_work, function):
                for outcome in self._pool.wait(self._patience_s(queue)):
                    work = in_work.pop(outcome.worker, None)
                    if work is None:
                        continue
                    result = self._judge(queue, work, outcome, tell)
                    if result is None:
                        continue
                    yield result
                    if result.status != "failed":
                        in_a_row = 0
                    elif not result.task.suspect:
                        in_a_row += 1
                    if in_a_row >= hopeless and queue:
                        raise ClusterError(
                            f"{in_a_row} tiles failed one after another, and the rest was not begun; the last: "
                            f"{result.reason}"
                        )
                self._end_overdue(in_work)
        except KeyboardInterrupt:
            self.leave()
            raise
        finally:
            if in_work:
                self._pool.give_up(patience_s=0.0 if self._leaving else self._left_s(in_work))

    def _fill(self, queue: _Queue, in_work: dict[str, _InWork], function: TaskFunction) -> bool:
        """Give every idle worker a task; tells whether there is anything to wait for."""
        if self.draining:
            return bool(in_work)
        workers = self._pool.workers() if queue else {}
        names = set(workers.values())
        one_try = self._retries["transient"].attempts <= 1
        for worker, name in workers.items():
            if worker in in_work:
                continue
            task = queue.take(name, names)
            if task is None:
                continue
            if task.attempt == 1:
                task = replace(task, last=one_try)
            in_work[worker] = _InWork(task, name, time.monotonic())
            self._pool.start(worker, function, task)
        return bool(in_work or queue)

    def _patience_s(self, queue: _Queue) -> float:
        if not queue.later:
            return _LOOK_S
        return min(_LOOK_S, max(0.01, queue.later[0][0] - time.monotonic()))

    def _left_s(self, in_work: Mapping[str, _InWork]) -> float | None:
        """Seconds until what is in work is overdue, None when nothing ever is."""
        if self._deadline_s is None:
            return None
        return max(0.0, self._deadline_s - min(time.monotonic() - work.since for work in in_work.values()))

    def _end_overdue(self, in_work: dict[str, _InWork]) -> None:
        if self._deadline_s is None:
            return
        for worker, work in in_work.items():
            if not work.overdue and time.monotonic() - work.since > self._deadline_s:
                work.overdue = True
                self._pool.end(worker)

    def _judge(self, queue: _Queue, work: _InWork, outcome: Outcome, tell: Tell | None) -> TaskResult | None:
        """Return the result of an attempt, None when the task is tried again."""
        result = outcome.result or self._lost(queue, work)
        task, fault = work.task, result.fault
        if result.status != "failed" or fault is None:
            queue.forget(task)
            return result
        counts = queue.faults.setdefault(task, {})
        counts[fault] = counts.get(fault, 0) + 1
        retry = self._retries[fault]
        if counts[fault] >= retry.attempts or self.draining:
            queue.forget(task)
            return result
        wait_s = retry.wait_s(counts[fault])
        if fault not in PASSING:
            queue.failed_on.setdefault(task, set()).add(work.name)
        if tell is not None:
            tell(Retried(task=task, fault=fault, reason=result.reason, worker=outcome.worker, wait_s=wait_s))
        passing = sum(n for f, n in counts.items() if f in PASSING)
        last = passing + 1 >= self._retries["transient"].attempts
        queue.again(replace(task, attempt=task.attempt + 1, last=last), wait_s)
        return None

    def _lost(self, queue: _Queue, work: _InWork) -> TaskResult:
        """Result of an attempt whose worker is gone."""
        before = queue.faults.get(work.task, {})
        seconds = round(time.monotonic() - work.since, 3)
        if work.overdue:
            reason = (
                f"not done after {seconds:.0f} s, {before.get('deadline', 0) + 1} times, and its worker was ended; "
                "raise deadline_min, or lower tile_px"
            )
            return TaskResult(
                task=work.task, status="failed", seconds=seconds, reason=reason, fault="deadline"
            )
        reason = (
            f"its worker died {before.get('worker', 0) + 1} times, each time alone with this tile, most likely out of "
            "memory; raise mem_gb or lower workers"
        )
        return TaskResult(task=work.task, status="failed", seconds=seconds, reason=reason, fault="worker")


def failed(task: TileTask, error: BaseException) -> TaskResult:
    """Result of a task whose function raised."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return TaskResult(task=task, status="failed", reason=reason, fault=fault_of(error))
