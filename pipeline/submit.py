"""A run as arrays of jobs of a batch system: what is due becomes scripts, and the scripts become jobs."""

from __future__ import annotations

import datetime as dt
import secrets
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from slidecube.cluster import slurm
from slidecube.cluster.batch import SHARD, TASK, BatchJob
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.pbs import pbs_script
from slidecube.cluster.resources import Array, ProfileFile, StageRequest, profiles, read_profile
from slidecube.cluster.runner import TileTask
from slidecube.pipeline.config import Config
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.estimate import Estimate
from slidecube.pipeline.fit_state import unfitted
from slidecube.pipeline.layers import create_stores
from slidecube.pipeline.lock import Lock
from slidecube.pipeline.mosaic_stage import mosaic_due
from slidecube.pipeline.plan import plan
from slidecube.pipeline.queue import SentJob, Submission, live_jobs, record_submission
from slidecube.pipeline.run import due
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.tasks import tasks_of

_DRIVER_GB = 0.7
"""Memory of the process that deals the tiles of a shard to its workers."""

STAGES = ("cube", "fit", "detect", "mosaic")

_EARLY_S = 60
"""Slurm may tell a job to end so much earlier than asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """What becomes of a stage that has something due.

    job : what is asked for; script : its text; profile : text of the TOML by which it runs inside; tiles : due now
    """

    stage: str
    job: BatchJob
    script: str
    profile: str
    tiles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is to be submitted of a run.

    made : its plan; folder : of scripts and logs; jobs : in order, each after the one before it
    remarks : lines that a user should read
    """

    made: RunPlan
    profile: str
    array: Array
    folder: Path
    jobs: tuple[StageJob, ...]
    remarks: tuple[str, ...] = ()


def prepare(config: Config, *, profile: str | None = None) -> Prepared:
    """Plan a run and write the texts of its jobs; nothing is sent.

    profile : in place of the configuration's
    Raises PipelineError when jobs of the workspace are queued or running, or may be, and when a tile does not fit its
    job.
    """
    name, file = _profile_of(config, profile)
    array = file.array
    assert array is not None
    made = plan(config)
    _refuse_beside_others(made)
    now = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
    root = made.workspace.root
    # a scheduler writes its logs to files
    submits = root / "submits" if isinstance(root, Path) else config.base / f"{config.stem}.submits"
    folder = submits / made.run / now
    limit = (slurm.max_array_size() if array.system == "slurm" else None) or array.max_array_size
    wanted = _stages_due(made)
    jobs, remarks = list[StageJob](), _gpu_remarks(made, array) if "detect" in wanted else []
    for stage, tasks in wanted.items():
        request: StageRequest = getattr(array, stage)
        shards = min(request.shards, sum(1 for _ in tasks_of(made, stage))) if tasks else 1
        if shards > limit:
            remarks.append(
                f"{stage}: {limit} shards instead of {shards}, each with more tiles: an array has at most {limit} tasks"
            )
        asked = request.model_copy(update={"shards": min(shards, limit)})
        jobs.append(_stage_job(made, (stage, tasks), asked, file=file, folder=folder))
    return Prepared(
        made=made, profile=name, array=array, folder=folder, jobs=tuple(jobs), remarks=tuple(remarks)
    )


def send(prepared: Prepared) -> Submission:
    """Create the stores, write the scripts and submit them, all or none; returns what was recorded.

    One `submit` of a workspace at a time: from the look at the queue to the last record it holds a lock of its own.
    Scripts for PBS are written and not submitted: `submission_text` says how.
    Raises PipelineError when a job is refused, and when jobs of the workspace are queued or running; InUseError beside
    another `submit`.
    """
    made, array = prepared.made, prepared.array
    if array.system == "slurm":
        slurm.require_there()
    with Lock(made.workspace.root / "submits", run=made.run):
        _refuse_beside_others(made)  # another submit may have sent some since the plan was made
        with Lock(made.workspace.locks, run=made.run):
            create_stores(made)
        (prepared.folder / "logs").mkdir(parents=True, exist_ok=True)
        scripts = [write(entry, prepared.folder) for entry in prepared.jobs]
        return _submission(prepared, []) if array.system != "slurm" else _send(prepared, scripts)


def _send(prepared: Prepared, scripts: list[Path]) -> Submission:
    """Submit scripts one after the other; whatever goes wrong, those that were sent are cancelled.

    What is about to be sent is recorded first, by names: were this process killed, the next one finds its jobs.
    """
    sent = [
        SentJob(stage=entry.stage, id="", tasks=len(entry.job.tasks) or 1, name=entry.job.name)
        for entry in prepared.jobs
    ]
    record_submission(prepared.made.workspace, _submission(prepared, sent))
    try:
        for i, path in enumerate(scripts):
            sent[i] = replace(sent[i], id=_sent_id(sent[i], path, after=sent[i - 1].id if i else ""))
            record_submission(prepared.made.workspace, _submission(prepared, sent))
    except BaseException as error:
        left = _take_back(sent)
        if left:
            raise PipelineError(f"{error or 'Stopped'}; {left}") from error
        raise
    return _submission(prepared, sent)


def _sent_id(job: SentJob, script: Path, *, after: str) -> str:
    try:
        return slurm.submit(str(script), after=after)
    except ClusterError as error:
        try:
            there = slurm.named([job.name])
        except ClusterError:
            there = {}
        if job.name in there:  # a busy controller may do what it is asked and not say so in time
            return there[job.name]
        raise PipelineError(f"Stage {job.stage} is not submitted, and no other is: {error}") from None


def _take_back(sent: list[SentJob]) -> str:
    """Cancel what was sent of a submission; returns what is left for the user to do, "" where all is cancelled."""
    ids = [job.id for job in sent if job.id]
    try:
        ids += slurm.named([job.name for job in sent if not job.id]).values()
        if ids:
            slurm.cancel(ids)
    except ClusterError as error:
        names = ",".join(job.name for job in sent)
        return f"jobs may be left in the queue ({error}); cancel them by `scancel --name={names}`"
    return ""


def _gpu_remarks(made: RunPlan, array: Array) -> list[str]:
    """Say what a detection does with the GPUs of its job.

    Raises PipelineError when every tile would fail: it wants a GPU and gets none, or its workers are not installed.
    """
    ask, device = array.detect, made.config.detect.device
    network = made.card.window_px > 1
    asked = bool(ask.gpus) or any("gpu" in directive for directive in ask.directives)
    if network and device == "cuda" and not asked:
        raise PipelineError(
            'device = "cuda" in [detect], and the jobs of stage detect ask for no GPU; set gpus = 1 in [array.detect] '
            'of the profile, or device = "cpu"'
        )
    require_gpu_workers(array)
    if ask.gpus and not network:
        return [f"detect: model {made.card.address} has no network, its GPU would idle; set gpus = 0"]
    if ask.gpus and device != "cuda":
        return [
            f'detect: device = "{device}" leaves its GPU idle; set device = "cuda" in [detect], or gpus = 0'
        ]
    return []


def require_gpu_workers(array: Array) -> None:
    """Raise PipelineError when jobs start a worker a GPU, and this installation, in which they work, has none."""
    for stage in STAGES:
        ask: StageRequest = getattr(array, stage)
        wanted = ask.runner == "dask-cuda" or (ask.gpus and not ask.runner)
        if wanted and stage != "mosaic" and not array.command and find_spec("dask_cuda") is None:
            raise PipelineError(
                f"Stage {stage} asks for a GPU, and package 'dask_cuda' is not installed; install it with `pip install "
                "'slidecube[gpu]'`, or set gpus = 0 in the profile"
            )


def try_out(prepared: Prepared) -> list[str]:
    """Ask the scheduler what it would do with each script; nothing is sent. Lines for people, none without Slurm."""
    if prepared.array.system != "slurm" or not slurm.there():
        return []
    return [f"{entry.stage:<11} {slurm.try_out(entry.script)}" for entry in prepared.jobs]


def write(entry: StageJob, folder: Path) -> Path:
    """Write the script of a stage and the profile by which it runs inside its job; returns the script."""
    (folder / f"{entry.stage}.toml").write_text(entry.profile, encoding="utf-8")
    path = folder / f"{entry.stage}.sh"
    path.write_text(entry.script, encoding="utf-8")
    return path


def _submission(prepared: Prepared, sent: list[SentJob]) -> Submission:
    return Submission(
        run=prepared.made.run,
        system=prepared.array.system,
        profile=prepared.profile,
        submitted_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        folder=str(prepared.folder),
        jobs=tuple(sent),
    )


def _profile_of(config: Config, name: str | None) -> tuple[str, ProfileFile]:
    chosen, base = (config.cluster.profile, config.base) if name is None else (name, None)
    file = read_profile(chosen, base=base)
    if file.array is None:
        arrays = [known for known in profiles() if known.endswith("-array")]
        raise PipelineError(
            f"Profile {chosen!r} is not an array of jobs but {file.runner!r}, for `slidecube run`; arrays: "
            f"{', '.join(arrays)}, and your own with an [array] table"
        )
    return chosen, file


def _refuse_beside_others(made: RunPlan) -> None:
    """Two sets of shards of one workspace would stand in each other's way."""
    live = live_jobs(made.workspace)
    if live:
        ids = " ".join(job for _, job in live)
        raise PipelineError(
            f"Jobs of run {live[0][0]!r} are queued or running in this workspace: {ids}; wait for them, or cancel them "
            f"by `{slurm.cancel_lines([job for _, job in live])}`"
        )


def _stages_due(made: RunPlan) -> dict[str, list[TileTask]]:
    """What is due now by stage, in order: every stage after one with something due is there, too."""
    found = {"cube": due(made, "cube")}
    if unfitted(made) or due(made, "classify"):
        found["fit"] = []
    if found["cube"] or "fit" in found:
        found["detect"] = [task for task, _ in tasks_of(made, "detect")]  # which ones shows after the cubes
    else:
        found["detect"] = due(made, "detect")
    stages = {stage: tasks for stage, tasks in found.items() if tasks or stage == "fit"}
    if stages or mosaic_due(made):
        stages["mosaic"] = []
    return stages


def _stage_job(
    made: RunPlan, work: tuple[str, list[TileTask]], request: StageRequest, *, file: ProfileFile, folder: Path
) -> StageJob:
    """Write the texts of a stage; work : its name and what is due of it."""
    (stage, wanted), array = work, file.array
    assert array is not None
    if 60 * request.time_min < array.drain_s + _EARLY_S:
        raise PipelineError(
            f"Stage {stage}: time_min={request.time_min} leaves nothing before drain_s={array.drain_s}, when a job is "
            f"told to end; raise time_min in [array.{stage}] of the profile, or lower drain_s in [array]"
        )
    tasks = _shards(made, wanted, request.shards)
    job = BatchJob(
        # a name of its own, by which a job is found whose id was never heard; PBS allows 15 characters
        name=f"slidecube-{stage}" + f"-{secrets.token_hex(4)}" * (array.system == "slurm"),
        command=_command(made, stage, array, request.shards, folder),
        request=request,
        log=str(folder / "logs" / (f"{stage}-{TASK}.log" if tasks else f"{stage}.log")),
        folder=str(made.config.base),
        tasks=tasks,
        drain_s=array.drain_s,
        max_restarts=array.max_restarts,
        prologue=array.prologue,
        scratch=array.scratch,
    )
    text = slurm.slurm_script if array.system == "slurm" else pbs_script
    return StageJob(
        stage=stage,
        job=job,
        script=text(job),
        profile=stage_profile(stage, request, made.estimate, deadline_min=file.deadline_min),
        tiles=len(wanted),
    )


def _shards(made: RunPlan, tasks: list[TileTask], count: int) -> tuple[int, ...]:
    """Return which shards have something due of a stage; () where it is not dealt into shards."""
    if not tasks:
        return ()
    wanted = set(tasks)
    dealt = enumerate(task for task, _ in tasks_of(made, tasks[0].stage))
    return tuple(sorted({i % count for i, task in dealt if task in wanted}))


def _command(made: RunPlan, stage: str, array: Array, shards: int, folder: Path) -> tuple[str, ...]:
    """Words of the command of a stage. The plan is named, so that no job searches, whatever becomes of the TOML."""
    words = [stage, str(made.config.path), "--plan", made.run, "--profile", str(folder / f"{stage}.toml")]
    if stage in {"cube", "detect"}:
        words += ["--shard", f"{SHARD}/{shards}"]
    return (*(array.command or (executable(),)), *words)


def executable() -> str:
    """Where slidecube is installed: the nodes see the same file system, but not always the same PATH."""
    beside = Path(sys.executable).with_name("slidecube")
    return str(beside) if beside.exists() else shutil.which("slidecube") or "slidecube"


def stage_profile(
    stage: str, request: StageRequest, cost: Estimate, *, deadline_min: float | None = None
) -> str:
    """Write the profile by which a stage runs inside its job.

    Tiles are worked on in processes of their own: one that runs out of memory or time costs itself, not the shard.
    Raises PipelineError when a tile does not fit.
    """
    workers, threads, mem_gb = fit_workers(stage, request, cost)
    runner = request.runner or ("dask-cuda" if request.gpus else "dask-local")
    lines = [
        f"# Inside a job of stage {stage}: {request.cpus} CPUs, {request.mem_gb:g} GB, {request.time_min} minutes.",
        f'runner = "{"threads" if stage == "mosaic" else runner}"',
        f"workers = {workers}",
        f"threads_per_worker = {threads}",
        f"mem_gb = {mem_gb:g}",
        # a tile that takes longer than a job would be begun again and again
        f"deadline_min = {min(deadline_min or request.time_min, request.time_min):g}",
    ]
    if runner == "dask-cuda":
        lines.append("gpus = 1")
    return "\n".join(lines) + "\n"


def fit_workers(stage: str, request: StageRequest, cost: Estimate) -> tuple[int, int, float]:
    """Return workers of a job, threads of each, and memory of each in GB: as many workers as its memory holds.

    Raises PipelineError when not even one does.
    """
    held = request.mem_gb - max(_DRIVER_GB, cost.fit_mem_gb if stage == "fit" else 0.0)
    if stage == "mosaic" or request.runner == "threads":
        choices, held = [(1, request.cpus if stage != "mosaic" else 1)], request.mem_gb
    elif request.gpus and request.runner in {"", "dask-cuda"}:
        choices = [(request.gpus, max(1, request.cpus // request.gpus))]
    else:
        choices = [(n, request.cpus // n) for n in range(request.cpus, 0, -1)]
    n, threads = choices[-1]
    choices += [(n, fewer) for fewer in range(threads - 1, 0, -1)]
    for n, threads in choices:
        if n * cost.worker_mem_gb(threads) <= held:
            return n, threads, int(100 * held / n) / 100
    needed = request.mem_gb - held + choices[-1][0] * cost.worker_mem_gb(1)
    raise PipelineError(
        f"Projected memory {needed:.1f} GB of a job of stage {stage} exceeds its mem_gb={request.mem_gb:g}; raise "
        f"mem_gb in [array.{stage}] of the profile, or lower tile_px or max_cloud_pct in the TOML"
    )


def submission_text(prepared: Prepared, sent: Submission | None) -> str:
    """Describe what was submitted, or would be: with `sent` None the scripts themselves."""
    made = prepared.made
    if not prepared.jobs:
        return f"run         {made.run}\nnothing is due: it is complete"
    head = [f"run         {made.run}", *(f"note        {remark}" for remark in prepared.remarks)]
    if sent is None:
        return "\n".join([*head, *_texts(prepared), *try_out(prepared), "dry run     nothing was sent"])
    ids = {job.stage: job.id for job in sent.jobs}
    lines = [
        *(
            f"{e.stage:<11} {f'job {ids[e.stage]}: ' if e.stage in ids else ''}{_size(e)}"
            for e in prepared.jobs
        ),
        f"scripts     {prepared.folder}",
        f"logs        {prepared.folder / 'logs'}",
        f"watch       slidecube status {made.workspace.root}",
    ]
    if ids:
        stop = slurm.cancel_lines(list(ids.values()))
        lines.append(f"stop        `{stop}`; the same command submits what is left")
    return "\n".join([*head, *lines, *_to_send(prepared)])


def _texts(prepared: Prepared) -> list[str]:
    lines, after = list[str](), ""
    for entry in prepared.jobs:
        lines += ["", f"# ---- {entry.stage}.sh{after}", entry.script.rstrip(), ""]
        lines += [f"# ---- {entry.stage}.toml", entry.profile]
        after = f", after the end of {entry.stage}"
    return lines


def _to_send(prepared: Prepared) -> list[str]:
    """Lines by which a user sends scripts of PBS, each after the one before."""
    if prepared.array.system == "slurm":
        return []
    lines, after = ["send it by these lines:"], ""
    for entry in prepared.jobs:
        script = shlex.quote(str(prepared.folder / f"{entry.stage}.sh"))
        lines.append(f"{entry.stage}=$(qsub {after}{script})")
        after = f"-W depend=afterany:${entry.stage} "
    return lines


def _size(entry: StageJob) -> str:
    ask = entry.job.request
    each = f"{ask.cpus} CPUs, {ask.mem_gb:g} GB" + f", {ask.gpus} GPU" * bool(ask.gpus)
    n = len(entry.job.tasks)
    shards = f"{n} shard{'s' * (n != 1)} of {entry.tiles:,} tiles, " if n else ""
    return f"{shards}{each}, {ask.time_min} minutes" + " each" * (n > 1)
