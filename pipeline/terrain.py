"""Terrain from a DEM: slope, aspect and more on its native grid, in metres, then resampled onto ours.

Resampling first makes staircases: nearest-resampled 30 m heights give slopes of zero inside a cell and of 48 degrees
at its edge (METHODS section 1).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import dask
import dask.array as da
import numpy as np
import pyproj
import rasterio.warp
import rioxarray  # noqa: F401  gives arrays their .rio
import scipy.ndimage
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling

from slidecube.catalog.errors import AssetReadError
from slidecube.catalog.grid import BLOCK_PX
from slidecube.catalog.load import Loader, ReadLog, load
from slidecube.catalog.read import Place, PlaceReadError, with_opened
from slidecube.catalog.scenes import Scene
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.landform import (
    CHANNEL_KM2,
    DRAINAGE_HALO_M,
    WINDOW_M,
    curvatures,
    relief,
    topographic_position,
)

TERRAIN_VERSION = 2
"""Of the definitions below, a part of the layer's key."""

SLOPE_SCALE = 0.01
SLOPE_NODATA = 65535
RASTERIO = threading.Lock()
"""Held while rasterio makes arrays of its own: it silences a warning about them in a way that two threads undo for
each other."""

MOST_CELLS = 64_000_000
"""Cells of a DEM that are held at once: 25 km at 3 m, a quarter of a gigabyte before they are worked on."""

_MARGIN_PX = 4  # one for Horn's kernel, two for the cubic kernel, one for rounding
_CONVERGENCE_STEP_PX = 32  # it turns by less than .01 degree over a kilometre
_GEOD = pyproj.Geod(ellps="WGS84")


@dataclass(frozen=True, slots=True, kw_only=True)
class TerrainVariable:
    """What is stored of the terrain: round(value / scale), or the value itself in float32.

    formula, unit, source : for people; halo_m : what it looks at around a pixel, beyond its neighbours
    """

    dtype: str
    scale: float
    nodata: float
    unit: str
    formula: str
    source: str
    halo_m: float = 0.0

    def stored(self, values: np.ndarray) -> np.ndarray:
        """Encode; what lies beyond the type's range is held at its end."""
        if self.dtype == "float32":
            return values
        limits = np.iinfo(self.dtype)
        low, high = (
            (limits.min + 1, limits.max) if self.nodata == limits.min else (limits.min, limits.max - 1)
        )
        scaled = np.clip(np.rint(values / self.scale), low, high)
        return np.where(np.isnan(values), self.nodata, scaled).astype(self.dtype)

    def values(self, stored: xr.DataArray) -> xr.DataArray:
        """Decode: float32, NaN = nodata."""
        if self.dtype == "float32":
            return stored
        return (stored.astype(np.float32) * np.float32(self.scale)).where(stored != self.nodata)


_HORN = "Horn 1981, eq. 1-3, doi:10.1109/PROC.1981.11918"
_EVANS = "Evans 1980; Minar et al. 2020, doi:10.1016/j.earscirev.2020.103414"

TERRAIN_VARIABLES: Mapping[str, TerrainVariable] = {
    "elevation": TerrainVariable(
        dtype="float32",
        scale=1.0,
        nodata=float("nan"),
        unit="m",
        formula="height above the DEM's own vertical datum",
        source="DEM",
    ),
    "slope_deg": TerrainVariable(
        dtype="uint16",
        scale=SLOPE_SCALE,
        nodata=SLOPE_NODATA,
        unit="degree",
        formula="slope, 3 x 3 cells",
        source=_HORN,
    ),
    "aspect_deg": TerrainVariable(
        dtype="uint16",
        scale=0.01,
        nodata=65535,
        unit="degree",
        formula="direction that the slope faces, clockwise from true north; none where flat",
        source=_HORN,
    ),
    "profile_curvature": TerrainVariable(
        dtype="int16",
        scale=1e-5,
        nodata=-32768,
        unit="1/m",
        formula="curvature along the slope, positive where convex; none where flat; held within .32",
        source=_EVANS,
    ),
    "plan_curvature": TerrainVariable(
        dtype="int16",
        scale=1e-5,
        nodata=-32768,
        unit="1/m",
        formula="curvature of the contour, positive on noses; none where flat; held within .32",
        source=_EVANS,
    ),
    "relief_m": TerrainVariable(
        dtype="uint16",
        scale=0.1,
        nodata=65535,
        unit="m",
        formula=f"range of heights in a square of {2 * WINDOW_M:.0f} m",
        source="local relief; of 3 x 3 cells the roughness of gdaldem",
        halo_m=WINDOW_M,
    ),
    "tpi_m": TerrainVariable(
        dtype="int16",
        scale=0.1,
        nodata=-32768,
        unit="m",
        formula=f"height above the mean of a square of {2 * WINDOW_M:.0f} m",
        source="topographic position index, Weiss 2001",
        halo_m=WINDOW_M,
    ),
    "hand_m": TerrainVariable(
        dtype="uint16",
        scale=0.1,
        nodata=65535,
        unit="m",
        formula=f"height above the nearest drainage of {CHANNEL_KM2} km2, as seen from {DRAINAGE_HALO_M:.0f} m around",
        source="Nobre et al. 2011, doi:10.1016/j.jhydrol.2011.03.051, by pyflwdir",
        halo_m=DRAINAGE_HALO_M,
    ),
}
"""Variables of the terrain by name."""

TERRAIN_ALWAYS = ("elevation", "slope_deg", "aspect_deg")
"""Stored with every terrain layer; the others where a feature needs them."""


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


def derived(dem: xr.DataArray, name: str) -> xr.DataArray:
    """Derive a variable of the table on a DEM's own pixels.

    dem : as for `slope_deg`, its rows running south; name : of `TERRAIN_VARIABLES`. The array's edges are the end of
        what can be seen: give `halo_m` more on each side.
    Returns (y, x) float32, NaN = none; aspect from true north.
    Raises PipelineError for an unknown name, and as `slope_deg`.
    """
    if name not in TERRAIN_VARIABLES:
        raise PipelineError(f"No terrain variable {name!r}; there are: {', '.join(TERRAIN_VARIABLES)}")
    plane = _plane(dem)
    transform = plane.rio.transform()
    if transform.e > 0 or transform.a < 0:
        raise PipelineError("The DEM's rows must run to the south and its columns to the east; flip it first")
    z, wkt = _heights(plane), _wkt(plane)
    values = _derive((name,), z, GeoBox(z.shape, transform, wkt))[name]
    variable = TERRAIN_VARIABLES[name]
    return _like(plane, values, units=variable.unit, long_name=name)


def terrain(
    scenes: list[Scene],
    geobox: GeoBox,
    *,
    variables: Sequence[str] = TERRAIN_ALWAYS,
    block_px: int = BLOCK_PX,
    log: ReadLog | None = None,
    loader: Loader = "odc-stac",
) -> dict[str, da.Array]:
    """Variables of the terrain of a window, as stored, lazily, one block of the lattice at a time.

    scenes : DEM items; where several overlap, the first one with a height counts, also where another has a void. Their
        tiles may have different pixels: slopes go on across the seam
    geobox : pixels wanted, on the lattice's blocks; variables : of `TERRAIN_VARIABLES`
    Returns (y, x), as `TerrainVariable` describes: elevation resampled by the cubic kernel, aspect through sine and
    cosine, all else bilinear. A void that no item fills stays one.
    """
    rows, cols = ([slice(i, min(i + block_px, n)) for i in range(0, n, block_px)] for n in geobox.shape)
    read = dask.delayed(terrain_block, pure=False)
    names = tuple(variables)

    def block(r: slice, c: slice) -> da.Array:
        part = geobox[r, c]
        made = read(scenes, part, log, loader, variables=names)
        lazy: da.Array = da.from_delayed(made, (len(names), *part.shape), np.float32)
        return lazy

    stack = da.block([[block(r, c) for c in cols] for r in rows])
    return {
        name: stack[i].map_blocks(_stored, variable=name, dtype=TERRAIN_VARIABLES[name].dtype)
        for i, name in enumerate(names)
    }


def terrain_block(
    scenes: list[Scene],
    geobox: GeoBox,
    log: ReadLog | None = None,
    loader: Loader = "odc-stac",
    *,
    variables: Sequence[str] = TERRAIN_ALWAYS,
) -> np.ndarray:
    """Variables of one block: (variable, y, x) float32, NaN = nodata; see `terrain`."""
    out = np.full((len(variables), *geobox.shape), np.nan, np.float32)
    wide_m = max(TERRAIN_VARIABLES[name].halo_m for name in variables)
    read = []
    for group in _same_pixels(scenes):
        native = _native_window(group[0], geobox, wide_m)
        if native is not None:
            _require_bounded(group[0], native, geobox)
            read.append((native, _read_native(group, native, log, loader), group[0]))
    # each variable from as much ground as it looks at: what else is asked for must not change it
    for halo_m in sorted({TERRAIN_VARIABLES[name].halo_m for name in variables}):
        names = [name for name in variables if TERRAIN_VARIABLES[name].halo_m == halo_m]
        at = [variables.index(name) for name in names]
        grids = [_cropped(*grid, geobox, halo_m) for grid in read]
        for i, (native, dem) in enumerate(grids):
            whole = _continued(native, dem, grids[:i] + grids[i + 1 :])
            found = _resampled(names, dem, whole, native, geobox)
            out[at] = np.where(np.isnan(out[at]), found, out[at])
    return out


def _require_bounded(scene: Scene, native: GeoBox, geobox: GeoBox) -> None:
    """Refuse a window of so many of the DEM's cells that a worker would hold gigabytes of them."""
    cells, wide_km = native.shape[0] * native.shape[1], abs(geobox.affine.a) * geobox.shape[1] / 1000
    if cells > MOST_CELLS:
        raise PipelineError(
            f"The DEM {scene.id!r} has {cells / 1e6:.0f} million cells in a window of {wide_km:.0f} km, more than "
            f"{MOST_CELLS / 1e6:.0f} million: radar and the shadow of ridges look that far around. Name a coarser one "
            "in [sources] dem, such as made by gdalwarp -tr 5 5 -r average"
        )


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


def _heights(dem: xr.DataArray) -> np.ndarray:
    """Heights as float64, NaN = nodata."""
    z = np.asarray(dem.data, np.float64)
    nodata = dem.rio.nodata if dem.rio.nodata is not None else dem.rio.encoded_nodata
    return z if nodata is None else np.where(z == nodata, np.nan, z)


def _wkt(dem: xr.DataArray) -> str:
    crs = dem.rio.crs
    if crs is None:
        raise PipelineError(
            "The DEM has no CRS, so its pixel size in metres is unknown; write one with .rio.write_crs()"
        )
    wkt: str = crs.to_wkt()
    return wkt


def _gradients(dem: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    z, wkt = _heights(dem), _wkt(dem)
    transform = dem.rio.transform()
    south_up = transform.e > 0
    if south_up:
        z = z[::-1]
    rows = transform.f + transform.e * (np.arange(z.shape[0]) + 0.5)
    dx_m, dy_m = _pixel_size_m(wkt, transform, rows[::-1] if south_up else rows)
    gx, gy = horn_gradients(z, dx_m, dy_m)
    if transform.a < 0:
        gx = -gx
    return (gx[::-1], gy[::-1]) if south_up else (gx, gy)


def _derive(names: Iterable[str], z: np.ndarray, native: GeoBox) -> dict[str, np.ndarray]:
    """Derive variables on the DEM's own pixels, rows from the north."""
    transform = native.affine
    rows = transform.f + transform.e * (np.arange(z.shape[0]) + 0.5)
    dx_m, dy_m = _pixel_size_m(str(native.crs), transform, rows)
    made: dict[str, np.ndarray] = {"elevation": z}
    wanted = set(names)
    if wanted & {"slope_deg", "aspect_deg"}:
        gx, gy = horn_gradients(z, dx_m, dy_m)
        made["slope_deg"], made["aspect_deg"] = slope_from(gx, gy), aspect_from(gx, gy)
        made["aspect_deg"] = (made["aspect_deg"] + convergence_deg(native)) % 360
    if wanted & {"profile_curvature", "plan_curvature"}:
        made["profile_curvature"], made["plan_curvature"] = curvatures(z, dx_m, dy_m)
    if "relief_m" in wanted:
        made["relief_m"] = relief(z, dx_m, dy_m)
    if "tpi_m" in wanted:
        made["tpi_m"] = topographic_position(z, dx_m, dy_m)
    if "hand_m" in wanted:
        from slidecube.pipeline.drainage import height_above_drainage  # noqa: PLC0415  compiles what few ask for

        made["hand_m"] = height_above_drainage(z, dx_m, dy_m)
    return made


def convergence_deg(native: GeoBox) -> np.ndarray | float:
    """Direction of the grid's north, clockwise from true north: (y, x) degrees, or 0 on a grid of degrees.

    Found by steps of a cell to the grid's north, as geodesics see them, on a coarse mesh.
    """
    assert native.crs is not None
    if native.crs.geographic:
        return 0.0
    mesh = [np.linspace(0.5, n - 0.5, -(-n // _CONVERGENCE_STEP_PX) + 1) for n in native.shape]
    row, col = np.meshgrid(*mesh, indexing="ij")
    to = pyproj.Transformer.from_crs(str(native.crs), "EPSG:4326", always_xy=True)
    a = native.affine
    (lon0, lat0), (lon1, lat1) = (to.transform(a.c + a.a * col, a.f + a.e * r) for r in (row, row - 1))
    azimuth = np.radians(_GEOD.inv(lon0, lat0, lon1, lat1)[0])
    at = np.meshgrid(
        *(np.linspace(0, len(m) - 1, n) for m, n in zip(mesh, native.shape, strict=True)), indexing="ij"
    )
    sine, cosine = (
        scipy.ndimage.map_coordinates(part, at, order=1) for part in (np.sin(azimuth), np.cos(azimuth))
    )
    turned: np.ndarray = np.degrees(np.arctan2(sine, cosine))
    return turned


def _pixel_size_m(crs_text: str, transform: Affine, y: np.ndarray) -> tuple[np.ndarray | float, float]:
    """Width (a row) and height of the pixels in metres."""
    crs = pyproj.CRS.from_user_input(crs_text)
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


def _native_window(scene: Scene, geobox: GeoBox, halo_m: float) -> GeoBox | None:
    """Pixels of the DEM's own grid under a block, with a margin; across the antimeridian longitudes go on past 180.

    halo_m : margin beyond what the kernels need
    """
    transform, crs = _native_grid(scene)
    to = pyproj.Transformer.from_crs(str(geobox.crs), crs, always_xy=True)
    x, y = (np.asarray(v) for v in to.transform(*_outline(geobox)))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    if pyproj.CRS.from_user_input(crs).is_geographic and np.ptp(x) > 180:
        x = np.where(x < 0, x + 360, x)
    col0, row0 = ~transform @ (x.min(), y.max())
    col1, row1 = ~transform @ (x.max(), y.min())
    dx_m, dy_m = _pixel_size_m(crs, transform, np.array([y.min(), y.max()]))
    across, along = (_MARGIN_PX + int(np.ceil(halo_m / np.min(size))) for size in (dx_m, dy_m))
    left, top = int(np.floor(col0)) - across, int(np.floor(row0)) - along
    width, height = int(np.ceil(col1)) + across - left, int(np.ceil(row1)) + along - top
    return GeoBox((height, width), transform @ Affine.translation(left, top), crs)


def _cropped(
    native: GeoBox, dem: np.ndarray, scene: Scene, geobox: GeoBox, halo_m: float
) -> tuple[GeoBox, np.ndarray]:
    """Cut a window down to that of a smaller halo."""
    inner = _native_window(scene, geobox, halo_m)
    assert inner is not None
    col, row = (round(v) for v in ~native.affine @ (inner.affine.c, inner.affine.f))
    return inner, dem[row : row + inner.shape[0], col : col + inner.shape[1]]


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


def _resampled(
    names: Sequence[str], dem: np.ndarray, continued: np.ndarray, native: GeoBox, geobox: GeoBox
) -> np.ndarray:
    """Derive variables from heights that go on beyond their tiles, and bring them onto our pixels."""
    made = _derive(names, continued, native)
    made["elevation"] = dem
    # what lies on another grid's tiles is that grid's to say
    own = {name: np.where(np.isnan(dem), np.nan, made[name]) for name in names}
    return np.stack([_onto(name, values, native, geobox) for name, values in own.items()])


def _onto(name: str, values: np.ndarray, native: GeoBox, geobox: GeoBox) -> np.ndarray:
    if name != "aspect_deg":
        return _warp(values, native, geobox, Resampling.cubic if name == "elevation" else Resampling.bilinear)
    turn = np.radians(values)
    sine, cosine = (_warp(part, native, geobox, Resampling.bilinear) for part in (np.sin(turn), np.cos(turn)))
    direction: np.ndarray = np.degrees(np.arctan2(sine, cosine)) % 360
    return direction


def _warp(layer: np.ndarray, native: GeoBox, geobox: GeoBox, kernel: Resampling) -> np.ndarray:
    out = np.full(geobox.shape, np.nan, np.float32)
    with RASTERIO:
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


def _stored(values: np.ndarray, variable: str) -> np.ndarray:
    found = TERRAIN_VARIABLES[variable].stored(values)
    # 359.996 degrees are north
    return np.where(found == 36_000, 0, found).astype(found.dtype) if variable == "aspect_deg" else found
