"""Planning Sentinel-1: which scenes a run may read, refused now where every tile would fail later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import compress

import shapely

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.failover import Sought, seek
from slidecube.catalog.radar import acquisition_of
from slidecube.catalog.scenes import Scene, footprints
from slidecube.pipeline.config import Config
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.radar_layer import BANDS, track_of


def search_radar(config: Config, aoi: Aoi, tiled: Aoi) -> Sought:
    """Find the radar scenes of all tiles: of the wanted orbit direction, with both polarisations.

    Raises PipelineError where a window has none over the area.
    """
    assert config.sources.radar is not None
    windows = sorted({span for e in config.epochs for w in e.windows.values() for span in w.spans}, key=str)
    found = seek([config.source(config.sources.radar)], tiled, windows, role="radar")
    kept, left_out = _usable(config, found.scenes)
    area = aoi.to_crs("EPSG:4326")
    over = list(compress(kept, shapely.intersects(area, footprints(kept)))) if kept else []
    for epoch in config.epochs:
        for side, window in epoch.windows.items():
            if any(scene.datetime in window for scene in over):
                continue
            others = [f"{n} {why}" for (why, which), n in left_out.items() if which == str(window)]
            raise PipelineError(
                f"Epoch {epoch.name!r} has no {side}-event radar scene between {window.start} and {window.end} in "
                f"{config.sources.radar!r} over {aoi.name!r} of {config.cube.radar.orbit} orbits with VV and VH"
                f"{' (left out: ' + ', '.join(others) + ')' if others else ''}; widen the window, set [cube] "
                "radar.orbit, or leave [sources] radar out"
            )
    return Sought(scenes=tuple(kept), sourcing=found.sourcing)


def _usable(config: Config, scenes: Sequence[Scene]) -> tuple[list[Scene], Counter[tuple[str, str]]]:
    """Split scenes into those that are read, and counts of the others by reason and window."""
    kept, left_out = [], Counter[tuple[str, str]]()
    windows = {str(w): w for e in config.epochs for w in e.windows.values()}
    for scene in scenes:
        why = _reason_against(config, scene)
        if not why:
            kept.append(scene)
        left_out.update((why, name) for name, window in windows.items() if why and scene.datetime in window)
    return kept, left_out


def _reason_against(config: Config, scene: Scene) -> str:
    if any(band not in scene.bands for band in BANDS):
        return f"with {' and '.join(acquisition_of(scene).polarisations) or 'no band'} only"
    state = track_of(scene).orbit_state
    return "" if state == config.cube.radar.orbit else f"of {state} orbits"


def require_one_quantity(config: Config, scenes: Iterable[Scene]) -> None:
    """Refuse scenes that a plan cannot read: not calibrated, of two quantities, or corrected for slopes already.

    Raises PipelineError.
    """
    quantities = {acquisition_of(scene).quantity: scene.id for scene in scenes}
    if "dn" in quantities:
        raise PipelineError(
            f"Scene {quantities['dn']!r} of {config.sources.radar!r} holds amplitudes that nobody calibrated; use "
            "gamma0, such as 'planetary-computer/sentinel-1-rtc', or a local catalogue of calibrated sigma0"
        )
    if len(quantities) > 1:
        raise PipelineError(
            f"Source {config.sources.radar!r} mixes gamma0 (as {quantities['gamma0']!r}) and sigma0 (as "
            f"{quantities['sigma0']!r}), which cannot be compared; leave one of them out"
        )
    if "gamma0" in quantities and config.cube.radar.slope_correction != "none":
        raise PipelineError(
            f"slope_correction = {config.cube.radar.slope_correction!r} would correct slopes twice: scene "
            f"{quantities['gamma0']!r} is gamma0, terrain corrected already; set [cube] radar.slope_correction to "
            "'none'"
        )
