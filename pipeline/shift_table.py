"""Shifts between the images of each epoch, out of the records of its detection: a table and its sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import shapely

from slidecube.pipeline.coregistration import Shift, shifts_in
from slidecube.pipeline.polygons import Column
from slidecube.pipeline.run_plan import RunPlan, coregistration_of
from slidecube.pipeline.tasks import wanted_of

SHIFT_SCHEMA: dict[str, Column] = {
    "epoch": Column("string", "", "name of the epoch"),
    "tile": Column("string", "", "key of the tile"),
    "row": Column("int64", "", "row of the block in the lattice"),
    "col": Column("int64", "", "column of the block in the lattice"),
    "south_m": Column("float64", "m", "by how much the image before the event must be moved to the south"),
    "east_m": Column("float64", "m", "the same to the east"),
    "length_px": Column("float64", "px", "length of the shift"),
    "chips": Column("int64", "", "windows within the block that agree on it"),
    "verdict": Column("string", "", "fine, warned, excluded or unmeasured, the last without numbers"),
}
"""Columns of the table, beside the outline of the block."""


def shift_table(plan: RunPlan) -> gpd.GeoDataFrame:
    """Shift of every lattice block that was detected, in the grid's CRS; no rows where nothing is compared.

    Columns as `SHIFT_SCHEMA` describes them.
    """
    held = coregistration_of(plan.config, plan.card)
    side_m, corner = plan.grid.block_px * plan.grid.resolution_m, plan.grid.frame.affine
    rows, outlines = [], []
    for wanted in wanted_of(plan, "detect") if held is not None else ():
        for tile, record in sorted(wanted.ledger.load().items()):
            if record.key != wanted.keys.get(tile):
                continue
            for (row, col), shift in shifts_in(record.numbers).items():
                left, top = corner.c + col * side_m, corner.f - row * side_m
                outlines.append(shapely.box(left, top - side_m, left + side_m, top))
                assert held is not None
                verdict = shift.verdict(held.warn_px, held.exclude_px) if shift else "unmeasured"
                rows.append((wanted.what, tile, row, col, *_measures(shift, plan.grid.resolution_m), verdict))
    return gpd.GeoDataFrame(
        {name: [row[i] for row in rows] for i, name in enumerate(SHIFT_SCHEMA)},
        geometry=outlines,
        crs=str(plan.grid.crs),
    )


def shift_sums(shifts: Sequence[Shift | None], plan: RunPlan) -> dict[str, Any]:
    """Count blocks by verdict, and tell the median and the largest length in pixels, None where there is none."""
    held = coregistration_of(plan.config, plan.card)
    if held is None:
        return {}
    verdicts = Counter(s.verdict(held.warn_px, held.exclude_px) if s else "unmeasured" for s in shifts)
    lengths = [shift.length_px for shift in shifts if shift]
    return {
        "blocks": {name: verdicts[name] for name in ("fine", "warned", "excluded", "unmeasured")},
        "median_px": round(float(np.median(lengths)), 3) if lengths else None,
        "largest_px": round(max(lengths), 3) if lengths else None,
        "warn_px": held.warn_px,
        "exclude_px": held.exclude_px,
    }


def _measures(shift: Shift | None, resolution_m: float) -> tuple[float, float, float, int]:
    if shift is None:
        return float("nan"), float("nan"), float("nan"), 0
    return (
        round(shift.south_px * resolution_m, 3),
        round(shift.east_px * resolution_m, 3),
        round(shift.length_px, 3),
        shift.chips,
    )
