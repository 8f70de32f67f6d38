"""Opening what a run made: the doors for notebooks and other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.inventory import CF, Observability, open_stored
from slidecube.pipeline.ledger import Ledger
from slidecube.pipeline.plan import RunPlan, current_run, read_plan
from slidecube.pipeline.store import Workspace


def open_plan(where: str | Path) -> RunPlan:
    """Read the current plan of a workspace."""
    workspace = Workspace.at(where)
    run = current_run(workspace)
    if run is None:
        raise PipelineError(
            f"{where} is not a workspace with a plan; make one with `slidecube plan FILE.toml`"
        )
    return read_plan(workspace, run)


def open_inventory(path: str | Path) -> xr.Dataset:
    """Open an inventory lazily, one Dask chunk a tile.

    path : a workspace (its current inventory) or one `inventories/*.zarr`

    Returns (epoch, y, x): `probability` and `spread` float32, NaN = unknown; `landslide` uint8, 1 yes, 0 no,
    255 unknown; `observability` uint8, see its flags ("no landslide" is `landslide == 0` where it is 3); `reason`
    uint8, why a pixel is not observable; with x, y (centres, metres) and `spatial_ref`. Tiles without a finished
    record are shown as not processed, whatever lies on the disk.
    Raises PipelineError when there is no inventory.
    """
    group = Path(path)
    if group.suffix != ".zarr":
        plan = open_plan(group)
        group = plan.workspace.inventory(plan.inventory)
    if not (group / "zarr.json").is_file():
        raise PipelineError(f"There is no inventory {group}; make it with `slidecube run FILE.toml`")
    stored = open_stored(group)
    try:
        first, px = stored.attrs["slidecube:first_tile"], int(stored.attrs["slidecube:tile_px"])
    except KeyError as missing:
        raise PipelineError(
            f"{group} has no attribute {missing}; it is not an inventory of slidecube"
        ) from None
    done = _recorded(group, [str(name) for name in stored["epoch"].values], first, px, stored)
    return _decoded(stored if done is None else _without_unrecorded(stored, done))


def _recorded(
    group: Path, epochs: list[str], first: list[int], px: int, stored: xr.Dataset
) -> da.Array | None:
    """Mask (epoch, y, x) of the pixels with a finished record, None when that is all of them."""
    rows, cols = stored.sizes["y"] // px, stored.sizes["x"] // px
    done = np.zeros((len(epochs), rows, cols), bool)
    for e, epoch in enumerate(epochs):
        for record in Ledger.of(group, epoch):
            row, _, col = record.tile.removeprefix("r").partition("c")
            at = int(row) - first[0], int(col) - first[1]
            if record.complete and 0 <= at[0] < rows and 0 <= at[1] < cols:
                done[(e, *at)] = True
    if done.all():
        return None
    tiles = da.from_array(done, chunks=1)
    mask: da.Array = tiles.map_blocks(
        lambda tile: np.broadcast_to(tile, (1, px, px)),
        chunks=((1,) * len(epochs), (px,) * rows, (px,) * cols),
    )
    return mask


def _without_unrecorded(stored: xr.Dataset, done: da.Array) -> xr.Dataset:
    mask = xr.DataArray(done, dims=("epoch", "y", "x"))
    shown = {}
    for name, array in stored.data_vars.items():
        fill: Any = CF[str(name)].get("_FillValue", int(Observability.NOT_PROCESSED))
        shown[name] = array.where(mask, np.asarray(fill, array.dtype)).assign_attrs(array.attrs)
    return stored.assign(shown)


def _decoded(stored: xr.Dataset) -> xr.Dataset:
    scaled = {}
    for name in ("probability", "spread"):
        array, cf = stored[name], CF[name]
        values = array.astype(np.float32) * np.float32(cf["scale_factor"])
        attrs = {
            k: v
            for k, v in array.attrs.items()
            if k not in ("scale_factor", "add_offset", "_FillValue", "valid_range")
        }
        scaled[name] = values.where(array != cf["_FillValue"]).assign_attrs(attrs)
    return stored.assign(scaled)
