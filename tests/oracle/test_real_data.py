"""What docs/real-data.md says is what the code gives on the real fixtures, and the document is made of its numbers."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import rioxarray
import scipy.linalg

from slidecube.catalog.scenes import Window
from slidecube.pipeline.composite import Compositing
from slidecube.pipeline.config import load_config
from slidecube.pipeline.indices import relative_difference
from slidecube.pipeline.masks import MaskRule
from slidecube.pipeline.open import open_inventory
from slidecube.pipeline.plan import plan
from slidecube.pipeline.tile import optical_layer

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def numbers():
    return json.loads((DOCS / "real-data.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def section():
    """Import a section of the document's program by its name."""
    sys.path.insert(0, str(DOCS / "real_data"))
    yield importlib.import_module
    sys.path.remove(str(DOCS / "real_data"))


def close(found, said, where=""):
    """Assert that two nests of numbers agree: whole numbers and text exactly, the rest to what is printed."""
    if isinstance(said, dict):
        assert set(found) == set(said), where
        for key in said:
            close(found[key], said[key], f"{where}.{key}")
    elif isinstance(said, list):
        assert len(found) == len(said), where
        for i, (one, two) in enumerate(zip(found, said, strict=True)):
            close(one, two, f"{where}[{i}]")
    elif isinstance(said, float):
        assert found == pytest.approx(said, abs=2e-3, rel=2e-3), where
    else:
        assert found == said, where


# --- the document ------------------------------------------------------------------------------------------------


def test_the_document_is_its_template_and_its_numbers(section, numbers):
    text = section("document").render(numbers)

    assert (DOCS / "real-data.md").read_text(encoding="utf-8") == text
    assert "{{" not in text


def test_every_picture_is_there_and_small():
    named = re.findall(r"\]\((images/[^)]+)\)", (DOCS / "real-data.md").read_text(encoding="utf-8"))

    assert sorted(named) == sorted(f"images/{p.name}" for p in (DOCS / "images").glob("real-*.png"))
    assert all((DOCS / name).stat().st_size < 300_000 for name in named)


# --- sections that are quick: the whole of their numbers ---------------------------------------------------------


@pytest.mark.parametrize("name", ["kaikoura", "segments", "offsets", "sentinel_item"])
def test_numbers_are_what_the_document_says(section, numbers, shared_data, tmp_path, name):
    close(section(name).measure(shared_data, tmp_path), numbers[name], name)


def test_the_real_item_is_read_as_warped_vrt_reads_it(numbers):
    said = numbers["sentinel_item"]

    assert len(set(said["pixel_m"].values())) == 3
    assert {n for grid in said["grids"].values() for n in grid["differing_px"].values()} == {0}
    assert said["composite_values_differing"] == 0
    assert 30 < said["clear_pct"] < 70


def test_scores_of_the_segments_follow_from_their_table(section, numbers, shared_data):
    """The rule as three lines of numpy, without the model."""
    table = section("segments").read(shared_data)
    said = numbers["segments"]["all"]
    before, after = table["ndvi"] + table["ndvi_change"], table["ndvi"]
    named = (100 * (after - before) <= -25 * np.sqrt((before + after).clip(lower=0))) & (before + after > 0)
    named &= table["slope_mean"] >= 10
    truth = table["Type"] == 1

    assert said["tp"] == (named & truth).sum()
    assert said["fp"] == (named & ~truth).sum()
    assert said["tp"] + said["fp"] + said["fn"] + said["tn"] == len(table) == 465
    assert said["precision"] == pytest.approx(said["tp"] / (said["tp"] + said["fp"]), abs=5e-4)
    assert said["recall"] == pytest.approx(said["tp"] / truth.sum(), abs=5e-4)


def test_the_loss_fixed_beforehand_is_the_models_limit(section):
    kaikoura = section("kaikoura")
    for before in (0.4, 0.8):
        loss = kaikoura.equivalent_loss(before, 25.0)
        assert relative_difference(np.array(before), np.array(before - loss)) == pytest.approx(-25)


def test_stripes_without_data_are_neither_found_nor_missed(section):
    """Two polygons of 2 x 2 pixels: one half seen, one never."""
    kaikoura = section("kaikoura")
    loss = np.full((4, 8), 0.5)
    loss[:, 1::2] = np.nan
    loss[:, 4:] = np.nan
    one, two = np.zeros((4, 8), bool), np.zeros((4, 8), bool)
    one[1:3, 0:2] = two[1:3, 5:7] = True
    both = np.stack([one, two])
    change = kaikoura.Change(
        loss_yx=loss, brightening_yx=loss, centres=both, touched=both, polygons=None, extent=(0, 8, 0, 4)
    )

    found = kaikoura.recall(change, 0.3)

    assert (found["polygons"], found["polygons_found"]) == (1, 1)
    assert (found["px"], found["px_found"]) == (2, 2)
    assert found["flagged_pct"] == 100
    assert kaikoura.recall(change, 0.6)["polygons_found"] == 0


# --- Flanders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrapped(section, shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flanders")
    flanders = section("flanders")
    for method in flanders.METHODS:
        flanders.prepare(shared_data, folder, method)
    return folder


def test_flanders_end_to_end_through_the_command_line(section, numbers, shared_data, wrapped):
    """118 real dates, plan to report: the stored composites are numpy's, and flat ground has no landslide."""
    flanders = section("flanders")
    flanders.command_line("run", wrapped / "greenest.toml")

    found = flanders.judge(shared_data, wrapped / "greenest", "greenest")

    close(found, numbers["flanders"]["methods"]["greenest"])
    assert found["values_compared"] == 2 * 64 * 64 * 14
    assert found["values_differing"] == 0
    assert found["ndvi_flagged_px"] > 0, "the NDVI part alone is fooled, so the slope is what is tested"
    inventory = open_inventory(wrapped / "greenest")
    assert not (inventory["landslide"] == 1).any()
    assert found["landslides"] == 0


def test_the_median_of_flanders_is_numpys(section, numbers, shared_data, wrapped):
    flanders = section("flanders")
    made = plan(load_config(wrapped / "median.toml"))
    box = flanders.site()
    tiles = [t for t in made.tiles if not (t.geobox.extent & box.extent).is_empty]
    assert len(tiles) > 1, "the site lies across blocks"
    for days in (flanders.PRE, flanders.POST):
        window = Window(start=np.datetime64(days[0]).item(), end=np.datetime64(days[1]).item())
        scenes = list(made.scenes.role("optical").within(window))
        want = flanders.expected(shared_data, days, "median")
        for tile in tiles:
            block = tile.geobox
            lazy = optical_layer(
                scenes,
                block,
                flanders.BANDS,
                how=Compositing(method="median"),
                mask=MaskRule(cloud_heights_m=None, readmit=False),
                block_px=512,
            )
            row, col = (
                round((block.affine.f - box.affine.f) / 10),
                round((box.affine.c - block.affine.c) / 10),
            )
            got = lazy.compute(scheduler="synchronous")
            rows = slice(max(row, 0), min(row + 64, 512))
            cols = slice(max(col, 0), min(col + 64, 512))
            part = np.s_[rows.start - row : rows.stop - row, cols.start - col : cols.stop - col]
            for name, values in want.items():
                np.testing.assert_array_equal(got[name].values[rows, cols], values[part], err_msg=name)
                outside = got[name].values.copy()
                outside[rows, cols] = 0
                assert not outside.any()
    assert numbers["flanders"]["methods"]["median"]["values_differing"] == 0
    assert numbers["flanders"]["methods"]["median"]["landslides"] == 0


def test_satellites_of_the_wrapped_series_agree_with_their_view(section, shared_data):
    """Each orbit looks from one side, and within it the two satellites differ by a constant degree or two."""
    wrap = section("flanders").wrap_module()
    _, twenty = wrap.open_series(shared_data)
    views = {}
    for when, azimuth in zip(twenty["timestamp"].values, twenty["viewAzimuthMean"].values, strict=True):
        views.setdefault(wrap.satellite_and_orbit(when), []).append(float(azimuth))

    assert set(views) == {("2A", 51), ("2A", 94), ("2B", 51), ("2B", 94)}
    middle = {key: np.median(azimuths) for key, azimuths in views.items()}
    for key, azimuths in views.items():
        assert np.percentile(np.abs(np.array(azimuths) - middle[key]), 75) < 0.6, key
    assert abs(middle["2A", 51] - middle["2A", 94]) > 100
    assert abs(middle["2A", 51] - middle["2B", 51]) > 0.5
    assert abs(middle["2A", 94] - middle["2B", 94]) > 0.5


# --- Sao Tome ----------------------------------------------------------------------------------------------------


def test_slope_of_a_real_tile_equals_scipys_and_gdaldems(section, numbers, shared_data, tmp_path):
    sao_tome = section("sao_tome")
    with rioxarray.open_rasterio(shared_data / sao_tome.TILE) as source:
        dem = source.isel(band=0, y=slice(2200, 3600), x=slice(1500, 2900)).load()

    assert float((dem > 0).mean()) > 0.3
    assert sao_tome.against_scipy(dem) < 1e-3
    assert numbers["sao_tome"]["native"]["against_scipy_max_deg"] < 1e-3
    if shutil.which("gdaldem"):
        found = sao_tome.against_gdaldem(dem, tmp_path)
        assert found["same_pixels_max_deg"] < 1e-3
        assert found["ellipsoid_max_deg"] < 1e-2


def test_resampling_first_makes_stairs(section, numbers, shared_data):
    """On one block in the middle of the island as in the numbers of the whole."""
    sao_tome = section("sao_tome")
    kept, stairs = sao_tome.ways(shared_data, sao_tome.island()[2048:2560, 1536:2048])
    assert kept["land"].all()

    assert (kept["slope"] < 1).mean() < 0.02
    assert np.nanmean(stairs < 1) > 0.05
    assert np.nanpercentile(stairs, 90) > np.percentile(kept["slope"], 90) + 5
    said = numbers["sao_tome"]
    assert said["slope_first"]["below_1_deg_pct"] < 2 < 10 < said["stairs"]["below_1_deg_pct"]
    assert said["slope_first"]["p90_deg"] + 5 < said["stairs"]["p90_deg"]


@pytest.mark.slow
def test_all_numbers_of_sao_tome(section, numbers, shared_data, tmp_path):
    found, said = section("sao_tome").measure(shared_data, tmp_path), numbers["sao_tome"]
    for native in (found["native"], said["native"]):
        native.pop("against_gdaldem")
    close(found, said)


# --- clusters without a label ------------------------------------------------------------------------------------


def test_eigenvalues_of_the_noise_fraction_are_what_the_document_says(section, numbers, shared_data):
    close(section("slovenia").spectra(shared_data), numbers["slovenia"]["spectra"], "slovenia")
    close(section("patches").spectra(shared_data), numbers["patches"]["spectrum"], "patches")


def test_eigenvalues_follow_from_numpys_covariances(section, numbers, shared_data):
    slovenia = section("slovenia")
    for scene, day in zip(slovenia.read(shared_data)[:2], slovenia.DATES, strict=False):  # no pixel is hidden
        values = np.stack([scene.post[band].values for band in slovenia.PAPER_BANDS]).astype(float)
        noise = (values[:, :-1, :-1] - values[:, 1:, 1:]).reshape(len(values), -1)
        covariance = np.cov(values.reshape(len(values), -1))
        found = scipy.linalg.eigh(covariance, np.cov(noise) / 2, eigvals_only=True)[::-1]
        assert found == pytest.approx(numbers["slovenia"]["spectra"][day]["eigenvalues"], abs=0.006)


def test_no_landslide_is_named_where_there_is_none(numbers):
    found = [f for by in numbers["slovenia"]["single"].values() for f in by.values()]
    found += [*numbers["slovenia"]["change"].values(), *numbers["flanders_clusters"]["models"].values()]
    assert {tuple(f["named"]) for f in found} == {()}
    assert {f["landslides"] for f in numbers["flanders_clusters"]["models"].values()} == {0}


@pytest.mark.slow
def test_plain_clusters_of_flanders_are_what_the_document_says(
    section, numbers, shared_data, tmp_path, monkeypatch
):
    flanders_clusters = section("flanders_clusters")
    models = ("kmeans", "kmeans-change")  # the bits of a training depend on the processor
    monkeypatch.setattr(flanders_clusters, "MODELS", models)
    found = flanders_clusters.measure(shared_data, tmp_path)
    said = numbers["flanders_clusters"]
    close(found, {"models": {m: said["models"][m] for m in models}, "spectra": said["spectra"]}, "flanders")
