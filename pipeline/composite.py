"""Optical composites: from raw digital numbers of many dates to one cloud-free image of a window.

Axes in names: b band, t date (scene), o observation (overpass), y, x, n pixel of a strip.

Everything is stored as whole numbers, `round(10000 * reflectance) + 1000` with 0 = nodata. Observations are worked in
the order of time and each pixel by itself, so that a composite depends neither on the order of scenes nor on how the
window is cut.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import dask.array as da
import numpy as np
import xarray as xr

from slidecube.catalog.scenes import Scene
from slidecube.pipeline import reducers
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.medians import median_of_columns

SCALE = 10_000
SHIFT = reducers.SHIFT
Method = Literal["greenest", "median", "medoid", "geomedian", "nearest-clear"]
METHODS: tuple[Method, ...] = get_args(Method)
"""Ways to make one image of the clear observations of a window; see `composite`."""

COMPILED: tuple[Method, ...] = ("medoid", "geomedian")
"""Methods whose loops are compiled when they are first used."""

WindowEnd = Literal["start", "end"]

OBSERVED_VARIABLES = ("clear_count", "date_first", "date_last", "date", "spread")
"""What a composite says of itself beside the bands; see `composite`."""

_EPOCH = dt.date(1970, 1, 1)
STRIP_PX = 1 << 14
"""Pixels that are worked at once: a dozen dates of them fit into a core's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compositing:
    """How the clear observations of a pixel become one.

    method : of METHODS; greenest_of : of "greenest", the draw whose greenest is meant, 0 = all observations
    event_at : of "nearest-clear", the end of the window at which the event lies
    """

    method: Method
    greenest_of: int = 0
    event_at: WindowEnd = "end"


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


def composite(
    bands_tyx: Mapping[str, da.Array],
    clear_tyx: da.Array,
    *,
    scenes: Sequence[Scene],
    how: Compositing,
) -> dict[str, da.Array]:
    """Reduce the dates of a window to one image.

    bands_tyx : band -> (t, y, x) uint16 raw digital numbers, 0 = nodata, one chunk in time
    clear_tyx : (t, y, x) bool
    scenes : the t scenes, for their offsets, dates and overpasses
    how : "greenest": each pixel's observation of the highest NDVI, all bands of that date (ENS, section 3.2; the
        earliest wins a tie), or what `greenest_of` observations would give, whatever their number
        (`reducers.greenest_of_draw`); "median": each band's median (mean of the two middle values, halves to even);
        "medoid": the observation nearest to all others; "geomedian": the geometric median of the spectra;
        "nearest-clear": the first or last observation of the window, by the end at which the event lies

    An observation counts where it is clear and no band is nodata. Where two items of one overpass overlap, the first
    clear one counts, once.

    Returns (y, x) uint16 arrays: each band as `round(10000 * reflectance) + 1000`, 0 = nodata; `clear_count`, the
    number of clear observations; `date_first` and `date_last`, the first and last of them, and `date`, the chosen
    one (the nearer of two for `greenest_of`; "median", "geomedian": 0), in days since 1970-01-01, 0 = none; `spread`,
    1 + the median distance of the observations from the composite in ten-thousandths of reflectance, 0 = fewer than
    two (`reducers.spread_around`).
    Raises PipelineError when "greenest" lacks B04 or B08.
    """
    names = list(bands_tyx)
    if how.method == "greenest" and not {"B04", "B08"} <= set(names):
        raise PipelineError(f"Composite 'greenest' needs bands B04 and B08; got {', '.join(names)}")
    shifts = shifts_of(scenes)
    days = np.array([(s.datetime.date() - _EPOCH).days for s in scenes], np.uint16)
    order = observations(scenes)

    def block(clear: np.ndarray, *bands: np.ndarray) -> np.ndarray:
        return composite_block(
            bands,
            clear,
            shifts=shifts,
            days=days,
            groups=order,
            how=how,
            red=names.index("B04") if "B04" in names else -1,
            nir=names.index("B08") if "B08" in names else -1,
        )

    template = next(iter(bands_tyx.values()))
    out = da.map_blocks(
        block,
        clear_tyx,
        *bands_tyx.values(),
        dtype=np.uint16,
        chunks=((len(names) + len(OBSERVED_VARIABLES),), *template.chunks[1:]),
        meta=np.empty((0, 0, 0), np.uint16),
    )
    return {name: out[i] for i, name in enumerate([*names, *OBSERVED_VARIABLES])}


def composite_block(
    bands_btyx: Sequence[np.ndarray],
    clear_tyx: np.ndarray,
    *,
    shifts: np.ndarray,
    days: np.ndarray,
    groups: Sequence[Sequence[int]],
    how: Compositing,
    red: int,
    nir: int,
) -> np.ndarray:
    """Composite one block, strip by strip of rows; see `composite`. Returns (band + 5, y, x) uint16."""
    bands, (dates, height, width) = len(bands_btyx), clear_tyx.shape
    out = np.empty((bands + len(OBSERVED_VARIABLES), height, width), np.uint16)
    rows = max(1, STRIP_PX // max(width, 1))
    for top in range(0, height, rows):
        at = np.s_[:, top : top + rows]
        valid_tn = clear_tyx[at].reshape(dates, -1)
        raw = [band[at].reshape(dates, -1) for band in bands_btyx]
        valid_tn = np.logical_and.reduce([valid_tn, *(band != 0 for band in raw)])
        stored_btn = np.empty((bands, *valid_tn.shape), np.uint16)
        for dn, stored in zip(raw, stored_btn, strict=True):
            _harmonise(dn, valid_tn, shifts, out=stored)
        valid_on, days_o = _merge_overpasses(stored_btn, valid_tn, days, groups)
        made = _strip(stored_btn[:, : len(valid_on)], valid_on, days_o, how=how, red=red, nir=nir)
        out[at] = made.reshape(len(out), -1, width)
    return out


def _strip(
    stored_bon: np.ndarray, valid_on: np.ndarray, days_o: np.ndarray, *, how: Compositing, red: int, nir: int
) -> np.ndarray:
    """Composite a strip: (band + 5, n) uint16."""
    bands = len(stored_bon)
    out = np.zeros((bands + len(OBSERVED_VARIABLES), valid_on.shape[1]), np.uint16)
    image_bn, chosen = _reduced(stored_bon, valid_on, how=how, red=red, nir=nir)
    out[:bands] = image_bn
    out[bands] = valid_on.sum(axis=0, dtype=np.uint16)
    out[bands + 1], out[bands + 2] = _first_and_last(valid_on, days_o)
    if chosen is not None:
        out[bands + 3] = np.where(out[bands] > 0, days_o[chosen], 0)
    out[bands + 4] = reducers.spread_around(stored_bon, valid_on, image_bn)
    return out


def _reduced(
    stored_bon: np.ndarray, valid_on: np.ndarray, *, how: Compositing, red: int, nir: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """One spectrum a pixel, (b, n) uint16, and the position of its observation, where it is that of one."""
    if how.method == "median":
        return np.stack([median_of_columns(band_on.copy()) for band_on in stored_bon]), None
    if how.method == "geomedian":
        return reducers.geometric_median(stored_bon, valid_on), None
    if how.method == "greenest" and how.greenest_of:
        return reducers.greenest_of_draw(stored_bon, valid_on, red=red, nir=nir, draw=how.greenest_of)
    if how.method == "greenest":
        chosen = reducers.greenest(stored_bon[red], stored_bon[nir], valid_on)
    elif how.method == "medoid":
        chosen = reducers.medoid(stored_bon, valid_on)
    else:
        chosen = (reducers.latest if how.event_at == "end" else reducers.earliest)(valid_on)
    return np.take_along_axis(stored_bon, chosen[None, None], 1)[:, 0], chosen


def reflectance(stored: xr.DataArray) -> xr.DataArray:
    """Turn stored values back into reflectance: float32, NaN = nodata."""
    return ((stored.astype(np.float32) - SHIFT) / SCALE).where(stored != 0)


def shifts_of(scenes: Sequence[Scene]) -> np.ndarray:
    """Return what is added to the digital numbers of each scene to bring them onto the stored scale: (t,) int32."""
    return np.array([SHIFT + round(SCALE * _offset(s)) for s in scenes], np.int32)


def stored_overpasses(
    dn_tn: np.ndarray, valid_tn: np.ndarray, *, shifts: np.ndarray, groups: Sequence[Sequence[int]]
) -> np.ndarray:
    """Bring one band onto the stored scale and merge the scenes of each overpass: (o, n) uint16, 0 = not valid."""
    stored_btn = np.empty((1, *dn_tn.shape), np.uint16)
    _harmonise(dn_tn, valid_tn, shifts, out=stored_btn[0])
    valid_on, _ = _merge_overpasses(stored_btn, valid_tn, np.zeros(len(dn_tn), np.uint16), groups)
    return stored_btn[0, : len(valid_on)]


def _offset(scene: Scene) -> float:
    if scene.offset is None:
        raise PipelineError(
            f"Scene {scene.id!r} has no offset decision; it cannot enter an optical composite"
        )
    return scene.offset.value


def _harmonise(dn_tn: np.ndarray, valid_tn: np.ndarray, shifts: np.ndarray, *, out: np.ndarray) -> None:
    """Bring raw numbers of several baselines onto the stored scale, 1 to 65535, and 0 where not valid."""
    for dn, valid, stored, shift in zip(dn_tn, valid_tn, out, shifts.clip(-65534, 65534), strict=True):
        size = np.uint16(abs(shift))
        if shift > 0:
            np.minimum(dn, 65535 - size, out=stored)
            np.add(stored, size, out=stored)
        elif shift < 0:
            np.maximum(dn, size + 1, out=stored)  # 1 is the darkest value that is not nodata
            np.subtract(stored, size, out=stored)
        np.multiply(stored if shift else dn, valid, out=stored)


def _merge_overpasses(
    stored_btn: np.ndarray, valid_tn: np.ndarray, days: np.ndarray, groups: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Merge scenes of one overpass, in place: its observation is each pixel's first valid scene.

    Leaves observation o at position o of the bands. Returns validity and day of each observation.
    """
    if all(list(group) == [i] for i, group in enumerate(groups)):
        return valid_tn, days
    valid_on = np.stack([valid_tn[list(group)].any(axis=0) for group in groups])
    for band_tn in stored_btn:
        merged = []
        for group in groups:
            one = band_tn[group[0]].copy()
            for t in group[1:]:
                np.copyto(one, band_tn[t], where=one == 0)
            merged.append(one)
        band_tn[: len(merged)] = merged
    return valid_on, np.array([days[group[0]] for group in groups], days.dtype)


def _first_and_last(valid_on: np.ndarray, days_o: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first = np.full(valid_on.shape[1:], 65535, np.uint16)
    last = np.zeros(valid_on.shape[1:], np.uint16)
    for valid_n, day in zip(valid_on, days_o, strict=True):
        np.copyto(first, np.minimum(first, day), where=valid_n)
        np.copyto(last, np.maximum(last, day), where=valid_n)
    first[last == 0] = 0
    return first, last
