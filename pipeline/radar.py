"""Radar composites: from backscatter of many dates to one image of a window, in decibels.

Axes in names: b band, t date (scene), o observation (overpass), y, x.

Backscatter comes as linear power, gamma0 or sigma0, float, where zero, NaN and what is below zero are nodata. It is
stored as `round(100 * dB) + 10000`, uint16, 0 = nodata: a median of whole numbers depends neither on the order of
dates nor on the machine, and a hundredth of a decibel is far below any speckle. Orbit directions are never mixed.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dask.array as da
import numpy as np
import xarray as xr
from scipy import ndimage

from slidecube.catalog.scenes import Scene
from slidecube.pipeline.composite import observations
from slidecube.pipeline.medians import median_of_positive

DB_SHIFT = 10_000
DB_PER_STEP = 0.01

COUNT_VARIABLES = ("count", "date_first", "date_last")
"""What a radar composite says of itself beside the bands; see `radar_composite`."""

_EPOCH = dt.date(1970, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeckleFilter:
    """The multitemporal speckle filter.

    window_px : side of the square over which each date's mean is taken, odd; 0 = no filter
    """

    window_px: int = 0


def decibels(power: np.ndarray) -> np.ndarray:
    """Linear power as decibels, 10 log10(power): float32; NaN where it is zero, below, or not finite."""
    known = np.isfinite(power) & (power > 0)
    db: np.ndarray = np.full(power.shape, np.nan, np.float32)
    db[known] = 10 * np.log10(power[known].astype(np.float64))
    return db


def linear_power(db: np.ndarray) -> np.ndarray:
    """Decibels as linear power, 10 ** (dB / 10): float32, NaN stays."""
    power: np.ndarray = np.power(10.0, np.asarray(db, np.float64) / 10).astype(np.float32)
    return power


def stored_of_power(power: np.ndarray) -> np.ndarray:
    """Linear power on the stored scale, `round(100 * dB) + 10000` within 1 to 65535: uint16, 0 = nodata."""
    db = decibels(power)
    steps = np.rint(db.astype(np.float64) / DB_PER_STEP) + DB_SHIFT
    stored: np.ndarray = np.where(np.isnan(db), 0, np.clip(steps, 1, 65535)).astype(np.uint16)
    return stored


def backscatter_db(stored: xr.DataArray) -> xr.DataArray:
    """Turn stored values back into decibels: float32, NaN = nodata."""
    return ((stored.astype(np.float32) - DB_SHIFT) * np.float32(DB_PER_STEP)).where(stored != 0)


def db_change(pre_db: xr.DataArray, post_db: xr.DataArray) -> xr.DataArray:
    """Change of backscatter, post minus pre, in decibels. Source: ENS (Ganerod 2023), dVV and dVH."""
    return post_db - pre_db


def cross_ratio_db(vh_db: xr.DataArray, vv_db: xr.DataArray) -> xr.DataArray:
    """VH / VV in decibels, VH minus VV: falls where volume scattering by vegetation is lost."""
    return vh_db - vv_db


def quegan_yu(power_oyx: np.ndarray, speckle: SpeckleFilter) -> np.ndarray:
    """Filter speckle by what other dates say of a pixel, without loss of resolution where nothing changed.

    power_oyx : (o, y, x) linear power, NaN = nodata; one lattice block, at whose edges the window is cut
    J_k = <I_k> / M * sum over i of I_i / <I_i>, where <> is the mean over the window (of what is known in it) and M
    the number of dates known at the pixel. The mean over dates of J_k / <I_k> is that of I_k / <I_k>.
    Returns (o, y, x) float32, NaN where the date itself is nodata; the input where there is no window.
    Source: Quegan & Yu 2001, the weights for images whose speckle is uncorrelated between dates.
    """
    if not speckle.window_px:
        return power_oyx
    known_oyx = ~np.isnan(power_oyx)
    means = np.empty(power_oyx.shape, np.float32)
    total_yx = np.zeros(power_oyx.shape[1:], np.float64)
    for power_yx, known_yx, mean_yx in zip(power_oyx, known_oyx, means, strict=True):
        filled = np.where(known_yx, power_yx, 0).astype(np.float64)
        share = ndimage.uniform_filter(known_yx.astype(np.float64), speckle.window_px, mode="constant")
        summed = ndimage.uniform_filter(filled, speckle.window_px, mode="constant")
        mean_yx[...] = np.where(known_yx, summed / np.where(known_yx, share, 1), np.nan)
        total_yx += np.where(known_yx, filled / np.where(known_yx, mean_yx, 1), 0)
    mean_ratio_yx = total_yx / np.maximum(known_oyx.sum(axis=0), 1)
    return np.asarray(means * mean_ratio_yx.astype(np.float32))


def radar_composite(
    bands_tyx: Mapping[str, da.Array],
    usable_tyx: da.Array,
    *,
    scenes: Sequence[Scene],
    speckle: SpeckleFilter | None = None,
) -> dict[str, da.Array]:
    """Reduce the dates of a window and one orbit direction to one image.

    bands_tyx : "VV", "VH" -> (t, y, x) linear power, one chunk in time; zero and NaN are nodata
    usable_tyx : (t, y, x) bool, False where the scene's geometry leaves nothing to see, as in layover
    scenes : the t scenes, for their dates and overpasses

    An observation counts where it is usable and every band is known. Where two items of one overpass overlap, the
    first known one counts, once.

    Returns (y, x) uint16 arrays: each band's median over the observations as `round(100 * dB) + 10000`, 0 = nodata
    (the mean of the two middle values of an even number, halves to even); `count`, the number of observations;
    `date_first`, `date_last` in days since 1970-01-01, 0 = none.
    Source: Ganerod 2023 (median composites before and after).
    """
    days = days_of(scenes)
    groups = observations(scenes)
    names = list(bands_tyx)

    def block(usable: np.ndarray, *bands: np.ndarray) -> np.ndarray:
        return radar_block(bands, usable, days=days, groups=groups, speckle=speckle or SpeckleFilter())

    template = next(iter(bands_tyx.values()))
    out = da.map_blocks(
        block,
        usable_tyx,
        *bands_tyx.values(),
        dtype=np.uint16,
        chunks=((len(names) + len(COUNT_VARIABLES),), *template.chunks[1:]),
        meta=np.empty((0, 0, 0), np.uint16),
    )
    return {name: out[i] for i, name in enumerate([*names, *COUNT_VARIABLES])}


def radar_block(
    bands_btyx: Sequence[np.ndarray],
    usable_tyx: np.ndarray,
    *,
    days: np.ndarray,
    groups: Sequence[Sequence[int]],
    speckle: SpeckleFilter,
) -> np.ndarray:
    """Composite one block; see `radar_composite`. Returns (band + 3, y, x) uint16."""
    known_tyx = known_everywhere(bands_btyx, usable_tyx)
    known_oyx = np.stack([known_tyx[list(group)].any(axis=0) for group in groups])
    days_o = days[[group[0] for group in groups]]
    out = np.zeros((len(bands_btyx) + len(COUNT_VARIABLES), *usable_tyx.shape[1:]), np.uint16)
    for i, band_tyx in enumerate(bands_btyx):
        power_oyx = of_overpasses(band_tyx, known_tyx, groups)
        out[i] = median_of_positive(stored_of_power(quegan_yu(power_oyx, speckle)))
    n = len(bands_btyx)
    out[n] = known_oyx.sum(axis=0, dtype=np.uint16)
    days_oyx = np.where(known_oyx, days_o[:, None, None], 0)
    out[n + 2] = days_oyx.max(axis=0)
    out[n + 1] = np.where(known_oyx, days_oyx, 65535).min(axis=0)
    out[n + 1][out[n] == 0] = 0
    return out


def days_of(scenes: Sequence[Scene]) -> np.ndarray:
    """Sensing days of scenes, in days since 1970-01-01: (t,) uint16."""
    return np.array([(s.datetime.date() - _EPOCH).days for s in scenes], np.uint16)


def known_everywhere(bands_btyx: Sequence[np.ndarray], usable_tyx: np.ndarray) -> np.ndarray:
    """Pixels of each scene that may be used and that no band leaves out: (t, y, x) bool."""
    known_tyx = usable_tyx.copy()
    for band_tyx in bands_btyx:
        with np.errstate(invalid="ignore"):
            known_tyx &= np.isfinite(band_tyx) & (band_tyx > 0)
    return known_tyx


def of_overpasses(band_tyx: np.ndarray, known_tyx: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Observation of each overpass: each pixel's first known scene; (o, y, x) float32, NaN = nodata."""
    out = np.full((len(groups), *band_tyx.shape[1:]), np.nan, np.float32)
    for one, group in zip(out, groups, strict=True):
        for t in group:
            np.copyto(one, band_tyx[t], where=np.isnan(one) & known_tyx[t])
    return out
