"""The seam audit: steps across the edges of tiles, overpasses and sensors, against those inside.

An edge is where neighbouring pixels lie in two regions. Across it stand pairs of neighbours, and beside it the same
pairs moved along their own direction by a few pixels, into one region or the other. A seam moves the median of the
signed differences across the edge and not of those beside it; texture and noise move neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CONTROLS_PX = (3, 6, 9, 12, 15)
"""How far beside an edge its controls lie, on each side."""

MARGIN_PX = CONTROLS_PX[-1] + 2
"""Pixels on each side of an edge that its audit reads."""

FEWEST_PAIRS = 64
_SEAM_SCORE = 6.0
_MAD_TO_SIGMA, _MEDIAN_ERROR = 1.4826, 1.2533


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeStep:
    """What was measured at one edge, in the unit of the values.

    first, second : codes of the regions, first below second; pairs : of neighbours across the edge
    step : median of second minus first across the edge, less that of the controls
    error : standard error of the step, from the scatter of the controls' medians and of the differences
    across, inside : median size of the difference between neighbours across the edge, and in the controls
    """

    first: int
    second: int
    pairs: int
    step: float
    error: float
    across: float
    inside: float

    @property
    def score(self) -> float:
        """The step in units of its error."""
        return abs(self.step) / self.error if self.error else (float("inf") if self.step else 0.0)

    def is_seam(self, least: float) -> bool:
        """Tell whether it is a seam: beyond what texture explains, and of at least so much."""
        return self.score > _SEAM_SCORE and abs(self.step) >= least


def edge_steps(values_yx: np.ndarray, regions_yx: np.ndarray) -> list[EdgeStep]:
    """Measure the step at each edge between two regions.

    values_yx : (y, x) real, NaN = unknown; regions_yx : (y, x) whole numbers, 0 = no region
    Returns one for each pair of regions with `FEWEST_PAIRS` known pairs across their edge and as many controls.
    """
    across: dict[tuple[int, int], list[np.ndarray]] = {}
    beside: dict[tuple[int, int], dict[int, list[np.ndarray]]] = {}
    for values, regions in ((values_yx, regions_yx), (values_yx.T, regions_yx.T)):
        for edge, signed, controls in _pairs(values.astype(np.float64), regions):
            across.setdefault(edge, []).append(signed)
            of_edge = beside.setdefault(edge, {})
            for shift, found in controls.items():
                of_edge.setdefault(shift, []).append(found)
    steps = []
    for edge in sorted(across):
        controls = {shift: np.concatenate(found) for shift, found in beside[edge].items()}
        step = _step(
            edge, np.concatenate(across[edge]), [c for c in controls.values() if len(c) >= FEWEST_PAIRS]
        )
        if step is not None:
            steps.append(step)
    return steps


def _pairs(
    values: np.ndarray, regions: np.ndarray
) -> Iterator[tuple[tuple[int, int], np.ndarray, dict[int, np.ndarray]]]:
    """Yield for each edge the signed differences along rows across it, and those of its controls by their shift."""
    width = values.shape[1] - 1
    differences = np.diff(values, axis=1)
    one, two = regions[:, :-1].astype(np.int64), regions[:, 1:].astype(np.int64)
    rows, cols = np.nonzero((one != two) & (one > 0) & (two > 0))
    a, b = one[rows, cols], two[rows, cols]
    low, high, sign = np.minimum(a, b), np.maximum(a, b), np.where(a < b, 1.0, -1.0)
    for first, second in {(int(p), int(q)) for p, q in np.unique(np.stack([low, high], 1), axis=0)}:
        mine = (low == first) & (high == second)
        r, c, s = rows[mine], cols[mine], sign[mine]
        found = differences[r, c] * s
        controls = {}
        for shift in (*(-k for k in CONTROLS_PX), *CONTROLS_PX):
            at = c + shift
            fits = (at >= 0) & (at < width)
            y, x, t = r[fits], at[fits], s[fits]
            same = (one[y, x] == two[y, x]) & np.isin(one[y, x], (first, second))
            control = (differences[y, x] * t)[same]
            controls[shift] = control[np.isfinite(control)]
        yield (first, second), found[np.isfinite(found)], controls


def _step(edge: tuple[int, int], across: np.ndarray, controls: list[np.ndarray]) -> EdgeStep | None:
    if len(across) < FEWEST_PAIRS or not controls:
        return None
    medians = np.array([np.median(control) for control in controls])
    together = np.concatenate(controls)
    scatter = _MAD_TO_SIGMA * float(np.median(np.abs(across - np.median(across))))
    of_median = _MEDIAN_ERROR * scatter / np.sqrt(len(across))
    between = float(medians.std(ddof=1)) if len(medians) > 1 else 0.0
    return EdgeStep(
        first=edge[0],
        second=edge[1],
        pairs=len(across),
        step=float(np.median(across) - medians.mean()),
        error=float(np.hypot(of_median, between * np.sqrt(1 + 1 / len(medians)))),
        across=float(np.median(np.abs(across))),
        inside=float(np.median(np.abs(together))),
    )
