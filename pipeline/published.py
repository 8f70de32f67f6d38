"""Feature sets of the papers, one explicit table: name -> inputs of a published model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

L4S_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12")
"""Bands of Landslide4Sense, in the order of its channels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSet:
    """The inputs of a published model.

    names : its features in the published order; source : the paper
    note : what a user must know; instead : the set to take where the source is of Level 2A and lacks a band
    """

    names: tuple[str, ...]
    source: str
    note: str = ""
    instead: str = ""


_ENS = "Ganerod et al. 2023, Automating global landslide detection, table 2"
_L4S = "Ghorbanzadeh et al. 2022, doi:10.1109/TGRS.2022.3215209; divisors: Landslide4Sense-2022, issue 4"
_RADAR = ("vv_pre", "vv_post", "dvv", "vh_pre", "vh_post", "dvh", "layover", "shadow", "lia_deg")
_OPTICAL = ("land_cover", "dndvi")
_L4S_TERRAIN = ("l4s_slope", "l4s_elevation")

FEATURE_SETS: Mapping[str, FeatureSet] = {
    "cae": FeatureSet(
        names=("mnf1_post", "mnf2_post", "mnf3_post", "ndvi_post", "slope_deg"),
        source="Shahabi et al. 2021, doi:10.3390/rs13224698",
        note="MNF of 10 bands: Level 2A has no B10, which the paper counts as well",
    ),
    "l4s": FeatureSet(
        names=(*(f"l4s_{band}" for band in L4S_BANDS), *_L4S_TERRAIN),
        source=_L4S,
        note="Level 1C; the published heights are above the ellipsoid, up to 110 m from those above the geoid",
        instead="l4s-l2a",
    ),
    "l4s-l2a": FeatureSet(
        names=(*(f"l4s_{band}" for band in L4S_BANDS if band != "B10"), *_L4S_TERRAIN),
        source=_L4S,
        note="without B10; the divisors are of Level 1C, so published weights do not fit",
    ),
    "ens-s1": FeatureSet(names=_RADAR, source=_ENS, note="descending orbits, dB"),
    "ens-s2": FeatureSet(names=_OPTICAL, source=_ENS),
    "ens-s1s2": FeatureSet(names=(*_RADAR, *_OPTICAL), source=_ENS),
    "ens-all": FeatureSet(
        names=(*_RADAR, *_OPTICAL, "elevation", "slope_deg", "climate", "canopy_height"), source=_ENS
    ),
    "fstf": FeatureSet(
        names=("B04_post", "B03_post", "B02_post", "slope_deg", "aspect_deg", "ndvi_post"),
        source="Xia et al. 2021, doi:10.3390/rs13245116",
        note="published at .3 to .8 m: on pixels of 10 m the architecture only",
    ),
}
"""Sets by name."""
