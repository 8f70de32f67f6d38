"""Topographic correction against the papers' own form, on hills whose light is known."""

from __future__ import annotations

from types import SimpleNamespace

import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidecube.pipeline.sunlight import Sun, cos_incidence
from slidecube.pipeline.terrain import aspect_from, horn_gradients, slope_from
from slidecube.pipeline.topography import FEWEST_PX, LARGEST_FACTOR, correct_scene, illumination

SUN = Sun(elevation_deg=35.0, azimuth_deg=150.0)
COS_Z = float(np.sin(np.radians(35.0)))


@pytest.fixture(scope="module")
def hill():
    """A rounded hill of 700 m with gullies: slope and cos i on 200 x 200 pixels of 10 m."""
    y, x = (np.mgrid[:200, :200] - 99.5) * 10.0
    z = 700 * np.exp(-(x**2 + y**2) / (2 * 450**2)) + 20 * np.sin(x / 60) * np.cos(y / 45)
    gradients = horn_gradients(z, 10.0, 10.0)
    slope, aspect = slope_from(*gradients), aspect_from(*gradients)
    return slope, cos_incidence(slope, aspect, SUN)


def under(elevation_deg, azimuth_deg):
    """A scene of which only the sun is known."""
    said = {"view:sun_elevation": elevation_deg, "view:sun_azimuth": azimuth_deg}
    return SimpleNamespace(id="s", source="mine", item={"properties": said})


def correlation(a, b, where):
    return float(np.corrcoef(a[where], b[where])[0, 1])


@pytest.mark.parametrize("c", [0.4, 0.8, 2.0])
def test_light_and_brightness_part_on_a_hill(hill, c):
    slope, cos_i = hill
    rng = np.random.default_rng(0)
    ground = rng.normal(2500, 200, slope.shape)  # forest and meadows, wherever they lie
    seen = (ground * (np.maximum(cos_i, 0) + c) / (COS_Z + c)).astype(np.float32)
    known = ~np.isnan(cos_i)
    lit = known & (cos_i > 0) & (slope >= 5)

    made = correct_scene(seen, known, cos_i, slope, cos_zenith=COS_Z, method="c")
    assert correlation(seen, cos_i, lit) > 0.5
    assert abs(correlation(made, cos_i, lit)) < 0.02
    assert np.abs(made[lit] / ground[lit] - 1).mean() < 0.02


def test_trees_stand_upright(hill):
    """Light on a canopy goes by the sun and the slope: SCS+C takes it back, C makes too much of it."""
    slope, cos_i = hill
    c = 0.4
    upright = np.cos(np.radians(slope)) * COS_Z
    seen = (2500 * (np.maximum(cos_i, 0) + c) / (upright + c)).astype(np.float32)
    # the line of cos i is exact where the slope is one and the same
    ring = ~np.isnan(cos_i) & (slope > 23) & (slope < 27)
    scs, plain = (
        correct_scene(seen, ring, cos_i, slope, cos_zenith=COS_Z, method=method)[ring]
        for method in ("scs+c", "c")
    )
    assert ring.sum() > FEWEST_PX
    assert abs(scs.mean() / 2500 - 1) < 0.03 < abs(plain.mean() / 2500 - 1)
    assert scs.std() / scs.mean() < 0.03


@given(st.floats(500, 3000), st.floats(300, 4000), st.integers(0, 99))
def test_the_ratio_is_the_papers_formula(intercept, slope_of_line, seed):
    rng = np.random.default_rng(seed)
    cos_i = rng.uniform(0.2, 0.95, (64, 64)).astype(np.float32)
    slope = np.full((64, 64), 20, np.float32)
    seen = (intercept + slope_of_line * cos_i + rng.normal(0, 50, cos_i.shape)).astype(np.float32)
    b, a = np.polyfit(cos_i.ravel().astype(float), seen.ravel().astype(float), 1)
    c = a / b

    for method, lean in (("c", 1.0), ("scs+c", np.cos(np.radians(20)))):
        made = correct_scene(seen, np.ones_like(seen, bool), cos_i, slope, cos_zenith=COS_Z, method=method)
        formula = seen * np.clip((lean * COS_Z + c) / (cos_i + c), 1 / LARGEST_FACTOR, LARGEST_FACTOR)
        np.testing.assert_allclose(made, formula, rtol=2e-4)


def test_what_was_corrected_too_much_is_taken_back(hill):
    """A provider's own correction may leave the dark side brighter: then the line falls."""
    slope, cos_i = hill
    seen = (3500 - 1800 * np.maximum(cos_i, 0)).astype(np.float32)
    known = ~np.isnan(cos_i)
    made = correct_scene(seen, known, cos_i, slope, cos_zenith=COS_Z, method="c")
    assert seen[known].std() > 200
    assert made[known & (cos_i > 0)].std() < 5


@given(st.sampled_from(["c", "scs+c"]))
def test_nearly_flat_ground_and_few_pixels_stay_as_they_are(method):
    rng = np.random.default_rng(0)
    seen = rng.normal(2000, 300, (100, 100)).astype(np.float32)
    everywhere = np.ones(seen.shape, bool)
    steep = np.full(seen.shape, 20, np.float32)
    spread = rng.uniform(0.1, 1, seen.shape).astype(np.float32)

    def made(clear, cos_i, slope):
        return correct_scene(seen, clear, cos_i, slope, cos_zenith=COS_Z, method=method)

    assert made(everywhere, spread, np.full(seen.shape, 4, np.float32)) is seen
    assert made(everywhere, np.full(seen.shape, COS_Z, np.float32), steep) is seen
    few = np.zeros(seen.shape, bool)
    few.ravel()[: FEWEST_PX - 1] = True
    assert made(few, spread, steep) is seen
    few.ravel()[FEWEST_PX - 1] = True
    assert made(few, spread, steep) is not seen


def test_unknown_slopes_stay_and_no_factor_runs_away(hill):
    slope, cos_i = hill
    seen = (2500 * (np.maximum(cos_i, 0) + 0.001) / (COS_Z + 0.001)).astype(np.float32)
    gaps = cos_i.copy()
    gaps[50:60] = np.nan
    made = correct_scene(seen, ~np.isnan(gaps), gaps, slope, cos_zenith=COS_Z, method="c")
    unknown = np.isnan(gaps)
    np.testing.assert_array_equal(made[unknown], seen[unknown])
    factor = made[~unknown] / seen[~unknown]
    assert factor.max() <= LARGEST_FACTOR * 1.0001
    assert factor.min() >= 1 / LARGEST_FACTOR * 0.9999


def test_the_illumination_layer_is_the_mean_light_of_the_clear_dates(hill):
    """Against the dot product of sun and normal, in plain vectors; the order of dates leaves no trace."""
    slope, _ = hill
    aspect = np.random.default_rng(3).uniform(0, 360, slope.shape).astype(np.float32)
    suns = [(35.0, 150.0), (52.0, 170.0), (28.0, 210.0)]
    scenes = [under(*sun) for sun in suns]
    clear = np.random.default_rng(4).random((3, *slope.shape)) < 0.6
    terrain = np.stack([slope, aspect])

    def made(order):
        lazy = da.from_array(clear[order]), da.from_array(terrain)
        return illumination(*lazy, scenes=[scenes[i] for i in order]).compute()

    s, a = np.radians(slope.astype(np.float64)), np.radians(aspect.astype(np.float64))
    normal = np.stack([np.sin(s) * np.sin(a), np.sin(s) * np.cos(a), np.cos(s)])
    light = []
    for elevation, azimuth in np.radians(suns):
        to_sun = np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth), np.sin(elevation)
        light.append(np.tensordot(to_sun, normal, axes=1))
    known = clear.any(axis=0) & ~np.isnan(slope)
    with np.errstate(invalid="ignore"):
        want = np.where(clear, light, 0).sum(axis=0) / clear.sum(axis=0)
    stored = made([0, 1, 2])
    np.testing.assert_allclose((stored[known].astype(float) - 10_001) / 10_000, want[known], atol=2e-4)
    assert (stored[~known] == 0).all()
    assert (~known).any()
    np.testing.assert_array_equal(made([2, 0, 1]), stored)
