"""A run over scenes that do not lie on each other: measured, warned of, left out or corrected, from the TOML."""

from __future__ import annotations

import json
import shutil

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from affine import Affine

from slidecube.pipeline.config import load_config
from slidecube.pipeline.inventory import LANDSLIDE_NODATA, Reason
from slidecube.pipeline.open import open_inventory
from slidecube.pipeline.plan import plan
from slidecube.pipeline.run import run
from slidecube.pipeline.simulate import simulate_archive
from slidecube.pipeline.status import status
from slidecube.pipeline.summaries import status_summary

pytestmark = pytest.mark.slow

TOML = """
[area]
aoi = "{archive}/truth/area.geojson"
[[epoch]]
name = "event"
pre = ["{pre[0]}", "{pre[1]}"]
post = ["{post[0]}", "{post[1]}"]
[sources]
optical = "{moved}/catalog.json"
dem = "{archive}/archive/dem/collection.json"
[cube]
tile_px = {tile_px}
bands = ["B03", "B04", "B08"]
coregistration = {{ {settings} }}
[detect]
min_area_m2 = 2000
[output]
workspace = "{workspace}"
formats = ["parquet", "stac"]
[cluster]
workers = 2
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(tmp_path_factory.mktemp("archive"), seed=3, extent_km=8.0, overpasses=7)


@pytest.fixture(scope="module")
def moved(archive, tmp_path_factory):
    """Archives whose scenes after the event lie some metres further east, as a bad geolocation says."""
    made = {}

    def by(east_m):
        if east_m not in made:
            made[east_m] = tmp_path_factory.mktemp("moved") / "archive"
            shutil.copytree(archive.root / "archive", made[east_m])
            for item in made[east_m].glob("sentinel-2-l2a/*/*.json"):
                if json.loads(item.read_text())["properties"]["datetime"][:10] > str(archive.pre[1]):
                    _move(item, east_m)
        return made[east_m]

    return by


def _move(item, east_m):
    body = json.loads(item.read_text())
    for part in (body["properties"], *body["assets"].values()):
        if "proj:transform" in part:
            part["proj:transform"][2] += east_m
    item.write_text(json.dumps(body))
    for path in item.parent.glob("*.tif"):
        with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
            file.transform = Affine.translation(east_m, 0) @ file.transform


@pytest.fixture(scope="module")
def mapped(archive, moved, tmp_path_factory):
    """Run a TOML over moved scenes; returns its workspace."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}

    def of(east_m, settings="", tile_px=512):
        key = east_m, settings, tile_px
        if key not in made:
            name = f"w{len(made)}"
            toml = folder / f"{name}.toml"
            toml.write_text(
                TOML.format(
                    archive=archive.root, moved=moved(east_m), pre=archive.pre, post=archive.post,
                    tile_px=tile_px, settings=settings, workspace=name,
                )
            )  # fmt: skip
            report = run(load_config(toml), progress=False)
            assert report.complete, report.reasons
            made[key] = folder / name
        return made[key]

    return of


def _shifts(workspace):
    (path,) = workspace.glob("products/*/shifts.parquet")
    table = gpd.read_parquet(path)
    return table[table["verdict"] != "unmeasured"].set_index(["row", "col"])


def test_the_shift_of_the_scenes_is_in_the_table(mapped):
    own, other = _shifts(mapped(0)), _shifts(mapped(10))
    both = own.index.intersection(other.index)
    assert len(both) >= 2
    # the image before must follow the one after, which lies 10 m further east
    # a fifth of a pixel: half of this ground is under cloud on one of the few dates
    assert np.abs(other.loc[both, "east_m"] - own.loc[both, "east_m"] - 10).max() <= 2
    assert np.abs(other.loc[both, "south_m"] - own.loc[both, "south_m"]).max() <= 2


def test_a_shift_above_the_limit_is_not_observable_with_its_reason(mapped):
    workspace = mapped(30)
    state = status(workspace)
    excluded = _shifts(workspace).query("verdict == 'excluded'")
    assert len(excluded) == state["shifts"]["blocks"]["excluded"] >= 2
    text = status_summary(state)
    assert "not observable: see shifts.parquet" in text
    assert "images before and after the event do not lie on each other" in text

    seen = open_inventory(workspace)
    why = seen["reason"].isel(epoch=0).values
    out = why == Reason.MISREGISTERED
    assert out.any()
    assert (seen["landslide"].isel(epoch=0).values[out] == LANDSLIDE_NODATA).all()
    assert not (open_inventory(mapped(0))["reason"].values == Reason.MISREGISTERED).any()


def test_without_the_check_nothing_is_measured_and_nothing_left_out(mapped):
    workspace = mapped(30, "check = false")
    assert not list(workspace.glob("products/*/shifts.parquet"))
    assert status(workspace)["shifts"] == {}
    assert not (open_inventory(workspace)["reason"].values == Reason.MISREGISTERED).any()


def test_a_correction_finds_fewer_false_pixels(mapped):
    """Against the scenes that were not moved; only where both looked."""

    def landslides(workspace):
        return open_inventory(workspace)["landslide"].isel(epoch=0).values

    own, left, corrected = (
        landslides(mapped(*how)) for how in ((0,), (10,), (10, "correct = true, warn_px = 0.4"))
    )
    # the scenes after the event lie a pixel further east, and so do their landslides
    own = np.pad(own, ((0, 0), (1, 0)), constant_values=LANDSLIDE_NODATA)[:, :-1]
    known = (np.stack([own, left, corrected]) != LANDSLIDE_NODATA).all(axis=0)
    wrong = {
        name: int((found[known] != own[known]).sum())
        for name, found in (("left", left), ("corrected", corrected))
    }
    assert wrong["corrected"] < 0.8 * wrong["left"], wrong


@pytest.mark.parametrize("settings", ["", "correct = true, warn_px = 0.1"])
def test_shifts_and_what_follows_do_not_depend_on_the_tiles(mapped, settings):
    one, other = (mapped(10, settings, tile_px=px) for px in (512, 2048))
    assert (
        _shifts(one).drop(columns="tile").equals(_shifts(other).drop(columns="tile").loc[_shifts(one).index])
    )
    small, large = map(open_inventory, (one, other))
    y, x = (np.intersect1d(small[dim], large[dim]) for dim in ("y", "x"))
    for name in ("probability", "landslide", "reason"):
        a, b = (cube[name].sel(y=y, x=x).values for cube in (small, large))
        np.testing.assert_array_equal(a, b)


def test_what_decides_a_pixel_is_in_the_keys(archive, moved, tmp_path):
    def made(settings):
        toml = tmp_path / "run.toml"
        toml.write_text(
            TOML.format(
                archive=archive.root, moved=moved(0), pre=archive.pre, post=archive.post, tile_px=512,
                settings=settings, workspace="w",
            )
        )  # fmt: skip
        return plan(load_config(toml))

    plain, other = made(""), made("exclude_px = 1.0")
    assert [layer.key for layer in plain.layers] == [layer.key for layer in other.layers]
    assert (plain.keys, plain.reads) == (other.keys, other.reads)
    keys = [made(s).epochs[0].detect_key for s in ("", "warn_px = 0.3", "check = false", "correct = true")]
    assert keys[0] == keys[1]  # a warning changes no pixel
    assert len({*keys, other.epochs[0].detect_key}) == 4
    assert made("correct = true, warn_px = 0.3").epochs[0].detect_key not in keys
