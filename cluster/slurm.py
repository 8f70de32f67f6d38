"""Slurm: the text of a batch script, and the few commands that send, cancel and ask."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from slidecube.cluster.batch import AGAIN, TASK, BatchJob, attend, command_line, give_up_s, prepare, ranges
from slidecube.cluster.errors import ClusterError

_ANSWER_S = 60.0

State = Literal["pending", "running", "done", "failed"]

_STATES: dict[str, State] = {
    "PENDING": "pending",
    "CONFIGURING": "pending",
    "EXPEDITING": "pending",
    "POWER_UP_NODE": "pending",
    "REQUEUED": "pending",
    "REQUEUE_FED": "pending",
    "REQUEUE_HOLD": "pending",
    "RESV_DEL_HOLD": "pending",
    "SPECIAL_EXIT": "pending",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SUSPENDED": "running",
    "STOPPED": "running",
    "SIGNALING": "running",
    "RESIZING": "running",
    "STAGE_OUT": "running",
    "COMPLETED": "done",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedTask:
    """A task of a job as the queue has it.

    job : of the array; task : its index, "" for a job without one; reason : why it waits or how it failed
    """

    job: str
    task: str
    state: State
    reason: str


def slurm_script(job: BatchJob) -> str:
    """Write the batch script of a job."""
    shell = "SLURM_ARRAY_TASK_ID"
    me = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if job.tasks else "${SLURM_JOB_ID}"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {directive}" for directive in _directives(job)),
        "",
        f'echo "{job.name}: job {me}, node $(hostname), start $((${{SLURM_RESTART_COUNT:-0}} + 1)), $(date -Is)"',
        *prepare(job),
        "again() {",
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; then',
        f'    echo "work is left: queued again"; scontrol requeue "{me}"',
        "  else",
        f'    echo "work is left after {job.max_restarts} restarts: submit it again"',
        "  fi",
        "}",
        "drain() {",
        '  kill -USR1 "$work"',
        f"  {{ sleep {give_up_s(job.drain_s)}; again; }} & late=$!",
        "}",
        *attend(command_line(job, shell)),
        f'case "$code" in {" | ".join(map(str, AGAIN))}) again ;; esac',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _directives(job: BatchJob) -> list[str]:
    """What is asked of Slurm, the site's own directives last."""
    ask = job.request
    log = job.log.replace("%", "%%").replace(TASK, "%a")
    array = [f"--array={ranges(job.tasks)}" + f"%{ask.at_once}" * bool(ask.at_once)] if job.tasks else []
    named = {
        "partition": ask.partition,
        "account": ask.account,
        "qos": ask.qos,
        "constraint": ask.constraint,
    }
    return [
        f"--job-name={job.name}",
        *array,
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={ask.cpus}",
        f"--mem={math.ceil(ask.mem_gb * 1e9 / 2**20)}M",
        *([f"--gres=gpu:{ask.gpus}"] if ask.gpus else []),
        f"--time={ask.time_min}",
        *(f"--{key}={shlex.quote(value)}" for key, value in named.items() if value),
        "--requeue",
        f"--signal=B:USR1@{job.drain_s}",
        f"--chdir={shlex.quote(job.folder)}",
        f"--output={shlex.quote(log)}",
        "--open-mode=append",
        *ask.directives,
    ]


def submit(script: str, *, after: str = "") -> str:
    """Submit a script and return the job's id; after : id of a job that must have ended, however it did.

    Where Slurm has several clusters, the id ends in `;` and the cluster's name, and what follows a job goes there, too.
    Raises ClusterError with what sbatch says, or that it said nothing: the job may be there even so, see `named`.
    """
    number, cluster = _split(after)
    dependency = [*_at(cluster), f"--dependency=afterany:{number}"] if after else []
    said = _call("sbatch", "--parsable", *dependency, script).splitlines()
    if not said:
        raise ClusterError("`sbatch` names no job; look at `squeue --me`")
    return said[-1].strip()


def there() -> bool:
    """Tell whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def require_there() -> None:
    """Raise ClusterError where no job can be submitted from this machine."""
    _require("sbatch")


def test_only(script: str) -> str:
    """Say when and where a script would start; nothing is sent.

    Raises ClusterError with why it is refused.
    """
    return _done("sbatch", "--test-only", said=script).stderr.strip().removeprefix("sbatch: ")


def try_out(script: str) -> str:
    """Say what Slurm would do with the text of a script: when and where it would start, or why it is refused."""
    try:
        return test_only(script)
    except ClusterError as error:
        return str(error)


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; raises ClusterError with what scancel says."""
    for cluster, numbers in _by_cluster(jobs).items():
        _call("scancel", *_at(cluster), *numbers)


def cancel_lines(jobs: Sequence[str]) -> str:
    """What a user types to cancel jobs."""
    return "; ".join(
        " ".join(["scancel", *_at(cluster), *numbers]) for cluster, numbers in _by_cluster(jobs).items()
    )


def named(names: Sequence[str]) -> dict[str, str]:
    """Ids by name of jobs that are queued or running.

    Raises ClusterError when the queue does not answer.
    """
    if not names:
        return {}
    lines = _call("squeue", "--noheader", f"--name={','.join(names)}", "--format=%F|%j").splitlines()
    return {name: job for job, bar, name in (line.strip().partition("|") for line in lines) if bar}


def _split(job: str) -> tuple[str, str]:
    """Number and cluster of a job's id, the cluster "" where there is only one."""
    number, _, cluster = job.partition(";")
    return number, cluster


def _at(cluster: str) -> list[str]:
    return [f"--clusters={cluster}"] if cluster else []


def _by_cluster(jobs: Sequence[str]) -> dict[str, list[str]]:
    found = dict[str, list[str]]()
    for number, cluster in dict.fromkeys(map(_split, jobs)):
        found.setdefault(cluster, []).append(number)
    return found


def max_array_size() -> int | None:
    """Most tasks that an array of this site may have, None where Slurm does not tell."""
    try:
        lines = _call("scontrol", "show", "config").splitlines()
    except ClusterError:
        return None
    found = [line.partition("=")[2].strip() for line in lines if line.split("=")[0].strip() == "MaxArraySize"]
    return int(found[0]) if found and found[0].isdecimal() else None


def queued(jobs: Sequence[str]) -> list[QueuedTask] | None:
    """What the queue, and the accounting where there is one, know of jobs; None where nobody can be asked."""
    found = list[QueuedTask]()
    for cluster, numbers in _by_cluster(jobs).items():
        tasks = _queued(numbers, cluster)
        if tasks is None:
            return None
        found += tasks
    return found


def _queued(numbers: Sequence[str], cluster: str) -> list[QueuedTask] | None:
    """What is known of jobs of a cluster."""
    asked = (*_at(cluster), f"--jobs={','.join(numbers)}")
    try:
        lines = _call(
            "squeue", "--noheader", "--array", "--states=all", *asked, "--format=%F|%K|%T|%r"
        ).splitlines()
    except ClusterError as error:
        if "Invalid job id" not in str(error):
            return None
        lines = []  # the queue has forgotten a job that ended long ago
    # where a cluster is named, a line says so
    found = [_parsed(line, cluster) for line in lines if "|" in line]
    known = {(task.job, task.task) for task in found}
    return found + [task for task in _accounted(asked, cluster) if (task.job, task.task) not in known]


def _parsed(line: str, cluster: str) -> QueuedTask:
    number, task, state, reason = (line.split("|", 3) + [""] * 3)[:4]
    ours = _STATES.get(state, "failed")
    why = state.lower().replace("_", " ") if ours == "failed" else reason if ours == "pending" else ""
    job = f"{number};{cluster}" if cluster else number
    return QueuedTask(job=job, task=task if task.isdecimal() else "", state=ours, reason=why)


def _accounted(asked: Sequence[str], cluster: str) -> list[QueuedTask]:
    """What the accounting knows, nothing where there is none."""
    try:
        text = _call("sacct", "--noheader", "--allocations", "--parsable2", *asked, "--format=JobID,State")
    except ClusterError:
        return []
    found = []
    for line in text.splitlines():
        name, _, state = line.partition("|")
        job, _, tasks = name.partition("_")
        word = state.split()[0] if state else ""  # "CANCELLED by 1000"
        found += [_parsed(f"{job}|{task}|{word}|", cluster) for task in _indices(tasks)]
    return found


def _indices(text: str) -> list[str]:
    """Indices of tasks as the accounting writes them: "3", or "[0-2,7%2]" for those that have not begun yet.

    What it cuts short with dots is left out.
    """
    if not text.startswith("["):
        return [text]
    found = list[str]()
    for part in text.strip("[]").partition("%")[0].split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if span:
            first, last, step = span[1], span[2] or span[1], span[3] or "1"
            found += map(str, range(int(first), int(last) + 1, int(step)))
    return found


def _require(command: str) -> None:
    if shutil.which(command) is None:
        raise ClusterError(f"`{command}` is not on this machine; start on a login node of the cluster")


def _call(*command: str) -> str:
    """Run a command and return what it prints."""
    return _done(*command).stdout.strip()


def _done(*command: str, said: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command; said : on its standard input. Raises ClusterError where it fails."""
    _require(command[0])
    try:
        done = subprocess.run(  # noqa: S603  our own words, no shell
            command, capture_output=True, text=True, timeout=_ANSWER_S, check=False, input=said
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"`{command[0]}` does not answer ({error}); try again") from None
    if done.returncode != 0:
        answer = " ".join((done.stderr or done.stdout).split())
        raise ClusterError(f"`{command[0]}` refuses: {answer}; mend the profile")
    return done
