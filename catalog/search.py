"""Search STAC catalogues for scenes: pages, retries, filters, one version of each acquisition.

The only module that uses pystac-client. Items stay plain dicts; whatever a server filters is filtered here again,
so that an API, a static catalogue and an ItemCollection give the same scenes.
"""

from __future__ import annotations

import datetime as dt
import itertools
import math
import random
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyproj
import pystac
import pystac_client
import requests
import shapely
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from shapely.geometry.base import BaseGeometry
from urllib3.util import Retry

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.errors import CatalogDownError, CatalogError, OtherMissionError
from slidecube.catalog.items import (
    MISSIONS,
    datetime_of,
    is_partial,
    mgrs_tile,
    mission_of,
    normalised,
    scene_of,
)
from slidecube.catalog.local import local_items, root_of
from slidecube.catalog.scenes import Role, Scene, Window, footprints
from slidecube.catalog.sources import Source, asset_bands, find_source

_PAGE = 100  # items a request: some gateways cut answers above 6 MB
_MOST_VERTICES = 400  # of the area sent to a server; many refuse long requests
_BATCH = 256  # items a footprint test
_REASONS = (
    "seen",
    "partial",
    "other_collection",
    "outside_windows",
    "outside_area",
    "cloudy",
    "other_mission",
    "refused",
    "superseded",
)
_BUSY = (429, 500, 502, 503, 504)
_LONGEST_ANSWER = 128 << 20  # bytes; a hundred items of the most talkative provider are 6 MB
_LONGEST_WAIT_S = 120
_FIRST_DAY = dt.date(2015, 6, 1)  # Sentinel-2A was launched on the 23rd


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How long a server is asked again.

    attempts : requests in all before giving up
    first_s, longest_s : the waits double from the first to the longest, each with jitter
    timeout_s : of one request
    """

    attempts: int = 6
    first_s: float = 1.0
    longest_s: float = 60.0
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found and what it left out.

    scenes : kept, by sensing time
    counts : items seen and left out, by reason: seen, partial, other_collection, outside_windows, outside_area,
        cloudy, other_mission (which are among the refused), refused, superseded
    refused : id -> why an item's acquisition or radiometric offset cannot be told
    """

    scenes: tuple[Scene, ...]
    counts: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        left = ", ".join(
            f"{n} {why.replace('_', ' ')}" for why, n in self.counts.items() if n and why != "seen"
        )
        return f"{len(self.scenes)} scenes of {self.counts.get('seen', 0)} items" + (
            f" ({left})" if left else ""
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest:
    """The newest scene of a provider over an area.

    id : of the item; datetime : sensing time, UTC; age_days : from then to now
    """

    id: str
    datetime: dt.datetime
    age_days: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TileScenes:
    """The scenes of one MGRS tile in one window.

    first, last : days; cloud_pct : median of the scenes' cloud cover, None where no item says it
    """

    mgrs_tile: str
    window: Window
    count: int
    first: dt.date
    last: dt.date
    cloud_pct: float | None


def search(
    source: Source | str,
    aoi: Aoi,
    windows: Sequence[Window] | None,
    *,
    max_cloud_pct: float = 100.0,
    role: Role = "optical",
    retries: Retries | None = None,
) -> list[Scene]:
    """Return the scenes of a source over an area and within any of the windows, by sensing time.

    source : a Source, a name in SOURCES, or the path of a local catalogue
    windows : None or empty for data without a season, such as a DEM
    max_cloud_pct : of the whole item; items that do not say it are kept
    Returns [] where nothing is found; `find` also says what was left out.
    Raises CatalogError where the catalogue is down, wrong or hostile, or where an item cannot be identified.
    """
    found = find(source, aoi, windows, max_cloud_pct=max_cloud_pct, role=role, retries=retries)
    if found.counts["other_mission"]:
        where = find_source(source, kind=role) if isinstance(source, str) else source
        raise CatalogError(_other_mission(where, role, found))
    if found.refused:
        first = next(iter(found.refused.values()))
        of = f"{len(found.refused)} of {found.counts['seen']} items cannot be used, first: "
        raise CatalogError(first if len(found.refused) == 1 else of + first)
    return list(found.scenes)


def _other_mission(source: Source, role: Role, found: Found) -> str:
    """Say that a catalogue holds another Sentinel's items, and where beside them those lie that are wanted."""
    wanted = MISSIONS[role]
    n, seen = found.counts["other_mission"], found.counts["seen"]
    said = f"{n} of {seen} items of {source.name!r} are of Sentinel-{3 - wanted}, and {role} takes Sentinel-{wanted}"
    beside = _collection_of(Path(source.endpoint), wanted) if source.is_local else None
    return f"{said}; name {repr(str(beside)) if beside else f'a catalogue of Sentinel-{wanted}'} as {role}"


def _collection_of(entry: Path, mission: int) -> Path | None:
    """Return the collection within a local catalogue, or beside it, whose items are of a mission."""
    folder = entry if entry.is_dir() else entry.parent
    for path in sorted({*folder.glob("*/collection.json"), *folder.parent.glob("*/collection.json")}):
        first = next(local_items(path), None)
        if first is not None and mission_of(first[0]) == mission:
            return path
    return None


def find(
    source: Source | str,
    aoi: Aoi,
    windows: Sequence[Window] | None,
    *,
    max_cloud_pct: float = 100.0,
    role: Role = "optical",
    retries: Retries | None = None,
) -> Found:
    """Search as `search` does, and count what was left out; items that cannot be identified are left out, too."""
    where = find_source(source, kind=role) if isinstance(source, str) else source
    wanted = _Wanted(source=where, role=role, windows=tuple(windows or ()), max_cloud_pct=max_cloud_pct)
    counts = Counter(dict.fromkeys(_REASONS, 0))
    scenes: dict[str, Scene] = {}
    refused: dict[str, str] = {}
    for scene in _near(wanted, aoi, counts, retries or Retries(), refused):
        scenes.setdefault(scene.id, scene)
    kept = deduplicate(scenes.values())
    counts["superseded"] = len(scenes) - len(kept)
    counts["refused"] = len(refused)
    return Found(scenes=tuple(kept), counts=dict(counts), refused=refused)


def _near(
    wanted: _Wanted, aoi: Aoi, counts: Counter[str], retries: Retries, refused: dict[str, str]
) -> Iterator[Scene]:
    """Yield the wanted scenes whose footprint touches the area, as the catalogue hands them out."""
    area = aoi.to_crs("EPSG:4326")
    shapely.prepare(area)
    items = _items(wanted.source, area, wanted.windows, retries)
    while batch := list(itertools.islice(items, _BATCH)):
        scenes = _with_outlines(_scenes(batch, wanted, counts, refused), refused)
        if scenes:
            hit = shapely.intersects(area, footprints(scenes))
            counts["outside_area"] += int(np.count_nonzero(~hit))
            yield from itertools.compress(scenes, hit.tolist())


def every_version(
    source: Source, aoi: Aoi, windows: Sequence[Window] | None, *, role: Role, retries: Retries | None = None
) -> Iterator[Scene]:
    """Yield all scenes of a source over an area and within any of the windows: every version, whatever its clouds.

    Items that cannot be identified are left out. Raises CatalogError where the catalogue is down, wrong or hostile.
    """
    wanted = _Wanted(source=source, role=role, windows=tuple(windows or ()), max_cloud_pct=100.0)
    return _near(wanted, aoi, Counter(), retries or Retries(), refused={})


def deduplicate(scenes: Iterable[Scene]) -> list[Scene]:
    """Keep the newest version of each acquisition; other datastrips of a tile are complementary and stay."""
    best: dict[tuple[str, str], Scene] = {}
    for scene in scenes:
        key = (scene.role, scene.identity)
        # the id decides between equals, so that the order of a server's pages decides nothing
        if key not in best or (scene.version, scene.id) > (best[key].version, best[key].id):
            best[key] = scene
    return sorted(best.values(), key=lambda s: (s.datetime, s.identity, s.id))


def newest_scene(
    source: Source | str, aoi: Aoi, *, now: dt.datetime | None = None, retries: Retries | None = None
) -> Newest | None:
    """Return the provider's newest scene over an area, whatever its clouds, and its age; None if it has none."""
    where = find_source(source) if isinstance(source, str) else source
    now = now or dt.datetime.now(dt.UTC)
    # backwards, a span at a time: the whole archive of a nation is a hundred thousand items
    first = _FIRST_DAY if where.is_local else (now - dt.timedelta(days=30)).date()
    span = Window(start=first, end=now.date())
    while True:
        wanted = _Wanted(source=where, role="optical", windows=(span,), max_cloud_pct=100.0)
        scenes = _near(wanted, aoi, Counter(), retries or Retries(), refused={})
        newest = max(scenes, key=lambda s: (s.datetime, s.id), default=None)
        if newest is not None:
            age_days = (now - newest.datetime).total_seconds() / 86_400
            return Newest(id=newest.id, datetime=newest.datetime, age_days=age_days)
        if span.start <= _FIRST_DAY:
            return None
        last = span.start - dt.timedelta(days=1)
        span = Window(start=max(_FIRST_DAY, last - dt.timedelta(days=90)), end=last)


def scenes_by_tile(scenes: Iterable[Scene], windows: Sequence[Window]) -> list[TileScenes]:
    """Count the optical scenes by MGRS tile and window, in that order."""
    groups: dict[tuple[int, str], list[Scene]] = {}
    for scene in scenes:
        for i, window in enumerate(windows):
            if scene.role == "optical" and scene.datetime in window:
                groups.setdefault((i, mgrs_tile(scene.item) or "?"), []).append(scene)
    found = []
    for (i, tile), members in sorted(groups.items()):
        days = sorted(s.datetime.date() for s in members)
        clouds = [c for s in members if (c := s.item["properties"].get("eo:cloud_cover")) is not None]
        found.append(
            TileScenes(
                mgrs_tile=tile,
                window=windows[i],
                count=len(members),
                first=days[0],
                last=days[-1],
                cloud_pct=float(np.median(clouds)) if clouds else None,
            )
        )
    return found


# --- filters that hold for every kind of catalogue ------------------------------------------------------------------

_Raw = tuple[dict[str, Any], Path | None, Path | None]


# what a field of a wrong type or value ends in, anywhere between the catalogue's JSON and a Scene
_MALFORMED = (
    AttributeError,
    IndexError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
    pyproj.exceptions.ProjError,
    shapely.errors.ShapelyError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What is asked of every item, whatever a server has filtered already."""

    source: Source
    role: Role
    windows: tuple[Window, ...]
    max_cloud_pct: float

    def reason_against(self, item: dict[str, Any]) -> str | None:
        if self.source.collection and item.get("collection") not in (None, "", self.source.collection):
            return "other_collection"
        if is_partial(item) or not asset_bands(item, self.source):
            return "partial"
        when = datetime_of(item)
        if self.windows and not any(when in w for w in self.windows):
            return "outside_windows"
        cloud_pct = item["properties"].get("eo:cloud_cover")
        return "cloudy" if cloud_pct is not None and cloud_pct > self.max_cloud_pct else None


def _scenes(
    batch: Iterable[_Raw], wanted: _Wanted, counts: Counter[str], refused: dict[str, str]
) -> Iterator[Scene]:
    for item, folder, root in batch:
        counts["seen"] += 1
        name = str(item.get("id"))[:200]
        try:
            if reason := wanted.reason_against(item):
                counts[reason] += 1
                continue
            kept = normalised(item, wanted.source, folder=folder, root=root)
            yield scene_of(kept, wanted.source, wanted.role)
        except OtherMissionError as error:
            counts["other_mission"] += 1
            refused[name] = str(error)
        except CatalogError as error:
            refused[name] = str(error)
        except _MALFORMED as error:
            refused[name] = _malformed(name, error)


def _with_outlines(scenes: Iterable[Scene], refused: dict[str, str]) -> list[Scene]:
    """Leave out scenes whose footprint cannot be made; one broken geometry must not stop a nation's search."""
    batch = list(scenes)
    try:
        footprints(batch)
    except (CatalogError, *_MALFORMED):
        whole = []
        for scene in batch:
            try:
                footprints([scene])
                whole.append(scene)
            except (CatalogError, *_MALFORMED) as error:
                refused[scene.id] = _malformed(scene.id, error)
        return whole
    return batch


def _malformed(name: str, error: Exception) -> str:
    what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"Item {name!r} is no valid STAC item ({what}); report it to the catalogue's provider"


def _items(
    source: Source, area: BaseGeometry, windows: tuple[Window, ...], retries: Retries
) -> Iterator[_Raw]:
    if source.is_local:
        entry = Path(source.endpoint)
        root = root_of(entry)
        for item, folder in local_items(entry):
            yield item, folder, root
        return
    for interval in _intervals(windows):
        for item in _remote_items(source, area, interval, retries):
            yield item, None, None


def _intervals(windows: tuple[Window, ...]) -> list[str | None]:
    """Join overlapping windows, so that nothing is asked for twice; the day after the last is the open end."""
    if not windows:
        return [None]
    spans: list[list[dt.date]] = []
    for window in sorted(windows, key=lambda w: (w.start, w.end)):
        if spans and window.start <= spans[-1][1] + dt.timedelta(days=1):
            spans[-1][1] = max(spans[-1][1], window.end)
        else:
            spans.append([window.start, window.end])
    day = dt.timedelta(days=1)
    return [f"{a.isoformat()}T00:00:00Z/{(b + day).isoformat()}T00:00:00Z" for a, b in spans]


# --- a STAC API ------------------------------------------------------------------------------------------------------


class _PatientIO(StacApiIO):
    """pystac-client's transport, which also asks again when an answer breaks off in its middle."""

    def __init__(self, retries: Retries) -> None:
        waits = Retry(
            total=retries.attempts - 1,
            status_forcelist=_BUSY,
            allowed_methods=None,  # a search is a POST that changes nothing
            backoff_factor=retries.first_s,
            backoff_jitter=retries.first_s,
            backoff_max=math.ceil(retries.longest_s),
            retry_after_max=_LONGEST_WAIT_S,
            raise_on_status=False,
        )
        super().__init__(timeout=retries.timeout_s, max_retries=waits)
        self.session.hooks["response"].append(_read_bounded)
        self._retries = retries

    def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
        """Read an address that an answer links to; pystac-client itself would open a file of this machine."""
        href = str(source.href if isinstance(source, pystac.Link) else source)
        if not href.startswith(("http://", "https://")):
            raise CatalogDownError(
                f"The catalogue links to {href[:200]!r}; a remote catalogue may link to http and https only"
            )
        return str(super().read_text(source, *args, **kwargs))

    def request(self, *args: Any, **kwargs: Any) -> str:
        for attempt in range(self._retries.attempts):
            try:
                return str(super().request(*args, **kwargs))
            except APIError as error:
                answered = getattr(error, "status_code", None) is not None
                if answered or "Max retries" in str(error) or attempt + 1 == self._retries.attempts:
                    raise
                wait_s = min(self._retries.first_s * 2**attempt, self._retries.longest_s)
                time.sleep(wait_s * random.uniform(0.5, 1.5))  # noqa: S311  # jitter, not a secret
        raise AssertionError


def _read_bounded(answer: requests.Response, **_: Any) -> None:
    """Read an answer's body, and no more of it than a page of items can have: an endless one would fill the memory."""
    body = bytearray()
    for part in answer.iter_content(1 << 16):
        body += part
        if len(body) > _LONGEST_ANSWER:
            answer.close()
            raise CatalogDownError(
                f"Catalogue {urlsplit(answer.url).netloc} sends more than {_LONGEST_ANSWER >> 20} MB as one page; "
                "use another source"
            )
    answer._content = bytes(body)  # noqa: SLF001  where requests itself puts what it has read


def _remote_items(
    source: Source, area: BaseGeometry, interval: str | None, retries: Retries
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for page in _pages(source, area, interval, retries):
        items = [item for item in page.get("features") or [] if isinstance(item, dict)]
        fresh = [item for item in items if str(item.get("id")) not in seen]
        if items and not fresh:
            raise CatalogDownError(
                f"Catalogue {source.endpoint} sends the same page again and again; try later"
            )
        seen.update(str(item.get("id")) for item in fresh)
        yield from fresh


def _pages(
    source: Source, area: BaseGeometry, interval: str | None, retries: Retries
) -> Iterator[dict[str, Any]]:
    pages: Iterator[dict[str, Any]] | None = None
    while True:
        try:
            # not around the yield: the filter of warnings would leak into whoever iterates
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of conformance classes that few servers declare right
                pages = pages or _open_search(source, area, interval, retries)
                page = next(pages, None)
        except APIError as error:
            raise CatalogDownError(_explained(source, error, retries)) from None
        except (
            pystac.errors.STACError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as error:
            raise CatalogDownError(
                f"{source.endpoint} is not a STAC API with item search ({type(error).__name__}: {_one_line(error)}); "
                "check the address"
            ) from None
        if page is None:
            return
        yield page


def _open_search(
    source: Source, area: BaseGeometry, interval: str | None, retries: Retries
) -> Iterator[dict[str, Any]]:
    # opening sets the timeout of the transport again, to none where none is named: a silent server would hang us
    client = pystac_client.Client.open(
        source.endpoint, stac_io=_PatientIO(retries), timeout=retries.timeout_s
    )
    found: Iterator[dict[str, Any]] = client.search(
        collections=[source.collection],
        intersects=shapely.geometry.mapping(_sendable(area)),
        datetime=interval,
        limit=_PAGE,
    ).pages_as_dicts()
    return found


def _explained(source: Source, error: APIError, retries: Retries) -> str:
    status = getattr(error, "status_code", None)
    head = f"Catalogue {source.endpoint} (collection {source.collection!r})"
    if status is None:
        times = f"{retries.attempts} attempt{'s' * (retries.attempts > 1)}"
        said = f"{head} cannot be reached after {times}: {_cause(error)}"
        return f"{said}; check the network, or use another source"
    if status in _BUSY:
        return f"{head} still answered {status} after {retries.attempts} attempts; try later, or use another source"
    return f"{head} refused the search with status {status}: {_one_line(error)}"


def _cause(error: BaseException) -> str:
    """Say what stopped a request: the innermost error, without the objects that it passed through."""
    match = re.search(r"Caused by (\w+)\((.*)\)\)$", " ".join(str(error).split()))
    if match is None:
        return _one_line(error)
    said = re.sub(r"^<[^>]*>, ", "", match[2])
    said = said[1:-1] if said[:1] in "'\"" and said[-1:] == said[:1] else said
    said = re.sub(r"^HTTPS?Connection(Pool)?\([^)]*\): ", "", said)
    return f"{match[1]}: {said}"[:200]


def _sendable(area: BaseGeometry) -> BaseGeometry:
    """Return an area that covers the AOI with few vertices: coarser, never smaller; the AOI itself filters after."""
    if shapely.get_num_coordinates(area) <= _MOST_VERTICES:
        return area
    world = shapely.box(-180, -90, 180, 90)
    for tolerance_deg in (0.001, 0.01, 0.05, 0.2):
        grown = shapely.simplify(shapely.buffer(area, 2 * tolerance_deg, quad_segs=1), tolerance_deg)
        simple = shapely.intersection(grown, world)
        if shapely.get_num_coordinates(simple) <= _MOST_VERTICES and shapely.covers(simple, area):
            return simple
    return shapely.box(*area.bounds)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
