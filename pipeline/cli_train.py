"""`slidecube train`: the verb, and what it prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from slidecube.models.network_card import NetworkCard
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
    if driver.say is not None:
        print("reading data", file=driver.say, flush=True)
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
    """Say what would be trained: data, number of trainings, what of it is done, networks, keys, and what looks wrong.

    Raises what the run would refuse before it trains.
    """
    from slidecube.pipeline.leave_one_out import planned_folds
    from slidecube.pipeline.training import done_keys
    from slidecube.pipeline.training_checks import network_sizes, warnings_of
    from slidecube.pipeline.training_data import explain_text

    works = planned_folds(driver) if leave_one_out else driver.planned(sweep=sweep)
    done = len(done_keys(driver.out, works))
    config, training = driver.config, driver.config.tables.training
    data = driver.data(works[0].candidate)
    epoch = training.batch * training.iterations or len(data.training)
    lines = [
        "data of the first training:",
        explain_text(data),
        f"trainings: {len(works)}, of which {done} are done in {driver.out}",
        f"each: {epoch:,} patches an epoch, {training.epochs} epochs, fewer after {training.patience} without gain",
        *(
            f"{architecture} of {features} feature{'s' * (features != 1)}: {n:,} weights"
            for (architecture, features), n in network_sizes(works).items()
        ),
        *(f"{work.key}  {work.candidate.label}" for work in works),
        *(f"warning: {line}" for line in warnings_of(config, works, driver.data)),
    ]
    return "\n".join(lines)


def report_text(report: TrainReport) -> str:
    """What was done, in a few lines."""
    from slidecube.models.network_card import read_card

    lines = [report.tables.rstrip()] if report.tables else []
    counts = f"{report.trained} trained, {report.there} done before"
    lines.append(f"{counts}, {len(report.failed)} failed" if report.failed else counts)
    lines += [f"failed: {work.candidate.label}: {reason}" for work, reason in report.failed]
    lines += [f"note: {work.candidate.label}: {text}" for work, text in report.notes]
    lines += [f"wrote {path}" for path in report.files]
    lines += [f"warning: {line}" for line in report.warnings]
    cards = [read_card(folder) for folder in report.models]
    best = max((_validation_f1(card) for card in cards), default=0.0)
    for folder, card in zip(report.models, cards, strict=True):
        lines.append(f"model {folder}")
        lines.append(f"{folder.name}: {scores_line(card)}")
        if not card.null_run:
            lines.append(f"no null run: how much {folder.name} maps where nothing happened is not known")
        if _validation_f1(card) < best:
            lines.append(
                f"{folder.name} is worse on validation than the other one (F1 {_validation_f1(card):.3f} against "
                f"{best:.3f}): not recommended"
            )
        else:
            lines.append(f'map with it: [detect] model = "{folder}"')
    return "\n".join(lines)


def _validation_f1(card: NetworkCard) -> float:
    return float(card.metrics.get("validation", {}).get("f1", 0.0))


def scores_line(card: NetworkCard) -> str:
    """F1 of the test, or of validation where there is none, its interval, the threshold, and on how many landslides."""
    part, scores = (
        ("test", card.metrics) if "f1" in card.metrics else ("validation", card.metrics.get("validation", {}))
    )
    pair = scores.get("f1_interval")
    f1 = f"{scores['f1']:.3f}" if "f1" in scores else "not defined"
    said = [
        f"{part} F1 {f1}{f' ({pair[0]:.3f} to {pair[1]:.3f})' if pair else ''}",
        f"threshold {card.output.threshold:.2g}",
    ]
    counts = [
        row["landslides"]
        for row in card.training.get("patches", ())
        if row.get("part") == part and "landslides" in row
    ]
    said += [f"{sum(counts)} landslide{'s' * (sum(counts) != 1)}"] if counts else []
    return f"{', '.join(said)}{' (simulated)' * card.simulated}"
