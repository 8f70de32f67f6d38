"""The protocol that every detector follows, and its lazy application to a cube."""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
import xarray as xr

from slidecube.models.card import ModelCard
from slidecube.models.errors import ModelError


class Detector(Protocol):
    """A detector of landslides.

    It reads features by name, one lattice block at a time with `card.window_px // 2` pixels of context on each side,
    and returns the probability of a landslide in each pixel.
    """

    @property
    def card(self) -> ModelCard:
        """What it is, what it reads, and its threshold."""
        ...

    def fit(self, features: xr.Dataset) -> Self:
        """Learn what is learnt from the cube itself (cluster centres, normalisation); rules return themselves."""
        ...

    def predict_block(self, features_fyx: np.ndarray) -> np.ndarray:
        """Probability of one block.

        features_fyx : (feature, y, x) float32 in the order of `card.inputs.names`, NaN = unknown
        Returns (y, x) float32 in [0, 1], NaN where it cannot be said.
        """
        ...


def predict(detector: Detector, features: xr.Dataset) -> xr.Dataset:
    """Apply a detector to a cube of features, lazily where the cube is lazy.

    features : (y, x) variables, at least those of the card; in Dask chunks or in memory
    Returns `probability` (y, x) float32, NaN = not observable.
    Raises ModelError when a feature is missing.
    """
    names = detector.card.inputs.names
    missing = [name for name in names if name not in features]
    if missing:
        raise ModelError(
            f"Model {detector.card.address} needs the features {', '.join(names)}; missing: {', '.join(missing)}"
        )
    if detector.card.window_px != 1:
        raise ModelError(
            f"Model {detector.card.address} needs context of {detector.card.window_px} px; "
            "predict applies it with its halo only through the tile program"
        )
    probability: xr.DataArray = xr.apply_ufunc(
        lambda *planes: detector.predict_block(np.stack(planes)),
        *(features[name].astype(np.float32) for name in names),
        dask="parallelized",
        output_dtypes=[np.float32],
    )
    probability.attrs.update(long_name="landslide probability", units="1")
    return xr.Dataset({"probability": probability})
