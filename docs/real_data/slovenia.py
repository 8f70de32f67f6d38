"""Five real Level 1C scenes of a forested hill country: MNF beside the paper's table, clusters without an event."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chain
import drawing
import numpy as np
import rioxarray  # noqa: F401  gives arrays their .rio
import xarray as xr

from slidecube.pipeline import styles
from slidecube.pipeline.terrain import slope_deg

DATES = ("2015-08-20", "2015-07-31", "2015-09-09", "2015-08-30", "2015-07-11")
"""Of the scenes, which carry none: each one's NDVI equals that of this date in the series beside them."""
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
PAPER_BANDS = tuple(band for band in BANDS if band not in {"B01", "B09"})
CLEAR = (4, 3, 2)
PAPER = {
    "India": (91.78, 70.41, 13.59, 12.85, 11.25, 5.69, 4.15, 2.81, 2.23, 1.80, 1.51),
    "China": (88.53, 72.10, 12.04, 11.05, 9.68, 6.89, 3.57, 2.42, 1.92, 1.55, 1.30),
    "Taiwan": (95.76, 78.10, 15.33, 9.85, 8.41, 6.02, 4.01, 2.72, 2.16, 1.74, 1.46),
}
"""Eigenvalues of Shahabi et al. 2021, Table 3."""


def measure(shared: Path, scratch: Path, images: Path | None = None) -> dict[str, Any]:
    """Fit the MNF to every scene, and cluster the clear ones, alone and in pairs."""
    del scratch
    scenes = read(shared)
    found: dict[str, Any] = {"scenes": len(scenes), "paper": paper(), "spectra": spectra(shared)}
    terrain = scenes[0].terrain["slope_deg"].values
    known = terrain[terrain != 65535] / 100
    found["slope_deg"] = {"median": round(float(np.median(known)), 1), "most": round(float(known.max()), 1)}
    found["heights_m"] = len(np.unique(scenes[0].terrain["elevation"].values))
    single, change = {}, {}
    for variant in chain.VARIANTS:
        single[variant] = {
            DATES[i]: chain.cluster([scenes[i]], chain.fit([scenes[i]], PAPER_BANDS), variant) for i in CLEAR
        }
        pair = [
            chain.Scene(pre=scenes[CLEAR[0]].post, post=scenes[CLEAR[-1]].post, terrain=scenes[0].terrain)
        ]
        change[variant] = chain.cluster(pair, chain.fit(pair, PAPER_BANDS), variant)
    found["single"] = {v: {day: f.to_dict() for day, f in by.items()} for v, by in single.items()}
    found["change"] = {v: f.to_dict() for v, f in change.items()}
    if images is not None:
        _draw(scenes, single, change, images / "real-slovenia.png")
    return found


def spectra(shared: Path) -> dict[str, Any]:
    """Eigenvalues of the MNF of each scene alone, in the paper's bands."""
    return {
        day: chain.spectrum(chain.fit([scene], PAPER_BANDS))
        for day, scene in zip(DATES, read(shared), strict=True)
    }


def paper() -> dict[str, Any]:
    """The paper's eigenvalues, and the share of the first three."""
    return {
        site: {"eigenvalues": list(values), "first_three": round(sum(values[:3]) / sum(values), 3)}
        for site, values in PAPER.items()
    }


def read(shared: Path) -> list[chain.Scene]:
    """Read the scenes, without what the cloud masks of their dates cover."""
    folder = shared / "eolearn_slovenia"
    values = np.load(folder / "REFERENCE_SCENES.npy").astype(np.float64)
    patch = folder / "TestEOPatch"
    stamps = [str(t)[:10] for t in json.loads((patch / "timestamps.json").read_text(encoding="utf-8"))]
    clouds = np.load(patch / "mask" / "CLM.npy")[..., 0]
    terrain = _terrain(patch)
    scenes = []
    for i, day in enumerate(DATES):
        # the two that are all cloud are kept as they are, to see what the MNF makes of cloud
        hidden = clouds[stamps.index(day)] == 1 if i in CLEAR else np.zeros(values.shape[1:3], bool)
        planes = {band: np.where(hidden, np.nan, values[i, ..., b]) for b, band in enumerate(BANDS)}
        scenes.append(chain.Scene(post=chain.stored_bands(planes), terrain=terrain))
    return scenes


def _terrain(patch: Path) -> xr.Dataset:
    heights = np.load(patch / "data_timeless" / "DEM.npy")[..., 0].astype(np.float32)
    corners = np.array(json.loads((patch / "bbox.geojson").read_text(encoding="utf-8"))["coordinates"][0])
    (left, bottom), (right, top) = corners.min(axis=0), corners.max(axis=0)
    rows, cols = heights.shape
    dem = xr.DataArray(
        heights,
        dims=("y", "x"),
        coords={
            "y": top - (np.arange(rows) + 0.5) * (top - bottom) / rows,
            "x": left + (np.arange(cols) + 0.5) * (right - left) / cols,
        },
    ).rio.write_crs("EPSG:32633")
    return chain.stored_terrain(slope_deg(dem).values, heights)


def _draw(scenes: list[chain.Scene], single: Any, change: Any, path: Path) -> None:
    figure, axes = drawing.panels(12, rows=3, width=2.9, height=3.1)
    for row, i in enumerate(CLEAR):
        day = DATES[i]
        _photo(axes[4 * row], scenes[i], day)
        for column, variant in enumerate(("kmeans", "cae deep"), start=1):
            show(axes[4 * row + column], single[variant][day], f"{variant}, {day}")
    for row, variant in enumerate(chain.VARIANTS):
        show(
            axes[4 * row + 3], change[variant], f"change, {variant}\n{DATES[CLEAR[0]]} to {DATES[CLEAR[-1]]}"
        )
    drawing.save(figure, path)


def _photo(axis: Any, scene: chain.Scene, title: str) -> None:
    planes = [
        np.where(scene.post[b].values == 0, np.nan, (scene.post[b].values - 1000.0) / 10_000)
        for b in ("B04", "B03", "B02")
    ]
    axis.imshow(drawing.stretched(*planes))
    drawing.plain(axis, title)


def show(axis: Any, found: chain.Found, title: str, which: int = 0) -> None:
    """Draw a map of clusters in the sheet's colours; what the rule names is said in the title."""
    found_yx = found.maps[which]
    colours = np.array([styles.rgb(c) for c in styles.CLUSTERS], np.uint8)
    picture = np.full((*found_yx.shape, 3), 225, np.uint8)
    known = found_yx != 255
    picture[known] = colours[found_yx[known]]
    axis.imshow(picture, interpolation="nearest")
    named = ", ".join(map(str, found.naming.clusters)) or "none"
    drawing.plain(axis, f"{title}\nnamed landslide: {named}")
