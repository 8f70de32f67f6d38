"""Computing lazy arrays one lattice block after another, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import dask
import dask.array as da
import numpy as np
from dask.array.optimization import optimize
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from dask.optimization import cull


def by_block(lazy: Mapping[str, da.Array], threads: int) -> dict[str, np.ndarray]:
    """Compute arrays of equal last two dimensions, one block of these after another, `threads` at a time.

    lazy : name -> array of the same chunks in its last two dimensions, and of one chunk in those before

    One graph over all blocks lets Dask read far ahead of what it reduces; memory would then grow with the tile, and
    with the order in which threads happen to run.
    """
    first = next(iter(lazy.values()))
    out = {name: np.empty(array.shape, array.dtype) for name, array in lazy.items()}
    row_ends, col_ends = (np.cumsum(sizes).tolist() for sizes in first.chunks[-2:])
    # optimised once for all blocks, of which each then takes its own branch: to optimise it for each of them took as
    # long as the work itself where that is light
    # all together: optimised one by one, each array would get a copy of the work that they share
    layers = HighLevelGraph.merge(*(array.__dask_graph__() for array in lazy.values()))
    graph = dict(optimize(layers, list(flatten([array.__dask_keys__() for array in lazy.values()]))))
    assert all(n == 1 for array in lazy.values() for n in array.numblocks[:-2])

    def one(row: int, col: int) -> None:
        keys = [(array.name, *(0,) * (array.ndim - 2), row, col) for array in lazy.values()]
        at = np.s_[
            ...,
            row_ends[row] - first.chunks[-2][row] : row_ends[row],
            col_ends[col] - first.chunks[-1][col] : col_ends[col],
        ]
        branch, _ = cull(graph, keys)
        for name, part in zip(lazy, dask.get(branch, keys), strict=True):
            out[name][at] = part

    places = [(row, col) for row in range(len(row_ends)) for col in range(len(col_ends))]
    if threads == 1:
        for place in places:
            one(*place)
        return out
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda place: one(*place), places))
    return out
