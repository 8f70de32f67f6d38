"""Features by name: one explicit table from layers to what models read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from slidecube.models.card import FeatureSpec
from slidecube.pipeline.composite import reflectance
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.indices import dndvi, ndvi, rdndvi
from slidecube.pipeline.terrain import SLOPE_NODATA, SLOPE_SCALE


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The layers that features are made of, as stored, on one and the same window (y, x).

    pre, post : optical layers before and after the event; terrain : elevation, slope and aspect
    """

    pre: xr.Dataset
    post: xr.Dataset
    terrain: xr.Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One feature: how it is made, its unit, and where it comes from.

    reads : "pre.B04", "terrain.slope_deg", ... : the stored variables it needs
    """

    build: Callable[[Layers], xr.DataArray]
    unit: str
    source: str
    reads: tuple[str, ...]


def _ndvi_of(layer: xr.Dataset) -> xr.DataArray:
    return ndvi(reflectance(layer["B04"]), reflectance(layer["B08"]))


def _hundredths(stored: xr.DataArray) -> xr.DataArray:
    return (stored.astype(np.float32) * np.float32(SLOPE_SCALE)).where(stored != SLOPE_NODATA)


_NDVI = ("B04", "B08")
_PRE, _POST = tuple(f"pre.{b}" for b in _NDVI), tuple(f"post.{b}" for b in _NDVI)

INDEX_FEATURES: Mapping[str, Feature] = {
    "ndvi_pre": Feature(build=lambda s: _ndvi_of(s.pre), unit="1", source="Rouse et al. 1974", reads=_PRE),
    "ndvi_post": Feature(build=lambda s: _ndvi_of(s.post), unit="1", source="Rouse et al. 1974", reads=_POST),
    "dndvi": Feature(
        build=lambda s: dndvi(_ndvi_of(s.pre), _ndvi_of(s.post)),
        unit="1",
        source="Ganerod 2023, section 3.2",
        reads=_PRE + _POST,
    ),
    "rdndvi": Feature(
        build=lambda s: rdndvi(_ndvi_of(s.pre), _ndvi_of(s.post)),
        unit="%",
        source="Scheip & Wegmann 2021, eq. 1",
        reads=_PRE + _POST,
    ),
    "slope_deg": Feature(
        build=lambda s: _hundredths(s.terrain["slope_deg"]),
        unit="degree",
        source="Horn 1981",
        reads=("terrain.slope_deg",),
    ),
    "aspect_deg": Feature(
        build=lambda s: _hundredths(s.terrain["aspect_deg"]),
        unit="degree",
        source="Horn 1981",
        reads=("terrain.aspect_deg",),
    ),
    "elevation": Feature(
        build=lambda s: s.terrain["elevation"], unit="m", source="DEM", reads=("terrain.elevation",)
    ),
}
"""Features that are not plain reflectances; those are named "B04_pre", "B11_post", ..."""


def feature(name: str) -> Feature:
    """Look a feature up by its name; raises PipelineError with the known ones."""
    if name in INDEX_FEATURES:
        return INDEX_FEATURES[name]
    band, _, side = name.partition("_")
    if side in {"pre", "post"} and band.startswith("B") and len(band) == 3:
        return Feature(
            build=lambda s: reflectance((s.pre if side == "pre" else s.post)[band]),
            unit="1",
            source="Sentinel-2 reflectance",
            reads=(f"{side}.{band}",),
        )
    raise PipelineError(
        f"No feature {name!r}; features: {', '.join(INDEX_FEATURES)}, and reflectances such as B04_pre, B11_post"
    )


def build_features(spec: FeatureSpec, layers: Layers) -> xr.Dataset:
    """Build features, lazily where the layers are lazy.

    Returns (y, x) float32 variables in the spec's order, NaN = unknown.
    Raises PipelineError for an unknown feature, or one whose band the layer does not hold.
    """
    held = {
        f"{side}.{name}" for side in ("pre", "post", "terrain") for name in getattr(layers, side).data_vars
    }
    out = {}
    for name in spec.names:
        made = feature(name)
        missing = [v for v in made.reads if v not in held]
        if missing:
            raise PipelineError(
                f"Feature {name!r} needs {', '.join(missing)}, which the layers do not hold; add it to [cube] bands"
            )
        out[name] = made.build(layers).astype(np.float32)
    return xr.Dataset(out)


def required_variables(spec: FeatureSpec) -> dict[str, list[str]]:
    """Stored variables that a spec reads: side ("pre", "post", "terrain") -> names, sorted."""
    needed: dict[str, set[str]] = {"pre": set(), "post": set(), "terrain": set()}
    for name in spec.names:
        for read in feature(name).reads:
            side, _, variable = read.partition(".")
            needed[side].add(variable)
    return {side: sorted(names) for side, names in needed.items()}
