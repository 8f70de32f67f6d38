"""Planning the DEM: where it comes from, when it was measured, and above what its heights count."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.errors import CatalogError
from slidecube.catalog.failover import Sought, seek
from slidecube.catalog.rasters import dem_scene
from slidecube.catalog.scenes import Scene, Sourcing
from slidecube.catalog.sources import SOURCES, is_raster
from slidecube.pipeline.config import Config
from slidecube.pipeline.errors import PipelineError

_NEVER = dt.date(1970, 1, 1)  # of items without a day of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class DemFacts:
    """What a run knows of its DEM.

    sources : names; first, last : days on which its heights were measured, None where nobody says
    vertical_datum : "" where nobody says
    """

    sources: tuple[str, ...]
    first: dt.date | None
    last: dt.date | None
    vertical_datum: str

    def later_event(self, day: dt.date) -> bool | None:
        """Tell whether an event of a day is later than the DEM, which then shows the ground before it; None = unknown.

        A DEM of several years shows one of them at each place: only a day after the last is surely later.
        """
        return None if self.last is None else day > self.last

    def __str__(self) -> str:
        days = f"measured {self.first} to {self.last}" if self.first != self.last else f"measured {self.last}"
        said = "of unknown date" if self.last is None else days
        datum = f"heights above {self.vertical_datum}" if self.vertical_datum else "vertical datum unknown"
        return f"{', '.join(self.sources)}, {said}, {datum}"


def search_dem(config: Config, tiled: Aoi) -> Sought:
    """Find the DEM of all tiles: in a catalogue, or the one file that the TOML names.

    Raises PipelineError or CatalogError where there is none.
    """
    sources = config.sources
    if not is_raster(sources.dem):
        names = [config.source(name) for name in (sources.dem, *sources.fallback_dem)]
        return seek(names, tiled, None, role="dem")
    href = config.place(sources.dem)
    try:
        scene = dem_scene(href, tiled, measured=sources.dem_date, vertical_datum=sources.dem_datum or "")
    except CatalogError as error:
        raise PipelineError(f"{config.path}: sources.dem: {error}") from None
    return Sought(scenes=(scene,), sourcing=Sourcing(role="dem", asked=href, used=href))


def dem_facts(config: Config, scenes: Iterable[Scene]) -> DemFacts:
    """Sum up what is known of DEM items; what the TOML says stands above what they say."""
    items = list(scenes)
    spans = [_days_of(scene) for scene in items]
    firsts, lasts = ([day for span in spans if span for day in (span[at],)] for at in (0, 1))
    known = bool(items) and all(spans)
    said = config.sources.dem_date
    data = {config.sources.dem_datum or _datum_of(scene) for scene in items}
    return DemFacts(
        sources=tuple(sorted({_name_of(scene) for scene in items})),
        first=said or (min(firsts) if known else None),
        last=said or (max(lasts) if known else None),
        vertical_datum=data.pop() if len(data) == 1 else ", ".join(sorted(d or "unknown" for d in data)),
    )


def _name_of(scene: Scene) -> str:
    """Name of a DEM; of a local one its collection's or its file's, for products say nothing of this machine."""
    if scene.source in SOURCES:
        return scene.source
    return str(scene.item.get("collection") or PurePosixPath(scene.source).name)


def _days_of(scene: Scene) -> tuple[dt.date, dt.date] | None:
    known = SOURCES.get(scene.source)
    if known is not None and known.acquired is not None:
        return known.acquired
    properties = scene.item["properties"]
    start, end = (str(properties.get(f"{at}_datetime") or "")[:10] for at in ("start", "end"))
    try:
        if start and end:
            return dt.date.fromisoformat(start), dt.date.fromisoformat(end)
    except ValueError:
        return None
    day = scene.datetime.date()
    return None if day == _NEVER else (day, day)


def _datum_of(scene: Scene) -> str:
    known = SOURCES.get(scene.source)
    stated = scene.item["properties"].get("slidecube:vertical_datum")
    return str(stated or (known.vertical_datum if known else ""))
