"""Where a workspace stands, and what of it nobody needs any more."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from slidecube.pipeline.coregistration import Shift, shifts_in
from slidecube.pipeline.drivers import Drivers
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.events import read_events
from slidecube.pipeline.fit_state import fit_state, unfitted
from slidecube.pipeline.inventory import REASONS, Observability
from slidecube.pipeline.land_cover import tree_lines
from slidecube.pipeline.ledger import Ledger
from slidecube.pipeline.lock import Lock
from slidecube.pipeline.mosaic_stage import mosaic_due
from slidecube.pipeline.pace import pace
from slidecube.pipeline.plan_files import INDEX, PLAN, collector_paused, current_run, known_runs, read_plan
from slidecube.pipeline.queue import jobs_of, queued_runs
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.shift_table import shift_sums
from slidecube.pipeline.storage import Place, matching, remove_tree, size_of, sizes
from slidecube.pipeline.store import Workspace
from slidecube.pipeline.tasks import FIT_STAGES, Wanted, wanted_of

STATES = ("done", "due", "failed", "running")


@dataclass(slots=True)
class _Tally:
    """Sums over the records of a plan."""

    tiles: dict[str, Counter[str]] = field(default_factory=lambda: {"cube": Counter(), "detect": Counter()})
    observed: Counter[str] = field(default_factory=Counter)
    unseen: Counter[str] = field(default_factory=Counter)
    shifts: list[Shift | None] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    lost: set[tuple[str, ...]] = field(default_factory=set)
    substituted: set[tuple[str, ...]] = field(default_factory=set)
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mem_gb: float = 0.0

    def add(self, wanted: Wanted) -> None:
        """Take in the records of a layer or an epoch."""
        told = wanted.ledger.table(*_TOLD)
        keys = pa.array(wanted.keys.values(), pa.string())
        of = keys.take(pc.index_in(told["tile"], value_set=pa.array(wanted.keys, pa.string())))
        known = told.filter(pc.fill_null(pc.equal(of, told["key"]), False))
        failed = known.filter(pc.equal(known["state"], "failed"))
        for tile, reason in zip(failed["tile"].to_pylist(), failed["reason"].to_pylist(), strict=True):
            failure = {"stage": wanted.stage, "what": wanted.what, "tile": tile, "reason": reason}
            self.failures.append(failure)
        # a nation's records say few different things
        for seen, name in ((self.lost, "lost"), (self.substituted, "substituted")):
            seen |= {tuple(entry) for text in known[name].unique().to_pylist() for entry in json.loads(text)}
        sums = known.group_by([]).aggregate([("bytes", "sum"), ("seconds", "sum"), ("peak_mem_gb", "max")])
        size, seconds, peak = (column[0].as_py() for column in sums.columns)
        self.bytes += size or 0
        self.seconds[wanted.stage] = self.seconds.get(wanted.stage, 0.0) + (seconds or 0.0)
        self.peak_mem_gb = max(self.peak_mem_gb, peak or 0.0)
        counts = self.tiles.setdefault(wanted.stage, Counter())
        counts["due"] += len(wanted.keys) - len(known)
        counts["done"] += len(known) - len(failed)
        counts["failed"] += len(failed)
        if wanted.stage == "detect":
            for said in known["numbers"].value_counts().to_pylist():
                self._count(json.loads(said["values"]), said["counts"])

    def _count(self, numbers: dict[str, int], tiles: int) -> None:
        """Take in the pixels of so many tiles of equal numbers: most of a nation is all of one kind."""
        self.shifts += [shift for shift in shifts_in(numbers).values() for _ in range(tiles)]
        for name, n in numbers.items():
            if name.upper() in Observability.__members__:
                self.observed[name] += n * tiles
            elif name.startswith("reason "):
                self.unseen[REASONS[int(name.split()[1])]] += n * tiles


_TOLD = ("key", "state", "reason", "lost", "substituted", "numbers", "bytes", "seconds", "peak_mem_gb")
"""What of the records is summed up."""


@collector_paused()
def status(where: str | Place, *, drivers: Drivers | None = None) -> dict[str, Any]:
    """Say where the current plan of a workspace stands.

    drivers : as they were seen before, by who looks again and again

    Returns {"run", "inventory", "tiles": {stage: {"done", "due", "failed", "running"}}, "scene_reads",
    "scene_reads_last_run", "jobs": as of `jobs_of`,
    "statistics": [{epoch, key, frozen, clusters, reasons, repaired_tiles, sheet}],
    "land_cover": what each tree of it learnt from, a line each,
    "observability": {name: pixels}, "not_observable": {reason: pixels},
    "shifts": as of `shift_sums`, {} where no images are compared,
    "failures": [{stage, what, tile, reason}], "lost": [{scene, asset, reason}],
    "substituted": [{scene, asset, source, reason}], "complete", "running", "drivers": at work,
    "dashboards": their addresses,
    "silent": [{run, shard, host, silent_s}] of drivers elsewhere whose heartbeat has stopped,
    "pace": {stage: tiles a minute}, "minutes_left": at that pace, None when it is not known,
    "used": {"bytes", "task_hours", "peak_mem_gb"}, "predicted": {"bytes", "cpu_hours", "peak_mem_gb"}}.
    `scene_reads` counts over the life of the workspace.
    """
    workspace = Workspace.at(where)
    name = current_run(workspace)
    if name is None:
        raise PipelineError(
            f"{where} is not a workspace with a plan; make one with `slidecube plan FILE.toml`"
        )
    made = read_plan(workspace, name)
    tally = _Tally()
    keys = {}
    for wanted in wanted_of(made):
        tally.add(wanted)
        if wanted.stage == "detect":
            keys[wanted.what] = wanted.keys
    tiles = {stage: {state: count[state] for state in STATES} for stage, count in tally.tiles.items()}
    at_work, silent = (drivers or Drivers()).look(workspace.locks)
    fits = [fit_state(made, epoch) for epoch in made.epochs if epoch.stat_key]
    if fits:
        fit_failures = _fit_failures(made)
        tally.failures += fit_failures
        frozen, stuck = sum(fit["frozen"] for fit in fits), len({f["what"] for f in fit_failures})
        fit_tiles = {"done": frozen, "due": len(fits) - frozen - stuck, "failed": stuck, "running": 0}
        tiles["fit"] = fit_tiles
    tiles = {stage: tiles[stage] for stage in ("cube", "classify", "fit", "detect") if stage in tiles}
    in_work = sum(lock["running"] for lock in at_work if lock["run"] == made.run)
    if in_work:
        stage = next((stage for stage in tiles if tiles[stage]["due"]), "detect")
        now = min(in_work, tiles[stage]["due"])
        tiles[stage] = {**tiles[stage], "running": now, "due": tiles[stage]["due"] - now}
    due = mosaic_due(made, formats=(), keys=keys)  # the plan's TOML may be older than the one that was run
    tiles["mosaic"] = {"done": int(not due), "due": int(due), "failed": 0, "running": 0}
    total, last = _scene_reads(workspace, made.run)
    speed = pace(workspace.root / "events", made.run)
    return {
        "run": made.run,
        "inventory": made.inventory,
        "tiles": tiles,
        "scene_reads": total,
        "scene_reads_last_run": last,
        "jobs": jobs_of(workspace, made.run),
        "statistics": fits,
        "land_cover": tree_lines(made),
        "observability": {v.name.lower(): tally.observed[v.name.lower()] for v in Observability},
        "not_observable": {reason: tally.unseen[reason] for i, reason in REASONS.items() if i},
        "shifts": shift_sums(tally.shifts, made),
        "failures": tally.failures,
        "lost": [{"scene": s, "asset": a, "reason": r} for s, a, r in sorted(tally.lost)],
        "substituted": [
            {"scene": s, "asset": a, "source": o, "reason": r} for s, a, o, r in sorted(tally.substituted)
        ],
        "complete": not any(t[state] for t in tiles.values() for state in ("due", "failed", "running")),
        "running": at_work[0]["run"] if at_work else None,
        "drivers": len([lock for lock in at_work if lock["run"] == made.run]),
        "dashboards": [lock["dashboard"] for lock in at_work if lock["dashboard"]],
        "silent": [{name: lock[name] for name in ("run", "shard", "host", "silent_s")} for lock in silent],
        "pace": speed,
        "minutes_left": _minutes_left(tiles, speed),
        "used": {
            "bytes": tally.bytes,
            "task_hours": round(sum(tally.seconds.values()) / 3600, 4),
            "peak_mem_gb": tally.peak_mem_gb,
        },
        "predicted": {
            "bytes": round(made.estimate.stored_gb * 1e9),
            "cpu_hours": made.estimate.cpu_hours,
            "peak_mem_gb": made.estimate.peak_mem_gb,
        },
    }


def under_way(state: dict[str, Any]) -> bool:
    """Tell whether a driver is at work, or a job queued or running, by what `status` found."""
    return bool(state["running"]) or any(job["pending"] or job["running"] for job in state["jobs"])


def work_due(state: dict[str, Any]) -> bool:
    """Tell whether something is due, by what `status` found."""
    return any(counts["due"] for counts in state["tiles"].values())


def _minutes_left(tiles: dict[str, dict[str, int]], speed: dict[str, float]) -> float | None:
    """Minutes until what is due is done; None while a stage that is due has no pace yet."""
    left = {stage: counts["due"] + counts["running"] for stage, counts in tiles.items()}
    left = {stage: left.get(stage, 0) for stage in ("cube", "detect") if left.get(stage, 0)}
    if not left or any(not speed.get(stage) for stage in left):
        return None
    return round(sum(n / speed[stage] for stage, n in left.items()), 1)


def _fit_failures(made: RunPlan) -> list[dict[str, str]]:
    """List what failed of fits that are not frozen, tile by tile."""
    return [
        {"stage": stage, "what": epoch.name, "tile": record.tile, "reason": record.reason}
        for epoch in unfitted(made)
        for stage in FIT_STAGES
        for record in Ledger.of(made.workspace.statistics(epoch.stat_key) / stage)
        if not record.complete
    ]


def clean(where: str | Place, *, dry_run: bool = False) -> list[tuple[Place, int]]:
    """Remove what no current plan uses: superseded plans, layers, inventories and products.

    A plan is current while it is the newest of its TOML, and while jobs of it are queued or running, or may be: those
    go on with it by its name. Events stay. Returns what was (or would be) removed, with
    its size in bytes.
    """
    workspace = Workspace.at(where)
    current = known_runs(workspace)
    if not current:
        raise PipelineError(f"{where} is not a workspace with a plan; there is nothing to clean")
    with Lock(workspace.locks, run="clean"):
        keep: set[Place] = set()
        waiting = {run for run in queued_runs(workspace) if (workspace.plan(run) / PLAN).exists()}
        for name in {*current.values(), *waiting}:
            made = read_plan(workspace, name)
            stores = [workspace.layer(made.grid, la.name) for la in made.layers]
            stores.append(workspace.inventory(made.inventory))
            keep |= {workspace.plan(name), workspace.products(made.inventory), *stores}
            keep |= {store.with_suffix(".ledger") for store in stores}
            fits = {key for epoch in made.epochs for key in (epoch.stat_key, epoch.tree_key) if key}
            keep |= {workspace.statistics(key) for key in fits}
        candidates = matching(
            workspace.root, "plans/*", "layers/*/*", "statistics/*", "inventories/*", "products/*"
        )
        candidates = [place for place in candidates if place.name != INDEX and not place.name.startswith(".")]
        removed = [(path, _size(path)) for path in candidates if path not in keep]
        if not dry_run:
            for path, _ in removed:
                # in order of name, ".ledger" before ".zarr": data without its records counts for nothing
                remove_tree(path)
    return removed


def _scene_reads(workspace: Workspace, run_name: str) -> tuple[int, int]:
    """Scenes read over the life of the workspace, and in the last run of a plan."""
    total, last = 0, dict[str, int]()
    for path in matching(workspace.root, "events/*.jsonl"):
        ours = path.stem == run_name or path.stem.startswith(f"{run_name}.")  # its shards
        for event in read_events(path):
            reads = event.get("scene_reads", 0)
            total += reads
            if ours:
                last[path.stem] = 0 if event["event"] == "run_started" else last.get(path.stem, 0) + reads
    return total, sum(last.values())


def _size(path: Place) -> int:
    return size_of(path) if path.is_file() else sum(sizes(path, deep=True).values())
