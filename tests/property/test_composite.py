"""Composites against numpy, brute force, and what may never change them: order, blocks, split items."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from fractions import Fraction

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slidecube.catalog.scenes import Offset, Scene
from slidecube.pipeline.composite import (
    Compositing,
    _harmonise,
    composite,
    observations,
)
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.medians import median_of_positive, sort_columns, sorting_network

EPOCH = np.datetime64("1970-01-01")
unhurried = settings(max_examples=60)
START = dt.datetime(2021, 6, 1, 10, 30, tzinfo=dt.UTC)


def scene(i, *, offset=0.0, datatake=None, when=None):
    when = when or START + dt.timedelta(days=5 * i)
    return Scene(
        id=f"S{i:03d}", role="optical", source="local", datetime=when, identity=f"I{i:03d}",
        datatake=f"D{i:03d}" if datatake is None else datatake, version="", bands={}, item={},
        offset=None if offset is None else Offset(value=offset, applied=False, reason="test"),
    )  # fmt: skip


EVERY = ("greenest", "greenest of 2", "median", "medoid", "geomedian", "nearest-clear")


def how_of(method):
    """A method by its name, "greenest of 2" being a draw."""
    name, _, draw = method.partition(" of ")
    return Compositing(method=name, greenest_of=int(draw or 0))


def run(bands, clear, scenes, method, chunks=-1):
    lazy = {name: da.from_array(values, chunks=(-1, chunks, chunks)) for name, values in bands.items()}
    made = composite(
        lazy, da.from_array(clear, chunks=(-1, chunks, chunks)), scenes=scenes, how=how_of(method)
    )
    return {name: array.compute(scheduler="synchronous") for name, array in made.items()}


def stored(bands, clear, scenes):
    """(band, t, y, x) on the stored scale in float64, NaN where not to be used."""
    valid = clear & np.all([values != 0 for values in bands.values()], axis=0)
    out = []
    for values in bands.values():
        shifts = np.array([1000 + round(10_000 * s.offset.value) for s in scenes])[:, None, None]
        out.append(np.where(valid, np.clip(values.astype(float) + shifts, 1, 65535), np.nan))
    return np.array(out)


# --- one band: the median ----------------------------------------------------------------------------------------


@unhurried
@given(
    hnp.arrays(np.uint16, st.tuples(st.integers(1, 9), st.just(3), st.just(4)), elements=st.integers(0, 12))
    | hnp.arrays(np.uint16, st.tuples(st.integers(1, 9), st.just(3), st.just(4)))
)
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_median_equals_nanmedian_rounded_to_even(values):
    masked = np.where(values == 0, np.nan, values.astype(float))
    want = np.nan_to_num(np.rint(np.nanmedian(masked, axis=0)), nan=0)

    np.testing.assert_array_equal(median_of_positive(values), want)


def test_median_of_two_halves_goes_to_even_and_all_nodata_is_nodata():
    one, two = np.array([[3, 4, 0, 0, 65535]], np.uint16), np.array([[4, 5, 0, 7, 65534]], np.uint16)

    got = median_of_positive(np.stack([one, two]))

    assert got.tolist() == [[4, 4, 0, 7, 65534]]


# --- whole composites --------------------------------------------------------------------------------------------


@st.composite
def stacks(draw, *, max_side=5):
    """Raw numbers of three bands, a clear mask, and scenes with several offsets, a date each."""
    t, y, x = draw(st.integers(1, 6)), draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    top = draw(st.sampled_from([3, 1500, 65535]))  # few values make ties
    numbers = hnp.arrays(np.uint16, (t, y, x), elements=st.integers(0, top))
    bands = {name: draw(numbers) for name in ("B02", "B04", "B08")}
    clear = draw(hnp.arrays(np.bool_, (t, y, x), elements=st.sampled_from([True, True, True, False])))
    scenes = [scene(i, offset=draw(st.sampled_from([0.0, -0.1, -0.05]))) for i in range(t)]
    return bands, clear, scenes


@unhurried
@given(stacks())
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_median_composite_equals_numpy(stack):
    bands, clear, scenes = stack
    got = run(bands, clear, scenes, "median")

    cube = stored(bands, clear, scenes)
    for values, name in zip(cube, bands, strict=True):
        np.testing.assert_array_equal(
            got[name], np.nan_to_num(np.rint(np.nanmedian(values, axis=0)), nan=0), err_msg=name
        )
    assert not got["date"].any()
    assert_dates(got, cube, scenes)


@unhurried
@given(stacks())
def test_greenest_composite_equals_brute_force(stack):
    """Pixel by pixel, with exact fractions, so that no rounding decides a tie."""
    bands, clear, scenes = stack
    got = run(bands, clear, scenes, "greenest")

    cube = stored(bands, clear, scenes)
    for y, x in np.ndindex(clear.shape[1:]):
        best, at = None, None
        for t in range(len(scenes)):
            _, red, nir = cube[:, t, y, x]
            if np.isnan(red):
                continue
            green = exact_ndvi(int(red) - 1000, int(nir) - 1000)
            if best is None or green > best:
                best, at = green, t
        want = [0, 0, 0, 0] if at is None else [*cube[:, at, y, x].astype(int), day(scenes[at])]
        assert [got[n][y, x] for n in (*bands, "date")] == want
    assert_dates(got, cube, scenes)


def exact_ndvi(red, nir):
    return (
        Fraction(-2)
        if nir + red <= 0
        else max(Fraction(-1), min(Fraction(1), Fraction(nir - red, nir + red)))
    )


def day(one):
    return int((np.datetime64(one.datetime.date()) - EPOCH).astype(int))


def assert_dates(got, cube, scenes):
    seen = ~np.isnan(cube[0])
    days = np.array([day(s) for s in scenes])[:, None, None]
    np.testing.assert_array_equal(got["clear_count"], seen.sum(axis=0))
    first = np.where(seen, days, 65535).min(axis=0)
    np.testing.assert_array_equal(got["date_first"], np.where(first == 65535, 0, first))
    np.testing.assert_array_equal(got["date_last"], np.where(seen, days, 0).max(axis=0))


@unhurried
@given(stacks(), st.sampled_from(EVERY), st.randoms(use_true_random=False))
def test_the_order_of_scenes_changes_nothing(stack, method, random):
    bands, clear, scenes = stack
    order = list(range(len(scenes)))
    random.shuffle(order)

    want = run(bands, clear, scenes, method)
    got = run({n: v[order] for n, v in bands.items()}, clear[order], [scenes[i] for i in order], method)

    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


@unhurried
@given(stacks(), st.sampled_from(EVERY), st.data())
def test_two_items_of_one_overpass_count_once(stack, method, data):
    """A scene cut into two overlapping items, listed in any order, gives the composite of the whole scene."""
    bands, clear, scenes = stack
    cut = data.draw(st.integers(0, len(scenes) - 1))
    side = clear.shape[2]
    left, right = sorted(data.draw(st.tuples(st.integers(0, side), st.integers(0, side))))
    # the western item ends at `right`, the eastern one starts at `left`: they share left..right
    west, east = np.arange(side) < right, np.arange(side) >= left
    split = {n: np.concatenate([v * 1, v[cut : cut + 1]]) for n, v in bands.items()}
    for values in split.values():
        values[cut] *= west
        values[-1] *= east
    twin = replace(
        scenes[cut], id="twin", identity="twin", datetime=scenes[cut].datetime + dt.timedelta(seconds=14)
    )

    want = run(bands, clear, scenes, method)
    got = run(split, np.concatenate([clear, clear[cut : cut + 1]]), [*scenes, twin], method)

    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


def test_the_first_clear_item_of_an_overpass_counts():
    """Where two items of one overpass differ, the earlier one is taken, unless it is cloudy there."""
    scenes = [
        scene(0, datatake="D"),
        scene(1, datatake="D", when=START + dt.timedelta(seconds=14)),
        scene(2),
    ]
    numbers = np.array([10, 20, 40], np.uint16)[:, None, None] * np.ones((1, 1, 3), np.uint16)
    clear = np.array([[[1, 0, 0]], [[1, 1, 0]], [[1, 1, 1]]], bool)

    got = run({"B02": numbers}, clear, scenes, "median")

    assert got["B02"].tolist() == [[1025, 1030, 1040]]
    assert got["clear_count"].tolist() == [[2, 2, 1]]


def test_an_overpass_may_cross_midnight():
    """Kamchatka and the Solomons: the two items of one overpass lie on two days of UTC."""
    late = dt.datetime(2021, 6, 1, 23, 59, 55, tzinfo=dt.UTC)
    scenes = [scene(0, datatake="D", when=late), scene(1, datatake="D", when=late + dt.timedelta(seconds=14))]

    assert observations(scenes) == [[0, 1]]
    got = run({"B02": np.full((2, 1, 1), 7, np.uint16)}, np.ones((2, 1, 1), bool), scenes, "median")
    assert got["clear_count"].item() == 1
    assert got["date_first"].item() == got["date_last"].item() == day(scenes[0])


def test_offsets_of_two_baselines_meet_on_one_scale():
    """The same reflectance, delivered with and without the 1000 of baseline 04.00, is one stored number."""
    bands = {"B04": np.array([500, 1500], np.uint16).reshape(2, 1, 1)}
    scenes = [scene(0, offset=0.0), scene(1, offset=-0.1)]

    got = run(bands, np.ones((2, 1, 1), bool), scenes, "median")

    assert got["B04"].item() == 1500


def test_a_raw_number_below_the_offset_stays_data():
    """DN 1..1000 of baseline 04.00 is zero or negative reflectance, which must not become nodata."""
    bands = {"B04": np.array([[[1, 999, 1000]]], np.uint16)}

    got = run(bands, np.ones((1, 1, 3), bool), [scene(0, offset=-0.2)], "median")

    assert got["B04"].tolist() == [[1, 1, 1]]
    assert got["clear_count"].tolist() == [[1, 1, 1]]


def test_greenest_tells_close_fractions_apart():
    """Two NDVI that are one number in float32: the later, greener date must win."""
    reds, nirs = np.array([7001, 6994]), np.array([20003, 19983])
    greenness = (nirs - reds) / (nirs + reds)
    assert greenness[1] > greenness[0]
    assert len(set(greenness.astype(np.float32))) == 1
    bands = {"B04": reds, "B08": nirs}
    bands = {name: values.astype(np.uint16).reshape(2, 1, 1) for name, values in bands.items()}

    got = run(bands, np.ones((2, 1, 1), bool), [scene(0), scene(1)], "greenest")

    assert got["date"].item() == day(scene(1))


def test_what_cannot_be_composed_is_refused():
    one = da.ones((1, 2, 2), dtype=np.uint16)
    clear = da.ones((1, 2, 2), dtype=bool)
    with pytest.raises(PipelineError, match="'greenest' needs bands B04 and B08; got B02"):
        composite({"B02": one}, clear, scenes=[scene(0)], how=Compositing(method="greenest"))
    with pytest.raises(PipelineError, match="'S000' has no offset decision"):
        composite({"B02": one}, clear, scenes=[scene(0, offset=None)], how=Compositing(method="median"))


@pytest.mark.parametrize("n", [*range(1, 15), 24, 61, 128, 200])
def test_the_sorting_network_sorts_columns(n):
    """All columns of zeros and ones for few rows, which proves it for all numbers; random ones for many."""
    if n < 15:
        columns = (np.arange(2**n) >> np.arange(n)[:, None] & 1).astype(np.uint16)
    else:
        columns = np.random.default_rng(n).integers(0, 2 * n, (n, 500)).astype(np.uint16)
    expected = np.sort(columns, axis=0)
    sort_columns(columns)

    assert np.array_equal(columns, expected)
    assert all(a.stop - a.start == b.stop - b.start and a.stop <= b.start for a, b in sorting_network(n))


def test_a_median_of_many_strips_is_numpys():
    rng = np.random.default_rng(5)
    values = rng.integers(0, 65536, (9, 150, 331)).astype(np.uint16)
    values[rng.random(values.shape) < 0.5] = 0
    values[:, 3, 4] = 0
    known = np.where(values == 0, np.nan, values.astype(np.float64))
    known[:, (values == 0).all(axis=0)] = 0

    assert np.array_equal(median_of_positive(values), np.rint(np.nanmedian(known, axis=0)))
    assert np.array_equal(median_of_positive(values[:, ::2, ::-1]), median_of_positive(values)[::2, ::-1])


@pytest.mark.parametrize("shift", [0, 1, 1000, -1, -1000, -50_000, 64_535, 65_535, 90_000, -65_535, -90_000])
def test_numbers_are_shifted_as_whole_numbers_and_kept_from_nodata(shift):
    dn = np.array([[[0, 1, 2, 999, 1000, 1001, 40_000, 64_535, 65_534, 65_535]]], np.uint16)
    valid = dn > 0

    got = np.empty(dn.shape, np.uint16)
    _harmonise(dn, valid, np.array([shift], np.int32), out=got)

    assert np.array_equal(got, np.where(valid, np.clip(dn.astype(np.int64) + shift, 1, 65535), 0))
