"""One tile, forward only: what a worker does for one task.

Inside, a failure is an exception; at the tile's edge, here in `run_task` and nowhere else, it becomes a value.
"""

from __future__ import annotations

import datetime as dt
import math
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import dask
import dask.array as da
import numpy as np
import rasterio.features
import scipy.ndimage
import xarray as xr
from odc.geo.geobox import GeoBox

from slidecube.catalog.errors import CatalogError
from slidecube.catalog.grid import Tile, cuts
from slidecube.catalog.load import ReadLog, load, on_lattice
from slidecube.catalog.scenes import Scene, SceneTable
from slidecube.cluster.runner import TaskResult, TileTask
from slidecube.models.errors import ModelError
from slidecube.models.predict import predict
from slidecube.pipeline.composite import MaskRule, Method, clear_mask, composite
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import Layers, build_features, required_variables
from slidecube.pipeline.inventory import (
    LANDSLIDE_NODATA,
    PROBABILITY_NODATA,
    PROBABILITY_SCALE,
    REASONS,
    Observability,
)
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.ledger import Ledger, Record
from slidecube.pipeline.lock import holds
from slidecube.pipeline.plan import RunPlan, halo_px, minimum_size_px, read_plan
from slidecube.pipeline.store import Workspace, erase_tile, geobox_of, read_window, stored_bytes, write_tile
from slidecube.pipeline.terrain import SLOPE_NODATA, terrain

FENCED = "fenced: another driver holds the workspace now"
"""Reason of a tile that was not written because this driver was believed dead and its workspace taken over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileContext:
    """What a worker needs to know beside the task.

    workspace, run : where the plan is; token : of the driver's lock; threads : of one tile
    """

    workspace: Path
    run: str
    token: str
    threads: int


def run_task(context: TileContext, task: TileTask) -> TaskResult:
    """Do one task, write its data and then its record, and return what became of it; never raises for a bad tile."""
    try:
        record = _recorded(context, task)
    except Exception as error:  # noqa: BLE001  no room even for the record, say: the tile stays due
        return TaskResult(task=task, status="failed", reason=_reason(error))
    return TaskResult(
        task=task,
        status=record.state,
        seconds=record.seconds,
        peak_mem_gb=record.peak_mem_gb,
        bytes=record.bytes,
        scene_reads=record.scene_reads,
        reason=record.reason,
    )


def _recorded(context: TileContext, task: TileTask) -> Record:
    started = time.monotonic()
    plan = _plan(context.workspace, context.run)
    ledger = ledger_of(plan, task)
    earlier = ledger.read(task.tile)
    if earlier is not None and earlier.key == task.key and earlier.complete:
        return earlier  # its worker died after the record and before the answer
    try:
        record = _STAGES[task.stage](plan, task, context)
    except Exception as error:  # noqa: BLE001  the tile's edge
        ours = isinstance(error, PipelineError | CatalogError | ModelError)
        record = _failed(task, _reason(error), "" if ours else traceback.format_exc())
    record = replace(
        record,
        attempts=1 if earlier is None or earlier.key != task.key else earlier.attempts + 1,
        seconds=round(time.monotonic() - started, 3),
        peak_mem_gb=round(peak_rss_gb(), 3),
        host=socket.gethostname(),
        written_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )
    _require_lock(plan, context)
    ledger.write(record)
    return record


def ledger_of(plan: RunPlan, task: TileTask) -> Ledger:
    """Ledger that holds a task's record."""
    if task.stage == "cube":
        return Ledger.of(plan.workspace.layer(plan.grid, task.layer))
    return Ledger.of(plan.workspace.inventory(plan.inventory), task.epoch)


def optical_layer(
    scenes: Sequence[Scene],
    geobox: GeoBox,
    bands: Sequence[str],
    *,
    method: Method,
    mask: MaskRule,
    block_px: int,
    clear_tyx: da.Array | None = None,
    log: ReadLog | None = None,
) -> xr.Dataset:
    """Composite of scenes over a window, lazily, block by block on the lattice.

    scenes : of one window of time; geobox : on the lattice's blocks; see `composite` for the rest
    clear_tyx : what may be used, when it is known already, as by `clear_observations`
    Returns (y, x) uint16 variables: the bands, `clear_count`, `date_first`, `date_last`, `date`.
    """
    cube = load(scenes, geobox, bands, block_px=block_px, log=log)
    clear = (
        clear_observations(scenes, geobox, mask=mask, block_px=block_px, log=log)
        if clear_tyx is None
        else clear_tyx
    )
    made = composite({b: cube[b].data for b in bands}, clear, scenes=scenes, method=method)
    coords = {name: cube.coords[name] for name in ("y", "x", "spatial_ref")}
    return xr.Dataset({name: (("y", "x"), data) for name, data in made.items()}, coords=coords)


def clear_observations(
    scenes: Sequence[Scene],
    geobox: GeoBox,
    *,
    mask: MaskRule,
    block_px: int,
    log: ReadLog | None = None,
) -> da.Array:
    """Which pixels of which scene may be used, lazily: (t, y, x) bool.

    The classification is read one block wider on each side: the dilation looks into the neighbouring blocks.
    """
    halo = block_px if mask.dilation_px else 0
    around = geobox.pad(halo) if halo else geobox
    scl = load(scenes, around, ["SCL"], block_px=block_px, log=log)["SCL"].data
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
        _store(plan, task, {}, context)
        what = "DEM" if layer.window is None else f"scene between {layer.window.start} and {layer.window.end}"
        return Record(tile=task.tile, key=task.key, state="empty", reason=f"no {what} touches this tile")
    log = ReadLog()
    make = _terrain_data if layer.window is None else _optical_data
    data = make(plan, tile, scenes, log, context.threads)
    _within_budget(plan, log, scenes)
    seen = ~np.isnan(data["elevation"]) if layer.window is None else data["clear_count"] > 0
    checksums, size = _store(plan, task, data, context)
    common: dict[str, Any] = {
        "scenes": tuple(s.id for s in scenes),
        "scene_reads": len(log.read),
        "lost": tuple(sorted(log.lost)),
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
    plan: RunPlan, tile: Tile, scenes: list[Scene], log: ReadLog, threads: int
) -> dict[str, np.ndarray]:
    return by_block(terrain(scenes, tile.geobox, block_px=plan.grid.block_px, log=log), threads)


def _optical_data(
    plan: RunPlan, tile: Tile, scenes: list[Scene], log: ReadLog, threads: int
) -> dict[str, np.ndarray]:
    """Composite one tile in bounded memory: what is clear first, once, then one block after another."""
    cube, block_px = plan.config.cube, plan.grid.block_px
    mask = MaskRule(scl_classes=cube.mask.scl_classes, dilation_px=cube.mask.dilation_px)
    lazy = clear_observations(scenes, tile.geobox, mask=mask, block_px=block_px, log=log)
    clear = by_block({"clear": lazy}, threads)["clear"]
    layer = optical_layer(
        scenes,
        tile.geobox,
        cube.bands,
        method=cube.composite,
        mask=mask,
        block_px=block_px,
        clear_tyx=da.from_array(clear, chunks=(-1, block_px, block_px), name=False),
        log=log,
    )
    return by_block({name: layer[name].data for name in plan.optical_variables()}, threads)


def _detect(plan: RunPlan, task: TileTask, context: TileContext) -> Record:
    tile, epoch = plan.by_tile[task.tile], plan.by_epoch[task.epoch]
    for name in (epoch.pre, epoch.post, epoch.terrain):
        if not _layer_ledger(plan, name).complete(tile.key, plan.tasks[name][tile.key][0]):
            raise PipelineError(
                f"Layer {name} is not done on tile {tile.key}; the tile is detected when it is"
            )
    card = plan.model.card
    minimum_px = minimum_size_px(card.min_area_m2, plan.grid.resolution_m)
    halo = halo_px(card, plan.grid)
    window = tile.geobox.pad(halo) if halo else tile.geobox
    layers = _read_layers(plan, epoch.name, tile, halo)
    inside = _aoi_mask(plan, window)
    probability = _quantised(_probability(plan, layers, tile, halo, context.threads))
    seen, reason = _observable(layers, probability)
    probability[~(seen & inside)] = PROBABILITY_NODATA
    hit = (probability != PROBABILITY_NODATA) & (
        probability >= math.ceil(card.threshold / PROBABILITY_SCALE - 1e-9)
    )
    kept = without_small(hit, minimum_px)
    core = np.s_[halo : halo + tile.geobox.shape[0], halo : halo + tile.geobox.shape[1]]
    seen, inside, reason = seen[core], inside[core], reason[core]
    judged = np.where(seen, Observability.OBSERVED, Observability.NOT_OBSERVABLE)
    observability = np.where(inside, judged, Observability.OUTSIDE_AOI).astype(np.uint8)
    data = {
        "probability": np.ascontiguousarray(probability[core]),
        "spread": np.full(tile.geobox.shape, PROBABILITY_NODATA, np.uint16),  # one member has none
        "landslide": np.where(observability == Observability.OBSERVED, kept[core], LANDSLIDE_NODATA).astype(
            np.uint8
        ),
        "observability": observability,
        "reason": np.where(observability == Observability.NOT_OBSERVABLE, reason, 0).astype(np.uint8),
    }
    checksums, size = _store(plan, task, data, context)
    numbers = {value.name.lower(): int((observability == value).sum()) for value in Observability}
    numbers |= {f"reason {i}": int((data["reason"] == i).sum()) for i in REASONS if i}
    numbers["landslide_px"] = int((data["landslide"] == 1).sum())
    return Record(
        tile=task.tile, key=task.key, state="done", checksums=checksums, numbers=numbers, bytes=size
    )


_STAGES: dict[str, Callable[[RunPlan, TileTask, TileContext], Record]] = {"cube": _cube, "detect": _detect}


def tasks_of(plan: RunPlan, *stages: str) -> Iterator[tuple[TileTask, Ledger]]:
    """Yield all tasks of a plan, or those of some stages, done or not, each with the ledger of its record."""
    if "cube" in (stages or ("cube",)):
        for layer in plan.layers:
            for tile, (key, _) in plan.tasks[layer.name].items():
                task = TileTask(stage="cube", layer=layer.name, epoch="", tile=tile, key=key)
                yield task, ledger_of(plan, task)
    if "detect" in (stages or ("detect",)):
        for epoch in plan.epochs:
            for tile, key in detect_keys(plan, epoch.name).items():
                task = TileTask(stage="detect", layer=plan.inventory, epoch=epoch.name, tile=tile, key=key)
                yield task, ledger_of(plan, task)


def detect_keys(plan: RunPlan, epoch: str) -> dict[str, str]:
    """Key of each tile's detection: what is detected, and the records of the 3 x 3 tiles that it reads."""
    made = plan.by_epoch[epoch]
    read: dict[str, list[tuple[str, str, str, bool]]] = {}
    for tile in plan.tiles:
        keys = [(name, plan.tasks[name][tile.key][0]) for name in (made.pre, made.post, made.terrain)]
        read[tile.key] = [
            (name, tile.key, key, _layer_ledger(plan, name).complete(tile.key, key)) for name, key in keys
        ]
    return {
        tile.key: content_key(
            made.detect_key,
            plan.inventory,
            tile.key,
            [entry for neighbour in plan.neighbours(tile) for entry in read[neighbour.key]],
        )
        for tile in plan.tiles
    }


def without_small(hit_yx: np.ndarray, minimum_px: int) -> np.ndarray:
    """Remove objects (8-connected) of fewer pixels.

    Exact for every pixel at least `minimum_px - 1` pixels from the edge of the window: a pixel of a large enough
    object reaches that many pixels of it within that distance, whatever lies beyond.
    """
    if minimum_px <= 1:
        return hit_yx
    labels, n = scipy.ndimage.label(hit_yx, structure=np.ones((3, 3), int))
    keep = np.bincount(labels.ravel(), minlength=n + 1) >= minimum_px
    keep[0] = False
    kept: np.ndarray = keep[labels]
    return kept


def peak_rss_gb() -> float:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6) * (1 if sys.platform == "darwin" else 1.024)


@lru_cache(maxsize=2)
def _plan(workspace: Path, run: str) -> RunPlan:
    return read_plan(Workspace(root=workspace), run)


def _layer_ledger(plan: RunPlan, name: str) -> Ledger:
    return Ledger.of(plan.workspace.layer(plan.grid, name))


def by_block(lazy: Mapping[str, da.Array], threads: int) -> dict[str, np.ndarray]:
    """Compute arrays of equal last two dimensions, one block of these after another, `threads` at a time.

    One graph over all blocks lets Dask read far ahead of what it reduces; memory would then grow with the tile, and
    with the order in which threads happen to run.
    """
    first = next(iter(lazy.values()))
    out = {name: np.empty(array.shape, array.dtype) for name, array in lazy.items()}
    row_ends, col_ends = (np.cumsum(sizes).tolist() for sizes in first.chunks[-2:])

    def one(row: int, col: int) -> None:
        parts = [array.blocks[..., row, col] for array in lazy.values()]
        at = np.s_[
            ...,
            row_ends[row] - first.chunks[-2][row] : row_ends[row],
            col_ends[col] - first.chunks[-1][col] : col_ends[col],
        ]
        for name, part in zip(lazy, dask.compute(*parts, scheduler="synchronous"), strict=True):
            out[name][at] = part

    places = [(row, col) for row in range(len(row_ends)) for col in range(len(col_ends))]
    if threads == 1:
        for place in places:
            one(*place)
        return out
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda place: one(*place), places))
    return out


def _within_budget(plan: RunPlan, log: ReadLog, scenes: Sequence[Scene]) -> None:
    lost = sorted({(scene, asset) for scene, asset, _ in log.lost})
    scenes_lost = {scene for scene, _ in lost}
    budget = plan.config.cube.max_lost_scenes
    if len(scenes_lost) > budget or (scenes_lost and scenes_lost == {s.id for s in scenes}):
        first = min(log.lost)
        raise PipelineError(
            f"{len(scenes_lost)} of {len(scenes)} scenes cannot be read, more than max_lost_scenes={budget}; "
            f"first: asset {first[1]!r} of item {first[0]!r}: {first[2]}"
        )


def _store(
    plan: RunPlan, task: TileTask, data: dict[str, np.ndarray], context: TileContext
) -> tuple[dict[str, str], int]:
    """Write a tile where it belongs in its group, if this driver still may; returns checksums and bytes stored.

    data : of all variables, or {} to remove what another key left there
    """
    _require_lock(plan, context)
    # of another key: while its data changes below it, it would vouch for a mixture
    ledger_of(plan, task).forget(task.tile)
    path, leading = plan.workspace.layer(plan.grid, task.layer), cast("tuple[int, ...]", ())
    if task.stage == "detect":
        path = plan.workspace.inventory(plan.inventory)
        leading = ([e.name for e in plan.epochs].index(task.epoch),)
    corner, first = geobox_of(path).affine, plan.by_tile[task.tile].geobox.affine
    at = (round((first.f - corner.f) / corner.e), round((first.c - corner.c) / corner.a))
    if not data:
        erase_tile(path, at_px=at, shard=plan.grid.tile_px, leading=leading)
    checksums = write_tile(path, data, at_px=at, leading=leading)
    return checksums, stored_bytes(path, list(data), at_px=at, shard=plan.grid.tile_px, leading=leading)


def _require_lock(plan: RunPlan, context: TileContext) -> None:
    if not holds(plan.workspace.locks / "driver.json", context.token):
        raise PipelineError(FENCED)


def _read_layers(plan: RunPlan, epoch: str, tile: Tile, halo: int) -> Layers:
    """Read what the model needs on the tile and its halo; a neighbour counts only if its record does."""
    made = plan.by_epoch[epoch]
    needed = required_variables(plan.model.card.inputs)
    sides = {
        "pre": (made.pre, ["clear_count", *needed["pre"]]),
        "post": (made.post, ["clear_count", *needed["post"]]),
        "terrain": (made.terrain, sorted({"elevation", *needed["terrain"]})),
    }
    read = {side: _read_around(plan, name, names, tile, halo) for side, (name, names) in sides.items()}
    return Layers(**read)


def _read_around(plan: RunPlan, layer: str, names: list[str], tile: Tile, halo: int) -> xr.Dataset:
    path, ledger = plan.workspace.layer(plan.grid, layer), _layer_ledger(plan, layer)
    px = plan.grid.tile_px
    row0, col0 = tile.row * px - halo, tile.col * px - halo
    n = px + 2 * halo
    out = {
        name: np.full((n, n), _FILL.get(name, 0), np.float32 if name == "elevation" else np.uint16)
        for name in names
    }
    for neighbour in plan.neighbours(tile):
        record = ledger.read(neighbour.key)
        if record is None or record.key != plan.tasks[layer][neighbour.key][0] or record.state != "done":
            continue
        rows = slice(max(row0, neighbour.row * px), min(row0 + n, (neighbour.row + 1) * px))
        cols = slice(max(col0, neighbour.col * px), min(col0 + n, (neighbour.col + 1) * px))
        if rows.start >= rows.stop or cols.start >= cols.stop:
            continue
        try:
            part = read_window(path, names, window=(rows, cols))
        except PipelineError as error:
            ledger.forget(neighbour.key)  # it vouches for what cannot be read
            raise PipelineError(f"{error}; done so for tile {neighbour.key} of {layer}: run again") from None
        at = np.s_[rows.start - row0 : rows.stop - row0, cols.start - col0 : cols.stop - col0]
        for name, values in part.items():
            out[name][at] = values
    return xr.Dataset({name: (("y", "x"), out[name]) for name in names})


_FILL: dict[str, float] = {"elevation": np.nan, "slope_deg": 65535, "aspect_deg": 65535}


def _probability(plan: RunPlan, layers: Layers, tile: Tile, halo: int, threads: int) -> np.ndarray:
    """Probability on the tile and its halo, block by block on the lattice."""
    px, block = plan.grid.tile_px, plan.grid.block_px
    chunks = {
        dim: tuple(c.stop - c.start for c in cuts(px + 2 * halo, first * px - halo, block))
        for dim, first in (("y", tile.row), ("x", tile.col))
    }
    lazy = Layers(
        pre=layers.pre.chunk(chunks), post=layers.post.chunk(chunks), terrain=layers.terrain.chunk(chunks)
    )
    found = predict(plan.model, build_features(plan.model.card.inputs, lazy))["probability"].data
    return by_block({"probability": found}, threads)["probability"]


def _quantised(probability: np.ndarray) -> np.ndarray:
    """Scale to what is stored; the threshold is applied to this, so that the cube agrees with its own landslides."""
    known = ~np.isnan(probability)
    out = np.full(probability.shape, PROBABILITY_NODATA, np.uint16)
    out[known] = np.rint(probability[known] / PROBABILITY_SCALE).astype(np.uint16)
    return out


def _observable(layers: Layers, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels could be judged, and why the others could not: bool and codes of `REASONS`."""
    pre, post = layers.pre["clear_count"].values > 0, layers.post["clear_count"].values > 0
    reason = np.zeros(probability.shape, np.uint8)
    reason[probability == PROBABILITY_NODATA] = 5
    no_terrain = np.isnan(layers.terrain["elevation"].values)
    if "slope_deg" in layers.terrain:  # the rim of a DEM has heights, and no slope
        no_terrain |= layers.terrain["slope_deg"].values == SLOPE_NODATA
    reason[no_terrain] = 4
    reason[pre & ~post] = 2
    reason[~pre & post] = 1
    reason[~pre & ~post] = 3
    return reason == 0, reason


def _aoi_mask(plan: RunPlan, window: GeoBox) -> np.ndarray:
    """Pixels whose centre lies in the area of interest."""
    inside: np.ndarray = rasterio.features.geometry_mask(
        [plan.aoi_shape], out_shape=tuple(window.shape), transform=window.affine, invert=True
    )
    return inside


def _failed(task: TileTask, reason: str, trace: str) -> Record:
    return Record(
        tile=task.tile, key=task.key, state="failed", reason=" ".join(reason.split())[:1000], traceback=trace
    )


def _reason(error: Exception) -> str:
    """Say in one line what went wrong; what the system said of a file comes first, the driver looks for it."""
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}"
    if isinstance(error, PipelineError | CatalogError | ModelError):
        return str(error)
    return f"{type(error).__name__}: {error}"
