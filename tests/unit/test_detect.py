"""From probability to what is stored: the threshold cuts where it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from slidecube.pipeline import styles
from slidecube.pipeline.detect import _observable, _quantised
from slidecube.pipeline.features import Layers
from slidecube.pipeline.inventory import CF, PROBABILITY_NODATA, REASONS, Reason


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


def _layers(**sides):
    def side(clear, snow, hidden):
        return xr.Dataset(
            {
                "clear_count": (("y", "x"), np.array([clear], np.uint16)),
                "snow_pct": (("y", "x"), np.array([snow], np.uint8)),
                "hidden": (("y", "x"), np.array([hidden], np.uint8)),
            }
        )

    n = len(sides["post"][0])
    terrain = xr.Dataset({"elevation": (("y", "x"), np.zeros((1, n), np.float32))})
    return Layers(pre=side(*sides["pre"]), post=side(*sides["post"]), terrain=terrain)


def test_what_hides_the_ground_is_told_by_its_own_reason():
    """The nearest to being seen is said; clouds alone have the old reasons; one clear date is enough."""
    layers = _layers(
        pre=([0, 3, 0, 2, 1, 1, 4, 0], [0, 0, 255, 0, 0, 0, 50, 100], [0, 0, 0, 0, 0, 0, 3, 0]),
        post=([2, 0, 0, 0, 0, 0, 1, 0], [0, 0, 255, 40, 40, 40, 90, 0], [0, 0, 0, 0, 1, 3, 3, 0]),
    )
    seen, reason = _observable(layers, np.zeros((1, 8), np.uint16), exclude_px=1.5)
    assert reason[0].tolist() == [
        Reason.NO_CLEAR_PRE, Reason.NO_CLEAR_POST, Reason.NO_CLEAR_PRE_NOR_POST, Reason.SNOW, Reason.LOW_SUN,
        Reason.CAST_SHADOW, Reason.NONE, Reason.SNOW,
    ]  # fmt: skip
    assert seen[0].tolist() == [False] * 6 + [True, False]


def test_a_side_that_is_not_looked_at_hides_nothing():
    layers = replace(_layers(pre=([1], [0], [0]), post=([1], [0], [0])), pre=xr.Dataset())
    assert _observable(layers, np.zeros((1, 1), np.uint16), exclude_px=0.0)[0].all()


def test_every_reason_is_explained_drawn_and_flagged():
    assert list(REASONS) == list(CF["reason"]["flag_values"]) == [int(r) for r in Reason]
    assert len(CF["reason"]["flag_meanings"].split()) == len(Reason)
    assert sorted(styles.REASONS) == [int(r) for r in Reason if r]
    assert len(set(styles.REASONS.values())) == len(styles.REASONS)
