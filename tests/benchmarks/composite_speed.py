"""Composites beside the peers, on the same dates in one run and one thread: median, medoid and geometric median.

Twelve dates of four bands on 512 x 512 px, seven tenths of them clear, read already. `composite` does all that a tile
program asks of it: mask, offsets, reduction, count, dates and spread of the clear observations. The peers get floats
that are masked already, and give the reduction alone:

- median: `xarray.median`, bottleneck, and odc-algo's `xr_quantile` at .5 (it has no median of its own)
- medoid: plain numpy, distances of all pairs of dates; odc-algo has none
- geometric median: odc-algo's, which is geomad's `nangeomedian_pcm`, at odc-algo's tolerance for whole numbers

odc-algo is asked where it is installed: the extra `bench` has it, and `make bench` installs that. Ratios are a
peer's time over ours: above 1, ours is the quicker one. Times are of the processor, since others may use the machine.
Usage: make bench, or python tests/benchmarks/composite_speed.py
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", NUMBA_NUM_THREADS="1", RAYON_NUM_THREADS="1")

import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable

import bottleneck
import numpy as np
import xarray as xr

from slidecube.pipeline.composite import Compositing, composite_block
from slidecube.pipeline.medians import median_of_positive
from slidecube.pipeline.reducers import geometric_median, medoid

DATES, BANDS, SIDE_PX, ROUNDS = 12, 4, 512, 3
Way = Callable[[], np.ndarray]


def main() -> None:
    """Time all, in turns; print the fastest round of each, and check that they agree."""
    bands, clear = _dates()
    known = [np.where(clear, band, 0).astype(np.uint16) for band in bands]
    floats = xr.Dataset(
        {
            f"b{i}": (("time", "y", "x"), np.where(v, v, np.nan).astype(np.float32))
            for i, v in enumerate(known)
        }
    )
    flat, valid = np.stack(known).reshape(BANDS, DATES, -1), clear.reshape(DATES, -1)
    table: dict[str, dict[str, Way]] = {
        "median": {
            "composite": lambda: _composite(bands, clear, "median"),
            "reduction alone": lambda: np.stack([median_of_positive(v) for v in known]),
            "xarray.median": lambda: _values(floats.median("time")),
            "bottleneck.nanmedian": lambda: np.stack(
                [bottleneck.nanmedian(v.values, axis=0) for v in floats.values()]
            ),
        },
        "medoid": {
            "composite": lambda: _composite(bands, clear, "medoid"),
            "reduction alone": lambda: _picked(known, medoid(flat, valid)),
            "numpy, all pairs": lambda: _picked(known, _numpy_medoid(flat, valid)),
        },
        "geomedian": {
            "composite": lambda: _composite(bands, clear, "geomedian"),
            "reduction alone": lambda: geometric_median(flat, valid).reshape(BANDS, SIDE_PX, SIDE_PX),
        },
    }
    if importlib.util.find_spec("odc") and importlib.util.find_spec("odc.algo"):
        table["median"]["odc-algo, quantile"] = lambda: _odc_quantile(floats)
        table["geomedian"]["odc-algo (geomad)"] = lambda: _geomad(floats)
    else:
        print("odc-algo is not installed: make bench, or the extra [bench]")
    print(f"{'':>10} {'':>22} {'s/Mpx':>8} {'of composite':>13} {'of reduction':>13}")
    for method, ways in table.items():
        _compare(method, ways, clear.sum(axis=0) > 2)


def _compare(method: str, ways: dict[str, Way], seen: np.ndarray) -> None:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, np.ndarray] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pixels that are never clear
        ways["composite"]()  # its loops are compiled once
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = time.process_time()
                found[name] = way()
                taken[name].append(time.process_time() - start)
    for name, image in found.items():
        apart = np.abs(np.nan_to_num(image) - found["reduction alone"].astype(float))[:, seen]
        # a quantile is one of the two middle values, never their mean; the peer's iteration stops a little earlier
        most = 200.5 if "quantile" in name else 3.0 if method == "geomedian" else 0.5
        assert apart.max() <= most, (method, name, apart.max())
    fastest = {name: min(seconds) for name, seconds in taken.items()}
    for name, seconds in fastest.items():
        ratios = "".join(f"{seconds / fastest[to]:>13.2f}x" for to in ("composite", "reduction alone"))
        print(f"{method:>10} {name:>22} {seconds / (SIDE_PX**2 / 1e6):>8.3f}{ratios}")


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


def _composite(bands: list[np.ndarray], clear: np.ndarray, method: str) -> np.ndarray:
    made = composite_block(
        bands, clear, shifts=np.zeros(DATES, np.int32), days=np.arange(1, DATES + 1, dtype=np.uint16),
        groups=[[i] for i in range(DATES)], how=Compositing(method=method), red=2, nir=3,
    )  # fmt: skip
    return made[:BANDS]


def _picked(known: list[np.ndarray], chosen: np.ndarray) -> np.ndarray:
    at = chosen.reshape(1, SIDE_PX, SIDE_PX)
    return np.stack([np.take_along_axis(band, at, 0)[0] for band in known])


def _numpy_medoid(flat: np.ndarray, valid: np.ndarray) -> np.ndarray:
    values = flat.astype(np.float64)
    sums = np.zeros(valid.shape)
    for other, there in zip(values.transpose(1, 0, 2), valid, strict=True):
        sums += np.sqrt(((values - other[:, None]) ** 2).sum(axis=0)) * there
    return np.where(valid, sums, np.inf).argmin(axis=0)


def _odc_quantile(floats: xr.Dataset) -> np.ndarray:
    quantile = importlib.import_module("odc.algo").xr_quantile
    return np.stack(
        [quantile(xr.Dataset({"b": v}), [0.5], nodata=np.nan)["b"].values[0] for v in floats.values()]
    )


def _geomad(floats: xr.Dataset) -> np.ndarray:
    geomedian = importlib.import_module("odc.algo").xr_geomedian
    return _values(geomedian(floats, eps=0.1, num_threads=1))


def _values(images: xr.Dataset) -> np.ndarray:
    return np.stack([image.values for image in images.values()])


if __name__ == "__main__":
    main()
