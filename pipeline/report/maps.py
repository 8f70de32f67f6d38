"""The report's linked maps and plots (Bokeh): drawn from files beside the page, so that it opens offline.

Coordinates are metres from the map's upper left corner, which keeps the page's data short. Names of models are a
contract with `report.js`: `e0-pre`, `e0-post`, `e0-observed` are figures, `e0-post-image-0` a rendering, and
`e0-post-tp` with `e0-post-tp-dots` a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import shapely
from bokeh import models, plotting
from numpy.typing import NDArray

from slidecube.pipeline import styles
from slidecube.pipeline.report.numbers import largest, malamud_density, size_density
from slidecube.pipeline.report.pictures import LAYER_COLOURS, Bounds

BK: Any = models  # Bokeh makes its constructors at run time, where no type checker sees their parameters
FIGURE: Any = plotting.figure

MOST_DRAWN = 5000
FEW = 300
PANELS = ("pre", "post", "observed")
FONT = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_TIPS = {
    "tp": [("id", "@id"), ("area", "@area{0,0} m²"), ("probability", "@probability"), ("slope", "@slope"),
           ("elevation", "@elevation"), ("last clear before", "@before"), ("first clear after", "@after"),
           ("place", "@place")],
    "fn": [("missed", "@id"), ("area", "@area{0,0} m²"), ("place", "@place")],
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """One picture of a panel: its file beside the page, and where it lies."""

    href: str
    bounds: Bounds


def linked_maps(
    *,
    prefix: str,
    bounds: Bounds,
    images: Mapping[str, Sequence[Overlay]],
    layers: Mapping[str, gpd.GeoDataFrame],
    titles: Mapping[str, str],
) -> dict[str, Any]:
    """Make the panels of one epoch, which pan and zoom together.

    bounds : left, bottom, right, top of the map; images : panel -> renderings, of which the first is visible
    layers : "found", "tp", "fp", "fn", "other" -> objects in the map's CRS, of which the largest are drawn
    Returns panel -> figure.
    """
    width, height = bounds[2] - bounds[0], bounds[3] - bounds[1]
    x_range = BK.Range1d(0, width, name=f"{prefix}-x")
    y_range = BK.Range1d(-height, 0, name=f"{prefix}-y")
    sources = {key: layer_source(layer, bounds) for key, layer in layers.items()}
    panels = {}
    for panel in PANELS:
        fig = _panel(f"{prefix}-{panel}", titles[panel], x_range, y_range, width / height)
        for i, overlay in enumerate(images[panel]):
            _image(fig, f"{prefix}-{panel}-image-{i}", overlay, bounds, visible=i == 0)
        for key in ("other", "found", "fp", "tp", "fn"):
            if key in sources:
                _layer(fig, f"{prefix}-{panel}-{key}", sources[key], key, filled=panel == "observed")
        panels[panel] = fig
    scale = BK.ScaleBar(range=x_range, unit="m", orientation="horizontal", location="bottom_left")
    scale.update(
        background_fill_alpha=0.8, border_line_color=None, label_text_font=FONT, length_sizing="adaptive"
    )
    panels["pre"].add_layout(scale)
    return panels


def layer_source(objects: gpd.GeoDataFrame, bounds: Bounds) -> Any:
    """Data of one layer: outlines, a point for small scales, and what the pointer shows."""
    drawn = largest(objects.assign(id=_ids(objects)), MOST_DRAWN).sort_values("id", kind="stable")
    outlines = [_rings(shape, bounds) for shape in drawn.geometry]
    points = shapely.point_on_surface(drawn.geometry.to_numpy())
    xy = shapely.get_coordinates(points) if len(drawn) else np.empty((0, 2))
    return BK.ColumnDataSource(
        {
            "xs": [[[ring[0] for ring in part] for part in shape] for shape in outlines],
            "ys": [[[ring[1] for ring in part] for part in shape] for shape in outlines],
            "x": (xy[:, 0] - bounds[0]).round(1).tolist(),
            "y": (xy[:, 1] - bounds[3]).round(1).tolist(),
            "id": drawn["id"].tolist(),
            "area": _floats(drawn, "area_m2").round().tolist(),
            "probability": _texts(drawn, "probability", "{:.2f}"),
            "slope": _texts(drawn, "slope_deg", "{:.0f}°"),
            "elevation": _spans(drawn),
            "before": _days(drawn, "pre_date"),
            "after": _days(drawn, "post_date"),
            "place": _places(xy, objects.crs),
            "colour": [styles.probability_hex(p) for p in np.nan_to_num(_floats(drawn, "probability"))],
        }
    )


def size_plot(areas: Mapping[str, NDArray[np.float64]], colours: Mapping[str, str]) -> Any:
    """Plot the density of sizes on logarithmic axes, with the law of Malamud et al. 2004 for comparison.

    areas : name of the set -> areas in m2
    """
    fig = FIGURE(
        x_axis_type="log",
        y_axis_type="log",
        height=330,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="",
        x_axis_label="area, m²",
        y_axis_label="probability density, 1/m²",
        name="sizes",
    )
    shown = [size_density(a) for a in areas.values()]
    ends = [c for c, _, _ in shown if len(c)]
    low = min((float(c.min()) for c in ends), default=300.0) / 2
    high = max((float(c.max()) for c in ends), default=50_000.0) * 2
    x = np.geomspace(low, high, 120)
    fig.line(
        x,
        malamud_density(x),
        color="#8a97a1",
        line_dash="dashed",
        line_width=1.6,
        legend_label="Malamud 2004",
    )
    for (name, _), (centres, density, counts) in zip(areas.items(), shown, strict=True):
        source = BK.ColumnDataSource({"x": centres, "y": density, "n": counts})
        dots = fig.scatter(
            "x", "y", source=source, size=9, color=colours[name], line_color="white", legend_label=name
        )
        fig.add_tools(BK.HoverTool(renderers=[dots], tooltips=[("area", "@x{0,0} m²"), ("objects", "@n")]))
    fig.x_range = BK.Range1d(low, high)
    fig.legend.update(
        location="bottom_left", background_fill_alpha=0.8, border_line_color=None, label_text_font=FONT
    )
    for axis in (fig.xaxis, fig.yaxis):
        axis.axis_label_text_font = axis.major_label_text_font = FONT
        axis.axis_label_text_font_style = "normal"
    fig.outline_line_color = "#d5dce1"
    return fig


def _panel(name: str, title: str, x_range: Any, y_range: Any, aspect: float) -> Any:
    wheel = BK.WheelZoomTool()
    fig = FIGURE(
        name=name,
        x_range=x_range,
        y_range=y_range,
        sizing_mode="scale_width",
        aspect_ratio=min(max(aspect, 0.7), 1.6),
        toolbar_location="above",
        tools=[BK.PanTool(), wheel, BK.BoxZoomTool(match_aspect=True), BK.ResetTool()],
        active_scroll=wheel,
        title=title,
        min_border=0,
        background_fill_color="#dfe4e8",
        lod_threshold=None,
    )
    fig.axis.visible = False
    fig.grid.visible = False
    fig.outline_line_color = "#b8c2ca"
    fig.title.update(text_font=FONT, text_font_size="15px", text_color="#1d2b36")
    fig.toolbar.logo = None
    return fig


def _image(fig: Any, name: str, overlay: Overlay, bounds: Bounds, *, visible: bool) -> None:
    left, bottom, right, top = overlay.bounds
    fig.image_url(
        url=[overlay.href],
        x=[left - bounds[0]],
        y=[top - bounds[3]],
        w=[right - left],
        h=[top - bottom],
        anchor="top_left",
        name=name,
        visible=visible,
        retry_attempts=2,
        retry_timeout=200,
    )


def _layer(fig: Any, name: str, source: Any, key: str, *, filled: bool) -> None:
    colour = "colour" if key == "found" else LAYER_COLOURS[key]
    outline = LAYER_COLOURS[key]
    shapes = fig.multi_polygons(
        "xs",
        "ys",
        source=source,
        name=name,
        fill_color=colour,
        fill_alpha=0.65 if filled else 0.12,
        hover_fill_alpha=0.5,
        hover_fill_color=colour,
        line_color=outline,
        line_width=1.6,
        hover_line_color="white",
    )
    few = len(source.data["x"]) <= FEW  # many dots would hide the ground
    dots = fig.scatter(
        "x",
        "y",
        source=source,
        name=f"{name}-dots",
        size=5 if few else 3,
        color=outline,
        line_color="white" if few else None,
        line_width=0.5,
    )
    tips = _TIPS["fn" if key == "fn" else "tp"]
    fig.add_tools(
        BK.HoverTool(renderers=[shapes, dots], tooltips=tips, point_policy="follow_mouse", visible=False)
    )


def _rings(shape: Any, bounds: Bounds) -> list[list[tuple[list[float], list[float]]]]:
    parts = []
    for part in shapely.get_parts(shape):
        rings = []
        for ring in shapely.get_rings(part):
            xy = shapely.get_coordinates(ring)
            rings.append(((xy[:, 0] - bounds[0]).round(1).tolist(), (xy[:, 1] - bounds[3]).round(1).tolist()))
        parts.append(rings)
    return parts


def _ids(objects: gpd.GeoDataFrame) -> list[str]:
    if "id" in objects:
        return [str(i) for i in objects["id"]]
    return [f"reference {i}" for i in range(len(objects))]


def _floats(objects: gpd.GeoDataFrame, name: str) -> NDArray[np.float64]:
    if name not in objects:
        return np.full(len(objects), np.nan)
    values: NDArray[np.float64] = objects[name].to_numpy(dtype=np.float64)
    return values


def _texts(objects: gpd.GeoDataFrame, name: str, form: str) -> list[str]:
    return ["unknown" if np.isnan(v) else form.format(v) for v in _floats(objects, name)]


def _spans(objects: gpd.GeoDataFrame) -> list[str]:
    low, high = _floats(objects, "elevation_min_m"), _floats(objects, "elevation_max_m")
    return ["unknown" if np.isnan(a) else f"{a:,.0f} to {b:,.0f} m" for a, b in zip(low, high, strict=True)]


def _days(objects: gpd.GeoDataFrame, name: str) -> list[str]:
    if name not in objects:
        return ["unknown"] * len(objects)
    return ["unknown" if pd.isna(day) else str(day)[:10] for day in objects[name]]


def _places(xy: NDArray[np.float64], crs: Any) -> list[str]:
    if not len(xy):
        return []
    to = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    lon, lat = to.transform(xy[:, 0], xy[:, 1])
    return [
        f"{abs(b):.4f}° {'N' if b >= 0 else 'S'}, {abs(a):.4f}° {'E' if a >= 0 else 'W'}"
        for a, b in zip(lon, lat, strict=True)
    ]
