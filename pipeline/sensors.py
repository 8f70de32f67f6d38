"""Mismatch of sensors: what one satellite measured of the same ground, less what another did.

Two satellites of a mission share their tracks, so nearly every tile is seen by both, and no edge tells them apart. The
difference is taken pixel by pixel while the dates of a lattice block are in memory, and kept as one number a block.

Axes in names: t date (scene), o observation (overpass), y, x.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import dask.array as da
import numpy as np

from slidecube.catalog.scenes import Scene
from slidecube.pipeline.composite import observations, shifts_of, stored_overpasses
from slidecube.pipeline.medians import median_of_positive

STEP_PX = 4
"""Every fourth row and column of a block is compared: 16,000 pixels of a block of 512 px, a sixteenth of the work."""

FEWEST_PX = 64
"""Compared pixels below which a block has no number."""

_DIGITS = 100_000  # a record holds whole numbers: hundred-thousandths of reflectance, or of a decibel
_NAME_LENGTH = 40

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SensorGap:
    """Difference of two sensors on one block of the lattice.

    row, col : of the block; variable : band or polarisation; first, second : names of the satellites, in their order
    difference : median over the pixels of the second's median less the first's, in reflectance or decibels
    px : pixels that were compared, which both saw clearly; one of every `STEP_PX` squared
    """

    row: int
    col: int
    variable: str
    first: str
    second: str
    difference: float
    px: int


def sensor_of(scene: Scene) -> str:
    """Name of the satellite, such as "sentinel-2b", or "" where an item does not say."""
    said = str((scene.item.get("properties") or {}).get("platform") or "").lower()
    return "-".join(said.split())[:_NAME_LENGTH]


def sensor_pairs(scenes: Sequence[Scene]) -> list[Pair]:
    """Pairs of the satellites that took scenes, by name; none where one satellite took them all."""
    return list(combinations(sorted({sensor_of(scene) for scene in scenes} - {""}), 2))


def audited_band(bands: Sequence[str]) -> str:
    """Band by which an optical layer is judged: near infrared, or the first."""
    return "B08" if "B08" in bands else bands[0]


def thinned(values: np.ndarray) -> np.ndarray:
    """Every `STEP_PX`-th row and column, counted from the block's corner, which is fixed on the ground."""
    return values[..., ::STEP_PX, ::STEP_PX]


def differences(
    stored_oyx: np.ndarray, sensors: Sequence[str], views: Sequence[Hashable], pairs: Sequence[Pair]
) -> np.ndarray:
    """Compare sensors on one block.

    stored_oyx : (o, y, x) uint16 whole steps, 0 = not seen; sensors : of each observation
    views : only observations of one view are compared: tracks see a slope from different sides
    Returns (2 * pairs,) int64: of each pair twice the median difference in steps, second less first, and the number of
    pixels, both 0 where there are fewer than `FEWEST_PX`.
    """
    positions: dict[tuple[Hashable, str], list[int]] = defaultdict(list)
    for o, (view, sensor) in enumerate(zip(views, sensors, strict=True)):
        positions[view, sensor].append(o)
    wanted = {name for pair in pairs for name in pair}
    medians = {
        key: median_of_positive(stored_oyx[at]).astype(np.int64)
        for key, at in positions.items()
        if key[1] in wanted and stored_oyx[at].any()
    }
    out = np.zeros((len(pairs), 2), np.int64)
    for found, (first, second) in zip(out, pairs, strict=True):
        parts = [np.zeros(0, np.int64)]
        for view in {view for view, _ in medians}:
            if (view, first) in medians and (view, second) in medians:
                one, two = medians[view, first], medians[view, second]
                both = (one > 0) & (two > 0)
                parts.append(two[both] - one[both])
        apart = np.concatenate(parts)
        if len(apart) >= FEWEST_PX:
            found[:] = round(2 * float(np.median(apart))), len(apart)
    return out.reshape(-1)


def optical_gaps(dn_tyx: da.Array, clear_tyx: da.Array, *, scenes: Sequence[Scene]) -> da.Array | None:
    """Compare the sensors of an optical layer by one band, lazily.

    dn_tyx : (t, y, x) uint16 digital numbers, 0 = nodata, one chunk in time; clear_tyx : (t, y, x) bool
    Returns (2 * pairs, rows of blocks, columns of blocks) int64, see `differences`, in ten-thousandths of reflectance;
    None where one satellite took all scenes.
    """
    pairs = sensor_pairs(scenes)
    if not pairs:
        return None
    groups, shifts = observations(scenes), shifts_of(scenes)
    sensors = [sensor_of(scenes[group[0]]) for group in groups]

    def block(dn: np.ndarray, clear: np.ndarray) -> np.ndarray:
        dn, clear = thinned(dn), thinned(clear)
        flat = (len(scenes), -1)
        stored_on = stored_overpasses(
            dn.reshape(flat), (clear & (dn != 0)).reshape(flat), shifts=shifts, groups=groups
        )
        made = differences(stored_on[:, None], sensors, [0] * len(groups), pairs)
        return made[:, None, None]

    return by_blocks_of(block, [dn_tyx, clear_tyx], n=2 * len(pairs))


def by_blocks_of(block: object, arrays: Sequence[da.Array], *, n: int) -> da.Array:
    """Map blocks of arrays to `n` whole numbers each: (n, rows of blocks, columns of blocks) int64, lazily."""
    rows, cols = arrays[0].numblocks[-2:]
    made: da.Array = da.map_blocks(
        block,
        *arrays,
        dtype=np.int64,
        chunks=((n,), (1,) * rows, (1,) * cols),
        meta=np.empty((0, 0, 0), np.int64),
    )
    return made


def gap_numbers(
    found: np.ndarray,
    pairs: Sequence[Pair],
    *,
    variables: Sequence[str],
    first_block: tuple[int, int],
    step: float,
) -> dict[str, int]:
    """Write differences as a record's numbers; blocks without one are left out.

    found : (variable * pair * 2, rows of blocks, columns of blocks), see `differences`
    first_block : row and column of the first block in the lattice; step : reflectance or decibels of a stored step
    """
    out = {}
    shape = (len(variables), len(pairs), 2, *found.shape[1:])
    for (v, p, row, col), px in np.ndenumerate(found.reshape(shape)[:, :, 1]):
        if px:
            twice = int(found.reshape(shape)[v, p, 0, row, col])
            at = f"gap {first_block[0] + row} {first_block[1] + col} {variables[v]} {' '.join(pairs[p])}"
            out[f"{at} e5"] = round(twice * step * _DIGITS / 2)
            out[f"{at} px"] = int(px)
    return out


def gaps_in(numbers: Mapping[str, int]) -> list[SensorGap]:
    """Read the differences in a record's numbers: the inverse of `gap_numbers`."""
    found = []
    for name, px in sorted(numbers.items()):
        if name.startswith("gap ") and name.endswith(" px"):
            _, row, col, variable, first, second, _ = name.split()
            found.append(
                SensorGap(
                    row=int(row),
                    col=int(col),
                    variable=variable,
                    first=first,
                    second=second,
                    difference=numbers[f"{name.removesuffix(' px')} e5"] / _DIGITS,
                    px=px,
                )
            )
    return found
