"""The mosaic stage: from the inventory's tiles to objects, products and report, once and whole."""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import geopandas as gpd
import numpy as np
import pandas as pd

from slidecube.catalog.scenes import Scene
from slidecube.catalog.sources import SOURCES
from slidecube.models.uncertainty import entropy_bits
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.fit_state import fit_state
from slidecube.pipeline.ground import SHIFTS, yes_no
from slidecube.pipeline.inventory import PROBABILITY_NODATA, PROBABILITY_SCALE
from slidecube.pipeline.keys import SCHEMA_VERSION, content_key
from slidecube.pipeline.lineage import (
    Lineage,
    LineageEpoch,
    LineageScene,
    Substitution,
    is_simulated,
    slidecube_version,
)
from slidecube.pipeline.model_stac import write_model_item
from slidecube.pipeline.mosaic import TileRasters, label_objects
from slidecube.pipeline.open import detected, open_detected
from slidecube.pipeline.plan_dem import dem_facts
from slidecube.pipeline.publish import write_products
from slidecube.pipeline.run_plan import EpochPlan, RunPlan
from slidecube.pipeline.shift_table import shift_table
from slidecube.pipeline.storage import Place, below, relative_href, remove_tree, staged, write_atomic
from slidecube.pipeline.store import read_window
from slidecube.pipeline.tasks import tasks_of

RECORD = "products.json"
_JUDGEMENTS = ("evaluation.json", "inventory.png")  # of the inventory before, written by the demonstration


def products_key(plan: RunPlan, keys: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Key of the products: the detections that they are made of. keys : of each epoch's tiles, if they are known."""
    made = [
        [epoch.name, detected(plan, epoch.name, keys=None if keys is None else keys[epoch.name])]
        for epoch in plan.epochs
    ]
    return content_key("products", SCHEMA_VERSION, slidecube_version(), made)


def mosaic_due(
    plan: RunPlan,
    *,
    formats: Sequence[str] | None = None,
    keys: Mapping[str, Mapping[str, str]] | None = None,
) -> bool:
    """Tell whether the products are missing or older than the detections.

    formats : that must be there; all of the configuration, and no other, when left out
    keys : of the detections of each epoch's tiles, where they are known already
    """
    folder = plan.workspace.products(plan.inventory)
    record = _read_record(folder)
    there = set(record["formats"])
    wanted = there == set(plan.config.output.formats) if formats is None else set(formats) <= there
    whole = all((folder / product).exists() for product in record["products"])
    if not (wanted and whole and record["key"]):
        return True  # whatever a nation's detections say
    return bool(record["key"] != products_key(plan, keys))


def any_detected(plan: RunPlan) -> bool:
    """Tell whether there is a detected tile to make products of."""
    return any(detected(plan, epoch.name) for epoch in plan.epochs)


def mosaic_run(
    plan: RunPlan, *, say: TextIO | None = None, fence: Callable[[], None] = lambda: None
) -> Place:
    """Label the objects of every epoch, write the products, and then their record.

    fence : raises when somebody else writes into the workspace by now; asked before each step that writes
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
                model=plan.card.address,
                detect_key=epoch.detect_key,
            )
        )
    tables = [with_terrain(plan, table) for table in tables]
    objects = gpd.GeoDataFrame(pd.concat(tables, ignore_index=True), crs=tables[0].crs)
    if say is not None:
        print(f"mosaic: {len(objects)} objects", file=say)
    inventory = plan.workspace.inventory(plan.inventory)
    made = lineage(plan)
    formats = [f for f in plan.config.output.formats if f != "report"]
    fence()
    with staged(folder, root=plan.workspace.root) as local:
        network = write_model_item(plan, local, folder) if "stac" in formats else None
        paths = write_products(
            local,
            objects=objects,
            inventory=open_detected(plan),
            inventory_path=local / relative_href(inventory, folder),
            lineage=made,
            formats=formats,
            footprint=plan.aoi.to_crs("EPSG:4326"),
            shifts=shift_table(plan),
            network=network,
        )
        paths |= {} if network is None else {"network": network}
        products = sorted(str(path.relative_to(local)) for path in paths.values())
        fence()  # before a bucket is given them
    if "report" in plan.config.output.formats:
        # here: who asks whether a mosaic is due, as `status` does, need not wait for what draws
        from slidecube.pipeline.report_stage import write_plan_report  # noqa: PLC0415

        products = sorted([*products, below(write_plan_report(plan, objects=objects), folder)])
    fence()
    _remove_stale(folder, {*_read_record(folder)["products"], *_JUDGEMENTS} - set(products))
    record = {
        "key": key,
        "formats": sorted(plan.config.output.formats),
        "inventory": plan.inventory,
        "run": plan.run,
        "objects": len(objects),
        "products": products,
    }
    write_atomic(folder / RECORD, json.dumps(record, indent=1, sort_keys=True))
    return folder


def with_terrain(plan: RunPlan, objects: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Say of each object how steep it lies, by which DEM, and whether its event is later than that."""
    facts = dem_facts(plan.config, plan.scenes.role("dem"))
    days = {epoch.name: epoch.event or epoch.post.start for epoch in plan.config.epochs}
    later = {name: facts.later_event(day) for name, day in days.items()}
    steps = np.searchsorted(np.array(plan.config.ground.slope_edges_deg), objects["slope_deg"], side="right")
    classes = np.array(["gentle", "moderate", "steep"], dtype=object)[steps]
    classes[objects["slope_deg"].isna().to_numpy()] = None
    return objects.assign(
        slope_class=pd.Series(classes, dtype="string", index=objects.index),
        dem_source=pd.Series([", ".join(facts.sources)] * len(objects), dtype="string", index=objects.index),
        dem_date=pd.Series([facts.last] * len(objects), dtype=objects["dem_date"].dtype, index=objects.index),
        event_after_dem=pd.Series(
            [later[name] for name in objects["epoch"]], dtype="boolean", index=objects.index
        ),
    )


def _read_record(folder: Place) -> dict[str, Any]:
    nothing: dict[str, Any] = {"key": "", "formats": [], "products": []}
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return nothing
    return nothing | record if isinstance(record, dict) else nothing


def _remove_stale(folder: Place, products: set[str]) -> None:
    """Remove products of formats that are not asked for any more: they would show an older inventory."""
    for product in products:
        if product.startswith("report/"):
            remove_tree(folder / "report")
        (folder / product).unlink(missing_ok=True)


def lineage(plan: RunPlan) -> Lineage:
    """Say what an inventory was made of."""
    several = len(plan.epochs) > 1
    scenes: dict[tuple[str, str], LineageScene] = {}
    for epoch in plan.epochs:
        for use, layer in (
            ("pre", epoch.pre),
            ("post", epoch.post),
            ("dem", epoch.terrain),
            ("radar pre", epoch.radar_pre),
            ("radar post", epoch.radar_post),
            *((f"layer {name}", layer) for name, layer in epoch.auxiliary.items()),
        ):
            if layer is None:
                continue
            own = f"{use} {epoch.name}" if several and use not in {"dem", *_of_any_epoch(epoch)} else use
            for i in sorted({i for positions in plan.reads[layer].values() for i in positions}):
                scene = plan.scenes.scenes[i]
                # layers of images read the DEM as well, for light, shadow and layover
                label = "dem" if scene.role == "dem" else own
                scenes[label, scene.id] = LineageScene(
                    id=scene.id,
                    source=_source_of(scene),
                    datetime=scene.datetime if scene.datetime.year > 1970 else None,
                    use=label,
                    href=_self_href(scene.item),
                    image=scene.role in {"optical", "radar"},
                )
    card = plan.card
    substituted = _substitutions(plan)
    used = {scene.source for scene in plan.scenes} | {entry.source for entry in substituted}
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
            LineageEpoch(
                name=e.name, pre=None if e.pre is None else _window(plan, e.pre), post=_window(plan, e.post)
            )
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
            **_clusters(plan),
            "training": card.training,
            "metrics": card.metrics,
            "source": card.source,
            "licence": card.licence,
            **({"content_sha256": card.content_sha256} if card.content_sha256 else {}),
        },
        keys={
            **{f"detect {e.name}": e.detect_key for e in plan.epochs},
            **{f"statistics {e.name}": e.stat_key for e in plan.epochs if e.stat_key},
            **{la.name: la.key for la in plan.layers},
        },
        scenes=tuple(scenes[k] for k in sorted(scenes)),
        dem=str(dem_facts(plan.config, plan.scenes.role("dem"))),
        sources=plan.scenes.sourcing,
        substituted=substituted,
        licences=licences,
        attributions=tuple(dict.fromkeys(attributions)),
        simulated=any(is_simulated(scene.item) for scene in plan.scenes),
    )


def _of_any_epoch(epoch: EpochPlan) -> set[str]:
    """Uses of what does not belong to one epoch."""
    return {f"layer {name}" for name in epoch.auxiliary}


def _clusters(plan: RunPlan) -> dict[str, str]:
    """Which clusters are landslides, and who said so."""
    said = {}
    for fit in (fit_state(plan, epoch) for epoch in plan.epochs if epoch.stat_key):
        if fit["named_by"]:
            names = ", ".join(map(str, fit["clusters"])) or "none"
            said[f"landslide clusters of {fit['epoch']}"] = f"{names}, named by {fit['named_by']}"
    return said


def _substitutions(plan: RunPlan) -> tuple[Substitution, ...]:
    """What was read from another source than its scene's, as the tiles' records say."""
    if not any(scene.alternates for scene in plan.scenes):
        return ()
    tiles: Counter[tuple[str, str, str]] = Counter()
    reasons: dict[tuple[str, str, str], str] = {}
    for task, ledger in tasks_of(plan, "cube"):
        record = ledger.read(task.tile)
        if record is None or record.key != task.key:
            continue
        for scene, asset, source, reason in record.substituted:
            tiles[scene, asset, source] += 1
            reasons.setdefault((scene, asset, source), reason)
    return tuple(
        Substitution(scene=scene, asset=asset, source=source, reason=reasons[scene, asset, source], tiles=n)
        for (scene, asset, source), n in sorted(tiles.items())
    )


def _source_of(scene: Scene) -> str:
    """Name of a scene's source; of a file on this machine its name alone."""
    if scene.source in SOURCES or "://" in scene.source:
        return scene.source
    if scene.role in {"dem", "layer"} and "data" in scene.item["assets"]:
        return PurePosixPath(scene.item["assets"]["data"]["href"]).name
    return PurePosixPath(scene.source).name


def _self_href(item: dict[str, Any]) -> str:
    links = [link["href"] for link in item.get("links", []) if link.get("rel") == "self"]
    return links[0] if links and links[0].startswith(("http://", "https://")) else ""


def _window(plan: RunPlan, layer: str) -> Any:
    window = plan.by_layer[layer].window
    assert window is not None
    return window


def _entropy_of(probability: np.ndarray) -> np.ndarray:
    """Entropy of a stored probability, stored as it is: uint16 of 1e-4 bits, and the same nodata."""
    bits = np.full(PROBABILITY_NODATA + 1, PROBABILITY_NODATA, np.uint16)
    most = round(1 / PROBABILITY_SCALE)
    bits[: most + 1] = np.round(entropy_bits(np.arange(most + 1) / most) / PROBABILITY_SCALE)
    found: np.ndarray = bits[probability]
    return found


def _tiles(plan: RunPlan, epoch: EpochPlan, index: int) -> Iterator[TileRasters]:
    """Detected tiles of an epoch, one at a time, with what the objects' attributes are made of."""
    inventory = plan.workspace.inventory(plan.inventory)
    done = detected(plan, epoch.name)
    px = plan.grid.tile_px
    row0, col0 = int(plan.tiles.rows.min()), int(plan.tiles.cols.min())
    if not done:
        raise PipelineError(
            f"No tile of epoch {epoch.name!r} has been detected; run `slidecube detect` first"
        )
    for tile in plan.tiles:
        if tile.key not in done:
            continue
        rows = slice((tile.row - row0) * px, (tile.row - row0 + 1) * px)
        cols = slice((tile.col - col0) * px, (tile.col - col0 + 1) * px)
        names = ["landslide", "probability", "spread", "ground"]
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
            if store is not None
        }
        layer.setdefault("pre_date", np.zeros_like(layer["post_date"]))  # no scene from before was looked at
        yield TileRasters(
            key=tile.key,
            offset_px=(tile.row * px, tile.col * px),
            landslide=landslide,
            attributes={
                "probability": stored["probability"],
                "spread": stored["spread"],
                "entropy": _entropy_of(stored["probability"]),
                **{name: yes_no(stored["ground"], name) for name in SHIFTS if name != "slope_class"},
                **layer,
            },
        )
