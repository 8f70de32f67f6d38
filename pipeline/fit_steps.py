"""Steps of the fit that run tile by tile: what is due of one, and the files that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slidecube.cluster.runner import TileTask
from slidecube.pipeline.errors import IncompleteError, PipelineError
from slidecube.pipeline.ledger import Ledger
from slidecube.pipeline.run_plan import EpochPlan, RunPlan
from slidecube.pipeline.statistics import sha256_of
from slidecube.pipeline.storage import Place
from slidecube.pipeline.tasks import fit_tasks

RunTasks = Callable[[str, list[TileTask]], None]
"""Runs the tasks of a stage, and leaves their records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of the fit that runs tile by tile.

    names : what follows the tile's key in the names of the files that it leaves; terms : what it depends on
    """

    stage: str
    names: list[str]
    terms: tuple[str, ...] = ()


def run_step(plan: RunPlan, epoch: EpochPlan, run_tasks: RunTasks, *, step: Step) -> list[Place]:
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
