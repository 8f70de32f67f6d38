"""Pictures of quality: how often each pixel was seen, and the edges of the tiles with their steps (Matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shapely

from slidecube.pipeline.quality import SIDES, Edge, Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_INK, _LEFT = "#1d2b36", "#c3ccd4"
_SEAM, _FINE = "#c0392b", "#2b6ca3"
_LABELLED = 12
_ACROSS = 2  # panels beside each other: of more, text would be too small at the width of the page
_TITLES = {
    "pre": "clear observations before",
    "post": "clear observations after",
    "radar_pre": "radar observations before",
    "radar_post": "radar observations after",
}


def save_counts(path: Path, quality: Quality, epoch: str) -> None:
    """Draw the median observations of each tile, before and after the event, each kind with a scale of its own."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415  half a second, which only who draws need spend
    from matplotlib.colors import Normalize  # noqa: PLC0415

    rows = [row for row in quality.tiles if row["epoch"] == epoch]
    keys = {s: f"{s}_{count}_median" for s, count in SIDES.items() if f"{s}_{count}_median" in rows[0]}
    figure, axes = _panels(len(keys))
    for axis, (side, key) in zip(axes, keys.items(), strict=True):
        alike = [other for name, other in keys.items() if SIDES[name] == SIDES[side]]
        scale = Normalize(0, max([1, *(row[other] or 0 for row in rows for other in alike)]))
        _tile_map(axis, rows, key, scale)
        bar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=axis, shrink=0.85)
        bar.set_label("observations of a pixel, median of the tile")
        bar.locator = _whole_numbers()
        axis.set_title(_TITLES[side])
    figure.savefig(path, metadata={"Software": None})


def _tile_map(axis: Axes, rows: Sequence[Any], key: str, scale: Normalize) -> None:
    import matplotlib as mpl  # noqa: PLC0415  as above
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    colours = mpl.colormaps["viridis"]
    for row in rows:
        y, x = (int(part) for part in row["tile"][1:].split("c"))
        value = row[key]
        face = _LEFT if value is None else colours(scale(value))
        axis.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white"))
        if len(rows) <= 400:
            dark = value is not None and scale(value) < 0.6
            text = "-" if value is None else f"{value:g}"
            axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", color="white" if dark else _INK)
    xs, ys = ([int(row["tile"][1:].split("c")[i]) for row in rows] for i in (1, 0))
    axis.set(xlim=(min(xs), max(xs) + 1), ylim=(max(ys) + 1, min(ys)), aspect="equal", xticks=[], yticks=[])


def save_edges(path: Path, edges: Sequence[Edge], outline: shapely.Geometry | None = None) -> None:
    """Draw the edges of the tiles, one panel a layer: red where there is a seam, with the steps of the largest.

    outline : of the area of interest, in the same coordinates
    """
    layers = sorted({edge.layer for edge in edges if edge.line})
    figure, axes = _panels(len(layers), below=0.5)
    for axis, layer in zip(axes, layers, strict=True):
        own = sorted((e for e in edges if e.line and e.layer == layer), key=lambda e: -e.measured.score)
        _draw_outline(axis, outline)
        for number, edge in enumerate(own):
            assert edge.line is not None
            (x0, y0), (x1, y1) = edge.line
            colour = _SEAM if edge.seam else _FINE
            axis.plot([x0, x1], [y0, y1], color=colour, linewidth=3.5 if edge.seam else 1.5)
            if number < _LABELLED:
                text = f"{_step_text(edge)}\n({min(edge.measured.score, 999):.1f})"
                axis.text((x0 + x1) / 2, (y0 + y1) / 2, text, ha="center", va="center", color=colour,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85})  # fmt: skip
        axis.set(aspect="equal", xticks=[], yticks=[])
        axis.margins(0.08)
        unit = "dB" if _is_radar(own[0]) else "reflectance"
        axis.set_title(f"{layer.rpartition('-')[0]}, {own[0].variable}, {unit}")
        for side in axis.spines.values():
            side.set_color(_LEFT)
    _legend(figure, with_outline=outline is not None)
    figure.savefig(path, metadata={"Software": None})


def _draw_outline(axis: Axes, outline: shapely.Geometry | None) -> None:
    for part in shapely.get_parts(outline) if outline is not None else ():
        xs, ys = shapely.get_coordinates(part.exterior).T
        axis.plot(xs, ys, color=_INK, linewidth=1, linestyle="--")


def _legend(figure: Figure, *, with_outline: bool) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415  as above

    entries = [
        Line2D([], [], color=_SEAM, linewidth=3.5, label="seam"),
        Line2D([], [], color=_FINE, linewidth=1.5, label="edge without a seam"),
    ]
    if with_outline:
        entries.append(Line2D([], [], color=_INK, linewidth=1, linestyle="--", label="area of interest"))
    entries.append(Line2D([], [], linestyle="none", label="numbers: step (in standard errors)"))
    figure.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False)


def _is_radar(edge: Edge) -> bool:
    return edge.variable in ("VV", "VH")


def _step_text(edge: Edge) -> str:
    return f"{edge.measured.step:+.2f}" if _is_radar(edge) else f"{edge.measured.step:+.4f}"


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  as above

    return MaxNLocator(integer=True)


def _panels(n: int, *, below: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Panels in rows of two, at the width of the page; below : inches for a legend."""
    from matplotlib.figure import Figure  # noqa: PLC0415  as above

    rows, columns = max(-(-n // _ACROSS), 1), _ACROSS
    figure = Figure(figsize=(10.4, 4.6 * rows + below), dpi=110, facecolor="white", layout="constrained")
    return figure, [figure.add_subplot(rows, columns, at + 1) for at in range(n)]
