"""Spectral indices: values worked by hand, their limits, and the same answer for every kind of array."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.pipeline.indices import INDICES, difference, ndvi, relative_difference

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
    assert difference(np.array([0.8]), np.array([0.5])) == pytest.approx(-0.3)


def test_rdndvi_by_hand():
    """Scheip & Wegmann 2021, eq. 1: a canopy of .8 that falls to .5 loses 26 per cent, and a meadow of .4 more."""
    pre, post = np.array([0.8, 0.4, 0.5, 0.3]), np.array([0.5, 0.1, 0.5, 0.6])

    want = [-30 / np.sqrt(1.3), -30 / np.sqrt(0.5), 0, 30 / np.sqrt(0.9)]
    np.testing.assert_allclose(relative_difference(pre, post), want)
    assert want[0] == pytest.approx(-26.3, abs=0.05)


def test_rdndvi_is_undefined_over_water_rock_and_snow():
    pre, post = np.array([-0.2, 0.1, 0.3, nan, 0.3]), np.array([0.1, -0.1, -0.1, 0.2, nan])

    found = relative_difference(pre, post)

    np.testing.assert_array_equal(np.isnan(found), [True, True, False, True, True])
    assert found[2] == pytest.approx(-40 / np.sqrt(0.2))


REFLECTANCES = st.lists(st.floats(0.001, 1.0), min_size=6, max_size=6)


def of_bands(name, values):
    """Compute an index of single pixels; values : of the bands that it reads, any more are left."""
    bands = INDICES[name].bands
    return INDICES[name].compute(*(np.array([v]) for v in values[: len(bands)]))[0]


@pytest.mark.parametrize(
    ("name", "bands", "want"),
    [  # a green leaf, worked by hand: B02 .03, B03 .06, B04 .04, B08 .44, B11 .20, B12 .09
        ("ndvi", ("B08", "B04"), 0.40 / 0.48),
        ("ndwi", ("B03", "B08"), -0.38 / 0.50),
        ("ndmi", ("B08", "B11"), 0.24 / 0.64),
        ("nbr", ("B08", "B12"), 0.35 / 0.53),
        ("bsi", ("B02", "B04", "B08", "B11"), (0.24 - 0.47) / (0.24 + 0.47)),
        ("savi", ("B04", "B08"), 0.6 / 0.98),
        ("tcb", ("B02", "B03", "B04", "B08", "B11", "B12"), 0.429241),
        ("tcg", ("B02", "B03", "B04", "B08", "B11", "B12"), 0.216957),
        ("tcw", ("B02", "B03", "B04", "B08", "B11", "B12"), -0.127772),
    ],
)
def test_each_index_by_hand(name, bands, want):
    leaf = {"B02": 0.03, "B03": 0.06, "B04": 0.04, "B08": 0.44, "B11": 0.20, "B12": 0.09}

    assert INDICES[name].bands == bands
    assert of_bands(name, [leaf[band] for band in bands]) == pytest.approx(want, abs=1e-6)


def test_the_tasselled_cap_turns_and_does_not_stretch():
    """Its three axes are orthogonal and of length one, as far as four digits go: a wrong digit shows."""
    axes = np.array([[of_bands(name, row) for row in np.eye(6)] for name in ("tcb", "tcg", "tcw")])

    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=2e-4)


@pytest.mark.parametrize("name", INDICES)
@settings(max_examples=30)
@given(values=REFLECTANCES, factor=st.floats(0.01, 100))
def test_scaling_the_bands_leaves_a_normalised_difference_and_scales_the_tasselled_cap(name, values, factor):
    before, after = of_bands(name, values), of_bands(name, [factor * v for v in values])

    if name == "savi":  # its soil term is a reflectance
        return
    wanted = before * factor if name.startswith("tc") else before
    assert after == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_savi_of_a_brighter_scale_is_another():
    assert of_bands("savi", [0.4, 4.4]) > of_bands("savi", [0.04, 0.44]) + 0.1


@pytest.mark.parametrize("name", INDICES)
@settings(max_examples=30)
@given(values=st.lists(st.floats(-0.2, 1.5), min_size=6, max_size=6), hole=st.integers(0, 5))
def test_a_hole_in_any_band_is_a_hole_and_ranges_hold(name, values, hole):
    found = of_bands(name, values)
    n = len(INDICES[name].bands)

    assert not np.isinf(found)
    if INDICES[name].within:
        assert np.isnan(found) or INDICES[name].within[0] <= found <= INDICES[name].within[1]
    assert np.isnan(of_bands(name, [nan if i == hole % n else v for i, v in enumerate(values)]))


@pytest.fixture(scope="module")
def real_bands(shared_data):
    """Each third of 118 dates of Sentinel-2, with clouds and shadows, on 20 m: reflectance, NaN = nodata."""
    site, real = shared_data / "worldcereal_series/site_31UDS", {}
    for res in (10, 20):
        file = site / f"S2_L2A_{res}m_00002806639B424A_32631_2017-08-01_2018-11-30.nc"
        with xr.open_dataset(file, mask_and_scale=False) as cube:
            for band in filter(lambda name: str(name).startswith("B"), cube.data_vars):
                plane = cube[band].values[::3, :: 20 // res, :: 20 // res].astype(np.float64)
                real[band] = np.where(np.isin(plane, (0, 65535)), np.nan, plane / 1e4)
    return real


@pytest.mark.parametrize("name", INDICES)
def test_the_formula_that_is_shown_is_what_is_computed_on_real_pixels(name, real_bands):
    """Python itself reads the formula, in float64."""
    index = INDICES[name]
    want = eval(index.formula, {"__builtins__": {}}, real_bands)

    found = index.compute(*(real_bands[band].astype(np.float32) for band in index.bands))

    assert found.dtype == np.float32
    known = np.isfinite(want)
    np.testing.assert_array_equal(np.isnan(found), ~known)
    np.testing.assert_allclose(found[known], want[known], rtol=2e-5, atol=2e-6)
    assert known.sum() > 30_000
    assert np.ptp(want[known]) > 0.3


@settings(max_examples=25)
@given(st.lists(st.tuples(*[st.floats(-0.2, 1.5)] * 4), min_size=1, max_size=20))
def test_numpy_xarray_and_dask_agree(rows):
    red0, nir0, red1, nir1 = np.array(rows).T
    want = relative_difference(ndvi(red0, nir0), ndvi(red1, nir1))

    for kind in (xr.DataArray, lambda a: xr.DataArray(a).chunk(), lambda a: da.from_array(a, chunks=3)):
        args = [kind(a) for a in (red0, nir0, red1, nir1)]
        lazy = relative_difference(ndvi(args[0], args[1]), ndvi(args[2], args[3]))
        assert type(lazy) is type(args[0])
        np.testing.assert_array_equal(np.asarray(lazy), want)
    known = ndvi(red0, nir0)
    assert (np.abs(known[~np.isnan(known)]) <= 1).all()
    assert not np.isinf(want).any()


def test_float32_stays_float32():
    one = np.array([0.1], np.float32)
    assert ndvi(one, one).dtype == np.float32
    assert relative_difference(one, one).dtype == np.float32
