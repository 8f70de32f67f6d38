"""Cubes to learn from: a run's finished layers and known landslides, and where patches are taken.

Axes in names: n patch, k pixel, b spatial block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from slidecube.models.card import FeatureSpec
from slidecube.models.patches import STABLE, UNLABELLED
from slidecube.pipeline.config import Config, load_config
from slidecube.pipeline.confusers import Confuser, confuser, is_polygons
from slidecube.pipeline.cube_patches import (
    BlockCache,
    CubePatches,
    FixedPlaces,
    LabelledCube,
    Places,
    RandomCrops,
    Rooms,
    area_bounds,
)
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.feature_sets import require_known
from slidecube.pipeline.features import mnf_images, required_variables
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.lineage import is_simulated
from slidecube.pipeline.plan_files import Index, read_plan
from slidecube.pipeline.reference import OutsideError, ReferencePixels, lay_on_pixels, read_polygons
from slidecube.pipeline.run_plan import EpochPlan, RunPlan
from slidecube.pipeline.sample import pixel_hash
from slidecube.pipeline.store import Workspace
from slidecube.pipeline.tasks import layer_ledger
from slidecube.pipeline.training_tables import DataTable, PatchTable, Use

SEARCHED_BLOCKS = 48
"""Lattice blocks of a cube that are looked through for confusers, chosen by a hash of their place."""
CANDIDATES = 64
"""Pixels of one confuser that one lattice block may give."""

LEARNING: tuple[Use, ...] = ("train", "blocks")
"""Uses of a cube that is learnt from."""

Blocks = frozenset[tuple[int, int]]
"""Spatial blocks by row and column, counted in their sides from the corner of the grid's frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCube:
    """A cube that was opened, and how patches of it are taken.

    base : folder of the training's TOML; made_of : digest of its layers
    landslides : observed pixels of them; facts : counts for people
    confusers : pixels of each file of confusers that has polygons here, where it is learnt from
    """

    table: DataTable
    settings: PatchTable
    base: Path
    cube: LabelledCube
    region: str
    made_of: str
    landslides: ReferencePixels
    facts: dict[str, int]
    confusers: Mapping[str, ReferencePixels]

    @property
    def used(self) -> Use:
        """What it is used for."""
        return self.table.used

    @property
    def ground(self) -> tuple[str, float, str]:
        """Which pixels it lies on: those of two cubes of one ground are the same."""
        grid = self.cube.plan.grid
        return grid.crs, grid.resolution_m, self.table.world or ""

    @property
    def rooms(self) -> Rooms:
        """Where patches of it may lie."""
        settings = self.settings
        side, gap = (settings.side_px, settings.gap_px) if self.used == "blocks" else (0, 0)
        return Rooms(bounds=area_bounds(self.cube.plan, settings.px), side_px=side, gap_px=gap)

    def cells(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First rows and columns of the patches that lie side by side on its ground, in each room from its corner."""
        plan, px, rooms = self.cube.plan, self.settings.px, self.rooms
        top, bottom, left, right = rooms.bounds
        firsts = [rooms.firsts(low, high, px) for low, high in ((top, bottom), (left, right))]
        rows, cols = (grid.ravel() for grid in np.meshgrid(*firsts, indexing="ij"))
        affine = plan.grid.frame.affine
        x, y = affine.c + cols * affine.a, affine.f + rows * affine.e
        boxes = shapely.box(x, y + px * affine.e, x + px * affine.a, y)
        area = plan.aoi_shape
        shapely.prepare(area)
        hit = shapely.intersects(area, boxes) & ~shapely.touches(area, boxes)
        return rows[hit], cols[hit]

    @property
    def percent_landslide(self) -> int:
        """Share of the area of interest under known landslides that are observed, in whole percent."""
        pixel_m2 = self.cube.plan.grid.resolution_m**2
        places = np.unique(np.stack([self.landslides.rows, self.landslides.cols]), axis=1).shape[1]
        return round(100 * float(places) * pixel_m2 / float(shapely.area(self.cube.plan.aoi_shape)))

    def blocks(self) -> dict[tuple[int, int], bool]:
        """Spatial blocks that hold a patch of it, and whether one of those holds a landslide."""
        cells = np.stack(self.cells(), axis=1)
        holds = _holding(self.landslides, cells, self.settings.px)
        side = self.settings.side_px
        found = dict.fromkeys(_blocks_of(cells[:, 0], cells[:, 1], side), False)
        return found | dict.fromkeys(_blocks_of(cells[holds, 0], cells[holds, 1], side), True)


def open_cube(table: DataTable, features: FeatureSpec, settings: PatchTable, *, base: Path) -> OpenCube:
    """Open a cube by its run's plan, which is used as it is; reads the blocks that hold landslides.

    base : folder that the table's paths start from
    Raises PipelineError or CatalogError in one line.
    """
    assert table.run is not None
    assert table.reference is not None
    config = load_config(_resolved(table.run, base))
    made = _made_plan(config)
    epoch = _epoch(made, config, table.epoch)
    if table.world and not any(is_simulated(scene.item) for scene in made.scenes.role("optical")):
        raise PipelineError(
            f"{config.path}: world = {table.world!r} is for simulated scenes, and these are real"
        )
    rules = FeatureSpec(names=tuple(name for rule in _rules(settings) for name in rule.reads))
    for spec in (features, rules):
        _require_made(made, epoch, spec, config)
    both = FeatureSpec(names=tuple(dict.fromkeys((*features.names, *rules.names))))
    view = replace(made, epochs=(_reading(made, epoch, both, config),))
    failed = _require_done(view, config)
    laid = _polygon_pixels(view, _resolved(table.reference, base), table.layer)
    cube = LabelledCube(
        plan=view,
        epoch=epoch.name,
        features=features,
        landslides=laid,
        complete=table.complete,
        cache=BlockCache(settings.cache_mb * 1_000_000),
    )
    observed = laid.within(cube.observed())
    facts = {"landslides not observable": len(laid.ids) - len(observed.ids)}
    return OpenCube(
        table=table,
        settings=settings,
        base=base,
        cube=cube,
        region=table.named,
        made_of=_made_of(view),
        landslides=observed,
        facts=facts | ({"tiles without data": failed} if failed else {}),
        confusers=dict(_confusing_polygons(view, settings, base)) if table.used in LEARNING else {},
    )


def _confusing_polygons(
    view: RunPlan, settings: PatchTable, base: Path
) -> Iterator[tuple[str, ReferencePixels]]:
    """Yield the files of confusers that have polygons in the area: one file may serve several regions."""
    for name in settings.confusers if settings.hard else ():
        if is_polygons(name):
            with suppress(OutsideError):
                yield name, _polygon_pixels(view, _resolved(name, base))


def crops(opened: OpenCube, count: int, *, blocks: Blocks | None = None) -> CubePatches:
    """Take random crops to learn from: on landslides, on confusers, anywhere.

    blocks : spatial blocks that they lie in, None = the whole ground
    Raises PipelineError where there is no ground.
    """
    settings = opened.settings
    kept = _within(opened, opened.landslides, blocks)
    cells = np.stack(opened.cells(), axis=1)
    cells = cells[_inside(opened, cells, blocks)] + settings.px // 2
    if not len(cells):
        raise PipelineError(
            f"[[data]] {opened.region!r} has no ground to learn from; make the blocks smaller"
        )
    confusing, confusers_a = _confusing(opened, cells, blocks)
    wanted = {
        "on landslides": round(count * settings.positive) if len(kept.ids) else 0,
        "on confusers": round(count * settings.hard) if len(confusers_a) > 1 else 0,
    }
    wanted["anywhere"] = count - sum(wanted.values())
    anchors = [
        (np.stack([kept.rows, kept.cols], axis=1), kept.starts),
        (confusing, confusers_a),
        (cells, np.arange(len(cells) + 1)),
    ]
    pixels, starts, ends = _chosen(anchors, list(wanted.values()), settings.seed)
    places = RandomCrops(
        px=settings.px,
        rooms=opened.rooms,
        rows_k=pixels[:, 0],
        cols_k=pixels[:, 1],
        starts_n=starts,
        ends_n=ends,
        seed=settings.seed,
    )
    return _patches(
        opened, places, {**_counted(kept), **wanted, "percent landslide": opened.percent_landslide}
    )


def side_by_side(opened: OpenCube, *, blocks: Blocks | None = None) -> CubePatches:
    """Take patches to judge by: fixed, side by side over all of the ground, or as many of them as are wanted.

    Of too many those with landslides go first, up to the share of those to learn from: at a nation's prevalence a
    random choice would hold next to none. So precision is to be quoted at a stated prevalence.
    """
    settings = opened.settings
    cells = np.stack(opened.cells(), axis=1)
    cells = cells[_inside(opened, cells, blocks)]
    holds = _holding(opened.landslides, cells, settings.px)
    order = np.lexsort((pixel_hash(cells[:, 0], cells[:, 1], settings.seed), ~holds))
    first = min(int(holds.sum()), round(settings.judged * settings.positive))
    others = order[int(holds.sum()) :][: settings.judged - first]
    chosen = np.sort(np.concatenate([order[:first], others]) if len(cells) > settings.judged else order)
    facts = {"with landslides": int(holds[chosen].sum()), "of": len(cells)}
    places = FixedPlaces(rows_n=cells[chosen, 0], cols_n=cells[chosen, 1])
    return _patches(opened, places, {**_counted(_covered(opened, cells[chosen])), **facts})


def _patches(opened: OpenCube, places: Places, facts: dict[str, int]) -> CubePatches:
    return CubePatches(
        cube=opened.cube,
        places=places,
        region=opened.region,
        patch_px=opened.settings.px,
        made_of=opened.made_of,
        block_px=opened.settings.side_px,
        facts={**facts, **opened.facts},
    )


def _resolved(text: str, base: Path) -> Path:
    return (base / Path(text).expanduser()).resolve()


def _rules(settings: PatchTable) -> list[Confuser]:
    return [confuser(name) for name in settings.confusers if not is_polygons(name)] if settings.hard else []


def _made_plan(config: Config) -> RunPlan:
    """Return the plan that a run has already; raises PipelineError where there is none."""
    workspace = Workspace.at(config.workspace)
    known = Index.read(workspace).runs.get(f"{config.stem} {content_key(config.science())}")
    if known is None:
        raise PipelineError(
            f"{config.path}: it has no plan as it stands, and training searches nothing; run `slidecube cube "
            f"{config.path.name}` first (what is made already stays)"
        )
    return read_plan(workspace, known, config=config)


def _epoch(made: RunPlan, config: Config, name: str | None) -> EpochPlan:
    if name is None and len(made.epochs) == 1:
        return made.epochs[0]
    if name is None or name not in made.by_epoch:
        got = "none is named" if name is None else f"got {name!r}"
        raise PipelineError(f"{config.path}: epoch: {got}; allowed: one of {', '.join(made.by_epoch)}")
    return made.by_epoch[name]


def _require_made(made: RunPlan, epoch: EpochPlan, spec: FeatureSpec, config: Config) -> None:
    """Refuse features that the layers of a run do not hold, and those that are fitted to it."""
    require_known(spec, config.layer_names)
    if mnf_images(spec):
        raise PipelineError(
            f"{config.path}: features {', '.join(n for n in spec.names if n.startswith('mnf'))} are fitted to one run, "
            "so a network would read others at the next; name bands or indices, which mean the same everywhere"
        )
    needed = required_variables(spec)
    held = {
        "pre": made.optical_variables() if epoch.pre else [],
        "post": made.optical_variables(),
        "terrain": made.terrain_variables(),
    }
    for side, names in held.items():
        lacking = [name for name in needed[side] if name not in names]
        if lacking:
            raise PipelineError(
                f"{config.path}: the layers of {side} do not hold {', '.join(lacking)}, which the features need; add "
                'it to [cube] bands, give the epoch a pre window, or let the run\'s model read it (model = "kmeans" '
                "with features), and run `slidecube cube` again"
            )
    radar = any(needed[side] for side in ("radar_pre", "radar_post"))
    if radar and config.sources.radar is None:
        raise PipelineError(
            f"{config.path}: the features need Sentinel-1, and [sources] names no radar; add it, and run `slidecube "
            "cube` again"
        )


def _reading(made: RunPlan, epoch: EpochPlan, spec: FeatureSpec, config: Config) -> EpochPlan:
    """Return the epoch with the layers that features need, whatever the plan's model reads."""
    needed = required_variables(spec)
    windows = next(e for e in config.epochs if e.name == epoch.name).windows
    radar = {
        f"radar_{side}": layer.name
        for side, window in windows.items()
        for layer in made.layers
        if layer.kind == "radar" and layer.window == window and (needed["radar_pre"] or needed["radar_post"])
    }
    own = {layer.feature: layer.name for layer in made.layers if layer.kind == "auxiliary"}
    own |= {"land_cover": epoch.land_cover} if epoch.land_cover else {}
    return replace(
        epoch,
        pre=epoch.pre if needed["pre"] else None,
        radar_pre=radar.get("radar_pre"),
        radar_post=radar.get("radar_post"),
        auxiliary={name: own[name] for name in needed["auxiliary"]},
    )


def _require_done(view: RunPlan, config: Config) -> int:
    """Refuse layers that are not made yet; returns how many tiles failed, of which nothing is known."""
    failed: set[str] = set()
    for name in view.epochs[0].layers:
        known, wanted = layer_ledger(view, name).keys(), view.keys[name]
        done = [tile for tile, key in wanted.items() if known.get(tile, ("", False))[0] == key]
        if len(done) < len(wanted):
            raise PipelineError(
                f"{config.path}: layer {name} is made on {len(done)} of {len(wanted)} tiles; run `slidecube cube "
                f"{config.path.name}` first"
            )
        failed |= {tile for tile in wanted if not known[tile][1]}
    if len(failed) == len(view.tiles):
        raise PipelineError(f"{config.path}: every tile of its layers failed; see `slidecube status`")
    return len(failed)


def _made_of(view: RunPlan) -> str:
    """Digest of the layers of an epoch: of each tile its key and what of it is known, and the outline."""
    said = []
    for name in view.epochs[0].layers:
        wanted = view.keys[name]
        rows = layer_ledger(view, name).table("key", "state", "lost").to_pylist()
        own = [[row["tile"], row["key"], row["state"], row["lost"]] for row in rows if row["tile"] in wanted]
        said.append([view.by_layer[name].key, sorted(own)])
    held = view.config.cube.coregistration.model_dump(mode="json")
    return content_key("cube", said, shapely.to_wkb(view.aoi.geometry, hex=True), view.aoi.crs, held)


def _polygon_pixels(plan: RunPlan, path: Path, layer: str | None = None) -> ReferencePixels:
    """Pixels of a file's polygons in the area of interest."""
    laid = lay_on_pixels(read_polygons(path, area=plan.aoi_shape, grid=plan.grid, layer=layer), plan.grid)
    affine = plan.grid.frame.affine
    x, y = affine.c + (laid.cols + 0.5) * affine.a, affine.f + (laid.rows + 0.5) * affine.e
    shapely.prepare(plan.aoi_shape)
    inside = shapely.contains_xy(plan.aoi_shape, x, y)
    if not inside.any():
        raise OutsideError(f"Reference {str(path)!r} has no pixel in the area of {plan.config.path}")
    return laid.within(inside)


def _blocks_of(rows: NDArray[np.int64], cols: NDArray[np.int64], side: int) -> list[tuple[int, int]]:
    return list(zip((rows // side).tolist(), (cols // side).tolist(), strict=True))


def _inside(opened: OpenCube, places: NDArray[np.int64], blocks: Blocks | None) -> NDArray[np.bool_]:
    """Tell which pixels (k, 2) a patch of these blocks may hold."""
    rows, cols = places[:, 0], places[:, 1]
    room = opened.rooms.holds(rows, cols)
    if blocks is None:
        return room
    own = [block in blocks for block in _blocks_of(rows, cols, opened.settings.side_px)]
    both: NDArray[np.bool_] = room & np.array(own, bool)
    return both


def _within(opened: OpenCube, known: ReferencePixels, blocks: Blocks | None) -> ReferencePixels:
    return known.within(_inside(opened, np.stack([known.rows, known.cols], axis=1), blocks))


def _counted(known: ReferencePixels) -> dict[str, int]:
    places = np.unique(np.stack([known.rows, known.cols], axis=1), axis=0)
    return {"landslides": len(known.ids), "landslide pixels": len(places)}


def _chosen(
    anchors: list[tuple[NDArray[np.int64], NDArray[np.int64]]], wanted: list[int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Choose anchors of each kind, all equally often, in the order of a hash.

    anchors : pixels (k, 2) of each kind, and where each anchor's begin
    Returns all pixels, and of each chosen anchor where its pixels begin and end in them.
    """
    starts_n, ends_n, first = [], [], 0
    for (pixels, starts_a), n in zip(anchors, wanted, strict=True):
        number = np.arange(len(starts_a) - 1)
        ranked = number[np.argsort(pixel_hash(number, number, seed), kind="stable")]
        chosen = np.resize(ranked, n if len(ranked) else 0)
        starts_n.append(starts_a[chosen] + first)
        ends_n.append(starts_a[chosen + 1] + first)
        first += len(pixels)
    return np.concatenate([pixels for pixels, _ in anchors]), np.concatenate(starts_n), np.concatenate(ends_n)


def _confusing(
    opened: OpenCube, cells: NDArray[np.int64], blocks: Blocks | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels (k, 2) of confusers that are observed, and no landslide, where patches may hold them.

    Beside them where each anchor's begin, and where the last one's end: a polygon is one anchor, as a landslide is, and
    a pixel on which a rule holds is one.
    """
    found, starts, end = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)], 0
    for laid in opened.confusers.values():
        near = _within(opened, laid, blocks)
        kept = near.within(np.isin(opened.cube.labels_at(near), (STABLE, UNLABELLED)))
        found.append(np.stack([kept.rows, kept.cols], axis=1))
        starts.append(kept.starts[:-1] + end)
        end += len(kept.rows)
    for places in _by_rules(opened, cells) if _rules(opened.settings) else ():
        inside = places[_inside(opened, places, blocks)]
        found.append(inside)
        starts.append(np.arange(len(inside)) + end)
        end += len(inside)
    return np.concatenate(found), np.append(np.concatenate(starts), end)


def _by_rules(opened: OpenCube, cells: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Look through some lattice blocks of the patches' ground, and yield pixels on which a rule holds."""
    cube, seed, rules = opened.cube, opened.settings.seed, _rules(opened.settings)
    spec = FeatureSpec(names=tuple(dict.fromkeys(name for rule in rules for name in rule.reads)))
    side = cube.block_px
    blocks = np.unique(cells // side, axis=0)
    ranked = blocks[np.argsort(pixel_hash(blocks[:, 0], blocks[:, 1], seed), kind="stable")]
    for row, col in ranked[:SEARCHED_BLOCKS].tolist():
        values = cube.values(spec, row, col)
        stable_yx = np.isin(cube.block(row, col)[1], (STABLE, UNLABELLED))
        for rule in rules:
            at = np.argwhere(rule.holds(values) & stable_yx) + np.array([row, col]) * side
            yield at[np.argsort(pixel_hash(at[:, 0], at[:, 1], seed), kind="stable")[:CANDIDATES]]


def _covered(opened: OpenCube, cells: NDArray[np.int64]) -> ReferencePixels:
    """Landslides as far as patches hold them; cells : their first pixels, (n, 2)."""
    known, px = opened.landslides, opened.settings.px
    held = np.zeros(len(known.rows), bool)
    if len(cells):
        held[_pairs(known, cells, px)[0]] = True
    return known.within(held)


def _pairs(known: ReferencePixels, cells: NDArray[np.int64], px: int) -> NDArray[np.int64]:
    """Which pixel lies in which patch, (2, pairs)."""
    tree = shapely.STRtree(shapely.box(cells[:, 1], cells[:, 0], cells[:, 1] + px, cells[:, 0] + px))
    return tree.query(shapely.points(known.cols + 0.5, known.rows + 0.5), predicate="within")


def _holding(known: ReferencePixels, cells: NDArray[np.int64], px: int) -> NDArray[np.bool_]:
    """Tell which patches hold a pixel; cells : their first ones, (n, 2)."""
    held = np.zeros(len(cells), bool)
    if len(cells):
        held[_pairs(known, cells, px)[1]] = True
    return held
