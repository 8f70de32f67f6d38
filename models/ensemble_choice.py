"""Which candidates make an ensemble: chosen on validation, by the F1 of the mean of their probabilities.

Axes: m candidate, n judged pixel of validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slidecube.models.calibration import ScoreHistogram
from slidecube.models.errors import ModelError

SIZES = (2, 90)
"""Members of an ensemble, at least and at most: Ganeroed et al. 2023 tried 2 to 90 of the 90 of a setting."""

FULL = 65535
"""What stands for a probability of 1 where probabilities are kept as uint16."""

Read = Callable[[int], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An ensemble that was tried. members : places among the candidates, in the order of the choice."""

    members: tuple[int, ...]
    f1: float
    threshold: float


def pack(probability: np.ndarray) -> np.ndarray:
    """Keep probabilities in two bytes, within 1/131070; NaN, which is not judged, as 0."""
    return np.asarray(np.round(np.nan_to_num(probability, nan=0.0) * FULL), np.uint16)


def unpack(kept: np.ndarray) -> np.ndarray:
    """Probabilities that were packed, float32."""
    return np.asarray(kept / np.float32(FULL), np.float32)


def ranking(scores: Sequence[float]) -> list[int]:
    """Places of candidates from the best score down; of equal ones the earlier first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def k_best(read: Read, labels_n: np.ndarray, scores: Sequence[float], sizes: Sequence[int]) -> list[Choice]:
    """Mean of the K best on validation, for each size that the candidates are enough for.

    read : place -> (n,) uint16 probabilities; labels_n : uint8; one candidate is in memory at a time
    Source: Ganeroed et al. 2023, section 3.5
    """
    wanted = sorted({k for k in sizes if k <= len(scores)})
    _require_sizes(sizes)
    order, total = ranking(scores), np.zeros(len(labels_n), np.uint32)
    found = []
    for k, place in enumerate(order[: wanted[-1] if wanted else 0], start=1):
        total += read(place)
        if k in wanted:
            f1, threshold = _best_f1(total, k, labels_n)
            found.append(Choice(members=tuple(order[:k]), f1=f1, threshold=threshold))
    return found


def greedy(read: Read, labels_n: np.ndarray, scores: Sequence[float], sizes: Sequence[int]) -> list[Choice]:
    """Forward selection: start with the best, and add what raises the F1 of the mean most, each candidate once.

    The next member is added even where all lower the score, so that each size has its ensemble.
    Source: Caruana et al. 2004, section 2, without replacement: members of a card have one weight.
    """
    _require_sizes(sizes)
    last = max((k for k in sizes if k <= len(scores)), default=0)
    if not last:
        return []
    chosen = [ranking(scores)[0]]
    total = read(chosen[0]).astype(np.uint32)
    found = []
    while len(chosen) < last:
        left = [i for i in ranking(scores) if i not in chosen]
        k = len(chosen) + 1
        tried = [_best_f1(total + read(i), k, labels_n) for i in left]
        best = max(range(len(left)), key=lambda j: (tried[j][0], -j))
        chosen.append(left[best])
        total = total + read(left[best])
        if k in sizes:
            found.append(Choice(members=tuple(chosen), f1=tried[best][0], threshold=tried[best][1]))
    return found


def _require_sizes(sizes: Sequence[int]) -> None:
    low, high = SIZES
    wrong = [k for k in sizes if not low <= k <= high]
    if wrong:
        raise ModelError(f"An ensemble of {wrong[0]} is not allowed; {low} to {high} members are")


def _best_f1(total: np.ndarray, members: int, labels_n: np.ndarray) -> tuple[float, float]:
    return ScoreHistogram.of((total / np.float32(members * FULL)).astype(np.float32), labels_n).best_f1()
