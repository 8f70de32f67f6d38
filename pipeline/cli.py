"""The command line: verbs are stages.

Each verb imports what it needs when it runs, so that `slidecube --version` answers at once. Errors become one line and
an exit code in one place, `main`: 0 complete, 1 the user's error, 2 incomplete, 70 a bug, 75 asked to end early by
SIGUSR1 (the same command goes on), 130 interrupted.
"""

from __future__ import annotations

import datetime as dt
import errno
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata, resources
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from slidecube.pipeline.cli_models import models
from slidecube.pipeline.cli_train import train

if TYPE_CHECKING:
    from slidecube.catalog.aoi import Aoi
    from slidecube.pipeline.doctor import Check
    from slidecube.pipeline.lock import Job

COMPLETE, USER_ERROR, INCOMPLETE, BUG, DRAINED, INTERRUPTED = 0, 1, 2, 70, 75, 130

STAGES = ("cube", "fit", "detect", "mosaic")

_GAP_S = 300.0
"""While work is due, `status --watch` waits so long for the next driver after it saw the last one."""

TomlFile = click.Path(path_type=Path)


class _FolderType(click.Path):
    """A folder to write to; an empty name, as of a variable that is not set, would be the one that we are in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the name is empty; name a folder", param, ctx)
        return super().convert(value, param, ctx)


Folder = _FolderType(path_type=Path)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    args = sys.argv[1:] if argv is None else argv
    debug = "--debug" in args  # wherever it stands
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(
            [arg for arg in args if arg != "--debug"], prog_name="slidecube", standalone_mode=False
        )
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the one place where errors end
        code, message = _verdict(error)
        if message:
            click.echo(f"slidecube: {message}", err=True)
        if debug:
            traceback.print_exception(error)
    _leave(code if isinstance(code, int) else COMPLETE)


def _leave(code: int) -> NoReturn:
    """End the process, at once where a thread was left behind: it would hold it, or crash on its way out."""
    threads = sys.modules.get("slidecube.cluster.threads")
    if threads is not None and threads.threads_at_work():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Stop as Ctrl-C does: schedulers say SIGTERM."""
    del signum, frame
    raise KeyboardInterrupt


def _verdict(error: BaseException) -> tuple[int, str]:
    """Return the exit code of an error and its one line."""
    from slidecube.catalog.errors import CatalogError
    from slidecube.cluster.errors import ClusterError
    from slidecube.models.errors import ModelError
    from slidecube.pipeline.errors import DrainedError, IncompleteError, PipelineError

    if isinstance(error, KeyboardInterrupt | click.Abort):
        return INTERRUPTED, "stopped; run the same command to resume"
    if isinstance(error, IncompleteError):
        return DRAINED if isinstance(error, DrainedError) else INCOMPLETE, _one_line(str(error))
    if isinstance(error, CatalogError | ModelError | ClusterError | PipelineError):
        return USER_ERROR, _one_line(str(error))
    if isinstance(error, click.ClickException):
        return USER_ERROR, _usage(error)
    machine = _machine_error(error)
    if machine is not None:
        return machine
    where = _write_traceback(error)
    return BUG, _one_line(f"a bug, please report it: {type(error).__name__}: {error}; traceback in {where}")


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context is not None else ""
    return _one_line(error.format_message()) + hint


def _machine_error(error: BaseException) -> tuple[int, str] | None:
    """Tell what this machine or its storage refuses, and exhausted memory, from a bug."""
    for link in _chain(error):
        if isinstance(link, MemoryError):
            return INCOMPLETE, "out of memory; lower workers in [cluster] or tile_px in [cube] and run again"
        if not isinstance(link, OSError):
            continue
        what = f"{link.filename}: {link.strerror}" if link.filename else str(link.strerror or link)
        if link.errno in (errno.ENOSPC, errno.EDQUOT):
            return INCOMPLETE, f"{_one_line(what)}; free some space and run the same command to resume"
        if link.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR):
            remedy = "name a folder that you may write to"
            if str(link.filename).startswith("s3://"):
                remedy = "check the credentials and their rights to list, read, write and delete"
            return USER_ERROR, f"{_one_line(what)}; {remedy}"
        if link.filename and link.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
            remedy = "when the storage answers again, run the same command to resume"
            return INCOMPLETE, f"{_one_line(what)}; {remedy}"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes: libraries wrap what the system said."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if line.endswith("...") else line.rstrip(".")


def _write_traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="slidecube-", suffix=".txt", delete=False
        ) as file:
            file.write(text)
    except OSError:
        click.echo(text, err=True)
        return "the lines above"
    return file.name


class _Group(click.Group):
    """A group that lists its verbs in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs as they were declared."""
        del ctx
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(metadata.version("slidecube"), prog_name="slidecube", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Print the traceback of an error.")
def cli() -> None:
    """Map the landslides of a country from open satellite data.

    Exit codes: 0 complete, 1 your error, 2 incomplete (run again to resume), 70 a bug,
    75 asked to end early by SIGUSR1 (run again), 130 interrupted.
    """


@cli.command()
@click.argument("file", type=TomlFile, required=False)
@click.option("--training", is_flag=True, help="Of a training of networks, in place of a run.")
def init(file: Path | None, *, training: bool) -> None:
    """Write a commented TOML to start from."""
    from slidecube.pipeline.errors import PipelineError

    file = file or Path("training.toml" if training else "slidecube.toml")
    name = "train_template.toml" if training else "init_template.toml"
    template = resources.files("slidecube.pipeline").joinpath(name).read_text(encoding="utf-8")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(template)
    except FileExistsError:
        raise PipelineError(f"{file} is there already, and is left as it is; name another file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise PipelineError(f"{file.parent} is not a folder; make it first") from None
    if training:
        click.echo(f"wrote {file}; name your data in it, then: slidecube train {file} --dry-run")
    else:
        click.echo(f"wrote {file}; name your area and epochs in it, then: slidecube plan {file}")


@cli.command()
@click.argument("file", type=TomlFile)
@click.option("--refresh", is_flag=True, help="Search again, even if a plan of this TOML exists.")
def plan(file: Path, *, refresh: bool) -> None:
    """Search and freeze the scenes; print the estimate."""
    from slidecube.pipeline.config import load_config
    from slidecube.pipeline.plan import plan as make_plan
    from slidecube.pipeline.summaries import plan_summary

    config = load_config(file)
    made = make_plan(config, refresh=refresh)
    source = made.scenes.source_of("optical", config.source(config.sources.optical))
    click.echo(plan_summary(made, newest=_newest(source, made.aoi)))


def _where(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every verb that works."""
    verb = click.option("--quiet", is_flag=True, help="Show no progress.")(verb)
    return click.option(
        "--profile",
        metavar="NAME",
        help="Where to run, in place of [cluster] profile: a name, or a TOML's path.",
    )(verb)


_shard = click.option(
    "--shard", metavar="I/N", callback=lambda _, __, text: _part(text), help="Only share I of N, from 0."
)
_named = click.option(
    "--plan", metavar="RUN", help="Go on with this plan, and never search; jobs are submitted so."
)
_mend = click.option(
    "--mend", is_flag=True, help="Read again what lacks scenes that could not be read for a passing reason."
)


@cli.command()
@click.argument("file", type=TomlFile)
@click.option("--refresh", is_flag=True, help="Search again, and process what is new.")
@_mend
@_where
def run(file: Path, *, refresh: bool, **how: Any) -> None:
    """Make the whole inventory; run again to resume."""
    _run(file, STAGES, refresh=refresh, **how)


@cli.command()
@click.argument("workspace")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--prometheus", type=click.Path(path_type=Path), help="Write metrics into this file, too.")
@click.option("--watch", is_flag=True, help="Tell again and again, until nothing is at work or queued.")
@click.option(
    "--every", type=click.FloatRange(min=1), default=10.0, show_default=True, help="Seconds, with --watch."
)
def status(workspace: str, *, as_json: bool, prometheus: Path | None, watch: bool, every: float) -> None:
    """Tell what is done, due and failed in a workspace."""
    from slidecube.pipeline.drivers import Drivers
    from slidecube.pipeline.status import status as read_status
    from slidecube.pipeline.status import under_way, work_due
    from slidecube.pipeline.storage import write_atomic
    from slidecube.pipeline.summaries import prometheus_text, status_summary

    drivers, last_s = Drivers(), -math.inf
    while True:
        state = read_status(workspace, drivers=drivers)
        if prometheus is not None:
            with _written(prometheus):
                write_atomic(prometheus, prometheus_text(state))
        if watch and sys.stdout.isatty():
            click.clear()
        click.echo(json.dumps(state, indent=2) if as_json else status_summary(state))
        last_s = time.monotonic() if state["running"] else last_s
        # between two jobs of a scheduler that cannot be asked, nobody is at work for a while
        gap = work_due(state) and time.monotonic() - last_s < _GAP_S
        if not watch or not (under_way(state) or gap):
            return
        time.sleep(every)


@cli.command()
@click.argument("file", type=TomlFile)
@_mend
@_shard
@_named
@_where
def cube(file: Path, **how: Any) -> None:
    """Build the layers only: composites and terrain."""
    _run(file, ("cube",), **how)


@cli.command()
@click.argument("file", type=TomlFile)
@click.option("--again", is_flag=True, help="Fit once more what is frozen, with the tiles mended since.")
@_named
@_where
def fit(file: Path, **how: Any) -> None:
    """Fit what the model learns from the layers, and freeze it."""
    _run(file, ("fit",), **how)


@cli.command()
@click.argument("file", type=TomlFile)
@_shard
@_named
@_where
def detect(file: Path, **how: Any) -> None:
    """Run the model over the layers that are there."""
    _run(file, ("detect",), **how)


@cli.command()
@click.argument("file", type=TomlFile)
@_named
@_where
def mosaic(file: Path, **how: Any) -> None:
    """Join the tiles into landslides across their edges."""
    _run(file, ("mosaic",), **how)


@cli.command()
@click.argument("file", type=TomlFile)
@click.option("--profile", metavar="NAME", help="An array of jobs, in place of [cluster] profile.")
@click.option("--dry-run", is_flag=True, help="Print the scripts, and send nothing.")
def submit(file: Path, *, profile: str | None, dry_run: bool) -> None:
    """Submit what is due as arrays of jobs, to Slurm."""
    from slidecube.pipeline.config import load_config
    from slidecube.pipeline.submit import prepare, send, submission_text

    prepared = prepare(load_config(file), profile=profile)
    sent = send(prepared) if prepared.jobs and not dry_run else None
    click.echo(submission_text(prepared, sent))


cli.add_command(train)


@cli.command()
@click.argument("workspace")
@click.argument("truth", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--report", "in_report", is_flag=True, help="Show it in the report, too.")
def evaluate(workspace: str, truth: Path, *, as_json: bool, in_report: bool) -> None:
    """Compare an inventory with known landslides."""
    from slidecube.pipeline.report_stage import evaluate_workspace, evaluation_json, report_workspace

    found = evaluate_workspace(workspace, truth)
    click.echo(
        evaluation_json(found) if as_json else "\n".join(f"{name}\n{e.table()}" for name, e in found.items())
    )
    if in_report:
        click.echo(report_workspace(workspace, evaluations=found), err=as_json)


@cli.command()
@click.argument("file", type=TomlFile)
def publish(file: Path) -> None:
    """Write the products: tables, GeoPackage, COGs, STAC."""
    from slidecube.pipeline.config import load_config
    from slidecube.pipeline.lock import Lock
    from slidecube.pipeline.mosaic_stage import mosaic_run
    from slidecube.pipeline.plan import plan as make_plan

    made = make_plan(load_config(file))
    with Lock(made.workspace.locks, run=made.run) as lock:
        click.echo(mosaic_run(made, say=sys.stderr, fence=lock.require))


@cli.command()
@click.argument("workspace")
def report(workspace: str) -> None:
    """Write the report, an HTML page that opens offline."""
    from slidecube.pipeline.report_stage import report_workspace

    click.echo(report_workspace(workspace))


@cli.command()
@click.option("--out", type=Folder, required=True, help="Folder of the simulated archive.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the simulation."
)
@click.option("--size", default="default", show_default=True, help="Its extent: default, small or island.")
@click.option("--radar", is_flag=True, help="Add Sentinel-1.")
@click.option(
    "--into", "catalog", type=click.Path(path_type=Path), help="Implant the scars into these scenes."
)
@click.option("--event", type=click.DateTime(["%Y-%m-%d"]), help="With --into: the day of the landslides.")
@click.option("--dem", type=click.Path(path_type=Path), help="With --into: a raster of heights in metres.")
def simulate(
    out: Path,
    *,
    seed: int,
    size: str,
    radar: bool,
    catalog: Path | None,
    event: dt.datetime | None,
    dem: Path | None,
) -> None:
    """Simulate scenes with known landslides, or implant some."""
    from slidecube.pipeline.demo import write_toml
    from slidecube.pipeline.simulate import into, simulate_archive

    if catalog is None:
        made = simulate_archive(out, seed=seed, size=size, radar=radar)
        click.echo(made)
        click.echo(
            f"map it: slidecube run {write_toml(made)}; compare: slidecube evaluate {out} {made.landslides}"
        )
    elif event is None or dem is None:
        raise click.UsageError(
            "--into needs --event YYYY-MM-DD and --dem FILE, beside the catalogue of the scenes"
        )
    else:
        path = into(catalog, out, event=event.date(), dem=dem, seed=seed)
        click.echo(
            f"SIMULATED landslides in real scenes: {path}, truth {out / 'truth' / 'landslides.parquet'}\n"
            f"map it: slidecube init, and name {path} as optical in [sources], {dem} as dem, {event.date()} as event"
        )


@cli.command()
@click.option("--out", type=Folder, required=True, help="Folder of the demonstration.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the simulated archive."
)
@click.option("--size", default="default", show_default=True, help="Its extent: default, small or island.")
def demo(out: Path, *, seed: int, size: str) -> None:
    """Map a simulated archive from end to end."""
    from slidecube.pipeline.demo import demo as run_demo

    click.echo(run_demo(out, seed=seed, size=size))


@cli.group()
def cluster() -> None:
    """List, show and try the profiles: where a run may work."""


@cluster.command("list")
def cluster_list() -> None:
    """List the profiles and their files."""
    from slidecube.cluster.errors import ClusterError
    from slidecube.cluster.resources import own_profiles, profiles, read_profile

    found = profiles()
    for name, path in found.items():
        own = "" if path.parent != own_profiles() else f"  ({path})"
        try:
            click.echo(f"{name:<14}  {read_profile(name).runner:<15}{own}")
        except ClusterError as error:  # it names the file
            click.echo(f"{name:<14}  cannot be read: {_one_line(str(error))}")
    click.echo(f"your own: TOML files in {own_profiles()}, or any TOML by its path")


@cluster.command("show")
@click.argument("profile")
def cluster_show(profile: str) -> None:
    """Print all settings of a profile, with what it leaves open filled in."""
    from slidecube.cluster.resources import load_profile, read_profile
    from slidecube.pipeline.summaries import profile_summary

    click.echo(profile_summary(load_profile(profile), read_profile(profile)))


@cluster.command("check")
@click.argument("profile")
def cluster_check(profile: str) -> int:
    """Start a profile, run a probe on its workers, and print what was there.

    Of a profile of job arrays the scheduler is asked what it would do; nothing is sent.
    """
    from slidecube.cluster.resources import load_profile, read_profile
    from slidecube.pipeline.array_check import array_checks
    from slidecube.pipeline.errors import IncompleteError
    from slidecube.pipeline.probe import probe
    from slidecube.pipeline.summaries import worker_line, worker_share

    array = read_profile(profile).array
    if array is not None:
        return _checked(array_checks(array))
    asked, n = load_profile(profile), 0
    for found in probe(asked):
        click.echo(worker_line(found))
        n += 1
    wanted = 1 if asked.runner == "threads" else asked.workers
    click.echo(f"{n} of {wanted} workers answered; each may use {worker_share(asked)}")
    if n < wanted:
        raise IncompleteError(f"only {n} of {wanted} workers of profile {profile!r} came; look at the queue")
    return COMPLETE


@cluster.command("manifests")
@click.argument("profile")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write a file each into this folder, in place of printing them.",
)
@click.option(
    "--plan", metavar="RUN", default="", help="Write the stages after the plan, too, for this plan."
)
def cluster_manifests(profile: str, *, out: Path | None, plan: str) -> None:
    """Write the Kubernetes resources of a profile as YAML.

    Jobs of stages go on with a plan by its name, and so are written when it has one, by --plan.
    """
    from slidecube.cluster.clusters import DASK_SETTINGS
    from slidecube.cluster.kubernetes import manifests
    from slidecube.cluster.resources import load_profile

    texts = manifests(load_profile(profile), DASK_SETTINGS, plan=plan)
    if out is None:
        click.echo("\n".join(f"# ---- {name}\n---\n{text}" for name, text in texts.items()), nl=False)
        return
    for name, text in texts.items():
        with _written(out):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text, encoding="utf-8")
    click.echo(f"wrote {len(texts)} files to {out}: {', '.join(texts)}")


@cli.command()
@click.option("--list", "as_text", is_flag=True, help="List them as text; so it does without options, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--set", "name", metavar="NAME", help="Check one set, and print its features in order.")
@click.option("--source", metavar="NAME", help="With --set: check that this source has its bands.")
def features(*, as_text: bool, as_json: bool, name: str | None, source: str | None) -> None:
    """List what models may read: features and sets, with sources."""
    from slidecube.catalog.sources import find_source
    from slidecube.pipeline.feature_sets import feature_set, listing, listing_text, require_source

    if name is None and source is not None:
        raise click.UsageError("--source needs --set NAME")
    if as_text and as_json:
        raise click.UsageError("--list and --json exclude each other")
    if name is None:
        click.echo(json.dumps(listing(), indent=2) if as_json else listing_text())
        return
    spec = feature_set(name)
    if source is not None:
        require_source(spec, source, find_source(source).bands)
    click.echo(json.dumps(list(spec.names)) if as_json else "\n".join(spec.names))


cli.add_command(models)


@cli.command()
def doctor() -> int:
    """Check this machine and what is installed."""
    from slidecube.pipeline.doctor import checks

    return _checked(checks())


@cli.command()
@click.argument("workspace")
@click.option("--dry-run", is_flag=True, help="Only list what would go.")
def clean(workspace: str, *, dry_run: bool) -> None:
    """Remove what no plan needs any more."""
    from slidecube.pipeline.status import clean as remove_superseded
    from slidecube.pipeline.summaries import clean_summary

    click.echo(clean_summary(remove_superseded(workspace, dry_run=dry_run), dry_run=dry_run))


def _checked(found: Iterable[Check]) -> int:
    """Print checks as they come, and return the exit code."""
    code = COMPLETE
    for check in found:
        click.echo(f"{check.level:<4}  {check.name:<20}  {check.text}")
        code = USER_ERROR if check.level == "fail" else code
    return code


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Tell a place where nothing can be written, which the user named, from a file of ours that is missing."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError) as error:
        raise click.UsageError(f"{path} cannot be written: {error.strerror}; name another place") from None


def _newest(source: str, aoi: Aoi) -> str:
    """Ask the provider for its newest scene; the plan stands without an answer."""
    from slidecube.catalog.errors import CatalogError
    from slidecube.catalog.search import Retries, newest_scene
    from slidecube.pipeline.summaries import newest_line

    try:
        return newest_line(newest_scene(source, aoi, retries=Retries(attempts=1)))
    except CatalogError as error:
        return f"not known ({_one_line(str(error))})"


def _run(
    file: Path,
    stages: tuple[str, ...],
    *,
    refresh: bool = False,
    plan: str | None = None,
    shard: tuple[int, int] | None = None,
    quiet: bool = False,
    **how: Any,
) -> None:
    from slidecube.pipeline.config import load_config
    from slidecube.pipeline.errors import DrainedError, IncompleteError
    from slidecube.pipeline.lock import Shard
    from slidecube.pipeline.plan import named_plan
    from slidecube.pipeline.plan import plan as make_plan
    from slidecube.pipeline.run import Drain, Part
    from slidecube.pipeline.run import run as run_plan
    from slidecube.pipeline.summaries import failure_line, run_summary

    drain = Drain()
    signal.signal(signal.SIGUSR1, lambda *_: drain.ask())
    config = load_config(file)
    part = Part(
        shard=None if shard is None else Shard(stage=stages[0], index=shard[0], count=shard[1]), job=_job()
    )
    made = make_plan(config, refresh=refresh) if plan is None else named_plan(config, plan)
    report = run_plan(made, stages=stages, part=part, drain=drain, progress=not quiet, **how)
    click.echo(run_summary(report))
    if report.drained:
        raise DrainedError("asked to end early, and some work is left; run the same command to go on")
    if not report.complete:
        raise IncompleteError(failure_line(report, config.workspace))


def _part(text: str | None) -> tuple[int, int] | None:
    """Read `3/8`."""
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise click.BadParameter(f"got {text!r}; allowed: I/N with I from 0 to N - 1, such as 0/8")
    return int(index), int(count)


def _job() -> Job:
    """Say which job of Slurm this is, and how often it was started again."""
    from slidecube.pipeline.lock import Job

    name = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID", "")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return Job(
        name=f"slurm {name}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}" * bool(name),
        restarts=int(restarts) if restarts.isdecimal() else 0,
    )
