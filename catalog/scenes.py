"""Scenes: the frozen list of what a run reads."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import shapely
import stac_geoparquet.arrow
from odc.geo.geobox import GeoBox
from shapely.geometry.base import BaseGeometry

from slidecube.catalog.aoi import split_at_antimeridian
from slidecube.catalog.errors import CatalogError

Role = Literal["optical", "radar", "dem", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A span of days, both ends inclusive, UTC; or several spans, such as one season of several years.

    start, end : first and last day of all; parts : the spans, in their order, where there are several
    """

    start: dt.date
    end: dt.date
    parts: tuple[Window, ...] = ()

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise CatalogError(f"Window starts {self.start} after it ends {self.end}; swap the two dates")

    @classmethod
    def of(cls, spans: Iterable[Window]) -> Window:
        """Make a window of one or more spans, of which none may share a day with another."""
        ordered = sorted(spans, key=lambda span: (span.start, span.end))
        for one, two in pairwise(ordered):
            if two.start <= one.end:
                raise CatalogError(f"Windows {one} and {two} share days; join them, or set them apart")
        if len(ordered) == 1:
            return ordered[0]
        return cls(start=ordered[0].start, end=ordered[-1].end, parts=tuple(ordered))

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read what `str` wrote."""
        spans = []
        for span in text.split("."):
            start, end = (dt.date.fromisoformat(day) for day in span.split("_"))
            spans.append(cls(start=start, end=end))
        return cls.of(spans)

    @property
    def spans(self) -> tuple[Window, ...]:
        """Its spans, each one window of one span."""
        return self.parts or (self,)

    def years_back(self, years: int) -> Window:
        """Return the same days of an earlier year; 29 February is the 28th where there is none."""
        if self.parts:
            return Window.of(part.years_back(years) for part in self.parts)
        return Window(start=_years_back(self.start, years), end=_years_back(self.end, years))

    def __contains__(self, when: object) -> bool:
        if not isinstance(when, dt.datetime):
            return False
        day = when.astimezone(dt.UTC).date()
        return any(span.start <= day <= span.end for span in self.spans)

    def __str__(self) -> str:
        if self.parts:
            return ".".join(map(str, self.parts))
        return f"{self.start.isoformat()}_{self.end.isoformat()}"


def _years_back(day: dt.date, years: int) -> dt.date:
    try:
        return day.replace(year=day.year - years)
    except ValueError:
        return day.replace(year=day.year - years, day=28)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offset:
    """The additive radiometric offset of a scene.

    value : reflectance to add to DN * 1e-4, e.g. -0.1 or 0.0
    applied : an offset existed and the stored DN already has it removed
    reason : which rule decided, one line
    """

    value: float
    applied: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternate:
    """The same acquisition, of the same processing baseline, as another source holds it.

    source : name in the table of sources, or a local catalogue's path; id : of its item
    version, offset : its own, as a Scene's
    hrefs : canonical band name -> address, unsigned and absolute
    """

    source: str
    id: str
    version: str
    offset: Offset | None
    hrefs: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sourcing:
    """Where the scenes of one role came from, and who stands by.

    asked : the source that was named first; used : the one whose scenes are read
    failed : (source, reason) of each that was asked before `used` and did not answer
    alternates : (source, number of the scenes that it holds, too); unsearched : (source, reason) of each that could
        not be asked for them
    """

    role: Role
    asked: str
    used: str
    failed: tuple[tuple[str, str], ...] = ()
    alternates: tuple[tuple[str, int], ...] = ()
    unsearched: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One STAC item as a run reads it.

    id : of the item
    role : what it is to the run
    source : name in the table of sources, or the local catalogue's path as the user wrote it
    datetime : sensing time, UTC
    identity : canonical key of the acquisition: platform, MGRS tile, datatake, datastrip sensing start
    datatake : the part of `identity` shared by neighbouring items of one overpass
    version : baseline and generation time; the newest of one identity is kept
    offset : None for a DEM
    bands : canonical band name ("B02", "SCL", "elevation") -> asset key
    item : the STAC item as a dict, hrefs unsigned and absolute, carrying proj:epsg and proj:code where either is known
    alternates : where its assets lie as well, in the order in which they are tried
    """

    id: str
    role: Role
    source: str
    datetime: dt.datetime
    identity: str
    datatake: str
    version: str
    offset: Offset | None
    bands: dict[str, str]
    item: dict[str, Any]
    alternates: tuple[Alternate, ...] = ()


_FORMAT = b"slidecube.scenes.v1"
_DATETIME = "%Y-%m-%dT%H:%M:%S.%fZ"
_EPSG_LONLAT = 4326


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneTable:
    """The frozen list of what a run reads, in one order whatever order it was found in.

    scenes : sorted by role, sensing time, identity and id
    sourcing : where they came from, by role; of a whole table only, its parts have none
    """

    scenes: tuple[Scene, ...]
    sourcing: tuple[Sourcing, ...] = ()
    _index: list[shapely.STRtree] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.scenes, key=_order))
        object.__setattr__(self, "scenes", ordered)
        for one, two in pairwise(ordered):
            if (one.role, one.identity, one.id) == (two.role, two.identity, two.id):
                raise CatalogError(f"Scene {one.id!r} stands twice in the scene table; remove one of the two")

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[Scene]:
        return iter(self.scenes)

    @property
    def digest(self) -> str:
        """Hash of what decides what is read: roles, identities, ids, versions, offsets; 32 hexadecimal digits.

        Alternates count where there are any: they decide no pixel, but a plan with others is another plan.
        """
        lines = [json.dumps(_decisive(scene), ensure_ascii=True) for scene in self.scenes]
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()

    def source_of(self, role: Role, asked: str) -> str:
        """Return the source that the scenes of a role came from: the one that was asked, unless it did not answer."""
        return next((entry.used for entry in self.sourcing if entry.role == role and entry.failed), asked)

    def role(self, role: Role) -> SceneTable:
        """Return the scenes of one role."""
        return SceneTable(scenes=tuple(s for s in self.scenes if s.role == role))

    def within(self, window: Window) -> SceneTable:
        """Return the scenes sensed within a window, both end days included."""
        return SceneTable(scenes=tuple(s for s in self.scenes if s.datetime in window))

    def touching(self, geobox: GeoBox) -> SceneTable:
        """Return the scenes whose footprint shares a point with a GeoBox, in any CRS and across the antimeridian."""
        return next(self.touching_each([geobox]))

    def touching_each(self, geoboxes: Iterable[GeoBox]) -> Iterator[SceneTable]:
        """Yield `touching` of each GeoBox; one query answers them all, so a hundred thousand tiles take seconds."""
        boxes = list(geoboxes)
        outlines = np.array([_outline(box) for box in boxes], dtype=object)
        tiles, rows = self._tree().query(outlines, predicate="intersects")
        order = np.lexsort((rows, tiles))
        tiles, rows = tiles[order], rows[order]
        cuts = np.searchsorted(tiles, np.arange(len(boxes) + 1))
        for start, stop in pairwise(cuts.tolist()):
            yield SceneTable(scenes=tuple(self.scenes[i] for i in rows[start:stop].tolist()))

    def _tree(self) -> shapely.STRtree:
        if not self._index:
            self._index.append(shapely.STRtree(footprints(self.scenes)))
        return self._index[0]

    def to_parquet(self, path: str | Path) -> None:
        """Write the table as stac-geoparquet with our columns beside; the file appears whole or not at all.

        The columns of stac-geoparquet are for other programs; the column `slidecube:item` holds each item as JSON,
        since one Parquet schema over several providers fills in nulls that the items do not have.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            self._write(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read_parquet(cls, path: str | Path) -> SceneTable:
        """Read a table written by `to_parquet`; it equals the one that was written.

        Raises CatalogError if the file is missing, of another format, or changed since.
        """
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:160]
            raise CatalogError(f"Scene table {str(path)!r} cannot be read: {reason}") from None
        meta = _frozen_as(table.schema)
        if meta.get(b"format") != _FORMAT:
            raise CatalogError(f"{str(path)!r} is not a scene table of this version; make the plan again")
        own = table.select([n for n in table.schema.names if n.startswith("slidecube:")]).to_pylist()
        try:
            scenes = tuple(_from_row(row) for row in own)
            sourcing = tuple(_sourcing_from(entry) for entry in json.loads(meta.get(b"sourcing", b"[]")))
        except (KeyError, TypeError, ValueError) as error:
            raise CatalogError(
                f"Scene table {str(path)!r} is damaged ({error!r}); make the plan again"
            ) from None
        found = cls(scenes=scenes, sourcing=sourcing)
        if found.digest.encode() != meta.get(b"digest"):
            raise CatalogError(
                f"Scene table {str(path)!r} was changed after it was frozen; make the plan again"
            )
        return found

    def _write(self, path: Path) -> None:
        own = pa.Table.from_pylist([_to_row(s) for s in self.scenes], schema=_OWN_SCHEMA)
        sourcing = json.dumps([asdict(entry) for entry in self.sourcing])
        frozen = {b"format": _FORMAT, b"digest": self.digest.encode(), b"sourcing": sourcing.encode()}
        last = _OWN_SCHEMA.field(_FROZEN_COLUMN).with_metadata(frozen)
        own = own.cast(_OWN_SCHEMA.set(_OWN_SCHEMA.get_field_index(_FROZEN_COLUMN), last))
        if not self.scenes:
            pq.write_table(own, path)
            return
        table = _interoperable([s.item for s in self.scenes])
        for column in own.schema:
            table = table.append_column(column, own.column(column.name))
        stac_geoparquet.arrow.to_parquet(table, path, compression="zstd")


_FROZEN_COLUMN = "slidecube:item"
_OWN_SCHEMA = pa.schema(
    [
        ("slidecube:role", pa.string()),
        ("slidecube:source", pa.string()),
        ("slidecube:datetime", pa.string()),
        ("slidecube:identity", pa.string()),
        ("slidecube:datatake", pa.string()),
        ("slidecube:version", pa.string()),
        ("slidecube:offset_value", pa.float64()),
        ("slidecube:offset_applied", pa.bool_()),
        ("slidecube:offset_reason", pa.string()),
        ("slidecube:bands", pa.string()),
        ("slidecube:alternates", pa.string()),
        ("slidecube:item", pa.string()),
    ]
)


def _frozen_as(schema: pa.Schema) -> dict[bytes, bytes]:
    """Return format and digest; they lie on a column, since stac-geoparquet writes the file's own metadata."""
    if _FROZEN_COLUMN not in schema.names:
        return {}
    return schema.field(_FROZEN_COLUMN).metadata or {}


def _order(scene: Scene) -> tuple[str, dt.datetime, str, str]:
    return (scene.role, scene.datetime, scene.identity, scene.id)


def _decisive(scene: Scene) -> list[Any]:
    offset = None if scene.offset is None else [scene.offset.value, scene.offset.applied]
    others = [[other.source, other.id, other.version] for other in scene.alternates]
    return [scene.role, scene.identity, scene.id, scene.version, offset, *([others] if others else [])]


def _to_row(scene: Scene) -> dict[str, Any]:
    offset = scene.offset
    return {
        "slidecube:role": scene.role,
        "slidecube:source": scene.source,
        "slidecube:datetime": scene.datetime.astimezone(dt.UTC).strftime(_DATETIME),
        "slidecube:identity": scene.identity,
        "slidecube:datatake": scene.datatake,
        "slidecube:version": scene.version,
        "slidecube:offset_value": offset.value if offset else None,
        "slidecube:offset_applied": offset.applied if offset else None,
        "slidecube:offset_reason": offset.reason if offset else None,
        "slidecube:bands": json.dumps(scene.bands),
        "slidecube:alternates": json.dumps([asdict(other) for other in scene.alternates], ensure_ascii=False),
        "slidecube:item": json.dumps(scene.item, ensure_ascii=False),
    }


def _from_row(row: dict[str, Any]) -> Scene:
    item = json.loads(row["slidecube:item"])
    offset = None
    if row["slidecube:offset_value"] is not None:
        offset = Offset(
            value=row["slidecube:offset_value"],
            applied=row["slidecube:offset_applied"],
            reason=row["slidecube:offset_reason"],
        )
    return Scene(
        id=item["id"],
        role=row["slidecube:role"],
        source=row["slidecube:source"],
        datetime=dt.datetime.fromisoformat(row["slidecube:datetime"]).astimezone(dt.UTC),
        identity=row["slidecube:identity"],
        datatake=row["slidecube:datatake"],
        version=row["slidecube:version"],
        offset=offset,
        bands=json.loads(row["slidecube:bands"]),
        item=item,
        # a list frozen before there were alternates has no such column
        alternates=tuple(
            _alternate_from(entry) for entry in json.loads(row.get("slidecube:alternates") or "[]")
        ),
    )


def _alternate_from(entry: dict[str, Any]) -> Alternate:
    offset = entry["offset"]
    return Alternate(**{**entry, "offset": None if offset is None else Offset(**offset)})


def _sourcing_from(entry: dict[str, Any]) -> Sourcing:
    pairs = {name: tuple(map(tuple, entry[name])) for name in ("failed", "alternates", "unsearched")}
    return Sourcing(**{**entry, **pairs})


def _interoperable(items: list[dict[str, Any]]) -> pa.Table:
    """Return the stac-geoparquet columns of items of any providers.

    Properties whose types disagree between providers are left to the JSON column; one such column would fail all.
    """
    plain = [_plain(item) for item in items]
    kinds: dict[str, set[str]] = {}
    for item in plain:
        for key, value in item["properties"].items():
            kinds.setdefault(key, set()).add(_kind(value))
    mixed = {
        key for key, seen in kinds.items() if len(seen - {"null"}) > 1 or "nested" in seen or "time" in seen
    }
    for item in plain:
        item["properties"] = {
            k: v for k, v in item["properties"].items() if k not in mixed or k == "datetime"
        }
    return stac_geoparquet.arrow.parse_stac_items_to_arrow(plain).read_all()


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item reduced to the core of STAC, its assets to href, type and roles."""
    keep = ("href", "type", "roles", "title")
    return {
        "type": "Feature",
        "stac_version": str(item.get("stac_version", "1.0.0")),
        "stac_extensions": [],
        "id": item["id"],
        "geometry": item["geometry"],
        "bbox": item.get("bbox") or list(shapely.geometry.shape(item["geometry"]).bounds),
        "collection": item.get("collection") or "",
        "links": [],
        "properties": dict(item["properties"]),
        "assets": {k: {n: a[n] for n in keep if n in a} for k, a in item["assets"].items()},
    }


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "time" if re.match(r"\d{4}-\d\d-\d\d[T ]", value) else "text"
    return "nested"


# --- footprints ---------------------------------------------------------------------------------------------------


def footprints(scenes: Sequence[Scene]) -> np.ndarray:
    """Return the footprints in longitude and latitude, split at the antimeridian, as an array of geometries.

    The vertices of a footprint are joined twice: straight in longitude and latitude, as GeoJSON says, and straight
    in the scene's own projection, as the pixels lie. At 66 degrees north the two differ by half a kilometre over the
    side of a Sentinel-2 tile; the union of both never loses a pixel.
    """
    shapes = np.array([_lonlat_shape(s.item["geometry"]) for s in scenes], dtype=object)
    codes = np.array([_epsg(s.item) for s in scenes])
    for code in np.unique(codes[codes > 0]).tolist():
        if code == _EPSG_LONLAT:
            continue
        rows = np.flatnonzero(codes == code)
        shapes[rows] = shapely.union(shapes[rows], _as_pixels_lie(shapes[rows], code))
    return np.array([split_at_antimeridian(s) for s in shapes], dtype=object)


def _lonlat_shape(geometry: dict[str, Any]) -> BaseGeometry:
    """Return a geometry whose longitudes run on past 180 instead of jumping."""
    shape = shapely.geometry.shape(geometry)
    shape = shapely.force_2d(shape)
    xmin, _, xmax, _ = shape.bounds
    if xmax - xmin > 180:  # split at the antimeridian, or wrongly not split: no scene is half a globe wide
        shape = shapely.transform(shape, lambda xy: np.column_stack([xy[:, 0] % 360, xy[:, 1]]))
    return shape if shape.is_valid else shapely.make_valid(shape)


def _as_pixels_lie(shapes: np.ndarray, epsg: int) -> np.ndarray:
    there = pyproj.Transformer.from_crs(_EPSG_LONLAT, epsg, always_xy=True)
    projected = shapely.transform(shapes, lambda xy: np.column_stack(there.transform(xy[:, 0], xy[:, 1])))
    dense = shapely.segmentize(projected, 5_000.0)

    def back(xy: np.ndarray) -> np.ndarray:
        lon, lat = there.transform(xy[:, 0], xy[:, 1], direction="INVERSE")
        return np.column_stack([lon, lat])

    lonlat = shapely.transform(dense, back)
    for i, shape in enumerate(lonlat):
        xmin, _, xmax, _ = shape.bounds
        if xmax - xmin > 180:
            lonlat[i] = shapely.transform(shape, lambda xy: np.column_stack([xy[:, 0] % 360, xy[:, 1]]))
    return np.asarray(shapely.make_valid(lonlat))


def _epsg(item: dict[str, Any]) -> int:
    code = item["properties"].get("proj:epsg")
    return int(code) if isinstance(code, int) and code > 0 else 0


def _outline(geobox: GeoBox) -> BaseGeometry:
    """Return a GeoBox's outline in longitude and latitude, densified and split at the antimeridian."""
    rows, cols = geobox.shape
    t = np.linspace(0.0, 1.0, 33)
    zero, one = np.zeros_like(t), np.ones_like(t)
    x_px = np.concatenate([t, one, 1 - t, zero, [0.5]]) * cols  # around, then the centre
    y_px = np.concatenate([zero, t, one, 1 - t, [0.5]]) * rows
    a, b, c, d, e, f = geobox.affine[:6]
    lon, lat = _to_lonlat(str(geobox.crs)).transform(a * x_px + b * y_px + c, d * x_px + e * y_px + f)
    (lon, centre_lon), (lat, centre_lat) = (lon[:-1], lon[-1]), (lat[:-1], lat[-1])
    if not (np.all(np.isfinite(lon)) and np.isfinite(centre_lon)):
        raise CatalogError(f"GeoBox {geobox.boundingbox} lies outside the area in which its CRS may be used")
    lon = centre_lon + (lon - centre_lon + 180) % 360 - 180
    ring = np.column_stack([lon, lat])
    if np.abs(np.diff(lon)).max() > 180:  # around a pole: everything on its side of the outline
        pole = 90.0 if centre_lat > 0 else -90.0
        return shapely.box(-180, min(pole, lat.min()), 180, max(pole, lat.max()))
    return split_at_antimeridian(shapely.make_valid(shapely.Polygon(ring)))


@lru_cache(maxsize=64)
def _to_lonlat(crs: str) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs(crs, _EPSG_LONLAT, always_xy=True)
