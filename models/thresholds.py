"""The threshold at which a map of logits has its best F1, from histograms that add up over batches and processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from slidecube.models.patches import LANDSLIDE, STABLE

_EDGES = np.arange(-600, 601) * 0.02
"""Logits from -12 to 12: thresholds of probability from 6e-6 to 1 - 6e-6, .005 apart around .5. What lies outside is
counted in the last bins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The best threshold of a map and what it gives; on a tie, the threshold nearest to .5."""

    threshold: float
    precision: float
    recall: float
    f1: float


def empty_histogram() -> np.ndarray:
    """(2, bins) int64: of stable ground and of landslides."""
    return np.zeros((2, len(_EDGES) - 1), np.int64)


def histogram(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count logits of stable ground and of landslides; all other labels are left out.

    logits : finite float32; labels : uint8 of the same shape. Returns (2, bins) int64.
    """
    bins = empty_histogram().shape[1]
    place = np.clip(np.searchsorted(_EDGES, logits.ravel(), side="right") - 1, 0, bins - 1)
    flat = labels.ravel()
    return np.stack([np.bincount(place[flat == of], minlength=bins) for of in (STABLE, LANDSLIDE)])


def best_threshold(counts: np.ndarray) -> Judgement:
    """Maximise F1 = 2 TP / (2 TP + FP + FN) over the thresholds, a pixel being landslide from the threshold on.

    counts : (2, bins) of `histogram`, with a landslide in it
    """
    above = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1][
        :, 1:
    ]  # the first bin also holds what is below its edge
    fp, tp = above.astype(np.float64)
    total = float(counts[1].sum())
    f1 = 2 * tp / (tp + fp + total)
    logits = _EDGES[1:-1]
    tied = np.flatnonzero(f1 == f1.max())
    at = tied[np.argmin(np.abs(logits[tied]))]
    return Judgement(
        threshold=1 / (1 + math.exp(-logits[at])),
        precision=float(tp[at] / max(tp[at] + fp[at], 1)),
        recall=float(tp[at] / total),
        f1=float(f1[at]),
    )
