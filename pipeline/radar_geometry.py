"""How Sentinel-1 looks at the ground: incidence, layover, shadow, and the correction of slopes.

Where the satellite passes is known from the relative orbit alone: its ground track repeats every 12 days within a
hundred metres or so. So all scenes of a track share one geometry, whatever slice of it an item holds, and nothing has
to be read from annotation files, which several providers leave out.

Angles are in degrees unless a name says otherwise. Azimuths are clockwise from true north.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyproj
from affine import Affine
from odc.geo.geobox import GeoBox
from scipy import ndimage

from slidecube.catalog.radar import OrbitState
from slidecube.pipeline.errors import PipelineError

SlopeModel = Literal["volume", "surface"]

ORBITS_PER_CYCLE = 175
"""Orbits in the 12 days after which the ground track repeats. Source: ESA, Sentinel-1 mission requirements."""

INCIDENCE_RANGE_DEG = (25.0, 50.0)
"""Incidences that an interferometric wide swath can have, 29.1 to 46.0, and room for what the track is known to."""

HALO_M = 5_000.0
"""How far terrain may throw layover or shadow: 2.5 km of relief at the steepest view, 5 km at the flattest."""

_AXIS_M = 7_071_000.0
_ECCENTRICITY = 0.001_15  # frozen, perigee over the north
_INCLINATION = np.radians(98.1813)
_DEG_PER_ORBIT = 360.0 * 12 / ORBITS_PER_CYCLE
# longitude at which relative orbit 1 rises over the equator; fitted to the footprints of eight real items of three
# tracks, which agree within 0.03 degrees (3 km, 0.2 degrees of incidence)
_FIRST_NODE_DEG = 0.06
_EARTH_M = 6_371_000.0
_COARSE = 2  # masks are worked on pixels twice as wide: no open DEM of a nation is finer than that


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Track:
    """One repeating ground track and the direction in which it is flown.

    relative_orbit : 1 to 175
    """

    relative_orbit: int
    orbit_state: OrbitState

    def __post_init__(self) -> None:
        if not 1 <= self.relative_orbit <= ORBITS_PER_CYCLE:
            raise PipelineError(
                f"Relative orbit {self.relative_orbit} does not exist; 1 to {ORBITS_PER_CYCLE}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """From where points on the ellipsoid are seen; all of one shape.

    incidence_deg : between the line of sight and the vertical; negative where the point lies to the left of the
        track, where Sentinel-1 never looks
    look_azimuth_deg : direction in which the radar looks, from the satellite to the point
    heading_deg : direction of the flight, against the turning Earth; range_m : from the satellite to the point
    """

    incidence_deg: np.ndarray
    look_azimuth_deg: np.ndarray
    heading_deg: np.ndarray
    range_m: np.ndarray


def view(track: Track, lon: np.ndarray, lat: np.ndarray) -> View:
    """See points on the ellipsoid from a track, each at the moment at which it lies abeam (zero Doppler).

    lon, lat : degrees, WGS84, any equal shape
    The orbit is an ellipse of fixed shape in a plane that turns with the Sun; against the items' footprints its
    incidence is right within 0.3 degrees.
    """
    lon, lat = np.broadcast_arrays(np.asarray(lon, np.float64), np.asarray(lat, np.float64))
    point = _on_ellipsoid(lon, lat)
    u = _moment_abeam(track, point, lat)
    satellite, velocity = _satellite(track, u), _velocity(track, u)
    up, east, north = _local_axes(lon, lat)
    sight = point - satellite
    distance = np.linalg.norm(sight, axis=0)
    cosine = -(sight * up).sum(axis=0) / distance
    right = (np.cross(velocity, up, axis=0) * sight).sum(axis=0)
    incidence = np.degrees(np.arccos(np.clip(cosine, -1, 1))) * np.where(right >= 0, 1, -1)
    return View(
        incidence_deg=incidence,
        look_azimuth_deg=_azimuth(sight, east, north),
        heading_deg=_azimuth(velocity, east, north),
        range_m=distance,
    )


def _on_ellipsoid(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    to = pyproj.Transformer.from_crs(4979, 4978, always_xy=True)
    return np.stack(to.transform(lon, lat, np.zeros_like(lon)))


def _local_axes(lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lam, phi = np.radians(lon), np.radians(lat)
    up = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])
    east = np.stack([-np.sin(lam), np.cos(lam), np.zeros_like(lam)])
    return up, east, np.cross(up, east, axis=0)


def _azimuth(vector: np.ndarray, east: np.ndarray, north: np.ndarray) -> np.ndarray:
    azimuth: np.ndarray = (
        np.degrees(np.arctan2((vector * east).sum(axis=0), (vector * north).sum(axis=0))) % 360
    )
    return azimuth


def _satellite(track: Track, u: np.ndarray) -> np.ndarray:
    """Place of the satellite, fixed to the Earth, (3, ...) metres; u : radians along the orbit from its rising node."""
    node = np.radians(_FIRST_NODE_DEG - (track.relative_orbit - 1) * _DEG_PER_ORBIT)
    radius = _AXIS_M * (1 - _ECCENTRICITY * np.sin(u))
    lat = np.arcsin(np.sin(_INCLINATION) * np.sin(u))
    along = np.arctan2(np.cos(_INCLINATION) * np.sin(u), np.cos(u))
    lon = node + along - np.radians(_DEG_PER_ORBIT) * u / (2 * np.pi)
    return np.stack(
        [radius * np.cos(lat) * np.cos(lon), radius * np.cos(lat) * np.sin(lon), radius * np.sin(lat)]
    )


def _velocity(track: Track, u: np.ndarray) -> np.ndarray:
    """Direction of the flight against the turning Earth, metres a radian."""
    step = 1e-4
    return np.asarray((_satellite(track, u + step) - _satellite(track, u - step)) / (2 * step))


def _moment_abeam(track: Track, point: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Where along the orbit a point lies square to the flight, by Newton's method; six steps end below a millimetre."""
    first = np.arcsin(np.clip(np.sin(np.radians(lat)) / np.sin(_INCLINATION), -1, 1))
    # an orbit is counted from its rising node: its southern ascending part comes last
    u = np.pi - first if track.orbit_state == "descending" else first % (2 * np.pi)
    step = 1e-4
    for _ in range(6):
        ahead, here, behind = (_doppler(track, u + d, point) for d in (step, 0.0, -step))
        u = u - here * 2 * step / (ahead - behind)
    return np.asarray(u)


def _doppler(track: Track, u: np.ndarray, point: np.ndarray) -> np.ndarray:
    return np.asarray(((point - _satellite(track, u)) * _velocity(track, u)).sum(axis=0))


# --- terrain seen by the radar -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SlopeAngles:
    """The slope of the ground as the radar sees it; all of one shape, NaN = unknown.

    range_deg : steepness along the line of sight, positive where the ground faces the radar
    azimuth_deg : steepness along the flight
    """

    range_deg: np.ndarray
    azimuth_deg: np.ndarray


def slope_angles(
    slope_deg: np.ndarray, aspect_deg: np.ndarray, look_azimuth_deg: np.ndarray | float
) -> SlopeAngles:
    """Split a slope along and across the line of sight.

    slope_deg : NaN = nodata; aspect_deg : direction that the slope faces, NaN where it is flat
    Source: Vollrath, Mullissa & Reiche 2020, eq. 2 and 3, with phi_r the angle between the aspect and the direction
    back to the radar.
    """
    tangent = np.tan(np.radians(slope_deg))
    flat = np.isnan(aspect_deg) & ~np.isnan(slope_deg)
    phi_r = np.radians(np.asarray(look_azimuth_deg) + 180 - np.where(flat, 0.0, aspect_deg))
    return SlopeAngles(
        range_deg=np.degrees(np.arctan(tangent * np.cos(phi_r))),
        azimuth_deg=np.degrees(np.arctan(tangent * np.sin(phi_r))),
    )


def local_incidence_deg(incidence_deg: np.ndarray | float, slopes: SlopeAngles) -> np.ndarray:
    """Angle between the line of sight and the normal of the ground.

    Returns degrees, 0 to 180: above 90 the ground faces away, NaN = unknown.
    Source: scalar product of the normal and the line of sight. Vollrath, Mullissa & Reiche 2020, eq. 4, multiplies
    the cosines of both slopes instead, which is the same where one of them is zero.
    """
    range_t, azimuth_t = (np.tan(np.radians(a)) for a in (slopes.range_deg, slopes.azimuth_deg))
    theta = np.radians(incidence_deg)
    cosine = (np.cos(theta) + range_t * np.sin(theta)) / np.sqrt(1 + range_t**2 + azimuth_t**2)
    local: np.ndarray = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return local


def slope_factor(incidence_deg: np.ndarray | float, slopes: SlopeAngles, model: SlopeModel) -> np.ndarray:
    """What a slope makes of the backscatter sigma0 of flat ground: gamma0 of flat ground = sigma0 / factor.

    model : "volume", for vegetation (Hoekman & Reiche 2015), or "surface", for bare ground (Ulander 1996)
    Returns linear factors above 0, the cosine that turns sigma0 into gamma0 included; NaN where the ground lies in
    layover or shadow of its own, or is unknown.
    Source: Vollrath, Mullissa & Reiche 2020, section 2.2: gamma0 = sigma0 / cos(theta_i); volume model
    tan(90 - theta_i + alpha_r) / tan(90 - theta_i); surface model
    cos(90 - theta_i) / (cos(alpha_az) cos(90 - theta_i + alpha_r)).
    """
    theta = np.radians(incidence_deg)
    alpha_r, alpha_az = np.radians(slopes.range_deg), np.radians(slopes.azimuth_deg)
    elevation = np.pi / 2 - theta
    with np.errstate(divide="ignore", invalid="ignore"):
        if model == "volume":
            scale = np.tan(elevation + alpha_r) / np.tan(elevation)
        else:
            scale = np.cos(elevation) / (np.cos(alpha_az) * np.cos(elevation + alpha_r))
    seen = (alpha_r < theta) & (alpha_r > -elevation)
    factor: np.ndarray = np.where(seen, scale * np.cos(theta), np.nan)
    return factor


def layover_and_shadow(
    heights: np.ndarray, spacing_m: float, *, incidence_deg: float, axis_range_m: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which points of lines along the ground range fold onto others, and which lie in the radar's shadow.

    heights : (line, point) metres, points `spacing_m` apart and further and further from the radar; NaN = unknown
    incidence_deg : at the ground distances 0 of `axis_range_m`, by default the middle of the lines
    Returns two bool arrays: layover, active and passive alike: some other point of the line has the same slant range
    in the wrong order; shadow: a nearer point hides this one. False where the height is unknown.
    Source: Kropatsch & Strobl 1990; slant range and look angle on a sphere.
    """
    n = heights.shape[1]
    ground_m = (np.arange(n) - (n - 1) / 2) * spacing_m if axis_range_m is None else axis_range_m
    theta = np.radians(incidence_deg)
    look = np.arcsin(np.sin(theta) * _EARTH_M / _AXIS_M)
    centre_angle = theta - look + ground_m / _EARTH_M
    radius = _EARTH_M + heights.astype(np.float64)
    across, down = radius * np.sin(centre_angle), _AXIS_M - radius * np.cos(centre_angle)
    slant, angle = np.hypot(across, down), np.arctan2(across, down)
    farthest_nearer = np.fmax.accumulate(slant, axis=1)
    nearest_farther = np.fmin.accumulate(slant[:, ::-1], axis=1)[:, ::-1]
    with np.errstate(invalid="ignore"):
        layover = (slant < farthest_nearer) | (slant > nearest_farther)
        shadow = angle < np.fmax.accumulate(angle, axis=1)
    return layover, shadow


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockGeometry:
    """One block of the grid as a track sees it; all (y, x).

    incidence_deg, local_incidence_deg : float32, NaN where the ground is unknown (the local one)
    layover, shadow : bool; slopes : of the ground
    """

    incidence_deg: np.ndarray
    local_incidence_deg: np.ndarray
    layover: np.ndarray
    shadow: np.ndarray
    slopes: SlopeAngles


def padded(geobox: GeoBox) -> GeoBox:
    """Pixels on which the heights around a block are needed: coarser, and `HALO_M` wider on each side."""
    halo_px = -(-int(HALO_M / abs(geobox.affine.a)) // _COARSE) * _COARSE
    wide = geobox.pad(halo_px)
    rows, cols = (-(-n // _COARSE) for n in wide.shape)
    return GeoBox((rows, cols), wide.affine @ Affine.scale(_COARSE), wide.crs)


def block_geometry(
    track: Track, geobox: GeoBox, terrain_yx: np.ndarray, heights: np.ndarray
) -> BlockGeometry:
    """Geometry of a block.

    geobox : its pixels; terrain_yx : (3, y, x) elevation, slope and aspect (from true north) on them, NaN = nodata
        (aspect: or flat)
    heights : (y, x) metres on the pixels of `padded(geobox)`, NaN = nodata
    """
    seen, away = _view_of(track, geobox), _range_direction(track, geobox)
    slopes = slope_angles(terrain_yx[1], terrain_yx[2], seen.look_azimuth_deg)
    layover, shadow = _masks(geobox, heights, away, _centre(seen.incidence_deg))
    return BlockGeometry(
        incidence_deg=seen.incidence_deg.astype(np.float32),
        local_incidence_deg=local_incidence_deg(seen.incidence_deg, slopes).astype(np.float32),
        layover=layover,
        shadow=shadow,
        slopes=slopes,
    )


def _view_of(track: Track, geobox: GeoBox) -> View:
    """View of each pixel, computed on a few and interpolated: over a block it is all but linear."""
    rows, cols = (np.linspace(0, n - 1, 9) for n in geobox.shape)
    col, row = np.meshgrid(cols + 0.5, rows + 0.5)
    seen = view(track, *_lonlat(geobox, col, row))
    at = np.meshgrid(*(np.linspace(0, 8, n) for n in geobox.shape), indexing="ij")

    def fine(values: np.ndarray) -> np.ndarray:
        return np.asarray(ndimage.map_coordinates(values, at, order=1, output=np.float64))

    def fine_azimuth(azimuth_deg: np.ndarray) -> np.ndarray:
        sine, cosine = (fine(f(np.radians(azimuth_deg))) for f in (np.sin, np.cos))
        return np.asarray(np.degrees(np.arctan2(sine, cosine)) % 360)

    return View(
        incidence_deg=fine(seen.incidence_deg),
        look_azimuth_deg=fine_azimuth(seen.look_azimuth_deg),
        heading_deg=fine_azimuth(seen.heading_deg),
        range_m=fine(seen.range_m),
    )


def _lonlat(geobox: GeoBox, col: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a = geobox.affine
    to = pyproj.Transformer.from_crs(str(geobox.crs), 4326, always_xy=True)
    lon, lat = to.transform(a.a * col + a.b * row + a.c, a.d * col + a.e * row + a.f)
    return np.asarray(lon), np.asarray(lat)


def _centre(values: np.ndarray) -> float:
    return float(values[values.shape[0] // 2, values.shape[1] // 2])


def _range_direction(track: Track, geobox: GeoBox) -> tuple[float, float]:
    """Direction away from the radar at a block's centre, as a unit step in columns and rows."""
    rows, cols = geobox.shape
    lon, lat = (float(v) for v in _lonlat(geobox, np.array(cols / 2), np.array(rows / 2)))
    azimuth = float(view(track, np.array(lon), np.array(lat)).look_azimuth_deg)
    far = pyproj.Geod(ellps="WGS84").fwd(lon, lat, azimuth, 1000.0)
    there = pyproj.Transformer.from_crs(4326, str(geobox.crs), always_xy=True)
    (x0, y0), (x1, y1) = there.transform(lon, lat), there.transform(far[0], far[1])
    dx, dy = (x1 - x0) / geobox.affine.a, (y1 - y0) / geobox.affine.e
    length = float(np.hypot(dx, dy))
    return dx / length, dy / length


def _masks(
    geobox: GeoBox, heights: np.ndarray, away: tuple[float, float], incidence_deg: float
) -> tuple[np.ndarray, np.ndarray]:
    """Layover and shadow of a block: heights are turned into lines along the range, and the masks back."""
    spacing_m = abs(geobox.affine.a) * _COARSE
    halo = int(HALO_M / spacing_m)
    rows, cols = geobox.shape
    half = int(np.ceil(np.hypot(rows, cols) / 2 / _COARSE)) + 1
    line, point = np.meshgrid(
        np.arange(-half, half + 1), np.arange(-half - halo, half + halo + 1), indexing="ij"
    )
    mid = [(n - 1) / 2 for n in heights.shape]
    dx, dy = away
    turned = _sampled(heights, mid[0] + point * dy + line * dx, mid[1] + point * dx - line * dy)
    masks = layover_and_shadow(turned, spacing_m, incidence_deg=incidence_deg)
    y, x = np.meshgrid(
        (np.arange(rows) - (rows - 1) / 2) / _COARSE,
        (np.arange(cols) - (cols - 1) / 2) / _COARSE,
        indexing="ij",
    )
    at = [y * dx - x * dy + half, y * dy + x * dx + half + halo]
    layover, shadow = (
        ndimage.map_coordinates(mask.astype(np.uint8), at, order=0, mode="nearest").astype(bool)
        for mask in masks
    )
    return layover, shadow


def _sampled(heights: np.ndarray, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Heights between pixels, bilinear; NaN beyond the window, and beside what is unknown."""
    return np.asarray(
        ndimage.map_coordinates(
            heights.astype(np.float64), [row, col], order=1, mode="constant", cval=np.nan, prefilter=False
        )
    )
