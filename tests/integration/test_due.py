"""Changes that make little due, or nothing: elsewhere, again, less, lost, moved."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import zarr

from slidecube.pipeline import load_config, open_inventory, plan
from slidecube.pipeline.run import due
from slidecube.pipeline.tasks import tasks_of

PRE, POST = "optical-2018-05-01_2018-09-05", "optical-2018-09-07_2018-11-15"


@pytest.fixture(scope="module")
def finished(desk_in, tmp_path_factory):
    """A finished run; copied by the tests."""
    desk = desk_in(tmp_path_factory.mktemp("finished") / "desk")
    assert desk.cli("run", desk.toml, "--quiet").code == 0
    return desk


@pytest.fixture
def desk(finished, desk_in, tmp_path, small_archive):
    """A desk with a finished run and an archive of its own, both free to be changed."""
    archive = tmp_path / "mine"
    shutil.copytree(small_archive, archive)
    desk = desk_in(tmp_path / "desk", archive=archive)
    shutil.copytree(finished.workspace, desk.workspace)
    return desk


@pytest.fixture
def run(command, desk):
    """Run the desk's TOML to completion; returns what was done and read, as the last run's events tell."""

    def call(*args: object) -> dict[str, object]:
        outcome = command("run", desk.toml, "--quiet", *args)
        assert outcome.code == 0, outcome
        state = json.loads(command("status", desk.workspace, "--json").out)
        assert state["complete"], state
        newest = max((desk.workspace / "events").glob("*.jsonl"), key=lambda p: p.stat().st_mtime_ns)
        events = [json.loads(line) for line in newest.read_text().splitlines()]
        last = max(i for i, e in enumerate(events) if e["event"] == "run_started")
        tasks = [e for e in events[last:] if e["event"] == "task"]
        assert state["scene_reads_last_run"] == sum(e["scene_reads"] for e in tasks)
        return {
            "cubes": sorted({e["layer"].rsplit("-", 1)[0] for e in tasks if e["stage"] == "cube"}),
            "cube": sum(e["stage"] == "cube" for e in tasks),
            "detect": sum(e["stage"] == "detect" for e in tasks),
            "reads": state["scene_reads_last_run"],
            "total": state["scene_reads"],
            "tiles": sorted({e["tile"] for e in tasks if e["stage"] == "cube"}),
        }

    return call


def scene_file(archive: Path, number: int = 0, *, after: str = "2018-09-06") -> Path:
    """The item file of one scene, by date, after a day."""
    items = sorted(
        (archive / "archive" / "sentinel-2-l2a").glob("*/*.json"), key=lambda p: p.stem.split("_")[3]
    )
    day = after.replace("-", "")
    return [p for p in items if p.stem.split("_")[3][:8] > day][number]


def unlink_item(archive: Path, item: Path) -> str:
    """Take an item out of its collection; returns the collection's text as it was."""
    collection = archive / "archive" / "sentinel-2-l2a" / "collection.json"
    text = collection.read_text()
    document = json.loads(text)
    document["links"] = [link for link in document["links"] if item.name not in link["href"]]
    collection.write_text(json.dumps(document))
    assert collection.read_text() != text
    return text


def test_the_same_archive_in_another_folder_makes_nothing_due(desk, run):
    """Scenes count by what they are, not where they lie."""
    before = desk.files("layers", "inventories")

    assert (run("--refresh")["cube"], run()["detect"]) == (0, 0)

    after = desk.files("layers", "inventories")
    changed = [name for name in before if after[name] != before[name]]
    assert [name.partition(".zarr")[2] for name in changed] == ["/zarr.json"], (
        "the inventory names its newest run"
    )


def test_an_archive_that_is_gone_makes_nothing_due(desk, run):
    run()
    shutil.rmtree(desk.archive / "archive")
    desk.write(detect={"threshold": 0.4})

    done = run()

    assert (done["cube"], done["detect"], done["reads"]) == (0, 4, 0)


def test_other_products_detect_nothing_anew(desk, run):
    desk.write(output={"formats": ["parquet", "cog"]})
    assert run()["detect"] == 0
    folder = next((desk.workspace / "products").iterdir())
    assert len(list(folder.glob("cog/*.tif"))) == 5
    desk.write(output={"formats": ["cog"]})
    assert run()["detect"] == 0
    assert not (folder / "landslides.parquet").exists(), "an old table beside new rasters would mislead"


def test_lost_products_are_made_again(desk, run):
    table = next((desk.workspace / "products").glob("*/landslides.parquet"))
    before = table.read_bytes()
    table.unlink()

    assert run()["detect"] == 0
    assert table.read_bytes() == before


def test_a_lost_layer_is_made_again(desk, run):
    run()
    layer = next((desk.workspace / "layers").glob("*/optical-2018-09*.zarr"))
    before = desk.files("layers", "inventories")
    shutil.rmtree(layer)

    assert run()["cubes"] == [POST]
    after = desk.files("layers", "inventories")
    assert {n: d for n, d in after.items() if ".ledger" not in n} == {
        n: d for n, d in before.items() if ".ledger" not in n
    }


def tiles_touching(desk, footprint) -> list[str]:
    """By geometry alone, from the grid of the layer."""
    layer = next((desk.workspace / "layers").glob("*/optical-2018-09*.zarr"))
    x0, y0 = (zarr.open_group(layer).attrs["spatial:transform"][i] for i in (2, 5))
    shape = gpd.GeoSeries([footprint], crs="EPSG:4326").to_crs("EPSG:32632").iloc[0]
    found = []
    for path in layer.with_suffix(".ledger").glob("*.json"):
        row, col = (int(n) for n in path.stem[1:].split("c"))
        left, top = x0 + col * 5120, y0 - row * 5120
        if shape.intersects(shapely.box(left, top - 5120, left + 5120, top)):
            found.append(path.stem)
    return sorted(found)


def test_a_scene_over_some_tiles_alone_makes_only_these_due(desk, run):
    """A post-event scene cut down to the north-western corner of the scene: its footprint says so."""
    item = scene_file(desk.archive)
    document = json.loads(item.read_text())
    shape = shapely.geometry.shape(document["geometry"])
    xmin, _, _, ymax = shape.bounds
    corner = shapely.box(xmin, ymax - 0.002, xmin + 0.002, ymax)
    touched = tiles_touching(desk, corner)
    assert 0 < len(touched) < 4
    whole = unlink_item(desk.archive, item)
    run("--refresh")
    document["geometry"] = shapely.geometry.mapping(corner)
    document["bbox"] = list(corner.bounds)
    item.write_text(json.dumps(document))
    (desk.archive / "archive" / "sentinel-2-l2a" / "collection.json").write_text(whole)

    done = run("--refresh")

    assert (done["cubes"], done["tiles"]) == ([POST], touched)


def test_a_reprocessed_scene_is_read_again(desk, run):
    item = scene_file(desk.archive)
    text = item.read_text()
    item.write_text(text.replace('"s2:generation_time": "20', '"s2:generation_time": "21'))
    assert item.read_text() != text

    assert run("--refresh")["cubes"] == [POST]


def test_a_scene_that_vanished_leaves_nothing_behind(desk, run):
    """Its tiles may have no scene at all any more: their old pixels must not shine through."""
    collection = desk.archive / "archive" / "sentinel-2-l2a" / "collection.json"
    document = json.loads(collection.read_text())
    day = scene_file(desk.archive).stem.split("_")[3][:8]
    tile = "T32NKF"
    document["links"] = [
        link
        for link in document["links"]
        if link["rel"] != "item" or tile not in link["href"] or link["href"].split("_")[3][:8] < day
    ]
    collection.write_text(json.dumps(document))

    done = run("--refresh")

    assert done["cubes"] == [POST]
    layer = next((desk.workspace / "layers").glob("*/optical-2018-09*.zarr"))
    for path in layer.with_suffix(".ledger").glob("*.json"):
        record = json.loads(path.read_text())
        row, col = (int(n) for n in record["tile"][1:].split("c"))
        if record["state"] == "empty":
            block = np.s_[row * 512 : (row + 1) * 512, col * 512 : (col + 1) * 512]
            assert not zarr.open_group(layer, mode="r")["B04"][block].any()


def area(desk, *bounds: float) -> None:
    """Name another area: a box in degrees."""
    desk.write(area={"aoi": None, "bbox": list(bounds)})


def test_a_grown_area_keeps_its_layers(desk, run):
    """First a corner, then all: no finished tile is read again, and the inventory is a new one."""
    shutil.rmtree(desk.workspace)
    xmin, ymin, xmax, ymax = gpd.read_file(desk.archive / "truth" / "area.geojson").total_bounds
    area(desk, xmin, ymin, xmin + 0.001, ymin + 0.001)
    small = run()
    assert small["cube"] == 3
    area(desk, xmin, ymin, xmin + 0.003, ymin + 0.003)
    within = run()
    area(desk, xmin, ymin, xmax, ymax)
    grown = run()

    assert (within["cube"], within["reads"], within["detect"]) == (0, 0, 1), (
        "another outline is another inventory"
    )
    assert grown["cube"] == 9
    assert not set(small["tiles"]) & set(grown["tiles"])
    assert grown["detect"] == 4
    assert len(list((desk.workspace / "inventories").glob("*.zarr"))) == 3


def test_what_lies_outside_a_smaller_area_is_not_shown_as_seen(desk, run):
    """The same tiles, a smaller outline: nothing of the old inventory counts."""
    bounds = gpd.read_file(desk.archive / "truth" / "area.geojson").total_bounds
    before = open_inventory(desk.workspace)["observability"].values
    area(desk, *(bounds + np.array([0.004, 0.004, -0.004, -0.004])))

    run()

    after = open_inventory(desk.workspace)["observability"].values
    assert (after == 1).sum() > (before == 1).sum()
    assert not ((after == 3) & (before == 1)).any()


def test_clean_keeps_the_work_of_every_toml(desk, run, command):
    other = desk.folder / "other.toml"
    other.write_text(desk.write(detect={"threshold": 0.4}).toml.read_text())
    desk.write(detect={"threshold": None})
    assert command("run", other, "--quiet").code == 0
    before = desk.files("layers", "inventories", "products", "plans")

    assert command("clean", desk.workspace).out == "nothing is superseded\n"
    assert desk.files("layers", "inventories", "products", "plans") == before
    assert run()["detect"] == 0


def test_the_machine_decides_nothing(desk, run):
    """Profile, threads, memory and budget are no part of any key."""
    desk.write(
        cluster={
            "profile": "threads",
            "workers": 2,
            "threads_per_worker": 1,
            "mem_gb": 6.0,
            "failure_budget": 3,
        }
    )

    assert (run()["cube"], run()["detect"]) == (0, 0)


def test_a_moved_workspace_is_complete(desk, command):
    moved = desk.folder / "elsewhere" / "ws2"
    moved.parent.mkdir()
    desk.workspace.rename(moved)
    desk.write(output={"workspace": "elsewhere/ws2"})

    outcome = command("run", desk.toml, "--quiet")

    assert outcome.code == 0
    assert "nothing was due" in outcome.out


def test_scenes_are_counted_as_they_are_opened(desk, run, monkeypatch):
    """`scene_reads` against the file system's own account: access to each asset."""
    shutil.rmtree(desk.workspace)
    opened: set[tuple[str, str]] = set()
    real = rasterio.open

    def spy(path, *args, **kwargs):
        if "SIMULATED" in str(path) and "sentinel-2" in str(path):
            opened.add(Path(str(path)).parent.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(rasterio, "open", spy)
    run()
    records = [json.loads(d) for n, d in desk.files("layers").items() if ".ledger" in n and "optical" in n]

    assert opened == {scene for record in records for scene in record["scenes"]}
    assert all(record["scene_reads"] == len(record["scenes"]) for record in records)


def test_a_detection_waits_for_the_cubes_beside_it_and_is_made_once(desk_in, tmp_path, command):
    desk = desk_in(tmp_path / "desk")
    assert command("cube", desk.toml, "--quiet", "--shard", "0/3").code == 0

    early = command("detect", desk.toml, "--quiet")

    assert early.code == 2
    assert "waits for the cubes of the tile and of those beside it; run `slidecube cube`" in early.err
    state = json.loads(command("status", desk.workspace, "--json").out)
    assert state["tiles"]["detect"] == {"done": 0, "due": 4, "failed": 0, "running": 0}
    assert command("run", desk.toml, "--quiet").code == 0
    detected = [e for e in desk.events() if e["event"] == "task" and e["stage"] == "detect"]
    assert sorted(e["tile"] for e in detected) == sorted({e["tile"] for e in detected})


def test_who_comes_after_a_killed_shard_tells_what_it_did(desk_in, tmp_path, command):
    desk = desk_in(tmp_path / "desk")
    assert command("cube", desk.toml, "--quiet", "--shard", "1/3").code == 0
    (told,) = (desk.workspace / "events").glob("*.cube-1of3.jsonl")
    lines = told.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["event"] in {"run_started", "stage_started"}]
    told.write_text("".join(kept))  # as if it had been killed after its last record
    whole = [json.loads(line) for line in lines if json.loads(line)["event"] == "task"]
    assert whole

    assert command("run", desk.toml, "--quiet").code == 0

    again = [e for e in desk.events() if e["event"] == "task" and e["stage"] == "cube"]
    counted = Counter((e["layer"], e["tile"]) for e in again)
    assert set(counted.values()) == {1}
    assert {(e["layer"], e["tile"]) for e in whole} <= set(counted)
    assert command("run", desk.toml, "--quiet").code == 0
    assert sum(e["event"] == "task" and e["stage"] == "cube" for e in desk.events()) == len(again), (
        "told twice"
    )


def test_what_failed_before_is_due_after_all_else(desk):
    made = plan(load_config(desk.toml))
    (failed, ledger), *_, (forgotten, _) = [
        (task, ledger) for task, ledger in tasks_of(made, "cube") if task.layer == made.layers[0].name
    ]
    ledger.write(dataclasses.replace(ledger.read(failed.tile), state="failed", reason="bad data"))
    ledger.forget(forgotten.tile)

    found = due(made, "cube")

    assert [(task.tile, task.suspect) for task in found] == [(forgotten.tile, False), (failed.tile, True)]
