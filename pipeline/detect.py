"""Detection of one tile: layers, features, probability, and what could be seen."""

from __future__ import annotations

import numpy as np
import scipy.ndimage

from slidecube.catalog.grid import Tile
from slidecube.cluster.runner import TileTask
from slidecube.models.predict import Detector, WindowedDetector, predict
from slidecube.models.thresholds import landslide_from, steps_of
from slidecube.pipeline import visibility
from slidecube.pipeline.blocks import by_block
from slidecube.pipeline.coregistration import shift_numbers
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import Layers
from slidecube.pipeline.ground import ground_of
from slidecube.pipeline.inventory import (
    LANDSLIDE_NODATA,
    PROBABILITY_NODATA,
    Observability,
    Reason,
)
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.masks import SNOW_NODATA
from slidecube.pipeline.pixels import PixelWindow, aoi_mask, features_of, read_layers
from slidecube.pipeline.run_plan import EpochPlan, RunPlan, coregistration_of, halo_px, minimum_size_px
from slidecube.pipeline.tasks import TileContext, fitted_statistics, layer_ledger, store_tile
from slidecube.pipeline.terrain import SLOPE_NODATA


def detect_tile(plan: RunPlan, task: TileTask, context: TileContext) -> Record:
    """Detect one tile of one epoch from its finished layers, and store it."""
    tile, epoch = plan.by_tile[task.tile], plan.by_epoch[task.epoch]
    for name in epoch.layers:
        if not layer_ledger(plan, name).complete(tile.key, plan.keys[name][tile.key]):
            raise PipelineError(
                f"Layer {name} is not done on tile {tile.key}; the tile is detected when it is"
            )
    data, layers = map_tile(plan, epoch, tile, threads=context.threads)
    checksums, size = store_tile(plan, task, data, context)
    observability = data["observability"]
    numbers = {value.name.lower(): int((observability == value).sum()) for value in Observability}
    counts = np.bincount(data["reason"].ravel(), minlength=len(Reason))
    numbers |= {f"reason {i:d}": int(counts[i]) for i in Reason if i and counts[i]}
    numbers["landslide_px"] = int((data["landslide"] == 1).sum())
    if layers.shifts is not None:
        per_tile = plan.grid.tile_px // plan.grid.block_px
        own = {
            at: shift
            for at, shift in layers.shifts.by_block.items()
            if (at[0] // per_tile, at[1] // per_tile) == (tile.row, tile.col)
        }
        numbers |= shift_numbers(own)
    return Record(
        tile=task.tile, key=task.key, state="done", checksums=checksums, numbers=numbers, bytes=size
    )


def map_tile(
    plan: RunPlan, epoch: EpochPlan, tile: Tile, *, threads: int
) -> tuple[dict[str, np.ndarray], Layers]:
    """Map one tile of one epoch: what the inventory stores of it, (y, x) by variable, and the layers that it is of."""
    fitted = fitted_statistics(plan, epoch)
    detector = fitted.detector.on(plan.config.detect.device)
    card = detector.card
    minimum_px = minimum_size_px(card.min_area_m2, plan.grid.resolution_m)
    halo = halo_px(card, plan.grid)
    window = PixelWindow.of_tile(plan.grid, tile).padded(halo)
    layers = read_layers(plan, epoch.name, window, mnf=fitted.mnf)
    inside = aoi_mask(plan, window)
    found = _predicted(plan, detector, layers, window, inside=inside, threads=threads)
    probability = _quantised(found["probability"])
    held = coregistration_of(plan.config, card)
    seen, reason = _observable(layers, probability, exclude_px=held.exclude_px if held else 0.0)
    probability[~(seen & inside)] = PROBABILITY_NODATA
    hit = (probability != PROBABILITY_NODATA) & (probability >= landslide_from(card.threshold))
    kept = without_small(hit, minimum_px)
    core = np.s_[halo : halo + tile.geobox.shape[0], halo : halo + tile.geobox.shape[1]]
    spread = np.full(tile.geobox.shape, PROBABILITY_NODATA, np.uint16)  # one member has none
    if "spread" in found:
        spread = _quantised(found["spread"][core])
        spread[probability[core] == PROBABILITY_NODATA] = PROBABILITY_NODATA
    seen, inside, reason = seen[core], inside[core], reason[core]
    judged = np.where(seen, Observability.OBSERVED, Observability.NOT_OBSERVABLE)
    observability = np.where(inside, judged, Observability.OUTSIDE_AOI).astype(np.uint8)
    data = {
        "probability": np.ascontiguousarray(probability[core]),
        "spread": spread,
        "landslide": np.where(observability == Observability.OBSERVED, kept[core], LANDSLIDE_NODATA).astype(
            np.uint8
        ),
        "observability": observability,
        "ground": ground_of(plan, epoch, PixelWindow.of_tile(plan.grid, tile)),
        "reason": np.where(observability == Observability.NOT_OBSERVABLE, reason, 0).astype(np.uint8),
    }
    return data, layers


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


def _predicted(
    plan: RunPlan,
    model: Detector,
    layers: Layers,
    window: PixelWindow,
    *,
    inside: np.ndarray,
    threads: int,
) -> dict[str, np.ndarray]:
    """What a model says of a window, on the lattice: name -> (y, x) float32, NaN where it says nothing.

    Outside the area of interest nothing is known: how much of it the tiles hold depends on their size, and a pixel's
    surroundings must not. Of a network's context, which is large, nothing is asked.
    """
    block_px = plan.grid.block_px
    features = features_of(model.card.inputs, layers, window, block_px=block_px, threads=threads)
    for values in features.values():
        values.to_numpy()[~inside] = np.nan
    at = (window.row, window.col)
    if not isinstance(model, WindowedDetector):
        probability = predict(model, features.chunk(window.chunks(block_px)), origin_px=at)["probability"]
        return by_block({"probability": probability.data}, threads)
    context = model.card.window_px // 2
    found = predict(model, features, origin_px=at, margin_px=context, threads=threads)
    return {
        str(name): np.pad(array.to_numpy(), context, constant_values=np.nan) for name, array in found.items()
    }


def _quantised(probability: np.ndarray) -> np.ndarray:
    """Scale to what is stored, downwards: the threshold is applied to this, so that the cube agrees with its own
    landslides, and what lies below it must not be rounded up to it.
    """
    known = ~np.isnan(probability)
    out = np.full(probability.shape, PROBABILITY_NODATA, np.uint16)
    out[known] = steps_of(probability[known])
    return out


_HIDDEN = (
    (Reason.LOW_SUN, visibility.LOW_SUN),
    (Reason.CAST_SHADOW, visibility.CAST_SHADOW),
)
"""What else than clouds and snow hides the ground, the nearest to being seen last: it is what is said of a pixel."""


def _observable(
    layers: Layers, probability: np.ndarray, *, exclude_px: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels could be judged, and why the others could not: bool and codes of `Reason`."""
    # a side that the model does not look at hides nothing
    shown = np.ones(probability.shape, bool)
    pre, post = (side["clear_count"].values > 0 if side else shown for side in (layers.pre, layers.post))
    reason = np.zeros(probability.shape, np.uint8)
    reason[probability == PROBABILITY_NODATA] = Reason.INDEX_UNDEFINED
    if layers.shifts is not None:
        reason[layers.shifts.excluded_yx(exclude_px)] = Reason.MISREGISTERED
    for side in (layers.radar_pre, layers.radar_post):
        if side:
            unseen = side["count"].values == 0
            reason[unseen] = Reason.NO_RADAR
            reason[unseen & (side["shadow"].values == 1)] = Reason.RADAR_SHADOW
            reason[unseen & (side["layover"].values == 1)] = Reason.RADAR_LAYOVER
    no_terrain = np.isnan(layers.terrain["elevation"].values)
    if "slope_deg" in layers.terrain:  # the rim of a DEM has heights, and no slope
        no_terrain |= layers.terrain["slope_deg"].values == SLOPE_NODATA
    reason[no_terrain] = Reason.NO_TERRAIN
    reason[pre & ~post] = Reason.NO_CLEAR_POST
    reason[~pre & post] = Reason.NO_CLEAR_PRE
    reason[~pre & ~post] = Reason.NO_CLEAR_PRE_NOR_POST
    for side, seen in ((layers.pre, pre), (layers.post, post)):
        if not side:
            continue
        snow = side["snow_pct"].values
        reason[~seen & (snow > 0) & (snow != SNOW_NODATA)] = Reason.SNOW
        for code, bit in _HIDDEN:
            reason[~seen & (side["hidden"].values & bit > 0)] = code
    return reason == 0, reason
