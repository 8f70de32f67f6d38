"""Leave one region out: a training for each region that has not seen it, judged there.

What it says is how well the recipe carries to a place that nobody labelled, which a test beside the training does not.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slidecube.models.weights import write_whole
from slidecube.pipeline.leaderboard import Standing, standings, table
from slidecube.pipeline.sweep import Driver, TrainReport
from slidecube.pipeline.train_config import candidates, check_losses
from slidecube.pipeline.training import Work
from slidecube.pipeline.training_data import leave_one_out

PARQUET, MARKDOWN = "leave-one-out.parquet", "leave-one-out.md"

_SCORES = ("f1", "precision", "recall", "average_precision", "object_f1", "object_precision", "object_recall")


def leave_one_out_run(driver: Driver) -> TrainReport:
    """Train and judge a fold for each region of [[data]], and write their table; no model is saved.

    Raises PipelineError where there are too few regions.
    """
    config, works = driver.config, planned_folds(driver)
    report = driver.train(works)
    found = standings(driver.out, works, {work.key: reason for work, reason in report.failed})
    text = markdown(sorted(found, key=lambda s: s.work.candidate.held_out), title=config.tables.name)
    buffer = io.BytesIO()
    table(found, []).to_parquet(buffer, index=False)
    files = (driver.out / MARKDOWN, driver.out / PARQUET)
    for path, content in zip(files, (text.encode(), buffer.getvalue()), strict=True):
        write_whole(Path(path), content)
    complete = len(report.failed) <= config.tables.cluster.failure_budget
    return replace(report, complete=complete, files=files, tables=text)


def planned_folds(driver: Driver) -> list[Work]:
    """A candidate for each region that is left out, after every check that needs no training.

    Raises PipelineError where there are too few regions, and for what would be refused later.
    """
    config = driver.config
    check_losses(config.path, config.tables, sweep=False)
    regions = [region for region, _ in leave_one_out(config.tables.data)]
    one = candidates(config, sweep=False)[0]
    works = driver.works([replace(one, held_out=region) for region in regions])
    driver.check(works)
    return works


def markdown(found: Sequence[Standing], *, title: str) -> str:
    """A row a fold, and the mean over the folds, which counts each region once."""
    lines = [f"# {title}: each region judged by a network that has not seen it", ""]
    heads = ["region", "F1", "95 %", *(name.replace("_", " ") for name in _SCORES[1:])]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rows = []
    for one in found:
        scores = one.judged.get("test") or {}
        rows.append([scores.get(name, math.nan) for name in _SCORES])
        pair = scores.get("f1_interval")
        interval = "-" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"
        cells = [_cell(value) for value in rows[-1]]
        lines.append(f"| {' | '.join([one.work.candidate.held_out, cells[0], interval, *cells[1:]])} |")
    means = [_mean([row[k] for row in rows]) for k in range(len(_SCORES))]
    cells = [_cell(value) for value in means]
    lines.append(f"| {' | '.join(['mean', cells[0], '', *cells[1:]])} |")
    lines += [f"\nFailed: {one.work.candidate.held_out}: {one.reason}" for one in found if one.score is None]
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _cell(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
