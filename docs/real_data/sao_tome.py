"""Slope on a real national DEM: Copernicus GLO-30 of Sao Tome, against gdaldem, and what resampling first does."""

from __future__ import annotations

import datetime as dt
import shutil
import subprocess
from pathlib import Path
from typing import Any

import drawing
import numpy as np
import pyproj
import rasterio
import rioxarray
import scipy.ndimage
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from rasterio.warp import Resampling, reproject

from slidecube.catalog.scenes import Scene
from slidecube.pipeline.terrain import slope_deg, terrain

NAME = "Copernicus_DSM_COG_10_N00_00_E006_00_DEM"
TILE = f"sentinel_cogs/copernicus-dem-30m/{NAME}/{NAME}.tif"
CRS = "EPSG:32632"
# whole blocks of the lattice of 10 m pixels around the island
WEST_M, NORTH_M, BLOCKS = 215_040.0, 51_200.0, (10, 8)
HORN_EAST = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], float) / 8


def measure(shared: Path, scratch: Path, images: Path | None = None) -> dict[str, Any]:
    """Compare the slope on the DEM's own pixels with gdaldem, then two ways onto 10 m pixels with each other."""
    with rioxarray.open_rasterio(shared / TILE) as source:
        dem = source.isel(band=0).load()
    ours = slope_deg(dem).to_numpy()
    land = dem.to_numpy() > 0
    box = island()
    kept, stairs = ways(shared, box)
    if images is not None:
        _draw(kept["slope"], stairs, images / "real-sao-tome.png")
    return {
        "native": {
            "land_px": int(land.sum()),
            "highest_m": round(float(dem.max()), 1),
            "slope_p90_deg": round(float(np.nanpercentile(ours[land], 90)), 2),
            "against_gdaldem": against_gdaldem(dem, scratch),
            "against_scipy_max_deg": round(against_scipy(dem), 5),
        },
        "grid_px": list(box.shape),
        "slope_first": _shape_of(kept["slope"], kept["land"]),
        "stairs": _shape_of(stairs, kept["land"]),
    }


def island() -> GeoBox:
    """10 m pixels over the island, on the lattice's blocks."""
    shape = (512 * BLOCKS[0], 512 * BLOCKS[1])
    return GeoBox(shape, Affine(10, 0, WEST_M, 0, -10, NORTH_M), CRS)


def ways(shared: Path, box: GeoBox) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Slope on 10 m pixels: slidecube's (slope first, then resampled), and of heights copied to 10 m first.

    Returns {"slope", "land"} of ours, and the stairs' slope; degrees, NaN = none.
    """
    made = terrain([dem_scene(shared)], box)
    stored = made["slope_deg"].compute(scheduler="synchronous")
    slope = np.where(stored == 65535, np.nan, stored / 100)
    heights = np.full(box.shape, np.nan, np.float32)
    with rasterio.open(shared / TILE) as source:
        reproject(
            rasterio.band(source, 1),
            heights,
            dst_transform=box.affine,
            dst_crs=CRS,
            dst_nodata=np.nan,
            resampling=Resampling.nearest,
        )
    copied = xr.DataArray(heights, coords=xr_coords(box), dims=box.dimensions)
    land = np.nan_to_num(made["elevation"].compute(scheduler="synchronous")) > 0
    return {"slope": slope, "land": land}, slope_deg(copied).to_numpy()


def dem_scene(shared: Path) -> Scene:
    """Make the scene of the GLO-30 tile, as its STAC item would."""
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": NAME,
        "collection": "cop-dem-glo-30",
        "geometry": {"type": "Polygon", "coordinates": [[[6, 0], [7, 0], [7, 1], [6, 1], [6, 0]]]},
        "bbox": [6, 0, 7, 1],
        "properties": {"datetime": "2021-04-22T00:00:00Z"},
        "links": [],
        "assets": {"data": {"href": str(shared / TILE), "type": "image/tiff; application=geotiff"}},
    }
    return Scene(
        id=NAME,
        role="dem",
        source="local",
        datetime=dt.datetime(2021, 4, 22, tzinfo=dt.UTC),
        identity=NAME,
        datatake="",
        version="",
        offset=None,
        bands={"elevation": "data"},
        item=item,
    )


def against_gdaldem(dem: xr.DataArray, scratch: Path) -> dict[str, Any] | None:
    """Largest difference from `gdaldem slope`, degrees; None where it is not installed.

    gdaldem knows no ellipsoid: it gets the same heights on pixels of the tile's mean size in metres, and the rest of
    the difference is how that size changes over the tile.
    """
    if shutil.which("gdaldem") is None:
        return None
    dx_m, dy_m = (float(np.mean(size)) for size in pixel_sizes_m(dem))
    box = GeoBox(dem.shape, Affine(dx_m, 0, 500_000, 0, -dy_m, 100_000), CRS)
    path, out = scratch / "dem.tif", scratch / "slope.tif"
    xr.DataArray(dem.to_numpy(), coords=xr_coords(box), dims=box.dimensions).rio.to_raster(path)
    subprocess.run(["gdaldem", "slope", str(path), str(out), "-q"], check=True)  # noqa: S603, S607
    with rasterio.open(out) as made:
        theirs = made.read(1, masked=True).filled(np.nan)
    flat = xr.DataArray(dem.to_numpy(), coords=xr_coords(box), dims=box.dimensions)
    same = np.abs(slope_deg(flat).to_numpy() - theirs)
    ellipsoid = np.abs(slope_deg(dem).to_numpy() - theirs)
    return {
        "same_pixels_max_deg": round(float(np.nanmax(same)), 5),
        "ellipsoid_max_deg": round(float(np.nanmax(ellipsoid)), 5),
    }


def against_scipy(dem: xr.DataArray) -> float:
    """Largest difference from Horn's kernels by scipy on pixel sizes by geodesics, degrees."""
    dx_m, dy_m = pixel_sizes_m(dem)
    z = dem.to_numpy().astype(float)
    east = scipy.ndimage.correlate(z, HORN_EAST) / dx_m[:, None]
    north = scipy.ndimage.correlate(z, -HORN_EAST.T) / dy_m[:, None]
    want = np.degrees(np.arctan(np.hypot(east, north)))[1:-1, 1:-1]
    return float(np.nanmax(np.abs(slope_deg(dem).to_numpy()[1:-1, 1:-1] - want)))


def pixel_sizes_m(dem: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of the pixels of each row, in metres along geodesics of WGS84."""
    geod = pyproj.Geod(ellps="WGS84")
    transform = dem.rio.transform()
    lat = transform.f + transform.e * (np.arange(dem.shape[0]) + 0.5)
    lon = np.full_like(lat, transform.c)
    width = geod.inv(lon, lat, lon + transform.a, lat)[2]
    height = geod.inv(lon, lat - 0.01, lon, lat + 0.01)[2] / 0.02 * abs(transform.e)
    return np.asarray(width), np.asarray(height)


def _shape_of(slope: np.ndarray, land: np.ndarray) -> dict[str, float]:
    on_land = slope[land & ~np.isnan(slope)]
    return {
        "below_1_deg_pct": round(100 * float((on_land < 1).mean()), 2),
        "p50_deg": round(float(np.percentile(on_land, 50)), 2),
        "p90_deg": round(float(np.percentile(on_land, 90)), 2),
        "above_10_deg_pct": round(100 * float((on_land >= 10).mean()), 2),
    }


def _draw(kept: np.ndarray, stairs: np.ndarray, path: Path) -> None:
    figure, axes = drawing.panels(3, width=4.2, height=4.8)
    shown = axes[0].imshow(kept[::8, ::8], cmap="viridis", vmin=0, vmax=60)
    drawing.plain(axes[0], "slope of Sao Tome, degrees")
    figure.colorbar(shown, ax=axes[0], location="bottom", shrink=0.8)
    rows, cols = slice(2560, 2720), slice(1400, 1560)
    axes[0].add_patch(
        drawing.plt.Rectangle((cols.start / 8, rows.start / 8), 20, 20, fill=False, edgecolor="crimson")
    )
    for axis, slope, title in (
        (axes[1], stairs, "heights copied to 10 m first: stairs"),
        (axes[2], kept, "as stored: slope first, then 10 m"),
    ):
        shown = axis.imshow(slope[rows, cols], cmap="viridis", vmin=0, vmax=60, interpolation="nearest")
        drawing.plain(axis, title)
        figure.colorbar(shown, ax=axis, location="bottom", shrink=0.8)
    drawing.save(figure, path)
