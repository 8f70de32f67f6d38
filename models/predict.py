"""The protocol that every detector follows, and its application to a cube on the grid's lattice.

Axes: n patch, f feature, y row, x column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import dask.array as da
import numpy as np
import xarray as xr

from slidecube.models.backends import Backend, Dtype
from slidecube.models.card import ModelCard
from slidecube.models.devices import Device
from slidecube.models.errors import ModelError

UNIT_PX = 128
"""Side of what a detector computes at once. Units lie on a lattice that starts at global pixel 0 and all have one
shape, because the bits of a convolution depend on both (cae on one core: .13 s/Mpx at 64, .10 at 128, .09 at 512)."""
CHUNK_PX = 512
"""Side of a Dask chunk, 4 x 4 units: one task each would be all overhead."""
_REGION_CHUNKS = 4
"""Chunks to a side of what a network computes at once: windows that two regions share are computed in both."""


Progress = Callable[[int, int], None]
"""Told how much is done, and how much there is in all."""


class Detector(Protocol):
    """A detector of landslides.

    It reads features by name, with `card.window_px // 2` pixels of context on each side, and returns the probability of
    a landslide in each pixel. It is a value: `fit` and `restore` return another one.
    """

    @property
    def card(self) -> ModelCard:
        """What it is, what it reads, its threshold, and how many patches it learns from."""
        ...

    def fit(
        self,
        patches_nfyx: np.ndarray,
        *,
        checkpoint: Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from patches; rules return themselves.

        patches_nfyx : (n, feature, window_px, window_px) float32 in the units and the order of `card.inputs`; the
            centres are known, their surroundings may be NaN. Equal patches in equal order give equal bits.
        checkpoint : a file in which long learning keeps its state; what is killed goes on from there to the same bits
        progress : told of long learning, now and then
        Raises ModelError when nothing can be learnt from them.
        """
        ...

    def predict_block(self, features_fyx: np.ndarray) -> np.ndarray:
        """Probability of one block.

        features_fyx : (feature, y + 2 c, x + 2 c) float32 with c = window_px // 2, NaN = unknown
        Returns (y, x) float32 in [0, 1], NaN where it cannot be said. Several threads may call at once.
        Raises ModelError when something had to be learnt first.
        """
        ...

    def on(self, device: Device) -> Self:
        """Return the detector with its network on a device; what has none is the same.

        Raises ModelError when there is no such device here.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write what `fit` learned into a folder; rules write nothing."""
        ...

    def restore(self, folder: Path) -> Self:
        """Take what `save` wrote; raises ModelError for what is missing, damaged or of another model."""
        ...


@runtime_checkable
class WindowedDetector(Detector, Protocol):
    """A detector that looks at large windows, which lie on a lattice of the grid and overlap.

    It is asked for whole regions, each window of which it computes once.
    """

    @property
    def variables(self) -> tuple[str, ...]:
        """What it says of a pixel: "probability" first, and "spread" where it has members or views."""
        ...

    @property
    def backend(self) -> str:
        """What computes it, see `backends.Backend`."""
        ...

    @property
    def dtype(self) -> str:
        """In which numbers, see `backends.Dtype`."""
        ...

    @property
    def tta(self) -> bool:
        """Whether it looks at each window turned and mirrored, too."""
        ...

    def computed_by(self, backend: Backend | None, dtype: Dtype | None, *, tta: bool = False) -> Self:
        """Return it with another backend or dtype; None = as it is. Raises ModelError for what cannot be."""
        ...

    def predict_region(
        self, planes_yx: Sequence[np.ndarray], *, origin_px: tuple[int, int], margin_px: int, threads: int = 1
    ) -> np.ndarray:
        """Return what it says of a region.

        planes_yx : (y + 2 margin, x + 2 margin) float32 each, in the order of `card.inputs`, NaN = unknown; beyond
            them all is unknown
        origin_px : global row and column of the region's first pixel; threads : that compute windows at once
        Returns (variable, y, x) float32, NaN where it cannot be said; equal bits for any number of threads.
        """
        ...


LONG_NAMES = {
    "probability": "landslide probability",
    "spread": "standard deviation of the probability over members, or over the views of a single network",
}


def predict(
    detector: Detector,
    features: xr.Dataset,
    *,
    origin_px: tuple[int, int] = (0, 0),
    margin_px: int = 0,
    threads: int = 1,
) -> xr.Dataset:
    """Apply a detector to a cube of features, lazily where the cube is lazy.

    features : (y, x) variables, at least those of the card; in Dask chunks or in memory
    origin_px : row and column of the first pixel on the grid; may be negative
    margin_px : of the features, on each side, for which nothing is asked: they are context
    threads : that compute at once where a network's features are in memory; lazy ones are computed as Dask likes
    Returns `probability` (y, x) float32, NaN = not observable, and of an ensemble `spread`. A pixel's value is the same
    to the bit whatever the chunks and whatever the window, as long as the window holds the pixel's context; beyond it
    all is unknown.
    Raises ModelError when a feature is missing.
    """
    if isinstance(detector, WindowedDetector):
        found = _in_windows(detector, features, origin_px=origin_px, margin_px=margin_px, threads=threads)
    else:
        found = {"probability": _in_units(detector, features, origin_px=origin_px, margin_px=margin_px)}
    for name, array in found.items():
        array.attrs.update(long_name=LONG_NAMES[name], units="1")
    return xr.Dataset(found)


def _in_windows(
    detector: WindowedDetector,
    features: xr.Dataset,
    *,
    origin_px: tuple[int, int],
    margin_px: int,
    threads: int,
) -> dict[str, xr.DataArray]:
    """Region by region: all at once where the features are in memory, else chunk by chunk with their context."""
    planes = _planes(detector.card, features)
    core = tuple(slice(margin_px, size - margin_px) for size in planes[0].shape)
    if _is_lazy(planes):
        whole = _lazy_regions(detector, [plane.data for plane in planes], origin_px)[:, *core]
    else:
        arrays = [np.asarray(plane.data, np.float32) for plane in planes]
        at = origin_px[0] + margin_px, origin_px[1] + margin_px
        whole = detector.predict_region(arrays, origin_px=at, margin_px=margin_px, threads=threads)
    like = planes[0][core]
    return {
        name: xr.DataArray(values, dims=like.dims, coords=like.coords)
        for name, values in zip(detector.variables, whole, strict=True)
    }


def _in_units(
    detector: Detector, features: xr.Dataset, *, origin_px: tuple[int, int], margin_px: int
) -> xr.DataArray:
    found = on_lattice(
        detector.predict_block, features, card=detector.card, origin_px=origin_px, unknown=np.float32(np.nan)
    )
    return found[tuple(slice(margin_px, size - margin_px) for size in found.shape)]


def on_lattice(
    block_function: Callable[[np.ndarray], np.ndarray],
    features: xr.Dataset,
    *,
    card: ModelCard,
    origin_px: tuple[int, int],
    unknown: np.generic,
) -> xr.DataArray:
    """Apply a function of one block, such as `Detector.predict_block`, unit by unit on the lattice.

    unknown : what it returns where nothing is known, and thereby the type of the result
    """
    planes = _planes(card, features)
    context_px = card.window_px // 2
    run = partial(_run_units, block_function, context_px=context_px, unknown=unknown)
    arrays = [plane.data for plane in planes]
    if _is_lazy(planes):
        values = _lazy_units(run, arrays, context_px, origin_px)
    else:
        values = run([np.asarray(array, np.float32) for array in arrays], origin_px=origin_px)
    return xr.DataArray(values, dims=planes[0].dims, coords=planes[0].coords)


def _planes(card: ModelCard, features: xr.Dataset) -> list[xr.DataArray]:
    """Features that a card names, in its order; raises ModelError where they cannot be had."""
    missing = [name for name in card.inputs.names if name not in features]
    if missing:
        raise ModelError(
            f"Model {card.address} needs the features {', '.join(card.inputs.names)}; missing: {', '.join(missing)}"
        )
    planes = [features[name] for name in card.inputs.names]
    if planes[0].ndim != 2 or any(plane.dims != planes[0].dims for plane in planes):
        dims = ", ".join(f"{plane.name} {plane.dims}" for plane in planes)
        raise ModelError(f"Model {card.address} needs features of two and the same dimensions; got {dims}")
    if card.window_px // 2 > CHUNK_PX:
        raise ModelError(
            f"Model {card.address} needs context of {card.window_px} px; up to {2 * CHUNK_PX + 1} are supported"
        )
    return planes


def _is_lazy(planes: list[xr.DataArray]) -> bool:
    return any(isinstance(plane.data, da.Array) for plane in planes)


def _lazy_units(
    run: Callable[..., np.ndarray], planes: list[Any], context_px: int, origin_px: tuple[int, int]
) -> da.Array:
    around, filled, (top, left) = _with_context(planes, context_px, origin_px, CHUNK_PX)
    unknown = run.keywords["unknown"]  # type: ignore[attr-defined]
    found = around.map_blocks(
        _run_chunk,
        run,
        context_px=context_px,
        drop_axis=0,
        chunks=filled.chunks[1:],
        dtype=unknown.dtype,
        meta=np.empty((0, 0), unknown.dtype),
    )
    height, width = planes[0].shape
    return found[top : top + height, left : left + width]


def _lazy_regions(detector: WindowedDetector, planes: list[Any], origin_px: tuple[int, int]) -> da.Array:
    """(variable, y, x), in chunks large enough that few windows are computed in two of them."""
    context_px, (height, width) = detector.card.window_px // 2, planes[0].shape
    chunk_px = CHUNK_PX * min(_REGION_CHUNKS, -(-max(height, width) // CHUNK_PX))
    around, filled, (top, left) = _with_context(planes, context_px, origin_px, chunk_px)
    found = around.map_blocks(
        _run_region,
        detector,
        context_px=context_px,
        corner_px=(origin_px[0] - top, origin_px[1] - left),
        chunks=((len(detector.variables),), *filled.chunks[1:]),
        dtype=np.float32,
        meta=np.empty((0, 0, 0), np.float32),
    )
    return found[:, top : top + height, left : left + width]


def _with_context(
    planes: list[Any], context_px: int, origin_px: tuple[int, int], chunk_px: int
) -> tuple[da.Array, da.Array, tuple[int, int]]:
    """Chunks on the lattice with their context, without it, and how far before the planes the first one begins.

    The window is filled up to whole chunks, because `overlap` would merge a narrow one with its neighbour.
    """
    stack_fyx = da.stack([da.asarray(plane).astype(np.float32) for plane in planes])
    before = origin_px[0] % chunk_px, origin_px[1] % chunk_px
    after = [-(first + size) % chunk_px for first, size in zip(origin_px, stack_fyx.shape[1:], strict=True)]
    filled = stack_fyx
    for axis, widths in enumerate(zip(before, after, strict=True), start=1):
        filled = _between(filled, widths, axis)
    filled = filled.rechunk({0: -1, 1: chunk_px, 2: chunk_px})
    around = filled
    if context_px:
        around = da.overlap.overlap(
            filled, depth={0: 0, 1: context_px, 2: context_px}, boundary={0: "none", 1: np.nan, 2: np.nan}
        )
    return around, filled, before


def _between(array_fyx: da.Array, widths: tuple[int, int], axis: int) -> da.Array:
    """An array between unknown pixels; `da.pad` would cut them as small as the smallest chunk."""
    shapes = [(*array_fyx.shape[:axis], width, *array_fyx.shape[axis + 1 :]) for width in widths]
    before, after = (da.full(shape, np.nan, np.float32, chunks=CHUNK_PX) for shape in shapes)
    return da.concatenate([before, array_fyx, after], axis=axis)


def _run_chunk(around_fyx: np.ndarray, run: Callable[..., np.ndarray], *, context_px: int) -> np.ndarray:
    """One chunk with its context; it begins at a multiple of units, wherever it lies."""
    return run(list(around_fyx), origin_px=(0, 0), margin_px=context_px)


def _run_region(
    around_fyx: np.ndarray,
    detector: WindowedDetector,
    *,
    context_px: int,
    corner_px: tuple[int, int],
    block_info: Any = None,
) -> np.ndarray:
    """One chunk with its context; corner_px : global row and column at which the first chunk begins."""
    _, (top, _), (left, _) = block_info[None]["array-location"]
    origin_px = corner_px[0] + top, corner_px[1] + left
    return detector.predict_region(list(around_fyx), origin_px=origin_px, margin_px=context_px)


def _run_units(
    block_function: Callable[[np.ndarray], np.ndarray],
    planes_yx: list[np.ndarray],
    *,
    context_px: int,
    unknown: np.generic,
    origin_px: tuple[int, int],
    margin_px: int = 0,
) -> np.ndarray:
    """Apply the function to every unit of the lattice that touches the core, each filled up to its whole shape.

    margin_px : of the planes around the core; what lies beyond the planes is NaN
    origin_px : global row and column of the core's first pixel
    """
    height, width = (size - 2 * margin_px for size in planes_yx[0].shape)
    out_yx = np.full((height, width), unknown)
    side = UNIT_PX + 2 * context_px
    for top in _unit_starts(origin_px[0], height):
        for left in _unit_starts(origin_px[1], width):
            unit_fyx = np.full((len(planes_yx), side, side), np.nan, np.float32)
            rows, in_rows = _shared(top - context_px + margin_px, side, planes_yx[0].shape[0])
            cols, in_cols = _shared(left - context_px + margin_px, side, planes_yx[0].shape[1])
            for unit_yx, plane_yx in zip(unit_fyx, planes_yx, strict=True):
                unit_yx[in_rows, in_cols] = plane_yx[rows, cols]
            core = slice(context_px, context_px + UNIT_PX)
            if np.isnan(unit_fyx[:, core, core]).all():
                continue
            rows, in_rows = _shared(top, UNIT_PX, height)
            cols, in_cols = _shared(left, UNIT_PX, width)
            out_yx[rows, cols] = block_function(unit_fyx)[in_rows, in_cols]
    return out_yx


def _unit_starts(first: int, size: int) -> Iterator[int]:
    """Where units begin, counted from the core's first pixel: the first one begins at or before it."""
    yield from range(-(first % UNIT_PX), size, UNIT_PX)


def _shared(start: int, length: int, size: int) -> tuple[slice, slice]:
    """What `start .. start + length` shares with `0 .. size`: as a slice of the whole, and of the part."""
    low = max(start, 0)
    high = max(min(start + length, size), low)
    return slice(low, high), slice(low - start, high - start)
