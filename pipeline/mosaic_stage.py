"""The mosaic stage: from the inventory's tiles to objects, products and report, once and whole."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import geopandas as gpd
import numpy as np
import pandas as pd

from slidecube.catalog.sources import SOURCES
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.inventory import open_stored
from slidecube.pipeline.keys import SCHEMA_VERSION, content_key
from slidecube.pipeline.ledger import Ledger, write_atomic
from slidecube.pipeline.lineage import Lineage, LineageEpoch, LineageScene, slidecube_version
from slidecube.pipeline.mosaic import TileRasters, label_objects
from slidecube.pipeline.plan import EpochPlan, RunPlan
from slidecube.pipeline.publish import write_products
from slidecube.pipeline.report_stage import write_plan_report
from slidecube.pipeline.store import read_window

RECORD = "products.json"


def products_key(plan: RunPlan) -> str:
    """Key of the products: the detections they are made of, and what is written."""
    records = [
        [epoch.name, tile.key, None if record is None else [record.key, record.state]]
        for epoch in plan.epochs
        for tile in plan.tiles
        for record in [Ledger.of(plan.workspace.inventory(plan.inventory), epoch.name).read(tile.key)]
    ]
    return content_key(
        "products", SCHEMA_VERSION, slidecube_version(), records, sorted(plan.config.output.formats)
    )


def mosaic_due(plan: RunPlan) -> bool:
    """Tell whether the products are missing or older than the detections."""
    try:
        record = json.loads((plan.workspace.products(plan.inventory) / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return True
    return bool(record.get("key") != products_key(plan))


def any_detected(plan: RunPlan) -> bool:
    """Tell whether there is a detected tile to make products of."""
    ledgers = (Ledger.of(plan.workspace.inventory(plan.inventory), epoch.name) for epoch in plan.epochs)
    return any(record.complete for ledger in ledgers for record in ledger)


def mosaic_run(plan: RunPlan, *, say: TextIO | None = None) -> Path:
    """Label the objects of every epoch, write the products, and then their record.

    Raises PipelineError when no tile has been detected.
    """
    key = products_key(plan)
    folder = plan.workspace.products(plan.inventory)
    tables = []
    for index, epoch in enumerate(plan.epochs):
        tables.append(
            label_objects(
                _tiles(plan, epoch, index),
                frame=plan.grid.frame,
                epoch=epoch.name,
                model=plan.model.card.address,
                detect_key=epoch.detect_key,
            )
        )
    objects = gpd.GeoDataFrame(pd.concat(tables, ignore_index=True), crs=tables[0].crs)
    if say is not None:
        print(f"mosaic: {len(objects)} objects", file=say)
    inventory = plan.workspace.inventory(plan.inventory)
    made = lineage(plan)
    formats = [f for f in plan.config.output.formats if f != "report"]
    paths = write_products(
        folder,
        objects=objects,
        inventory=open_stored(inventory),
        inventory_path=inventory,
        lineage=made,
        formats=formats,
        footprint=plan.aoi.to_crs("EPSG:4326"),
    )
    if "report" in plan.config.output.formats:
        paths["report"] = write_plan_report(plan, objects=objects)
    record = {
        "key": key,
        "inventory": plan.inventory,
        "run": plan.run,
        "objects": len(objects),
        "products": sorted(str(p.relative_to(folder)) for p in paths.values() if p.is_relative_to(folder)),
    }
    write_atomic(folder / RECORD, json.dumps(record, indent=1, sort_keys=True))
    return folder


def lineage(plan: RunPlan) -> Lineage:
    """Say what an inventory was made of."""
    several = len(plan.epochs) > 1
    scenes: dict[tuple[str, str], LineageScene] = {}
    for epoch in plan.epochs:
        for use, layer in (("pre", epoch.pre), ("post", epoch.post), ("dem", epoch.terrain)):
            label = f"{use} {epoch.name}" if several and use != "dem" else use
            for positions in plan.tasks[layer].values():
                for i in positions[1]:
                    scene = plan.scenes.scenes[i]
                    scenes[label, scene.id] = LineageScene(
                        id=scene.id,
                        source=scene.source,
                        datetime=scene.datetime,
                        use=label,
                        href=_self_href(scene.item),
                    )
    card = plan.model.card
    used = {scene.source for scene in plan.scenes}
    licences, attributions = {}, []
    for name in sorted(used):
        if name in SOURCES:
            licences[name] = SOURCES[name].licence
            attributions.append(SOURCES[name].attribution)
    for scene in plan.scenes:
        properties = scene.item["properties"]
        if scene.source not in SOURCES and properties.get("license"):
            licences[Path(scene.source).name or scene.source] = properties["license"]
        attributions += [properties["attribution"]] if properties.get("attribution") else []
    return Lineage(
        name=plan.inventory,
        run=plan.run,
        created=dt.datetime.now(dt.UTC).replace(microsecond=0),
        grid=plan.grid.key,
        epochs=tuple(
            LineageEpoch(name=e.name, pre=_window(plan, e.pre), post=_window(plan, e.post))
            for e in plan.epochs
        ),
        model={
            "name": card.name,
            "version": card.version,
            "architecture": card.architecture,
            "inputs": ", ".join(card.inputs.names),
            "threshold": card.threshold,
            "min_area_m2": card.min_area_m2,
            **card.parameters,
            "training": card.training,
            "metrics": card.metrics,
            "source": card.source,
            "licence": card.licence,
        },
        keys={
            **{f"detect {e.name}": e.detect_key for e in plan.epochs},
            **{la.name: la.key for la in plan.layers},
        },
        scenes=tuple(scenes[k] for k in sorted(scenes)),
        licences=licences,
        attributions=tuple(dict.fromkeys(attributions)),
        simulated=any(is_simulated(scene.item) for scene in plan.scenes),
    )


def is_simulated(item: dict[str, Any]) -> bool:
    """Tell whether a STAC item says that its pixels are simulated."""
    return bool(item["properties"].get("slidecube:simulated", False))


def _self_href(item: dict[str, Any]) -> str:
    links = [link["href"] for link in item.get("links", []) if link.get("rel") == "self"]
    return links[0] if links and links[0].startswith(("http://", "https://")) else ""


def _window(plan: RunPlan, layer: str) -> Any:
    window = plan.by_layer[layer].window
    assert window is not None
    return window


def _tiles(plan: RunPlan, epoch: EpochPlan, index: int) -> Iterator[TileRasters]:
    """Detected tiles of an epoch, one at a time, with what the objects' attributes are made of."""
    inventory = plan.workspace.inventory(plan.inventory)
    ledger = Ledger.of(inventory, epoch.name)
    px = plan.grid.tile_px
    row0, col0 = min(t.row for t in plan.tiles), min(t.col for t in plan.tiles)
    found = False
    for tile in plan.tiles:
        record = ledger.read(tile.key)
        if record is None or not record.complete:
            continue
        found = True
        rows = slice((tile.row - row0) * px, (tile.row - row0 + 1) * px)
        cols = slice((tile.col - col0) * px, (tile.col - col0 + 1) * px)
        names = ["landslide", "probability", "spread"]
        stored = read_window(inventory, names, window=(rows, cols), leading=(index,))
        landslide = stored["landslide"].astype(np.uint8)
        frame = (slice(tile.row * px, (tile.row + 1) * px), slice(tile.col * px, (tile.col + 1) * px))
        layer = {
            name: read_window(plan.workspace.layer(plan.grid, store), [variable], window=frame)[variable]
            for name, store, variable in (
                ("slope_deg", epoch.terrain, "slope_deg"),
                ("elevation", epoch.terrain, "elevation"),
                ("pre_date", epoch.pre, "date_last"),
                ("post_date", epoch.post, "date_first"),
            )
        }
        yield TileRasters(
            key=tile.key,
            offset_px=(tile.row * px, tile.col * px),
            landslide=landslide,
            attributes={"probability": stored["probability"], "spread": stored["spread"], **layer},
        )
    if not found:
        raise PipelineError(
            f"No tile of epoch {epoch.name!r} has been detected; run `slidecube detect` first"
        )
