"""What was submitted of the runs of a workspace, and what the queue says of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from slidecube.cluster import slurm
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.slurm import QueuedTask
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.storage import Place, matching, write_atomic
from slidecube.pipeline.store import Workspace

_LIVE = ("pending", "running")


@dataclass(frozen=True, slots=True, kw_only=True)
class SentJob:
    """A job that was submitted, or is about to be.

    id : "" until it is known; name : of its own, by which it is found when its id never was
    tasks : of its array, 1 for a job without one
    """

    stage: str
    id: str
    tasks: int
    name: str = ""


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
    for sent, tasks in _looked(workspace):
        if tasks is None:
            ids = " ".join(job.id or job.name for job in sent.jobs)
            raise PipelineError(
                f"Jobs {ids} of run {sent.run!r} were submitted in this workspace, and Slurm cannot be asked whether "
                "they are there still; submit from a login node when `squeue` answers or, if they are known to have "
                f"ended, remove {_place(workspace, sent.run)} first"
            )
        found += [(sent.run, job) for job in _live(sent, tasks)]
    return found


def queued_runs(workspace: Workspace) -> set[str]:
    """Runs with jobs that are queued or running, or may be: their plans are needed."""
    return {sent.run for sent, tasks in _looked(workspace) if tasks is None or _live(sent, tasks)}


def jobs_of(workspace: Workspace, run: str) -> list[dict[str, Any]]:
    """Say what the queue knows of the jobs that were submitted last of a run, and of others' that are not known to end.

    Returns [{"run", "stage", "id", "asked", "pending", "running", "done", "failed", "gone", "reasons"}], counts of
    tasks: `gone` are those that no queue knows any more, `reasons` why tasks wait or failed. Not `asked` are jobs whose
    queue does not answer: nothing is known of them. Empty when nothing was submitted.
    """
    seen = [
        (sent, tasks)
        for sent, tasks in _looked(workspace)
        if sent.run == run or tasks is None or _live(sent, tasks)
    ]
    return [
        {"run": sent.run, **_state(job, tasks)}
        for sent, tasks in sorted(seen, key=lambda found: found[0].run != run)
        for job in sent.jobs
        if job.id or tasks is None  # one without an id, and of no name in the queue, was never sent
    ]


def _looked(workspace: Workspace) -> Iterator[tuple[Submission, list[QueuedTask] | None]]:
    """Yield each submission with what is known of its tasks, None where nobody can be asked: one look at the queue.

    Jobs whose sending was cut short have the id that the queue knows by their name.
    """
    sent = submissions(workspace)
    lost = [job.name for entry in sent for job in entry.jobs if not job.id and job.name]
    try:
        ids = slurm.named(lost)
    except ClusterError:
        ids = None
    known = {job.id for entry in sent for job in entry.jobs} | set((ids or {}).values())
    tasks = slurm.queued(sorted(known - {""}))
    for entry in sent:
        jobs = tuple(replace(job, id=job.id or (ids or {}).get(job.name, "")) for job in entry.jobs)
        unknown = ids is None and not all(job.id for job in jobs)
        yield replace(entry, jobs=jobs), None if unknown else tasks


def _live(sent: Submission, tasks: list[QueuedTask]) -> list[str]:
    """Ids of those jobs of a submission that are queued or running."""
    there = {task.job for task in tasks if task.state in _LIVE}
    return [job.id for job in sent.jobs if job.id in there]


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
