"""The report's pictures: overlays as PNG files, small before-and-after crops, and the static picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import geopandas as gpd
import numpy as np
import shapely
import xarray as xr
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from PIL import Image, ImageDraw
from shapely.geometry.base import BaseGeometry

from slidecube.pipeline import styles
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.evaluate import Evaluation
from slidecube.pipeline.inventory import Observability, stored

OVERLAY_PX = 2000
CROP_PX = 240
UNSEEN = "#dfe4e8"

Bounds = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A georeferenced picture.

    pixels : (y, x, 3) uint8, black where nothing was seen; geobox : its pixels, in the inventory's CRS
    """

    pixels: NDArray[np.uint8]
    geobox: GeoBox

    def __post_init__(self) -> None:
        if self.pixels.shape != (*self.geobox.shape, 3) or self.pixels.dtype != np.uint8:
            raise PipelineError(
                f"A picture of {self.pixels.dtype} {self.pixels.shape} does not fit a grid of {self.geobox.shape}; "
                "give uint8 (y, x, 3)"
            )

    @property
    def bounds(self) -> Bounds:
        """Left, bottom, right, top."""
        left, bottom, right, top = self.geobox.boundingbox.bbox
        return left, bottom, right, top


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochView:
    """What the report shows of one epoch.

    name : of the epoch; index : in the inventory
    pre, post : name of the rendering ("True colour", "False colour") -> picture; the first is shown first
    evaluation : against reference polygons, when there are some
    """

    name: str
    index: int = 0
    pre: Mapping[str, Picture] = field(default_factory=dict)
    post: Mapping[str, Picture] = field(default_factory=dict)
    evaluation: Evaluation | None = None


def save_overlay(path: Path, picture: Picture) -> None:
    """Write a picture of at most 2,000 pixels a side; nothing seen is transparent."""
    seen = picture.pixels.any(axis=2)
    rgba = np.dstack((picture.pixels, np.where(seen, 255, 0).astype(np.uint8)))
    image = Image.fromarray(rgba)
    scale = OVERLAY_PX / max(image.size)
    if scale < 1:
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        image = image.resize(size, Image.Resampling.BOX)
    image.save(path, optimize=True)


def save_observability(path: Path, inventory: xr.Dataset, *, epoch: int) -> None:
    """Write the map of what was observed, in the colours of `styles`, every k-th pixel of a large one."""
    observability = stored(inventory, "observability", epoch=epoch)
    step = max(-(-max(observability.shape) // OVERLAY_PX), 1)
    seen = observability[::step, ::step].to_numpy()
    reason = (
        stored(inventory, "reason", epoch=epoch)[::step, ::step].to_numpy()
        if "reason" in inventory
        else seen * 0
    )
    rgb = np.zeros((*seen.shape, 3), np.uint8)
    for value, colour in styles.OBSERVABILITY.items():
        rgb[seen == value] = styles.rgb(colour)
    for value, colour in styles.REASONS.items():
        rgb[(seen == Observability.NOT_OBSERVABLE) & (reason == value)] = styles.rgb(colour)
    Image.fromarray(rgb).quantize(32).save(path, optimize=True)


def save_crops(path: Path, pictures: tuple[Picture, Picture], shape: BaseGeometry, colour: str) -> bool:
    """Write one object before (left) and after (right), outlined on the right.

    Returns False, writing nothing, when the pictures are too coarse or end before the object does.
    """
    side = _crop_side(shape, pictures[0])
    left, bottom, right, top = shape.bounds
    x, y = (left + right) / 2, (bottom + top) / 2
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    tiles = [_crop(picture, box) for picture in pictures]
    if tiles[0] is None or tiles[1] is None:
        return False
    sheet = Image.new("RGB", (2 * CROP_PX + 4, CROP_PX), "white")
    draw = ImageDraw.Draw(tiles[1])
    for ring in shapely.get_rings(shapely.get_parts(shape)):
        xy = shapely.get_coordinates(ring)
        dots = np.column_stack((xy[:, 0] - box[0], box[3] - xy[:, 1])) * (CROP_PX / side)
        draw.line([(float(a), float(b)) for a, b in dots], fill=colour, width=2)
    sheet.paste(tiles[0], (0, 0))
    sheet.paste(tiles[1], (CROP_PX + 4, 0))
    sheet.save(path, optimize=True)
    return True


def _crop_side(shape: BaseGeometry, picture: Picture) -> float:
    left, bottom, right, top = shape.bounds
    return float(max(1.8 * max(right - left, top - bottom), 32 * abs(picture.geobox.affine.a)))


def _crop(picture: Picture, box: Bounds) -> Image.Image | None:
    left, bottom, right, top = picture.bounds
    a = picture.geobox.affine
    if not (box[0] < right and box[2] > left and box[1] < top and box[3] > bottom):
        return None
    c0, r0 = (box[0] - left) / a.a, (box[3] - top) / a.e
    c1, r1 = (box[2] - left) / a.a, (box[1] - top) / a.e
    seen = picture.pixels.any(axis=2, keepdims=True)
    image = Image.fromarray(np.where(seen, picture.pixels, np.array(styles.rgb(UNSEEN), np.uint8)))
    # pixels stay square blocks: smoothing would pretend a resolution that is not there
    return image.transform(
        (CROP_PX, CROP_PX),
        Image.Transform.EXTENT,
        (c0, r0, c1, r1),
        Image.Resampling.NEAREST,
        fillcolor=UNSEEN,
    )


def visible_layers(objects: gpd.GeoDataFrame, evaluation: Evaluation | None) -> dict[str, gpd.GeoDataFrame]:
    """The layers that are drawn, by key: "tp", "fp", "fn" with an evaluation, "found" without.

    What could not be judged is drawn with what was found ("other").
    """
    if evaluation is None:
        return {"found": objects}
    predicted, truth = evaluation.predicted, evaluation.truth
    layers = {
        "tp": predicted[predicted["status"] == "tp"],
        "fp": predicted[predicted["status"] == "fp"],
        "fn": truth[truth["status"] == "fn"],
        "other": predicted[predicted["status"] == "unobserved"],
    }
    return {key: layer for key, layer in layers.items() if key != "other" or len(layer)}


def focus_of(objects: gpd.GeoDataFrame, view: EpochView) -> gpd.GeoDataFrame:
    """The objects about which a close-up is drawn: the reference's, where there is one, lest it shows errors alone."""
    if view.evaluation is not None and len(view.evaluation.truth):
        return view.evaluation.truth
    return objects


LAYER_COLOURS = {
    "found": styles.FOUND,
    "tp": styles.TRUE_POSITIVE,
    "fp": styles.FALSE_POSITIVE,
    "fn": styles.FALSE_NEGATIVE,
    "other": "#666666",
}


def layer_label(key: str, n: int, *, simulated: bool) -> str:
    """A layer in words, with its number of objects."""
    truth = "simulated truth" if simulated else "reference"
    words = {
        "found": "landslide",
        "tp": f"mapped, and in the {truth}",
        "fp": "invented (mapped only)",
        "fn": f"missed (in the {truth} only)",
        "other": "mapped, not judged",
    }
    return f"{words[key]}: {n:,}"
