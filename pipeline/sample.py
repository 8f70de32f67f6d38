"""Samples: which pixels a model learns from, chosen by a hash of their place on the grid.

Axes in names: n patch, f feature, y, x.

A hash needs no order and no count, so the same pixels are chosen whatever the tiles and however many workers there
are; and they are spread over the whole area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from slidecube.pipeline.storage import Place, write_atomic

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MARGIN = 1.25
"""Candidates for each patch wanted: some of the pixels that the fit counted have no slope, or no index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Patches around chosen pixels.

    hash_n : uint64, of each pixel; row_n, col_n : int64, its place in the grid's frame
    patches_nfyx : float32, in the order of the features, NaN where the surroundings are unknown
    """

    hash_n: np.ndarray
    row_n: np.ndarray
    col_n: np.ndarray
    patches_nfyx: np.ndarray

    def save(self, path: Place) -> None:
        """Write it, uncompressed, whole or not at all."""
        held = BytesIO()
        np.savez(held, **{name: getattr(self, name) for name in self.__slots__})
        write_atomic(path, held.getvalue())

    @classmethod
    def read(cls, path: Place) -> Sample:
        """Read what `save` wrote."""
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in cls.__slots__})


def pixel_hash(rows: np.ndarray, cols: np.ndarray, seed: int = 0) -> np.ndarray:
    """Hash of pixels by their row and column in the grid's frame: uint64, evenly spread.

    rows, cols : whole numbers of any shape that broadcast, below 2^32; seed : another one chooses other pixels
    Source: the finaliser of SplitMix64 (Steele, Lea & Flood 2014, figure 15), twice.
    """
    place = (rows.astype(np.uint64) << np.uint64(32)) | cols.astype(np.uint64)
    return _mixed(_mixed(place) ^ _mixed(np.array(seed, np.uint64)))


def limit_of(patches: int, pixels: int) -> int:
    """Hash below which pixels are candidates, for so many patches out of so many pixels."""
    share = _MARGIN * patches / max(pixels, 1)
    return min(int(share * 2.0**64), 2**64 - 1)


def draw(
    features_fyx: np.ndarray, eligible_yx: np.ndarray, *, first_px: tuple[int, int], limit: int, seed: int
) -> Sample:
    """Take the patches of a window.

    features_fyx : float32 with c pixels of context on each side of what `eligible_yx` covers
    eligible_yx : bool, pixels that may be centres
    first_px : row and column in the frame of the first of them; limit : of the hash, as by `limit_of`
    """
    context = (features_fyx.shape[1] - eligible_yx.shape[0]) // 2
    height, width = eligible_yx.shape
    rows = np.arange(first_px[0], first_px[0] + height)
    cols = np.arange(first_px[1], first_px[1] + width)
    hash_yx = pixel_hash(rows[:, None], cols[None, :], seed)
    y_n, x_n = np.nonzero(eligible_yx & (hash_yx <= np.uint64(limit)))
    side = 2 * context + 1
    windows_fyxab = np.lib.stride_tricks.sliding_window_view(features_fyx, (side, side), axis=(1, 2))
    return Sample(
        hash_n=hash_yx[y_n, x_n],
        row_n=rows[y_n],
        col_n=cols[x_n],
        patches_nfyx=np.ascontiguousarray(windows_fyxab[:, y_n, x_n].swapaxes(0, 1), np.float32),
    )


def gather(paths: Sequence[Place], patches: int) -> Sample:
    """Join the samples of tiles, in one order whatever the tiles, and keep the patches of the smallest hashes.

    paths : files as `Sample.save` writes them; the patches of one at a time are in memory beside those that are kept
    """
    places = []
    for part, path in enumerate(paths):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            count = len(arrays["hash_n"])
            places.append(
                (arrays["hash_n"], arrays["row_n"], arrays["col_n"], np.full(count, part), np.arange(count))
            )
    hash_n, row_n, col_n, part_n, at_n = (np.concatenate(column) for column in zip(*places, strict=True))
    kept = np.lexsort((col_n, row_n, hash_n))[:patches]
    out: np.ndarray | None = None
    for part, path in enumerate(paths):
        own = np.flatnonzero(part_n[kept] == part)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            held = arrays["patches_nfyx"]
        out = np.empty((len(kept), *held.shape[1:]), np.float32) if out is None else out
        out[own] = held[at_n[kept[own]]]
    assert out is not None
    return Sample(hash_n=hash_n[kept], row_n=row_n[kept], col_n=col_n[kept], patches_nfyx=out)


def _mixed(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = z + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = z ^ (z >> np.uint64(31))
        return mixed
