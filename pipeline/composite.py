"""Optical composites: from raw digital numbers of many dates to one cloud-free image of a window.

Axes in names: b band, t date (scene), o observation (overpass), y, x.

Everything is integer arithmetic on the stored scale, `round(10000 * reflectance) + 1000` with 0 = nodata, so that a
composite does not depend on the order of dates or on the machine.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import dask.array as da
import numpy as np
import xarray as xr

from slidecube.catalog.scenes import Scene
from slidecube.pipeline.errors import PipelineError

SCALE = 10_000
SHIFT = 1_000
Method = Literal["greenest", "median"]

DATE_VARIABLES = ("clear_count", "date_first", "date_last", "date")
"""What a composite says of itself beside the bands; see `composite`."""

SCL_MASKED = (0, 1, 3, 8, 9, 10, 11)
"""Classes of Sen2Cor never used: no data, saturated, cloud shadow, cloud, thin cirrus, snow."""

SCL_DILATED = (3, 8, 9, 10)
"""Scene classes whose edges are uncertain, and are widened."""

_EPOCH = dt.date(1970, 1, 1)
_STRIP_PX = 1 << 14  # of a dozen dates fit into a core's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRule:
    """Which pixels of a scene are used.

    scl_classes : scene classes that are masked
    dilation_px : widening of the cloud and shadow classes, in pixels of the grid, as a square
    """

    scl_classes: tuple[int, ...] = SCL_MASKED
    dilation_px: int = 3


def observations(scenes: Sequence[Scene]) -> list[list[int]]:
    """Group scenes of one overpass: neighbouring items of a datatake show one observation twice where they overlap.

    Returns positions in `scenes`, a list for each overpass; overpasses and their scenes by sensing time, then identity
    and id, so that ties fall the same way in whatever order the scenes come.
    """
    groups: dict[str, list[int]] = {}
    for i in sorted(range(len(scenes)), key=lambda i: _order(scenes[i])):
        # not by day: about 157 degrees east an overpass goes on through midnight UTC
        groups.setdefault(scenes[i].datatake or scenes[i].id, []).append(i)
    return list(groups.values())


def _order(scene: Scene) -> tuple[dt.datetime, str, str]:
    return scene.datetime, scene.identity, scene.id


def clear_mask(scl_tyx: da.Array, rule: MaskRule, *, halo_px: int) -> da.Array:
    """Pixels that may be used, from the scene classification.

    scl_tyx : (t, y, x) uint8 on whole lattice blocks, `halo_px` wider on each side than the result
    Returns (t, y, x) bool. The dilation looks into the neighbouring blocks, so it does not see block edges.
    """
    masked = np.zeros(256, bool)
    masked[list(rule.scl_classes)] = True
    widened = np.zeros(256, bool)
    widened[[c for c in rule.scl_classes if c in SCL_DILATED]] = True

    def block(scl: np.ndarray) -> np.ndarray:
        cloudy: np.ndarray = masked[scl] | _dilate(widened[scl], rule.dilation_px)
        return ~cloudy

    d = rule.dilation_px
    clear: da.Array = (
        scl_tyx.map_overlap(
            block, depth={0: 0, 1: d, 2: d}, boundary=255, dtype=bool, meta=np.empty((0, 0, 0), bool)
        )
        if d
        else scl_tyx.map_blocks(block, dtype=bool)
    )
    inner: da.Array = clear[:, slice(halo_px, -halo_px or None), slice(halo_px, -halo_px or None)]
    return inner


def composite(
    bands_tyx: Mapping[str, da.Array],
    clear_tyx: da.Array,
    *,
    scenes: Sequence[Scene],
    method: Method,
) -> dict[str, da.Array]:
    """Reduce the dates of a window to one image.

    bands_tyx : band -> (t, y, x) uint16 raw digital numbers, 0 = nodata, one chunk in time
    clear_tyx : (t, y, x) bool
    scenes : the t scenes, for their offsets, dates and overpasses
    method : "greenest": each pixel's observation of the highest NDVI, all bands of that date (ENS, section 3.2; the
        earliest wins a tie); "median": each band's median (mean of the two middle values, halves to even)

    An observation counts where it is clear and no band is nodata. Where two items of one overpass overlap, the first
    clear one counts, once.

    Returns (y, x) uint16 arrays: each band as `round(10000 * reflectance) + 1000`, 0 = nodata; `clear_count`, the
    number of clear observations; `date_first` and `date_last`, the first and last of them, and `date`, the chosen
    one ("median": 0), in days since 1970-01-01, 0 = none.
    Raises PipelineError when "greenest" lacks B04 or B08.
    """
    names = list(bands_tyx)
    if method == "greenest" and not {"B04", "B08"} <= set(names):
        raise PipelineError(f"Composite 'greenest' needs bands B04 and B08; got {', '.join(names)}")
    shifts = np.array([SHIFT + round(SCALE * _offset(s)) for s in scenes], np.int32)
    days = np.array([(s.datetime.date() - _EPOCH).days for s in scenes], np.uint16)
    order = observations(scenes)

    def block(clear: np.ndarray, *bands: np.ndarray) -> np.ndarray:
        return composite_block(
            bands,
            clear,
            shifts=shifts,
            days=days,
            groups=order,
            method=method,
            red=names.index("B04") if "B04" in names else -1,
            nir=names.index("B08") if "B08" in names else -1,
        )

    template = next(iter(bands_tyx.values()))
    out = da.map_blocks(
        block,
        clear_tyx,
        *bands_tyx.values(),
        dtype=np.uint16,
        chunks=((len(names) + len(DATE_VARIABLES),), *template.chunks[1:]),
        meta=np.empty((0, 0, 0), np.uint16),
    )
    return {name: out[i] for i, name in enumerate([*names, *DATE_VARIABLES])}


def composite_block(
    bands_btyx: Sequence[np.ndarray],
    clear_tyx: np.ndarray,
    *,
    shifts: np.ndarray,
    days: np.ndarray,
    groups: Sequence[Sequence[int]],
    method: Method,
    red: int,
    nir: int,
) -> np.ndarray:
    """Composite one block; see `composite`. Returns (band + 4, y, x) uint16."""
    valid_tyx = clear_tyx.copy()
    for band_tyx in bands_btyx:
        valid_tyx &= band_tyx != 0
    stored = [_harmonised(band_tyx, valid_tyx, shifts) for band_tyx in bands_btyx]
    valid_oyx, days_o = _merge_overpasses(stored, valid_tyx, days, groups)
    stored = [band[: len(valid_oyx)] for band in stored]
    out = np.zeros((len(stored) + len(DATE_VARIABLES), *clear_tyx.shape[1:]), np.uint16)
    n = len(stored)
    out[n] = valid_oyx.sum(axis=0, dtype=np.uint16)
    out[n + 1], out[n + 2] = _first_and_last(valid_oyx, days_o)
    if method == "greenest":
        chosen_yx = _greenest(stored[red], stored[nir], valid_oyx)
        for i, band_oyx in enumerate(stored):
            out[i] = np.take_along_axis(band_oyx, chosen_yx[None], 0)[0]
        out[n + 3] = np.where(out[n] > 0, days_o[chosen_yx], 0)
    else:
        for i, band_oyx in enumerate(stored):
            out[i] = median_of_positive(band_oyx)
    return out


def median_of_positive(values_oyx: np.ndarray) -> np.ndarray:
    """Median over the first axis of the values that are not 0.

    values_oyx : (o, y, x) uint16, 0 = nodata. Returns (y, x) uint16, 0 where all are nodata; the mean of the two
    middle values, halves to even, as `np.rint(np.nanmedian(...))`.
    """
    flat_on = values_oyx.reshape(len(values_oyx), -1)
    out = np.empty(flat_on.shape[1], np.uint16)
    for start in range(0, len(out), _STRIP_PX):
        strip_on = flat_on[:, start : start + _STRIP_PX].copy()
        out[start : start + _STRIP_PX] = _median_of_strip(strip_on)
    return out.reshape(values_oyx.shape[1:])


def _median_of_strip(values_on: np.ndarray) -> np.ndarray:
    """Median of the positive values of each column; sorts the columns, in place."""
    o, n = values_on.shape
    known = np.count_nonzero(values_on, axis=0).astype(np.int32)
    _sort_columns(values_on)  # nodata comes first
    low = values_on.ravel().take((o - (known + 2) // 2) * n + np.arange(n), mode="clip")
    high = values_on.ravel().take((o - (known + 1) // 2) * n + np.arange(n), mode="clip")
    pair = low.astype(np.uint32) + high
    median = pair >> 1
    median += pair & median & 1  # halves to even
    median[known == 0] = 0
    image: np.ndarray = median.astype(np.uint16)
    return image


def _sort_columns(values_on: np.ndarray) -> None:
    """Sort each column in place: whole rows are compared at once, which is 10 times faster than column by column."""
    lower = np.empty_like(values_on)
    for first, second in _sorting_network(len(values_on)):
        a, b = values_on[first], values_on[second]
        least = np.minimum(a, b, out=lower[: len(a)])
        np.maximum(a, b, out=b)
        a[...] = least


@lru_cache(maxsize=256)
def _sorting_network(n: int) -> tuple[tuple[slice, slice], ...]:
    """Runs of rows to be compared, one after another. Source: Batcher 1968, odd-even merging, for any n."""
    steps = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                rows = [i for i in range(j, min(j + k, n - k)) if i // (2 * p) == (i + k) // (2 * p)]
                if rows:  # a run without a gap, as 2 p is a multiple of 2 k
                    steps.append((slice(rows[0], rows[-1] + 1), slice(rows[0] + k, rows[-1] + 1 + k)))
            k //= 2
        p *= 2
    return tuple(steps)


def reflectance(stored: xr.DataArray) -> xr.DataArray:
    """Turn stored values back into reflectance: float32, NaN = nodata."""
    return ((stored.astype(np.float32) - SHIFT) / SCALE).where(stored != 0)


def _offset(scene: Scene) -> float:
    if scene.offset is None:
        raise PipelineError(
            f"Scene {scene.id!r} has no offset decision; it cannot enter an optical composite"
        )
    return scene.offset.value


def _harmonised(dn_tyx: np.ndarray, valid_tyx: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Raw numbers of several baselines on the stored scale, 1 to 65535, and 0 where not valid."""
    out = np.empty(dn_tyx.shape, np.uint16)
    for dn, valid, stored, shift in zip(dn_tyx, valid_tyx, out, shifts.clip(-65534, 65534), strict=True):
        size = np.uint16(abs(shift))
        if shift > 0:
            np.minimum(dn, 65535 - size, out=stored)
            np.add(stored, size, out=stored)
        elif shift < 0:
            np.maximum(dn, size + 1, out=stored)  # 1 is the darkest value that is not nodata
            np.subtract(stored, size, out=stored)
        np.multiply(stored if shift else dn, valid, out=stored)
    return out


def _merge_overpasses(
    stored: list[np.ndarray], valid_tyx: np.ndarray, days: np.ndarray, groups: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Merge scenes of one overpass, in place: its observation is each pixel's first valid scene.

    Leaves observation o at position o of the arrays. Returns validity and day of each observation.
    """
    if all(list(group) == [i] for i, group in enumerate(groups)):
        return valid_tyx, days
    valid_oyx = np.stack([valid_tyx[list(group)].any(axis=0) for group in groups])
    for band_tyx in stored:
        merged = []
        for group in groups:
            one = band_tyx[group[0]].copy()
            for t in group[1:]:
                np.copyto(one, band_tyx[t], where=one == 0)
            merged.append(one)
        for o, one in enumerate(merged):
            band_tyx[o] = one
    return valid_oyx, np.array([days[group[0]] for group in groups], days.dtype)


def _first_and_last(valid_oyx: np.ndarray, days_o: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first = np.full(valid_oyx.shape[1:], 65535, np.uint16)
    last = np.zeros(valid_oyx.shape[1:], np.uint16)
    for valid_yx, day in zip(valid_oyx, days_o, strict=True):
        np.copyto(first, np.minimum(first, day), where=valid_yx)
        np.copyto(last, np.maximum(last, day), where=valid_yx)
    first[last == 0] = 0
    return first, last


def _greenest(red_oyx: np.ndarray, nir_oyx: np.ndarray, valid_oyx: np.ndarray) -> np.ndarray:
    """Position of the observation of the highest NDVI; the earlier one wins a tie."""
    # float64 tells any two ratios of stored values apart (they differ by 6e-11 or more); float32 makes ties of some
    best_yx = np.full(red_oyx.shape[1:], -np.inf)
    chosen_yx = np.zeros(red_oyx.shape[1:], np.intp)
    for o, (red_yx, nir_yx, valid_yx) in enumerate(zip(red_oyx, nir_oyx, valid_oyx, strict=True)):
        nir, red = nir_yx.astype(np.float64) - SHIFT, red_yx.astype(np.float64) - SHIFT
        total = nir + red
        ndvi = np.where(total > 0, np.clip((nir - red) / np.where(total > 0, total, 1), -1, 1), -2)
        better = valid_yx & (ndvi > best_yx)
        best_yx[better] = ndvi[better]
        chosen_yx[better] = o
    return chosen_yx


def _dilate(mask_tyx: np.ndarray, d: int) -> np.ndarray:
    """Widen by a square of side 2 d + 1: two passes of shifted ors, far cheaper than a morphology on each date."""
    out = mask_tyx
    for axis in (1, 2):
        wide = out.copy()
        for shift in range(1, d + 1):
            lo, hi = [slice(None)] * 3, [slice(None)] * 3
            lo[axis], hi[axis] = slice(None, -shift), slice(shift, None)
            wide[tuple(lo)] |= out[tuple(hi)]
            wide[tuple(hi)] |= out[tuple(lo)]
        out = wide
    return out
