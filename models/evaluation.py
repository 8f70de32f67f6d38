"""Judgement of probabilities against labels: pixels, objects and calibration, patch by patch, with intervals.

Memory does not grow with the pixels: a patch leaves some counts, all patches together one histogram. Only what was
observed and labelled is judged. A score whose denominator is 0 is None.
Axes: p patch, k count, r resample, y row, x column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.ndimage

from slidecube.models.calibration import ScoreHistogram, judged_pixels
from slidecube.models.errors import ModelError
from slidecube.models.intervals import RESAMPLES, bootstrap, summed, units_of, wilson
from slidecube.models.patches import LANDSLIDE

PREVALENCES = (0.01, 0.001, 0.0001)
"""Shares of land under landslides at which cards quote precision."""

ECE_FROM = 0.1
"""Calibration is judged on pixels above this probability: nearly all others are stable and say nothing of it."""

ECE_BINS = 10

MIN_OVERLAP = 0.2
"""Share of an object that the other side must cover for it to count as matched, as in the evaluation of inventories."""

MIN_OBSERVED = 0.5
"""Share of an object's pixels that must be judged for it to be judged at all."""

_EIGHT = np.ones((3, 3), int)
"""Neighbours that belong to one object, as in the inventory."""

_COUNTS = ("tp", "fp", "fn", "tn", "truth_found", "truth_missed", "predicted_right", "predicted_wrong")
TP, FP, FN, TN, FOUND, MISSED, RIGHT, WRONG = range(len(_COUNTS))


@dataclass(slots=True)
class Tally:
    """What is known of some patches; filled patch by patch, and two of them can be joined.

    threshold : probability from which a pixel is landslide
    min_area_px : smaller predicted objects are removed before anything is counted, as detection removes them; but what
        the edge of a patch cuts may be larger than it shows, so its pixels count, and as an object it is not judged
    """

    threshold: float
    min_area_px: int = 1
    counts: list[np.ndarray] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    histogram: ScoreHistogram = field(default_factory=ScoreHistogram)
    squares: float = 0.0
    pixel_ece: np.ndarray = field(default_factory=lambda: np.zeros((3, ECE_BINS)))
    object_ece: np.ndarray = field(default_factory=lambda: np.zeros((3, ECE_BINS)))

    def add(
        self, probability_yx: np.ndarray, labels_yx: np.ndarray, *, region: str = "", block: str = ""
    ) -> None:
        """Judge a patch. Raises ModelError where probability and labels have other sides."""
        if probability_yx.shape != labels_yx.shape:
            raise ModelError(
                f"Probability of {probability_yx.shape} pixels and labels of {labels_yx.shape} do not belong together"
            )
        judged = judged_pixels(probability_yx, labels_yx)
        p, y = probability_yx[judged].astype(np.float64), labels_yx[judged] == LANDSLIDE
        with np.errstate(invalid="ignore"):
            called_yx = self._without_small(probability_yx >= self.threshold)  # NaN is not
        called = called_yx[judged]
        row = np.zeros(len(_COUNTS), np.int64)
        row[:4] = (called & y).sum(), (called & ~y).sum(), (~called & y).sum(), (~called & ~y).sum()
        row[4:] = self._objects(called_yx, probability_yx, labels_yx == LANDSLIDE, judged)
        self.counts.append(row)
        self.regions.append(region)
        self.blocks.append(block)
        self.histogram = ScoreHistogram.sum_of((self.histogram, ScoreHistogram.of(p, y.astype(np.uint8))))
        self.squares += float(((p - y) ** 2).sum())
        some = p > ECE_FROM
        _gather(self.pixel_ece, p[some], y[some])

    def _objects(
        self, called_yx: np.ndarray, probability_yx: np.ndarray, truth_yx: np.ndarray, judged_yx: np.ndarray
    ) -> tuple[int, int, int, int]:
        _, found = _matches(truth_yx, called_yx, judged_yx, min_px=1)
        objects, right = _matches(called_yx, truth_yx, judged_yx, min_px=self.min_area_px)
        _gather(self.object_ece, objects.means(probability_yx), right)
        return int(found.sum()), int((~found).sum()), int(right.sum()), int((~right).sum())

    def _without_small(self, called_yx: np.ndarray) -> np.ndarray:
        numbers_yx, n = scipy.ndimage.label(called_yx, structure=_EIGHT)
        kept = np.bincount(numbers_yx.ravel(), minlength=n + 1) >= self.min_area_px
        for edge in (numbers_yx[0], numbers_yx[-1], numbers_yx[:, 0], numbers_yx[:, -1]):
            kept[edge] = True
        kept[0] = False
        return np.asarray(kept[numbers_yx])

    def join(self, other: Tally) -> None:
        """Take in the patches of another one of the same threshold."""
        assert (self.threshold, self.min_area_px) == (other.threshold, other.min_area_px)
        self.counts += other.counts
        self.regions += other.regions
        self.blocks += other.blocks
        self.histogram = ScoreHistogram.sum_of((self.histogram, other.histogram))
        self.squares += other.squares
        self.pixel_ece = self.pixel_ece + other.pixel_ece
        self.object_ece = self.object_ece + other.object_ece

    def metrics(self, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """Scores with intervals, JSON types, for a card; what is not defined is left out.

        landslide_share is that of the judged pixels, at which threshold, average precision, Brier score and ECE hold.
        An interval, `<score>_interval`, is the bootstrap's over what `interval_unit` names, see `units_of`.
        """
        rows_pk = np.array(self.counts, np.int64).reshape(-1, len(_COUNTS))
        total = rows_pk.sum(axis=0)
        unit, units_p = units_of(self.regions, self.blocks)
        rows_uk = summed(rows_pk, units_p)
        said: dict[str, Any] = {
            "patches": len(rows_pk),
            "regions": len(set(self.regions)),
            "interval_unit": unit,
            "threshold": self.threshold,
            "landslide_share": _number(self.histogram.landslide_share),
            **{name: int(n) for name, n in zip(_COUNTS, total, strict=True)},
        }
        for name, score in SCORES.items():
            said[name] = _number(score(total[None])[0])
            said[f"{name}_interval"] = _pair(bootstrap(rows_uk, score, resamples=resamples, seed=seed))
        said["precision_wilson"] = _pair(wilson(int(total[TP]), int(total[TP] + total[FP])))
        said["recall_wilson"] = _pair(wilson(int(total[TP]), int(total[TP] + total[FN])))
        said["average_precision"] = _number(self.histogram.average_precision())
        pixels = int(total[:4].sum())
        said["brier"] = _number(self.squares / pixels if pixels else None)
        said["ece_above_0.1"] = _number(expected_error(self.pixel_ece))
        said["ece_of_objects"] = _number(expected_error(self.object_ece))
        for prevalence in PREVALENCES:
            at = precision_at(prevalence)
            name = f"precision_at_{100 * prevalence:g}_pct"
            said[name] = _number(at(total[None])[0])
            said[f"{name}_interval"] = _pair(bootstrap(rows_uk, at, resamples=resamples, seed=seed))
        return {name: value for name, value in said.items() if value is not None}


def _gather(into: np.ndarray, p: np.ndarray, right: np.ndarray) -> None:
    """Add number, sum of probabilities and number of right ones to the bins of probability."""
    at = np.minimum((p * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    into[0] += np.bincount(at, minlength=ECE_BINS)
    into[1] += np.bincount(at, weights=p, minlength=ECE_BINS)
    into[2] += np.bincount(at, weights=right, minlength=ECE_BINS)


def expected_error(bins: np.ndarray) -> float | None:
    """Expected calibration error of bins (number, sum of probabilities, number of right ones); None of nothing.

    Source: Naeini et al. 2015; Guo et al. 2017, eq. 3
    """
    n = bins[0].sum()
    return float(np.abs(bins[1] - bins[2]).sum() / n) if n else None


@dataclass(frozen=True, slots=True)
class _Objects:
    """Pixels connected over edges and corners. numbers_yx : 0 = none; kept : numbers of those that are judged."""

    numbers_yx: np.ndarray
    kept: np.ndarray

    def means(self, values_yx: np.ndarray) -> np.ndarray:
        inside = self.numbers_yx > 0
        size = int(self.numbers_yx.max(initial=0)) + 1
        sums = np.bincount(self.numbers_yx[inside], weights=values_yx[inside], minlength=size)
        n = np.bincount(self.numbers_yx[inside], minlength=size)
        return np.asarray(sums[self.kept] / n[self.kept])


def _matches(
    objects_yx: np.ndarray, others_yx: np.ndarray, judged_yx: np.ndarray, *, min_px: int
) -> tuple[_Objects, np.ndarray]:
    """Tell for each object whether the others cover enough of it.

    Those below `min_px`, and those of which too little is judged, are left out.
    """
    numbers_yx, n = scipy.ndimage.label(objects_yx, structure=_EIGHT)
    sizes = np.bincount(numbers_yx.ravel(), minlength=n + 1)[1:]
    judged = np.bincount(numbers_yx[judged_yx], minlength=n + 1)[1:]
    hit = np.bincount(numbers_yx[judged_yx & others_yx], minlength=n + 1)[1:]
    kept = (sizes >= min_px) & (judged >= MIN_OBSERVED * sizes)
    objects = _Objects(numbers_yx, np.flatnonzero(kept) + 1)
    return objects, np.asarray(hit[kept] >= MIN_OVERLAP * judged[kept])


def precision_at(prevalence: float) -> Callable[[np.ndarray], np.ndarray]:
    """Score: precision that the same recall and false-positive rate give where landslides have another share.

    Source: Bayes; METHODS section 5
    """

    def score(k: np.ndarray) -> np.ndarray:
        recall = _ratio(k[:, TP], k[:, TP] + k[:, FN])
        false_rate = _ratio(k[:, FP], k[:, FP] + k[:, TN])
        hits = prevalence * recall
        return _ratio(hits, hits + (1 - prevalence) * false_rate)

    return score


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(b > 0, a / b, np.nan)


def _f1(k: np.ndarray) -> np.ndarray:
    return _ratio(2 * k[:, TP], 2 * k[:, TP] + k[:, FP] + k[:, FN])


def _object_f1(k: np.ndarray) -> np.ndarray:
    p = _ratio(k[:, RIGHT], k[:, RIGHT] + k[:, WRONG])
    r = _ratio(k[:, FOUND], k[:, FOUND] + k[:, MISSED])
    return np.where(p + r == 0, 0.0, _ratio(2 * p * r, p + r))


SCORES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "f1": _f1,
    "precision": lambda k: _ratio(k[:, TP], k[:, TP] + k[:, FP]),
    "recall": lambda k: _ratio(k[:, TP], k[:, TP] + k[:, FN]),
    "iou_landslide": lambda k: _ratio(k[:, TP], k[:, TP] + k[:, FP] + k[:, FN]),
    "false_positive_rate": lambda k: _ratio(k[:, FP], k[:, FP] + k[:, TN]),
    "object_f1": _object_f1,
    "object_precision": lambda k: _ratio(k[:, RIGHT], k[:, RIGHT] + k[:, WRONG]),
    "object_recall": lambda k: _ratio(k[:, FOUND], k[:, FOUND] + k[:, MISSED]),
}
"""Scores of sums of counts, (r, k) -> (r,), NaN where not defined."""


def judge(
    probabilities: Sequence[np.ndarray] | np.ndarray,
    labels: Sequence[np.ndarray] | np.ndarray,
    *,
    threshold: float,
    regions: Sequence[str] = (),
    blocks: Sequence[str] = (),
    min_area_px: int = 1,
) -> Tally:
    """Judge patches: probabilities and labels (p, y, x), read one after the other."""
    tally = Tally(threshold=threshold, min_area_px=min_area_px)
    for i, (probability_yx, labels_yx) in enumerate(zip(probabilities, labels, strict=True)):
        region, block = regions[i] if regions else "", blocks[i] if blocks else ""
        tally.add(probability_yx, labels_yx, region=region, block=block)
    return tally


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")


def _pair(values: tuple[float, float] | None) -> list[float] | None:
    return None if values is None else [float(f"{value:.6g}") for value in values]
