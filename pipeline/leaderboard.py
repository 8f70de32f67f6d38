"""The leaderboard of a sweep: every candidate in order, ensembles beside the best single networks, and their diagram.

Tables as 7 and 8 of Ganeroed et al. 2023, for whatever was trained.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from slidecube.models.diagrams import Point, write_performance_diagram
from slidecube.models.network_card import Calibration
from slidecube.models.weights import write_whole
from slidecube.pipeline.training import Work, judged_of, trained_of

PARQUET, MARKDOWN, DIAGRAM = "leaderboard.parquet", "leaderboard.md", "performance.png"

SHOWN = 10
"""Candidates of a setting that the table for people shows, as in ENS; the Parquet file holds all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A candidate and what came of it.

    score : highest F1 on validation, None where it failed or diverged, for a reason
    """

    work: Work
    score: float | None
    trained: Mapping[str, Any]
    judged: Mapping[str, Any]
    reason: str = ""

    @property
    def diverged(self) -> bool:
        """True where its numbers did not stay finite: a result, and no failure."""
        return bool(self.trained.get("diverged"))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleRow:
    """An ensemble of one setting that was tried.

    members : best first; score : highest F1 on validation; calibration : of the mean of the members
    validation, test : scores at its threshold, None = no test
    """

    setting: str
    members: tuple[Work, ...]
    score: float
    calibration: Calibration
    threshold: float
    chosen: str
    validation: Mapping[str, Any]
    test: Mapping[str, Any] | None


def standings(out: Path, works: Iterable[Work], failed: Mapping[str, str]) -> list[Standing]:
    """All candidates, setting by setting in their order, each from the best on validation down; the failed last.

    failed : key -> reason
    """
    found = []
    for work in works:
        judged = {} if work.key in failed else judged_of(out, work.key)
        trained = {} if work.key in failed else trained_of(out, work.key)
        diverged = f"diverged: {trained['diverged']}" if trained.get("diverged") else ""
        done = judged.get("judged_key") == work.judged_key
        found.append(
            Standing(
                work=work,
                score=judged["score"] if done else None,
                trained=trained if done or diverged else {},
                judged=judged if done else {},
                reason=failed.get(work.key) or diverged or ("" if done else "not trained"),
            )
        )
    settings = list(dict.fromkeys(one.work.candidate.setting for one in found))
    return sorted(
        found,
        key=lambda one: (
            settings.index(one.work.candidate.setting),
            -1.0 if one.score is None else -2 - one.score,
            one.work.candidate.label,
        ),
    )


def table(found: Sequence[Standing], ensembles: Sequence[EnsembleRow]) -> pd.DataFrame:
    """Leaderboard as a table, a row a candidate and a row an ensemble."""
    rows = [_single_row(one) for one in found] + [_ensemble_row(one) for one in ensembles]
    return pd.DataFrame(rows)


_SHOWN_SCORES = (
    "f1", "precision", "recall", "iou_landslide", "average_precision", "object_f1", "object_precision",
    "object_recall", "ece_above_0.1", "ece_of_objects", "brier", "precision_at_0.1_pct",
)  # fmt: skip


def _single_row(one: Standing) -> dict[str, Any]:
    candidate = one.work.candidate
    return {
        "kind": "single",
        "setting": candidate.setting,
        "architecture": candidate.architecture,
        "loss": candidate.loss,
        "learning_rate": candidate.learning_rate,
        "held_out": candidate.held_out,
        "size": 1,
        "score": one.score,
        "threshold": one.judged.get("threshold"),
        **_scores(one.judged.get("validation"), one.judged.get("test")),
        "epoch": one.trained.get("epoch"),
        "epochs_run": one.trained.get("epochs_run"),
        "seconds": one.trained.get("seconds"),
        "key": one.work.key,
        "members": "",
        "reason": one.reason,
    }


def _ensemble_row(one: EnsembleRow) -> dict[str, Any]:
    return {
        "kind": "ensemble",
        "setting": one.setting,
        "size": len(one.members),
        "score": one.score,
        "threshold": one.threshold,
        **_scores(one.validation, one.test),
        "members": " ".join(work.key for work in one.members),
        "reason": "",
    }


def _scores(validation: Mapping[str, Any] | None, test: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        f"{part}_{name}": (scores or {}).get(name)
        for part, scores in (("validation", validation), ("test", test))
        for name in _SHOWN_SCORES
    }


def write_leaderboard(
    out: Path, found: Sequence[Standing], ensembles: Sequence[EnsembleRow], *, title: str
) -> tuple[Path, ...]:
    """Write the leaderboard as Parquet, as Markdown, and as a performance diagram; returns the files."""
    buffer = io.BytesIO()
    table(found, ensembles).to_parquet(buffer, index=False)
    write_whole(out / PARQUET, buffer.getvalue())
    write_whole(out / MARKDOWN, markdown(found, ensembles, title=title).encode())
    write_performance_diagram(out / DIAGRAM, points(found, ensembles), title=title)
    return out / MARKDOWN, out / PARQUET, out / DIAGRAM


def markdown(found: Sequence[Standing], ensembles: Sequence[EnsembleRow], *, title: str) -> str:
    """Tables for people: the best candidates of each setting, ensembles against singles, and what failed."""
    parts = [f"# {title}", "## Single networks, best on validation first", _singles(found)]
    if ensembles:
        parts += [
            "## Ensembles against the single network that is best on validation",
            _versus(found, ensembles),
        ]
    diverged = [one for one in found if one.diverged]
    failed = [one for one in found if one.score is None and not one.diverged]
    for name, rows in (("Diverged", diverged), ("Failed", failed)):
        if rows:
            lines = [f"- {one.work.candidate.label}: {one.reason}" for one in rows]
            parts += [f"## {name}: {len(rows)} of {len(found)}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _singles(found: Sequence[Standing]) -> str:
    lines = [
        _line("setting", "F1 validation", "loss", "learning rate", "architecture", "precision (test)",
              "recall (test)", "F1 (test)", "95 %", "objects F1 (test)", "epochs"),
        "|---" * 11 + "|",
    ]  # fmt: skip
    shown = dict[str, int]()
    for one in found:
        candidate, test = one.work.candidate, one.judged.get("test") or {}
        shown[candidate.setting] = shown.get(candidate.setting, 0) + 1
        if one.score is None or shown[candidate.setting] > SHOWN:
            continue
        lines.append(
            _line(
                candidate.setting,
                f"{one.score:.3f}",
                candidate.loss,
                f"{candidate.learning_rate:g}",
                candidate.architecture,
                *(_cell(test.get(name)) for name in ("precision", "recall", "f1")),
                _interval(test.get("f1_interval")),
                _cell(test.get("object_f1")),
                str(one.trained["epochs_run"]),
            )
        )
    return "\n".join(lines)


def _versus(found: Sequence[Standing], ensembles: Sequence[EnsembleRow]) -> str:
    sizes = sorted({len(one.members) for one in ensembles})
    heads = [f"ensemble of {size}" for size in sizes]
    parts = []
    for name, pick in (("test", "test"), ("validation", "validation")):
        lines = [_line("setting", "single", *heads), "|---" * (2 + len(sizes)) + "|"]
        any_known = False
        for setting in dict.fromkeys(one.setting for one in ensembles):
            best = next(one for one in found if one.work.candidate.setting == setting)
            single = best.judged.get(pick) or {}
            by_size = {len(one.members): one for one in ensembles if one.setting == setting}
            cells = [_against(getattr(by_size[k], pick) if k in by_size else None, single) for k in sizes]
            any_known |= "f1" in single
            lines.append(_line(setting, _cell(single.get("f1")), *cells))
        if any_known:
            parts += [
                f"F1 on {name} (a difference in percent only where the intervals lie apart):",
                "\n".join(lines),
            ]
    return "\n\n".join(parts)


def _against(scores: Mapping[str, Any] | None, single: Mapping[str, Any]) -> str:
    """F1 of an ensemble, and by how much it differs from the single's where that is more than chance."""
    scores = scores or {}
    f1, other = scores.get("f1"), single.get("f1")
    if f1 is None:
        return "-"
    return f"{f1:.3f} ({100 * (f1 / other - 1):+.0f} %)" if other and _apart(scores, single) else f"{f1:.3f}"


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether the intervals of two F1 share nothing; unknown ones may."""
    ours, theirs = one.get("f1_interval"), other.get("f1_interval")
    return bool(ours and theirs and (ours[0] > theirs[1] or theirs[0] > ours[1]))


def points(found: Sequence[Standing], ensembles: Sequence[EnsembleRow]) -> list[Point]:
    """Points of the performance diagram: on the test, or on validation where there is none."""
    marked, seen = [], set[str]()
    for one in found:
        scores = one.judged.get("test") or one.judged.get("validation")
        setting = one.work.candidate.setting
        if scores is not None:
            marked.append((scores, setting, "single", setting not in seen))
            seen.add(setting)
    marked += [
        (one.test or one.validation, one.setting, f"ensemble of {len(one.members)}", True)
        for one in ensembles
    ]
    return [
        Point(label=label, group=setting, precision=scores["precision"], recall=scores["recall"], main=main)
        for scores, setting, label, main in marked
        if "precision" in scores and "recall" in scores
    ]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(pair: Sequence[float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
