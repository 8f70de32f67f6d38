"""Fail-over between sources: at plan time to the next that answers, and for each scene to who else holds it.

A source that answers and has nothing is no outage: its answer stands, and who has more is said.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.errors import CatalogDownError, CatalogError
from slidecube.catalog.scenes import Alternate, Role, Scene, Sourcing, Window
from slidecube.catalog.search import Retries, every_version, search
from slidecube.catalog.sources import Source, find_source

_Key = tuple[str, str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """What a search over several sources found.

    scenes : of the source that was used, with their alternates; sourcing : what was asked and why
    elsewhere : source -> sensing times of the acquisitions that each of the others holds, whatever their clouds
    """

    scenes: tuple[Scene, ...]
    sourcing: Sourcing
    elsewhere: Mapping[str, tuple[dt.datetime, ...]] = field(default_factory=dict)


def seek(
    sources: Sequence[str],
    aoi: Aoi,
    windows: Sequence[Window] | None,
    *,
    max_cloud_pct: float = 100.0,
    role: Role = "optical",
    retries: Retries | None = None,
) -> Sought:
    """Search the first source that answers, and the ones after it for the same acquisitions.

    sources : names or paths as `find_source` takes them, in the order in which they are asked
    role : only optical scenes get alternates: other items do not say whether their pixels are the same
    A source after the first that cannot be asked for alternates stops nothing; `sourcing` says why.
    Raises CatalogError where a name is wrong, where an item cannot be identified, or where no source answers.
    """
    known = [find_source(name, kind=role) for name in sources]
    failed: list[tuple[str, str]] = []
    for i, source in enumerate(known):
        try:
            scenes = search(source, aoi, windows, max_cloud_pct=max_cloud_pct, role=role, retries=retries)
        except CatalogDownError as error:
            if len(known) == 1:
                raise
            failed.append((source.name, str(error)))
            continue
        sourcing = Sourcing(role=role, asked=known[0].name, used=source.name, failed=tuple(failed))
        found = Sought(scenes=tuple(scenes), sourcing=sourcing)
        return _with_alternates(found, known[i + 1 :], aoi, windows, retries) if role == "optical" else found
    reasons = "; ".join(f"{name}: {reason}" for name, reason in failed)
    raise CatalogDownError(f"None of {len(known)} sources answers: {reasons}")


def _with_alternates(
    found: Sought,
    others: Sequence[Source],
    aoi: Aoi,
    windows: Sequence[Window] | None,
    retries: Retries | None,
) -> Sought:
    """Ask each other source what it holds of the scenes found."""
    wanted = {_same_pixels(scene) for scene in found.scenes}
    held: dict[_Key, list[Alternate]] = {}
    counts: list[tuple[str, int]] = []
    unsearched: list[tuple[str, str]] = []
    elsewhere: dict[str, tuple[dt.datetime, ...]] = {}
    for source in others:
        newest: dict[_Key, Scene] = {}
        times: dict[str, dt.datetime] = {}
        try:
            for scene in every_version(source, aoi, windows, role=found.sourcing.role, retries=retries):
                times[scene.identity] = scene.datetime
                key = _same_pixels(scene)
                if key in wanted and (
                    key not in newest or (scene.version, scene.id) > (newest[key].version, newest[key].id)
                ):
                    newest[key] = scene
        except CatalogError as error:
            unsearched.append((source.name, str(error)))
            continue
        for key, scene in newest.items():
            held.setdefault(key, []).append(_alternate(scene))
        counts.append((source.name, len(newest)))
        elsewhere[source.name] = tuple(times.values())
    scenes = tuple(
        replace(scene, alternates=tuple(held.get(_same_pixels(scene), ()))) for scene in found.scenes
    )
    sourcing = replace(found.sourcing, alternates=tuple(counts), unsearched=tuple(unsearched))
    return Sought(scenes=scenes, sourcing=sourcing, elsewhere=elsewhere)


def _same_pixels(scene: Scene) -> _Key:
    """What two sources must agree on to hold the same pixels: acquisition, processing baseline and level.

    An unknown baseline agrees with none, so it is told apart by the source's own id. Level-2A is what has a scene
    classification: identities name the acquisition, which a Level-1C item shares.
    """
    baseline = scene.version.split("/")[0]
    known = baseline if baseline != "00.00" else f"{scene.source} {scene.id}"
    return scene.identity, known, "SCL" in scene.bands


def _alternate(scene: Scene) -> Alternate:
    hrefs = {band: str(scene.item["assets"][key]["href"]) for band, key in scene.bands.items()}
    return Alternate(
        source=scene.source, id=scene.id, version=scene.version, offset=scene.offset, hrefs=hrefs
    )
