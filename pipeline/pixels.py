"""Pixel windows of a plan's grid: their layers as far as they are done, and the features made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import rasterio.features
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

from slidecube.catalog.grid import Tile, TileGrid, cuts
from slidecube.models.card import FeatureSpec
from slidecube.pipeline.auxiliary import dtype_of, nodata_of
from slidecube.pipeline.blocks import by_block
from slidecube.pipeline.config import Coregistration
from slidecube.pipeline.coregistration import BlockShifts, margin_px, measure_shift, move
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import SIDES, Layers, build_features, required_variables
from slidecube.pipeline.masks import SNOW_NODATA
from slidecube.pipeline.mnf_strata import StratifiedMnf
from slidecube.pipeline.radar_layer import ANGLE_NODATA, MASK_NODATA
from slidecube.pipeline.run_plan import EpochPlan, RunPlan, coregistration_of
from slidecube.pipeline.store import read_window
from slidecube.pipeline.strata import blend_weights
from slidecube.pipeline.tasks import layer_ledger
from slidecube.pipeline.terrain import RASTERIO, TERRAIN_VARIABLES
from slidecube.pipeline.visibility import SEEN_VARIABLES

_FILL: dict[str, tuple[float, str]] = {
    "lia_deg": (ANGLE_NODATA, "uint16"),
    "layover": (MASK_NODATA, "uint8"),
    "shadow": (MASK_NODATA, "uint8"),
    "snow_pct": (SNOW_NODATA, "uint8"),
    "hidden": (0, "uint8"),
}


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

    def on_blocks(self, block_px: int) -> PixelWindow:
        """Return the whole blocks of the lattice that it touches."""
        row, col = self.row // block_px * block_px, self.col // block_px * block_px
        bottom, right = (
            -(-end // block_px) * block_px for end in (self.row + self.height, self.col + self.width)
        )
        return PixelWindow(row=row, col=col, height=bottom - row, width=right - col)

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
    mnf: Mapping[str, StratifiedMnf] | None = None,
    also: Mapping[str, tuple[str, ...]] | None = None,
    inputs: FeatureSpec | None = None,
) -> Layers:
    """Read what the plan's model needs in a window, as far as it is done; a tile counts only if its record does.

    What it does not need is not read: `pre` is empty for a model of a single image. Where the model compares two
    images, the shift between them is measured, `pre` is moved if the configuration says so, and is unknown in blocks
    that are shifted by too much.

    mnf : the frozen MNF of each image that the features need one of
    also : further variables by side, of `features.SIDES`
    inputs : features that are to be made in place of the model's
    """
    made = plan.by_epoch[epoch]
    card = plan.card if inputs is None else replace(plan.card, inputs=inputs)
    needed = required_variables(card.inputs)
    read = {}
    held = coregistration_of(plan.config, card)
    margin = margin_px(held.exclude_px) if held is not None and held.correct else 0
    radar_alone = not needed["pre"] and not needed["post"] and bool(needed["radar_post"])
    for side in (side for side in SIDES if side != "auxiliary"):
        name = getattr(made, side)
        wanted = {*needed[side], *(also or {}).get(side, ())}
        if side == "terrain":
            wanted.add("elevation")
        elif side.startswith("radar"):
            wanted |= {"count", "layover", "shadow"} if wanted else set()
        elif wanted or (side == "post" and not radar_alone):
            wanted |= {"clear_count", "snow_pct", "hidden"}
        around = window.padded(margin) if side == "pre" else window
        read[side] = read_stored(plan, name, sorted(wanted), around) if name and wanted else xr.Dataset()
    read["auxiliary"] = xr.Dataset()
    for name in needed["auxiliary"]:
        read["auxiliary"].update(read_stored(plan, made.auxiliary[name], [name], window))
    weights = stratum_weights(plan, window) if mnf else xr.Dataset()
    layers = Layers(**read, mnf=mnf or {}, strata=weights)  # type: ignore[arg-type]  # by the names of SIDES
    if held is None:
        return layers
    shifts = _measured(plan, made, window, held)
    return replace(layers, pre=_registered(layers.pre, shifts, held, margin), shifts=shifts)


def _measured(plan: RunPlan, epoch: EpochPlan, window: PixelWindow, held: Coregistration) -> BlockShifts:
    """Measure the shifts of the lattice's blocks under a window, each from all of its pixels in the area."""
    block_px = plan.grid.block_px
    whole = window.on_blocks(block_px)
    assert epoch.pre is not None
    pre, post = (
        read_stored(plan, name, [held.band], whole)[held.band].values for name in (epoch.pre, epoch.post)
    )
    known = (pre != 0) & (post != 0) & aoi_mask(plan, whole)
    found = {}
    for row in range(0, whole.height, block_px):
        for col in range(0, whole.width, block_px):
            at = np.s_[row : row + block_px, col : col + block_px]
            if known[at].any():
                block = (whole.row + row) // block_px, (whole.col + col) // block_px
                found[block] = measure_shift(pre[at], post[at], known[at])
    return BlockShifts(by_block=found, row=window.row, col=window.col, shape=window.shape, block_px=block_px)


def _registered(pre: xr.Dataset, shifts: BlockShifts, held: Coregistration, margin: int) -> xr.Dataset:
    """Cut off the margin, move what is to be moved, and forget what is shifted by too much."""
    core = {dim: slice(margin, size - margin) for dim, size in pre.sizes.items()}
    out = pre.isel(core).copy(deep=bool(margin))
    for block, shift in shifts.by_block.items():
        verdict = shift.verdict(held.warn_px, held.exclude_px) if shift else "unmeasured"
        rows, cols = shifts.part(block)
        if shift is not None and verdict == "warned" and held.correct:
            around = {
                "y": slice(rows.start, rows.stop + 2 * margin), "x": slice(cols.start, cols.stop + 2 * margin)
            }  # fmt: skip
            moved = move(pre.isel(around), shift.south_px, shift.east_px, margin=margin)
            for name, array in moved.data_vars.items():
                out[name].values[rows, cols] = array.values
        elif verdict == "excluded":
            for name, array in out.data_vars.items():
                if name not in SEEN_VARIABLES:  # that something was seen there stays true
                    array.values[rows, cols] = _nodata_and_dtype(str(name))[0]
    return out


def stratum_weights(plan: RunPlan, window: PixelWindow) -> xr.Dataset:
    """Weight of each stratum in a window, (y, x) float32 by its name; empty where the plan has no strata."""
    if plan.strata is None:
        return xr.Dataset()
    half_px = plan.config.fit.strata_blend_m / plan.grid.resolution_m
    margin = math.ceil(half_px) + 1
    found = blend_weights(stratum_codes(plan, window.padded(margin)), margin_px=margin, half_px=half_px)
    return xr.Dataset({plan.strata.name_of(code): (("y", "x"), weight) for code, weight in found.items()})


def stratum_codes(plan: RunPlan, window: PixelWindow) -> np.ndarray:
    """Codes of a plan's strata in a window, block by block of the lattice: (y, x) uint16, 0 = in none."""
    out = np.zeros(window.shape, np.uint16)
    if plan.strata is None:
        return out
    px = plan.grid.block_px
    for row in range(window.row // px, -(-(window.row + window.height) // px)):
        for col in range(window.col // px, -(-(window.col + window.width) // px)):
            block = PixelWindow(row=row * px, col=col * px, height=px, width=px)
            codes = plan.strata.codes(block.geobox(plan.grid))
            y0, x0 = block.row - window.row, block.col - window.col
            to = np.s_[max(y0, 0) : y0 + px, max(x0, 0) : x0 + px]
            part = codes[max(-y0, 0) :, max(-x0, 0) :]
            part = part[: window.height - max(y0, 0), : window.width - max(x0, 0)]
            out[to] = part
    return out


def aoi_mask(plan: RunPlan, window: PixelWindow) -> np.ndarray:
    """Pixels whose centre lies in the area of interest: (y, x) bool."""
    affine = window.geobox(plan.grid).affine
    with RASTERIO:
        inside: np.ndarray = rasterio.features.geometry_mask(
            [plan.aoi_shape], out_shape=window.shape, transform=affine, invert=True
        )
    return inside


def features_of(
    spec: FeatureSpec, layers: Layers, window: PixelWindow, *, block_px: int, threads: int
) -> xr.Dataset:
    """Build features in memory, one lattice block after another, `threads` at a time: (y, x) float32, NaN = unknown."""
    chunks = window.chunks(block_px)
    sides = {side: getattr(layers, side) for side in SIDES}
    lazy = Layers(
        **{side: d.chunk(chunks) if d else d for side, d in sides.items()},
        mnf=layers.mnf,
        strata=layers.strata.chunk(chunks) if layers.strata else layers.strata,
    )
    built = build_features(spec, lazy)
    made = by_block({str(name): array.data for name, array in built.items()}, threads)
    return xr.Dataset({name: (("y", "x"), values) for name, values in made.items()})


def read_stored(plan: RunPlan, layer: str, names: list[str], window: PixelWindow) -> xr.Dataset:
    """Read variables of a layer in a window, as far as its tiles are done; nodata elsewhere."""
    path, ledger, px = plan.workspace.layer(plan.grid, layer), layer_ledger(plan, layer), plan.grid.tile_px
    own = plan.layer_settings(layer)
    out = {
        name: np.full(window.shape, *((nodata_of(own), dtype_of(own)) if own else _nodata_and_dtype(name)))
        for name in names
    }
    for tile in _tiles_in(plan, window):
        record = ledger.read(tile.key)
        if record is None or record.key != plan.keys[layer][tile.key]:
            continue
        if (
            not record.complete or not record.checksums
        ):  # of an empty one reasons may be stored, and nothing else
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
    if terrain is None:
        return _FILL.get(variable, (0, "uint16"))
    return terrain.nodata, terrain.dtype


def _tiles_in(plan: RunPlan, window: PixelWindow) -> list[Tile]:
    px = plan.grid.tile_px
    keys = (
        f"r{row:03d}c{col:03d}"
        for row in range(max(window.row // px, 0), -(-(window.row + window.height) // px))
        for col in range(max(window.col // px, 0), -(-(window.col + window.width) // px))
    )
    return [plan.by_tile[key] for key in keys if key in plan.by_tile]
