"""Reflectance of the ground on a day: green plants, litter and soil mixed, and what has changed."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np

from slidecube.pipeline.simulate import fields
from slidecube.pipeline.simulate.changes import MATERIALS, ChangeMap, bareness_on
from slidecube.pipeline.simulate.landscape import CLASSES, COVER_OF, Landscape
from slidecube.pipeline.simulate.parameters import Parameters, Phenology

_NO_GREEN = "water"
_SOILS: dict[
    str, dict[str, float]
] = {  # what lies under each class: shares of fixed spectra, the rest is soil
    "water": {"water": 1.0},
    "bare": {"rock": 0.6},
    "built": {"built": 1.0},
    "road": {"built": 1.0},
    "river": {"gravel": 0.75, "water": 0.25},
}
_GREENS = {"built": "grass", "road": "grass", "river": "grass", "bare": "grass", "water": "grass"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The ground on one day, ready to be mixed band by band.

    landscape, changes : what lies there
    day : date
    removed : (n + 1,) share of the green cover that each change has removed by then, index 0 = none
    """

    parameters: Parameters
    landscape: Landscape
    changes: ChangeMap
    day: dt.date
    removed: np.ndarray

    def strip(self, rows: slice) -> Strip:
        """Mix the cover of some 10 m rows, on the fine grid."""
        return Strip.of(self, rows)


def ground_on(
    parameters: Parameters, landscape: Landscape, changes: ChangeMap, day: dt.date, *, only: str | None = None
) -> Ground:
    """Look at the ground on a day.

    only : a kind of change to show, as if the others never happened; "" shows none
    """
    removed = bareness_on(changes.changes, day)
    if only is not None:
        removed[1:] *= np.array([change.kind == only for change in changes.changes], np.float32)
    return Ground(parameters=parameters, landscape=landscape, changes=changes, day=day, removed=removed)


def green_cover(
    p: Phenology,
    names: tuple[str, ...],
    day: dt.date,
    *,
    stand: np.ndarray,
    fall: np.ndarray,
    cover: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Green cover and its yearly maximum, by pixel: two (y, x) float32 in 0..1.

    names : class of each code; stand, fall : standard deviations of cover and of the day of leaf fall
    Source: double logistic of Zhang 2003, of which the windows see the second half; a summer dip by drought.
    """

    def table(values: dict[str, float], default: float = 0.0) -> np.ndarray:
        return np.array([values.get(COVER_OF.get(n, n), default) for n in names], np.float32)

    doy = day.timetuple().tm_yday
    high = np.clip(table(p.green_high)[cover] + table(p.green_sd)[cover] * stand, 0, 0.98)
    late = (doy - table(p.fall_day, 400)[cover] - table(p.fall_spread_days)[cover] * fall) / p.fall_width_days
    left = 1 / (1 + np.exp(np.clip(late, -30, 30)))
    low = np.minimum(table(p.green_low)[cover], high)
    dip = np.exp(-0.5 * ((doy - p.summer_dip_day) / p.summer_dip_days) ** 2)
    green = low + (high - low) * left - table(p.summer_dip)[cover] * np.float32(dip)
    return np.clip(green, 0, 1).astype(np.float32), high.astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Cover of some rows on the fine grid: shares of green, litter and soil, and the changed share."""

    ground: Ground
    rows: slice
    green: np.ndarray
    litter: np.ndarray
    cover: np.ndarray
    index: np.ndarray
    changed: np.ndarray
    soil: np.ndarray
    brightness: np.ndarray

    @classmethod
    def of(cls, ground: Ground, rows: slice) -> Strip:
        """Mix the shares once for all bands."""
        land, p = ground.landscape, ground.parameters
        fine = slice(rows.start * 2, rows.stop * 2)
        cover = land.cover[fine]
        stand, fall, soil, bright, tint = (
            fields.repeat(a[rows].astype(np.float32), 2)
            for a in (land.stand, land.fall, land.soil, land.bright, land.tint_b)
        )
        green, high = green_cover(p.phenology, CLASSES, ground.day, stand=stand, fall=fall, cover=cover)
        index = ground.changes.index[fine]
        texture = np.clip(1 + p.landslides.bare_texture * tint, 0.3, 1.3)
        changed = ground.removed[index] * (ground.changes.cover[fine] * np.float32(1 / 255))
        bright *= p.spectra.texture_sd
        speckle = land.speckle[fine].astype(np.float32) * np.float32(p.spectra.speckle_sd)
        return cls(
            ground=ground,
            rows=rows,
            green=green,
            litter=np.maximum(high - green, 0) * np.float32(p.phenology.dead_share),
            cover=cover,
            index=index,
            changed=np.clip(changed * texture, 0, 1),
            soil=soil,
            brightness=np.where(cover == CLASSES.index("water"), 1, np.clip(1 + bright + speckle, 0.4, 1.8)),
        )

    def band(self, number: int) -> np.ndarray:
        """Reflectance of one band by its place in `spectra.bands`: (2y, 2x) float32."""
        p, land = self.ground.parameters.spectra, self.ground.landscape
        base, slope, leaves = _tables(p, number)
        rho = self.green * leaves[self.cover]
        rho += self.litter * np.float32(p.litter[number])
        soil = base[self.cover] + slope[self.cover] * self.soil
        rho += (1 - self.green - self.litter) * soil
        fresh = _materials(p, self.ground.changes, number)
        rho += self.changed * (fresh[self.index] - rho)
        angle = np.pi * number / len(p.bands)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        tint = cos * land.tint_a[self.rows].astype(np.float32) + sin * land.tint_b[self.rows].astype(
            np.float32
        )
        rho *= self.brightness
        rho *= fields.repeat((1 + p.texture_band_sd * tint).astype(np.float32), 2)
        return np.asarray(np.maximum(rho, np.float32(0)))


def _tables(spectra: object, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Soil at its darkest, its range, and leaves, by class: three (classes,) float32."""

    def value(name: str) -> float:
        return float(getattr(spectra, name)[number])

    base, slope, leaves = [], [], []
    for name in CLASSES:
        fixed = _SOILS.get(name, {})
        rest = 1 - sum(fixed.values())
        base.append(sum(share * value(what) for what, share in fixed.items()) + rest * value("soil_dark"))
        slope.append(rest * (value("soil_bright") - value("soil_dark")))
        leaves.append(value(_GREENS.get(name, name)))
    return np.array(base, np.float32), np.array(slope, np.float32), np.array(leaves, np.float32)


def _materials(spectra: object, changes: ChangeMap, number: int) -> np.ndarray:
    """Reflectance of the new ground of each change, index 0 = 0: (n + 1,) float32."""
    pure = np.array([getattr(spectra, name)[number] for name in MATERIALS])
    mixed = [float(np.dot(change.mix, pure)) for change in changes.changes]
    return np.array([0.0, *mixed], np.float32)
