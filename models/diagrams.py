"""Performance diagram: precision, recall, F1 and frequency bias of many models in one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slidecube.models.weights import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BIASES = (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0)
_F1S = tuple(np.round(np.arange(0.1, 1.0, 0.1), 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model in the diagram. group : points of one group have one colour; main : drawn large, and named."""

    label: str
    group: str
    precision: float
    recall: float
    main: bool = False


def write_performance_diagram(path: Path, points: Sequence[Point], *, title: str) -> None:
    """Write a PNG: precision (success ratio) to the right, recall (probability of detection) up.

    Straight lines through the origin are equal frequency bias, recall / precision, where 1 calls as many pixels as
    there are; curves are equal F1, as Ganeroed et al. 2023 draw in place of the critical success index
    F1 / (2 - F1).
    Source: Roebber 2009, fig. 2
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  it takes a second
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6.4, 6.0), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_lines(axes)
    colours = {group: f"C{i % 10}" for i, group in enumerate(dict.fromkeys(p.group for p in points))}
    for group, colour in colours.items():
        own = [p for p in points if p.group == group]
        for main, size, alpha in ((False, 18, 0.5), (True, 80, 1.0)):
            shown = [p for p in own if p.main == main]
            axes.scatter(
                [p.precision for p in shown],
                [p.recall for p in shown],
                s=size,
                alpha=alpha,
                color=colour,
                label=group if main == any(p.main for p in own) else None,
                edgecolors="black" if main else "none",
                zorder=3 + main,
                clip_on=False,  # a point at an edge is as true as others
            )
    _name_points(axes, [p for p in points if p.main])
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title, xlabel="precision (success ratio)")
    axes.set_ylabel("recall (probability of detection)")
    axes.plot(
        [], [], color="0.6", linewidth=0.7, linestyle="--", label="equal frequency bias, recall / precision"
    )
    axes.plot([], [], color="0.75", linewidth=0.8, label="equal F1")
    if any(not p.main for p in points):
        axes.scatter([], [], s=18, alpha=0.5, color="0.4", label="small: other candidates; large: named")
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    write_whole(path, buffer.getvalue())


def _name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write names beside points; those of points that lie together stand one below the other."""
    placed: list[tuple[float, float]] = []
    for p in sorted(points, key=lambda p: -p.recall):
        near = sum(abs(p.precision - x) < _NAME_WIDE and abs(p.recall - y) < _NAME_HIGH for x, y in placed)
        placed.append((p.precision, p.recall))
        left = p.precision > 1 - _NAME_WIDE
        axes.annotate(
            p.label,
            (p.precision, p.recall),
            xytext=(-6 if left else 6, 5 - 9 * near),
            textcoords="offset points",
            fontsize=7,
            ha="right" if left else "left",
            zorder=6,
        )


_NAME_WIDE, _NAME_HIGH = 0.2, 0.03
"""Room that a name takes, in units of the axes."""


def f1_curve(f1: float, precision: np.ndarray) -> np.ndarray:
    """Recall at which precision gives an F1; NaN where none up to 1 does."""
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = f1 * precision / (2 * precision - f1)
    return np.where((2 * precision > f1) & (recall <= 1), recall, np.nan)


def _draw_lines(axes: object) -> None:
    precision = np.linspace(0.001, 1, 1000)
    for f1 in _F1S:
        recall = f1_curve(f1, precision)
        axes.plot(precision, recall, color="0.75", linewidth=0.8, zorder=1)  # type: ignore[attr-defined]
        axes.annotate(  # type: ignore[attr-defined]
            f"F1 {f1:.1f}", (f1 / (2 - f1) + 0.004, 0.985), fontsize=6, color="0.5", va="top", rotation=90
        )
    for bias in _BIASES:
        end = min(1.0, 1 / bias)
        axes.plot([0, end], [0, end * bias], color="0.6", linewidth=0.7, linestyle="--", zorder=1)  # type: ignore[attr-defined]
        axes.annotate(f"{bias:g}", (end, end * bias), fontsize=6, color="0.4", zorder=2)  # type: ignore[attr-defined]
