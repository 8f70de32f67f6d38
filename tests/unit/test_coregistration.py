"""Shifts between two images: known ones are found on real pixels, and are taken back."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import scipy.ndimage
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.pipeline.coregistration import (
    CHIP_PX,
    BlockShifts,
    Shift,
    cubic_weights,
    margin_px,
    measure_shift,
    move,
    shift_numbers,
    shifts_in,
)

SHIFTS = ((0.3, -0.4), (0.85, 0.1), (-1.2, 0.7), (2.1, -0.35), (0.0, 1.45))


@pytest.fixture(scope="module")
def two_dates(shared_data):
    """Near infrared of one real place on two dates, on the stored scale."""
    with rasterio.open(shared_data / "inn_valley_two_dates" / "inference-img.tif") as src:
        return src.read(4) + np.uint16(1000), src.read(8) + np.uint16(1000)


def moved_by_fourier(image, south, east):
    """Move an image by turning the phases of its spectrum, which shares nothing with the kernel under test."""
    spectrum = scipy.ndimage.fourier_shift(np.fft.fft2(image.astype(float)), (south, east))
    return np.clip(np.rint(np.fft.ifft2(spectrum).real), 1, 65535).astype(np.uint16)


def measured(pre, post, known=None):
    found = measure_shift(pre, post, np.ones(pre.shape, bool) if known is None else known)
    assert found is not None
    return np.array([found.south_px, found.east_px])


@pytest.mark.parametrize("shift", SHIFTS)
def test_known_shifts_between_two_real_dates_are_found_to_a_tenth_of_a_pixel(two_dates, shift):
    pre, post = two_dates
    own = measured(pre, post)  # the two dates do not lie on each other either

    assert np.hypot(*own) < 0.5
    assert np.abs(measured(pre, moved_by_fourier(post, *shift)) - own - shift).max() <= 0.1


@pytest.mark.parametrize("shift", SHIFTS)
def test_clouds_over_a_third_of_the_ground_do_not_pull_the_shift_to_zero(two_dates, shift):
    pre, post = two_dates
    noise = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=pre.shape), 10)
    known = noise < np.quantile(noise, 0.67)
    found = measured(pre, np.where(known, moved_by_fourier(post, *shift), 0).astype(np.uint16), known)

    assert np.abs(found - measured(pre, post) - shift).max() <= 0.1


def test_half_a_pixel_as_a_sensor_would_see_it(two_dates):
    """Two cameras of 20 m whose pixels begin 10 m apart: no image was interpolated, and both alias."""
    image = np.vstack([two_dates[0][:376], two_dates[1][:376]]).astype(float)

    def camera(south, east):
        cut = image[south : 750 + south, east : 576 + east]
        return np.rint(cut.reshape(375, 2, 288, 2).mean(axis=(1, 3))).astype(np.uint16)

    # what lies further south in the first frame lies further north in the second, which begins later
    for south, east in ((1, 0), (0, 1), (1, 1)):
        found = measured(camera(0, 0), camera(south, east))
        assert np.abs(found - (-south / 2, -east / 2)).max() <= 0.1


@settings(max_examples=20)
@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(0, 2**32 - 1))
def test_whole_pixels_are_found_in_any_texture(south, east, seed):
    ground = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(300, 300)), 1.5)
    stored = np.rint(4000 + 8000 * ground).clip(1, 65535).astype(np.uint16)
    pre = stored[10 : 10 + 2 * CHIP_PX, 10 : 10 + 2 * CHIP_PX]
    post = stored[10 - south :, 10 - east :][: 2 * CHIP_PX, : 2 * CHIP_PX]

    assert np.abs(measured(pre, post) - (south, east)).max() <= 0.1


def test_ground_without_anything_in_common_has_no_shift(two_dates):
    pre, post = two_dates
    rng = np.random.default_rng(1)
    ones = np.ones(pre.shape, bool)
    noise = rng.integers(1000, 5000, pre.shape).astype(np.uint16)
    assert measure_shift(pre, noise, ones) is None
    assert measure_shift(pre, np.full_like(pre, 2000), ones) is None
    assert measure_shift(pre, post[::-1, ::-1].copy(), ones) is None
    few = np.zeros(pre.shape, bool)
    few[: 2 * CHIP_PX, :CHIP_PX] = True
    assert measure_shift(pre, post, few) is None  # two chips cannot agree against a third


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_a_quadratic_surface_is_moved_exactly(south, east):
    y, x = np.mgrid[:40, :50]

    def surface(y, x):
        return 20_000 + 31.0 * x - 17.0 * y + 4.0 * x * x - 3.0 * y * y + 2.0 * x * y

    layer = xr.Dataset({"B08": (("y", "x"), np.rint(surface(y, x)).astype(np.uint16))})
    made = move(layer, south, east, margin=4)["B08"].values

    expected = surface(y[4:-4, 4:-4] - south, x[4:-4, 4:-4] - east)
    assert made.shape == expected.shape
    assert np.abs(made - expected).max() <= 1.3  # rounded before, weighted by up to 1.3, and rounded after


def test_whole_pixels_are_moved_without_a_change():
    values = np.random.default_rng(0).integers(1, 60_000, (30, 30)).astype(np.uint16)
    layer = xr.Dataset(dict.fromkeys(("B04", "clear_count"), (("y", "x"), values)))
    for south, east in ((0, 0), (1, 0), (-2, 1), (0, -2)):
        made = move(layer, south, east, margin=4)
        expected = values[4 - south : 26 - south, 4 - east : 26 - east]
        for name in ("B04", "clear_count"):
            np.testing.assert_array_equal(made[name].values, expected)


def test_nodata_stays_nodata_and_takes_what_its_kernel_touches():
    values = np.full((20, 20), 3000, np.uint16)
    values[10, 10] = 0
    made = move(xr.Dataset({"B04": (("y", "x"), values)}), 0.5, 0.0, margin=4)["B04"].values

    rows, cols = np.nonzero(made == 0)
    # of the four rows that each row reads at half a pixel, two lie before it and two after
    assert sorted(set(rows.tolist())) == [5, 6, 7, 8]
    assert set(cols.tolist()) == {6}
    assert (made[made != 0] == 3000).all()


@given(st.floats(0, 1, exclude_max=True))
def test_weights_sum_to_one(fraction):
    assert abs(cubic_weights(fraction).sum() - 1) < 1e-12


@pytest.mark.parametrize("shift", [(0.7, -0.9), (1.2, 0.4), (-0.6, -1.1)])
def test_what_was_moved_lies_where_it_should(two_dates, shift):
    """The kernel takes back what the spectrum did, to a tenth of a pixel and nearly to the grey value."""
    pre, post = two_dates
    away = moved_by_fourier(pre, *(-np.array(shift)))
    margin = margin_px(1.5)
    back = move(xr.Dataset({"B08": (("y", "x"), away)}), *shift, margin=margin)["B08"].values
    core = np.s_[margin:-margin, margin:-margin]

    assert np.abs(measured(back, post[core]) - measured(pre, post)).max() <= 0.1
    assert np.corrcoef(back.ravel(), pre[core].ravel())[0, 1] > 0.98
    assert np.corrcoef(away[core].ravel(), pre[core].ravel())[0, 1] < 0.95


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 4000), st.integers(0, 4000)),
        st.none()
        | st.builds(
            Shift,
            south_px=st.integers(-8000, 8000).map(lambda n: n / 1000),
            east_px=st.integers(-8000, 8000).map(lambda n: n / 1000),
            chips=st.integers(1, 16),
        ),
        max_size=20,
    )
)
def test_numbers_of_a_record_hold_the_shifts(by_block):
    assert shifts_in({"observed": 7, **shift_numbers(by_block)}) == by_block


def test_the_limits_are_still_allowed():
    def verdict(south):
        return Shift(south_px=south, east_px=0.0, chips=4).verdict(0.5, 1.5)

    assert [verdict(v) for v in (0.0, 0.5, 0.501, 1.5, 1.501, -1.6)] == [
        "fine", "fine", "warned", "warned", "excluded", "excluded"
    ]  # fmt: skip


def test_a_block_covers_its_own_pixels_of_a_window():
    far = Shift(south_px=3.0, east_px=0.0, chips=9)
    shifts = BlockShifts(
        by_block={(2, 3): far, (2, 4): None},
        row=2 * 512 - 10,
        col=4 * 512 - 20,
        shape=(100, 80),
        block_px=512,
    )
    out = shifts.excluded_yx(1.5)
    assert out[10:, :20].all()
    assert out.sum() == 90 * 20
