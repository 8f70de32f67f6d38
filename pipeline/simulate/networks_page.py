"""The document of the networks on simulated worlds: tables, performance diagram and maps, whatever they say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd

from slidecube.models.diagrams import Point, write_performance_diagram
from slidecube.models.network_card import read_card
from slidecube.pipeline.composite import SCALE, SHIFT
from slidecube.pipeline.evaluate import Evaluation
from slidecube.pipeline.null_run import MIN_AREA_M2, SLOPES_DEG
from slidecube.pipeline.pixels import PixelWindow, read_stored
from slidecube.pipeline.simulate.networks import CHANGE, DRAWN, ENSEMBLE, POST, SINGLE, SINGLE_IMAGE, Outcome
from slidecube.pipeline.simulate.worlds import World

DIAGRAM, MAPS = "networks-diagram.png", "networks-maps.png"

_WHITE = 0.18
_CROP_PX = 260
_COLOURS = {"tp": "#1a9850", "fp": "#d73027", "fn": "#ffd92f"}

_ABOUT = (
    "Networks are trained through `slidecube train --sweep` on simulated archives, chosen on others and judged on "
    "others again: {worlds}. The terrains are {extent:g} km wide and share no ground; every archive has its own random "
    "numbers. The simulation's parameters are those of [the simulation](simulation.md), which were fixed before any "
    "detector was run. What is learnt here is how the simulation looks; nothing of it is the accuracy of a map of the "
    "earth."
)
_HOW = (
    "Each network reads {features} features of {px} px patches ({names}), and learns for {epochs} epochs of "
    "{iterations} batches of {batch} patches by Adam from 0.001, falling as a cosine, once for each loss. ResU-Nets "
    "have a width of {width}{encoder}. The epoch with the best F1 on validation is kept, then a temperature and a "
    "threshold (highest F1) are chosen there. All trainings together took {hours:.1f} hours of one core."
)
_SINGLES = (
    "As Table 7 of Ganerød et al. 2023: F1 of pixels, over all patches of the part; validation / test. In bold, the "
    "network that is best on validation, and the one that is best on the test, which nobody could have chosen."
)
_ENSEMBLES = (
    "As Table 8 there: pixel F1 of the mean of the calibrated probabilities of K networks, against the one that is "
    "best on validation. The K best are taken by their validation F1; the greedy choice adds whatever raises the "
    "validation F1 of the mean most. Size and order are chosen on validation; the test is read when all is chosen."
)
_DETECTORS = (
    "Run whole on {worlds}: cube, features, detection, objects; mean (least to most) of several worlds. Pixels "
    "and objects are judged by [the same evaluation](simulation-report.md) as every detector, at the threshold of the "
    "detector's card. `false` counts objects without a landslide for each 100 km² observed. The *null run* maps the "
    "summer before the event (June to 10 July against 11 July to 6 September), in which fields are harvested and "
    "woods are cut, and nothing slides: false objects of at least {area:,.0f} m² for each 100 km² of slopes above "
    "{slope:g} degrees. The last column is the pixel precision that the same rates would give where landslides cover "
    "0.1 % of the land. A dash: nothing was mapped, so there is no precision."
)
_MAPS = (
    "Part of the held-out archive {world} after the event: landslides that were found are outlined in green, those "
    "that were missed in yellow, and objects that are no landslide in red."
)


def markdown(outcome: Outcome) -> str:
    """Write the tables."""
    scale = outcome.scale
    encoder = f", the others the encoder {scale.encoder}" if scale.encoder else ""
    parts = [
        "# Networks on simulated worlds",
        "**SIMULATED data**. Made by `make networks`.",
        _ABOUT.format(worlds=_worlds(scale.worlds), extent=scale.extent_km),
        _HOW.format(
            features=len(CHANGE),
            names=", ".join(CHANGE),
            px=scale.px,
            epochs=scale.epochs,
            iterations=scale.iterations,
            batch=scale.batch,
            width=scale.width,
            encoder=encoder,
            hours=outcome.seconds / 3600,
        ),
        "## Single networks",
        _SINGLES,
        single_table(outcome.singles),
        "## Ensembles",
        _ENSEMBLES,
        ensemble_table(outcome.singles, {"the K best": outcome.ensembles, "greedy": outcome.greedy}),
        f"![Performance diagram](images/{DIAGRAM})",
        "## Beside the other detectors",
        _DETECTORS.format(
            worlds=", ".join(dict.fromkeys(outcome.detectors["world"])), area=MIN_AREA_M2, slope=SLOPES_DEG
        ),
        detector_table(outcome.detectors),
        f"{_shipped(outcome.detectors)} {_on_patches(outcome.models)}",
        _MAPS.format(world=scale.of("test")[0].name),
        f"![What was found, missed and invented](images/{MAPS})",
    ]
    return "\n\n".join(parts) + "\n"


def _worlds(worlds: tuple[World, ...]) -> str:
    said = {"train": "learnt from", "validation": "for the choice", "test": "held out"}
    parts = []
    for use, words in said.items():
        own = [world.name for world in worlds if world.use == use]
        parts.append(f"{', '.join(own)} ({words})")
    return "; ".join(parts)


def _shipped(detectors: pd.DataFrame) -> str:
    said = (
        f"`{SINGLE}` is the best ResU-Net on validation, `{ENSEMBLE}` the best small ensemble of ResU-Nets, "
        f"`{SINGLE_IMAGE}` a ResU-Net that reads {len(POST)} features of the image after the event alone "
        f'({", ".join(POST)}). They ship with slidecube: `[detect] model = "{SINGLE}"`.'
    )
    if detectors["px_precision"].isna().any():
        silent = detectors.loc[detectors["px_precision"].isna(), "detector"]
        said += f" On some of the worlds nothing was mapped by {', '.join(dict.fromkeys(silent))}."
    return said


def _on_patches(models: Mapping[str, Path]) -> str:
    """F1 of the models that ship on the patches that the tables above are of."""
    said = []
    for name in (SINGLE, ENSEMBLE, SINGLE_IMAGE):
        metrics = read_card(models[name]).metrics
        low, high = metrics["f1_interval"]
        said.append(
            f"`{name}` {metrics['validation']['f1']:.3f} / {metrics['f1']:.3f} ({low:.3f} to {high:.3f})"
        )
    return f"On the patches, validation / test (95 %): {', '.join(said)}."


def single_table(singles: pd.DataFrame) -> str:
    """F1 of every network, architecture by loss."""
    losses = list(dict.fromkeys(singles["loss"]))
    best = {part: singles[f"{part}_f1"].max() for part in ("validation", "test")}
    lines = ["| architecture | " + " | ".join(losses) + " |", "|---" * (len(losses) + 1) + "|"]
    for architecture in dict.fromkeys(singles["architecture"]):
        cells = []
        for loss in losses:
            own = singles[(singles["architecture"] == architecture) & (singles["loss"] == loss)]
            cells.append(" / ".join(_f1(own, part, best[part]) for part in best))
        lines.append(f"| {architecture} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _f1(row: pd.DataFrame, part: str, best: float) -> str:
    value = row[f"{part}_f1"].iloc[0] if len(row) else np.nan
    if pd.isna(value):
        return "-"
    return f"**{value:.3f}**" if value == best else f"{value:.3f}"


def ensemble_table(singles: pd.DataFrame, chosen: Mapping[str, pd.DataFrame]) -> str:
    """F1 of ensembles by size, against the single network that is best on validation."""
    best = singles.iloc[int(singles["validation_f1"].to_numpy().argmax())]
    single = (
        f"| single ({best['architecture']}, {best['loss']}) | 1 | {best['validation_f1']:.3f} | {best['test_f1']:.3f} "
        f"| | {best['test_precision']:.3f}, {best['test_recall']:.3f} |"
    )
    lines = [
        "| choice | members | F1 validation | F1 test | against the single | precision, recall (test) |",
        "|---|---|---|---|---|---|",
        single,
    ]
    for label, table in chosen.items():
        for _, row in table.sort_values("size").iterrows():
            gain = row["test_f1"] - best["test_f1"]
            lines.append(
                f"| {label} | {row['size']} | {row['validation_f1']:.3f} | {row['test_f1']:.3f} | {gain:+.3f} "
                f"| {row['test_precision']:.3f}, {row['test_recall']:.3f} |"
            )
    return "\n".join(lines)


_HEADS = {
    "px_precision": "pixel P",
    "px_recall": "R",
    "px_f1": "F1",
    "object_precision": "object P",
    "object_recall": "R",
    "object_f1": "F1",
    "false_per_100_km2": "false",
    "null_per_100_km2": "null run",
    "precision_at_0.1_pct": "P at 0.1 %",
}


def detector_table(detectors: pd.DataFrame) -> str:
    """Scores of every detector over the held-out worlds."""
    lines = ["| detector | " + " | ".join(_HEADS.values()) + " |", "|---" * (len(_HEADS) + 1) + "|"]
    for label in dict.fromkeys(detectors["detector"]):
        rows = detectors[detectors["detector"] == label]
        cells = [_cell(rows[name], ".0f" if "100_km2" in name else ".3f") for name in _HEADS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: pd.Series[float], form: str) -> str:
    known = values.dropna()
    if known.empty:
        return "-"
    if len(known) == 1:
        return format(known.iloc[0], form)
    return f"{known.mean():{form}} ({known.min():{form}} to {known.max():{form}})"


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(outcome: Outcome, folder: Path) -> None:
    """Draw the performance diagram and the maps."""
    folder.mkdir(parents=True, exist_ok=True)
    write_performance_diagram(folder / DIAGRAM, points(outcome), title="SIMULATED, held-out worlds: pixels")
    _draw_maps(outcome, folder / MAPS)


def points(outcome: Outcome) -> list[Point]:
    """Networks and ensembles on the patches of the held-out worlds, detectors on their whole maps."""
    found = []
    best = outcome.singles["validation_f1"].idxmax()
    for index, row in outcome.singles.iterrows():
        label = f"{row['architecture']} {row['loss']}"
        found.append(_point(row, "test", label, "single networks, patches", main=index == best))
    for group, table in (
        ("ensembles of the K best", outcome.ensembles),
        ("greedy ensembles", outcome.greedy),
    ):
        top = table["validation_f1"].idxmax() if len(table) else None
        for index, row in table.iterrows():
            label = f"{row['size']} members"
            found.append(_point(row, "test", label, f"{group}, patches", main=index == top))
    means = outcome.detectors.groupby("detector", sort=False).mean(numeric_only=True)
    for name, row in means.iterrows():
        found.append(_point(row, "px", str(name), "detectors, whole maps", main=True))
    return [point for point in found if np.isfinite([point.precision, point.recall]).all()]


def _point(row: pd.Series[float], prefix: str, label: str, group: str, *, main: bool) -> Point:
    return Point(
        label=label,
        group=group,
        precision=float(row[f"{prefix}_precision"]),
        recall=float(row[f"{prefix}_recall"]),
        main=main,
    )


def _draw_maps(outcome: Outcome, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  it takes a second
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = [label for label in DRAWN if label in outcome.drawn]
    figure = Figure(figsize=(4.2 * len(shown), 4.8), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    picture, extent = _picture(outcome)
    for axis, label in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        axis.imshow(picture, extent=extent, interpolation="nearest")
        _outline(axis, outcome.drawn[label])
        axis.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[], xlabel="", ylabel="")
        axis.set_title(f"SIMULATED: {label}", fontsize=10)
    canvas.print_png(str(path), metadata={"Software": None})  # type: ignore[no-untyped-call]


def _outline(axis: object, found: Evaluation) -> None:
    for table, status in ((found.predicted, "fp"), (found.truth, "fn"), (found.truth, "tp")):
        own = table[table["status"] == status]
        if len(own):
            own.boundary.plot(ax=axis, color=_COLOURS[status], linewidth=1.1)


def _picture(outcome: Outcome) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """True colour after the event of the part with most landslides, and its left, right, bottom and top."""
    archive, plan = outcome.archive, outcome.layers
    row, col = plan.grid.offset_px(archive.geobox)
    rows, cols = archive.geobox.shape
    down, right = _densest(gpd.read_parquet(archive.landslides), archive.geobox.affine, (rows, cols))
    window = PixelWindow(
        row=row + down, col=col + right, height=min(_CROP_PX, rows), width=min(_CROP_PX, cols)
    )
    stored = read_stored(plan, plan.epochs[0].post, ["B04", "B03", "B02"], window)
    planes = [(stored[b].to_numpy().astype(np.float32) - SHIFT) / SCALE for b in ("B04", "B03", "B02")]
    picture = (255 * np.clip(np.dstack(planes) / _WHITE, 0, 1) ** (1 / 1.5)).astype(np.uint8)
    box = window.geobox(plan.grid).boundingbox
    return picture, (box.left, box.right, box.bottom, box.top)


def _densest(landslides: gpd.GeoDataFrame, affine: object, shape: tuple[int, int]) -> tuple[int, int]:
    """First row and column of the crop that holds the centres of most landslides."""
    centres = landslides.geometry.representative_point()
    x = ((centres.x - affine.c) / affine.a).to_numpy()  # type: ignore[attr-defined]
    y = ((centres.y - affine.f) / affine.e).to_numpy()  # type: ignore[attr-defined]
    best, found = -1, (0, 0)
    for top in range(0, max(shape[0] - _CROP_PX, 0) + 1, 50):
        for left in range(0, max(shape[1] - _CROP_PX, 0) + 1, 50):
            inside = (y >= top) & (y < top + _CROP_PX) & (x >= left) & (x < left + _CROP_PX)
            if inside.sum() > best:
                best, found = int(inside.sum()), (top, left)
    return found
