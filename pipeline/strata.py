"""Strata: parts of an area that are fitted apart, such as ecoregions, and how they blend into each other.

Codes are whole numbers from 1, in the order of the strata's names; 0 is what lies in no stratum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyogrio
import pyproj
import rasterio
import rasterio.features
import rasterio.warp
import rasterio.windows
import scipy.ndimage
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from shapely.geometry.base import BaseGeometry

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.errors import CatalogError
from slidecube.pipeline.errors import PipelineError

NO_STRATUM = "(none)"
"""Name of what lies in no stratum."""

POLYGON_FILES = (".geojson", ".json", ".gpkg", ".shp", ".fgb", ".parquet")
"""Endings of files of polygons; any other file is read as a raster."""

_MOST_STRATA = 1000
_FILES = {"polygons": "strata.parquet", "raster": "strata.tif"}

Bounds = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClassRaster:
    """Codes of strata as a raster: (y, x) uint16, on a transform in a CRS (WKT)."""

    codes_yx: np.ndarray
    transform: Affine
    crs: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Strata:
    """The strata of an area, frozen with its plan.

    names : of the strata in and near the area, sorted; the first has code 1
    shapes : polygons in the grid's CRS with their codes, or () ; where they overlap, the higher code counts
    raster : classes, or None
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[BaseGeometry, int], ...] = ()
    raster: ClassRaster | None = None

    def name_of(self, code: int) -> str:
        """Name of a code."""
        return self.names[code - 1] if code else NO_STRATUM

    def codes(self, geobox: GeoBox) -> np.ndarray:
        """Codes at the centres of pixels: (y, x) uint16, nearest class of a raster.

        Of one block of the lattice at a time: what a rasteriser or a warp gives on an edge depends on its window.
        """
        out = np.zeros(geobox.shape, np.uint16)
        if self.raster is not None:
            rasterio.warp.reproject(
                self.raster.codes_yx,
                out,
                src_transform=self.raster.transform,
                src_crs=self.raster.crs,
                src_nodata=0,
                dst_transform=geobox.affine,
                dst_crs=str(geobox.crs),
                dst_nodata=0,
                resampling=Resampling.nearest,
            )
            return out
        box = shapely.box(*geobox.boundingbox.bbox)
        near = [(shape, code) for shape, code in self.shapes if shape.intersects(box)]
        if near:
            rasterio.features.rasterize(near, out=out, transform=geobox.affine)
        return out

    def write(self, folder: Path, crs: str) -> None:
        """Write them beside a plan; crs : of the grid."""
        if self.raster is not None:
            height, width = self.raster.codes_yx.shape
            profile = {"driver": "GTiff", "count": 1, "dtype": "uint16", "nodata": 0, "compress": "deflate"}
            with rasterio.open(
                folder / _FILES["raster"],
                "w",
                height=height,
                width=width,
                crs=self.raster.crs,
                transform=self.raster.transform,
                **profile,
            ) as file:
                file.write(self.raster.codes_yx, 1)
            return
        shapes, codes = zip(*self.shapes, strict=True)
        frame = gpd.GeoDataFrame({"code": codes}, geometry=list(shapes), crs=crs)
        frame.to_parquet(folder / _FILES["polygons"])

    @classmethod
    def read(cls, folder: Path, names: Sequence[str]) -> Strata:
        """Read what `write` wrote; names : as the plan has them."""
        if (folder / _FILES["raster"]).is_file():
            with rasterio.open(folder / _FILES["raster"]) as file:
                raster = ClassRaster(codes_yx=file.read(1), transform=file.transform, crs=file.crs.to_wkt())
            return cls(names=tuple(names), raster=raster)
        frame = gpd.read_parquet(folder / _FILES["polygons"])
        shapes = tuple(zip(frame.geometry, (int(code) for code in frame["code"]), strict=True))
        return cls(names=tuple(names), shapes=shapes)


def read_strata(path: Path, *, field: str | None, bounds: Bounds, crs: str) -> Strata:
    """Read the strata in and near an area.

    path : polygons of any format of `POLYGON_FILES`, or a raster of whole numbers of any format of GDAL
    field : attribute of the polygons that names them; None: their number in the file, from 1
    bounds : of the area in the grid's CRS; crs : of the grid
    Raises PipelineError for a file that cannot be read, has no CRS, or has no stratum here.
    """
    try:
        if path.suffix.lower() in POLYGON_FILES:
            return _of_polygons(path, field, bounds, crs)
        if field is not None:
            raise PipelineError(
                f"Strata {path} are a raster, whose values name them; leave strata_field out of [fit]"
            )
        return _of_raster(path, bounds, crs)
    except (pyogrio.errors.DataSourceError, rasterio.errors.RasterioError, CatalogError, OSError) as error:
        raise PipelineError(
            f"Strata {path} cannot be read ({' '.join(str(error).split())[:160]}); name polygons "
            f"({', '.join(POLYGON_FILES)}) or a raster of classes as strata in [fit]"
        ) from None


def _of_polygons(path: Path, field: str | None, bounds: Bounds, crs: str) -> Strata:
    frame = gpd.read_parquet(path) if path.suffix.lower() == ".parquet" else gpd.read_file(path)
    if frame.crs is None:
        raise PipelineError(f"Strata {path} have no CRS; write one into the file")
    if field is not None and field not in frame:
        known = ", ".join(str(name) for name in frame.columns if name != frame.geometry.name)
        raise PipelineError(f"Strata {path} have no attribute {field!r}; they have: {known or 'none'}")
    if not frame.geom_type.isin(("Polygon", "MultiPolygon")).all():
        kinds = ", ".join(sorted(set(frame.geom_type.dropna()) - {"Polygon", "MultiPolygon"})) or "empty ones"
        raise PipelineError(f"Strata {path} are polygons; got {kinds}")
    given = range(1, len(frame) + 1) if field is None else frame[field]
    labels = ["" if value is None or value != value else str(value) for value in given]  # noqa: PLR0124  NaN
    clips = shapely.union_all([shapely.box(*box) for box in _boxes_in(bounds, crs, frame.crs)])
    found: list[tuple[BaseGeometry, str]] = []
    for shape, label in zip(frame.geometry, labels, strict=True):
        part = shapely.make_valid(shape).intersection(clips) if label else shapely.Polygon()
        part = shapely.union_all([p for p in shapely.get_parts(part) if p.geom_type.endswith("Polygon")])
        if not part.is_empty:
            found.append((Aoi(name=label, geometry=part, crs=frame.crs.to_wkt()).to_crs(crs), label))
    names = _names(path, {label for _, label in found})
    coded = sorted(
        ((shape, names.index(label) + 1) for shape, label in found), key=lambda one: (one[1], one[0].wkb)
    )
    return Strata(names=names, shapes=tuple(coded))


def _of_raster(path: Path, bounds: Bounds, crs: str) -> Strata:
    with rasterio.open(path) as file:
        if file.crs is None:
            raise PipelineError(f"Strata {path} have no CRS; write one into the file")
        if np.dtype(file.dtypes[0]).kind not in "iu":
            raise PipelineError(
                f"Strata {path} hold {file.dtypes[0]}; whole numbers, one a stratum, are wanted"
            )
        whole = rasterio.windows.Window(0, 0, file.width, file.height)
        window = rasterio.windows.union(
            [file.window(*box) for box in _boxes_in(bounds, crs, file.crs.to_wkt())]
        )
        window = rasterio.windows.Window(
            np.floor(window.col_off) - 2,
            np.floor(window.row_off) - 2,
            np.ceil(window.width) + 5,
            np.ceil(window.height) + 5,
        )
        if not rasterio.windows.intersect(window, whole):
            _names(path, set())
        window = window.intersection(whole)
        values = file.read(1, window=window, masked=True)
        transform, source = file.window_transform(window), file.crs.to_wkt()
    there = np.unique(values.compressed())
    by_name = {str(int(value)): value for value in there}
    names = _names(path, set(by_name))
    codes = np.zeros(values.shape, np.uint16)
    for code, name in enumerate(names, start=1):
        codes[np.ma.getdata(values) == by_name[name]] = code
    codes[np.ma.getmaskarray(values)] = 0
    return Strata(names=names, raster=ClassRaster(codes_yx=codes, transform=transform, crs=source))


def _names(path: Path, found: set[str]) -> tuple[str, ...]:
    if not found:
        raise PipelineError(
            f"Strata {path} do not meet the area; name a file that covers it, or leave strata out"
        )
    if len(found) > _MOST_STRATA:
        raise PipelineError(
            f"Strata {path} are {len(found)} in this area, more than {_MOST_STRATA}: a fit needs thousands of pixels; "
            "join them"
        )
    return tuple(sorted(found))


def _boxes_in(bounds: Bounds, crs: str, target: str | pyproj.CRS) -> list[Bounds]:
    """Bounds in another CRS, a tenth larger on each side; two boxes across the antimeridian."""
    left, bottom, right, top = bounds
    pad = max(right - left, top - bottom) / 10
    to = pyproj.Transformer.from_crs(crs, target, always_xy=True)
    a = to.transform_bounds(left - pad, bottom - pad, right + pad, top + pad)
    if a[0] <= a[2]:
        return [a]
    return [(a[0], a[1], 180.0, a[3]), (-180.0, a[1], a[2], a[3])]


def blend_weights(codes_yx: np.ndarray, *, margin_px: int, half_px: float) -> Mapping[int, np.ndarray]:
    """Weight of each stratum at the pixels of a window, by the distance to its border.

    codes_yx : with a margin on each side of at least half_px + 1, which the weights do not cover
    half_px : half the width of the band across a border in which two strata blend; 0 = a hard border
    Returns code -> (y, x) float32, of those with any weight; they add up to 1.

    With s the signed distance of a pixel's centre to the border of a stratum, positive inside, its share is
    u = clip(1/2 + s / (2 half_px), 0, 1), and its weight is u over the sum of all shares: along one straight border a
    linear ramp, 1/2 on the border. Distances are exact, so no weight depends on the window.
    """
    core = np.s_[margin_px : codes_yx.shape[0] - margin_px, margin_px : codes_yx.shape[1] - margin_px]
    present = [int(code) for code in np.unique(codes_yx)]
    if len(present) == 1:
        return {present[0]: np.ones(codes_yx[core].shape, np.float32)}
    # each where it lies: a window of a nation's map may hold a hundred strata
    reach = math.ceil(half_px) + 2
    places = scipy.ndimage.find_objects(codes_yx.astype(np.int32) + 1)
    shares: dict[int, tuple[tuple[slice, ...], np.ndarray]] = {}
    total = np.zeros(codes_yx.shape)
    for code in present:
        around = tuple(slice(max(at.start - reach, 0), at.stop + reach) for at in places[code])
        share = _share(codes_yx[around] == code, half_px)
        total[around] += share
        shares[code] = (around, share)
    out = {}
    for code, (around, share) in shares.items():
        weight = np.zeros(codes_yx.shape, np.float32)
        weight[around] = share / total[around]
        if weight[core].any():
            out[code] = weight[core].copy()
    return out


def _share(mask_yx: np.ndarray, half_px: float) -> np.ndarray:
    if half_px <= 0.5:  # the nearest centres lie half a pixel from the border
        return mask_yx.astype(np.float64)
    # the border runs half way between the last pixel inside and the first one outside
    signed: np.ndarray = scipy.ndimage.distance_transform_edt(mask_yx)
    signed -= scipy.ndimage.distance_transform_edt(~mask_yx)
    signed -= np.where(mask_yx, 0.5, -0.5)
    signed /= 2 * half_px
    signed += 0.5
    return np.clip(signed, 0, 1, out=signed)
