"""Splits: no ground in two parts, whatever the blocks, the shares and the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.models.card import FeatureSpec
from slidecube.models.errors import ModelError
from slidecube.models.patches import blocks_of
from slidecube.models.splits import Subset, cut_touching, join, share_out
from slidecube.pipeline.cube_patches import FixedPlaces, RandomCrops, Rooms
from slidecube.pipeline.sample import pixel_hash

SHARES = st.sampled_from([(0.7, 0.15, 0.15), (0.5, 0.5, 0.0), (1.0, 0.0, 0.0), (0.34, 0.33, 0.33)])


class Numbers:
    """Patches that are their own number."""

    features, units, resolution_m, patch_px = FeatureSpec(names=("n",)), ("1",), 10.0, 4

    def __init__(self, regions, first=0):
        self.regions, self.first = tuple(regions), first

    @property
    def digest(self):
        return f"{self.first} {self.regions}"

    def __len__(self):
        return len(self.regions)

    def read(self, index, *, seed=0):
        return np.full((1, 4, 4), self.first + index + 100 * seed, np.float32), np.zeros((4, 4), np.uint8)


@given(n=st.integers(0, 60), holding=st.integers(0, 60), shares=SHARES, seed=st.integers(0, 99))
def test_blocks_are_shared_by_shares_and_landslides_go_to_every_part(n, holding, shares, seed):
    place = np.arange(n)
    hashes, holds = pixel_hash(place, place, seed), place < holding
    parts = share_out(hashes, holds, shares)

    for kind in (True, False):
        counts = np.bincount(parts[holds == kind], minlength=3)
        wanted = np.array(shares) * (holds == kind).sum()
        assert (abs(counts - wanted) < 2).all()
        if (holds == kind).sum() >= 3:
            assert ((counts > 0) == (np.array(shares) > 0)).all()
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_array_equal(share_out(hashes[order], holds[order], shares), parts[order])


@settings(max_examples=60)  # scipy is imported by the first
@given(
    n=st.integers(1, 40),
    pairs=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60),
    shares=SHARES,
)
def test_patches_that_touch_are_never_in_two_parts(n, pairs, shares):
    touching = [(a, b) for a, b in pairs if a < b < n]
    place = np.arange(n)
    parts = cut_touching(touching, pixel_hash(place, place), shares)

    assert all(parts[a] == parts[b] or min(parts[a], parts[b]) == -1 for a, b in touching)
    assert set(np.flatnonzero(parts == -1)) <= {patch for pair in touching for patch in pair}
    if shares[2] == 0:
        assert 2 not in parts


def test_a_strip_of_touching_patches_loses_only_those_at_the_cuts():
    n = 100
    parts = cut_touching([(i, i + 1) for i in range(n - 1)], np.arange(n, dtype=np.uint64), (0.7, 0.2, 0.1))
    assert np.bincount(parts + 1).tolist() == [2, 69, 19, 10]


@settings(max_examples=60)
@given(
    px=st.sampled_from([32, 64, 100]),
    gap=st.integers(1, 40),
    extra=st.integers(0, 150),
    seed=st.integers(0, 10**6),
    halo=st.integers(0, 2),
)
def test_crops_of_two_blocks_never_meet_nor_do_what_their_features_look_at(px, gap, extra, seed, halo):
    side = px + 2 * gap + extra
    rooms = Rooms(bounds=(0, 5 * side, 0, 5 * side), side_px=side, gap_px=gap)
    drawn = np.random.default_rng(seed)
    pixels = drawn.integers(0, 5 * side, (200, 2))
    pixels = pixels[rooms.holds(pixels[:, 0], pixels[:, 1])]
    crops = RandomCrops(
        px=px,
        rooms=rooms,
        rows_k=pixels[:, 0],
        cols_k=pixels[:, 1],
        starts_n=np.arange(len(pixels)),
        ends_n=np.arange(len(pixels)) + 1,
        seed=seed,
    )
    places = np.array([crops.at(i, seed) for i in range(len(crops))]).reshape(-1, 2)

    assert (places <= pixels).all()
    assert (pixels < places + px).all()  # each holds its pixel
    block = places // side
    reach = min(halo, gap)  # neighbours that a slope or a filter looks at
    assert ((places - reach) // side == block).all()
    assert ((places + px - 1 + reach) // side == block).all()
    firsts = rooms.firsts(0, 5 * side, px)
    assert ((firsts - reach) // side == (firsts + px - 1 + reach) // side).all()
    assert (np.diff(firsts) >= px).all()  # fixed ones share no pixel


def test_a_crop_is_moved_by_the_seed_alone_and_reaches_every_place():
    rooms = Rooms(bounds=(0, 96, 0, 96))
    crops = RandomCrops(
        px=32,
        rooms=rooms,
        rows_k=np.array([50]),
        cols_k=np.array([95]),
        starts_n=np.array([0]),
        ends_n=np.array([1]),
        seed=3,
    )
    places = np.array([crops.at(0, seed) for seed in range(600)])

    assert crops.at(0, 7) == crops.at(0, 7)
    assert set(places[:, 0]) == set(range(19, 51))
    assert set(places[:, 1]) == {64}  # the room ends at 96
    fixed = FixedPlaces(rows_n=np.array([4]), cols_n=np.array([9]))
    assert fixed.at(0, 1) == fixed.at(0, 2) == (4, 9)


def test_joined_sets_read_like_their_members():
    whole = join([Numbers("aab"), Numbers(""), Numbers("bc", first=10)])

    assert [whole.read(i, seed=1)[0].max() for i in range(len(whole))] == [100, 101, 102, 110, 111]
    assert whole.regions == ("a", "a", "b", "b", "c")
    assert blocks_of(whole) == ("",) * 5, "none of them knows its place"
    placed = Numbers("de", first=20)
    placed.blocks = ("d 0 0", "e 0 1")
    assert blocks_of(Subset(of=join([whole, placed]), indices=(6, 0, 5))) == ("e 0 1", "", "d 0 0")
    with pytest.raises(IndexError):
        whole.read(5)
    assert len(join([], like=whole)) == 0


def test_sets_of_other_features_or_sizes_do_not_go_together():
    other = Numbers("a")
    other.patch_px = 8
    with pytest.raises(ModelError, match="patch_px"):
        join([Numbers("a"), other])
