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


ALDI_DEFAULTS: Mapping[str, float] = {
    # Exponents of the three factors; 1 each, as no inventory was used to choose others
    "alpha": 1.0,
    "beta": 1.0,
    "lambda": 1.0,
    # A canopy (NDVI .8) that certainly falls to .5 has an index of .3 * .5: a third of the pixel is bare, as in rdndvi
    "limit": 0.15,
    "limit_width": 0.03,
    "slope_deg": 10.0,
    "slope_width_deg": 2.0,
}
"""Parameters of `aldi`, chosen from `rdndvi`'s before it was run on anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A detector that has nothing to learn: all that it knows is on its card."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RdNdvi(Rule):
    """Relative loss of vegetation on a slope.

    Both conditions must hold: the relative change of NDVI falls below `-loss_pct`, and the slope exceeds `slope_deg`.
    Each gives a logistic membership that is 0.5 at its limit; the probability is the smaller of the two (a fuzzy AND),
    so that at threshold 0.5 it is exactly the rule.

    Source: index of Scheip & Wegmann 2021 (HazMapper), with a limit on slope as in ENS and CAE.
    """

    def predict_block(self, features_fyx: np.ndarray) -> np.ndarray:
        """Probability of one block; see `Detector.predict_block`."""
        change_pct, slope_deg = features_fyx
        p = self.card.parameters
        loss = _logistic((-change_pct - p["loss_pct"]) / p["loss_width_pct"])
        steep = _logistic((slope_deg - p["slope_deg"]) / p["slope_width_deg"])
        probability: np.ndarray = np.minimum(loss, steep).astype(np.float32)
        return probability


@dataclass(frozen=True, slots=True, kw_only=True)
class Aldi(Rule):
    """A fall of NDVI that is large, leaves little green, and is not chance; on a slope.

    The index must exceed `limit`, and the slope `slope_deg`; memberships as in `RdNdvi`.

    Source: after Milledge et al. 2022; see `aldi_index` for what of it is certain. The limit on slope is ours, so that
    it stands beside `rdndvi` on equal terms.
    """

    def predict_block(self, features_fyx: np.ndarray) -> np.ndarray:
        """Probability of one block; see `Detector.predict_block`."""
        pre, post, chance, slope_deg = features_fyx
        p = self.card.parameters
        index = aldi_index(pre, post, chance, exponents=(p["alpha"], p["beta"], p["lambda"]))
        loss = _logistic((index - p["limit"]) / p["limit_width"])
        steep = _logistic((slope_deg - p["slope_deg"]) / p["slope_width_deg"])
        probability: np.ndarray = np.minimum(loss, steep).astype(np.float32)
        return probability


def aldi_index(
    ndvi_pre: np.ndarray,
    ndvi_post: np.ndarray,
    loss_p: np.ndarray,
    exponents: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> np.ndarray:
    """Product of three signs of a landslide in NDVI's series: how much it fell, how little is left, how surely.

    ndvi_pre, ndvi_post : means over the clear observations; loss_p : probability that the mean fell (t-test)
    exponents : of the fall, of what is left, and of the probability; 0 or more
    Returns float in [0, 2], 0 where it did not fall; NaN where any is NaN.
    Source: after Milledge et al. 2022, doi:10.5194/nhess-22-481-2022, an index of the pixel-wise difference of NDVI's
    series. The paper's own equation and exponents were not at hand: that these three are multiplied, the form of the
    second, 1 - NDVI, and the exponents of 1 are ours to answer for.
    """
    pre, post, chance = np.clip(ndvi_pre, -1, 1), np.clip(ndvi_post, -1, 1), np.clip(loss_p, 0, 1)
    fall, bare = np.maximum(pre - post, 0), 1 - np.maximum(post, 0)
    product = fall ** exponents[0] * bare ** exponents[1] * chance ** exponents[2]
    unknown = np.isnan(fall + chance)  # which a power of 0 would forget, as it would that nothing fell
    index: np.ndarray = np.where(unknown, np.nan, np.where(fall > 0, product, 0)).astype(product.dtype)
    return index


def rdndvi(*, threshold: float | None, min_area_m2: float | None, parameters: Mapping[str, float]) -> RdNdvi:
    """Build the detector; unknown parameters are refused with the list of known ones."""
    merged = _checked("rdndvi", RDNDVI_DEFAULTS, parameters)
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


def aldi(*, threshold: float | None, min_area_m2: float | None, parameters: Mapping[str, float]) -> Aldi:
    """Build the detector; unknown parameters are refused with the list of known ones."""
    merged = _checked("aldi", ALDI_DEFAULTS, parameters)
    negative = [k for k in ("alpha", "beta", "lambda") if merged[k] < 0]
    if negative:
        raise ModelError(f"Parameter {negative[0]}={merged[negative[0]]} of model 'aldi' must be 0 or more")
    card = ModelCard(
        name="aldi",
        version=1,
        architecture="rule: fall of mean NDVI x bareness after x probability of the fall, and slope, fuzzy AND",
        inputs=FeatureSpec(names=("ndvi_mean_pre", "ndvi_mean_post", "ndvi_loss_p", "slope_deg")),
        window_px=1,
        threshold=0.5 if threshold is None else threshold,
        min_area_m2=500.0 if min_area_m2 is None else min_area_m2,
        parameters=merged,
        training="none; the exponents are 1, not those that the paper fitted to inventories",
        metrics="none on the ground; it needs two clear observations on each side",
        source="after Milledge et al. 2022, doi:10.5194/nhess-22-481-2022: fall, what is left, and t-test of NDVI's "
        "series; NOT the paper's exact equation and exponents, which were not at hand",
    )
    return Aldi(card=card)


def _checked(model: str, defaults: Mapping[str, float], given: Mapping[str, float]) -> dict[str, float]:
    merged = merged_parameters(model, defaults, given)
    bad = [k for k, v in merged.items() if not np.isfinite(v) or ("width" in k and v <= 0)]
    if bad:
        raise ModelError(
            f"Parameter {bad[0]}={merged[bad[0]]} of model {model!r} must be finite, and a width above 0"
        )
    return merged


def _logistic(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        p: np.ndarray = 1.0 / (1.0 + np.exp(-x))
    return p
