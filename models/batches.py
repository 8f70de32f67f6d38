"""Batches of patches: checked, normalised, in an order that follows from the seed, and read ahead by threads.

Axes: b patch of a batch, f feature, y row, x column.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch

from slidecube.models.errors import ModelError
from slidecube.models.network import EXTREME
from slidecube.models.patches import IGNORE, LANDSLIDE, STABLE, UNLABELLED, Patches

T = TypeVar("T")
R = TypeVar("R")
Batch = tuple[torch.Tensor, torch.Tensor]
"""(b, f, y, x) float32, normalised, without NaN; (b, y, x) uint8 labels."""

_ORDER, _CROP, _AUGMENT, _TORCH = range(4)
"""What a random number is for: each purpose has a stream of its own."""


def read_patch(patches: Patches, index: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Read a patch and check it: (f, y, x) float32, NaN = unknown, and (y, x) uint8 labels.

    Nothing is learnt or judged where an input is unknown: detectors have no probability there either.
    Raises ModelError for another shape, a value that is infinite, or a label that is no class.
    """
    x_fyx, y_yx = patches.read(index, seed=seed)
    side = patches.patch_px
    want = (len(patches.features.names), side, side)
    if x_fyx.shape != want or y_yx.shape != want[1:]:
        raise ModelError(
            f"Patch {index} has features of the shape {x_fyx.shape} and labels of {y_yx.shape}; "
            f"{want} and {want[1:]} are needed"
        )
    known = _KNOWN_LABEL[y_yx] if y_yx.dtype == np.uint8 else np.isin(y_yx, _CLASSES)
    if not known.all():
        found = ", ".join(str(v) for v in np.unique(y_yx[~known])[:5])
        raise ModelError(
            f"Patch {index} has the labels {found}; allowed are {STABLE} (stable), {LANDSLIDE} (landslide), "
            f"{UNLABELLED} (unlabelled) and {IGNORE} (not observable)"
        )
    unknown = ~np.isfinite(x_fyx)
    if unknown.any():
        if np.isinf(x_fyx).any():
            raise ModelError(f"Patch {index} has infinite values; what is unknown is NaN")
        y_yx = np.where(unknown.any(axis=0), np.uint8(IGNORE), y_yx)
    return x_fyx, y_yx.astype(np.uint8, copy=False)


_CLASSES = (STABLE, LANDSLIDE, UNLABELLED, IGNORE)
_KNOWN_LABEL = np.isin(np.arange(256), _CLASSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What training patches are like.

    mean, std : (f,) float32 of the known pixels of each feature, std 1 where a feature is constant
    donors : patches with a landslide, in order, among those looked at
    """

    mean: np.ndarray
    std: np.ndarray
    donors: tuple[int, ...]


def survey(training: Patches, *, most: int, seed: int) -> Survey:
    """Look at training patches, at most so many, in float64, each value once.

    Raises ModelError where nothing can be learnt: no patch, a feature that is unknown everywhere, no landslide pixel.
    """
    if not len(training):
        raise ModelError("There is no training patch")
    order = _permutation(len(training), seed, -1)
    looked_at = np.sort(order[:most])
    moments = _Moments(len(training.features.names))
    donors = []
    for index in looked_at.tolist():
        x_fyx, y_yx = read_patch(training, index)
        moments.add(x_fyx)
        if (y_yx == LANDSLIDE).any():
            donors.append(index)
    mean, std = moments.mean_std(training.features.names)
    if not donors:
        donors = _first_with_landslide(training, order[most:].tolist(), "training")
    return Survey(mean=mean, std=std, donors=tuple(donors))


def require_landslide(patches: Patches, what: str) -> None:
    """Raise ModelError unless patches hold a landslide pixel that is observable."""
    _first_with_landslide(patches, range(len(patches)), what)


def require_judgeable(patches: Patches, what: str) -> None:
    """Raise ModelError unless patches hold both a landslide pixel and a stable one that are observable."""
    require_landslide(patches, what)
    if not any((read_patch(patches, index)[1] == STABLE).any() for index in range(len(patches))):
        raise ModelError(
            f"The {what} patches hold no stable pixel whose inputs are all known; F1 says nothing there: say complete "
            "= true where the reference holds every landslide, or judge by other data"
        )


def _first_with_landslide(patches: Patches, indices: Iterable[int], what: str) -> list[int]:
    for index in indices:
        if (read_patch(patches, index)[1] == LANDSLIDE).any():
            return [index]
    raise ModelError(
        f"The {what} patches hold no landslide pixel whose inputs are all known; F1 says nothing there: "
        "check the reference and the features, or share the data otherwise"
    )


class _Moments:
    """Mean and sum of squared deviations of each feature, merged patch by patch (Chan et al. 1983, eq. 2.1)."""

    def __init__(self, features: int) -> None:
        self.count, self.mean, self.squares = (np.zeros(features) for _ in range(3))

    def add(self, x_fyx: np.ndarray) -> None:
        flat = x_fyx.reshape(len(x_fyx), -1).astype(np.float64)
        known = np.isfinite(flat)
        count = known.sum(axis=1)
        mean = np.where(known, flat, 0).sum(axis=1) / np.maximum(count, 1)
        squares = np.where(known, flat - mean[:, None], 0)
        total = np.maximum(self.count + count, 1)
        apart = mean - self.mean
        self.mean = self.mean + apart * count / total
        self.squares = self.squares + (squares**2).sum(axis=1) + apart**2 * self.count * count / total
        self.count = self.count + count

    def mean_std(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not self.count.all():
            lost = ", ".join(name for name, n in zip(names, self.count, strict=True) if not n)
            raise ModelError(f"No training patch knows a value of {lost}; leave it out of [features] names")
        std = np.sqrt(self.squares / self.count).astype(np.float32)
        return self.mean.astype(np.float32), np.where(std > 0, std, np.float32(1))


def normalise(x_fyx: np.ndarray, mean: np.ndarray, std: np.ndarray, out: np.ndarray) -> None:
    """Write (value - mean) / std in float32, and 0, the mean, where the value is unknown: as `network.standardised`."""
    with np.errstate(over="ignore"):
        np.subtract(x_fyx, mean[:, None, None], out=out)
        np.divide(out, std[:, None, None], out=out)
    np.clip(out, -EXTREME, EXTREME, out=out)
    np.nan_to_num(out, copy=False, nan=0.0)


def stream(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """Random numbers of one purpose, which follow from nothing but these numbers."""
    return np.random.default_rng([seed, purpose, *numbers])


def torch_seed(seed: int, step: int, part: int, rank: int) -> int:
    """Seed of torch's own numbers (dropout) in one part of a step."""
    return int(stream(seed, _TORCH, step, part, rank).integers(2**62))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Which patch is drawn when: all of them in an order of their own, and again in another one, without end."""

    patches: int
    seed: int

    def patch(self, draw: int) -> int:
        """Patch of a draw, counted from the start of the training."""
        number, place = divmod(draw, self.patches)
        return int(_permutation(self.patches, self.seed, number)[place])

    def crop(self, draw: int) -> int:
        """Seed of the place of a random crop."""
        return int(stream(self.seed, _CROP, draw).integers(2**62))

    def augment(self, draw: int) -> np.random.Generator:
        """Random numbers of the augmentation of a draw."""
        return stream(self.seed, _AUGMENT, draw)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, number: int) -> np.ndarray:
    order = stream(seed, _ORDER, number + 1).permutation(n)
    order.setflags(write=False)
    return order


def empty_batch(size: int, features: int, side: int, *, layout: torch.memory_format, pinned: bool) -> Batch:
    """Memory of a batch, from torch, whose alignment is always the same: kernels look at it, and so the last bits.

    What is not written is the mean, and not observable.
    """
    x_bfyx = torch.empty((size, features, side, side), memory_format=layout, pin_memory=pinned).zero_()
    y_byx = torch.empty((size, side, side), dtype=torch.uint8, pin_memory=pinned).fill_(IGNORE)
    return x_bfyx, y_byx


def ahead(make: Callable[[T], R], items: Iterable[T], *, threads: int) -> Iterator[R]:
    """Make things in threads ahead of who takes them, in order; an error comes where its thing would have come.

    At most threads + 1 things wait in memory.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="patches") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def validation_batches(
    patches: Patches,
    indices: Sequence[int],
    *,
    mean: np.ndarray,
    std: np.ndarray,
    batch: int,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
    loaders: int = 2,
) -> Iterator[tuple[Sequence[int], Batch]]:
    """Batches of one and the same shape in order; the last one is filled with the mean and not observable labels."""

    def make(part: Sequence[int]) -> tuple[Sequence[int], Batch]:
        x_bfyx, y_byx = empty_batch(
            batch, len(mean), patches.patch_px, layout=layout, pinned=device.type != "cpu"
        )
        for i, index in enumerate(part):
            x_fyx, y_yx = read_patch(patches, index)
            normalise(x_fyx, mean, std, x_bfyx[i].numpy())
            y_byx[i].numpy()[...] = y_yx
        return part, (x_bfyx, y_byx)

    parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    for part, (x_bfyx, y_byx) in ahead(make, parts, threads=loaders):
        yield part, (x_bfyx.to(device, non_blocking=True), y_byx.to(device, non_blocking=True))
