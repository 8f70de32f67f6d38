"""Who may write a tile, and whose it is when two attempts at it overlap: the right is asked for, again and again."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading

import numpy as np
import pytest

from slidecube.cluster.runner import TileTask
from slidecube.pipeline import staging
from slidecube.pipeline import tasks as tasks_module
from slidecube.pipeline import tile as tile_module
from slidecube.pipeline.config import load_config
from slidecube.pipeline.events import read_events
from slidecube.pipeline.layers import create_stores
from slidecube.pipeline.ledger import Ledger
from slidecube.pipeline.lock import Lock
from slidecube.pipeline.plan import plan
from slidecube.pipeline.run import run
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.staging import checksum, shard_file
from slidecube.pipeline.store import geobox_of
from slidecube.pipeline.tasks import TileContext, ledger_of, tasks_of
from slidecube.pipeline.tile import run_task


@pytest.fixture
def made(desk) -> RunPlan:
    made = plan(load_config(desk.toml))
    create_stores(made)
    return made


def first_of(made: RunPlan) -> tuple[TileTask, Ledger]:
    """A tile of the terrain, which is made quickly."""
    return next((task, ledger) for task, ledger in tasks_of(made) if task.layer.startswith("terrain"))


@pytest.fixture
def first(made) -> tuple[TileTask, Ledger]:
    return first_of(made)


def driver(made: RunPlan) -> Lock:
    return Lock(made.workspace.locks, run=made.run)


def context(made: RunPlan, lock: Lock, **changes: object) -> TileContext:
    held = TileContext(
        workspace=made.workspace.root, run=made.run, lock=lock.path.name, token=lock.token, threads=1
    )
    return dataclasses.replace(held, **changes)


def data(made: RunPlan) -> dict[str, bytes]:
    root = made.workspace.root
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*/c/*/*") if p.is_file()}


def test_a_record_carries_the_token_of_its_driver(made, first):
    task, ledger = first
    with driver(made) as lock:
        assert run_task(context(made, lock), task).status == "done"

    assert ledger.read(task.tile).driver == lock.token


def test_what_another_driver_recorded_meanwhile_is_taken_over_and_not_done_again(made, first, monkeypatch):
    """As a dead driver's worker does between its successor's look at what is due and the task."""
    task, ledger = first
    with driver(made) as dead:
        run_task(context(made, dead), task)
    before, stored = ledger.read(task.tile), data(made)
    monkeypatch.setitem(tile_module._STAGES, "cube", lambda *_: pytest.fail("it was done again"))
    with driver(made) as lock:
        result = run_task(context(made, lock), task)
        again = run_task(context(made, lock), task)

    assert ledger.read(task.tile) == dataclasses.replace(before, driver=lock.token)
    assert data(made) == stored
    assert result == again
    assert (result.status, result.scene_reads, result.bytes) == ("done", before.scene_reads, before.bytes)


def test_who_lost_the_workspace_takes_nothing_over(made, first):
    task, ledger = first
    with driver(made) as dead:
        run_task(context(made, dead), task)
    with driver(made) as gone:
        pass
    before = ledger.read(task.tile)

    result = run_task(context(made, gone), task)

    assert (result.status, result.fault) == ("failed", "fenced")
    assert ledger.read(task.tile) == before


def test_who_loses_the_workspace_in_mid_tile_writes_neither_data_nor_record(made, first, monkeypatch):
    task, ledger = first
    terrain = tile_module._MAKERS["terrain"]
    lock = driver(made)

    def lost(*args):
        found = terrain(*args)
        lock.__exit__(None, None, None)
        return found

    monkeypatch.setitem(tile_module._MAKERS, "terrain", lost)
    result = run_task(context(made, lock.__enter__()), task)

    assert (result.status, result.fault) == ("failed", "fenced")
    assert ledger.read(task.tile) is None
    assert data(made) == {}


def test_an_attempt_that_was_given_up_takes_nothing_from_the_one_that_was_done(made, first, monkeypatch):
    """A thread that was overdue, or a worker that was cut off, goes on with the token of its driver, and dies."""
    task, ledger = first
    terrain = tile_module._MAKERS["terrain"]

    def dies(*_, **__):
        raise SystemExit  # no Exception: as of a process that is killed here, no record follows

    with driver(made) as lock:

        def overtaken(*args):
            found = terrain(*args)
            monkeypatch.setitem(tile_module._MAKERS, "terrain", terrain)
            assert run_task(context(made, lock), dataclasses.replace(task, attempt=2)).status == "done"
            monkeypatch.setattr(tasks_module, "stage_tile", dies)
            return found

        monkeypatch.setitem(tile_module._MAKERS, "terrain", overtaken)
        with pytest.raises(SystemExit):
            run_task(context(made, lock), task)

    record = ledger.read(task.tile)
    assert record is not None, "the record of the attempt that was done is gone"
    assert (record.key, record.state) == (task.key, "done")


def as_recorded(made: RunPlan, task: TileTask) -> bool:
    """Tell whether the stored bytes of a tile of a layer are those of its record."""
    path, tile = made.workspace.layer(made.grid, task.layer), made.by_tile[task.tile]
    corner = geobox_of(path).affine
    at = (
        round((tile.geobox.affine.f - corner.f) / corner.e),
        round((tile.geobox.affine.c - corner.c) / corner.a),
    )
    record = ledger_of(made, task).read(task.tile)
    assert record is not None
    for name, told in record.checksums.items():
        file = shard_file(path, name, at_px=at, shard=made.grid.tile_px)
        if (checksum(file.read_bytes()) if file.is_file() else "empty") != told:
            return False
    return True


def with_a_hole(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a tile is whose worker could not read a scene."""
    return {
        name: np.where(np.arange(len(values))[:, None] < 100, values[0, 0], values)
        for name, values in data.items()
    }


def test_a_frozen_worker_is_not_overtaken_in_the_moment_of_its_writing(made, first, monkeypatch):
    task, _ = first
    commit, terrain = staging.StagedTile.commit, tile_module._MAKERS["terrain"]
    frozen, wake = threading.Event(), threading.Event()

    def freezes(*args):
        monkeypatch.setattr(staging.StagedTile, "commit", commit)
        frozen.set()
        assert wake.wait(30)
        commit(*args)

    def loses(*args):
        monkeypatch.setitem(tile_module._MAKERS, "terrain", terrain)
        return with_a_hole(terrain(*args))

    def succeed():
        assert frozen.wait(60)
        zombie.__exit__(None, None, None)  # it is believed dead
        with driver(made) as lock:
            taken.append(run_task(context(made, lock), task).status)

    monkeypatch.setattr(staging.StagedTile, "commit", freezes)
    monkeypatch.setitem(tile_module._MAKERS, "terrain", loses)
    zombie, taken = driver(made).__enter__(), []
    successor = threading.Thread(target=succeed)
    successor.start()
    late = threading.Timer(1.5, lambda: (taken.append("woken"), wake.set()))
    frozen_run = threading.Thread(target=lambda: run_task(context(made, zombie), task))
    frozen_run.start()
    assert frozen.wait(60)
    late.start()
    frozen_run.join(60)
    successor.join(60)

    assert taken == ["woken", "done"], "it was overtaken while it wrote"
    assert as_recorded(made, task)


def test_a_frozen_worker_changes_nothing_in_a_bucket_after_its_successor(desk, s3, monkeypatch):
    made = plan(load_config(desk.write(output={"workspace": s3, "formats": ["parquet"]}).toml))
    create_stores(made)
    task, ledger = first_of(made)
    commit, terrain = staging.StagedTile.commit, tile_module._MAKERS["terrain"]

    def frozen(staged, held):
        monkeypatch.setattr(staging.StagedTile, "commit", commit)
        held()  # we hold it still, and then freeze
        zombie.__exit__(None, None, None)
        with driver(made) as lock:
            assert run_task(context(made, lock), task).status == "done"
        commit(staged, lambda: None)

    def loses(*args):
        monkeypatch.setitem(tile_module._MAKERS, "terrain", terrain)
        return with_a_hole(terrain(*args))

    monkeypatch.setattr(staging.StagedTile, "commit", frozen)
    monkeypatch.setitem(tile_module._MAKERS, "terrain", loses)
    zombie = driver(made).__enter__()
    result = run_task(context(made, zombie), task)

    assert result.status == "failed"
    assert ledger.read(task.tile).driver != zombie.token
    assert as_recorded(made, task)


def test_what_a_killed_driver_recorded_and_did_not_tell_is_told_whatever_its_clock_said(desk, monkeypatch):
    """Times in records and events lie hours apart, in either direction; nothing is told twice, nothing is missing."""
    config = load_config(desk.toml)
    assert run(config, progress=False).complete
    events = next((desk.workspace / "events").glob("*.jsonl"))
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    tasks = [line for line in lines if line["event"] == "task"]
    # the driver is killed after its last records: some of its tasks are not told, and the run has no end
    untold = tasks[::3]
    kept = [line for line in lines if line not in untold and line["event"] != "run_ended"]
    for number, line in enumerate(kept):
        line["time"] = f"2031-01-01T{number % 24:02d}:00:00.000+00:00"  # its clock ran years ahead
    events.write_text("".join(f"{json.dumps(line)}\n" for line in kept))

    assert run(config, progress=False).complete

    told = [e for e in read_events(events) if e["event"] == "task"]
    said = ("layer", "epoch", "tile", "key", "status", "scene_reads", "driver")
    assert sorted(tuple(e[name] for name in said) for e in told) == sorted(
        tuple(e[name] for name in said) for e in tasks
    )
    assert sum(e["scene_reads"] for e in told) > 0


def test_a_record_that_was_on_its_way_when_its_driver_died_is_told(desk, monkeypatch):
    """A worker asked for the right to write just before its driver was taken over, and its disk was slow."""
    config = load_config(desk.toml)
    assert run(config, progress=False).complete
    events = next((desk.workspace / "events").glob("*.jsonl"))
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    late = next(line for line in lines if line["event"] == "task" and line["scene_reads"])
    kept = [line for line in lines if line != late and line["event"] != "run_ended"]
    events.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    record = next(desk.workspace.glob(f"layers/*/{late['layer']}.ledger/{late['tile']}.json"))
    held = record.rename(desk.folder / "on its way")
    module = sys.modules[run.__module__]
    real = module.write_event

    def tell(path, event, **fields):
        if event == "run_started":  # which is after the first look, and before what is due is known
            held.rename(record)
        real(path, event, **fields)

    monkeypatch.setattr(module, "write_event", tell)
    assert run(config, progress=False).complete

    told = [e for e in read_events(events) if e["event"] == "task"]
    said = ("layer", "tile", "key", "scene_reads", "driver")
    assert [tuple(e[name] for name in said) for e in told].count(tuple(late[name] for name in said)) == 1
    assert len(told) == sum(line["event"] == "task" for line in lines)


@pytest.mark.parametrize("when", ["before the end", "after the end"])
def test_a_tile_that_was_given_up_with_its_worker_and_finished_by_it_is_told(desk, monkeypatch, when):
    """A scheduler that dies makes workers look dead which go on: what they read counts, and counts once."""
    config = load_config(desk.toml)

    def loses(self, result):
        if result.scene_reads and not lost:
            lost.append(result)
            result = dataclasses.replace(
                result, status="failed", fault="worker", reason="its worker died", scene_reads=0
            )
        taken(self, result)

    lost = []
    module = sys.modules[run.__module__]
    taken = module._Driver._take
    monkeypatch.setattr(module._Driver, "_take", loses)
    if when == "after the end":
        monkeypatch.setattr(module, "GIVEN_UP", frozenset())  # nobody looks again
    assert not run(config, progress=False).complete
    monkeypatch.undo()

    events = next((desk.workspace / "events").glob("*.jsonl"))
    again = [run(config, progress=False) for _ in range(2)]

    (task,) = (result.task for result in lost)
    told = [e for e in read_events(events) if e["event"] == "task" and e["key"] == task.key]
    assert [(e["status"], e["scene_reads"]) for e in told] == [("failed", 0), ("done", lost[0].scene_reads)]
    assert [report.complete for report in again] == [True, True]
    assert [report.done.get("cube", 0) for report in again] == [0, 0]
