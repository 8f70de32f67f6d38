"""Moments against exact fractions, and what may never change them: chunks, tiles, order."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slidecube.pipeline import moments as module
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.moments import Moments, block_moments, merge, moments

unhurried = settings(max_examples=60)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
stored = shapes.flatmap(lambda shape: hnp.arrays(np.uint16, shape, elements=st.integers(0, 65535)))


def dataset(values_byx, chunks=None):
    cube = xr.Dataset({f"b{i}": (("y", "x"), v) for i, v in enumerate(values_byx)})
    return cube if chunks is None else cube.chunk(y=chunks[0], x=chunks[1])


def exact_sums(columns):
    """Sums of the products of (column, 1) with itself, as fractions."""
    rows = [[*map(Fraction, column), Fraction(1)] for column in columns]
    g = len(rows[0]) if rows else 0
    return [[sum(r[i] * r[j] for r in rows) for j in range(g)] for i in range(g)]


def brute(values_byx, valid_yx):
    """Signal and noise sums of a whole image, pixel by pixel."""
    _, height, width = values_byx.shape
    value = lambda y, x: [v.item() for v in values_byx[:, y, x]]  # noqa: E731
    pixels = [value(y, x) for y in range(height) for x in range(width) if valid_yx[y, x]]
    pairs = [
        [Fraction(a) - Fraction(b) for a, b in zip(value(y, x), value(y + 1, x + 1), strict=True)]
        for y in range(height - 1)
        for x in range(width - 1)
        if valid_yx[y, x] and valid_yx[y + 1, x + 1]
    ]
    return exact_sums(pixels), exact_sums(pairs)


def said(sums):
    return [
        [Fraction(float(high)) + Fraction(float(low)) for high, low in zip(*rows, strict=True)]
        for rows in zip(*sums, strict=True)
    ]


def assert_exactly(found, expected):
    for sums, wanted in zip((found.signal, found.noise), expected, strict=True):
        if wanted:
            assert said(sums) == wanted
        else:
            assert not sums.any()


def split(values_byx, y, x, valid_yx=None):
    """Blocks of (y, x) pixels with their context, as a tile program cuts them."""
    padded = np.pad(values_byx, ((0, 0), (0, 1), (0, 1)))
    known = np.ones(values_byx.shape[1:], bool) if valid_yx is None else valid_yx
    known = np.pad(known, (0, 1))
    for y0 in range(0, values_byx.shape[1], y):
        for x0 in range(0, values_byx.shape[2], x):
            at = np.s_[y0 : min(y0 + y, values_byx.shape[1]) + 1, x0 : min(x0 + x, values_byx.shape[2]) + 1]
            yield block_moments(padded[:, *at], valid_yx=known[at])


# --- what they are ------------------------------------------------------------------------------------------------


@unhurried
@given(stored)
def test_sums_are_those_of_fractions(values_byx):
    known = (values_byx != 0).all(axis=0)

    assert_exactly(moments(dataset(values_byx), nodata=0), brute(values_byx, known))
    assert_exactly(moments(dataset(values_byx)), brute(values_byx, np.ones_like(known)))


@unhurried
@given(stored, st.integers(1, 9), st.integers(1, 9), st.integers(2, 5))
def test_chunks_and_tiles_change_no_bit(values_byx, y, x, split_every):
    whole = moments(dataset(values_byx), nodata=0)
    known = (values_byx != 0).all(axis=0)

    assert moments(dataset(values_byx, (y, x)), nodata=0, split_every=split_every) == whole
    tiles = list(split(values_byx, y, x, known))
    assert merge(tiles) == whole
    assert merge(tiles[::-1]) == whole
    assert merge([merge(tiles[0::2]), *tiles[1::2]]).to_json() == whole.to_json()


@unhurried
@given(stored)
def test_nan_nodata_and_mask_say_the_same(values_byx):
    known = (values_byx != 0).all(axis=0)
    holes = np.where(values_byx == 0, np.nan, values_byx).astype(np.float32)
    padded, valid = np.pad(values_byx, ((0, 0), (0, 1), (0, 1))), np.pad(known, (0, 1))
    whole = moments(dataset(values_byx), nodata=0)

    assert moments(dataset(holes)) == whole
    assert moments(dataset(holes, (3, 2))) == whole
    assert block_moments(padded, valid_yx=valid) == whole
    infinite = np.where(np.isnan(holes), np.inf, holes)
    assert block_moments(np.pad(infinite, ((0, 0), (0, 1), (0, 1)), constant_values=-np.inf)) == whole


def test_a_block_larger_than_its_strips_is_exact():
    rng = np.random.default_rng(1)
    values = rng.integers(-65535, 65536, (3, 70, 5000), np.int32)  # two strips of columns, many of rows
    padded = np.pad(values, ((0, 0), (0, 1), (0, 1)))
    valid = np.zeros(padded.shape[1:], bool)
    valid[:-1, :-1] = rng.random(values.shape[1:]) < 0.9
    flat = [[int(v) for v in column] for column in values[:, valid[:-1, :-1]].T]
    signal = [[sum(a[i] * a[j] for a in flat) for j in range(3)] for i in range(3)]
    found = block_moments(padded, valid_yx=valid)

    assert [row[:3] for row in said(found.signal)[:3]] == signal
    assert found.pixels == len(flat)
    assert found == merge(split(values, 9, 777, valid[:-1, :-1]))


def test_a_large_mean_costs_no_digit():
    rng = np.random.default_rng(2)
    small = rng.normal(size=(2, 64, 64))
    large = small + 2.0**30  # squares of 2**60 leave float64 nothing of variances of 1
    shifted = large - 2.0**30  # what is left of the small numbers after rounding, exactly
    found, expected = moments(dataset(large)), moments(dataset(shifted))

    np.testing.assert_allclose(found.covariance, np.cov(shifted.reshape(2, -1)), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-12)
    np.testing.assert_allclose(found.noise_covariance, expected.noise_covariance, rtol=1e-12)


def test_covariance_is_numpys():
    rng = np.random.default_rng(3)
    values = rng.normal(0.2, 0.05, (4, 50, 60)).astype(np.float32)
    found = moments(dataset(values, (17, 23)))
    deltas = (values[:, :-1, :-1].astype(float) - values[:, 1:, 1:]).reshape(4, -1)

    np.testing.assert_allclose(found.mean, values.astype(float).mean(axis=(1, 2)), rtol=1e-13)
    np.testing.assert_allclose(
        found.covariance, np.cov(values.astype(float).reshape(4, -1)), rtol=1e-11, atol=1e-16
    )
    np.testing.assert_allclose(found.noise_covariance, np.cov(deltas) / 2, rtol=1e-11, atol=1e-16)
    assert (found.pixels, found.pairs) == (3000, 49 * 59)


# --- merging --------------------------------------------------------------------------------------------------------


def many_tiles(whole):
    """100,000 tiles' sums of a 16th of a megapixel each, far cheaper to write down than to sum."""
    rng = np.random.default_rng(4)
    for _ in range(100_000):
        sums = rng.integers(-(2**45), 2**52, (2, 3, 3)).astype(np.float64)
        if not whole:
            sums = sums * rng.normal(size=sums.shape) / 3
        sums = sums + sums.transpose(0, 2, 1)
        sums[:, 2, 2] = 4_000_000 if whole else sums[:, 2, 2]
        yield Moments(
            signal=np.stack([sums[0], np.zeros((3, 3))]), noise=np.stack([sums[1], np.zeros((3, 3))])
        )


@pytest.mark.parametrize("whole", [True, False])
def test_100_000_tiles_merge_as_in_extended_precision(whole):
    parts = list(many_tiles(whole))
    found = merge(parts)
    scale = 2**200  # each of these numbers is a whole multiple of 2**-200
    for name in ("signal", "noise"):
        sums = said(getattr(found, name))
        for i, j in zip(*np.triu_indices(3), strict=True):
            terms = [int(math.ldexp(getattr(part, name)[0, i, j], 200)) for part in parts]
            exact, size = Fraction(sum(terms), scale), Fraction(sum(map(abs, terms)), scale)
            error = abs(sums[i][j] - exact)
            assert size > 0
            if whole:
                assert error == 0
            else:
                assert error <= Fraction(4, 10**32) * len(parts) * size  # what `merge` promises
                assert error <= Fraction(1, 10**29) * size  # and what comes


def test_a_country_of_1e12_pixels_is_exact():
    block = np.full((2, 2, 2), 0.0)
    n, value = 2**40, 65535
    block[0] = [[n * value**2, n * value], [n * value, n]]
    big = Moments(signal=block, noise=block)
    one = block_moments(np.array([[[3, 0], [0, 0]]]), valid_yx=np.array([[True, False], [False, False]]))

    found = said(big.merged(one).signal)

    assert found == [[n * value**2 + 9, n * value + 3], [n * value + 3, n + 1]]


# --- as files and values ----------------------------------------------------------------------------------------------


@unhurried
@given(hnp.arrays(np.float64, (2, 4, 5), elements=st.floats(-1e6, 1e6)))
def test_json_and_pickle_lose_nothing(values_byx):
    found = moments(dataset(values_byx, (2, 3)))

    assert Moments.from_json(found.to_json()) == found
    assert Moments.from_json(found.to_json()).to_json() == found.to_json()
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert hash(again) == hash(found)
    with pytest.raises(ValueError, match="read-only"):
        found.signal[0, 0, 0] = 1


def test_nothing_known_counts_nothing():
    nothing = moments(dataset(np.full((2, 3, 4), np.nan), (2, 2)))

    assert nothing == Moments.none(2)
    with pytest.raises(PipelineError, match="0 pixels are too few"):
        _ = nothing.mean


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: merge([]), "no moments to merge"),
        (lambda: merge([Moments.none(2), Moments.none(3)]), "of 2 and of 3 bands"),
        (lambda: block_moments(np.zeros((3, 3))), r"shape \(3, 3\); \(band, y \+ 1, x \+ 1\)"),
        (lambda: block_moments(np.zeros((1, 3, 3)), valid_yx=np.ones((2, 2), bool)), r"\(2, 2\).*\(3, 3\)"),
        (lambda: moments(xr.Dataset()), "has bands {}"),
        (lambda: moments(xr.Dataset({"a": ("y", [1.0])})), r"\('y',\)"),
        (lambda: moments(dataset(np.ones((1, 3, 3))), split_every=1), "split_every=1"),
        (
            lambda: Moments(signal=np.zeros((2, 3, 2)), noise=np.zeros((2, 3, 3))),
            r"signal has shape \(2, 3, 2\)",
        ),
        (lambda: Moments(signal=np.zeros((2, 3, 3)), noise=np.zeros((2, 4, 4))), "2 bands of signal and 3"),
    ],
)
def test_refusals_are_one_line(act, message):
    with pytest.raises(PipelineError, match=message) as told:
        act()
    assert "\n" not in str(told.value)


# --- lazily -----------------------------------------------------------------------------------------------------------


def test_each_chunk_is_read_once_and_only_rims_travel():
    reads, sizes = [], []
    values = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60)

    def read(block_info=None):
        (y0, y1), (x0, x1) = block_info[None]["array-location"]
        reads.append((y0, x0))
        return values[y0:y1, x0:x1]

    lazy = dask.array.map_blocks(
        read, chunks=((10,) * 4, (20,) * 3), dtype=np.uint16, meta=np.empty((0, 0), "u2")
    )
    seamed = module._with_seams

    def watched(*parts):
        sizes.extend(len(pickle.dumps(part)) for part in parts if part is not None)
        return seamed(*parts)

    module._with_seams = watched
    try:
        found = moments(xr.Dataset({"a": (("y", "x"), lazy)}))
    finally:
        module._with_seams = seamed
    assert found == moments(dataset(values[None]))
    assert sorted(reads) == [(y, x) for y in range(0, 40, 10) for x in range(0, 60, 20)]
    assert max(sizes) < 4000
