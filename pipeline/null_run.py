"""The null run: what a detector invents where nothing happened.

Both windows of its epoch lie before any event, so every object that it maps is false. A benchmark has landslides on one
pixel of fifty and a country on one of several thousand: what counts there is how rarely a detector says something of
ground that did nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slidecube.catalog.grid import Tile
from slidecube.models.card import FeatureSpec
from slidecube.models.predict import Detector
from slidecube.pipeline.config import Epoch
from slidecube.pipeline.detect import map_tile
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import required_variables
from slidecube.pipeline.inventory import Observability
from slidecube.pipeline.mosaic import TileRasters, label_objects
from slidecube.pipeline.pixels import PixelWindow, read_stored
from slidecube.pipeline.run_plan import EpochPlan, RunPlan, learns
from slidecube.pipeline.tasks import fitted_statistics, layer_ledger
from slidecube.pipeline.terrain import SLOPE_NODATA, SLOPE_SCALE

SLOPES_DEG = 10.0
"""Slopes on which false objects are counted: landslides are rare on gentler ones, where fields are ploughed."""

MIN_AREA_M2 = 1_000.0
"""Smallest false object that counts: a detector of small objects is not punished for the smallest."""

Progress = Callable[[int, int], None]
"""Told how many tiles are done, and how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NullRun:
    """What a detector maps where nothing happened.

    false_objects : of at least `min_area_m2` and a mean slope above `slopes_deg`
    km2 : of observed pixels steeper than that, on the map; epoch : that was mapped
    """

    false_objects: int
    km2: float
    epoch: str
    slopes_deg: float = SLOPES_DEG
    min_area_m2: float = MIN_AREA_M2

    @property
    def per_100_km2(self) -> float | None:
        """False objects for each 100 km2 of slopes; None where no slope was observed."""
        return None if self.km2 == 0 else 100 * self.false_objects / self.km2

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for a card; what is not known is left out, since TOML has no null."""
        said = {
            "epoch": self.epoch,
            "false_objects": self.false_objects,
            "km2": round(self.km2, 3),
            "slopes_deg": self.slopes_deg,
            "min_area_m2": self.min_area_m2,
        }
        rate = self.per_100_km2
        return said if rate is None else {**said, "per_100_km2": round(rate, 3)}


def null_run(
    plan: RunPlan,
    detector: Detector | None = None,
    *,
    epoch: str | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> NullRun:
    """Map an epoch before any event as `detect` does, write nothing, and count what is found: all of it is false.

    plan : of a run whose layers are made; detector : in place of the plan's own, of features that its layers hold
    epoch : both of whose windows lie before any event; its only one when left out
    One tile is in memory at a time, and of its objects one line each.
    Raises PipelineError when there is no such epoch, an event lies in its windows, or layers or statistics are missing.
    """
    made = plan if detector is None else _with_detector(plan, detector)
    chosen = _epoch_of(made, epoch, made.model.card.inputs)
    _require_done(made, chosen)
    slopes = _Slopes()
    objects = label_objects(
        _tiles(made, chosen, slopes, threads=threads, progress=progress),
        frame=made.grid.frame,
        epoch=chosen.name,
    )
    large = objects["area_m2"] >= MIN_AREA_M2
    steep = (objects["slope_deg"] > SLOPES_DEG).fillna(value=False)
    return NullRun(
        false_objects=int((large & steep).sum()),
        km2=slopes.observed_px * made.grid.resolution_m**2 / 1e6,
        epoch=chosen.name,
    )


def require_ready(plan: RunPlan, inputs: FeatureSpec, *, epoch: str | None = None) -> None:
    """Refuse what `null_run` will refuse of a network that is not yet trained; inputs : that it will read.

    Raises PipelineError.
    """
    _require_held(plan, inputs, "The network")
    _require_done(_unfitted(plan), _epoch_of(_unfitted(plan), epoch, inputs))


@dataclass(slots=True)
class _Slopes:
    observed_px: int = 0


def _tiles(
    plan: RunPlan, epoch: EpochPlan, slopes: _Slopes, *, threads: int, progress: Progress | None
) -> Iterator[TileRasters]:
    px = plan.grid.tile_px
    for done, tile in enumerate(plan.tiles, start=1):
        data, _ = map_tile(plan, epoch, tile, threads=threads)
        slope = _stored_slope(plan, epoch, tile)
        observed = data["observability"] == Observability.OBSERVED
        steep = (slope != SLOPE_NODATA) & (slope > SLOPES_DEG / SLOPE_SCALE)
        slopes.observed_px += int((observed & steep).sum())
        yield TileRasters(
            key=tile.key,
            offset_px=(tile.row * px, tile.col * px),
            landslide=data["landslide"],
            attributes={"slope_deg": slope},
        )
        if progress is not None:
            progress(done, len(plan.tiles))


def _stored_slope(plan: RunPlan, epoch: EpochPlan, tile: Tile) -> np.ndarray:
    found = read_stored(plan, epoch.terrain, ["slope_deg"], PixelWindow.of_tile(plan.grid, tile))
    return np.asarray(found["slope_deg"].values)


def _epoch_of(plan: RunPlan, name: str | None, inputs: FeatureSpec) -> EpochPlan:
    """Find the epoch, and refuse one that an event may show in."""
    if name is None and len(plan.epochs) > 1:
        raise PipelineError(
            f"{plan.config.path}: a null run needs the name of its epoch; epochs: {', '.join(plan.by_epoch)}"
        )
    if name is not None and name not in plan.by_epoch:
        raise PipelineError(f"{plan.config.path}: no epoch {name!r}; epochs: {', '.join(plan.by_epoch)}")
    chosen = plan.epochs[0] if name is None else plan.by_epoch[name]
    settings = next(e for e in plan.config.epochs if e.name == chosen.name)
    event = _event_in(plan, settings, inputs)
    if event is not None:
        raise PipelineError(
            f"{plan.config.path}: epoch {chosen.name!r} looks until {settings.post.end}, and epoch {event.name!r} has "
            f"an event on {event.event}; a null run needs both windows before any event"
        )
    return chosen


def _event_in(plan: RunPlan, settings: Epoch, inputs: FeatureSpec) -> Epoch | None:
    """Find an epoch whose event lies before the end of the windows; where two images are compared, and after the
    start of the first: what slid before both is no change.
    """
    first = settings.before.start if settings.before is not None else None
    compares = bool(required_variables(inputs)["pre"])
    for other in plan.config.epochs:
        if other.event is None or other.event > settings.post.end:
            continue
        if compares and first is not None and other.event < first:
            continue
        return other
    return None


def _require_done(plan: RunPlan, epoch: EpochPlan) -> None:
    """Refuse layers that are not whole: ground that was not looked at would count as quiet."""
    for name in epoch.layers:
        ledger = layer_ledger(plan, name)
        lacking = [t.key for t in plan.tiles if not ledger.complete(t.key, plan.keys[name][t.key])]
        if lacking:
            raise PipelineError(
                f"{plan.config.path}: layer {name} is not done on {len(lacking)} of {len(plan.tiles)} tiles, such as "
                f"{lacking[0]}; run `slidecube cube` first"
            )
    fitted_statistics(plan, epoch)


def _with_detector(plan: RunPlan, detector: Detector) -> RunPlan:
    """Return a plan that maps with another detector, where its layers hold what that one reads."""
    card = detector.card
    if learns(card):
        raise PipelineError(
            f"Model {card.address} learns from a cube; name it as [detect] model of the run whose null run is wanted"
        )
    _require_held(plan, card.inputs, f"Model {card.address}")
    made = _unfitted(plan)
    made.__dict__["model"] = (
        detector  # what a plan otherwise builds from its configuration, when it is first asked
    )
    return made


def _unfitted(plan: RunPlan) -> RunPlan:
    """Return the plan without statistics that are fitted to its cube."""
    return replace(plan, epochs=tuple(replace(e, stat_key="") for e in plan.epochs))


def _require_held(plan: RunPlan, inputs: FeatureSpec, who: str) -> None:
    """Refuse layers that do not hold what a detector reads."""
    needed = required_variables(inputs)
    epoch = plan.epochs[0]  # the layers of one hold what those of the others do
    held = {
        "pre": plan.optical_variables() if epoch.pre else (),
        "post": plan.optical_variables(),
        "terrain": plan.terrain_variables(),
        "auxiliary": tuple(epoch.auxiliary),
    }
    for side, names in needed.items():
        radar = names if getattr(epoch, side, None) else ()
        missing = sorted(set(names) - set(held.get(side, radar)))
        if missing:
            raise PipelineError(
                f"{who} reads {', '.join(missing)} ({side}), which the layers of run {plan.run} do not "
                "hold; let its model read them, and run `slidecube cube`"
            )
