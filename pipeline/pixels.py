"""Pixel windows of a plan's grid: their layers as far as they are done, and the features made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import rasterio.features
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

from slidecube.catalog.grid import Tile, TileGrid, cuts
from slidecube.models.card import FeatureSpec
from slidecube.pipeline.blocks import by_block
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import Layers, build_features, required_variables
from slidecube.pipeline.mnf import Mnf
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.store import read_window
from slidecube.pipeline.tasks import layer_ledger
from slidecube.pipeline.terrain import TERRAIN_VARIABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelWindow:
    """A window of a grid's frame; it may reach beyond the frame, where nothing is known.

    row, col : of its first pixel; height, width : in pixels
    """

    row: int
    col: int
    height: int
    width: int

    @classmethod
    def of_tile(cls, grid: TileGrid, tile: Tile) -> PixelWindow:
        """Return the window of a tile."""
        px = grid.tile_px
        return cls(row=tile.row * px, col=tile.col * px, height=px, width=px)

    def padded(self, px: int) -> PixelWindow:
        """Return the window with a margin on each side."""
        return PixelWindow(
            row=self.row - px, col=self.col - px, height=self.height + 2 * px, width=self.width + 2 * px
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height, self.width

    def geobox(self, grid: TileGrid) -> GeoBox:
        """Return its pixels on the ground."""
        frame = grid.frame
        return GeoBox(self.shape, frame.affine @ Affine.translation(self.col, self.row), frame.crs)

    def chunks(self, block_px: int) -> dict[str, tuple[int, ...]]:
        """Cut it along the lattice."""
        sides = {"y": (self.height, self.row), "x": (self.width, self.col)}
        return {
            dim: tuple(c.stop - c.start for c in cuts(size, first, block_px))
            for dim, (size, first) in sides.items()
        }


def read_layers(
    plan: RunPlan,
    epoch: str,
    window: PixelWindow,
    *,
    mnf: Mapping[str, Mnf] | None = None,
    also: Mapping[str, tuple[str, ...]] | None = None,
) -> Layers:
    """Read what the plan's model needs in a window, as far as it is done; a tile counts only if its record does.

    What it does not need is not read: `pre` is empty for a model of a single image.

    mnf : the frozen MNF of each image that the features need one of
    also : further variables by side, "pre", "post" or "terrain"
    """
    made = plan.by_epoch[epoch]
    needed = required_variables(plan.model.card.inputs)
    read = {}
    for side, name in (("pre", made.pre), ("post", made.post), ("terrain", made.terrain)):
        wanted = {*needed[side], *(also or {}).get(side, ())}
        if side == "terrain":
            wanted.add("elevation")
        elif side == "post" or wanted:
            wanted.add("clear_count")
        read[side] = _read(plan, name, sorted(wanted), window) if name and wanted else xr.Dataset()
    return Layers(**read, mnf=mnf or {})


def aoi_mask(plan: RunPlan, window: PixelWindow) -> np.ndarray:
    """Pixels whose centre lies in the area of interest: (y, x) bool."""
    inside: np.ndarray = rasterio.features.geometry_mask(
        [plan.aoi_shape], out_shape=window.shape, transform=window.geobox(plan.grid).affine, invert=True
    )
    return inside


def features_of(
    spec: FeatureSpec, layers: Layers, window: PixelWindow, *, block_px: int, threads: int
) -> xr.Dataset:
    """Build features in memory, one lattice block after another, `threads` at a time: (y, x) float32, NaN = unknown."""
    chunks = window.chunks(block_px)
    lazy = Layers(
        pre=layers.pre.chunk(chunks) if layers.pre else layers.pre,
        post=layers.post.chunk(chunks),
        terrain=layers.terrain.chunk(chunks),
        mnf=layers.mnf,
    )
    built = build_features(spec, lazy)
    made = by_block({str(name): array.data for name, array in built.items()}, threads)
    return xr.Dataset({name: (("y", "x"), values) for name, values in made.items()})


def _read(plan: RunPlan, layer: str, names: list[str], window: PixelWindow) -> xr.Dataset:
    path, ledger, px = plan.workspace.layer(plan.grid, layer), layer_ledger(plan, layer), plan.grid.tile_px
    out = {name: np.full(window.shape, *_nodata_and_dtype(name)) for name in names}
    for tile in _tiles_in(plan, window):
        record = ledger.read(tile.key)
        if record is None or record.key != plan.keys[layer][tile.key] or record.state != "done":
            continue
        rows = slice(max(window.row, tile.row * px), min(window.row + window.height, (tile.row + 1) * px))
        cols = slice(max(window.col, tile.col * px), min(window.col + window.width, (tile.col + 1) * px))
        try:
            part = read_window(path, names, window=(rows, cols))
        except PipelineError as error:
            ledger.forget(tile.key)  # it vouches for what cannot be read
            raise PipelineError(f"{error}; done so for tile {tile.key} of {layer}: run again") from None
        at = np.s_[
            rows.start - window.row : rows.stop - window.row, cols.start - window.col : cols.stop - window.col
        ]
        for name, values in part.items():
            out[name][at] = values
    return xr.Dataset({name: (("y", "x"), out[name]) for name in names})


def _nodata_and_dtype(variable: str) -> tuple[float, str]:
    terrain = TERRAIN_VARIABLES.get(variable)
    return (0, "uint16") if terrain is None else (terrain.nodata, terrain.dtype)


def _tiles_in(plan: RunPlan, window: PixelWindow) -> list[Tile]:
    px = plan.grid.tile_px
    keys = (
        f"r{row:03d}c{col:03d}"
        for row in range(max(window.row // px, 0), -(-(window.row + window.height) // px))
        for col in range(max(window.col // px, 0), -(-(window.col + window.width) // px))
    )
    return [plan.by_tile[key] for key in keys if key in plan.by_tile]
