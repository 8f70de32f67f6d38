"""Lazy cubes from scenes, read block by block on the grid's lattice, by odc-stac.

A warp depends on the block it is run for, so every read here is run for a whole block of the lattice, whatever
window is asked for: two overlapping windows see the same pixels (ADR 2, ADR 5).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pystac
import rasterio
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.loader import RioDriver
from odc.loader._rio import RioReader
from odc.loader.types import RasterLoadParams, RasterSource, ReaderSubsetSelection
from odc.stac import load as odc_load
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from slidecube.catalog.errors import AssetReadError, CatalogError
from slidecube.catalog.grid import BLOCK_PX
from slidecube.catalog.scenes import Scene
from slidecube.catalog.sources import REFLECTANCE_BANDS, asset_bands, sign_href
from slidecube.catalog.zoom import magnification, on_binary_grid, read_magnified

DTYPES: Mapping[str, str] = {"SCL": "uint8", "elevation": "float32"}
"""Band -> dtype as delivered; every other band is uint16."""

NODATA: Mapping[str, float] = {"elevation": float("nan")}
"""Band -> fill value of a loaded cube; 0 for every other band."""

RESAMPLING: Mapping[str, str] = {"SCL": "nearest", "*": "bilinear"}
"""Band -> kernel used where a band's pixels are not those of the grid (20 and 60 m bands, or another CRS)."""

# these log a failed or repeated href as it is, signature included; our error names item and asset instead
for _name in ("odc.loader._rio", "rasterio._env", "rasterio._err"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

_READ_ATTEMPTS = 3
_WHOLE = ("uint8", "uint16")

_GDAL_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MAX_RETRY": "5",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
}


@dataclass(slots=True)
class ReadLog:
    """What was really read, and what could not be; filled by the readers of one process, from any thread.

    read : ids of scenes of which at least one asset was opened
    lost : (scene id, asset, reason) of each asset that failed on at least one block
    """

    read: set[str] = field(default_factory=set)
    lost: set[tuple[str, str, str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_read(self, scene: str) -> None:
        """Count a scene as read."""
        with self._lock:
            self.read.add(scene)

    def add_lost(self, error: AssetReadError) -> None:
        """Keep the name and the reason of a failed read."""
        with self._lock:
            self.lost.add((error.item, error.asset, error.reason))


def load(
    scenes: Iterable[Scene | dict[str, Any] | pystac.Item],
    geobox: GeoBox,
    bands: Sequence[str],
    *,
    resampling: Mapping[str, str] | None = None,
    block_px: int = BLOCK_PX,
    log: ReadLog | None = None,
) -> xr.Dataset:
    """Load scenes as one lazy cube of raw digital numbers.

    scenes : Scene records, STAC items, or their dicts; one step of time each, in the order given
    geobox : the pixels wanted; exactly these are returned
    bands : canonical names, such as "B04", "SCL", "elevation"
    resampling : band -> kernel, over `RESAMPLING`
    block_px : side of the lattice's blocks; the read, and each Dask chunk, is one block with all its dates
    log : given, a failed read leaves nodata in its block and is written down there; left out, it raises

    Returns (time, y, x) uint16 a band (SCL uint8, elevation float32), 0 (NaN) = nodata, with the coordinates
    `time` (UTC) and `scene` (item id).
    Raises CatalogError for an unknown band or no scenes, and, when computed without a log, AssetReadError.
    """
    records = [_slim(scene, bands) for scene in scenes]
    if not records:
        raise CatalogError("No scenes to load; widen the window or raise max_cloud_pct")
    blocks, crop = on_lattice(geobox, block_px)
    names = {uri: name for record in records for uri, name in record.names.items()}
    with rasterio.Env(**_GDAL_OPTIONS):
        cube = odc_load(
            [record.item for record in records],
            bands=list(bands),
            geobox=blocks,
            groupby="id",
            preserve_original_order=True,
            resampling={band: _kernel(band, resampling) for band in bands},
            chunks={"time": -1, "y": block_px, "x": block_px},
            driver=_NamingDriver(names, log),
            stac_cfg={_COLLECTION: {"assets": _band_types(bands)}},
        )
    y, x = blocks.dimensions  # latitude and longitude in a geographic CRS
    cube = cube.isel({y: crop[0], x: crop[1]})
    return cube.assign_coords(scene=("time", [record.id for record in records]))


_COLLECTION = "slidecube"


@dataclass(frozen=True, slots=True)
class _Record:
    id: str
    item: pystac.Item
    names: dict[str, _AssetName]


@dataclass(frozen=True, slots=True)
class _AssetName:
    item: str
    asset: str
    source: str


def _slim(scene: Scene | dict[str, Any] | pystac.Item, bands: Sequence[str]) -> _Record:
    """Reduce a scene to what the reader needs: the wanted assets under their canonical names."""
    unknown = [band for band in bands if band not in {*REFLECTANCE_BANDS, *DTYPES}]
    if unknown:
        raise CatalogError(
            f"Band {', '.join(unknown)} cannot be loaded; bands: {', '.join((*REFLECTANCE_BANDS, *DTYPES))}"
        )
    if isinstance(scene, Scene):
        item, source, assets = scene.item, scene.source, scene.bands
    else:
        item = scene if isinstance(scene, dict) else scene.to_dict(transform_hrefs=False)
        source, assets = "", asset_bands(item)
    missing = [band for band in bands if band not in assets]
    if missing:
        raise CatalogError(
            f"Item {item['id']!r} has no band {', '.join(missing)}; it has: {', '.join(sorted(assets)) or 'none'}"
        )
    wanted = {band: item["assets"][assets[band]] for band in bands}
    names = {
        _absolute(asset["href"]): _AssetName(item["id"], assets[band], source)
        for band, asset in wanted.items()
    }
    keep = {k: v for k, v in item["properties"].items() if k.startswith("proj:") or k == "datetime"}
    slim = {
        "type": "Feature",
        "stac_version": item.get("stac_version", "1.0.0"),
        "stac_extensions": [e for e in item.get("stac_extensions", []) if "/projection/" in e],
        "id": item["id"],
        "collection": _COLLECTION,
        "geometry": item["geometry"],
        "bbox": item.get("bbox"),
        "properties": {**keep, "datetime": _datetime_of(item)},
        "links": [],
        "assets": {
            band: {
                "href": _absolute(asset["href"]),
                "type": asset.get("type", "image/tiff"),
                "roles": ["data"],
                **{k: v for k, v in asset.items() if k.startswith("proj:")},
            }
            for band, asset in wanted.items()
        },
    }
    return _Record(item["id"], pystac.Item.from_dict(slim, preserve_dict=True), names)


def _datetime_of(item: dict[str, Any]) -> str:
    properties = item["properties"]
    return str(properties.get("datetime") or properties.get("start_datetime") or "1970-01-01T00:00:00Z")


def _absolute(href: str) -> str:
    return href.removeprefix("file://")


def _band_types(bands: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {band: {"data_type": DTYPES.get(band, "uint16"), "nodata": NODATA.get(band, 0)} for band in bands}


def _kernel(band: str, resampling: Mapping[str, str] | None) -> str:
    table = {**RESAMPLING, **(resampling or {})}
    return table.get(band, table["*"])


def on_lattice(geobox: GeoBox, block_px: int) -> tuple[GeoBox, tuple[slice, slice]]:
    """Grow a GeoBox to whole blocks of the lattice, and say where it lies in the grown one.

    The lattice is anchored at the origin of the CRS (the corner of every frame lies on it). A GeoBox whose pixels do
    not fall on multiples of its resolution has no place on the lattice: its own corner is the anchor.
    """
    a = geobox.affine
    row, col = -a.f / abs(a.e), a.c / a.a
    aligned = a.b == a.d == 0 and a.a > 0 > a.e and all(abs(v - round(v)) < 1e-6 for v in (row, col))
    before = (round(row) % block_px, round(col) % block_px) if aligned else (0, 0)
    rows, cols = (-(-(n + b) // block_px) * block_px for n, b in zip(geobox.shape, before, strict=True))
    grown = GeoBox((rows, cols), a @ Affine.translation(-before[1], -before[0]), geobox.crs)
    crop = tuple(slice(b, b + n) for n, b in zip(geobox.shape, before, strict=True))
    return grown, (crop[0], crop[1])


class _NamingDriver(RioDriver):
    """odc-loader's rasterio driver that signs hrefs when they are read and names item and asset when that fails."""

    def __init__(self, names: Mapping[str, _AssetName], log: ReadLog | None) -> None:
        super().__init__()
        self._names = names
        self._log = log

    def open(self, src: RasterSource, ctx: Any) -> _NamingReader:
        return _NamingReader(src, ctx, self._names[src.uri], self._log)


class _NamingReader(RioReader):
    """Reader of one asset; see `_NamingDriver`."""

    def __init__(self, src: RasterSource, ctx: Any, name: _AssetName, log: ReadLog | None) -> None:
        super().__init__(src, ctx)
        self._name, self._log = name, log

    def read(
        self,
        cfg: RasterLoadParams,
        dst_geobox: GeoBox,
        *,
        dst: np.ndarray | None = None,
        selection: ReaderSubsetSelection | None = None,
    ) -> tuple[tuple[slice, slice], np.ndarray]:
        del dst, selection  # odc-loader gives neither for two-dimensional bands
        try:
            found = self._read(cfg, dst_geobox)
        except (rasterio.errors.RasterioError, OSError) as error:
            failure = AssetReadError(self._name.item, self._name.asset, _one_line(error))
            if self._log is None:
                raise failure from None
            self._log.add_lost(failure)
            return np.s_[0:0, 0:0], np.empty((0, 0), cfg.dtype)
        if self._log is not None:
            self._log.add_read(self._name.item)
        return found

    def _read(self, cfg: RasterLoadParams, geobox: GeoBox) -> tuple[tuple[slice, slice], np.ndarray]:
        for attempt in range(1, _READ_ATTEMPTS + 1):
            src = self._src.patch(uri=sign_href(self._src.uri, self._name.source))
            try:
                with rasterio.open(src.uri, sharing=False, driver=driver_of(src.uri)) as asset:
                    return np.s_[0 : geobox.shape[0], 0 : geobox.shape[1]], _onto(
                        asset, src.band, cfg, geobox
                    )
            except (rasterio.errors.RasterioError, OSError):
                # a local file that is broken stays broken; a remote one may only be busy
                if attempt == _READ_ATTEMPTS or not self._src.uri.startswith(
                    ("http://", "https://", "s3://")
                ):
                    raise
                time.sleep(0.5 * 2**attempt)
        raise AssertionError


def driver_of(href: str) -> str:
    """GDAL driver that opens an asset: GeoTIFF, or JPEG 2000 by its ending, and no other.

    Left to itself GDAL goes by the content, and some formats follow addresses in it: a hostile catalogue could have
    this machine's own files read.
    """
    return "JP2OpenJPEG" if urlsplit(href).path.lower().endswith(".jp2") else "GTiff"


def _onto(asset: rasterio.DatasetReader, band: int, cfg: RasterLoadParams, geobox: GeoBox) -> np.ndarray:
    """Read an asset onto a block: by copying or magnifying where its pixels allow, else by a warp as gdalwarp's.

    odc-loader would hand GDAL a source window cut to the block; GDAL's automatic kernel then gets another width than
    over the whole source, and the pixels of a neighbouring zone differ from every other tool's.
    """
    nodata = asset.nodata if asset.nodata is not None else cfg.src_nodata_fallback
    fill = cfg.fill_value if cfg.fill_value is not None else nodata
    factor = magnification(asset, geobox)
    exact = (
        factor == 1
        or cfg.resampling == "nearest"
        or (factor == 2 and asset.dtypes[band - 1] in _WHOLE and on_binary_grid(asset))
    )
    # a DEM that declares no nodata still has none beyond its edge: a height of 0 there would hide the next tile's
    outside = fill if nodata is None else nodata
    holds = outside is None or not np.isnan(outside) or np.dtype(asset.dtypes[band - 1]).kind == "f"
    if factor is not None and exact and holds:
        read = read_magnified(asset, band, geobox, factor=factor, kernel=cfg.resampling, nodata=outside)
        return _with_nodata(read.astype(cfg.dtype, copy=False), outside, fill)
    with WarpedVRT(
        asset,
        crs=str(geobox.crs),
        transform=geobox.affine,
        width=geobox.shape[1],
        height=geobox.shape[0],
        resampling=Resampling[cfg.resampling],
        src_nodata=nodata,
        nodata=fill,
        dtype=cfg.dtype,
    ) as warped:
        pixels: np.ndarray = warped.read(band)
        return pixels


def _with_nodata(pixels: np.ndarray, nodata: float | None, fill: float | None) -> np.ndarray:
    """Replace the source's nodata by the cube's."""
    if nodata is None or fill is None or nodata == fill or (np.isnan(nodata) and np.isnan(fill)):
        return pixels
    pixels[np.isnan(pixels) if np.isnan(nodata) else pixels == nodata] = fill
    return pixels


def _one_line(error: Exception) -> str:
    """Say a reader's error in one line, without query strings (they hold signatures)."""
    cause = error.__cause__ or error
    return re.sub(r"\?[^\s'\"]*", "", " ".join(str(cause).split()))[:300]
