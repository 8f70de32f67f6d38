"""What is due after something changed: never too little, and never a scene too much."""

from __future__ import annotations

import json
import shutil

import pytest
import shapely
from shapely.geometry import mapping, shape

from slidecube.pipeline.open import open_inventory, open_plan

SCENES = "archive/sentinel-2-l2a"


def status(command, desk) -> dict:
    return json.loads(command("status", desk.workspace, "--json").out)


@pytest.fixture
def own_archive(small_archive, tmp_path):
    """A copy of the small archive that a test may change."""
    root = tmp_path / "own"
    shutil.copytree(small_archive, root)
    return root


def tasks(desk, before: list[dict]) -> list[dict]:
    """Tasks that were told since; each run has its own file of events, so their order says nothing."""
    return [e for e in desk.events() if e["event"] == "task" and e not in before]


def test_a_second_run_does_nothing(desk, command):
    assert command("run", desk.toml, "--quiet").code == 0
    first, seen = status(command, desk), desk.events()
    assert command("run", desk.toml, "--quiet").code == 0
    assert status(command, desk)["scene_reads"] == first["scene_reads"] > 0
    assert tasks(desk, seen) == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"cube": {"composite": "median"}}, id="composite", marks=pytest.mark.slow),
        pytest.param({"cube": {"mask": {"dilation_px": 1}}}, id="dilation", marks=pytest.mark.slow),
        pytest.param(
            {"cube": {"mask": {"scl_classes": [0, 1, 3, 9, 10, 11]}}}, id="classes", marks=pytest.mark.slow
        ),
        pytest.param(
            {"cube": {"bands": ["B02", "B03", "B04", "B08", "B11"]}}, id="bands", marks=pytest.mark.slow
        ),
        pytest.param({"epoch": {"post": ["2018-09-07", "2018-10-20"]}}, id="window"),
        pytest.param({"cube": {"max_cloud_pct": 40.0}}, id="clouds", marks=pytest.mark.slow),
    ],
)
def test_a_changed_toml_never_counts_old_work_as_done(desk_in, tmp_path, command, change):
    desk = desk_in(tmp_path / "desk")
    assert command("run", desk.toml, "--quiet").code == 0
    desk.write(**change)
    assert command("plan", desk.toml).code == 0
    before = status(command, desk)
    assert before["tiles"]["cube"]["due"] > 0
    assert command("run", desk.toml, "--quiet").code == 0
    fresh = desk_in(tmp_path / "fresh", **change)
    assert command("run", fresh.toml, "--quiet").code == 0
    one, two = open_inventory(desk.workspace), open_inventory(fresh.workspace)
    for name in ("probability", "landslide", "observability", "reason"):
        assert one[name].equals(two[name]), name


@pytest.mark.parametrize(
    "change", [{"threshold": 0.7}, {"parameters": {"loss_pct": 35.0}}, {"min_area_m2": 3000.0}]
)
def test_a_changed_model_reads_no_scene(desk_in, own_archive, tmp_path, command, change):
    desk = desk_in(tmp_path / "desk", archive=own_archive)
    assert command("run", desk.toml, "--quiet").code == 0
    before = status(command, desk)
    for path in (own_archive / SCENES).glob("*/*.tif"):
        path.unlink()  # there is nothing left to read
    desk.write(detect=change)
    assert command("run", desk.toml, "--quiet").code == 0
    after = status(command, desk)
    assert after["complete"]
    assert after["scene_reads"] == before["scene_reads"]
    assert after["inventory"] != before["inventory"]


def test_one_scene_added_is_read_on_its_tiles_and_no_scene_before_the_event(
    desk_in, own_archive, tmp_path, command
):
    desk = desk_in(tmp_path / "desk", archive=own_archive)
    assert command("run", desk.toml, "--quiet").code == 0
    plan, before, seen = open_plan(desk.workspace), status(command, desk), desk.events()
    post = plan.scenes_of(plan.epochs[0].post, plan.tiles[0].key)[-1]

    # a new acquisition of the same ground over one tile alone, ten days later
    source = own_archive / SCENES / post.id
    item = json.loads((source / f"{post.id}.json").read_text())
    name = post.id.replace(post.datetime.strftime("%Y%m%d"), "20181108")
    old, new = post.datetime.strftime("%Y-%m-%d"), "2018-11-08"
    text = json.dumps(item).replace(post.id, name).replace(old, new)
    item = json.loads(text.replace(post.datetime.strftime("%Y%m%d"), "20181108"))
    tile = plan.tiles[0]
    inner = tile.geobox.extent.to_crs("EPSG:4326").geom.buffer(-0.0005)
    outline = shapely.intersection(shape(item["geometry"]), inner)
    assert not outline.is_empty
    item["geometry"], item["bbox"] = mapping(outline), list(outline.bounds)
    shutil.copytree(source, own_archive / SCENES / name)
    (own_archive / SCENES / name / f"{post.id}.json").unlink()
    (own_archive / SCENES / name / f"{name}.json").write_text(json.dumps(item))
    collection = own_archive / SCENES / "collection.json"
    document = json.loads(collection.read_text())
    document["links"].append({"rel": "item", "href": f"./{name}/{name}.json", "type": "application/geo+json"})
    collection.write_text(json.dumps(document))

    assert command("run", desk.toml, "--quiet").code == 0
    assert status(command, desk)["scene_reads"] == before["scene_reads"], (
        "an unchanged TOML is not searched again"
    )
    assert command("run", desk.toml, "--refresh", "--quiet").code == 0
    done = tasks(desk, seen)
    cubes = [e for e in done if e["stage"] == "cube"]
    assert [(e["layer"], e["tile"]) for e in cubes] == [(plan.epochs[0].post, tile.key)]
    assert status(command, desk)["scene_reads"] - before["scene_reads"] == cubes[0]["scene_reads"]
    fresh = open_plan(desk.workspace)
    read = {scene.id for scene in fresh.scenes_of(fresh.epochs[0].post, tile.key)}
    assert name in read
    # detection reads 3 x 3 tiles: all of this small grid is judged anew, and nothing else happens
    assert {e["tile"] for e in done if e["stage"] == "detect"} == {t.key for t in plan.tiles}


def test_a_grown_area_keeps_its_cubes(desk_in, tmp_path, command, small_archive):
    whole = json.loads((small_archive / "truth" / "area.geojson").read_text())
    west, south, east, north = shape(whole["features"][0]["geometry"]).bounds
    part = tmp_path / "part.geojson"
    box = shapely.box(west, south, west + (east - west) * 0.4, south + (north - south) * 0.4)
    part.write_text(json.dumps({"type": "Feature", "properties": {}, "geometry": mapping(box)}))
    desk = desk_in(tmp_path / "desk", area={"aoi": str(part)})
    assert command("run", desk.toml, "--quiet").code == 0
    small = open_plan(desk.workspace)
    seen = desk.events()
    desk.write(area={"aoi": str(small_archive / "truth" / "area.geojson")})
    assert command("run", desk.toml, "--quiet").code == 0
    grown = open_plan(desk.workspace)
    kept = {tile.key for tile in small.tiles}
    assert kept < {tile.key for tile in grown.tiles}
    assert not [e for e in tasks(desk, seen) if e["stage"] == "cube" and e["tile"] in kept]
    assert status(command, desk)["complete"]


def test_clean_removes_what_is_superseded_and_nothing_else(desk, command):
    assert command("run", desk.toml, "--quiet").code == 0
    old = open_plan(desk.workspace)
    desk.write(cube={"composite": "median"})
    assert command("run", desk.toml, "--quiet").code == 0
    new = open_plan(desk.workspace)
    before = {str(p) for p in desk.workspace.rglob("*")}
    assert command("clean", desk.workspace, "--dry-run").code == 0
    assert {str(p) for p in desk.workspace.rglob("*") if "locks" not in str(p)} >= {
        p for p in before if "locks" not in p
    }
    assert command("clean", desk.workspace).code == 0
    assert not desk.workspace.joinpath("inventories", f"{old.inventory}.zarr").exists()
    assert not old.workspace.layer(old.grid, old.epochs[0].pre).exists()
    assert new.workspace.layer(new.grid, new.epochs[0].terrain).exists(), "the terrain serves both"
    found = status(command, desk)
    assert found["complete"]
    reads = found["scene_reads"]
    assert command("run", desk.toml, "--quiet").code == 0
    assert status(command, desk)["scene_reads"] == reads
