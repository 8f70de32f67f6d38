"""From probability to what is stored: the threshold cuts where it says."""

from __future__ import annotations

import numpy as np
import pytest

from slidecube.pipeline.detect import _quantised
from slidecube.pipeline.inventory import PROBABILITY_NODATA


@pytest.mark.parametrize("hundredths", range(1, 100))
def test_no_probability_below_the_threshold_is_rounded_up_to_it(hundredths):
    threshold = np.float64(hundredths) / 100
    near = np.float32(threshold)
    ladder = [near]
    for _ in range(4):
        ladder = [np.nextafter(ladder[0], np.float32(0)), *ladder, np.nextafter(ladder[-1], np.float32(1))]
    p = np.array(ladder, np.float32)

    stored = _quantised(p)

    # a float32 next to the threshold may be the threshold itself, written in fewer digits
    below = p.astype(np.float64) < threshold - 1e-12
    assert below.any()
    assert (stored[below] < round(threshold * 10_000)).all()
    assert (stored[p.astype(np.float64) > threshold + 1e-12] >= round(threshold * 10_000)).all()


def test_unknown_is_nodata_and_the_ends_are_the_ends():
    stored = _quantised(np.array([np.nan, 0, 1, np.nextafter(np.float32(1), np.float32(0))], np.float32))
    assert stored.tolist() == [PROBABILITY_NODATA, 0, 10_000, 9_999]
