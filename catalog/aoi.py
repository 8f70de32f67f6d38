"""The area of interest: what a user wants mapped, read from a file, a bounding box or WKT.

Longitudes and latitudes are kept as RFC 7946 asks: x before y, and an area across the antimeridian split at it.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pyproj
import shapely
import shapely.affinity
from shapely.geometry.base import BaseGeometry
from shapely.validation import explain_validity

from slidecube.catalog.errors import CatalogError

_LONLAT = "EPSG:4326"
_GEOJSON = (".geojson", ".json")
_VECTOR = (*_GEOJSON, ".gpkg", ".shp", ".fgb", ".zip")
_WKT = re.compile(
    r"\s*(SRID=(?P<srid>\d+);)?\s*(MULTI)?(POLYGON|POINT|LINESTRING|GEOMETRYCOLLECTION|CURVEPOLYGON|SURFACE)\b",
    re.IGNORECASE,
)
# A straight edge of 2 km leaves the curve of its projection by 0.1 m at most: a hundredth of a pixel.
_STEP_DEG = 0.02
_STEP_M = 2_000.0
_SPLIT_HINT = "write it as polygons split at longitude 180 (RFC 7946, 3.1.9), or as a bbox with west > east"


@dataclass(frozen=True, slots=True, kw_only=True)
class Aoi:
    """An area of interest.

    name : short name, used in file names
    geometry : valid polygon or multipolygon, x/y (lon/lat) order, in `crs`; areas across the antimeridian are
        split at it as RFC 7946 asks
    crs : any text that pyproj understands
    """

    name: str
    geometry: BaseGeometry
    crs: str = _LONLAT

    def to_crs(self, crs: str) -> BaseGeometry:
        """Return the geometry in another CRS, its long edges densified so that they stay true.

        Into longitudes and latitudes an area across the antimeridian comes back split at it.
        Raises CatalogError where one of the two CRSs may not be used.
        """
        source, target = pyproj.CRS.from_user_input(self.crs), pyproj.CRS.from_user_input(crs)
        if source == target:
            return self.geometry
        step = _STEP_DEG if source.is_geographic else _STEP_M
        xmin, ymin, xmax, ymax = self.geometry.bounds
        dense = shapely.segmentize(self.geometry, max(step, (xmax - xmin) / 4096, (ymax - ymin) / 4096))
        to = pyproj.Transformer.from_crs(source, target, always_xy=True)

        def project(xy: np.ndarray) -> np.ndarray:
            return np.column_stack(to.transform(xy[:, 0], xy[:, 1]))

        projected = shapely.transform(dense, project)
        if not np.all(np.isfinite(shapely.get_coordinates(projected))):
            raise CatalogError(
                f"AOI {self.name!r} cannot be brought from {_crs_name(self.crs)} to {_crs_name(crs)}: it lies outside "
                "the area in which one of them may be used; name another crs"
            )
        if target.is_geographic and not source.is_geographic:
            projected = split_at_antimeridian(_unwrap(projected))
        return _polygons_of(projected)


def read_aoi(
    source: str | Path | Sequence[float],
    *,
    name: str | None = None,
    crs: str | None = None,
    layer: str | None = None,
) -> Aoi:
    """Read an area of interest.

    source : a file (GeoJSON, GeoPackage, shapefile, FlatGeobuf, zipped shapefile), a bounding box
        (west, south, east, north; west > east crosses the antimeridian), WKT or GeoJSON text
    name : defaults to the file's stem
    crs : of a source that does not say its own; longitudes and latitudes for a bbox, WKT and GeoJSON
    layer : of a file with several layers of polygons
    Returns one valid polygon or multipolygon: features are unioned, heights dropped.
    Raises CatalogError, one line saying what is wrong and where.
    """
    label, parts, found = _read(source, crs, layer)
    given = crs or found
    if given is None:
        raise CatalogError(
            f"AOI {label} has no CRS (a shapefile needs its .prj file); add the .prj, or give crs, "
            "for example crs = 'EPSG:4326'"
        )
    if crs and found and not _same_crs(crs, found):
        raise CatalogError(f"AOI {label} is in {_crs_name(found)}, but crs={crs!r} was given; leave crs out")
    horizontal = _horizontal_crs(given, label)
    union = _checked_union(parts, horizontal.is_geographic, label)
    aoi = _in_own_or_lonlat(union, horizontal, label)
    return Aoi(name=_slug(name or _default_name(source)), geometry=aoi[0], crs=aoi[1])


def split_at_antimeridian(geometry: BaseGeometry) -> BaseGeometry:
    """Cut polygons that run past longitude -180 or 180 and bring the parts back between the two."""
    xmin, _, xmax, _ = geometry.bounds
    if geometry.is_empty or (xmin >= -180 and xmax <= 180):
        return geometry
    parts = []
    for turn in range(int(np.floor((xmin + 180) / 360)), int(np.ceil((xmax + 180) / 360))):
        strip = shapely.box(turn * 360 - 180, -90, turn * 360 + 180, 90)
        part = shapely.intersection(shapely.make_valid(geometry), strip)
        parts.append(shapely.affinity.translate(part, -360.0 * turn))
    return _polygons_of(shapely.union_all(parts))


def _read(
    source: str | Path | Sequence[float], crs: str | None, layer: str | None
) -> tuple[str, list[tuple[str, BaseGeometry]], str | None]:
    """Return a label for messages, the named geometries, and the CRS that the source itself says."""
    if isinstance(source, str) and (numbers := _as_numbers(source)) is not None:
        source = numbers
    if isinstance(source, str):
        text = source.strip()
        if text.startswith("{"):
            return _read_geojson_text(text, "text", crs)
        if match := _WKT.match(text):
            return _read_wkt(text, match["srid"], crs)
        source = Path(source)
    if isinstance(source, Path):
        return _read_file(source.expanduser(), crs, layer)
    return _read_bbox(source, crs)


def _as_numbers(text: str) -> list[float] | None:
    parts = [p for p in re.split(r"[,\s]+", text.strip().strip("[]()")) if p]
    try:
        return [float(p) for p in parts] if len(parts) > 1 else None
    except ValueError:
        return None


def _read_bbox(
    values: Sequence[float], crs: str | None
) -> tuple[str, list[tuple[str, BaseGeometry]], str | None]:
    label = f"bbox {list(values)}"
    try:
        box = [float(v) for v in values]
    except (TypeError, ValueError):
        raise CatalogError(f"AOI {label} is not made of numbers; give [west, south, east, north]") from None
    if len(box) != 4 or not np.all(np.isfinite(box)):
        raise CatalogError(f"AOI {label} has {len(box)} values; give four: [west, south, east, north]")
    west, south, east, north = box
    lonlat = crs is None or _horizontal_crs(crs, label).is_geographic
    if lonlat:
        _check_lonlat(np.array([[west, south], [east, north]]), label)
    if south >= north or west == east or (west > east and not lonlat):
        raise CatalogError(f"AOI {label} is empty or upside down; give [west, south, east, north]")
    if lonlat and east - west > 180:
        raise CatalogError(
            f"AOI {label} spans {east - west:g} degrees of longitude; if it crosses the antimeridian, give "
            f"west > east: {[east, south, west, north]}; otherwise give a smaller area"
        )
    turn = 360.0 if west > east else 0.0  # RFC 7946, 5.2: west > east crosses the antimeridian
    box_shape = shapely.box(west, south, east + turn, north)
    shape = split_at_antimeridian(box_shape) if lonlat else box_shape
    return label, [("", shape)], crs or _LONLAT


def _read_wkt(
    text: str, srid: str | None, crs: str | None
) -> tuple[str, list[tuple[str, BaseGeometry]], str | None]:
    label = f"WKT {_short(text)!r}"
    body = text.split(";", 1)[1] if srid else text
    try:
        shape = shapely.from_wkt(body)
    except shapely.errors.GEOSException as error:
        raise CatalogError(f"AOI {label} cannot be read: {_one_line(error)}") from None
    return label, [("", shape)], f"EPSG:{srid}" if srid else (crs or _LONLAT)


def _read_file(
    path: Path, crs: str | None, layer: str | None
) -> tuple[str, list[tuple[str, BaseGeometry]], str | None]:
    label = f"{str(path)!r}"
    if not path.exists():
        raise CatalogError(f"AOI file {label} does not exist{_did_you_mean(path)}")
    if path.is_dir() or path.suffix.lower() not in _VECTOR:
        what = "is a folder" if path.is_dir() else f"has the unknown ending {path.suffix!r}"
        raise CatalogError(f"AOI {label} {what}; give a file that ends in {', '.join(_VECTOR)}")
    if path.suffix.lower() in _GEOJSON:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise CatalogError(f"AOI file {label} cannot be read: {_one_line(error)}") from None
        return _read_geojson_text(text, label, crs)
    return _read_with_gdal(path, label, layer)


def _read_with_gdal(
    path: Path, label: str, layer: str | None
) -> tuple[str, list[tuple[str, BaseGeometry]], str | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = _polygon_layer(path, label, layer)
            meta, _, wkb, _ = pyogrio.raw.read(path, layer=chosen, columns=[], force_2d=True)
            shapes = shapely.from_wkb(wkb)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, OSError, ValueError) as error:
        raise CatalogError(f"AOI file {label} cannot be read: {_one_line(error)}") from None
    except shapely.errors.GEOSException as error:
        raise CatalogError(f"AOI file {label} holds a broken geometry: {_one_line(error)}") from None
    return label, [(f"feature {i + 1}", s) for i, s in enumerate(shapes)], meta["crs"]


def _polygon_layer(path: Path, label: str, layer: str | None) -> str:
    layers = pyogrio.list_layers(path)
    names = [str(n) for n in layers[:, 0]]
    if layer is not None:
        if layer not in names:
            raise CatalogError(f"AOI file {label} has no layer {layer!r}; layers: {', '.join(names)}")
        return layer
    with_polygons = [str(n) for n, kind in layers if "Polygon" in str(kind) or str(kind) == "Unknown"]
    candidates = with_polygons or [str(n) for n, kind in layers if kind is not None]
    if not candidates:
        raise CatalogError(f"AOI file {label} has no layer with geometries; give a file with a polygon")
    if len(candidates) > 1:
        raise CatalogError(
            f"AOI file {label} has several layers: {', '.join(candidates)}; name one with layer"
        )
    return candidates[0]


def _read_geojson_text(
    text: str, label: str, crs: str | None
) -> tuple[str, list[tuple[str, BaseGeometry]], str | None]:
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CatalogError(f"AOI {label} is not valid JSON: {_one_line(error)}") from None
    if not isinstance(document, dict) or "type" not in document:
        raise CatalogError(
            f"AOI {label} is JSON but not GeoJSON; it needs a 'type' such as 'FeatureCollection'"
        )
    if document["type"] == "FeatureCollection":
        features = document.get("features")
        if not isinstance(features, list):
            raise CatalogError(f"AOI {label} has no list of 'features'")
        named = [(f"feature {i + 1}", f) for i, f in enumerate(features)]
    else:
        named = [("", document)]
    parts = [(where, _geojson_shape(f, f"{label} {where}".strip())) for where, f in named]
    return label, parts, _geojson_crs(document) or crs or _LONLAT


def _geojson_crs(document: dict[str, Any]) -> str | None:
    # the 2008 draft had a 'crs' member, and GIS programs still write it
    try:
        return str(document["crs"]["properties"]["name"])
    except (KeyError, TypeError):
        return None


def _geojson_shape(feature: Any, where: str) -> BaseGeometry:
    geometry = feature.get("geometry") if isinstance(feature, dict) and "geometry" in feature else feature
    if geometry is None:
        return shapely.Polygon()
    try:
        return shapely.geometry.shape(_closed(geometry))
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise CatalogError(f"AOI {where} has a broken geometry: {_one_line(error)}") from None
    except shapely.errors.ShapelyError as error:
        raise CatalogError(f"AOI {where} has a broken geometry: {_one_line(error)}") from None


def _closed(geometry: dict[str, Any]) -> dict[str, Any]:
    """Close open rings and drop heights: both are unambiguous."""
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        return {"type": kind, "geometries": [_closed(g) for g in geometry["geometries"]]}
    if kind not in ("Polygon", "MultiPolygon"):
        return geometry

    def ring(points: list[list[float]]) -> list[list[float]]:
        flat = [[float(p[0]), float(p[1])] for p in points]
        if not np.all(np.isfinite(flat)):
            raise ValueError("a coordinate is not a finite number")
        return flat if not flat or flat[0] == flat[-1] else [*flat, flat[0]]

    polygons = geometry["coordinates"] if kind == "MultiPolygon" else [geometry["coordinates"]]
    return {"type": "MultiPolygon", "coordinates": [[ring(r) for r in polygon] for polygon in polygons]}


def _checked_union(parts: Iterable[tuple[str, BaseGeometry]], lonlat: bool, label: str) -> BaseGeometry:  # noqa: FBT001
    polygons = []
    for where, shape in parts:
        place = f"{label} {where}".strip()
        if shape is None or shape.is_empty:
            continue
        for polygon in _only_polygons(shape, place):
            xy = shapely.get_coordinates(polygon)
            if not np.all(np.isfinite(xy)):
                raise CatalogError(f"AOI {place} has coordinates that are not finite numbers")
            if lonlat:
                _check_lonlat(xy, place)
                _check_edges(polygon, place)
            polygons.append(_repaired(polygon, place))
    union = shapely.union_all(polygons) if polygons else shapely.Polygon()
    if union.is_empty or union.area == 0:
        raise CatalogError(f"AOI {label} is empty; give at least one polygon with an area")
    return union


def _only_polygons(shape: BaseGeometry, place: str) -> list[BaseGeometry]:
    flat = list(shapely.get_parts(shape))
    while any(s.geom_type == "GeometryCollection" or s.geom_type.startswith("Multi") for s in flat):
        flat = [p for s in flat for p in shapely.get_parts(s)]
    others = sorted({s.geom_type for s in flat if s.geom_type != "Polygon" and not s.is_empty})
    if others:
        raise CatalogError(f"AOI {place} holds {'/'.join(others)}; an area of interest is made of polygons")
    return [shapely.force_2d(s) for s in flat if not s.is_empty]


def _check_lonlat(xy: np.ndarray, place: str) -> None:
    x, y = np.abs(xy[:, 0]).max(), np.abs(xy[:, 1]).max()
    if x <= 180 and y <= 90:
        return
    worst = xy[int(np.argmax(np.maximum(np.abs(xy[:, 0]) - 180, np.abs(xy[:, 1]) - 90)))]
    got = f"({worst[0]:g}, {worst[1]:g}) is not a longitude and latitude"
    if y <= 90 and x <= 360:
        raise CatalogError(f"AOI {place}: {got}; if the area crosses the antimeridian, {_SPLIT_HINT}")
    if x <= 90 and y <= 180:
        raise CatalogError(f"AOI {place}: {got}; probably swapped: x (longitude) comes first")
    raise CatalogError(f"AOI {place}: {got}; probably projected metres: give crs, such as 'EPSG:32632'")


def _check_edges(polygon: BaseGeometry, place: str) -> None:
    rings = [polygon.exterior, *polygon.interiors]  # type: ignore[attr-defined]
    for ring in rings:
        xy = shapely.get_coordinates(ring)
        jump = np.abs(np.diff(xy[:, 0]))
        if jump.size and jump.max() > 180:
            a, b = xy[int(jump.argmax())], xy[int(jump.argmax()) + 1]
            raise CatalogError(
                f"AOI {place} has an edge over {jump.max():g} degrees of longitude, from ({a[0]:g}, {a[1]:g}) to "
                f"({b[0]:g}, {b[1]:g}): it crosses the antimeridian unsplit; {_SPLIT_HINT}"
            )


def _repaired(polygon: BaseGeometry, place: str) -> BaseGeometry:
    """Return a valid polygon where the repair keeps the area that the rings enclose; refuse every other fault.

    A ring that touches itself or has a spike encloses the same area after the repair; a bow tie, a hole outside its
    shell or a ring drawn twice does not, and what was meant is anyone's guess.
    """
    if polygon.is_valid:
        return polygon
    fixed = _polygons_of(shapely.make_valid(polygon))
    drawn = polygon.area  # shell minus holes by the surveyor's formula, valid or not
    if drawn > 0 and abs(fixed.area - drawn) <= 1e-9 * drawn:
        return fixed
    raise CatalogError(f"AOI {place} is not a valid polygon: {explain_validity(polygon)}; repair it in a GIS")


def _polygons_of(geometry: BaseGeometry) -> BaseGeometry:
    """Return the valid polygonal part."""
    valid = geometry if geometry.is_valid else shapely.make_valid(geometry)
    if valid.geom_type in ("Polygon", "MultiPolygon"):
        return valid
    return shapely.union_all(
        [p for p in shapely.get_parts(valid) if p.geom_type in ("Polygon", "MultiPolygon")]
    )


def _in_own_or_lonlat(union: BaseGeometry, crs: pyproj.CRS, label: str) -> tuple[BaseGeometry, str]:
    """Keep a projected AOI in its own CRS, so that its edges stay exactly where they were drawn."""
    text = crs.to_string()
    if crs == pyproj.CRS.from_user_input(_LONLAT):
        return union, _LONLAT
    try:
        lonlat = Aoi(name=label, geometry=union, crs=text).to_crs(_LONLAT)
    except CatalogError:
        lonlat = shapely.Polygon()
    if lonlat.is_empty or lonlat.area == 0:
        raise CatalogError(
            f"AOI {label} lies outside the area in which {_crs_name(text)} may be used; is crs right, or is it "
            "in longitudes and latitudes?"
        )
    return (lonlat, _LONLAT) if crs.is_geographic else (union, text)


def _unwrap(geometry: BaseGeometry) -> BaseGeometry:
    """Bring every longitude within half a turn of the first one, so that no edge jumps at the antimeridian."""
    first = shapely.get_coordinates(geometry)[:1, 0]
    if not first.size or not np.isfinite(first[0]):
        return geometry
    return shapely.transform(
        geometry, lambda xy: np.column_stack([first + (xy[:, 0] - first + 180) % 360 - 180, xy[:, 1]])
    )


def _horizontal_crs(crs: str, label: str) -> pyproj.CRS:
    try:
        parsed = pyproj.CRS.from_user_input(crs)
    except pyproj.exceptions.CRSError:
        raise CatalogError(
            f"AOI {label}: CRS {_short(str(crs))!r} is not known; name an EPSG code such as 'EPSG:32632'"
        ) from None
    parsed = parsed.to_2d()
    if parsed.is_compound:  # heights are dropped, and so is their datum
        parsed = parsed.sub_crs_list[0]
    if not (parsed.is_geographic or parsed.is_projected):
        raise CatalogError(f"AOI {label}: CRS {_crs_name(crs)} is local; name one that is tied to the Earth")
    return parsed


def _same_crs(a: str, b: str) -> bool:
    one, two = _horizontal_crs(a, "crs"), _horizontal_crs(b, "file")
    return one.equals(two, ignore_axis_order=True) or (
        one.to_epsg() is not None and one.to_epsg() == two.to_epsg()
    )


def _crs_name(crs: str) -> str:
    try:
        parsed = pyproj.CRS.from_user_input(crs)
    except pyproj.exceptions.CRSError:
        return _short(str(crs))
    code = parsed.to_epsg()
    return f"EPSG:{code}" if code else parsed.name


def _did_you_mean(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, _names(folder.parent), n=1)
        return f": there is no folder {str(folder)!r}" + (
            f"; did you mean {str(folder.parent / near[0] / path.name)!r}?" if near else ""
        )
    near = difflib.get_close_matches(path.name, _names(folder), n=1)
    return f"; did you mean {str(folder / near[0])!r}?" if near else f"; look into {str(folder)!r}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir())
    except OSError:
        return []


def _default_name(source: str | Path | Sequence[float]) -> str:
    is_text = isinstance(source, str) and (_WKT.match(source) or source.strip().startswith("{"))
    if is_text or not isinstance(source, str | Path) or _as_numbers(str(source)) is not None:
        return "aoi"
    return Path(source).stem


def _slug(name: str) -> str:
    """Return a name that is safe in file names on every system."""
    return re.sub(r"[^\w-]+", "-", name).strip("-_")[:64] or "aoi"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
