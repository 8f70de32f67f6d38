"""Bad input and bad luck: one clear line, the right exit code, and a workspace that can be resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import rasterio

from slidecube.pipeline.open import open_inventory

SCENES = "archive/sentinel-2-l2a"


@pytest.fixture
def own_archive(small_archive, tmp_path):
    """A copy of the small archive that a test may break."""
    root = tmp_path / "own"
    shutil.copytree(small_archive, root)
    return root


def state(desk) -> dict:
    return json.loads(desk.cli("status", desk.workspace, "--json").out)


def scene_folders(archive, day_from: str):
    """Folders of the scenes from a day on, in order of time."""
    found = sorted((archive / SCENES).glob("*/"), key=lambda p: p.name.split("_")[3])
    return [p for p in found if p.name.split("_")[3][:8] >= day_from]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"epoch": {"pre": ["2001-01-01", "2001-02-01"]}},
            "no pre-event scene between 2001-01-01 and 2001-02-01",
        ),
        ({"epoch": {"post": ["2030-01-01", "2030-02-01"]}}, "no post-event scene between 2030-01-01"),
        ({"area": {"aoi": None, "bbox": [100.0, 10.0, 100.1, 10.1]}}, "no pre-event scene"),
        ({"cube": {"bands": ["B04", "B08", "B10"]}}, "has no band B10"),
        ({"cube": {"bands": ["B04", "B03"]}}, "needs band B08"),
        ({"area": {"crs": "EPSG:4326"}}, "projected CRS in metres"),
        ({"area": {"crs": "EPSG:999999"}}, "is not known"),
        ({"area": {"crs": "EPSG:2193"}}, "name another crs"),
        ({"area": {"aoi": "nowhere.geojson"}}, "nowhere.geojson"),
        ({"sources": {"optical": "earth-serch/sentinel-2-l2a"}}, "earth-search/sentinel-2-l2a"),
        ({"sources": {"dem": "nothing/here.json"}}, "nothing/here.json"),
        ({"detect": {"model": "unet"}}, "models: rdndvi"),
        ({"detect": {"parameters": {"loss": 3.0}}}, "loss_pct"),
        ({"detect": {"threshold": 1.0}}, "0.0001 to 0.9999"),
        ({"detect": {"min_area_m2": 1e9}}, "halo"),
        ({"cube": {"tile": 512}}, "tile_px"),
        ({"cluster": {"profile": "nowhere"}}, "profile"),
        ({"cluster": {"mem_gb": 0.1}}, "exceeds mem_gb=0.1"),
        ({"epoch": {"pre": ["2018-13-01", "2018-09-05"]}}, "2018-13-01"),
    ],
)
def test_one_line_and_exit_1(desk, command, changes, says):
    desk.write(**changes)
    found = command("run", desk.toml)
    assert found.code == 1, found
    assert says in found.refusal
    # and the right input afterwards finds a workspace that works
    good = {
        "area": {"aoi": str(desk.archive / "truth" / "area.geojson"), "bbox": None, "crs": None},
        "epoch": {"pre": ["2018-05-01", "2018-09-05"], "post": ["2018-09-07", "2018-11-15"]},
        "sources": {
            "optical": str(desk.archive / "archive" / "catalog.json"),
            "dem": str(desk.archive / "archive" / "dem" / "collection.json"),
        },
        "cube": {"tile": None, "bands": ["B02", "B03", "B04", "B08"]},
        "detect": {"model": None, "parameters": None, "threshold": None, "min_area_m2": None},
        "cluster": {"profile": "threads", "mem_gb": None},
    }
    desk.write(**good)
    assert command("plan", desk.toml).code == 0


@pytest.mark.parametrize(
    ("fit", "model", "says"),
    [
        ({"strata": "nowhere.gpkg"}, "kmeans", "fit.strata: got 'nowhere.gpkg', which cannot be read"),
        ({"strata": "small.toml"}, "kmeans", "cannot be read"),
        ({"strata_field": "zone"}, "kmeans", "strata_field names an attribute of strata"),
        ({"mnf_components": 5}, "rdndvi", "reads no MNF component; leave mnf_components out"),
        ({"mnf_variance": 1.5}, "kmeans", "above 0, at most 1"),
    ],
)
def test_strata_and_components_that_do_not_serve_are_refused(desk, command, fit, model, says):
    bands = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
    desk.write(fit=fit, detect={"model": model}, cube={"bands": bands})
    refused = command("plan", desk.toml)
    assert refused.code == 1
    assert says in refused.refusal


def test_all_cloud_is_done_with_a_reason(desk_in, own_archive, tmp_path, command):
    for path in (own_archive / SCENES).glob("*/SCL.tif"):
        with rasterio.open(path) as src:
            profile, values = src.profile, src.read(1)
        values[values != 0] = 9
        profile.update(driver="GTiff", interleave="band")
        with rasterio.open(path, "w", **profile) as out:
            out.write(values, 1)
    desk = desk_in(tmp_path / "desk", archive=own_archive, cube={"mask": {"readmit": False}})
    assert command("run", desk.toml, "--quiet").code == 0
    inventory = open_inventory(desk.workspace)
    inside = inventory.observability.values != 1
    assert inside.any()
    assert (inventory.observability.values[inside] == 2).all()
    assert (inventory.reason.values[inside] == 3).all()
    assert not (inventory.landslide.values == 0).any(), "no landslide was claimed where nothing was seen"
    found = json.loads(command("status", desk.workspace, "--json").out)
    assert found["complete"]
    assert found["observability"]["observed"] == 0


def test_a_truncated_asset_costs_its_blocks_within_the_budget_and_the_tile_beyond(
    desk_in, own_archive, tmp_path, command
):
    folders = scene_folders(own_archive, "20180907")
    victim = folders[0] / "B08.tif"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 3])
    desk = desk_in(tmp_path / "desk", archive=own_archive, cube={"max_lost_scenes": 1})
    assert command("run", desk.toml, "--quiet").code == 0
    found = json.loads(command("status", desk.workspace, "--json").out)
    assert {(loss["scene"], loss["asset"]) for loss in found["lost"]} == {(folders[0].name, "B08")}

    strict = desk_in(tmp_path / "strict", archive=own_archive, cube={"max_lost_scenes": 0})
    failed = command("run", strict.toml, "--quiet")
    assert failed.code == 2
    assert "max_lost_scenes=0" in failed.refusal
    assert f"item '{folders[0].name}'" in failed.refusal
    found = json.loads(command("status", strict.workspace, "--json").out)
    assert found["tiles"]["cube"]["failed"] > 0
    assert found["tiles"]["cube"]["done"] > 0, "the other tiles went on"

    # the file is mended: the same command ends what is due
    good = strict.archive / SCENES / folders[0].name / "B08.tif"
    shutil.copy(folders[1] / "B08.tif", good)
    assert command("run", strict.toml, "--quiet").code == 0


def test_without_the_dem_an_image_that_needs_it_is_not_made(desk_in, own_archive, tmp_path, command):
    """A budget of lost scenes is not one of lost heights: without them no shadow would be taken out."""
    (dem,) = own_archive.glob("archive/dem/**/*.tif")
    content = dem.read_bytes()
    dem.write_bytes(content[: len(content) // 50])
    desk = desk_in(
        tmp_path / "desk", archive=own_archive, cube={"max_lost_scenes": 5, "sun": {"correction": "scs+c"}}
    )
    failed = command("run", desk.toml, "--quiet")
    assert failed.code == 2
    tiles = json.loads(command("status", desk.workspace, "--json").out)["tiles"]["cube"]
    assert tiles["done"] == 0, tiles

    dem.write_bytes(content)
    assert command("run", desk.toml, "--quiet").code == 0


@pytest.mark.parametrize(
    ("scenes", "says"),
    [
        (2, "the only scene of this tile cannot be read; first: asset 'B08'"),
        (4, "none of the 2 scenes of this tile can be read; first: asset 'B08'"),
    ],
)
def test_a_tile_of_which_nothing_can_be_read_says_so_and_speaks_of_no_budget(
    desk_in, own_archive, tmp_path, command, scenes, says
):
    after = scene_folders(own_archive, "20180907")[:scenes]
    for folder in after:
        (folder / "B08.tif").write_bytes(b"no TIFF")
    day = after[-1].name.split("_")[3]
    desk = desk_in(
        tmp_path / "desk",
        archive=own_archive,
        cube={"max_lost_scenes": 9},
        epoch={"post": ["2018-09-07", f"{day[:4]}-{day[4:6]}-{day[6:8]}"]},
    )
    failed = command("cube", desk.toml, "--quiet")
    assert failed.code == 2
    assert says in failed.refusal
    assert "max_lost_scenes" not in failed.refusal


def test_a_deleted_asset_is_named(desk_in, own_archive, tmp_path, command):
    folders = scene_folders(own_archive, "20180907")
    (folders[0] / "B04.tif").unlink()
    desk = desk_in(tmp_path / "desk", archive=own_archive, cube={"max_lost_scenes": 0})
    failed = command("run", desk.toml, "--quiet")
    assert failed.code == 2
    assert f"asset 'B04' of item '{folders[0].name}'" in failed.refusal


def test_a_full_disk_stops_the_run_and_room_lets_it_finish(desk, command, small_disk):
    desk.write(output={"workspace": str(small_disk / "ws")})
    full = command("run", desk.toml, "--quiet")
    assert full.code == 2, full
    assert "No space left on device" in full.refusal or "is full" in full.refusal
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    assert command("run", desk.toml, "--quiet").code == 0
    assert not list(small_disk.rglob("*.partial"))
    assert json.loads(command("status", small_disk / "ws", "--json").out)["complete"]


@pytest.mark.parametrize("free_kib", [8, 200, 600])
def test_a_disk_that_fills_up_under_the_products_leaves_no_half_of_one(desk, command, small_disk, free_kib):
    """GDAL and SQLite close what they could not write to its end without a word, or with another reason."""
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    desk.write(
        output={"workspace": str(small_disk / "ws"), "formats": ["parquet", "gpkg", "cog", "stac", "report"]}
    )
    assert command("cube", desk.toml, "--quiet").code == 0
    assert command("detect", desk.toml, "--quiet").code == 0
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - free_kib * 1024))

    full = command("mosaic", desk.toml, "--quiet")

    assert full.code == 2, full
    assert "No space left on device" in full.refusal
    filler.unlink()
    assert command("mosaic", desk.toml, "--quiet").code == 0
    assert not list(small_disk.rglob("*.partial"))
    products = [p for p in (small_disk / "ws" / "products").rglob("*") if p.suffix == ".tif"]
    assert products
    for path in products:
        with rasterio.open(path) as cog:
            cog.read()


def test_a_read_only_workspace(desk, command, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    desk.write(output={"workspace": str(small_disk / "ws")})
    refused = command("run", desk.toml)
    assert refused.code == 1
    assert "Read-only file system" in refused.refusal


def test_a_second_driver_is_refused_and_the_first_unharmed(desk):
    first = desk.start("run", desk.toml, "--quiet")
    lock = desk.workspace / "locks" / "driver.json"
    deadline = time.monotonic() + 60
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)  # alive, and in no hurry
    try:
        second = desk.cli("run", desk.toml)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.code == 1
    assert f"process {first.pid}" in second.refusal
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert state(desk)["complete"]


def test_the_lock_of_a_dead_driver_is_taken_over(desk, command):
    first = desk.start("run", desk.toml, "--quiet")
    lock = desk.workspace / "locks" / "driver.json"
    deadline = time.monotonic() + 60
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert lock.exists()
    assert command("run", desk.toml, "--quiet").code == 0


def test_ctrl_c_can_be_resumed(desk, command):
    process = desk.start("run", desk.toml)
    ledgers = desk.workspace / "layers"
    deadline = time.monotonic() + 60
    while not list(ledgers.rglob("r*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("slidecube: ")] == [
        "slidecube: stopped; run the same command to resume"
    ]
    assert not (desk.workspace / "locks" / "driver.json").exists()
    assert command("run", desk.toml, "--quiet").code == 0


def test_a_damaged_record_is_done_again(desk, command):
    assert command("run", desk.toml, "--quiet").code == 0
    record = next((desk.workspace / "layers").rglob("optical-*.ledger/r*.json"))
    record.write_text(record.read_text()[:40])
    before = json.loads(command("status", desk.workspace, "--json").out)
    assert before["tiles"]["cube"]["due"] == 1
    assert command("run", desk.toml, "--quiet").code == 0
    assert json.loads(command("status", desk.workspace, "--json").out)["complete"]


def test_evaluate_refuses_what_is_no_reference(desk, command, tmp_path):
    assert command("run", desk.toml, "--quiet").code == 0
    assert "no file" in command("evaluate", desk.workspace, tmp_path / "no.parquet").refusal
    (tmp_path / "bad.geojson").write_text("{}")
    assert command("evaluate", desk.workspace, tmp_path / "bad.geojson").code == 1
    found = command("evaluate", desk.workspace, desk.archive / "truth" / "landslides.parquet", "--json")
    assert found.code == 0
    assert np.isfinite(json.loads(found.out)["event"]["pixels"]["recall"])


def test_a_folder_without_a_plan(command, tmp_path):
    for verb in ("status", "report", "clean"):
        found = command(verb, tmp_path)
        assert found.code == 1
        assert "not a workspace" in found.refusal
