"""A threshold on a real change of NDVI against hand-drawn landslides: Kaikoura, 2016. Recall only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drawing
import geopandas as gpd
import numpy as np
import rasterio
from rasterio.features import rasterize

from slidecube.models.rules import RDNDVI_DEFAULTS

FOLDER = "kaikoura_change"
RASTER, POLYGONS = "diff_landslide_69.tif", "label_landslide_69.shp"
CANOPY_NDVI = 0.8
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(-2, 13))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The change raster and the polygons on its pixels.

    loss_yx : NDVI before minus after, NaN = not seen; brightening_yx : brightness after minus before
    centres : (polygon, y, x) bool, pixels whose centre a polygon holds; touched : the same, pixels that it touches
    extent : left, right, bottom, top, metres
    """

    loss_yx: np.ndarray
    brightening_yx: np.ndarray
    centres: np.ndarray
    touched: np.ndarray
    polygons: gpd.GeoDataFrame
    extent: tuple[float, float, float, float]


def measure(shared: Path, scratch: Path, images: Path | None = None) -> dict[str, Any]:
    """Recall over thresholds, and at the one that the model's own loss means for a canopy."""
    del scratch
    change = read(shared)
    limit = equivalent_loss(CANOPY_NDVI, RDNDVI_DEFAULTS["loss_pct"])
    found = {
        "px": int(change.loss_yx.size),
        "unseen_px": int(np.isnan(change.loss_yx).sum()),
        "polygons": len(change.polygons),
        "without_a_pixel_centre": int((~change.centres.any(axis=(1, 2))).sum()),
        "loss_pct": RDNDVI_DEFAULTS["loss_pct"],
        "each": _each(change),
        "a_priori": {"canopy_ndvi": CANOPY_NDVI, **recall(change, limit)},
        "curve": [recall(change, threshold) for threshold in THRESHOLDS],
    }
    if images is not None:
        _draw(change, found, limit, images / "real-kaikoura.png")
    return found


def read(shared: Path) -> Change:
    """Read raster and polygons; the raster's sign is before minus after (see the document)."""
    polygons = gpd.read_file(shared / FOLDER / POLYGONS)
    with rasterio.open(shared / FOLDER / RASTER) as source:
        loss = source.read(source.descriptions.index("ndvi_change") + 1).astype(float)
        brightening = -source.read(source.descriptions.index("brightness_change") + 1).astype(float)
        transform, bounds = source.transform, source.bounds
        polygons = polygons.to_crs(source.crs)
    loss[~np.isfinite(loss)] = np.nan
    burnt = {
        touched: np.stack(
            [
                rasterize([p], out_shape=loss.shape, transform=transform, all_touched=touched).astype(bool)
                for p in polygons.geometry
            ]
        )
        for touched in (False, True)
    }
    return Change(
        loss_yx=loss,
        brightening_yx=brightening,
        centres=burnt[False],
        touched=burnt[True],
        polygons=polygons,
        extent=(bounds.left, bounds.right, bounds.bottom, bounds.top),
    )


def equivalent_loss(before: float, loss_pct: float) -> float:
    """NDVI lost by a pixel of `before` whose relative change is exactly -`loss_pct` (Scheip & Wegmann 2021, eq. 1).

    With d the loss: 100 d = loss_pct sqrt(2 before - d), a quadratic equation in d.
    """
    k = (loss_pct / 100) ** 2
    return float((-k + np.sqrt(k * k + 8 * k * before)) / 2)


def recall(change: Change, threshold: float) -> dict[str, Any]:
    """Share of the polygons and of their pixels with a loss of at least `threshold`; what was not seen counts nowhere.

    A polygon is found when one pixel that it touches is; one that nobody saw is left out.
    """
    seen = ~np.isnan(change.loss_yx)
    hit = seen & (np.nan_to_num(change.loss_yx, nan=-np.inf) >= threshold)
    judged = [touched for touched in change.touched if (touched & seen).any()]
    inside = change.centres.any(axis=0) & seen
    return {
        "threshold": round(threshold, 3),
        "polygons": len(judged),
        "polygons_found": sum(bool((touched & hit).any()) for touched in judged),
        "px": int(inside.sum()),
        "px_found": int((inside & hit).sum()),
        "flagged_pct": round(100 * float(hit.sum() / seen.sum()), 2),
    }


def _each(change: Change) -> list[dict[str, float]]:
    """Return what happened in each polygon, the smallest first; medians of the pixels that it touches."""
    rows = [
        {
            "area_m2": round(float(area)),
            "loss": round(float(np.nanmedian(change.loss_yx[touched])), 3),
            "brightening": round(float(np.nanmedian(change.brightening_yx[touched])), 3),
        }
        for area, touched in zip(change.polygons.area, change.touched, strict=True)
    ]
    return sorted(rows, key=lambda row: row["area_m2"])


def _draw(change: Change, found: dict[str, Any], limit: float, path: Path) -> None:
    figure, axes = drawing.panels(3, width=4.4, height=4.9)
    for axis, step, title in (
        (axes[0], 2, "NDVI lost (before minus after)"),
        (axes[1], 1, "around the largest polygon"),
    ):
        shown = axis.imshow(
            change.loss_yx[::step, ::step],
            extent=change.extent,
            cmap="BrBG_r",
            vmin=-0.6,
            vmax=0.6,
        )
        hit = np.nan_to_num(change.loss_yx, nan=-1) >= limit
        axis.contour(
            hit,
            levels=[0.5],
            colors="crimson",
            linewidths=0.4 * (3 - step),
            extent=change.extent,
            origin="upper",
        )
        change.polygons.boundary.plot(ax=axis, color="black", linewidth=1.5)
        drawing.plain(axis, f"{title}\nred: {limit:.3f} or more, black: drawn by hand")
        figure.colorbar(shown, ax=axis, location="bottom", shrink=0.8)
    middle = change.polygons.geometry[change.polygons.area.idxmax()].centroid
    axes[1].set_xlim(middle.x - 700, middle.x + 700)
    axes[1].set_ylim(middle.y - 700, middle.y + 700)
    curve = found["curve"]
    thresholds = [point["threshold"] for point in curve]
    for key, of, label in (
        ("polygons_found", "polygons", "polygons"),
        ("px_found", "px", "pixels of polygons"),
    ):
        axes[2].plot(thresholds, [100 * p[key] / p[of] for p in curve], marker="o", markersize=3, label=label)
    axes[2].plot(thresholds, [p["flagged_pct"] for p in curve], "--", color="grey", label="the whole scene")
    axes[2].axvline(limit, color="crimson", linewidth=0.8, label="fixed beforehand")
    axes[2].set(xlabel="threshold on the NDVI lost", ylabel="flagged, %", ylim=(-3, 103))
    axes[2].set_title("recall, and how much is flagged anyway", fontsize=10)
    axes[2].legend(fontsize=8)
    drawing.save(figure, path)
