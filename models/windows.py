"""Windows of networks: a lattice anchored to the grid, and weights by which its windows are blended.

What a network says of a pixel depends on the window around it. So windows lie on one lattice of the whole grid, never
on a tile's, and where they overlap each counts by a Hann ramp: every pixel has one value, whatever is computed at once.

Axes: y row, x column of a region of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A rectangle of the grid whose pixels are asked for, inside the planes that are known.

    row, col : global, of its first pixel; height, width : in pixels
    above, left : rows and columns of the planes before its first pixel; planes : their shape
    """

    row: int
    col: int
    height: int
    width: int
    above: int
    left: int
    planes: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A window that touches a region.

    rows, cols : of the planes that it holds; in_rows, in_cols : where in the window they lie, the rest is unknown
    out_rows, out_cols : of the region that it says something of; of_rows, of_cols : where in the window they lie
    """

    rows: slice
    cols: slice
    in_rows: slice
    in_cols: slice
    out_rows: slice
    out_cols: slice
    of_rows: slice
    of_cols: slice


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowLattice:
    """Windows of one side, of which one begins at global pixel 0 and the next ones a stride apart.

    side_px : of a window; margin_px : two neighbours overlap by two margins, so that a stride is side - 2 margins
    """

    side_px: int
    margin_px: int

    @property
    def stride_px(self) -> int:
        """From one window's first pixel to the next one's."""
        return self.side_px - 2 * self.margin_px

    def weights_yx(self) -> np.ndarray:
        """Weight of each pixel of a window: (side, side) float32; those of all windows over a pixel sum to one."""
        ramp = _weights(self.side_px, self.margin_px)
        weights: np.ndarray = np.outer(ramp, ramp).astype(np.float32)
        return weights

    def windows(self, region: Region, wanted_yx: np.ndarray) -> list[Placed]:
        """Windows that say something of a wanted pixel, row by row: the order in which they are added up.

        wanted_yx : (height, width) bool; a window without any such pixel changes no answer, and is left out
        """
        rows = self._axis(region.row, region.height, region.above, region.planes[0])
        cols = self._axis(region.col, region.width, region.left, region.planes[1])
        return [
            Placed(
                rows=r[0], in_rows=r[1], out_rows=r[2], of_rows=r[3],
                cols=c[0], in_cols=c[1], out_cols=c[2], of_cols=c[3],
            )
            for r in rows
            for c in cols
            if wanted_yx[r[2], c[2]].any()
        ]  # fmt: skip

    def _axis(
        self, first: int, size: int, before: int, whole: int
    ) -> list[tuple[slice, slice, slice, slice]]:
        """Slices along one axis, of each window that touches `first .. first + size` of the grid."""
        least = -(-(first - self.side_px + 1) // self.stride_px)
        starts = range(least * self.stride_px - first, size, self.stride_px)
        return [
            (*_shared(start + before, self.side_px, whole), *_shared(start, self.side_px, size))
            for start in starts
        ]


def _shared(start: int, length: int, size: int) -> tuple[slice, slice]:
    """What `start .. start + length` shares with `0 .. size`: as a slice of the whole, and of the part."""
    low = max(start, 0)
    high = max(min(start + length, size), low)
    return slice(low, high), slice(low - start, high - start)


@lru_cache(maxsize=32)
def _weights(side_px: int, margin_px: int) -> np.ndarray:
    """Weights along one axis, float64: a Hann ramp over what two neighbours share, divided by the sum over all windows.

    Where two windows meet the ramps are sin^2 and cos^2, which sum to one already; wide margins let more than two meet.
    """
    stride, overlap = side_px - 2 * margin_px, 2 * margin_px
    at = np.arange(side_px)
    nearest = np.minimum(at, side_px - 1 - at)
    ramp = np.sin(np.pi / 2 * np.minimum((nearest + 0.5) / max(overlap, 1), 1.0)) ** 2
    sums = np.bincount(at % stride, weights=ramp)
    weights: np.ndarray = ramp / sums[at % stride]
    weights.setflags(write=False)
    return weights
