"""Ctrl-C that lands in the driver's own work, between the results of its workers."""

from __future__ import annotations

import importlib
import threading
import time
from unittest import mock

import pytest

from slidecube.cluster.runner import Runner, TaskResult, TileTask
from slidecube.cluster.threads import ThreadsPool, threads_at_work

run_module = importlib.import_module("slidecube.pipeline.run")  # the package shows the function of that name


def test_nobody_waits_for_the_tiles_in_work(monkeypatch):
    """One of them may take hours, and nothing would be said."""
    through = threading.Event()

    def work(_: object, task: TileTask) -> TaskResult:
        if task.tile != "quick":
            through.wait(60)
        return TaskResult(task=task, status="done")

    monkeypatch.setattr(run_module, "run_task", work)
    tasks = [TileTask(stage="cube", layer="l", epoch="", tile=name, key=name) for name in ("quick", "slow")]
    driver = mock.MagicMock()
    driver.profile.workers = 2
    driver.plan.config.cluster.failure_budget = 0
    driver._take.side_effect = KeyboardInterrupt  # in an event, in the lock
    began = time.monotonic()
    try:
        with Runner(ThreadsPool(2), deadline_s=14_400) as runner, pytest.raises(KeyboardInterrupt):
            run_module._Driver._stage(driver, "cube", tasks, runner)
        assert time.monotonic() - began < 10
        assert threads_at_work()
    finally:
        through.set()
    while threads_at_work():
        time.sleep(0.01)
