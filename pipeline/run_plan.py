"""The frozen plan of a run: what its stages and workers know."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import shapely

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.grid import Tile, TileGrid, Tiles
from slidecube.catalog.radar import OrbitState
from slidecube.catalog.scenes import Scene, SceneTable, Window
from slidecube.catalog.sources import SOURCES
from slidecube.models.card import ModelCard
from slidecube.models.predict import Detector, WindowedDetector
from slidecube.models.unsupervised import Kmeans
from slidecube.models.zoo import build_model
from slidecube.pipeline.composite import Compositing, WindowEnd
from slidecube.pipeline.config import Config, Coregistration, Layer
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.estimate import Estimate, compares_images
from slidecube.pipeline.feature_sets import require_known, require_source
from slidecube.pipeline.features import MNF_BANDS, mnf_images, required_variables
from slidecube.pipeline.model_registry import load_adopted
from slidecube.pipeline.points import Points
from slidecube.pipeline.series import SERIES_VARIABLES
from slidecube.pipeline.store import Workspace
from slidecube.pipeline.strata import Strata
from slidecube.pipeline.terrain import TERRAIN_ALWAYS
from slidecube.pipeline.topography import ILLUMINATION
from slidecube.pipeline.visibility import SEEN_VARIABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer of the run.

    name : of its store, key included; key : layer_key; window : None for terrain; orbit : of radar, None of others
    feature : name by which features read it, of a layer of the TOML or the classified land cover
    event_at : of an optical layer for which it matters, the end of the window at which the event lies
    """

    name: str
    kind: Literal["optical", "radar", "terrain", "auxiliary", "land-cover"]
    key: str
    window: Window | None = None
    orbit: OrbitState | None = None
    heights_m: float | None = None
    feature: str = ""
    event_at: WindowEnd | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """One epoch: its layers by name, and the keys of its statistics and its detection.

    pre : None where no scene from before the event is read; stat_key : "" where the model learns nothing from the cube
    radar_pre, radar_post : None where the model reads no radar, though the plan may make such layers
    auxiliary : name in the TOML -> layer, of those that the model reads
    land_cover : layer of the land cover, whether the model reads it or not; tree_key : of the tree that it is made by,
        "" where it is a raster; tree_radar : radar layer that the tree reads, None without one
    """

    name: str
    pre: str | None
    post: str
    terrain: str
    stat_key: str
    detect_key: str
    radar_pre: str | None = None
    radar_post: str | None = None
    auxiliary: Mapping[str, str] = field(default_factory=dict)
    land_cover: str | None = None
    tree_key: str = ""
    tree_radar: str | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that it reads."""
        own = (layer for _, layer in sorted(self.auxiliary.items()))
        names = (self.pre, self.post, self.terrain, self.radar_pre, self.radar_post, *own)
        return tuple(name for name in names if name is not None)


LAND_COVER = Layer(name="land_cover", kind="categorical", source="points")
"""How classified land cover is stored: as a layer of the TOML would be."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A frozen plan.

    run : name, the TOML's stem and eight digits of the plan's digest; inventory : name of the inventory it makes
    aoi : frozen with the plan; scenes : everything that the run may read
    keys : layer -> tile -> key of its task; reads : layer -> tile -> positions in `scenes` of what is read
    strata : that are fitted apart, None where the whole is fitted
    points : of which a land cover is learnt, None without one
    network : card of the network that was adopted into the workspace, None for a rule and for what learns from the cube
    reused_scenes : the scene list came from an earlier plan, nothing was searched
    """

    run: str
    workspace: Workspace
    config: Config
    aoi: Aoi
    grid: TileGrid
    tiles: Tiles
    scenes: SceneTable
    layers: tuple[LayerPlan, ...]
    epochs: tuple[EpochPlan, ...]
    keys: Mapping[str, Mapping[str, str]]
    reads: Mapping[str, Mapping[str, tuple[int, ...]]]
    inventory: str
    estimate: Estimate = field(repr=False)
    strata: Strata | None = None
    points: Points | None = field(default=None, repr=False)
    network: ModelCard | None = None
    reused_scenes: bool = False

    @cached_property
    def by_tile(self) -> dict[str, Tile]:
        """Tiles by key."""
        return {tile.key: tile for tile in self.tiles}

    @cached_property
    def by_layer(self) -> dict[str, LayerPlan]:
        """Layers by name."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def by_epoch(self) -> dict[str, EpochPlan]:
        """Epochs by name."""
        return {epoch.name: epoch for epoch in self.epochs}

    @cached_property
    def model(self) -> Detector:
        """The detector, built from the configuration, or loaded from the workspace."""
        if self.network is None:
            return model_of(self.config)
        return computed_as_configured(load_adopted(self.workspace, self.network), self.config)

    @cached_property
    def card(self) -> ModelCard:
        """Card of the detector; a network is not loaded for it."""
        return self.network or self.model.card

    @cached_property
    def aoi_shape(self) -> shapely.Geometry:
        """The area of interest in the grid's CRS."""
        return self.aoi.to_crs(self.grid.crs)

    def scenes_of(self, layer: str, tile: str) -> list[Scene]:
        """Scenes that a tile of a layer reads."""
        return [self.scenes.scenes[i] for i in self.reads[layer][tile]]

    def neighbours(self, tile: Tile) -> list[Tile]:
        """Tiles of the plan among the 3 x 3 around a tile, itself included."""
        keys = (
            f"r{tile.row + r:03d}c{tile.col + c:03d}"
            for r in (-1, 0, 1)
            for c in (-1, 0, 1)
            if tile.row + r >= 0
        )
        return [self.by_tile[key] for key in keys if key in self.by_tile]

    def optical_variables(self) -> list[str]:
        """Stored variables of an optical layer."""
        light = [ILLUMINATION] if self.config.cube.sun.correction != "none" else []
        return [*self.config.cube.bands, *SEEN_VARIABLES, *self.series_variables(), *light]

    def series_variables(self) -> tuple[str, ...]:
        """Stored variables of an optical layer that tell of its dates' NDVI."""
        return series_variables(self.card)

    def layer_settings(self, layer: str) -> Layer | None:
        """Settings of a layer of the TOML, or of a classified land cover; None for every other layer."""
        name = self.by_layer[layer].feature
        if self.by_layer[layer].kind == "land-cover":
            return LAND_COVER
        return next((own for own in self.config.layers if own.name == name), None)

    def terrain_variables(self) -> tuple[str, ...]:
        """Stored variables of the terrain layer."""
        return terrain_variables(self.card, self.config)


def model_of(config: Config, network: Detector | None = None) -> Detector:
    """Build the configured detector, and check that the cube will hold what it reads.

    network : the one that the configuration names, None for a model of the zoo
    """
    detect = config.detect
    model = network or build_model(
        config.models[0],
        threshold=detect.threshold,
        min_area_m2=detect.min_area_m2,
        parameters=detect.parameters,
        features=detect.features,
    )
    model = _with_components(model, config)
    require_known(model.card.inputs, config.layer_names)
    needed = required_variables(model.card.inputs)
    if config.sources.optical in SOURCES:  # of others each item says what it has
        require_source(model.card.inputs, config.sources.optical, SOURCES[config.sources.optical].bands)
    by_dates = {*SEEN_VARIABLES, *SERIES_VARIABLES}
    of_series = {"B04", "B08"} if series_variables(model.card) else set()
    for side in ("pre", "post"):
        for band in sorted({*needed[side], *of_series} - by_dates):
            if band not in config.cube.bands:
                raise PipelineError(
                    f"Model {model.card.address} needs band {band}; [cube] bands holds {', '.join(config.cube.bands)}"
                )
    held = coregistration_of(config, model.card)
    if held is not None and held.band not in config.cube.bands:
        raise PipelineError(
            f"[cube.coregistration] band: got {held.band!r}, which [cube] bands does not hold; allowed: "
            f"{', '.join(config.cube.bands)}"
        )
    if reads_radar(model.card) and config.sources.radar is None:
        raise PipelineError(
            f"Model {model.card.address} reads Sentinel-1; name a source of it as radar in [sources], such as "
            "'planetary-computer/sentinel-1-rtc'"
        )
    for epoch in config.epochs:
        if (needed["pre"] or needed["radar_pre"]) and epoch.before is None:
            raise PipelineError(
                f"Model {model.card.address} compares with scenes from before the event, and epoch {epoch.name!r} has "
                "no pre window; give it one, or choose a model of a single image, such as 'cae-kmeans'"
            )
    _require_clusters(model, detect.landslide_clusters)
    return model


def computed_as_configured(model: Detector, config: Config) -> Detector:
    """Return a network with the backend and the dtype of the configuration; other models as they are."""
    detect = config.detect
    if not isinstance(model, WindowedDetector):
        return model
    return model.computed_by(detect.backend, detect.dtype, tta=detect.tta)


def compositing(config: Config, *, event_at: WindowEnd | None) -> Compositing:
    """Return how an optical layer is composited; what its method does not look at has one value, and no other key."""
    cube = config.cube
    return Compositing(
        method=cube.composite,
        greenest_of=cube.greenest_of if cube.composite == "greenest" else 0,
        event_at=event_at or "end",
    )


def _with_components(model: Detector, config: Config) -> Detector:
    """Let a model read as many MNF components as the configuration says."""
    fit = config.fit
    wanted = {name: getattr(fit, name) for name in ("mnf_components", "mnf_variance", "strata")}
    asked = [name for name, value in wanted.items() if value is not None]
    if asked and not mnf_images(model.card.inputs):
        raise PipelineError(
            f"Model {model.card.address} reads no MNF component; leave {', '.join(asked)} out of [fit], or choose a "
            "model that does, such as 'kmeans'"
        )
    count = fit.mnf_components or (len(MNF_BANDS) if fit.mnf_variance is not None else None)
    if count is None or not isinstance(model, Kmeans):
        return model
    images = mnf_images(model.card.inputs)
    components = {f"mnf{k + 1}_{image}": None for image in images for k in range(count)}
    others = [name for name in model.card.inputs.names if re.fullmatch(r"mnf\d+_\w+", name) is None]
    inputs = replace(model.card.inputs, names=(*components, *others))
    return replace(model, card=replace(model.card, inputs=inputs))


def terrain_variables(card: ModelCard, config: Config) -> tuple[str, ...]:
    """Variables of the terrain that are stored: those of every layer, and what else features and strata read."""
    needed = required_variables(card.inputs)["terrain"]
    if config.ground.river_corridor_m and "hand_m" not in needed:
        needed = [*needed, "hand_m"]
    return (*TERRAIN_ALWAYS, *(name for name in needed if name not in TERRAIN_ALWAYS))


def series_variables(card: ModelCard) -> tuple[str, ...]:
    """Mean and spread of NDVI, both or none, where a model reads one: every optical layer of a run holds the same."""
    needed = required_variables(card.inputs)
    wanted = {*needed["pre"], *needed["post"]} & set(SERIES_VARIABLES)
    return SERIES_VARIABLES if wanted else ()


def _require_clusters(model: Detector, chosen: Mapping[str, tuple[int, ...]] | None) -> None:
    if chosen is None:
        return
    if not isinstance(model, Kmeans):
        raise PipelineError(
            f"Model {model.card.address} does not cluster; leave landslide_clusters out of [detect]"
        )
    k = int(model.card.parameters["k"])
    unknown = [c for clusters in chosen.values() for c in clusters if c >= k]
    if unknown:
        raise PipelineError(
            f"Model {model.card.address} has clusters 0 to {k - 1}; got {unknown[0]} in landslide_clusters"
        )


def fit_terms(config: Config) -> dict[str, Any]:
    """What of a cube must agree for statistics of one to hold for another, as canonical JSON types."""
    # numbers of a composite that is not made decide nothing
    wanted = {"composite", "mask", "sun"} | (
        {"greenest_of"} if config.cube.composite == "greenest" else set()
    )
    cube = config.cube.model_dump(
        mode="json", include=wanted | ({"radar"} if config.sources.radar else set())
    )
    cube |= {"coregistration": config.cube.coregistration.model_dump(mode="json", exclude={"warn_px"})}
    unset = dict.fromkeys(("mnf_variance", "strata", "strata_field", "strata_blend_m", "strata_min_px"))
    return {"resolution_m": config.area.resolution_m, **cube, **unset, **config.fit_terms()}


def reads_radar(card: ModelCard) -> bool:
    """Tell whether a model reads a radar layer."""
    needed = required_variables(card.inputs)
    return bool(needed["radar_pre"] or needed["radar_post"])


def coregistration_of(config: Config, card: ModelCard) -> Coregistration | None:
    """Return how the two images of a model are held to one place; None where they are not, or there is one only."""
    how = config.cube.coregistration
    return how if how.check and compares_images(card) else None


def learns(card: ModelCard) -> bool:
    """Tell whether a model needs anything that is fitted to the cube: an MNF, or what it learns from patches."""
    return bool(mnf_images(card.inputs)) or card.sample_patches > 0


def minimum_size_px(min_area_m2: float, resolution_m: float) -> int:
    """Fewest pixels of an object of at least so many square metres."""
    return max(1, math.ceil(min_area_m2 / resolution_m**2 - 1e-9))


def halo_px(card: ModelCard, grid: TileGrid) -> int:
    """Pixels beyond its edges that a tile's detection looks at: cut objects count whole, and networks look around."""
    return minimum_size_px(card.min_area_m2, grid.resolution_m) - 1 + card.window_px // 2
