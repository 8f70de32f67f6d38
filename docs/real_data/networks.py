"""Networks that learnt from simulated scenes alone, on real pixels: a look at what carries over, and no accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import drawing
import flanders_clusters
import numpy as np
import patches
import scipy.ndimage
import slovenia
import xarray as xr
from chain import Scene

from slidecube.models.predict import Detector, predict
from slidecube.models.registry import find_model, load_model, shipped_root
from slidecube.pipeline.composite import reflectance
from slidecube.pipeline.detect import without_small
from slidecube.pipeline.indices import ndvi
from slidecube.pipeline.open import open_inventory
from slidecube.pipeline.run_plan import minimum_size_px
from slidecube.pipeline.terrain import SLOPE_NODATA, SLOPE_SCALE

SINGLE_IMAGE, TWO_IMAGES = "sim-post", ("sim-small", "sim-ensemble")
PAIR = (slovenia.CLEAR[0], slovenia.CLEAR[-1])
"""Scenes of Slovenia that are compared: the earliest and the latest of the clear ones."""
PIXEL_M = 10.0


def measure(shared: Path, scratch: Path, images: Path | None = None) -> dict[str, Any]:
    """Map the patches by the network of a single image, and the pairs by those of two."""
    names, scenes = patches.read(shared)
    single = detector(SINGLE_IMAGE)
    maps = {name: probability(single, scene) for name, scene in zip(names, scenes, strict=True)}
    pair = _pair(shared)
    pairs = {name: probability(detector(name), pair) for name in TWO_IMAGES}
    found = {
        "patches": {name: _counts(single, found_yx) for name, found_yx in maps.items()},
        "labelled": _against(single, maps[patches.LABELLED], patches.read_mask(shared)),
        "slovenia": {name: _counts(detector(name), found_yx) for name, found_yx in pairs.items()},
        "slovenia_days": [slovenia.DATES[i] for i in PAIR],
        "flanders": {name: _flanders(shared, scratch, name) for name in TWO_IMAGES},
    }
    if images is not None:
        mask = patches.read_mask(shared)
        _draw_patches(scenes, maps, mask, images / "real-networks-patches.png")
        _draw_pair(pair, pairs, images / "real-networks-slovenia.png")
    return found


def detector(name: str) -> Detector:
    """Load a network that ships with slidecube."""
    return load_model(find_model(name, [shipped_root()]))


def probability(model: Detector, scene: Scene) -> np.ndarray:
    """Map a scene: (y, x) float32, NaN = unknown."""
    return np.asarray(predict(model, features(model, scene))["probability"].values)


def features(model: Detector, scene: Scene) -> xr.Dataset:
    """Make what a network reads of a scene's layers, as the pipeline does."""
    slope = scene.terrain["slope_deg"]
    made = {"slope_deg": (slope * np.float32(SLOPE_SCALE)).where(slope != SLOPE_NODATA)}
    for side, layer in (("pre", scene.pre), ("post", scene.post)):
        if layer is not None:
            made |= {f"{band}_{side}": reflectance(layer[band]) for band in map(str, layer)}
            made[f"ndvi_{side}"] = ndvi(reflectance(layer["B04"]), reflectance(layer["B08"]))
    if scene.pre is not None:
        made["dndvi"] = made["ndvi_post"] - made["ndvi_pre"]
    return xr.Dataset({name: made[name].astype(np.float32) for name in model.card.inputs.names})


def mapped(model: Detector, found_yx: np.ndarray) -> np.ndarray:
    """Pixels of objects that are large enough: (y, x) bool."""
    hit = np.nan_to_num(found_yx) >= model.card.threshold
    return without_small(hit, minimum_size_px(model.card.min_area_m2, PIXEL_M))


def _counts(model: Detector, found_yx: np.ndarray) -> dict[str, float]:
    hit = mapped(model, found_yx)
    _, objects = scipy.ndimage.label(hit, structure=np.ones((3, 3)))
    return {
        "px": int(hit.sum()),
        "objects": int(objects),
        "known_px": int(np.isfinite(found_yx).sum()),
        "highest": float(f"{np.nanmax(found_yx):.1e}"),
    }


def _against(model: Detector, found_yx: np.ndarray, mask: np.ndarray) -> dict[str, int]:
    hit, truth = mapped(model, found_yx), mask == 1
    return {
        "mask_px": int(truth.sum()),
        "both_px": int((hit & truth).sum()),
        "mapped_px": int(hit.sum()),
    }


def _pair(shared: Path) -> Scene:
    scenes = slovenia.read(shared)
    first, last = PAIR
    return Scene(pre=scenes[first].post, post=scenes[last].post, terrain=scenes[0].terrain)


def _flanders(shared: Path, scratch: Path, model: str) -> dict[str, int]:
    flanders_clusters.run_model(shared, scratch, model)
    inventory = open_inventory(scratch / "greenest").isel(epoch=0)
    return {
        "landslide_px": int((inventory["landslide"] == 1).sum()),
        "observed_px": int((inventory["observability"] == 3).sum()),
    }


def _photo(axis: Any, layer: xr.Dataset, title: str) -> None:
    planes = [
        np.where(layer[b].values == 0, np.nan, (layer[b].values - 1000.0) / 10_000)
        for b in ("B04", "B03", "B02")
    ]
    axis.imshow(drawing.stretched(*planes))
    drawing.plain(axis, title)


def _draw_patches(scenes: list[Scene], maps: dict[str, np.ndarray], mask: np.ndarray, path: Path) -> None:
    single = detector(SINGLE_IMAGE)
    figure, axes = drawing.panels(2 * len(scenes), rows=4, width=1.9, height=2.1)
    for i, (name, scene) in enumerate(zip(maps, scenes, strict=True)):
        _photo(axes[2 * i], scene.post, name)
        axes[2 * i + 1].imshow(maps[name], cmap="magma", vmin=0)  # to its own highest: else all is black
        hit = mapped(single, maps[name])
        if hit.any():
            axes[2 * i].contour(hit, levels=[0.5], colors="crimson", linewidths=0.8)
        if name == patches.LABELLED:
            axes[2 * i + 1].contour(mask, levels=[0.5], colors="white", linewidths=0.8)
        drawing.plain(axes[2 * i + 1], f"up to {np.nanmax(maps[name]):.0e}")
    drawing.save(figure, path)


def _draw_pair(pair: Scene, maps: dict[str, np.ndarray], path: Path) -> None:
    figure, axes = drawing.panels(2 + len(maps), width=3.0, height=3.3)
    assert pair.pre is not None
    for axis, layer, i in ((axes[0], pair.pre, PAIR[0]), (axes[1], pair.post, PAIR[1])):
        _photo(axis, layer, slovenia.DATES[i])
    for axis, (name, found_yx) in zip(axes[2:], maps.items(), strict=True):
        axis.imshow(found_yx, cmap="magma", vmin=0)
        hit = mapped(detector(name), found_yx)
        if hit.any():
            axis.contour(hit, levels=[0.5], colors="cyan", linewidths=0.8)
        drawing.plain(axis, f"{name}, up to {np.nanmax(found_yx):.0e}")
    drawing.save(figure, path)
