"""Laws that hold for any simulation: sizes, shares of pixels, optics, drainage, sun and shadow."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from scipy import stats

from slidecube.pipeline.simulate import fields, load_parameters
from slidecube.pipeline.simulate.changes import coverage, draw
from slidecube.pipeline.simulate.light import Sun, illuminate, lit, sun_on
from slidecube.pipeline.simulate.optics import sampler, spread_px
from slidecube.pipeline.simulate.scars import ScarField, draw_areas, size_class
from slidecube.pipeline.simulate.terrain import Terrain, drainage

P = load_parameters()
BOX = GeoBox((200, 200), Affine(10, 0, 230000, 0, -10, 34000), "EPSG:32632")


def test_sizes_follow_malamud():
    areas = draw_areas(P.landslides, np.inf, np.random.default_rng(1), count=4000)
    law = stats.invgamma(1.40, loc=-132.0, scale=1280.0)
    low, high = law.cdf([P.landslides.min_area_m2, P.landslides.max_area_m2])
    assert stats.kstest(areas, lambda a: (law.cdf(a) - low) / (high - low)).pvalue > 0.01
    # METHODS section 5: 48 % of slides but 9 % of their area lie below 1,000 m2
    assert np.mean(areas < 1000) == pytest.approx(0.48, abs=0.04)
    assert areas[areas < 1000].sum() / areas.sum() == pytest.approx(0.09, abs=0.03)


@given(total=st.floats(2e3, 2e6), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_drawn_areas_sum_to_the_share(total, seed):
    areas = draw_areas(P.landslides, total, np.random.default_rng(seed))
    assert areas.min() >= P.landslides.min_area_m2
    assert areas.max() <= P.landslides.max_area_m2
    assert total - P.landslides.min_area_m2 <= areas.sum() <= 2 * total + 80


@pytest.mark.parametrize(
    ("area", "name"), [(399.9, "<400"), (400, "400-1000"), (1000, "1000-3000"), (1e5, ">=10000")]
)
def test_size_classes(area, name):
    assert size_class(area) == name


def cone() -> np.ndarray:
    """A mountain of 35 degrees in the middle, 1 m above the sea at its foot."""
    y, x = np.indices(BOX.shape)
    return np.maximum(900 - 7.0 * np.hypot(y - 100, x - 100), 1).astype(np.float32)


@given(area=st.floats(25, 60000), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_a_landslide_has_its_area_and_runs_downhill(area, seed):
    field = ScarField(P.landslides, cone(), BOX, 0)
    found = field.trace(100, 140, area, np.random.default_rng(seed))
    if found is None:
        return
    outline, drop = found
    assert outline.is_valid
    assert outline.area == pytest.approx(area, rel=1e-6)
    assert drop > 0 or (drop == 0 and area < 400)  # one shorter than a pixel lies within one height
    crown = shapely.Point(BOX.affine @ (140.5, 100.5))
    assert outline.distance(crown) < 20
    # east of the summit, downhill is eastwards: the mass lies east of its crown
    assert outline.centroid.x > crown.x - 5


def test_runout_stops_on_flat_ground():
    dem = cone()
    dem[:, 150:] = dem[100, 150]  # a terrace
    field = ScarField(P.landslides, dem, BOX, 0)
    path = field._path(100.5, 140.5, 2000.0)
    assert path is not None
    assert path[-1, 0] < BOX.affine.c + 155 * 10


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_coverage_sums_to_the_area(seed):
    rng = np.random.default_rng(seed)
    x, y = 231000 + rng.uniform(0, 10), 33000 + rng.uniform(0, 10)
    shape = shapely.Point(x, y).buffer(rng.uniform(8, 150)).intersection(shapely.Point(x + 5, y).buffer(100))
    rows, cols, share = coverage(shape, BOX)
    # 4 x 4 samples a pixel: the error is a small part of the rim
    assert share.sum() / 255 * 100 == pytest.approx(shape.area, abs=0.35 * shape.length + 5)
    assert (rows.stop - rows.start, cols.stop - cols.start) == share.shape


def test_draw_gives_a_shared_pixel_to_the_larger():
    big, small = shapely.box(230000, 33000, 230008, 33010), shapely.box(230008, 33000, 230010, 33010)
    index, cover = draw([small, big], BOX)
    assert index[99, 0] == 2
    assert cover[99, 0] == pytest.approx(0.8 * 255, abs=20)


@given(shift=st.floats(-12, 12), pixel=st.sampled_from([10, 20, 60]))
@settings(max_examples=40)
def test_sampler_keeps_light_and_moves_it_by_the_shift(shift, pixel):
    n = 480
    matrix = sampler(n, 5.0, pixel, spread_px(0.25), shift)
    assert np.allclose(np.asarray(matrix.sum(axis=1)).ravel(), 1, atol=1e-5)
    at = (np.arange(n) + 0.5) * 5
    blob = np.exp(-(((at - 1200) / 150) ** 2)).astype(np.float32)
    seen = matrix @ blob
    centre = (np.arange(len(seen)) + 0.5) * pixel
    assert (seen * centre).sum() / seen.sum() == pytest.approx(1200 + shift, abs=0.05)
    assert seen.sum() * pixel == pytest.approx(blob.sum() * 5, rel=1e-3)


@pytest.mark.parametrize("mtf", [0.15, 0.22, 0.30])
def test_sampler_has_the_mtf_it_was_asked_for(mtf):
    """A wave of two pixels comes out with the contrast that the MTF at the Nyquist frequency says."""
    at = (np.arange(4000) + 0.5) * 0.5
    wave = np.cos(np.pi * at / 10 - np.pi / 2 + np.pi / 2).astype(np.float32)
    # sampled in phase: pixel centres at 5, 15, ... see cos(pi / 2): move the wave by half a pixel
    seen = sampler(4000, 0.5, 10.0, spread_px(mtf), 5.0) @ wave
    inner = seen[5:-5]
    assert (inner.max() - inner.min()) / 2 == pytest.approx(mtf, abs=0.005)


def test_drainage_reaches_the_sea_and_counts_every_cell():
    dem = fields.fractal((60, 70), np.random.default_rng(3), patch_px=30) * 50 + 200
    dem[:, :5] = 0
    down, count = drainage(dem)
    ends = np.flatnonzero(down == -1)
    assert count[ends].sum() == dem.size
    cell = 30 * 70 + 40
    for _ in range(dem.size):
        if down[cell] < 0:
            break
        assert count[down[cell]] > count[cell]
        cell = down[cell]
    assert down[cell] == -1


def test_sun_of_the_equinox():
    noon = P.season.model_copy(update={"latitude_deg": 40.0, "overpass_solar_hour": 12.0})
    sun = sun_on(noon, dt.date(2018, 3, 22))
    assert sun.elevation_deg == pytest.approx(50, abs=0.6)
    assert sun.azimuth_deg == pytest.approx(180, abs=0.1)
    assert sun_on(P.season, dt.date(2018, 11, 15)).elevation_deg < 30  # low sun occurs


def test_a_wall_casts_a_shadow_as_long_as_trigonometry_says():
    dem = np.full((240, 240), 1.0, np.float32)
    dem[:, 100:104] = 101.0
    terrain = Terrain(geobox=BOX[20:180, 20:180], margin_px=40, dem_m=dem)
    seen = lit(terrain, Sun(elevation_deg=30.0, azimuth_deg=90.0), 0.3)[80]
    shaded = np.flatnonzero(seen < 0.5)
    # 100 m at 30 degrees reach 173 m to the west of the wall
    assert len(shaded) == pytest.approx(17.3, abs=2.1)
    assert shaded.max() < 60
    light = illuminate(terrain, Sun(elevation_deg=30.0, azimuth_deg=90.0), P.light)
    assert light.direct[80, shaded[5]] < 0.2
    assert light.direct[80, 120] == pytest.approx(1, abs=1e-3)


@given(st.integers(0, 1000), st.text(max_size=8))
@settings(max_examples=20)
def test_generators_of_purposes_are_apart_and_repeatable(seed, purpose):
    a, b = fields.generator(seed, purpose, 1), fields.generator(seed, purpose, 1)
    assert a.integers(2**60) == b.integers(2**60)
    assert fields.generator(seed, purpose, 1).integers(2**60) != fields.generator(seed, purpose, 2).integers(
        2**60
    )
