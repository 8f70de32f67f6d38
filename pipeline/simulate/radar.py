"""Sentinel-1 of the simulation: backscatter of the ground, the radar's geometry, and speckle.

Everything random has generators of its own, so the optical scenes of a seed are the same with and without radar.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from slidecube.catalog.radar import OrbitState
from slidecube.pipeline.radar_geometry import BlockGeometry, Track, block_geometry, padded, slope_factor
from slidecube.pipeline.simulate import fields
from slidecube.pipeline.simulate.changes import ChangeMap
from slidecube.pipeline.simulate.ground import ground_on
from slidecube.pipeline.simulate.landscape import CLASSES, Landscape
from slidecube.pipeline.simulate.parameters import Parameters, Radar
from slidecube.pipeline.simulate.terrain import Terrain, gradients

STRIP_PX = 240
NODATA = -32768.0
"""What lies outside the swath, as in Planetary Computer's files; parts that the processor left out are zero."""

_MARGIN_PX = 12  # of 10 m: beyond the reach of the point spread


@dataclass(frozen=True, slots=True, kw_only=True)
class RadarPass:
    """One overpass of Sentinel-1."""

    day: dt.date
    orbit_state: OrbitState
    zero_filled: bool = False


def passes(p: Parameters, most: tuple[int, int] | None = None) -> list[RadarPass]:
    """Overpasses of both directions within the two windows, by day; the last one before and after has a zero part.

    most : keep only so many a direction before and after, the last ones of each window
    """
    found = []
    for state, first in p.radar.first_day.items():
        days = [first + dt.timedelta(days=i * p.radar.repeat_days) for i in range(40)]
        for side, (start, end) in enumerate((p.season.pre, p.season.post)):
            within = [day for day in days if start <= day <= end]
            kept = within[-most[side] :] if most else within
            found += [RadarPass(day=d, orbit_state=state, zero_filled=d == within[-1]) for d in kept]
    return sorted(found, key=lambda one: (one.day, one.orbit_state))


def scene_geometry(p: Parameters, terrain: Terrain, orbit_state: OrbitState) -> BlockGeometry:
    """Geometry of the whole scene on the true terrain; beyond its margin the edge goes on."""
    geobox = terrain.geobox
    wide = padded(geobox)
    beyond = round((geobox.affine.c - wide.affine.c) / geobox.affine.a) - terrain.margin_px
    far = np.pad(terrain.dem_m, max(beyond, 0), mode="edge")
    cut = max(-beyond, 0)
    heights = fields.block_mean(far[cut : far.shape[0] - cut, cut : far.shape[1] - cut], 2)
    east, north = (g[terrain.inner] for g in gradients(terrain.dem_m, abs(geobox.affine.a)))
    slope = np.degrees(np.arctan(np.hypot(east, north)))
    aspect = np.where(slope > 0, np.degrees(np.arctan2(-east, -north)) % 360, np.nan)
    track = Track(relative_orbit=p.radar.relative_orbit[orbit_state], orbit_state=orbit_state)
    stack = np.stack([terrain.scene_dem_m, slope, aspect])
    return block_geometry(track, geobox, stack, heights[: wide.shape[0], : wide.shape[1]])


def backscatter(
    p: Parameters, landscape: Landscape, changes: ChangeMap, one: RadarPass, *, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield "vv" and "vh": gamma0 of the ground without noise or geometry, (y, x) float32 linear power, 10 m."""
    ground = ground_on(p, landscape, changes, one.day)
    rows = landscape.cover10.shape[0]
    for band in ("vv", "vh"):
        fresh = _fresh_power(p.radar, changes, band, seed)
        strips = []
        for start in range(0, rows, STRIP_PX):
            strip = ground.strip(slice(start, min(start + STRIP_PX, rows)))
            cover_db = _class_db(p.radar, band)[strip.cover]
            cover_db -= np.float32(p.radar.leaf_db[band]) * (1 - strip.green)
            stand = fields.repeat(landscape.bright[strip.rows].astype(np.float32), 2)
            power = _power(cover_db + np.float32(p.radar.texture_db) * stand)
            power += strip.changed * (fresh[strip.index] - power)
            strips.append(fields.block_mean(power, 2))
        yield band, np.concatenate(strips)


def _class_db(radar: Radar, band: str) -> np.ndarray:
    table = radar.vv_db if band == "vv" else radar.vh_db
    return np.array([table[name] for name in CLASSES], np.float32)


def _fresh_power(radar: Radar, changes: ChangeMap, band: str, seed: int) -> np.ndarray:
    """Power of the new ground of each change, index 0 = 0: (n + 1,) float32."""
    rough = fields.generator(seed, "radar roughness", band).standard_normal(len(changes.changes))
    slides = np.array([change.kind in ("landslide", "old_scar") for change in changes.changes], bool)
    db = np.where(slides, radar.scar_db[band], radar.tilled_db[band]) + radar.scar_sd_db[band] * rough
    return np.concatenate([[0.0], _power(db)]).astype(np.float32)


def _power(db: np.ndarray | float) -> np.ndarray:
    return np.asarray(np.power(10.0, np.asarray(db) / 10))


def look(
    p: Parameters, clean: np.ndarray, geometry: BlockGeometry, one: RadarPass, *, seed: int, band: str
) -> np.ndarray:
    """What one overpass delivers: (y, x) float32 gamma0, linear power.

    clean : of `backscatter`; adds what terrain correction leaves, layover, shadow, moisture, noise, speckle, zeros
    """
    r = p.radar
    rng = fields.generator(seed, "radar look", one.day, one.orbit_state, band)
    common = fields.generator(seed, "radar date", one.day, one.orbit_state)
    offset_db = r.moisture_sd_db * common.standard_normal() + r.gain_sd_db * rng.standard_normal()
    factor = slope_factor(geometry.incidence_deg, geometry.slopes, "surface")
    flat = np.cos(np.radians(geometry.incidence_deg))
    left = np.where(np.isnan(factor), 1.0, factor / flat) ** r.flattening_residual
    power = clean * _power(offset_db) * np.clip(left, 0.25, 4.0)
    power = _folded(r, power, geometry, rng)
    power = np.where(geometry.shadow, 0.0, power) + _power(r.noise_db)
    power = (power * speckle(r, power.shape, rng)).astype(np.float32)
    if one.zero_filled:
        power[:, : round(r.zero_filled * power.shape[1])] = 0
    return np.asarray(np.maximum(power, 0), dtype=np.float32)


def _folded(r: Radar, power: np.ndarray, geometry: BlockGeometry, rng: np.random.Generator) -> np.ndarray:
    """In layover the ground is a mean of its surroundings, at a brightness that is off."""
    mixed = ndimage.gaussian_filter(power, r.layover_smear_m / 10)
    off = _power(r.layover_sd_db * fields.smooth_noise((power.shape[0], power.shape[1]), rng, patch_px=6))
    return np.where(geometry.layover, mixed * off, power)


def speckle(r: Radar, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Multiplicative noise of mean 1 with as many looks as real products have, smeared by the point spread.

    A gamma law on each pixel, smoothed by a Gaussian of sigma s pixels, has 4 pi s^2 times its looks.
    """
    sigma = r.smear_m / 10
    white_looks = r.looks / (4 * np.pi * sigma**2)
    rows, cols = (n + 2 * _MARGIN_PX for n in shape)
    white = rng.gamma(white_looks, 1 / white_looks, (rows, cols)).astype(np.float32)
    smooth = ndimage.gaussian_filter(white, sigma)
    return np.asarray(smooth[_MARGIN_PX:-_MARGIN_PX, _MARGIN_PX:-_MARGIN_PX])
