"""Detectors that are rules: no weights, no training, an answer on day one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from slidecube.models.card import FeatureSpec, ModelCard, merged_parameters
from slidecube.models.devices import Device
from slidecube.models.errors import ModelError
from slidecube.models.predict import Progress

RDNDVI_DEFAULTS: Mapping[str, float] = {
    # A canopy (NDVI .8) that falls to .55 loses 22 %, one that falls to .5 loses 26 %: a third of the pixel is bare
    "loss_pct": 25.0,
    # Width of the transition, per cent of relative change: the spread of rdNDVI between two undisturbed seasons
    "loss_width_pct": 5.0,
    # Sources below 10 degrees are rare (Malamud 2004 and the inventories there), rivers and fields common
    "slope_deg": 10.0,
    "slope_width_deg": 2.0,
}
"""Parameters of `rdndvi`, chosen from the literature before it was run on anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RdNdvi:
    """Relative loss of vegetation on a slope.

    Both conditions must hold: the relative change of NDVI falls below `-loss_pct`, and the slope exceeds `slope_deg`.
    Each gives a logistic membership that is 0.5 at its limit; the probability is the smaller of the two (a fuzzy AND),
    so that at threshold 0.5 it is exactly the rule.

    Source: index of Scheip & Wegmann 2021 (HazMapper), with a limit on slope as in ENS and CAE.
    """

    card: ModelCard

    def fit(
        self,
        patches_nfyx: np.ndarray,
        *,
        checkpoint: Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Return itself: a rule learns nothing."""
        del patches_nfyx, checkpoint, progress
        return self

    def on(self, device: Device) -> Self:
        """Return itself: a rule has no network."""
        del device
        return self

    def save(self, folder: Path) -> None:
        """Write nothing: all that it knows is on its card."""

    def restore(self, folder: Path) -> Self:
        """Return itself."""
        del folder
        return self

    def predict_block(self, features_fyx: np.ndarray) -> np.ndarray:
        """Probability of one block; see `Detector.predict_block`."""
        change_pct, slope_deg = features_fyx
        p = self.card.parameters
        loss = _logistic((-change_pct - p["loss_pct"]) / p["loss_width_pct"])
        steep = _logistic((slope_deg - p["slope_deg"]) / p["slope_width_deg"])
        probability: np.ndarray = np.minimum(loss, steep).astype(np.float32)
        return probability


def rdndvi(*, threshold: float | None, min_area_m2: float | None, parameters: Mapping[str, float]) -> RdNdvi:
    """Build the detector; unknown parameters are refused with the list of known ones."""
    merged = merged_parameters("rdndvi", RDNDVI_DEFAULTS, parameters)
    bad = [
        k
        for k, v in merged.items()
        if not np.isfinite(v) or (k.endswith(("width_pct", "width_deg")) and v <= 0)
    ]
    if bad:
        raise ModelError(
            f"Parameter {bad[0]}={merged[bad[0]]} of model 'rdndvi' must be finite, and a width above 0"
        )
    card = ModelCard(
        name="rdndvi",
        version=1,
        architecture="rule: relative NDVI loss and slope, fuzzy AND",
        inputs=FeatureSpec(names=("rdndvi", "slope_deg")),
        window_px=1,
        threshold=0.5 if threshold is None else threshold,
        min_area_m2=500.0 if min_area_m2 is None else min_area_m2,
        parameters=merged,
        training="none",
        metrics="none on the ground; on simulated scenes see docs/simulation.md",
        source="Scheip & Wegmann 2021 (HazMapper), doi:10.5194/nhess-21-1495-2021",
    )
    return RdNdvi(card=card)


def _logistic(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        p: np.ndarray = 1.0 / (1.0 + np.exp(-x))
    return p
