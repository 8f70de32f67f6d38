"""Intervals of scores: Wilson's of a share, and the bootstrap over whatever samples are independent.

Axes: u unit (a patch, a spatial block or a region), k count, r resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import scipy.special

Interval = tuple[float, float]

LEVEL = 0.95
"""Confidence of the intervals that cards quote."""

RESAMPLES = 1_000

Unit = Literal["region", "block", "patch"]
"""What is drawn again."""

MIN_UNITS = 5
"""Regions, or spatial blocks, from which on they are what is drawn again: pixels of one event, and patches beside each
other, are alike. Of fewer a draw says nothing."""


def wilson(hits: int, trials: int, *, level: float = LEVEL) -> Interval | None:
    """Interval of a share; None without trials.

    Source: Wilson 1927; unlike the normal approximation it stays within 0 and 1 and is not empty at 0 hits.
    """
    if trials == 0:
        return None
    z = math.sqrt(2) * float(scipy.special.erfinv(level))
    share, denominator = hits / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # the two ends are exact at no hits and at nothing but hits, which rounding would hide
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == trials else centre + half)


def bootstrap(
    sums_uk: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval | None:
    """Percentile interval of a score of sums, over units drawn again with replacement.

    sums_uk : what each unit adds; score : (r, k) sums -> (r,) scores, NaN where one is not defined
    Returns None with fewer than two units, or when more than half of the draws leave the score undefined.
    Source: Efron 1979.
    """
    units = len(sums_uk)
    if units < 2:
        return None
    draws_ru = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)
    scores = score(draws_ru @ sums_uk.astype(np.float64))
    known = scores[np.isfinite(scores)]
    if len(known) < resamples / 2:
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def units_of(regions: Sequence[str], blocks: Sequence[str]) -> tuple[Unit, np.ndarray]:
    """Say what is independent, and the number of the unit of each patch.

    That is its region where there are `MIN_UNITS`, else its spatial block where all are known and there are as many,
    else the patch itself: then neighbours count as independent, and intervals are too narrow.
    """
    kinds: tuple[tuple[Unit, Sequence[str]], ...] = (("region", regions), ("block", blocks))
    for unit, names_p in kinds:
        names = sorted(set(names_p))
        if len(names) >= MIN_UNITS and all(names_p):
            numbers = {name: n for n, name in enumerate(names)}
            return unit, np.array([numbers[name] for name in names_p])
    return "patch", np.arange(len(regions))


def summed(values_pk: np.ndarray, units_p: np.ndarray) -> np.ndarray:
    """Sum rows by unit."""
    out_uk = np.zeros((int(units_p.max(initial=-1)) + 1, values_pk.shape[1]), values_pk.dtype)
    np.add.at(out_uk, units_p, values_pk)
    return out_uk
