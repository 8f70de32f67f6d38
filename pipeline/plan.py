"""Plans: the frozen decision of what a run reads, makes and calls done.

A plan is made once from a TOML: the area, the grid, the tiles, the frozen scene list, and the key of every piece of
work. Workers read it and never search. An unchanged TOML finds its plan again; `refresh` searches anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import compress
from typing import Any

import shapely

from slidecube.catalog.aoi import Aoi, read_aoi
from slidecube.catalog.failover import Sought, seek
from slidecube.catalog.grid import TileGrid, Tiles, choose_crs
from slidecube.catalog.scenes import Scene, SceneTable, Window, footprints
from slidecube.models.predict import Detector
from slidecube.pipeline.config import Config
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.estimate import estimate
from slidecube.pipeline.keys import SCHEMA_VERSION, content_key
from slidecube.pipeline.plan_files import Index, read_plan, search_key, write_plan
from slidecube.pipeline.plan_keys import (
    detect_key_of,
    optical_layer_plan,
    stat_key_of,
    terrain_layer_plan,
    tile_keys,
)
from slidecube.pipeline.run_plan import (
    EpochPlan,
    LayerPlan,
    RunPlan,
    fit_terms,
    halo_px,
    learns,
    model_of,
    series_variables,
    terrain_variables,
)
from slidecube.pipeline.statistics import load_statistics, read_manifest
from slidecube.pipeline.storage import fetched
from slidecube.pipeline.store import Workspace


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


def _require_halo(model: Detector, grid: TileGrid) -> None:
    halo = halo_px(model.card, grid)
    if halo > grid.tile_px:
        raise PipelineError(
            f"min_area_m2={model.card.min_area_m2:g} needs a halo of {halo} px, wider than a tile of "
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
        index.remember(workspace, found)
        return replace(found, reused_scenes=True)
    model = model_of(config)
    _require_statistics(workspace, config, model)
    aoi = read_aoi(config.aoi)
    crs = config.area.crs or choose_crs(aoi)
    grid = TileGrid(crs=crs, resolution_m=config.area.resolution_m, tile_px=config.cube.tile_px)
    _require_halo(model, grid)
    tiles = grid.tiles(aoi)
    if not tiles:
        raise PipelineError(
            f"The AOI {aoi.name!r} covers no pixel of the grid {grid.key}; check its coordinates"
        )
    earlier = index.searches.get(search_key(config, tiles))
    if earlier and not refresh and (workspace.plan(earlier) / "scenes.parquet").exists():
        with fetched(workspace.plan(earlier) / "scenes.parquet") as file:
            scenes, reused = SceneTable.read_parquet(file), True
    else:
        scenes, reused = _search(config, aoi, _tiled(aoi, tiles)), False
    made = _assemble(config, workspace=workspace, aoi=aoi, grid=grid, tiles=tiles, scenes=scenes, model=model)
    write_plan(made)
    index.remember(workspace, made)
    return replace(made, reused_scenes=reused)


def named_plan(config: Config, run: str) -> RunPlan:
    """Read a plan by its name, for a job that must not search; it holds whatever became of its TOML since.

    Raises PipelineError when there is none of this name.
    """
    workspace = Workspace.at(config.workspace)
    found = read_plan(workspace, run)
    same = found.config.science() == config.science()
    return replace(found, config=config if same else found.config, reused_scenes=True)


def _tiled(aoi: Aoi, tiles: Tiles) -> Aoi:
    """Area of whole tiles: what a tile holds must not depend on how much of it the area covers, or a grown area would
    read every tile at its old edge again.
    """
    boxes = [shapely.box(*tile.geobox.boundingbox.bbox) for tile in tiles]
    return Aoi(name=aoi.name, geometry=shapely.union_all(boxes), crs=str(tiles[0].geobox.crs))


def _search(config: Config, aoi: Aoi, tiled: Aoi) -> SceneTable:
    """Find the scenes and the DEM of all tiles; an epoch without any scene over the area itself is refused."""
    sources = config.sources
    windows = sorted({w for e in config.epochs for w in e.windows.values()}, key=str)
    found = seek(
        [config.source(name) for name in (sources.optical, *sources.fallback)],
        tiled,
        windows,
        max_cloud_pct=config.cube.max_cloud_pct,
    )
    optical = [scene for scene in found.scenes if any(band.startswith("B") for band in scene.bands)]
    _require_bands(config, optical)
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
    heights = seek(
        [config.source(name) for name in (sources.dem, *sources.fallback_dem)], tiled, None, role="dem"
    )
    dem = [scene for scene in heights.scenes if "elevation" in scene.bands]  # a catalogue may hold both
    if not dem:
        raise PipelineError(
            f"Source {_as_written(config, heights.sourcing.used)!r} has no DEM over {aoi.name!r}; name another one "
            "in [sources]"
        )
    return SceneTable(scenes=(*optical, *dem), sourcing=(found.sourcing, heights.sourcing))


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


def _require_bands(config: Config, optical: list[Scene]) -> None:
    """Refuse now what would fail on every tile later."""
    for scene in optical:
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


def _assemble(
    config: Config,
    *,
    workspace: Workspace,
    aoi: Aoi,
    grid: TileGrid,
    tiles: Tiles,
    scenes: SceneTable,
    model: Detector,
) -> RunPlan:
    terrain = terrain_layer_plan(config, grid, scenes, terrain_variables(model.card))
    series = series_variables(model.card)
    sides = [
        {
            side: optical_layer_plan(config, grid, w, scenes, series=series)
            for side, w in epoch.windows.items()
        }
        for epoch in config.epochs
    ]
    layers = {la.name: la for la in (terrain, *(la for by in sides for la in by.values()))}
    touching = list(scenes.touching_each([tile.geobox for tile in tiles]))
    made = {name: tile_keys(layer, tiles, scenes, touching) for name, layer in layers.items()}
    keys = {name: by for name, (by, _) in made.items()}
    reads = {name: by for name, (_, by) in made.items()}
    # the outline counts, too: it decides what is looked at, and another one is another inventory
    outline = [shapely.to_wkb(aoi.geometry, hex=True), aoi.crs]
    epochs = []
    for epoch, by in zip(config.epochs, sides, strict=True):
        read = (*by.values(), terrain)
        contributing = [[keys[layer.name][tile] for layer in read] for tile in tiles.keys]
        epochs.append(
            _epoch_plan(config, epoch.name, by, terrain, model=model, terms=[contributing, outline])
        )
    _require_fits(config, epochs)
    extent = [
        int(found) for found in (tiles.rows.min(), tiles.cols.min(), tiles.rows.max(), tiles.cols.max())
    ]
    inventory_key = content_key(
        "inventory", [[e.name, e.detect_key] for e in epochs], grid.key, extent, outline
    )
    digest = content_key("plan", SCHEMA_VERSION, config.science(), scenes.digest, tiles.keys)
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
        estimate=estimate(
            config,
            grid,
            card=model.card,
            tiles=len(tiles),
            scenes=len(scenes),
            dates={n: {t: len(s) for t, s in by.items()} for n, by in reads.items() if n != terrain.name},
        ),
    )


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
    read = (*sides.values(), terrain)
    stat_key = ""
    if learns(model.card):
        stat_key = config.fit.statistics or stat_key_of(read, model, terms)
    chosen = (config.detect.landslide_clusters or {}).get(stat_key)
    return EpochPlan(
        name=name,
        pre=sides["pre"].name if "pre" in sides else None,
        post=sides["post"].name,
        terrain=terrain.name,
        stat_key=stat_key,
        detect_key=detect_key_of(read, model.card, stat_key, chosen, device=config.detect.device),
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
