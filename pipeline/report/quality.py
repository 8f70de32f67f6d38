"""Pictures of quality: how often each pixel was seen, and the edges of the tiles with their steps (Matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidecube.pipeline.quality import Edge, Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _LEFT = "#1d2b36", "#c3ccd4"
_SEAM, _FINE = "#c0392b", "#2b6ca3"
_LABELLED = 12


def save_counts(path: Path, quality: Quality, epoch: str) -> None:
    """Draw the median clear observations of each tile, before and after the event."""
    rows = [row for row in quality.tiles if row["epoch"] == epoch]
    sides = [side for side in ("pre", "post") if f"{side}_clear_median" in rows[0]]
    figure = _figure(len(sides))
    high = max((row[f"{s}_clear_median"] or 0 for s in sides for row in rows), default=0)
    for at, side in enumerate(sides, start=1):
        axis = figure.add_subplot(1, len(sides), at)
        _tile_map(axis, rows, f"{side}_clear_median", max(high, 1))
        axis.set_title(
            f"clear observations {'before' if side == 'pre' else 'after'}, median of the tile", fontsize=9
        )
    figure.savefig(path, metadata={"Software": None})


def _tile_map(axis: Axes, rows: Sequence[Any], key: str, high: float) -> None:
    import matplotlib as mpl  # noqa: PLC0415  half a second, which only who draws need spend
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    colours = mpl.colormaps["viridis"]
    for row in rows:
        y, x = (int(part) for part in row["tile"][1:].split("c"))
        value = row[key]
        face = _LEFT if value is None else colours(value / high)
        axis.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white"))
        if len(rows) <= 400:
            dark = value is not None and value / high < 0.6
            text = "-" if value is None else f"{value:g}"
            axis.text(
                x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color="white" if dark else _INK
            )
    xs, ys = ([int(row["tile"][1:].split("c")[i]) for row in rows] for i in (1, 0))
    axis.set(xlim=(min(xs), max(xs) + 1), ylim=(max(ys) + 1, min(ys)), aspect="equal", xticks=[], yticks=[])


def save_edges(path: Path, edges: Sequence[Edge]) -> None:
    """Draw the edges of the tiles, one panel a layer: red where there is a seam, with the step of the largest."""
    layers = sorted({edge.layer for edge in edges if edge.line})
    figure = _figure(len(layers))
    for at, layer in enumerate(layers, start=1):
        axis = figure.add_subplot(1, len(layers), at)
        own = sorted((e for e in edges if e.line and e.layer == layer), key=lambda e: -e.measured.score)
        for number, edge in enumerate(own):
            assert edge.line is not None
            (x0, y0), (x1, y1) = edge.line
            colour = _SEAM if edge.seam else _FINE
            axis.plot([x0, x1], [y0, y1], color=colour, linewidth=3 if edge.seam else 1.5)
            if number < _LABELLED:
                unit = "dB" if edge.variable in ("VV", "VH") else ""
                text = f"{edge.measured.step:+.4f}{unit}\n{min(edge.measured.score, 999):.1f} sd"
                axis.text((x0 + x1) / 2, (y0 + y1) / 2, text, ha="center", va="center", fontsize=7, color=colour,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
        axis.set(aspect="equal", xticks=[], yticks=[])
        axis.margins(0.15)
        axis.set_title(f"{layer.rpartition('-')[0]}, {own[0].variable}", fontsize=8)
        for side in axis.spines.values():
            side.set_color(_LEFT)
    figure.savefig(path, metadata={"Software": None})


def _figure(panels: int) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  half a second, which only who draws need spend

    return Figure(figsize=(4.2 * max(panels, 1), 4.2), dpi=110, facecolor="white", layout="constrained")
