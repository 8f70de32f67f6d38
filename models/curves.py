"""Curves of a training: its history as Parquet and for TensorBoard, and a picture of its best and worst patches.

Axes: b patch of a batch, f feature, y row, x column.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slidecube.models.errors import ModelError
from slidecube.models.patches import LANDSLIDE, STABLE
from slidecube.models.training_state import Row
from slidecube.models.weights import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

COLUMNS = pa.schema(
    [
        ("epoch", pa.int32()),
        ("iteration", pa.int64()),
        ("loss", pa.float64()),
        ("learning_rate", pa.float64()),
        ("validation_loss", pa.float64()),
        ("precision", pa.float64()),
        ("recall", pa.float64()),
        ("f1", pa.float64()),
        ("threshold", pa.float64()),
        ("seconds", pa.float64()),
    ]
)
"""One row an epoch, counted from 1: mean loss of its steps, rate of its last one, and validation at its own best
threshold; seconds of training and validation, which alone differ from run to run."""

_RGB = (("B04_post", "B03_post", "B02_post"), ("l4s_B4", "l4s_B3", "l4s_B2"))
_UNKNOWN = "0.75"


def write_history(path: Path, rows: Sequence[Row]) -> None:
    """Write the epochs so far, whole or not at all."""
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=COLUMNS), out)
    write_whole(path, out.getvalue())


def open_events(folder: Path, *, done: int) -> Callable[[Row], None]:
    """Open an event file of TensorBoard, in which epochs after `done` of an earlier one no longer count.

    Returns what writes an epoch. Raises ModelError where TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  an extra
    except ImportError:
        raise ModelError("tensorboard = true needs TensorBoard: pip install 'slidecube[nets]'") from None
    writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(row: Row) -> None:
        for name in COLUMNS.names[2:]:
            writer.add_scalar(name, row[name], global_step=int(row["epoch"]))
        writer.flush()

    return write


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictured:
    """A patch in the panel: features in their units, NaN = unknown; labels; probability."""

    title: str
    x_fyx: np.ndarray
    y_yx: np.ndarray
    probability_yx: np.ndarray


def f1_of_patches(logits_byx: np.ndarray, labels_byx: np.ndarray, threshold: float) -> np.ndarray:
    """F1 of each patch at a threshold of probability: (b,), NaN where there is no landslide and none is found."""
    judged = (labels_byx == STABLE) | (labels_byx == LANDSLIDE)
    found = (logits_byx >= np.log(threshold / (1 - threshold))) & judged
    truth = labels_byx == LANDSLIDE
    both = (found & truth).sum(axis=(1, 2))
    either = found.sum(axis=(1, 2)) + truth.sum(axis=(1, 2))
    return np.where(either > 0, 2 * both / np.maximum(either, 1), np.nan)


def best_and_worst(f1: np.ndarray, holds: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """Places of the best and of the worst patches, never one in both; the first one wins a tie.

    holds : which patches hold a landslide; where none is, nothing can be found well, and only false alarms are worst
    """
    order = [int(i) for i in np.argsort(-f1, kind="stable") if np.isfinite(f1[i])]
    with_landslides = [i for i in order if holds[i]]
    best = with_landslides[: min(count, -(-len(order) // 2))]
    return best, [i for i in reversed(order) if i not in best][:count]


def write_panel(path: Path, rows: Sequence[Pictured], names: Sequence[str], threshold: float) -> None:
    """Draw patches beside their labels and probabilities, as PNG; unknown and unobserved pixels are grey."""
    from matplotlib.figure import Figure  # noqa: PLC0415  slow to import

    if not rows:
        return
    figure = Figure(figsize=(7.5, 2.4 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for row, (image, label, probability) in zip(rows, grid, strict=True):
        _draw_image(image, row.x_fyx, names)
        image.set_title(row.title, loc="left", fontsize=8)
        known = np.isin(row.y_yx, (STABLE, LANDSLIDE))
        probability_yx = np.ma.masked_where(~known, row.probability_yx)
        _draw(label, np.where(known, row.y_yx, np.nan), "Reds")
        shown = _draw(probability, probability_yx, "viridis")
        if known.any() and probability_yx.min() < threshold <= probability_yx.max():
            probability.contour(probability_yx, [threshold], colors="white", linewidths=0.7)
        figure.colorbar(shown, ax=probability, shrink=0.8)
    figure.supxlabel("grey: unknown, or not labelled", fontsize=8)
    for axes, title in zip(grid[0, 1:], ("reference", f"probability, line at {threshold:.2g}"), strict=True):
        axes.set_title(title, loc="left", fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    write_whole(path, out.getvalue())


def _draw(axes: Axes, values_yx: np.ndarray, colours: str) -> AxesImage:
    axes.set_axis_off()
    axes.imshow(
        np.ones(values_yx.shape), cmap="gray", vmin=0, vmax=1 / float(_UNKNOWN), interpolation="nearest"
    )
    return axes.imshow(np.ma.masked_invalid(values_yx), cmap=colours, vmin=0, vmax=1, interpolation="nearest")


def _draw_image(axes: Axes, x_fyx: np.ndarray, names: Sequence[str]) -> None:
    """The image after the event in its colours where the features hold it, else the first feature."""
    bands = next((rgb for rgb in _RGB if set(rgb) <= set(names)), names[:1])
    planes = [_stretched(x_fyx[list(names).index(name)]) for name in bands]
    if len(planes) == 1:
        _draw(axes, planes[0], "gray")
    else:
        rgb = np.stack(planes, axis=-1)
        unknown = ~np.isfinite(rgb).all(axis=-1)
        axes.set_axis_off()
        axes.imshow(np.where(unknown[..., None], float(_UNKNOWN), rgb), interpolation="nearest")
    axes.text(0, 1, " ".join(bands), fontsize=6, color="white", va="top", backgroundcolor="black")


def _stretched(plane_yx: np.ndarray) -> np.ndarray:
    """Values between the 2nd and the 98th percentile as 0 to 1."""
    if not np.isfinite(plane_yx).any():
        return plane_yx
    low, high = np.nanpercentile(plane_yx, [2, 98])
    stretched: np.ndarray = np.clip((plane_yx - low) / (high - low or 1), 0, 1)
    return stretched
