"""Shape of the ground on a DEM's own pixels: curvature, relief and position.

Axes: y row from the north, x column from the west. Heights in metres, NaN = nodata.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.ndimage

WINDOW_M = 300.0
"""Half the side of the window of relief and position: a hillside; Weiss 2001 takes it for slope position."""

CHANNEL_KM2 = 0.5
"""Upstream area from which a cell counts as drainage: heads of channels in mountains drain .1 to 1 km2."""

DRAINAGE_HALO_M = 3000.0
"""What the search for drainage sees around a window. A basin of CHANNEL_KM2 lies within it; what it cannot see is a
river that comes from farther away and has not gathered CHANNEL_KM2 from the slopes within it, as on a wide plain, and
depressions that drain beyond it. There heights count from where the water leaves what is seen, and may step at a
block's edge."""


def curvatures(z: np.ndarray, dx_m: np.ndarray | float, dy_m: float) -> tuple[np.ndarray, np.ndarray]:
    """Profile and plan curvature by the quadric that fits 3 x 3 cells best.

    z : (y, x); dx_m : width of the cells, one number or one a row; dy_m : their height
    Returns two (y, x) float32 arrays, 1/m, NaN at the edge, beside nodata and on flat ground, where neither has a
    direction. Profile: along the slope, positive where it is convex (becomes steeper downhill). Plan: of the contour
    line, positive where it is convex (a nose, water parts), negative in a hollow (water gathers).
    Source: Evans 1980 (Z. Geomorph. Suppl. 36), by the equations of Minar et al. 2020, table 2,
    doi:10.1016/j.earscirev.2020.103414: normal slope line curvature, and projected contour curvature.
    """
    p, q, r, s, t = _quadric(z, dx_m, dy_m)
    steep = p * p + q * q
    with np.errstate(divide="ignore", invalid="ignore"):
        profile = -(p * p * r + 2 * p * q * s + q * q * t) / (steep * (1 + steep) ** 1.5)
        plan = -(q * q * r - 2 * p * q * s + p * p * t) / steep**1.5
    return tuple(np.where(steep > 0, c, np.nan).astype(np.float32) for c in (profile, plan))  # type: ignore[return-value]


def relief(z: np.ndarray, dx_m: np.ndarray | float, dy_m: float, radius_m: float = WINDOW_M) -> np.ndarray:
    """Range of heights in a square window; beyond the DEM and in its voids there is none to count.

    z : (y, x); radius_m : half the window's side, rounded to whole cells, at least one
    Returns (y, x) float32 metres, NaN where z is.
    """

    def window_range(size: tuple[int, int]) -> np.ndarray:
        high = scipy.ndimage.maximum_filter(np.where(known, z, -np.inf), size, mode="constant", cval=-np.inf)
        low = scipy.ndimage.minimum_filter(np.where(known, z, np.inf), size, mode="constant", cval=np.inf)
        with np.errstate(invalid="ignore"):
            span: np.ndarray = high - low
        return span

    known = np.isfinite(z)
    return np.where(known, _in_windows(window_range, z.shape, dx_m, dy_m, radius_m), np.nan).astype(
        np.float32
    )


def topographic_position(
    z: np.ndarray, dx_m: np.ndarray | float, dy_m: float, radius_m: float = WINDOW_M
) -> np.ndarray:
    """Height above the mean of the other cells in a square window: positive on ridges, negative in valleys.

    z : (y, x); radius_m : as for `relief`. Returns (y, x) float32 metres, NaN where z is, or stands alone.
    Source: Weiss 2001 (topographic position index). With a radius of one cell equal to `gdaldem TPI`.
    """
    known = np.isfinite(z)
    height = np.where(known, z, 0.0).astype(np.float64)

    def above_mean(size: tuple[int, int]) -> np.ndarray:
        cells = size[0] * size[1]
        total = scipy.ndimage.uniform_filter(height, size, mode="constant") * cells - height
        others = (
            np.rint(scipy.ndimage.uniform_filter(known.astype(np.float64), size, mode="constant") * cells) - 1
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            above: np.ndarray = np.where(others > 0, height - total / others, np.nan)
        return above

    return np.where(known, _in_windows(above_mean, z.shape, dx_m, dy_m, radius_m), np.nan).astype(np.float32)


def _in_windows(
    filtered: Callable[[tuple[int, int]], np.ndarray],
    shape: tuple[int, ...],
    dx_m: np.ndarray | float,
    dy_m: float,
    radius_m: float,
) -> np.ndarray:
    """Filter with windows of equal metres: on a grid of degrees they are wider in cells towards the poles."""
    width = np.broadcast_to(np.asarray(dx_m, np.float64).ravel(), (shape[0],))
    radii = np.maximum(np.rint(radius_m / width).astype(int), 1)
    tall = 2 * max(round(radius_m / dy_m), 1) + 1
    out = np.empty(shape, np.float64)
    for radius in np.unique(radii):
        rows = np.flatnonzero(radii == radius)
        out[rows] = filtered((tall, 2 * int(radius) + 1))[rows]
    return out


def _quadric(z: np.ndarray, dx_m: np.ndarray | float, dy_m: float) -> tuple[np.ndarray, ...]:
    """First and second derivatives p, q, r, s, t (east, north, east-east, east-north, north-north)."""
    height = z.astype(np.float64)
    dx = np.broadcast_to(np.asarray(dx_m, np.float64).reshape(-1, 1), (z.shape[0], 1))
    one, edge, middle = np.ones(3), np.array([-1.0, 0, 1]), np.array([1.0, -2, 1])

    def apply(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        along: np.ndarray = scipy.ndimage.correlate1d(height, cols, axis=1, mode="constant", cval=np.nan)
        both: np.ndarray = scipy.ndimage.correlate1d(along, rows, axis=0, mode="constant", cval=np.nan)
        return both

    return (
        apply(one, edge) / (6 * dx),
        apply(-edge, one) / (6 * dy_m),
        apply(one, middle) / (3 * dx**2),
        apply(-edge, edge) / (4 * dx * dy_m),
        apply(middle, one) / (3 * dy_m**2),
    )
