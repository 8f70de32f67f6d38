"""Rasters that a user names: a file by its address, or the items of any STAC catalogue, as scenes of one layer.

They stand in the frozen scene list beside the satellites' scenes, so that a tile is keyed, retried and told of alike.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import rasterio
import shapely
from rasterio.warp import transform_bounds
from shapely.geometry.base import BaseGeometry

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.errors import CatalogError
from slidecube.catalog.items import remote_href
from slidecube.catalog.read import Place, PlaceReadError, with_opened
from slidecube.catalog.scenes import Alternate, Scene, Window
from slidecube.catalog.search import find
from slidecube.catalog.sources import find_source

_ASK_TIMEOUT_S = 20.0
_BEYOND_DEG = 2.0  # coarse pixels reach beyond the antimeridian
_VALIDATORS = ("ETag", "Last-Modified", "Content-Length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a raster says of itself.

    crs : None = none; bounds : left, bottom, right, top in it; shape : rows, columns
    scale, offset : of the band, by which its numbers become values; bands : how many it has
    """

    crs: str | None
    epsg: int | None
    bounds: tuple[float, float, float, float]
    shape: tuple[int, int]
    dtype: str
    bands: int
    scale: float
    offset: float
    tags: dict[str, str]


def read_header(href: str, *, source: str = "", band: int = 1) -> Header:
    """Read what a raster says of one of its bands.

    Raises CatalogError where it cannot be opened, or has no such band.
    """

    def said(file: rasterio.DatasetReader) -> Header:
        at = min(band, file.count) - 1
        return Header(
            crs=file.crs.to_wkt() if file.crs else None,
            epsg=_horizontal_epsg(file.crs.to_wkt()) if file.crs else None,
            bounds=tuple(file.bounds),
            shape=file.shape,
            dtype=file.dtypes[at],
            bands=file.count,
            scale=float(file.scales[at]),
            offset=float(file.offsets[at]),
            tags={str(k): str(v) for k, v in file.tags().items()},
        )

    try:
        header = with_opened(Place(href=href, source=source), said)
    except PlaceReadError as error:
        raise CatalogError(f"{href!r} cannot be read: {error}") from None
    if band > header.bands:
        raise CatalogError(f"{href!r} has no band {band}; it has 1 to {header.bands}")
    return header


def _horizontal_epsg(wkt: str) -> int | None:
    """Code of a CRS, without its heights."""
    crs = pyproj.CRS.from_wkt(wkt)
    code = (crs.sub_crs_list[0] if crs.is_compound else crs).to_epsg()
    return None if code is None else int(code)


def find_rasters(
    source: str, aoi: Aoi, *, name: str, asset: str, year: int | None = None
) -> tuple[Scene, ...]:
    """Find the items of a layer in a STAC catalogue over an area.

    source : as `find_source` takes it; name : of the layer; asset : key of the asset that is read
    year : of the items that are taken, by their (start) datetime
    Returns them newest first: where two overlap, the first one that has a value counts.
    Raises CatalogError where there are none, none has the asset, or they are of several years and none was chosen.
    """
    where = replace(find_source(source, kind="layer"), bands={name: asset})
    windows = [Window(start=dt.date(year, 1, 1), end=dt.date(year, 12, 31))] if year else None
    found = find(where, aoi, windows, role="layer")
    own = [scene for scene in found.scenes if scene.bands.get(name) == asset]
    if not own:
        what = f"with an asset {asset!r}" + (f" of {year}" if year else "")
        others = found.counts["partial"] + len(found.scenes)
        held = f"; {others} others have no such asset: name theirs as asset" if others else ""
        raise CatalogError(f"Source {source!r} has no item {what} over {aoi.name!r}{held}")
    years = sorted({scene.datetime.year for scene in own})
    if year is None and len(years) > 1:
        raise CatalogError(
            f"Source {source!r} has items of the years {', '.join(map(str, years))} over {aoi.name!r}; choose one with "
            "year"
        )
    kept = [
        replace(scene, identity=f"{name}/{scene.identity}", bands={name: asset}, offset=None) for scene in own
    ]
    return tuple(kept)


def dem_scene(href: str, aoi: Aoi, *, measured: dt.date | None = None, vertical_datum: str = "") -> Scene:
    """Make the one scene of a DEM that is a single file, such as a country's LiDAR heights.

    measured : day on which its heights were measured; left out, what the file's own tag says
    vertical_datum : left out, that of the file's CRS
    Raises CatalogError as `raster_scene`, and where its band holds no heights.
    """
    scene = raster_scene(href, aoi, name="elevation")
    header = read_header(scene.item["assets"]["data"]["href"])
    if np.dtype(header.dtype).kind not in "iuf":
        raise CatalogError(
            f"{href!r} holds {header.dtype}, and heights are real numbers; give the DEM's file"
        )
    if (header.scale, header.offset) != (1.0, 0.0):
        raise CatalogError(
            f"{href!r} holds scaled numbers (x {header.scale:g} + {header.offset:g}); write metres, as with "
            "gdal_translate -unscale"
        )
    day = measured or _day_of(header.tags)
    datum = vertical_datum or _vertical_datum(header)
    when = dt.datetime.combine(day or dt.date(1970, 1, 1), dt.time(), dt.UTC)
    properties = {
        **scene.item["properties"],
        "datetime": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
        **({"slidecube:vertical_datum": datum} if datum else {}),
    }
    return replace(
        scene,
        role="dem",
        source=href,
        datetime=when,
        identity="dem",
        item={**scene.item, "properties": properties},
    )


def _day_of(tags: dict[str, str]) -> dt.date | None:
    """Day of a TIFF's own tag."""
    try:
        return dt.datetime.strptime(tags["TIFFTAG_DATETIME"][:10], "%Y:%m:%d").replace(tzinfo=dt.UTC).date()
    except (KeyError, ValueError):
        return None


def _vertical_datum(header: Header) -> str:
    crs = pyproj.CRS.from_user_input(header.crs)
    parts = crs.sub_crs_list if crs.is_compound else []
    return next((part.name for part in parts if part.is_vertical), "")


def raster_scene(
    href: str, aoi: Aoi, *, name: str, band: int = 1, mirrors: Sequence[str] = (), year: int | None = None
) -> Scene:
    """Make the one scene of a layer that is a single file.

    href : an absolute path, or http, https or s3; mirrors : where else the same file lies
    Its version is its content: a moved file is the same, a changed one is not. Of a remote one it is what the server
    and the file's header say.
    Raises CatalogError where the file is missing, has no CRS, or covers nothing of the area.
    """
    places = [_placed(text, name) for text in (href, *mirrors)]
    header = read_header(places[0], band=band)
    if header.crs is None:
        raise CatalogError(
            f"{href!r} has no CRS, so nobody knows where it lies; write one, as with gdal_edit.py -a_srs EPSG:..."
        )
    footprint = _footprint(header, aoi, href)
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": f"{name}-{Path(places[0]).name}"[:200],
        "collection": "",
        "geometry": shapely.geometry.mapping(footprint),
        "bbox": list(footprint.bounds),
        "properties": {
            "datetime": f"{year or 1970:04d}-01-01T00:00:00Z",
            **({"proj:epsg": header.epsg, "proj:code": f"EPSG:{header.epsg}"} if header.epsg else {}),
        },
        "links": [],
        "assets": {"data": {"href": places[0], "type": "image/tiff"}},
    }
    version = _version(places[0], header)
    return Scene(
        id=str(item["id"]),
        role="layer",
        source="",
        datetime=dt.datetime(year or 1970, 1, 1, tzinfo=dt.UTC),
        identity=name,
        datatake="",
        version=version,
        offset=None,
        bands={name: "data"},
        item=item,
        alternates=tuple(
            Alternate(source="mirror", id=str(item["id"]), version=version, offset=None, hrefs={name: place})
            for place in places[1:]
        ),
    )


def _placed(href: str, name: str) -> str:
    if "://" in href:
        return remote_href(href, f"of layer {name!r}")
    if not Path(href).is_file():
        raise CatalogError(f"{href!r} is no file; give the path or the address of a raster")
    return href


def _footprint(header: Header, aoi: Aoi, href: str) -> BaseGeometry:
    """What of the area a raster covers, in longitude and latitude; a whole globe has no outline that could be drawn."""
    area = aoi.to_crs("EPSG:4326")
    try:
        west, south, east, north = transform_bounds(header.crs, "EPSG:4326", *header.bounds, densify_pts=33)
    except rasterio.errors.CRSError:
        return area
    if not np.isfinite([west, south, east, north]).all():
        return area
    boxes = (
        [shapely.box(west, south, east, north)]
        if west <= east
        else [shapely.box(west, south, 180, north), shapely.box(-180, south, east, north)]
    )
    if east > 180 + _BEYOND_DEG:
        raise CatalogError(
            f"{href!r} counts its longitudes from {west:g} to {east:g}; write it from -180 to 180, as with gdalwarp "
            "-te -180 -90 180 90 --config CENTER_LONG 0"
        )
    covered = shapely.intersection(area, shapely.union_all(boxes))
    if shapely.area(covered) == 0:
        raise CatalogError(
            f"{href!r} covers nothing of {aoi.name!r}: it lies from {west:.3f} to {east:.3f} east and from {south:.3f} "
            f"to {north:.3f} north"
        )
    return shapely.union_all([part for part in shapely.get_parts(covered) if shapely.area(part) > 0])


def _version(href: str, header: Header) -> str:
    """Tell one content from another."""
    if "://" not in href:
        with Path(href).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    said: list[Any] = [
        href,
        header.crs,
        header.bounds,
        header.shape,
        header.dtype,
        sorted(header.tags.items()),
    ]
    text = json.dumps([*said, _validators(href)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _validators(href: str) -> list[str]:
    """What a web server says of a file's content, without sending it."""
    if not href.startswith(("http://", "https://")):
        return []
    request = urllib.request.Request(href, method="HEAD")  # noqa: S310  http and https only
    try:
        with urllib.request.urlopen(request, timeout=_ASK_TIMEOUT_S) as answer:  # noqa: S310
            return [answer.headers.get(name) or "" for name in _VALIDATORS]
    except (OSError, HTTPException, urllib.error.URLError):
        return []  # some servers answer no HEAD; the header's own words stay
