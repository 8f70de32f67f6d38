"""Opening what a run made: the doors for notebooks and other programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.inventory import CF, Observability, open_stored
from slidecube.pipeline.ledger import Ledger
from slidecube.pipeline.plan_files import current_run, read_plan
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.storage import Place, place_of
from slidecube.pipeline.store import Workspace
from slidecube.pipeline.tasks import detect_keys


def open_plan(where: str | Place) -> RunPlan:
    """Read the current plan of a workspace."""
    workspace = Workspace.at(where)
    run = current_run(workspace)
    if run is None:
        raise PipelineError(
            f"{where} is not a workspace with a plan; make one with `slidecube plan FILE.toml`"
        )
    return read_plan(workspace, run)


def open_inventory(path: str | Place) -> xr.Dataset:
    """Open an inventory lazily, one Dask chunk a tile.

    path : a workspace (its current inventory) or one `inventories/*.zarr`

    Returns (epoch, y, x): `probability` and `spread` float32, NaN = unknown; `landslide` uint8, 1 yes, 0 no,
    255 unknown; `observability` uint8, see its flags ("no landslide" is `landslide == 0` where it is 3); `reason`
    uint8, why a pixel is not observable; with x, y (centres, metres) and `spatial_ref`. Tiles without a finished
    record (of a workspace: under the current plan's key) are shown as not processed, whatever lies on the disk.
    Raises PipelineError when there is no inventory.
    """
    group = place_of(path)
    if group.suffix != ".zarr":
        return _decoded(open_detected(open_plan(group)))
    stored = _open(group)
    epochs = [str(name) for name in stored["epoch"].values]
    done = [{r.tile for r in Ledger.of(group, epoch) if r.complete} for epoch in epochs]
    return _decoded(_masked(stored, done))


def open_detected(plan: RunPlan) -> xr.Dataset:
    """Open a plan's inventory as stored, lazily; what is not detected under the plan's keys is not processed.

    This is the one way in which products, reports and evaluations read it.
    """
    stored = _open(plan.workspace.inventory(plan.inventory))
    return _masked(stored, [set(detected(plan, epoch.name)) for epoch in plan.epochs])


def detected(plan: RunPlan, epoch: str, *, keys: Mapping[str, str] | None = None) -> dict[str, str]:
    """Tiles of an epoch whose detection is done under the plan's key, and that key.

    keys : of all its tiles, where they are known already
    """
    ledger = Ledger.of(plan.workspace.inventory(plan.inventory), epoch)
    keys = detect_keys(plan, epoch) if keys is None else keys
    known = ledger.keys()
    return {tile: key for tile, key in keys.items() if known.get(tile) == (key, True)}


def _open(group: Place) -> xr.Dataset:
    if not (group / "zarr.json").is_file():
        raise PipelineError(f"There is no inventory {group}; make it with `slidecube run FILE.toml`")
    stored = open_stored(group)
    if "slidecube:first_tile" not in stored.attrs:
        raise PipelineError(f"{group} does not say which tiles it holds; it is not an inventory of slidecube")
    return stored


def _masked(stored: xr.Dataset, done: list[set[str]]) -> xr.Dataset:
    """Hide what is not done; done : of each epoch, keys of tiles."""
    (row0, col0), px = stored.attrs["slidecube:first_tile"], int(stored.attrs["slidecube:tile_px"])
    rows, cols = stored.sizes["y"] // px, stored.sizes["x"] // px
    there = np.array(
        [
            [[f"r{row0 + r:03d}c{col0 + c:03d}" in tiles for c in range(cols)] for r in range(rows)]
            for tiles in done
        ],
        bool,
    )
    if there.all():
        return stored
    mask = da.from_array(there, chunks=1).map_blocks(
        lambda tile: np.broadcast_to(tile, (1, px, px)),
        chunks=((1,) * len(done), (px,) * rows, (px,) * cols),
    )
    return _without_unrecorded(stored, mask)


def _without_unrecorded(stored: xr.Dataset, done: da.Array) -> xr.Dataset:
    mask = xr.DataArray(done, dims=("epoch", "y", "x"))
    shown = {}
    for name, array in stored.data_vars.items():
        fill: Any = CF.get(str(name), {}).get("_FillValue", int(Observability.NOT_PROCESSED))
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
