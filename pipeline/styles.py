"""Colours, said once for the report, the pictures, the GeoTIFFs and QGIS.

The ramp is ordered in lightness. The categories differ for colour-blind eyes too: blue, orange and pink after Okabe &
Ito 2008, brighter, to stand on dark forest. `*_qml` return the text of QGIS styles; nothing here writes a file.
"""

from __future__ import annotations

from itertools import pairwise
from xml.sax.saxutils import escape

PROBABILITY_RAMP = (
    (0.0, "#fff3b8"),
    (0.25, "#fec44f"),
    (0.5, "#fb8d3d"),
    (0.75, "#e0402a"),
    (1.0, "#8c0d25"),
)
"""Probability -> colour, light to dark."""

FOUND = "#e8590c"
TRUE_POSITIVE = "#2b9af3"
FALSE_NEGATIVE = "#e83fb8"
FALSE_POSITIVE = "#ffa600"

OBSERVABILITY = {0: "#9aa0a6", 1: "#eceff1", 2: "#6a51a3", 3: "#cfe8d5"}
"""By the value of the observability byte."""

REASONS = {
    1: "#54278f",
    2: "#9e5bb5",
    3: "#2b1055",
    4: "#8d6e63",
    5: "#5b8fc7",
    6: "#c62828",
    7: "#ef8a62",
    8: "#7a0019",
    9: "#00838f",
    10: "#4dd0e1",
    11: "#f9a825",
    12: "#455a64",
}
"""By the value of the reason byte, where a pixel is not observable."""

CLUSTERS = ("#d55e00", "#f0c419", "#9467bd", "#56b4e9", "#00795c", "#8c564b", "#cc79a7", "#7f7f7f")
"""By the number of a cluster, the barest first."""


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green, blue of "#rrggbb"."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def probability_rgb(probability: float) -> tuple[int, int, int]:
    """Colour of a probability in [0, 1], straight between the stops of the ramp."""
    p = min(max(probability, 0.0), 1.0)
    for (p0, c0), (p1, c1) in pairwise(PROBABILITY_RAMP):
        if p <= p1:
            w = (p - p0) / (p1 - p0)
            r, g, b = (round(a + w * (z - a)) for a, z in zip(rgb(c0), rgb(c1), strict=True))
            return r, g, b
    raise AssertionError("the ramp ends at 1")


def probability_hex(probability: float) -> str:
    """Colour of a probability as "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*probability_rgb(probability))


def objects_qml(column: str = "probability", classes: int = 5) -> str:
    """QGIS style of the objects' layer: filled by probability in equal classes."""
    edges = [i / classes for i in range(classes + 1)]
    ranges, symbols = [], []
    for i, (low, high) in enumerate(pairwise(edges)):
        r, g, b = probability_rgb((low + high) / 2)
        label = f"{low:.1f} to {high:.1f}"
        ranges.append(
            f'<range symbol="{i}" lower="{low:.6f}" upper="{high:.6f}" label="{label}" render="true"/>'
        )
        symbols.append(
            f'<symbol name="{i}" type="fill" alpha="0.85" clip_to_extent="1" force_rhr="0">'
            '<layer class="SimpleFill" enabled="1" locked="0" pass="0"><Option type="Map">'
            f'<Option name="color" type="QString" value="{r},{g},{b},255"/>'
            '<Option name="outline_color" type="QString" value="60,10,20,255"/>'
            '<Option name="outline_width" type="QString" value="0.2"/>'
            '<Option name="outline_width_unit" type="QString" value="MM"/>'
            '<Option name="outline_style" type="QString" value="solid"/>'
            '<Option name="style" type="QString" value="solid"/></Option></layer></symbol>'
        )
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        '<qgis version="3.28.0" styleCategories="Symbology|MapTips">'
        f'<renderer-v2 type="graduatedSymbol" attr="{escape(column)}" graduatedMethod="GraduatedColor" '
        'symbollevels="0" enableorderby="0" forceraster="0">'
        f"<ranges>{''.join(ranges)}</ranges><symbols>{''.join(symbols)}</symbols></renderer-v2>"
        "<mapTip>&lt;b&gt;[% id %]&lt;/b&gt;&lt;br&gt;[% round(area_m2) %] m², probability [% probability %]</mapTip>"
        "<layerGeometryType>2</layerGeometryType></qgis>\n"
    )


def probability_qml(scale: float) -> str:
    """QGIS style of the probability raster; scale : probability of one stored unit."""
    items = "".join(
        f'<item value="{p / scale:.0f}" color="{colour}" alpha="255" label="{p:g}"/>'
        for p, colour in PROBABILITY_RAMP
    )
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        '<qgis version="3.28.0" styleCategories="Symbology"><pipe>'
        '<rasterrenderer type="singlebandpseudocolor" band="1" opacity="1" alphaBand="-1" '
        f'classificationMin="0" classificationMax="{1 / scale:.0f}"><rastershader>'
        f'<colorrampshader colorRampType="INTERPOLATED" classificationMode="1" clip="0" '
        f'minimumValue="0" maximumValue="{1 / scale:.0f}">{items}</colorrampshader>'
        "</rastershader></rasterrenderer></pipe></qgis>\n"
    )
