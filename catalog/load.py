"""Lazy cubes from scenes, read block by block on the grid's lattice, laid out by odc-stac or by stackstac.

A warp depends on the block it is run for, so every read here is run for a whole block of the lattice, whatever
window is asked for: two overlapping windows see the same pixels (ADR 2, ADR 5). Both loaders read pixels by
`read_asset` and ask one rule which scene touches which block, so their cubes are equal (ADR 6).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import pystac
import rasterio
import xarray as xr
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox, GeoboxTiles
from odc.geo.xr import xr_coords
from odc.loader import RioDriver
from odc.loader._rio import RioReader
from odc.loader.types import RasterLoadParams, RasterSource, ReaderSubsetSelection
from odc.stac import load as odc_load
from odc.stac import parse_item
from rasterio.enums import Resampling

from slidecube.catalog.errors import CatalogError
from slidecube.catalog.grid import BLOCK_PX
from slidecube.catalog.read import Asset, Pixels, Place, ReadLog, read_asset
from slidecube.catalog.scenes import Scene
from slidecube.catalog.sources import RADAR_BANDS, REFLECTANCE_BANDS, asset_bands

__all__ = [
    "DTYPES",
    "LOADERS",
    "NODATA",
    "RESAMPLING",
    "Loader",
    "ReadLog",
    "load",
    "on_lattice",
    "require_loader",
]

DTYPES: Mapping[str, str] = {
    "SCL": "uint8",
    "CLD": "uint8",
    "elevation": "float32",
    **dict.fromkeys(RADAR_BANDS, "float32"),
}
"""Band -> dtype as delivered; every other band is uint16."""

NODATA: Mapping[str, float] = dict.fromkeys(("elevation", *RADAR_BANDS), float("nan"))
"""Band -> fill value of a loaded cube; 0 for every other band."""

RESAMPLING: Mapping[str, str] = {"SCL": "nearest", "CLD": "nearest", "*": "bilinear"}
"""Band -> kernel used where a band's pixels are not those of the grid (20 and 60 m bands, or another CRS)."""

# this one logs a failed href as it is, signature included; our error names item and asset instead
logging.getLogger("odc.loader._rio").setLevel(logging.CRITICAL + 1)

Loader = Literal["odc-stac", "stackstac"]

LOADERS: tuple[Loader, ...] = ("odc-stac", "stackstac")
"""Programs that lay out a cube; the first is the default. The pixels are equal, read by one function (ADR 6)."""


def load(
    scenes: Iterable[Scene | dict[str, Any] | pystac.Item],
    geobox: GeoBox,
    bands: Sequence[str],
    *,
    resampling: Mapping[str, str] | None = None,
    block_px: int = BLOCK_PX,
    log: ReadLog | None = None,
    loader: Loader = "odc-stac",
) -> xr.Dataset:
    """Load scenes as one lazy cube of raw digital numbers.

    scenes : Scene records, STAC items, or their dicts; one step of time each, in the order given
    geobox : the pixels wanted; exactly these are returned
    bands : canonical names, such as "B04", "SCL", "elevation"
    resampling : band -> kernel, over `RESAMPLING`
    block_px : side of the lattice's blocks; the read, and each Dask chunk, is one block with all its dates
    log : given, a failed read leaves nodata in its block and is written down there; left out, it raises
    loader : of `LOADERS`; the cubes are equal, pixel for pixel and coordinate for coordinate

    Returns (time, y, x) uint16 a band (SCL, CLD uint8; elevation and radar bands float32), 0 (NaN) = nodata, with the
    coordinates `time` (UTC) and `scene` (item id).
    Raises CatalogError for an unknown band or loader, no scenes, or a grid that the loader does not know, and, when
    computed without a log, AssetReadError.
    """
    records = [_slim(scene, bands) for scene in scenes]
    if not records:
        raise CatalogError("No scenes to load; widen the window or raise max_cloud_pct")
    require_loader(loader, str(geobox.crs))
    blocks, crop = on_lattice(geobox, block_px)
    pixels = {band: _pixels(band, resampling) for band in bands}
    lay_out = _by_odc_stac if loader == "odc-stac" else _by_stackstac
    cube = lay_out(records, blocks, pixels, block_px=block_px, log=log)
    y, x = blocks.dimensions  # latitude and longitude in a geographic CRS
    cube = cube.isel({y: crop[0], x: crop[1]})
    return cube.assign_coords(scene=("time", [record.id for record in records]))


def require_loader(loader: str, crs: str) -> None:
    """Refuse a loader that does not exist or cannot lay out a grid in a CRS.

    Raises CatalogError.
    """
    if loader not in LOADERS:
        raise CatalogError(f"Loader {loader!r} does not exist; loaders: {', '.join(LOADERS)}")
    if loader == "stackstac" and CRS(crs).epsg is None:
        name = " ".join(crs.split())[:80]
        raise CatalogError(
            f"Loader 'stackstac' knows a CRS by its EPSG code only, and {name!r} has none; use loader 'odc-stac', or a "
            "grid with a code, such as 'EPSG:32632'"
        )


_COLLECTION = "slidecube"
_DN_OF_REFLECTANCE = 10_000  # digital numbers of reflectance 1, of every Sentinel-2 product


@dataclass(frozen=True, slots=True)
class _Record:
    """A scene as the loaders take it: a slim item whose assets are the wanted bands, and what each of them is."""

    id: str
    item: pystac.Item
    assets: dict[str, Asset]


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
    named = {
        band: Asset(
            item=item["id"],
            asset=assets[band],
            places=(Place(href=_absolute(asset["href"]), source=source), *_other_places(scene, band)),
        )
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
    return _Record(item["id"], pystac.Item.from_dict(slim, preserve_dict=True), named)


def _other_places(scene: Scene | dict[str, Any] | pystac.Item, band: str) -> Iterator[Place]:
    """Yield where else a band of a scene lies, and what makes its digital numbers those of the scene."""
    if not isinstance(scene, Scene):
        return
    for other in scene.alternates:
        if band not in other.hrefs:
            continue
        shift = 0
        if band in REFLECTANCE_BANDS:
            if scene.offset is None or other.offset is None:
                continue
            shift = round((other.offset.value - scene.offset.value) * _DN_OF_REFLECTANCE)
        yield Place(href=_absolute(other.hrefs[band]), source=other.source, shift_dn=shift)


def _datetime_of(item: dict[str, Any]) -> str:
    properties = item["properties"]
    return str(properties.get("datetime") or properties.get("start_datetime") or "1970-01-01T00:00:00Z")


def _absolute(href: str) -> str:
    return href.removeprefix("file://")


def _band_types(bands: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {band: {"data_type": DTYPES.get(band, "uint16"), "nodata": NODATA.get(band, 0)} for band in bands}


def _pixels(band: str, resampling: Mapping[str, str] | None) -> Pixels:
    table = {**RESAMPLING, **(resampling or {})}
    fill = NODATA.get(band, 0)
    return Pixels(
        dtype=DTYPES.get(band, "uint16"),
        kernel=table.get(band, table["*"]),
        # Sentinel's 0 is nodata whether a file says so or not: some providers' do not, and a warp would blend it
        nodata=None if band == "elevation" else 0,
        fill=fill,
        positive=band in RADAR_BANDS,
    )


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


# --- odc-stac ------------------------------------------------------------------------------------------------------


def _by_odc_stac(
    records: Sequence[_Record],
    blocks: GeoBox,
    pixels: Mapping[str, Pixels],
    *,
    block_px: int,
    log: ReadLog | None,
) -> xr.Dataset:
    """Let odc-stac lay out the cube; our driver reads the blocks."""
    assets = {
        asset.places[0].href: (asset, pixels[band])
        for record in records
        for band, asset in record.assets.items()
    }
    return odc_load(
        [record.item for record in records],
        bands=list(pixels),
        geobox=blocks,
        groupby="id",
        preserve_original_order=True,
        resampling={band: how.kernel for band, how in pixels.items()},
        chunks={"time": -1, "y": block_px, "x": block_px},
        driver=_NamingDriver(assets, log),
        stac_cfg={_COLLECTION: {"assets": _band_types(list(pixels))}},
    )


class _NamingDriver(RioDriver):
    """odc-loader's rasterio driver that reads by `read_asset`."""

    def __init__(self, assets: Mapping[str, tuple[Asset, Pixels]], log: ReadLog | None) -> None:
        super().__init__()
        self._assets = assets
        self._log = log

    def open(self, src: RasterSource, ctx: Any) -> _NamingReader:
        return _NamingReader(src, ctx, *self._assets[src.uri], log=self._log)


class _NamingReader(RioReader):
    """Reader of one asset; see `_NamingDriver`."""

    def __init__(
        self, src: RasterSource, ctx: Any, asset: Asset, pixels: Pixels, *, log: ReadLog | None
    ) -> None:
        super().__init__(src, ctx)
        self._asset, self._pixels, self._log = asset, replace(pixels, band=src.band), log

    def read(
        self,
        cfg: RasterLoadParams,
        dst_geobox: GeoBox,
        *,
        dst: np.ndarray | None = None,
        selection: ReaderSubsetSelection | None = None,
    ) -> tuple[tuple[slice, slice], np.ndarray]:
        del dst, selection  # odc-loader gives neither for two-dimensional bands
        found = read_asset(self._asset, dst_geobox, self._pixels, self._log)
        if found is None:
            return np.s_[0:0, 0:0], np.empty((0, 0), cfg.dtype)
        return np.s_[0 : dst_geobox.shape[0], 0 : dst_geobox.shape[1]], found


# --- stackstac -----------------------------------------------------------------------------------------------------


def _by_stackstac(
    records: Sequence[_Record],
    blocks: GeoBox,
    pixels: Mapping[str, Pixels],
    *,
    block_px: int,
    log: ReadLog | None,
) -> xr.Dataset:
    """Let stackstac lay out the cube; our reader reads the blocks.

    stackstac makes the lazy array, its chunks and its time axis. It is told the grid by EPSG code, bounds and
    resolution at once, since a code alone gives it another grid, and each item's extent on that grid, so that nothing
    depends on which spelling of the projection an item carries. Its own reader is not used: it warps each window out
    of one virtual raster of the whole grid, in float and without our nodata.
    """
    import stackstac  # noqa: PLC0415  a second, which whoever loads nothing by it need not spend

    box, a = blocks.boundingbox, blocks.affine
    bounds = (box.left, box.bottom, box.right, box.top)
    epsg = CRS(str(blocks.crs)).epsg
    assert epsg is not None
    items = [_stackable(i, record, epsg, bounds) for i, record in enumerate(records)]
    touched = _touched(records, blocks, block_px)
    cube = {}
    for band, how in pixels.items():
        table = _Table(
            assets=tuple(record.assets[band] for record in records),
            touched=touched,
            blocks=blocks,
            block_px=block_px,
            pixels=how,
            log=log,
        )
        stack = stackstac.stack(
            items,
            assets=[band],
            epsg=epsg,
            resolution=(a.a, -a.e),
            bounds=bounds,
            snap_bounds=False,
            resampling=Resampling[how.kernel],
            chunksize=(-1, 1, block_px, block_px),
            dtype=np.dtype(how.dtype),
            fill_value=np.dtype(how.dtype).type(how.fill),
            rescale=False,
            sortby_date=False,
            xy_coords=False,
            properties=False,
            band_coords=False,
            reader=cast("type[stackstac.reader_protocol.Reader]", partial(_StackReader, table=table)),
        )
        assert stack.shape == (len(records), 1, *blocks.shape)
        cube[band] = stack
    dims = ("time", *blocks.dimensions)
    coords = {**xr_coords(blocks), "time": next(iter(cube.values())).coords["time"].values}
    return xr.Dataset({band: (dims, stack.data[:, 0]) for band, stack in cube.items()}, coords=coords)


def _stackable(
    number: int, record: _Record, epsg: int, bounds: tuple[float, float, float, float]
) -> dict[str, Any]:
    """Return an item as stackstac reads it; the href is the item's number, which our reader looks up."""
    when = record.item.datetime
    assert when is not None
    return {
        "id": record.id,
        "bbox": list(bounds),
        "properties": {"datetime": when.isoformat()},
        "assets": {
            band: {"href": str(number), "proj:epsg": epsg, "proj:bbox": list(bounds)}
            for band in record.assets
        },
    }


def _touched(records: Sequence[_Record], blocks: GeoBox, block_px: int) -> frozenset[tuple[int, int, int]]:
    """Blocks that each scene is read for, by odc-stac's rule, as (scene, row of blocks, column of blocks).

    Beyond an item's outline its file may hold pixels; both loaders must leave out the same.
    """
    tiles = GeoboxTiles(blocks, (block_px, block_px))
    found = set()
    for i, record in enumerate(records):
        outline = parse_item(record.item).safe_geometry(blocks.crs)
        if outline is not None:
            found |= {(i, row, col) for row, col in tiles.tiles(outline)}
    return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """What the readers of one band share.

    assets : by number of the scene; touched : see `_touched`
    """

    assets: tuple[Asset, ...]
    touched: frozenset[tuple[int, int, int]]
    blocks: GeoBox
    block_px: int
    pixels: Pixels
    log: ReadLog | None
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __dask_tokenize__(self) -> str:
        """Name each cube anew: what is read may change, and so may the log that is written into."""
        return self.name


class _StackReader:
    """stackstac's reader protocol for one asset: whole blocks of the lattice, by `read_asset`."""

    def __init__(self, *, table: _Table, url: str, **_: Any) -> None:
        self._table, self._number = table, int(url)

    def read(self, window: rasterio.windows.Window, **_: Any) -> np.ndarray:
        """Read one chunk, which is a block."""
        table = self._table
        rows, cols = window.toslices()
        how = table.pixels
        found = None
        if (self._number, rows.start // table.block_px, cols.start // table.block_px) in table.touched:
            found = read_asset(table.assets[self._number], table.blocks[rows, cols], how, table.log)
        if found is None:
            return np.full((int(window.height), int(window.width)), how.fill, how.dtype)
        return found

    def close(self) -> None:
        """Do nothing: every read opens and closes the file."""
