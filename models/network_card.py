"""Cards of networks: `card.toml`, which says what a network reads, what computes, and what it may be trusted with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from slidecube.models.card import FeatureSpec, ModelCard
from slidecube.models.errors import ModelError

CARD_FILE = "card.toml"
SCHEMA = 1
"""Version of the card's own layout."""

Argument = bool | int | float | str


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_tuple)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Inputs(_Table):
    """What a network reads: features in order, with the units and the normalisation that it was trained on.

    A channel is (value - mean) / std; what is unknown is 0 afterwards, the mean. resolution_m : of its training
    """

    names: Texts = Field(min_length=1)
    units: Texts
    mean: Numbers
    std: Numbers
    resolution_m: float = Field(10.0, gt=0)
    version: int = 1

    @pydantic.model_validator(mode="after")
    def _one_each(self) -> Inputs:
        n = len(self.names)
        if len(set(self.names)) < n:
            raise ValueError("names a feature twice")
        for key in ("units", "mean", "std"):
            if len(getattr(self, key)) != n:
                raise ValueError(
                    f"has {n} names and {len(getattr(self, key))} of {key}; one for each is needed"
                )
        if min(self.std) <= 0:
            raise ValueError("has a std that is not above 0")
        return self


class Architecture(_Table):
    """What computes: a name of `architectures.ARCHITECTURES` with its arguments, or "onnx".

    window_px : side of the windows that are computed, at most 513; margin_px : on each side of it blended into the next
    window; receptive_px : measured side of what one output pixel looks at, 0 = the whole window
    """

    name: str = Field(min_length=1)
    arguments: dict[str, Argument] = Field(default_factory=dict)
    window_px: int = Field(ge=32, le=513)
    margin_px: int = Field(ge=0)
    receptive_px: int = Field(0, ge=0)

    @pydantic.model_validator(mode="after")
    def _a_core(self) -> Architecture:
        if 2 * self.margin_px >= self.window_px:
            raise ValueError(
                f"has margins of {self.margin_px} px, which leave nothing of {self.window_px} px"
            )
        return self


class Calibration(_Table):
    """How logits become probabilities: divided by a temperature, or by a rising line through points (isotonic).

    strata : name of a stratum -> temperature, in place of the general one, of a categorical feature that the run has
    """

    method: Literal["none", "temperature", "isotonic"] = "none"
    temperature: float = Field(1.0, gt=0)
    logits: Numbers = ()
    probabilities: Numbers = ()
    by: str = ""
    strata: dict[str, float] = Field(default_factory=dict)


class Output(_Table):
    """From which probability a pixel is landslide, and how that was chosen."""

    threshold: float = Field(gt=0, lt=1)
    chosen: str = ""
    min_area_m2: float = Field(500.0, ge=0)


class Weights(_Table):
    """The file beside the card that holds what was learnt."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.(safetensors|onnx)$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Member(_Table):
    """A member of an ensemble: a folder beside the card, with a card and weights of its own."""

    folder: str = Field(pattern=r"^[a-z0-9][a-z0-9@._-]*$")
    identity: str = Field(pattern=r"^[0-9a-f]{64}$")


class NetworkCard(_Table):
    """The whole of `card.toml`. A network has architecture and weights; an ensemble has members, and neither.

    training, metrics, null_run : facts for people and machines, JSON types; simulated : trained on simulated scenes
    """

    schema_: Literal[1] = Field(SCHEMA, alias="schema")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    version: int = Field(ge=1)
    description: str
    licence: str
    simulated: bool = False
    source: str = ""
    slidecube: str = ""
    created: str = ""
    inputs: Inputs
    architecture: Architecture | None = None
    members: Annotated[tuple[Member, ...], BeforeValidator(_tuple)] = ()
    calibration: Calibration = Field(default_factory=Calibration)
    output: Output
    weights: Weights | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    null_run: dict[str, Any] = Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _network_or_ensemble(self) -> NetworkCard:
        single = self.architecture is not None and self.weights is not None
        if single == bool(self.members) or (self.architecture is None) != (self.weights is None):
            raise ValueError("is neither a network (architecture and weights) nor an ensemble (members)")
        if len(self.members) == 1:
            raise ValueError("has one member; an ensemble has two or more")
        return self

    @property
    def address(self) -> str:
        """Name and version, as users write it."""
        return f"{self.name}@{self.version}"

    @property
    def identity(self) -> str:
        """Digest of all that decides its probabilities: inputs, architecture, calibration, weights, members."""
        deciding = self.model_dump(
            mode="json", include={"inputs", "architecture", "members", "calibration", "weights"}
        )
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def read_card(folder: Path) -> NetworkCard:
    """Read a folder's card. Raises ModelError, in one line, where it is missing or not allowed."""
    raise NotImplementedError


def write_card(folder: Path, card: NetworkCard) -> None:
    """Write a card whole or not at all; the weights come before it."""
    raise NotImplementedError


def model_card(card: NetworkCard, *, threshold: float | None, min_area_m2: float | None) -> ModelCard:
    """Return what the pipeline wants to know of a network; None = the card's own."""
    raise NotImplementedError


def spec_of(card: NetworkCard) -> FeatureSpec:
    """Features that it reads."""
    return FeatureSpec(names=card.inputs.names, version=card.inputs.version)
