"""Calibration: logits become probabilities that mean what they say; and the threshold from which a pixel counts.

Everything is numpy: what is applied to a nation gives equal bits whatever computed the logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import scipy.special

from slidecube.models.card import THRESHOLDS
from slidecube.models.errors import ModelError
from slidecube.models.network_card import Calibration
from slidecube.models.patches import LANDSLIDE, STABLE
from slidecube.models.thresholds import (
    STEPS,
    at_least,
    best_threshold,
    empty_histogram,
    landslide_from,
    step_histogram,
)

Method = Literal["none", "temperature", "isotonic"]
Rule = Literal["max-f1", "precision"]

TEMPERATURES = (0.05, 20.0)
"""What a temperature may be. Where validation is separated without an error, the best one would be 0."""

MIN_STRATUM_PX = 1_000
"""Judged pixels, with landslides among them, from which on a stratum has a temperature of its own."""

_ISOTONIC_LIMIT = 12.0  # logits beyond it are as sure as it
_ISOTONIC_BINS_PER_LOGIT = 16  # points of a card: a file that people read
_SURE = 1e-6  # what isotonic regression may say at most of its extremes, which are counts of 0


def fit_calibration(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    method: Method,
    by: str = "",
    strata: np.ndarray | None = None,
) -> Calibration:
    """Fit on validation what turns logits into probabilities.

    logits, labels : of equal shape; labels other than 0 and 1, and logits that are not finite, are left out
    by : name of a categorical feature; strata : its values for each pixel, NaN = unknown; of temperatures only
    Raises ModelError when validation has no landslide, or nothing else, and for strata that are no whole numbers.
    """
    if method == "none":
        return Calibration()
    if method == "isotonic" and by:
        raise ModelError("Isotonic calibration has no strata; leave by out, or take method = 'temperature'")
    judged = judged_pixels(logits, labels)
    x, y = logits[judged].astype(np.float64), labels[judged] == LANDSLIDE
    require_both(y)
    if method == "isotonic":
        points, probabilities = fit_isotonic(x, y)
        return Calibration(method="isotonic", logits=tuple(points), probabilities=tuple(probabilities))
    found = dict[str, float]()
    if by:
        if strata is None:
            raise ModelError(f"Calibration by {by!r} needs its values; name it among the features")
        found = _stratum_temperatures(x, y, strata[judged])
    return Calibration(method="temperature", temperature=fit_temperature(x, y), by=by, strata=found)


def judged_pixels(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tell which pixels are judged: known to be stable or landslide, and with a finite logit."""
    return np.asarray(((labels == STABLE) | (labels == LANDSLIDE)) & np.isfinite(logits))


def require_both(landslide: np.ndarray) -> None:
    """Raise ModelError where validation has only one of the two classes."""
    hits = int(landslide.sum())
    if hits == 0:
        raise ModelError(
            f"Validation has no landslide pixel among {landslide.size} judged ones, so nothing can be calibrated and "
            "no threshold chosen; give it data with landslides"
        )
    if hits == landslide.size:
        raise ModelError(
            f"All {hits} judged pixels of validation are landslide, so nothing can be calibrated and no threshold "
            "chosen; give it ground without, or complete = true where the reference holds every landslide"
        )


def fit_temperature(logits: np.ndarray, landslide: np.ndarray) -> float:
    """Temperature by which logits are divided, of the least negative log-likelihood; convex in its inverse.

    Source: Guo et al. 2017, section 4.2
    """
    from scipy.optimize import minimize_scalar  # noqa: PLC0415  only who trains needs it

    signed = np.where(landslide, -logits, logits).astype(np.float64)

    def loss(inverse: float) -> float:
        return float(np.logaddexp(0.0, signed * inverse).mean())

    low, high = TEMPERATURES
    best = minimize_scalar(loss, bounds=(1 / high, 1 / low), method="bounded", options={"xatol": 1e-6})
    return float(f"{1 / float(best.x):.6g}")


def fit_isotonic(logits: np.ndarray, landslide: np.ndarray) -> tuple[list[float], list[float]]:
    """Points of a line that never falls, logits and probabilities, between which it is straight.

    Logits are first gathered into narrow bins, so that a card stays short.
    Source: Zadrozny and Elkan 2002; pool adjacent violators of scikit-learn.
    """
    from sklearn.isotonic import IsotonicRegression  # noqa: PLC0415  only who trains needs it

    limit = _ISOTONIC_LIMIT
    place = np.round(np.clip(logits, -limit, limit) * _ISOTONIC_BINS_PER_LOGIT).astype(np.int64)
    bins, where = np.unique(place, return_inverse=True)
    n = np.bincount(where).astype(np.float64)
    hits = np.bincount(where, weights=landslide)
    middle = bins / _ISOTONIC_BINS_PER_LOGIT
    fit = IsotonicRegression(y_min=_SURE, y_max=1 - _SURE).fit(middle, hits / n, sample_weight=n)
    return [float(v) for v in fit.X_thresholds_], [float(f"{v:.9g}") for v in fit.y_thresholds_]


def _stratum_temperatures(x: np.ndarray, y: np.ndarray, strata: np.ndarray) -> dict[str, float]:
    """Temperature of each stratum with enough pixels of both kinds; the others keep the general one."""
    found = {}
    values = np.unique(strata[np.isfinite(strata)])
    wrong = values[values != np.round(values)]
    if len(wrong):
        raise ModelError(
            f"The feature by which probabilities are calibrated has the value {wrong[0]:g}; classes are whole numbers: "
            "name a layer of classes in by, or leave it out"
        )
    for value in values:
        inside = strata == value
        hits = int(y[inside].sum())
        if inside.sum() >= MIN_STRATUM_PX and 0 < hits < inside.sum():
            found[stratum_name(value)] = fit_temperature(x[inside], y[inside])
    return found


def stratum_name(value: float) -> str:
    """Name of a class in a card: its number."""
    return str(int(value))


def calibrated(calibration: Calibration, logits: np.ndarray, strata: np.ndarray | None = None) -> np.ndarray:
    """Probabilities of logits: float32 of the same shape, never falling in the logit of one stratum; NaN stays NaN.

    strata : values of the feature `calibration.by` for each pixel; unknown ones take the general temperature
    """
    x = np.asarray(logits, np.float32)
    if calibration.method == "none":
        return np.asarray(scipy.special.expit(x), np.float32)
    if calibration.method == "isotonic":
        points = np.asarray(calibration.logits, np.float64)
        line = np.interp(x, points, np.asarray(calibration.probabilities, np.float64))
        return line.astype(np.float32)  # NaN stays NaN
    temperature: np.ndarray | np.float32 = np.float32(calibration.temperature)
    if calibration.strata and strata is not None:
        temperature = np.full(x.shape, calibration.temperature, np.float32)
        for name, own in calibration.strata.items():
            temperature[strata == float(name)] = own
    return np.asarray(scipy.special.expit(x / temperature), np.float32)


@dataclass(frozen=True, slots=True)
class ScoreHistogram:
    """Judged pixels by class and calibrated probability: bounded, and two of them can be added.

    counts_ks : (2, steps + 1) int64, row 0 stable, row 1 landslide, by the steps in which maps keep probabilities
    """

    counts_ks: np.ndarray = field(default_factory=empty_histogram)

    @classmethod
    def of(cls, probability: np.ndarray, labels: np.ndarray) -> ScoreHistogram:
        """Count pixels; unknown probabilities and other labels than 0 and 1 are left out."""
        return cls(step_histogram(probability, labels))

    @classmethod
    def sum_of(cls, parts: Iterable[ScoreHistogram]) -> ScoreHistogram:
        """Add histograms."""
        total = empty_histogram()
        for part in parts:
            total += part.counts_ks
        return cls(total)

    @property
    def totals(self) -> tuple[int, int]:
        """Pixels of landslides, and stable ones."""
        return int(self.counts_ks[1].sum()), int(self.counts_ks[0].sum())

    @property
    def landslide_share(self) -> float | None:
        """Share of landslides among the pixels; None without any."""
        landslide, stable = self.totals
        return landslide / (landslide + stable) if landslide + stable else None

    def average_precision(self) -> float | None:
        """Area under the steps of precision over recall, without interpolation; None without landslides.

        Equal to scikit-learn's of the probabilities that a map keeps.
        """
        hits, false = at_least(self.counts_ks)
        if not hits[0]:
            return None
        called = hits + false
        precision = np.where(called > 0, hits / np.maximum(called, 1), 0.0)
        gained = self.counts_ks[1] / hits[0]
        return float((precision * gained).sum())

    def best_f1(self) -> tuple[float, float]:
        """Highest F1 of all thresholds and the one of `best_threshold` that gives it; (0, .5) without landslides."""
        if not self.totals[0]:
            return 0.0, 0.5
        best = best_threshold(self.counts_ks)
        return best.f1, best.threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A threshold, and in words how it was chosen."""

    threshold: float
    chosen: str


def choose_threshold(
    histogram: ScoreHistogram,
    *,
    rule: Rule = "max-f1",
    precision: float = 0.9,
    prevalence: float = 0.001,
) -> Chosen:
    """Choose on validation the probability from which a pixel is landslide, one of the steps that maps keep.

    rule : "max-f1", or "precision": the lowest threshold whose precision, where landslides cover the share
        `prevalence`, is at least `precision`
    Raises ModelError where validation has only one class, and where no threshold gives such a precision.
    """
    landslide, stable = histogram.totals
    require_both(np.repeat([True, False], [min(landslide, 1), min(stable, 1)]))
    if rule == "max-f1":
        f1, threshold = histogram.best_f1()
        return Chosen(threshold=threshold, chosen=f"highest F1 on validation, {f1:.3f}")
    low, high = (landslide_from(value) for value in THRESHOLDS)
    hits, false = (found[low : high + 1] for found in at_least(histogram.counts_ks))
    recall = hits / landslide
    # no false pixel among n does not prove a rate of 0: it counts as one
    false_rate = np.maximum(false, 1) / stable
    share = prevalence * recall / (prevalence * recall + (1 - prevalence) * false_rate)
    enough = np.flatnonzero((share >= precision) & (hits > 0))
    if not len(enough):
        best = int(np.argmax(np.where(hits > 0, share, -1)))
        raise ModelError(
            f"No threshold has a precision of {precision:g} where landslides cover {100 * prevalence:g} % of the land: "
            f"on validation the highest is {share[best]:.3g}, with a recall of {recall[best]:.3g} "
            f"from {(best + low) / STEPS:.4g}; lower precision in [threshold], or take rule = 'max-f1'"
        )
    first = int(enough[0])
    return Chosen(
        threshold=(first + low) / STEPS,
        chosen=f"lowest of a precision of {precision:g} at a prevalence of {100 * prevalence:g} % on validation, "
        f"recall {recall[first]:.3f}",
    )
