"""The whole tile program beside the sum of its parts, each run alone, on the same scenes and one thread.

One tile of 2048 px, ten bands, twelve dates before (median) and one after, a DEM, detection by `rdndvi`: `run_task` on
its four tasks, with plan, graph, keys, log, checks and records; against plain calls of the parts on arrays in memory.
Times are of the processor, since others may use the machine.
Usage: make bench, or python tests/benchmarks/tile_overhead.py [OUT]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dask.array as da
import numpy as np
import tile_memory
from rasterio.warp import transform_bounds

from slidecube.catalog.load import load
from slidecube.models.predict import predict
from slidecube.pipeline.composite import OBSERVED_VARIABLES, Compositing, composite_block, observations
from slidecube.pipeline.config import load_config
from slidecube.pipeline.detect import without_small
from slidecube.pipeline.features import build_features
from slidecube.pipeline.layers import create_stores
from slidecube.pipeline.lock import Lock
from slidecube.pipeline.masks import admitted, judge, sun_of
from slidecube.pipeline.pixels import PixelWindow, aoi_mask, read_layers
from slidecube.pipeline.plan import plan
from slidecube.pipeline.run_plan import RunPlan, halo_px, minimum_size_px
from slidecube.pipeline.staging import stage_tile
from slidecube.pipeline.tasks import TileContext, ledger_of, tasks_of
from slidecube.pipeline.terrain import terrain_block
from slidecube.pipeline.tile import run_task

TILE_PX, DATES, BLOCK_PX, ROUNDS = 2048, 12, 512, 3
ALLOWED = 1.15


def main() -> None:
    """Time whole and parts in turns; print the fastest of each and the ratio of their sums."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="slidecube-bench-"))
    made = planned(out)
    whole: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    with Lock(made.workspace.locks, run=made.run) as lock:
        create_stores(made)
        context = tile_memory.context_of(made, lock)
        for _ in range(ROUNDS):
            _whole(made, context, whole)
            _parts(made, parts)
    for title, taken in (("tile program", whole), ("parts alone", parts)):
        print(title)
        for name, seconds in taken.items():
            print(f"  {name:<24} {min(seconds):7.2f} s")
        print(f"  {'in all':<24} {_total(taken):7.2f} s")
    ratio = _total(whole) / _total(parts)
    print(f"program / parts: {ratio:.2f} (at most {ALLOWED:.2f} is wanted)")


def _total(taken: dict[str, list[float]]) -> float:
    return sum(map(min, taken.values()))  # of each the fastest round: what others did to the machine left out


def planned(out: Path, *, more: str = "") -> RunPlan:
    """Plan one tile of twelve dates; more : lines of the TOML."""
    items = tile_memory.archive(out)
    workspace = Path(tempfile.mkdtemp(prefix="overhead-", dir=out))
    left, top, side = tile_memory.LEFT, tile_memory.TOP, TILE_PX * 10
    box = transform_bounds(
        "EPSG:32633", "EPSG:4326", left + 200, top - side + 200, left + side - 200, top - 200
    )
    toml = workspace / "bench.toml"
    toml.write_text(
        f"""
[area]
bbox = [{", ".join(map(str, box))}]
crs = "EPSG:32633"
[[epoch]]
name = "bench"
pre = ["{tile_memory.day(0)}", "{tile_memory.day(DATES - 1)}"]
post = ["{tile_memory.day(tile_memory.DATES)}", "{tile_memory.day(tile_memory.DATES)}"]
[sources]
optical = "{items}"
dem = "{items}"
[cube]
tile_px = {TILE_PX}
composite = "median"
{more}[detect]
model = "rdndvi"
[output]
workspace = "."
"""
    )
    return plan(load_config(toml))


def _whole(made: RunPlan, context: TileContext, taken: dict[str, list[float]]) -> None:
    for stage in ("cube", "detect"):
        for task, _ in list(tasks_of(made, stage)):
            ledger_of(made, task).forget(task.tile)
        for task, _ in list(tasks_of(made, stage)):
            start = time.process_time()
            result = run_task(context, task)
            seconds = time.process_time() - start
            assert result.status == "done", result.reason
            name = f"{stage} {task.layer.rpartition('-')[0] if stage == 'cube' else task.epoch}"
            taken.setdefault(name, []).append(seconds)


@contextmanager
def _timed(taken: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    taken[name] = taken.get(name, 0.0) + time.process_time() - start


def _parts(made: RunPlan, rounds: dict[str, list[float]]) -> None:
    taken: dict[str, float] = {}
    tile = made.tiles[0]
    for layer in made.layers:
        scenes = made.scenes_of(layer.name, tile.key)
        make: Callable = _terrain if layer.window is None else _optical
        data = make(made, tile, scenes, taken)
        with _timed(taken, "write layers"):
            group = made.workspace.layer(made.grid, layer.name)
            stage_tile(group, data, at_px=_at(made, tile), shard=TILE_PX).commit()
    _detection(made, tile, taken)
    for name, seconds in taken.items():
        rounds.setdefault(name, []).append(seconds)


def _at(made: RunPlan, tile) -> tuple[int, int]:
    first = made.tiles[0]
    return (tile.row - first.row) * TILE_PX, (tile.col - first.col) * TILE_PX


def _blocks() -> Iterator[tuple[slice, slice]]:
    for y in range(0, TILE_PX, BLOCK_PX):
        for x in range(0, TILE_PX, BLOCK_PX):
            yield slice(y, y + BLOCK_PX), slice(x, x + BLOCK_PX)


def _optical(made: RunPlan, tile, scenes, taken: dict[str, float]) -> dict[str, np.ndarray]:
    config = made.config.cube
    rule = config.mask.rule()
    with _timed(taken, "read"):
        cube = load(scenes, tile.geobox, config.bands, block_px=BLOCK_PX).compute(scheduler="synchronous")
        around = load(scenes, tile.geobox.pad(BLOCK_PX), ["SCL"], block_px=BLOCK_PX)
        scl = around["SCL"].compute(scheduler="synchronous").values
    with _timed(taken, "mask"):
        lazy = da.from_array(scl, chunks=(-1, 3 * BLOCK_PX, 3 * BLOCK_PX))
        groups, suns = observations(scenes), [sun_of(scene) for scene in scenes]
        codes, _ = judge(lazy, rule, geobox=tile.geobox, suns=suns, groups=groups, halo_px=BLOCK_PX)
        data = {name: cube[name].chunk(y=BLOCK_PX, x=BLOCK_PX).data for name in config.bands}
        open_cases = admitted(
            codes.rechunk(data["B04"].chunks), data, offsets=[s.offset.value for s in scenes], groups=groups
        )
        clear = open_cases.compute(scheduler="synchronous")
    names = list(config.bands)
    stored = np.empty((len(names) + len(OBSERVED_VARIABLES), TILE_PX, TILE_PX), np.uint16)
    with _timed(taken, "composite"):
        for rows, columns in _blocks():
            at = np.s_[:, rows, columns]
            stored[at] = composite_block(
                [cube[name].values[at] for name in names], clear[at],
                shifts=np.array([1000 + round(10_000 * s.offset.value) for s in scenes], np.int32),
                days=np.arange(len(scenes), dtype=np.uint16) + 1, groups=observations(scenes),
                how=Compositing(method="median"),
                red=names.index("B04"), nir=names.index("B08"),
            )  # fmt: skip
    return dict(zip([*names, *OBSERVED_VARIABLES], stored, strict=True))


def _terrain(_made: RunPlan, tile, scenes, taken: dict[str, float]) -> dict[str, np.ndarray]:
    out = np.empty((3, TILE_PX, TILE_PX), np.float32)
    with _timed(taken, "terrain"):
        for rows, columns in _blocks():
            out[:, rows, columns] = terrain_block(scenes, tile.geobox[rows, columns])
        slope, aspect = (np.where(np.isnan(v), 65535, np.rint(v * 100)).astype(np.uint16) for v in out[1:])
    return {"elevation": out[0], "slope_deg": slope, "aspect_deg": aspect}


def _detection(made: RunPlan, tile, taken: dict[str, float]) -> None:
    card = made.model.card
    halo = halo_px(card, made.grid)
    window = PixelWindow.of_tile(made.grid, tile).padded(halo)
    with _timed(taken, "read layers"):
        layers = read_layers(made, made.epochs[0].name, window)
    with _timed(taken, "features"):
        features = build_features(card.inputs, layers).compute()
    with _timed(taken, "predict"):
        probability = predict(made.model, features, origin_px=(window.row, window.col))["probability"].values
    with _timed(taken, "objects"):
        inside = aoi_mask(made, window)
        minimum_px = minimum_size_px(card.min_area_m2, made.grid.resolution_m)
        kept = without_small((probability >= card.threshold) & inside, minimum_px)
    core = np.s_[halo : halo + TILE_PX, halo : halo + TILE_PX]
    scaled = np.where(np.isnan(probability[core]), 65535, probability[core] * 10_000).astype(np.uint16)
    data = {
        "probability": scaled,
        "spread": np.full_like(scaled, 65535),
        "landslide": kept[core].astype(np.uint8),
        "observability": inside[core].astype(np.uint8) * 3,
        "reason": np.zeros(scaled.shape, np.uint8),
    }
    with _timed(taken, "write inventory"):
        group = made.workspace.inventory(made.inventory)
        stage_tile(group, data, at_px=_at(made, tile), shard=TILE_PX, leading=(0,)).commit()


if __name__ == "__main__":
    main()
