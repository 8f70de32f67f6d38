"""The whole rule `rdndvi` on 465 labelled segments of real Sentinel-2 image pairs of many landslides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import drawing
import numpy as np
import pandas as pd
import xarray as xr

from slidecube.models.predict import predict
from slidecube.models.zoo import build_model
from slidecube.pipeline.indices import relative_difference

TABLE = "kaikoura_change/df4ML.csv"
PREVALENCES = (0.01, 0.001)
RESAMPLES, SEED = 2000, 0


def measure(shared: Path, scratch: Path, images: Path | None = None) -> dict[str, Any]:
    """Judge every segment by the model as it stands; no number of it was chosen here."""
    del scratch
    table = read(shared)
    model = build_model("rdndvi")
    judged = judge(table)
    by_slope = {name: _scores(judge(table, slope=name), table["landslide"]) for name in ("slope_max",)}
    hit, truth = judged["hit"], table["landslide"]
    lost, steep = judged["change_pct"] <= -model.card.parameters["loss_pct"], None
    steep = table["slope_mean"] >= model.card.parameters["slope_deg"]
    found = {
        "segments": len(table),
        "landslides": int(truth.sum()),
        "events": int(table["event"].nunique()),
        "model": model.card.address,
        "threshold": model.card.threshold,
        "parameters": dict(model.card.parameters),
        "pre_if_before_minus_after": [round(float(v), 3) for v in (table["pre"].min(), table["pre"].max())],
        "pre_if_after_minus_before": [
            round(float(v), 3) for v in np.sort(table["ndvi"] - table["ndvi_change"])[[0, -1]]
        ],
        "undefined": int(judged["change_pct"].isna().sum()),
        "all": _scores(judged, truth),
        "interval_95": _interval(table, hit),
        "slope_max_instead": by_slope["slope_max"],
        "loss_alone": _scores(judged.assign(hit=lost), truth),
        "missed": {
            "loss_too_small": int((truth & ~hit & ~lost).sum()),
            "only_slope_too_gentle": int((truth & ~hit & lost & ~steep).sum()),
        },
        "invented": {
            "events": int(table.loc[~truth & hit, "event"].nunique()),
            "median_change_pct": round(float(judged.loc[~truth & hit, "change_pct"].median()), 1),
        },
        "at_prevalence": {str(p): _precision_at(hit, truth, p) for p in PREVALENCES},
    }
    if images is not None:
        _draw(table, judged, found, images / "real-segments.png")
    return found


def read(shared: Path) -> pd.DataFrame:
    """Read the table; `pre` is the NDVI before, `event` the part of the name that says which image pair."""
    table = pd.read_csv(shared / TABLE)
    return table.assign(
        pre=table["ndvi"] + table["ndvi_change"],  # the table's change is before minus after
        event=table["segment_id"].str.split("_").str[0],
        landslide=table["Type"] == 1,
    )


def judge(table: pd.DataFrame, *, slope: str = "slope_mean") -> pd.DataFrame:
    """Apply the model to each segment as if it were a pixel: relative change, probability, and landslide or not."""
    change = relative_difference(table["pre"].to_numpy(), table["ndvi"].to_numpy())
    features = xr.Dataset(
        {"rdndvi": (("y", "x"), change[None]), "slope_deg": (("y", "x"), table[slope].to_numpy()[None])}
    )
    model = build_model("rdndvi")
    probability = predict(model, features)["probability"].to_numpy()[0]
    return pd.DataFrame(
        {"change_pct": change, "probability": probability, "hit": probability >= model.card.threshold},
        index=table.index,
    )


def _scores(judged: pd.DataFrame, truth: pd.Series) -> dict[str, Any]:
    hit = judged["hit"]
    tp, fp, fn = (int(n.sum()) for n in (hit & truth, hit & ~truth, ~hit & truth))
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": int((~hit & ~truth).sum()),
        "precision": round(tp / (tp + fp), 3),
        "recall": round(tp / (tp + fn), 3),
        "f1": round(2 * tp / (2 * tp + fp + fn), 3),
    }


def _interval(table: pd.DataFrame, hit: pd.Series) -> dict[str, list[float]]:
    """95 % interval by resampling whole events: segments of one image pair are not independent."""
    counts = (
        pd.DataFrame(
            {"tp": hit & table["landslide"], "fp": hit & ~table["landslide"], "fn": ~hit & table["landslide"]}
        )
        .groupby(table["event"])
        .sum()
        .to_numpy()
    )
    rng = np.random.default_rng(SEED)
    drawn = counts[rng.integers(0, len(counts), (RESAMPLES, len(counts)))].sum(axis=1)
    tp, fp, fn = drawn.T
    shares = {"precision": tp / (tp + fp), "recall": tp / (tp + fn), "f1": 2 * tp / (2 * tp + fp + fn)}
    return {
        name: [round(float(v), 2) for v in np.percentile(share, [2.5, 97.5])]
        for name, share in shares.items()
    }


def _precision_at(hit: pd.Series, truth: pd.Series, prevalence: float) -> float:
    """Precision if landslides were so rare, at the same rates of hits and false alarms (METHODS: base rate)."""
    found, false = float(hit[truth].mean()), float(hit[~truth].mean())
    return round(found * prevalence / (found * prevalence + false * (1 - prevalence)), 4)


def _draw(table: pd.DataFrame, judged: pd.DataFrame, found: dict[str, Any], path: Path) -> None:
    figure, axes = drawing.panels(1, width=7.0, height=5.0)
    axis, parameters = axes[0], found["parameters"]
    for truth, colour, label in (
        (False, "tab:blue", "labelled: other"),
        (True, "tab:orange", "labelled: landslide"),
    ):
        of = table["landslide"] == truth
        axis.scatter(
            judged.loc[of, "change_pct"],
            table.loc[of, "slope_mean"],
            s=12,
            alpha=0.6,
            color=colour,
            label=label,
        )
    axis.axvline(-parameters["loss_pct"], color="crimson", linewidth=0.8)
    axis.axhline(parameters["slope_deg"], color="crimson", linewidth=0.8)
    left, top = axis.get_xlim()[0], axis.get_ylim()[1]
    axis.text(left + 2, top - 1, "the rule says landslide", color="crimson", fontsize=8, va="top")
    axis.set(xlabel="relative change of NDVI, %", ylabel="mean slope of the segment, degrees")
    axis.legend(fontsize=8)
    drawing.save(figure, path)
