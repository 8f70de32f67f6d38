"""Detection of one tile: layers, features, probability, and what could be seen."""

from __future__ import annotations

import math

import numpy as np
import rasterio.features
import scipy.ndimage
import xarray as xr
from odc.geo.geobox import GeoBox

from slidecube.catalog.grid import Tile, cuts
from slidecube.cluster.runner import TileTask
from slidecube.models.predict import predict
from slidecube.pipeline.blocks import by_block
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import Layers, build_features, required_variables
from slidecube.pipeline.inventory import (
    LANDSLIDE_NODATA,
    PROBABILITY_NODATA,
    PROBABILITY_SCALE,
    REASONS,
    Observability,
)
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.plan import RunPlan, halo_px, minimum_size_px
from slidecube.pipeline.store import read_window
from slidecube.pipeline.tasks import TileContext, layer_ledger, store_tile
from slidecube.pipeline.terrain import SLOPE_NODATA


def detect_tile(plan: RunPlan, task: TileTask, context: TileContext) -> Record:
    """Detect one tile of one epoch from its finished layers, and store it."""
    tile, epoch = plan.by_tile[task.tile], plan.by_epoch[task.epoch]
    for name in (epoch.pre, epoch.post, epoch.terrain):
        if not layer_ledger(plan, name).complete(tile.key, plan.tasks[name][tile.key][0]):
            raise PipelineError(
                f"Layer {name} is not done on tile {tile.key}; the tile is detected when it is"
            )
    card = plan.model.card
    minimum_px = minimum_size_px(card.min_area_m2, plan.grid.resolution_m)
    halo = halo_px(card, plan.grid)
    window = tile.geobox.pad(halo) if halo else tile.geobox
    layers = read_layers(plan, epoch.name, tile, halo)
    inside = aoi_mask(plan, window)
    probability = _quantised(_probability(plan, layers, tile, halo, context.threads))
    seen, reason = _observable(layers, probability)
    probability[~(seen & inside)] = PROBABILITY_NODATA
    hit = (probability != PROBABILITY_NODATA) & (
        probability >= math.ceil(card.threshold / PROBABILITY_SCALE - 1e-9)
    )
    kept = without_small(hit, minimum_px)
    core = np.s_[halo : halo + tile.geobox.shape[0], halo : halo + tile.geobox.shape[1]]
    seen, inside, reason = seen[core], inside[core], reason[core]
    judged = np.where(seen, Observability.OBSERVED, Observability.NOT_OBSERVABLE)
    observability = np.where(inside, judged, Observability.OUTSIDE_AOI).astype(np.uint8)
    data = {
        "probability": np.ascontiguousarray(probability[core]),
        "spread": np.full(tile.geobox.shape, PROBABILITY_NODATA, np.uint16),  # one member has none
        "landslide": np.where(observability == Observability.OBSERVED, kept[core], LANDSLIDE_NODATA).astype(
            np.uint8
        ),
        "observability": observability,
        "reason": np.where(observability == Observability.NOT_OBSERVABLE, reason, 0).astype(np.uint8),
    }
    checksums, size = store_tile(plan, task, data, context)
    numbers = {value.name.lower(): int((observability == value).sum()) for value in Observability}
    numbers |= {f"reason {i}": int((data["reason"] == i).sum()) for i in REASONS if i}
    numbers["landslide_px"] = int((data["landslide"] == 1).sum())
    return Record(
        tile=task.tile, key=task.key, state="done", checksums=checksums, numbers=numbers, bytes=size
    )


def without_small(hit_yx: np.ndarray, minimum_px: int) -> np.ndarray:
    """Remove objects (8-connected) of fewer pixels.

    Exact for every pixel at least `minimum_px - 1` pixels from the edge of the window: a pixel of a large enough
    object reaches that many pixels of it within that distance, whatever lies beyond.
    """
    if minimum_px <= 1:
        return hit_yx
    labels, n = scipy.ndimage.label(hit_yx, structure=np.ones((3, 3), int))
    keep = np.bincount(labels.ravel(), minlength=n + 1) >= minimum_px
    keep[0] = False
    kept: np.ndarray = keep[labels]
    return kept


def read_layers(plan: RunPlan, epoch: str, tile: Tile, halo: int) -> Layers:
    """Read what the model needs on the tile and its halo; a neighbour counts only if its record does."""
    made = plan.by_epoch[epoch]
    needed = required_variables(plan.model.card.inputs)
    sides = {
        "pre": (made.pre, ["clear_count", *needed["pre"]]),
        "post": (made.post, ["clear_count", *needed["post"]]),
        "terrain": (made.terrain, sorted({"elevation", *needed["terrain"]})),
    }
    read = {side: _read_around(plan, name, names, tile, halo) for side, (name, names) in sides.items()}
    return Layers(**read)


def _read_around(plan: RunPlan, layer: str, names: list[str], tile: Tile, halo: int) -> xr.Dataset:
    path, ledger = plan.workspace.layer(plan.grid, layer), layer_ledger(plan, layer)
    px = plan.grid.tile_px
    row0, col0 = tile.row * px - halo, tile.col * px - halo
    n = px + 2 * halo
    out = {
        name: np.full((n, n), _FILL.get(name, 0), np.float32 if name == "elevation" else np.uint16)
        for name in names
    }
    for neighbour in plan.neighbours(tile):
        record = ledger.read(neighbour.key)
        if record is None or record.key != plan.tasks[layer][neighbour.key][0] or record.state != "done":
            continue
        rows = slice(max(row0, neighbour.row * px), min(row0 + n, (neighbour.row + 1) * px))
        cols = slice(max(col0, neighbour.col * px), min(col0 + n, (neighbour.col + 1) * px))
        if rows.start >= rows.stop or cols.start >= cols.stop:
            continue
        try:
            part = read_window(path, names, window=(rows, cols))
        except PipelineError as error:
            ledger.forget(neighbour.key)  # it vouches for what cannot be read
            raise PipelineError(f"{error}; done so for tile {neighbour.key} of {layer}: run again") from None
        at = np.s_[rows.start - row0 : rows.stop - row0, cols.start - col0 : cols.stop - col0]
        for name, values in part.items():
            out[name][at] = values
    return xr.Dataset({name: (("y", "x"), out[name]) for name in names})


_FILL: dict[str, float] = {"elevation": np.nan, "slope_deg": 65535, "aspect_deg": 65535}


def _probability(plan: RunPlan, layers: Layers, tile: Tile, halo: int, threads: int) -> np.ndarray:
    """Probability on the tile and its halo, block by block on the lattice."""
    px, block = plan.grid.tile_px, plan.grid.block_px
    chunks = {
        dim: tuple(c.stop - c.start for c in cuts(px + 2 * halo, first * px - halo, block))
        for dim, first in (("y", tile.row), ("x", tile.col))
    }
    lazy = Layers(
        pre=layers.pre.chunk(chunks), post=layers.post.chunk(chunks), terrain=layers.terrain.chunk(chunks)
    )
    found = predict(plan.model, build_features(plan.model.card.inputs, lazy))["probability"].data
    return by_block({"probability": found}, threads)["probability"]


def _quantised(probability: np.ndarray) -> np.ndarray:
    """Scale to what is stored; the threshold is applied to this, so that the cube agrees with its own landslides."""
    known = ~np.isnan(probability)
    out = np.full(probability.shape, PROBABILITY_NODATA, np.uint16)
    out[known] = np.rint(probability[known] / PROBABILITY_SCALE).astype(np.uint16)
    return out


def _observable(layers: Layers, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels could be judged, and why the others could not: bool and codes of `REASONS`."""
    pre, post = layers.pre["clear_count"].values > 0, layers.post["clear_count"].values > 0
    reason = np.zeros(probability.shape, np.uint8)
    reason[probability == PROBABILITY_NODATA] = 5
    no_terrain = np.isnan(layers.terrain["elevation"].values)
    if "slope_deg" in layers.terrain:  # the rim of a DEM has heights, and no slope
        no_terrain |= layers.terrain["slope_deg"].values == SLOPE_NODATA
    reason[no_terrain] = 4
    reason[pre & ~post] = 2
    reason[~pre & post] = 1
    reason[~pre & ~post] = 3
    return reason == 0, reason


def aoi_mask(plan: RunPlan, window: GeoBox) -> np.ndarray:
    """Pixels whose centre lies in the area of interest."""
    inside: np.ndarray = rasterio.features.geometry_mask(
        [plan.aoi_shape], out_shape=tuple(window.shape), transform=window.affine, invert=True
    )
    return inside
