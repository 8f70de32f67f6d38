"""Confusers: ground that looks like a landslide and is none, named, so that networks see enough of it.

A rule is a condition on features; what it holds on and the reference does not is a hard negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidecube.models.card import FeatureSpec
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.refusals import did_you_mean

Values = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confuser:
    """One rule: the features that it reads, and where it holds; NaN holds nowhere.

    what : in words, for people
    """

    reads: tuple[str, ...]
    holds: Callable[[Values], NDArray[np.bool_]]
    what: str

    @property
    def spec(self) -> FeatureSpec:
        """Features that it reads."""
        return FeatureSpec(names=self.reads)


LOSS = -0.15
"""NDVI that must be lost to count as a loss: about a third of what a slide in forest loses (chosen)."""
FLAT_DEG, STEEP_DEG = 5.0, 20.0
"""Slopes below and above which hardly any, and most, landslides start (chosen; nine of ten start above 15 degrees)."""
BARE = 0.25
"""NDVI below which little grows."""

CONFUSERS: Mapping[str, Confuser] = {
    "flat-loss": Confuser(
        reads=("dndvi", "slope_deg"),
        holds=lambda v: (v["dndvi"] <= LOSS) & (v["slope_deg"] < FLAT_DEG),
        what=f"NDVI falls by {-LOSS:g} and more on slopes below {FLAT_DEG:g} degrees: harvest, ploughing, floods",
    ),
    "steep-loss": Confuser(
        reads=("dndvi", "slope_deg"),
        holds=lambda v: (v["dndvi"] <= LOSS) & (v["slope_deg"] > STEEP_DEG),
        what=f"the same above {STEEP_DEG:g} degrees, where the reference has no landslide: logging, fire, drought",
    ),
    "steep-bare": Confuser(
        reads=("ndvi_pre", "ndvi_post", "slope_deg"),
        holds=lambda v: (v["ndvi_pre"] < BARE) & (v["ndvi_post"] < BARE) & (v["slope_deg"] > STEEP_DEG),
        what=f"NDVI below {BARE:g} before and after, above {STEEP_DEG:g} degrees: rock, scree, old scars",
    ),
    "flat-bare": Confuser(
        reads=("ndvi_pre", "ndvi_post", "slope_deg"),
        holds=lambda v: (v["ndvi_pre"] < BARE) & (v["ndvi_post"] < BARE) & (v["slope_deg"] < FLAT_DEG),
        what=f"the same below {FLAT_DEG:g} degrees: river beds, roads, towns, water",
    ),
    "bare-after": Confuser(
        reads=("ndvi_post",),
        holds=lambda v: v["ndvi_post"] < BARE,
        what=f"NDVI below {BARE:g} after the event, for models of a single image",
    ),
    "shadow": Confuser(
        reads=("B08_post", "slope_deg"),
        holds=lambda v: (v["B08_post"] < 0.08) & (v["slope_deg"] > STEEP_DEG),
        what="near infrared below .08 on steep ground after the event: cast and own shadow",
    ),
}
"""Rules by name, one explicit table."""

POLYGONS = (".gpkg", ".geojson", ".json", ".shp", ".fgb", ".parquet", ".geoparquet", ".zip")
"""Endings of what is a file of polygons, and no rule."""


def is_polygons(name: str) -> bool:
    """Tell a file of polygons from the name of a rule."""
    return name.lower().endswith(POLYGONS)


def confuser(name: str) -> Confuser:
    """Look a rule up; raises PipelineError with the known ones."""
    if name not in CONFUSERS:
        raise PipelineError(
            f"No confuser {name!r}{did_you_mean(name, CONFUSERS)}; rules: {', '.join(CONFUSERS)}, and paths of vector "
            f"files that end in {', '.join(POLYGONS)}"
        )
    return CONFUSERS[name]
