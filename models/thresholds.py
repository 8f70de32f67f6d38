"""Thresholds: the steps in which maps keep probabilities, and where on them F1 is best.

Histograms count pixels by step, so they add up over batches and processes, and what is chosen holds on the map.
Axes: k class (stable ground, landslide), s step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.special

from slidecube.models.card import PROBABILITY_STEP, THRESHOLDS
from slidecube.models.patches import LANDSLIDE, STABLE

STEPS = round(1 / PROBABILITY_STEP)
"""Steps from 0 to 1; a histogram has one more bin, of probabilities of 1."""

_FIRST, _LAST = (round(value * STEPS) for value in THRESHOLDS)
_LOGITS = scipy.special.logit(np.arange(_FIRST, _LAST + 1) / STEPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The best threshold of a map and what it gives."""

    threshold: float
    precision: float
    recall: float
    f1: float


def steps_of(probability: np.ndarray) -> np.ndarray:
    """Whole steps of known probabilities, downwards, as maps keep them: int64 of the same shape."""
    return np.floor(probability.astype(np.float64) / PROBABILITY_STEP).astype(np.int64)


def landslide_from(threshold: float) -> int:
    """Step from which a pixel is landslide: the threshold, rounded up."""
    return math.ceil(threshold / PROBABILITY_STEP - 1e-9)


def on_step(threshold: float) -> float:
    """Return the lowest threshold not below this one that a card may hold, or the highest that it may."""
    return min(max(landslide_from(threshold), _FIRST), _LAST) / STEPS


def empty_histogram() -> np.ndarray:
    """(2, steps + 1) int64: of stable ground and of landslides."""
    return np.zeros((2, STEPS + 1), np.int64)


def step_histogram(probability: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count the probabilities of stable ground and of landslides; other labels, and NaN, are left out.

    labels : uint8 of the same shape. Returns (2, steps + 1) int64.
    """
    known = np.isfinite(probability)
    return np.stack(
        [
            np.bincount(steps_of(probability[known & (labels == of)]), minlength=STEPS + 1)
            for of in (STABLE, LANDSLIDE)
        ]
    )


def logit_histogram(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count logits by the step of their probability; logits : finite float32."""
    return step_histogram(scipy.special.expit(logits.ravel()), labels.ravel())


def at_least(counts_ks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hits and false alarms of each step as threshold."""
    false, hits = counts_ks[:, ::-1].cumsum(axis=1)[:, ::-1]
    return hits, false


def best_threshold(counts_ks: np.ndarray) -> Judgement:
    """Maximise F1 = 2 TP / (2 TP + FP + FN) over the thresholds, a pixel being landslide from the threshold on.

    Of thresholds that are equally good it is the middle, in the logit, of the widest stretch of them: as far from the
    surest stable ground as from the least sure landslide.
    counts_ks : of `step_histogram`, with a landslide in it
    """
    hits, false = (found[_FIRST : _LAST + 1].astype(np.float64) for found in at_least(counts_ks))
    total = float(counts_ks[1].sum())
    f1 = 2 * hits / (hits + false + total)
    at = _middle(np.flatnonzero(f1 == f1.max()))
    return Judgement(
        threshold=(at + _FIRST) / STEPS,
        precision=float(hits[at] / max(hits[at] + false[at], 1)),
        recall=float(hits[at] / total),
        f1=float(f1[at]),
    )


def _middle(tied: np.ndarray) -> int:
    """Place in the middle of the widest unbroken stretch of places; of equal ones the first."""
    stretches = np.split(tied, np.flatnonzero(np.diff(tied) > 1) + 1)
    widest = max(stretches, key=lambda places: _LOGITS[places[-1]] - _LOGITS[places[0]])
    middle = (_LOGITS[widest[0]] + _LOGITS[widest[-1]]) / 2
    return int(widest[np.argmin(np.abs(_LOGITS[widest] - middle))])
