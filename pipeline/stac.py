"""The STAC item of an inventory: what it is, where it lies, and what it was made of."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pystac
import shapely
import shapely.affinity
from odc.geo.geobox import GeoBox
from shapely.geometry.base import BaseGeometry

from slidecube.pipeline.ground import GROUND_CF, SHIFTS
from slidecube.pipeline.inventory import (
    LANDSLIDE_NODATA,
    PROBABILITY_NODATA,
    PROBABILITY_SCALE,
    REASONS,
    Observability,
    Reason,
)
from slidecube.pipeline.lineage import Lineage
from slidecube.pipeline.polygons import SCHEMA
from slidecube.pipeline.shift_table import SHIFT_SCHEMA

EXTENSIONS = (
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/processing/v1.2.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
    "https://stac-extensions.github.io/table/v1.2.0/schema.json",
    "https://stac-extensions.github.io/classification/v2.0.0/schema.json",
    "https://stac-extensions.github.io/raster/v2.0.0/schema.json",
)

OUTLINE_STEP_M = 20_000.0

MEDIA_TYPES = {
    ".parquet": "application/vnd.apache.parquet",
    ".gpkg": "application/geopackage+sqlite3",
    ".tif": "image/tiff; application=geotiff; profile=cloud-optimized",
    ".zarr": "application/vnd.zarr; version=3",
    ".html": "text/html",
    ".png": "image/png",
}

_TITLES = {
    "objects": "Landslide objects (parquet)",
    "geopackage": "Landslide objects (gpkg)",
    "shifts": "Shifts between the images before and after the event, by block (parquet)",
}


def _bitfields() -> list[dict[str, Any]]:
    """Answers of the ground's byte, as the classification extension says them."""
    meanings = zip(
        GROUND_CF["flag_masks"],
        GROUND_CF["flag_values"],
        str(GROUND_CF["flag_meanings"]).split(),
        strict=True,
    )
    flags = [(int(mask), int(value), name) for mask, value, name in meanings]
    return [
        {
            "name": factor,
            "offset": shift,
            "length": 2,
            "classes": [
                {"value": 0, "name": "unknown", "description": "Not known"},
                *(
                    {
                        "value": value >> shift,
                        "name": name,
                        "description": name.replace("_", " ").capitalize(),
                    }
                    for mask, value, name in flags
                    if mask == 3 << shift
                ),
            ],
        }
        for factor, shift in SHIFTS.items()
    ]


_BANDS: dict[str, dict[str, Any]] = {
    "probability": {
        "name": "probability",
        "data_type": "uint16",
        "nodata": PROBABILITY_NODATA,
        "unit": "1",
        "raster:scale": PROBABILITY_SCALE,
        "raster:offset": 0.0,
    },
    "landslide": {
        "name": "landslide",
        "data_type": "uint8",
        "nodata": LANDSLIDE_NODATA,
        "classification:classes": [
            {"value": 0, "name": "no_landslide", "description": "No landslide, where observability is 3"},
            {"value": 1, "name": "landslide", "description": "Landslide"},
        ],
    },
    "observability": {
        "name": "observability",
        "data_type": "uint8",
        "classification:classes": [
            {"value": int(o), "name": o.name.lower(), "description": o.name.replace("_", " ").capitalize()}
            for o in Observability
        ],
    },
    "reason": {
        "name": "reason",
        "data_type": "uint8",
        "classification:classes": [
            {"value": int(r), "name": r.name.lower(), "description": REASONS[r].capitalize()} for r in Reason
        ],
    },
    "ground": {
        "name": "ground",
        "data_type": "uint8",
        "nodata": 0,
        "classification:bitfields": _bitfields(),
    },
}


def inventory_item(
    lineage: Lineage,
    *,
    geobox: GeoBox,
    assets: Mapping[str, Path],
    at: Path,
    footprint: BaseGeometry | None = None,
    network: Path | None = None,
) -> pystac.Item:
    """Describe an inventory as one STAC 1.1 item; nothing is written.

    assets : key -> file or Zarr folder, there already; at : where the item will lie, to which hrefs are relative
    footprint : area of interest, longitude and latitude, split at the antimeridian as RFC 7946 asks; left out, it is
        the outline of the grid's pixels; network : item of the network that detected, None for a rule
    """
    shape = outline_lonlat(geobox) if footprint is None else footprint
    item = pystac.Item(
        id=lineage.name,
        geometry=shapely.geometry.mapping(shape),
        bbox=bbox_lonlat(shape),
        datetime=None,
        start_datetime=min(_midnight((e.pre or e.post).start) for e in lineage.epochs),
        end_datetime=max(_midnight(e.post.end) + dt.timedelta(days=1, seconds=-1) for e in lineage.epochs),
        properties=_properties(lineage, geobox),
        stac_extensions=list(EXTENSIONS),
    )
    for key, path in sorted(assets.items()):
        item.add_asset(key, _asset(key, path, at))
    for scene in lineage.scenes:
        if scene.href:
            item.add_link(
                pystac.Link("derived_from", scene.href, media_type=pystac.MediaType.GEOJSON, title=scene.id)
            )
    if network is not None:  # so that MLM asks to be told of
        href = Path(os.path.relpath(network, at.parent)).as_posix()
        item.add_link(
            pystac.Link("derived_from", href, media_type=pystac.MediaType.GEOJSON, title=network.stem)
        )
    item.set_self_href(str(at))
    return item


def item_text(item: pystac.Item) -> str:
    """JSON of an item with relative hrefs and no address of this machine, the same for the same item."""
    import json  # noqa: PLC0415

    body = item.to_dict(include_self_link=False, transform_hrefs=False)
    return json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def outline_lonlat(geobox: GeoBox) -> BaseGeometry:
    """Outline of a GeoBox in longitude and latitude, split where it crosses the antimeridian."""
    dense = shapely.segmentize(shapely.box(*geobox.boundingbox.bbox), OUTLINE_STEP_M)
    to = pyproj.Transformer.from_crs(str(geobox.crs), "EPSG:4326", always_xy=True)
    lon, lat = to.transform(*shapely.get_coordinates(dense).T)
    turned = np.column_stack((np.rad2deg(np.unwrap(np.deg2rad(lon))), lat)).round(7)
    ring = shapely.Polygon(turned)
    if ring.bounds[0] >= -180 and ring.bounds[2] <= 180:
        return shapely.orient_polygons(ring)
    world = shapely.box(-180, -90, 180, 90)
    turns = [shapely.affinity.translate(ring, xoff=shift).intersection(world) for shift in (-360, 0, 360)]
    pieces = [piece for piece in shapely.get_parts(np.array(turns, dtype=object)) if piece.area > 0]
    return shapely.orient_polygons(shapely.MultiPolygon(pieces))


def bbox_lonlat(shape: BaseGeometry) -> list[float]:
    """Bounding box as RFC 7946 section 5.2 asks: west is above east when the antimeridian lies between."""
    west, south, east, north = shape.bounds
    if east - west > 180:
        parts = shapely.bounds(shapely.get_parts(shape))
        west = float(parts[parts[:, 0] > 0, 0].min())
        east = float(parts[parts[:, 2] < 0, 2].max())
    return [west, south, east, north]


def multihash(path: Path) -> str:
    """SHA-256 of a file as a multihash in hex, as the STAC file extension asks."""
    with path.open("rb") as file:
        return "1220" + hashlib.file_digest(file, "sha256").hexdigest()


def _properties(lineage: Lineage, geobox: GeoBox) -> dict[str, Any]:
    crs, a = geobox.crs, geobox.affine
    assert crs is not None
    simulated = " SIMULATED data." if lineage.simulated else ""
    return {
        "title": f"Landslide inventory {lineage.name}",
        "description": f"Landslides mapped by {lineage.model_name} from satellite data. "
        f"Not reviewed by a person.{simulated}",
        "created": lineage.created.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "unreviewed": True,
        "simulated": lineage.simulated,
        "license": "other",
        "gsd": abs(a.a),
        "proj:code": None if crs.epsg is None else f"EPSG:{crs.epsg}",
        "proj:wkt2": pyproj.CRS.from_user_input(str(crs)).to_wkt(),
        "proj:shape": list(geobox.shape),
        "proj:transform": [a.a, a.b, a.c, a.d, a.e, a.f],
        "proj:bbox": list(geobox.boundingbox.bbox),
        "processing:level": "L4",
        "processing:software": {"slidecube": lineage.version},
        "processing:lineage": _story(lineage),
        "slidecube:run": lineage.run,
        "slidecube:grid": lineage.grid,
        "slidecube:epochs": [
            {
                "name": e.name,
                "pre": None if e.pre is None else _ends(e.pre.start, e.pre.end),
                **(
                    {"pre_spans": [_ends(s.start, s.end) for s in e.pre.spans]}
                    if e.pre and e.pre.parts
                    else {}
                ),
                "post": _ends(e.post.start, e.post.end),
            }
            for e in lineage.epochs
        ],
        "slidecube:model": dict(lineage.model),
        "slidecube:keys": dict(lineage.keys),
        "slidecube:scenes": [
            {"id": s.id, "source": s.source, "datetime": s.datetime and s.datetime.isoformat(), "use": s.use}
            for s in lineage.scenes
        ],
        "slidecube:dem": lineage.dem,
        "slidecube:sources": [asdict(entry) for entry in lineage.sources],
        "slidecube:substituted": [asdict(entry) for entry in lineage.substituted],
        "slidecube:licences": dict(lineage.licences),
        "slidecube:attributions": list(lineage.attributions),
    }


def _story(lineage: Lineage) -> str:
    n = len(lineage.substituted)
    elsewhere = f" {n} of their assets were read from another source, with the same pixels." if n else ""
    windows = "; ".join(
        f"epoch {e.name}: "
        + (" and ".join(f"{s.start} to {s.end}" for s in e.pre.spans) + " against " if e.pre else "")
        + f"{e.post.start} to {e.post.end}"
        for e in lineage.epochs
    )
    return (
        f"{sum(scene.image for scene in lineage.scenes)} scenes, composited by window ({windows}), "
        f"classified by {lineage.model_name}, joined into objects by slidecube {lineage.version}.{elsewhere}"
    )


def _asset(key: str, path: Path, at: Path) -> pystac.Asset:
    extra: dict[str, Any] = {}
    if path.is_file():
        extra = {"file:size": path.stat().st_size, "file:checksum": multihash(path)}
    roles = ["data"]
    band = _BANDS.get(key.rpartition("/")[2])
    if path.suffix == ".tif" and band is not None:
        extra["bands"] = [band]
    if path.suffix in {".parquet", ".gpkg"}:
        extra["table:primary_geometry"] = "geometry" if path.suffix == ".parquet" else "geom"
        extra["table:columns"] = [
            {"name": name, "type": c.dtype, "description": c.description + (f" [{c.unit}]" if c.unit else "")}
            for name, c in (SHIFT_SCHEMA if key == "shifts" else SCHEMA).items()
        ]
    if path.suffix == ".html":
        roles = ["overview"]
    if path.suffix == ".png":
        roles = ["thumbnail"]
    title = _TITLES.get(key, key.replace("/", ", "))
    return pystac.Asset(
        href=Path(os.path.relpath(path, at.parent)).as_posix(),
        title=title,
        media_type=MEDIA_TYPES.get(path.suffix),
        roles=roles,
        extra_fields=extra,
    )


def _midnight(day: dt.date) -> dt.datetime:
    return dt.datetime.combine(day, dt.time(), dt.UTC)


def _ends(start: dt.date, end: dt.date) -> list[str]:
    return [start.isoformat(), end.isoformat()]
