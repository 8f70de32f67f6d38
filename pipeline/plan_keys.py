"""Keys of a plan: its layers, what each tile of them reads, its statistics and its detections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from slidecube.catalog.grid import TileGrid, Tiles
from slidecube.catalog.scenes import Role, Scene, SceneTable, Window
from slidecube.catalog.sources import SOURCES, is_raster
from slidecube.models.card import ModelCard
from slidecube.models.devices import Device
from slidecube.models.predict import Detector, WindowedDetector
from slidecube.models.unsupervised import Kmeans
from slidecube.pipeline.composite import WindowEnd
from slidecube.pipeline.config import Config, Coregistration, LandCover, Layer, SunSettings
from slidecube.pipeline.coregistration import COREGISTRATION_VERSION
from slidecube.pipeline.keys import SCHEMA_VERSION, content_key, task_key
from slidecube.pipeline.points import Points
from slidecube.pipeline.radar_geometry import HALO_M
from slidecube.pipeline.run_plan import LayerPlan, compositing
from slidecube.pipeline.sunlight import SHADOW_HALO_M, SUN_VERSION
from slidecube.pipeline.terrain import TERRAIN_VARIABLES, TERRAIN_VERSION

_EVENT_AT: dict[str, WindowEnd] = {"pre": "end", "post": "start"}
_MARGIN_M = 1_000.0  # beyond a halo: what the kernels of a warp from the DEM's own pixels reach

RADAR_VERSION = 2
"""Version of what radar layers hold and how it is made; a change makes every tile of them due, and of no others."""

AUXILIARY_VERSION = 1
"""The same of the layers that the TOML names."""

LAND_COVER_VERSION = 1
"""The same of classified land cover."""


OPTICAL_VERSION = 3
"""Version of what optical layers hold and how it is made; a change makes every tile of them due, and of no others."""


def optical_layer_plan(
    config: Config,
    grid: TileGrid,
    window: Window,
    scenes: SceneTable,
    *,
    side: str,
    series: Sequence[str] = (),
) -> LayerPlan:
    """Name and key the composite of a window.

    side : "pre" or "post", which tells where the event lies; series : what it stores of its dates' NDVI
    """
    cube, rule = config.cube, config.cube.mask.rule()
    how = compositing(config, event_at=_EVENT_AT[side] if cube.composite == "nearest-clear" else None)
    key = content_key(
        "optical",
        SCHEMA_VERSION,
        OPTICAL_VERSION,
        grid.key,
        _source_term(scenes.source_of("optical", config.sources.optical)),
        sorted([*cube.bands, *series]),
        replace(rule, scl_classes=tuple(sorted(rule.scl_classes))),
        how,
        str(window),
        *_sun_terms(config, scenes),
    )
    return LayerPlan(
        name=f"optical-{window}-{key[:8]}",
        kind="optical",
        key=key,
        window=window,
        event_at=how.event_at if how.method == "nearest-clear" else None,
        heights_m=_heights_m(config.cube.sun),
    )


def _heights_m(sun: SunSettings) -> float | None:
    """How far around a tile an optical layer reads the DEM, None where it does not."""
    if sun.cast_shadow:
        return SHADOW_HALO_M + _MARGIN_M
    return _MARGIN_M if sun.reads_heights else None


def _sun_terms(config: Config, scenes: SceneTable) -> list[Any]:
    """What of the sun decides an optical layer; the DEM where it is read."""
    sun = config.cube.sun
    heights = [TERRAIN_VERSION, _dem_term(config, scenes)]
    return [SUN_VERSION, sun.model_dump(mode="json"), *(heights if sun.reads_heights else [])]


def terrain_layer_plan(
    config: Config, grid: TileGrid, scenes: SceneTable, variables: Sequence[str]
) -> LayerPlan:
    """Name and key the terrain; variables : that it stores."""
    key = content_key(
        "terrain",
        SCHEMA_VERSION,
        TERRAIN_VERSION,
        grid.key,
        _dem_term(config, scenes),
        sorted(variables),
    )
    return LayerPlan(
        name=f"terrain-{key[:8]}", kind="terrain", key=key, heights_m=_terrain_reach_m(variables)
    )


def _terrain_reach_m(variables: Iterable[str]) -> float:
    return max(TERRAIN_VARIABLES[name].halo_m for name in variables) + _MARGIN_M


def dem_reach_m(config: Config, variables: Iterable[str]) -> float:
    """How far around the tiles any layer of a plan looks at the DEM; variables : of the terrain that it stores."""
    radar_m = HALO_M + _MARGIN_M if config.sources.radar else 0.0
    return max(_terrain_reach_m(variables), _heights_m(config.cube.sun) or 0.0, radar_m)


def radar_layer_plan(config: Config, grid: TileGrid, window: Window, scenes: SceneTable) -> LayerPlan:
    """Name and key the radar composite of a window and one orbit direction."""
    assert config.sources.radar is not None
    radar = config.cube.radar
    key = content_key(
        "radar",
        RADAR_VERSION,
        grid.key,
        _source_term(scenes.source_of("radar", config.sources.radar)),
        _dem_term(config, scenes),
        radar.model_dump(mode="json"),
        str(window),
    )
    name = f"radar-{window}-{radar.orbit}-{key[:8]}"
    return LayerPlan(
        name=name, kind="radar", key=key, window=window, orbit=radar.orbit, heights_m=HALO_M + _MARGIN_M
    )


def auxiliary_layer_plan(grid: TileGrid, layer: Layer) -> LayerPlan:
    """Name and key a layer of the TOML; which rasters it reads counts tile by tile."""
    key = content_key(
        "auxiliary",
        AUXILIARY_VERSION,
        grid.key,
        layer.model_dump(mode="json", include={"name", "kind", "band", "nodata"}),
        layer.kernel,
        # a file counts by its content; of an item nothing says which of its assets was read
        *([layer.asset, layer.source if "://" in layer.source else "local"] if layer.source else []),
    )
    return LayerPlan(name=f"auxiliary-{layer.name}-{key[:8]}", kind="auxiliary", key=key, feature=layer.name)


def tree_key_of(inputs: Sequence[LayerPlan], points: Points, settings: LandCover, terms: list[Any]) -> str:
    """Key of a tree; inputs : layers that it reads; terms : task keys of the tiles that hold points."""
    return content_key(
        "land-cover-tree",
        LAND_COVER_VERSION,
        [layer.key for layer in inputs],
        [points.rows, points.cols, points.codes, sorted(points.names.items())],
        settings.model_dump(mode="json", include={"min_points", "min_leaf"}),
        *terms,
    )


def land_cover_layer_plan(grid: TileGrid, window: Window, tree_key: str) -> LayerPlan:
    """Name and key the land cover of a tree."""
    key = content_key("land-cover", LAND_COVER_VERSION, grid.key, tree_key)
    name = f"land_cover-{window}-{key[:8]}"
    return LayerPlan(name=name, kind="land-cover", key=key, window=window, feature="land_cover")


def _source_term(name: str) -> str:
    """What of a source counts in a key: its name; a local one may move or be gone, its scenes count themselves."""
    return name if name in SOURCES else "local"


def _dem_term(config: Config, scenes: SceneTable) -> str | list[str]:
    """What of the DEM counts in the key of a layer: of one file its content, so that two of them are two layers and
    two inventories, to be compared.
    """
    source = scenes.source_of("dem", config.sources.dem)
    if not is_raster(source):
        return _source_term(source)
    return sorted({scene.version for scene in scenes.role("dem")})


def _registration_terms(held: Coregistration | None) -> list[Any]:
    """What of the co-registration decides a pixel: where it is only warned of, the limit of the warning does not."""
    if held is None:
        return []
    return [
        COREGISTRATION_VERSION,
        held.model_dump(mode="json", exclude=set() if held.correct else {"warn_px"}),
    ]


def stat_key_of(
    layers: tuple[LayerPlan, ...], model: Detector, terms: list[Any], held: Coregistration | None = None
) -> str:
    """Key of what is fitted to the layers of an epoch.

    terms : task keys of the tiles, the area's outline, and `Config.fit_terms` where there are any
    held : how the two images are held to one place
    """
    card = model.card
    # the smallest objects by which clusters are named
    smallest_m2 = card.min_area_m2 if isinstance(model, Kmeans) else None
    return content_key(
        "statistics",
        SCHEMA_VERSION,
        [layer.key for layer in layers],
        card.address,
        asdict(card.inputs),
        dict(card.parameters),
        smallest_m2,
        *terms,
        *_registration_terms(held),
    )


def _pool(layer: LayerPlan, scenes: SceneTable) -> list[Scene]:
    """Scenes that a layer may read."""
    if layer.kind == "auxiliary":
        return [scene for scene in scenes.role("layer") if layer.feature in scene.bands]
    if layer.window is None:
        return list(scenes.role("dem"))
    role: Role = "optical" if layer.kind == "optical" else "radar"
    heights: Iterable[Scene] = [] if layer.heights_m is None else scenes.role("dem")
    return [*scenes.role(role).within(layer.window), *heights]


def computed_terms(model: Detector, device: Device) -> dict[str, str]:
    """What of the computation decides last digits: a rule on one pixel has none on any device."""
    if isinstance(model, WindowedDetector):
        views = {"views": "all"} if model.tta else {}
        return {"backend": model.backend, "dtype": model.dtype, "device": device, **views}
    if model.card.window_px == 1:
        return {"backend": "numpy", "dtype": "float32"}
    return {"backend": "torch", "dtype": "float32", "device": device}


def detect_key_of(
    layers: tuple[LayerPlan, ...],
    card: ModelCard,
    stat_key: str,
    clusters: tuple[int, ...] | None,
    *,
    computed: Mapping[str, str],
    held: Coregistration | None = None,
    ground: Mapping[str, Any] | None = None,
) -> str:
    """Key of an epoch's detection; clusters : that a person named, None for those of the rule; held : as above.

    computed : see `computed_terms`; ground : strata that are not the default's
    """
    return content_key(
        "detect",
        SCHEMA_VERSION,
        [layer.key for layer in layers],
        stat_key,
        None if clusters is None else sorted(clusters),
        card.address,
        card.architecture,
        asdict(card.inputs),
        dict(card.parameters),
        card.weights_sha256,
        card.threshold,
        card.min_area_m2,
        dict(computed),
        *_registration_terms(held),
        *([dict(ground)] if ground else []),
        # of a network all that decides its probabilities; its name may stay
        *([{"content": card.content_sha256}] if card.content_sha256 else []),
    )


def around_tiles(
    grid: TileGrid,
    tiles: Tiles,
    scenes: SceneTable,
    touching: Sequence[SceneTable],
    heights_m: float,
) -> list[SceneTable]:
    """Scenes that each tile of a layer reads which looks at the DEM around it.

    touching : scenes that touch each tile; heights_m : how far the DEM is looked at
    """
    dem = scenes.role("dem").touching_each(
        [tile.geobox.pad(int(heights_m / grid.resolution_m) + 1) for tile in tiles]
    )
    return [
        SceneTable(scenes=(*(s for s in there if s.role != "dem"), *heights))
        for there, heights in zip(touching, dem, strict=True)
    ]


def tile_keys(
    layer: LayerPlan, tiles: Tiles, scenes: SceneTable, touching: Sequence[SceneTable]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Key of each tile of a layer, and the positions in `scenes` of what it reads.

    touching : those of `scenes` that touch each tile, for all layers at once: outlines of tiles are dear; of a layer
        that reads the DEM around a tile, too, those that touch it and its surroundings
    """
    chosen = {id(scene) for scene in _pool(layer, scenes)}
    position = {id(scene): i for i, scene in enumerate(scenes.scenes)}
    keys, reads = {}, {}
    for tile, there in zip(tiles.keys, touching, strict=True):
        read = SceneTable(scenes=tuple(scene for scene in there if id(scene) in chosen))
        keys[tile] = task_key(layer.key, tile, read)
        reads[tile] = tuple(position[id(scene)] for scene in read)
    return keys, reads
