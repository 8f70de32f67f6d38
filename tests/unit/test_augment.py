"""Varied patches beside what geometry says: four turns are none, directions turn with the ground, labels follow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from slidecube.models.augment import (
    augmented,
    can_turn,
    clouded,
    flipped_turned,
    is_optical,
    is_radar,
    jittered,
    mirrored,
    turned,
    with_scar,
)
from slidecube.models.errors import ModelError
from slidecube.models.patches import IGNORE, LANDSLIDE, STABLE, UNLABELLED
from slidecube.models.train_settings import AugmentSettings
from slidecube.pipeline.features import FEATURES

NAMES = ("B04_pre", "B04_post", "dndvi", "vv_post", "slope_deg", "aspect_deg", "eastness", "northness")
SIDE = 24
seeds = st.integers(0, 2**32 - 1)


def patch(seed, *, side=SIDE):
    """A patch with unknown pixels, two landslides, and all kinds of labels; its aspect is that of its own parts."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(NAMES), side, side)).astype(np.float32)
    x[4] = 25 + rng.normal(size=(side, side))
    x[5] = rng.uniform(0, 360, (side, side))
    x[6], x[7] = np.sin(np.radians(x[5])), np.cos(np.radians(x[5]))
    x[:, rng.random((side, side)) < 0.05] = np.nan
    x[0, rng.random((side, side)) < 0.05] = np.nan
    y = np.zeros((side, side), np.uint8)
    y[3:7, 4:9] = LANDSLIDE
    y[15:17, 12:20] = LANDSLIDE
    y[20:, :3] = UNLABELLED
    y[:2, -3:] = IGNORE
    return x, y


def all_of(seed, chosen):
    x, y = patch(seed)
    rng = np.random.default_rng(seed)
    return augmented(x, y, NAMES, rng, settings=chosen, donor=lambda r: patch(int(r.integers(100))))


EVERYTHING = AugmentSettings(jitter_gain=0.1, jitter_offset=0.1, clouds=0.7, scars=0.7)


# --- turns and mirrors -------------------------------------------------------------------------------------------


def heights(side=40):
    y, x = np.mgrid[:side, :side].astype(float)
    return 30 * np.sin(x / 7) + 20 * np.cos(y / 5 + x / 11) + 3 * x - 2 * y


def terrain(z):
    """Aspect, eastness and northness of heights by finite differences: downhill, rows run south."""
    south, east = np.gradient(-z)
    size = np.hypot(south, east)
    aspect = np.degrees(np.arctan2(east, -south)) % 360
    return np.stack([aspect, east / size, -south / size]).astype(np.float32)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize("mirror", [False, True])
def test_terrain_turned_is_the_terrain_of_turned_heights(quarters, mirror):
    names = ("aspect_deg", "eastness", "northness")
    z = heights()
    want = terrain(np.rot90(z[:, ::-1] if mirror else z, quarters))

    found = terrain(z)
    found = turned(mirrored(found, names) if mirror else found, names, quarters)

    apart = (found[0] - want[0] + 180) % 360 - 180
    assert np.abs(apart).max() < 1e-3
    assert (found[0] >= 0).all()
    assert (found[0] < 360).all()
    np.testing.assert_allclose(found[1:], want[1:], atol=1e-6)


@given(seeds)
def test_four_turns_and_two_mirrors_are_none(seed):
    x, _ = patch(seed)
    four = x
    for _ in range(4):
        four = turned(four, NAMES, 1)
    two = mirrored(mirrored(x, NAMES), NAMES)

    plain = [i for i, name in enumerate(NAMES) if name != "aspect_deg"]
    for found in (four, two):
        np.testing.assert_array_equal(found[plain], x[plain])
        apart = np.abs((found[5] - x[5] + 180) % 360 - 180)
        assert np.nanmax(apart) < 1e-3
        np.testing.assert_array_equal(np.isnan(found[5]), np.isnan(x[5]))
    np.testing.assert_array_equal(turned(x, NAMES, 4), x)


@given(seeds)
def test_flipped_and_turned_keeps_each_pixel_with_its_label(seed):
    x, y = patch(seed)
    x[0] = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    x_new, y_new = flipped_turned(x, y, NAMES, np.random.default_rng(seed))

    np.testing.assert_array_equal(y_new, y.ravel()[x_new[0].astype(int)])
    np.testing.assert_array_equal(x_new[1], x[1].ravel()[x_new[0].astype(int)])
    np.testing.assert_array_equal(np.sort(x_new[0].ravel()), x[0].ravel())


def test_all_eight_ways_come_equally_often_and_none_where_it_is_switched_off():
    x, y = patch(0)
    x[0] = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    rng = np.random.default_rng(0)

    def ways(**switches):
        found = [flipped_turned(x, y, NAMES, rng, **switches)[0][0, :2, :2].tobytes() for _ in range(400)]
        return np.unique(found, return_counts=True)[1]

    assert len(ways()) == 8
    assert ways().min() > 25
    assert len(ways(flips=False)) == 4
    assert len(ways(turns=False)) == 2
    assert len(ways(flips=False, turns=False)) == 1


def test_half_of_a_direction_is_never_turned_by_a_quarter():
    names = ("northness",)
    x, y = patch(0)
    assert can_turn(NAMES)
    assert not can_turn(names)
    with pytest.raises(ValueError, match="northness cannot be turned"):
        turned(x[7:], names, 1)
    np.testing.assert_array_equal(turned(x[7:], names, 2)[0], -x[7, ::-1, ::-1])
    for seed in range(20):
        found, _ = flipped_turned(x[7:], y, names, np.random.default_rng(seed))
        ways = [x[7], x[7, :, ::-1], -x[7, ::-1, ::-1], -x[7, ::-1]]
        assert any(np.array_equal(found[0], way, equal_nan=True) for way in ways)


# --- what is seen by which sensor --------------------------------------------------------------------------------


def test_optical_and_radar_are_told_by_name_as_the_table_of_features_reads_them():
    for name, feature in FEATURES.items():
        layers = {one.split(".")[0] for one in feature.reads}
        assert is_optical(name) == bool(layers & {"pre", "post"}), name
        backscatter = bool(layers & {"radar_pre", "radar_post"}) and feature.unit == "dB"
        assert is_radar(name) == backscatter, name
    for name in ("B8A_pre", "B12_post", "mnf3_change", "l4s_B10"):
        assert is_optical(name)
    for name in ("geology", "distance_to_road_m", "l4s_slope"):
        assert not is_optical(name)
        assert not is_radar(name)


@given(seeds)
def test_jitter_is_a_line_of_each_optical_feature_and_leaves_all_else(seed):
    x, y = patch(seed)
    x_new, y_new = jittered(x, y, NAMES, np.random.default_rng(seed), gain=0.2, offset=0.1)

    np.testing.assert_array_equal(x_new[3:], x[3:])
    np.testing.assert_array_equal(y_new, y)
    for i in range(3):
        known = np.isfinite(x[i])
        np.testing.assert_array_equal(np.isfinite(x_new[i]), known)
        slope, level = np.polyfit(x[i][known], x_new[i][known], 1)
        np.testing.assert_allclose(x_new[i][known], slope * x[i][known] + level, atol=1e-4)
        assert abs(slope - 1) + abs(level) > 1e-6


@given(seeds)
def test_a_cloud_hides_optical_features_and_is_not_observable(seed):
    x, y = patch(seed)
    x_new, y_new = clouded(x, y, NAMES, np.random.default_rng(seed))

    hidden = np.isnan(x_new[:3]) & ~np.isnan(x[:3])
    np.testing.assert_array_equal(x_new[3:], x[3:])
    assert 0.02 < hidden.any(axis=0).mean() < 0.42
    assert (y_new[hidden.any(axis=0)] == IGNORE).all()
    np.testing.assert_array_equal(y_new[y_new != IGNORE], y[y_new != IGNORE])
    assert hidden[2].any(), "what compares two images loses either"
    pieces = ndimage.label(np.isnan(x_new[2]) & (y_new == IGNORE))[1]
    assert pieces < 0.1 * SIDE * SIDE, "it is smooth"


def test_a_cloud_covers_the_image_before_or_after_or_both():
    x, y = patch(3)
    ways = set()
    for seed in range(40):
        x_new, _ = clouded(x, y, NAMES, np.random.default_rng(seed))
        ways.add(tuple(bool((np.isnan(x_new[i]) & ~np.isnan(x[i])).any()) for i in (0, 1)))
    assert ways == {(True, False), (False, True), (True, True)}
    x_new, y_new = clouded(x[3:], y, NAMES[3:], np.random.default_rng(0))
    np.testing.assert_array_equal(x_new, x[3:])
    np.testing.assert_array_equal(y_new, y, "radar looks through it")


# --- scars -------------------------------------------------------------------------------------------------------


def ground(value, *, slope=25.0, side=48):
    x = np.full((len(NAMES), side, side), value, np.float32)
    x[4] = slope
    return x, np.zeros((side, side), np.uint8)


def scar(*, slope=25.0):
    x, y = ground(1.0, slope=slope)
    y[20:28, 20:30] = LANDSLIDE
    return x, y


@settings(deadline=None)
@given(seeds)
def test_a_scar_is_copied_whole_with_soft_edges_and_the_terrain_stays(seed):
    x, y = ground(0.0)
    x_new, y_new = with_scar(x, y, NAMES, np.random.default_rng(seed), donor=scar())

    rows, cols = np.nonzero(y_new == LANDSLIDE)
    assert len(rows) == 80
    assert (np.ptp(rows) + 1, np.ptp(cols) + 1) == (8, 10)
    inner = ndimage.binary_erosion(y_new == LANDSLIDE)
    assert (x_new[:4, inner] == 1).all()
    assert (x_new[:4, y_new == LANDSLIDE] >= 0.5).all()
    assert (x_new[:4, y_new == STABLE] < 0.5).all()
    assert ((x_new[:4] > 0) & (x_new[:4] < 1)).any(), "its edge is soft"
    np.testing.assert_array_equal(x_new[4:], x[4:])


def test_a_scar_comes_only_onto_stable_ground_of_a_similar_slope():
    x, y = ground(0.0)
    steep_x, steep_y = ground(0.0)
    steep_x[4, :, :24] = 2.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert not (with_scar(*ground(0.0, slope=2.0), NAMES, rng, donor=scar())[1] == LANDSLIDE).any()
        found = with_scar(steep_x, steep_y, NAMES, rng, donor=scar())[1]
        assert (steep_x[4][found == LANDSLIDE] == 25).mean() > 0.5 if (found == LANDSLIDE).any() else True
        unobserved = np.full_like(y, IGNORE)
        np.testing.assert_array_equal(with_scar(x, unobserved, NAMES, rng, donor=scar())[1], unobserved)
        np.testing.assert_array_equal(with_scar(x, y, NAMES, rng, donor=ground(1.0))[0], x)


@settings(deadline=None)
@given(seeds)
def test_a_scar_comes_onto_ground_that_nobody_labelled_too(seed):
    x, y = ground(0.0)
    unlabelled = np.full_like(y, UNLABELLED)
    x_new, y_new = with_scar(x, unlabelled, NAMES, np.random.default_rng(seed), donor=scar())
    x_stable, y_stable = with_scar(x, y, NAMES, np.random.default_rng(seed), donor=scar())
    assert (y_new == LANDSLIDE).sum() == 80
    np.testing.assert_array_equal(x_new, x_stable)
    np.testing.assert_array_equal(y_new, np.where(y_stable == LANDSLIDE, y_stable, UNLABELLED))


# --- all of them -------------------------------------------------------------------------------------------------


@given(seeds)
def test_nothing_unknown_becomes_known_and_nothing_given_is_written_to(seed):
    x, y = patch(seed)
    before_x, before_y = x.copy(), y.copy()
    rng = np.random.default_rng(seed)
    jitter = AugmentSettings(
        flips=False, turns=False, jitter_gain=0.1, jitter_offset=0.1, clouds=0.7, scars=1
    )

    x_new, y_new = augmented(x, y, NAMES, rng, settings=jitter, donor=lambda r: patch(int(r.integers(9))))

    assert np.isnan(x_new[np.isnan(x)]).all()
    assert (y_new[y == IGNORE] == IGNORE).all()
    assert (y_new[y == UNLABELLED] != STABLE).all()
    np.testing.assert_array_equal(x, before_x)
    np.testing.assert_array_equal(y, before_y)


@given(seeds)
def test_it_follows_from_its_random_numbers_alone(seed):
    one, other = all_of(seed, EVERYTHING), all_of(seed, EVERYTHING)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    assert one[0].shape == (len(NAMES), SIDE, SIDE)
    assert one[0].dtype == np.float32
    assert one[1].dtype == np.uint8


def test_all_switched_off_is_the_patch_itself():
    x, y = patch(5)
    off = AugmentSettings(flips=False, turns=False)
    found = all_of(5, off)
    np.testing.assert_array_equal(found[0], x)
    np.testing.assert_array_equal(found[1], y)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"clouds": 1.5}, "clouds = 1.5 is not allowed; a share"), ({"jitter_gain": -1}, "jitter_gain = -1 is")],
)
def test_settings_that_mean_nothing_are_one_line(settings, says):
    with pytest.raises(ModelError, match=says):
        AugmentSettings(**settings)
