"""What was submitted of a run, and what the queue says of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from slidecube.cluster.slurm import QueuedTask, queued
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.storage import Place, matching, write_atomic
from slidecube.pipeline.store import Workspace

_LIVE = ("pending", "running")


@dataclass(frozen=True, slots=True, kw_only=True)
class SentJob:
    """A job that was submitted. tasks : of its array, 1 for a job without one."""

    stage: str
    id: str
    tasks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The jobs of a run that were submitted together.

    system : "slurm" or "pbs"; submitted_at : UTC; folder : of the scripts and logs
    """

    run: str
    system: str
    profile: str
    submitted_at: str
    folder: str
    jobs: tuple[SentJob, ...]


def record_submission(workspace: Workspace, sent: Submission) -> None:
    """Write down what was submitted last of a run."""
    place = _place(workspace, sent.run)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(place, json.dumps(asdict(sent), indent=1, sort_keys=True))


def submissions(workspace: Workspace) -> list[Submission]:
    """What was submitted last of each run of a workspace; a damaged record says nothing."""
    found = []
    for place in matching(workspace.root, "submits/*/latest.json"):
        try:
            raw = json.loads(place.read_text(encoding="utf-8"))
            found.append(Submission(**{**raw, "jobs": tuple(SentJob(**job) for job in raw["jobs"])}))
        except (ValueError, TypeError, KeyError):
            continue
    return found


def live_jobs(workspace: Workspace) -> list[tuple[str, str]]:
    """Jobs of a workspace that are queued or running, each with its run.

    Raises PipelineError when there are jobs that nobody can be asked about.
    """
    found = []
    for sent in submissions(workspace):
        tasks = _asked(sent)
        if tasks is None:
            ids = " ".join(job.id for job in sent.jobs)
            raise PipelineError(
                f"Jobs {ids} of run {sent.run!r} were submitted in this workspace, and Slurm cannot be asked whether "
                "they are there still; submit from a login node when `squeue` answers or, if they are known to have "
                f"ended, remove {_place(workspace, sent.run)} first"
            )
        there = {task.job for task in tasks if task.state in _LIVE}
        found += [(sent.run, job.id) for job in sent.jobs if job.id in there]
    return found


def jobs_of(workspace: Workspace, run: str) -> list[dict[str, Any]]:
    """Say what the queue knows of the jobs that were submitted last of a run.

    Returns [{"stage", "id", "asked", "pending", "running", "done", "failed", "gone", "reasons"}], counts of tasks:
    `gone` are those that no queue knows any more, `reasons` why tasks wait or failed. Not `asked` are jobs whose queue
    does not answer: nothing is known of them. Empty when nothing was submitted.
    """
    last = [sent for sent in submissions(workspace) if sent.run == run]
    return [_state(job, tasks) for sent in last for tasks in [_asked(sent)] for job in sent.jobs]


def _asked(sent: Submission) -> list[QueuedTask] | None:
    """What is known of jobs, None where nobody can be asked."""
    return queued([job.id for job in sent.jobs]) if sent.system == "slurm" else []


def _state(job: SentJob, known: list[QueuedTask] | None) -> dict[str, Any]:
    tasks = [task for task in known or [] if task.job == job.id]
    count = Counter(task.state for task in tasks)
    reasons = Counter(task.reason for task in tasks if task.reason and task.reason != "None")
    return {
        "stage": job.stage,
        "id": job.id,
        "asked": known is not None,
        **{state: count[state] for state in ("pending", "running", "done", "failed")},
        "gone": 0 if known is None else max(job.tasks - len(tasks), 0),
        "reasons": [reason for reason, _ in reasons.most_common()],
    }


def _place(workspace: Workspace, run: str) -> Place:
    return workspace.root / "submits" / run / "latest.json"
