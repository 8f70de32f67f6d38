"""Reducers against plain numpy and scipy, and equal numbers of dates: no change must look like none."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slidecube.pipeline.composite import Compositing, composite_block
from slidecube.pipeline.reducers import (
    geometric_median,
    greenest,
    greenest_of_draw,
    medoid,
    spread_around,
)

unhurried = settings(max_examples=60)


@st.composite
def strips(draw, *, most=7, top=None):
    """(b, o, n) stored values, 0 where not valid, and what is valid."""
    b, o, n = draw(st.integers(1, 4)), draw(st.integers(1, most)), draw(st.integers(1, 5))
    high = top or draw(st.sampled_from([4, 2500, 65535]))  # few values make ties
    values = draw(hnp.arrays(np.uint16, (b, o, n), elements=st.integers(1, high)))
    valid = draw(hnp.arrays(np.bool_, (o, n), elements=st.sampled_from([True, True, True, False])))
    return values * valid, valid


def distances(values, at):
    """Euclidean distances of the observations of one pixel from a spectrum."""
    return np.sqrt(((values.astype(float) - np.asarray(at, float)[:, None]) ** 2).sum(axis=0))


@unhurried
@given(strips())
def test_the_medoid_is_the_observation_nearest_to_all_others(strip):
    stored, valid = strip
    got = medoid(stored, valid)

    for n, chosen in enumerate(got):
        if not valid[:, n].any():
            assert chosen == 0
            continue
        known = stored[:, valid[:, n], n]
        sums = [distances(known, stored[:, o, n]).sum() if ok else np.inf for o, ok in enumerate(valid[:, n])]
        assert valid[chosen, n]
        assert sums[chosen] <= min(sums) * (1 + 1e-12)
        assert not any(s < sums[chosen] * (1 - 1e-12) for s in sums[:chosen]), "the earlier one wins a tie"


def objective(values, at):
    """Sum of distances of which none counts less than half a unit: what the iteration minimises."""
    d = distances(values, at)
    return np.where(d < 0.5, d**2 + 0.25, d).sum()


@unhurried
@given(strips(most=6, top=3000))
def test_the_geometric_median_is_the_least_sum_of_distances(strip):
    stored, valid = strip
    got = geometric_median(stored, valid)

    for n in range(valid.shape[1]):
        known = stored[:, valid[:, n], n].astype(float)
        if known.shape[1] < 3:
            want = known.mean(axis=1) if known.shape[1] else np.zeros(len(known))
            np.testing.assert_array_equal(got[:, n], np.rint(want))
            continue
        found = scipy.optimize.minimize(lambda m, k=known: objective(k, m), got[:, n], method="Nelder-Mead")
        # rounded to whole units, of which each band may lose a half; the rest is what 200 steps leave
        slack = known.shape[1] * 0.5 * np.sqrt(len(known))
        assert objective(known, got[:, n]) <= found.fun + slack + 1e-3 * found.fun


def test_the_geometric_median_of_a_triangle_is_fermats_point():
    """Of an equilateral triangle its centre; of one with an angle above 120 degrees that very corner."""
    equal = np.array([[1000, 3000, 2000], [1000, 1000, 2732]], np.uint16)[..., None]
    blunt = np.array([[1000, 3000, 2000], [1000, 1000, 1100]], np.uint16)[..., None]
    one = np.ones((3, 1), bool)

    np.testing.assert_allclose(geometric_median(equal, one)[:, 0], [2000, 1577], atol=1)
    np.testing.assert_allclose(geometric_median(blunt, one)[:, 0], [2000, 1100], atol=1)


def test_one_outlier_of_many_does_not_move_the_geometric_median():
    values = np.full((3, 9, 1), 1500, np.uint16)
    values[:, 4] = 60_000

    np.testing.assert_array_equal(geometric_median(values, np.ones((9, 1), bool))[:, 0], [1500] * 3)


@pytest.mark.parametrize("method", ["medoid", "geomedian", "greenest", "median"])
def test_pixels_do_not_know_their_neighbours(method):
    """Each pixel alone, and among 700 others in strips and lanes, is the same to the byte."""
    rng = np.random.default_rng(8)
    bands = rng.integers(500, 9000, (3, 9, 7, 100)).astype(np.uint16)
    clear = rng.random((9, 7, 100)) < 0.7
    how = Compositing(method=method, greenest_of=2 * (method == "greenest"))

    def made(at):
        return composite_block(
            [b[at] for b in bands], clear[at], shifts=np.zeros(9, np.int32), how=how, red=0, nir=1,
            days=np.arange(1, 10, dtype=np.uint16), groups=[[i] for i in range(9)],
        )  # fmt: skip

    whole = made(np.s_[:, :, :])
    for y, x in ((0, 0), (3, 50), (6, 99)):
        alone = made(np.s_[:, y : y + 1, x : x + 1])
        np.testing.assert_array_equal(alone[:, 0, 0], whole[:, y, x])


@unhurried
@given(strips(most=9), st.integers(1, 4))
def test_a_draw_lies_between_the_two_ranks_that_its_formula_says(strip, draw):
    stored, valid = strip
    stored = np.concatenate([stored, stored[:1]]) if len(stored) == 1 else stored
    got, nearer = greenest_of_draw(stored, valid, red=0, nir=1, draw=draw)

    top = greenest(stored[0], stored[1], valid)
    for n in range(valid.shape[1]):
        at = np.flatnonzero(valid[:, n])
        if at.size <= draw:
            np.testing.assert_array_equal(got[:, n], stored[:, top[n], n] if at.size else 0)
            continue
        red, nir = stored[:2, :, n].astype(float) - 1000
        ndvi = np.where(
            nir + red > 0, np.clip((nir - red) / np.where(nir + red > 0, nir + red, 1), -1, 1), -2
        )
        ranked = sorted(at, key=lambda o, v=ndvi: (v[o], -o))
        rank = min(max(1 / 3 + (at.size + 1 / 3) * 0.5 ** (1 / draw), 1), at.size)
        low = int(rank)
        below, above = (stored[:, ranked[min(r, at.size) - 1], n].astype(float) for r in (low, low + 1))
        want = below + (rank - low) * (above - below)
        assert np.abs(got[:, n] - want).max() <= 0.5 + np.abs(above - below).max() / 512 + 1e-6
        assert nearer[n] in {ranked[low - 1], ranked[min(low, at.size - 1)]}


@unhurried
@given(strips(most=6))
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_the_spread_is_the_median_of_mean_absolute_differences(strip):
    stored, valid = strip
    image = stored[:, 0]
    got = spread_around(stored, valid, image)

    apart = np.abs(stored.astype(int) - image[:, None]).sum(axis=0)
    means = np.where(valid, (apart + len(stored) // 2) // len(stored), np.nan)
    want = np.rint(np.nanmedian(np.minimum(means, 65_534) + 1, axis=0))
    np.testing.assert_array_equal(got, np.where(valid.sum(axis=0) > 1, want, 0))


NOISE = {
    "gaussian": lambda rng, shape: rng.normal(0, 100, shape),
    "hazy": lambda rng, shape: rng.normal(0, 100, shape) + (rng.random(shape[1:]) < 0.1) * 900,
}
"""Noise of B04 and B08 in ten-thousandths; the second leaves a tenth of the dates under haze that no mask found."""


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("counts", [(12, 3), (3, 12), (7, 2), (5, 4), (40, 3)])
@pytest.mark.parametrize(
    "method", ["greenest of 2", "greenest of 3", "median", "medoid", "geomedian", "nearest-clear"]
)
def test_no_change_is_none_whatever_the_numbers_of_dates(method, counts, noise):
    """Forest that stays as it is, seen on 12 dates before and 3 after: the median of dNDVI is 0 +- .005."""
    if method == "greenest of 3" and min(counts) < 3:
        pytest.skip("fewer dates than the draw: their greenest is that of fewer")
    if noise == "hazy" and min(counts) < 3:
        pytest.skip("of two dates none can outvote a hazy one")
    assert abs(median_change(method, counts, noise)) <= 0.005


def test_the_greenest_of_all_dates_is_greener_where_there_are_more():
    """What the draw is there for."""
    assert median_change("greenest", (12, 3), "gaussian") < -0.01


def median_change(method, counts, noise):
    name, _, draw = method.partition(" of ")
    rng = np.random.default_rng(3)
    ndvi = []
    for dates, event_at in zip(counts, ("end", "start"), strict=True):
        truth = np.array([400, 3000])[:, None, None, None]
        dn = np.rint(truth + NOISE[noise](rng, (2, dates, 60, 100))).clip(1, 20_000).astype(np.uint16)
        made = composite_block(
            list(dn), np.ones(dn.shape[1:], bool), shifts=np.full(dates, 1000, np.int32), red=0, nir=1,
            days=np.arange(1, dates + 1, dtype=np.uint16), groups=[[i] for i in range(dates)],
            how=Compositing(method=name, greenest_of=int(draw or 0), event_at=event_at),
        )  # fmt: skip
        red, nir = made[:2].astype(float) - 1000
        ndvi.append((nir - red) / (nir + red))
    return float(np.median(ndvi[1]) - np.median(ndvi[0]))


def test_the_nearest_clear_date_is_the_last_one_before_and_the_first_one_after():
    clear = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]], bool)[:, None]
    dn = np.arange(10, 10 + clear.size).reshape(clear.shape).astype(np.uint16)

    def made(event_at):
        return composite_block(
            [dn], clear, shifts=np.full(3, 1000, np.int32), days=np.array([5, 9, 30], np.uint16), red=-1, nir=-1,
            groups=[[0], [1], [2]], how=Compositing(method="nearest-clear", event_at=event_at),
        )[:, 0]  # fmt: skip

    assert made("end")[[0, 4]].tolist() == [[1014, 1019, 1020, 0], [9, 30, 30, 0]]
    assert made("start")[[0, 4]].tolist() == [[1010, 1015, 1020, 0], [5, 9, 30, 0]]
