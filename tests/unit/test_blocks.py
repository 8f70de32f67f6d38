"""Blocks computed one after another: the values of the whole, and no work done twice."""

from __future__ import annotations

import collections

import dask.array as da
import numpy as np
import pytest

from slidecube.pipeline.blocks import by_block


@pytest.mark.parametrize("threads", [1, 3])
def test_arrays_made_of_one_another_are_computed_once(threads):
    seen = collections.Counter()

    def read(block_info=None):
        (y0, y1), (x0, x1) = block_info[None]["array-location"][1:]
        seen[y0, x0] += 1
        return np.arange(3)[:, None, None] * 100 + np.add.outer(np.arange(y0, y1) * 10, np.arange(x0, x1))

    stack = da.map_blocks(
        read, chunks=((3,), (2, 2, 1), (4, 3)), dtype=np.int64, meta=np.empty((0, 0, 0), np.int64)
    )
    sums = stack.map_blocks(lambda block: block + 1, dtype=np.int64)
    whole = np.arange(3)[:, None, None] * 100 + np.add.outer(np.arange(5) * 10, np.arange(7)) + 1

    found = by_block({"all": sums, **{str(i): sums[i] for i in range(3)}}, threads)

    assert np.array_equal(found["all"], whole)
    assert all(np.array_equal(found[str(i)], whole[i]) for i in range(3))
    assert set(seen.values()) == {1}
    assert len(seen) == 6


@pytest.mark.parametrize("threads", [1, 3])
def test_an_array_of_few_numbers_a_block_lies_beside_one_of_pixels(threads):
    pixels = da.from_array(np.arange(35).reshape(5, 7), chunks=((2, 2, 1), (4, 3)))
    sums = pixels.map_blocks(
        lambda block: block.sum(keepdims=True)[None],
        dtype=np.int64,
        new_axis=0,
        chunks=((1,), (1,) * 3, (1,) * 2),
    )
    found = by_block({"pixels": pixels, "sums": sums}, threads)
    assert np.array_equal(found["pixels"], np.arange(35).reshape(5, 7))
    assert found["sums"].shape == (1, 3, 2)
    assert found["sums"][0, 2, 1] == 32 + 33 + 34
    with pytest.raises(AssertionError, match="different blocks"):
        by_block({"pixels": pixels, "fewer": sums[:, :2]}, threads)
