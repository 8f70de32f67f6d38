"""Reducers: one spectrum out of the clear observations of each pixel.

Axes in names: b band, o observation (overpass, by time), n pixel. Values are on the stored scale, 0 = not to be used.
Each pixel is worked by itself and in the order of its observations, so that no cut into strips, blocks or tiles
changes a byte of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from slidecube.pipeline.medians import median_of_columns

SHIFT = 1_000
"""What is added to ten-thousandths of reflectance when they are stored."""

_RANK_STEPS = 256  # parts into which the way from one rank to the next is divided
_LANES_PX = 128  # pixels of which a compiled loop holds all observations in the cache
_STEP = 0.5  # stored units: what rounding hides counts as no distance
_STILL = 1 / 20
_LONGER = 1.4
_ROUNDS = (8, 192)


def latest(valid_on: np.ndarray) -> np.ndarray:
    """Return the position of each pixel's last valid observation; (n,) intp, 0 where there is none."""
    place = np.arange(len(valid_on))[:, None]
    found: np.ndarray = np.where(valid_on, place, 0).max(axis=0)
    return found


def earliest(valid_on: np.ndarray) -> np.ndarray:
    """Return the position of each pixel's first valid observation; (n,) intp, 0 where there is none."""
    found: np.ndarray = np.argmax(valid_on, axis=0)
    return found


def greenest(red_on: np.ndarray, nir_on: np.ndarray, valid_on: np.ndarray) -> np.ndarray:
    """Return the position of the observation of the highest NDVI; the earlier one wins a tie.

    red_on, nir_on : (o, n) uint16; valid_on : (o, n) bool. Returns (n,) intp, 0 where nothing is valid.
    """
    best = np.full(red_on.shape[1:], -np.inf)
    chosen = np.zeros(red_on.shape[1:], np.intp)
    for o, (red, nir, valid) in enumerate(zip(red_on, nir_on, valid_on, strict=True)):
        ndvi = _ndvi(red, nir)
        better = valid & (ndvi > best)
        best[better] = ndvi[better]
        chosen[better] = o
    return chosen


def greenest_of_draw(
    stored_bon: np.ndarray, valid_on: np.ndarray, *, red: int, nir: int, draw: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the greenest of a draw of `draw` observations is at its median, whatever the number of them.

    stored_bon : (b, o, n) uint16; valid_on : (o, n) bool; red, nir : positions of B04 and B08
    Of n observations, ordered by NDVI, the one at rank 1/3 + (n + 1/3) 2^(-1 / draw), at most n, is taken; between two
    ranks, both, by how near they are, in 256ths. Where there are no more than `draw`, the greenest is.
    Returns (b, n) uint16, 0 = nodata, and the position of the nearer one: (n,) intp.
    Source: the greatest of k numbers lies below the quantile p of their distribution with the probability p^k, so that
    its median is the quantile 2^(-1/k); median ranks (j - 1/3) / (n + 1/3) after Tukey 1962.
    """
    count = valid_on.sum(axis=0)
    ndvi = np.stack([_ndvi(r, i) for r, i in zip(stored_bon[red], stored_bon[nir], strict=True)])
    # unused ones last; of equal ones the later first, so that the highest rank is the earliest, as of `greenest`
    last = len(ndvi) - 1
    order = last - np.argsort(np.where(valid_on, ndvi, np.inf)[::-1], axis=0, kind="stable")
    low, parts = _rank_of_draw(len(ndvi), draw)[:, count]
    lower = np.take_along_axis(order, low[None], 0)
    upper = np.take_along_axis(order, np.minimum(low + (parts > 0), last)[None], 0)
    image = np.empty((len(stored_bon), valid_on.shape[1]), np.uint16)
    for band_on, out in zip(stored_bon, image, strict=True):
        below, above = (np.take_along_axis(band_on, at, 0)[0].astype(np.int64) for at in (lower, upper))
        out[:] = (below * (_RANK_STEPS - parts) + above * parts + _RANK_STEPS // 2) // _RANK_STEPS
    image[:, count == 0] = 0
    nearer: np.ndarray = np.where(2 * parts > _RANK_STEPS, upper[0], lower[0])
    return image, nearer


@lru_cache(maxsize=64)
def _rank_of_draw(most: int, draw: int) -> np.ndarray:
    """Position of the lower rank, and 256ths of the way to the next one, by number of observations: (2, most + 1)."""
    n = np.arange(most + 1)
    rank = np.clip(1 / 3 + (n + 1 / 3) * 0.5 ** (1 / draw), 1, np.maximum(n, 1))
    rank[n <= draw] = np.maximum(n[n <= draw], 1)
    low = np.floor(rank)
    return np.stack([low - 1, np.rint((rank - low) * _RANK_STEPS)]).astype(np.intp)


def medoid(stored_bon: np.ndarray, valid_on: np.ndarray) -> np.ndarray:
    """Return the position of the observation that is nearest to all others; the earlier one wins a tie.

    stored_bon : (b, o, n) uint16; valid_on : (o, n) bool
    Nearest is the least sum of Euclidean distances over all bands.
    Returns (n,) intp, 0 where nothing is valid. Source: Flood 2013, doi:10.3390/rs5126481.
    """
    loop = _compiled(_medoids)
    out = np.zeros(valid_on.shape[1], np.intp)
    for start in range(0, len(out), _LANES_PX):
        at = slice(start, start + _LANES_PX)
        out[at] = loop(*_lanes(stored_bon, valid_on, at))
    return out


def geometric_median(stored_bon: np.ndarray, valid_on: np.ndarray) -> np.ndarray:
    """Return the spectrum of the least sum of Euclidean distances over all bands to the observations, rounded.

    stored_bon : (b, o, n) uint16, 0 where not valid; valid_on : (o, n) bool. Returns (b, n) uint16, 0 = nodata.
    Weiszfeld's iteration from the mean, each step 1.4 times as long, in float64, until no band's step is longer than
    1/20 of a stored unit, or 200 times. A distance below half a unit, which rounding would hide, counts as half a
    unit. Of two observations it is the middle.
    Source: Roberts, Mueller & McIntyre 2017, doi:10.1109/TGRS.2017.2723896; Weiszfeld 1937; longer steps, up to twice,
    converge, too: Ostresh 1978, doi:10.1287/opre.26.4.597.
    """
    count = valid_on.sum(axis=0)
    middle_bn = stored_bon.sum(axis=1, dtype=np.int64) / np.maximum(count, 1)
    loop = _compiled(_weiszfeld)
    moving = np.flatnonzero(count > 2)
    for (
        rounds
    ) in _ROUNDS:  # those that take long are gathered, so that the others need not wait in their lanes
        slow = []
        for start in range(0, len(moving), _LANES_PX):
            at = moving[start : start + _LANES_PX]
            middle = middle_bn[:, at]
            still = loop(*_lanes(stored_bon, valid_on, at), middle, rounds)
            middle_bn[:, at] = middle
            slow.append(at[~still])
        moving = np.concatenate(slow) if slow else moving
    image: np.ndarray = np.clip(np.rint(middle_bn), 1, 65_535).astype(np.uint16)
    image[:, count == 0] = 0
    return image


def spread_around(stored_bon: np.ndarray, valid_on: np.ndarray, image_bn: np.ndarray) -> np.ndarray:
    """Return how far the observations lie from their composite: the median of their mean absolute differences.

    stored_bon : (b, o, n) uint16; valid_on : (o, n) bool; image_bn : (b, n) uint16, the composite
    Returns (n,) uint16: 1 + the median over the valid observations of the mean over bands of |observation -
    composite|, 0 where fewer than two are valid. The median makes it blind to up to half of them.
    Source: after Roberts, Dunn & Mueller 2018 (doi:10.1109/IGARSS.2018.8518312), with this distance.
    """
    bands = len(stored_bon)
    apart = np.zeros(valid_on.shape, np.uint16)
    for total, o in zip(apart, range(len(apart)), strict=True):
        sums = np.zeros(valid_on.shape[1], np.uint32)
        for band_on, image in zip(stored_bon, image_bn, strict=True):
            sums += np.maximum(band_on[o], image) - np.minimum(band_on[o], image)
        np.minimum((sums + bands // 2) // bands, 65_534, out=sums)
        total[:] = (sums + 1) * valid_on[o]
    found = median_of_columns(apart)
    found[valid_on.sum(axis=0) < 2] = 0
    return found


def _ndvi(red: np.ndarray, nir: np.ndarray) -> np.ndarray:
    # float64 tells any two ratios of stored values apart (they differ by 6e-11 or more); float32 makes ties of some
    r, i = red.astype(np.float64) - SHIFT, nir.astype(np.float64) - SHIFT
    light = i + r
    return np.where(light > 0, np.clip((i - r) / np.where(light > 0, light, 1), -1, 1), -2)


# --- compiled loops: the innermost runs over pixels, so that it is a vector's and no sum is taken in another order ----


def _lanes(
    stored_bon: np.ndarray, valid_on: np.ndarray, at: slice | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Observations of some pixels, (o, b, n) float32, and which of them count, (o, n) 0 or 1."""
    values = np.ascontiguousarray(stored_bon[..., at].transpose(1, 0, 2), np.float32)
    return values, np.ascontiguousarray(valid_on[:, at], np.float64)


@lru_cache(maxsize=4)
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    import numba  # noqa: PLC0415  half a second and 60 MB, which only these two methods need

    # without `fastmath`: sums keep their order, and a multiplication is not joined to an addition
    loop: Callable[..., Any] = numba.njit(nogil=True, error_model="numpy")(kernel)
    return loop


def _medoids(values: Any, weight: Any) -> Any:
    """Position of the medoid of each pixel; values : (o, b, n) float32; weight : (o, n) 0 or 1."""
    o, b, n = values.shape
    total = np.zeros((o, n))
    squares = np.zeros(n)
    for i in range(o):
        for j in range(i + 1, o):
            squares[:] = 0.0
            for k in range(b):
                for p in range(n):
                    apart = np.float64(values[i, k, p]) - np.float64(values[j, k, p])
                    squares[p] += apart * apart
            for p in range(n):
                distance = np.sqrt(squares[p])
                total[i, p] += distance * weight[j, p]
                total[j, p] += distance * weight[i, p]
    best, chosen = np.full(n, np.inf), np.zeros(n, np.intp)
    for i in range(o):
        for p in range(n):
            if weight[i, p] > 0 and total[i, p] < best[p]:
                best[p], chosen[p] = total[i, p], i
    return chosen


def _weiszfeld(values: Any, weight: Any, middle: Any, rounds: int) -> Any:  # noqa: C901  as above
    """Move `middle` (b, n) towards the geometric median of each pixel, and tell which of them have come to rest."""
    o, b, n = values.shape
    moving = np.ones(n)
    pull, target, share, farthest = np.zeros(n), np.zeros((b, n)), np.zeros(n), np.zeros(n)
    for _ in range(rounds):
        pull[:], target[:], farthest[:] = 0.0, 0.0, 0.0
        for i in range(o):
            share[:] = 0.0
            for k in range(b):
                for p in range(n):
                    apart = np.float64(values[i, k, p]) - middle[k, p]
                    share[p] += apart * apart
            for p in range(n):
                share[p] = weight[i, p] / max(np.sqrt(share[p]), _STEP)
                pull[p] += share[p]
            for k in range(b):
                for p in range(n):
                    target[k, p] += np.float64(values[i, k, p]) * share[p]
        for k in range(b):
            for p in range(n):
                step = (target[k, p] / pull[p] - middle[k, p]) * moving[p]
                farthest[p] = max(farthest[p], abs(step))
                middle[k, p] += _LONGER * step
        for p in range(n):
            moving[p] = np.float64(farthest[p] > _STILL)
        if moving.sum() == 0.0:
            break
    return moving == 0.0
