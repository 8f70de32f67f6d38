"""Radar composites against xarray on real series, and what may never change them: order, blocks, split items, gaps."""

from __future__ import annotations

import datetime as dt

import dask.array as da
import numpy as np
import pytest
import rasterio
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slidecube.catalog.scenes import Scene
from slidecube.pipeline.radar import (
    SpeckleFilter,
    backscatter_db,
    cross_ratio_db,
    db_change,
    decibels,
    linear_power,
    quegan_yu,
    radar_composite,
    stored_of_power,
)

unhurried = settings(max_examples=12)
START = dt.datetime(2018, 5, 1, 5, 30, tzinfo=dt.UTC)
SERIES = "worldcereal_series/site_31UDS/S1_GRD-ASCENDING_20m_00002806639B424A_32631_2017-08-01_2018-11-30.nc"
powers = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 8), st.just(4), st.just(6)),
    elements=st.sampled_from([0.0, np.nan, -1.0, np.inf]) | st.floats(2**-20, 2**6, width=32),
)


def scene(i, *, when=None, datatake=None):
    return Scene(
        id=f"S{i:03d}", role="radar", source="local", datetime=when or START + dt.timedelta(days=6 * i),
        identity=f"I{i:03d}", datatake=f"D{i:03d}" if datatake is None else datatake, version="", offset=None,
        bands={}, item={},
    )  # fmt: skip


def run(bands, *, scenes=None, usable=None, chunks=-1, window_px=0):
    shape = next(iter(bands.values())).shape
    usable = np.ones(shape, bool) if usable is None else usable
    lazy = {name: da.from_array(values, chunks=(-1, chunks, chunks)) for name, values in bands.items()}
    made = radar_composite(
        lazy,
        da.from_array(usable, chunks=(-1, chunks, chunks)),
        scenes=scenes or [scene(i) for i in range(shape[0])],
        speckle=SpeckleFilter(window_px=window_px),
    )
    return {name: array.compute(scheduler="synchronous") for name, array in made.items()}


@pytest.fixture(scope="module")
def series(shared_data):
    """159 real dates of VV and VH in decibels, NaN = nodata."""
    with xr.open_dataset(shared_data / SERIES) as source:
        return source[["VV", "VH"]].load()


# --- real chips against xarray -----------------------------------------------------------------------------------


def test_medians_of_a_real_series_are_xarrays(series):
    dates = [dt.datetime.fromisoformat(str(t)[:19]).replace(tzinfo=dt.UTC) for t in series.timestamp.values]
    scenes = [scene(i, when=when) for i, when in enumerate(dates)]
    bands = {name: linear_power(series[name].values) for name in ("VV", "VH")}

    made = run(bands, scenes=scenes, chunks=16)

    for name, power in bands.items():
        want = series[name].median("timestamp").values
        np.testing.assert_allclose(backscatter_db(xr.DataArray(made[name])), want, atol=0.0101)
        steps = xr.DataArray(stored_of_power(power)).astype(float)
        median = steps.where(steps > 0).median("dim_0")
        np.testing.assert_array_equal(made[name], np.rint(median.values))
    assert (made["count"] == 159).all()
    assert (made["date_first"] == (dates[0].date() - dt.date(1970, 1, 1)).days).all()
    assert (made["date_last"] == (dates[-1].date() - dt.date(1970, 1, 1)).days).all()


def test_nothing_changed_in_flanders_and_the_filter_changes_no_mean(series):
    """Two halves of one summer: the change is near zero, and filtered dates are smoother with the same mean."""
    power = np.power(10, series["VV"].values[60:100] / 10)
    before, after = (run({"VV": part})["VV"] for part in (power[:20], power[20:]))
    change = db_change(backscatter_db(xr.DataArray(before)), backscatter_db(xr.DataArray(after)))
    filtered = quegan_yu(power.astype(np.float32), SpeckleFilter(window_px=7))

    assert abs(float(np.median(change))) < 2.5
    assert filtered.mean() == pytest.approx(power.mean(), rel=0.05)
    noise = [float((p.std(axis=(1, 2)) / p.mean(axis=(1, 2))).mean()) for p in (power, filtered)]
    assert noise[1] < noise[0]


def test_a_real_chip_keeps_its_decibels(shared_data):
    path = shared_data / "s1_camargue/S1A__IW___A_20150309T173017_VV_grd_mli_geo_norm_db.tif"
    with rasterio.open(path) as source:
        db = source.read(1, masked=True).filled(np.nan)

    stored = stored_of_power(linear_power(db))

    np.testing.assert_allclose(backscatter_db(xr.DataArray(stored)), db, atol=0.0051)


# --- scales ------------------------------------------------------------------------------------------------------


@unhurried
@given(powers)
def test_what_is_no_power_is_nodata_on_every_scale(power):
    bad = ~(np.isfinite(power) & (power > 0))
    stored = stored_of_power(power)

    np.testing.assert_array_equal(np.isnan(decibels(power)), bad)
    np.testing.assert_array_equal(stored == 0, bad)
    back = linear_power(backscatter_db(xr.DataArray(stored)).values)
    np.testing.assert_allclose(back[~bad], power[~bad], rtol=0.0012)  # half of a hundredth of a decibel


def test_decibels_of_known_powers():
    np.testing.assert_allclose(decibels(np.array([1.0, 10.0, 0.01, 0.5])), [0, 10, -20, -3.0103], atol=1e-4)
    ratio = cross_ratio_db(xr.DataArray([-18.0]), xr.DataArray([-11.0]))
    assert float(ratio[0]) == -7.0


# --- what must not matter ----------------------------------------------------------------------------------------


@unhurried
@given(powers, st.randoms(use_true_random=False), st.sampled_from([0, 3]))
def test_the_order_of_dates_changes_nothing(power, random, window_px):
    order = list(range(len(power)))
    random.shuffle(order)
    scenes = [scene(i) for i in range(len(power))]

    one = run({"VV": power, "VH": power[::-1].copy()}, scenes=scenes, window_px=window_px)
    two = run(
        {"VV": power[order], "VH": power[::-1][order]},
        scenes=[scenes[i] for i in order],
        window_px=window_px,
    )

    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@unhurried
@given(powers)
def test_chunks_change_nothing(power):
    one, two = (run({"VV": power, "VH": power * 2}, chunks=chunks) for chunks in (-1, 2))

    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@unhurried
@given(powers)
def test_an_overpass_cut_into_two_items_counts_once(power):
    cut = np.concatenate([power, power])
    left, right = cut[: len(power)], cut[len(power) :]
    left[:, :, 4:], right[:, :, :2] = np.nan, 0
    scenes = [scene(i) for i in range(len(power))]
    halves = [scene(i + 100, when=s.datetime, datatake=s.datatake) for i, s in enumerate(scenes)]

    one = run({"VV": power}, scenes=scenes)
    two = run({"VV": cut}, scenes=[*scenes, *halves])

    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@unhurried
@given(powers)
def test_a_band_that_lacks_a_pixel_takes_the_observation_with_it(power):
    whole = np.full(power.shape, 0.1, np.float32)

    made = run({"VV": whole, "VH": power})

    known = np.isfinite(power) & (power > 0)
    np.testing.assert_array_equal(made["count"], known.sum(axis=0))
    np.testing.assert_array_equal(made["VV"] == 0, ~known.any(axis=0))


def test_all_zeros_nan_stripes_and_layover_are_not_observed():
    power = np.full((3, 8, 8), 0.2, np.float32)
    power[:, 2] = 0  # filled by the processor
    power[:, :, 5] = np.nan  # a stripe
    usable = np.ones(power.shape, bool)
    usable[:, 7, 7] = False

    made = run({"VV": power, "VH": power}, usable=usable)

    lost = np.zeros((8, 8), bool)
    lost[2], lost[:, 5], lost[7, 7] = True, True, True
    for name in ("VV", "VH", "count", "date_first", "date_last"):
        np.testing.assert_array_equal(made[name] == 0, lost, err_msg=name)


# --- the speckle filter ------------------------------------------------------------------------------------------


def test_the_filter_is_its_formula():
    rng = np.random.default_rng(0)
    power = rng.gamma(4.4, 0.1, (5, 9, 9)).astype(np.float32)

    found = quegan_yu(power, SpeckleFilter(window_px=3))

    windows = np.lib.stride_tricks.sliding_window_view(power.astype(float), (3, 3), (1, 2)).mean((3, 4))
    want = windows * (power[:, 1:-1, 1:-1] / windows).mean(axis=0)
    np.testing.assert_allclose(found[:, 1:-1, 1:-1], want, rtol=1e-5)


def test_the_filter_cuts_its_window_at_nodata_and_keeps_gaps():
    power = np.full((4, 9, 9), 0.3, np.float32)
    power[1, 3:6] = np.nan

    found = quegan_yu(power, SpeckleFilter(window_px=5))

    np.testing.assert_array_equal(np.isnan(found), np.isnan(power))
    np.testing.assert_allclose(found[~np.isnan(found)], 0.3, rtol=1e-5)


def test_the_filter_gains_looks():
    """Over a plain of one backscatter, the equivalent number of looks rises many times; the mean stays."""
    rng = np.random.default_rng(1)
    looks = 4.4
    power = rng.gamma(looks, 0.1 / looks, (20, 80, 80)).astype(np.float32)

    found = quegan_yu(power, SpeckleFilter(window_px=7))[:, 8:-8, 8:-8]

    gained = found.mean() ** 2 / found.var(axis=(1, 2)).mean()
    assert gained > 6 * looks
    assert found.mean() == pytest.approx(0.1, rel=0.02)
