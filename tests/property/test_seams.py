"""The seam audit finds a planted step and none where there is none, whatever the texture."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.pipeline.seams import edge_steps

LEAST = 0.005
unhurried = settings(max_examples=30)


def ground(seed, shape=(256, 96)):
    """Reflectance of a hillside: smooth shapes, fields with edges of their own, and noise."""
    rng = np.random.default_rng(seed)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=shape), 6)
    fields = scipy.ndimage.zoom(rng.normal(size=[n // 16 + 1 for n in shape]), 16, order=0)[
        : shape[0], : shape[1]
    ]
    return 0.2 + 0.2 * smooth + 0.03 * fields + rng.normal(0, 0.004, shape)


def halves(shape=(256, 96)):
    regions = np.ones(shape, int)
    regions[:, shape[1] // 2 + 3 :] = 2
    return regions


@unhurried
@given(st.integers(0, 2**31))
def test_no_seam_where_none_is(seed):
    (found,) = edge_steps(ground(seed), halves())
    assert not found.is_seam(LEAST), found
    assert found.pairs == 256


@unhurried
@given(st.integers(0, 2**31), st.sampled_from([-0.05, -0.015, 0.015, 0.03]), st.booleans())
def test_a_planted_step_is_found_with_its_size_and_sign(seed, size, turned):
    values = ground(seed) + np.where(halves() == 2, size, 0)
    regions = halves()
    if turned:
        values, regions = values.T, regions.T
    (found,) = edge_steps(values, regions)
    assert found.is_seam(LEAST), found
    assert found.step == pytest.approx(size, abs=0.004)
    assert (found.first, found.second) == (1, 2)


def test_a_slanting_edge_counts_pairs_of_both_directions():
    row, col = np.mgrid[:200, :200]
    regions = np.where(col + row // 2 < 150, 5, 9)
    values = ground(1, (200, 200)) + np.where(regions == 9, 0.02, 0)
    (found,) = edge_steps(values, regions)
    assert (found.first, found.second) == (5, 9)
    assert found.pairs > 200
    assert found.is_seam(LEAST)
    assert found.step == pytest.approx(0.02, abs=0.004)
    assert found.across > found.inside


def test_unknown_pixels_and_no_region_take_no_part():
    values, regions = ground(2), halves()
    values[:200] = np.nan
    assert edge_steps(values, regions) == [], "too few pairs to tell"
    values = ground(2)
    regions[:, 40:60] = 0
    assert edge_steps(values, regions) == [], "the regions do not touch"


def test_a_constant_offset_and_a_swap_of_codes_change_nothing_but_the_sign():
    values = ground(3) + np.where(halves() == 2, 0.02, 0)
    (one,), (two,), (three,) = (
        edge_steps(v, r) for v, r in ((values, halves()), (values + 5, halves()), (values, 3 - halves()))
    )
    assert two.step == pytest.approx(one.step, abs=1e-9)
    assert three.step == pytest.approx(-one.step, abs=1e-12)
