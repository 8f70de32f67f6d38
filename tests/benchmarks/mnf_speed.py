"""MNF of large cubes in constant memory, and its time a pixel beside Spectral Python's, in one run and one thread.

First 25, 100 and 200 Mpx of ten bands stream from a lazy cube, made block by block as if read, each in a fresh
process: fit (moments by Dask's tree, on one thread) and peak memory, with that of the process before the fit. Then
fit and transform of a cube that fits into memory beside SPy's, from the same array of uint16; SPy's time with and
without the float64 copy that it needs.
The times beside SPy's are of the processor, since others may use the machine.
Usage: make bench, or python tests/benchmarks/mnf_speed.py
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import json
import resource
import subprocess
import sys
import time
from functools import partial

import dask
import dask.array as da
import numpy as np
import spectral
import xarray as xr

from slidecube.pipeline.mnf import fit_mnf
from slidecube.pipeline.moments import moments

BANDS = tuple(f"B{i:02d}" for i in range(10))
BLOCK_PX, SIDE_PX, ROUNDS = 512, 2048, 3
SIZES_MPX = (25, 100, 200)


def main() -> None:
    """Print memory by size, then times beside SPy's."""
    print(f"{'streamed':>9} {'fit':>9} {'reading alone':>14} {'before':>8} {'peak':>8} {'more':>8}")
    for size in SIZES_MPX:
        answer = subprocess.run(
            [sys.executable, __file__, str(size)], check=True, capture_output=True, text=True
        ).stdout
        said = json.loads(answer)
        print(
            f"{size:>5} Mpx {said['fit_s']:>7.1f} s {said['read_s']:>12.1f} s {said['before_gb']:>5.2f} GB "
            f"{said['peak_gb']:>5.2f} GB {said['peak_gb'] - said['before_gb']:>5.2f} GB"
        )
    _beside_spy()


def _stream(size_mpx: int) -> None:
    """Fit one large cube, and say what it took."""
    side = round(np.sqrt(size_mpx * 1e6 / BLOCK_PX**2)) * BLOCK_PX
    with dask.config.set(scheduler="synchronous"):
        moments(_lazy(2 * BLOCK_PX))
        before = _peak_gb()
        start = time.perf_counter()
        found = moments(_lazy(side), nodata=0)
        fit_s = time.perf_counter() - start
        assert fit_mnf(found, bands=BANDS).pixels <= side**2
        block = _block(0, 0)
        start = time.perf_counter()
        for _ in range(20):
            _block(512, 512)
        read_s = (time.perf_counter() - start) / 20 * side**2 / block[0].size
    print(json.dumps({"fit_s": fit_s, "read_s": read_s, "before_gb": before, "peak_gb": _peak_gb()}))


def _lazy(side: int) -> xr.Dataset:
    array = da.map_blocks(
        lambda block_info: _block(*(first for first, _ in block_info[None]["array-location"][1:])),
        chunks=((len(BANDS),), *((BLOCK_PX,) * (side // BLOCK_PX),) * 2),
        dtype=np.uint16,
        meta=np.empty((0, 0, 0), np.uint16),
    )
    return xr.Dataset({name: (("y", "x"), array[i]) for i, name in enumerate(BANDS)})


def _block(y: int, x: int) -> np.ndarray:
    """Ten bands of stored reflectance that depend on their place alone."""
    rng = np.random.default_rng((y, x))
    rows, columns = (np.arange(first, first + BLOCK_PX, dtype=np.float32) for first in (y, x))
    maps = (np.sin(rows / 90)[:, None], np.cos(columns / 70)[None], np.sin((rows[:, None] + columns) / 40))
    out = np.empty((len(BANDS), BLOCK_PX, BLOCK_PX), np.uint16)
    for b, band in enumerate(out):
        land = 3000 + sum(np.float32(300 * np.cos(b + i)) * m for i, m in enumerate(maps))
        band[:] = land + rng.integers(0, 60 + 10 * b, band.shape, np.uint16)
    return out


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _beside_spy() -> None:
    cube = _lazy(SIDE_PX).compute(scheduler="synchronous")
    stored_yxb = np.ascontiguousarray(np.stack([cube[name].values for name in BANDS], axis=-1))
    taken: dict[str, list[float]] = {}

    def timed(name, act):
        start = time.process_time()
        answer = act()
        taken.setdefault(name, []).append(time.process_time() - start)
        return answer

    for _ in range(ROUNDS):
        mnf = timed("fit", lambda: fit_mnf(moments(cube), bands=BANDS))
        ours = timed("transform", partial(mnf.transform, cube))
        floats = timed("SPy's float64", lambda: stored_yxb.astype(np.float64))
        spy = timed("SPy fit", partial(_spy, floats))
        theirs = timed("SPy transform", partial(spy.reduce, floats, num=3))
    apart = np.abs(np.array(mnf.eigenvalues) / spy.napc.eigenvalues - 1).max()
    worst = max(
        np.abs(np.abs(ours[f"mnf{k + 1}"].values) - np.abs(theirs[..., k])).max() / theirs[..., k].std()
        for k in range(3)
    )
    ns = {name: min(seconds) / SIDE_PX**2 * 1e9 for name, seconds in taken.items()}
    copy = ns["SPy's float64"]
    print(f"{'ns a pixel':>12} {'slidecube':>10} {'SPy':>8} {'with its copy':>14} {'ratio':>7}")
    for step in ("fit", "transform"):
        own, peer = ns[step], ns[f"SPy {step}"]
        print(f"{step:>12} {own:>10.1f} {peer:>8.1f} {peer + copy:>14.1f} {peer / own:>6.1f}x")
    print(f"eigenvalues differ by {apart:.1e}, components by {worst:.1e} of their standard deviation")


def _spy(scene_yxb: np.ndarray):
    return spectral.mnf(spectral.calc_stats(scene_yxb), spectral.noise_from_diffs(scene_yxb))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _stream(int(sys.argv[1]))
    else:
        main()
