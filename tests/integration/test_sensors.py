"""Sensors and overpasses in the quality report: a planted mismatch comes back with its size, and so do edges."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict

import numpy as np
import pytest
import rasterio
import rasterio.warp
import shapely
import zarr

from slidecube.pipeline import load_config, plan, run
from slidecube.pipeline import quality as quality_module
from slidecube.pipeline.quality import _edges, quality_of
from slidecube.pipeline.sensors import gaps_in
from slidecube.pipeline.simulate import simulate_archive
from slidecube.pipeline.summaries import plan_summary
from slidecube.pipeline.tasks import layer_ledger

A, C = "sentinel-1a", "sentinel-1c"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    return simulate_archive(folder, seed=5, size="small", extent_km=2.4, overpasses=3, radar=True)


@pytest.fixture(scope="module")
def radar_in(archive, tmp_path_factory):
    """Copy the radar catalogue, change each scene of the one direction, and return its path."""

    def make(name, change):
        folder = tmp_path_factory.mktemp(name) / "s1"
        shutil.copytree(archive.radar.parent, folder)
        text = (folder / "collection.json").read_text().replace("../catalog.json", "./collection.json")
        (folder / "collection.json").write_text(text)
        scenes = sorted(folder.glob("*DESCENDING*/*.json"), key=sensed)
        for number, path in enumerate(scenes):
            change(number, path)
        return folder / "collection.json"

    return make


def sensed(path):
    return json.loads(path.read_text())["properties"]["datetime"]


def edit(path, **properties):
    item = json.loads(path.read_text())
    item["properties"].update(properties)
    path.write_text(json.dumps(item))


def rewrite(path, change):
    """Change the pixels of a file, its grid and its nodata stay."""
    with rasterio.open(path) as raster:
        profile, values, nodata = raster.profile, raster.read(1), raster.nodata
    profile.update(driver="GTiff")
    path.unlink()
    with rasterio.open(path, "w", **profile) as raster:
        raster.write(change(values, nodata).astype(values.dtype), 1)


def brighten(path, db):
    for file in path.parent.glob("v*.tif"):
        rewrite(file, lambda power, _: np.where(power > 0, power * np.float32(10 ** (db / 10)), power))


@pytest.fixture(scope="module")
def made_in(archive, tmp_path_factory):
    """Make the layers of a run."""

    def make(name, radar, *, cube="tile_px = 512", threads=1):
        path = tmp_path_factory.mktemp(name) / "run.toml"
        path.write_text(
            f'[area]\naoi = "{archive.aoi}"\ncrs = "EPSG:32632"\n'
            '[[epoch]]\nname = "event"\npre = ["2018-06-01", "2018-09-06"]\npost = ["2018-09-08", "2018-11-20"]\n'
            f'[sources]\noptical = "{archive.optical}"\ndem = "{archive.dem}"\nradar = "{radar}"\n'
            f'[cube]\nbands = ["B04", "B08"]\n{cube}\n'
            f'[output]\nworkspace = "ws"\nformats = ["parquet"]\n[cluster]\nthreads_per_worker = {threads}\n'
        )
        found = plan(load_config(path))
        assert not run(found, stages=("cube",), progress=False).reasons
        return found

    return make


def by_block(made, kind="radar"):
    """Every block's differences of the layers before the event."""
    (layer,) = [
        la for la in made.layers if la.kind == kind and la.window == made.config.epochs[0].windows["pre"]
    ]
    found = {}
    for record in layer_ledger(made, layer.name).load().values():
        for gap in gaps_in(record.numbers):
            found[gap.row, gap.col, gap.variable, gap.first, gap.second] = (gap.difference, gap.px)
    return found


def of_two(number, path, db=0.0):
    """The first scene before the event is C's, and so much brighter."""
    if number == 0:
        edit(path, platform="SENTINEL-1C")
        brighten(path, db)


@pytest.fixture(scope="module")
def plain(made_in, radar_in):
    return made_in("plain", radar_in("plain-s1", of_two))


@pytest.fixture(scope="module")
def planted(made_in, radar_in):
    return made_in("planted", radar_in("planted-s1", lambda n, path: of_two(n, path, 0.5)))


def test_half_a_decibel_on_one_satellite_comes_back(plain, planted):
    one, two = by_block(plain), by_block(planted)
    assert {(key[2:]) for key in one} == {("VV", A, C), ("VH", A, C)}
    assert set(one) == set(two)
    for key, (difference, px) in one.items():
        assert two[key] == (pytest.approx(difference + 0.5, abs=0.011), px)
    before, after = (
        {row["variable"]: row for row in quality_of(made).gaps if row["unit"] == "dB"}
        for made in (plain, planted)
    )
    for polarisation in ("VV", "VH"):
        assert after[polarisation]["difference"] - before[polarisation]["difference"] == pytest.approx(
            0.5, abs=0.011
        )
        blocks = [value for key, value in two.items() if key[2] == polarisation]
        assert after[polarisation]["blocks"] == len(blocks)
        assert after[polarisation]["px"] == sum(px for _, px in blocks)
        assert min(d for d, _ in blocks) <= after[polarisation]["difference"] <= max(d for d, _ in blocks)


def test_the_rows_of_tiles_hold_it_and_what_else_radar_saw(planted):
    found = quality_of(planted)
    blocks = defaultdict(list)
    for (row, col, variable, *_), value in by_block(planted).items():
        blocks[f"r{row:03d}c{col:03d}", variable].append(value)
    for row in found.tiles:
        if (of_tile := blocks.get((row["tile"], "VV"))) is not None:
            assert row[f"radar_pre_gap_VV_{A}_{C}"] == of_tile[0][0]
            assert row[f"radar_pre_gap_VV_{A}_{C}_n"] == of_tile[0][1]
    assert f"radar_post_gap_VV_{A}_{C}" not in found.tiles[0], "one satellite took the scene after the event"
    said = json.loads(found.to_json())
    assert any(row["variable"] == "VH" and row["first"] == A for row in said["sensors"])
    assert f"radar_pre_gap_VV_{A}_{C}" in found.to_csv().splitlines()[0]


def test_tiles_and_threads_change_no_difference(plain, made_in, radar_in):
    radar = radar_in("other-s1", of_two)
    large = by_block(made_in("large", radar, cube="tile_px = 1024", threads=2))
    small = by_block(plain)
    assert small.items() <= large.items()
    assert small


def half_of(power, nodata, *, west):
    left = np.arange(power.shape[1]) < power.shape[1] // 2
    return np.where(left == west, power, nodata)


def cut_in_two(number, path):
    """Of the scene after the event the east becomes C's own overpass, 4 dB brighter."""
    if number != 2:
        return
    item = json.loads(path.read_text())
    other = path.parent.with_name(path.parent.name + "-EAST")
    shutil.copytree(path.parent, other)
    with rasterio.open(path.parent / "vv.tif") as file:
        left, bottom, right, top = file.bounds
        middle, crs = left + file.width // 2 * file.res[0], file.crs
    for folder, (x0, x1), sensor in ((path.parent, (left, middle), A), (other, (middle, right), C)):
        for tif in folder.glob("v*.tif"):
            rewrite(tif, lambda power, nodata, west=sensor == A: half_of(power, nodata, west=west))
        outline = rasterio.warp.transform_geom(
            crs, "EPSG:4326", shapely.geometry.mapping(shapely.box(x0, bottom, x1, top))
        )
        document = json.loads((folder / path.name).read_text())
        document |= {"geometry": outline, "bbox": list(shapely.geometry.shape(outline).bounds)}
        if sensor == C:
            document["id"] = item["id"] + "-EAST"
            document["properties"]["s1:datatake_id"] += "-EAST"
            document["properties"]["datetime"] = document["properties"]["datetime"][:17] + "59Z"
        document["properties"]["platform"] = sensor
        (folder / path.name).unlink()
        (folder / f"{document['id']}.json").write_text(json.dumps(document))
    brighten(other / f"{item['id']}-EAST.json", 4)
    collection = path.parent.parent / "collection.json"
    held = json.loads(collection.read_text())
    link = next(link for link in held["links"] if item["id"] in link["href"] and link["rel"] == "item")
    held["links"].append(link | {"href": f"./{other.name}/{item['id']}-EAST.json"})
    collection.write_text(json.dumps(held))


def test_half_a_swath_of_another_sensor_is_an_edge_of_its_overpass_and_of_its_sensor(made_in, radar_in):
    made = made_in("halves", radar_in("halves-s1", cut_in_two))
    post = next(
        la for la in made.layers
        if la.kind == "radar" and la.window == made.config.epochs[0].windows["post"]
    )  # fmt: skip
    edges = [edge for edge in _edges(made) if edge.layer == post.name]
    found = {kind: [edge for edge in edges if edge.kind == kind] for kind in ("overpass", "sensor")}
    for kind, of_kind in found.items():
        seams = [edge for edge in of_kind if edge.seam]
        assert seams, (kind, [edge.row() for edge in of_kind])
        for edge in seams:
            east_first = edge.first == C or edge.first.endswith("-EAST")
            assert edge.measured.step == pytest.approx(-4 if east_first else 4, abs=1.2)
            assert east_first or edge.second == C or edge.second.endswith("-EAST")
    (row,) = (row for row in quality_of(made).sensors() if row["layer"] == post.name)
    assert (row["first"], row["second"], row["variable"]) == (A, C, "VV")
    assert row["step"] == pytest.approx(4, abs=1.2)
    assert row["seams"] > 0


@pytest.mark.slow
def test_blocks_within_a_tile_are_audited_where_something_is_made_block_by_block(made_in, archive):
    none = made_in("blocks-off", archive.radar, cube="tile_px = 1024")
    assert not [edge for edge in _edges(none) if edge.kind == "block"]
    on = 'tile_px = 1024\n[cube.radar]\nspeckle_window_px = 5\n[cube.sun]\ncorrection = "c"'
    made = made_in("blocks", archive.radar, cube=on)
    layers = {edge.layer.partition("-")[0] for edge in _edges(made) if edge.kind == "block"}
    assert layers == {"radar", "optical"}

    blocks = [edge for edge in _edges(made) if edge.kind == "block" and edge.layer.startswith("optical")]
    first = blocks[0]
    before = {(e.first, e.second) for e in blocks if e.layer == first.layer and e.seam}
    row, col = (int(n) for n in first.first.split()[1:])
    band = zarr.open_group(str(made.workspace.layer(made.grid, first.layer)), mode="r+")["B08"]
    at = (slice(row * 512, row * 512 + 512), slice(col * 512, col * 512 + 512))
    band[at] = np.where(band[at] == 0, 0, band[at] + 500).astype(np.uint16)
    after = [e for e in _edges(made) if e.kind == "block" and e.layer == first.layer]
    assert {e.seam for e in after if first.first in (e.first, e.second)} == {True}
    for edge in after:
        if edge.first == first.first:
            assert edge.measured.step < -0.03
    others = {(e.first, e.second) for e in after if e.seam and first.first not in (e.first, e.second)}
    assert others == {pair for pair in before if first.first not in pair}


def test_blocks_that_are_moved_are_audited_as_they_are_read(made_in, archive, monkeypatch):
    cube = "tile_px = 1024\n[cube.coregistration]\ncorrect = true"
    made = made_in("moved", archive.radar, cube=cube)
    edges = [edge for edge in _edges(made) if edge.kind == "block"]
    assert edges
    assert {edge.layer for edge in edges} == {made.epochs[0].pre}, "of two images the one before is moved"
    read = quality_module.read_layers

    def shifted(plan, epoch, window, **how):
        layers = read(plan, epoch, window, **how)
        moved = layers.pre["B08"].values
        moved[:, 512:][moved[:, 512:] > 0] += 500  # as if the second block came from brighter ground
        return layers

    monkeypatch.setattr(quality_module, "read_layers", shifted)
    planted = {(e.first, e.second): e.measured.step for e in _edges(made) if e.kind == "block"}
    for edge in edges:
        beside = edge.first.split()[1] == edge.second.split()[1]
        grown = planted[edge.first, edge.second] - edge.measured.step
        assert grown == pytest.approx(0.05 if beside else 0, abs=1e-6)


def test_what_was_not_looked_for_is_said(plain, made_in, archive):
    text = plan_summary(plain, newest="none")
    assert "not sought  cast shadow: [cube.sun] cast_shadow = false" in text
    assert "not sought  river corridor: [ground] river_corridor_m is not set" in text
    assert len(quality_of(plain).omissions) == 2


def test_two_hundredths_of_reflectance_on_one_satellite_come_back(small_archive, desk_in, tmp_path):
    copied = tmp_path / "archive"
    shutil.copytree(small_archive, copied)
    changed = 0
    for path in sorted((copied / "archive").rglob("*.json")):
        item = json.loads(path.read_text())
        if item.get("properties", {}).get("platform") != "sentinel-2b":
            continue
        rewrite(path.parent / "B08.tif", lambda dn, _: np.where(dn > 0, dn + 200, 0))
        changed += 1
    assert changed
    rows = []
    for name, source in (("plain", small_archive), ("planted", copied)):
        made = plan(load_config(desk_in(tmp_path / name, archive=source).toml))
        run(made, stages=("cube",), progress=False)
        rows.append({row["layer"]: row for row in quality_of(made).gaps})
    assert rows[0]
    assert rows[0].keys() == rows[1].keys()
    for layer, row in rows[0].items():
        assert (row["variable"], row["first"], row["second"]) == ("B08", "sentinel-2a", "sentinel-2b")
        assert rows[1][layer]["difference"] - row["difference"] == pytest.approx(0.02, abs=0.002)
        assert rows[1][layer]["px"] == pytest.approx(row["px"], rel=0.05)
