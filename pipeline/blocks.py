"""Lattice blocks: computing lazy arrays one after another, in bounded memory, and which scenes touch them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import dask
import dask.array as da
import numpy as np
from dask.array.optimization import optimize
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from dask.optimization import cull
from odc.geo.geobox import GeoBox

from slidecube.catalog.load import on_lattice
from slidecube.catalog.scenes import Scene, SceneTable


def by_block(lazy: Mapping[str, da.Array], threads: int) -> dict[str, np.ndarray]:
    """Compute arrays of the same blocks, one block after another, `threads` at a time.

    lazy : name -> array of as many chunks in its last two dimensions as the others, and of one chunk in those before;
        a block may hold pixels in one and a few numbers in another

    One graph over all blocks lets Dask read far ahead of what it reduces; memory would then grow with the tile, and
    with the order in which threads happen to run.
    """
    out = {name: np.empty(array.shape, array.dtype) for name, array in lazy.items()}
    edges = {
        name: [[0, *np.cumsum(sizes).tolist()] for sizes in array.chunks[-2:]] for name, array in lazy.items()
    }
    (rows, cols), *others = {array.numblocks[-2:] for array in lazy.values()}
    assert not others, "arrays of different blocks"
    # optimised once for all blocks, of which each then takes its own branch: to optimise it for each of them took as
    # long as the work itself where that is light
    # all together: optimised one by one, each array would get a copy of the work that they share
    layers = HighLevelGraph.merge(*(array.__dask_graph__() for array in lazy.values()))
    graph = dict(optimize(layers, list(flatten([array.__dask_keys__() for array in lazy.values()]))))
    assert all(n == 1 for array in lazy.values() for n in array.numblocks[:-2])

    def one(row: int, col: int) -> None:
        keys = [(array.name, *(0,) * (array.ndim - 2), row, col) for array in lazy.values()]
        branch, _ = cull(graph, keys)
        for name, part in zip(lazy, dask.get(branch, keys), strict=True):
            down, right = edges[name]
            out[name][..., down[row] : down[row + 1], right[col] : right[col + 1]] = part

    places = [(row, col) for row in range(rows) for col in range(cols)]
    if threads == 1:
        for place in places:
            one(*place)
        return out
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda place: one(*place), places))
    return out


def touching(scenes: Sequence[Scene], geobox: GeoBox, blocks: da.Array, block_px: int) -> np.ndarray:
    """Which scene's footprint touches which block: (t, rows of blocks, columns of blocks) bool.

    A scene is read on a tile when its footprint touches the tile. Pixels beyond the footprint may exist; taking them
    where the tile is large and not where it is small would make the result depend on the tiling.
    """
    row_ends, col_ends = (np.cumsum(sizes).tolist() for sizes in blocks.chunks[1:])
    boxes = [
        on_lattice(geobox[r - h : r, c - w : c], block_px)[0]
        for r, h in zip(row_ends, blocks.chunks[1], strict=True)
        for c, w in zip(col_ends, blocks.chunks[2], strict=True)
    ]
    found = SceneTable(scenes=tuple(scenes)).touching_each(boxes)
    ids = [{id(scene) for scene in table} for table in found]
    touches = [[id(scene) in there for there in ids] for scene in scenes]
    return np.array(touches, bool).reshape(len(scenes), len(row_ends), len(col_ends))
