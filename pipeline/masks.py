"""Masks: which pixels of a scene may be used, by its scene classification, its sun, and what its bands show.

Axes in names: t date (scene), o observation (overpass), y, x, n pixel of a strip.

The classification is judged first, once a tile: what it leaves open (a pixel under the projection of a cloud, a pixel
that is called cloud) is decided when the bands are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import dask.array as da
import numpy as np
import pyproj
from odc.geo.geobox import GeoBox

from slidecube.catalog.scenes import Scene

SCL_MASKED = (0, 1, 3, 8, 9, 10, 11)
"""Classes of Sen2Cor never used: no data, saturated, cloud shadow, cloud, thin cirrus, snow."""

SCL_DILATED = (3, 8, 9, 10)
"""Scene classes whose edges are uncertain, and are widened."""

CLOUD, SNOW = 8, 11
"""Cloud of medium probability, and snow."""

_CLOUDS = (8, 9, 10)
_THICK = (8, 9)  # thin cirrus throws no shadow that matters

MASKED, CLEAR, SHADED, CLOUDED = range(4)
"""What the classification says of a pixel: not to be used; clear; clear, but a cloud may stand between it and the sun;
called cloud, or near one."""

SNOW_NODATA = 255

DARK_NIR = 0.12
"""Reflectance of B08 below which what lies under the projection of a cloud counts as its shadow. In a real series of
118 dates (site 31UDS) the classes of shadow have .068 +- .030."""

SHADE = 0.6
"""Share of the NIR of its brightest date below which a pixel may lie in shadow: the direct light is more than that."""

_STRIP_PX = 1 << 16
_LIKE = (0.02, 0.15)  # of two dates that show the same ground: absolute, and of their mean


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRule:
    """Which pixels of a scene are used.

    scl_classes : scene classes that are masked
    dilation_px : widening of the cloud and shadow classes, in pixels of the grid, as a square
    cloud_heights_m : lowest and highest cloud whose shadow is looked for, above the ground; None = not looked for
    readmit : whether what is called cloud is used where it proves to be bright ground
    cloud_pct : probability from which on a second opinion counts as cloud; None = it is not asked
    """

    scl_classes: tuple[int, ...] = SCL_MASKED
    dilation_px: int = 3
    cloud_heights_m: tuple[float, float] | None = (200.0, 3000.0)
    readmit: bool = True
    cloud_pct: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sun:
    """Where the sun stands, degrees; azimuth clockwise from true north."""

    azimuth_deg: float
    elevation_deg: float


def sun_of(scene: Scene) -> Sun | None:
    """Return the sun of a scene as its item says, None where it does not say."""
    said = scene.item.get("properties") or {}
    azimuth, elevation = said.get("view:sun_azimuth"), said.get("view:sun_elevation")
    if azimuth is None or elevation is None:
        azimuth, zenith = said.get("s2:mean_solar_azimuth"), said.get("s2:mean_solar_zenith")
        elevation = None if zenith is None else 90 - zenith
    if not isinstance(azimuth, int | float) or not isinstance(elevation, int | float) or elevation <= 0:
        return None
    return Sun(azimuth_deg=float(azimuth), elevation_deg=float(elevation))


def judge(
    scl_tyx: da.Array,
    rule: MaskRule,
    *,
    geobox: GeoBox,
    suns: Sequence[Sun | None],
    groups: Sequence[Sequence[int]],
    halo_px: int,
) -> tuple[da.Array, da.Array]:
    """Say of each pixel of each scene whether it may be used, and how often a pixel lay under snow.

    scl_tyx : (t, y, x) uint8, `halo_px` wider on each side than `geobox`; suns : of the scenes; groups : overpasses
    Returns codes (t, y, x) uint8, of MASKED, CLEAR, SHADED, CLOUDED; and (y, x) uint8, the share of the overpasses
    that saw the pixel and called it snow, in per cent, SNOW_NODATA where none saw it. Clouds are widened and their
    shadows are projected across blocks, as far as `halo_px` reaches.
    """
    inner = scl_tyx[:, slice(halo_px, -halo_px or None), slice(halo_px, -halo_px or None)]
    rows, cols = inner.chunks[1:]
    blocks: list[list[da.Array]] = []
    for i, height in enumerate(rows):
        blocks.append([])
        for j, width in enumerate(cols):
            r, c = sum(rows[:i]), sum(cols[:j])
            box = geobox[r : r + height, c : c + width]
            one = partial(
                _judge_block,
                rule=rule,
                shadows=_shadows(box, suns, rule, halo_px),
                groups=groups,
                halo=halo_px,
            )
            part = scl_tyx[:, r : r + height + 2 * halo_px, c : c + width + 2 * halo_px].rechunk(-1)
            chunks = ((len(suns) + 1,), (height,), (width,))
            blocks[-1].append(
                part.map_blocks(one, dtype=np.uint8, chunks=chunks, meta=np.empty((0, 0, 0), np.uint8))
            )
    judged: da.Array = da.block(blocks)
    return judged[:-1], judged[-1]


def second_opinion(scl_tyx: da.Array, cloud_pct_tyx: da.Array, rule: MaskRule) -> da.Array:
    """Call cloud what a provider's cloud probability calls so: (t, y, x) uint8 of scene classes, lazily.

    scl_tyx : (t, y, x) uint8; cloud_pct_tyx : (t, y, x) uint8, in per cent; nodata, 0, is no cloud, as its makers
    write it. What no scene shows stays class 0, and snow, which looks like cloud to it, stays snow. The clouds that it
    finds are widened, throw shadows and are admitted again like those of the classification.
    """
    assert rule.cloud_pct is not None
    cloudy = (cloud_pct_tyx >= rule.cloud_pct) & (scl_tyx != 0) & ~da.isin(scl_tyx, (*_CLOUDS, SNOW))
    return da.where(cloudy, np.uint8(CLOUD), scl_tyx)


def _shadows(
    block: GeoBox, suns: Sequence[Sun | None], rule: MaskRule, halo_px: int
) -> list[list[tuple[int, int]]]:
    """Rows and columns by which a cloud's shadow may lie off it, for each scene, seen from a block's centre."""
    if rule.cloud_heights_m is None:
        return [[] for _ in suns]
    assert block.crs is not None
    north_deg = 0.0  # of the grid's north, clockwise from true north
    if block.crs.projected:
        centre = block.extent.centroid.to_crs("EPSG:4326").coords[0]
        north_deg = float(pyproj.Proj(str(block.crs)).get_factors(*centre).meridian_convergence)
    size_m = abs(block.affine.a)
    return [[] if s is None else shadow_offsets(s, rule, size_m, north_deg, halo_px) for s in suns]


def shadow_offsets(
    sun: Sun, rule: MaskRule, size_m: float, north_deg: float, most_px: int
) -> list[tuple[int, int]]:
    """Rows (down) and columns (right) from a cloud to the pixels where its shadow may fall, each once.

    A cloud at height h throws its shadow h / tan(elevation) away from the sun, on level ground. Where that is farther
    than `most_px`, the widening of clouds left out, it is not followed.
    """
    if rule.cloud_heights_m is None:
        return []
    low, high = (h / np.tan(np.radians(sun.elevation_deg)) / size_m for h in rule.cloud_heights_m)
    high = min(high, float(most_px - rule.dilation_px - 1))
    if high < low:
        return []
    away = np.arange(np.floor(low), np.ceil(high) + 1)
    around = np.radians(sun.azimuth_deg - north_deg)
    steps = zip(np.rint(away * np.cos(around)), np.rint(-away * np.sin(around)), strict=True)
    return list(dict.fromkeys((int(row), int(col)) for row, col in steps))


def _judge_block(
    scl_tyx: np.ndarray,
    *,
    rule: MaskRule,
    shadows: Sequence[Sequence[tuple[int, int]]],
    groups: Sequence[Sequence[int]],
    halo: int,
) -> np.ndarray:
    """Judge one block, which its surroundings stand around; returns codes and, last, the share of snow."""
    dates, height, width = scl_tyx.shape[0], scl_tyx.shape[1] - 2 * halo, scl_tyx.shape[2] - 2 * halo
    core = np.s_[halo : halo + height, halo : halo + width]
    out = np.empty((dates + 1, height, width), np.uint8)
    for scl, offsets, codes in zip(scl_tyx, shadows, out, strict=False):
        codes[...] = _codes(scl, offsets, rule=rule, core=core)
    inner = scl_tyx[:, core[0], core[1]]
    out[-1] = _snow_pct(inner, groups)
    return out


def _codes(
    scl_yx: np.ndarray, offsets: Sequence[tuple[int, int]], *, rule: MaskRule, core: tuple[slice, slice]
) -> np.ndarray:
    """Judge the core of one scene's classification."""
    d, classes = rule.dilation_px, set(rule.scl_classes)
    here = scl_yx[core]
    around = scl_yx[core[0].start - d : core[0].stop + d, core[1].start - d : core[1].stop + d]
    inner = np.s_[d : d + here.shape[0], d : d + here.shape[1]]
    codes = np.full(here.shape, CLEAR, np.uint8)
    if offsets and 3 in classes:
        codes[_projected(scl_yx, offsets, core=core, dilation_px=d)] = SHADED
    codes[_dilate(_of(around, classes & set(_CLOUDS)), d)[inner]] = CLOUDED if rule.readmit else MASKED
    codes[_dilate(_of(around, classes & set(SCL_DILATED) - set(_CLOUDS)), d)[inner]] = MASKED
    codes[_of(here, classes - set(_CLOUDS))] = MASKED
    return codes


def _projected(
    scl_yx: np.ndarray,
    offsets: Sequence[tuple[int, int]],
    *,
    core: tuple[slice, slice],
    dilation_px: int,
) -> np.ndarray:
    """Where a shadow of the clouds, widened, may fall, in the core."""
    shape = core[0].stop - core[0].start, core[1].stop - core[1].start
    down, right = zip(*offsets, strict=True)
    top, left = core[0].start - max(down) - dilation_px, core[1].start - max(right) - dilation_px
    bottom, end = core[0].stop - min(down) + dilation_px, core[1].stop - min(right) + dilation_px
    thick = _of(scl_yx[top:bottom, left:end], _THICK)
    shaded = np.zeros(shape, bool)
    if not thick.any():
        return shaded
    clouds = _dilate(thick, dilation_px)
    for row, col in offsets:
        r, c = core[0].start - row - top, core[1].start - col - left
        shaded |= clouds[r : r + shape[0], c : c + shape[1]]
    return shaded


def _of(scl_yx: np.ndarray, classes: Iterable[int]) -> np.ndarray:
    """Tell which pixels are of some classes; a table is ten times as quick as a search."""
    table = np.zeros(256, bool)
    table[list(classes)] = True
    found: np.ndarray = table[scl_yx]
    return found


def _snow_pct(scl_tyx: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    seen, snowy = (np.zeros(scl_tyx.shape[1:], np.int32) for _ in range(2))
    for group in groups:
        scl = scl_tyx[list(group)]
        seen += (scl != 0).any(axis=0)
        snowy += (scl == SNOW).any(axis=0)
    share = np.rint(100 * snowy / np.maximum(seen, 1))
    return np.where(seen > 0, share, SNOW_NODATA).astype(np.uint8)


def admitted(
    codes_tyx: da.Array,
    bands_tyx: Mapping[str, da.Array],
    *,
    offsets: Sequence[float],
    groups: Sequence[Sequence[int]],
) -> da.Array:
    """Decide by the bands what the classification left open: (t, y, x) bool, lazily.

    codes_tyx : of `judge`; bands_tyx : band -> (t, y, x) uint16 digital numbers, 0 = nodata; offsets : of the scenes
    groups : scenes of one overpass, which are one date however many granules they are cut into
    A SHADED pixel is used unless its B08 is below DARK_NIR and below SHADE times that of its brightest date (without
    B08, it is used): ground that is dark on all dates, a wet scar, lies in no cloud's shadow. A CLOUDED one is used
    where it proves to be bright ground (`returning_ground`; without B02, B04 and B08 it never is).
    """
    names = [band for band in ("B02", "B04", "B08") if band in bands_tyx]
    if "B08" not in names:
        return codes_tyx.map_blocks(lambda codes: (codes == CLEAR) | (codes == SHADED), dtype=bool)
    shift = np.asarray(offsets, np.float32)[:, None]
    overpass = np.zeros(len(offsets), np.int64)
    for number, group in enumerate(groups):
        overpass[list(group)] = number

    def block(codes: np.ndarray, *bands: np.ndarray) -> np.ndarray:
        flat, out = codes.reshape(len(codes), -1), np.empty(codes.shape, bool)
        flags = out.reshape(flat.shape)
        for start in range(0, flat.shape[1], _STRIP_PX):
            at = np.s_[:, start : start + _STRIP_PX]
            strip = {n: b.reshape(flat.shape)[at] for n, b in zip(names, bands, strict=True)}
            flags[at] = _admitted_strip(flat[at], strip, shift, overpass)
        return out

    return da.map_blocks(
        block, codes_tyx, *(bands_tyx[n] for n in names), dtype=bool, meta=np.empty((0, 0, 0), bool)
    )


def _admitted_strip(
    codes_tn: np.ndarray, bands_tn: Mapping[str, np.ndarray], shift_t: np.ndarray, overpass_t: np.ndarray
) -> np.ndarray:
    used: np.ndarray = codes_tn == CLEAR
    shaded = codes_tn == SHADED
    if shaded.any():
        nir = bands_tn["B08"].astype(np.float32) / 10_000 + shift_t
        nir[(bands_tn["B08"] == 0) | ~(used | shaded)] = 0
        used |= shaded & ((nir >= DARK_NIR) | (nir >= SHADE * nir.max(axis=0)))
    # ground that is called cloud on three dates at least; few pixels, so that they are looked at apart
    asked = np.flatnonzero((codes_tn == CLOUDED).any(axis=0)) if len(bands_tn) == 3 else np.array([], int)
    if asked.size and len(set(overpass_t.tolist())) > 2:
        blue, red, nir = (
            np.where(b[:, asked] == 0, np.nan, b[:, asked].astype(np.float32) / 10_000 + shift_t)
            for b in (bands_tn[n] for n in ("B02", "B04", "B08"))
        )
        codes = codes_tn[:, asked]
        candidates = (codes == CLEAR) | (codes == CLOUDED)
        clouded = codes == CLOUDED
        used[:, asked] |= returning_ground(blue, red, nir, candidates, overpass_t, asked_tn=clouded)
    return used


def returning_ground(
    blue_tn: np.ndarray,
    red_tn: np.ndarray,
    nir_tn: np.ndarray,
    candidates_tn: np.ndarray,
    overpass_t: np.ndarray,
    *,
    asked_tn: np.ndarray | None = None,
) -> np.ndarray:
    """Tell bare bright ground that stays, on three dates or more, from clouds, which do not: (t, n) bool.

    blue_tn, red_tn, nir_tn : reflectance, NaN = nodata; candidates_tn : scenes that may be of the same ground
    overpass_t : (t,) number of each scene's overpass: scenes of one saw the same cloud, and are one date
    asked_tn : (t, n) bool, of which an answer is wanted, None = of all; the others are False
    A date counts as bare ground where it has no haze (blue - .5 red - .08 < 0), NDVI below .35 and red of .08 or
    more; it returns where two other such dates agree with it in red and NIR, to .02 and 15 %.
    Source of the haze test: Zhu & Woodcock 2012, doi:10.1016/j.rse.2011.10.028, eq. 3.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ndvi = (nir_tn - red_tn) / (nir_tn + red_tn)
        bare = candidates_tn & (blue_tn - 0.5 * red_tn - 0.08 < 0) & (ndvi < 0.35) & (red_tn >= 0.08)
    out = np.zeros(bare.shape, bool)
    some = np.flatnonzero(bare.sum(axis=0) > 2)
    bare, red, nir = bare[:, some], red_tn[:, some], nir_tn[:, some]
    wanted = bare if asked_tn is None else bare & asked_tn[:, some]
    overpasses = [np.flatnonzero(overpass_t == number) for number in np.unique(overpass_t)]
    for t, wanted_n in enumerate(wanted):
        at = np.flatnonzero(wanted_n)
        others = [scenes for scenes in overpasses if t not in scenes]
        out[t, some[at[_agreed(t, at, others, bare_tn=bare, red_tn=red, nir_tn=nir)]]] = True
    return out


def _agreed(
    t: int,
    at: np.ndarray,
    others: Sequence[np.ndarray],
    *,
    bare_tn: np.ndarray,
    red_tn: np.ndarray,
    nir_tn: np.ndarray,
) -> np.ndarray:
    """Tell with which pixels `at` of scene t two other overpasses agree: positions in `at`.

    A pixel is not asked again once two agreed: with many dates, all pairs of them took longer than all else.
    """
    left, alike = np.arange(at.size), np.zeros(at.size, np.int32)
    found = []
    for scenes in others:
        if not left.size:
            break
        n = at[left]
        red, nir = red_tn[t, n], nir_tn[t, n]
        agrees = np.zeros(n.size, bool)
        for s in scenes:
            agrees |= bare_tn[s, n] & _like(red_tn[s, n], red) & _like(nir_tn[s, n], nir)
        alike += agrees
        enough = alike >= 2
        if enough.any():
            found.append(left[enough])
            left, alike = left[~enough], alike[~enough]
    return np.concatenate(found) if found else np.array([], np.intp)


def _like(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        close: np.ndarray = np.abs(a - b) <= _LIKE[0] + _LIKE[1] * (a + b) / 2
    return close


def _dilate(mask_yx: np.ndarray, d: int) -> np.ndarray:
    """Widen by a square of side 2 d + 1: two passes of shifted ors, far cheaper than a morphology."""
    out = mask_yx
    for axis in (0, 1):
        wide = out.copy()
        for shift in range(1, d + 1):
            lo, hi = [slice(None)] * 2, [slice(None)] * 2
            lo[axis], hi[axis] = slice(None, -shift), slice(shift, None)
            wide[tuple(lo)] |= out[tuple(hi)]
            wide[tuple(hi)] |= out[tuple(lo)]
        out = wide
    return out
