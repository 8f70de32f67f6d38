"""How much each component of a noise fraction transform holds: a table and a picture (Matplotlib)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from slidecube.pipeline.mnf import Mnf

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _MUTED, _KEPT, _LEFT = "#1d2b36", "#5d6b76", "#2b6ca3", "#c3ccd4"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumRow:
    """One component, as a row of CAE's Table 3.

    component : from 1; eigenvalue : its variance, noise being 1; share : of the sum of all eigenvalues
    cumulated : share of this component and those before
    """

    component: int
    eigenvalue: float
    share: float
    cumulated: float


def spectrum(mnf: Mnf) -> list[SpectrumRow]:
    """List the components, the first one first."""
    return [
        SpectrumRow(component=k, eigenvalue=value, share=share, cumulated=total)
        for k, (value, share, total) in enumerate(
            zip(mnf.eigenvalues, mnf.shares, accumulate(mnf.shares), strict=True), start=1
        )
    ]


def markdown_table(mnf: Mnf) -> str:
    """Write the spectrum as a Markdown table."""
    head = ["| component | eigenvalue | share | cumulated |", "|---:|---:|---:|---:|"]
    rows = [
        f"| {row.component} | {row.eigenvalue:.2f} | {row.share:.3f} | {row.cumulated:.3f} |"
        for row in spectrum(mnf)
    ]
    return "\n".join([*head, *rows]) + "\n"


def write_spectrum(mnf: Mnf, folder: Path, *, title: str = "") -> dict[str, Path]:
    """Write `mnf.csv`, `mnf.md` and `mnf.png` into a folder, which is made.

    title : above the picture; left out, it says how many bands and pixels there were
    Returns the paths by "csv", "markdown" and "picture". The same transform gives the same bytes.
    Source: CAE (Shahabi 2021), Table 3 and Figure 4.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "csv": folder / "mnf.csv",
        "markdown": folder / "mnf.md",
        "picture": folder / "mnf.png",
    }
    with paths["csv"].open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["component", "eigenvalue", "share", "cumulated"])
        writer.writerows([r.component, r.eigenvalue, r.share, r.cumulated] for r in spectrum(mnf))
    paths["markdown"].write_text(markdown_table(mnf), encoding="utf-8")
    heading = title or f"{len(mnf.bands)} bands, {mnf.pixels:,} pixels"
    _figure(mnf, heading).savefig(paths["picture"], metadata={"Software": None})
    return paths


def _figure(mnf: Mnf, title: str) -> Figure:
    import matplotlib as mpl  # noqa: PLC0415  half a second, which only who draws need spend
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415

    rows = spectrum(mnf)
    x = [row.component for row in rows]
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 9, "text.color": _INK}):
        figure = Figure(figsize=(6.4, 3.6), dpi=110, facecolor="white", layout="constrained")
        axis = figure.add_subplot()
        colours = [_KEPT if row.component <= mnf.components else _LEFT for row in rows]
        axis.bar(x, [row.share for row in rows], color=colours, width=0.7)
        axis.plot(x, [row.cumulated for row in rows], color=_INK, marker="o", markersize=3.5, linewidth=1.2)
        kept = rows[mnf.components - 1]
        axis.annotate(
            f"{kept.cumulated:.0%} in {mnf.components}", (kept.component, kept.cumulated), (6, -6),
            textcoords="offset points", va="top", fontsize=9,
        )  # fmt: skip
        axis.set(ylim=(0, 1.03), xticks=x)
        axis.set_xticklabels([f"{row.component}\n{_short(row.eigenvalue)}" for row in rows])
        axis.set_xlabel("component, and its eigenvalue (noise alone: 1)")
        axis.set_ylabel(
            f"share: each ({'blue: kept' if mnf.components < len(rows) else 'bars'}), cumulated (line)"
        )
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.tick_params(color=_MUTED, labelcolor=_INK, length=0)
        axis.grid(axis="y", color=_LEFT, linewidth=0.5)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.set_title(f"Minimum noise fraction: {title}", fontsize=10, loc="left")
    return figure


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
