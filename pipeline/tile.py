"""One tile, forward only: what a worker does for one task.

Inside, a failure is an exception; at the tile's edge, here in `run_task` and nowhere else, it becomes a value.
"""

from __future__ import annotations

import datetime as dt
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import dask.array as da
import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox

from slidecube.catalog.errors import CatalogError
from slidecube.catalog.grid import Tile
from slidecube.catalog.load import Loader, ReadLog, load, on_lattice
from slidecube.catalog.scenes import Scene, SceneTable
from slidecube.cluster.faults import Fault, fault_of
from slidecube.cluster.runner import TaskResult, TileTask
from slidecube.models.errors import ModelError
from slidecube.pipeline.blocks import by_block
from slidecube.pipeline.composite import MaskRule, Method, clear_mask, composite
from slidecube.pipeline.detect import detect_tile
from slidecube.pipeline.errors import PassingError, PipelineError
from slidecube.pipeline.fit import moments_tile, sample_tile
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.plan_files import read_plan
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.series import ndvi_series
from slidecube.pipeline.storage import Place
from slidecube.pipeline.store import Workspace
from slidecube.pipeline.tasks import TileContext, adopted, holding, ledger_of, record_tile, store_tile
from slidecube.pipeline.terrain import terrain


def run_task(context: TileContext, task: TileTask) -> TaskResult:
    """Do one task, write its data and then its record, and return what became of it; never raises for a bad tile."""
    try:
        record = _recorded(context, task)
    except Exception as error:  # noqa: BLE001  no room even for the record, say: the tile stays due
        return TaskResult(task=task, status="failed", reason=_reason(error), fault=_fault(error))
    return TaskResult(
        task=task,
        status=record.state,
        seconds=record.seconds,
        peak_mem_gb=record.peak_mem_gb,
        bytes=record.bytes,
        scene_reads=record.scene_reads,
        reason=record.reason,
        fault=cast("Fault | None", record.fault or None),
    )


def _recorded(context: TileContext, task: TileTask) -> Record:
    started = time.monotonic()
    plan = _plan(context.workspace, context.run)
    ledger = ledger_of(plan, task)
    earlier = ledger.read(task.tile)
    if earlier is not None and earlier.key == task.key and earlier.complete:
        lacks = context.mend and earlier.passing > 0 and task.attempt == 1
        if not lacks:  # its worker died after the record and before the answer
            with holding(plan, context):
                return adopted(ledger, earlier, context)
    context = replace(context, staged=[])
    try:
        try:
            record = _STAGES[task.stage](plan, task, context)
        except Exception as error:  # noqa: BLE001  the tile's edge
            record = _failed(task, error)
            _discard(context)
        record = replace(
            record,
            attempts=1 if earlier is None or earlier.key != task.key else earlier.attempts + 1,
            seconds=round(time.monotonic() - started, 3),
            peak_mem_gb=round(peak_rss_gb(), 3),
            host=socket.gethostname(),
            written_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            driver=context.token,
        )
        return record_tile(plan, task, record, context)
    finally:
        _discard(context)


def _discard(context: TileContext) -> None:
    """Remove what was staged and did not come to its place."""
    for staged in context.staged:
        staged.discard()
    context.staged.clear()


def optical_layer(
    scenes: Sequence[Scene],
    geobox: GeoBox,
    bands: Sequence[str],
    *,
    method: Method,
    mask: MaskRule,
    block_px: int,
    clear_tyx: da.Array | None = None,
    series: bool = False,
    log: ReadLog | None = None,
    loader: Loader = "odc-stac",
) -> xr.Dataset:
    """Composite of scenes over a window, lazily, block by block on the lattice.

    scenes : of one window of time; geobox : on the lattice's blocks; see `composite` for the rest
    clear_tyx : what may be used, when it is known already, as by `clear_observations`
    series : add `ndvi_mean` and `ndvi_std`; see `ndvi_series`
    Returns (y, x) uint16 variables: the bands, `clear_count`, `date_first`, `date_last`, `date`.
    """
    cube = load(scenes, geobox, bands, block_px=block_px, log=log, loader=loader)
    clear = (
        clear_observations(scenes, geobox, mask=mask, block_px=block_px, log=log, loader=loader)
        if clear_tyx is None
        else clear_tyx
    )
    data = {b: cube[b].data for b in bands}
    made = composite(data, clear, scenes=scenes, method=method)
    if series:
        made |= ndvi_series(data, clear, scenes=scenes)
    coords = {name: cube.coords[name] for name in ("y", "x", "spatial_ref")}
    return xr.Dataset({name: (("y", "x"), data) for name, data in made.items()}, coords=coords)


def clear_observations(
    scenes: Sequence[Scene],
    geobox: GeoBox,
    *,
    mask: MaskRule,
    block_px: int,
    log: ReadLog | None = None,
    loader: Loader = "odc-stac",
) -> da.Array:
    """Which pixels of which scene may be used, lazily: (t, y, x) bool.

    The classification is read one block wider on each side: the dilation looks into the neighbouring blocks.
    """
    halo = block_px if mask.dilation_px else 0
    around = geobox.pad(halo) if halo else geobox
    scl = load(scenes, around, ["SCL"], block_px=block_px, log=log, loader=loader)["SCL"].data
    clear = clear_mask(scl, mask, halo_px=halo)
    touches_tji = _touching(scenes, geobox, clear, block_px)
    only: da.Array = clear.map_blocks(
        lambda part, block_id: part & touches_tji[:, block_id[1], block_id[2], None, None], dtype=bool
    )
    return only


def _touching(scenes: Sequence[Scene], geobox: GeoBox, blocks: da.Array, block_px: int) -> np.ndarray:
    """Which scene's footprint touches which block: (t, rows of blocks, columns of blocks) bool.

    A scene is read on a tile when its footprint touches the tile. Pixels beyond the footprint may exist; taking them
    where the tile is large and not where it is small would make the result depend on the tiling.
    """
    row_ends, col_ends = (np.cumsum(sizes).tolist() for sizes in blocks.chunks[1:])
    boxes = [
        on_lattice(geobox[r - h : r, c - w : c], block_px)[0]
        for r, h in zip(row_ends, blocks.chunks[1], strict=True)
        for c, w in zip(col_ends, blocks.chunks[2], strict=True)
    ]
    found = SceneTable(scenes=tuple(scenes)).touching_each(boxes)
    ids = [{id(scene) for scene in table} for table in found]
    touches = [[id(scene) in there for there in ids] for scene in scenes]
    return np.array(touches, bool).reshape(len(scenes), len(row_ends), len(col_ends))


def _cube(plan: RunPlan, task: TileTask, context: TileContext) -> Record:
    tile, layer = plan.by_tile[task.tile], plan.by_layer[task.layer]
    scenes = plan.scenes_of(task.layer, task.tile)
    if not scenes:
        store_tile(plan, task, {}, context)
        what = "DEM" if layer.window is None else f"scene between {layer.window.start} and {layer.window.end}"
        return Record(tile=task.tile, key=task.key, state="empty", reason=f"no {what} touches this tile")
    log = ReadLog()
    make = _terrain_data if layer.window is None else _optical_data
    data = make(plan, tile, scenes, log, context)
    _within_budget(plan, task, log, scenes)
    seen = ~np.isnan(data["elevation"]) if layer.window is None else data["clear_count"] > 0
    checksums, size = store_tile(plan, task, data, context)
    common: dict[str, Any] = {
        "scenes": tuple(s.id for s in scenes),
        "scene_reads": len(log.read),
        "lost": tuple(sorted(log.lost)),
        "passing": len(log.passing),
        "substituted": tuple(sorted(log.substituted)),
    }
    numbers = {"px": int(seen.size), "seen_px": int(seen.sum())}
    if not seen.any():
        reason = (
            "the DEM has no height here"
            if layer.window is None
            else f"no clear observation in {len(scenes)} scenes"
        )
        return Record(
            tile=task.tile,
            key=task.key,
            state="empty",
            reason=reason,
            numbers=numbers,
            checksums=checksums,
            **common,
        )
    return Record(
        tile=task.tile, key=task.key, state="done", checksums=checksums, numbers=numbers, bytes=size, **common
    )


def _terrain_data(
    plan: RunPlan, tile: Tile, scenes: list[Scene], log: ReadLog, context: TileContext
) -> dict[str, np.ndarray]:
    lazy = terrain(
        scenes,
        tile.geobox,
        variables=plan.terrain_variables(),
        block_px=plan.grid.block_px,
        log=log,
        loader=context.loader,
    )
    return by_block(lazy, context.threads)


def _optical_data(
    plan: RunPlan, tile: Tile, scenes: list[Scene], log: ReadLog, context: TileContext
) -> dict[str, np.ndarray]:
    """Composite one tile in bounded memory: what is clear first, once, then one block after another."""
    cube, block_px = plan.config.cube, plan.grid.block_px
    mask = MaskRule(scl_classes=cube.mask.scl_classes, dilation_px=cube.mask.dilation_px)
    lazy = clear_observations(
        scenes, tile.geobox, mask=mask, block_px=block_px, log=log, loader=context.loader
    )
    clear = by_block({"clear": lazy}, context.threads)["clear"]
    layer = optical_layer(
        scenes,
        tile.geobox,
        cube.bands,
        method=cube.composite,
        mask=mask,
        block_px=block_px,
        series=bool(plan.series_variables()),
        clear_tyx=da.from_array(clear, chunks=(-1, block_px, block_px), name=False),
        log=log,
        loader=context.loader,
    )
    return by_block({name: layer[name].data for name in plan.optical_variables()}, context.threads)


_STAGES: dict[str, Callable[[RunPlan, TileTask, TileContext], Record]] = {
    "cube": _cube,
    "moments": moments_tile,
    "sample": sample_tile,
    "detect": detect_tile,
}


def peak_rss_gb() -> float:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6) * (1 if sys.platform == "darwin" else 1.024)


@lru_cache(maxsize=2)
def _plan(workspace: Place, run: str) -> RunPlan:
    return read_plan(Workspace(root=workspace), run)


def _within_budget(plan: RunPlan, task: TileTask, log: ReadLog, scenes: Sequence[Scene]) -> None:
    """Refuse a tile that lacks more scenes than it may, and wait for those that may come while it is worth it.

    Raises PassingError, by which the tile is tried again, and PipelineError when that would not help.
    """
    lost = sorted({(scene, asset) for scene, asset, _ in log.lost})
    if not lost:
        return
    first = min(log.lost)
    what = f"first: asset {first[1]!r} of item {first[0]!r}: {first[2]}"
    if log.passing and not task.last:
        raise PassingError(f"{len(log.passing)} assets cannot be read now; {what}", log.passing_fault)
    scenes_lost = {scene for scene, _ in lost}
    budget = plan.config.cube.max_lost_scenes
    if len(scenes_lost) > budget or scenes_lost == {s.id for s in scenes}:
        n = f"{len(scenes_lost)} of {len(scenes)}"
        message = f"{n} scenes cannot be read, more than max_lost_scenes={budget}; {what}"
        raise PassingError(message, log.passing_fault) if log.passing else PipelineError(message)


def _failed(task: TileTask, error: Exception) -> Record:
    ours = isinstance(error, PipelineError | CatalogError | ModelError)
    return Record(
        tile=task.tile,
        key=task.key,
        state="failed",
        reason=" ".join(_reason(error).split())[:1000],
        fault=_fault(error),
        traceback="" if ours else traceback.format_exc(),
    )


def _fault(error: Exception) -> Fault:
    return "data" if isinstance(error, ModelError) else fault_of(error)


def _reason(error: Exception) -> str:
    """Say in one line what went wrong; what the system said of a file comes first, the driver looks for it."""
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}"
    if isinstance(error, PipelineError | CatalogError | ModelError):
        return str(error)
    return f"{type(error).__name__}: {error}"
