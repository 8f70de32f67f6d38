"""The radar's geometry against real footprints, analytic planes and cones, and what may never change it."""

from __future__ import annotations

import json

import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.radar_geometry import (
    INCIDENCE_RANGE_DEG,
    SlopeAngles,
    Track,
    block_geometry,
    layover_and_shadow,
    local_incidence_deg,
    padded,
    slope_angles,
    slope_factor,
    view,
)

DESCENDING = Track(relative_orbit=124, orbit_state="descending")
ASCENDING = Track(relative_orbit=103, orbit_state="ascending")
UTM32 = "EPSG:32632"
angles = st.floats(-60, 60)


def box(px=256, resolution_m=10.0):
    """Blocks on Sao Tome, which both tracks see at about 40 degrees."""
    return GeoBox((px, px), Affine(resolution_m, 0, 232_000, 0, -resolution_m, 30_000), UTM32)


def xy(geobox):
    col, row = np.meshgrid(np.arange(geobox.shape[1]) + 0.5, np.arange(geobox.shape[0]) + 0.5)
    a = geobox.affine
    return a.a * col + a.c, a.e * row + a.f


# --- the orbit, against real items -------------------------------------------------------------------------------


def real_items(shared_data):
    for name in (
        "stac_geoparquet/sentinel-1-rtc-pc.json",
        "pystac_client_cassettes/earthsearch_sentinel-1-grd.json",
    ):
        found = json.loads((shared_data / "stac_items" / name).read_text(encoding="utf-8"))
        yield from found["features"] if isinstance(found, dict) else found


def test_swaths_of_real_items_begin_and_end_where_the_instrument_s_do(shared_data):
    """Sub-swaths IW1 to IW3 see incidences of 29.2..30.9 to 44.3..46.0 degrees, by the height of the orbit."""
    seen = 0
    for item in real_items(shared_data):
        said = item["properties"]
        ring = np.array(item["geometry"]["coordinates"][0], float).reshape(-1, 2)
        track = Track(relative_orbit=said["sat:relative_orbit"], orbit_state=said["sat:orbit_state"])
        found = view(track, ring[:, 0], ring[:, 1]).incidence_deg
        assert 29.2 - 0.3 < found.min() < 30.9 + 0.3, item["id"]
        assert 44.3 - 0.3 < found.max() < 46.0 + 0.3, item["id"]
        seen += 1
    assert seen == 7


def test_flight_and_swath_of_a_real_image_are_those_of_its_control_points(shared_data):
    folder = shared_data / "sentinel_cogs/sentinel-s1-l1c/GRD/2018/7/16/IW/DV"
    (path,) = folder.glob("*022812*/measurement/iw-vv.tiff")
    with rasterio.open(path) as source:
        points, _ = source.gcps
    near = sorted((p for p in points if p.col == 0), key=lambda p: p.row)
    far = sorted((p for p in points if p.col == max(q.col for q in points)), key=lambda p: p.row)
    azimuth, _, _ = pyproj.Geod(ellps="WGS84").inv(near[0].x, near[0].y, near[-1].x, near[-1].y)

    track = Track(relative_orbit=(22812 - 73) % 175 + 1, orbit_state="descending")
    seen = view(track, np.array([near[0].x, far[0].x]), np.array([near[0].y, far[0].y]))

    assert seen.heading_deg[0] == pytest.approx(azimuth % 360, abs=0.3)
    assert seen.incidence_deg[0] == pytest.approx(30.4, abs=0.4)
    assert seen.incidence_deg[1] == pytest.approx(46.0, abs=0.4)


def test_looks_to_the_right_of_the_flight_and_nothing_lies_to_its_left():
    for track in (DESCENDING, ASCENDING):
        seen = view(track, np.array(6.6), np.array(0.25))
        assert float((seen.look_azimuth_deg - seen.heading_deg) % 360) == pytest.approx(90, abs=0.5)
        assert INCIDENCE_RANGE_DEG[0] < float(seen.incidence_deg) < INCIDENCE_RANGE_DEG[1]
    east, west = view(DESCENDING, np.array([20.0, 6.6]), np.array([0.25, 0.25])).incidence_deg
    assert east < 0 < west


def test_an_orbit_that_does_not_exist_is_refused():
    with pytest.raises(PipelineError, match="Relative orbit 176 does not exist; 1 to 175"):
        Track(relative_orbit=176, orbit_state="ascending")


# --- local incidence: planes and a cone --------------------------------------------------------------------------


def test_flat_ground_is_seen_under_the_incidence_itself():
    flat = slope_angles(np.zeros(3), np.full(3, np.nan), 100.0)
    np.testing.assert_allclose(local_incidence_deg(np.array([30.0, 38, 45]), flat), [30, 38, 45], atol=1e-6)


@pytest.mark.parametrize(("slope", "want"), [(20.0, 19.0), (39.0, 0.0), (50.0, 11.0)])
def test_planes_that_face_the_radar_and_that_face_away(slope, want):
    look = 100.0
    towards = slope_angles(np.array([slope]), np.array([look + 180 - 360]), look)
    away = slope_angles(np.array([slope]), np.array([look]), look)

    np.testing.assert_allclose(local_incidence_deg(39.0, towards), want, atol=1e-6)
    np.testing.assert_allclose(local_incidence_deg(39.0, away), 39 + slope, atol=1e-6)


@settings(max_examples=60)
@given(st.floats(0, 80), st.floats(0, 360), st.floats(0, 360), st.floats(20, 50))
def test_local_incidence_is_the_angle_of_two_vectors_whatever_turns_both(slope, aspect, look, theta):
    found = float(local_incidence_deg(theta, slope_angles(np.array(slope), np.array(aspect), look)))

    s, a, t = (np.radians(v) for v in (slope, aspect, theta))
    back = np.radians(look + 180)
    normal = [np.sin(s) * np.sin(a), np.sin(s) * np.cos(a), np.cos(s)]
    sight = [np.sin(t) * np.sin(back), np.sin(t) * np.cos(back), np.cos(t)]
    assert found == pytest.approx(np.degrees(np.arccos(np.clip(np.dot(normal, sight), -1, 1))), abs=1e-4)
    turned = local_incidence_deg(theta, slope_angles(np.array(slope), np.array(aspect + 77), look + 77))
    assert found == pytest.approx(float(turned), abs=1e-4)


@pytest.mark.parametrize("track", [DESCENDING, ASCENDING], ids=["descending", "ascending"])
def test_a_cone_on_the_grid(track):
    """Every aspect at one slope: the local incidence of each pixel, and layover only where the cone is too steep."""
    geobox, steep = box(), 55.0
    x, y = xy(geobox)
    dx, dy = x - x.mean(), y - y.mean()
    wide = padded(geobox)
    wx, wy = xy(wide)
    top = 300.0
    heights = np.maximum(top - np.tan(np.radians(steep)) * np.hypot(wx - x.mean(), wy - y.mean()), 0)
    on = np.hypot(dx, dy) * np.tan(np.radians(steep)) < top
    slope = np.where(on, steep, 0.0)
    aspect = np.where(on, np.degrees(np.arctan2(dx, dy)) % 360, np.nan)
    z = np.maximum(top - np.tan(np.radians(steep)) * np.hypot(dx, dy), 0)

    found = block_geometry(track, geobox, np.stack([z, slope, aspect]), heights)

    lon, lat = pyproj.Transformer.from_crs(UTM32, 4326, always_xy=True).transform(x, y)
    seen = view(track, lon, lat)
    back, theta = np.radians(seen.look_azimuth_deg + 180), np.radians(seen.incidence_deg)
    normal = np.stack([np.where(on, np.sin(np.radians(steep)) * d / np.hypot(dx, dy), 0) for d in (dx, dy)])
    up = np.where(on, np.cos(np.radians(steep)), 1)
    cosine = np.sin(theta) * (normal[0] * np.sin(back) + normal[1] * np.cos(back)) + np.cos(theta) * up
    np.testing.assert_allclose(found.local_incidence_deg, np.degrees(np.arccos(cosine)), atol=0.01)
    active = found.slopes.range_deg > found.incidence_deg + 4
    assert active.sum() > 100
    assert found.layover[active].mean() > 0.98  # a pixel of the coarser lines at the cone's foot and ridge
    far = np.hypot(dx, dy) > 2.2 * top
    assert not found.layover[far].any()
    assert not found.shadow[far].any()


def test_layover_and_shadow_of_a_wedge_are_as_long_as_geometry_says():
    """A ridge on a line: what folds onto it lies H / tan(theta) before its top; its shadow ends H tan(theta) behind."""
    spacing, theta, top, front, back = 1.0, 40.0, 200.0, 60.0, 70.0
    s = np.arange(-1500, 1501) * spacing
    z = np.maximum(top - np.where(s < 0, np.tan(np.radians(front)), np.tan(np.radians(back))) * np.abs(s), 0)

    layover, shadow = layover_and_shadow(z[None], spacing, incidence_deg=theta)

    first, last = s[layover[0]].min(), s[layover[0]].max()
    assert first == pytest.approx(-top / np.tan(np.radians(theta)), abs=2)
    foot = -top / np.tan(np.radians(front))
    # behind the ridge: as far as the foot's slant range reaches on the back slope
    behind = (top * np.cos(np.radians(theta)) + foot * np.sin(np.radians(theta))) / (
        np.sin(np.radians(theta)) + np.tan(np.radians(back)) * np.cos(np.radians(theta))
    )
    assert last == pytest.approx(max(behind, 0), abs=3)
    assert s[shadow[0]].max() == pytest.approx(top * np.tan(np.radians(theta)), abs=3)
    assert s[shadow[0]].min() > 0


@settings(max_examples=30)
@given(st.floats(-49, 38), st.floats(25, 48))
def test_no_plane_gentler_than_the_view_folds_or_hides(slope, theta):
    """A plane lies in layover as a whole where it is steeper than the incidence, in shadow beyond 90 less it."""
    z = np.tan(np.radians(slope)) * np.arange(-200, 201) * 10.0
    layover, shadow = layover_and_shadow(z[None], 10.0, incidence_deg=theta)
    if abs(slope - theta) > 1:
        assert layover[0, 1:-1].all() == (slope > theta)
        assert layover[0, 1:-1].any() == (slope > theta)
    if abs(slope + 90 - theta) > 1:
        assert shadow[0, 1:].any() == (slope < theta - 90)


def test_unknown_heights_are_neither():
    z = np.zeros((1, 50))
    z[0, 10:20] = np.nan
    layover, shadow = layover_and_shadow(z, 10.0, incidence_deg=38.0)
    assert not layover.any()
    assert not shadow.any()


def test_a_block_is_cut_out_of_a_larger_one_with_the_same_masks():
    """The halo is wide enough: what a block says does not depend on what else is computed with it."""
    rng = np.random.default_rng(0)
    wide = padded(box(512))
    wx, wy = xy(wide)
    waves = [(rng.uniform(300, 900), rng.uniform(0, 2 * np.pi)) for _ in range(8)]

    def ground(x, y):
        return sum(350 * np.sin((x * np.cos(a) + y * np.sin(a)) / w) for w, a in waves) + 500

    whole = block_geometry(DESCENDING, box(512), np.zeros((3, 512, 512)), ground(wx, wy))
    part_box = box(512)[128:384, 128:384]
    px, py = xy(padded(part_box))
    part = block_geometry(DESCENDING, part_box, np.zeros((3, 256, 256)), ground(px, py))

    for name in ("layover", "shadow"):
        one, two = getattr(whole, name)[128:384, 128:384], getattr(part, name)
        assert (one != two).mean() < 0.01  # the lines run through other points
        assert one.mean() == pytest.approx(two.mean(), abs=0.003)
    assert whole.layover.any()


# --- the correction of slopes ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(angles, angles, st.floats(25, 48), st.sampled_from(["volume", "surface"]))
def test_correction_is_the_paper_s_formula_and_one_on_flat_ground(range_deg, azimuth_deg, theta, model):
    # on the very edge of what is defined, the last digit of an angle in radians decides
    assume(min(abs(range_deg - theta), abs(range_deg - theta + 90)) > 1e-9)
    slopes = SlopeAngles(range_deg=np.array(range_deg), azimuth_deg=np.array(azimuth_deg))
    found = float(slope_factor(theta, slopes, model))

    if range_deg >= theta or range_deg <= theta - 90:
        assert np.isnan(found)
        return
    r, az, e = (np.radians(v) for v in (range_deg, azimuth_deg, 90 - theta))
    want = np.tan(e + r) / np.tan(e) if model == "volume" else np.cos(e) / (np.cos(az) * np.cos(e + r))
    assert found == pytest.approx(want * np.cos(np.radians(theta)), rel=1e-9)
    flat = SlopeAngles(range_deg=np.array(0.0), azimuth_deg=np.array(0.0))
    assert float(slope_factor(theta, flat, model)) == pytest.approx(np.cos(np.radians(theta)))


def test_corrected_slopes_are_as_bright_as_flat_ground():
    """Slopes lit by the surface model's own law: after the correction no aspect is left."""
    aspect = np.arange(0, 360, 15.0)
    slopes = slope_angles(np.full(aspect.shape, 25.0), aspect, 280.0)
    lit = 0.1 * slope_factor(39.0, slopes, "surface")

    np.testing.assert_allclose(lit / slope_factor(39.0, slopes, "surface"), 0.1)
    facing, averted = lit[np.argmax(slopes.range_deg)], lit[np.argmin(slopes.range_deg)]
    assert facing > 2 * averted
