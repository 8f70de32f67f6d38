"""The simulated archive: hard, fair, consistent with the offset rule, and the same again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.search import search
from slidecube.catalog.sources import find_source, offset_of
from slidecube.pipeline import simulate
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.simulate import BASELINES, load_parameters, report, score, simulate_archive
from slidecube.pipeline.simulate.archive import build_world
from slidecube.pipeline.simulate.baselines import markdown, of_mask, truth_mask
from slidecube.pipeline.simulate.scene import Sky, classify
from slidecube.pipeline.simulate.terrain import slope_deg

P = load_parameters()
PARAMETERS = Path(simulate.__file__).with_name("parameters.toml")
BANDS_M = {
    **dict.fromkeys(("B02", "B03", "B04", "B08"), 10),
    **dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12", "SCL"), 20),
    **dict.fromkeys(("B01", "B09"), 60),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(tmp_path_factory.mktemp("simulated"), size="small")


@pytest.fixture(scope="module")
def items(archive):
    return [
        json.loads(p.read_text()) | {"_at": p.parent} for p in sorted(archive.optical.parent.glob("*/*.json"))
    ]


@pytest.fixture(scope="module")
def world():
    """The default scene's ground; no scene is rendered."""
    return build_world(P, 0, P.area.sizes["default"])


def read(item, band):
    with rasterio.open(item["_at"] / item["assets"][band]["href"]) as file:
        return file.read(1), file.profile


# --- truth ---------------------------------------------------------------------------------------------------------


def test_shares_inside_and_outside_the_core(world):
    land_m2 = (world.landscape.terrain.scene_dem_m > 0).sum() * 100
    core = world.changes.event_core
    slides = [c for c in world.changes.changes if c.kind == "landslide"]
    inside = sum(c.outline.area for c in slides if c.group == "event")
    outside = sum(c.outline.area for c in slides if c.group == "background")
    assert inside / core.area == pytest.approx(0.05, abs=0.01)
    assert 1e-4 <= outside / (land_m2 - core.area) <= 1e-3
    assert min(c.outline.area for c in slides) < 100  # truth reaches below the pixel


def test_sources_are_steep_and_landslides_go_down(world):
    slides = [c for c in world.changes.changes if c.kind == "landslide"]
    assert min(c.source_slope_deg for c in slides) >= P.landslides.source_slope_min_deg
    assert np.mean([c.drop_m > 0 for c in slides]) > 0.97
    surfaces = {c.surface for c in slides}
    assert {"forest", "grass", "bare"} <= surfaces


def test_landslides_do_not_overlap(world):
    shapes = [c.outline for c in world.changes.changes if c.kind == "landslide"]
    union = shapely.union_all(shapes)
    assert union.area == pytest.approx(sum(s.area for s in shapes), rel=1e-9)


def test_confusers_outnumber_the_slides(world):
    kinds = [c.kind for c in world.changes.changes]
    slides = kinds.count("landslide")
    others = [k for k in kinds if k not in ("landslide", "old_scar")]
    assert len(others) > 1.2 * slides
    assert set(others) == {"harvest", "clear_cut", "river_bank", "road", "burn", "quarry"}
    area = {k: sum(c.outline.area for c in world.changes.changes if c.kind == k) for k in set(kinds)}
    assert sum(area[k] for k in set(others)) > area["landslide"]
    assert kinds.count("old_scar") > 0


def test_truth_table_is_exact(archive):
    table = gpd.read_parquet(archive.landslides)
    assert table.crs.to_epsg() == 32632
    assert np.allclose(table["area_m2"], table.area, rtol=1e-12)
    # UTM is 6e-4 larger here, 2.4 degrees off its meridian
    assert np.allclose(table["area_geodesic_m2"], table["area_m2"], rtol=2e-3)
    assert table.geometry.is_valid.all()
    assert set(table["kind"]) <= {"event", "background"}
    assert set(table["event_date"]) == {P.season.event.isoformat()}
    assert len(gpd.read_parquet(archive.confusers)) > len(table)


def test_the_detectors_dem_is_not_the_true_one(archive):
    with rasterio.open(archive.oracle) as file:
        true, box = file.read(4), file.transform
    name = next(archive.dem.parent.glob("*/DEM.tif"))
    with rasterio.open(name) as file:
        given = file.read(1)
        assert file.crs.to_epsg() == 4326
        assert file.res[0] == pytest.approx(1 / 3600)
        x, y = rasterio.warp.transform("EPSG:32632", "EPSG:4326", [box.c + 1800], [box.f - 1800])
        at = file.index(x[0], y[0])
    inner = given[20:-20, 20:-20]
    assert abs(given[at] - true[180, 180]) < 40
    assert 1 < inner.mean() - 0 > true.min()
    rough_given = np.std(np.diff(inner, 2, axis=0)) / 30
    rough_true = np.std(np.diff(true[::3, ::3], 2, axis=0)) / 30
    assert rough_given < rough_true


# --- catalogue -----------------------------------------------------------------------------------------------------


def test_items_hold_all_bands_at_their_own_size(items):
    assert len(items) == 2 * sum(len(o.baselines) for o in P.overpass)
    for item in items:
        assert set(item["assets"]) == set(BANDS_M)
        for band, metres in BANDS_M.items():
            asset = item["assets"][band]
            assert asset["href"].startswith("./")
            assert asset["proj:transform"][0] == metres
            with rasterio.open(item["_at"] / asset["href"]) as file:
                assert list(file.shape) == asset["proj:shape"]
                assert list(file.transform)[:6] == asset["proj:transform"]
                assert file.crs.to_epsg() == 32632
                assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
                assert file.dtypes[0] == ("uint8" if band == "SCL" else "uint16")
                assert file.nodata == 0
                assert file.tags()["SIMULATED"] == "YES"


def test_items_say_that_they_are_simulated(items):
    for item in items:
        assert "SIMULATED" in item["id"]
        assert "SIMULATED" in item["properties"]["title"]
        assert item["properties"]["slidecube:simulated"] is True


def test_offsets_are_decided_right_from_both_sides(items):
    seen = set()
    for item in items:
        baseline = float(item["properties"]["s2:processing_baseline"])
        offset = offset_of({k: v for k, v in item.items() if k != "_at"})
        assert offset.value == (-0.1 if baseline >= 4 else 0.0)
        seen.add((baseline >= 4, item["properties"]["datetime"] > "2018-09-07"))
        dn, _ = read(item, "B04")
        clear = dn[(dn > 0)].astype(float) * 1e-4 + offset.value
        assert 0.005 < np.quantile(clear, 0.05) < 0.2
    assert len(seen) == 4  # both sorts before and after the event


def test_both_spellings_of_the_projection_occur(items):
    keys = {key for item in items for key in ("proj:epsg", "proj:code") if key in item["properties"]}
    assert keys == {"proj:epsg", "proj:code"}
    assert {item["stac_version"] for item in items} == {"1.0.0", "1.1.0"}


def test_one_acquisition_was_processed_twice_and_is_searched_once(archive, items):
    outline = gpd.read_file(archive.aoi).geometry.iloc[0]
    found = search(find_source(str(archive.optical)), Aoi(name="all", geometry=outline), None)
    assert len(found) == 2 * len(P.overpass)
    assert len(items) - len(found) == 2
    twice = {s.id for s in found if "20180718" in s.id}
    assert all(name.endswith("N0500") for name in twice)
    takes = {s.datatake for s in found}
    assert len(takes) == len(P.overpass)  # neighbours share a datatake


def test_neighbours_agree_where_they_overlap(items):
    west, east = (next(i for i in items if t in i["id"] and "20180802" in i["id"]) for t in ("NKF", "NLF"))
    a, pa = read(west, "B08")
    b, pb = read(east, "B08")
    shift = round((pb["transform"].c - pa["transform"].c) / 10)
    assert 0 < shift < a.shape[1]
    left, right = a[:, shift:].astype(int), b[:, : a.shape[1] - shift].astype(int)
    assert left.size > 0.03 * a.size
    assert np.abs(left - right).max() < 60  # only the aerosol of a tile differs
    assert np.std(left - right) < 1


def test_the_swath_ends_in_one_overpass(items):
    for item in items:
        dn, _ = read(item, "B04")
        scl, _ = read(item, "SCL")
        cut = "20180817" in item["id"]
        assert cut or (dn > 0).all()
        assert cut or (scl > 0).all()
        if cut and "NLF" in item["id"]:
            assert 0.2 < (dn == 0).mean() < 0.8
            assert (scl == 0).mean() == pytest.approx((dn == 0).mean(), abs=0.01)


def test_clear_counts_differ_before_and_after(items):
    counts = {True: 0, False: 0}
    for item in items:
        if "NKF" in item["id"]:
            scl, _ = read(item, "SCL")
            after = item["properties"]["datetime"] > P.season.event.isoformat()
            counts[after] = counts[after] + np.isin(scl, (4, 5, 7))
    assert counts[False].mean() > counts[True].mean() + 0.5
    assert (counts[True] == 0).any()


def test_catalogue_is_static_and_relative(archive):
    for path in archive.catalog.parent.rglob("*.json"):
        document = json.loads(path.read_text())
        for link in document["links"]:
            assert (path.parent / link["href"]).resolve().exists(), (path, link)
    found = search(
        find_source(str(archive.dem), kind="dem"),
        Aoi(name="all", geometry=gpd.read_file(archive.aoi).geometry.iloc[0]),
        None,
        role="dem",
    )
    assert [s.bands for s in found] == [{"elevation": "data"}]


# --- honesty -------------------------------------------------------------------------------------------------------


def sky(shape, **layers):
    zero = np.zeros(shape, np.float32)
    return Sky(**{name: zero + layers.get(name, 0) for name in ("opacity", "veil", "shade")})


def reflectance(shape, red, nir):
    return {b: np.full(shape, v, np.float32) for b, v in (("B03", red), ("B04", red), ("B08", nir))}


def classes(red, nir, **layers):
    scl = classify(P, P.overpass[0], reflectance((400, 400), red, nir), sky=sky((400, 400), **layers), seed=0)
    return np.bincount(scl.ravel(), minlength=12) / scl.size


def test_thin_cloud_is_missed():
    assert classes(0.03, 0.3, veil=0.06)[4] > 0.9
    assert classes(0.03, 0.3, veil=0.23)[10] > 0.7
    assert classes(0.03, 0.3, opacity=0.9)[9] == 1


def test_bright_fresh_soil_is_called_cloud():
    assert classes(0.165, 0.2)[8] == pytest.approx(0.5, abs=0.1)
    assert classes(0.21, 0.25)[8] > 0.95
    assert classes(0.11, 0.16)[8] < 0.01


def test_a_part_of_the_shadow_is_not_found():
    assert classes(0.03, 0.3, shade=0.8)[3] == pytest.approx(P.scl.shadow_found, abs=0.02)


def test_oracle_and_slope_bound_the_test(tmp_path):
    """The oracle finds nearly all, slope alone nearly nothing: the test is neither impossible nor a gift."""
    archive = simulate_archive(tmp_path, overpasses=0)
    got = {name: score(archive, detector(archive)) for name, detector in BASELINES.items()}
    assert got["oracle"].pixels.f1 >= 0.95
    assert got["slope-only"].pixels.f1 <= 0.2
    assert got["slope-only"].objects.f1 <= 0.2
    assert got["all-negative"].pixels.f1 == 0
    # no NDVI threshold, even without noise, cloud and shadow, is good: the confusers see to that
    assert got["slope-only"].pixels.f1 < got["oracle-ndvi"].pixels.f1 < 0.75
    assert json.loads(archive.catalog.read_text())["links"][1]["href"] == "./dem/collection.json"


def test_report_takes_further_detectors():
    def perfect(archive):
        return of_mask(archive, truth_mask(archive))

    def blind(archive):
        seen = np.zeros(archive.geobox.shape, bool)
        seen[: seen.shape[0] // 2] = True
        return BASELINES["all-negative"](archive).__class__(
            objects=of_mask(archive, truth_mask(archive)).objects, observed=seen
        )

    table = report({"perfect": perfect, "half": blind}, seeds=[7], size="small", extent_km=2.4)
    scores = table.set_index("detector")
    assert scores.loc["perfect", "pixel_f1"] == 1
    assert scores.loc["half", "pixel_f1"] == 1
    assert set(BASELINES) < set(scores.index)
    assert "| perfect | 1 (1 to 1)" in markdown(table)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_same_seed_same_bytes_other_seed_other_world(tmp_path):
    runs = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        simulate_archive(tmp_path / name, seed=seed, size="small", extent_km=1.8, overpasses=2)
        runs[name] = digest(tmp_path / name)
    assert runs["a"] == runs["b"]
    assert runs["a"]["truth/landslides.parquet"] != runs["c"]["truth/landslides.parquet"]
    assert len(runs["a"]) > 50


def test_a_scar_darkens_the_index_of_its_own_pixels(archive):
    with rasterio.open(archive.oracle) as file:
        share, before, after, dem = file.read()
    full = share > 0.9
    assert full.any()
    assert (before - after)[full].mean() > 0.2
    assert slope_deg(dem, 10)[full].mean() > 20
    untouched = share < 0.01
    assert np.median(np.abs(before - after)[untouched]) < 0.02


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"size": "huge"}, "Unknown size 'huge'"),
        ({"extent_km": 0.5}, "extent_km=0.5"),
        ({"size": "small", "overpasses": 1}, "overpasses=1"),
    ],
)
def test_wrong_arguments_get_one_line(tmp_path, arguments, what):
    with pytest.raises(PipelineError, match=what):
        simulate_archive(tmp_path, **arguments)


def test_unknown_and_missing_parameters_are_named(tmp_path):
    text = PARAMETERS.read_text()
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(text.replace("speckle_sd ", "speckel_sd "))
    with pytest.raises(PipelineError, match=r"spectra\.speck"):
        load_parameters(wrong)
    with pytest.raises(PipelineError, match="Cannot read"):
        load_parameters(tmp_path / "none.toml")


def test_every_parameter_has_its_source_in_the_toml():
    """The schedule and the named sizes are covered by the comment above them; every other value has its own."""
    section, bare = "", []
    for line in PARAMETERS.read_text().splitlines():
        section = line if line.startswith("[") else section
        covered = section.startswith(("[[overpass", "[area.sizes", "[items"))
        if "=" in line and "#" not in line and not covered:
            bare.append(line)
    assert bare == []
