"""Patches of our own cubes: features of finished layers, and labels of known landslides, read when asked for.

Axes in names: f feature, y, x, n patch, k pixel.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import shapely
from numpy.typing import NDArray

from slidecube.models.card import FeatureSpec
from slidecube.models.patches import IGNORE, LANDSLIDE, STABLE, UNLABELLED
from slidecube.pipeline.features import build_features, feature
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.pixels import PixelWindow, aoi_mask, read_layers
from slidecube.pipeline.reference import ReferencePixels
from slidecube.pipeline.run_plan import RunPlan

CUBE_PATCHES_VERSION = 1
"""Version of what patches hold and where they lie; a change makes every training due."""

Block = tuple[NDArray[np.float32], NDArray[np.uint8]]
"""Features (f, y, x) and labels (y, x) of a lattice block."""


class BlockCache:
    """The blocks that were read last, as many as fit; several threads may ask at once.

    limit_bytes : of all of them; the newest one is kept whatever its size
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process begins with an empty one."""
        return BlockCache, (self.limit_bytes,)

    @property
    def held_bytes(self) -> int:
        """Memory that the blocks take."""
        return self._bytes

    def get(self, at: tuple[int, int], read: Callable[[], Block]) -> Block:
        """Return a block, read where it is not held."""
        with self._lock:
            if at in self._held:
                self._held.move_to_end(at)
                return self._held[at]
        made = read()  # two threads may read the same one: that costs time, and no memory
        with self._lock:
            if at not in self._held:
                self._held[at] = made
                self._bytes += _size(made)
            while self._bytes > self.limit_bytes and len(self._held) > 1:
                self._bytes -= _size(self._held.popitem(last=False)[1])
        return made


def _size(block: Block) -> int:
    return sum(array.nbytes for array in block)


@dataclass(frozen=True, kw_only=True)
class LabelledCube:
    """One epoch of a plan with its known landslides.

    plan : whose epoch names every layer that the features need; landslides : pixels in the area of interest
    complete : ground outside of the landslides is stable, else unlabelled
    """

    plan: RunPlan
    epoch: str
    features: FeatureSpec
    landslides: ReferencePixels
    complete: bool
    cache: BlockCache = field(compare=False)

    @property
    def units(self) -> tuple[str, ...]:
        """Units of the features."""
        return tuple(feature(name).unit for name in self.features.names)

    @property
    def block_px(self) -> int:
        """Side of a lattice block."""
        return self.plan.grid.block_px

    def block(self, row: int, col: int) -> Block:
        """Return features and labels of a lattice block by its row and column; not to be changed."""
        return self.cache.get((row, col), lambda: self._read(row, col))

    def values(self, spec: FeatureSpec, row: int, col: int) -> dict[str, NDArray[np.float32]]:
        """Build other features of a lattice block: (y, x) float32 by name, NaN = unknown or outside of the area."""
        px = self.block_px
        made = {name: np.full((px, px), np.nan, np.float32) for name in spec.names}
        top, bottom, left, right = self._area
        rows, at_rows = _overlap(row * px, px, top, bottom - top)
        cols, at_cols = _overlap(col * px, px, left, right - left)
        height, width = rows.stop - rows.start, cols.stop - cols.start
        if min(height, width) <= 0:
            return made
        window = PixelWindow(row=top + at_rows.start, col=left + at_cols.start, height=height, width=width)
        # features look at their own pixel alone, so that a part of a block is as it is in the whole
        built = build_features(spec, read_layers(self.plan, self.epoch, window, inputs=spec))
        inside = aoi_mask(self.plan, window)
        for name in spec.names:
            made[name][rows, cols] = np.where(inside, built[name].values, np.float32(np.nan))
        return made

    def window(self, row: int, col: int, px: int) -> Block:
        """Read features and labels of a square of the frame, from its first row and column; may reach beyond it."""
        x_fyx = np.full((len(self.features.names), px, px), np.nan, np.float32)
        labels_yx = np.full((px, px), IGNORE, np.uint8)
        side = self.block_px
        for b_row in range(row // side, (row + px - 1) // side + 1):
            for b_col in range(col // side, (col + px - 1) // side + 1):
                rows, at_rows = _overlap(row, px, b_row * side, side)
                cols, at_cols = _overlap(col, px, b_col * side, side)
                of_fyx, of_yx = self.block(b_row, b_col)
                x_fyx[:, rows, cols] = of_fyx[:, at_rows, at_cols]
                labels_yx[rows, cols] = of_yx[at_rows, at_cols]
        return x_fyx, labels_yx

    @cached_property
    def _area(self) -> tuple[int, int, int, int]:
        """First and last row, first and last column of the area of interest, the last ones excluded."""
        return area_bounds(self.plan, 1)

    @cached_property
    def _by_block(self) -> dict[tuple[int, int], NDArray[np.int64]]:
        """Positions in `landslides` of the pixels of each lattice block."""
        return _positions(self.landslides, self.block_px)

    def _read(self, row: int, col: int) -> Block:
        px = self.block_px
        made = self.values(self.features, row, col)
        x_fyx = np.stack([made[name] for name in self.features.names])
        labels_yx = np.full((px, px), STABLE if self.complete else UNLABELLED, np.uint8)
        inside = self._by_block.get((row, col), np.zeros(0, np.int64))
        labels_yx[self.landslides.rows[inside] - row * px, self.landslides.cols[inside] - col * px] = (
            LANDSLIDE
        )
        labels_yx[~np.isfinite(x_fyx).all(axis=0)] = IGNORE
        for array in (x_fyx, labels_yx):
            array.setflags(write=False)
        return x_fyx, labels_yx

    def observed(self) -> NDArray[np.bool_]:
        """Tell of each landslide pixel whether all inputs are known there; reads each block that holds one."""
        seen_k: NDArray[np.bool_] = self.labels_at(self.landslides) == LANDSLIDE
        return seen_k

    def labels_at(self, pixels: ReferencePixels) -> NDArray[np.uint8]:
        """Return the label of each pixel; reads each block that holds one."""
        labels_k = np.full(len(pixels.rows), IGNORE, np.uint8)
        px = self.block_px
        for (row, col), inside in _positions(pixels, px).items():
            at = pixels.rows[inside] - row * px, pixels.cols[inside] - col * px
            labels_k[inside] = self.block(row, col)[1][at]
        return labels_k


def _positions(pixels: ReferencePixels, side: int) -> dict[tuple[int, int], NDArray[np.int64]]:
    """Positions of the pixels that lie in each lattice block."""
    keys = np.stack([pixels.rows // side, pixels.cols // side], axis=1)
    blocks, block_k = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(block_k.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(block_k.ravel(), minlength=len(blocks)))
    parts = np.split(order, ends[:-1]) if len(blocks) else []
    return {(int(r), int(c)): part for (r, c), part in zip(blocks, parts, strict=True)}


def area_bounds(plan: RunPlan, step_px: int) -> tuple[int, int, int, int]:
    """First and last row, first and last column of the area of interest, in whole steps, the last ones excluded."""
    affine = plan.grid.frame.affine
    xmin, ymin, xmax, ymax = shapely.bounds(plan.aoi_shape)
    (left, top), (right, bottom) = ~affine @ (xmin, ymax), ~affine @ (xmax, ymin)
    low, high = np.floor(np.array([top, left]) / step_px), np.ceil(np.array([bottom, right]) / step_px)
    return int(low[0]) * step_px, int(high[0]) * step_px, int(low[1]) * step_px, int(high[1]) * step_px


def _overlap(first: int, size: int, block: int, side: int) -> tuple[slice, slice]:
    """Part of a run of pixels that lies in a block: as places in the run, and in the block."""
    start, stop = max(first, block), min(first + size, block + side)
    return slice(start - first, stop - first), slice(start - block, stop - block)


def _digest(*arrays: NDArray[np.int64]) -> str:
    """Of whole numbers; a nation's are millions, which JSON would take long for."""
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(f"{array.shape}".encode())
        whole.update(np.ascontiguousarray(array, "<i8").tobytes())
    return whole.hexdigest()


class Places(Protocol):
    """Where patches lie."""

    @property
    def digest(self) -> str:
        """Of all places, whatever the seed."""
        ...

    def __len__(self) -> int: ...

    def at(self, index: int, seed: int) -> tuple[int, int]:
        """Row and column in the frame of a patch's first pixel."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedPlaces:
    """Places that stay where they are: rows_n, cols_n of their first pixels."""

    rows_n: NDArray[np.int64]
    cols_n: NDArray[np.int64]

    @cached_property
    def digest(self) -> str:
        """Of all places."""
        return _digest(self.rows_n, self.cols_n)

    def __len__(self) -> int:
        return len(self.rows_n)

    def at(self, index: int, seed: int) -> tuple[int, int]:  # noqa: ARG002  fixed patches do not look at it
        """Row and column of a patch's first pixel."""
        return int(self.rows_n[index]), int(self.cols_n[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """Where a crop may lie: anywhere in bounds, or in the spatial block around its anchor, less the gap at its edges.

    bounds : first and last row, first and last column, the last ones excluded; side_px : of the blocks, 0 = none
    """

    bounds: tuple[int, int, int, int]
    side_px: int = 0
    gap_px: int = 0

    def around(self, row: int, col: int) -> tuple[int, int, int, int]:
        """Bounds of a crop about a pixel."""
        if not self.side_px:
            return self.bounds
        top, left = row // self.side_px * self.side_px, col // self.side_px * self.side_px
        gap, last = self.gap_px, self.side_px - self.gap_px
        return top + gap, top + last, left + gap, left + last

    def firsts(self, low: int, high: int, px: int) -> NDArray[np.int64]:
        """First rows, or columns, of the patches that lie side by side from one to before another."""
        if not self.side_px:
            return np.arange(low, high, px)
        inner = np.arange((self.side_px - 2 * self.gap_px) // px) * px + self.gap_px
        return (
            np.arange(low // self.side_px, -(-high // self.side_px))[:, None] * self.side_px + inner
        ).ravel()

    def holds(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Pixels that a crop may hold."""
        if not self.side_px:
            top, bottom, left, right = self.bounds
            return (rows >= top) & (rows < bottom) & (cols >= left) & (cols < right)
        places = np.stack([rows, cols]) % self.side_px
        inner = (places >= self.gap_px) & (places < self.side_px - self.gap_px)
        both: NDArray[np.bool_] = inner[0] & inner[1]
        return both


@dataclass(frozen=True, kw_only=True)
class RandomCrops:
    """Crops that each hold a pixel of their anchor; where in the crop it lies is drawn by the seed.

    rows_k, cols_k : pixels; starts_n, ends_n : of each patch its anchor's, all of a landslide's or a single one
    """

    px: int
    rooms: Rooms
    rows_k: NDArray[np.int64]
    cols_k: NDArray[np.int64]
    starts_n: NDArray[np.int64]
    ends_n: NDArray[np.int64]
    seed: int

    @cached_property
    def digest(self) -> str:
        """Of all that decides the places."""
        arrays = _digest(self.rows_k, self.cols_k, self.starts_n, self.ends_n)
        return content_key("crops", self.px, self.rooms, self.seed, arrays)

    def __len__(self) -> int:
        return len(self.starts_n)

    def at(self, index: int, seed: int) -> tuple[int, int]:
        """Row and column of a patch's first pixel."""
        drawn = np.random.default_rng((self.seed, seed, index))
        k = int(drawn.integers(self.starts_n[index], self.ends_n[index]))
        row, col = int(self.rows_k[k]), int(self.cols_k[k])
        top, bottom, left, right = self.rooms.around(row, col)
        return (
            int(drawn.integers(max(row - self.px + 1, top), min(row, bottom - self.px) + 1)),
            int(drawn.integers(max(col - self.px + 1, left), min(col, right - self.px) + 1)),
        )


@dataclass(frozen=True, kw_only=True)
class CubePatches:
    """Patches of one cube, see `Patches`.

    made_of : digest of the layers; block_px : side of the spatial blocks, in which patches are alike
    facts : counts for people
    """

    cube: LabelledCube
    places: Places
    region: str
    patch_px: int
    made_of: str
    block_px: int
    facts: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def features(self) -> FeatureSpec:
        """Features of a patch, in order."""
        return self.cube.features

    @property
    def units(self) -> tuple[str, ...]:
        """Units of the features."""
        return self.cube.units

    @property
    def resolution_m(self) -> float:
        """Side of a pixel."""
        return self.cube.plan.grid.resolution_m

    @cached_property
    def digest(self) -> str:
        """Of all that decides what is read: layers, landslides, places, features; not where they are stored."""
        cube = self.cube
        return content_key(
            CUBE_PATCHES_VERSION,
            self.made_of,
            cube.features,
            cube.landslides.digest,
            cube.complete,
            self.places.digest,
            self.patch_px,
            self.region,
        )

    @property
    def regions(self) -> tuple[str, ...]:
        """Region of each patch."""
        return (self.region,) * len(self)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Spatial block of each patch, by the place that it has without a seed."""
        first = [self.places.at(index, 0) for index in range(len(self))]
        side = self.block_px
        return tuple(f"{self.region} {row // side} {col // side}" for row, col in first)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Read a patch: (f, y, x) float32, NaN = unknown, and (y, x) uint8 labels."""
        if not 0 <= index < len(self):
            raise IndexError(f"patch {index} of {len(self)}")
        return self.cube.window(*self.places.at(index, seed), self.patch_px)
