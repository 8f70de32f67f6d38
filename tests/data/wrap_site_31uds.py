"""Wrap the real Sentinel-2 series of site 31UDS (Flanders) as COGs and STAC items, so that it can be planned and read.

Source of the series: WorldCereal/worldcereal-classification (MIT); contains modified Copernicus Sentinel data.
Usage: python tests/data/wrap_site_31uds.py SHARED_DATA OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import rasterio
import xarray as xr
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds

SITE = "worldcereal_series/site_31UDS"
STEM = "00002806639B424A_32631_2017-08-01_2018-11-30.nc"
LEFT, TOP, SIDE_M = 501_360.0, 5_629_680.0, 640
CYCLE_START = np.datetime64("2017-08-04")
"""A day on which Sentinel-2A passed in relative orbit 51; the same again every tenth day, Sentinel-2B five days later.
It follows from the real item S2A_29RKH_20200219 (orbit 37), and the view angles of the series agree:
the azimuths of one orbit fall into two groups, one a satellite."""
PASSES = {0: ("2A", 51), 3: ("2A", 94), 5: ("2B", 51), 8: ("2B", 94)}
"""Day of the ten-day cycle -> satellite and relative orbit."""
CLOUDY = (8, 9, 10)
"""Scene classes that a provider counts as cloud: medium and high probability, thin cirrus."""

BANDS_10M = ("B02", "B03", "B04", "B08")
BANDS_20M = ("B05", "B06", "B07", "B8A", "B11", "B12", "SCL")


def open_series(shared: Path) -> tuple[xr.Dataset, xr.Dataset]:
    """Open the 10 m and the 20 m series as stored (0 = nodata)."""
    ten, twenty = (
        xr.open_dataset(shared / SITE / f"S2_L2A_{r}_{STEM}", mask_and_scale=False, engine="h5netcdf")
        for r in ("10m", "20m")
    )
    return ten, twenty


def wrap(shared: Path, out: Path) -> Path:
    """Write one COG a band and date, the DEM, and an ItemCollection; returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    ten, twenty = open_series(shared)
    items = [
        _item(out, ten.isel(timestamp=i), twenty.isel(timestamp=i)) for i in range(ten.sizes["timestamp"])
    ]
    items.append(_dem(shared, out))
    path = out / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": items}, indent=1))
    return path


def satellite_and_orbit(when: np.datetime64) -> tuple[str, int]:
    """Tell satellite and relative orbit of a sensing time over this site."""
    return PASSES[int((when.astype("datetime64[D]") - CYCLE_START).astype(int)) % 10]


def _item(out: Path, ten: xr.Dataset, twenty: xr.Dataset) -> dict:
    when = np.datetime_as_string(ten.timestamp.values, unit="s")
    stamp = when.replace("-", "").replace(":", "")
    satellite, orbit = satellite_and_orbit(ten.timestamp.values)
    # the series is older than baseline 04.00; which of the older ones, and the absolute orbit, it does not say
    name = f"S{satellite}_MSIL2A_{stamp}_N0206_R{orbit:03d}_T31UDS_{stamp}"
    assets = {}
    for bands, dataset, resolution in ((BANDS_10M, ten, 10), (BANDS_20M, twenty, 20)):
        for band in bands:
            _write(out / name / f"{band}.tif", dataset[band].values, resolution)
            assets[band] = {
                "href": f"{name}/{band}.tif",
                "type": "image/tiff; application=geotiff",
                "roles": ["data"],
            }
    properties = {
        "datetime": f"{when}Z",
        "platform": f"sentinel-{satellite.lower()}",
        "eo:cloud_cover": float(100 * np.isin(twenty["SCL"].values, CLOUDY).mean()),
        "sat:relative_orbit": orbit,
        "proj:code": "EPSG:32631",
        "proj:epsg": 32631,
        "s2:mgrs_tile": "31UDS",
        "s2:processing_baseline": "02.06",
        "s2:datatake_id": f"GS{satellite}_{stamp}_000000_N02.06",
        "s2:datastrip_id": f"S{satellite}_OPER_MSI_L2A_DS_XXXX_{stamp}_S{stamp}_N02.06",
        "s2:generation_time": f"{when}Z",
        "license": "MIT",
        "attribution": "Contains modified Copernicus Sentinel data 2017-2018; series by WorldCereal",
    }
    return _feature(name, "site-31uds", properties, assets)


def _dem(shared: Path, out: Path) -> dict:
    (out / "dem").mkdir(exist_ok=True)
    (out / "dem" / "dem.tif").write_bytes((shared / SITE / "dem_31UDS.tif").read_bytes())
    properties = {
        "datetime": "2015-01-01T00:00:00Z",
        "proj:code": "EPSG:32631",
        "proj:epsg": 32631,
        "license": "MIT",
    }
    assets = {
        "elevation": {"href": "dem/dem.tif", "type": "image/tiff; application=geotiff", "roles": ["data"]}
    }
    return _feature("dem-31uds", "dem", properties, assets)


def _feature(name: str, collection: str, properties: dict, assets: dict) -> dict:
    west, south, east, north = transform_bounds(
        "EPSG:32631", "EPSG:4326", LEFT, TOP - SIDE_M, LEFT + SIDE_M, TOP
    )
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": ["https://stac-extensions.github.io/projection/v2.0.0/schema.json"],
        "id": name,
        "collection": collection,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": [west, south, east, north],
        "properties": properties,
        "links": [],
        "assets": assets,
    }


def _write(path: Path, values: np.ndarray, resolution_m: int) -> None:
    path.parent.mkdir(exist_ok=True)
    profile = {
        "driver": "COG",
        "width": values.shape[1],
        "height": values.shape[0],
        "count": 1,
        "dtype": values.dtype.name,
        "crs": "EPSG:32631",
        "transform": from_origin(LEFT, TOP, resolution_m, resolution_m),
        "nodata": 0,
        "compress": "deflate",
        "overviews": "none",
    }
    with rasterio.open(path, "w", **profile) as file:
        file.write(values, 1)


if __name__ == "__main__":
    print(wrap(Path(sys.argv[1]), Path(sys.argv[2])))
