"""Cards of networks: `card.toml`, which says what a network reads, what computes, and what it may be trusted with."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import tomli_w
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from slidecube.models.card import THRESHOLDS, FeatureSpec, ModelCard
from slidecube.models.errors import ModelError
from slidecube.models.weights import read_file, write_whole

CARD_FILE = "card.toml"
SCHEMA: Literal[1] = 1
"""Version of the card's own layout."""

_SHOWN_CHARACTERS = 80

Argument = bool | int | float | str


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_tuple)]


def _plain(value: object, at: str = "") -> Any:
    """Take JSON types only; in a table, what is None or not finite is not known and left out."""
    if isinstance(value, dict):
        known = {str(key): _plain(one, f"{at}.{key}".lstrip(".")) for key, one in value.items()}
        return {key: one for key, one in known.items() if one is not None}
    if isinstance(value, list | tuple):
        items = [_plain(one, f"{at}.{k}".lstrip(".")) for k, one in enumerate(value)]
        if None in items:
            raise ValueError(f"{at} holds something unknown in a list; leave it out")
        return items
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(
        f"{at} is a {type(value).__name__}; text, numbers, true and false, lists and tables are allowed"
    )


Facts = Annotated[dict[str, Any], AfterValidator(_plain)]
"""Tables for people and machines: JSON types; what is not known is left out."""


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

    @pydantic.model_validator(mode="after")
    def _a_line(self) -> Calibration:
        if len(self.logits) != len(self.probabilities):
            raise ValueError(
                f"has {len(self.logits)} logits and {len(self.probabilities)} probabilities; points have one of each"
            )
        if self.method == "isotonic" and not self.logits:
            raise ValueError("is isotonic and has no points; logits and probabilities are needed")
        if any(a >= b for a, b in pairwise(self.logits)):
            raise ValueError("has logits that do not rise from point to point")
        if any(a > b for a, b in pairwise((0.0, *self.probabilities, 1.0))):
            raise ValueError("has probabilities that fall from point to point, or lie outside of 0 to 1")
        return self

    @pydantic.model_validator(mode="after")
    def _of_classes(self) -> Calibration:
        for name, temperature in self.strata.items():
            if not re.fullmatch(r"-?(0|[1-9][0-9]{0,8})", name):
                raise ValueError(f"has a stratum {name!r}; strata are the numbers of classes, such as '40'")
            if temperature <= 0:
                raise ValueError(f"has the temperature {temperature:g} in stratum {name}; above 0 is allowed")
        if self.strata and not self.by:
            raise ValueError("has strata and no by; by names the feature that holds their classes")
        return self


class Output(_Table):
    """From which probability a pixel is landslide, and how that was chosen."""

    threshold: float = Field(ge=THRESHOLDS[0], le=THRESHOLDS[1])
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
    description: str = Field(min_length=1)
    licence: str = Field(min_length=1)
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
    training: Facts = Field(default_factory=dict)
    metrics: Facts = Field(default_factory=dict)
    null_run: Facts = Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _network_or_ensemble(self) -> NetworkCard:
        single = self.architecture is not None and self.weights is not None
        if single == bool(self.members) or (self.architecture is None) != (self.weights is None):
            raise ValueError("is neither a network (architecture and weights) nor an ensemble (members)")
        if len(self.members) == 1:
            raise ValueError("has one member; an ensemble has two or more")
        return self

    @pydantic.model_validator(mode="after")
    def _calibrated_by_an_input(self) -> NetworkCard:
        by = self.calibration.by
        if by and by not in self.inputs.names:
            raise ValueError(
                f"is calibrated by {by!r}, which is none of its inputs; allowed: {', '.join(self.inputs.names)}"
            )
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
    path = folder / CARD_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror or error}); a folder of a model holds {CARD_FILE}"
        ) from None
    return parse_card(content, str(path))


def parse_card(content: bytes, where: str) -> NetworkCard:
    """Take a card from the content of its file; where : it lies, for the message. Raises ModelError."""
    try:
        tables = tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ModelError(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ModelError(f"{where}: not valid TOML: {' '.join(str(error).split())}") from None
    try:
        return NetworkCard.model_validate(tables)
    except pydantic.ValidationError as error:
        raise ModelError(f"{where}: {card_refusal(error, tables)}") from None


def card_text(card: NetworkCard) -> str:
    """TOML of a card; what is None or empty is left out, and means the same when it is read back."""
    tables = card.model_dump(mode="json", by_alias=True, exclude_none=True)
    return tomli_w.dumps({key: value for key, value in tables.items() if value not in ("", {}, [])})


def write_card(folder: Path, card: NetworkCard) -> None:
    """Write a card whole or not at all; the weights come before it."""
    write_whole(folder / CARD_FILE, card_text(card).encode("utf-8"))


def model_card(
    card: NetworkCard,
    *,
    threshold: float | None = None,
    min_area_m2: float | None = None,
    members: Sequence[NetworkCard] = (),
) -> ModelCard:
    """Return what the pipeline wants to know of a network; None = the card's own.

    members : cards of an ensemble's members, in the order of the card
    The context is that of the largest window: a pixel may lie in any window that holds it (`models/windows.py`).
    """
    parts = [one.architecture for one in (card, *members) if one.architecture is not None]
    window_px = max((part.window_px for part in parts), default=1)
    return ModelCard(
        name=card.name,
        version=card.version,
        architecture=_in_words(card, [part.name for part in parts]),
        inputs=spec_of(card),
        window_px=2 * (window_px - 1) + 1,
        threshold=card.output.threshold if threshold is None else threshold,
        min_area_m2=card.output.min_area_m2 if min_area_m2 is None else min_area_m2,
        weights_sha256=weights_digest(card),
        content_sha256=card.identity,
        training=f"{'SIMULATED scenes. ' if card.simulated else ''}{card.description}",
        metrics=headline(card),
        licence=card.licence,
        source=card.source,
    )


def weights_digest(card: NetworkCard) -> str:
    """SHA-256 of a network's weights; of an ensemble, of its members' identities in order."""
    if card.weights is not None:
        return card.weights.sha256
    return hashlib.sha256("".join(member.identity for member in card.members).encode()).hexdigest()


def headline(card: NetworkCard) -> str:
    """F1 of a card in a few words, "" where it says none; scores on simulated scenes are called so."""
    f1 = card.metrics.get("f1")
    if not isinstance(f1, int | float) or isinstance(f1, bool):
        return ""
    return f"F1 {f1:.3f}{' (simulated)' if card.simulated else ''}"


def spec_of(card: NetworkCard) -> FeatureSpec:
    """Features that it reads."""
    return FeatureSpec(names=card.inputs.names, version=card.inputs.version)


def _in_words(card: NetworkCard, names: Sequence[str]) -> str:
    if card.architecture is None:
        counted = ", ".join(
            f"{n} {name}" if (n := list(names).count(name)) > 1 else name for name in dict.fromkeys(names)
        )
        return f"mean of {len(card.members)} networks{f' ({counted})' if counted else ''}"
    arguments = ", ".join(f"{key}={value}" for key, value in sorted(card.architecture.arguments.items()))
    return f"{card.architecture.name}{f' ({arguments})' if arguments else ''}"


def card_refusal(error: pydantic.ValidationError, tables: Mapping[str, Any]) -> str:
    """Render the first problem of a card in one line: the key, what was got, what is allowed; all that is missing."""
    problems = sorted(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    if problems[0]["type"] != "extra_forbidden":
        missing = [_where(found) for found in problems if found["type"] == "missing"]
        if missing:
            return f"missing: {', '.join(missing)}"
    line = _problem(problems[0], tables)
    others = len(problems) - 1
    return line if others == 0 else f"{line} (and {others} more problem{'s' * (others > 1)})"


def _where(problem: Any) -> str:
    return ".".join(str(part) for part in problem["loc"]) or "the card"


def _problem(problem: Any, tables: Mapping[str, Any]) -> str:
    loc, where = problem["loc"], _where(problem)
    if problem["type"] == "extra_forbidden":
        known = _known_keys([part for part in loc[:-1] if isinstance(part, str)])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"{where}: unknown key{hint}; allowed: {', '.join(known)}"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    got, allowed = repr(_value_at(tables, loc)), problem["msg"].removeprefix("Input should be ")
    allowed = _NAMES if where == "name" and problem["type"] == "string_pattern_mismatch" else allowed
    got = got if len(got) <= _SHOWN_CHARACTERS else f"{got[: _SHOWN_CHARACTERS - 3]}..."
    return f"{where}: got {got}; allowed: {allowed[:1].lower()}{allowed[1:]}"


_NAMES = "lower-case letters, digits, '-' and '_', at most 63, the first a letter or digit"


def _known_keys(path: Sequence[str]) -> list[str]:
    """Keys of the table of a card at a path."""
    table: type[BaseModel] = NetworkCard
    for part in path:
        annotation = table.model_fields[part].annotation
        inner = [
            t
            for t in (annotation, *_arguments(annotation))
            if isinstance(t, type) and issubclass(t, BaseModel)
        ]
        table = inner[0]
    return [str(field.alias or name) for name, field in table.model_fields.items()]


def _arguments(annotation: object) -> list[object]:
    """Types within a type, such as those of `tuple[Member, ...]` or `Weights | None`."""
    return [found for part in get_args(annotation) for found in (part, *_arguments(part))]


def _value_at(tables: Any, loc: Sequence[int | str]) -> object:
    """Return what was written at a place; of pydantic's own words for a part, the whole of it."""
    for part in loc:
        inside = (
            part in tables if isinstance(tables, dict) else isinstance(tables, list) and isinstance(part, int)
        )
        if not inside:
            break
        tables = tables[part]
    return tables


def read_weights(folder: Path, card: NetworkCard) -> bytes:
    """Read a network's weights, of which the card tells the digest. Raises ModelError for any other bytes."""
    assert card.weights is not None
    path = folder / card.weights.file
    content = read_file(path, f"Weights of model {card.address}")
    found = hashlib.sha256(content).hexdigest()
    if found != card.weights.sha256:
        raise ModelError(
            f"Weights of model {card.address} are damaged or were changed: {path} has the SHA-256 {found[:12]}..., and "
            f"its card says {card.weights.sha256[:12]}...; take both again from where they came"
        )
    return content


def read_members(folder: Path, card: NetworkCard) -> tuple[NetworkCard, ...]:
    """Read the cards of an ensemble's members, in its order. Raises ModelError for any that it was not made of."""
    found = []
    for member in card.members:
        one = read_card(folder / member.folder)
        if one.identity != member.identity:
            raise ModelError(
                f"Model {card.address} was not made of the member that lies in {folder / member.folder}: its card was "
                "changed; take the ensemble again from where it came"
            )
        if one.members:
            raise ModelError(
                f"Member {one.address} of model {card.address} is an ensemble itself; name its members"
            )
        found.append(one)
    return tuple(found)
