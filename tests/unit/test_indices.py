"""Spectral indices: values worked by hand, their limits, and the same answer for every kind of array."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.pipeline.indices import dndvi, ndvi, rdndvi

nan = np.nan


def test_ndvi_by_hand():
    red = np.array([0.05, 0.1, 0.2, 0.0, 0.3], np.float32)
    nir = np.array([0.45, 0.1, 0.1, 0.4, 0.1], np.float32)

    np.testing.assert_allclose(ndvi(red, nir), [0.8, 0, -1 / 3, 1, -0.5], rtol=1e-6)


def test_ndvi_is_unknown_without_light_and_keeps_to_its_range():
    """Baseline 04.00 has slightly negative reflectances in the dark."""
    red = np.array([0, -0.01, -0.02, nan, 0.1, 0.02])
    nir = np.array([0, 0.01, 0.01, 0.1, nan, -0.01])

    np.testing.assert_array_equal(ndvi(red, nir), [nan, nan, nan, nan, nan, -1])
    assert ndvi(np.array([-0.01]), np.array([0.02])) == 1


def test_integers_do_not_wrap_around():
    """In uint16, 500 - 600 is 65436."""
    red, nir = np.array([600, 40_000], np.uint16), np.array([500, 50_000], np.uint16)

    np.testing.assert_allclose(ndvi(red, nir), [-100 / 1100, 1 / 9], rtol=1e-6)


def test_dndvi_is_negative_for_a_loss():
    assert dndvi(np.array([0.8]), np.array([0.5])) == pytest.approx(-0.3)


def test_rdndvi_by_hand():
    """Scheip & Wegmann 2021, eq. 1: a canopy of .8 that falls to .5 loses 26 per cent, and a meadow of .4 more."""
    pre, post = np.array([0.8, 0.4, 0.5, 0.3]), np.array([0.5, 0.1, 0.5, 0.6])

    want = [-30 / np.sqrt(1.3), -30 / np.sqrt(0.5), 0, 30 / np.sqrt(0.9)]
    np.testing.assert_allclose(rdndvi(pre, post), want)
    assert want[0] == pytest.approx(-26.3, abs=0.05)


def test_rdndvi_is_undefined_over_water_rock_and_snow():
    pre, post = np.array([-0.2, 0.1, 0.3, nan, 0.3]), np.array([0.1, -0.1, -0.1, 0.2, nan])

    found = rdndvi(pre, post)

    np.testing.assert_array_equal(np.isnan(found), [True, True, False, True, True])
    assert found[2] == pytest.approx(-40 / np.sqrt(0.2))


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(-0.2, 1.5)] * 4), min_size=1, max_size=20))
def test_numpy_xarray_and_dask_agree(rows):
    red0, nir0, red1, nir1 = np.array(rows).T
    want = rdndvi(ndvi(red0, nir0), ndvi(red1, nir1))

    for kind in (xr.DataArray, lambda a: xr.DataArray(a).chunk(), lambda a: da.from_array(a, chunks=3)):
        args = [kind(a) for a in (red0, nir0, red1, nir1)]
        lazy = rdndvi(ndvi(args[0], args[1]), ndvi(args[2], args[3]))
        assert type(lazy) is type(args[0])
        np.testing.assert_array_equal(np.asarray(lazy), want)
    known = ndvi(red0, nir0)
    assert (np.abs(known[~np.isnan(known)]) <= 1).all()
    assert not np.isinf(want).any()


def test_float32_stays_float32():
    one = np.array([0.1], np.float32)
    assert ndvi(one, one).dtype == np.float32
    assert rdndvi(one, one).dtype == np.float32
