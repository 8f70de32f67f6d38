"""What a window's dates say beside its composite: mean and spread of NDVI over the clear observations of each pixel.

Axes: t date (scene), o observation (overpass), y, x. NDVI counts in whole ten-thousandths, so that sums are exact and
do not depend on the order of dates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import dask.array as da
import numpy as np
import scipy.special
import xarray as xr

from slidecube.catalog.scenes import Scene
from slidecube.pipeline.composite import SCALE, SHIFT, observations
from slidecube.pipeline.errors import PipelineError

SERIES_VARIABLES = ("ndvi_mean", "ndvi_std")
"""Stored with an optical layer where a feature needs them."""

_ZERO = {"ndvi_mean": 1 + SCALE, "ndvi_std": 1}  # as stored; 0 = none


def ndvi_series(
    bands_tyx: Mapping[str, da.Array], clear_tyx: da.Array, *, scenes: Sequence[Scene]
) -> dict[str, da.Array]:
    """Mean and standard deviation of NDVI over the observations that `composite` counts, lazily.

    bands_tyx, clear_tyx, scenes : as for `composite`; an observation without light (B08 + B04 <= 0) counts as 0
    Returns (y, x) uint16: `ndvi_mean` as round(10000 * mean) + 10001 and `ndvi_std` (of the sample, n - 1) as
    round(10000 * deviation) + 1; 0 = no observation, or of the deviation fewer than two.
    Raises PipelineError without B04 and B08, or for a scene without an offset decision.
    """
    names = list(bands_tyx)
    if not {"B04", "B08"} <= set(names):
        raise PipelineError(f"Mean and spread of NDVI need bands B04 and B08; got {', '.join(names)}")
    lacking = [scene.id for scene in scenes if scene.offset is None]
    if lacking:
        raise PipelineError(f"Scene {lacking[0]!r} has no offset decision; it cannot enter an optical layer")
    shifts = np.array([round(SCALE * s.offset.value) for s in scenes if s.offset is not None], np.int32)
    groups, red, nir = observations(scenes), names.index("B04"), names.index("B08")

    def block(clear: np.ndarray, *bands: np.ndarray) -> np.ndarray:
        valid = clear.copy()
        for band in bands:
            valid &= band != 0
        return series_block(bands[red], bands[nir], valid, shifts=shifts, groups=groups)

    made = da.map_blocks(
        block,
        clear_tyx,
        *bands_tyx.values(),
        dtype=np.uint16,
        chunks=((len(SERIES_VARIABLES),), *clear_tyx.chunks[1:]),
        meta=np.empty((0, 0, 0), np.uint16),
    )
    return {name: made[i] for i, name in enumerate(SERIES_VARIABLES)}


def series_block(
    red_tyx: np.ndarray,
    nir_tyx: np.ndarray,
    valid_tyx: np.ndarray,
    *,
    shifts: np.ndarray,
    groups: Sequence[Sequence[int]],
) -> np.ndarray:
    """Mean and deviation of one block, as stored; see `ndvi_series`. Returns (2, y, x) uint16."""
    shape = valid_tyx.shape[1:]
    count, total, squares = (np.zeros(shape, np.int64) for _ in range(3))
    for group in groups:
        seen = np.zeros(shape, bool)
        for t in group:  # where items of one overpass overlap, the first clear one counts
            new = valid_tyx[t] & ~seen
            seen |= new
            ndvi = np.where(new, _ndvi(red_tyx[t], nir_tyx[t], shifts[t]), 0)
            count += new
            total += ndvi
            squares += ndvi * ndvi
    n = np.maximum(count, 1)
    mean = np.rint(total / n).astype(np.int64)
    variance = (count * squares - total * total) / np.maximum(n * (n - 1), 1)
    deviation = np.rint(np.sqrt(variance)).astype(np.int64)
    out = np.zeros((2, *shape), np.uint16)
    out[0] = np.where(count > 0, mean + _ZERO["ndvi_mean"], 0)
    out[1] = np.where(count > 1, deviation + _ZERO["ndvi_std"], 0)
    return out


def series_values(name: str, stored: xr.DataArray) -> xr.DataArray:
    """Decode: float32 NDVI, NaN = none."""
    return ((stored.astype(np.float32) - _ZERO[name]) / SCALE).where(stored != 0)


def loss_probability(*sides: np.ndarray) -> np.ndarray:
    """Probability that a mean fell, by Welch's t-test of two samples: 1 minus its one-sided p-value.

    sides : mean, deviation of the sample (n - 1) and n, before and then after, six arrays of equal shape
    Returns float32 in [0, 1], 1/2 where the means are equal; NaN where a side has fewer than two observations.
    Source: Welch 1947, doi:10.1093/biomet/34.1-2.28.
    """
    mean_pre, std_pre, n_pre, mean_post, std_post, n_post = (np.asarray(a, np.float64) for a in sides)
    n0, n1 = np.maximum(n_pre, 2), np.maximum(n_post, 2)
    v0, v1 = std_pre**2 / n0, std_post**2 / n1
    fall = mean_pre - mean_post
    known = np.isfinite(fall + v0 + v1) & (n_pre >= 2) & (n_post >= 2)
    spread = known & (v0 + v1 > 0)
    v0, v1 = np.where(spread, v0, 1.0), np.where(spread, v1, 1.0)
    freedom = (v0 + v1) ** 2 / (v0**2 / (n0 - 1) + v1**2 / (n1 - 1))
    by_test = scipy.special.stdtr(freedom, np.where(known, fall, 0.0) / np.sqrt(v0 + v1))
    # without any spread what fell has fallen
    sure = np.where(fall > 0, 1.0, np.where(fall < 0, 0.0, 0.5))
    probability = np.where(known, np.where(spread, by_test, sure), np.nan)
    return probability.astype(np.float32)


def _ndvi(red: np.ndarray, nir: np.ndarray, shift: int) -> np.ndarray:
    """NDVI in ten-thousandths, from numbers that are held to what an optical layer stores."""
    low, high = 1 - SHIFT, 65535 - SHIFT
    r, n = (np.clip(band.astype(np.int64) + shift, low, high) for band in (red, nir))
    light = n + r
    ratio = np.clip((n - r) / np.where(light > 0, light, 1), -1, 1)
    whole: np.ndarray = np.where(light > 0, np.rint(SCALE * ratio), 0).astype(np.int64)
    return whole
