"""Patches: what networks learn from, wherever they lie.

Axes: f feature, y row, x column.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from slidecube.models.card import FeatureSpec

STABLE, LANDSLIDE = 0, 1
UNLABELLED = 254
"""Nobody looked here, or nobody says so: a landslide may be there. A positive-unlabelled loss learns from it, others
leave it out."""
IGNORE = 255
"""Not observable: nothing is learnt from it, and nothing is judged."""


class Patches(Protocol):
    """A set of patches, read one by one; several threads and processes may read at once."""

    @property
    def features(self) -> FeatureSpec:
        """Features of a patch, in order."""
        ...

    @property
    def units(self) -> tuple[str, ...]:
        """Units of the features."""
        ...

    @property
    def resolution_m(self) -> float:
        """Side of a pixel."""
        ...

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        ...

    @property
    def digest(self) -> str:
        """Of all that decides what is read, 16 hex digits."""
        ...

    @property
    def regions(self) -> tuple[str, ...]:
        """Region of each patch, by which samples are stratified and events left out."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Read a patch: (f, y, x) float32 in the features' units, NaN = unknown, and (y, x) uint8 labels.

        seed : of the place of a random crop; equal seeds give equal bits, and fixed patches do not look at it
        Raises ModelError for what is damaged or of another shape, naming the patch.
        """
        ...


@runtime_checkable
class Placed(Protocol):
    """Patches that know which of them lie near each other."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Spatial block of each patch, "" = not known: patches of one are alike."""
        ...


def blocks_of(patches: Patches) -> tuple[str, ...]:
    """Spatial block of each patch, "" where the patches do not know."""
    return patches.blocks if isinstance(patches, Placed) else ("",) * len(patches)
