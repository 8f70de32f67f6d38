"""Plans: the frozen decision of what a run reads, makes and calls done.

A plan is made once from a TOML: the area, the grid, the tiles, the frozen scene list, and the key of every piece of
work. Workers read it and never search. An unchanged TOML finds its plan again; `refresh` searches anew.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import geopandas as gpd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import shapely

from slidecube.catalog.aoi import Aoi, read_aoi
from slidecube.catalog.failover import Sought, seek
from slidecube.catalog.grid import Tile, TileGrid, choose_crs
from slidecube.catalog.scenes import Scene, SceneTable, Window, footprints
from slidecube.catalog.sources import SOURCES
from slidecube.models.card import ModelCard
from slidecube.models.predict import Detector
from slidecube.models.unsupervised import Kmeans
from slidecube.models.zoo import build_model
from slidecube.pipeline.composite import DATE_VARIABLES
from slidecube.pipeline.config import Config, load_config
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.estimate import Estimate, estimate
from slidecube.pipeline.features import mnf_images, required_variables
from slidecube.pipeline.keys import SCHEMA_VERSION, content_key, task_key
from slidecube.pipeline.ledger import write_atomic
from slidecube.pipeline.lock import guard
from slidecube.pipeline.statistics import load_statistics, read_manifest
from slidecube.pipeline.store import Workspace

TERRAIN_VARIABLES = ("elevation", "slope_deg", "aspect_deg")


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
    tasks : layer -> tile -> (task key, positions in `scenes` of what is read)
    reused_scenes : the scene list came from an earlier plan, nothing was searched
    """

    run: str
    workspace: Workspace
    config: Config
    aoi: Aoi
    grid: TileGrid
    tiles: tuple[Tile, ...]
    scenes: SceneTable
    layers: tuple[LayerPlan, ...]
    epochs: tuple[EpochPlan, ...]
    tasks: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
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
        return [self.scenes.scenes[i] for i in self.tasks[layer][tile][1]]

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
        return [*self.config.cube.bands, *DATE_VARIABLES]


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
    for side in ("pre", "post"):
        for band in needed[side]:
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
    index = _Index.read(workspace)
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
    earlier = index.searches.get(_search_key(config, tiles))
    if earlier and not refresh and (workspace.plan(earlier) / "scenes.parquet").exists():
        scenes, reused = SceneTable.read_parquet(workspace.plan(earlier) / "scenes.parquet"), True
    else:
        scenes, reused = _search(config, aoi, _tiled(aoi, tiles)), False
    made = _assemble(config, workspace=workspace, aoi=aoi, grid=grid, tiles=tiles, scenes=scenes, model=model)
    _write(made)
    index.remember(workspace, made)
    return replace(made, reused_scenes=reused)


def read_plan(workspace: Workspace, run: str, *, config: Config | None = None) -> RunPlan:
    """Read a plan back.

    config : the configuration as it stands now, whose machine settings count; the plan's own when left out
    """
    folder = workspace.plan(run)
    if not (folder / "plan.json").exists():
        raise PipelineError(f"No plan {run!r} in {workspace.root}; make it with `slidecube plan`")
    try:
        return _read_folder(folder, workspace, config)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        pa.ArrowException,
        pyogrio.errors.DataSourceError,
    ) as error:
        raise PipelineError(
            f"Plan {folder} is damaged ({' '.join(str(error).split())[:160]}); remove this folder and plan again, "
            "what is done stays done"
        ) from None


def _read_folder(folder: Path, workspace: Workspace, config: Config | None) -> RunPlan:
    raw = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    frame = gpd.read_file(folder / "aoi.geojson")
    grid = TileGrid(**raw["grid"])
    table = pq.read_table(folder / "tiles.parquet").to_pylist()
    return RunPlan(
        run=folder.name,
        workspace=workspace,
        config=config or load_config(folder / "run.toml", base=Path(raw["base"])),
        aoi=Aoi(name=raw["aoi"], geometry=frame.geometry.iloc[0]),
        grid=grid,
        tiles=tuple(grid.tile_of(row["tile"]) for row in table),
        scenes=SceneTable.read_parquet(folder / "scenes.parquet"),
        layers=tuple(_layer_from(entry) for entry in raw["layers"]),
        epochs=tuple(EpochPlan(**entry) for entry in raw["epochs"]),
        tasks={
            entry["name"]: {
                row["tile"]: (row[f"{entry['name']}.key"], tuple(row[f"{entry['name']}.scenes"]))
                for row in table
            }
            for entry in raw["layers"]
        },
        inventory=raw["inventory"],
        estimate=Estimate(**raw["estimate"]),
    )


def current_run(workspace: Workspace) -> str | None:
    """Name of the plan that was last made or used in a workspace."""
    return _Index.read(workspace).latest or None


def known_runs(workspace: Workspace) -> dict[str, str]:
    """Plans that a TOML can still ask for: the newest of each TOML, by its path."""
    index = _Index.read(workspace)
    return dict(index.newest)


@dataclass(slots=True)
class _Index:
    """Which plan answers which TOML and which search: `plans/index.json`."""

    runs: dict[str, str] = field(default_factory=dict)
    searches: dict[str, str] = field(default_factory=dict)
    newest: dict[str, str] = field(default_factory=dict)
    latest: str = ""

    @classmethod
    def read(cls, workspace: Workspace) -> _Index:
        try:
            index = cls(**json.loads((workspace.root / "plans" / "index.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError):  # only speeds things up: a damaged one is made anew
            return cls()
        tables = (index.runs, index.searches, index.newest)
        return index if all(isinstance(table, dict) for table in tables) else cls()

    def remember(self, workspace: Workspace, made: RunPlan) -> None:
        before = asdict(self)
        self.note(made)
        if asdict(self) == before:
            return
        with guard(workspace.locks / "plans"):  # another plan may have been made since we read
            fresh = _Index.read(workspace)
            fresh.note(made)
            write_atomic(
                workspace.root / "plans" / "index.json", json.dumps(asdict(fresh), indent=1, sort_keys=True)
            )

    def note(self, made: RunPlan) -> None:
        """Take a plan in."""
        config = made.config
        self.runs[f"{config.stem} {content_key(config.science())}"] = made.run
        self.searches[_search_key(config, made.tiles)] = made.run
        self.newest[str(config.path)] = made.run
        self.latest = made.run


def _search_key(config: Config, tiles: tuple[Tile, ...]) -> str:
    return content_key(config.search_terms(), str(tiles[0].geobox.crs), [tile.key for tile in tiles])


def _tiled(aoi: Aoi, tiles: tuple[Tile, ...]) -> Aoi:
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
    tiles: tuple[Tile, ...],
    scenes: SceneTable,
    model: Detector,
) -> RunPlan:
    terrain = _terrain_layer(config, grid, scenes)
    sides = [
        {side: _optical_layer(config, grid, w, scenes) for side, w in epoch.windows.items()}
        for epoch in config.epochs
    ]
    layers = {la.name: la for la in (terrain, *(la for by in sides for la in by.values()))}
    tasks = {layer.name: _tasks(layer, tiles, scenes) for layer in layers.values()}
    # the outline counts, too: it decides what is looked at, and another one is another inventory
    outline = [shapely.to_wkb(aoi.geometry, hex=True), aoi.crs]
    epochs = []
    for epoch, by in zip(config.epochs, sides, strict=True):
        read = (*by.values(), terrain)
        contributing = [[tasks[layer.name][tile.key][0] for layer in read] for tile in tiles]
        stat_key = (
            config.fit.statistics or _stat_key(read, model, contributing, outline)
            if learns(model.card)
            else ""
        )
        chosen = (config.detect.landslide_clusters or {}).get(stat_key)
        epochs.append(
            EpochPlan(
                name=epoch.name,
                pre=by["pre"].name if "pre" in by else None,
                post=by["post"].name,
                terrain=terrain.name,
                stat_key=stat_key,
                detect_key=_detect_key(read, model.card, stat_key, chosen),
            )
        )
    _require_fits(config, epochs)
    extent = [
        min(t.row for t in tiles),
        min(t.col for t in tiles),
        max(t.row for t in tiles),
        max(t.col for t in tiles),
    ]
    inventory_key = content_key(
        "inventory", [[e.name, e.detect_key] for e in epochs], grid.key, extent, outline
    )
    digest = content_key("plan", SCHEMA_VERSION, config.science(), scenes.digest, [t.key for t in tiles])
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
        tasks=tasks,
        inventory=f"{config.stem}-{model.card.name}-{inventory_key[:8]}",
        estimate=estimate(
            config,
            grid,
            card=model.card,
            tiles=len(tiles),
            scenes=len(scenes),
            dates={
                n: {t: len(s) for t, (_, s) in by.items()} for n, by in tasks.items() if n != terrain.name
            },
        ),
    )


def _optical_layer(config: Config, grid: TileGrid, window: Window, scenes: SceneTable) -> LayerPlan:
    cube = config.cube
    key = content_key(
        "optical",
        SCHEMA_VERSION,
        grid.key,
        _source_term(scenes.source_of("optical", config.sources.optical)),
        sorted(cube.bands),
        {"classes": sorted(cube.mask.scl_classes), "dilation_px": cube.mask.dilation_px},
        cube.composite,
        str(window),
    )
    return LayerPlan(name=f"optical-{window}-{key[:8]}", kind="optical", key=key, window=window)


def _terrain_layer(config: Config, grid: TileGrid, scenes: SceneTable) -> LayerPlan:
    key = content_key(
        "terrain", SCHEMA_VERSION, grid.key, _source_term(scenes.source_of("dem", config.sources.dem))
    )
    return LayerPlan(name=f"terrain-{key[:8]}", kind="terrain", key=key)


def _source_term(name: str) -> str:
    """What of a source counts in a key: its name; a local one may move or be gone, its scenes count themselves."""
    return name if name in SOURCES else "local"


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


def _stat_key(
    layers: tuple[LayerPlan, ...], model: Detector, contributing: list[list[str]], outline: list[str]
) -> str:
    """Key of what is fitted to the layers of an epoch; contributing : task keys of each tile."""
    card = model.card
    return content_key(
        "statistics",
        SCHEMA_VERSION,
        [layer.key for layer in layers],
        card.address,
        asdict(card.inputs),
        dict(card.parameters),
        card.min_area_m2
        if isinstance(model, Kmeans)
        else None,  # the smallest objects by which clusters are named
        contributing,
        outline,
    )


def _detect_key(
    layers: tuple[LayerPlan, ...], card: ModelCard, stat_key: str, clusters: tuple[int, ...] | None
) -> str:
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
        {"backend": "numpy" if card.window_px == 1 else "torch", "dtype": "float32"},
    )


def _tasks(
    layer: LayerPlan, tiles: tuple[Tile, ...], scenes: SceneTable
) -> dict[str, tuple[str, tuple[int, ...]]]:
    pool = scenes.role("dem") if layer.window is None else scenes.role("optical").within(layer.window)
    position = {id(scene): i for i, scene in enumerate(scenes.scenes)}
    out = {}
    for tile, read in zip(tiles, pool.touching_each([tile.geobox for tile in tiles]), strict=True):
        key = task_key(layer.key, tile.key, read)
        out[tile.key] = (key, tuple(position[id(scene)] for scene in read))
    return out


def _write(made: RunPlan) -> None:
    """Write a plan into its folder: into a temporary one first, then renamed, so that half a plan is never found."""
    folder = made.workspace.plan(made.run)
    if (folder / "plan.json").exists():
        return
    for stale in folder.parent.glob(".*.partial"):  # of a killed driver
        pid = stale.name.split(".")[-2]
        if not (pid.isdigit() and psutil.pid_exists(int(pid))):
            shutil.rmtree(stale, ignore_errors=True)
            stale.unlink(missing_ok=True)
    partial = folder.with_name(f".{made.run}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / "run.toml").write_text(made.config.text, encoding="utf-8")
        made.scenes.to_parquet(partial / "scenes.parquet")
        gpd.GeoDataFrame(
            {"name": [made.aoi.name]}, geometry=[made.aoi.to_crs("EPSG:4326")], crs="EPSG:4326"
        ).to_file(partial / "aoi.geojson", driver="GeoJSON", COORDINATE_PRECISION=15, RFC7946="NO")
        rows = [
            {
                "tile": tile.key,
                "row": tile.row,
                "col": tile.col,
                **{f"{name}.key": by[tile.key][0] for name, by in made.tasks.items()},
                **{f"{name}.scenes": list(by[tile.key][1]) for name, by in made.tasks.items()},
            }
            for tile in made.tiles
        ]
        pq.write_table(pa.Table.from_pylist(rows), partial / "tiles.parquet")
        text = json.dumps(_plan_json(made), indent=1, sort_keys=True)
        (partial / "plan.json").write_text(text, encoding="utf-8")
        with guard(made.workspace.locks / "plans"):
            if not (folder / "plan.json").exists():  # another driver may have been faster
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _plan_json(made: RunPlan) -> dict[str, Any]:
    grid = made.grid
    return {
        "aoi": made.aoi.name,
        "base": str(made.config.base),
        "epochs": [asdict(epoch) for epoch in made.epochs],
        "estimate": asdict(made.estimate),
        "grid": {
            "crs": grid.crs,
            "resolution_m": grid.resolution_m,
            "tile_px": grid.tile_px,
            "block_px": grid.block_px,
        },
        "inventory": made.inventory,
        "layers": [
            {
                "name": la.name,
                "kind": la.kind,
                "key": la.key,
                "window": None if la.window is None else str(la.window),
            }
            for la in made.layers
        ],
        "model": asdict(made.model.card) | {"parameters": dict(made.model.card.parameters)},
        "scenes_digest": made.scenes.digest,
        "schema_version": SCHEMA_VERSION,
        "sources": [asdict(entry) for entry in made.scenes.sourcing],
        "science": made.config.science(),
        "tiles": len(made.tiles),
    }


def _layer_from(entry: dict[str, Any]) -> LayerPlan:
    window = None
    if entry["window"] is not None:
        import datetime as dt  # noqa: PLC0415

        start, end = (dt.date.fromisoformat(day) for day in entry["window"].split("_"))
        window = Window(start=start, end=end)
    return LayerPlan(name=entry["name"], kind=entry["kind"], key=entry["key"], window=window)
