"""Training points of a land-cover classification: a file of points with a class, as pixels of the grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyogrio

from slidecube.catalog.grid import Tile, TileGrid
from slidecube.pipeline.errors import PipelineError

MOST_CLASSES = 65_534
"""Largest code of a class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Pixels whose class a person named, by row and column of the grid's frame.

    names : of the classes, by code
    """

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    codes: tuple[int, ...]
    names: dict[int, str]

    @property
    def counts(self) -> dict[str, int]:
        """Pixels of each class, by its name."""
        found = Counter(self.codes)
        return {name: found[code] for code, name in self.names.items()}

    def tiles(self, grid: TileGrid) -> list[str]:
        """Keys of the tiles in which they lie, sorted."""
        px = grid.tile_px
        return sorted({f"r{r // px:03d}c{c // px:03d}" for r, c in zip(self.rows, self.cols, strict=True)})


def read_points(path: Path, *, column: str, grid: TileGrid, tiles: Sequence[Tile], fewest: int) -> Points:
    """Read points of classes, and refuse now what would make a bad tree.

    path : GeoJSON, GeoPackage or any vector file of points; column : of the class, whole numbers or names
    tiles : in which they must lie; fewest : pixels of a class that are needed
    Names are numbered from 1 in the order of the alphabet. Points of one class on one pixel count once.
    Raises PipelineError: no such file or column, no points, points outside, two classes on a pixel, too few of a class.
    """
    table = _read(path, column)
    codes, names = _codes(table[column], path, column)
    moved = table.to_crs(grid.crs)
    affine, px = grid.frame.affine, grid.tile_px
    cols = np.floor((moved.geometry.x.to_numpy() - affine.c) / affine.a).astype(np.int64)
    rows = np.floor((moved.geometry.y.to_numpy() - affine.f) / affine.e).astype(np.int64)
    known = {(tile.row, tile.col) for tile in tiles}
    outside = [
        i
        for i, at in enumerate(zip((rows // px).tolist(), (cols // px).tolist(), strict=True))
        if at not in known
    ]
    if outside:
        lonlat = table.to_crs("EPSG:4326").geometry.iloc[outside[0]]
        raise PipelineError(
            f"{len(outside)} of {len(table)} points of {str(path)!r} lie outside the area's tiles, the first is number "
            f"{outside[0] + 1}, at {lonlat.x:.5f}, {lonlat.y:.5f}; remove them, or correct the CRS of the file"
        )
    pixels = sorted(set(zip(rows.tolist(), cols.tolist(), codes.tolist(), strict=True)))
    _refuse_two_classes(pixels, names, path)
    found = Points(
        rows=tuple(r for r, _, _ in pixels),
        cols=tuple(c for _, c, _ in pixels),
        codes=tuple(k for _, _, k in pixels),
        names=names,
    )
    require_enough(found.counts, fewest, f"{str(path)!r} has")
    return found


def require_enough(counts: dict[str, int], fewest: int, where: str) -> None:
    """Refuse a class of too few pixels; where : who has them, for the message."""
    few = {name: n for name, n in counts.items() if n < fewest}
    if few or len(counts) < 2:
        said = ", ".join(f"{name} {n}" for name, n in counts.items())
        need = f"at least {fewest} points of each class" if few else "two classes or more"
        raise PipelineError(f"{where} too few points for a land cover: {said}; {need} are needed")


def _read(path: Path, column: str) -> gpd.GeoDataFrame:
    try:
        table = gpd.read_file(path)
    except (OSError, ValueError, pyogrio.errors.DataSourceError) as error:
        # after a semicolon come hints about the library's own arguments
        said = " ".join(str(error).split()).removeprefix(f"'{path}' ").partition(";")[0].rstrip(".")[:160]
        raise PipelineError(
            f"Points {str(path)!r} cannot be read ({said}); name a GeoJSON or GeoPackage of points"
        ) from None
    if not isinstance(table, gpd.GeoDataFrame) or not len(table):
        raise PipelineError(f"{str(path)!r} holds no points")
    if column not in table.columns:
        held = ", ".join(str(name) for name in table.columns if name != table.geometry.name) or "none"
        raise PipelineError(f"{str(path)!r} has no column {column!r}; its columns: {held}")
    if table.crs is None:
        raise PipelineError(f"{str(path)!r} has no CRS; set it in the file")
    kinds = sorted({str(kind) for kind in table.geom_type} - {"Point"})
    if kinds or table.geometry.is_empty.any():
        raise PipelineError(f"{str(path)!r} holds {kinds[0] if kinds else 'empty points'}; points are needed")
    return table


def _codes(column: pd.Series, path: Path, name: str) -> tuple[np.ndarray, dict[int, str]]:
    if column.isna().any():
        n = int(column.isna().sum())
        raise PipelineError(f"{n} points of {str(path)!r} have no {name!r}; name their class, or remove them")
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        values = column.to_numpy(np.float64)
        if ((values != np.rint(values)) | (values < 0) | (values > MOST_CLASSES)).any():
            raise PipelineError(
                f"{name!r} of {str(path)!r} holds numbers that are no classes; whole numbers from 0 to {MOST_CLASSES} "
                "or names are"
            )
        codes = values.astype(np.int64)
        return codes, {int(code): str(int(code)) for code in np.unique(codes)}
    texts = column.astype(str).str.strip()
    names = sorted(set(texts))
    number = {text: i for i, text in enumerate(names, start=1)}
    return texts.map(number).to_numpy(np.int64), {i: text for text, i in number.items()}


def _refuse_two_classes(pixels: list[tuple[int, int, int]], names: dict[int, str], path: Path) -> None:
    seen: dict[tuple[int, int], int] = {}
    for row, col, code in pixels:
        other = seen.setdefault((row, col), code)
        if other != code:
            raise PipelineError(
                f"{str(path)!r} has points of {names[other]} and of {names[code]} on one pixel of the grid (row {row}, "
                f"column {col}); remove one of them"
            )


def farmland_codes(farmland: Sequence[int | str], points: Points | None) -> list[int]:
    """Codes of the classes that a TOML calls farmland; points : None where land cover is a raster's numbers.

    Raises PipelineError for a class that the points do not have, and for a name where there are numbers only.
    """
    names = {name: code for code, name in points.names.items()} if points else {}
    codes = []
    for entry in farmland:
        if points is None and isinstance(entry, str):
            raise PipelineError(
                f"[ground] farmland names the class {entry!r}; classes of a raster are numbers: give its number"
            )
        if points is not None and entry not in names and entry not in points.names:
            raise PipelineError(
                f"[ground] farmland names the class {entry!r}; the points have {', '.join(names)}"
            )
        codes.append(names[entry] if isinstance(entry, str) else entry)
    return codes
