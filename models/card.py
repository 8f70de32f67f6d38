"""Cards: what a model is, what it reads, and what it may be trusted with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from slidecube.models.errors import ModelError

PROBABILITY_STEP = 1e-4
"""Steps in which probabilities are kept, downwards."""

THRESHOLDS = (PROBABILITY_STEP, 1 - PROBABILITY_STEP)
"""The lowest and the highest threshold: of kept probabilities others would call everything a landslide, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """The features that a model reads, by name and in order.

    names : such as ("rdndvi", "slope_deg"); version : of their definitions
    """

    names: tuple[str, ...]
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Identity and limits of a model.

    name, version : together its address, "rdndvi@1"
    architecture : what computes
    parameters : its numbers, each a part of the detection's key, and all numbers that `fit` depends on
    inputs : features read; window_px : side of the context that one pixel needs, 1 for a rule on the pixel alone
    threshold : probability from which a pixel is landslide
    min_area_m2 : objects below are not reported; weights_sha256 : "" for a rule, and for what is not fitted yet
    content_sha256 : of all that decides a network's probabilities, "" for what has no card of its own
    sample_patches : patches that it learns from, 0 when there is nothing to learn
    training, metrics, licence, source : in words, for people
    """

    name: str
    version: int
    architecture: str
    inputs: FeatureSpec
    window_px: int
    threshold: float
    min_area_m2: float
    sample_patches: int = 0
    parameters: Mapping[str, float] = field(default_factory=dict)
    weights_sha256: str = ""
    content_sha256: str = ""
    training: str = ""
    metrics: str = ""
    licence: str = "Apache-2.0"
    source: str = ""

    def __post_init__(self) -> None:
        low, high = THRESHOLDS
        if not low <= self.threshold <= high:
            raise ModelError(
                f"threshold={self.threshold} is not allowed; a probability from {low} to {high} is, in whose steps "
                "probabilities are kept"
            )
        if not (self.min_area_m2 >= 0 and np.isfinite(self.min_area_m2)):
            raise ModelError(f"min_area_m2={self.min_area_m2} is not allowed; 0 or more square metres are")
        if not (self.window_px >= 1 and self.window_px % 2):
            raise ModelError(f"window_px={self.window_px} is not allowed; an odd number of pixels is")
        if self.sample_patches < 0:
            raise ModelError(f"sample_patches={self.sample_patches} is not allowed; 0 or more patches are")

    @property
    def address(self) -> str:
        """Name and version, as users write it."""
        return f"{self.name}@{self.version}"


def merged_parameters(
    model: str, defaults: Mapping[str, float], given: Mapping[str, float]
) -> dict[str, float]:
    """Parameters of a model with the user's; raises ModelError for unknown ones, with the list of known ones."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ModelError(
            f"Model {model!r} has no parameter {', '.join(unknown)}; it has: {', '.join(defaults)}"
        )
    return {**defaults, **given}
