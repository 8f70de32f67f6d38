"""The simulated Sentinel-1: beside the optical archive, labelled, and with the physics that it claims."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import rasterio

from slidecube.catalog.aoi import read_aoi
from slidecube.catalog.errors import CatalogError
from slidecube.catalog.radar import acquisition_of
from slidecube.catalog.search import search
from slidecube.catalog.sources import find_source
from slidecube.pipeline.config import load_config
from slidecube.pipeline.demo import write_toml
from slidecube.pipeline.plan import plan
from slidecube.pipeline.radar import decibels
from slidecube.pipeline.radar_geometry import INCIDENCE_RANGE_DEG
from slidecube.pipeline.simulate import load_parameters, simulate_archive
from slidecube.pipeline.simulate.archive import build_world, scar_share
from slidecube.pipeline.simulate.parameters import Size
from slidecube.pipeline.simulate.radar import RadarPass, backscatter, look, passes, scene_geometry, speckle

P = load_parameters()


@pytest.fixture(scope="module")
def world():
    return build_world(P, 4, Size(centre_m=P.area.sizes["small"].centre_m, extent_m=2400.0))


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    root = tmp_path_factory.mktemp("radar")
    return [
        simulate_archive(root / name, seed=2, size="small", extent_km=1.8, overpasses=2, radar=radar)
        for name, radar in (("without", False), ("with", True))
    ]


def files(root):
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.*")
    }


def test_radar_changes_no_byte_of_the_rest(archives):
    without, whole = (files(archive.root) for archive in archives)
    beside = {name: digest for name, digest in whole.items() if "sentinel-1-rtc" not in name}

    assert set(beside) == set(without)
    assert {name for name in beside if beside[name] != without[name]} == {"archive/catalog.json"}
    assert len(whole) > len(beside)


def test_items_are_found_say_how_they_were_taken_and_that_they_are_simulated(archives):
    archive = archives[1]
    scenes = search(find_source(str(archive.radar), kind="radar"), read_aoi(archive.aoi), None, role="radar")

    said = [acquisition_of(scene) for scene in scenes]
    assert {(one.orbit_state, one.relative_orbit) for one in said} == {
        ("ascending", 103),
        ("descending", 124),
    }
    assert {(one.quantity, one.polarisations) for one in said} == {("gamma0", ("VH", "VV"))}
    assert len({scene.identity for scene in scenes}) == len(scenes) == 4
    for scene in scenes:
        assert "SIMULATED" in scene.id
        assert scene.item["properties"]["slidecube:simulated"] is True
        with rasterio.open(scene.item["assets"]["vv"]["href"]) as file:
            assert file.tags()["SIMULATED"] == "YES"
            assert (file.dtypes, file.nodata) == (("float32",), -32768.0)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_radar(tmp_path, archives):
    again = simulate_archive(tmp_path, seed=2, size="small", extent_km=1.8, overpasses=2, radar=True)
    assert files(again.root) == files(archives[1].root)


def test_overpasses_lie_in_the_windows_and_on_the_raster_of_the_orbit():
    found = passes(P)
    for state in ("ascending", "descending"):
        days = [one.day for one in found if one.orbit_state == state]
        assert {(day - days[0]).days % 12 for day in days} == {0}
        for start, end in (P.season.pre, P.season.post):
            assert sum(start <= day <= end for day in days) >= 5
    assert sum(one.zero_filled for one in found) == 4
    assert not any(P.season.pre[1] < one.day < P.season.post[0] for one in found)


def test_speckle_has_the_looks_of_real_products_and_mean_one():
    drawn = speckle(P.radar, (600, 600), np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(1, abs=0.01)
    assert drawn.mean() ** 2 / drawn.var() == pytest.approx(4.4, rel=0.08)
    assert drawn.min() > 0


def test_geometry_differs_by_direction_and_shadow_is_dark(world):
    one, two = (scene_geometry(P, world.landscape.terrain, s) for s in ("ascending", "descending"))
    for geometry in (one, two):
        assert INCIDENCE_RANGE_DEG[0] < float(geometry.incidence_deg.mean()) < INCIDENCE_RANGE_DEG[1]
        assert 0 < geometry.layover.mean() < 0.35
    # what faces one direction turns its back on the other
    assert np.corrcoef(one.slopes.range_deg.ravel(), two.slopes.range_deg.ravel())[0, 1] < -0.8
    steep = RadarPass(day=P.season.pre[0], orbit_state="ascending")
    ((_, clean), _) = backscatter(P, world.landscape, world.changes, steep, seed=4)
    seen = look(P, clean, one, steep, seed=4, band="vv")
    if one.shadow.sum() > 50:
        assert np.median(decibels(seen[one.shadow])) < np.median(decibels(seen[~one.shadow])) - 8


def test_slides_take_volume_scattering_away_and_vv_either_way(world):
    share = scar_share(world)
    one, two = (
        dict(
            backscatter(P, world.landscape, world.changes, RadarPass(day=d, orbit_state="ascending"), seed=4)
        )
        for d in (P.season.pre[1], P.season.post[0])
    )
    scar, far = share > 0.8, share < 0.01
    forest = np.isin(world.landscape.cover10, [1, 2]) & scar
    assert forest.sum() > 20
    change = {band: decibels(two[band]) - decibels(one[band]) for band in ("vv", "vh")}
    assert np.median(change["vh"][forest]) < -1.5
    assert np.median(change["vh"][forest]) < np.median(change["vv"][forest])
    assert abs(np.median(change["vv"][far])) < 0.1


def test_zero_filled_parts_are_zero_and_the_rest_is_not(world):
    geometry = scene_geometry(P, world.landscape.terrain, "descending")
    one = RadarPass(day=P.season.post[1], orbit_state="descending", zero_filled=True)
    seen = look(P, np.full(world.landscape.cover10.shape, 0.1, np.float32), geometry, one, seed=4, band="vv")
    edge = round(P.radar.zero_filled * seen.shape[1])
    assert (seen[:, :edge] == 0).all()
    assert (seen[:, edge:] > 0).all()


def test_the_root_catalogue_links_the_radar(archives):
    links = json.loads(archives[1].catalog.read_text())["links"]
    assert "./sentinel-1-rtc/collection.json" in [link["href"] for link in links]


@pytest.mark.parametrize(
    ("role", "given", "said", "instead"),
    [
        ("optical", "catalog", "are of Sentinel-1, and optical takes Sentinel-2", "optical"),
        ("optical", "radar", "are of Sentinel-1, and optical takes Sentinel-2", "optical"),
        ("radar", "optical", "are of Sentinel-2, and radar takes Sentinel-1", "radar"),
    ],
)
def test_items_of_the_other_sentinel_are_told_with_the_collection_to_name_instead(
    archives, role, given, said, instead
):
    archive = archives[1]
    source = find_source(str(getattr(archive, given)), kind=role)

    with pytest.raises(CatalogError) as caught:
        search(source, read_aoi(archive.aoi), None, role=role)

    assert said in str(caught.value)
    assert str(caught.value).endswith(f"; name {str(getattr(archive, instead))!r} as {role}")


def test_without_the_wanted_collection_beside_it_a_catalogue_of_it_is_asked_for(archives, tmp_path):
    shutil.copytree(archives[1].radar.parent, tmp_path / "alone")

    with pytest.raises(CatalogError, match=r"; name a catalogue of Sentinel-2 as optical$"):
        search(str(tmp_path / "alone" / "collection.json"), read_aoi(archives[1].aoi), None)


def test_the_toml_of_an_archive_plans_with_radar_and_without_and_is_never_overwritten(archives):
    without, beside = (load_config(write_toml(archive)) for archive in archives)

    assert without.sources.radar is None
    assert {scene.role for scene in plan(without).scenes.scenes} == {"optical", "dem"}
    assert {scene.role for scene in plan(beside).scenes.scenes} == {"optical", "dem", "radar"}
    beside.path.write_text("mine")
    assert write_toml(archives[1]).read_text() == "mine"
