"""The fit: from finished layers to frozen statistics, once an epoch.

Tile by tile, on the runner: the moments of the MNF, then the patches of the sample. Here: the merge, the training, the
naming of the clusters, and the manifest that freezes it all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import shapely
import xarray as xr

from slidecube.cluster.runner import TileTask
from slidecube.models.predict import Detector, Progress
from slidecube.models.unsupervised import UNKNOWN_CLUSTER, Kmeans, predict_clusters
from slidecube.pipeline.clusters import ClusterBlock, describe_clusters
from slidecube.pipeline.errors import IncompleteError, PipelineError
from slidecube.pipeline.features import MNF_BANDS, Layers, mnf_image, mnf_images
from slidecube.pipeline.fit_state import contributing
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.ledger import Ledger, Record
from slidecube.pipeline.lineage import is_simulated
from slidecube.pipeline.mnf import Mnf, fit_mnf
from slidecube.pipeline.moments import Moments, block_moments, merge
from slidecube.pipeline.pixels import PixelWindow, aoi_mask, features_of, read_layers
from slidecube.pipeline.report.spectrum import write_spectrum
from slidecube.pipeline.run_plan import EpochPlan, RunPlan, fit_terms
from slidecube.pipeline.sample import draw, gather, limit_of, pixel_hash
from slidecube.pipeline.statistics import (
    MODEL,
    freeze,
    frozen_digest,
    load_statistics,
    mnf_file,
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
    staged,
    write_atomic,
)
from slidecube.pipeline.tasks import TileContext, fit_tasks, require_lock

_TRAINING = "training-"
"""What the names of checkpoints begin with."""

SHEET_BLOCKS = 16
"""Lattice blocks that the clusters are named and shown on, chosen by a hash of their place."""

RunTasks = Callable[[str, list[TileTask]], None]
"""Runs the tasks of a stage, and leaves their records."""


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
    mnf = _fit_mnf(plan, epoch, run_tasks, fence)
    fitted = plan.model
    if fitted.card.sample_patches:
        fitted = _learn(plan, epoch, run_tasks, mnf, fence=fence, progress=progress)
    fence()
    facts = {
        "contributed": sorted(contributing(plan, epoch)),
        "cube": fit_terms(plan.config),
        "epoch": epoch.name,
        "pixels": max((m.pixels for m in mnf.values()), default=0),
        **_named(plan, epoch, fitted, mnf, threads),
    }
    fence()
    freeze(folder, key=epoch.stat_key, model=plan.model, files=_results(folder), facts=facts)
    for working in (folder / "sample", folder / "sample.ledger"):  # large, and made again from the layers
        remove_tree(working)
    remove_many(matching(folder, f"{_TRAINING}*"))
    return folder


def _named(
    plan: RunPlan, epoch: EpochPlan, fitted: Detector, mnf: dict[str, Mnf], threads: int
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


def moments_tile(plan: RunPlan, task: TileTask, context: TileContext) -> Record:
    """Sum the moments of each image that the model needs the MNF of, over the tile's pixels in the area."""
    epoch, tile = plan.by_epoch[task.epoch], plan.by_tile[task.tile]
    folder = plan.workspace.statistics(task.layer) / "moments"
    folder.mkdir(parents=True, exist_ok=True)
    window = PixelWindow.of_tile(plan.grid, tile).padded(1)
    inside = aoi_mask(plan, window)
    layers = read_layers(plan, epoch.name, window)
    numbers, checksums = {}, {}
    for image in mnf_images(plan.model.card.inputs):
        sums = merge(
            block_moments(_bands_of(image, layers, at), valid_yx=inside[at])
            for at in _blocks_with_next(plan.grid.tile_px, plan.grid.block_px)
        )
        require_lock(plan, context)
        path = folder / f"{tile.key}-{image}.json"
        write_atomic(path, sums.to_json())
        numbers[f"{image}_px"], checksums[path.name] = sums.pixels, sha256_of(path)
    seen = sum(numbers.values())
    return Record(
        tile=task.tile,
        key=task.key,
        state="done" if seen else "empty",
        reason="" if seen else "no pixel of which every band is known",
        numbers=numbers,
        checksums=checksums,
    )


def _bands_of(image: str, layers: Layers, at: tuple[slice, slice]) -> np.ndarray:
    """Bands of a part of an image, (band, y, x): a whole tile of floats would take more than its detection."""
    part = {"y": at[0], "x": at[1]}
    cut = replace(
        layers, post=layers.post.isel(part), pre=layers.pre.isel(part) if layers.pre else layers.pre
    )
    return np.stack([band.values for band in mnf_image(image, cut).data_vars.values()])


def sample_tile(plan: RunPlan, task: TileTask, context: TileContext) -> Record:
    """Take the tile's part of the sample."""
    epoch, tile, card = plan.by_epoch[task.epoch], plan.by_tile[task.tile], plan.model.card
    statistics = plan.workspace.statistics(task.layer)
    mnf = _read_mnf(plan, statistics)
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


def _fit_mnf(
    plan: RunPlan, epoch: EpochPlan, run_tasks: RunTasks, fence: Callable[[], None]
) -> dict[str, Mnf]:
    images = mnf_images(plan.model.card.inputs)
    if not images:
        return {}
    folder = plan.workspace.statistics(epoch.stat_key)
    made = _run_step(
        plan, epoch, run_tasks, step=_Step(stage="moments", names=[f"-{i}.json" for i in images])
    )
    for image, components in images.items():
        sums = merge(
            Moments.from_json(path.read_text(encoding="utf-8"))
            for path in made
            if path.name.endswith(f"-{image}.json")
        )
        mnf = fit_mnf(sums, bands=MNF_BANDS, components=components)
        fence()
        with staged(folder / f"mnf-{image}") as local:
            write_spectrum(mnf, local, title=f"MNF of {image}, epoch {epoch.name}")
        write_atomic(mnf_file(folder, image), mnf.to_json())
    return _read_mnf(plan, folder)


def _learn(
    plan: RunPlan,
    epoch: EpochPlan,
    run_tasks: RunTasks,
    mnf: dict[str, Mnf],
    *,
    fence: Callable[[], None],
    progress: Progress | None,
) -> Detector:
    folder = plan.workspace.statistics(epoch.stat_key)
    said = content_key([mnf[image].to_json() for image in sorted(mnf)])
    made = _run_step(plan, epoch, run_tasks, step=_Step(stage="sample", names=[".npz"], terms=(said,)))
    drawn = gather(made, plan.model.card.sample_patches)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step of the fit that runs tile by tile.

    names : what follows the tile's key in the names of the files that it leaves; terms : what it depends on
    """

    stage: str
    names: list[str]
    terms: tuple[str, ...] = ()


def _run_step(plan: RunPlan, epoch: EpochPlan, run_tasks: RunTasks, *, step: _Step) -> list[Place]:
    """Run what is due of a step; returns the files that it left, in the order of the plan's tiles."""
    folder = plan.workspace.statistics(epoch.stat_key) / step.stage

    def files(tile: str) -> list[Place]:
        return [folder / f"{tile}{name}" for name in step.names]

    def whole(task: TileTask, ledger: Ledger) -> bool:
        record = ledger.read(task.tile)
        return record is not None and all(
            record.checksums.get(path.name) == sha256_of(path)
            for path in files(task.tile)
            if record.state == "done"
        )

    tasks = list(fit_tasks(plan, epoch.name, step.stage, *step.terms))
    for task, ledger in tasks:
        if not whole(task, ledger):
            ledger.forget(task.tile)  # it vouches for what is not there
    due = [task for task, ledger in tasks if not ledger.complete(task.tile, task.key)]
    if due:
        run_tasks(step.stage, due)
    return _whole_step(tasks, files, of=f"the {step.stage} of epoch {epoch.name!r}")


def _whole_step(
    tasks: list[tuple[TileTask, Ledger]], files: Callable[[str], list[Place]], *, of: str
) -> list[Place]:
    """Return the files of all tiles; raises when one is missing, or when there are none."""
    made, failed = [], []
    for task, ledger in tasks:
        record = ledger.read(task.tile)
        if record is None or record.key != task.key or not record.complete:
            failed.append((task.tile, "not done" if record is None else record.reason))
        elif record.state == "done":
            made += files(task.tile)
    if failed:
        raise IncompleteError(
            f"The fit lacks {of} on {len(failed)} tiles, first {failed[0][0]}: {failed[0][1]}; mend that and run again"
        )
    if not made:
        raise PipelineError(
            f"The fit found nothing for {of}: there is no pixel of which every feature is known; widen the windows, or "
            "raise max_cloud_pct in [cube]"
        )
    return made


def _read_mnf(plan: RunPlan, folder: Place) -> dict[str, Mnf]:
    images = mnf_images(plan.model.card.inputs)
    return {image: Mnf.from_json(mnf_file(folder, image).read_text(encoding="utf-8")) for image in images}


def _pixels(plan: RunPlan, mnf: dict[str, Mnf]) -> int:
    """Pixels to choose from: as the MNF counted them, or all of the area; the tiles' size does not matter."""
    area_px = math.ceil(shapely.area(plan.aoi_shape) / plan.grid.resolution_m**2)
    return max((m.pixels for m in mnf.values()), default=area_px)


def _blocks_with_next(tile_px: int, block_px: int) -> Iterator[tuple[slice, slice]]:
    """Lattice blocks of a tile within its window of one pixel more on each side, with the row and column after each."""
    for r in range(1, tile_px + 1, block_px):
        for c in range(1, tile_px + 1, block_px):
            yield slice(r, r + block_px + 1), slice(c, c + block_px + 1)


def _cluster_blocks(
    plan: RunPlan, epoch: EpochPlan, fitted: Kmeans, mnf: dict[str, Mnf], threads: int
) -> Iterator[ClusterBlock]:
    """Some lattice blocks of the area with their clusters; the same ones whatever the tiles."""
    card, block_px = fitted.card, plan.grid.block_px
    margin = card.window_px // 2
    held = {"pre": plan.config.cube.bands, "post": plan.config.cube.bands, "terrain": ("slope_deg",)}
    found = 0
    for row, col in _places(plan):
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


def _places(plan: RunPlan) -> Iterator[tuple[int, int]]:
    """Rows and columns of the lattice blocks that share area with the area of interest, in the order of their hash."""
    per_tile, block_px = plan.grid.tile_px // plan.grid.block_px, plan.grid.block_px
    offsets = np.arange(per_tile)
    rows = np.concatenate([np.repeat(t.row * per_tile + offsets, per_tile) for t in plan.tiles])
    cols = np.concatenate([np.tile(t.col * per_tile + offsets, per_tile) for t in plan.tiles])
    a, side_m = plan.grid.frame.affine, block_px * plan.grid.resolution_m
    left, top = a.c + cols * side_m, a.f - rows * side_m
    meets = shapely.intersects(plan.aoi_shape, shapely.box(left, top - side_m, left + side_m, top))
    rows, cols = rows[meets], cols[meets]
    order = np.argsort(pixel_hash(rows, cols), kind="stable")
    yield from zip(rows[order].tolist(), cols[order].tolist(), strict=True)
