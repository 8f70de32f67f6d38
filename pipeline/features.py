"""Features by name: one explicit table from layers to what models read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import xarray as xr

from slidecube.models.card import FeatureSpec
from slidecube.models.rules import aldi_index
from slidecube.pipeline.auxiliary import values_of
from slidecube.pipeline.composite import SCALE, reflectance
from slidecube.pipeline.config import BANDS, DEFAULT_BANDS, LAYER_NAME
from slidecube.pipeline.coregistration import BlockShifts
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.indices import INDICES, Index, difference, relative_difference
from slidecube.pipeline.mnf_strata import StratifiedMnf
from slidecube.pipeline.published import L4S_BANDS
from slidecube.pipeline.radar import backscatter_db, cross_ratio_db, db_change
from slidecube.pipeline.radar_layer import ANGLE_NODATA, MASK_NODATA
from slidecube.pipeline.series import SERIES_VARIABLES, loss_probability, series_values
from slidecube.pipeline.terrain import TERRAIN_VARIABLES, TerrainVariable

SIDES = ("pre", "post", "terrain", "radar_pre", "radar_post", "auxiliary")
"""Layers that features are made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The layers that features are made of, as stored, on one and the same window (y, x).

    pre, post : optical layers before and after the event; pre is empty where no scene from before is read
    terrain : elevation, slope, aspect, and what else of `TERRAIN_VARIABLES` is wanted
    radar_pre, radar_post : radar layers of one orbit direction; empty where no radar is read
    auxiliary : layers of the TOML, by their names
    mnf : "post", "pre" or "change" -> the frozen MNF of that image, for features that need one
    strata : weight of each stratum by name, as `blend_weights` has them; empty where one fit serves the whole
    components : MNF components, by name; `build_features` makes them from `mnf`, once for all that are wanted
    shifts : of `pre` against `post`, where they are compared and the shift is measured
    """

    pre: xr.Dataset
    post: xr.Dataset
    terrain: xr.Dataset
    radar_pre: xr.Dataset = field(default_factory=xr.Dataset)
    radar_post: xr.Dataset = field(default_factory=xr.Dataset)
    auxiliary: xr.Dataset = field(default_factory=xr.Dataset)
    mnf: Mapping[str, StratifiedMnf] = field(default_factory=dict)
    strata: xr.Dataset = field(default_factory=xr.Dataset)
    components: xr.Dataset = field(default_factory=xr.Dataset)
    shifts: BlockShifts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One feature: how it is made, its unit, and where it comes from.

    formula : as a reader writes it, of reflectances ("B04") of the image before ("pre") or after the event ("post")
    reads : "pre.B04", "terrain.slope_deg", ... : the stored variables it needs
    """

    build: Callable[[Layers], xr.DataArray]
    formula: str
    unit: str
    source: str
    reads: tuple[str, ...]


def _index_of(index: Index, layer: xr.Dataset) -> xr.DataArray:
    made: xr.DataArray = index.compute(*(reflectance(layer[band]) for band in index.bands))
    return made


def _index_features(name: str, index: Index) -> dict[str, Feature]:
    """Make the four features of an index: before, after, difference and relative difference."""
    pre, post = ([f"{side}.{band}" for band in sorted(index.bands)] for side in ("pre", "post"))

    def change(of: Callable[[xr.DataArray, xr.DataArray], xr.DataArray]) -> Callable[[Layers], xr.DataArray]:
        return lambda s: of(_index_of(index, s.pre), _index_of(index, s.post))

    return {
        f"{name}_pre": Feature(
            build=lambda s: _index_of(index, s.pre),
            formula=f"{index.formula}, pre",
            unit="1",
            source=index.source,
            reads=tuple(pre),
        ),
        f"{name}_post": Feature(
            build=lambda s: _index_of(index, s.post),
            formula=f"{index.formula}, post",
            unit="1",
            source=index.source,
            reads=tuple(post),
        ),
        f"d{name}": Feature(
            build=change(difference),
            formula=f"{name}_post - {name}_pre",
            unit="1",
            source="Ganerod et al. 2023, section 3.2" if name == "ndvi" else index.source,
            reads=(*pre, *post),
        ),
        f"rd{name}": Feature(
            build=change(relative_difference),
            formula=f"100 ({name}_post - {name}_pre) / sqrt({name}_pre + {name}_post)",
            unit="%",
            source="Scheip & Wegmann 2021 (HazMapper), eq. 1, doi:10.5194/nhess-21-1495-2021"
            + ("" if name == "ndvi" else f", there of NDVI; {index.source}"),
            reads=(*pre, *post),
        ),
    }


def _terrain_feature(name: str, variable: TerrainVariable) -> Feature:
    return Feature(
        build=lambda s: variable.values(s.terrain[name]),
        formula=variable.formula,
        unit=variable.unit,
        source=variable.source,
        reads=(f"terrain.{name}",),
    )


def _db(layer: xr.Dataset, band: str) -> xr.DataArray:
    return backscatter_db(layer[band])


def _ratio(layer: xr.Dataset) -> xr.DataArray:
    return cross_ratio_db(_db(layer, "VH"), _db(layer, "VV"))


def _mask(s: Layers, name: str) -> xr.DataArray:
    """1 where either side has the mask, NaN where no scene looked at one of them."""
    pre, post = (
        side[name].astype(np.float32).where(side[name] != MASK_NODATA) for side in (s.radar_pre, s.radar_post)
    )
    return pre.where(pre > post, post).where(pre.notnull() & post.notnull())


def _angle(stored: xr.DataArray) -> xr.DataArray:
    return (stored.astype(np.float32) * np.float32(0.01)).where(stored != ANGLE_NODATA)


_ENS_S1 = "Ganerod et al. 2023, table 2"


def _of_band(band: str) -> dict[str, Feature]:
    """Make the three features of a polarisation: before, after, and the change."""
    name, pre, post = band.lower(), f"radar_pre.{band}", f"radar_post.{band}"

    def made(build: Callable[[Layers], xr.DataArray], formula: str, *reads: str) -> Feature:
        return Feature(build=build, formula=formula, unit="dB", source=_ENS_S1, reads=reads)

    median = f"median {band} of the window"
    return {
        f"{name}_pre": made(lambda s: _db(s.radar_pre, band), f"{median}, pre", pre),
        f"{name}_post": made(lambda s: _db(s.radar_post, band), f"{median}, post", post),
        f"d{name}": made(
            lambda s: db_change(_db(s.radar_pre, band), _db(s.radar_post, band)),
            f"{name}_post - {name}_pre",
            pre,
            post,
        ),
    }


def _radar_features() -> dict[str, Feature]:
    """Make what is read of Sentinel-1."""

    def ratio(side: str, of: Callable[[Layers], xr.Dataset]) -> Feature:
        return Feature(
            build=lambda s: _ratio(of(s)),
            formula=f"vh_{side} - vv_{side}",
            unit="dB",
            source="VH / VV as power",
            reads=(f"radar_{side}.VH", f"radar_{side}.VV"),
        )

    def mask(name: str) -> Feature:
        return Feature(
            build=lambda s: _mask(s, name),
            formula=f"1 in radar {name} before or after, on every track",
            unit="1",
            source=_ENS_S1,
            reads=(f"radar_pre.{name}", f"radar_post.{name}"),
        )

    return {
        **_of_band("VV"),
        **_of_band("VH"),
        "vhvv_pre": ratio("pre", lambda s: s.radar_pre),
        "vhvv_post": ratio("post", lambda s: s.radar_post),
        "layover": mask("layover"),
        "shadow": mask("shadow"),
        "lia_deg": Feature(
            build=lambda s: _angle(s.radar_post["lia_deg"]),
            formula="angle between the line of sight and the ground's normal, post",
            unit="degree",
            source=f"{_ENS_S1}; geometry of the track and the DEM",
            reads=("radar_post.lia_deg",),
        ),
    }


_L4S_DIVISORS = (
    1111.81,
    824.63,
    663.42,
    445.17,
    645.86,
    1547.74,
    1960.44,
    1941.32,
    674.08,
    9.048,
    1113.98,
    519.90,
)
_L4S_SLOPE, _L4S_ELEVATION = 20.292, 772.83
_L4S = "Landslide4Sense (Ghorbanzadeh et al. 2022), divided by the authors' vector"


def _l4s_band(band: str, divisor: float) -> Feature:
    """Make a channel of Landslide4Sense: the digital number without its offset, by the authors' divisor."""
    return Feature(
        build=lambda s: reflectance(s.post[band]) * np.float32(SCALE / divisor),
        formula=f"{SCALE} * {band} / {divisor}, post",
        unit="1",
        source=_L4S,
        reads=(f"post.{band}",),
    )


def _l4s_terrain(name: str, divisor: float) -> Feature:
    variable = TERRAIN_VARIABLES[name]
    return Feature(
        build=lambda s: variable.values(s.terrain[name]) / np.float32(divisor),
        formula=f"{name} / {divisor}",
        unit="1",
        source=_L4S,
        reads=(f"terrain.{name}",),
    )


def _series_feature(variable: str, side: str) -> Feature:
    what = {"ndvi_mean": "mean", "ndvi_std": "standard deviation (n - 1)"}[variable]
    return Feature(
        build=lambda s: series_values(variable, (s.pre if side == "pre" else s.post)[variable]),
        formula=f"{what} of NDVI over the clear observations of {side}",
        unit="1",
        source="Milledge et al. 2022, doi:10.5194/nhess-22-481-2022",
        reads=(f"{side}.{variable}",),
    )


_WELCH = tuple(f"{side}.{name}" for side in ("pre", "post") for name in (*SERIES_VARIABLES, "clear_count"))


def _loss_probability(layers: Layers) -> xr.DataArray:
    sides = [
        (*(series_values(name, side[name]) for name in SERIES_VARIABLES), side["clear_count"])
        for side in (layers.pre, layers.post)
    ]
    found: xr.DataArray = xr.apply_ufunc(
        loss_probability, *sides[0], *sides[1], dask="parallelized", output_dtypes=[np.float32]
    )
    return found


def _aldi(layers: Layers) -> xr.DataArray:
    pre, post = (series_values("ndvi_mean", side["ndvi_mean"]) for side in (layers.pre, layers.post))
    found: xr.DataArray = xr.apply_ufunc(
        aldi_index, pre, post, _loss_probability(layers), dask="parallelized", output_dtypes=[np.float32]
    )
    return found


_SERIES_FEATURES: Mapping[str, Feature] = {
    **{
        f"{name}_{side}": _series_feature(name, side) for name in SERIES_VARIABLES for side in ("pre", "post")
    },
    "ndvi_loss_p": Feature(
        build=_loss_probability,
        formula="P(T < t), t = (mean_pre - mean_post) / sqrt(std_pre^2 / n_pre + std_post^2 / n_post), one-sided",
        unit="1",
        source="Welch 1947, doi:10.1093/biomet/34.1-2.28",
        reads=_WELCH,
    ),
    "aldi": Feature(
        build=_aldi,
        formula="max(ndvi_mean_pre - ndvi_mean_post, 0) * (1 - max(ndvi_mean_post, 0)) * ndvi_loss_p",
        unit="1",
        source="after Milledge et al. 2022, doi:10.5194/nhess-22-481-2022: three factors, not the exact equation",
        reads=_WELCH,
    ),
}

FEATURES: Mapping[str, Feature] = {
    **{name: made for index, of in INDICES.items() for name, made in _index_features(index, of).items()},
    **_SERIES_FEATURES,
    **{name: _terrain_feature(name, of) for name, of in TERRAIN_VARIABLES.items()},
    **_radar_features(),
    **{f"l4s_{band}": _l4s_band(band, by) for band, by in zip(L4S_BANDS, _L4S_DIVISORS, strict=True)},
    "l4s_slope": _l4s_terrain("slope_deg", _L4S_SLOPE),
    "l4s_elevation": _l4s_terrain("elevation", _L4S_ELEVATION),
}
"""Features that are neither reflectances ("B04_pre", "B11_post", ...) nor MNF components ("mnf1_post", ...)."""

MNF_BANDS = DEFAULT_BANDS
"""Bands of the MNF: CAE's, on Level 2A, which has no cirrus band (METHODS, section 1)."""


def feature(name: str) -> Feature:
    """Look a feature up by its name: one of this build, or a layer of the TOML.

    Whether a TOML has such a layer is its plan's to say. Raises PipelineError for what can be neither.
    """
    if is_built_in(name) or not re.fullmatch(LAYER_NAME, name):
        return built_in(name)
    return Feature(
        build=lambda s: values_of(s.auxiliary[name]),
        formula=f"layer {name!r} of the TOML",
        unit="its own",
        source="[[layer]]",
        reads=(f"auxiliary.{name}",),
    )


def built_in(name: str) -> Feature:
    """Look a feature of this build up; raises PipelineError with the known ones."""
    if name in FEATURES:
        return FEATURES[name]
    band, _, side = name.partition("_")
    if side in {"pre", "post"} and band in BANDS:
        return Feature(
            build=lambda s: reflectance((s.pre if side == "pre" else s.post)[band]),
            formula=f"reflectance of {band}, {side}",
            unit="1",
            source="Sentinel-2 reflectance",
            reads=(f"{side}.{band}",),
        )
    component = _mnf_component(name)
    if component is not None and component[0] <= len(MNF_BANDS):
        image = component[1]
        sides = ("pre", "post") if image == "change" else (image,)
        return Feature(
            build=lambda s: s.components[name],
            formula=f"component {component[0]} of the MNF of {image}",
            unit="noise sd",
            source="Green et al. 1988",
            reads=tuple(f"{side}.{b}" for side in sides for b in MNF_BANDS),
        )
    raise PipelineError(
        f"No feature {name!r}; features: {', '.join(FEATURES)}, reflectances such as B04_pre, B11_post, and MNF "
        f"components such as mnf1_post, mnf3_change (1 to {len(MNF_BANDS)}, of pre, post or change)"
    )


def is_built_in(name: str) -> bool:
    """Tell whether this build makes a feature by itself; all other names are free for layers of the TOML."""
    try:
        built_in(name)
    except PipelineError:
        return False
    return True


def _mnf_component(name: str) -> tuple[int, str] | None:
    match = re.fullmatch(r"mnf([1-9]\d?)_(pre|post|change)", name)
    return (int(match[1]), match[2]) if match else None


def mnf_images(spec: FeatureSpec) -> dict[str, int]:
    """Images whose MNF a spec needs, "pre", "post" or "change", and how many of its components."""
    images: dict[str, int] = {}
    for number, image in filter(None, map(_mnf_component, spec.names)):
        images[image] = max(number, images.get(image, 0))
    return dict(sorted(images.items()))


def mnf_image(image: str, layers: Layers) -> xr.Dataset:
    """Bands of the image that an MNF is fitted to, on the stored scale: (y, x) float32, NaN = unknown.

    image : "pre", "post", or "change", which is post minus pre, band by band
    """
    sides = [layers.post, layers.pre] if image == "change" else [getattr(layers, image)]
    known = [{b: side[b].astype(np.float32).where(side[b] != 0) for b in MNF_BANDS} for side in sides]
    if len(known) == 1:
        return xr.Dataset(known[0])
    return xr.Dataset({b: known[0][b] - known[1][b] for b in MNF_BANDS})


def _with_components(layers: Layers, spec: FeatureSpec) -> Layers:
    components = xr.Dataset()
    for image, count in mnf_images(spec).items():
        if image not in layers.mnf:
            raise PipelineError(
                f"Features mnf1_{image}, ... need the fitted MNF of {image}; run `slidecube fit` first"
            )
        bands = mnf_image(image, layers)
        components.update(layers.mnf[image].components(bands, layers.strata, suffix=image, count=count))
    return replace(layers, components=components)


def build_features(spec: FeatureSpec, layers: Layers) -> xr.Dataset:
    """Build features, lazily where the layers are lazy.

    Returns (y, x) float32 variables in the spec's order, NaN = unknown.
    Raises PipelineError for an unknown feature, or one whose band the layer does not hold.
    """
    held = {f"{side}.{name}" for side in SIDES for name in getattr(layers, side).data_vars}
    made = {name: feature(name) for name in spec.names}
    for name, one in made.items():
        missing = [v for v in one.reads if v not in held]
        if missing:
            raise PipelineError(
                f"Feature {name!r} needs {', '.join(missing)}, which the layers do not hold; add it to [cube] bands, "
                "name [sources] radar, or add a [[layer]]"
            )
    whole = _with_components(layers, spec)
    return xr.Dataset({name: one.build(whole).astype(np.float32) for name, one in made.items()})


def required_variables(spec: FeatureSpec) -> dict[str, list[str]]:
    """Stored variables that a spec reads: side, of `SIDES` -> names, sorted."""
    needed: dict[str, set[str]] = {side: set() for side in SIDES}
    for name in spec.names:
        for read in feature(name).reads:
            side, _, variable = read.partition(".")
            needed[side].add(variable)
    return {side: sorted(names) for side, names in needed.items()}
