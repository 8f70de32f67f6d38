"""Feature sets of the papers by name, and the list of all features for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from slidecube.models.card import FeatureSpec
from slidecube.pipeline.config import BANDS
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import FEATURES, L4S_BANDS, MNF_BANDS, Feature, feature, is_built_in
from slidecube.pipeline.refusals import did_you_mean


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

    @property
    def layers(self) -> tuple[str, ...]:
        """Features that the TOML must bring."""
        return tuple(name for name in self.names if not is_built_in(name))


_ENS = "Ganerod et al. 2023, Automating global landslide detection, table 2"
_L4S = "Ghorbanzadeh et al. 2022, doi:10.1109/TGRS.2022.3215209; divisors: Landslide4Sense-2022, issue 4"
_RADAR = ("vv_pre", "vv_post", "dvv", "vh_pre", "vh_post", "dvh", "layover", "shadow", "lia_deg")
_OPTICAL = ("land_cover", "dndvi")
_L4S_TERRAIN = ("l4s_slope", "l4s_elevation")

FEATURE_SETS: Mapping[str, FeatureSet] = {
    "cae": FeatureSet(
        names=("mnf1_post", "mnf2_post", "mnf3_post", "ndvi_post", "slope_deg"),
        source="Shahabi et al. 2021, doi:10.3390/rs13224698",
        note=f"MNF of {len(MNF_BANDS)} bands: Level 2A has no B10, which the paper counts as well",
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


def feature_set(name: str) -> FeatureSpec:
    """Return the features of a set; raises PipelineError for an unknown set."""
    if name not in FEATURE_SETS:
        raise PipelineError(f"No feature set {name!r}; sets: {', '.join(FEATURE_SETS)}")
    return FeatureSpec(names=FEATURE_SETS[name].names)


def require_known(spec: FeatureSpec, layers: Collection[str]) -> None:
    """Refuse features that neither this build nor a TOML's layers make, and layers that hide a feature.

    layers : names of a TOML's layers
    Raises PipelineError.
    """
    for name in layers:
        if is_built_in(name):
            raise PipelineError(
                f"Layer {name!r} has the name of a feature ({feature(name).formula}); give it another one"
            )
    held = f"the layers {', '.join(layers)}" if layers else "no [[layer]]"
    for name in spec.names:
        if not is_built_in(name) and name not in layers:
            raise PipelineError(
                f"No feature {name!r}{did_you_mean(name, FEATURES)}: `slidecube features` lists those of this build, "
                f"and the TOML has {held}; add a [[layer]] "
                "of this name"
            )


def require_source(spec: FeatureSpec, source: str, bands: Collection[str]) -> None:
    """Refuse features of bands that a source of scenes does not have.

    source : its name; bands : that it has, none where they are asked of each item
    Raises PipelineError, which names the set to take instead where there is one.
    """
    reads = {read.partition(".") for name in spec.names for read in feature(name).reads}
    lacking = sorted({what for _, _, what in reads if what in BANDS} - set(bands))
    if not lacking or not bands:
        return
    for name, found in FEATURE_SETS.items():
        if found.instead and set(found.names) <= set(spec.names):
            raise PipelineError(
                f"Feature set {name!r} needs {', '.join(lacking)} of Level 1C, and source {source!r} does not have it; "
                f"take the set {found.instead!r}, or a source such as 'earth-search/sentinel-2-l1c'"
            )
    raise PipelineError(
        f"Features need {', '.join(lacking)}, and source {source!r} has no such band; it has {', '.join(bands)}"
    )


def listing() -> dict[str, Any]:
    """Return every feature and every set, as JSON types."""
    bands = [_entry(f"{band}_{side}") for side in ("pre", "post") for band in (BANDS[0], BANDS[-1])]
    mnf = [_entry(f"mnf{n}_{image}") for image in ("pre", "post", "change") for n in (1, len(MNF_BANDS))]
    return {
        "features": [_entry(name) for name in FEATURES],
        "families": [*bands, *mnf],
        "sets": [
            {
                "name": name,
                "features": list(found.names),
                "layers": list(found.layers),
                "note": found.note,
                "instead": found.instead,
                "source": found.source,
            }
            for name, found in FEATURE_SETS.items()
        ],
    }


def listing_text() -> str:
    """Return the same as lines of text."""
    said = listing()
    rows = [*said["features"], *said["families"]]
    wide = {key: max(len(row[key]) for row in rows) for key in ("name", "unit")}

    def line(row: Mapping[str, Any]) -> str:
        return f"{row['name']:<{wide['name']}}  {row['unit']:<{wide['unit']}}  {row['formula']}  [{row['source']}]"

    lines = ["features", *map(line, said["features"])]
    lines += ["", "families, by their first and last", *map(line, said["families"]), "", "sets"]
    for found in said["sets"]:
        lines.append(f"{found['name']:<{wide['name']}}  {', '.join(found['features'])}  [{found['source']}]")
        if found["layers"]:
            lines.append(f"{'':<{wide['name']}}  wants [[layer]] {', '.join(found['layers'])}")
        if found["note"]:
            lines.append(f"{'':<{wide['name']}}  {found['note']}")
    return "\n".join(lines)


def _entry(name: str) -> dict[str, Any]:
    one: Feature = feature(name)
    return {
        "name": name,
        "unit": one.unit,
        "formula": one.formula,
        "source": one.source,
        "reads": list(one.reads),
    }
