"""The frozen plan of a run: what its stages and workers know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import shapely

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.grid import Tile, TileGrid, Tiles
from slidecube.catalog.scenes import Scene, SceneTable, Window
from slidecube.catalog.sources import SOURCES
from slidecube.models.card import ModelCard
from slidecube.models.predict import Detector
from slidecube.models.unsupervised import Kmeans
from slidecube.models.zoo import build_model
from slidecube.pipeline.composite import DATE_VARIABLES
from slidecube.pipeline.config import Config
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.estimate import Estimate
from slidecube.pipeline.feature_sets import require_source
from slidecube.pipeline.features import mnf_images, required_variables
from slidecube.pipeline.series import SERIES_VARIABLES
from slidecube.pipeline.store import Workspace
from slidecube.pipeline.terrain import TERRAIN_ALWAYS


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer of the run.

    name : of its store, key included; key : layer_key; window : None for terrain
    """

    name: str
    kind: Literal["optical", "terrain"]
    key: str
    window: Window | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """One epoch: its layers by name, and the keys of its statistics and its detection.

    pre : None where no scene from before the event is read; stat_key : "" where the model learns nothing from the cube
    """

    name: str
    pre: str | None
    post: str
    terrain: str
    stat_key: str
    detect_key: str

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that it reads."""
        return tuple(name for name in (self.pre, self.post, self.terrain) if name is not None)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A frozen plan.

    run : name, the TOML's stem and eight digits of the plan's digest; inventory : name of the inventory it makes
    aoi : frozen with the plan; scenes : everything that the run may read
    keys : layer -> tile -> key of its task; reads : layer -> tile -> positions in `scenes` of what is read
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
        """The detector, built from the configuration."""
        return model_of(self.config)

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
        return [*self.config.cube.bands, *DATE_VARIABLES, *self.series_variables()]

    def series_variables(self) -> tuple[str, ...]:
        """Stored variables of an optical layer that tell of its dates' NDVI."""
        return series_variables(self.model.card)

    def terrain_variables(self) -> tuple[str, ...]:
        """Stored variables of the terrain layer."""
        return terrain_variables(self.model.card)


def model_of(config: Config) -> Detector:
    """Build the configured detector, and check that the cube will hold what it reads."""
    detect = config.detect
    model = build_model(
        detect.model,
        threshold=detect.threshold,
        min_area_m2=detect.min_area_m2,
        parameters=detect.parameters,
    )
    needed = required_variables(model.card.inputs)
    if config.sources.optical in SOURCES:  # of others each item says what it has
        require_source(model.card.inputs, config.sources.optical, SOURCES[config.sources.optical].bands)
    by_dates = {*DATE_VARIABLES, *SERIES_VARIABLES}
    of_series = {"B04", "B08"} if series_variables(model.card) else set()
    for side in ("pre", "post"):
        for band in sorted({*needed[side], *of_series} - by_dates):
            if band not in config.cube.bands:
                raise PipelineError(
                    f"Model {model.card.address} needs band {band}; [cube] bands holds {', '.join(config.cube.bands)}"
                )
    for epoch in config.epochs:
        if needed["pre"] and epoch.pre is None:
            raise PipelineError(
                f"Model {model.card.address} compares with scenes from before the event, and epoch {epoch.name!r} has "
                "no pre window; give it one, or choose a model of a single image, such as 'cae-kmeans'"
            )
    _require_clusters(model, detect.landslide_clusters)
    return model


def terrain_variables(card: ModelCard) -> tuple[str, ...]:
    """Variables of the terrain that are stored for a model: those of every layer, and what else its features read."""
    needed = required_variables(card.inputs)["terrain"]
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
    cube = config.cube.model_dump(mode="json", include={"composite", "mask"})
    return {"resolution_m": config.area.resolution_m, **cube}


def learns(card: ModelCard) -> bool:
    """Tell whether a model needs anything that is fitted to the cube: an MNF, or what it learns from patches."""
    return bool(mnf_images(card.inputs)) or card.sample_patches > 0


def minimum_size_px(min_area_m2: float, resolution_m: float) -> int:
    """Fewest pixels of an object of at least so many square metres."""
    return max(1, math.ceil(min_area_m2 / resolution_m**2 - 1e-9))


def halo_px(card: ModelCard, grid: TileGrid) -> int:
    """Pixels beyond its edges that a tile's detection reads: cut objects count whole, and networks look around."""
    return minimum_size_px(card.min_area_m2, grid.resolution_m) - 1 + card.window_px // 2
