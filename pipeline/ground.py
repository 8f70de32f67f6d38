"""The ground that a pixel lies on: strata in which an inventory is right or wrong for reasons of their own.

One byte a pixel holds four answers of two bits each, 0 = not known: little vegetation before the event (1 no, 2 yes), a
river's corridor (1 no, 2 yes), farmland (1 no, 2 yes), and the class of the slope (1 gentle, 2 moderate, 3 steep).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slidecube.pipeline.auxiliary import CLASS_NODATA
from slidecube.pipeline.composite import SCALE, SHIFT
from slidecube.pipeline.config import Ground
from slidecube.pipeline.indices import ndvi
from slidecube.pipeline.pixels import PixelWindow, read_stored
from slidecube.pipeline.points import farmland_codes
from slidecube.pipeline.run_plan import EpochPlan, RunPlan
from slidecube.pipeline.terrain import TERRAIN_VARIABLES

SHIFTS: Mapping[str, int] = {"low_vegetation": 0, "river_corridor": 2, "farmland": 4, "slope_class": 6}
"""Place of each answer in the byte, in bits."""

_NO, _YES = 1, 2

GROUND_CF: Mapping[str, Any] = {
    "long_name": "ground that the pixel lies on; 0 in a mask = not known",
    "flag_masks": [3, 3, 12, 12, 48, 48, 192, 192, 192],
    "flag_values": [1, 2, 4, 8, 16, 32, 64, 128, 192],
    "flag_meanings": "vegetated low_vegetation away_from_rivers river_corridor other_land farmland "
    "gentle moderate steep",
}
"""CF attributes of the byte. Source: CF conventions 1.11, section 3.5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """One stratum: an answer of one factor.

    name : as JSON has it; label : for people
    """

    name: str
    label: str
    factor: str
    value: int

    def holds(self, ground: np.ndarray) -> np.ndarray:
        """Tell which bytes lie in it."""
        return np.asarray(answer(ground, self.factor) == self.value)


def strata(settings: Ground) -> tuple[Stratum, ...]:
    """All strata, in the order in which they are shown."""
    low, high = settings.slope_edges_deg
    limit = settings.low_vegetation_ndvi
    river = f"{settings.river_corridor_m:g} m" if settings.river_corridor_m else "the limit"
    rows = (
        ("low_vegetation", f"NDVI before the event below {limit:g}", "low_vegetation", _YES),
        ("vegetated", f"NDVI before the event of {limit:g} and more", "low_vegetation", _NO),
        ("river_corridor", f"below {river} above the nearest drainage", "river_corridor", _YES),
        ("away_from_rivers", f"{river} above the nearest drainage and more", "river_corridor", _NO),
        ("farmland", "farmland", "farmland", _YES),
        ("other_land", "no farmland", "farmland", _NO),
        ("slope_gentle", f"slope below {low:g} degrees", "slope_class", 1),
        ("slope_moderate", f"slope of {low:g} to {high:g} degrees", "slope_class", 2),
        ("slope_steep", f"slope of {high:g} degrees and more", "slope_class", 3),
    )
    return tuple(Stratum(name=n, label=text, factor=f, value=v) for n, text, f, v in rows)


def answer(ground: np.ndarray, factor: str) -> np.ndarray:
    """Take one answer out of the bytes; factor : of `SHIFTS`."""
    return np.asarray((ground >> SHIFTS[factor]) & 3)


def yes_no(ground: np.ndarray, factor: str) -> np.ndarray:
    """Take an answer as 0, 1 and 255 = not known: uint8."""
    return np.asarray(np.array([255, 0, 1, 255], np.uint8)[answer(ground, factor)])


def pack(answers: Mapping[str, np.ndarray]) -> np.ndarray:
    """Put answers into bytes: factor -> (y, x) of 0 to 3."""
    shape = next(iter(answers.values())).shape
    out = np.zeros(shape, np.uint8)
    for factor, values in answers.items():
        out |= values.astype(np.uint8) << np.uint8(SHIFTS[factor])
    return out


def ground_of(plan: RunPlan, epoch: EpochPlan, window: PixelWindow) -> np.ndarray:
    """Find the ground of a window from finished layers: (y, x) uint8, see the module.

    What a plan does not hold is not known: vegetation without red and near infrared from before the event, rivers and
    farmland where the TOML does not ask for them.
    """
    return pack(dict(_answers(plan, epoch, window)))


def _answers(plan: RunPlan, epoch: EpochPlan, window: PixelWindow) -> Iterator[tuple[str, np.ndarray]]:
    settings = plan.config.ground
    if epoch.pre and {"B04", "B08"} <= set(plan.config.cube.bands):
        red, nir = (v.values for v in read_stored(plan, epoch.pre, ["B04", "B08"], window).data_vars.values())
        before = ndvi(*((band.astype(np.float32) - SHIFT) / np.float32(SCALE) for band in (red, nir)))
        seen = (red != 0) & (nir != 0) & ~np.isnan(before)
        yield "low_vegetation", _asked(before < settings.low_vegetation_ndvi, seen)
    if settings.river_corridor_m:
        height = _terrain(plan, epoch, "hand_m", window)
        yield "river_corridor", _asked(height < settings.river_corridor_m, ~np.isnan(height))
    if settings.farmland and epoch.land_cover:
        (cover,) = read_stored(plan, epoch.land_cover, ["land_cover"], window).data_vars.values()
        classes = np.isin(cover.values, farmland_codes(settings.farmland, plan.points))
        yield "farmland", _asked(classes, cover.values != CLASS_NODATA)
    slope = _terrain(plan, epoch, "slope_deg", window)
    steps = np.searchsorted(np.array(settings.slope_edges_deg), slope, side="right") + 1
    yield "slope_class", np.where(np.isnan(slope), 0, steps)


def _terrain(plan: RunPlan, epoch: EpochPlan, name: str, window: PixelWindow) -> np.ndarray:
    stored = read_stored(plan, epoch.terrain, [name], window)[name]
    return np.asarray(TERRAIN_VARIABLES[name].values(stored).values)


def _asked(yes: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(known, np.where(yes, _YES, _NO), 0)
