"""Lineage: what an inventory was made of, as the STAC item and the report tell it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from slidecube.catalog.scenes import Sourcing, Window


def slidecube_version() -> str:
    """Version of the installed program."""
    try:
        return version("slidecube")
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageScene:
    """One scene that was read.

    datetime : None where nobody says it, as of a file without a date
    use : what for, "pre", "post", "dem", with the epoch's name where there are several
    href : address of its STAC item, unsigned; "" when the catalogue gives none
    image : whether it is a satellite's, and not a DEM or a layer of the user's
    """

    id: str
    source: str
    datetime: dt.datetime | None
    use: str
    href: str = ""
    image: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Substitution:
    """One asset whose pixels were read from another source than its scene's; they are the same pixels.

    reason : why not from its own source, one line; tiles : on how many tiles, counted layer by layer
    """

    scene: str
    asset: str
    source: str
    reason: str
    tiles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageEpoch:
    """One epoch: the two windows, both ends inclusive, UTC; pre is None where a single image was looked at."""

    name: str
    pre: Window | None
    post: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What an inventory was made of.

    name : of the inventory; run : of the plan; created : when, UTC
    grid : key of the grid
    model : name, version, threshold, ... of the model card, in the order in which they are to be read
    keys : name -> key ("detect", "statistics", a layer's name)
    dem : source, days on which it was measured, and vertical datum, in words; "" without one
    sources : where the scenes of each role came from, and who stood by; substituted : what was read elsewhere
    licences : name of the source -> licence of its data; attributions : lines that must be shown
    simulated : True when any scene is simulated
    """

    name: str
    run: str
    created: dt.datetime
    grid: str
    epochs: tuple[LineageEpoch, ...]
    model: Mapping[str, str | float | int]
    keys: Mapping[str, str] = field(default_factory=dict)
    scenes: tuple[LineageScene, ...] = ()
    dem: str = ""
    sources: tuple[Sourcing, ...] = ()
    substituted: tuple[Substitution, ...] = ()
    licences: Mapping[str, str] = field(default_factory=dict)
    attributions: tuple[str, ...] = ()
    simulated: bool = False
    version: str = field(default_factory=slidecube_version)

    @property
    def model_name(self) -> str:
        """Name and version of the model."""
        return f"{self.model.get('name', 'unknown')}@{self.model.get('version', '?')}"


def sourcing_lines(sources: Iterable[Sourcing]) -> list[str]:
    """Say which sources did not answer and which stand by, a line each; nothing where all is as asked."""
    lines = []
    for entry in sources:
        lines += [
            f"{entry.role} from {entry.used}, since {name} did not answer: {why}"
            for name, why in entry.failed
        ]
        lines += [f"{name} stands by with {n:,} of the same scenes" for name, n in entry.alternates]
        lines += [f"{name} could not be asked what it holds of them: {why}" for name, why in entry.unsearched]
    return lines


def is_simulated(item: dict[str, Any]) -> bool:
    """Tell whether a STAC item says that its pixels are simulated."""
    return bool(item["properties"].get("slidecube:simulated", False))
