"""Masks against scipy and brute force: classes, dilation, shadows along the sun, ground that stays bright, snow."""

from __future__ import annotations

import datetime as dt

import dask.array as da
import numpy as np
import pyproj
import pytest
import scipy.ndimage
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from odc.geo.geobox import GeoBox

from slidecube.catalog.scenes import Offset, Scene
from slidecube.pipeline.composite import METHODS, Compositing, composite
from slidecube.pipeline.masks import (
    CLEAR,
    CLOUDED,
    MASKED,
    SCL_DILATED,
    SCL_MASKED,
    SHADED,
    SNOW_NODATA,
    MaskRule,
    Sun,
    admitted,
    judge,
    returning_ground,
    second_opinion,
    shadow_offsets,
    sun_of,
)

unhurried = settings(max_examples=40)
BOX = GeoBox((8, 8), Affine(10, 0, 500_000, 0, -10, 5_000_000), "EPSG:32632")
NO_SHADOWS = {"cloud_heights_m": None, "readmit": False}


def scene(i, *, offset=0.0):
    when = dt.datetime(2021, 6, 1, 10, 30, tzinfo=dt.UTC) + dt.timedelta(days=5 * i)
    return Scene(
        id=f"S{i:03d}", role="optical", source="local", datetime=when, identity=f"I{i:03d}", datatake=f"D{i:03d}",
        version="", bands={}, item={}, offset=Offset(value=offset, applied=False, reason="test"),
    )  # fmt: skip


def judged(scl, rule, *, geobox=BOX, suns=None, halo_px=8, chunk=8):
    lazy = da.from_array(scl, chunks=(-1, chunk, chunk))
    codes, snow = judge(
        lazy,
        rule,
        geobox=geobox,
        suns=suns or [None] * len(scl),
        groups=[[i] for i in range(len(scl))],
        halo_px=halo_px,
    )
    return da.compute(codes, snow, scheduler="synchronous")


@unhurried
@given(
    hnp.arrays(np.uint8, (2, 24, 24), elements=st.sampled_from([0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])),
    st.integers(0, 4),
    st.sampled_from([SCL_MASKED, (9, 11), (0, 4), ()]),
)
def test_mask_equals_morphology_and_sees_no_block_edge(scl, dilation, classes):
    """Against scipy on the whole; blocks of 8 px with a halo of one block, the result in its middle."""
    rule = MaskRule(scl_classes=classes, dilation_px=dilation, **NO_SHADOWS)
    cloudy = np.isin(scl, [c for c in classes if c in SCL_DILATED])
    square = np.ones((1, 2 * dilation + 1, 2 * dilation + 1), bool)
    want = ~(np.isin(scl, classes) | scipy.ndimage.binary_dilation(cloudy, square))

    for chunk in (8, 24):
        codes, snow = judged(scl, rule, chunk=chunk)
        np.testing.assert_array_equal(codes == CLEAR, want[:, 8:16, 8:16])
        core = scl[:, 8:16, 8:16]
        seen, snowy = (core != 0).sum(axis=0), (core == 11).sum(axis=0)
        share = np.where(seen > 0, np.rint(100 * snowy / np.maximum(seen, 1)), SNOW_NODATA)
        np.testing.assert_array_equal(snow, share)


@unhurried
@given(
    hnp.arrays(np.uint8, (2, 9, 9), elements=st.integers(0, 11)),
    hnp.arrays(np.uint8, (2, 9, 9), elements=st.integers(0, 100)),
    st.integers(1, 100),
)
def test_a_second_opinion_only_adds_clouds(scl, cloud_pct, limit):
    """Nothing that is hidden comes to light, no data and snow stay what they are, and no opinion changes nothing."""
    rule = MaskRule(cloud_pct=limit, **NO_SHADOWS)
    found = second_opinion(da.from_array(scl), da.from_array(cloud_pct), rule).compute()

    added = found != scl
    assert found.dtype == np.uint8
    assert (found[added] == 8).all()
    clear = (scl != 0) & ~np.isin(scl, (8, 9, 10, 11))
    np.testing.assert_array_equal(added, clear & (cloud_pct >= limit))


@pytest.mark.parametrize("azimuth", [10, 100, 155, 200, 290])
def test_a_shadow_falls_where_the_ray_from_the_sun_meets_the_ground(azimuth):
    """One cloud of one pixel, in geographic space: a geodesic away from the sun ends in the shaded pixels."""
    sun = Sun(azimuth_deg=azimuth, elevation_deg=40.0)
    # two degrees east of the zone's middle, where the grid's north is 1.6 degrees off
    box = GeoBox((512, 512), Affine(10, 0, 680_000, 0, -10, 5_400_000), "EPSG:32632")
    rule = MaskRule(dilation_px=0, cloud_heights_m=(1000.0, 1000.0))
    scl = np.full((1, 3 * 512, 3 * 512), 4, np.uint8)
    row, col = 512 + 256, 512 + 256
    scl[0, row, col] = 9
    codes, _ = judged(scl, rule, geobox=box, suns=[sun], halo_px=512, chunk=512)

    shaded = np.argwhere(codes[0] == SHADED)
    to = pyproj.Transformer.from_crs("EPSG:32632", "EPSG:4326", always_xy=True)
    x, y = box.affine @ (col - 512 + 0.5, row - 512 + 0.5)
    lon, lat = to.transform(x, y)
    away = 1000 / np.tan(np.radians(40.0))
    lon, lat, _ = pyproj.Geod(ellps="WGS84").fwd(lon, lat, azimuth + 180, away)
    c, r = ~box.affine @ to.transform(lon, lat, direction="INVERSE")
    assert len(shaded) in (2, 3), "the height falls between whole pixels"
    assert np.hypot(*(shaded + 0.5 - [r, c]).T).max() < 1.6


def test_shadows_cross_blocks_and_do_not_depend_on_them():
    rng = np.random.default_rng(2)
    scl = np.where(scipy.ndimage.gaussian_filter(rng.random((96, 96)), 3) > 0.53, 9, 4).astype(np.uint8)[None]
    rule = MaskRule(dilation_px=1, cloud_heights_m=(50.0, 220.0))
    sun = [Sun(azimuth_deg=160.0, elevation_deg=45.0)]
    box = GeoBox((32, 32), BOX.affine, BOX.crs)
    whole, _ = judged(scl, rule, geobox=box, suns=sun, halo_px=32, chunk=32)
    clouds = scipy.ndimage.binary_dilation(scl[0] == 9, np.ones((3, 3)))
    want = np.zeros((32, 32), bool)
    north = (
        pyproj.Proj("EPSG:32632")
        .get_factors(*box.extent.centroid.to_crs("EPSG:4326").coords[0])
        .meridian_convergence
    )
    for row, col in shadow_offsets(sun[0], rule, 10.0, north, 32):
        want |= clouds[32 - row : 64 - row, 32 - col : 64 - col]

    np.testing.assert_array_equal(whole[0] == CLOUDED, clouds[32:64, 32:64])
    np.testing.assert_array_equal(whole[0] == SHADED, want & ~clouds[32:64, 32:64])
    assert 0 < (whole == SHADED).mean() < 1
    for chunk in (16, 8):
        again, _ = judged(scl, rule, geobox=box, suns=sun, halo_px=32, chunk=chunk)
        np.testing.assert_array_equal(again, whole)


def test_what_cannot_be_followed_is_not_projected():
    rule = MaskRule(dilation_px=3, cloud_heights_m=(200.0, 3000.0))
    low = shadow_offsets(Sun(azimuth_deg=180, elevation_deg=2.0), rule, 10.0, 0.0, 512)
    assert low == [], "the lowest cloud already throws it too far"
    high = shadow_offsets(Sun(azimuth_deg=180, elevation_deg=30.0), rule, 10.0, 0.0, 512)
    assert max(-row for row, _ in high) == 508
    assert {col for _, col in high} == {0}
    assert all(row < 0 for row, _ in high), "the sun stands in the south, the shadow falls north"


def test_the_sun_of_an_item_is_told_in_two_ways_or_not_at_all():
    def of(**properties):
        one = scene(0)
        one.item["properties"] = properties
        return sun_of(one)

    angles = Sun(azimuth_deg=150.0, elevation_deg=40.0)
    assert of(**{"view:sun_azimuth": 150.0, "view:sun_elevation": 40.0}) == angles
    assert of(**{"s2:mean_solar_azimuth": 150.0, "s2:mean_solar_zenith": 50.0}) == angles
    assert of(**{"view:sun_azimuth": 150.0}) is None
    assert of(**{"view:sun_azimuth": 150.0, "view:sun_elevation": -3.0}) is None


def used(codes, groups=None, **bands):
    lazy = {n: da.from_array((np.asarray(v) * 10_000).round().astype(np.uint16)) for n, v in bands.items()}
    each = groups or [[i] for i in range(len(codes))]
    clear = admitted(da.from_array(codes), lazy, offsets=[0.0] * len(codes), groups=each)
    return clear.compute(scheduler="synchronous")


def test_a_pixel_under_a_projected_cloud_is_used_unless_it_is_dark():
    codes = np.array([SHADED, CLEAR, CLOUDED], np.uint8)[:, None, None] * np.ones((1, 1, 4), np.uint8)
    first = [[0.05, 0.3, 0.05, 0.11]]
    others = [[0.3, 0.3, 0.06, 0.13], [0.5, 0.5, 0.5, 0.5]]

    assert used(codes, B08=[first, *([o] for o in others)])[0].tolist() == [[False, True, True, True]]
    assert used(codes[:1], B08=[first]).all(), "with nothing to compare it with, it is ground"
    assert used(codes[:1], B04=[first]).all(), "nothing says that it is dark"


GROUND = {"B02": 0.11, "B04": 0.20, "B08": 0.28}
CLOUD = {"B02": 0.45, "B04": 0.44, "B08": 0.50}


def series(*dates):
    return {n: np.array([d[n] for d in dates])[:, None, None] for n in GROUND}


def called(*codes):
    return np.array(codes, np.uint8)[:, None, None]


def test_bright_ground_that_stays_on_three_dates_is_admitted_again():
    assert used(called(CLOUDED, CLOUDED, CLOUDED), **series(*[GROUND] * 3)).all()
    one_clear = used(called(CLOUDED, CLEAR, CLOUDED), **series(*[GROUND] * 3))
    assert one_clear.all()


@pytest.mark.parametrize(
    ("groups", "ground"),
    [([[0, 1, 2, 3]], False), ([[0, 1], [2, 3]], False), ([[0, 1], [2], [3]], True)],
    ids=["one", "two", "three"],
)
def test_granules_of_one_overpass_are_one_date(groups, ground):
    """Where granules overlap a cloud is seen several times at once, and agrees with itself."""
    assert used(called(*(CLOUDED,) * 4), groups, **series(*[GROUND] * 4)).all() == ground


@pytest.mark.parametrize(
    ("codes", "dates", "why"),
    [
        ((CLOUDED,) * 2, [GROUND] * 2, "two dates may be two clouds"),
        ((CLOUDED,) * 4, [CLOUD] * 4, "white, not of the colour of soil"),
        ((CLOUDED, CLEAR, CLEAR, CLEAR), [CLOUD, GROUND, GROUND, GROUND], "a cloud over ground"),
        ((CLOUDED,) * 3, [{n: v * f for n, v in GROUND.items()} for f in (1, 1.6, 2.4)], "it does not stay"),
        ((CLOUDED, MASKED, MASKED), [GROUND] * 3, "the others are shadow, snow or nothing"),
        ((CLOUDED,) * 3, [{"B02": 0.04, "B04": 0.05, "B08": 0.4}] * 3, "forest below cirrus is not bright"),
    ],
)
def test_what_does_not_prove_to_be_ground_stays_masked(codes, dates, why):
    got = used(called(*codes), **series(*dates))

    assert not got[np.array(codes) == CLOUDED].any(), why


@unhurried
@given(
    hnp.arrays(np.float32, (5, 4), elements=st.sampled_from([0.1, 0.2, 0.21, 0.3, np.nan])),
    st.permutations(range(5)),
)
def test_the_order_of_dates_admits_the_same(values, order):
    stack = values * 0.5, values, values * 1.2
    every = np.ones(values.shape, bool)
    overpass = np.array([0, 1, 2, 2, 3])
    got = returning_ground(*stack, every, overpass)
    again = returning_ground(*(v[order] for v in stack), every, overpass[list(order)])

    np.testing.assert_array_equal(again, got[order])


@pytest.mark.parametrize("method", METHODS)
def test_block_cuts_change_nothing(method):
    """Mask, dilation, shadows and composite of 16 px in blocks of 4, 8 or 16, with 16 px of halo around."""
    rng = np.random.default_rng(4)
    scl = rng.choice([4, 5, 3, 8, 9, 11], (4, 48, 48), p=[0.6, 0.35, 0.01, 0.01, 0.01, 0.02]).astype(np.uint8)
    bands = {name: rng.integers(0, 2000, (4, 16, 16)).astype(np.uint16) for name in ("B02", "B04", "B08")}
    scenes = [scene(i, offset=[0.0, -0.1][i % 2]) for i in range(4)]
    rule = MaskRule(dilation_px=2, cloud_heights_m=(20.0, 100.0))
    box, suns = (
        GeoBox((16, 16), BOX.affine, BOX.crs),
        [Sun(azimuth_deg=30.0 * i, elevation_deg=50.0) for i in range(4)],
    )
    whole = None
    for block in (16, 8, 4):
        codes, snow = judge(
            da.from_array(scl, chunks=(-1, block, block)), rule, geobox=box, suns=suns,
            groups=[[0], [1], [2], [3]], halo_px=16,
        )  # fmt: skip
        cut = {n: da.from_array(v, chunks=(-1, block, block)) for n, v in bands.items()}
        clear = admitted(codes, cut, offsets=[s.offset.value for s in scenes], groups=[[0], [1], [2], [3]])
        made = {
            **composite(cut, clear, scenes=scenes, how=Compositing(method=method, greenest_of=2)),
            "snow": snow,
        }
        got = dict(zip(made, da.compute(*made.values(), scheduler="synchronous"), strict=True))
        assert 0 < (got["clear_count"] == 0).mean() < 1
        whole = whole or got
        for name, values in whole.items():
            np.testing.assert_array_equal(got[name], values, err_msg=name)
