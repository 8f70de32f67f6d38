"""Layers out of real rasters, against GDAL's own warp of the same files."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from slidecube.catalog.aoi import read_aoi
from slidecube.catalog.grid import TileGrid
from slidecube.catalog.rasters import raster_scene
from slidecube.pipeline.auxiliary import CLASS_NODATA, auxiliary
from slidecube.pipeline.config import Layer

CASES = {
    # a scene classification of 200 m pixels onto 10 m in the neighbouring zone
    "classes": ("sentinel_cogs/sentinel-cogs", "SCL.tif", "categorical", "mode", "EPSG:32628"),
    # heights of the island of Sao Tome, degrees onto metres
    "heights": ("sentinel_cogs/copernicus-dem-30m", "*DEM.tif", "continuous", "bilinear", "EPSG:32632"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_real_raster_is_what_gdal_s_warp_makes_of_it(shared_data, case):
    where, name, kind, kernel, crs = CASES[case]
    path = min((shared_data / where).rglob(name))
    with rasterio.open(path) as file:
        west, south, east, north = rasterio.warp.transform_bounds(file.crs, "EPSG:4326", *file.bounds)
    # Sao Tome lies in the south-east of its tile of sea
    x, y = (6.6, 0.25) if case == "heights" else ((west + east) / 2, (south + north) / 2)
    aoi = read_aoi((x - 0.01, y - 0.01, x + 0.01, y + 0.01))
    grid = TileGrid(crs=crs, resolution_m=10.0, tile_px=512)
    layer = Layer(name="real", kind=kind, href=str(path))
    seen = 0
    for tile in grid.tiles(aoi):
        box = read_aoi(tuple(tile.geobox.extent.to_crs("EPSG:4326").boundingbox.bbox))
        scene = raster_scene(str(path), box, name="real")

        found = auxiliary([scene], tile.geobox, layer, block_px=512).compute()

        with (
            rasterio.open(path) as file,
            WarpedVRT(
                file,
                crs=crs,
                transform=tile.geobox.affine,
                width=512,
                height=512,
                resampling=Resampling[kernel],
                dtype="float32",
                nodata=np.nan,
            ) as warped,
        ):
            want = warped.read(1)
        if kind == "categorical":
            want = np.where(np.isnan(want), CLASS_NODATA, want).astype(np.uint16)
            assert set(np.unique(found)) <= {2, 5, 7, 8, 9, 10, CLASS_NODATA}
        np.testing.assert_array_equal(found, want)
        seen += int(((found != CLASS_NODATA) & (found > 0)).sum())
    assert seen > 100_000
