"""Splits: which patches are learnt from and which judge, so that no ground is in two parts.

Axes in names: n patch, b spatial block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slidecube.models.card import FeatureSpec
from slidecube.models.errors import ModelError
from slidecube.models.patches import Patches, blocks_of

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
"""What a patch is for: to learn from, to choose and stop by, to judge by once."""


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Some patches of a set, as a set; indices : of them, in the order that they get."""

    of: Patches
    indices: tuple[int, ...]

    @property
    def features(self) -> FeatureSpec:
        """Features of a patch, in order."""
        return self.of.features

    @property
    def units(self) -> tuple[str, ...]:
        """Units of the features."""
        return self.of.units

    @property
    def resolution_m(self) -> float:
        """Side of a pixel."""
        return self.of.resolution_m

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        return self.of.patch_px

    @cached_property
    def digest(self) -> str:
        """Of all that decides what is read."""
        return _digest(self.of.digest, *self.indices)

    @cached_property
    def regions(self) -> tuple[str, ...]:
        """Region of each patch."""
        whole = self.of.regions
        return tuple(whole[i] for i in self.indices)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Spatial block of each patch."""
        whole = blocks_of(self.of)
        return tuple(whole[i] for i in self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Read a patch."""
        return self.of.read(self.indices[index], seed=seed)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Several sets as one, one after another; of none at all it is an empty set."""

    members: tuple[Patches, ...]
    features: FeatureSpec
    units: tuple[str, ...]
    resolution_m: float
    patch_px: int

    @cached_property
    def digest(self) -> str:
        """Of all that decides what is read."""
        return _digest("joined", *(member.digest for member in self.members))

    @cached_property
    def regions(self) -> tuple[str, ...]:
        """Region of each patch."""
        return tuple(region for member in self.members for region in member.regions)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Spatial block of each patch."""
        return tuple(block for member in self.members for block in blocks_of(member))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(member) for member in self.members], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.members else 0

    def read(self, index: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Read a patch."""
        if not 0 <= index < len(self):
            raise IndexError(f"patch {index} of {len(self)}")
        at = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[at - 1]) if at else 0
        return self.members[at].read(index - first, seed=seed)


def join(sets: Sequence[Patches], *, like: Patches | None = None) -> Joined:
    """Join sets of the same features, units, pixels and size; like : one that says these where there is none.

    Raises ModelError, naming what differs.
    """
    first = next(iter(sets), like)
    assert first is not None
    for other in sets:
        for what in ("features", "units", "resolution_m", "patch_px"):
            got, wanted = getattr(other, what), getattr(first, what)
            if got != wanted:
                raise ModelError(
                    f"Patches of {got} and of {wanted} do not go together ({what}); use one of them"
                )
    return Joined(
        members=tuple(member for member in sets if len(member)),
        features=first.features,
        units=first.units,
        resolution_m=first.resolution_m,
        patch_px=first.patch_px,
    )


def share_out(
    hash_b: NDArray[np.uint64], holds_b: NDArray[np.bool_], shares: tuple[float, float, float]
) -> NDArray[np.int64]:
    """Share blocks among the parts: those that hold landslides and those that do not, each by these shares.

    hash_b : by which blocks are ranked, so that equal hashes give equal parts whatever the order
    holds_b : whether a block holds a landslide
    Returns the position in `PARTS` of each. Every part with a share gets a block that holds a landslide where there
    are enough of them.
    """
    part_b = np.zeros(len(hash_b), np.int64)
    for kind in (True, False):
        own = np.flatnonzero(holds_b == kind)
        ranked = own[np.argsort(hash_b[own], kind="stable")]
        part_b[ranked] = np.repeat(np.arange(3), _counts(len(ranked), shares))
    return part_b


def _counts(n: int, shares: tuple[float, float, float]) -> list[int]:
    """Whole numbers in the ratio of the shares that add up to n; a share above 0 gets one where n allows it."""
    exact = np.array(shares) / sum(shares) * n
    counts = np.floor(exact).astype(int)
    for at in np.argsort(-(exact - counts), kind="stable")[: n - counts.sum()]:
        counts[at] += 1
    for at in np.flatnonzero((np.array(shares) > 0) & (counts == 0)):
        most = int(np.argmax(counts))
        if counts[most] > 1:
            counts[most] -= 1
            counts[at] += 1
    return [int(count) for count in counts]


def cut_touching(
    touching: Iterable[tuple[int, int]], hash_n: NDArray[np.uint64], shares: tuple[float, float, float]
) -> NDArray[np.int64]:
    """Share patches among the parts so that no two which touch are in different ones.

    Patches that hang together are one group, and groups are shared by their sizes. Of a group larger than what a part
    wants the patches are cut in their own order, and those at the cut are in no part.
    touching : pairs of patches; hash_n : by which groups are ranked, of each its first patch's
    Returns the position in `PARTS` of each patch, -1 = in none.
    """
    n = len(hash_n)
    pairs = np.array(sorted(set(touching)), np.int64).reshape(-1, 2)
    groups = sorted(_groups(n, pairs), key=lambda group: (int(hash_n[group[0]]), group[0]))
    order = [patch for group in groups for patch in group]
    part_n = np.full(n, -1, np.int64)
    part_n[order] = np.repeat(np.arange(3), _counts(n, shares))
    sizes = np.bincount(part_n, minlength=3)
    for a, b in pairs.tolist():
        if part_n[a] != part_n[b] and min(part_n[a], part_n[b]) >= 0:
            part_n[a if sizes[part_n[a]] >= sizes[part_n[b]] else b] = -1  # the larger part can spare it
    return part_n


def _groups(n: int, pairs: NDArray[np.int64]) -> list[list[int]]:
    """Patches that hang together, each group in rising order."""
    from scipy.sparse import coo_array  # noqa: PLC0415  splits are made once, and planning imports this module
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    ones = np.ones(len(pairs), np.int8)
    _, label_n = connected_components(
        coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(n, n)), directed=False
    )
    groups: dict[int, list[int]] = {}
    for patch, label in enumerate(label_n.tolist()):
        groups.setdefault(label, []).append(patch)
    return list(groups.values())


def _digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
