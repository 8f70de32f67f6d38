"""PBS: the text of a batch script. PBS Professional and OpenPBS are meant; Torque writes its requests otherwise."""

from __future__ import annotations

import math
import shlex

from slidecube.cluster.batch import AGAIN, TASK, BatchJob, attend, command_line, give_up_s, prepare


def pbs_script(job: BatchJob) -> str:
    """Write the batch script of a job.

    PBS sends no signal of our choice before the walltime, so that the script does it; and only an operator may queue
    a running job again, so that what is left is submitted again.
    """
    drain_at_s = max(60 * job.request.time_min - job.drain_s, 1)
    lines = [
        "#!/bin/bash",
        *(f"#PBS {directive}" for directive in _directives(job)),
        "",
        f"cd {shlex.quote(job.folder)} || exit 1",
        f"exec >> {_log(job)} 2>&1",
        f'echo "{job.name}: job $PBS_JOBID, node $(hostname), $(date -Is)"',
        *prepare(job),
        "drain() {",
        '  kill -USR1 "$work"',
        f'  {{ sleep {give_up_s(job.drain_s)}; kill -TERM "$work"; }} & late=$!',
        "}",
        f"{{ sleep {drain_at_s}; kill -USR1 $$; }} & clock=$!",
        *attend(command_line(job, "PBS_ARRAY_INDEX")),
        'kill "$clock" 2> /dev/null',
        f'case "$code" in {" | ".join(map(str, AGAIN))}) echo "work is left: submit it again" ;; esac',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _directives(job: BatchJob) -> list[str]:
    """What is asked of PBS, the site's own directives last."""
    ask = job.request
    hours, minutes = divmod(ask.time_min, 60)
    chunk = f"select=1:ncpus={ask.cpus}:mem={math.ceil(ask.mem_gb * 1e9 / 2**20)}mb"
    chunk += f":ngpus={ask.gpus}" * bool(ask.gpus) + f":{ask.constraint}" * bool(ask.constraint)
    queue = [f"-q {shlex.quote(ask.partition)}"] if ask.partition else []
    account = [f"-A {shlex.quote(ask.account)}"] if ask.account else []
    qos = [f"-l qos={shlex.quote(ask.qos)}"] if ask.qos else []
    return [
        f"-N {job.name}",
        *_array(job),
        f"-l {chunk}",
        f"-l walltime={hours:02d}:{minutes:02d}:00",
        *queue,
        *account,
        *qos,
        "-r y",
        "-j oe",
        "-o /dev/null",  # the script writes its own log: PBS copies one back only at the end
        *ask.directives,
    ]


def _array(job: BatchJob) -> list[str]:
    """An array has two tasks at least; one alone gets its index as a variable of a plain job."""
    if not job.tasks:
        return []
    if len(job.tasks) == 1:
        return [f"-v PBS_ARRAY_INDEX={job.tasks[0]}"]
    # a range alone can be asked for: what is done within it ends at once
    limit = f"%{job.request.at_once}" * bool(job.request.at_once)
    return [f"-J {min(job.tasks)}-{max(job.tasks)}{limit}"]


def _log(job: BatchJob) -> str:
    before, index, after = job.log.partition(TASK)
    quoted = shlex.quote(before)
    return quoted + ('"$PBS_ARRAY_INDEX"' + shlex.quote(after) if index else "")
