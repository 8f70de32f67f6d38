"""What may never change a noise fraction transform, or changes it as it must: units, order, chunks, masks."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import scipy.ndimage
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.mnf import Mnf, component_names, fit_mnf
from slidecube.pipeline.moments import Moments, merge, moments

BANDS = ("B02", "B03", "B04", "B08", "B11")
unhurried = settings(max_examples=30)


def scene(seed=0, shape=(90, 70)):
    """Five bands of stored reflectance out of three smooth maps and noise."""
    rng = np.random.default_rng(seed)
    maps = np.stack([scipy.ndimage.gaussian_filter(rng.normal(size=shape), sigma) for sigma in (2, 5, 9)])
    maps /= maps.std(axis=(1, 2), keepdims=True)
    values = 3000 + np.einsum("bm,myx->byx", rng.normal(0, 300, (len(BANDS), 3)), maps)
    values += rng.normal(size=(len(BANDS), *shape)) * np.linspace(20, 60, len(BANDS))[:, None, None]
    return values.round().clip(1, 65535).astype(np.uint16)


def dataset(values_byx, names=BANDS):
    return xr.Dataset({n: (("y", "x"), v) for n, v in zip(names, values_byx, strict=True)})


@pytest.fixture(scope="module")
def cube():
    return dataset(scene())


@pytest.fixture(scope="module")
def mnf(cube):
    return fit_mnf(moments(cube), bands=BANDS)


# --- the fit ----------------------------------------------------------------------------------------------------------


def test_components_are_what_the_name_says(cube, mnf):
    """Noise of variance 1 and uncorrelated, signal uncorrelated with the eigenvalues for variances, mean zero."""
    parts = moments(mnf.transform(cube, components=5).astype(np.float64))

    np.testing.assert_allclose(parts.mean, 0, atol=1e-5)
    np.testing.assert_allclose(parts.noise_covariance, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(parts.covariance, np.diag(mnf.eigenvalues), rtol=1e-5, atol=1e-4)
    assert list(mnf.eigenvalues) == sorted(mnf.eigenvalues, reverse=True)
    assert sum(mnf.shares) == pytest.approx(1)


def test_weights_invert_each_other(mnf):
    np.testing.assert_allclose(np.array(mnf.weights) @ np.array(mnf.inverse_weights), np.eye(5), atol=1e-12)


@unhurried
@given(
    st.lists(st.floats(1e-4, 1e4), min_size=5, max_size=5),
    st.lists(st.floats(-1e4, 1e4), min_size=5, max_size=5),
)
def test_units_of_the_bands_do_not_matter(scale, offset):
    values = scene(1, (40, 30)).astype(np.float64)
    first = fit_mnf(moments(dataset(values)), bands=BANDS)
    other = values * np.array(scale)[:, None, None] + np.array(offset)[:, None, None]
    second = fit_mnf(moments(dataset(other)), bands=BANDS)

    np.testing.assert_allclose(second.eigenvalues, first.eigenvalues, rtol=1e-7)
    np.testing.assert_allclose(np.array(second.weights) * scale, first.weights, rtol=1e-5, atol=1e-7)


@given(st.permutations(range(5)))
@unhurried
def test_permuted_bands_permute_the_weights(order):
    values, order = scene(2, (40, 30)), list(order)
    first = fit_mnf(moments(dataset(values)), bands=BANDS)
    names = [BANDS[i] for i in order]
    second = fit_mnf(moments(dataset(values[order], names)), bands=names)

    np.testing.assert_allclose(second.eigenvalues, first.eigenvalues, rtol=1e-12)
    np.testing.assert_allclose(second.weights, np.array(first.weights)[:, order], rtol=1e-8, atol=1e-12)


def test_the_sign_is_the_rule_s_and_stays_for_like_data(cube, mnf):
    centred = np.stack([cube[b].values.ravel() for b in BANDS])
    for k, part in enumerate(mnf.transform(cube, components=5).values()):
        correlation = [np.corrcoef(band, part.values.ravel())[0, 1] for band in centred]
        assert correlation[np.argmax(np.abs(correlation))] > 0, k
    # of any nine tenths of the rows the first three components are the same, with the same sign
    for start in range(0, 90, 9):
        rows = np.r_[0:start, start + 9 : 90]
        again = fit_mnf(moments(cube.isel(y=rows)), bands=BANDS)
        for a, b in zip(again.weights[:3], mnf.weights[:3], strict=True):
            assert np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.95


def test_a_mask_is_as_if_the_pixels_were_not_there(cube, mnf):
    values = scene()
    values[:, 60:, :] = 0
    masked = fit_mnf(moments(dataset(values), nodata=0), bands=BANDS)

    assert masked == fit_mnf(moments(cube.isel(y=slice(0, 60))), bands=BANDS)
    assert masked != mnf


def test_tiles_merge_to_the_same_fit(cube, mnf):
    assert fit_mnf(moments(cube.chunk(y=31, x=17)), bands=BANDS) == mnf


# --- transform and inverse ------------------------------------------------------------------------------------------


def test_transform_is_the_matrix_product(cube, mnf):
    found = mnf.transform(cube, suffix="post", components=5)
    values = np.stack([cube[b].values for b in BANDS]).astype(np.float64)
    expected = np.einsum("kb,byx->kyx", mnf.weights, values - np.array(mnf.mean)[:, None, None])

    assert list(found) == ["mnf1_post", "mnf2_post", "mnf3_post", "mnf4_post", "mnf5_post"]
    for name, wanted in zip(found, expected, strict=True):
        assert found[name].dtype == np.float32
        assert np.abs(found[name].values - wanted).max() < 1e-5 * wanted.std()


@unhurried
@given(st.integers(8, 90), st.integers(8, 70))
def test_chunks_change_no_bit_of_the_components(y, x):
    cube = dataset(scene())
    mnf = fit_mnf(moments(cube), bands=BANDS)
    whole = mnf.transform(cube)
    lazy = mnf.transform(cube.chunk(y=y, x=x))

    assert all(array.chunks is not None for array in lazy.values())
    assert lazy.chunks["y"][0] == y
    xr.testing.assert_identical(lazy.compute(), whole)
    xr.testing.assert_identical(mnf.transform(cube.isel(y=slice(y - 1, y), x=slice(x - 1, None))),
                                whole.isel(y=slice(y - 1, y), x=slice(x - 1, None)))  # fmt: skip


def test_large_means_cost_nothing(cube):
    values = np.stack([cube[b].values for b in BANDS]).astype(np.float64)
    plain = fit_mnf(moments(dataset(values)), bands=BANDS).transform(dataset(values))
    high = fit_mnf(moments(dataset(values + 1e8)), bands=BANDS).transform(dataset(values + 1e8))
    for name in plain:
        assert np.abs(plain[name].values - high[name].values).max() < 1e-5 * plain[name].values.std()


def test_unknown_in_one_band_is_unknown_in_all_components(cube, mnf):
    holes = cube.copy(deep=True)
    holes["B08"][3, 4] = 0
    floats = holes.astype(np.float32).where(holes != 0)
    for found in (
        mnf.transform(holes, nodata=0),
        mnf.transform(floats),
        mnf.transform(holes.chunk(y=7), nodata=0),
    ):
        for name, array in found.items():
            assert np.argwhere(np.isnan(array.values)).tolist() == [[3, 4]], name


def test_all_components_give_the_bands_back(cube, mnf):
    back = mnf.inverse(mnf.transform(cube.chunk(y=31), suffix="post", components=5), suffix="post").compute()

    assert list(back) == list(BANDS)
    for band in BANDS:
        np.testing.assert_allclose(back[band].values, cube[band].values, rtol=1e-4)
        assert back[band].dtype == np.float32


def test_the_first_components_give_the_bands_with_less_noise(cube, mnf):
    smooth = mnf.inverse(mnf.transform(cube, components=3))
    before, after = moments(cube), moments(smooth.astype(np.float64))

    assert (np.diag(after.noise_covariance) < np.diag(before.noise_covariance)).all()
    weights = np.array(mnf.inverse_weights)[:, :3] @ np.array(mnf.weights)[:3]
    expected = weights @ before.noise_covariance @ weights.T
    np.testing.assert_allclose(after.noise_covariance, expected, rtol=1e-4, atol=1e-3)


# --- as files, and refusals -----------------------------------------------------------------------------------------


def test_json_and_pickle_lose_nothing(mnf):
    assert Mnf.from_json(mnf.to_json()) == mnf
    assert pickle.loads(pickle.dumps(mnf)) == mnf
    assert Mnf.from_json(mnf.to_json()).to_json() == mnf.to_json()


def unfit(change):
    values = scene().astype(np.float64)
    change(values)
    return lambda: fit_mnf(moments(dataset(values)), bands=BANDS)


def constant(values):
    values[2] = 4000.0


def repeated(values):
    values[4] = values[0] + 2 * values[3]


def no_noise(values):
    values[1] = np.subtract.outer(np.arange(90), np.arange(70))  # equal along the diagonal


def unknown(values):
    values[:, 1:, 1:] = np.nan


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_bands_that_repeat_others_are_refused_by_name(kind):
    values = (scene() / 10_000).astype(kind)
    values[4] = values[0] + 2 * values[3]
    with pytest.raises(PipelineError, match=r"cannot use B02, B08, B11 together"):
        fit_mnf(moments(dataset(values)), bands=BANDS)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (unfit(constant), r"cannot use B04: constant"),
        (unfit(no_noise), r"cannot use B03: without noise"),
        (unfit(repeated), r"cannot use B02, B08, B11 together"),
        (unfit(unknown), r"needs 6 pixels .* got 159 and 0"),
        (
            lambda: fit_mnf(Moments.none(5), bands=BANDS),
            r"B02, B03, B04, B08, B11 needs 6 pixels .* got 0 and 0",
        ),
        (
            lambda: fit_mnf(moments(dataset(scene())), bands=BANDS[:4]),
            r"moments of 5 bands got the names B02, B03",
        ),
        (lambda: fit_mnf(moments(dataset(scene())), bands=("a",) * 5), r"none twice"),
        (
            lambda: fit_mnf(moments(dataset(scene())), bands=BANDS, components=6),
            r"6 components of 5 bands; 1 to 5",
        ),
        (lambda: fit_mnf(moments(dataset(scene() * 1e200)), bands=BANDS), r"not finite"),
    ],
)
def test_unfit_data_are_refused_in_one_line(act, message):
    with pytest.raises(PipelineError, match=message) as told:
        act()
    assert "\n" not in str(told.value)


def test_uses_that_do_not_fit_are_refused_in_one_line(cube, mnf):
    parts = mnf.transform(cube)
    cases = [
        (lambda: mnf.transform(cube.drop_vars("B04")), r"lacks B04; it has B02, B03, B08, B11"),
        (lambda: mnf.transform(cube, components=0), r"components=0 is not allowed; 1 to 5"),
        (lambda: mnf.inverse(parts.drop_vars("mnf2")), r"needs mnf1 .* got mnf1, mnf3"),
        (lambda: mnf.inverse(parts, suffix="post"), r"needs mnf1_post .* got none"),
        (lambda: mnf.transform({**cube.data_vars, "B04": cube["B04"][1:]}), r"one shape; got B02"),
        (lambda: dataclasses.replace(mnf, components=9), r"9 components of 5 bands"),
    ]
    for act, message in cases:
        with pytest.raises(PipelineError, match=message) as told:
            act()
        assert "\n" not in str(told.value)


def test_names():
    assert component_names(2) == ("mnf1", "mnf2")
    assert component_names(2, "change") == ("mnf1_change", "mnf2_change")
    assert merge([Moments.none(1)]) == Moments.none(1)
