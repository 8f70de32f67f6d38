"""The median composite beside `xarray.median`, bottleneck and odc-algo, on the same dates in one run and one thread.

Twelve dates of four bands on 1024 x 1024 px, seven tenths of them clear. `composite` does all that a tile program
asks of it: mask, offsets, median, count and dates of the clear observations, in blocks of 512 px; `median` is its
median alone. The peers get floats that are masked already, and give the median alone. odc-algo has no median of its
own; its `xr_quantile` at .5 stands for it, where it is installed (`uv pip install odc-algo`).
Times are of the processor, since others may use the machine.
Usage: make bench, or python tests/benchmarks/composite_speed.py
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", NUMBA_NUM_THREADS="1")

import importlib
import importlib.util
import time
import warnings

import bottleneck
import numpy as np
import xarray as xr

from slidecube.pipeline.composite import Compositing, composite_block
from slidecube.pipeline.medians import median_of_positive

DATES, BANDS, SIDE_PX, BLOCK_PX, ROUNDS = 12, 4, 1024, 512, 3
WANTED = 4.0


def main() -> None:
    """Time all, in turns; print the fastest round of each, and check that they agree."""
    bands, clear = _dates()
    known = [np.where(clear, band, 0).astype(np.uint16) for band in bands]
    floats = xr.Dataset(
        {
            f"b{i}": (("time", "y", "x"), np.where(clear, v, np.nan).astype(np.float32))
            for i, v in enumerate(bands)
        }
    )
    lazy = floats.chunk(time=-1, y=BLOCK_PX, x=BLOCK_PX)
    ways = {
        "composite": lambda: _composite(bands, clear),
        "median": lambda: [median_of_positive(v) for v in known],
        "xarray.median, dask": lambda: _values(lazy.median("time").compute(scheduler="synchronous")),
        "xarray.median, numpy": lambda: _values(floats.median("time")),
        "bottleneck.nanmedian": lambda: [bottleneck.nanmedian(v.values, axis=0) for v in floats.values()],
    }
    if importlib.util.find_spec("odc") and importlib.util.find_spec("odc.algo"):
        quantile = importlib.import_module("odc.algo").xr_quantile
        ways["odc-algo, quantile"] = lambda: [
            quantile(xr.Dataset({"b": v}), [0.5], nodata=np.nan)["b"].values[0] for v in floats.values()
        ]
    else:
        print("odc-algo is not installed: uv pip install odc-algo")
    taken: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pixels that are never clear
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = time.process_time()
                found[name] = way()
                taken[name].append(time.process_time() - start)
    for name, images in found.items():
        for ours, theirs in zip(found["median"], images, strict=False):
            # halves are ours to round; the quantile is one of the two middle values, never their mean
            apart = np.abs(np.nan_to_num(theirs) - ours.astype(float))
            assert apart.max() <= (200.5 if "quantile" in name else 0.5), name
    megapixels = BANDS * SIDE_PX**2 / 1e6
    fastest = {name: min(seconds) for name, seconds in taken.items()}
    print(f"{'':>22} {'s/Mpx of a band':>16} {'of composite':>13} {'of median':>10}")
    for name, seconds in fastest.items():
        ratios = f"{seconds / fastest['composite']:>12.1f}x {seconds / fastest['median']:>9.1f}x"
        print(f"{name:>22} {seconds / megapixels:>16.4f} {ratios}")
    print(f"{WANTED:.0f}x of xarray.median is wanted of the composite")


def _dates() -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    cell = np.ones((16, 16), np.uint16)
    land = [
        np.kron(rng.integers(500, 4000, (SIDE_PX // 16,) * 2).astype(np.uint16), cell) for _ in range(BANDS)
    ]
    bands = [
        (image + rng.integers(0, 400, (DATES, SIDE_PX, SIDE_PX), np.uint16)).astype(np.uint16)
        for image in land
    ]
    clear = np.kron(rng.random((DATES, SIDE_PX // 32, SIDE_PX // 32)) < 0.7, np.ones((32, 32), bool))
    return bands, clear.astype(bool)


def _composite(bands: list[np.ndarray], clear: np.ndarray) -> list[np.ndarray]:
    out = np.empty((BANDS + 4, SIDE_PX, SIDE_PX), np.uint16)
    for y in range(0, SIDE_PX, BLOCK_PX):
        for x in range(0, SIDE_PX, BLOCK_PX):
            at = np.s_[:, y : y + BLOCK_PX, x : x + BLOCK_PX]
            out[at] = composite_block(
                [band[at] for band in bands], clear[at], shifts=np.zeros(DATES, np.int32),
                days=np.arange(DATES, dtype=np.uint16) + 1, groups=[[i] for i in range(DATES)],
                how=Compositing(method="median"),
                red=2, nir=3,
            )  # fmt: skip
    return list(out[:BANDS])


def _values(images: xr.Dataset) -> list[np.ndarray]:
    return [image.values for image in images.values()]


if __name__ == "__main__":
    main()
