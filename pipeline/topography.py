"""Topographic correction: what a slope would reflect if it lay flat.

A slope that faces the sun is brighter than one that turns away from it, of the same ground. The sun moves between two
images, so the difference changes, and looks like a change of the ground.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from slidecube.catalog.scenes import Scene
from slidecube.pipeline.composite import SCALE
from slidecube.pipeline.sunlight import cos_incidence, required_sun

Correction = Literal["none", "c", "scs+c"]

FEWEST_PX = 2_000
"""Pixels of a block from which a line is drawn."""

STEEP_DEG = 5.0
"""Slope from which a pixel takes part in the fit: valley floors carry another ground than slopes."""

LEAST_SPREAD = 0.03
"""Standard deviation of cos i of those pixels below which the block is as good as flat, and is not corrected."""

LARGEST_FACTOR = 3.0
"""Correction beyond which, or below whose inverse, it is held: at grazing light there is little left to correct."""


def corrected(
    bands_tyx: Mapping[str, da.Array],
    clear_tyx: da.Array,
    terrain_syx: da.Array,
    *,
    scenes: Sequence[Scene],
    method: Correction,
) -> dict[str, da.Array]:
    """Correct the raw digital numbers of each scene, band by band and block by block of the lattice.

    bands_tyx : band -> (t, y, x) uint16 raw digital numbers, 0 = nodata, one chunk in time and one a block
    clear_tyx : (t, y, x) bool, of what the line is fitted to; terrain_syx : (2, y, x) float32, slope and aspect in
        degrees, NaN = unknown (aspect: or flat), see `cos_incidence`
    scenes : of t, for their sun and their offset; method : "c" or "scs+c", see `correct_scene`
    Returns the same arrays corrected; pixels without a slope stay as they are.
    Raises PipelineError where an item does not say where the sun stood.
    """
    suns = [required_sun(scene) for scene in scenes]
    offsets = [0.0 if scene.offset is None else SCALE * scene.offset.value for scene in scenes]
    zenith_cosines = [float(np.sin(np.radians(sun.elevation_deg))) for sun in suns]

    def light(terrain: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([cos_incidence(terrain[0], terrain[1], sun) for sun in suns])

    def block(
        dn: NDArray[np.uint16],
        clear: NDArray[np.bool_],
        cos_i: NDArray[np.float32],
        terrain: NDArray[np.float32],
    ) -> NDArray[np.uint16]:
        out = dn.copy()
        for t in range(len(dn)):
            if clear[t].any():
                stored = dn[t].astype(np.float32) + np.float32(offsets[t])
                made = correct_scene(
                    stored, clear[t] & (dn[t] != 0), cos_i[t], terrain[0],
                    cos_zenith=zenith_cosines[t], method=method,
                )  # fmt: skip
                back = np.clip(np.rint(made - np.float32(offsets[t])), 1, 65535)
                out[t] = np.where((dn[t] == 0) | np.isnan(back), dn[t], back)
        return out

    chunks = ((len(scenes),), *terrain_syx.chunks[1:])
    lit = da.map_blocks(
        light, terrain_syx, dtype=np.float32, chunks=chunks, meta=np.empty((0, 0, 0), np.float32)
    )
    meta = np.empty((0, 0, 0), np.uint16)
    return {
        # one chunk along the first axis each: of dates, of dates, of dates, and of slope and aspect
        name: da.map_blocks(
            block, band, clear_tyx, lit, terrain_syx, dtype=np.uint16, chunks=band.chunks, meta=meta
        )
        for name, band in bands_tyx.items()
    }


ILLUMINATION = "illumination"
"""Stored with an optical layer that is corrected."""


def illumination(clear_tyx: da.Array, terrain_syx: da.Array, *, scenes: Sequence[Scene]) -> da.Array:
    """Mean light over the clear scenes of each pixel: the cosine of the angle between sun and ground, lazily.

    clear_tyx, terrain_syx, scenes : as for `corrected`
    Returns (y, x) uint16, round(10000 * mean) + 10001; 0 = seen on no date, or without a slope. Cosines count in whole
    ten-thousandths, so that the order of dates leaves no trace.
    """
    suns = [required_sun(scene) for scene in scenes]

    def block(clear: NDArray[np.bool_], terrain: NDArray[np.float32]) -> NDArray[np.uint16]:
        total, count = np.zeros(clear.shape[1:], np.int64), clear.sum(axis=0)
        known = ~np.isnan(terrain[0]) & (count > 0)
        for seen, sun in zip(clear, suns, strict=True):
            light = np.rint(10_000 * np.nan_to_num(cos_incidence(terrain[0], terrain[1], sun))).astype(
                np.int64
            )
            total += np.where(seen, light, 0)
        mean = np.rint(total / np.maximum(count, 1)) + 10_001
        return np.where(known, mean, 0).astype(np.uint16)

    return da.map_blocks(
        block, clear_tyx, terrain_syx, dtype=np.uint16, drop_axis=0, meta=np.empty((0, 0), np.uint16)
    )


def correct_scene(
    reflectance: NDArray[np.float32],
    clear: NDArray[np.bool_],
    cos_i: NDArray[np.float32],
    slope_deg: NDArray[np.float32],
    *,
    cos_zenith: float,
    method: Correction,
) -> NDArray[np.float32]:
    """Correct one band of one scene on one block.

    reflectance : (y, x) on any scale that starts at zero; clear : pixels that the line is fitted to, as far as they
        are steeper than `STEEP_DEG` and face the sun; cos_i, slope_deg : (y, x), NaN = unknown
    The line is reflectance = a + b cos i, by least squares. "c" returns reflectance (cos z + c) / (cos i + c) with
    c = a / b, "scs+c" reflectance (cos s cos z + c) / (cos i + c), s the slope: trees stand upright on every slope.
    Both are written as (a + b ...) / (a + b cos i), which is the same where b is above 0, and holds where b is 0 or
    below: where a provider has corrected too much already. Ground that faces away from the sun has cos i = 0.
    Returns (y, x) float32, unchanged where the block is nearly flat (`LEAST_SPREAD`), has fewer than `FEWEST_PX`, or
    the slope is unknown.
    Source: Teillet, Guindon & Goodenough 1982, eq. 7; Soenen, Peddle & Coburn 2005, eq. 9,
    doi:10.1109/TGRS.2005.852480.
    """
    known = ~np.isnan(cos_i)
    used = clear & known & (slope_deg >= STEEP_DEG) & (cos_i > 0)
    line = _fitted(cos_i[used], reflectance[used])
    if line is None or line[0] + line[1] * cos_zenith <= 0:
        return reflectance
    a, b = line
    light = np.clip(cos_i, 0, 1)
    lean = np.cos(np.radians(slope_deg)) if method == "scs+c" else 1.0
    flat = np.float32(cos_zenith) * lean
    least = np.float32((a + b * cos_zenith) / LARGEST_FACTOR)
    factor = (a + b * flat) / np.maximum(a + b * light, least)
    held = np.clip(factor, 1 / LARGEST_FACTOR, LARGEST_FACTOR).astype(np.float32)
    return np.where(known, reflectance * held, reflectance)


def _fitted(x: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[float, float] | None:
    """Line through points, None where there are too few, or they lie too close together."""
    if len(x) < FEWEST_PX:
        return None
    wide, high = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = wide.mean(), high.mean()
    spread = ((wide - mean_x) ** 2).mean()
    if spread < LEAST_SPREAD**2:
        return None
    b = ((wide - mean_x) * (high - mean_y)).mean() / spread
    a = mean_y - b * mean_x
    return float(a), float(b)
