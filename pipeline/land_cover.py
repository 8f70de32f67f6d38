"""Land cover before the event: a tree grown from a user's points, frozen, and applied tile by tile."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from slidecube.cluster.runner import TileTask
from slidecube.models.card import FeatureSpec
from slidecube.models.cart import Tree, grow
from slidecube.models.errors import ModelError
from slidecube.pipeline.auxiliary import CLASS_NODATA
from slidecube.pipeline.blocks import by_block
from slidecube.pipeline.errors import IncompleteError, PipelineError
from slidecube.pipeline.features import SIDES, Layers, build_features, required_variables
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.pixels import PixelWindow, read_stored
from slidecube.pipeline.points import require_enough
from slidecube.pipeline.run_plan import LAND_COVER, EpochPlan, RunPlan
from slidecube.pipeline.storage import Place, write_atomic
from slidecube.pipeline.tasks import TileContext, layer_ledger, store_tile

TREE = "tree.json"


def tree_features(plan: RunPlan, epoch: EpochPlan) -> FeatureSpec:
    """What the tree of an epoch reads: bands and backscatter before the event, and the DEM.

    Source: Ganerod et al. 2023, section 3.2.
    """
    radar = ("vv_pre", "vh_pre") if epoch.tree_radar else ()
    bands = (f"{band}_pre" for band in plan.config.cube.bands)
    return FeatureSpec(names=(*bands, *radar, "elevation", "slope_deg"))


def grow_tree(plan: RunPlan, epoch: EpochPlan, fence: Callable[[], None]) -> Tree:
    """Grow the tree of an epoch from the plan's points and freeze it; one that is frozen stays.

    fence : raises when another driver has taken the workspace over
    Raises IncompleteError where layers are missing under a point, PipelineError where clouds leave too few of a class.
    """
    file = _tree_file(plan, epoch)
    if file.exists():
        return read_tree(plan, epoch)
    points, settings = plan.points, plan.config.land_cover
    assert points is not None
    assert settings is not None
    spec = tree_features(plan, epoch)
    rows, cols, codes = (np.array(values) for values in (points.rows, points.cols, points.codes))
    x_nf = np.full((len(codes), len(spec.names)), np.nan, np.float32)
    for tile in points.tiles(plan.grid):
        _require_inputs(plan, epoch, tile)
    block_px = plan.grid.block_px
    for row, col in sorted({(r // block_px, c // block_px) for r, c in zip(rows, cols, strict=True)}):
        window = PixelWindow(row=row * block_px, col=col * block_px, height=block_px, width=block_px)
        own = np.flatnonzero((rows // block_px == row) & (cols // block_px == col))
        made = build_features(spec, _layers(plan, epoch, window))
        for i, name in enumerate(spec.names):
            x_nf[own, i] = made[name].values[rows[own] - window.row, cols[own] - window.col]
    known = np.isfinite(x_nf).all(axis=1)
    counts = {name: int((codes[known] == code).sum()) for code, name in points.names.items()}
    require_enough(counts, settings.min_points, f"Before the event of epoch {epoch.name!r} were seen clearly")
    tree = grow(x_nf[known], codes[known], spec.names, min_leaf=settings.min_leaf)
    about = {
        "classes": {str(code): name for code, name in points.names.items()},
        "points": counts,
        "unseen_points": int((~known).sum()),
        "tree": json.loads(tree.to_json()),
    }
    fence()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(about, indent=1) + "\n")
    return tree


def read_tree(plan: RunPlan, epoch: EpochPlan) -> Tree:
    """Read the frozen tree of an epoch; raises PipelineError where there is none, or a damaged one."""
    file = _tree_file(plan, epoch)
    try:
        return Tree.from_json(json.dumps(json.loads(file.read_text(encoding="utf-8"))["tree"]))
    except FileNotFoundError:
        raise PipelineError(
            f"There is no tree of the land cover of epoch {epoch.name!r}; run `slidecube fit`"
        ) from None
    except (ValueError, KeyError, TypeError, ModelError) as error:
        raise PipelineError(f"{file} is damaged ({error}); remove it and run `slidecube fit`") from None


def tree_lines(plan: RunPlan) -> list[str]:
    """Say of each frozen tree what it grew from and how often it is right."""
    lines = []
    for epoch in plan.epochs:
        if not epoch.tree_key or not _tree_file(plan, epoch).exists():
            continue
        about = json.loads(_tree_file(plan, epoch).read_text(encoding="utf-8"))
        right = about["tree"]["accuracy"]
        held = ", ".join(f"{name} {n}" for name, n in about["points"].items())
        said = "" if right is None else f"; right on {right:.0%} of points that it did not see"
        unseen = f"; {about['unseen_points']} hidden by clouds" if about["unseen_points"] else ""
        lines.append(f"{epoch.name}: a tree of {len(about['tree']['leaf'])} nodes from {held}{unseen}{said}")
    return lines


def classify_tile(plan: RunPlan, task: TileTask, context: TileContext) -> Record:
    """Apply the frozen tree to one tile; a pixel of which a feature is unknown has no class."""
    (epoch,) = [e for e in plan.epochs if e.tree_key and e.land_cover == task.layer][:1]
    _require_inputs(plan, epoch, task.tile)
    tree = read_tree(plan, epoch)
    spec = FeatureSpec(
        names=tree.features
    )  # its own order: that of the bands in the TOML may have changed since
    tile, block_px = plan.by_tile[task.tile], plan.grid.block_px
    window = PixelWindow.of_tile(plan.grid, tile)
    layers = _layers(plan, epoch, window)
    chunks = window.chunks(block_px)
    lazy = Layers(**{s: d.chunk(chunks) if (d := getattr(layers, s)) else d for s in SIDES})
    stack = build_features(spec, lazy).to_dataarray("feature").chunk(feature=-1).data
    classes = stack.map_blocks(_classes, tree=tree, dtype=np.uint16, drop_axis=0)
    found = by_block({LAND_COVER.name: classes}, context.threads)
    checksums, size = store_tile(plan, task, found, context)
    seen = found[LAND_COVER.name] != CLASS_NODATA
    return Record(
        tile=task.tile,
        key=task.key,
        state="done" if seen.any() else "empty",
        reason="" if seen.any() else "no pixel of which every feature of the tree is known",
        numbers={"px": int(seen.size), "seen_px": int(seen.sum())},
        checksums=checksums,
        bytes=size,
    )


def _classes(features_fyx: np.ndarray, tree: Tree) -> np.ndarray:
    known = np.isfinite(features_fyx).all(axis=0)
    out = np.full(known.shape, CLASS_NODATA, np.uint16)
    out[known] = tree.predict(features_fyx[:, known].T)
    return out


def _layers(plan: RunPlan, epoch: EpochPlan, window: PixelWindow) -> Layers:
    needed = required_variables(tree_features(plan, epoch))
    stored: Mapping[str, str | None] = {
        "pre": epoch.pre,
        "terrain": epoch.terrain,
        "radar_pre": epoch.tree_radar,
    }
    read = {
        side: read_stored(plan, name, needed[side], window) if name else xr.Dataset()
        for side, name in stored.items()
    }
    return Layers(pre=read["pre"], post=xr.Dataset(), terrain=read["terrain"], radar_pre=read["radar_pre"])


def _require_inputs(plan: RunPlan, epoch: EpochPlan, tile: str) -> None:
    for name in (epoch.pre, epoch.terrain, epoch.tree_radar):
        if name and not layer_ledger(plan, name).complete(tile, plan.keys[name][tile]):
            raise IncompleteError(
                f"The land cover of epoch {epoch.name!r} lacks layer {name} on tile {tile}; run `slidecube cube`"
            )


def _tree_file(plan: RunPlan, epoch: EpochPlan) -> Place:
    return plan.workspace.statistics(epoch.tree_key) / TREE
