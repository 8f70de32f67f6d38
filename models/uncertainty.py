"""How sure a probability is: its entropy, the spread of several of them, and views of one patch (test-time augmentation).

Axes: m member or view, b batch, c channel, y row, x column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

ASPECT = "aspect_deg"
"""The feature whose values turn with the image: degrees clockwise from north, rows to the south, columns to the east."""


def entropy_bits(probability: np.ndarray) -> np.ndarray:
    """Entropy of a probability in bits, 0 (sure) to 1 (a coin); float32, NaN stays NaN.

    Source: Shannon 1948; of the mean of members it is the total uncertainty (Depeweg et al. 2018).
    """
    p = np.asarray(probability, np.float64)
    nats = scipy.special.entr(p) + scipy.special.entr(1 - p)
    return np.asarray(nats / np.log(2), np.float32)


def spread(probability_m: np.ndarray) -> np.ndarray:
    """Standard deviation over the members (axis 0), of the members themselves and not of a population (ddof 0)."""
    return np.asarray(probability_m, np.float64).std(axis=0).astype(np.float32)


def mutual_information_bits(probability_m: np.ndarray) -> np.ndarray:
    """What the members disagree on: entropy of their mean less the mean of their entropies, in bits, 0 or more.

    Source: Houlsby et al. 2011, eq. 1.
    """
    members = np.asarray(probability_m, np.float64)
    total = entropy_bits(members.mean(axis=0)).astype(np.float64)
    own = np.stack([entropy_bits(p) for p in members]).astype(np.float64).mean(axis=0)
    return np.maximum(total - own, 0).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A patch as it would look from elsewhere: mirrored left to right, and then turned by quarters against the clock.

    aspect_channels : places of `aspect_deg` among the channels
    """

    flip: bool
    quarters: int
    aspect_channels: tuple[int, ...] = ()

    def see(self, x_bcyx: np.ndarray) -> np.ndarray:
        """Turn patches, square, in the features' units and before their normalisation; a copy."""
        seen = x_bcyx[..., ::-1] if self.flip else x_bcyx
        seen = np.ascontiguousarray(np.rot90(seen, self.quarters, axes=(-2, -1)))
        for channel in self.aspect_channels:
            seen[:, channel] = self.aspect_deg(seen[:, channel])
        return seen

    def aspect_deg(self, aspect_deg: np.ndarray) -> np.ndarray:
        """Turn directions: mirrored, east is west; a quarter against the clock takes 90 degrees off."""
        turned = 360 - aspect_deg if self.flip else aspect_deg
        return np.asarray((turned - 90 * self.quarters) % 360, aspect_deg.dtype)

    def back(self, map_byx: np.ndarray) -> np.ndarray:
        """Turn maps of a view back to where they belong."""
        found = np.rot90(map_byx, -self.quarters, axes=(-2, -1))
        return np.ascontiguousarray(found[..., ::-1] if self.flip else found)


def tta_views(names: Sequence[str]) -> tuple[View, ...]:
    """Return the eight symmetries of a square, the patch as it is first; names : of the features, in order.

    What has a direction other than `aspect_deg` cannot be turned: layover, shadow and incidence of a radar, and the
    light of the sun, come from one side. Such features are seen as they are, as they were in training.
    """
    aspect = tuple(i for i, name in enumerate(names) if name == ASPECT)
    return tuple(
        View(flip=flip, quarters=quarters, aspect_channels=aspect)
        for flip in (False, True)
        for quarters in range(4)
    )


def with_tta(
    logits_of: Callable[[np.ndarray], np.ndarray], x_bcyx: np.ndarray, views: Sequence[View]
) -> tuple[np.ndarray, np.ndarray]:
    """Probability as the mean over views, and its spread: (b, y, x) float32 each.

    logits_of : (b, c, y, x) in the features' units -> (b, y, x) logits
    """
    seen_mbyx = np.stack(
        [scipy.special.expit(view.back(logits_of(view.see(x_bcyx)))).astype(np.float32) for view in views]
    )
    return seen_mbyx.mean(axis=0, dtype=np.float64).astype(np.float32), spread(seen_mbyx)
