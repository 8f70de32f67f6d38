"""Polygons: from labelled pixels to objects with a written schema.

Outlines follow the pixels exactly and are canonical: vertices lie on whole pixels of the grid's frame, none lies in
the middle of a straight edge, and rings start and turn as `shapely.normalize` says. So one object has one geometry,
byte for byte, however the grid was tiled.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyproj
import rasterio.features
import shapely
from affine import Affine
from numpy.typing import NDArray

DENSIFY_M = 1000.0
"""Longest edge when an area is taken: a straight kilometre of a map leaves the geodesic by 2 cm."""

DATE = "date32[day][pyarrow]"


class Column(NamedTuple):
    """One column of the table of objects."""

    dtype: str
    unit: str
    description: str


SCHEMA: dict[str, Column] = {
    "id": Column(
        "string",
        "",
        "stable identity: the epoch, and the row and column in the grid's frame of the object's first pixel "
        "(northernmost row, then westernmost)",
    ),
    "epoch": Column("string", "", "name of the epoch, a pair of a pre- and a post-event window"),
    "n_px": Column("int64", "px", "pixels of the object, joined over edges and corners"),
    "area_m2": Column("float64", "m2", "geodesic area of the outline"),
    "length_m": Column("float32", "m", "longer side of the smallest rotated rectangle about the outline"),
    "width_m": Column("float32", "m", "shorter side of that rectangle"),
    "probability": Column(
        "float32", "1", "mean over the object's pixels of the model's landslide probability"
    ),
    "probability_max": Column("float32", "1", "highest probability of a pixel"),
    "spread": Column("float32", "1", "mean over the pixels of the spread between the ensemble's members"),
    "entropy": Column(
        "float32", "bit", "mean over the pixels of the entropy of the probability, 0 = sure, 1 = a coin"
    ),
    "slope_deg": Column("float32", "degree", "mean slope of the terrain"),
    "slope_max_deg": Column("float32", "degree", "steepest slope of a pixel"),
    "elevation_min_m": Column("float32", "m", "lowest elevation, above the height datum of the DEM"),
    "elevation_max_m": Column("float32", "m", "highest elevation"),
    "elevation_range_m": Column("float32", "m", "highest less lowest elevation"),
    "pre_date": Column(
        DATE, "day (UTC)", "latest day before the event on which a pixel of the object was seen clearly"
    ),
    "pre_date_min": Column(
        DATE, "day (UTC)", "last clear day before the event of the pixel that went longest without one"
    ),
    "post_date": Column(
        DATE, "day (UTC)", "earliest day after the event on which a pixel of the object was seen clearly"
    ),
    "post_date_max": Column(
        DATE, "day (UTC)", "first clear day after the event of the pixel that waited longest for one"
    ),
    "low_vegetation": Column(
        "boolean",
        "",
        "true where half of the object or more had little vegetation before the event ([ground]); null = unknown",
    ),
    "river_corridor": Column(
        "boolean", "", "true where half of it or more lies in a river's corridor; null = not known"
    ),
    "farmland": Column("boolean", "", "true where half of it or more is farmland; null = not known"),
    "slope_class": Column(
        "string", "", "gentle, moderate or steep, by its mean slope and the edges of [ground]"
    ),
    "dem_source": Column("string", "", "source of the DEM"),
    "dem_date": Column(DATE, "day", "last day on which the DEM was measured; null where nobody says"),
    "event_after_dem": Column(
        "boolean",
        "",
        "true where the event (without one, the first day of the window after it) is later than the DEM, which then "
        "shows the ground before the landslide",
    ),
    "model": Column("string", "", "name and version of the model"),
    "detect_key": Column(
        "string", "", "key of the detection: layers, statistics, features, weights, threshold"
    ),
}
"""Columns of the table of objects, in order; `geometry` follows, in the grid's CRS."""


def pixel_polygons(labels_yx: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.object_]]:
    """Outline the labelled pixels.

    labels_yx : (y, x), 0 = nothing; pixels of one label need not be connected
    Returns label and polygon of each part that is connected over edges, in pixel coordinates (x = column, y = row,
    whole numbers). Parts that meet at a corner are two polygons: one ring through a corner twice would be invalid.
    """
    shapes = list(
        rasterio.features.shapes(labels_yx, mask=labels_yx > 0, connectivity=4, transform=Affine.identity())
    )
    labels = np.array([label for _, label in shapes], dtype=np.int64)
    sizes = [[len(ring) for ring in shape["coordinates"]] for shape, _ in shapes]
    flat = [xy for shape, _ in shapes for ring in shape["coordinates"] for xy in ring]
    if not flat:
        return labels, np.empty(0, dtype=object)
    ring_of = np.repeat(np.arange(sum(map(len, sizes))), [n for part in sizes for n in part])
    part_of = np.repeat(np.arange(len(sizes)), [len(part) for part in sizes])
    rings = np.asarray(shapely.linearrings(np.asarray(flat, dtype=np.float64), indices=ring_of))
    return labels, np.asarray(shapely.polygons(rings, indices=part_of))


def merge_parts(parts: NDArray[np.object_], group: NDArray[np.int64]) -> NDArray[np.object_]:
    """Unite the parts of each object.

    parts : polygons in pixel coordinates that share no area; group : object 0, 1, ... of each part, none left out
    Returns one canonical polygon or multipolygon an object.
    """
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    ends = np.cumsum(sizes)
    merged = parts[order[ends - sizes]]
    for i in np.flatnonzero(sizes > 1):
        merged[i] = shapely.union_all(parts[order[ends[i] - sizes[i] : ends[i]]])
    return corners_only(merged)


def corners_only(shapes: NDArray[np.object_]) -> NDArray[np.object_]:
    """Drop the vertices of rectilinear polygons at which the outline does not turn, also where a ring starts."""
    polygons, shape_of = shapely.get_parts(shapes, return_index=True)
    rings, polygon_of = shapely.get_rings(polygons, return_index=True)
    xy, ring_of = shapely.get_coordinates(rings, return_index=True)
    closing = np.append(ring_of[1:] != ring_of[:-1], [True] * bool(len(ring_of)))
    xy, ring_of = xy[~closing], ring_of[~closing]
    first = np.searchsorted(ring_of, np.arange(len(rings)))
    last = np.append(first[1:], len(ring_of)) - 1
    before = np.arange(len(xy)) - 1
    before[first] = last
    after = np.arange(len(xy)) + 1
    after[last] = first
    level = (xy[:, 1] == xy[before, 1]) & (xy[:, 1] == xy[after, 1])
    upright = (xy[:, 0] == xy[before, 0]) & (xy[:, 0] == xy[after, 0])
    turns = ~(level | upright)
    rings = shapely.linearrings(xy[turns], indices=ring_of[turns])
    polygons = shapely.polygons(rings, indices=polygon_of)
    whole = polygons[np.searchsorted(shape_of, np.arange(len(shapes)))]
    several = np.flatnonzero(np.bincount(shape_of, minlength=len(shapes)) > 1)
    inside = np.isin(shape_of, several)
    if len(several):
        whole[several] = shapely.multipolygons(
            polygons[inside], indices=np.searchsorted(several, shape_of[inside])
        )
    return np.asarray(shapely.normalize(whole))


def to_frame(shapes: NDArray[np.object_], affine: Affine) -> NDArray[np.object_]:
    """Carry shapes from frame pixels to map coordinates; affine : of the frame, north up."""

    def move(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack((affine.c + affine.a * xy[:, 0], affine.f + affine.e * xy[:, 1]))

    return np.asarray(shapely.normalize(shapely.transform(shapes, move)))


def geodesic_areas_m2(shapes: NDArray[np.object_], crs: str) -> NDArray[np.float64]:
    """Areas on the ellipsoid of the CRS, whatever the CRS does to areas.

    shapes : normalised polygons or multipolygons, in the CRS
    Returns m2, rounded to 0.01. The outline's edges are cut to `DENSIFY_M` first, because a straight line of the map
    is not a geodesic. Equal to the sum of the geodesic areas of the pixels to 1e-6 (Source: Karney 2013).
    """
    areas = np.zeros(len(shapes))
    if not len(shapes):
        return areas
    projected = pyproj.CRS.from_user_input(crs)
    geodetic = projected.geodetic_crs
    geod = projected.get_geod()
    assert geodetic is not None
    assert geod is not None
    to = pyproj.Transformer.from_crs(projected, geodetic, always_xy=True)
    polygons, shape_of = shapely.get_parts(shapely.segmentize(shapes, DENSIFY_M), return_index=True)
    rings, polygon_of = shapely.get_rings(polygons, return_index=True)
    xy, ring_of = shapely.get_coordinates(rings, return_index=True)
    lon, lat = to.transform(xy[:, 0], xy[:, 1])
    bounds = np.searchsorted(ring_of, np.arange(len(rings) + 1))
    for ring, (a, b) in enumerate(itertools.pairwise(bounds)):
        # shells and holes turn in opposite ways, so their signed areas subtract
        areas[shape_of[polygon_of[ring]]] += geod.polygon_area_perimeter(lon[a:b], lat[a:b])[0]
    return np.abs(areas).round(2)


def oriented_sizes_m(shapes: NDArray[np.object_]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Length and width of the smallest rotated rectangle about each shape, to 0.1 m of the map."""
    if not len(shapes):
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    corners = shapely.get_coordinates(shapely.get_exterior_ring(shapely.oriented_envelope(shapes)))
    corners = corners.reshape(len(shapes), 5, 2)
    sides = np.hypot(*np.moveaxis(corners[:, 1:3] - corners[:, 0:2], 2, 0))
    return (
        np.round(sides.max(axis=1), 1).astype(np.float32),
        np.round(sides.min(axis=1), 1).astype(np.float32),
    )


def objects_frame(columns: dict[str, object], geometry: NDArray[np.object_], crs: str) -> gpd.GeoDataFrame:
    """Put the columns under the schema; one that is missing is wholly null, and an empty table keeps its types."""
    n = len(geometry)
    data = {}
    for name, column in SCHEMA.items():
        dtype = pd.ArrowDtype(pa.date32()) if column.dtype == DATE else column.dtype
        values = columns.get(name)
        if values is None:
            values = np.full(n, np.nan) if column.dtype.startswith("float") else [None] * n
        data[name] = pd.Series(values, dtype=dtype)
    return gpd.GeoDataFrame(data, geometry=gpd.GeoSeries(geometry, crs=crs), crs=crs)
