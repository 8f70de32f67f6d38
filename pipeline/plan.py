"""Plans: the frozen decision of what a run reads, makes and calls done.

A plan is made once from a TOML: the area, the grid, the tiles, the frozen scene list, and the key of every piece of
work. Workers read it and never search. An unchanged TOML finds its plan again; `refresh` searches anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Literal

import numpy as np
import shapely

from slidecube.catalog.aoi import Aoi, read_aoi
from slidecube.catalog.failover import Sought, seek
from slidecube.catalog.grid import TileGrid, Tiles, choose_crs
from slidecube.catalog.scenes import Scene, SceneTable, Window, footprints
from slidecube.models.ensembles import Ensemble
from slidecube.models.errors import ModelError
from slidecube.models.network import Network
from slidecube.models.network_cost import cost_of
from slidecube.models.predict import Detector
from slidecube.pipeline.config import Config
from slidecube.pipeline.coregistration import margin_px
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.estimate import estimate
from slidecube.pipeline.features import required_variables
from slidecube.pipeline.keys import SCHEMA_VERSION, content_key
from slidecube.pipeline.model_registry import adopt, card_at_paths, chosen_network, require_adopted
from slidecube.pipeline.plan_dem import search_dem
from slidecube.pipeline.plan_files import Index, read_plan, search_key, write_plan
from slidecube.pipeline.plan_keys import (
    around_tiles,
    auxiliary_layer_plan,
    computed_terms,
    dem_reach_m,
    detect_key_of,
    land_cover_layer_plan,
    optical_layer_plan,
    radar_layer_plan,
    stat_key_of,
    terrain_layer_plan,
    tile_keys,
    tree_key_of,
)
from slidecube.pipeline.plan_layers import search_layers
from slidecube.pipeline.plan_radar import require_one_quantity, search_radar
from slidecube.pipeline.points import Points, farmland_codes, read_points
from slidecube.pipeline.run_plan import (
    EpochPlan,
    LayerPlan,
    RunPlan,
    computed_as_configured,
    coregistration_of,
    fit_terms,
    halo_px,
    learns,
    model_of,
    reads_radar,
    series_variables,
    terrain_variables,
)
from slidecube.pipeline.statistics import load_statistics, read_manifest
from slidecube.pipeline.storage import fetched
from slidecube.pipeline.store import Workspace
from slidecube.pipeline.strata import Strata, read_strata
from slidecube.pipeline.sunlight import required_sun


def _require_statistics(workspace: Workspace, config: Config, model: Detector) -> None:
    """Refuse now statistics that are not there, or of another model."""
    if config.fit.statistics is None:
        return
    if not learns(model.card):
        raise PipelineError(
            f"Model {model.card.address} learns nothing from the cube; leave [fit] statistics out"
        )
    folder = workspace.statistics(config.fit.statistics)
    load_statistics(folder, model)
    fitted, own = read_manifest(folder)["cube"], fit_terms(config)
    other = [f"{name} = {fitted[name]!r}, not {own[name]!r}" for name in own if fitted.get(name) != own[name]]
    if other:
        raise PipelineError(
            f"Statistics {config.fit.statistics} were fitted to another cube: {'; '.join(other)}; set that back, or "
            "leave [fit] statistics out"
        )


@contextmanager
def _of_the_toml(config: Config) -> Iterator[None]:
    """Name the TOML in a refusal of what it says, as those do that need nothing but it."""
    try:
        yield
    except (ModelError, PipelineError) as error:
        raise PipelineError(f"{config.path}: {error}") from None


def _require_halo(config: Config, model: Detector, grid: TileGrid) -> None:
    held = coregistration_of(config, model.card)
    halo = halo_px(model.card, grid) + (margin_px(held.exclude_px) if held and held.correct else 0)
    if halo > grid.tile_px:
        context = model.card.window_px // 2
        network = f", {context} px of it for the windows of {model.card.address}" if context else ""
        raise PipelineError(
            f"min_area_m2={model.card.min_area_m2:g} needs a halo of {halo} px{network}, wider than a tile of "
            f"{grid.tile_px} px; lower it or raise tile_px"
        )


def plan(config: Config, *, refresh: bool = False) -> RunPlan:
    """Make the plan of a configuration, or find the one that it already has.

    refresh : search the catalogues again
    Raises PipelineError or CatalogError: no tiles, no scene in a window, an unknown model, ...
    """
    workspace = Workspace.at(config.workspace)
    index = Index.read(workspace)
    known = index.runs.get(f"{config.stem} {content_key(config.science())}")
    if known and not refresh and (workspace.plan(known) / "plan.json").exists():
        found = read_plan(workspace, known, config=config)
        if _is_current(found):
            _require_network(found)
            index.remember(workspace, found)
            return replace(found, reused_scenes=True)
    with _of_the_toml(config):
        model = _model(config, workspace)
    aoi = read_aoi(config.aoi)
    crs = config.area.crs or choose_crs(aoi)
    grid = TileGrid(crs=crs, resolution_m=config.area.resolution_m, tile_px=config.cube.tile_px)
    with _of_the_toml(config):
        _require_halo(config, model, grid)
    tiles = grid.tiles(aoi)
    if not tiles:
        raise PipelineError(
            f"The AOI {aoi.name!r} covers no pixel of the grid {grid.key}; check its coordinates"
        )
    points = _points(config, grid, tiles)
    farmland_codes(config.ground.farmland, points)  # refuses what is no class
    reach_m = dem_reach_m(config, terrain_variables(model.card, config))
    earlier = index.searches.get(search_key(config, tiles, reach_m))
    if earlier and not refresh and (workspace.plan(earlier) / "scenes.parquet").exists():
        with fetched(workspace.plan(earlier) / "scenes.parquet") as file:
            scenes, reused = SceneTable.read_parquet(file), True
    else:
        scenes, reused = _search(config, aoi, _tiled(aoi, tiles), reach_m), False
    # a search that is known may have been made for other settings
    _require_bands(config, scenes.role("optical"))
    require_one_quantity(config, scenes.role("radar"))
    made = _assemble(
        config,
        workspace=workspace,
        aoi=aoi,
        grid=grid,
        tiles=tiles,
        scenes=scenes,
        model=model,
        points=points,
    )
    write_plan(made)
    index.remember(workspace, made)
    return replace(made, reused_scenes=reused)


def _model(config: Config, workspace: Workspace) -> Detector:
    """Build or find the detector; a network is adopted when all that can be said of it by now is in order."""
    with chosen_network(config, workspace) as chosen:
        model = computed_as_configured(model_of(config, chosen.detector if chosen else None), config)
        _require_statistics(workspace, config, model)
        if chosen is not None:
            adopt(workspace, chosen.folder, chosen.card)
    return model


def _is_current(made: RunPlan) -> bool:
    """Tell whether the folders that the TOML names hold the network that was planned with, as far as they are there."""
    with _of_the_toml(made.config):
        now = card_at_paths(made.config, made.workspace)
    return now is None or (made.network is not None and now.identity == made.network.content_sha256)


def _require_network(made: RunPlan) -> None:
    """Say once what every tile would say: the network is not in the workspace any more, or is another one."""
    if made.network is not None:
        require_adopted(made.workspace, made.network)


def _points(config: Config, grid: TileGrid, tiles: Tiles) -> Points | None:
    settings = config.land_cover
    if settings is None:
        return None
    path = config.resolve(settings.points)
    with _of_the_toml(config):
        return read_points(path, column=settings.column, grid=grid, tiles=tiles, fewest=settings.min_points)


def named_plan(config: Config, run: str) -> RunPlan:
    """Read a plan by its name, for a job that must not search; it holds whatever became of its TOML since.

    Raises PipelineError when there is none of this name.
    """
    workspace = Workspace.at(config.workspace)
    found = read_plan(workspace, run)
    _require_network(found)
    same = found.config.science() == config.science()
    return replace(found, config=config if same else found.config, reused_scenes=True)


def _tiled(aoi: Aoi, tiles: Tiles) -> Aoi:
    """Area of whole tiles: what a tile holds must not depend on how much of it the area covers, or a grown area would
    read every tile at its old edge again.
    """
    boxes = [shapely.box(*tile.geobox.boundingbox.bbox) for tile in tiles]
    return Aoi(name=aoi.name, geometry=shapely.union_all(boxes), crs=str(tiles[0].geobox.crs))


def _widened(tiled: Aoi, by_m: float) -> Aoi:
    """Area of the tiles and their surroundings, where the DEM throws shadow and gathers water."""
    return Aoi(name=tiled.name, geometry=tiled.geometry.buffer(by_m, join_style="mitre"), crs=tiled.crs)


def _search(config: Config, aoi: Aoi, tiled: Aoi, reach_m: float) -> SceneTable:
    """Find the scenes and the DEM of all tiles; an epoch without any scene over the area itself is refused.

    reach_m : how far around the tiles the DEM is looked at
    """
    sources = config.sources
    windows = sorted({span for e in config.epochs for w in e.windows.values() for span in w.spans}, key=str)
    found = seek(
        [config.source(name) for name in (sources.optical, *sources.fallback)],
        tiled,
        windows,
        max_cloud_pct=config.cube.max_cloud_pct,
    )
    optical = [scene for scene in found.scenes if any(band.startswith("B") for band in scene.bands)]
    area = aoi.to_crs("EPSG:4326")
    over = list(compress(optical, shapely.intersects(area, footprints(optical)))) if optical else []
    for epoch in config.epochs:
        for side, window in epoch.windows.items():
            if not any(scene.datetime in window for scene in over):
                raise PipelineError(
                    f"Epoch {epoch.name!r} has no {side}-event scene between {window.start} and {window.end} "
                    f"in {_as_written(config, found.sourcing.used)!r} over {aoi.name!r} with at most "
                    f"{config.cube.max_cloud_pct:g} % cloud; widen the window or raise max_cloud_pct"
                    f"{_elsewhere(found, window)}"
                )
    heights = search_dem(config, _widened(tiled, reach_m))
    dem = [scene for scene in heights.scenes if "elevation" in scene.bands]  # a catalogue may hold both
    if not dem:
        raise PipelineError(
            f"Source {_as_written(config, heights.sourcing.used)!r} has no DEM over {aoi.name!r}; name another one "
            "in [sources]"
        )
    sourcing = (found.sourcing, heights.sourcing)
    with _of_the_toml(config):
        rasters = search_layers(config, tiled)
    radar = search_radar(config, aoi, tiled) if sources.radar else None
    if radar is not None:
        return SceneTable(
            scenes=(*optical, *dem, *radar.scenes, *rasters), sourcing=(*sourcing, radar.sourcing)
        )
    return SceneTable(scenes=(*optical, *dem, *rasters), sourcing=sourcing)


def _as_written(config: Config, source: str) -> str:
    """Return a source as the TOML names it."""
    sources = config.sources
    named = (sources.optical, sources.dem, *sources.fallback, *sources.fallback_dem)
    return next((name for name in named if config.source(name) == source), source)


def _elsewhere(found: Sought, window: Window) -> str:
    """Say which fallback has what is missing: a source that has nothing is not down, so none takes its place."""
    counts = {name: sum(when in window for when in times) for name, times in found.elsewhere.items()}
    holds = [f"{name!r} holds {n} there, of any cloud" for name, n in counts.items() if n]
    return f", or name another source as optical ({', '.join(holds)})" if holds else ""


def _require_bands(config: Config, optical: Iterable[Scene]) -> None:
    """Refuse now what would fail on every tile later."""
    for scene in optical:
        if config.cube.sun.reads_heights:
            required_sun(scene)
        missing = [band for band in config.cube.bands if band not in scene.bands]
        if missing:
            raise PipelineError(
                f"Scene {scene.id!r} of {scene.source!r} has no band {', '.join(missing)}; "
                f"it has {', '.join(scene.bands)}; name only such bands in [cube] bands"
            )
        if "SCL" not in scene.bands:
            raise PipelineError(
                f"Scene {scene.id!r} of {scene.source!r} has no scene classification (SCL), by which clouds "
                "are masked; use a Level-2A source"
            )
        if config.cube.mask.cloud_pct is not None and "CLD" not in scene.bands:
            raise PipelineError(
                f"Scene {scene.id!r} of {scene.source!r} has no cloud probability (CLD), which [cube.mask] cloud_pct "
                "asks for; leave it out, or use source 'earth-search/sentinel-2-c1-l2a'"
            )


def _assemble(
    config: Config,
    *,
    workspace: Workspace,
    aoi: Aoi,
    grid: TileGrid,
    tiles: Tiles,
    scenes: SceneTable,
    model: Detector,
    points: Points | None,
) -> RunPlan:
    terrain = terrain_layer_plan(config, grid, scenes, terrain_variables(model.card, config))
    series = series_variables(model.card)
    sides = [
        {
            side: optical_layer_plan(config, grid, w, scenes, side=side, series=series)
            for side, w in epoch.windows.items()
        }
        for epoch in config.epochs
    ]
    radar = [
        {f"radar_{side}": radar_layer_plan(config, grid, w, scenes) for side, w in epoch.windows.items()}
        if config.sources.radar
        else {}
        for epoch in config.epochs
    ]
    own = [auxiliary_layer_plan(grid, layer) for layer in config.layers]
    layers = {la.name: la for la in (terrain, *(la for by in (*sides, *radar) for la in by.values()), *own)}
    touching = list(scenes.touching_each([tile.geobox for tile in tiles]))
    around = {0.0: touching} | {
        m: around_tiles(grid, tiles, scenes, touching, m)
        for m in {layer.heights_m for layer in layers.values() if layer.heights_m}
    }
    found = {
        name: tile_keys(layer, tiles, scenes, around[layer.heights_m or 0.0])
        for name, layer in layers.items()
    }
    keys = {name: by for name, (by, _) in found.items()}
    reads = {name: by for name, (_, by) in found.items()}
    covers = [
        _land_cover(config, grid, (points, tiles), {**optical, **seen, "terrain": terrain}, keys)
        for optical, seen in zip(sides, radar, strict=True)
    ]
    for cover in covers:
        if cover is not None:
            layers[cover.layer.name] = cover.layer
            keys[cover.layer.name], reads[cover.layer.name] = cover.keys, cover.reads
    raster = next((la for la in own if la.feature == "land_cover"), None)
    # the outline counts, too: it decides what is looked at, and another one is another inventory
    outline = [shapely.to_wkb(aoi.geometry, hex=True), aoi.crs]
    epochs = []
    for epoch, optical, seen, cover in zip(config.epochs, sides, radar, covers, strict=True):
        wanted = {
            *required_variables(model.card.inputs)["auxiliary"],
            *(["land_cover"] if config.ground.farmland else []),
        }
        rasters = [*own, *([cover.layer] if cover else [])]
        read_too = {
            la.feature: la for la in sorted(rasters, key=lambda la: la.feature) if la.feature in wanted
        }
        by = {**optical, **(seen if reads_radar(model.card) else {}), **read_too}
        read = _read_layers(by, terrain)
        contributing = [[keys[layer.name][tile] for layer in read] for tile in tiles.keys]
        terms = [contributing, outline, *([config.fit_terms()] if config.fit_terms() else [])]
        made = _epoch_plan(config, epoch.name, by, terrain, model=model, terms=terms)
        if cover is not None:
            made = replace(
                made, land_cover=cover.layer.name, tree_key=cover.tree_key, tree_radar=cover.tree_radar
            )
        elif raster is not None:
            made = replace(made, land_cover=raster.name)
        epochs.append(made)
    _require_fits(config, epochs)
    extent = [
        int(found) for found in (tiles.rows.min(), tiles.cols.min(), tiles.rows.max(), tiles.cols.max())
    ]
    inventory_key = content_key(
        "inventory", [[e.name, e.detect_key] for e in epochs], grid.key, extent, outline
    )
    content = model.card.content_sha256  # of a network; its name may mean another one tomorrow
    digest = content_key(
        "plan", SCHEMA_VERSION, config.science(), scenes.digest, tiles.keys, *([content] if content else [])
    )
    return RunPlan(
        run=f"{config.stem}-{digest[:8]}",
        workspace=workspace,
        config=config,
        aoi=aoi,
        grid=grid,
        tiles=tiles,
        scenes=scenes,
        layers=tuple(layers.values()),
        epochs=tuple(epochs),
        keys=keys,
        reads=reads,
        inventory=f"{config.stem}-{model.card.name}-{inventory_key[:8]}",
        strata=_strata(config, grid, tiles),
        points=points,
        network=model.card if content else None,
        estimate=estimate(
            config,
            grid,
            card=model.card,
            tiles=len(tiles),
            scenes=len(scenes),
            dates=_dates(layers, reads, scenes, "optical"),
            radar_dates=_dates(layers, reads, scenes, "radar"),
            rasters=_rasters(layers, reads),
            network=cost_of(model) if isinstance(model, Network | Ensemble) else None,
        ),
    )


def _strata(config: Config, grid: TileGrid, tiles: Tiles) -> Strata | None:
    """Read the strata of the tiles and of what lies around them."""
    fit = config.fit
    if fit.strata is None:
        return None
    boxes = [tile.geobox.boundingbox.bbox for tile in tiles]
    lows, highs = (np.array([box[at] for box in boxes]) for at in (slice(0, 2), slice(2, 4)))
    around_m = grid.tile_px * grid.resolution_m + 2 * fit.strata_blend_m  # a tile reads into its neighbours
    left, bottom = lows.min(axis=0) - around_m
    right, top = highs.max(axis=0) + around_m
    bounds = (float(left), float(bottom), float(right), float(top))
    with _of_the_toml(config):
        return read_strata(config.resolve(fit.strata), field=fit.strata_field, bounds=bounds, crs=grid.crs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cover:
    """Classified land cover of an epoch: its layer, the keys of its tiles, what they read, and its tree."""

    layer: LayerPlan
    keys: dict[str, str]
    reads: dict[str, tuple[int, ...]]
    tree_key: str
    tree_radar: str | None


def _land_cover(
    config: Config,
    grid: TileGrid,
    learnt: tuple[Points | None, Tiles],
    by: Mapping[str, LayerPlan],
    keys: Mapping[str, Mapping[str, str]],
) -> _Cover | None:
    """Plan the land cover of an epoch; learnt : points and all tiles; by : its layers; keys : of their tiles."""
    (points, tiles), settings = learnt, config.land_cover
    if points is None or settings is None:
        return None
    radar = by.get("radar_pre") if settings.radar else None
    inputs = [by["pre"], by["terrain"], *([radar] if radar else [])]
    under = {tile: [keys[layer.name][tile] for layer in inputs] for tile in tiles.keys}
    window = by["pre"].window
    assert window is not None
    tree_key = tree_key_of(inputs, points, settings, [[under[tile] for tile in points.tiles(grid)]])
    layer = land_cover_layer_plan(grid, window, tree_key)
    return _Cover(
        layer=layer,
        keys={tile: content_key(layer.key, tile, read) for tile, read in under.items()},
        reads=dict.fromkeys(under, ()),
        tree_key=tree_key,
        tree_radar=radar.name if radar else None,
    )


def _dates(
    layers: Mapping[str, LayerPlan],
    reads: Mapping[str, Mapping[str, tuple[int, ...]]],
    scenes: SceneTable,
    kind: Literal["optical", "radar"],
) -> dict[str, dict[str, int]]:
    """Count the scenes of a role that each tile of each layer of a kind reads."""
    of_kind = [scene.role == kind for scene in scenes]
    return {
        name: {tile: sum(of_kind[i] for i in read) for tile, read in by.items()}
        for name, by in reads.items()
        if layers[name].kind == kind
    }


def _rasters(
    layers: Mapping[str, LayerPlan], reads: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, int]:
    """Count the rasters that the tiles of each layer of the TOML read."""
    return {
        name: sum(len(read) for read in by.values())
        for name, by in reads.items()
        if layers[name].kind in ("auxiliary", "land-cover")
    }


def _read_layers(sides: Mapping[str, LayerPlan], terrain: LayerPlan) -> tuple[LayerPlan, ...]:
    """Layers that an epoch reads, in the order of its keys: optical, terrain, radar, those of the TOML."""
    optical, radar = (
        [layer for layer in sides.values() if layer.kind == kind] for kind in ("optical", "radar")
    )
    return (*optical, terrain, *radar, *(layer for layer in sides.values() if layer.feature))


def _epoch_plan(
    config: Config,
    name: str,
    sides: Mapping[str, LayerPlan],
    terrain: LayerPlan,
    *,
    model: Detector,
    terms: list[Any],
) -> EpochPlan:
    """Key an epoch; terms : what its statistics are made of beside the layers."""
    read = _read_layers(sides, terrain)
    stat_key, held = "", coregistration_of(config, model.card)
    if learns(model.card):
        stat_key = config.fit.statistics or stat_key_of(read, model, terms, held)
    chosen = (config.detect.landslide_clusters or {}).get(stat_key)
    return EpochPlan(
        name=name,
        pre=sides["pre"].name if "pre" in sides else None,
        post=sides["post"].name,
        radar_pre=sides["radar_pre"].name if "radar_pre" in sides else None,
        radar_post=sides["radar_post"].name if "radar_post" in sides else None,
        terrain=terrain.name,
        auxiliary={layer.feature: layer.name for layer in sides.values() if layer.feature},
        stat_key=stat_key,
        detect_key=detect_key_of(
            read,
            model.card,
            stat_key,
            chosen,
            computed=computed_terms(model, config.detect.device),
            held=held,
            ground=config.ground_terms(),
        ),
    )


def _require_fits(config: Config, epochs: list[EpochPlan]) -> None:
    """Refuse clusters of a fit that this plan does not use: another fit numbers them anew."""
    fits = {epoch.stat_key: epoch.name for epoch in epochs}
    foreign = [key for key in config.detect.landslide_clusters or {} if key not in fits]
    if foreign:
        own = ", ".join(f"{key} ({name})" for key, name in fits.items())
        raise PipelineError(
            f"landslide_clusters names the fit {foreign[0]}, and this plan uses {own}; another fit numbers its "
            "clusters anew: leave that line out, run `slidecube fit`, and look at the new sheet"
        )
