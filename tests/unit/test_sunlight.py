"""The sun over a scene: where it stood, the light on slopes, and the shadow of ridges, against vectors and marching."""

from __future__ import annotations

import datetime as dt
import json

import numpy as np
import pytest
import scipy.ndimage
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from slidecube.catalog.scenes import Scene
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.masks import Sun, sun_of
from slidecube.pipeline.sunlight import (
    SHADOW_HALO_M,
    around_block,
    cast_shadow,
    cos_incidence,
    grid_azimuth,
    required_sun,
)
from slidecube.pipeline.terrain import aspect_from, horn_gradients, slope_from

BLOCK = GeoBox((128, 128), Affine(10, 0, 500_000 - 640, 0, -10, 5_000_640), "EPSG:32632")
"""On the zone's central meridian, where the grid's north is true north."""

AROUND = around_block(BLOCK)
suns = st.builds(Sun, elevation_deg=st.floats(10, 80), azimuth_deg=st.floats(0, 360, exclude_max=True))


def scene(**properties):
    return Scene(
        id="x", role="optical", source="s", datetime=dt.datetime(2020, 1, 1, tzinfo=dt.UTC), identity="i",
        datatake="", version="", offset=None, bands={}, item={"properties": properties},
    )  # fmt: skip


def places(geobox):
    """East and north of each pixel's centre from the middle of the block, metres."""
    rows, cols = np.mgrid[: geobox.shape[0], : geobox.shape[1]] + 0.5
    a = geobox.affine
    return a.c + a.a * cols - 500_000, a.f + a.e * rows - 5_000_000


def test_a_sun_that_is_not_said_is_asked_for():
    assert required_sun(scene(**{"view:sun_elevation": 40.0, "view:sun_azimuth": 150.0})) == Sun(
        elevation_deg=40.0, azimuth_deg=150.0
    )
    with pytest.raises(PipelineError, match=r"Item 'x' of 's' does not say where the sun stood"):
        required_sun(scene(**{"view:sun_elevation": 40.0}))


def test_real_items_say_it(shared_data):
    found = []
    for path in shared_data.glob("stac_items/**/*.json"):
        body = json.loads(path.read_text())
        items = body.get("features", [body]) if isinstance(body, dict) else []
        for item in items:
            properties = item.get("properties") or {}
            if any("sun" in key or "solar" in key for key in properties):
                found.append(sun_of(scene(**properties)))
    assert len(found) > 5
    assert all(sun is not None and 0 < sun.elevation_deg < 90 and 0 <= sun.azimuth_deg < 360 for sun in found)


@given(suns, st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
def test_light_on_a_plane_is_that_of_its_normal(sun, east, north):
    """Heights -> our slope and aspect -> cos i, against the scalar product of two vectors."""
    y, x = np.mgrid[:5, :5] * 10.0
    gradients = horn_gradients(1000 + east * x - north * y, 10.0, 10.0)
    light = cos_incidence(slope_from(*gradients), aspect_from(*gradients), sun)[2, 2]

    high, around = np.radians(sun.elevation_deg), np.radians(sun.azimuth_deg)
    towards = np.array([np.cos(high) * np.sin(around), np.cos(high) * np.cos(around), np.sin(high)])
    normal = np.array([-east, -north, 1.0]) / np.sqrt(1 + east**2 + north**2)
    assert abs(light - towards @ normal) < 1e-4


@given(suns)
def test_light_around_a_cone(sun):
    """A cone's aspect is the direction from its tip: light goes round as a cosine, and its mean is that of the tip."""
    aspect = np.arange(360, dtype=np.float32)
    light = cos_incidence(np.full(360, 30, np.float32), aspect, sun)
    z = np.radians(90 - sun.elevation_deg)
    assert abs(light.mean() - np.cos(z) * np.cos(np.radians(30))) < 1e-4
    assert abs(((aspect[light.argmax()] - sun.azimuth_deg) + 180) % 360 - 180) <= 0.51
    assert abs(light.max() - np.cos(z - np.radians(30))) < 1e-3


def test_flat_ground_and_unknown_ground():
    sun = Sun(elevation_deg=30.0, azimuth_deg=77.0)
    light = cos_incidence(np.array([0, np.nan], np.float32), np.array([np.nan, np.nan], np.float32), sun)
    assert light[0] == pytest.approx(0.5)
    assert np.isnan(light[1])


def test_grid_north_is_turned_by_the_convergence():
    far_east = GeoBox((2, 2), Affine(10, 0, 700_000, 0, -10, 5_000_000), "EPSG:32632")
    # 2.54 degrees east of the central meridian at 45 degrees north
    assert grid_azimuth(BLOCK, 100.0) == pytest.approx(100.0, abs=0.01)
    assert grid_azimuth(far_east, 100.0) == pytest.approx(100 - 2.54 * np.sin(np.radians(45.1)), abs=0.02)


@settings(max_examples=15)
@given(suns)
def test_a_gentle_cone_throws_no_shadow_and_a_steep_one_throws_it_away_from_the_sun(sun):
    x, y = places(AROUND)
    distance = np.hypot(x, y)
    gentle = 0.8 * np.tan(np.radians(sun.elevation_deg))
    low = np.maximum(0, 300 - gentle * distance).astype(np.float32)
    assert not cast_shadow(low, AROUND, BLOCK, sun).any()

    tower = np.where(distance < 150, 4 * 150 * np.tan(np.radians(sun.elevation_deg)), 0).astype(np.float32)
    dark = cast_shadow(tower, AROUND, BLOCK, sun)
    bx, by = places(BLOCK)
    turn = np.radians(sun.azimuth_deg)
    along = -(bx * np.sin(turn) + by * np.cos(turn))  # away from the sun
    across = np.abs(bx * np.cos(turn) - by * np.sin(turn))
    # 600 m of shadow from each point of its rim
    assert dark[(along > 200) & (along < 600) & (across < 60)].all()
    assert not dark[(along < -200) | (across > 230)].any()
    assert not dark[np.hypot(bx, by) < 60].any()  # its top


@settings(max_examples=10)
@given(suns, st.integers(0, 1000))
def test_shadow_is_that_of_a_march_towards_the_sun(sun, seed):
    """Against lines of sight that are followed step by step from every pixel of a rough land."""
    rng = np.random.default_rng(seed)
    land = scipy.ndimage.gaussian_filter(rng.normal(size=AROUND.shape), 6)
    heights = (1500 + land / land.std() * 250).astype(np.float32)
    dark = cast_shadow(heights, AROUND, BLOCK, sun)

    rows, cols = ((np.arange(128) + 0.5) / 4 - 0.5 + SHADOW_HALO_M / 40 for _ in range(2))
    r, c = np.meshgrid(rows, cols, indexing="ij")
    own = scipy.ndimage.map_coordinates(heights, [r, c], order=1)
    turn, rise = np.radians(sun.azimuth_deg), np.tan(np.radians(sun.elevation_deg))
    marched = np.zeros_like(dark)
    for step in np.arange(1, 240):
        there = scipy.ndimage.map_coordinates(
            heights, [r - step * np.cos(turn), c + step * np.sin(turn)], order=1, mode="nearest"
        )
        marched |= there > own + step * 40 * rise + 1
    assert (dark == marched).mean() > 0.97


def test_unknown_heights_and_a_sun_below_the_horizon():
    nothing = np.full(AROUND.shape, np.nan, np.float32)
    assert not cast_shadow(nothing, AROUND, BLOCK, Sun(elevation_deg=30.0, azimuth_deg=0.0)).any()
    assert cast_shadow(np.zeros_like(nothing), AROUND, BLOCK, Sun(elevation_deg=-1.0, azimuth_deg=0.0)).all()
