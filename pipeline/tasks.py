"""Tasks: what a plan asks for, each with its key and its ledger, and the one way in which a tile is stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from slidecube.catalog.grid import Tiles
from slidecube.catalog.load import Loader
from slidecube.cluster.runner import TileTask
from slidecube.pipeline.errors import FencedError
from slidecube.pipeline.keys import content_key, text_keys
from slidecube.pipeline.ledger import Ledger, Record
from slidecube.pipeline.lock import holds
from slidecube.pipeline.run_plan import EpochPlan, RunPlan
from slidecube.pipeline.staging import StagedTile, stage_tile
from slidecube.pipeline.statistics import Statistics, cached_statistics, frozen_digest
from slidecube.pipeline.storage import Place, guard
from slidecube.pipeline.store import geobox_of

FIT_STAGES = ("moments", "sample")
"""Steps of the fit that run tile by tile."""

LAYER_STAGES = ("cube", "classify")
"""Stages that fill layers: from scenes, and from other layers by a tree."""

FENCED = "fenced: another driver holds the workspace now"
"""Reason of a tile that was not written because this driver was believed dead and its workspace taken over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileContext:
    """What a worker needs to know beside the task.

    workspace, run : where the plan is; lock, token : file of the driver's lock, and what must stand in it
    threads : of one tile; loader : of its cubes
    mend : make tiles again that do without scenes which a passing fault kept away
    staged : of the task in work, what its record takes to its place
    """

    workspace: Place
    run: str
    lock: str
    token: str
    threads: int
    loader: Loader = "odc-stac"
    mend: bool = False
    staged: list[StagedTile] = field(default_factory=list, compare=False)


def ledger_of(plan: RunPlan, task: TileTask) -> Ledger:
    """Ledger that holds a task's record."""
    if task.stage in LAYER_STAGES:
        return Ledger.of(plan.workspace.layer(plan.grid, task.layer))
    if task.stage in FIT_STAGES:
        return Ledger.of(plan.workspace.statistics(task.layer) / task.stage)
    return Ledger.of(plan.workspace.inventory(plan.inventory), task.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a plan asks for of one layer, or of one epoch's detection.

    what : name of the layer's store or of the epoch; keys : tile -> key of its task; ledger : of the records
    """

    stage: str
    what: str
    keys: Mapping[str, str]
    ledger: Ledger


def wanted_of(plan: RunPlan, *stages: str) -> Iterator[Wanted]:
    """Yield what a plan asks for, of all stages or of some, without a task for each tile."""
    for stage in LAYER_STAGES:
        if stage not in (stages or (stage,)):
            continue
        for layer in plan.layers:
            name = layer.name
            if (layer.kind == "land-cover") != (stage == "classify"):
                continue
            yield Wanted(stage=stage, what=name, keys=plan.keys[name], ledger=layer_ledger(plan, name))
    if "detect" in (stages or ("detect",)):
        for epoch in plan.epochs:
            ledger = Ledger.of(plan.workspace.inventory(plan.inventory), epoch.name)
            keys = detect_keys(plan, epoch.name)
            yield Wanted(stage="detect", what=epoch.name, keys=keys, ledger=ledger)


def tasks_of(plan: RunPlan, *stages: str) -> Iterator[tuple[TileTask, Ledger]]:
    """Yield all tasks of a plan, or those of some stages, done or not, each with the ledger of its record."""
    for wanted in wanted_of(plan, *stages):
        layer, epoch = (wanted.what, "") if wanted.stage in LAYER_STAGES else (plan.inventory, wanted.what)
        for tile, key in wanted.keys.items():
            task = TileTask(stage=wanted.stage, layer=layer, epoch=epoch, tile=tile, key=key)
            yield task, wanted.ledger


def detect_keys(plan: RunPlan, epoch: str) -> dict[str, str]:
    """Key of each tile's detection: what is detected, and the records of the 3 x 3 tiles that it reads."""
    made = plan.by_epoch[epoch]
    digest = frozen_digest(plan.workspace.statistics(made.stat_key)) if made.stat_key else ""
    return _keys(plan, made, made.detect_key, plan.inventory, digest)


def fit_tasks(plan: RunPlan, epoch: str, stage: str, *terms: str) -> Iterator[tuple[TileTask, Ledger]]:
    """Yield the tasks of a step of the fit, one a tile, each with the ledger of its record.

    stage : of `FIT_STAGES`; terms : what they depend on beside the layers
    """
    made = plan.by_epoch[epoch]
    ledger = Ledger.of(plan.workspace.statistics(made.stat_key) / stage)
    for tile, key in _keys(plan, made, stage, made.stat_key, *terms).items():
        yield TileTask(stage=stage, layer=made.stat_key, epoch=epoch, tile=tile, key=key), ledger


def _keys(plan: RunPlan, epoch: EpochPlan, *terms: str) -> dict[str, str]:
    """Keys of tasks that read all layers of the 3 x 3 tiles around a tile."""
    tiles = pa.array(plan.tiles.keys)
    said = [tiles]
    for name in epoch.layers:
        keys = pa.array(map(plan.keys[name].__getitem__, plan.tiles.keys), pa.string())
        known, states = _states(layer_ledger(plan, name))
        rows = pc.index_in(tiles, value_set=known["tile"])
        same = pc.fill_null(pc.equal(known["key"].take(rows), keys), False)
        said.append(pc.binary_join_element_wise(name, keys, pc.if_else(same, states.take(rows), ""), " "))
    # of each tile a digest, once, and not in each of its nine neighbours; the last one is of no tile
    read = pa.array([*text_keys(*said), ""])
    around = [read.take(pa.array(positions)) for positions in _around(plan.tiles)]
    return dict(zip(plan.tiles.keys, text_keys(content_key(*terms), tiles, *around), strict=True))


def _around(tiles: Tiles) -> list[npt.NDArray[np.int64]]:
    """Positions of the 3 x 3 tiles around each, an array for each of the nine; past the last where there is none."""
    row, col = tiles.rows, tiles.cols
    # one column more than there are: the right neighbour of a row's last is not the next row's first
    width = int(col.max(initial=0)) + 2
    order = np.argsort(row * width + col)
    codes = (row * width + col)[order]
    found = []
    for r, c in ((r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)):
        wanted = np.where(col + c >= 0, (row + r) * width + col + c, -1)
        at = np.searchsorted(codes, wanted).clip(max=len(codes) - 1)
        found.append(np.where(codes[at] == wanted, order[at], len(tiles)))
    return found


def _states(ledger: Ledger) -> tuple[pa.Table, pa.Array]:
    """What of a layer's records decides what is read from them: their key, and whether they are done and lack scenes.

    Returns a table of tiles and keys, and beside it a text each, "" of what failed.
    """
    known = ledger.table("key", "state", "lost").combine_chunks()
    lost = pc.dictionary_encode(known["lost"]).combine_chunks()  # a nation's records say few different things
    done = pa.array(map(_lacking, lost.dictionary.to_pylist()), pa.string()).take(lost.indices)
    return known, pc.if_else(pc.equal(known["state"], "failed"), "", done)


def _lacking(lost: str) -> str:
    if lost == "[]":
        return "done"
    lacking = sorted({(scene, asset) for scene, asset, _ in json.loads(lost)})
    return f"done {content_key(lacking)}" if lacking else "done"


def fitted_statistics(plan: RunPlan, epoch: EpochPlan) -> Statistics:
    """Return what was fitted for an epoch, with the landslide clusters that a person named instead of the rule's.

    Raises PipelineError when it is needed and not fitted.
    """
    if not epoch.stat_key:
        return Statistics(key="", digest="", mnf={}, detector=plan.model)
    folder = plan.workspace.statistics(epoch.stat_key)
    found = cached_statistics(folder, frozen_digest(folder), plan.model)
    return found.with_clusters((plan.config.detect.landslide_clusters or {}).get(epoch.stat_key))


def layer_ledger(plan: RunPlan, name: str) -> Ledger:
    """Ledger of a layer of the plan."""
    return Ledger.of(plan.workspace.layer(plan.grid, name))


def store_tile(
    plan: RunPlan, task: TileTask, data: dict[str, np.ndarray], context: TileContext
) -> tuple[dict[str, str], int]:
    """Bring a tile to the disk beside its place, where its record takes it over; returns checksums and bytes.

    data : of all variables, or {} to remove what another key left there
    """
    require_lock(plan, context)
    path, leading = plan.workspace.layer(plan.grid, task.layer), cast("tuple[int, ...]", ())
    if task.stage == "detect":
        path = plan.workspace.inventory(plan.inventory)
        leading = ([e.name for e in plan.epochs].index(task.epoch),)
    corner, first = geobox_of(path).affine, plan.by_tile[task.tile].geobox.affine
    at = (round((first.f - corner.f) / corner.e), round((first.c - corner.c) / corner.a))
    staged = stage_tile(path, data, at_px=at, shard=plan.grid.tile_px, leading=leading)
    context.staged.append(staged)
    return staged.checksums, staged.size


def record_tile(plan: RunPlan, task: TileTask, record: Record, context: TileContext) -> Record:
    """Put what was staged of a tile in its place, and its record; returns the record that counts now.

    On a disk nobody takes the workspace over between the question whether we hold it and the record. A bucket cannot
    be held: there each object is written where it is still the one that was there before the question.
    Raises FencedError when another driver holds the workspace.
    """
    ledger = ledger_of(plan, task)
    with holding(plan, context):
        there = ledger.read(task.tile)
        if not context.mend and there is not None and there.key == task.key and there.complete:
            return adopted(ledger, there, context)  # another attempt made it, after ours was given up
        if context.staged:
            # while its data changes below it, a record would vouch for a mixture
            ledger.forget(task.tile)
        for staged in context.staged:
            staged.commit(partial(require_lock, plan, context))
        require_lock(plan, context)
        ledger.write(record)
    return record


def adopted(ledger: Ledger, record: Record, context: TileContext) -> Record:
    """Take over a record that another driver wrote after we began: we tell of it now, and it would be told twice."""
    if record.driver == context.token:
        return record
    ledger.write(ours := replace(record, driver=context.token))
    return ours


@contextmanager
def holding(plan: RunPlan, context: TileContext) -> Iterator[None]:
    """Hold the workspace for a moment: on a disk nobody can take it over while the block runs.

    Raises FencedError when another driver has it.
    """
    lock = plan.workspace.locks / context.lock
    with guard(lock) if isinstance(lock, Path) else nullcontext():
        require_lock(plan, context)
        yield


def require_lock(plan: RunPlan, context: TileContext) -> None:
    """Raise PipelineError when this driver does not hold the workspace any more."""
    if not holds(plan.workspace.locks / context.lock, context.token):
        raise FencedError(FENCED)
