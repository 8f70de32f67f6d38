"""How sure a probability is: its entropy, the spread of several, and views of one patch (test-time augmentation).

Axes: m member, f feature, y row, x column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

from slidecube.models.augment import can_turn, directions, mirrored, turned


def entropy_bits(probability: np.ndarray) -> np.ndarray:
    """Entropy of a probability in bits, 0 (sure) to 1 (a coin); float32, NaN stays NaN.

    Source: Shannon 1948; of the mean of members it is the total uncertainty (Depeweg et al. 2018).
    """
    p = np.asarray(probability, np.float64)
    nats = scipy.special.entr(p) + scipy.special.entr(1 - p)
    return np.asarray(nats / np.log(2), np.float32)


def spread(probability_m: np.ndarray) -> np.ndarray:
    """Standard deviation over the members (axis 0), of the members themselves and not of a population (ddof 0)."""
    return np.asarray(np.asarray(probability_m, np.float64).std(axis=0), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A patch as it would look from elsewhere: mirrored east to west, then turned by quarters against the clock.

    names : of the features; those that are directions turn with the ground (`augment`)
    """

    names: tuple[str, ...]
    mirror: bool
    quarters: int

    def see(self, x_fyx: np.ndarray) -> np.ndarray:
        """Turn features, in their units and before they are normalised; a copy."""
        seen = mirrored(x_fyx, self.names) if self.mirror else x_fyx
        return turned(seen, self.names, self.quarters)

    def back(self, maps: np.ndarray) -> np.ndarray:
        """Turn maps of a view, (..., y, x), back to where they belong."""
        found = np.rot90(maps, -self.quarters, axes=(-2, -1))
        return np.ascontiguousarray(found[..., ::-1] if self.mirror else found)

    def in_place(self, planes_yx: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return features with the values that they have in the view, each pixel where it was: directions turn."""
        planes, turning = list(planes_yx), directions(self.names)
        if turning:
            own = View(
                names=tuple(self.names[i] for i in turning), mirror=self.mirror, quarters=self.quarters
            )
            for i, plane_yx in zip(
                turning, own.back(own.see(np.stack([planes[i] for i in turning]))), strict=True
            ):
                planes[i] = plane_yx
        return planes


def tta_views(names: Sequence[str]) -> tuple[View, ...]:
    """Return the symmetries of a square, the patch as it is first; names : of the features, in order.

    Eight of them, or four where a feature is one part of a direction without the other, which no quarter turn can be
    computed of. A radar's view and the light of the sun are seen as they are, as they were in training.
    """
    quarters = range(4) if can_turn(names) else (0, 2)
    return tuple(
        View(names=tuple(names), mirror=mirror, quarters=q) for mirror in (False, True) for q in quarters
    )
