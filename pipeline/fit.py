"""The fit: from finished layers to frozen statistics, once an epoch.

Tile by tile, on the runner: the moments of the MNF, then the patches of the sample. Here: the merge, the training, the
naming of the clusters, and the manifest that freezes it all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import shapely
import xarray as xr

from slidecube.cluster.runner import TileTask
from slidecube.models.predict import Detector, Progress
from slidecube.models.unsupervised import UNKNOWN_CLUSTER, Kmeans, predict_clusters
from slidecube.pipeline.clusters import ClusterBlock, describe_clusters
from slidecube.pipeline.fit_mnf import fit_images, lattice_places, read_images, said_of
from slidecube.pipeline.fit_state import contributing
from slidecube.pipeline.fit_steps import RunTasks, Step, run_step
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.lineage import is_simulated
from slidecube.pipeline.mnf_strata import StratifiedMnf
from slidecube.pipeline.pixels import PixelWindow, aoi_mask, features_of, read_layers
from slidecube.pipeline.run_plan import EpochPlan, RunPlan, fit_terms
from slidecube.pipeline.sample import draw, gather, limit_of
from slidecube.pipeline.statistics import (
    MODEL,
    freeze,
    frozen_digest,
    load_statistics,
    sha256_of,
)
from slidecube.pipeline.storage import (
    Place,
    kept_file,
    matching,
    remove_many,
    remove_tree,
    replaced,
    sizes,
)
from slidecube.pipeline.tasks import TileContext, require_lock

_TRAINING = "training-"
"""What the names of checkpoints begin with."""

SHEET_BLOCKS = 16
"""Lattice blocks that the clusters are named and shown on, chosen by a hash of their place."""


def fit_epoch(
    plan: RunPlan,
    epoch: EpochPlan,
    run_tasks: RunTasks,
    *,
    threads: int,
    fence: Callable[[], None],
    progress: Progress | None = None,
) -> Place:
    """Fit what the plan's model needs of an epoch and freeze it; what is frozen already stays.

    run_tasks : how the tasks of a step are run; threads : of the naming of the clusters; progress : of the training
    fence : raises when another driver has taken the workspace over; asked before anything is written
    Returns the folder of the statistics.
    Raises PipelineError when there is nothing to learn from, or when the statistics that the configuration names are
    missing, IncompleteError when a tile's part of it failed.
    """
    folder = plan.workspace.statistics(epoch.stat_key)
    if frozen_digest(folder):
        return folder
    if plan.config.fit.statistics:  # they were there when it was planned
        load_statistics(folder, plan.model)
    folder.mkdir(parents=True, exist_ok=True)
    mnf, seams = fit_images(plan, epoch, run_tasks, fence)
    fitted = plan.model
    if fitted.card.sample_patches:
        fitted = _learn(plan, epoch, run_tasks, mnf, fence=fence, progress=progress)
    fence()
    facts = {
        "contributed": sorted(contributing(plan, epoch)),
        "cube": fit_terms(plan.config),
        "epoch": epoch.name,
        "pixels": max((m.pixels for m in mnf.values()), default=0),
        **seams,
        **_named(plan, epoch, fitted, mnf, threads),
    }
    fence()
    freeze(folder, key=epoch.stat_key, model=plan.model, files=_results(folder), facts=facts)
    for working in (folder / "sample", folder / "sample.ledger"):  # large, and made again from the layers
        remove_tree(working)
    remove_many(matching(folder, f"{_TRAINING}*"))
    return folder


def _named(
    plan: RunPlan, epoch: EpochPlan, fitted: Detector, mnf: dict[str, StratifiedMnf], threads: int
) -> dict[str, Any]:
    """Name the landslide clusters of a model that has some, and draw their sheet; returns what the manifest says."""
    if not isinstance(fitted, Kmeans):
        return {}
    named = describe_clusters(
        plan.workspace.statistics(epoch.stat_key),
        _cluster_blocks(plan, epoch, fitted, mnf, threads),
        model=fitted,
        title=f"Epoch {epoch.name}",
        resolution_m=plan.grid.resolution_m,
        simulated=any(is_simulated(scene.item) for scene in plan.scenes),
    )
    return {
        "clusters": list(named.clusters),
        "reasons": {str(cluster): reason for cluster, reason in named.reasons.items()},
    }


def _results(folder: Place) -> list[Place]:
    """Files that are frozen; beside them lie the moments, and what a killed fit left."""
    parts = ("mnf-*.json", "mnf-*/*", "clusters.json", f"{MODEL}/*", "sheet/*")
    there = [folder / name for name in sizes(folder, deep=True) if any(fnmatchcase(name, p) for p in parts)]
    return [path for path in there if not path.name.startswith(".")]


def sample_tile(plan: RunPlan, task: TileTask, context: TileContext) -> Record:
    """Take the tile's part of the sample."""
    epoch, tile, card = plan.by_epoch[task.epoch], plan.by_tile[task.tile], plan.card
    statistics = plan.workspace.statistics(task.layer)
    mnf = read_images(plan, statistics)
    margin = card.window_px // 2
    window = PixelWindow.of_tile(plan.grid, tile).padded(margin)
    features = features_of(
        card.inputs,
        read_layers(plan, epoch.name, window, mnf=mnf),
        window,
        block_px=plan.grid.block_px,
        threads=context.threads,
    )
    inside = aoi_mask(plan, window)
    features_fyx = np.stack([np.where(inside, features[name].values, np.nan) for name in card.inputs.names])
    core_fyx = features_fyx[:, margin : margin + plan.grid.tile_px, margin : margin + plan.grid.tile_px]
    drawn = draw(
        features_fyx,
        np.isfinite(core_fyx).all(axis=0),
        first_px=(tile.row * plan.grid.tile_px, tile.col * plan.grid.tile_px),
        limit=limit_of(card.sample_patches, _pixels(plan, mnf)),
        seed=int(card.parameters.get("seed", 0)),
    )
    (statistics / "sample").mkdir(exist_ok=True)
    require_lock(plan, context)
    path = statistics / "sample" / f"{tile.key}.npz"
    drawn.save(path)
    n = len(drawn.hash_n)
    return Record(
        tile=task.tile,
        key=task.key,
        state="done" if n else "empty",
        reason="" if n else "no pixel to learn from",
        numbers={"patches": n},
        checksums={path.name: sha256_of(path)},
    )


def _learn(
    plan: RunPlan,
    epoch: EpochPlan,
    run_tasks: RunTasks,
    mnf: dict[str, StratifiedMnf],
    *,
    fence: Callable[[], None],
    progress: Progress | None,
) -> Detector:
    folder = plan.workspace.statistics(epoch.stat_key)
    said = content_key([said_of(mnf[image]) for image in sorted(mnf)])
    made = run_step(plan, epoch, run_tasks, step=Step(stage="sample", names=[".npz"], terms=(said,)))
    drawn = gather(made, plan.card.sample_patches)
    with kept_file(folder / f"{_TRAINING}{said}.safetensors") as (checkpoint, keep):

        def told(done: int, total: int) -> None:
            keep()
            if progress:
                progress(done, total)

        fitted = plan.model.fit(drawn.patches_nfyx, checkpoint=checkpoint, progress=told)
    fence()
    with replaced(folder / MODEL) as local:
        fitted.save(local)
    return fitted


def _pixels(plan: RunPlan, mnf: dict[str, StratifiedMnf]) -> int:
    """Pixels to choose from: as the MNF counted them, or all of the area; the tiles' size does not matter."""
    area_px = math.ceil(shapely.area(plan.aoi_shape) / plan.grid.resolution_m**2)
    return max((m.pixels for m in mnf.values()), default=area_px)


def _cluster_blocks(
    plan: RunPlan, epoch: EpochPlan, fitted: Kmeans, mnf: dict[str, StratifiedMnf], threads: int
) -> Iterator[ClusterBlock]:
    """Some lattice blocks of the area with their clusters; the same ones whatever the tiles."""
    card, block_px = fitted.card, plan.grid.block_px
    margin = card.window_px // 2
    held = {"pre": plan.config.cube.bands, "post": plan.config.cube.bands, "terrain": ("slope_deg",)}
    found = 0
    for row, col in lattice_places(plan):
        core = PixelWindow(row=row * block_px, col=col * block_px, height=block_px, width=block_px)
        around = core.padded(margin)
        layers = read_layers(plan, epoch.name, around, mnf=mnf, also=held)
        features = features_of(card.inputs, layers, around, block_px=block_px, threads=threads)
        inside = xr.DataArray(aoi_mask(plan, around), dims=("y", "x"))
        clusters = predict_clusters(fitted, features.where(inside), origin_px=(around.row, around.col))
        at = {"y": slice(margin, margin + block_px), "x": slice(margin, margin + block_px)}
        clusters_yx = clusters["cluster"].isel(at).values
        if (clusters_yx == UNKNOWN_CLUSTER).all():
            continue
        yield ClusterBlock(
            geobox=core.geobox(plan.grid),
            clusters_yx=clusters_yx,
            pre=layers.pre.isel(at) if layers.pre else None,
            post=layers.post.isel(at),
            terrain=layers.terrain.isel(at),
        )
        found += 1
        if found == SHEET_BLOCKS:
            return
