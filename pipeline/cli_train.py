"""`slidecube train`: the verb, and what it prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from slidecube.pipeline.sweep import Driver, TrainReport
    from slidecube.pipeline.train_config import TrainConfig


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--sweep", is_flag=True, help="Train all that [sweep] combines, and choose.")
@click.option("--leave-one-out", is_flag=True, help="Train once without each region, and judge there.")
@click.option(
    "--dry-run", is_flag=True, help="Open the data, print what would be trained, and train nothing."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of trainings and models; left out, `training` beside FILE.",
)
@click.option(
    "--profile", metavar="NAME", help="Where to run, in place of [cluster] profile: a name, or a TOML's path."
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
def train(
    file: Path,
    *,
    sweep: bool,
    leave_one_out: bool,
    dry_run: bool,
    out: Path | None,
    profile: str | None,
    quiet: bool,
) -> None:
    """Train networks; run again to resume.

    FILE is the TOML of a training; `slidecube init --training` writes one.
    """
    from slidecube.pipeline.errors import IncompleteError, PipelineError
    from slidecube.pipeline.leave_one_out import leave_one_out_run
    from slidecube.pipeline.sweep import Driver
    from slidecube.pipeline.train_config import load_train_config

    if sweep and leave_one_out:
        raise click.UsageError("--sweep and --leave-one-out exclude each other")
    config = load_train_config(file)
    driver = Driver(
        config=config,
        out=_folder(config, out),
        profile=profile,
        say=None if quiet else sys.stderr,
    )
    if dry_run:
        click.echo(dry_run_text(driver, sweep=sweep, leave_one_out=leave_one_out))
        return
    verb = leave_one_out_run if leave_one_out else Driver.sweep if sweep else Driver.single
    report = verb(driver)
    click.echo(report_text(report))
    if not report.complete and not report.failed:
        raise PipelineError(
            f"{config.path}: every training diverged, so there is nothing to choose from; lower learning_rate, or set "
            "warmup or clip_norm in [training]"
        )
    if not report.complete:
        raise IncompleteError(
            f"{len(report.failed)} trainings failed, more than failure_budget = {config.tables.cluster.failure_budget} "
            "in [cluster]; their reasons stand above, and the same command tries them again"
        )


def _folder(config: TrainConfig, out: Path | None) -> Path:
    if out is not None and (str(out) == "." or "://" in str(out) or ":/" in str(out)):
        raise click.UsageError(
            f"--out: got '{out}'; allowed: a folder of this file system, such as 'training'"
        )
    return (config.base / "training" if out is None else out).resolve()


def dry_run_text(driver: Driver, *, sweep: bool, leave_one_out: bool) -> str:
    """Say what would be trained: data, number of trainings, what of it is done, and their keys."""
    from dataclasses import replace

    from slidecube.pipeline.train_config import candidates, check_losses
    from slidecube.pipeline.training import done_keys
    from slidecube.pipeline.training_data import explain_text
    from slidecube.pipeline.training_data import leave_one_out as folds

    config = driver.config
    check_losses(config.path, config.tables, sweep=sweep)
    wanted = candidates(config, sweep=sweep)
    if leave_one_out:
        wanted = [replace(wanted[0], held_out=region) for region, _ in folds(config.tables.data)]
    works = driver.works(wanted)
    done = len(done_keys(driver.out, works))
    training = config.tables.training
    data = driver.data(wanted[0])
    epoch = training.batch * training.iterations or len(data.training)
    lines = [
        "data of the first training:",
        explain_text(data),
        f"trainings: {len(works)}, of which {done} are done in {driver.out}",
        f"each: {epoch:,} patches an epoch, {training.epochs} epochs, fewer after {training.patience} without gain",
        *(f"{work.key}  {work.candidate.label}" for work in works),
    ]
    return "\n".join(lines)


def report_text(report: TrainReport) -> str:
    """What was done, in a few lines."""
    from slidecube.models.network_card import read_card

    lines = [report.tables.rstrip()] if report.tables else []
    counts = f"{report.trained} trained, {report.there} done before"
    lines.append(f"{counts}, {len(report.failed)} failed" if report.failed else counts)
    lines += [f"failed: {work.candidate.label}: {reason}" for work, reason in report.failed]
    lines += [f"wrote {path}" for path in report.files]
    for folder in report.models:
        lines.append(f'model {folder}; map with it: [detect] model = "{folder}"')
        if not read_card(folder).null_run:
            lines.append(f"no null run: how much {folder.name} maps where nothing happened is not known")
    return "\n".join(lines)
