"""What it means that two workspaces hold the same work: arrays and tables by bytes, the rest by content."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import geopandas as gpd

from slidecube.pipeline import storage
from slidecube.pipeline.ledger import VOLATILE, Ledger
from slidecube.pipeline.open import open_plan
from slidecube.pipeline.storage import Place, sizes
from slidecube.pipeline.tasks import tasks_of

FOLDERS = ("layers/", "statistics/", "inventories/", "products/")
MOMENTARY = ("created", "updated", "file:checksum", "file:size")
"""Keys of JSON that hold the time of writing, or follow from it."""


def assert_same_work(found: Place | Path, expected: Place | Path) -> None:
    """Arrays, COGs and GeoParquet by bytes; records, GeoPackage, JSON and STAC by content, without times and hosts."""
    names, told = (
        {name for name in sizes(root, deep=True) if name.startswith(FOLDERS)} for root in (found, expected)
    )
    assert names == told
    assert sum("/c/" in name for name in names) > 20
    assert any(name.endswith("landslides.parquet") for name in names)
    for name in sorted(names):
        places = [root.joinpath(*name.split("/")) for root in (found, expected)]
        if ".ledger/" in name or "/report/" in name:
            continue
        if name.endswith(".gpkg"):
            with storage.fetched(places[0]) as left, storage.fetched(places[1]) as right:
                assert tables(left) == tables(right), name
                layers = [gpd.read_file(path, layer="landslides") for path in (left, right)]
                assert layers[0].equals(layers[1]), name
        elif name.endswith(".json") and "products/" in name:
            left, right = (without_time(json.loads(place.read_bytes())) for place in places)
            assert left == right, name
        else:
            assert places[0].read_bytes() == places[1].read_bytes(), name
    pairs = zip(tasks_of(open_plan(found)), tasks_of(open_plan(expected)), strict=True)
    for ledgers in {(left, right) for (_, left), (_, right) in pairs}:
        assert records(ledgers[0]) == records(ledgers[1]) != {}


def records(ledger: Ledger) -> dict[str, dict[str, Any]]:
    """Records without what differs between two runs of the same work."""
    return {
        tile: {name: value for name, value in dataclasses.asdict(record).items() if name not in VOLATILE}
        for tile, record in ledger.load().items()
    }


def without_time(value: Any) -> Any:
    """JSON without the times of its writing."""
    if isinstance(value, dict):
        return {key: without_time(inner) for key, inner in value.items() if key not in MOMENTARY}
    return [without_time(inner) for inner in value] if isinstance(value, list) else value


def tables(path: Path) -> dict[str, list[list[Any]]]:
    """Rows of a GeoPackage's own tables, without the times at which they were written."""
    with closing(sqlite3.connect(path)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {
            name: db.execute(f'SELECT * FROM "{name}"').fetchall() for name in names if "rtree" not in name
        }
    return {
        name: [[v for v in row if not (isinstance(v, str) and v.endswith("Z"))] for row in found]
        for name, found in rows.items()
    }
