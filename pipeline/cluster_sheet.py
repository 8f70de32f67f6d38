"""The cluster sheet: a page without scripts that shows what each cluster is, so that a person may overrule the rule.

Axes in names: k cluster, y row, x column.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pyproj
import xarray as xr
from PIL import Image

from slidecube.models.naming import ClusterEvidence, Naming
from slidecube.models.unsupervised import UNKNOWN_CLUSTER
from slidecube.pipeline import styles
from slidecube.pipeline.cluster_statistics import (
    AROUND_PX,
    SHAPED_PX,
    ClusterBlock,
    ClusterSummary,
    Distribution,
    bands_of,
    known_window,
)
from slidecube.pipeline.composite import SCALE, SHIFT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUE_COLOUR = ("B04", "B03", "B02")
_WHITE, _GAMMA = 0.18, 1.5
_INK, _MUTED, _LINE, _ALL = "#1d2b36", "#5d6b76", "#dde3e8", "#b4bec6"
_SLOPE_EDGES = np.arange(0, 61, 2.5)
_NDVI_EDGES = np.arange(-0.4, 1.001, 0.05)
_CHANGE_EDGES = np.arange(-1, 1.001, 0.05)
_PLOT: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": "#b8c2ca",
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetFacts:
    """What the sheet says beside the clusters.

    fit : key of the statistics, by which a person's choice names them
    inputs : features of the model; patches : that it learnt from; evidence : of each cluster, by its number
    """

    title: str
    fit: str
    simulated: bool
    resolution_m: float
    model: str
    inputs: tuple[str, ...]
    patches: int
    evidence: tuple[ClusterEvidence, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetBlock:
    """A block as the sheet shows it.

    number : its place in the sheet; shape : rows, columns; bounds : left, bottom, right, top in its CRS
    crs : as people write it; longitude, latitude : of its middle, degrees
    has_pre : whether there is a picture of it before the event; pixels_k : of each cluster
    """

    number: int
    shape: tuple[int, int]
    bounds: tuple[float, float, float, float]
    crs: str
    longitude: float
    latitude: float
    has_pre: bool
    pixels_k: tuple[int, ...]


def draw_block(images: Path, number: int, block: ClusterBlock, clusters: int) -> SheetBlock:
    """Write the pictures of one block where it is known: pre, post, and one transparent picture a cluster."""
    window = known_window(block.clusters_yx)
    clusters_yx, geobox = block.clusters_yx[window], block.geobox[window]
    for side, layer in (("pre", block.pre), ("post", block.post)):
        if layer is not None:
            Image.fromarray(_true_colour(layer)[window]).quantize(
                256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
            ).save(images / f"b{number}-{side}.png", optimize=True)
    for k in range(clusters):
        mask_yx = clusters_yx == k
        if mask_yx.any():
            picture = Image.fromarray(mask_yx.astype(np.uint8), mode="P")
            picture.putpalette([0, 0, 0, *styles.rgb(colour_of(k))])
            picture.save(images / f"b{number}-c{k}.png", optimize=True, transparency=0, bits=1)
    left, bottom, right, top = geobox.boundingbox.bbox
    to = pyproj.Transformer.from_crs(str(geobox.crs), "EPSG:4326", always_xy=True)
    longitude, latitude = to.transform((left + right) / 2, (bottom + top) / 2)
    crs = pyproj.CRS.from_user_input(str(geobox.crs))
    code = crs.to_epsg()
    return SheetBlock(
        number=number,
        shape=(int(clusters_yx.shape[0]), int(clusters_yx.shape[1])),
        bounds=(left, bottom, right, top),
        crs=crs.name if code is None else f"EPSG:{code}",
        longitude=round(longitude, 4),
        latitude=round(latitude, 4),
        has_pre=block.pre is not None,
        pixels_k=tuple(int((clusters_yx == k).sum()) for k in range(clusters)),
    )


def write_sheet(
    folder: Path,
    facts: SheetFacts,
    *,
    summaries: Sequence[ClusterSummary],
    naming: Naming,
    blocks: Sequence[SheetBlock],
) -> None:
    """Write the page, its style and its plots beside the pictures of the blocks, which are there already."""
    import matplotlib as mpl  # noqa: PLC0415  half a second, which only who draws need spend

    with mpl.rc_context(_PLOT):
        for summary in summaries:
            if summary.pixels:
                _plots(folder / "img", summary, summaries, facts.resolution_m)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slidecube.pipeline.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, number=number)
    page = environment.get_template("clusters.html.j2").render(
        facts=facts,
        naming=naming,
        clusters=[_cluster(s, facts, naming) for s in summaries],
        blocks=sorted(blocks, key=lambda block: -sum(block.pixels_k)),
        has_pre=any(block.has_pre for block in blocks),
        area_km2=sum(s.pixels for s in summaries) * facts.resolution_m**2 / 1e6,
        unknown=UNKNOWN_CLUSTER,
        around_m=AROUND_PX * facts.resolution_m,
        shaped_px=SHAPED_PX,
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    for name in ("report.css", "clusters.css"):
        with as_file(files("slidecube.pipeline.report") / "templates" / name) as path:
            shutil.copyfile(path, folder / name)


def _cluster(s: ClusterSummary, facts: SheetFacts, naming: Naming) -> dict[str, Any]:
    pixel_m2 = facts.resolution_m**2

    def m2(px: float | None) -> float | None:
        return None if px is None else px * pixel_m2

    return {
        "k": s.cluster,
        "colour": colour_of(s.cluster),
        "landslide": s.cluster in naming.clusters,
        "reason": naming.reasons[s.cluster],
        "score": naming.scores[s.cluster],
        "evidence": facts.evidence[s.cluster],
        "pixels": s.pixels,
        "share": s.share,
        "ndvi": {name: _three(d) for name, d in s.ndvi.items()},
        "around": {name: d.median for name, d in s.around.items()},
        "slope": _three(s.slope_deg),
        "whole": len(s.objects.size_px_n),
        "median_m2": m2(s.objects.size_px()),
        "large_m2": m2(s.objects.size_px(0.9)),
        "largest_m2": m2(s.objects.largest_px),
        "cut_share": s.objects.cut_share,
        "cut": len(s.objects.cut_px_m),
    }


def _three(distribution: Distribution) -> tuple[float | None, ...]:
    """Lower quartile, median, upper quartile."""
    return tuple(distribution.quantile(q) for q in (0.25, 0.5, 0.75))


def colour_of(cluster: int) -> str:
    """Colour of a cluster on the sheet, "#rrggbb"."""
    return styles.CLUSTERS[cluster % len(styles.CLUSTERS)]


def percent(share: float | None) -> str:
    """Share as a percentage of two digits at least."""
    if share is None:
        return "-"
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{100 * share:.{1 if share >= 0.01 else 2}f} %"


def number(value: float | None, form: str = "%.2f") -> str:
    """Format a number that may be unknown."""
    return "-" if value is None else form % value


def _true_colour(layer: xr.Dataset) -> np.ndarray:
    """Stretch to (y, x, 3) uint8, grey-blue where unseen; in grey where a layer lacks red, green or blue."""
    bands = TRUE_COLOUR if set(TRUE_COLOUR) <= set(bands_of(layer)) else (bands_of(layer)[0],) * 3
    planes = [layer[band].values for band in bands]
    value = (np.dstack(planes).astype(np.float32) - SHIFT) / SCALE / _WHITE
    shown: np.ndarray = np.rint(255 * np.clip(value, 0, 1) ** (1 / _GAMMA)).astype(np.uint8)
    shown[np.dstack(planes).min(axis=2) == 0] = styles.rgb("#9aa7b0")
    return shown


# --- plots ----------------------------------------------------------------------------------------------------------


def _plots(images: Path, s: ClusterSummary, every: Sequence[ClusterSummary], resolution_m: float) -> None:
    _save(_spectra(s), images / f"c{s.cluster}-spectra.png")
    _save(_slope(s, every), images / f"c{s.cluster}-slope.png")
    _save(_ndvi(s, every), images / f"c{s.cluster}-ndvi.png")
    if "change" in s.ndvi:
        _save(_change(s, every), images / f"c{s.cluster}-change.png")
    _save(_sizes(s, resolution_m), images / f"c{s.cluster}-sizes.png")


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(4.1, 2.75), dpi=120, facecolor="white")
    figure.subplots_adjust(left=0.15, right=0.97, bottom=0.19, top=0.97)
    ax = figure.add_subplot()
    ax.set(xlabel=x, ylabel=y)
    ax.grid(axis="y", color=_LINE, linewidth=0.8)
    ax.set_axisbelow(True)
    return figure, ax


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})  # no version: equal bytes


def _spectra(s: ClusterSummary) -> Figure:
    figure, ax = _axes("band", "reflectance")
    for side, style, colour in (("pre", "--", _MUTED), ("post", "-", colour_of(s.cluster))):
        bands = list(s.spectra[side])
        known = [b for b in bands if s.reflectance(side, b) is not None]
        if not known:
            continue
        low, middle, high = ([s.reflectance(side, b, q) for b in known] for q in (0.25, 0.5, 0.75))
        ax.fill_between(known, low, high, color=colour, alpha=0.18, linewidth=0)
        ax.plot(known, middle, style, color=colour, linewidth=1.8, marker="o", markersize=3, label=side)
    ax.set_ylim(bottom=0)
    ax.tick_params(axis="x", labelrotation=45)
    ax.legend(frameon=False)
    return figure


def _histogram(ax: Any, s: ClusterSummary, shares: tuple[np.ndarray, np.ndarray], edges: np.ndarray) -> None:
    own, every = shares
    ax.bar(edges[:-1], 100 * own, np.diff(edges), align="edge", color=colour_of(s.cluster), alpha=0.75)
    ax.stairs(100 * every, edges, color=_INK, linewidth=1.1, label="all clusters")


def _of_all(distributions: Sequence[Distribution], edges: np.ndarray) -> np.ndarray:
    total = sum(d.n for d in distributions)
    parts = [d.binned(edges) * d.n for d in distributions]
    shares: np.ndarray = np.sum(parts, axis=0) / max(total, 1)
    return shares


def _slope(s: ClusterSummary, every: Sequence[ClusterSummary]) -> Figure:
    figure, ax = _axes("slope, degrees", "% of its pixels")
    all_of_them = _of_all([o.slope_deg for o in every], _SLOPE_EDGES)
    _histogram(ax, s, (s.slope_deg.binned(_SLOPE_EDGES), all_of_them), _SLOPE_EDGES)
    ax.legend(frameon=False)
    return figure


def _ndvi(s: ClusterSummary, every: Sequence[ClusterSummary]) -> Figure:
    figure, ax = _axes("NDVI", "% of its pixels")
    all_of_them = _of_all([o.ndvi["post"] for o in every], _NDVI_EDGES)
    _histogram(ax, s, (s.ndvi["post"].binned(_NDVI_EDGES), all_of_them), _NDVI_EDGES)
    if "pre" in s.ndvi:
        ax.stairs(
            100 * s.ndvi["pre"].binned(_NDVI_EDGES),
            _NDVI_EDGES,
            color=_MUTED,
            linestyle="--",
            linewidth=1.5,
            label="it, before",
        )
    ax.legend(frameon=False)
    return figure


def _change(s: ClusterSummary, every: Sequence[ClusterSummary]) -> Figure:
    figure, ax = _axes("change of NDVI, after minus before", "% of its pixels")
    all_of_them = _of_all([o.ndvi["change"] for o in every], _CHANGE_EDGES)
    _histogram(ax, s, (s.ndvi["change"].binned(_CHANGE_EDGES), all_of_them), _CHANGE_EDGES)
    ax.set_xticks(np.arange(-1, 1.1, 0.5))
    ax.axvline(0, color=_MUTED, linewidth=0.8)
    ax.legend(frameon=False)
    return figure


def _sizes(s: ClusterSummary, resolution_m: float) -> Figure:
    """Objects by size, and the cluster's area by the size of the object that it lies in."""
    figure, ax = _axes("area of the object, m²", "%")
    edges = resolution_m**2 * 2.0 ** np.arange(-0.5, 19.5)
    sizes_m2, weight_n = s.objects.size_px_n * resolution_m**2, s.objects.weight_n
    for weights, style, label in (
        (weight_n, "-", "of objects"),
        (weight_n * sizes_m2, "--", "of their area"),
    ):
        if len(sizes_m2):
            counts, _ = np.histogram(sizes_m2, edges, weights=weights)
            ax.stairs(100 * counts / weights.sum(), edges, color=colour_of(s.cluster), linestyle=style,
                      linewidth=1.8, label=label)  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlim(edges[0], edges[-1])
    if len(sizes_m2):
        ax.legend(frameon=False)
    return figure
