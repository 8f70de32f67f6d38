"""Co-registration: how far the image before the event lies from the one after it, and what follows from it.

Measured on the blocks of the lattice, which are fixed on the ground: a tile of another size holds the same blocks, so
it finds the same shifts. A shift that varied within a block would need its neighbours' neighbours to be smooth, which
a tile of 512 px does not have; so it is one vector a block (ADR 14).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, distance_transform_edt
from skimage.registration import phase_cross_correlation

from slidecube.pipeline.visibility import SEEN_VARIABLES

COREGISTRATION_VERSION = 1
"""Of the definitions below, a part of the keys of what compares two images."""

CHIP_PX = 128
"""Side of the windows that are compared within a block: 1.28 km at 10 m, enough for a hundredth of a pixel."""

SEARCH_PX = 8.0
"""Largest shift that is believed: the pixels of a chip that both images show must be most of it."""

KERNEL_MARGIN_PX = 2
"""Pixels beyond the whole ones of a shift that the cubic kernel reads."""

_UPSAMPLING = 50  # steps of .02 px
_KNOWN_SHARE = 0.4  # of a chip's weight
_TAPER_PX = 4.0
_FEWEST_CHIPS = 3
_AGREEMENT_PX = 0.5
_INTERPOLATED_FROM = 2  # bytes of a value: bands and means are wider than flags

Verdict = Literal["unmeasured", "fine", "warned", "excluded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """By how much the image before must be moved to lie on the one after, in pixels, to the south and to the east.

    chips : windows that agree on it
    """

    south_px: float
    east_px: float
    chips: int

    @property
    def length_px(self) -> float:
        """Its length."""
        return float(np.hypot(self.south_px, self.east_px))

    def verdict(self, warn_px: float, exclude_px: float) -> Verdict:
        """Judge it by the two limits, each of which is still allowed."""
        if self.length_px > exclude_px:
            return "excluded"
        return "warned" if self.length_px > warn_px else "fine"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShifts:
    """Shifts of the lattice's blocks under a window.

    by_block : (row, column) of the block in the lattice -> its shift, None where it could not be measured
    row, col : of the window's first pixel; shape : of the window; block_px : side of a block
    """

    by_block: Mapping[tuple[int, int], Shift | None]
    row: int
    col: int
    shape: tuple[int, int]
    block_px: int

    def part(self, block: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of the window that lie in a block."""
        starts = [n * self.block_px - first for n, first in zip(block, (self.row, self.col), strict=True)]
        rows, cols = (
            slice(max(start, 0), min(start + self.block_px, size))
            for start, size in zip(starts, self.shape, strict=True)
        )
        return rows, cols

    def excluded_yx(self, exclude_px: float) -> NDArray[np.bool_]:
        """Pixels of the blocks that are shifted by more than a limit."""
        out = np.zeros(self.shape, bool)
        for block, shift in self.by_block.items():
            if shift is not None and shift.length_px > exclude_px:
                out[self.part(block)] = True
        return out


def shift_numbers(by_block: Mapping[tuple[int, int], Shift | None]) -> dict[str, int]:
    """Write shifts as a record's numbers, in thousandths of a pixel; a block without a shift has 0 chips."""
    out = {}
    for (row, col), shift in sorted(by_block.items()):
        out[f"shift {row} {col} chips"] = shift.chips if shift else 0
        if shift:
            out[f"shift {row} {col} south_mpx"] = round(1000 * shift.south_px)
            out[f"shift {row} {col} east_mpx"] = round(1000 * shift.east_px)
    return out


def shifts_in(numbers: Mapping[str, int]) -> dict[tuple[int, int], Shift | None]:
    """Read the shifts in a record's numbers: the inverse of `shift_numbers`."""
    found: dict[tuple[int, int], Shift | None] = {}
    for name, chips in numbers.items():
        if name.startswith("shift ") and name.endswith(" chips"):
            _, row, col, _ = name.split()
            at = f"shift {row} {col}"
            found[int(row), int(col)] = (
                Shift(
                    south_px=numbers[f"{at} south_mpx"] / 1000,
                    east_px=numbers[f"{at} east_mpx"] / 1000,
                    chips=chips,
                )
                if chips
                else None
            )
    return found


def measure_shift(
    pre_yx: NDArray[np.uint16], post_yx: NDArray[np.uint16], known_yx: NDArray[np.bool_]
) -> Shift | None:
    """Measure the shift of one block by phase correlation of its chips.

    pre_yx, post_yx : (y, x) of one band, as stored; known_yx : pixels that both know and that may be looked at
    Each chip is weighted by a Hann window, which falls to 0 towards unknown pixels over four more: the outline of what
    is known is one and the same in both images, and cut sharply it would pull every shift to zero. The shift is the
    median of those chips that lie within half a pixel of the median of all.
    Returns None where fewer than three chips hold two fifths of their weight, or fewer than half of them agree, or the
    shift is beyond `SEARCH_PX`: fields that all changed, snow, water.
    Source: Kuglin & Hines 1975; Guizar-Sicairos, Thurman & Fienup 2008, doi:10.1364/OL.33.000156, by scikit-image.
    """
    found = []
    for r in range(0, known_yx.shape[0] - CHIP_PX + 1, CHIP_PX):
        for c in range(0, known_yx.shape[1] - CHIP_PX + 1, CHIP_PX):
            at = np.s_[r : r + CHIP_PX, c : c + CHIP_PX]
            known = known_yx[at]
            weight = _hann() * np.minimum(distance_transform_edt(known) / _TAPER_PX, 1)
            if weight.sum() < _KNOWN_SHARE * _hann().sum():
                continue
            one, two = _weighted(pre_yx[at], weight), _weighted(post_yx[at], weight)
            if one.any() and two.any():
                moved, _, _ = phase_cross_correlation(  # type: ignore[no-untyped-call]
                    two, one, upsample_factor=_UPSAMPLING, normalization="phase"
                )
                found.append(moved)
    if len(found) < _FEWEST_CHIPS:
        return None
    return _agreed(np.array(found, np.float64))


def _agreed(shifts_n2: NDArray[np.float64]) -> Shift | None:
    near = np.abs(shifts_n2 - np.median(shifts_n2, axis=0)).max(axis=1) <= _AGREEMENT_PX
    if near.sum() < max(_FEWEST_CHIPS, len(shifts_n2) / 2):
        return None
    south, east = np.median(shifts_n2[near], axis=0)
    shift = Shift(
        south_px=round(float(south), 3),
        east_px=round(float(east), 3),
        chips=int(near.sum()),
    )
    return shift if shift.length_px <= SEARCH_PX else None


def _weighted(values: NDArray[np.uint16], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    mean = (values * weight).sum() / weight.sum()
    weighted: NDArray[np.float64] = (values - mean) * weight
    return weighted


@lru_cache(maxsize=1)
def _hann() -> NDArray[np.float64]:
    side = np.hanning(CHIP_PX + 2)[1:-1]
    return np.outer(side, side)


def cubic_weights(fraction: float) -> NDArray[np.float64]:
    """Weights of the pixels -1, 0, 1 and 2 for a place `fraction` of a pixel after pixel 0; they sum to 1.

    Source: cubic convolution, Keys 1981, doi:10.1109/TASSP.1981.1163711, a = -1/2: exact for quadratic images, and of
    four pixels only, so that no block sees beyond its neighbours (a spline's prefilter sees the whole image).
    """
    t = fraction
    return np.array(
        [
            -0.5 * t**3 + t**2 - 0.5 * t,
            1.5 * t**3 - 2.5 * t**2 + 1,
            -1.5 * t**3 + 2 * t**2 + 0.5 * t,
            0.5 * t**3 - 0.5 * t**2,
        ]
    )


def margin_px(exclude_px: float) -> int:
    """Pixels beyond a window that a correction up to a limit reads."""
    return int(np.ceil(exclude_px)) + KERNEL_MARGIN_PX


def move(layer: xr.Dataset, south_px: float, east_px: float, *, margin: int) -> xr.Dataset:
    """Move the pixels of a layer by cubic convolution.

    layer : (y, x) stored variables, 0 = nodata; margin : pixels on each side that the result is smaller by, at least
        the shift and two
    What is counted (`clear_count`, dates, flags) is taken from the nearest pixel; all else is interpolated, rounded to
    the stored scale, and nodata where one of its 16 pixels is.
    """
    shifts = (south_px, east_px)
    # the value at a pixel comes from where it lay before it was moved
    whole = [int(np.floor(-s)) for s in shifts]
    weights = [cubic_weights(-s - w) for s, w in zip(shifts, whole, strict=True)]
    near = [int(np.rint(-s)) for s in shifts]
    out = {}
    for name, array in layer.data_vars.items():
        if str(name) in SEEN_VARIABLES or array.dtype.itemsize < _INTERPOLATED_FROM:
            out[name] = (array.dims, _cut(array.values, near, margin))
        else:
            out[name] = (array.dims, _interpolated(array.values, whole, weights, margin))
    return xr.Dataset(out)


def _cut(values: NDArray[np.generic], offset: list[int], margin: int) -> NDArray[np.generic]:
    rows, cols = (slice(margin + o, size - margin + o) for o, size in zip(offset, values.shape, strict=True))
    return values[rows, cols]


def _interpolated(
    values: NDArray[np.uint16], whole: list[int], weights: list[NDArray[np.float64]], margin: int
) -> NDArray[np.uint16]:
    image, unknown = values.astype(np.float64), values == 0
    for axis in (0, 1):
        w, used = weights[axis], weights[axis] != 0
        # correlate1d centres its weights: five of them, of which the first is none
        image = correlate1d(image, np.concatenate([[0.0], w]), axis=axis, mode="nearest")
        seen = np.concatenate([[0], used]).astype(np.uint8)
        unknown = correlate1d(unknown.astype(np.uint8), seen, axis=axis, mode="nearest") > 0
    shown = _cut(image, whole, margin)
    hidden = _cut(unknown, whole, margin)
    limit = np.iinfo(values.dtype).max
    moved: NDArray[np.uint16] = np.where(hidden, 0, np.clip(np.rint(shown), 1, limit)).astype(values.dtype)
    return moved
