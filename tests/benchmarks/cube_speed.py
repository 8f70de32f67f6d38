"""The cube stage beside its limit: plain reads of the same files and the same arithmetic on whole arrays, one thread.

One tile of 2048 px, ten bands, twelve dates, median. `run_task` of the optical layer does what `slidecube cube` does
for it: reads block by block, masks, composite, what is said of the observations, compression, read-back, and record.
The limit is what has to be done in any case:

- read: rasterio's windows of the 10 m bands, `WarpedVRT` (bilinear) of the 20 m bands, and the classification's pixels
  twice as large (nearest), as odc-stac reads them; nothing is read twice, nothing lies around the tile
- arithmetic: SCL by a table, scipy's widening of clouds, and the median over dates, which is the quickest of
  bottleneck's and of ours, each alone

The cube is timed as its mask is by default, and with `readmit` off, which is the arithmetic of the limit: bright ground
that is called cloud stays masked then, and the bands must be equal to the limit's, bit for bit.
Times are of the processor, since others may use the machine. Usage: make bench, or
python tests/benchmarks/cube_speed.py [OUT]
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import bottleneck
import numpy as np
import rasterio
import scipy.ndimage
import tile_memory
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import from_bounds
from tile_overhead import DATES, TILE_PX, planned

from slidecube.pipeline.layers import create_stores
from slidecube.pipeline.lock import Lock
from slidecube.pipeline.masks import SCL_DILATED, SCL_MASKED
from slidecube.pipeline.medians import median_of_positive
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.store import read_window
from slidecube.pipeline.tasks import ledger_of, tasks_of
from slidecube.pipeline.tile import run_task

ROUNDS, WANTED, SHIFT = 2, 0.80, 1000
MASKS = {"mask as by default": "", "readmit = false": "[cube.mask]\nreadmit = false\n"}
Reduce = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Time all, in turns; print the fastest round of each, and the ratios of the limit to the cube."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="slidecube-bench-"))
    plans = {name: planned(out, more=more) for name, more in MASKS.items()}
    cubes: dict[str, list[float]] = {name: [] for name in plans}
    parts: dict[str, list[float]] = {}
    image = np.empty(0)
    for _ in range(ROUNDS):
        for name, made in plans.items():
            cubes[name].append(_cube(made))
        image = _limit(plans["readmit = false"], parts)
    _require_equal(plans["readmit = false"], image)
    least = {name: min(seconds) for name, seconds in parts.items()}
    medians = {name: seconds for name, seconds in least.items() if name.startswith("median")}
    limit = sum(least.values()) - sum(medians.values()) + min(medians.values())
    for name, seconds in least.items():
        print(f"  {name:<34} {seconds:7.2f} s")
    print(f"{'limit, with the quicker median':<36} {limit:7.2f} s")
    for name, seconds in cubes.items():
        print(f"{'cube, ' + name:<36} {min(seconds):7.2f} s   limit / cube {limit / min(seconds):.2f}")
    print(f"limit / cube: at least {WANTED:.2f} is wanted")


def _cube(made: RunPlan) -> float:
    """Make the layer before the event anew; returns seconds."""
    with Lock(made.workspace.locks, run=made.run) as lock:
        create_stores(made)
        context = tile_memory.context_of(made, lock)
        (task,) = [task for task, _ in tasks_of(made, "cube") if task.layer == _layer(made)]
        ledger_of(made, task).forget(task.tile)
        start = time.process_time()
        result = run_task(context, task)
        seconds = time.process_time() - start
    assert result.status == "done", result.reason
    return seconds


def _layer(made: RunPlan) -> str:
    return max(
        (layer.name for layer in made.layers if layer.kind == "optical"),
        key=lambda name: len(made.scenes_of(name, made.tiles[0].key)),
    )


def _limit(made: RunPlan, rounds: dict[str, list[float]]) -> np.ndarray:
    """Read and reduce with plain libraries; returns (band, y, x) as stored, 0 = nodata."""
    taken: dict[str, float] = {}
    tile = made.tiles[0]
    scenes = [s for s in made.scenes_of(_layer(made), tile.key) if s.role == "optical"]
    assert len(scenes) == DATES

    def read(band: str) -> np.ndarray:
        with _timed(taken, f"read {'SCL' if band == 'SCL' else 'bands'}"):
            return np.stack(
                [_plain(s.item["assets"][s.bands[band]]["href"], tile.geobox, band) for s in scenes]
            )

    scl = read("SCL")
    with _timed(taken, "mask"):
        clear = _clear(scl)
    image = []
    for band in made.config.cube.bands:
        values = read(band)
        with _timed(taken, "mask the bands"):
            known = values * clear
        with _timed(taken, "median, ours alone"):
            ours = median_of_positive(known)
        with _timed(taken, "median, bottleneck"):
            theirs = bottleneck.nanmedian(np.where(known == 0, np.nan, known.astype(np.float32)), axis=0)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(np.rint(np.nan_to_num(theirs)), ours)
        image.append(np.where(ours == 0, 0, ours + SHIFT))
    for name, seconds in taken.items():
        rounds.setdefault(name, []).append(seconds)
    return np.stack(image)


def _plain(href: str, geobox, band: str) -> np.ndarray:
    """Read one file onto the tile."""
    box, (rows, columns) = geobox.boundingbox, geobox.shape
    with rasterio.open(href) as file:
        window = from_bounds(*box.bbox, file.transform)
        if band == "SCL":
            pixels = file.read(1, window=window)
            return pixels.repeat(rows // pixels.shape[0], axis=0).repeat(columns // pixels.shape[1], axis=1)
        if (window.height, window.width) == (rows, columns):
            return file.read(1, window=window)
        how = {
            "transform": geobox.affine,
            "height": rows,
            "width": columns,
            "resampling": Resampling.bilinear,
        }
        with WarpedVRT(file, crs=str(geobox.crs), **how) as warped:
            return warped.read(1)


def _clear(scl_tyx: np.ndarray) -> np.ndarray:
    masked, wide = np.zeros(256, bool), np.zeros(256, np.uint8)
    masked[list(SCL_MASKED)], wide[list(SCL_DILATED)] = True, 1
    near = [scipy.ndimage.maximum_filter(wide[scl], size=7, mode="constant") for scl in scl_tyx]
    return ~masked[scl_tyx] & (np.stack(near) == 0)


@contextmanager
def _timed(taken: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    taken[name] = taken.get(name, 0.0) + time.process_time() - start


def _require_equal(made: RunPlan, image: np.ndarray) -> None:
    tile = made.tiles[0]
    row, col = tile.row * TILE_PX, tile.col * TILE_PX
    window = (slice(row, row + TILE_PX), slice(col, col + TILE_PX))
    path = made.workspace.layer(made.grid, _layer(made))
    stored = read_window(path, list(made.config.cube.bands), window=window)
    for band, expected in zip(made.config.cube.bands, image, strict=True):
        np.testing.assert_array_equal(stored[band], expected, err_msg=band)


if __name__ == "__main__":
    main()
