"""Ensembles of a sweep: chosen among the candidates of one setting on validation, and judged on the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.special

from slidecube.models.calibration import ScoreHistogram, calibrated, fit_calibration
from slidecube.models.ensemble_choice import FULL, Choice, greedy, k_best, unpack
from slidecube.models.evaluation import judge
from slidecube.models.patches import LANDSLIDE, STABLE, Patches
from slidecube.pipeline.leaderboard import EnsembleRow, Standing
from slidecube.pipeline.train_config import TrainSections
from slidecube.pipeline.training import (
    TEST,
    VALIDATION,
    Work,
    chosen_threshold,
    labels_of,
    min_area_px,
    probabilities_of,
)
from slidecube.pipeline.training_data import Data

ENSEMBLE_VERSION = 2
"""Version of how ensembles are chosen, calibrated and judged; a change makes another model of the same candidates."""


def ensembles_of(
    done: Sequence[Standing], data: Data, *, out: Path, tables: TrainSections
) -> list[EnsembleRow]:
    """Choose an ensemble of each size of [sweep] best that there are candidates for, and judge it.

    done : judged candidates of one setting. The test has no say: it is read when all is chosen.
    """
    labels_nyx = labels_of(data.validation)
    judged_nyx = (labels_nyx == STABLE) | (labels_nyx == LANDSLIDE)

    def read(place: int) -> np.ndarray:
        return np.asarray(probabilities_of(out, done[place].work.key, VALIDATION)[judged_nyx])

    scores, sizes, labels_n = [one.score or 0.0 for one in done], tables.sweep.best, labels_nyx[judged_nyx]
    if tables.sweep.choose == "greedy":  # reads each candidate at each step: two bytes a pixel of all of them
        choices = greedy([read(place) for place in range(len(done))].__getitem__, labels_n, scores, sizes)
    else:
        choices = k_best(read, labels_n, scores, sizes)
    judge_on = {VALIDATION: (data.validation, labels_nyx)}
    if choices and len(data.test):
        judge_on[TEST] = (data.test, labels_of(data.test))
    return [_row(done, choice, judge_on, out=out, tables=tables) for choice in choices]


def _row(
    done: Sequence[Standing],
    choice: Choice,
    judge_on: Mapping[str, tuple[Patches, np.ndarray]],
    *,
    out: Path,
    tables: TrainSections,
) -> EnsembleRow:
    """Judge an ensemble; judge_on : patches and labels of validation and, where there is one, of the test."""
    members = tuple(done[place].work for place in choice.members)
    mean_nyx, labels_nyx = mean_of(out, members, VALIDATION), judge_on[VALIDATION][1]
    calibration = fit_calibration(logits_of(mean_nyx), labels_nyx, method=tables.calibration.method)
    probability_nyx = calibrated(calibration, logits_of(mean_nyx))
    chosen, _ = chosen_threshold(ScoreHistogram.of(probability_nyx, labels_nyx), tables.threshold)

    def scores(part: str, found_nyx: np.ndarray) -> dict[str, object]:
        patches, labels_nyx = judge_on[part]
        tally = judge(
            found_nyx,
            labels_nyx,
            threshold=chosen.threshold,
            regions=patches.regions,
            min_area_px=min_area_px(tables.threshold.min_area_m2, patches.resolution_m),
        )
        return tally.metrics()

    test = None
    if TEST in judge_on:
        probability_test_nyx = calibrated(calibration, logits_of(mean_of(out, members, TEST)))
        test = scores(TEST, probability_test_nyx)
    return EnsembleRow(
        setting=members[0].candidate.setting,
        members=members,
        score=choice.f1,
        calibration=calibration,
        threshold=chosen.threshold,
        chosen=chosen.chosen,
        validation=scores(VALIDATION, probability_nyx),
        test=test,
    )


def logits_of(mean_nyx: np.ndarray) -> np.ndarray:
    """Logits of a mean, from which it is calibrated; nothing is surer than what two bytes can tell from 0 and 1."""
    least = 0.5 / FULL
    return np.asarray(scipy.special.logit(np.clip(mean_nyx, least, 1 - least)), np.float32)


def mean_of(out: Path, members: Sequence[Work], part: str) -> np.ndarray:
    """Mean of the members' calibrated probabilities, (n, y, x) float32; what was not known counts as 0 there."""
    total_nyx: np.ndarray | None = None
    for work in members:
        own_nyx = unpack(probabilities_of(out, work.key, part)).astype(np.float64)
        total_nyx = own_nyx if total_nyx is None else total_nyx + own_nyx
    assert total_nyx is not None
    return (total_nyx / len(members)).astype(np.float32)
