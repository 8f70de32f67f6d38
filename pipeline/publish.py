"""Publish: the products that people open. Every file appears whole or not at all."""

from __future__ import annotations

import datetime as dt
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import geopandas as gpd
import xarray as xr
from shapely.geometry.base import BaseGeometry

from slidecube.pipeline import styles
from slidecube.pipeline.cog import CogSpec, write_cog
from slidecube.pipeline.disk import naming_a_full_disk
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.inventory import (
    LANDSLIDE_NODATA,
    PROBABILITY_NODATA,
    PROBABILITY_SCALE,
    epochs_of,
    geobox_of,
    stored,
)
from slidecube.pipeline.lineage import Lineage
from slidecube.pipeline.polygons import SCHEMA
from slidecube.pipeline.stac import inventory_item, item_text
from slidecube.pipeline.storage import write_atomic

FORMATS = ("parquet", "gpkg", "cog", "stac")
LAYER = "landslides"
ROW_GROUP = 50_000

COGS: dict[str, CogSpec] = {
    "probability": CogSpec(
        nodata=PROBABILITY_NODATA,
        description="probability of a landslide",
        scale=PROBABILITY_SCALE,
        overview="average",
    ),
    "landslide": CogSpec(
        nodata=LANDSLIDE_NODATA,
        description="landslide (1), where observability is 3",
        colours={0: (0, 0, 0, 0), 1: (*styles.rgb(styles.FOUND), 255), LANDSLIDE_NODATA: (0, 0, 0, 0)},
    ),
    "observability": CogSpec(
        nodata=None,
        description="0 not processed, 1 outside the AOI, 2 not observable, 3 observed",
        colours={value: (*styles.rgb(colour), 255) for value, colour in styles.OBSERVABILITY.items()},
    ),
    "reason": CogSpec(
        nodata=None, description="why a pixel is not observable, 0 where it is; classes in the item"
    ),
    "ground": CogSpec(
        nodata=0,
        description="ground, two bits each, 0 not known: little vegetation before the event, river corridor, farmland "
        "(1 no, 2 yes), slope (1 gentle, 2 moderate, 3 steep)",
    ),
}
"""Variables of an inventory that are written as GeoTIFFs, where it holds them."""


def write_products(
    out_dir: Path,
    *,
    objects: gpd.GeoDataFrame,
    inventory: xr.Dataset,
    lineage: Lineage,
    inventory_path: Path | None = None,
    formats: Sequence[str] = FORMATS,
    footprint: BaseGeometry | None = None,
    shifts: gpd.GeoDataFrame | None = None,
    network: Path | None = None,
) -> dict[str, Path]:
    """Write an inventory's products and the STAC item that lists them.

    objects : by `polygons.SCHEMA`; inventory : (epoch, y, x), opened decoded or as stored
    inventory_path : Zarr group to list among the item's assets; footprint : of the item, longitude and latitude
    shifts : between the images of each epoch, by block; written as a table where there are any
    network : item of the network that detected, to which the inventory's leads; None for a rule
    Returns asset key -> path ("objects", "shifts", "geopackage", "<epoch>/probability", ..., "item").
    Raises PipelineError for an unknown format.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise PipelineError(f"Format {unknown[0]!r} is not known; formats: {', '.join(FORMATS)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    made: dict[str, Path] = {}
    if "parquet" in formats:
        made["objects"] = write_geoparquet(out_dir / "landslides.parquet", objects[[*SCHEMA, "geometry"]])
        if shifts is not None and len(shifts):
            made["shifts"] = write_geoparquet(out_dir / "shifts.parquet", shifts)
    if "gpkg" in formats:
        made["geopackage"] = write_geopackage(out_dir / "landslides.gpkg", objects, lineage)
    if "cog" in formats:
        made.update(write_cogs(out_dir / "cog", inventory, lineage))
    if "stac" in formats:
        assets = made if inventory_path is None else {**made, "inventory": inventory_path}
        at = out_dir / "stac" / f"{lineage.name}.json"
        item = inventory_item(
            lineage, geobox=geobox_of(inventory), assets=assets, at=at, footprint=footprint, network=network
        )
        at.parent.mkdir(exist_ok=True)
        write_atomic(at, item_text(item))
        made["item"] = at
    return made


def write_geoparquet(path: Path, objects: gpd.GeoDataFrame) -> Path:
    """Write objects as GeoParquet 1.1 with a bounding box a row; equal objects give equal bytes."""

    def write(partial: Path) -> None:
        objects.to_parquet(
            partial,
            index=False,
            compression="zstd",
            schema_version="1.1.0",
            write_covering_bbox=True,
            row_group_size=ROW_GROUP,
        )

    return _whole(path, write)


def write_geopackage(path: Path, objects: gpd.GeoDataFrame, lineage: Lineage) -> Path:
    """Write objects as a GeoPackage that QGIS opens coloured by probability."""
    note = "SIMULATED. " if lineage.simulated else ""

    def write(partial: Path) -> None:
        objects[[*SCHEMA, "geometry"]].to_file(
            partial,
            driver="GPKG",
            layer=LAYER,
            engine="pyogrio",
            use_arrow=True,
            index=False,
            promote_to_multi=True,
            geometry_type="MultiPolygon",
            layer_options={
                "IDENTIFIER": f"Landslides {lineage.name}",
                "DESCRIPTION": f"{note}Unreviewed; {lineage.model_name}, slidecube {lineage.version}",
            },
        )
        with closing(sqlite3.connect(partial)) as db, db:
            _add_style(db, lineage.created)

    return _whole(path, write, suffix=".gpkg")


def write_cogs(folder: Path, inventory: xr.Dataset, lineage: Lineage) -> dict[str, Path]:
    """Write the variables of `COGS` of each epoch as cloud-optimised GeoTIFFs."""
    geobox = geobox_of(inventory)
    made = {}
    for index, epoch in enumerate(epochs_of(inventory)):
        prefix = f"{epoch}-" if epoch else ""
        tags = {
            "INVENTORY": lineage.name,
            "EPOCH": epoch,
            "MODEL": lineage.model_name,
            "SOFTWARE": f"slidecube {lineage.version}",
            "STATUS": "simulated, unreviewed" if lineage.simulated else "unreviewed",
        }
        for name, spec in ((name, spec) for name, spec in COGS.items() if name in inventory):
            path = folder / f"{prefix}{name}.tif"
            values = stored(inventory, name, epoch=index)
            made[f"{epoch}/{name}" if epoch else name] = write_cog(
                path, values, geobox=geobox, spec=spec, tags=tags
            )
        write_atomic(folder / f"{prefix}probability.qml", styles.probability_qml(PROBABILITY_SCALE))
    return made


def _whole(path: Path, write: Callable[[Path], None], *, suffix: str = "") -> Path:
    """Let `write` make the file under a temporary name, then give it its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.partial"):  # of a writer that was killed
        shutil.rmtree(stale, ignore_errors=True)
    # a folder, because some writers judge a file by its suffix and keep a journal beside it
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    folder.mkdir()
    try:
        partial = folder / f"new{suffix or path.suffix}"
        with naming_a_full_disk(folder):
            write(partial)
        partial.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def _add_style(db: sqlite3.Connection, created: dt.datetime) -> None:
    """Add the table from which QGIS takes a layer's default style."""
    when = created.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    db.execute(
        "CREATE TABLE layer_styles (id INTEGER PRIMARY KEY AUTOINCREMENT, f_table_catalog TEXT(256), "
        "f_table_schema TEXT(256), f_table_name TEXT(256), f_geometry_column TEXT(256), styleName TEXT(30), "
        "styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN, description TEXT, owner TEXT(30), ui TEXT(30), "
        "update_time DATETIME)"
    )
    db.execute(
        "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, styleName, "
        "styleQML, styleSLD, useAsDefault, description, owner, ui, update_time) "
        "VALUES ('', '', ?, 'geom', 'probability', ?, '', 1, 'Coloured by probability', '', '', ?)",
        (LAYER, styles.objects_qml(), when),
    )
    db.execute(
        "INSERT INTO gpkg_contents (table_name, data_type, identifier, description, last_change) "
        "VALUES ('layer_styles', 'attributes', 'layer_styles', 'QGIS styles', ?)",
        (when,),
    )
