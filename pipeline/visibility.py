"""What of the ground the sun let be seen on each date: scenes of a low sun, and the shadow of ridges.

Axes in names: t date (scene), y, x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import dask
import dask.array as da
import numpy as np
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from slidecube.catalog.load import Loader, ReadLog
from slidecube.catalog.scenes import Scene
from slidecube.pipeline.composite import OBSERVED_VARIABLES
from slidecube.pipeline.masks import CLEAR, CLOUDED, MASKED, SHADED, sun_of
from slidecube.pipeline.sunlight import around_block, cast_shadow, required_sun
from slidecube.pipeline.terrain import terrain_block

LOW_SUN_CODE, DARK_CODE = CLOUDED + 1, CLOUDED + 2
"""What would be clear, had the sun been higher, or no ridge before it: beside the codes of `masks`."""

LOW_SUN, CAST_SHADOW = 1, 2
"""Bits of the stored byte `hidden`: what alone hid a pixel on one of its dates."""

SEEN_VARIABLES = (*OBSERVED_VARIABLES, "snow_pct", "hidden")
"""What a layer says of its observations: neither interpolated nor forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SunRule:
    """Which observations are left out for their light.

    min_elevation_deg : lowest sun; a scene that does not say where the sun stood is not left out for it
    cast_shadow : leave out what lies in the shadow of ridges
    """

    min_elevation_deg: float = 25.0
    cast_shadow: bool = False


def lit(
    codes_tyx: da.Array,
    scenes: Sequence[Scene],
    dem: Sequence[Scene],
    geobox: GeoBox,
    *,
    rule: SunRule,
    log: ReadLog | None = None,
    loader: Loader = "odc-stac",
) -> da.Array:
    """Take what the sun did not light out of what may be used, lazily, block by block of the lattice.

    codes_tyx : (t, y, x) uint8 of `masks.judge`, one chunk in time and one a block; scenes : of t
    dem : items under the pixels and `SHADOW_HALO_M` around them, read for cast shadow only
    Returns (t, y, x) uint8: LOW_SUN_CODE or DARK_CODE in place of CLEAR and of SHADED; MASKED in place of CLOUDED,
    which the bands might have admitted.
    Raises PipelineError where a shadow is wanted and an item does not say where the sun stood.
    """
    low = np.array([_is_low(scene, rule.min_elevation_deg) for scene in scenes])
    codes: da.Array = codes_tyx
    if low.any():
        codes = codes_tyx.map_blocks(
            lambda part: np.stack(
                [_taken_out(c, LOW_SUN_CODE) if out else c for c, out in zip(part, low, strict=True)]
            ),
            dtype=np.uint8,
        )
    if not rule.cast_shadow:
        return codes
    shade, sides = dask.delayed(_shaded, pure=False), codes.chunks[1:]
    ends = [np.cumsum(sizes).tolist() for sizes in sides]

    def shaded(row: int, col: int) -> da.Array:
        h, w = sides[0][row], sides[1][col]
        part = geobox[ends[0][row] - h : ends[0][row], ends[1][col] - w : ends[1][col]]
        heights = dask.delayed(_heights, pure=False)(list(dem), around_block(part), log, loader)
        made = shade(codes.blocks[0, row, col], scenes, heights, part)
        lazy: da.Array = da.from_delayed(made, (len(scenes), h, w), np.uint8)
        return lazy

    return da.block([[[shaded(r, c) for c in range(len(sides[1]))] for r in range(len(sides[0]))]])


def hidden_by(codes_tyx: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bits of what alone hid a pixel on one of its dates: (y, x) uint8."""
    out = np.zeros(codes_tyx.shape[1:], np.uint8)
    for code, bit in ((LOW_SUN_CODE, LOW_SUN), (DARK_CODE, CAST_SHADOW)):
        out[(codes_tyx == code).any(axis=0)] |= np.uint8(bit)
    return out


def _is_low(scene: Scene, min_elevation_deg: float) -> bool:
    sun = sun_of(scene)
    return sun is not None and sun.elevation_deg < min_elevation_deg


def _taken_out(codes: NDArray[np.uint8], code: int) -> NDArray[np.uint8]:
    """Codes of pixels of which nothing is used."""
    table = np.arange(256, dtype=np.uint8)
    table[[CLEAR, SHADED, CLOUDED]] = code, code, MASKED
    return table[codes]


def _heights(dem: list[Scene], around: GeoBox, log: ReadLog | None, loader: Loader) -> NDArray[np.float32]:
    heights: NDArray[np.float32] = terrain_block(dem, around, log, loader, variables=("elevation",))[0]
    return heights


def _shaded(
    codes_tyx: NDArray[np.uint8],
    scenes: Sequence[Scene],
    heights: NDArray[np.float32],
    geobox: GeoBox,
) -> NDArray[np.uint8]:
    """Codes of a block with the shadow of the ground; of dates that show none of it, nothing is computed."""
    out, around = codes_tyx.copy(), around_block(geobox)
    for codes, scene in zip(out, scenes, strict=True):
        if np.isin(codes, (CLEAR, SHADED, CLOUDED)).any():
            dark = cast_shadow(heights, around, geobox, required_sun(scene))
            codes[dark] = _taken_out(codes[dark], DARK_CODE)
    return out
