"""Sums of a cube that merge: what a noise fraction transform of a whole country needs, in one pass.

Axes in names: b band, y, x, n pixel; g a band or, last, the constant 1, so that one symmetric matrix over g holds
products, sums and count at once. A leading axis of 2 is an unevaluated pair of float64 whose sum is meant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import dask
import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import Delayed

from slidecube.pipeline.errors import PipelineError

# 2**14 squares of whole numbers below 2**19 are below 2**53: their sum is exact in float64, in whatever order a
# matrix product takes them; and ten bands of that many pixels stay in a core's cache
_STRIP_PX = 1 << 14
_STRIP_COLUMNS = 1 << 11
_BLOCK_PX = 512

# what overflows is refused when it is used, by one line
_QUIET = np.errstate(over="ignore", invalid="ignore")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Sufficient statistics of signal and noise, about zero.

    signal : (2, g, g) sums over the pixels of which all bands are known, of the products of (bands, 1) with itself
    noise : the same of the differences between a pixel and its neighbour one row down and one column right, where
        both are known

    Of whole numbers below 2**19, such as stored reflectances and their differences, the sums are exact: equal bit for
    bit in whatever blocks and order they were made, up to 1e12 pixels and more. Of other numbers a merge adds at
    most 4e-32 of the sum; a block brings the rounding of float64 about its own origin.
    """

    signal: np.ndarray
    noise: np.ndarray

    def __post_init__(self) -> None:
        for name in ("signal", "noise"):
            sums = np.array(getattr(self, name), np.float64)
            if sums.ndim != 3 or sums.shape[0] != 2 or sums.shape[1] != sums.shape[2] or sums.shape[1] < 2:
                raise PipelineError(
                    f"Moments.{name} has shape {sums.shape}; (2, bands + 1, bands + 1) is wanted"
                )
            sums.flags.writeable = False
            object.__setattr__(self, name, sums)
        if self.signal.shape != self.noise.shape:
            raise PipelineError(
                f"Moments of {self.signal.shape[1] - 1} bands of signal and {self.noise.shape[1] - 1} of noise; "
                "give as many"
            )

    @classmethod
    def none(cls, bands: int) -> Moments:
        """Moments of no pixel."""
        return cls(signal=np.zeros((2, bands + 1, bands + 1)), noise=np.zeros((2, bands + 1, bands + 1)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return np.array_equal(self.signal, other.signal) and np.array_equal(self.noise, other.noise)

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def bands(self) -> int:
        """Number of bands."""
        return int(self.signal.shape[1]) - 1

    @property
    def pixels(self) -> int:
        """Number of pixels of which all bands are known."""
        return int(self.signal[0, -1, -1])

    @property
    def pairs(self) -> int:
        """Number of neighbours that were compared."""
        return int(self.noise[0, -1, -1])

    @property
    def mean(self) -> np.ndarray:
        """(b,) mean of each band; Raises PipelineError without a pixel."""
        n = self._counted(self.signal, 1)
        return np.array([float(_exact(self.signal, b, -1) / n) for b in range(self.bands)])

    @property
    def covariance(self) -> np.ndarray:
        """(b, b) covariance, over one pixel less than there are."""
        return self._covariance(self.signal)

    @property
    def noise_covariance(self) -> np.ndarray:
        """(b, b) covariance of the noise: half of that of the differences, each of which holds the noise twice."""
        return self._covariance(self.noise) / 2

    def merged(self, other: Moments) -> Moments:
        """Moments of the pixels of both."""
        return merge((self, other))

    def to_json(self) -> str:
        """Write as JSON, exactly: each number in hexadecimal; upper triangles, row by row, highs before lows."""
        i, j = np.triu_indices(self.bands + 1)
        sums = {
            name: [[v.hex() for v in half[i, j].tolist()] for half in getattr(self, name)]
            for name in ("signal", "noise")
        }
        return json.dumps({"bands": self.bands, **sums})

    @classmethod
    def from_json(cls, text: str) -> Moments:
        """Read what `to_json` wrote."""
        said = json.loads(text)
        g = int(said["bands"]) + 1
        i, j = np.triu_indices(g)
        sums = {}
        for name in ("signal", "noise"):
            sums[name] = np.zeros((2, g, g))
            for half, values in zip(sums[name], said[name], strict=True):
                half[i, j] = half[j, i] = [float.fromhex(v) for v in values]
        return cls(**sums)

    def _covariance(self, sums: np.ndarray) -> np.ndarray:
        # products minus means cancel: exact fractions, rounded once at the end, lose no digit
        n = self._counted(sums, 2)
        first = [_exact(sums, b, -1) for b in range(self.bands)]
        out = np.empty((self.bands, self.bands))
        for i in range(self.bands):
            for j in range(i, self.bands):
                out[i, j] = out[j, i] = float((_exact(sums, i, j) * n - first[i] * first[j]) / (n * (n - 1)))
        return out

    @staticmethod
    def _counted(sums: np.ndarray, least: int) -> int:
        n = int(sums[0, -1, -1])
        if n < least or not np.isfinite(sums).all():
            raise PipelineError(
                f"Moments of {n} pixels are too few; {least} or more are needed"
                if n < least
                else "Moments are not finite: the values are too large to be squared in float64; scale them down"
            )
        return n


@_QUIET
def merge(parts: Iterable[Moments]) -> Moments:
    """Merge moments in the order in which they come; raises PipelineError for none, or for unequal bands.

    The sums of whole numbers are exact. Of N parts of other numbers, |error| <= 4e-32 N sum|part|.
    """
    total: np.ndarray | None = None
    for part in parts:
        sums = np.stack([part.signal, part.noise], axis=1)
        if total is not None and total.shape != sums.shape:
            raise PipelineError(
                f"Moments of {total.shape[-1] - 1} and of {part.bands} bands cannot be merged"
            )
        total = sums if total is None else _added(total, sums)
    if total is None:
        raise PipelineError("There are no moments to merge; give one or more")
    return Moments(signal=total[:, 0], noise=total[:, 1])


@_QUIET
def block_moments(values_byx: np.ndarray, *, valid_yx: np.ndarray | None = None) -> Moments:
    """Moments of one block.

    values_byx : (band, y + 1, x + 1), any real type, NaN or infinite = unknown. The last row and column are the
        neighbours' and serve the differences alone; where the frame ends they are NaN, or not valid
    valid_yx : (y + 1, x + 1) bool, what may be used; None: all that is finite
    """
    if values_byx.ndim != 3 or 0 in values_byx.shape:
        raise PipelineError(f"A block has shape {values_byx.shape}; (band, y + 1, x + 1) is wanted")
    if valid_yx is not None and valid_yx.shape != values_byx.shape[1:]:
        raise PipelineError(
            f"valid_yx has shape {valid_yx.shape}; that of a band, {values_byx.shape[1:]}, is wanted"
        )
    total = np.zeros((2, 2, len(values_byx) + 1, len(values_byx) + 1))
    origin_b: np.ndarray | None = None
    for rows, columns in _strips(values_byx.shape[1] - 1, values_byx.shape[2] - 1):
        strip = values_byx[:, rows, columns]
        valid_n = _valid(strip, None if valid_yx is None else valid_yx[rows, columns])
        if origin_b is None:
            origin_b = _origin(strip, valid_n)
            if origin_b is None:
                continue
        high, error = _two_sum(total[0], _strip_sums(strip, valid_n, origin_b))
        total[0], total[1] = high, total[1] + error
    if origin_b is None:
        return Moments.none(len(values_byx))
    total = np.stack(_fast_two_sum(total[0], total[1]))
    return Moments(signal=_about_zero(total[:, 0], origin_b), noise=total[:, 1] + 0.0)


def moments(cube: xr.Dataset, *, nodata: float | None = None, split_every: int = 16) -> Moments:
    """Moments of a whole cube; reads it once, and holds a few blocks at a time.

    cube : (y, x) bands in the order of its variables, Dask-backed or not; NaN and `nodata` = unknown
    split_every : so many moments are merged by one task

    On Dask each chunk is summed where it lies, its rim alone travels to its neighbours, and the sums go up a tree;
    a client of a cluster is used where there is one. Whole numbers give the same bits whatever the chunks.
    Raises PipelineError for a cube without bands, or with bands that are not (y, x).
    """
    bands = list(cube.data_vars.values())
    if not bands or any(band.dims != bands[0].dims or band.ndim != 2 or 0 in band.shape for band in bands):
        dims = {str(name): band.dims for name, band in cube.data_vars.items()}
        raise PipelineError(f"The cube has bands {dims}; one or more of the same (y, x) are wanted")
    if split_every < 2:
        raise PipelineError(f"split_every={split_every} is not allowed; 2 or more is")
    arrays = [band.data for band in bands]
    if not any(isinstance(array, da.Array) for array in arrays):
        return _in_memory(arrays, nodata)
    lazy = da.unify_chunks(*(item for a in arrays for item in (da.asarray(a, chunks=_BLOCK_PX), "yx")))[1]
    (found,) = dask.compute(_tree(_seamed(lazy, nodata), split_every))
    result: Moments = found
    return result


def _exact(sums: np.ndarray, i: int, j: int) -> Fraction:
    return Fraction(float(sums[0, i, j])) + Fraction(float(sums[1, i, j]))


# --- one block ------------------------------------------------------------------------------------------------------


def _strips(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Cut a block into strips of at most `_STRIP_PX` pixels, each with its row and column of context."""
    for x in range(0, width, _STRIP_COLUMNS):
        columns = min(_STRIP_COLUMNS, width - x)
        rows = max(_STRIP_PX // (columns + 1), 1)
        for y in range(0, height, rows):
            yield slice(y, min(y + rows, height) + 1), slice(x, x + columns + 1)


def _valid(strip_byx: np.ndarray, valid_yx: np.ndarray | None) -> np.ndarray | None:
    """Which pixels may be used, flat; None: all."""
    valid = None if valid_yx is None or valid_yx.all() else valid_yx.copy()
    if strip_byx.dtype.kind == "f":
        for band in strip_byx:
            finite = np.isfinite(band)
            if not finite.all():
                valid = finite if valid is None else valid & finite
    return None if valid is None else valid.ravel()


def _origin(strip_byx: np.ndarray, valid_n: np.ndarray | None) -> np.ndarray | None:
    """Subtrahend of each band: the mean of the first strip that knows something, with few digits; None: nothing known.

    Squares about it keep the digits that squares about zero would lose to a large mean. It is a whole number where
    the values are, so that their sums stay exact.
    """
    flat = strip_byx.reshape(len(strip_byx), -1)
    known = flat if valid_n is None else flat[:, valid_n]
    if known.shape[1] == 0:
        return None
    mean = known.mean(axis=1, dtype=np.float64)
    whole = known.dtype.kind in "iub" or bool((np.rint(known) == known).all())
    origin: np.ndarray = np.rint(mean) if whole else mean.astype(np.float32).astype(np.float64)
    return np.where(np.isfinite(origin), origin, 0.0)


def _strip_sums(strip_byx: np.ndarray, valid_n: np.ndarray | None, origin_b: np.ndarray) -> np.ndarray:
    """(2, g, g) float64: signal about the origin, and noise, of one strip."""
    b, height, width = strip_byx.shape
    n = (height - 1) * width
    # flat, the neighbour below and right is width + 1 further on; the column of context, which has no such
    # neighbour and is another strip's own, is set to zero in what is multiplied
    x_gn = np.empty((b + 1, height * width + 1))
    values = x_gn[:, :-1].reshape(b + 1, height, width)
    np.subtract(strip_byx, origin_b[:, None, None], out=values[:b])
    x_gn[b], x_gn[:, -1] = 1.0, 0.0
    if valid_n is not None:
        x_gn[:, :-1][:, ~valid_n] = 0.0  # NaN times zero is NaN
    e_gn = np.empty((b + 1, n))
    np.subtract(x_gn[:b, :n], x_gn[:b, width + 1 :], out=e_gn[:b])
    e_gn[b] = 1.0
    if valid_n is not None:
        both = x_gn[b, :n] * x_gn[b, width + 1 :]
        e_gn *= both
    e_gn.reshape(b + 1, height - 1, width)[:, :, -1] = 0.0
    values[:, :, -1] = 0.0
    s_gn = x_gn[:, :n]
    return np.stack([s_gn @ s_gn.T, e_gn @ e_gn.T])


def _about_zero(sums: np.ndarray, origin_b: np.ndarray) -> np.ndarray:
    """(2, g, g) sums about an origin, as sums about zero: with x = d + c, xx' = dd' + cd' + dc' + cc'."""
    b, n, c = len(origin_b), sums[0, -1, -1], origin_b
    first = sums[:, :b, b]
    total = np.stack(_two_prod(np.full(b, n), c))
    cross = _times(first[:, None, :], c[:, None])
    square = _times(total[:, None, :], c[:, None])
    out = sums.copy()
    out[:, :b, :b] = _added(_added(sums[:, :b, :b], _added(cross, cross.transpose(0, 2, 1))), square)
    out[:, :b, b] = out[:, b, :b] = _added(first, total)
    return out + 0.0  # no negative zeros


# --- pairs of float64: Dekker 1971, Knuth 1997 (4.2.2); errors after Joldes, Muller & Popescu 2017 -------


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounded sum and its exact error."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _fast_two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounded sum and its exact error where |a| >= |b| or a = 0."""
    s = a + b
    return s, b - (s - a)


def _two_prod(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounded product and its exact error."""
    p = a * b
    (ah, al), (bh, bl) = _halves(a), _halves(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _halves(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t = a * 134217729.0  # 2**27 + 1
    high = t - (t - a)
    return high, a - high


def _added(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum of pairs; relative error below 3 * 2**-106."""
    high, error = _two_sum(x[0], y[0])
    low, rest = _two_sum(x[1], y[1])
    high, error = _fast_two_sum(high, error + low)
    return np.stack(_fast_two_sum(high, error + rest))


def _times(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Pairs times plain numbers; relative error below 2 * 2**-106."""
    high, error = _two_prod(x[0], np.broadcast_to(c, np.broadcast_shapes(x[0].shape, c.shape)))
    return np.stack(_fast_two_sum(high, error + x[1] * c))


# --- a whole cube ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one chunk knows alone, and its rim, with which its neighbours complete theirs; unknown = NaN.

    first_row, last_row : (b, x); first_column, last_column : (b, y)
    """

    own: Moments
    first_row: np.ndarray
    last_row: np.ndarray
    first_column: np.ndarray
    last_column: np.ndarray


def _in_memory(arrays: Sequence[Any], nodata: float | None) -> Moments:
    height, width = arrays[0].shape
    blocks = (
        (slice(y, y + _BLOCK_PX + 1), slice(x, x + _BLOCK_PX + 1))
        for y in range(0, height, _BLOCK_PX)
        for x in range(0, width, _BLOCK_PX)
    )
    return merge(
        _framed([np.asarray(array[at]) for array in arrays], nodata, height=_BLOCK_PX, width=_BLOCK_PX)
        for at in blocks
    )


def _framed(bands: Sequence[np.ndarray], nodata: float | None, *, height: int, width: int) -> Moments:
    """Moments of a block whose context is missing where it is not larger than the given size."""
    y, x = bands[0].shape
    known = _known(bands, nodata)
    values = np.zeros((len(bands), y + (y <= height), x + (x <= width)), np.result_type(*bands))
    for padded, band in zip(values, bands, strict=True):
        padded[:y, :x] = band
    if known is not None or values.shape[1:] != (y, x):
        valid = np.zeros(values.shape[1:], bool)
        valid[:y, :x] = True if known is None else known
        known = valid
    return block_moments(values, valid_yx=known)


def _known(bands: Sequence[np.ndarray], nodata: float | None) -> np.ndarray | None:
    if nodata is None or math.isnan(nodata):
        return None
    known: np.ndarray = np.logical_and.reduce([band != nodata for band in bands])
    return known


def _part(*bands: np.ndarray, nodata: float | None) -> np.ndarray:
    """Sum one chunk; a (1, 1) array of objects, as Dask wants an array from an array."""
    values = np.stack(bands)
    height, width = values.shape[1:]
    known = _known(bands, nodata)

    def rim(at: Any) -> np.ndarray:
        edge = values[(slice(None), *at)].astype(
            np.float64
        )  # a copy: a view would keep the whole chunk alive
        if known is not None:
            edge[:, ~known[at]] = np.nan
        return edge

    out = np.empty((1, 1), object)
    out[0, 0] = _Part(
        own=_framed(bands, nodata, height=height, width=width),
        first_row=rim(np.s_[0, :]),
        last_row=rim(np.s_[-1, :]),
        first_column=rim(np.s_[:, 0]),
        last_column=rim(np.s_[:, -1]),
    )
    return out


def _seamed(bands: Sequence[da.Array], nodata: float | None) -> list[Delayed]:
    """Moments of all chunks, each with the pairs across its lower and right edge, row by row."""
    rows, columns = bands[0].numblocks
    parts = da.map_blocks(
        partial(_part, nodata=nodata),
        *bands,
        dtype=object,
        chunks=((1,) * rows, (1,) * columns),
        meta=np.empty((0, 0), object),
    ).to_delayed()
    seam = dask.delayed(_with_seams, pure=True)

    def at(row: int, column: int) -> Delayed | None:
        return parts[row, column] if row < rows and column < columns else None

    return [
        seam(at(row, column), at(row, column + 1), at(row + 1, column), at(row + 1, column + 1))
        for row in range(rows)
        for column in range(columns)
    ]


def _with_seams(
    here: np.ndarray, right: np.ndarray | None, below: np.ndarray | None, beyond: np.ndarray | None
) -> Moments:
    """Complete a chunk's moments by the pairs that reach into its neighbours."""
    part: _Part = here[0, 0]
    pairs = []
    if right is not None:
        pairs.append((part.last_column[:, :-1], right[0, 0].first_column[:, 1:]))
    if below is not None:
        pairs.append((part.last_row[:, :-1], below[0, 0].first_row[:, 1:]))
    if beyond is not None:
        pairs.append((part.last_row[:, -1:], beyond[0, 0].first_row[:, :1]))
    pairs = [pair for pair in pairs if pair[0].size]
    if not pairs:
        return part.own
    a_bn, b_bn = (np.concatenate(side, axis=1) for side in zip(*pairs, strict=True))
    # columns of two rows: the pixel above, its neighbour below and right of it, and what lies between unknown
    values = np.full((len(a_bn), 2, 2 * a_bn.shape[1]), np.nan)
    values[:, 0, 0::2], values[:, 1, 1::2] = a_bn, b_bn
    across = block_moments(values)
    return part.own.merged(Moments(signal=np.zeros_like(across.signal), noise=across.noise))


def _tree(found: list[Delayed], split_every: int) -> Delayed:
    join = dask.delayed(merge, pure=True)
    while len(found) > 1:
        found = [join(found[i : i + split_every]) for i in range(0, len(found), split_every)]
    return found[0]
