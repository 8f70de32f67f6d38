"""The run: what is due, in order, on a runner; and what there is to say of it afterwards."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from slidecube.cluster.resources import Profile, load_profile
from slidecube.cluster.runner import Runner, TaskResult, TileTask, open_runner
from slidecube.pipeline.config import Config
from slidecube.pipeline.errors import IncompleteError, PipelineError
from slidecube.pipeline.inventory import (
    CF,
    LANDSLIDE_NODATA,
    PROBABILITY_NODATA,
    REASONS,
    Observability,
    finish_inventory,
)
from slidecube.pipeline.ledger import Ledger
from slidecube.pipeline.lock import Lock, alive, read_lock
from slidecube.pipeline.mosaic_stage import any_detected, mosaic_due, mosaic_run
from slidecube.pipeline.plan import RunPlan, current_run, known_runs, plan, read_plan
from slidecube.pipeline.store import Variable, Workspace, create_arrays, remove_partials
from slidecube.pipeline.tile import TileContext, detect_task_key, run_task

STAGES = ("cube", "detect", "mosaic")
_ENOSPC = os.strerror(errno.ENOSPC)
_EDQUOT = os.strerror(errno.EDQUOT)
_LOG_EVERY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run did.

    complete : nothing is due any more, or the failures lie within the budget
    done, failed : tiles of this run by stage; reasons : of the failures, with their tiles; products : folder or None
    """

    run: str
    complete: bool
    done: dict[str, int]
    failed: dict[str, int]
    reasons: tuple[tuple[str, str], ...] = ()
    scene_reads: int = 0
    products: Path | None = None


def run(
    what: Config | RunPlan,
    *,
    stages: Sequence[str] = STAGES,
    progress: bool = True,
    say: TextIO | None = None,
) -> RunReport:
    """Do what is due of a plan, stage by stage, and leave a record of every tile.

    what : a configuration (its plan is found or made) or a plan; stages : of `STAGES`, in order
    progress : show a bar on a terminal, lines in a log
    Raises PipelineError when the run cannot start, IncompleteError when it must stop (full disk).
    """
    made = what if isinstance(what, RunPlan) else plan(what)
    cluster = made.config.cluster
    profile = load_profile(
        cluster.profile,
        workers=cluster.workers,
        threads_per_worker=cluster.threads_per_worker,
        mem_gb=cluster.mem_gb,
    )
    _refuse_too_large(made, profile)
    with Lock(made.workspace.locks, run=made.run) as lock:
        remove_partials(made.workspace.root)
        _create(made)
        return _Driver(plan=made, profile=profile, lock=lock, progress=progress, say=say or sys.stderr).drive(
            stages
        )


@dataclass(slots=True, kw_only=True)
class _Driver:
    """One run from its first task to its last."""

    plan: RunPlan
    profile: Profile
    lock: Lock
    progress: bool
    say: TextIO
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    reasons: list[tuple[str, str]] = field(default_factory=list)
    scene_reads: int = 0

    def drive(self, stages: Sequence[str]) -> RunReport:
        self._event("run_started", stages=list(stages), profile=self.profile.name)
        if "cube" in stages or "detect" in stages:
            with open_runner(self.profile) as runner:
                if runner.address and self.progress:
                    print(f"Dask dashboard: {runner.address}", file=self.say)
                if "cube" in stages:
                    self._stage("cube", due_cubes(self.plan), runner)
                if "detect" in stages:
                    self._stage("detect", due_detections(self.plan), runner)
        products = None
        if "mosaic" in stages:
            products = self._mosaic()
        complete = self.failed.total() <= self.plan.config.cluster.failure_budget
        self._event("run_ended", complete=complete, done=dict(self.done), failed=dict(self.failed))
        return RunReport(
            run=self.plan.run,
            complete=complete,
            done=dict(self.done),
            failed=dict(self.failed),
            reasons=tuple(self.reasons),
            scene_reads=self.scene_reads,
            products=products,
        )

    def _stage(self, stage: str, tasks: list[TileTask], runner: Runner) -> None:
        context = TileContext(
            workspace=self.plan.workspace.root,
            run=self.plan.run,
            token=self.lock.token,
            threads=self.profile.worker.cpus,
        )
        self._event("stage_started", stage=stage, due=len(tasks))
        self.lock.set_running(min(len(tasks), self.profile.workers))
        results = runner.run(partial(run_task, context), tasks)
        for result in self._shown(stage, results, len(tasks)):
            self._take(result)
        self.lock.set_running(0)

    def _shown(self, stage: str, results: Iterator[TaskResult], total: int) -> Iterable[TaskResult]:
        if not self.progress or not total:
            return results
        tty = self.say.isatty()
        bar: Iterable[TaskResult] = tqdm(
            results,
            total=total,
            desc=f"{stage:>6}",
            unit="tile",
            file=self.say,
            mininterval=0.2 if tty else _LOG_EVERY_S,
            maxinterval=1.0 if tty else _LOG_EVERY_S,
            ascii=not tty,
            dynamic_ncols=tty,
        )
        return bar

    def _take(self, result: TaskResult) -> None:
        task = result.task
        self.scene_reads += result.scene_reads
        self._event(
            "task",
            stage=task.stage,
            layer=task.layer,
            epoch=task.epoch,
            tile=task.tile,
            key=task.key,
            status=result.status,
            reason=result.reason,
            seconds=result.seconds,
            peak_mem_gb=result.peak_mem_gb,
            bytes=result.bytes,
            scene_reads=result.scene_reads,
        )
        if result.status != "failed":
            self.done[task.stage] += 1
            return
        self.failed[task.stage] += 1
        self.reasons.append((f"{task.stage} {task.tile}", result.reason))
        if result.reason.startswith((_ENOSPC, _EDQUOT)):
            raise IncompleteError(
                f"The disk of workspace {self.plan.workspace.root} is full ({result.reason}); free some space and run "
                "the same command: what is done stays done"
            )

    def _mosaic(self) -> Path | None:
        if not mosaic_due(self.plan):
            return self.plan.workspace.products(self.plan.inventory)
        if self.failed.total() and not any_detected(self.plan):
            return None  # the reasons of the failures say more than a missing product
        self._event("stage_started", stage="mosaic", due=1)
        folder = mosaic_run(self.plan, say=self.say if self.progress else None)
        self.done["mosaic"] += 1
        self._event("mosaic", products=str(folder.relative_to(self.plan.workspace.root)))
        return folder

    def _event(self, event: str, **fields: Any) -> None:
        path = self.plan.workspace.events(self.plan.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # a full disk takes no events; the task that met it stops the run with its own message


def due_cubes(made: RunPlan) -> list[TileTask]:
    """List the tiles of all layers that have no record under the plan's key."""
    tasks = []
    for layer in made.layers:
        ledger = Ledger.of(made.workspace.layer(made.grid, layer.name))
        for tile in made.tiles:
            key = made.tasks[layer.name][tile.key][0]
            if not ledger.complete(tile.key, key):
                tasks.append(TileTask(stage="cube", layer=layer.name, epoch="", tile=tile.key, key=key))
    return tasks


def due_detections(made: RunPlan) -> list[TileTask]:
    """List the tiles of all epochs whose detection has no record under its key."""
    tasks = []
    for epoch in made.epochs:
        ledger = Ledger.of(made.workspace.inventory(made.inventory), epoch.name)
        for tile in made.tiles:
            key = detect_task_key(made, epoch.name, tile)
            if not ledger.complete(tile.key, key):
                tasks.append(
                    TileTask(stage="detect", layer=made.inventory, epoch=epoch.name, tile=tile.key, key=key)
                )
    return tasks


def status(where: str | Path) -> dict[str, Any]:
    """Say where the current plan of a workspace stands.

    Returns {"run", "tiles": {stage: {"done", "due", "failed", "running"}}, "scene_reads", "scene_reads_last_run",
    "observability": {name: pixels}, "not_observable": {reason: pixels}, "failures": [{stage, tile, reason}],
    "lost": [{scene, asset, reason}], "complete"}. `scene_reads` counts over the life of the workspace.
    """
    workspace = Workspace.at(where)
    name = current_run(workspace)
    if name is None:
        raise PipelineError(
            f"{where} is not a workspace with a plan; make one with `slidecube plan FILE.toml`"
        )
    made = read_plan(workspace, name)
    running = read_lock(workspace.locks / "driver.json")
    tiles, failures, lost = {}, [], set()
    layers = [(la.name, Ledger.of(workspace.layer(made.grid, la.name))) for la in made.layers]
    pieces = [
        ("cube", layer, ledger, {t: k for t, (k, _) in made.tasks[layer].items()}) for layer, ledger in layers
    ]
    observed: Counter[str] = Counter()
    unseen: Counter[str] = Counter()
    for epoch in made.epochs:
        keys = {tile.key: detect_task_key(made, epoch.name, tile) for tile in made.tiles}
        pieces.append(
            ("detect", epoch.name, Ledger.of(workspace.inventory(made.inventory), epoch.name), keys)
        )
    counts: dict[str, Counter[str]] = {"cube": Counter(), "detect": Counter()}
    for stage, what, ledger, keys in pieces:
        for tile, key in keys.items():
            record = ledger.read(tile)
            state = (
                "due"
                if record is None or record.key != key
                else "failed"
                if record.state == "failed"
                else "done"
            )
            counts[stage][state] += 1
            if record is None or state == "due":
                continue
            lost |= set(record.lost)
            if state == "failed":
                failures.append({"stage": stage, "what": what, "tile": tile, "reason": record.reason})
            for name_, n in record.numbers.items() if stage == "detect" else ():
                if name_.upper() in Observability.__members__:
                    observed[name_] += n
                elif name_.startswith("reason "):
                    unseen[REASONS[int(name_.split()[1])]] += n
    for stage, count in counts.items():
        tiles[stage] = {state: count[state] for state in ("done", "due", "failed", "running")}
    if alive(running) and running is not None and running["run"] == made.run:
        stage = "cube" if tiles["cube"]["due"] else "detect"
        tiles[stage]["running"] = min(running["running"], tiles[stage]["due"])
        tiles[stage]["due"] -= tiles[stage]["running"]
    due = mosaic_due(made)
    tiles["mosaic"] = {"done": int(not due), "due": int(due), "failed": 0, "running": 0}
    total, last = _scene_reads(workspace, made.run)
    return {
        "run": made.run,
        "inventory": made.inventory,
        "tiles": tiles,
        "scene_reads": total,
        "scene_reads_last_run": last,
        "observability": {value.name.lower(): observed[value.name.lower()] for value in Observability},
        "not_observable": {reason: unseen[reason] for i, reason in REASONS.items() if i},
        "failures": failures,
        "lost": [{"scene": s, "asset": a, "reason": r} for s, a, r in sorted(lost)],
        "complete": all(not t["due"] and not t["failed"] and not t["running"] for t in tiles.values()),
        "running": running["run"] if alive(running) and running is not None else None,
    }


def clean(where: str | Path, *, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove what no current plan uses: superseded plans, layers, inventories and products.

    A plan is current while it is the newest of its TOML. Events stay. Returns what was (or would be) removed, with
    its size in bytes.
    """
    workspace = Workspace.at(where)
    current = known_runs(workspace)
    if not current:
        raise PipelineError(f"{where} is not a workspace with a plan; there is nothing to clean")
    with Lock(workspace.locks, run="clean"):
        keep: set[Path] = set()
        for name in current.values():
            made = read_plan(workspace, name)
            stores = [workspace.layer(made.grid, la.name) for la in made.layers]
            stores.append(workspace.inventory(made.inventory))
            keep |= {workspace.plan(name), workspace.products(made.inventory), *stores}
            keep |= {store.with_suffix(".ledger") for store in stores}
        candidates = [
            *(p for p in (workspace.root / "plans").glob("*") if p.is_dir()),
            *(workspace.root / "layers").glob("*/*"),
            *(workspace.root / "inventories").glob("*"),
            *(workspace.root / "products").glob("*"),
        ]
        removed = [(path, _size(path)) for path in sorted(candidates) if path not in keep]
        if not dry_run:
            for path, _ in removed:
                # the ledger goes first in name order (".ledger" before ".zarr"): data without records counts for nothing
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return removed


def _refuse_too_large(made: RunPlan, profile: Profile) -> None:
    projected = made.estimate.worker_mem_gb(profile.worker.cpus)
    if projected > profile.worker.mem_gb:
        raise PipelineError(
            f"Projected memory {projected:.1f} GB a worker exceeds mem_gb={profile.worker.mem_gb:g} "
            f"({made.estimate.max_dates} scenes on the fullest tile, tile_px={made.grid.tile_px}, "
            f"{profile.worker.cpus} threads); lower tile_px, threads_per_worker or max_cloud_pct, or raise mem_gb"
        )


def _create(made: RunPlan) -> None:
    """Make the arrays that are missing; what is there stays."""
    frame = made.grid.frame
    common = {"tile_px": made.grid.tile_px, "block_px": made.grid.block_px}
    for layer in made.layers:
        variables = TERRAIN if layer.kind == "terrain" else _optical_variables(made)
        attrs = {"slidecube:layer_key": layer.key, "slidecube:window": str(layer.window or "")}
        create_arrays(
            made.workspace.layer(made.grid, layer.name), variables, geobox=frame, attrs=attrs, **common
        )
    rows, cols = [t.row for t in made.tiles], [t.col for t in made.tiles]
    px = made.grid.tile_px
    extent = frame[min(rows) * px : (max(rows) + 1) * px, min(cols) * px : (max(cols) + 1) * px]
    inventory = made.workspace.inventory(made.inventory)
    create_arrays(
        inventory,
        INVENTORY,
        geobox=extent,
        leading={"epoch": len(made.epochs)},
        attrs={"slidecube:run": made.run, "slidecube:epochs": [e.name for e in made.epochs]},
        **common,
    )
    finish_inventory(inventory, geobox=extent, epochs=[e.name for e in made.epochs])


_DAYS = {"units": "days since 1970-01-01", "long_name": "date", "comment": "0 = none"}

TERRAIN = {
    "elevation": Variable(
        dtype="float32", fill=float("nan"), attrs={"units": "m", "standard_name": "surface_altitude"}
    ),
    "slope_deg": Variable(
        dtype="uint16", fill=65535, attrs={"units": "degree", "scale_factor": 0.01, "long_name": "slope"}
    ),
    "aspect_deg": Variable(
        dtype="uint16",
        fill=65535,
        attrs={"units": "degree", "scale_factor": 0.01, "long_name": "aspect from grid north"},
    ),
}
"""Stored variables of the terrain layer."""

INVENTORY = {
    "probability": Variable(dtype="uint16", fill=PROBABILITY_NODATA, attrs=CF["probability"]),
    "spread": Variable(dtype="uint16", fill=PROBABILITY_NODATA, attrs=CF["spread"]),
    "landslide": Variable(dtype="uint8", fill=LANDSLIDE_NODATA, attrs=CF["landslide"]),
    "observability": Variable(dtype="uint8", fill=Observability.NOT_PROCESSED, attrs=CF["observability"]),
    "reason": Variable(dtype="uint8", fill=0, attrs=CF["reason"]),
}
"""Stored variables of an inventory, each (epoch, y, x)."""


def _optical_variables(made: RunPlan) -> dict[str, Variable]:
    band = {"units": "1", "scale_factor": 1e-4, "add_offset": -0.1, "long_name": "surface reflectance"}
    bands = {name: Variable(dtype="uint16", fill=0, attrs=band) for name in made.config.cube.bands}
    count = Variable(
        dtype="uint16", fill=0, attrs={"units": "1", "long_name": "number of clear observations"}
    )
    dates = {
        name: Variable(dtype="uint16", fill=0, attrs=_DAYS) for name in ("date_first", "date_last", "date")
    }
    return {**bands, "clear_count": count, **dates}


def _scene_reads(workspace: Workspace, run_name: str) -> tuple[int, int]:
    """Scenes read over the life of the workspace, and in the last run of a plan."""
    total = last = 0
    for path in sorted((workspace.root / "events").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # the last line of a killed driver
                continue
            total += event.get("scene_reads", 0)
            if path.stem == run_name:
                last = 0 if event["event"] == "run_started" else last + event.get("scene_reads", 0)
    return total, last


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
