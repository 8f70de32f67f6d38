"""The paper's Table 4 on simulated archives: k-means on plain inputs or on deep features, of one image and of two.

`python -m slidecube.pipeline.simulate.ablation DOCUMENT.md [SEED ...]`

Two things can fail: the clusters (no cluster is the landslides) and the name (the rule picks another one). So beside
what the pipeline maps stands what the best single cluster would have scored, picked with the truth at hand.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from slidecube.models.unsupervised import UNKNOWN_CLUSTER, Kmeans, predict_clusters
from slidecube.pipeline.detect import without_small
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.evaluate import Evaluation
from slidecube.pipeline.pixels import PixelWindow, aoi_mask, features_of, read_layers
from slidecube.pipeline.run_plan import RunPlan, minimum_size_px
from slidecube.pipeline.simulate.archive import SimulatedArchive, simulate_archive
from slidecube.pipeline.simulate.baselines import Detection, of_mask, score, truth_mask
from slidecube.pipeline.simulate.detectors import detection_of, run_model
from slidecube.pipeline.tasks import fitted_statistics

SAMPLE = 50_000.0
"""Patches learnt from, a quarter of the models' default: 100 epochs then take half a minute and not two."""

READING = "## Reading"
"""What stands in the document from this line on was written by a person, and is kept."""

_PIXELS = ("precision", "recall", "f1", "iou_landslide", "miou")
_OBJECTS = ("precision", "recall", "f1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of the table; parameters : beside the model's own."""

    label: str
    model: str
    parameters: Mapping[str, float] = field(default_factory=dict)


VARIANTS = (
    Variant(label="rdndvi (a rule, two images)", model="rdndvi"),
    Variant(label="MNF + NDVI + slope, k-means", model="kmeans"),
    Variant(label="deep features", model="cae-kmeans", parameters={"deep_and_inputs": 0.0}),
    Variant(label="deep features + inputs", model="cae-kmeans", parameters={"deep_and_inputs": 1.0}),
    Variant(label="MNF + NDVI + slope of the change, k-means", model="kmeans-change"),
    Variant(
        label="deep features of the change", model="cae-kmeans-change", parameters={"deep_and_inputs": 0.0}
    ),
    Variant(
        label="deep features of the change + inputs",
        model="cae-kmeans-change",
        parameters={"deep_and_inputs": 1.0},
    ),
)


def ablation(
    variants: Iterable[Variant] = VARIANTS,
    *,
    seeds: Iterable[int] = range(5),
    size: str = "default",
    sample: float = SAMPLE,
    epochs: float | None = None,
    overpasses: int | None = None,
) -> pd.DataFrame:
    """Run every variant through the pipeline on the archive of every seed; the cubes are made once a seed.

    sample : patches that are learnt from; epochs : of the auto-encoder, None for the paper's
    Returns one row a seed and variant: scores of what the pipeline mapped (NaN where undefined), the clusters that the
    rule named, and number and scores of the best single cluster.
    """
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            archive = simulate_archive(Path(scratch), seed=seed, size=size, overpasses=overpasses)
            for variant in variants:
                started = time.monotonic()
                rows.append({"seed": seed, "variant": variant.label} | _row(archive, variant, sample, epochs))
                took = time.monotonic() - started
                sys.stderr.write(f"seed {seed}, {variant.label}: {took:.0f} s\n")
    return pd.DataFrame(rows)


def _row(
    archive: SimulatedArchive, variant: Variant, sample: float, epochs: float | None
) -> dict[str, float | str]:
    parameters = dict(variant.parameters)
    if variant.model != "rdndvi":
        parameters["sample"] = sample
    if epochs is not None and variant.model.startswith("cae"):
        parameters["epochs"] = epochs
    plan = run_model(archive, model=variant.model, parameters=parameters)
    mapped = detection_of(archive, plan)
    row: dict[str, float | str] = _scores(score(archive, mapped), "")
    if isinstance(plan.model, Kmeans):
        row |= _clusters(archive, plan, mapped)
    return row


def _scores(result: Evaluation, prefix: str) -> dict[str, float | str]:
    values = {f"{prefix}px_{name}": getattr(result.pixels, name) for name in _PIXELS}
    values |= {f"{prefix}object_{name}": getattr(result.objects, name) for name in _OBJECTS}
    return {name: float("nan") if value is None else value for name, value in values.items()}


def _clusters(archive: SimulatedArchive, plan: RunPlan, mapped: Detection) -> dict[str, float | str]:
    """What the rule named, and the best that one cluster alone could have scored."""
    clusters_yx = cluster_map(archive, plan)
    best, mask = best_cluster(archive, plan, mapped, clusters_yx)
    result = score(archive, Detection(objects=of_mask(archive, mask).objects, observed=mapped.observed))
    observed = np.ones(clusters_yx.shape, bool) if mapped.observed is None else mapped.observed
    return {
        "named": ", ".join(map(str, fitted_statistics(plan, plan.epochs[0]).clusters or ())) or "none",
        "best": best,
        "share_of_best": float((clusters_yx == best)[observed].mean()),
        **_scores(result, "best_"),
    }


def best_cluster(
    archive: SimulatedArchive, plan: RunPlan, mapped: Detection, clusters_yx: np.ndarray
) -> tuple[int, np.ndarray]:
    """Return the cluster that would map best by pixel F1, picked with the truth at hand, and its map: (y, x) bool."""
    fitted = fitted_statistics(plan, plan.epochs[0])
    assert isinstance(fitted.detector, Kmeans)
    assert fitted.detector.fitted is not None
    observed = np.ones(clusters_yx.shape, bool) if mapped.observed is None else mapped.observed
    truth = truth_mask(archive) & observed
    minimum_px = minimum_size_px(plan.model.card.min_area_m2, plan.grid.resolution_m)
    masks = [
        without_small((clusters_yx == k) & observed, minimum_px)
        for k in range(len(fitted.detector.fitted.centres))
    ]
    f1 = [2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1) for mask in masks]
    best = int(np.argmax(f1))
    return best, masks[best]


def cluster_map(archive: SimulatedArchive, plan: RunPlan) -> np.ndarray:
    """Clusters of a fitted model on the archive's pixels: (y, x) uint8, 255 = unknown."""
    fitted, epoch = fitted_statistics(plan, plan.epochs[0]), plan.epochs[0].name
    if not isinstance(fitted.detector, Kmeans):
        raise PipelineError(f"Model {plan.model.card.address} has no clusters")
    card, px = plan.model.card, plan.grid.tile_px
    margin = card.window_px // 2
    row0, col0 = plan.grid.offset_px(archive.geobox)
    out_yx = np.full(archive.geobox.shape, UNKNOWN_CLUSTER)
    for tile in plan.tiles:
        window = PixelWindow.of_tile(plan.grid, tile).padded(margin)
        layers = read_layers(plan, epoch, window, mnf=fitted.mnf)
        features = features_of(card.inputs, layers, window, block_px=plan.grid.block_px, threads=1)
        inside = xr.DataArray(aoi_mask(plan, window), dims=("y", "x"))
        found = predict_clusters(fitted.detector, features.where(inside), origin_px=(window.row, window.col))
        core_yx = found["cluster"].to_numpy()[margin : margin + px, margin : margin + px]
        at, part = zip(
            _shared(tile.row * px - row0, px, out_yx.shape[0]),
            _shared(tile.col * px - col0, px, out_yx.shape[1]),
            strict=True,
        )
        out_yx[at] = core_yx[part]
    return out_yx


def _shared(start: int, length: int, size: int) -> tuple[slice, slice]:
    low, high = max(start, 0), max(min(start + length, size), 0)
    return slice(low, max(low, high)), slice(low - start, max(low, high) - start)


_ABOUT = (
    "As Table 4 of Shahabi et al. 2021, with one image after the event as there, and with two. Each model runs through "
    "the pipeline on its card's defaults (5 clusters of the inputs alone, 4 with deep features, 100 epochs), but for a "
    "sample of {sample:,.0f} patches instead of 200,000, which keeps the command short. Nothing was tuned on these "
    "seeds. A model of which the rule names no cluster maps nothing: its recall is 0, and it has no precision."
)
_SCORES = (
    "IoU is that of the landslide class, mIoU the mean over both classes: where landslides are rare, a map without any "
    "has an mIoU near .5. Precision is the mean over the seeds that have one."
)
_BEST = (
    "Picked with the truth at hand, by pixel F1: what a person could get out of the same clusters with one number in "
    "`landslide_clusters`, and no more. If this is low, the clusters fail, and no name helps."
)
_NUMBERS = (
    "Named by the rule; then the best, and its share of what was observed. Clusters are numbered from the barest on, "
    "of the change from the greatest loss."
)


# --- the document -----------------------------------------------------------------------------------------------------


def markdown(table: pd.DataFrame, *, sample: float = SAMPLE) -> str:
    """Write the tables."""
    seeds = ", ".join(map(str, sorted(set(table["seed"]))))
    named = table[table["named"].notna()] if "named" in table else table.iloc[:0]
    parts = [
        "# Ablation: plain inputs or deep features",
        f"**SIMULATED data**, archives of the seeds {seeds}; mean (least to most) over them. Made by `make ablation`.",
        _ABOUT.format(sample=sample),
        "## What the pipeline maps",
        _table(table, ""),
        _SCORES,
        "## What the best single cluster would have mapped",
        _BEST,
        _table(named, "best_"),
        "## Which cluster was named, and which is best",
        _NUMBERS,
        _names(named),
    ]
    return "\n\n".join(parts) + "\n"


def _table(table: pd.DataFrame, prefix: str) -> str:
    columns = [f"{prefix}px_{n}" for n in _PIXELS] + [f"{prefix}object_{n}" for n in _OBJECTS]
    heads = ["pixel P", "R", "F1", "IoU", "mIoU", "object P", "R", "F1"]
    lines = ["| features | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for label in dict.fromkeys(table["variant"]):
        part = table[table["variant"] == label]
        lines.append(f"| {label} | " + " | ".join(_cell(part[c]) for c in columns) + " |")
    return "\n".join(lines)


def _cell(values: pd.Series[float]) -> str:
    known = values.dropna()
    if known.empty:
        return "-"
    return f"{known.mean():.3f} ({known.min():.3f} to {known.max():.3f})"


def _names(table: pd.DataFrame) -> str:
    seeds = sorted(set(table["seed"]))
    lines = [
        "| features | " + " | ".join(f"seed {s}" for s in seeds) + " |",
        "|---" * (len(seeds) + 1) + "|",
    ]
    for label in dict.fromkeys(table["variant"]):
        part = table[table["variant"] == label].set_index("seed")
        cells = [
            f"{part['named'][s]}; {part['best'][s]:.0f} ({100 * part['share_of_best'][s]:.0f} %)"
            for s in seeds
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Write the document; arguments : file to write, then seeds (0 to 4 where none is given)."""
    if not arguments or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m slidecube.pipeline.simulate.ablation DOCUMENT.md [SEED ...]\n")
        return 1
    seeds = [int(seed) for seed in arguments[1:]] or list(range(5))
    path = Path(arguments[0])
    text = markdown(ablation(seeds=seeds))
    sys.stdout.write(text)
    written = path.read_text(encoding="utf-8") if path.exists() else ""
    _, mark, reading = written.partition(READING)
    path.write_text(text + (f"\n{mark}{reading}" if mark else ""), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
