"""Mosaic: objects across tile edges.

Tiles come one by one in any order. Of each only what crosses its edge and one line of sums an object are kept, so a
nation is labelled in the memory of one tile and its objects. Sums are whole numbers and floats are only compared, so
the table does not depend on the tiling.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import geopandas as gpd
import numpy as np
import shapely
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.polygons import (
    geodesic_areas_m2,
    merge_parts,
    objects_frame,
    oriented_sizes_m,
    pixel_polygons,
    to_frame,
)

LANDSLIDE = 1
EPOCH_ZERO = dt.date(1970, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Raster:
    """How an attribute is stored: value = stored x scale; nodata never counts (NaN for floats)."""

    scale: float = 1.0
    nodata: float = float("nan")


YES_NO = ("low_vegetation", "river_corridor", "farmland")
"""Attributes of 0 and 1, of which an object has what half of it or more has."""

RASTERS: dict[str, Raster] = {
    "probability": Raster(scale=1e-4, nodata=65535),
    "spread": Raster(scale=1e-4, nodata=65535),
    "entropy": Raster(scale=1e-4, nodata=65535),
    "slope_deg": Raster(scale=0.01, nodata=65535),
    "elevation": Raster(),
    "pre_date": Raster(nodata=0),
    "post_date": Raster(nodata=0),
    **dict.fromkeys(YES_NO, Raster(nodata=255)),
}
"""Attributes that objects can take: scaled integers, float32 elevation, uint16 days since 1970-01-01, and 0 or 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRasters:
    """What labelling reads of one tile.

    key : of the tile, for messages
    offset_px : row and column in the grid's frame of its first pixel
    landslide : (y, x) uint8, 1 = landslide, anything else is not
    attributes : name in `RASTERS` -> (y, x) as stored; the same names in every tile
    """

    key: str
    offset_px: tuple[int, int]
    landslide: NDArray[np.uint8]
    attributes: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.attributes) - set(RASTERS))
        if unknown:
            raise PipelineError(f"Tile {self.key} has attributes {unknown}; allowed are {', '.join(RASTERS)}")
        for name, values in self.attributes.items():
            if values.shape != self.landslide.shape:
                raise PipelineError(
                    f"Tile {self.key}: {name} has shape {values.shape}, landslide {self.landslide.shape}; "
                    "they must be equal"
                )


@dataclass(slots=True)
class _Sums:
    """Count, whole-number sum, least and greatest of one attribute, a value a component."""

    count: NDArray[np.int64]
    total: NDArray[np.int64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(slots=True)
class _Components:
    """Components of the tiles seen so far; a component is what is connected inside one tile."""

    n: int = 0
    n_px: list[NDArray[np.int64]] = field(default_factory=list)
    first_row: list[NDArray[np.int64]] = field(default_factory=list)
    first_col: list[NDArray[np.int64]] = field(default_factory=list)
    sums: dict[str, list[_Sums]] = field(default_factory=dict)
    parts: list[NDArray[np.object_]] = field(default_factory=list)
    part_of: list[NDArray[np.int64]] = field(default_factory=list)
    edge_row: list[NDArray[np.int64]] = field(default_factory=list)
    edge_col: list[NDArray[np.int64]] = field(default_factory=list)
    edge_of: list[NDArray[np.int64]] = field(default_factory=list)


def label_objects(
    tiles: Iterable[TileRasters], *, frame: GeoBox, epoch: str, model: str = "", detect_key: str = ""
) -> gpd.GeoDataFrame:
    """Join landslide pixels into objects across tiles, over edges and corners.

    tiles : in any order, each once, none overlapping; read one at a time
    frame : pixels of the whole grid, to which the tiles' offsets refer
    Returns the objects by `polygons.SCHEMA`, sorted by id, in the frame's CRS; byte-equal for any tiling.
    Raises PipelineError for a tile given twice, unknown attributes, or attributes that differ between tiles.
    """
    found = _Components()
    seen: dict[tuple[int, int], str] = {}
    names: tuple[str, ...] | None = None
    for tile in tiles:
        if tile.offset_px in seen:
            raise PipelineError(
                f"Tiles {seen[tile.offset_px]} and {tile.key} both start at {tile.offset_px}; give each tile once"
            )
        seen[tile.offset_px] = tile.key
        names = tuple(sorted(tile.attributes)) if names is None else names
        if names != tuple(sorted(tile.attributes)):
            raise PipelineError(
                f"Tile {tile.key} has attributes {sorted(tile.attributes)}, earlier tiles {list(names)}"
            )
        _add_tile(found, tile)
    return _table(found, frame=frame, epoch=epoch, model=model, detect_key=detect_key)


def _add_tile(found: _Components, tile: TileRasters) -> None:
    labels, n = ndimage.label(tile.landslide == LANDSLIDE, structure=np.ones((3, 3)))
    if n == 0:
        return
    rows, cols = np.nonzero(labels)
    own = labels[rows, cols] - 1
    order = np.argsort(own, kind="stable")  # stable: a component's first pixel stays first, row by row
    starts = np.searchsorted(own[order], np.arange(n))
    row0, col0 = tile.offset_px
    found.n_px.append(np.bincount(own, minlength=n))
    found.first_row.append(rows[order[starts]] + row0)
    found.first_col.append(cols[order[starts]] + col0)
    for name, values in tile.attributes.items():
        sums = _sum(values[rows, cols][order], starts, RASTERS[name])
        found.sums.setdefault(name, []).append(sums)
    height, width = labels.shape
    edge = (rows == 0) | (rows == height - 1) | (cols == 0) | (cols == width - 1)
    found.edge_row.append(rows[edge] + row0)
    found.edge_col.append(cols[edge] + col0)
    found.edge_of.append(own[edge] + found.n)
    label_of, parts = pixel_polygons(labels.astype(np.int32))
    found.parts.append(shapely.transform(parts, lambda xy: xy + np.array([col0, row0])))
    found.part_of.append(label_of - 1 + found.n)
    found.n += n


def _sum(values: NDArray[np.generic], starts: NDArray[np.intp], raster: Raster) -> _Sums:
    """Sum, least and greatest of each run of values that begins at `starts`."""
    is_float = values.dtype.kind == "f"
    valid = ~np.isnan(values) if is_float else values != raster.nodata
    number = values.astype(np.float64)
    whole = np.zeros(len(values), np.int64) if is_float else np.where(valid, values, 0).astype(np.int64)
    return _Sums(
        count=np.add.reduceat(valid.astype(np.int64), starts),
        total=np.add.reduceat(whole, starts),
        low=np.minimum.reduceat(np.where(valid, number, np.inf), starts),
        high=np.maximum.reduceat(np.where(valid, number, -np.inf), starts),
    )


def _join(found: _Components, frame: GeoBox) -> tuple[int, NDArray[np.int64]]:
    """Number of objects, and the object of each component: pixels of two tiles' edges that touch are one object."""
    row, col = np.concatenate(found.edge_row), np.concatenate(found.edge_col)
    of = np.concatenate(found.edge_of)
    stride = (
        frame.shape[1] + 2
    )  # wider than a row, so that the frame's right edge is not next to its left one
    key = row * stride + col
    order = np.argsort(key)
    key, of = key[order], of[order]
    if np.any(key[1:] == key[:-1]):
        r, c = divmod(int(key[1:][key[1:] == key[:-1]][0]), stride)
        raise PipelineError(
            f"Two tiles overlap at row {r}, column {c} of the frame; tiles must not share pixels"
        )
    pairs = []
    for step in (1, stride - 1, stride, stride + 1):
        at = np.minimum(np.searchsorted(key, key + step), max(len(key) - 1, 0))
        touch = np.flatnonzero(key[at] == key + step)
        pairs.append(np.stack((of[touch], of[at[touch]])))
    a, b = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(found.n, found.n))
    n, object_of = connected_components(graph, directed=False)
    return n, object_of.astype(np.int64)


def _table(found: _Components, *, frame: GeoBox, epoch: str, model: str, detect_key: str) -> gpd.GeoDataFrame:
    crs = str(frame.crs)
    if found.n == 0:
        return objects_frame({}, np.empty(0, dtype=object), crs)
    n, object_of = _join(found, frame)
    first = np.concatenate(found.first_row) * (frame.shape[1] + 2) + np.concatenate(found.first_col)
    object_first = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(object_first, object_of, first)
    rank = np.empty(n, np.int64)
    rank[np.argsort(object_first)] = np.arange(n)
    object_of = rank[object_of]  # objects are numbered by their first pixel, which is the order of their ids
    first_row, first_col = np.divmod(np.sort(object_first), frame.shape[1] + 2)
    n_px = np.zeros(n, np.int64)
    np.add.at(n_px, object_of, np.concatenate(found.n_px))
    shapes = merge_parts(np.concatenate(found.parts), object_of[np.concatenate(found.part_of)])
    geometry = to_frame(shapes, frame.affine)
    length_m, width_m = oriented_sizes_m(geometry)
    columns: dict[str, object] = {
        "id": [f"{epoch}-r{r:07d}c{c:07d}" for r, c in zip(first_row, first_col, strict=True)],
        "epoch": [epoch] * n,
        "n_px": n_px,
        "area_m2": geodesic_areas_m2(geometry, crs),
        "length_m": length_m,
        "width_m": width_m,
        "model": [model] * n,
        "detect_key": [detect_key] * n,
    }
    for name, sums in found.sums.items():
        merged = _merge(sums, object_of, n)
        columns.update({name: _mostly(merged)} if name in YES_NO else _attributes(name, merged))
    return objects_frame(columns, geometry, crs)


def _merge(sums: list[_Sums], object_of: NDArray[np.int64], n: int) -> _Sums:
    merged = _Sums(
        count=np.zeros(n, np.int64),
        total=np.zeros(n, np.int64),
        low=np.full(n, np.inf),
        high=np.full(n, -np.inf),
    )
    np.add.at(merged.count, object_of, np.concatenate([s.count for s in sums]))
    np.add.at(merged.total, object_of, np.concatenate([s.total for s in sums]))
    np.minimum.at(merged.low, object_of, np.concatenate([s.low for s in sums]))
    np.maximum.at(merged.high, object_of, np.concatenate([s.high for s in sums]))
    return merged


def _mostly(sums: _Sums) -> list[bool | None]:
    """Tell of which objects half of the known pixels or more have it; null where none is known."""
    return [bool(2 * n >= of) if of else None for n, of in zip(sums.total, sums.count, strict=True)]


def _attributes(name: str, sums: _Sums) -> dict[str, object]:
    """Columns of one attribute; an object without a valid pixel has null."""
    some = sums.count > 0
    scale = RASTERS[name].scale
    low, high = np.where(some, sums.low, np.nan) * scale, np.where(some, sums.high, np.nan) * scale
    mean = np.where(some, sums.total * scale / np.maximum(sums.count, 1), np.nan)
    match name:
        case "probability":
            return {"probability": mean, "probability_max": high}
        case "spread" | "entropy":
            return {name: mean}
        case "slope_deg":
            return {"slope_deg": mean, "slope_max_deg": high}
        case "elevation":
            return {"elevation_min_m": low, "elevation_max_m": high, "elevation_range_m": high - low}
        case "pre_date":
            return {"pre_date": _days(high), "pre_date_min": _days(low)}
        case _:
            return {"post_date": _days(low), "post_date_max": _days(high)}


def _days(days: NDArray[np.float64]) -> list[dt.date | None]:
    return [None if np.isnan(d) else EPOCH_ZERO + dt.timedelta(days=int(d)) for d in days]
