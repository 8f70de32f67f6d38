"""Workers that are threads of this process: nothing to start."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self
from weakref import WeakSet

from slidecube.cluster.runner import Outcome, TaskFunction, TaskResult, TileTask, failed

_left_behind: WeakSet[threading.Thread] = WeakSet()


class ThreadsPool:
    """So many threads, each with at most one task.

    A thread cannot be ended from outside: one that is overdue is left behind and another one takes its place. What it
    still writes are the bytes that its successor writes, and its record takes the place of none that is done.
    """

    address = ""

    def __init__(self, workers: int) -> None:
        self._size = workers
        self._inboxes: dict[str, SimpleQueue[tuple[TaskFunction, TileTask] | None]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._busy: set[str] = set()
        self._ended: SimpleQueue[Outcome] = SimpleQueue()
        self._made = 0

    def workers(self) -> Mapping[str, str]:
        """Addresses and names of the threads."""
        return {address: address for address in self._threads}

    def start(self, worker: str, function: TaskFunction, task: TileTask) -> None:
        """Give a thread a task."""
        self._busy.add(worker)
        self._inboxes[worker].put((function, task))

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return the attempts that ended."""
        try:
            found = [self._ended.get(timeout=timeout_s)]
            while not self._ended.empty():
                found.append(self._ended.get_nowait())
        except Empty:
            return []
        self._busy -= {outcome.worker for outcome in found}
        return found

    def end(self, worker: str) -> None:
        """Leave a thread behind."""
        _left_behind.add(self._threads[worker])
        self._dismiss(worker)
        self._make()
        self._ended.put(Outcome(worker=worker, result=None))

    def give_up(self, *, patience_s: float | None) -> None:
        """Wait for the tasks in work, and leave behind the threads that take longer; None = as long as it takes."""
        until = None if patience_s is None else time.monotonic() + patience_s
        for worker in list(self._busy):
            thread = self._threads.get(worker)
            self._dismiss(worker)
            if thread is None:
                continue
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
            if thread.is_alive():
                _left_behind.add(thread)
            self._make()
        self._busy.clear()

    def __enter__(self) -> Self:
        """Start the threads."""
        for _ in range(self._size):
            self._make()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the idle ones end."""
        for worker in list(self._threads):
            self._dismiss(worker)

    def _make(self) -> None:
        self._made += 1
        name = f"slidecube-worker-{self._made}"
        inbox: SimpleQueue[tuple[TaskFunction, TileTask] | None] = SimpleQueue()
        # daemons: one that hangs must not keep the process
        thread = threading.Thread(target=_work, args=(name, inbox, self._ended), name=name, daemon=True)
        self._inboxes[name], self._threads[name] = inbox, thread
        thread.start()

    def _dismiss(self, worker: str) -> None:
        self._threads.pop(worker, None)
        inbox = self._inboxes.pop(worker, None)
        if inbox is not None:
            inbox.put(None)


def threads_at_work() -> bool:
    """Tell whether a thread was left behind in the middle of a task."""
    return any(thread.is_alive() for thread in _left_behind)


def _work(
    name: str, inbox: SimpleQueue[tuple[TaskFunction, TileTask] | None], ended: SimpleQueue[Outcome]
) -> None:
    while (given := inbox.get()) is not None:
        function, task = given
        result: TaskResult
        try:
            result = function(task)
        except Exception as error:  # noqa: BLE001  one task must not end the others
            result = failed(task, error)
        ended.put(Outcome(worker=name, result=result))
