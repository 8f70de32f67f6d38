"""Files of the simulated archive: cloud-optimised GeoTIFFs and a static STAC catalogue, all hrefs relative."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import rasterio
import rasterio.shutil
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.io import MemoryFile

from slidecube.pipeline.simulate.light import Sun
from slidecube.pipeline.simulate.optics import NATIVE_M
from slidecube.pipeline.simulate.parameters import Overpass

OPTICAL = "simulated-sentinel-2-l2a"
RADAR = "simulated-sentinel-1-rtc"
DEM = "simulated-dem"
_RADAR_NODATA = -32768.0
_COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_DEM_CREDIT = (
    "Derived from Copernicus GLO-30: (c) DLR e.V. 2010-2014 and (c) Airbus Defence and Space GmbH 2014-2018, provided "
    "under COPERNICUS by the European Union and ESA; all rights reserved"
)
_WARNING = (
    "SIMULATED pixels, not a satellite image: the terrain is refined from a real DEM of Sao Tome, everything on it "
    "(land cover, landslides, clouds, sun and season of another latitude) is invented by slidecube"
)
_COMMON_NAME = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "B11": "swir16", "B12": "swir22"}
_EXTENSION = "https://stac-extensions.github.io"


@dataclass(frozen=True, slots=True, kw_only=True)
class Granule:
    """One item to be written: a tile of an overpass, processed with one baseline.

    cloud_pct, nodata_pct : of its pixels, by its classification
    new_style : STAC 1.1 with `proj:code` and `bands` instead of STAC 1.0 with `proj:epsg` and `eo:bands`
    """

    overpass: Overpass
    baseline: str
    tile: str
    sun: Sun
    relative_orbit: int
    cloud_pct: float
    nodata_pct: float
    new_style: bool
    seed: int = 0

    @property
    def sensed(self) -> dt.datetime:
        """Start of the datatake, UTC."""
        return dt.datetime.combine(self.overpass.day, dt.time(10, 0, 31), dt.UTC)

    @property
    def generated(self) -> dt.datetime:
        """When the simulated ground segment made it: Collection 1 comes years later.

        Another seed is another version of the same acquisition, and must not pass for this one.
        """
        late = dt.timedelta(days=1826) if float(self.baseline) >= 4 else dt.timedelta(hours=5)
        return self.sensed + late + dt.timedelta(minutes=self.seed)

    @property
    def craft(self) -> str:
        """Platform in file names, "S2A"."""
        return f"S2{self.overpass.platform[-1].upper()}"

    @property
    def id(self) -> str:
        """Id of the item."""
        return f"{self.craft}_SIMULATED_T{self.tile}_{_stamp(self.sensed)}_N{self.baseline.replace('.', '')}"

    @property
    def offset(self) -> float:
        """Reflectance to add to DN / 10000: from baseline 04.00 on the DN are stored 1000 higher."""
        return -0.1 if float(self.baseline) >= 4 else 0.0


def write_cog(
    path: Path, values: np.ndarray, *, crs: str, transform: Affine, nodata: float | None, tags: dict[str, str]
) -> None:
    """Write (y, x) or (band, y, x) values as a cloud-optimised GeoTIFF with deflate."""
    stack = values if values.ndim == 3 else values[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            count=stack.shape[0],
            height=stack.shape[1],
            width=stack.shape[2],
            dtype=stack.dtype,
            crs=crs,
            transform=transform,
            nodata=nodata,
        ) as file:
            file.write(stack)
            file.update_tags(**tags)
        with memory.open() as file:
            rasterio.shutil.copy(
                file,
                str(path),
                driver="COG",
                compress="DEFLATE",
                level=1,  # noise does not compress further, and level 6 takes thrice the time
                predictor="YES",
                blocksize=512,
                overviews="NONE",
            )


def to_dn(reflectance: np.ndarray, offset: float) -> np.ndarray:
    """Digital numbers: (y, x) uint16, 0 = nodata (NaN), clipped at 1 as the ground segment does."""
    dn = np.rint((reflectance - np.float32(offset)) * 10000)
    return np.where(np.isnan(dn), 0, np.clip(dn, 1, 65535)).astype(np.uint16)


def write_granule(
    folder: Path, granule: Granule, rasters: dict[str, np.ndarray], *, crs: str, corner: tuple[float, float]
) -> Path:
    """Write an item and its assets.

    folder : of the collection; rasters : band -> DN uint16, and "SCL" uint8, each at its own pixel size
    corner : map coordinates of the upper left corner
    Returns the item's file.
    """
    home = folder / granule.id
    tags = {"SIMULATED": "YES", "DESCRIPTION": _WARNING}
    assets = {}
    for name, values in rasters.items():
        pixel_m = float(NATIVE_M.get(name, 20))
        transform = Affine(pixel_m, 0, corner[0], 0, -pixel_m, corner[1])
        write_cog(home / f"{name}.tif", values, crs=crs, transform=transform, nodata=0, tags=tags)
        assets[name] = _asset(name, values.shape, transform, granule)
    item = _item(granule, assets, crs=crs, bounds=_bounds(rasters["SCL"].shape, 20.0, corner))
    return write_json(home / f"{granule.id}.json", item)


@dataclass(frozen=True, slots=True, kw_only=True)
class RadarItem:
    """One radar item to be written."""

    day: dt.date
    orbit_state: str
    relative_orbit: int
    looks: float

    @property
    def sensed(self) -> dt.datetime:
        """When it was taken, UTC: at six local solar time, in the morning on the way down."""
        hour = 5 if self.orbit_state == "descending" else 17
        return dt.datetime.combine(self.day, dt.time(hour, 34, 11), dt.UTC)

    @property
    def id(self) -> str:
        """Id of the item."""
        return f"S1A_SIMULATED_RTC_{self.orbit_state.upper()}_{self.relative_orbit:03d}_{_stamp(self.sensed)}"


def write_radar(folder: Path, item: RadarItem, rasters: dict[str, np.ndarray], *, geobox: GeoBox) -> Path:
    """Write a radar item and its assets, as Planetary Computer's are laid out.

    rasters : "vv", "vh" -> gamma0, float32 linear power, 0 where the processor left it out
    Returns the item's file.
    """
    home, crs = folder / item.id, str(geobox.crs)
    tags = {"SIMULATED": "YES", "DESCRIPTION": _WARNING}
    assets = {}
    for band, values in rasters.items():
        write_cog(
            home / f"{band}.tif", values, crs=crs, transform=geobox.affine, nodata=_RADAR_NODATA, tags=tags
        )
        assets[band] = {
            "href": f"./{band}.tif",
            "type": _COG,
            "title": f"SIMULATED gamma0 {band.upper()}",
            "roles": ["data"],
            "raster:bands": [{"data_type": "float32", "nodata": _RADAR_NODATA, "spatial_resolution": 10.0}],
        }
    footprint = lonlat_outline(geobox.extent.boundingbox.bbox, crs)
    a = geobox.affine
    properties = {
        "datetime": _iso(item.sensed),
        "title": f"SIMULATED {item.id}",
        "description": _WARNING,
        "slidecube:simulated": True,
        "platform": "sentinel-1a",
        "constellation": "sentinel-1",
        "sar:instrument_mode": "IW",
        "sar:frequency_band": "C",
        "sar:product_type": "RTC",
        "sar:polarizations": [band.upper() for band in rasters],
        "sar:looks_equivalent_number": item.looks,
        "sat:orbit_state": item.orbit_state,
        "sat:relative_orbit": item.relative_orbit,
        "s1:datatake_id": f"SIMULATED-{_stamp(item.sensed)}",
        "proj:epsg": int(crs.split(":")[1]),
        "proj:shape": list(geobox.shape),
        "proj:transform": [a.a, 0.0, a.c, 0.0, a.e, a.f],
    }
    document = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [
            f"{_EXTENSION}/{name}/schema.json"
            for name in ("sar/v1.0.0", "sat/v1.0.0", "projection/v1.1.0", "raster/v1.1.0")
        ],
        "id": item.id,
        "collection": RADAR,
        "geometry": shapely.geometry.mapping(footprint),
        "bbox": list(footprint.bounds),
        "properties": properties,
        "links": _up(),
        "assets": assets,
    }
    return write_json(home / f"{item.id}.json", document)


def _up() -> list[dict[str, str]]:
    return [
        {"rel": "root", "href": "../../catalog.json", "type": "application/json"},
        {"rel": "collection", "href": "../collection.json", "type": "application/json"},
        {"rel": "parent", "href": "../collection.json", "type": "application/json"},
    ]


def _bounds(
    shape: tuple[int, ...], pixel_m: float, corner: tuple[float, float]
) -> tuple[float, float, float, float]:
    return corner[0], corner[1] - shape[0] * pixel_m, corner[0] + shape[1] * pixel_m, corner[1]


def _asset(name: str, shape: tuple[int, ...], transform: Affine, granule: Granule) -> dict[str, Any]:
    asset: dict[str, Any] = {
        "href": f"./{name}.tif",
        "type": _COG,
        "title": f"SIMULATED {name}",
        "roles": ["data"],
        "gsd": transform.a,
        "proj:shape": list(shape),
        "proj:transform": [transform.a, 0.0, transform.c, 0.0, transform.e, transform.f],
    }
    if name == "SCL":
        return asset | {"raster:bands": [{"data_type": "uint8", "nodata": 0, "spatial_resolution": 20}]}
    band = {"name": name} | ({"common_name": _COMMON_NAME[name]} if name in _COMMON_NAME else {})
    values = {"data_type": "uint16", "nodata": 0}
    if granule.new_style:
        common = {"eo:common_name": band["common_name"]} if "common_name" in band else {}
        scaling = {"raster:scale": 0.0001, "raster:offset": granule.offset}
        asset["bands"] = [{"name": name} | common | values | scaling]
        # odc-stac reads nodata from here; STAC 1.1 allows both
        asset["raster:bands"] = [values | {"scale": 0.0001, "offset": granule.offset}]
    else:
        asset["eo:bands"] = [band]
        asset["raster:bands"] = [
            values | {"scale": 0.0001, "offset": granule.offset, "spatial_resolution": transform.a}
        ]
    return asset


def _item(
    granule: Granule, assets: dict[str, Any], *, crs: str, bounds: tuple[float, float, float, float]
) -> dict[str, Any]:
    footprint = lonlat_outline(bounds, crs)
    projection = {"proj:code": crs} if granule.new_style else {"proj:epsg": int(crs.split(":")[1])}
    return {
        "type": "Feature",
        "stac_version": "1.1.0" if granule.new_style else "1.0.0",
        "stac_extensions": _extensions(new_style=granule.new_style),
        "id": granule.id,
        "collection": OPTICAL,
        "geometry": shapely.geometry.mapping(footprint),
        "bbox": list(footprint.bounds),
        "properties": _properties(granule) | projection,
        "links": _up(),
        "assets": assets,
    }


def _extensions(*, new_style: bool) -> list[str]:
    names = ["eo/v2.0.0", "projection/v2.0.0", "raster/v2.0.0"] if new_style else []
    names = names or ["eo/v1.1.0", "projection/v1.1.0", "raster/v1.1.0"]
    return [f"{_EXTENSION}/{name}/schema.json" for name in [*names, "view/v1.0.0", "sat/v1.0.0"]]


def _properties(granule: Granule) -> dict[str, Any]:
    taken, made = _stamp(granule.sensed), _stamp(granule.generated)
    version = f"N{granule.baseline}"
    orbit = f"{30000 + granule.overpass.day.toordinal() % 30000:06d}"
    strip = _stamp(granule.sensed + dt.timedelta(seconds=570))
    return {
        "datetime": _iso(granule.sensed + dt.timedelta(seconds=577)),
        "title": f"SIMULATED {granule.id}",
        "description": _WARNING,
        "slidecube:simulated": True,
        "platform": granule.overpass.platform,
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "gsd": 10,
        "eo:cloud_cover": round(granule.cloud_pct, 4),
        "view:sun_elevation": round(granule.sun.elevation_deg, 4),
        "view:sun_azimuth": round(granule.sun.azimuth_deg, 4),
        "view:off_nadir": 0,
        "sat:orbit_state": "descending",
        "sat:relative_orbit": granule.relative_orbit,
        "s2:mgrs_tile": granule.tile,
        "grid:code": f"MGRS-{granule.tile}",
        "s2:processing_baseline": granule.baseline,
        "s2:datatake_id": f"G{granule.craft}_{taken}_{orbit}_{version}",
        "s2:datastrip_id": f"{granule.craft}_OPER_MSI_L2A_DS_SIMU_{made}_S{strip}_{version}",
        "s2:granule_id": f"{granule.craft}_OPER_MSI_L2A_TL_SIMU_{made}_A{orbit}_T{granule.tile}_{version}",
        "s2:product_uri": (
            f"{granule.craft}_MSIL2A_{taken}_N{granule.baseline.replace('.', '')}_R{granule.relative_orbit:03d}"
            f"_T{granule.tile}_{made}.SAFE"
        ),
        "s2:product_type": "S2MSI2A",
        "s2:generation_time": _iso(granule.generated),
        "s2:nodata_pixel_percentage": round(granule.nodata_pct, 4),
        "s2:mean_solar_zenith": round(90 - granule.sun.elevation_deg, 4),
        "s2:mean_solar_azimuth": round(granule.sun.azimuth_deg, 4),
    }


def write_dem(folder: Path, dem: np.ndarray, transform: Affine) -> Path:
    """Write the DEM that a detector gets, as a collection of one item."""
    name = "SIMULATED_Copernicus_DSM_COG_10_N00_00_E006_00_DEM"
    tags = {"SIMULATED": "YES", "DESCRIPTION": f"{_WARNING}. {_DEM_CREDIT}"}
    write_cog(folder / name / "DEM.tif", dem, crs="EPSG:4326", transform=transform, nodata=None, tags=tags)
    rows, cols = dem.shape
    bounds = (
        transform.c,
        transform.f + rows * transform.e,
        transform.c + cols * transform.a,
        transform.f,
    )
    footprint = shapely.box(*bounds)
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [f"{_EXTENSION}/projection/v1.1.0/schema.json"],
        "id": name,
        "collection": DEM,
        "geometry": shapely.geometry.mapping(footprint),
        "bbox": list(bounds),
        "properties": {
            "datetime": "2014-12-31T00:00:00Z",
            "title": f"SIMULATED {name}",
            "description": "A surface model as a detector gets it: smoothed, with canopy and noise. "
            + _WARNING,
            "slidecube:simulated": True,
            "platform": "TanDEM-X",
            "gsd": 30,
            "proj:epsg": 4326,
            "proj:shape": [rows, cols],
            "proj:transform": [transform.a, 0.0, transform.c, 0.0, transform.e, transform.f],
        },
        "links": [
            {"rel": "root", "href": "../../catalog.json", "type": "application/json"},
            {"rel": "collection", "href": "../collection.json", "type": "application/json"},
            {"rel": "parent", "href": "../collection.json", "type": "application/json"},
        ],
        "assets": {
            "data": {
                "href": "./DEM.tif",
                "type": _COG,
                "title": "SIMULATED elevation, metres above EGM2008",
                "roles": ["data"],
                "gsd": 30,
                "raster:bands": [{"data_type": "float32", "unit": "metre"}],
            }
        },
    }
    path = write_json(folder / name / f"{name}.json", item)
    write_collection(
        folder,
        DEM,
        title="SIMULATED digital elevation model",
        items=[path],
        bbox=bounds,
        days=("2010-12-12", "2015-01-16"),
        credit=_DEM_CREDIT,
    )
    return path


def write_collection(
    folder: Path,
    name: str,
    *,
    title: str,
    items: Sequence[Path],
    bbox: Sequence[float],
    days: tuple[str, str],
    credit: str = "slidecube",
) -> Path:
    """Write a collection that links its items."""
    document = {
        "type": "Collection",
        "stac_version": "1.0.0",
        "id": name,
        "title": title,
        "description": f"{_WARNING}. {credit}",
        "license": "other",
        "keywords": ["simulated"],
        "extent": {
            "spatial": {"bbox": [list(bbox)]},
            "temporal": {"interval": [[f"{days[0]}T00:00:00Z", f"{days[1]}T23:59:59Z"]]},
        },
        "links": [
            {"rel": "root", "href": "../catalog.json", "type": "application/json"},
            {"rel": "parent", "href": "../catalog.json", "type": "application/json"},
            *(
                {
                    "rel": "item",
                    "href": f"./{p.relative_to(folder).as_posix()}",
                    "type": "application/geo+json",
                }
                for p in items
            ),
        ],
    }
    return write_json(folder / "collection.json", document)


def write_root(path: Path, children: Sequence[Path], description: str = "") -> Path:
    """Write the root catalogue."""
    links = [
        {"rel": "child", "href": f"./{c.relative_to(path.parent).as_posix()}", "type": "application/json"}
        for c in children
    ]
    document = {
        "type": "Catalog",
        "stac_version": "1.0.0",
        "id": "slidecube-simulated",
        "title": "SIMULATED archive of slidecube",
        "description": description or _WARNING,
        "links": [{"rel": "root", "href": "./catalog.json", "type": "application/json"}, *links],
    }
    return write_json(path, document)


def write_json(path: Path, document: dict[str, Any]) -> Path:
    """Write a document, the same bytes for the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def lonlat_outline(bounds: tuple[float, float, float, float], crs: str) -> shapely.Polygon:
    """Outline of map bounds (left, bottom, right, top) in longitude and latitude, long edges densified."""
    to = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    ring = np.array(shapely.segmentize(shapely.box(*bounds), 20_000.0).exterior.coords)
    lon, lat = to.transform(ring[:, 0], ring[:, 1])
    return shapely.Polygon(np.column_stack([np.round(lon, 7), np.round(lat, 7)]))


def _stamp(when: dt.datetime) -> str:
    return when.strftime("%Y%m%dT%H%M%S")


def _iso(when: dt.datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
