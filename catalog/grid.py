"""The national grid: one CRS, one frame, square tiles, and one fixed lattice of blocks inside them.

Tile keys count from the corner of a frame that depends on the CRS and the resolution alone, so they stay when the
area of interest grows. Everything that depends on its block (a warp, a network) runs on the lattice, never on the
tile, so results do not depend on the tile size (ADR 2).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import overload

import numpy as np
import numpy.typing as npt
import pyproj
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.errors import CatalogError

TILE_SIZES_PX = (512, 1024, 2048, 4096)
BLOCK_PX = 512
_FRAME_STEP_PX = max(TILE_SIZES_PX)
_FRAME_MARGIN_M = 200_000.0
_FRAME_HALF_M = 5_000_000.0  # of a CRS without an area of use: wide enough for the largest nation


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One tile of the grid: the unit of work, and one Zarr shard.

    key : "r012c034", row and column counted from the frame's upper left corner
    frame : pixels of the whole grid; side_px : of the tile
    """

    key: str
    row: int
    col: int
    frame: GeoBox = field(repr=False)
    side_px: int

    @property
    def geobox(self) -> GeoBox:
        """Its pixels; made when asked for, a nation has 100,000 tiles."""
        px = self.side_px
        return self.frame[self.row * px : (self.row + 1) * px, self.col * px : (self.col + 1) * px]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGrid:
    """A grid of square tiles over a whole projected CRS.

    crs : projected, in metres; "EPSG:32632" or any text that pyproj understands
    resolution_m : pixel size
    tile_px : side of a tile, one of 512, 1024, 2048, 4096
    block_px : side of a lattice block
    """

    crs: str
    resolution_m: float = 10.0
    tile_px: int = 2048
    block_px: int = BLOCK_PX

    def __post_init__(self) -> None:
        if self.tile_px not in TILE_SIZES_PX:
            raise CatalogError(f"tile_px={self.tile_px} is not allowed; use one of {TILE_SIZES_PX}")
        if not (math.isfinite(self.resolution_m) and self.resolution_m > 0):
            raise CatalogError(f"resolution_m={self.resolution_m} is not allowed; it must be above 0")
        try:
            crs = pyproj.CRS.from_user_input(self.crs)
        except pyproj.exceptions.CRSError:
            raise CatalogError(
                f"CRS {self.crs!r} is not known; name an EPSG code such as 'EPSG:32632'"
            ) from None
        units = {axis.unit_name for axis in crs.axis_info}
        if not crs.is_projected or units != {"metre"}:
            raise CatalogError(
                f"CRS {self.crs!r} has axes in {'/'.join(sorted(units))}; the grid needs a projected CRS in metres"
            )

    @property
    def key(self) -> str:
        """Short name of the grid, safe as a folder name."""
        return f"{_crs_slug(self.crs)}-{self.resolution_m:.15g}m-{self.tile_px}px-b{self.block_px}"

    @property
    def tile_m(self) -> float:
        """Side of a tile in metres."""
        return self.tile_px * self.resolution_m

    @property
    def frame(self) -> GeoBox:
        """The pixels of the whole CRS; every array of every layer has this shape."""
        return _frame(self.crs, self.resolution_m)

    def tile(self, row: int, col: int) -> Tile:
        """Return the tile at a row and a column of the frame."""
        return self.tiles_at([row], [col])[0]

    def tiles_at(self, rows: npt.ArrayLike, cols: npt.ArrayLike) -> Tiles:
        """Return the tiles at rows and columns of the frame, in this order."""
        found = Tiles(self, np.asarray(rows, np.int64), np.asarray(cols, np.int64))
        n_rows, n_cols = (n // self.tile_px for n in self.frame.shape)
        outside = (found.rows < 0) | (found.rows >= n_rows) | (found.cols < 0) | (found.cols >= n_cols)
        if outside.any():
            row, col = found.rows[outside][0], found.cols[outside][0]
            raise CatalogError(
                f"Tile row {row}, column {col} lies outside the frame of {n_rows} x {n_cols} tiles"
            )
        return found

    def tiles(self, aoi: Aoi) -> Tiles:
        """Return the tiles that share area with the AOI, by row, then column."""
        shape = aoi.to_crs(self.crs)
        left, bottom, right, top = _frame_bounds(self.crs, self.resolution_m)
        xmin, ymin, xmax, ymax = shape.bounds
        if not np.all(np.isfinite([xmin, ymin, xmax, ymax])) or not shapely.box(
            left, bottom, right, top
        ).contains(shapely.box(xmin, ymin, xmax, ymax)):
            raise CatalogError(
                f"The AOI leaves the area in which CRS {self.crs!r} may be used; name another crs in [area], "
                "or leave it out"
            )
        m = self.tile_m
        rows = np.arange(math.floor((top - ymax) / m), math.floor((top - ymin) / m) + 1)
        cols = np.arange(math.floor((xmin - left) / m), math.floor((xmax - left) / m) + 1)
        r, c = (a.ravel() for a in np.meshgrid(rows, cols, indexing="ij"))
        boxes = shapely.box(left + c * m, top - (r + 1) * m, left + (c + 1) * m, top - r * m)
        shapely.prepare(shape)
        # the interiors must meet: an AOI that only touches a tile's edge has no pixel in it
        hit = shapely.intersects(shape, boxes) & ~shapely.touches(shape, boxes)
        return self.tiles_at(r[hit], c[hit])

    def offset_px(self, geobox: GeoBox) -> tuple[int, int]:
        """Row and column in the frame of a GeoBox's first pixel; the GeoBox must lie on the grid's pixels."""
        col, row = (~self.frame.affine) @ (geobox.affine.c, geobox.affine.f)
        return round(row), round(col)


class Tiles(Sequence[Tile]):
    """Tiles of a grid in one order, each made when it is asked for: a nation has 100,000, and few look at all.

    rows, cols : of the frame, (n,) int64
    """

    def __init__(self, grid: TileGrid, rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64]) -> None:
        self.grid, self.rows, self.cols = grid, rows, cols

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Their keys."""
        return tuple(_tile_key(*place) for place in zip(self.rows.tolist(), self.cols.tolist(), strict=True))

    @property
    def roi(self) -> tuple[slice, slice]:
        """Pixels of the frame from the first to the last of their rows and columns."""
        px = self.grid.tile_px
        ends = [(int(at.min()) * px, (int(at.max()) + 1) * px) for at in (self.rows, self.cols)]
        return slice(*ends[0]), slice(*ends[1])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Tile: ...

    @overload
    def __getitem__(self, i: slice) -> Tiles: ...

    def __getitem__(self, i: int | slice) -> Tile | Tiles:
        """Return one tile, or some of them in their order."""
        if isinstance(i, slice):
            return Tiles(self.grid, self.rows[i], self.cols[i])
        row, col, grid = int(self.rows[i]), int(self.cols[i]), self.grid
        return Tile(key=_tile_key(row, col), row=row, col=col, frame=grid.frame, side_px=grid.tile_px)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tiles):
            return NotImplemented
        same = np.array_equal(self.rows, other.rows) and np.array_equal(self.cols, other.cols)
        return self.grid == other.grid and same

    __hash__ = None  # type: ignore[assignment]  # arrays


def _tile_key(row: int, col: int) -> str:
    return f"r{row:03d}c{col:03d}"


def choose_crs(aoi: Aoi) -> str:
    """Choose the grid's CRS: the UTM zone when the AOI lies in one, else an equal-area projection about it.

    The centre of the Lambert azimuthal equal-area is rounded to a degree, so that a slightly grown AOI keeps its grid.
    """
    lonlat = aoi.to_crs("EPSG:4326")
    lon_min, lat_min, lon_max, lat_max = lonlat.bounds
    if lon_max - lon_min > 180:  # split at the antimeridian: the centre lies on the far side
        wrapped = shapely.transform(lonlat, lambda xy: xy + (xy[:, :1] < 0) * np.array([360.0, 0.0]))
        lon_min, _, lon_max, _ = wrapped.bounds
    zone = math.floor((lon_min + 180) / 6)
    if lon_max <= (zone + 1) * 6 - 180 and lat_min >= -80 and lat_max <= 84:
        south = (lat_min + lat_max) / 2 < 0
        return f"EPSG:{(32700 if south else 32600) + zone % 60 + 1}"
    lon0 = (round((lon_min + lon_max) / 2) + 180) % 360 - 180
    lat0 = round((lat_min + lat_max) / 2)
    return _equal_area(lat0, lon0)


def lattice(
    shape: tuple[int, int], offset_px: tuple[int, int], block_px: int
) -> Iterator[tuple[slice, slice]]:
    """Cut a window of the frame along the lattice.

    shape : rows and columns of the window; offset_px : frame row and column of its first pixel.
    Yields slices into the window, in row-major order; blocks at the edge may be partial.
    """
    for rows in cuts(shape[0], offset_px[0], block_px):
        for cols in cuts(shape[1], offset_px[1], block_px):
            yield rows, cols


def cuts(size: int, offset: int, block: int) -> list[slice]:
    """Cut one side of a window, `offset` pixels from the lattice's origin, along the lattice."""
    edges = [0, *range(block - offset % block, size, block), size]
    return [slice(a, b) for a, b in pairwise(edges)]


def _equal_area(lat: int, lon: int) -> str:
    return f"+proj=laea +lat_0={lat} +lon_0={lon} +x_0=0 +y_0=0 +datum=WGS84 +units=m +no_defs"


def _crs_slug(crs: str) -> str:
    """Name a CRS shortly where the short name says all of it, and by a hash otherwise."""
    code = re.fullmatch(r"epsg:(\d+)", crs.strip(), re.IGNORECASE)
    if code:
        return f"epsg{code[1]}"
    laea = re.match(r"\+proj=laea \+lat_0=(-?\d+) \+lon_0=(-?\d+) ", crs)
    if laea and crs == _equal_area(lat := int(laea[1]), lon := int(laea[2])):
        return f"laea-{'ns'[lat < 0]}{abs(lat):02d}{'ew'[lon < 0]}{abs(lon):03d}"
    wkt = pyproj.CRS.from_user_input(crs).to_wkt()
    return "crs" + hashlib.blake2b(wkt.encode(), digest_size=6).hexdigest()


@lru_cache(maxsize=64)
def _frame(crs: str, resolution_m: float) -> GeoBox:
    left, bottom, right, top = _frame_bounds(crs, resolution_m)
    shape = (round((top - bottom) / resolution_m), round((right - left) / resolution_m))
    return GeoBox(shape, Affine(resolution_m, 0, left, 0, -resolution_m, top), crs)


@lru_cache(maxsize=64)
def _frame_bounds(crs: str, resolution_m: float) -> tuple[float, float, float, float]:
    """Left, bottom, right, top of the frame, on multiples of the largest tile."""
    area = pyproj.CRS.from_user_input(crs).area_of_use
    if area is None:
        left = bottom = -_FRAME_HALF_M
        right = top = _FRAME_HALF_M
    else:
        to = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True)
        left, bottom, right, top = to.transform_bounds(*area.bounds, densify_pts=41)
        left, bottom = left - _FRAME_MARGIN_M, bottom - _FRAME_MARGIN_M
        right, top = right + _FRAME_MARGIN_M, top + _FRAME_MARGIN_M
    step = _FRAME_STEP_PX * resolution_m
    return (
        math.floor(left / step) * step,
        math.floor(bottom / step) * step,
        math.ceil(right / step) * step,
        math.ceil(top / step) * step,
    )
