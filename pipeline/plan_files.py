"""Plans on the disk: written once, read back, and found again by the TOML that they answer."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.grid import TileGrid, Tiles
from slidecube.catalog.scenes import SceneTable, Window
from slidecube.models.card import FeatureSpec, ModelCard
from slidecube.pipeline.config import Config, load_config
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.estimate import Estimate
from slidecube.pipeline.keys import SCHEMA_VERSION, content_key
from slidecube.pipeline.plan_keys import dem_reach_m
from slidecube.pipeline.points import Points
from slidecube.pipeline.run_plan import EpochPlan, LayerPlan, RunPlan
from slidecube.pipeline.storage import create, fetched, made_once, read_tagged, swap
from slidecube.pipeline.store import Workspace
from slidecube.pipeline.strata import Strata

INDEX = "index.json"
"""File beside the plans which tells what each of them answers."""

PLAN = "plan.json"
"""File of a plan that is written last."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the cycle collector away while a nation's tiles, hundreds of thousands of small objects, are made.

    None of them is part of a cycle, and to look through them again and again takes a third of the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def read_plan(workspace: Workspace, run: str, *, config: Config | None = None) -> RunPlan:
    """Read a plan back.

    config : the configuration as it stands now, whose machine settings count; the plan's own when left out
    """
    folder = workspace.plan(run)
    if not (folder / PLAN).exists():
        raise PipelineError(f"No plan {run!r} in {workspace.root}; make it with `slidecube plan`")
    try:
        with fetched(folder) as local, collector_paused():
            return _read_folder(local, workspace, config)
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
    raw = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    frame = gpd.read_file(folder / "aoi.geojson")
    grid = TileGrid(**raw["grid"])
    table = pq.read_table(folder / "tiles.parquet").combine_chunks()
    tiles = grid.tiles_at(table["row"], table["col"])
    rows = {tile: row for row, tile in enumerate(tiles.keys)}
    names = [entry["name"] for entry in raw["layers"]]
    return RunPlan(
        run=folder.name,
        workspace=workspace,
        config=config or _as_planned(load_config(folder / "run.toml", base=Path(raw["base"])), raw),
        aoi=Aoi(name=raw["aoi"], geometry=frame.geometry.iloc[0]),
        grid=grid,
        tiles=tiles,
        scenes=SceneTable.read_parquet(folder / "scenes.parquet"),
        layers=tuple(_layer_from(entry) for entry in raw["layers"]),
        epochs=tuple(EpochPlan(**entry) for entry in raw["epochs"]),
        keys={name: dict(zip(tiles.keys, table[f"{name}.key"].to_pylist(), strict=True)) for name in names},
        reads={name: _Reads(rows, table[f"{name}.scenes"]) for name in names},
        inventory=raw["inventory"],
        estimate=Estimate(**raw["estimate"]),
        strata=Strata.read(folder, raw["strata"]) if raw.get("strata") else None,
        points=_points_from(raw.get("points")),
        network=_network_from(raw["model"]),
    )


def _as_planned(config: Config, raw: dict[str, Any]) -> Config:
    """Let a network be computed as the plan's keys say, whatever became of the profile since."""
    planned = {key: raw["science"]["detect"].get(key) for key in ("backend", "dtype")}
    return replace(config, detect=config.detect.model_copy(update=planned))


class _Reads(Mapping[str, tuple[int, ...]]):
    """What each tile of a layer reads, looked up in the plan's table: a nation's are millions of numbers.

    rows : of the table, by tile; scenes : its column, a list of positions each
    """

    def __init__(self, rows: Mapping[str, int], scenes: pa.ChunkedArray) -> None:
        lists = scenes.combine_chunks()
        self._rows, self._ends, self._flat = rows, lists.offsets.to_numpy(), lists.values.to_numpy()

    def __getitem__(self, tile: str) -> tuple[int, ...]:
        row = self._rows[tile]
        return tuple(self._flat[self._ends[row] : self._ends[row + 1]].tolist())

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def current_run(workspace: Workspace) -> str | None:
    """Name of the plan that was last made or used in a workspace."""
    return Index.read(workspace).latest or None


def known_runs(workspace: Workspace) -> dict[str, str]:
    """Plans that a TOML can still ask for: the newest of each TOML, by its path."""
    index = Index.read(workspace)
    return dict(index.newest)


@dataclass(slots=True)
class Index:
    """Which plan answers which TOML and which search: `plans/index.json`."""

    runs: dict[str, str] = field(default_factory=dict)
    searches: dict[str, str] = field(default_factory=dict)
    newest: dict[str, str] = field(default_factory=dict)
    latest: str = ""

    @classmethod
    def read(cls, workspace: Workspace) -> Index:
        """Read it; an empty one where there is none, or a damaged one."""
        try:
            return cls.parsed((workspace.root / "plans" / INDEX).read_bytes())
        except FileNotFoundError:
            return cls()

    @classmethod
    def parsed(cls, content: bytes) -> Index:
        """Make it of a file's content."""
        try:
            index = cls(**json.loads(content))
        except (ValueError, TypeError):  # only speeds things up: a damaged one is made anew
            return cls()
        tables = (index.runs, index.searches, index.newest)
        return index if all(isinstance(table, dict) for table in tables) else cls()

    def remember(self, workspace: Workspace, made: RunPlan) -> None:
        """Take a plan in and write, where that changes something."""
        before = asdict(self)
        self.note(made)
        if asdict(self) == before:
            return
        place = workspace.root / "plans" / INDEX
        while True:  # another plan may be noted meanwhile
            found = read_tagged(place)
            fresh = Index.parsed(found[0]) if found else Index()
            fresh.note(made)
            content = json.dumps(asdict(fresh), indent=1, sort_keys=True).encode()
            if create(place, content) if found is None else swap(place, content, found[1]):
                return

    def note(self, made: RunPlan) -> None:
        """Take a plan in."""
        config = made.config
        self.runs[f"{config.stem} {content_key(config.science())}"] = made.run
        self.searches[search_key(config, made.tiles, dem_reach_m(config, made.terrain_variables()))] = (
            made.run
        )
        self.newest[str(config.path)] = made.run
        self.latest = made.run


def search_key(config: Config, tiles: Tiles, reach_m: float) -> str:
    """Key of a search: what was asked for, over which tiles, and how far around them the DEM was."""
    return content_key(config.search_terms(), str(tiles[0].geobox.crs), tiles.keys, reach_m)


def write_plan(made: RunPlan) -> None:
    """Write a plan into its folder, whole or not at all; one that is there already stays."""
    folder = made.workspace.plan(made.run)
    if (folder / PLAN).exists():
        return
    with made_once(folder, PLAN) as local:
        (local / "run.toml").write_text(made.config.text, encoding="utf-8")
        made.scenes.to_parquet(local / "scenes.parquet")
        gpd.GeoDataFrame(
            {"name": [made.aoi.name]}, geometry=[made.aoi.to_crs("EPSG:4326")], crs="EPSG:4326"
        ).to_file(local / "aoi.geojson", driver="GeoJSON", COORDINATE_PRECISION=15, RFC7946="NO")
        tiles = made.tiles
        columns = {"tile": pa.array(tiles.keys), "row": tiles.rows, "col": tiles.cols}
        for name, by in made.keys.items():
            columns[f"{name}.key"] = pa.array([by[tile] for tile in tiles.keys])
        for name, read in made.reads.items():
            columns[f"{name}.scenes"] = pa.array([read[tile] for tile in tiles.keys], pa.list_(pa.int64()))
        pq.write_table(pa.table(columns), local / "tiles.parquet")
        if made.strata is not None:
            made.strata.write(local, made.grid.crs)
        text = json.dumps(_plan_json(made), indent=1, sort_keys=True)
        (local / PLAN).write_text(text, encoding="utf-8")


def _plan_json(made: RunPlan) -> dict[str, Any]:
    grid = made.grid
    return {
        "aoi": made.aoi.name,
        "base": str(made.config.base),
        "epochs": [
            {name: v for name, v in asdict(epoch).items() if v is not None or not name.startswith("radar")}
            for epoch in made.epochs
        ],
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
                **({"orbit": la.orbit} if la.orbit else {}),
                **({"feature": la.feature} if la.feature else {}),
                **({"event_at": la.event_at} if la.event_at else {}),
                **({} if la.heights_m is None else {"heights_m": la.heights_m}),
            }
            for la in made.layers
        ],
        "model": asdict(made.card) | {"parameters": dict(made.card.parameters)},
        "points": None if made.points is None else asdict(made.points),
        "scenes_digest": made.scenes.digest,
        "schema_version": SCHEMA_VERSION,
        "sources": [asdict(entry) for entry in made.scenes.sourcing],
        "science": made.config.science(),
        "tiles": len(made.tiles),
        **({"strata": list(made.strata.names)} if made.strata else {}),
    }


def _network_from(entry: dict[str, Any]) -> ModelCard | None:
    if not entry.get("content_sha256"):
        return None
    inputs = FeatureSpec(names=tuple(entry["inputs"]["names"]), version=entry["inputs"]["version"])
    return ModelCard(**entry | {"inputs": inputs})


def _points_from(entry: dict[str, Any] | None) -> Points | None:
    if entry is None:
        return None
    names = {int(code): name for code, name in entry["names"].items()}
    return Points(
        **{key: tuple(entry[key]) for key in ("rows", "cols", "codes")}, names=dict(sorted(names.items()))
    )


def _layer_from(entry: dict[str, Any]) -> LayerPlan:
    return LayerPlan(
        name=entry["name"],
        kind=entry["kind"],
        key=entry["key"],
        window=None if entry["window"] is None else Window.parse(entry["window"]),
        orbit=entry.get("orbit"),
        feature=entry.get("feature", ""),
        event_at=entry.get("event_at"),
        heights_m=entry.get("heights_m"),
    )
