"""Known landslides, and other polygons: read from any vector file, and laid on the pixels of a grid.

A pixel belongs to a polygon that holds its centre. One that holds no centre, a slide of a few metres, keeps the pixel
in which its middle lies: else the smallest would be ground without a landslide.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten

import geopandas as gpd
import numpy as np
import pyogrio
import rasterio.features
import shapely
from affine import Affine
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from slidecube.catalog.grid import TileGrid
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.keys import KEY_HEX
from slidecube.pipeline.refusals import did_you_mean
from slidecube.pipeline.terrain import RASTERIO

_PARQUET = (".parquet", ".geoparquet")


class OutsideError(PipelineError):
    """A file of polygons has none in the area."""


@dataclass(frozen=True, kw_only=True)
class ReferencePixels:
    """Pixels of polygons in a grid's frame, object by object.

    rows, cols : int64, of each pixel; objects : int64, number of the polygon that it belongs to, rising from 0; a pixel
        that several hold is named once for each
    ids : of the polygons that are left, as their place in the file
    """

    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    objects: NDArray[np.int64]
    ids: NDArray[np.int64]

    @property
    def digest(self) -> str:
        """Of the pixels alone: the same polygons in another file or format are the same."""
        place = np.unique(np.stack([self.rows, self.cols]), axis=1)
        return hashlib.sha256(place.astype("<i8").tobytes()).hexdigest()[:KEY_HEX]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each object's pixels begin, and where the last one's end."""
        return np.searchsorted(self.objects, np.arange(len(self.ids) + 1))

    def within(self, keep: NDArray[np.bool_]) -> ReferencePixels:
        """Keep some of the pixels; objects that lose all of theirs are gone."""
        left, objects = np.unique(self.objects[keep], return_inverse=True)
        return ReferencePixels(
            rows=self.rows[keep], cols=self.cols[keep], objects=objects, ids=self.ids[left]
        )


def read_polygons(
    path: Path, *, area: shapely.Geometry, grid: TileGrid, layer: str | None = None
) -> NDArray[np.object_]:
    """Read the polygons of a file that share ground with an area, in the grid's CRS, repaired where invalid.

    area : in the grid's CRS; layer : of a file with several
    Raises PipelineError in one line: no file, no polygons, no CRS, or none in the area.
    """
    table = _table(path, layer)
    what = f"Reference {str(path)!r}"
    if table.crs is None:
        raise PipelineError(
            f"{what} has no CRS (a shapefile needs its .prj file); set it in the file, else nobody knows where it lies"
        )
    table = table[~(table.geometry.isna() | table.geometry.is_empty)]
    if not len(table):
        raise PipelineError(f"{what} holds no polygon; name a file of known landslides")
    kinds = sorted(set(table.geom_type) - {"Polygon", "MultiPolygon"})
    if kinds:
        raise PipelineError(
            f"{what} holds {kinds[0]}; only polygons and multipolygons can be laid on pixels; draw outlines, or "
            "buffer points yourself"
        )
    moved = shapely.force_2d(table.to_crs(grid.crs).geometry.to_numpy())
    if not np.isfinite(shapely.bounds(moved)).all(axis=1).any():
        raise PipelineError(
            f"{what} cannot be brought to {grid.crs}: its coordinates do not fit its CRS, {table.crs.to_string()}; "
            "correct that"
        )
    shapes = np.array([areal(shape) for shape in moved], dtype=object)
    shapely.prepare(area)
    inside = shapely.intersects(area, shapes) & (shapely.area(shapes) > 0)
    if not inside.any():
        west, south, east, north = table.to_crs("EPSG:4326").total_bounds
        raise OutsideError(
            f"{what} has no polygon in the area of the run: its {len(shapes)} lie between {west:.3f} and {east:.3f} "
            f"degrees east, {south:.3f} and {north:.3f} north; name another file, or correct its CRS"
        )
    return shapes[inside]


def lay_on_pixels(shapes: Iterable[BaseGeometry], grid: TileGrid) -> ReferencePixels:
    """Find the pixels of polygons; shapes : in the grid's CRS."""
    affine = grid.frame.affine
    found = [_pixels(shape, affine) for shape in shapes]
    sizes = [len(rows) for rows, _ in found]
    return ReferencePixels(
        rows=np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in found)]),
        cols=np.concatenate([np.zeros(0, np.int64), *(cols for _, cols in found)]),
        objects=np.repeat(np.arange(len(sizes)), sizes),
        ids=np.arange(len(sizes)),
    )


def areal(shape: BaseGeometry) -> BaseGeometry:
    """The valid, areal part of a shape; lines and points that repair leaves behind have no area."""
    if shape.is_valid:
        return shape
    parts = shapely.get_parts(shapely.get_parts(shapely.make_valid(shape)))
    return shapely.union_all([part for part in parts if part.geom_type == "Polygon"])


def _table(path: Path, layer: str | None) -> gpd.GeoDataFrame:
    if not path.exists():
        near = [p.name for p in sorted(path.parent.glob("*"))] if path.parent.is_dir() else []
        raise PipelineError(f"Reference {str(path)!r}: no such file{did_you_mean(path.name, near)}")
    try:
        if path.suffix.lower() in _PARQUET:
            found: gpd.GeoDataFrame = gpd.read_parquet(path)
            return found
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of drivers, about things that we do not read
            chosen = _layer(path, layer)
            table = gpd.read_file(path, layer=chosen, columns=[])
    except PipelineError:
        raise
    except Exception as error:  # noqa: BLE001  GDAL, GEOS and Arrow each have errors of their own
        why = shorten(str(error), 160, placeholder=" ...")
        raise PipelineError(
            f"Reference {str(path)!r} cannot be read as a vector file ({why}); give a "
            "GeoPackage, GeoJSON, shapefile or GeoParquet"
        ) from None
    if not isinstance(table, gpd.GeoDataFrame):
        raise PipelineError(
            f"Reference {str(path)!r} is a table without geometries; give polygons, as a GeoPackage, GeoJSON, "
            "shapefile or GeoParquet"
        )
    return table


def _layer(path: Path, layer: str | None) -> str:
    known = pyogrio.list_layers(path)
    names = [str(name) for name in known[:, 0]]
    if layer is not None:
        if layer not in names:
            raise PipelineError(f"Reference {str(path)!r} has no layer {layer!r}; layers: {', '.join(names)}")
        return layer
    polygons = [str(name) for name, kind in known if "Polygon" in str(kind) or str(kind) == "Unknown"]
    candidates = polygons or names
    if len(candidates) != 1:
        raise PipelineError(
            f"Reference {str(path)!r} has {len(candidates)} layers ({', '.join(candidates)}); name one with layer"
        )
    return candidates[0]


def _pixels(shape: BaseGeometry, affine: Affine) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns in the frame of the pixels of one polygon."""
    left, bottom, right, top = shape.bounds
    col, row = (int(np.floor(v)) for v in ~affine @ (left, top))
    width, height = int(np.ceil((right - left) / affine.a)) + 1, int(np.ceil((bottom - top) / affine.e)) + 1
    with RASTERIO:
        burnt = rasterio.features.rasterize(
            [shape],
            out_shape=(height, width),
            transform=affine @ Affine.translation(col, row),
            dtype="uint8",
        )
    rows, cols = np.nonzero(burnt)
    if not len(rows):
        middle = shape.representative_point()
        x, y = ~affine @ (middle.x, middle.y)
        return np.array([int(np.floor(y))]), np.array([int(np.floor(x))])
    return rows.astype(np.int64) + row, cols.astype(np.int64) + col
