"""Terrain from a DEM: slope and aspect on its native grid, in metres, then resampled onto ours.

Resampling first makes staircases: nearest-resampled 30 m heights give slopes of zero inside a cell and of 48 degrees
at its edge (METHODS section 1).
"""

from __future__ import annotations

import threading

import dask
import dask.array as da
import numpy as np
import pyproj
import rasterio.warp
import rioxarray  # noqa: F401  gives arrays their .rio
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from rasterio.enums import Resampling

from slidecube.catalog.errors import AssetReadError
from slidecube.catalog.grid import BLOCK_PX
from slidecube.catalog.load import Loader, ReadLog, load
from slidecube.catalog.read import Place, PlaceReadError, with_opened
from slidecube.catalog.scenes import Scene
from slidecube.pipeline.errors import PipelineError

SLOPE_SCALE = 0.01
SLOPE_NODATA = 65535
_REPROJECT = threading.Lock()
_MARGIN_PX = 4  # one for Horn's kernel, two for the cubic kernel, one for rounding


def slope_deg(dem: xr.DataArray) -> xr.DataArray:
    """Slope of the terrain by Horn's 3 x 3 kernel.

    dem : (y, x), or the one band of (band, y, x), metres above the geoid, NaN (or its nodata value) = nodata. The
        pixel size comes from its coordinates and CRS: metres for a projected CRS; for a geographic one, the metres
        that a pixel measures on the ellipsoid at its row.
    Returns (y, x) float32 degrees in [0, 90); NaN where any of the nine cells is nodata, and at the edge.
    Raises PipelineError if the array has no CRS, or one that is neither projected nor geographic.
    Source: Horn 1981, eq. 1-3. Equal to `gdaldem slope` to 1e-3 degrees on a projected DEM.
    """
    plane = _plane(dem)
    dz_dx, dz_dy = _gradients(plane)
    return _like(plane, slope_from(dz_dx, dz_dy), units="degrees", long_name="slope")


def aspect_deg(dem: xr.DataArray) -> xr.DataArray:
    """Direction that the slope faces, clockwise from the north of the DEM's grid.

    dem : as for `slope_deg`. Returns (y, x) float32 degrees in [0, 360); NaN where flat, at nodata and at the edge.
    Source: Horn 1981. Equal to `gdaldem aspect`.
    """
    plane = _plane(dem)
    dz_dx, dz_dy = _gradients(plane)
    return _like(plane, aspect_from(dz_dx, dz_dy), units="degrees", long_name="aspect")


def terrain(
    scenes: list[Scene],
    geobox: GeoBox,
    *,
    block_px: int = BLOCK_PX,
    log: ReadLog | None = None,
    loader: Loader = "odc-stac",
) -> dict[str, da.Array]:
    """Elevation, slope and aspect of a window, lazily, one block of the lattice at a time.

    scenes : DEM items; where several overlap, the first one with a height counts. Their tiles may have different
        pixels: slopes go on across the seam
    geobox : pixels wanted, on the lattice's blocks
    Returns (y, x): `elevation` float32 metres above the DEM's vertical datum (cubic), NaN = nodata; `slope_deg`
    uint16 in units of 0.01 degree (bilinear), 65535 = nodata; `aspect_deg` uint16 in units of 0.01 degree (through
    sine and cosine, bilinear), clockwise from the north of the DEM's grid, which is true north for GLO-30; 65535 =
    nodata or flat.
    """
    rows, cols = ([slice(i, min(i + block_px, n)) for i in range(0, n, block_px)] for n in geobox.shape)
    read = dask.delayed(terrain_block, pure=False)

    def block(r: slice, c: slice) -> da.Array:
        part = geobox[r, c]
        lazy: da.Array = da.from_delayed(read(scenes, part, log, loader), (3, *part.shape), np.float32)
        return lazy

    stack = da.block([[block(r, c) for c in cols] for r in rows])
    return {
        "elevation": stack[0],
        "slope_deg": stack[1].map_blocks(_hundredths, dtype=np.uint16),
        "aspect_deg": stack[2].map_blocks(_hundredths_of_a_turn, dtype=np.uint16),
    }


def terrain_block(
    scenes: list[Scene], geobox: GeoBox, log: ReadLog | None = None, loader: Loader = "odc-stac"
) -> np.ndarray:
    """Elevation, slope and aspect of one block: (3, y, x) float32, NaN = nodata; see `terrain`."""
    grids = []
    for group in _same_pixels(scenes):
        native = _native_window(group[0], geobox)
        if native is not None:
            grids.append((native, _read_native(group, native, log, loader)))
    out = np.full((3, *geobox.shape), np.nan, np.float32)
    for i, (native, dem) in enumerate(grids):
        found = _resampled(dem, _continued(native, dem, grids[:i] + grids[i + 1 :]), native, geobox)
        out = np.where(np.isnan(out), found, out)
    return out


def slope_from(dz_dx: np.ndarray, dz_dy: np.ndarray) -> np.ndarray:
    """Slope in degrees from the two gradients (metres per metre)."""
    slope = np.empty(dz_dx.shape, np.float32)
    for start in range(0, len(dz_dx), rows := _strip_rows(dz_dx.shape[-1])):
        gx, gy = dz_dx[start : start + rows], dz_dy[start : start + rows]
        # np.hypot guards against overflow, which slopes cannot reach, at ten times the cost
        slope[start : start + rows] = np.degrees(np.arctan(np.sqrt(gx * gx + gy * gy)))
    return slope


def aspect_from(dz_dx: np.ndarray, dz_dy: np.ndarray) -> np.ndarray:
    """Aspect in degrees clockwise from grid north, from the gradients to the east and to the north; NaN where flat."""
    azimuth = np.degrees(np.arctan2(-dz_dx, -dz_dy)) % 360.0
    azimuth = np.where(azimuth >= 360.0, 0.0, azimuth)
    return np.where((dz_dx == 0) & (dz_dy == 0), np.nan, azimuth).astype(np.float32)


def horn_gradients(z: np.ndarray, dx_m: np.ndarray | float, dy_m: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradients to the east and to the north by Horn's weights.

    z : (y, x), north up, metres, NaN = nodata; dx_m : pixel width, one number or one a row; dy_m : pixel height
    Returns two (y, x) float64 arrays, NaN at the edge and beside nodata.
    """
    out_x, out_y = np.full(z.shape, np.nan), np.full(z.shape, np.nan)
    width = np.broadcast_to(np.asarray(dx_m, np.float64).reshape(-1, 1), (z.shape[0], 1))
    for start in range(1, z.shape[0] - 1, rows := _strip_rows(z.shape[1])):
        stop = min(start + rows, z.shape[0] - 1)
        strip = z[start - 1 : stop + 1].astype(np.float64)
        at = np.s_[start:stop, 1:-1]
        out_x[at], out_y[at] = _horn(strip, width[start:stop], dy_m)
    return out_x, out_y


def _horn(z: np.ndarray, width: np.ndarray, height: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of the inner pixels."""
    nw, n, ne = z[:-2, :-2], z[:-2, 1:-1], z[:-2, 2:]
    w, e = z[1:-1, :-2], z[1:-1, 2:]
    sw, s, se = z[2:, :-2], z[2:, 1:-1], z[2:, 2:]
    gx = ((ne + 2 * e + se) - (nw + 2 * w + sw)) / (8 * width)
    gy = ((nw + 2 * n + ne) - (sw + 2 * s + se)) / (8 * height)
    hole = np.isnan(z[1:-1, 1:-1])
    return np.where(hole | np.isnan(gy), np.nan, gx), np.where(hole | np.isnan(gx), np.nan, gy)


def _strip_rows(width: int) -> int:
    """So many rows of float64 stay in a core's cache; whole arrays pass through memory a dozen times."""
    return max(32_768 // max(width, 1), 1)


def _plane(dem: xr.DataArray) -> xr.DataArray:
    """Take the one band of what `rioxarray.open_rasterio` gives."""
    plane = dem.isel({dem.dims[0]: 0}, drop=True) if dem.ndim == 3 and dem.shape[0] == 1 else dem
    if plane.ndim != 2:
        raise PipelineError(f"A DEM has two dimensions (y, x); got {dem.dims} of {dem.shape}")
    return plane


def _like(dem: xr.DataArray, values: np.ndarray, *, units: str, long_name: str) -> xr.DataArray:
    """Place derived values on the DEM's pixels; its own nodata, scale and units do not hold for them."""
    return xr.DataArray(
        values,
        coords=dem.coords,
        dims=dem.dims,
        name=long_name,
        attrs={"units": units, "long_name": long_name},
    )


def _gradients(dem: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    z = np.asarray(dem.data, np.float64)
    nodata = dem.rio.nodata if dem.rio.nodata is not None else dem.rio.encoded_nodata
    if nodata is not None:
        z = np.where(z == nodata, np.nan, z)
    crs = dem.rio.crs
    if crs is None:
        raise PipelineError(
            "The DEM has no CRS, so its pixel size in metres is unknown; write one with .rio.write_crs()"
        )
    transform = dem.rio.transform()
    south_up = transform.e > 0
    if south_up:
        z = z[::-1]
    rows = transform.f + transform.e * (np.arange(z.shape[0]) + 0.5)
    dx_m, dy_m = _pixel_size_m(crs.to_wkt(), transform, rows[::-1] if south_up else rows)
    gx, gy = horn_gradients(z, dx_m, dy_m)
    if transform.a < 0:
        gx = -gx
    return (gx[::-1], gy[::-1]) if south_up else (gx, gy)


def _pixel_size_m(wkt: str, transform: Affine, y: np.ndarray) -> tuple[np.ndarray | float, float]:
    """Width (a row) and height of the pixels in metres."""
    crs = pyproj.CRS.from_wkt(wkt)
    width, height = abs(transform.a), abs(transform.e)
    if crs.is_geographic or (crs.is_compound and crs.sub_crs_list[0].is_geographic):
        lat = np.radians(np.clip(y, -89.9, 89.9))
        ellipsoid = crs.ellipsoid or pyproj.CRS.from_epsg(4326).ellipsoid
        assert ellipsoid is not None
        a, e2 = ellipsoid.semi_major_metre, 1 - (ellipsoid.semi_minor_metre / ellipsoid.semi_major_metre) ** 2
        q = 1 - e2 * np.sin(lat) ** 2
        # radii of curvature in the prime vertical and in the meridian
        dx = np.radians(width) * a / np.sqrt(q) * np.cos(lat)
        dy = np.radians(height) * a * (1 - e2) / q**1.5
        return dx, float(dy.mean())
    unit = crs.axis_info[0].unit_conversion_factor if crs.axis_info else 1.0
    if not crs.is_projected and not crs.is_compound:
        raise PipelineError(
            f"The DEM's CRS {crs.name!r} is neither projected nor geographic; reproject it first"
        )
    return width * unit, height * unit


def _same_pixels(scenes: list[Scene]) -> list[list[Scene]]:
    """Group DEM items that share one pixel grid (GLO-30 is wider spaced towards the poles)."""
    groups: dict[tuple[object, ...], list[Scene]] = {}
    for scene in scenes:
        transform, crs = _native_grid(scene)
        # a phase of 0.9999999 is one of 0
        phase = tuple(round(v, 4) % 1 for v in (transform.c / transform.a, transform.f / transform.e))
        groups.setdefault((crs, round(transform.a, 12), round(transform.e, 12), phase), []).append(scene)
    return list(groups.values())


def _native_grid(scene: Scene) -> tuple[Affine, str]:
    asset = scene.item["assets"][scene.bands["elevation"]]
    properties = {**scene.item["properties"], **asset}
    transform = properties.get("proj:transform")
    crs = properties.get("proj:code") or (
        f"EPSG:{properties['proj:epsg']}" if properties.get("proj:epsg") else None
    )
    if transform is None or crs is None:
        try:
            return with_opened(
                Place(href=asset["href"], source=scene.source), lambda src: (src.transform, str(src.crs))
            )
        except PlaceReadError as error:
            raise AssetReadError(scene.id, scene.bands["elevation"], str(error), error.fault) from None
    return Affine(*transform[:6]), str(crs)


def _native_window(scene: Scene, geobox: GeoBox) -> GeoBox | None:
    """Pixels of the DEM's own grid under a block, with a margin; across the antimeridian longitudes go on past 180."""
    transform, crs = _native_grid(scene)
    to = pyproj.Transformer.from_crs(str(geobox.crs), crs, always_xy=True)
    x, y = (np.asarray(v) for v in to.transform(*_outline(geobox)))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    if pyproj.CRS.from_user_input(crs).is_geographic and np.ptp(x) > 180:
        x = np.where(x < 0, x + 360, x)
    col0, row0 = ~transform @ (x.min(), y.max())
    col1, row1 = ~transform @ (x.max(), y.min())
    left, top = int(np.floor(col0)) - _MARGIN_PX, int(np.floor(row0)) - _MARGIN_PX
    width, height = int(np.ceil(col1)) + _MARGIN_PX - left, int(np.ceil(row1)) + _MARGIN_PX - top
    return GeoBox((height, width), transform @ Affine.translation(left, top), crs)


def _outline(geobox: GeoBox) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along the four edges of a block, a point every 32 pixels or less."""
    rows, cols = (np.linspace(0, n, -(-n // 32) + 1) for n in geobox.shape)
    c = np.concatenate([cols, cols, np.zeros_like(rows), np.full_like(rows, geobox.shape[1])])
    r = np.concatenate([np.zeros_like(cols), np.full_like(cols, geobox.shape[0]), rows, rows])
    a = geobox.affine
    return a.a * c + a.b * r + a.c, a.d * c + a.e * r + a.f


def _read_native(scenes: list[Scene], native: GeoBox, log: ReadLog | None, loader: Loader) -> np.ndarray:
    """Heights on the DEM's own pixels, the first one that there is of several items; NaN = none."""
    parts = []
    for part in _within_180(native):
        cube = load(scenes, part, ["elevation"], resampling={"*": "nearest"}, log=log, loader=loader)
        steps = cube["elevation"].data
        parts.append(_first_height(np.asarray(steps.compute(scheduler="synchronous"))))
    return np.hstack(parts)


def _within_180(native: GeoBox) -> list[GeoBox]:
    """Cut a window of a geographic grid at the antimeridian, each part with the longitudes that its tiles have."""
    assert native.crs is not None
    if not native.crs.geographic:
        return [native]
    a = native.affine
    centres = a.c + a.a * (np.arange(native.shape[1]) + 0.5)
    turn = np.floor((centres + 180) / 360 + 1e-9).astype(
        int
    )  # 1e-9: a centre at 180 belongs to the tile of -180
    parts = []
    for n in np.unique(turn):
        cols = np.flatnonzero(turn == n)
        part = native[:, int(cols[0]) : int(cols[-1]) + 1]
        parts.append(GeoBox(part.shape, Affine.translation(-360.0 * n, 0) @ part.affine, part.crs))
    return parts


def _first_height(steps_tyx: np.ndarray) -> np.ndarray:
    dem: np.ndarray = steps_tyx[0].copy()
    for step in steps_tyx[1:]:
        np.copyto(dem, step, where=np.isnan(dem))
    return dem


def _continued(native: GeoBox, dem: np.ndarray, others: list[tuple[GeoBox, np.ndarray]]) -> np.ndarray:
    """Heights on one grid, and beyond its tiles those of the other grids, so that slopes exist up to its edge."""
    whole = dem
    for grid, heights in others:
        if not np.isnan(whole).any():
            break
        whole = np.where(np.isnan(whole), _warp(heights, grid, native, Resampling.bilinear), whole)
    return whole


def _resampled(dem: np.ndarray, continued: np.ndarray, native: GeoBox, geobox: GeoBox) -> np.ndarray:
    array = xr.DataArray(continued, coords=xr_coords(native), dims=native.dimensions)
    dz_dx, dz_dy = _gradients(array)
    # what lies on another grid's tiles is that grid's to say
    dz_dx, dz_dy = (np.where(np.isnan(dem), np.nan, gradient) for gradient in (dz_dx, dz_dy))
    aspect = np.radians(aspect_from(dz_dx, dz_dy))
    slope = slope_from(dz_dx, dz_dy)
    elevation, slope, sine, cosine = (
        _warp(layer, native, geobox, kernel)
        for layer, kernel in (
            (dem, Resampling.cubic),
            (slope, Resampling.bilinear),
            (np.sin(aspect), Resampling.bilinear),
            (np.cos(aspect), Resampling.bilinear),
        )
    )
    return np.stack([elevation, slope, np.degrees(np.arctan2(sine, cosine)) % 360])


def _warp(layer: np.ndarray, native: GeoBox, geobox: GeoBox, kernel: Resampling) -> np.ndarray:
    out = np.full(geobox.shape, np.nan, np.float32)
    # rasterio silences a warning about its own helper arrays in a way that two threads undo for each other
    with _REPROJECT:
        rasterio.warp.reproject(
            layer.astype(np.float32),
            out,
            src_transform=native.affine,
            src_crs=str(native.crs),
            dst_transform=geobox.affine,
            dst_crs=str(geobox.crs),
            src_nodata=np.nan,
            dst_nodata=np.nan,
            resampling=kernel,
        )
    return out


def _hundredths(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), SLOPE_NODATA, np.rint(values * 100)).astype(np.uint16)


def _hundredths_of_a_turn(values: np.ndarray) -> np.ndarray:
    stored = _hundredths(values)
    return np.where(stored == 36_000, 0, stored).astype(np.uint16)  # 359.996 degrees are north
