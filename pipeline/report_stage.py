"""Reports and evaluations of a workspace: the pictures are read from its layers, the numbers from its products."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyogrio

from slidecube.pipeline.composite import SCALE, SHIFT
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.evaluate import Evaluation, evaluate
from slidecube.pipeline.ledger import Ledger
from slidecube.pipeline.lock import Lock
from slidecube.pipeline.mosaic_stage import lineage, mosaic_due
from slidecube.pipeline.open import open_detected, open_plan
from slidecube.pipeline.quality import quality_of
from slidecube.pipeline.report.page import write_report
from slidecube.pipeline.report.pictures import EpochView, Picture
from slidecube.pipeline.report.static import render_picture
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.storage import Place, matching, staged
from slidecube.pipeline.store import read_window

MAX_PICTURE_PX = 2000
RENDERINGS: Mapping[str, tuple[str, str, str]] = {
    "True colour": ("B04", "B03", "B02"),
    "False colour": ("B12", "B08", "B04"),
}
"""Name -> bands shown as red, green and blue."""

_WHITE = {
    "B02": 0.18,
    "B03": 0.18,
    "B04": 0.18,
    "B08": 0.50,
    "B12": 0.35,
}  # reflectance shown at full brightness
_GAMMA = 1.5


def evaluate_workspace(
    where: str | Place, truth: str | Path, *, simulated: bool | None = None
) -> dict[str, Evaluation]:
    """Judge the inventory of a workspace against reference polygons, epoch by epoch.

    truth : any vector file; a column `epoch` assigns its polygons, without one they count for every epoch
    simulated : of the reference; left out, it is what the scenes say of themselves
    """
    plan = open_plan(where)
    reference = read_reference(truth)
    _require_current(plan)
    objects = read_objects(plan)
    inventory = open_detected(plan)
    flag = lineage(plan).simulated if simulated is None else simulated
    if "epoch" in reference.columns and not set(reference["epoch"]) & set(plan.by_epoch):
        named = ", ".join(sorted({str(name) for name in reference["epoch"]}))
        raise PipelineError(
            f"{str(truth)!r} holds the epochs {named}; this inventory has {', '.join(plan.by_epoch)}; "
            "rename them, or leave the column out"
        )
    found = {}
    for index, epoch in enumerate(plan.epochs):
        own = reference[reference["epoch"] == epoch.name] if "epoch" in reference.columns else reference
        found[epoch.name] = evaluate(
            objects[objects["epoch"] == epoch.name],
            own,
            inventory=inventory,
            epoch=index,
            simulated=flag,
            ground=plan.config.ground,
        )
    return found


def report_workspace(
    where: str | Place, *, evaluations: Mapping[str, Evaluation] | None = None, picture: Place | None = None
) -> Place:
    """Write the report of a workspace's current inventory; returns its index.html.

    evaluations : by epoch, to show what was missed and what was invented
    picture : also draw the first epoch into this PNG
    """
    plan = open_plan(where)
    _require_current(plan)
    with Lock(plan.workspace.locks, run=f"report of {plan.run}"):
        return write_plan_report(plan, evaluations=evaluations, picture=picture)


def write_plan_report(
    plan: RunPlan,
    *,
    objects: gpd.GeoDataFrame | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
    picture: Place | None = None,
) -> Place:
    """Write the report of a plan's inventory; see `report_workspace`."""
    folder = plan.workspace.products(plan.inventory)
    table = read_objects(plan) if objects is None else objects
    inventory = open_detected(plan)
    made = lineage(plan)
    views = [
        EpochView(
            name=epoch.name,
            index=index,
            pre=_pictures(plan, epoch.pre) if epoch.pre else {},
            post=_pictures(plan, epoch.post),
            evaluation=(evaluations or {}).get(epoch.name),
        )
        for index, epoch in enumerate(plan.epochs)
    ]
    files = {path.name: path for path in matching(folder, "landslides.*", "*/*.tif", "stac/*.json")}
    index = write_report(
        folder / "report",
        inventory=inventory,
        objects=table,
        views=views,
        lineage=made,
        products=files,
        quality=quality_of(plan),
    )
    if picture is not None:
        title = f"{plan.inventory}: {plan.card.address}, unreviewed"
        with staged(picture.parent) as local:
            render_picture(
                local / picture.name,
                inventory=inventory,
                objects=table,
                view=views[0],
                title=title,
                simulated=made.simulated,
            )
    return index


def read_objects(plan: RunPlan) -> gpd.GeoDataFrame:
    """Read the objects of a plan's inventory."""
    path = plan.workspace.products(plan.inventory) / "landslides.parquet"
    if not path.exists():
        raise PipelineError(
            f"There is no {path}; run `slidecube mosaic` first, with 'parquet' in [output] formats"
        )
    try:
        with path.open("rb") as file:
            table: gpd.GeoDataFrame = gpd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"{path} cannot be read ({' '.join(str(error).split())[:160]}); remove it and run again"
        ) from None
    return table


def read_reference(path: str | Path) -> gpd.GeoDataFrame:
    """Read reference polygons from any vector file."""
    try:
        table: gpd.GeoDataFrame = (
            gpd.read_parquet(path) if str(path).endswith((".parquet", ".geoparquet")) else gpd.read_file(path)
        )
    except FileNotFoundError:
        raise PipelineError(f"There is no file {str(path)!r} to compare with") from None
    except (OSError, ValueError, pyogrio.errors.DataSourceError) as error:
        raise PipelineError(
            f"{str(path)!r} cannot be read as polygons: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(table, gpd.GeoDataFrame) or table.geometry.isna().all():
        raise PipelineError(
            f"{str(path)!r} holds no geometries; give polygons, such as GeoJSON, GeoPackage or GeoParquet"
        )
    return table


def _require_current(plan: RunPlan) -> None:
    """Refuse to judge or show objects that are older than the detections."""
    if mosaic_due(plan, formats=["parquet"]):
        raise PipelineError(
            f"The products of {plan.inventory} are missing or older than its detections; run `slidecube mosaic` "
            "first, with 'parquet' in [output] formats"
        )


def _pictures(plan: RunPlan, layer: str) -> dict[str, Picture]:
    held = set(plan.config.cube.bands)
    return {name: _picture(plan, layer, bands) for name, bands in RENDERINGS.items() if set(bands) <= held}


def _picture(plan: RunPlan, layer: str, bands: tuple[str, str, str]) -> Picture:
    """Draw a layer over the plan's tiles, thinned to at most `MAX_PICTURE_PX` a side, one tile in memory."""
    px = plan.grid.tile_px
    extent = plan.grid.frame[plan.tiles.roi]
    row0, col0 = (int(at.start) for at in plan.tiles.roi)
    step = max(1, -(-max(extent.shape) // MAX_PICTURE_PX))
    box = extent.zoom_out(step) if step > 1 else extent
    pixels = np.zeros((*box.shape, 3), np.uint8)
    path, ledger = plan.workspace.layer(plan.grid, layer), Ledger.of(plan.workspace.layer(plan.grid, layer))
    for tile in plan.tiles:
        if not ledger.complete(tile.key, plan.keys[layer][tile.key]):
            continue
        top, left = tile.row * px, tile.col * px
        data = read_window(path, list(bands), window=(slice(top, top + px), slice(left, left + px)))
        # the first pixel of every step-th, counted from the picture's corner
        r, c = (
            np.arange(-(-(a - b) // step), -(-(a - b + px) // step)) for a, b in ((top, row0), (left, col0))
        )
        r, c = r[r < box.shape[0]], c[c < box.shape[1]]
        part = np.ix_(r * step - (top - row0), c * step - (left - col0))
        pixels[np.ix_(r, c)] = np.dstack([_brightness(data[band][part], _WHITE[band]) for band in bands])
    return Picture(pixels=pixels, geobox=box)


def _brightness(stored: np.ndarray, white: float) -> np.ndarray:
    """Stretch stored reflectance to 1..255, 0 where nothing was seen."""
    value = (stored.astype(np.float32) - SHIFT) / SCALE / white
    bright = 1 + 254 * np.clip(value, 0, 1) ** (1 / _GAMMA)
    shown: np.ndarray = np.where(stored == 0, 0, bright).astype(np.uint8)
    return shown


def evaluation_json(evaluations: Mapping[str, Evaluation]) -> str:
    """All numbers of all epochs as JSON."""
    return json.dumps({name: found.to_dict() for name, found in evaluations.items()}, indent=2)
