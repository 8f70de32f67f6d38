"""Feature sets of the papers by name, and the list of all features for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from slidecube.models.card import FeatureSpec
from slidecube.pipeline.config import BANDS
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import FEATURES, MNF_BANDS, Feature, feature, is_built_in
from slidecube.pipeline.published import FEATURE_SETS, FeatureSet
from slidecube.pipeline.refusals import did_you_mean


def feature_set(name: str) -> FeatureSpec:
    """Return the features of a set; raises PipelineError for an unknown set."""
    if name not in FEATURE_SETS:
        raise PipelineError(f"No feature set {name!r}; sets: {', '.join(FEATURE_SETS)}")
    return FeatureSpec(names=FEATURE_SETS[name].names)


def layers_of(found: FeatureSet) -> tuple[str, ...]:
    """Return the features of a set that the TOML must bring."""
    return tuple(name for name in found.names if not is_built_in(name))


def require_known(spec: FeatureSpec, layers: Collection[str]) -> None:
    """Refuse features that neither this build nor a TOML's layers make, and layers that hide a feature or a set.

    layers : names of a TOML's layers
    Raises PipelineError.
    """
    for name in layers:
        if is_built_in(name):
            raise PipelineError(
                f"Layer {name!r} has the name of a feature ({feature(name).formula}); give it another one"
            )
        if name in FEATURE_SETS:
            raise PipelineError(f"Layer {name!r} has the name of a feature set; give it another one")
    held = f"the layers {', '.join(layers)}" if layers else "no [[layer]]"
    for name in spec.names:
        if not is_built_in(name) and name not in layers:
            points = ", or [land_cover]" if name == "land_cover" else ""
            raise PipelineError(
                f"No feature {name!r}{did_you_mean(name, (*FEATURES, *FEATURE_SETS))}: `slidecube features` lists "
                f"those of this build, and the TOML has {held}; add a [[layer]] of this name{points}"
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
                "layers": list(layers_of(found)),
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
            lines.append(f"{'':<{wide['name']}}  wants {_wanted(found['layers'])}")
        if found["note"]:
            lines.append(f"{'':<{wide['name']}}  {found['note']}")
    return "\n".join(lines)


def _wanted(layers: Collection[str]) -> str:
    """Say by which tables a TOML brings layers: land cover may be classified as well."""
    own = [name for name in layers if name != "land_cover"]
    classified = ["[land_cover] or [[layer]] land_cover"] if len(own) < len(layers) else []
    return ", and ".join([*classified, *([f"[[layer]] {', '.join(own)}"] if own else [])])


def _entry(name: str) -> dict[str, Any]:
    one: Feature = feature(name)
    return {
        "name": name,
        "unit": one.unit,
        "formula": one.formula,
        "source": one.source,
        "reads": list(one.reads),
    }
