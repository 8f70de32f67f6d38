"""Masks: which pixels of a scene may be used, from its scene classification.

Axes in names: t date (scene), y, x.
"""

from __future__ import annotations

from dataclasses import dataclass

import dask.array as da
import numpy as np

SCL_MASKED = (0, 1, 3, 8, 9, 10, 11)
"""Classes of Sen2Cor never used: no data, saturated, cloud shadow, cloud, thin cirrus, snow."""

SCL_DILATED = (3, 8, 9, 10)
"""Scene classes whose edges are uncertain, and are widened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRule:
    """Which pixels of a scene are used.

    scl_classes : scene classes that are masked
    dilation_px : widening of the cloud and shadow classes, in pixels of the grid, as a square
    """

    scl_classes: tuple[int, ...] = SCL_MASKED
    dilation_px: int = 3


def clear_mask(scl_tyx: da.Array, rule: MaskRule, *, halo_px: int) -> da.Array:
    """Pixels that may be used, from the scene classification.

    scl_tyx : (t, y, x) uint8 on whole lattice blocks, `halo_px` wider on each side than the result
    Returns (t, y, x) bool. The dilation looks into the neighbouring blocks, so it does not see block edges.
    """
    masked = np.zeros(256, bool)
    masked[list(rule.scl_classes)] = True
    widened = np.zeros(256, bool)
    widened[[c for c in rule.scl_classes if c in SCL_DILATED]] = True

    def block(scl: np.ndarray) -> np.ndarray:
        cloudy: np.ndarray = masked[scl] | _dilate(widened[scl], rule.dilation_px)
        return ~cloudy

    d = rule.dilation_px
    clear: da.Array = (
        scl_tyx.map_overlap(
            block, depth={0: 0, 1: d, 2: d}, boundary=255, dtype=bool, meta=np.empty((0, 0, 0), bool)
        )
        if d
        else scl_tyx.map_blocks(block, dtype=bool)
    )
    inner: da.Array = clear[:, slice(halo_px, -halo_px or None), slice(halo_px, -halo_px or None)]
    return inner


def _dilate(mask_tyx: np.ndarray, d: int) -> np.ndarray:
    """Widen by a square of side 2 d + 1: two passes of shifted ors, far cheaper than a morphology on each date."""
    out = mask_tyx
    for axis in (1, 2):
        wide = out.copy()
        for shift in range(1, d + 1):
            lo, hi = [slice(None)] * 3, [slice(None)] * 3
            lo[axis], hi[axis] = slice(None, -shift), slice(shift, None)
            wide[tuple(lo)] |= out[tuple(hi)]
            wide[tuple(hi)] |= out[tuple(lo)]
        out = wide
    return out
