"""The unsupervised models through the command line on flat Flanders, where no landslide must be found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chain
import drawing
import flanders
import geopandas as gpd
import numpy as np

from slidecube.models.unsupervised import Kmeans, predict_clusters
from slidecube.pipeline import styles
from slidecube.pipeline.open import open_plan
from slidecube.pipeline.pixels import PixelWindow, features_of, read_layers
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.statistics import load_statistics

MODELS = ("kmeans", "cae-kmeans", "kmeans-change", "cae-kmeans-change")


def measure(shared: Path, scratch: Path, images: Path | None = None) -> dict[str, Any]:
    """Plan and run every model on one workspace; what the rule says of each cluster, and what is mapped."""
    found: dict[str, Any] = {"models": {}}
    maps = {}
    for model in MODELS:
        plan = run_model(shared, scratch, model)
        folder = plan.workspace.statistics(plan.epochs[0].stat_key)
        said = json.loads((folder / "clusters.json").read_text(encoding="utf-8"))
        objects = gpd.read_parquet(plan.workspace.products(plan.inventory) / "landslides.parquet")
        found["models"][model] = {
            "named": said["landslide_clusters"],
            "landslides": len(objects),
            "sheet_written": (folder / "sheet" / "index.html").is_file(),
            "against_the_first": said["clusters"][0]["reason"].removeprefix("not a landslide: "),
            "clusters": [_row(cluster) for cluster in said["clusters"]],
        }
        maps[model] = cluster_map(plan)
        for image, mnf in load_statistics(folder, plan.model).mnf.items():
            found.setdefault("spectra", {})[image] = chain.spectrum(mnf.whole)
    if images is not None:
        _draw(shared, maps, found["models"], images / "real-flanders-clusters.png")
    return found


def run_model(shared: Path, scratch: Path, model: str) -> RunPlan:
    """Plan and run a model on the greenest composites, through the command line."""
    flanders.prepare(shared, scratch, "greenest")
    text = (scratch / "greenest.toml").read_text(encoding="utf-8")
    toml = scratch / f"{model}.toml"
    toml.write_text(text.replace("[output]", f'[detect]\nmodel = "{model}"\n\n[output]'), encoding="utf-8")
    for verb in ("plan", "run"):
        flanders.command_line(verb, toml)
    return open_plan(scratch / "greenest")


def _row(cluster: dict[str, Any]) -> dict[str, Any]:
    evidence = cluster["evidence"]

    def rounded(name: str, digits: int) -> float | None:
        return None if evidence[name] is None else round(evidence[name], digits)

    return {
        "cluster": cluster["cluster"],
        "share_pct": round(100 * evidence["share"], 1),
        "ndvi": rounded("ndvi_post", 2),
        "change": rounded("dndvi", 2),
        "slope_deg": rounded("slope_deg", 1),
        "score": round(cluster["score"], 3),
    }


def cluster_map(plan: RunPlan) -> np.ndarray:
    """Clusters over the site: (y, x) uint8."""
    epoch, card = plan.epochs[0], plan.model.card
    fitted = load_statistics(plan.workspace.statistics(epoch.stat_key), plan.model)
    assert isinstance(fitted.detector, Kmeans)
    margin = card.window_px // 2
    row, col = plan.grid.offset_px(flanders.site())
    height, width = flanders.site().shape
    window = PixelWindow(row=row, col=col, height=height, width=width).padded(margin)
    layers = read_layers(plan, epoch.name, window, mnf=fitted.mnf)
    features = features_of(card.inputs, layers, window, block_px=plan.grid.block_px, threads=1)
    found = predict_clusters(fitted.detector, features, origin_px=(window.row, window.col))["cluster"].values
    core: np.ndarray = found[margin : margin + height, margin : margin + width]
    return core


def _draw(shared: Path, maps: dict[str, np.ndarray], said: dict[str, Any], path: Path) -> None:
    figure, axes = drawing.panels(6, rows=2, width=3.0, height=3.3)
    for axis, window, title in ((axes[0], flanders.PRE, "before"), (axes[3], flanders.POST, "after")):
        made = flanders.expected(shared, window, "greenest")
        planes = [(made[b].astype(float) - 1000) / 10_000 for b in ("B04", "B03", "B02")]
        axis.imshow(drawing.true_colour(*planes, white=0.18))
        drawing.plain(axis, title)
    colours = np.array([styles.rgb(c) for c in styles.CLUSTERS], np.uint8)
    for axis, (model, found_yx) in zip((axes[1], axes[2], axes[4], axes[5]), maps.items(), strict=True):
        picture = np.full((*found_yx.shape, 3), 225, np.uint8)
        known = found_yx != 255
        picture[known] = colours[found_yx[known]]
        axis.imshow(picture, interpolation="nearest")
        named = ", ".join(map(str, said[model]["named"])) or "none"
        drawing.plain(axis, f"{model}\nnamed landslide: {named}")
    drawing.save(figure, path)
