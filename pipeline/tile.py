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
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypedDict, cast

import dask.array as da
import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox

from slidecube.catalog.errors import CatalogError
from slidecube.catalog.grid import Tile
from slidecube.catalog.load import Loader, ReadLog, load
from slidecube.catalog.scenes import Scene
from slidecube.cluster.faults import Fault, fault_of
from slidecube.cluster.runner import TaskResult, TileTask
from slidecube.models.errors import ModelError
from slidecube.pipeline.auxiliary import CLASS_NODATA, auxiliary
from slidecube.pipeline.blocks import by_block, touching
from slidecube.pipeline.composite import Compositing, composite, observations
from slidecube.pipeline.detect import detect_tile
from slidecube.pipeline.errors import PassingError, PipelineError
from slidecube.pipeline.fit import sample_tile
from slidecube.pipeline.fit_mnf import moments_tile
from slidecube.pipeline.land_cover import classify_tile
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.masks import MaskRule, admitted, judge, second_opinion, sun_of
from slidecube.pipeline.plan_files import read_plan
from slidecube.pipeline.radar import SpeckleFilter
from slidecube.pipeline.radar_layer import RadarSettings, radar_layer
from slidecube.pipeline.run_plan import LayerPlan, RunPlan, compositing
from slidecube.pipeline.series import ndvi_series
from slidecube.pipeline.storage import Place
from slidecube.pipeline.store import Workspace
from slidecube.pipeline.tasks import TileContext, adopted, holding, ledger_of, record_tile, store_tile
from slidecube.pipeline.terrain import TERRAIN_VARIABLES, terrain
from slidecube.pipeline.topography import Correction, corrected
from slidecube.pipeline.visibility import SunRule, hidden_by, lit


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
    how: Compositing,
    mask: MaskRule,
    block_px: int,
    judged: tuple[da.Array, da.Array] | None = None,
    terrain_syx: da.Array | None = None,
    correction: Correction = "none",
    series: bool = False,
    log: ReadLog | None = None,
    loader: Loader = "odc-stac",
) -> xr.Dataset:
    """Composite of scenes over a window, lazily, block by block on the lattice.

    scenes : of one window of time; geobox : on the lattice's blocks; see `composite` for the rest
    judged : codes and share of snow, when they are known already, as by `judged_scenes`
    terrain_syx, correction : slope and aspect, and how their light is taken out; see `topography.corrected`
    series : add `ndvi_mean` and `ndvi_std`; see `ndvi_series`
    Returns (y, x) uint16 variables: the bands, and `composite.OBSERVED_VARIABLES`; and `snow_pct` uint8, the share of
    the overpasses that called the pixel snow, 255 where none saw it.
    """
    cube = load(scenes, geobox, bands, block_px=block_px, log=log, loader=loader)
    codes, snow_pct = judged or judged_scenes(
        scenes, geobox, mask=mask, block_px=block_px, log=log, loader=loader
    )
    data = {b: cube[b].data for b in bands}
    offsets = [0.0 if scene.offset is None else scene.offset.value for scene in scenes]
    clear = admitted(codes, data, offsets=offsets, groups=observations(scenes))
    if terrain_syx is not None and correction != "none":
        data = corrected(data, clear, terrain_syx, scenes=scenes, method=correction)
    made = composite(data, clear, scenes=scenes, how=how)
    made["snow_pct"] = snow_pct
    if series:
        made |= ndvi_series(data, clear, scenes=scenes)
    coords = {name: cube.coords[name] for name in ("y", "x", "spatial_ref")}
    return xr.Dataset({name: (("y", "x"), data) for name, data in made.items()}, coords=coords)


def judged_scenes(
    scenes: Sequence[Scene],
    geobox: GeoBox,
    *,
    mask: MaskRule,
    block_px: int,
    log: ReadLog | None = None,
    loader: Loader = "odc-stac",
    threads: int = 0,
) -> tuple[da.Array, da.Array]:
    """Say which pixels of which scene may be used, lazily, and how often each lay under snow: see `masks.judge`.

    The classification is read one block wider on each side: clouds are widened, and throw shadows, across blocks.
    threads : read all of it now, on so many threads; 0 = lazily, nine blocks for each that is judged
    """
    halo = block_px if mask.dilation_px or mask.cloud_heights_m else 0
    around = geobox.pad(halo) if halo else geobox
    bands = ["SCL"] if mask.cloud_pct is None else ["SCL", "CLD"]
    read = load(scenes, around, bands, block_px=block_px, log=log, loader=loader)
    scl = read["SCL"].data
    if mask.cloud_pct is not None:
        scl = second_opinion(scl, read["CLD"].data, mask)
    touches_tji = touching(scenes, around, scl, block_px)
    scl = scl.map_blocks(
        lambda part, block_id: part * touches_tji[:, block_id[1], block_id[2], None, None], dtype=np.uint8
    )
    if threads and halo:
        scl = da.from_array(by_block({"SCL": scl}, threads)["SCL"], chunks=scl.chunks, name=False)
    suns, groups = [sun_of(scene) for scene in scenes], observations(scenes)
    return judge(scl, mask, geobox=geobox, suns=suns, groups=groups, halo_px=halo)


def _cube(plan: RunPlan, task: TileTask, context: TileContext) -> Record:
    tile, layer = plan.by_tile[task.tile], plan.by_layer[task.layer]
    scenes = plan.scenes_of(task.layer, task.tile)
    role = _ROLES[layer.kind]
    if not any(scene.role == role for scene in scenes):
        store_tile(plan, task, {}, context)
        between = f" between {layer.window.start} and {layer.window.end}" if layer.window else ""
        what = {
            "optical": "scene",
            "radar": f"{layer.orbit} radar scene",
            "terrain": "DEM",
            "auxiliary": f"raster of layer {layer.feature!r}",
        }[layer.kind]
        return Record(
            tile=task.tile, key=task.key, state="empty", reason=f"no {what}{between} touches this tile"
        )
    log = ReadLog()
    data = _MAKERS[layer.kind](
        _Work(plan=plan, layer=layer, tile=tile, scenes=scenes, log=log, context=context)
    )
    _within_budget(plan, task, log, [scene for scene in scenes if scene.role == role])
    seen = _seen(layer, data)
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
        n = sum(scene.role == role for scene in scenes)
        reason = {
            "terrain": "the DEM has no height here",
            "optical": f"no clear observation in {n} scenes",
            "radar": f"no radar observation in {n} scenes",
            "auxiliary": f"layer {layer.feature!r} has no value here",
        }[layer.kind]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """One tile of one layer to be made, and where it is noted what was read."""

    plan: RunPlan
    layer: LayerPlan
    tile: Tile
    scenes: list[Scene]
    log: ReadLog
    context: TileContext


def _terrain_data(work: _Work) -> dict[str, np.ndarray]:
    lazy = terrain(
        work.scenes,
        work.tile.geobox,
        variables=work.plan.terrain_variables(),
        block_px=work.plan.grid.block_px,
        log=work.log,
        loader=work.context.loader,
    )
    return by_block(lazy, work.context.threads)


def _optical_data(work: _Work) -> dict[str, np.ndarray]:
    """Composite one tile in bounded memory: what is clear first, once, then one block after another."""
    cube, block_px = work.plan.config.cube, work.plan.grid.block_px
    seen, dem = ([scene for scene in work.scenes if scene.role == role] for role in ("optical", "dem"))
    geobox, threads, mask = work.tile.geobox, work.context.threads, cube.mask.rule()
    read: _Reading = {"block_px": block_px, "log": work.log, "loader": work.context.loader}
    judged = _judged(work, seen, dem)
    slopes = None
    if cube.sun.correction != "none":
        found = terrain(dem, geobox, variables=_SLOPES, **read)
        slopes = da.stack([_degrees(found[name], name) for name in _SLOPES]).rechunk({0: -1})
    layer = optical_layer(
        seen,
        geobox,
        cube.bands,
        how=compositing(work.plan.config, event_at=work.layer.event_at),
        mask=mask,
        series=bool(work.plan.series_variables()),
        judged=(
            da.from_array(judged["codes"], chunks=(-1, block_px, block_px), name=False),
            da.from_array(judged["snow_pct"], chunks=block_px, name=False),
        ),
        terrain_syx=slopes,
        correction=cube.sun.correction,
        **read,
    )
    wanted = [name for name in work.plan.optical_variables() if name != "hidden"]
    made = by_block({name: layer[name].data for name in wanted}, threads)
    return {**made, "hidden": hidden_by(judged["codes"])}


def _judged(work: _Work, seen: list[Scene], dem: list[Scene]) -> dict[str, np.ndarray]:
    """Codes and share of snow of one tile; the classifications are forgotten before any band is read."""
    cube, geobox, threads = work.plan.config.cube, work.tile.geobox, work.context.threads
    read: _Reading = {"block_px": work.plan.grid.block_px, "log": work.log, "loader": work.context.loader}
    sun = SunRule(min_elevation_deg=cube.sun.min_elevation_deg, cast_shadow=cube.sun.cast_shadow)
    codes, snow_pct = judged_scenes(seen, geobox, mask=cube.mask.rule(), threads=threads, **read)
    codes = lit(codes, seen, dem, geobox, rule=sun, log=work.log, loader=work.context.loader)
    return by_block({"codes": codes, "snow_pct": snow_pct}, threads)


_SLOPES = ("slope_deg", "aspect_deg")


class _Reading(TypedDict):
    """How pixels are read."""

    block_px: int
    log: ReadLog
    loader: Loader


def _degrees(stored: da.Array, name: str) -> da.Array:
    """Slope or aspect as float32 degrees, NaN = unknown."""
    variable = TERRAIN_VARIABLES[name]
    decoded: da.Array = da.where(
        stored == variable.nodata, np.float32(np.nan), stored.astype(np.float32) * np.float32(variable.scale)
    )
    return decoded


def _radar_data(work: _Work) -> dict[str, np.ndarray]:
    radar = work.plan.config.cube.radar
    lazy = radar_layer(
        [scene for scene in work.scenes if scene.role == "radar"],
        [scene for scene in work.scenes if scene.role == "dem"],
        work.tile.geobox,
        settings=RadarSettings(
            slope_correction=radar.slope_correction, speckle=SpeckleFilter(window_px=radar.speckle_window_px)
        ),
        block_px=work.plan.grid.block_px,
        log=work.log,
        loader=work.context.loader,
    )
    return by_block(lazy, work.context.threads)


def _auxiliary_data(work: _Work) -> dict[str, np.ndarray]:
    settings = work.plan.layer_settings(work.layer.name)
    assert settings is not None
    block_px = work.plan.grid.block_px
    lazy = auxiliary(work.scenes, work.tile.geobox, settings, block_px=block_px, log=work.log)
    return by_block({settings.name: lazy}, work.context.threads)


def _seen(layer: LayerPlan, data: dict[str, np.ndarray]) -> np.ndarray:
    """Pixels of which a layer knows something."""
    if layer.feature:
        values = data[layer.feature]
        return np.asarray(~np.isnan(values) if values.dtype == np.float32 else values != CLASS_NODATA)
    if layer.kind == "terrain":
        return np.asarray(~np.isnan(data["elevation"]))
    return np.asarray(data["clear_count" if layer.kind == "optical" else "count"] > 0)


_ROLES = {"optical": "optical", "radar": "radar", "terrain": "dem", "auxiliary": "layer"}
_MAKERS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "optical": _optical_data,
    "radar": _radar_data,
    "terrain": _terrain_data,
    "auxiliary": _auxiliary_data,
}
_STAGES: dict[str, Callable[[RunPlan, TileTask, TileContext], Record]] = {
    "cube": _cube,
    "classify": classify_tile,
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

    scenes : of the layer's own role; what else it reads, the DEM, it may not lack
    Raises PassingError, by which the tile is tried again, and PipelineError when that would not help.
    """
    lost = sorted({(scene, asset) for scene, asset, _ in log.lost})
    if not lost:
        return
    first = min(log.lost)
    what = f"first: asset {first[1]!r} of item {first[0]!r}: {first[2]}"
    if log.passing and not task.last:
        raise PassingError(f"{len(log.passing)} assets cannot be read now; {what}", log.passing_fault)
    scenes_lost, own = {scene for scene, _ in lost}, {s.id for s in scenes}
    budget = plan.config.cube.max_lost_scenes
    if not scenes_lost <= own:  # without the DEM all that it decides would silently be left out
        message = f"the DEM under or around this tile cannot be read; {what}"
        raise PassingError(message, log.passing_fault) if log.passing else PipelineError(message)
    if len(scenes_lost) > budget or scenes_lost == own:
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
