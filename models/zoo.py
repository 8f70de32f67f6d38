"""The zoo: name -> builder, one explicit table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from slidecube.models.errors import ModelError
from slidecube.models.predict import Detector
from slidecube.models.rules import aldi, rdndvi
from slidecube.models.unsupervised import Kmeans, cae_kmeans, cae_kmeans_change, kmeans, kmeans_change


class Builder(Protocol):
    """Builds a detector from what a user may set; None = the card's own."""

    def __call__(
        self, *, threshold: float | None, min_area_m2: float | None, parameters: Mapping[str, float]
    ) -> Detector:
        """Build it."""
        ...


ZOO: Mapping[str, Builder] = {
    "rdndvi": rdndvi,
    "aldi": aldi,
    "cae-kmeans": cae_kmeans,
    "cae-kmeans-change": cae_kmeans_change,
    "kmeans": kmeans,
    "kmeans-change": kmeans_change,
}


def build_model(
    address: str,
    *,
    threshold: float | None = None,
    min_area_m2: float | None = None,
    parameters: Mapping[str, float] | None = None,
    features: Sequence[str] | None = None,
) -> Detector:
    """Build a detector by its address, "name" or "name@version".

    features : that it reads instead of its own, of models that cluster
    Raises ModelError for an unknown name, a version that is not there, bad parameters, or features it cannot take.
    """
    match = re.fullmatch(r"([a-z0-9][a-z0-9_-]*)(?:@(\d+))?", address)
    if match is None or match[1] not in ZOO:
        raise ModelError(f"No model {address!r}; models: {', '.join(ZOO)}")
    model = ZOO[match[1]](threshold=threshold, min_area_m2=min_area_m2, parameters=parameters or {})
    if features is not None:
        model = _reading(model, tuple(features))
    if match[2] is not None and int(match[2]) != model.card.version:
        raise ModelError(f"No version {match[2]} of model {match[1]!r}; there is {model.card.address}")
    return model


def _reading(model: Detector, features: tuple[str, ...]) -> Detector:
    """Let a model read other features than its card's."""
    if not isinstance(model, Kmeans):
        raise ModelError(
            f"Model {model.card.address} reads {', '.join(model.card.inputs.names)} and nothing else; leave features "
            "out, or choose a model that clusters, such as 'kmeans'"
        )
    return model.reading(features)
