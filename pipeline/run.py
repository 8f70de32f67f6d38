"""The run: what is due, in order, on a runner; and what there is to say of it afterwards."""

from __future__ import annotations

import datetime as dt
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from slidecube.catalog.load import require_loader
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.limits import memory_gb
from slidecube.cluster.pools import open_runner
from slidecube.cluster.resources import Profile, load_profile
from slidecube.cluster.runner import HOPELESS, Retried, Runner, TaskResult, TileTask
from slidecube.pipeline.config import Config
from slidecube.pipeline.errors import IncompleteError, PipelineError
from slidecube.pipeline.events import GIVEN_UP, event_files, unfinished, write_event
from slidecube.pipeline.fit import fit_epoch
from slidecube.pipeline.fit_state import contributing, fit_state, thaw, tried, unfitted
from slidecube.pipeline.land_cover import grow_tree, tree_lines
from slidecube.pipeline.layers import create_stores
from slidecube.pipeline.ledger import Ledger, Record
from slidecube.pipeline.lock import Job, Lock, Shard
from slidecube.pipeline.mosaic_stage import any_detected, mosaic_due, mosaic_run
from slidecube.pipeline.plan import plan
from slidecube.pipeline.progress import progress
from slidecube.pipeline.run_plan import EpochPlan, RunPlan
from slidecube.pipeline.statistics import frozen_digest
from slidecube.pipeline.storage import Place, below, guard
from slidecube.pipeline.store import remove_partials
from slidecube.pipeline.tasks import FIT_STAGES, TileContext, ledger_of, tasks_of, wanted_of
from slidecube.pipeline.tile import run_task

STAGES = ("cube", "fit", "detect", "mosaic")
_STORES_S = 600.0
"""How long a shard waits while others make the stores in a bucket, one after another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run did.

    complete : nothing is due any more, or the failures lie within the budget
    drained : it was asked to end before it was through, and some work is left
    done, failed : tiles of this run by stage; reasons : of the failures, with their tiles; products : folder or None
    statistics : what is fitted, an entry an epoch as of `fit_state`; land_cover : a line a tree
    """

    run: str
    complete: bool
    done: dict[str, int]
    failed: dict[str, int]
    reasons: tuple[tuple[str, str], ...] = ()
    scene_reads: int = 0
    products: Place | None = None
    statistics: tuple[dict[str, Any], ...] = ()
    land_cover: tuple[str, ...] = ()
    drained: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The part of a run that one job of a batch system does.

    shard : of the tiles of a stage; job : by which an earlier start of the same job is known to be gone
    """

    shard: Shard | None = None
    job: Job = field(default_factory=Job)


class Drain:
    """A request to begin nothing more; may be made from a signal handler."""

    def __init__(self) -> None:
        self.asked = False
        self.runner: Runner | None = None

    def ask(self) -> None:
        """Let what is in work come to its end, and end then."""
        self.asked = True
        if self.runner is not None:
            self.runner.drain()


def run(
    what: Config | RunPlan,
    *,
    stages: Sequence[str] = STAGES,
    again: bool = False,
    mend: bool = False,
    profile: str | None = None,
    part: Part | None = None,
    drain: Drain | None = None,
    progress: bool = True,
    say: TextIO | None = None,
) -> RunReport:
    """Do what is due of a plan, stage by stage, and leave a record of every tile.

    what : a configuration (its plan is found or made) or a plan; stages : of `STAGES`, in order
    again : fit once more what is frozen, with the tiles that were mended since
    mend : make tiles again that do without scenes which a passing fault kept away
    profile : in place of the configuration's; part : of the run, None = all of it; drain : how to end it early
    progress : show a bar on a terminal, lines in a log
    Raises PipelineError when the run cannot start, IncompleteError when it must stop (full disk).
    """
    made = what if isinstance(what, RunPlan) else plan(what)
    part = part or Part()
    where = _profile_of(made.config, profile)
    require_loader(made.config.cluster.loader, made.grid.crs)
    _refuse_too_large(made, where)
    with Lock(made.workspace.locks, run=made.run, shard=part.shard, job=part.job) as lock:
        if part.shard is None:  # shards beside us would lose what they are writing
            remove_partials(made.workspace)
        _create_stores(made, alone=part.shard is None)
        if again:
            thaw(made)
        driver = _Driver(
            plan=made,
            profile=where,
            lock=lock,
            shard=part.shard,
            mend=mend,
            drain=drain or Drain(),
            progress=progress,
            say=say or sys.stderr,
        )
        return driver.drive(stages)


def _create_stores(made: RunPlan, *, alone: bool) -> None:
    """Make the stores, one shard after another: a half-made one looks like one that was lost, records and all."""
    folder = made.workspace.locks / "stores"
    if alone:
        create_stores(made)
        return
    with guard(folder) if isinstance(folder, Path) else Lock(folder, run=made.run, patience_s=_STORES_S):
        create_stores(made)


def _profile_of(config: Config, name: str | None) -> Profile:
    """Profile of a configuration, or another one, to which the widths in the configuration do not belong."""
    cluster = config.cluster
    if name is not None:
        return load_profile(name)
    profile = load_profile(
        cluster.profile,
        base=config.base,
        workers=cluster.workers,
        threads_per_worker=cluster.threads_per_worker,
        mem_gb=cluster.mem_gb,
    )
    return replace(profile, deadline_min=cluster.deadline_min or profile.deadline_min)


@dataclass(slots=True, kw_only=True)
class _Driver:
    """One run from its first task to its last."""

    plan: RunPlan
    profile: Profile
    lock: Lock
    shard: Shard | None
    mend: bool
    drain: Drain
    progress: bool
    say: TextIO
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    reasons: list[tuple[str, str]] = field(default_factory=list)
    lost_tiles: set[str] = field(default_factory=set)
    gave_up: bool = False
    scene_reads: int = 0

    def drive(self, stages: Sequence[str]) -> RunReport:
        inherited = self._recover_events()
        self._event(
            "run_started",
            stages=list(stages),
            profile=self.profile.name,
            host=socket.gethostname(),
            driver=self.lock.token,
        )
        # nothing due starts no workers; what is due of detect shows when the cubes are done
        if any(self._due(stage) for stage in ("cube", "detect") if stage in stages) or (
            "fit" in stages and (unfitted(self.plan) or self._due("classify"))
        ):
            with open_runner(self.profile) as runner:
                self.drain.runner = runner
                if self.drain.asked:
                    runner.drain()
                self.lock.set_dashboard(runner.address)
                if runner.address and self.progress:
                    print(f"Dask dashboard: {runner.address}", file=self.say)
                self._on(runner, stages)
        products = None
        if "mosaic" in stages and not self.drain.asked:
            products = self._mosaic()
        complete = len(self.lost_tiles) <= self.plan.config.cluster.failure_budget
        if "fit" in stages and unfitted(self.plan):
            complete = False
        drained = self.drain.asked and (
            any(self._due(stage) for stage in stages if stage in {"cube", "detect"})
            or not {"fit", "mosaic"}.isdisjoint(stages)
        )
        self._fold()
        # a record may have been on its way to a slow disk when we looked first, or a worker that was given up went on
        if inherited or self.gave_up:
            self._recover_events()
        self._event("run_ended", complete=complete, done=dict(self.done), failed=dict(self.failed))
        return RunReport(
            run=self.plan.run,
            complete=complete and not drained,
            drained=drained,
            done=dict(self.done),
            failed=dict(self.failed),
            reasons=tuple(self.reasons),
            scene_reads=self.scene_reads,
            products=products,
            statistics=tuple(fit_state(self.plan, e) for e in self.plan.epochs if e.stat_key),
            land_cover=tuple(tree_lines(self.plan)),
        )

    def _on(self, runner: Runner, stages: Sequence[str]) -> None:
        if "cube" in stages:
            self._stage("cube", self._due("cube"), runner)
        if "fit" in stages and not self.drain.asked:
            self._classify(runner)
            self._fit(runner)
        if "detect" not in stages or self.drain.asked:
            return
        waiting = unfitted(self.plan)
        if waiting and not self.reasons:
            raise PipelineError(
                f"Nothing is fitted yet for epoch {waiting[0].name!r}, and {self.plan.card.address} learns from "
                "the cube; run `slidecube fit` first"
            )
        unfit = {epoch.name for epoch in waiting}
        self._stage("detect", self._ready([t for t in self._due("detect") if t.epoch not in unfit]), runner)

    def _ready(self, tasks: list[TileTask]) -> list[TileTask]:
        """Leave out the detections whose layers, or those of the tiles beside, were not tried yet.

        They would be made with a seam and, when the neighbour is there, again. One that failed is not waited for.
        """
        untried = {}
        for epoch in self.plan.epochs:
            known = tried(self.plan, epoch)
            untried[epoch.name] = {(t.row, t.col) for t in self.plan.tiles if t.key not in known}
        ready = []
        for task in tasks:
            tile = self.plan.by_tile[task.tile]
            around = {(tile.row + r, tile.col + c) for r in (-1, 0, 1) for c in (-1, 0, 1)}
            if untried[task.epoch].isdisjoint(around):
                ready.append(task)
                continue
            self.lost_tiles.add(task.tile)
            self.reasons.append(
                (
                    f"detect {task.tile}",
                    "waits for the cubes of the tile and of those beside it; run `slidecube cube`",
                )
            )
        return ready

    def _due(self, stage: str) -> list[TileTask]:
        """What is due of a stage and of our shard."""
        return due(self.plan, stage, shard=self.shard, mend=self.mend and stage == "cube")

    def _classify(self, runner: Runner) -> None:
        """Grow the trees of the land cover that are not frozen yet, and apply them."""
        tasks = self._due("classify")
        layers = {task.layer for task in tasks}
        for epoch in self.plan.epochs:
            if not epoch.tree_key or epoch.land_cover not in layers:
                continue
            try:
                grow_tree(self.plan, epoch, self.lock.require)
            except IncompleteError as error:
                self.reasons.append((f"classify {epoch.name}", str(error)))
                self.lost_tiles |= {task.tile for task in tasks if task.layer == epoch.land_cover}
                tasks = [task for task in tasks if task.layer != epoch.land_cover]
        if tasks:
            self._stage("classify", tasks, runner)

    def _fit(self, runner: Runner) -> None:
        """Fit what is not frozen yet; what one epoch lacks does not keep another from its fit."""
        for epoch in unfitted(self.plan):
            if self._lacking(epoch):
                continue
            self._event("fit_started", epoch=epoch.name, key=epoch.stat_key)
            try:
                with self._bar(unit="epoch", desc="train") as bar:
                    folder = fit_epoch(
                        self.plan,
                        epoch,
                        lambda stage, tasks: self._stage(stage, tasks, runner),
                        threads=self.profile.worker.cpus,
                        fence=self.lock.require,
                        progress=partial(_move, bar),
                    )
            except IncompleteError as error:
                self.lock.require()
                self.reasons.append((f"fit {epoch.name}", str(error)))
                self.lost_tiles |= set(self.plan.tiles.keys)
                continue
            self.done["fit"] += 1
            self._event("fit_frozen", epoch=epoch.name, key=epoch.stat_key, digest=frozen_digest(folder))

    def _lacking(self, epoch: EpochPlan) -> bool:
        """Tell whether an epoch cannot be fitted: what is frozen stays, so it must not be frozen too early.

        Tiles whose layers failed may be missing, up to the failure budget; tiles that were not tried may not.
        """
        lacking = set(self.plan.tiles.keys) - contributing(self.plan, epoch)
        untried = lacking - tried(self.plan, epoch)
        if not untried and len(lacking) <= self.plan.config.cluster.failure_budget:
            return False
        self.lost_tiles |= lacking
        self.reasons += [
            (f"fit {tile}", "not fitted: the tile's layers are not done; run `slidecube cube`")
            for tile in sorted(lacking)
        ]
        return True

    def _stage(self, stage: str, tasks: list[TileTask], runner: Runner) -> None:
        context = TileContext(
            workspace=self.plan.workspace.root,
            run=self.plan.run,
            lock=self.lock.path.name,
            token=self.lock.token,
            threads=self.profile.worker.cpus,
            loader=self.plan.config.cluster.loader,
            mend=self.mend,
        )
        self._event("stage_started", stage=stage, due=len(tasks))
        self.lock.set_running(min(len(tasks), self.profile.workers))
        # closed here: after the lock is given back, no thread may be at work
        try:
            hopeless = max(HOPELESS, self.plan.config.cluster.failure_budget + 1)
            work = runner.run(partial(run_task, context), tasks, tell=self._retried, hopeless=hopeless)
            with self._bar(desc=stage, unit="tile", total=len(tasks)) as bar, closing(work) as results:
                try:
                    for result in results:
                        self._take(result)
                        bar.update()
                except KeyboardInterrupt:  # a tile may take hours
                    runner.leave()
                    raise
        except ClusterError as error:  # nothing works, or nobody is left to work
            raise IncompleteError(f"{error}; what is done stays done") from None
        self.lock.set_running(0)

    def _retried(self, again: Retried) -> None:
        task = again.task
        self._event(
            "retry",
            stage=task.stage,
            layer=task.layer,
            epoch=task.epoch,
            tile=task.tile,
            attempt=task.attempt,
            fault=again.fault,
            reason=again.reason,
            worker=again.worker,
            wait_s=round(again.wait_s, 3),
        )

    def _bar(self, *, desc: str, unit: str, total: int | None = None) -> Any:
        """Progress, which is not shown where nobody wants it or nothing is due."""
        if not self.progress or total == 0:
            return tqdm(disable=True)
        return progress(self.say, desc=desc, unit=unit, total=total)

    def _fold(self) -> None:
        """Fold a nation's records, where nobody else writes: shards work side by side."""
        if self.shard is None:
            self.lock.require()
            for wanted in wanted_of(self.plan):
                wanted.ledger.pack()

    def _take(self, result: TaskResult) -> None:
        task = result.task
        self.scene_reads += result.scene_reads
        self._task_event(task, result)
        if result.status != "failed":
            if task.stage not in FIT_STAGES:  # which count as one fit
                self.done[task.stage] += 1
            return
        self.failed[task.stage] += 1
        self.lost_tiles.add(task.tile)
        self.reasons.append((f"{task.stage} {task.tile}", result.reason))
        if result.fault == "fenced":
            self.lock.require()
        self._quarantine(result)
        if result.fault == "disk":
            raise IncompleteError(
                f"The disk of workspace {self.plan.workspace.root} is full ({result.reason}); free some space and run "
                "the same command: what is done stays done"
            )

    def _quarantine(self, result: TaskResult) -> None:
        """Record a tile that its workers could not: it ended them, or was never done."""
        task, ledger = result.task, ledger_of(self.plan, result.task)
        if result.fault not in GIVEN_UP:
            return
        self.gave_up = True
        earlier = ledger.read(task.tile)
        if earlier is not None and earlier.key == task.key and earlier.complete:
            return  # it was done when its worker died
        self.lock.require()
        ledger.write(
            Record(
                tile=task.tile,
                key=task.key,
                state="failed",
                reason=result.reason,
                fault=result.fault,
                attempts=task.attempt,
                seconds=result.seconds,
                host=socket.gethostname(),
                written_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                driver=self.lock.token,
            )
        )

    def _mosaic(self) -> Place | None:
        self.lock.require()
        undetected = {task.tile for task in due(self.plan, "detect")} - self.lost_tiles
        self.reasons += [(f"detect {tile}", "not detected yet") for tile in sorted(undetected)]
        self.lost_tiles |= undetected
        if not mosaic_due(self.plan):
            return self.plan.workspace.products(self.plan.inventory)
        if self.lost_tiles and not any_detected(self.plan):
            return None  # the reasons of the failures say more than a missing product
        self._event("stage_started", stage="mosaic", due=1)
        folder = mosaic_run(self.plan, say=self.say if self.progress else None, fence=self.lock.require)
        self.done["mosaic"] += 1
        self._event("mosaic", products=below(folder, self.plan.workspace.root))
        return folder

    def _recover_events(self) -> bool:
        """Tell what a killed driver could not: the tiles that were recorded and not told of.

        Otherwise the scenes that they read would not be counted. No times are compared: clocks are set, and those of
        two machines differ. Who holds the workspace alone tells it of the shards, too, which may never come again.
        Returns whether there was such a driver.
        """
        if self.shard is not None:
            return self._recover(self._events)
        found = [
            self._recover(path) for path in event_files(self.plan.workspace.root / "events", self.plan.run)
        ]
        return any(found)

    def _recover(self, path: Place) -> bool:
        """Tell what is missing in a file of events; one of a shard ends with that."""
        open_ = unfinished(path)
        if not open_.suspects:
            return False
        mine = None if self.shard is None else set(_dealt(self.plan, self.shard))
        untold = {wanted.ledger.folder: _by(wanted.ledger, open_.suspects) for wanted in wanted_of(self.plan)}
        for task, ledger in tasks_of(self.plan):
            driver = untold[ledger.folder].get((task.tile, task.key), "")
            if (
                not driver
                or (driver, task.key, True) in open_.told
                or (mine is not None and task not in mine)
            ):
                continue
            record = ledger.read(task.tile)
            if record is None or record.key != task.key or (driver, task.key, record.complete) in open_.told:
                continue
            self._task_event(task, record, path)
        if path != self._events and open_.begun:
            self._event("run_ended", path, complete=False, done={}, failed={})
        return bool(open_.begun)

    def _task_event(self, task: TileTask, result: TaskResult | Record, path: Place | None = None) -> None:
        self._event(
            "task",
            path,
            stage=task.stage,
            layer=task.layer,
            epoch=task.epoch,
            tile=task.tile,
            key=task.key,
            status=result.status if isinstance(result, TaskResult) else result.state,
            reason=result.reason,
            fault=result.fault or "",
            attempt=task.attempt,
            seconds=result.seconds,
            peak_mem_gb=result.peak_mem_gb,
            bytes=result.bytes,
            scene_reads=result.scene_reads,
            driver=self.lock.token if isinstance(result, TaskResult) else result.driver,
        )

    def _event(self, event: str, path: Place | None = None, **fields: Any) -> None:
        """Tell something, if this driver still may: who took over has told it already. path : of another's events."""
        self.lock.require()
        write_event(path or self._events, event, **fields)

    @property
    def _events(self) -> Place:
        """File of our events: each driver appends to its own."""
        return self.plan.workspace.events(self.plan.run, "" if self.shard is None else self.shard.slug)


def _move(bar: Any, done: int, total: int) -> None:
    if bar.total != total:  # it begins now, whatever came before the training
        bar.reset(total)
    bar.update(done - bar.n)


def due(made: RunPlan, stage: str, *, shard: Shard | None = None, mend: bool = False) -> list[TileTask]:
    """List the tasks of a stage, or of a shard of it, that have no finished record under the plan's key.

    Those that failed before come last: they may fail again, and must not keep the others waiting.
    mend : and those that do without scenes which a passing fault kept away
    """
    tasks = list(tasks_of(made, stage))
    if shard is not None:
        tasks = tasks[shard.index :: shard.count]
    ledgers = {ledger.folder: ledger for _, ledger in tasks}
    known = {folder: ledger.keys() for folder, ledger in ledgers.items()}
    lacking = {folder: ledger.passing() for folder, ledger in ledgers.items()} if mend else {}
    found: list[TileTask] = []
    suspects: list[TileTask] = []
    for task, ledger in tasks:
        record = known[ledger.folder].get(task.tile)
        if record == (task.key, False):
            suspects.append(replace(task, suspect=True))
        elif record != (task.key, True) or task.tile in lacking.get(ledger.folder, ()):
            found.append(task)
    return found + suspects


def _by(ledger: Ledger, drivers: frozenset[str]) -> dict[tuple[str, str], str]:
    """Records that some drivers wrote: (tile, key) -> driver."""
    table = ledger.table("key", "driver")
    rows = zip(*(table[name].to_pylist() for name in ("tile", "key", "driver")), strict=True)
    return {(tile, key): driver for tile, key, driver in rows if driver in drivers}


def _dealt(made: RunPlan, shard: Shard) -> list[TileTask]:
    return [task for task, _ in list(tasks_of(made, shard.stage))[shard.index :: shard.count]]


def _refuse_too_large(made: RunPlan, profile: Profile) -> None:
    held = memory_gb()
    if made.estimate.fit_mem_gb > held and unfitted(made):
        raise PipelineError(
            f"Projected memory {made.estimate.fit_mem_gb:.1f} GB of the fit exceeds the {held:.1f} GB that this "
            "process may use; lower sample in [detect] parameters"
        )
    projected = made.estimate.worker_mem_gb(profile.worker.cpus)
    if projected > profile.worker.mem_gb:
        raise PipelineError(
            f"Projected memory {projected:.1f} GB a worker exceeds mem_gb={profile.worker.mem_gb:g} "
            f"({made.estimate.max_dates} scenes on the fullest tile, tile_px={made.grid.tile_px}, "
            f"{profile.worker.cpus} threads); lower tile_px, threads_per_worker or max_cloud_pct, or raise mem_gb"
        )
