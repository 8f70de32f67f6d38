"""Where the sun stood over a scene: light on slopes, and the shadow that ridges throw.

Directions are degrees clockwise from north, heights of the sun above the horizon of flat ground.
"""

from __future__ import annotations

import numpy as np
import pyproj
import scipy.ndimage
from affine import Affine
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from slidecube.catalog.scenes import Scene
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.masks import Sun, sun_of

SUN_VERSION = 1
"""Of the definitions below, a part of the keys of layers that are made by them."""

SHADOW_HALO_M = 10_000.0
"""Farthest ridge whose shadow is looked for: one of 4.6 km above the ground at a sun of 25 degrees, of 1.7 km at 10."""

_COARSE = 4  # grid pixels of 10 m a side of what casts shadow: about the 30 m of a global DEM
_TOLERANCE_M = 1.0  # below which a ridge is the error of the heights


def required_sun(scene: Scene) -> Sun:
    """Read the sun of a scene; raises PipelineError where its item does not say."""
    sun = sun_of(scene)
    if sun is None:
        raise PipelineError(
            f"Item {scene.id!r} of {scene.source!r} does not say where the sun stood (view:sun_elevation and "
            "view:sun_azimuth, or s2:mean_solar_zenith and s2:mean_solar_azimuth); use another source, or leave "
            "correction and cast_shadow of [cube.sun] out"
        )
    return sun


def cos_incidence(
    slope_deg: NDArray[np.float32], aspect_deg: NDArray[np.float32], sun: Sun
) -> NDArray[np.float32]:
    """Cosine of the angle between the sun and the ground's normal: cos i of the illumination layer.

    slope_deg, aspect_deg : (y, x), aspect clockwise from true north, NaN where flat; NaN slope = unknown
    Returns (y, x) float32 in [-1, 1], below 0 where the ground faces away from the sun, NaN = unknown.
    Source: Teillet et al. 1982, eq. 2, doi:10.1080/07038992.1982.10855028.
    """
    slope, zenith = np.radians(slope_deg), np.radians(90.0 - sun.elevation_deg)
    turned = np.radians(sun.azimuth_deg - np.where(slope_deg > 0, np.nan_to_num(aspect_deg), 0.0))
    light = np.cos(zenith) * np.cos(slope) + np.sin(zenith) * np.sin(slope) * np.cos(turned)
    return np.asarray(light, dtype=np.float32)


def around_block(geobox: GeoBox) -> GeoBox:
    """Pixels on which the heights around a block are needed: coarser, and `SHADOW_HALO_M` wider on each side."""
    halo_px = -(-int(SHADOW_HALO_M / abs(geobox.affine.a)) // _COARSE) * _COARSE
    wide = geobox.pad(halo_px)
    rows, cols = (-(-n // _COARSE) for n in wide.shape)
    return GeoBox((rows, cols), wide.affine @ Affine.scale(_COARSE), wide.crs)


def grid_azimuth(geobox: GeoBox, azimuth_deg: float) -> float:
    """Turn an azimuth from true north into one from the north of a grid, at the grid's centre."""
    crs = pyproj.CRS.from_user_input(str(geobox.crs))
    centre = geobox.extent.centroid.to_crs("EPSG:4326").coords[0]
    return azimuth_deg - float(pyproj.Proj(crs).get_factors(*centre).meridian_convergence)


def cast_shadow(
    heights_m: NDArray[np.float32], around: GeoBox, geobox: GeoBox, sun: Sun
) -> NDArray[np.bool_]:
    """Pixels from which the sun is hidden by the ground, their own slope included.

    heights_m : (y, x) on the pixels of `around`, NaN = unknown, which hides nothing; geobox : pixels wanted, within
    A line of sight towards the sun is followed to the edge of `around`: heights are turned into lines along the sun's
    azimuth, on which height plus distance times the tangent of its elevation is held against the largest before it.
    The curvature of the Earth (7 m over 10 km) is left out.
    Returns (y, x) bool. Source: horizons as of Dozier, Bruno & Downey 1981, doi:10.1016/0098-3004(81)90026-9.
    """
    if sun.elevation_deg <= 0:
        return np.ones(geobox.shape, bool)
    pixel_m = abs(around.affine.a)
    turn = np.radians(grid_azimuth(around, sun.azimuth_deg))
    away, across = np.array([np.cos(turn), -np.sin(turn)]), np.array([np.sin(turn), np.cos(turn)])
    side = int(np.ceil(np.hypot(*heights_m.shape))) + 2
    frame = np.column_stack([across, away])  # of a line's number and a place along it
    centre = (np.array(heights_m.shape) - 1) / 2
    start = centre - frame @ np.full(2, (side - 1) / 2)
    lowest = float(np.nanmin(heights_m)) if np.isfinite(heights_m).any() else 0.0
    lines = scipy.ndimage.affine_transform(
        np.nan_to_num(heights_m, nan=lowest), frame, start, (side, side), order=1, cval=lowest
    )
    seen = lines + np.arange(side) * (pixel_m * np.tan(np.radians(sun.elevation_deg)))
    hidden = np.full_like(seen, -1.0)
    hidden[:, 1:] = np.maximum.accumulate(seen, axis=1)[:, :-1] - seen[:, 1:]
    at = np.tensordot(frame.T, _places(geobox, around) - start[:, None, None], axes=1)
    above = scipy.ndimage.map_coordinates(hidden, at, order=1, mode="nearest")
    return np.asarray(above > _TOLERANCE_M)


def _places(geobox: GeoBox, around: GeoBox) -> NDArray[np.float64]:
    """Row and column in `around` of each pixel's centre: (2, y, x)."""
    to = ~around.affine @ geobox.affine
    rows, cols = (np.arange(n) + 0.5 for n in geobox.shape)
    return np.stack(
        np.broadcast_arrays((to.e * rows + to.f - 0.5)[:, None], (to.a * cols + to.c - 0.5)[None, :])
    )
