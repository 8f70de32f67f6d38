"""Storage: one Zarr v3 group a layer, one array a variable over the whole frame, one shard a tile.

The shard is the unit of safe writing: two writers in one shard lose pixels silently, so a write that is not exactly
one tile is refused in `staging` and nowhere else needs to think of it (ADR 4).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr
import zarr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from zarr.codecs import ZstdCodec

from slidecube.catalog.grid import Tile, TileGrid
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.inventory import geozarr_attrs, reading
from slidecube.pipeline.storage import Place, place_of, remove_tree, require_reachable, zarr_store

_WRITTEN = ("layers", "statistics", "inventories", "products")
"""Folders of a workspace that only the holder of its lock writes to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One stored raster variable.

    dtype : as stored; fill : value of what was never written, and nodata; attrs : CF attributes
    """

    dtype: str
    fill: float
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Where a run keeps what it knows and makes.

    root : folder or prefix; made when it is first written to
    """

    root: Place

    @classmethod
    def at(cls, where: str | Place) -> Workspace:
        """Open a workspace by its address, a folder or `s3://bucket/prefix`.

        Raises PipelineError when it is a file, or a bucket that cannot be asked.
        """
        root = place_of(where)
        require_reachable(root)
        if isinstance(root, Path):
            first = next(folder for folder in (root, *root.parents) if folder.exists())
            if not first.is_dir():
                raise PipelineError(
                    f"Workspace {str(where)!r} is no folder: {first} is a file; name a folder"
                )
        return cls(root=root)

    def layer(self, grid: TileGrid, name: str) -> Place:
        """Path of a layer's Zarr group."""
        return self.root / "layers" / grid.key / f"{name}.zarr"

    def inventory(self, name: str) -> Place:
        """Path of an inventory's Zarr group."""
        return self.root / "inventories" / f"{name}.zarr"

    def products(self, name: str) -> Place:
        """Folder of an inventory's products."""
        return self.root / "products" / name

    def plan(self, run: str) -> Place:
        """Folder of a plan."""
        return self.root / "plans" / run

    @property
    def models(self) -> Place:
        """Folder of the networks that were adopted."""
        return self.root / "models"

    def statistics(self, stat_key: str) -> Place:
        """Folder of what was fitted to the layers of an epoch."""
        return self.root / "statistics" / stat_key

    def events(self, run: str, part: str = "") -> Place:
        """File of a run's events, one JSON a line; each shard of it has its own."""
        return self.root / "events" / f"{run}{'.' if part else ''}{part}.jsonl"

    @property
    def locks(self) -> Place:
        """Folder of locks."""
        return self.root / "locks"


def create_arrays(
    path: Place,
    variables: Mapping[str, Variable],
    *,
    geobox: GeoBox,
    tile_px: int,
    block_px: int,
    attrs: Mapping[str, Any],
    leading: Mapping[str, int] | None = None,
) -> None:
    """Make a group's arrays where they are missing; what is there stays.

    A record of data that is gone counts for nothing: where an array is missing, the ledger goes, too.

    geobox : pixels that each array covers; leading : dimensions before (y, x), one chunk a step, such as epoch
    """
    lead = dict(leading or {})
    with reading(path):
        group = zarr.open_group(zarr_store(path), mode="a", zarr_format=3)
        for name in variables:  # opened now, so that a damaged one is named before anything is computed
            group.get(name)
    if any(name not in group for name in variables):
        remove_tree(path.with_suffix(".ledger"))
    group.attrs.update({**attrs, **geozarr_attrs(geobox)})
    for name, variable in variables.items():
        if name in group:
            continue
        group.create_array(
            name,
            shape=(*lead.values(), *geobox.shape),
            shards=(*([1] * len(lead)), tile_px, tile_px),
            chunks=(*([1] * len(lead)), block_px, block_px),
            dtype=variable.dtype,
            fill_value=variable.fill,
            compressors=[ZstdCodec(level=3, checksum=True)],
            dimension_names=(*lead, "y", "x"),
            attributes={**variable.attrs, "grid_mapping": "spatial_ref"},
        )


def geobox_of(path: Place) -> GeoBox:
    """Pixels that a group's arrays cover."""
    from affine import Affine  # noqa: PLC0415

    with reading(path):
        attrs = zarr.open_group(zarr_store(path), mode="r").attrs
    try:
        transform, shape, wkt = attrs["spatial:transform"], attrs["spatial:shape"], attrs["proj:wkt2"]
    except KeyError as missing:
        raise PipelineError(f"{path} has no attribute {missing}; it is not a slidecube layer") from None
    rows, cols = (int(n) for n in cast("list[int]", shape))
    return GeoBox((rows, cols), Affine(*cast("list[float]", transform)), str(wkt))


def read_window(
    path: Place, names: list[str], *, window: tuple[slice, slice], leading: tuple[int, ...] = ()
) -> dict[str, np.ndarray]:
    """Read a window of several variables; what lies outside the arrays is fill.

    window : rows and columns of the arrays; they may be negative or too large (a halo at the frame's edge)
    """
    remedy = f"remove it or its records in {path.with_suffix('.ledger').name}, and its tiles are made anew"
    with reading(path, remedy):
        group = zarr.open_group(zarr_store(path), mode="r")
        return {name: _window_of(group[name], window, leading) for name in names}


def _window_of(array: Any, window: tuple[slice, slice], leading: tuple[int, ...]) -> np.ndarray:
    rows, cols = array.shape[-2:]
    inner = (
        slice(max(window[0].start, 0), max(min(window[0].stop, rows), 0)),
        slice(max(window[1].start, 0), max(min(window[1].stop, cols), 0)),
    )
    shape = (window[0].stop - window[0].start, window[1].stop - window[1].start)
    out = np.full(shape, array.fill_value, array.dtype)
    if inner[0].start < inner[0].stop and inner[1].start < inner[1].stop:
        at = tuple(slice(i.start - w.start, i.stop - w.start) for i, w in zip(inner, window, strict=True))
        out[at] = array[(*leading, *inner)]
    return out


def open_layer(path: Place, *, tiles: list[Tile] | None = None) -> xr.Dataset:
    """Open a layer lazily, one Dask chunk a shard's block row, cropped to the tiles' bounding box when given.

    Returns (y, x) variables as stored, with coordinates and `spatial_ref`.
    """
    geobox = geobox_of(path)
    group = zarr.open_group(zarr_store(path), mode="r")
    names = sorted(name for name, _ in group.arrays() if name not in {"x", "y", "spatial_ref", "epoch"})
    roi = _bounding_roi(geobox, tiles) if tiles else np.s_[0 : geobox.shape[0], 0 : geobox.shape[1]]
    import dask.array as da  # noqa: PLC0415

    variables = {}
    for name in names:
        array = group[name]
        assert isinstance(array, zarr.Array)
        lazy = da.from_zarr(array, chunks=array.shards)[roi]
        variables[name] = xr.Variable(("y", "x"), lazy, dict(array.attrs))
    return xr.Dataset(variables, coords=xr_coords(geobox[roi]), attrs=dict(group.attrs))


def remove_partials(workspace: Workspace) -> int:
    """Remove the temporary files and folders that a killed writer left; returns how many.

    Only in folders of our own: a workspace may be somebody's home, and a browser calls its downloads so, too. Plans
    are not looked at, they are written outside the driver's lock. A bucket holds none: what is put is there whole.
    """
    if not isinstance(workspace.root, Path):
        return 0
    removed = 0
    for folder, folders, files in chain.from_iterable(os.walk(workspace.root / own) for own in _WRITTEN):
        for name in [f for f in folders if f.endswith(".partial")]:
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
            folders.remove(name)
            removed += 1
        for name in files:
            if name.endswith(".partial"):
                (Path(folder) / name).unlink(missing_ok=True)
                removed += 1
    return removed


def _bounding_roi(geobox: GeoBox, tiles: list[Tile]) -> tuple[slice, slice]:
    px = tiles[0].geobox.shape[0]
    rows, cols = [t.row for t in tiles], [t.col for t in tiles]
    assert geobox.shape[0] % px == 0
    return np.s_[min(rows) * px : (max(rows) + 1) * px, min(cols) * px : (max(cols) + 1) * px]
