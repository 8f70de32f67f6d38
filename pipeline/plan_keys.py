"""Keys of a plan: its layers, what each tile of them reads, its statistics and its detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from slidecube.catalog.grid import TileGrid, Tiles
from slidecube.catalog.scenes import SceneTable, Window
from slidecube.catalog.sources import SOURCES
from slidecube.models.card import ModelCard
from slidecube.models.devices import Device
from slidecube.models.predict import Detector
from slidecube.models.unsupervised import Kmeans
from slidecube.pipeline.config import Config
from slidecube.pipeline.keys import SCHEMA_VERSION, content_key, task_key
from slidecube.pipeline.run_plan import LayerPlan
from slidecube.pipeline.terrain import TERRAIN_VERSION


def optical_layer_plan(
    config: Config, grid: TileGrid, window: Window, scenes: SceneTable, *, series: Sequence[str] = ()
) -> LayerPlan:
    """Name and key the composite of a window; series : what it stores of its dates' NDVI."""
    cube = config.cube
    key = content_key(
        "optical",
        SCHEMA_VERSION,
        grid.key,
        _source_term(scenes.source_of("optical", config.sources.optical)),
        sorted([*cube.bands, *series]),
        {"classes": sorted(cube.mask.scl_classes), "dilation_px": cube.mask.dilation_px},
        cube.composite,
        str(window),
    )
    return LayerPlan(name=f"optical-{window}-{key[:8]}", kind="optical", key=key, window=window)


def terrain_layer_plan(
    config: Config, grid: TileGrid, scenes: SceneTable, variables: Sequence[str]
) -> LayerPlan:
    """Name and key the terrain; variables : that it stores."""
    key = content_key(
        "terrain",
        SCHEMA_VERSION,
        TERRAIN_VERSION,
        grid.key,
        _source_term(scenes.source_of("dem", config.sources.dem)),
        sorted(variables),
    )
    return LayerPlan(name=f"terrain-{key[:8]}", kind="terrain", key=key)


def _source_term(name: str) -> str:
    """What of a source counts in a key: its name; a local one may move or be gone, its scenes count themselves."""
    return name if name in SOURCES else "local"


def stat_key_of(layers: tuple[LayerPlan, ...], model: Detector, terms: list[Any]) -> str:
    """Key of what is fitted to the layers of an epoch; terms : task keys of the tiles, and the area's outline."""
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
    )


def detect_key_of(
    layers: tuple[LayerPlan, ...],
    card: ModelCard,
    stat_key: str,
    clusters: tuple[int, ...] | None,
    *,
    device: Device = "cpu",
) -> str:
    """Key of an epoch's detection; clusters : that a person named, None for those of the rule."""
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
        {"backend": "numpy", "dtype": "float32"}
        if card.window_px == 1
        else {"backend": "torch", "dtype": "float32", "device": device},
    )


def tile_keys(
    layer: LayerPlan, tiles: Tiles, scenes: SceneTable, touching: Sequence[SceneTable]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Key of each tile of a layer, and the positions in `scenes` of what it reads.

    touching : those of `scenes` that touch each tile, for all layers at once: outlines of tiles are dear
    """
    pool = scenes.role("dem") if layer.window is None else scenes.role("optical").within(layer.window)
    chosen = {id(scene) for scene in pool}
    position = {id(scene): i for i, scene in enumerate(scenes.scenes)}
    keys, reads = {}, {}
    for tile, there in zip(tiles.keys, touching, strict=True):
        read = SceneTable(scenes=tuple(scene for scene in there if id(scene) in chosen))
        keys[tile] = task_key(layer.key, tile, read)
        reads[tile] = tuple(position[id(scene)] for scene in read)
    return keys, reads
