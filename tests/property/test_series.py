"""Mean and spread of NDVI over a window's dates against plain numpy, the t-test against scipy's, and ALDI's rule."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.catalog.scenes import Offset, Scene
from slidecube.models.errors import ModelError
from slidecube.models.rules import ALDI_DEFAULTS, aldi_index
from slidecube.models.zoo import build_model
from slidecube.pipeline.composite import Compositing, composite
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.run_plan import series_variables
from slidecube.pipeline.series import loss_probability, ndvi_series, series_values

unhurried = settings(max_examples=40)
START = np.datetime64("2021-06-01T10:30")


def scene(i, *, offset=0.0, datatake=None):
    return Scene(
        id=f"S{i:03d}", role="optical", source="local", identity=f"I{i:03d}", version="", bands={}, item={},
        datetime=(START + np.timedelta64(5 * i, "D")).astype(object), datatake=datatake or f"D{i:03d}",
        offset=Offset(value=offset, applied=False, reason="test"),
    )  # fmt: skip


def stack(seed, dates=6, shape=(7, 8), holes=0.3):
    rng = np.random.default_rng(seed)
    bands = {b: rng.integers(1, 6000, (dates, *shape)).astype(np.uint16) for b in ("B04", "B08", "B11")}
    for band in bands.values():
        band[rng.random(band.shape) < holes / 3] = 0
    return bands, rng.random((dates, *shape)) > holes


def run(bands, clear, scenes, chunks=-1):
    lazy = {name: da.from_array(values, chunks=(-1, chunks, chunks)) for name, values in bands.items()}
    made = ndvi_series(lazy, da.from_array(clear, chunks=(-1, chunks, chunks)), scenes=scenes)
    return {name: array.compute(scheduler="synchronous") for name, array in made.items()}


def decoded(made):
    return [series_values(name, xr.DataArray(values)).values for name, values in made.items()]


@unhurried
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_equals_numpy_to_a_ten_thousandth(seed, dates):
    bands, clear = stack(seed, dates)
    scenes = [scene(i, offset=-0.1 if i % 2 else 0.0) for i in range(dates)]
    valid = clear & np.all([b != 0 for b in bands.values()], axis=0)
    shifts = np.array([1000 * (i % 2) for i in range(dates)])[:, None, None]
    red, nir = (np.maximum(bands[b].astype(float) - shifts, -999) for b in ("B04", "B08"))
    ratio = np.clip((nir - red) / np.where(nir + red > 0, nir + red, 1), -1, 1)
    ndvi = np.ma.masked_array(np.where(nir + red > 0, ratio, 0), ~valid)

    mean, deviation = decoded(run(bands, clear, scenes))

    n = valid.sum(axis=0)
    np.testing.assert_array_equal(np.isnan(mean), n == 0)
    np.testing.assert_array_equal(np.isnan(deviation), n < 2)
    np.testing.assert_allclose(mean[n > 0], ndvi.mean(axis=0)[n > 0], atol=1.1e-4)
    if (n > 1).any():
        np.testing.assert_allclose(deviation[n > 1], ndvi.std(axis=0, ddof=1)[n > 1], atol=2e-4)


@unhurried
@given(st.integers(0, 2**32 - 1), st.randoms())
def test_order_and_blocks_change_nothing_and_counts_are_the_composites(seed, random):
    bands, clear = stack(seed)
    scenes = [
        scene(i, datatake=f"D{i // 2}" if i < 4 else None) for i in range(6)
    ]  # two overpasses of two items
    want = run(bands, clear, scenes)
    order = random.sample(range(6), 6)

    cut = run({b: v[order] for b, v in bands.items()}, clear[order], [scenes[i] for i in order], chunks=3)
    lazy = {name: da.from_array(values) for name, values in bands.items()}
    count = composite(lazy, da.from_array(clear), scenes=scenes, how=Compositing(method="median"))[
        "clear_count"
    ].compute()

    for name, values in want.items():
        np.testing.assert_array_equal(cut[name], values)
    np.testing.assert_array_equal(want["ndvi_mean"] > 0, count > 0)
    np.testing.assert_array_equal(want["ndvi_std"] > 0, count > 1)


def test_what_it_cannot_do_without_is_named():
    one = da.ones((1, 2, 2), dtype=np.uint16)
    with pytest.raises(PipelineError, match="need bands B04 and B08; got B02"):
        ndvi_series({"B02": one}, one > 0, scenes=[scene(0)])


SAMPLE = st.tuples(st.floats(-1, 1), st.floats(0.001, 0.5), st.integers(2, 60))


@unhurried
@given(SAMPLE, SAMPLE)
def test_the_probability_is_scipys_welch(before, after):
    want = scipy.stats.ttest_ind_from_stats(*before, *after, equal_var=False, alternative="greater").pvalue

    found = loss_probability(*(np.array([v]) for v in (*before, *after)))[0]

    assert found == pytest.approx(1 - want, abs=1e-6)


def test_the_probability_at_its_ends():
    def of(*sides):
        return loss_probability(*np.array(sides, float).T.reshape(6, -1))

    nan = np.nan
    same, fell, rose = [0.5, 0, 3, 0.5, 0, 3], [0.8, 0, 3, 0.5, 0, 3], [0.5, 0, 3, 0.8, 0, 3]
    np.testing.assert_array_equal(of(same, fell, rose), [0.5, 1, 0])
    one_date, none = [0.8, nan, 1, 0.5, 0.1, 9], [nan, nan, 0, 0.5, 0.1, 9]
    assert np.isnan(of(one_date, none)).all()


@unhurried
@given(st.floats(-0.5, 1), st.floats(-0.5, 1), st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_greater_and_surer_fall_is_never_less_of_a_landslide(pre, post, chance, more, surer):
    index = aldi_index(np.array(pre), np.array(post), np.array(chance))

    assert 0 <= index <= 2
    assert aldi_index(np.array(pre + more), np.array(post), np.array(min(chance + surer, 1))) >= index
    assert aldi_index(np.array(pre), np.array(post + more), np.array(chance)) <= index + 1e-12
    if post >= pre:
        assert index == 0


def rule(*pixel, **parameters):
    block = np.array(pixel, np.float32).reshape(4, 1, 1)
    return build_model("aldi", parameters=parameters).predict_block(block)[0, 0]


def test_the_rule_at_its_limits():
    assert rule(0.8, 0.5, 1.0, 10.0) == pytest.approx(0.5, abs=1e-5)
    assert rule(0.8, 0.45, 1.0, 12.0) > 0.5
    by_chance = 1 / (1 + np.exp((0.15 - 0.35 * 0.55 * 0.5) / 0.03))
    assert rule(0.8, 0.45, 0.5, 40.0) == pytest.approx(by_chance, rel=1e-4)
    assert by_chance < 0.2
    assert rule(0.8, 0.45, 1.0, 2.0) < 0.05, "flat"
    assert rule(0.5, 0.8, 0.0, 40.0) < 0.01, "greener"
    assert np.isnan(rule(0.8, 0.4, np.nan, 40.0)), "too few dates to tell"
    assert np.isnan(rule(0.8, 0.4, np.nan, 40.0, **{"lambda": 0.0}))
    assert rule(0.8, 0.8, 1.0, 40.0, alpha=0.0) < 0.01, "nothing fell"


def test_parameters_are_checked_and_the_card_says_what_it_is_not():
    with pytest.raises(ModelError, match=r"Parameter lambda=-1\.0 of model 'aldi' must be 0 or more"):
        build_model("aldi", parameters={"lambda": -1.0})
    with pytest.raises(ModelError, match=r"Parameter limit_width=0\.0.*width above 0"):
        build_model("aldi", parameters={"limit_width": 0.0})
    card = build_model("aldi").card
    assert card.parameters == ALDI_DEFAULTS
    assert "NOT the paper's exact equation" in card.source
    assert series_variables(card) == ("ndvi_mean", "ndvi_std")
    assert series_variables(build_model("rdndvi").card) == ()
