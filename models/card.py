"""Cards: what a model is, what it reads, and what it may be trusted with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from slidecube.models.errors import ModelError


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
    architecture : what computes; parameters : its numbers, each a part of the detection's key
    inputs : features read; window_px : side of the context that one pixel needs, 1 for a rule on the pixel alone
    threshold : probability from which a pixel is landslide
    min_area_m2 : objects below are not reported; weights_sha256 : "" for a rule
    training, metrics, licence, source : in words, for people
    """

    name: str
    version: int
    architecture: str
    inputs: FeatureSpec
    window_px: int
    threshold: float
    min_area_m2: float
    parameters: Mapping[str, float] = field(default_factory=dict)
    weights_sha256: str = ""
    training: str = ""
    metrics: str = ""
    licence: str = "Apache-2.0"
    source: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ModelError(f"threshold={self.threshold} is not allowed; a probability between 0 and 1 is")
        if not (self.min_area_m2 >= 0 and np.isfinite(self.min_area_m2)):
            raise ModelError(f"min_area_m2={self.min_area_m2} is not allowed; 0 or more square metres are")

    @property
    def address(self) -> str:
        """Name and version, as users write it."""
        return f"{self.name}@{self.version}"
