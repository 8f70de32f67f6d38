"""The sample: the same pixels whatever the tiles, evenly spread, and their patches as they lie."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.pipeline.sample import Sample, draw, limit_of, pixel_hash
from slidecube.pipeline.sample import gather as gather_files

SIDE, CONTEXT = 64, 3


def world(seed=0, *, holes=0.1):
    """Two features over a window with its context, and which pixels may be centres."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2, SIDE + 2 * CONTEXT, SIDE + 2 * CONTEXT)).astype(np.float32)
    features[:, rng.random(features.shape[1:]) < holes] = np.nan
    core = features[:, CONTEXT:-CONTEXT, CONTEXT:-CONTEXT]
    return features, np.isfinite(core).all(axis=0)


def gather(parts, patches):
    """Through the disk, as the fit does."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.npz" for i in range(len(parts))]
        for part, path in zip(parts, paths, strict=True):
            part.save(path)
        return gather_files(paths, patches)


def in_tiles(features, eligible, tile_px, *, limit, seed=0, first=(1_000, 70_000)):
    """Draw tile by tile, as workers do."""
    parts = []
    for r in range(0, SIDE, tile_px):
        for c in range(0, SIDE, tile_px):
            at = np.s_[r : r + tile_px, c : c + tile_px]
            around = np.s_[:, r : r + tile_px + 2 * CONTEXT, c : c + tile_px + 2 * CONTEXT]
            parts.append(
                draw(
                    features[around],
                    eligible[at],
                    first_px=(first[0] + r, first[1] + c),
                    limit=limit,
                    seed=seed,
                )
            )
    return parts


@settings(max_examples=25)
@given(st.sampled_from([8, 16, 32]), st.integers(0, 2**32 - 1), st.integers(1, 3_000), st.randoms())
def test_tiles_and_their_order_change_nothing(tile_px, seed, patches, shuffle):
    features, eligible = world()
    limit = limit_of(patches, int(eligible.sum()))
    whole = gather(in_tiles(features, eligible, SIDE, limit=limit, seed=seed), patches)
    parts = in_tiles(features, eligible, tile_px, limit=limit, seed=seed)
    shuffle.shuffle(parts)

    joined = gather(parts, patches)

    for name in Sample.__slots__:
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


def test_patches_are_what_lies_around_the_pixel():
    features, eligible = world()
    first = (4_096, 8_192)

    drawn = draw(features, eligible, first_px=first, limit=2**64 - 1, seed=0)

    assert len(drawn.hash_n) == eligible.sum()
    for i in range(0, len(drawn.hash_n), 97):
        y, x = drawn.row_n[i] - first[0], drawn.col_n[i] - first[1]
        assert eligible[y, x]
        np.testing.assert_array_equal(drawn.patches_nfyx[i], features[:, y : y + 7, x : x + 7])
    assert np.isfinite(drawn.patches_nfyx[:, :, CONTEXT, CONTEXT]).all()
    assert np.isnan(drawn.patches_nfyx).any(), "holes in the surroundings stay"


def test_the_limit_yields_a_few_more_than_wanted():
    rows, cols = np.arange(500)[:, None], np.arange(400)[None, :]
    hashes = pixel_hash(rows, cols)
    for wanted in (500, 5_000, 50_000):
        candidates = (hashes <= np.uint64(limit_of(wanted, hashes.size))).sum()
        assert wanted * 1.1 < candidates < wanted * 1.4
    assert (hashes <= np.uint64(limit_of(10**9, hashes.size))).all(), "more than there are: all of them"


def test_the_hash_is_even_and_never_the_same_twice():
    hashes = pixel_hash(np.arange(1_000)[:, None], np.arange(1_000)[None, :])
    assert np.unique(hashes).size == hashes.size
    unit = hashes / 2.0**64
    assert abs(unit.mean() - 0.5) < 0.002
    # neither rows nor columns, nor neighbours, go together
    for a, b in ((unit[:-1], unit[1:]), (unit[:, :-1], unit[:, 1:]), (unit[:-1, :-1], unit[1:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.005
    low = unit < 0.01
    assert low.reshape(10, 100, 10, 100).sum(axis=(1, 3)).std() < 3 * np.sqrt(100), (
        "spread like dice, not in lumps"
    )


def test_another_seed_chooses_other_pixels():
    rows, cols = np.arange(300)[:, None], np.arange(300)[None, :]
    one, two = (pixel_hash(rows, cols, seed) < 2**60 for seed in (0, 1))
    assert (one & two).sum() < 0.2 * one.sum()


@pytest.mark.parametrize("patches", [0, 1, 700])
def test_it_survives_the_disk(tmp_path, patches):
    features, eligible = world()
    drawn = gather([draw(features, eligible, first_px=(0, 0), limit=2**64 - 1, seed=0)], patches)
    drawn.save(tmp_path / "sample.npz")

    back = Sample.read(tmp_path / "sample.npz")

    assert len(back.hash_n) == patches
    for name in Sample.__slots__:
        one, two = getattr(back, name), getattr(drawn, name)
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
