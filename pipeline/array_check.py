"""What can be said of a profile of job arrays before anything is submitted by it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from slidecube.cluster import slurm
from slidecube.cluster.batch import BatchJob
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import Array, StageRequest
from slidecube.pipeline.doctor import Check
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.submit import STAGES, executable, require_gpu_workers

_COMMANDS = {"slurm": ("sbatch", "squeue", "scancel", "scontrol"), "pbs": ("qsub",)}


def array_checks(array: Array) -> Iterator[Check]:
    """Yield what stands in the way of an array's jobs: commands, and what the scheduler says to each stage's request.

    Slurm is asked by `sbatch --test-only`, which sends nothing: it knows the partitions, accounts and nodes. What a
    node alone can tell (the prologue, the scratch folder) is left to the jobs' own logs.
    """
    missing = [name for name in _COMMANDS[array.system] if shutil.which(name) is None]
    if missing:
        lacks = f"{', '.join(missing)} not on this machine; start on a login node of the cluster"
        yield Check(level="fail", name="commands", text=lacks)
    else:
        yield Check(level="ok", name="commands", text=", ".join(_COMMANDS[array.system]))
    command = array.command or (executable(),)
    yield Check(level="ok", name="slidecube", text=f"jobs start {' '.join(command)}")
    try:
        require_gpu_workers(array)
    except PipelineError as error:
        yield Check(level="fail", name="GPU workers", text=str(error))
    if array.scratch:
        text = f"{array.scratch}, made on each node; where it cannot be, the job's log says so and TMPDIR is used"
        yield Check(level="ok", name="scratch", text=text)
    if array.system != "slurm":
        text = "PBS tries nothing out; read the scripts of `slidecube submit FILE --dry-run`"
        yield Check(level="warn", name="requests", text=text)
    elif not missing:
        yield from _tried(array)


def _tried(array: Array) -> Iterator[Check]:
    """What Slurm says to the request of each stage."""
    limit = slurm.max_array_size() or array.max_array_size
    yield Check(level="ok", name="largest array", text=f"{limit} tasks")
    for stage in STAGES:
        ask: StageRequest = getattr(array, stage)
        tasks = tuple(range(min(ask.shards, limit))) if stage in {"cube", "detect"} else ()
        script = slurm.slurm_script(
            BatchJob(
                name=f"slidecube-check-{stage}",
                command=("true",),
                request=ask,
                log="/dev/null",
                folder="/",
                tasks=tasks,
                drain_s=array.drain_s,
            )
        )
        try:
            yield Check(level="ok", name=stage, text=slurm.test_only(script))
        except ClusterError as error:
            yield Check(level="fail", name=stage, text=str(error))
