"""Sun, shadow, and the light that falls on sloping ground."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from slidecube.pipeline.simulate import fields
from slidecube.pipeline.simulate.parameters import Light, Season
from slidecube.pipeline.simulate.terrain import Terrain, gradients

_SHADOW_STEP = 2  # shadows are marched on 20 m pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Sun:
    """Where the sun stands, degrees; azimuth clockwise from north."""

    elevation_deg: float
    azimuth_deg: float

    @property
    def towards(self) -> tuple[float, float, float]:
        """Unit vector east, north, up to the sun."""
        high, around = np.radians(self.elevation_deg), np.radians(self.azimuth_deg)
        return (
            float(np.cos(high) * np.sin(around)),
            float(np.cos(high) * np.cos(around)),
            float(np.sin(high)),
        )


def sun_on(season: Season, day: dt.date) -> Sun:
    """Sun at the overpass.

    Source: declination by Cooper 1969, 23.45 sin(360 (284 + n) / 365) degrees; the usual hour-angle formulas.
    """
    declination = np.radians(23.45 * np.sin(np.radians(360 * (284 + day.timetuple().tm_yday) / 365)))
    latitude = np.radians(season.latitude_deg)
    hour = np.radians(15 * (season.overpass_solar_hour - 12))
    sine = np.sin(latitude) * np.sin(declination) + np.cos(latitude) * np.cos(declination) * np.cos(hour)
    east = -np.cos(declination) * np.sin(hour)
    north = np.sin(declination) * np.cos(latitude) - np.cos(declination) * np.sin(latitude) * np.cos(hour)
    return Sun(
        elevation_deg=float(np.degrees(np.arcsin(sine))),
        azimuth_deg=float(np.degrees(np.arctan2(east, north)) % 360),
    )


def lit(terrain: Terrain, sun: Sun, soft_px: float) -> np.ndarray:
    """Share of the sun's disc that each pixel sees: (y, x) float32 of the scene, by marching towards the sun."""
    step_px = _SHADOW_STEP
    dem = fields.block_mean(terrain.dem_m, step_px)
    pixel_m = abs(terrain.geobox.affine.a) * step_px
    around = np.radians(sun.azimuth_deg)
    rise = pixel_m * np.tan(np.radians(sun.elevation_deg))
    lit_px = np.ones(dem.shape, bool)
    highest = float(dem.max())
    for distance in _marches(int((highest - float(dem.min())) / rise) + 1):
        dx, dy = round(float(distance * np.sin(around))), round(float(-distance * np.cos(around)))
        seen = np.hypot(dx, dy)
        here, there = _overlap(dem.shape, dy, dx)
        lit_px[here] &= dem[there] <= dem[here] + np.float32(seen * rise)
    soft = ndimage.gaussian_filter(lit_px.astype(np.float32), soft_px)
    return fields.enlarge(soft, step_px, terrain.dem_m.shape)[terrain.inner]


def _marches(reach: int) -> list[float]:
    """Distances in pixels: every pixel near by, then ever wider steps, since far ridges are wide."""
    distances, at = [], 1.0
    while at <= reach:
        distances.append(at)
        at += max(1.0, at / 24)
    return distances


def _overlap(shape: tuple[int, ...], dy: int, dx: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Slices of the pixels whose neighbour (dy, dx) exists, and of those neighbours."""

    def cut(size: int, d: int) -> tuple[slice, slice]:
        low, high = max(0, -d), min(size, size - d)
        high = max(high, low)
        return slice(low, high), slice(low + d, high + d) if high > low else slice(0, 0)

    (y, y2), (x, x2) = cut(shape[0], dy), cut(shape[1], dx)
    return (y, x), (y2, x2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Illumination:
    """Light on each 10 m pixel of the scene, relative to flat ground.

    direct : (y, x) float32, cosine of incidence times the lit share, over the cosine on flat ground
    unshaded : the same without cast shadow; sky : (y, x) share of the sky that is seen
    """

    direct: np.ndarray
    unshaded: np.ndarray
    sky: np.ndarray

    def factor(self, light: Light, number: int, rows: slice) -> np.ndarray:
        """Reflectance after the partial terrain correction, relative to flat ground: (y, x) float32."""
        diffuse = np.float32(light.diffuse[number])
        seen = (1 - diffuse) * self.direct[rows] + diffuse * self.sky[rows]
        assumed = (1 - diffuse) * self.unshaded[rows] + diffuse * self.sky[rows]
        # the correction knows slope and aspect but no cast shadow, and is held back at grazing light
        return np.asarray(seen / np.clip(assumed, 0.4, 3) ** light.corrected_share, dtype=np.float32)


def illuminate(terrain: Terrain, sun: Sun, light: Light) -> Illumination:
    """Light of a sun on a terrain."""
    east, north = (g[terrain.inner] for g in gradients(terrain.dem_m, abs(terrain.geobox.affine.a)))
    length = np.sqrt(1 + east**2 + north**2)
    x, y, z = sun.towards
    unshaded = np.maximum((z - east * x - north * y) / length, 0) / z
    return Illumination(
        direct=(unshaded * lit(terrain, sun, light.shadow_soft_px)).astype(np.float32),
        unshaded=unshaded.astype(np.float32),
        sky=((1 + 1 / length) / 2).astype(np.float32),
    )
