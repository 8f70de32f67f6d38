"""Scenes: the frozen list of what a run reads."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any, Literal

from slidecube.catalog.errors import CatalogError

Role = Literal["optical", "radar", "dem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A span of days, both ends inclusive, UTC."""

    start: dt.date
    end: dt.date

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise CatalogError(f"Window starts {self.start} after it ends {self.end}; swap the two dates")

    def __contains__(self, when: object) -> bool:
        return isinstance(when, dt.datetime) and self.start <= when.astimezone(dt.UTC).date() <= self.end

    def __str__(self) -> str:
        return f"{self.start.isoformat()}_{self.end.isoformat()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offset:
    """The additive radiometric offset of a scene.

    value : reflectance to add to DN * 1e-4, e.g. -0.1 or 0.0
    applied : an offset existed and the stored DN already has it removed
    reason : which rule decided, one line
    """

    value: float
    applied: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One STAC item as a run reads it.

    id : of the item
    role : what it is to the run
    source : name in the table of sources, or the local catalogue's path as the user wrote it
    datetime : sensing time, UTC
    identity : canonical key of the acquisition: platform, MGRS tile, datatake, datastrip sensing start
    datatake : the part of `identity` shared by neighbouring items of one overpass
    version : baseline and generation time; the newest of one identity is kept
    offset : None for a DEM
    bands : canonical band name ("B02", "SCL", "elevation") -> asset key
    item : the STAC item as a dict, hrefs unsigned and absolute, carrying proj:epsg and proj:code where either is known
    """

    id: str
    role: Role
    source: str
    datetime: dt.datetime
    identity: str
    datatake: str
    version: str
    offset: Offset | None
    bands: dict[str, str]
    item: dict[str, Any]
