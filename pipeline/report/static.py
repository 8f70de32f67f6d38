"""The static picture: before, after, and the inventory with what was missed and invented (Matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import shapely
import xarray as xr

from slidecube.pipeline import styles
from slidecube.pipeline.inventory import Observability, geobox_of, stored
from slidecube.pipeline.report.numbers import densest_box, observed_parts
from slidecube.pipeline.report.pictures import (
    LAYER_COLOURS,
    Bounds,
    EpochView,
    focus_of,
    layer_label,
    visible_layers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ZOOM_PX = 400
_INK, _PAPER, _MUTED = "#1d2b36", "#ffffff", "#5d6b76"


def render_picture(
    path: Path,
    *,
    inventory: xr.Dataset,
    objects: gpd.GeoDataFrame,
    view: EpochView,
    title: str,
    simulated: bool = False,
    bounds: Bounds | None = None,
) -> Path:
    """Draw before, after and the inventory side by side.

    bounds : part of the map to draw; left out, it is the densest square of 400 pixels
    title : one line above; a simulated inventory says so in the picture itself
    """
    import matplotlib as mpl  # noqa: PLC0415  half a second, which only who draws need spend
    from matplotlib.figure import Figure  # noqa: PLC0415

    geobox = geobox_of(inventory)
    whole = observed_parts(inventory, geobox, epoch=view.index).bounds
    layers = visible_layers(objects[objects["epoch"] == view.name], view.evaluation)
    every = gpd.GeoDataFrame(
        geometry=np.concatenate([g.geometry.to_numpy() for g in layers.values()]), crs=objects.crs
    )
    box = (
        densest_box(focus_of(every, view), whole, ZOOM_PX * abs(geobox.affine.a))
        if bounds is None
        else bounds
    )
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 9, "text.color": _INK}):
        figure = Figure(figsize=(13.2, 5.62), dpi=110, facecolor=_PAPER)
        axes = [figure.add_axes((0.012 + i * 0.3287, 0.118, 0.3187, 0.7485)) for i in range(3)]
        for ax, heading, pictures in zip(axes, ("Before", "After"), (view.pre, view.post), strict=False):
            _photo(ax, heading, next(iter(pictures.values()), None))
        _inventory(axes[2], inventory, layers, view, box)
        for ax in axes:
            _frame(ax, box)
        _scale_bar(axes[0], box)
        _locator(figure, axes[2], whole, box, every)
        _text(figure, title, simulated=simulated)
        _legend(figure, layers, simulated=simulated)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    return path


def _photo(ax: Any, heading: str, picture: Any) -> None:
    ax.set_title(heading, loc="left", fontsize=11, fontweight="bold", pad=5)
    ax.set_facecolor("#dfe4e8")
    if picture is None:
        ax.text(0.5, 0.5, "no picture", transform=ax.transAxes, ha="center", color=_MUTED)
        return
    left, bottom, right, top = picture.bounds
    seen = picture.pixels.any(axis=2)
    rgba = np.dstack((picture.pixels, np.where(seen, 255, 0).astype(np.uint8)))
    ax.imshow(rgba, extent=(left, right, bottom, top), interpolation="nearest")


def _inventory(
    ax: Any, inventory: xr.Dataset, layers: dict[str, gpd.GeoDataFrame], view: EpochView, box: Bounds
) -> None:
    ax.set_title("Inventory", loc="left", fontsize=11, fontweight="bold", pad=5)
    ax.set_facecolor("#cfd4d8")
    picture = next(iter(view.post.values()), None)
    if picture is not None:
        left, bottom, right, top = picture.bounds
        grey = np.ma.masked_equal(picture.pixels.mean(axis=2), 0)
        ax.imshow(
            grey, extent=(left, right, bottom, top), cmap="gray", vmin=-200, vmax=255, interpolation="nearest"
        )
    _hidden(ax, inventory, view.index, box)
    for key in ("other", "found", "tp", "fp", "fn"):
        if key in layers and len(layers[key]):
            near = layers[key][layers[key].intersects(shapely.box(*box))]
            _patches(ax, near.geometry.to_numpy(), LAYER_COLOURS[key])


def _hidden(ax: Any, inventory: xr.Dataset, epoch: int, box: Bounds) -> None:
    geobox = geobox_of(inventory)
    a = geobox.affine
    rows = slice(max(int((box[3] - a.f) / a.e), 0), max(int((box[1] - a.f) / a.e), 1))
    cols = slice(max(int((box[0] - a.c) / a.a), 0), max(int((box[2] - a.c) / a.a), 1))
    seen = stored(inventory, "observability", epoch=epoch)[rows, cols].to_numpy()
    if not seen.size:
        return
    rgba = np.zeros((*seen.shape, 4), np.uint8)
    rgba[seen == Observability.NOT_OBSERVABLE] = (*styles.rgb(styles.OBSERVABILITY[2]), 150)
    left, top = a.c + cols.start * a.a, a.f + rows.start * a.e
    extent = (left, left + seen.shape[1] * a.a, top + seen.shape[0] * a.e, top)
    ax.imshow(rgba, extent=extent, interpolation="nearest")


def _patches(ax: Any, shapes: Any, colour: str) -> None:
    from matplotlib.collections import PatchCollection  # noqa: PLC0415
    from matplotlib.patches import PathPatch  # noqa: PLC0415
    from matplotlib.path import Path as MplPath  # noqa: PLC0415

    patches = []
    for shape in shapes:
        rings = [shapely.get_coordinates(r) for r in shapely.get_rings(shapely.get_parts(shape))]
        patches.append(PathPatch(MplPath.make_compound_path(*(MplPath(r, closed=True) for r in rings))))
    ax.add_collection(PatchCollection(patches, facecolor=colour, edgecolor=colour, linewidth=1.1))


def _frame(ax: Any, box: Bounds) -> None:
    ax.set(xlim=(box[0], box[2]), ylim=(box[1], box[3]), xticks=[], yticks=[], aspect="equal")
    for spine in ax.spines.values():
        spine.set_color("#b8c2ca")


def _scale_bar(ax: Any, box: Bounds) -> None:
    width = box[2] - box[0]
    target = width / 4
    step = 10 ** np.floor(np.log10(target))
    length = max(k * step for k in (1, 2, 5) if k * step <= target)
    x, y = box[0] + 0.04 * width, box[1] + 0.05 * (box[3] - box[1])
    ax.plot([x, x + length], [y, y], color="white", linewidth=5, solid_capstyle="butt")
    ax.plot([x, x + length], [y, y], color=_INK, linewidth=2.4, solid_capstyle="butt")
    label = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    ax.text(
        x + length / 2,
        y + 0.015 * (box[3] - box[1]),
        label,
        ha="center",
        va="bottom",
        fontsize=9,
        bbox={"facecolor": "white", "alpha": 0.75, "pad": 1.5, "edgecolor": "none"},
    )


def _locator(figure: Figure, beside: Any, whole: Bounds, box: Bounds, every: gpd.GeoDataFrame) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    if box[2] - box[0] > 0.7 * (whole[2] - whole[0]):
        return
    at = beside.get_position()
    inset = figure.add_axes((at.x1 - 0.072, at.y0 + 0.012, 0.066, 0.15))
    inset.set(
        xlim=(whole[0], whole[2]),
        ylim=(whole[1], whole[3]),
        xticks=[],
        yticks=[],
        aspect="equal",
        anchor="SE",
    )
    inset.set_facecolor("#ffffffe8")
    points = every.geometry.representative_point()
    inset.plot(points.x, points.y, ".", color="#b6bfc6", markersize=1, zorder=1)
    inset.add_patch(
        Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, color=_INK, linewidth=1.4)
    )
    for spine in inset.spines.values():
        spine.set_color("#8a97a1")


def _text(figure: Figure, title: str, *, simulated: bool) -> None:
    figure.text(0.012, 0.955, title, fontsize=13.5, fontweight="bold", va="center")
    note, colour = ("SIMULATED, UNREVIEWED", "#b3261e") if simulated else ("UNREVIEWED", "#8a5a00")
    figure.text(
        0.988,
        0.955,
        note,
        ha="right",
        va="center",
        fontsize=10,
        fontweight="bold",
        color="white",
        bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": "round,pad=0.4"},
    )


def _legend(figure: Figure, layers: dict[str, gpd.GeoDataFrame], *, simulated: bool) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415

    order = [k for k in ("found", "tp", "fn", "fp", "other") if k in layers]
    handles = [
        Patch(color=LAYER_COLOURS[k], label=layer_label(k, len(layers[k]), simulated=simulated))
        for k in order
    ]
    handles.append(Patch(color=styles.OBSERVABILITY[2], alpha=0.6, label="not observable"))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.006, 0.022),
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
        handlelength=1.2,
        handleheight=1.0,
        columnspacing=1.8,
    )
