"""Sentinel-1 from a catalogue to a stored layer, features and what could be seen; runs without it stay as they were."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import xarray as xr
import zarr

from slidecube.catalog.scenes import SceneTable
from slidecube.models import zoo
from slidecube.models.card import FeatureSpec
from slidecube.models.rules import RdNdvi, rdndvi
from slidecube.pipeline import load_config, plan, run
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.inventory import open_stored
from slidecube.pipeline.layers import RADAR
from slidecube.pipeline.pixels import PixelWindow, features_of, read_layers
from slidecube.pipeline.quality import quality_of
from slidecube.pipeline.radar import stored_of_power
from slidecube.pipeline.radar_layer import VARIABLES
from slidecube.pipeline.simulate import simulate_archive
from slidecube.pipeline.store import read_window
from slidecube.pipeline.summaries import plan_summary


class Dimming(RdNdvi):
    """A rule for the tests: the cross-polarised backscatter falls on a slope."""

    def predict_block(self, features_fyx):
        change_db, slope_deg = features_fyx
        return np.minimum(np.clip(-change_db / 6, 0, 1), np.clip(slope_deg / 20, 0, 1)).astype(np.float32)


def dimming(*, threshold, min_area_m2, parameters):
    built = rdndvi(threshold=threshold, min_area_m2=min_area_m2, parameters=parameters)
    return Dimming(card=replace(built.card, name="dimming", inputs=FeatureSpec(names=("dvh", "slope_deg"))))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(
        tmp_path_factory.mktemp("archive"), seed=5, size="small", extent_km=2.4, overpasses=3, radar=True
    )


@pytest.fixture(scope="module", autouse=True)
def with_dimming():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "ZOO", {**zoo.ZOO, "dimming": dimming})
        yield


@pytest.fixture(scope="module")
def configured(archive, tmp_path_factory):
    """Write a TOML and load it."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name, *, model="dimming", radar=archive.radar, tile_px=512, workspace=None, more=""):
        source = f'radar = "{radar}"' if radar else ""
        (folder / f"{name}.toml").write_text(
            f'[area]\naoi = "{archive.aoi}"\ncrs = "EPSG:32632"\n'
            '[[epoch]]\nname = "event"\npre = ["2018-06-01", "2018-09-06"]\npost = ["2018-09-08", "2018-11-20"]\n'
            f'[sources]\noptical = "{archive.optical}"\ndem = "{archive.dem}"\n{source}\n'
            f'[cube]\ntile_px = {tile_px}\n{more}\n[detect]\nmodel = "{model}"\n'
            f'[output]\nworkspace = "{workspace or name}"\nformats = ["parquet"]\n'
        )
        return load_config(folder / f"{name}.toml")

    return make


def layer(made, side, names=VARIABLES):
    """A radar layer over the tiles of a plan."""
    (found,) = [
        la for la in made.layers if la.kind == "radar" and la.window == made.config.epochs[0].windows[side]
    ]
    rows, cols = [t.row for t in made.tiles], [t.col for t in made.tiles]
    px = made.grid.tile_px
    window = (slice(min(rows) * px, (max(rows) + 1) * px), slice(min(cols) * px, (max(cols) + 1) * px))
    return read_window(made.workspace.layer(made.grid, found.name), list(names), window=window), window


@pytest.fixture(scope="module")
def finished(configured):
    made = plan(configured("whole"))
    report = run(made, progress=False)
    assert not report.reasons
    return made


def test_a_layer_holds_what_it_says_and_its_medians_are_xarray_s(finished, archive):
    stored, window = layer(finished, "post")
    scenes = sorted(archive.radar.parent.glob("*DESCENDING*/vv.tif"))[-1:]
    path = finished.workspace.layer(
        finished.grid, next(la.name for la in finished.layers if la.kind == "radar")
    )

    assert set(zarr.open_group(str(path), mode="r").array_keys()) >= set(RADAR)
    with rasterio.open(scenes[0]) as file:
        power, (west, north) = file.read(1), (file.transform.c, file.transform.f)
    left, top = (finished.grid.frame.affine.c, finished.grid.frame.affine.f)
    row, col = round((top - north) / 10) - window[0].start, round((west - left) / 10) - window[1].start
    at = np.s_[row : row + power.shape[0], col : col + power.shape[1]]
    vv, count = stored["VV"][at], stored["count"][at]
    # one scene after the event: its own decibels, unless its zeros or its geometry took the pixel away
    want = xr.DataArray(stored_of_power(power)[None]).median("dim_0").values
    seen = count > 0
    np.testing.assert_array_equal(vv[seen], want[seen])
    assert set(np.unique(count)) == {0, 1}
    hidden = (stored["layover"][at] == 1) | (stored["shadow"][at] == 1)
    np.testing.assert_array_equal(~seen, hidden | (power == 0))
    assert 0.02 < hidden.mean() < 0.5


@pytest.mark.slow
def test_tiles_threads_and_loaders_change_no_pixel(configured, finished):
    whole, window = layer(finished, "pre")
    for name, how in (("large", {"tile_px": 1024}), ("stack", {})):
        more = '\n[cluster]\nloader = "stackstac"\nthreads_per_worker = 2' if name == "stack" else ""
        made = plan(configured(name, model="rdndvi", **how))
        if more:
            text = made.config.path.read_text() + more
            made.config.path.write_text(text)
            made = plan(load_config(made.config.path))
        run(made, stages=("cube",), progress=False)
        other, around = layer(made, "pre")
        rows, cols = (
            slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(window, around, strict=True)
        )
        for variable in VARIABLES:
            one = whole[variable][
                rows.start - window[0].start : rows.stop - window[0].start,
                cols.start - window[1].start : cols.stop - window[1].start,
            ]
            two = other[variable][
                rows.start - around[0].start : rows.stop - around[0].start,
                cols.start - around[1].start : cols.stop - around[1].start,
            ]
            assert (one != two).sum() == 0, (name, variable)


def test_a_radar_model_is_run_and_what_it_cannot_see_has_its_reason(finished):
    inventory = open_stored(finished.workspace.inventory(finished.inventory))
    reason = inventory["reason"].isel(epoch=0).values
    stored, _ = layer(finished, "post")
    before, _ = layer(finished, "pre")
    inside = inventory["observability"].isel(epoch=0).values > 1

    blind = (stored["count"] == 0) | (before["count"] == 0)
    assert set(np.unique(reason[inside])) >= {0, 6, 7}
    assert not set(np.unique(reason[inside])) & {1, 2, 3}, "clouds do not matter to radar"
    assert (reason[inside & blind] > 0).all()
    assert (inventory["landslide"].isel(epoch=0).values[inside & blind] == 255).all()
    folded = inside & (stored["count"] == 0) & (stored["layover"] == 1)
    assert np.isin(reason[folded], [4, 7]).all()
    assert {6, 7, 8} <= set(inventory["reason"].attrs["flag_values"])


def test_the_quality_report_counts_radar_as_the_layers_hold_it(finished):
    found = quality_of(finished)
    (whole,) = found.epochs
    seen = open_stored(finished.workspace.inventory(finished.inventory))["observability"].isel(epoch=0).values
    for side in ("pre", "post"):
        stored, around = layer(finished, side)
        sums = dict.fromkeys(("unseen_px", "layover_px", "shadow_px", "looked_px"), 0)
        for tile, row in zip(finished.tiles, found.tiles, strict=True):
            corner = tile.row * 512 - around[0].start, tile.col * 512 - around[1].start
            at = np.s_[corner[0] : corner[0] + 512, corner[1] : corner[1] + 512]
            of = {name: values[at][seen[at] != 1] for name, values in stored.items()}
            said = {name.removeprefix(f"radar_{side}_"): value for name, value in row.items()}
            assert said["state"] == "done"
            assert said["scenes"] == {"pre": 2, "post": 1}[side]
            numbers = [said[f"count_{name}"] for name in ("min", "median", "max")]
            assert numbers == [of["count"].min(), np.median(of["count"]), of["count"].max()]
            days = of["date_first"][of["date_first"] > 0]
            assert said["first"] == str(np.datetime64(int(days.min()), "D"))
            assert said["last"] == str(np.datetime64(int(of["date_last"].max()), "D"))
            looked = of["layover"] != 255
            assert said["layover_share"] == pytest.approx((of["layover"][looked] == 1).mean(), abs=1e-6)
            assert said["shadow_share"] == pytest.approx((of["shadow"][looked] == 1).mean(), abs=1e-6)
            for name in sums:
                sums[name] += said[name]
        assert sums["unseen_px"] == whole[f"radar_{side}_unseen_px"] > 0
        assert whole[f"radar_{side}_layover_share"] == pytest.approx(
            sums["layover_px"] / sums["looked_px"], abs=1e-6
        )
        assert whole[f"radar_{side}_layover_share"] > 0.01
        assert whole[f"radar_{side}_first"] <= whole[f"radar_{side}_last"]
    assert "radar_pre_count_median" in found.to_csv().splitlines()[0]
    assert "pre_clear_median" in found.tiles[0], "optical layers are there, too"


def test_features_of_the_run_are_made_of_its_layers(finished):
    tile = finished.tiles[0]
    window = PixelWindow.of_tile(finished.grid, tile)
    spec = FeatureSpec(names=("dvv", "vhvv_post", "lia_deg", "layover", "shadow"))
    also = dict.fromkeys(("radar_pre", "radar_post"), ("VV", "VH", "lia_deg", "layover", "shadow"))

    made = features_of(
        spec, read_layers(finished, "event", window, also=also), window, block_px=256, threads=1
    )

    pre, around = layer(finished, "pre")
    post, _ = layer(finished, "post")
    at = np.s_[
        tile.row * 512 - around[0].start : (tile.row + 1) * 512 - around[0].start,
        tile.col * 512 - around[1].start : (tile.col + 1) * 512 - around[1].start,
    ]
    seen = (pre["count"][at] > 0) & (post["count"][at] > 0)
    change = (post["VV"][at].astype(float) - pre["VV"][at]) / 100
    np.testing.assert_allclose(made["dvv"].values[seen], change[seen], atol=1e-4)
    assert np.isnan(made["dvv"].values[~seen]).all()


def test_the_layer_key_covers_what_changes_pixels_and_nothing_else(configured, finished):
    def keys(made):
        return {la.kind + str(la.window): la.key for la in made.layers}

    base = keys(plan(configured("keys", model="rdndvi")))
    other = keys(plan(configured("keys2", model="rdndvi", more="[cube.radar]\nspeckle_window_px = 5")))
    none = keys(plan(configured("keys3", model="rdndvi", radar=None)))

    assert base == keys(finished)
    changed = {name for name in base if base[name] != other[name]}
    assert changed == {name for name in base if name.startswith("radar")}
    assert none == {name: key for name, key in base.items() if not name.startswith("radar")}


def test_without_radar_the_keys_are_those_of_a_version_that_knew_none(configured):
    """A model that reads no radar keeps its detection when radar is added; and the plan's file says nothing of it."""
    without, beside = (
        plan(configured("optical", model="rdndvi", radar=None)),
        plan(configured("keys", model="rdndvi")),
    )
    assert without.epochs == beside.epochs
    assert "radar" not in json.dumps(without.config.science())
    text = (without.workspace.plan(without.run) / "plan.json").read_text()
    assert "radar" not in text.replace("radar/archive", "").replace('"tree_radar": null', "")


def test_the_plan_tells_of_its_radar_and_of_what_it_costs(finished):
    text = plan_summary(finished, newest="none")
    assert "radar       descending, relative orbits 124; scenes: event pre 2, event post 1" in text
    assert "charged" not in text
    paying = replace(
        finished,
        scenes=SceneTable(
            scenes=tuple(replace(s, source="earth-search/sentinel-1-grd") if s.role == "radar" else s
                         for s in finished.scenes)
        ),
    )  # fmt: skip
    assert "reading earth-search/sentinel-1-grd is charged to your account" in plan_summary(
        paying, newest="none"
    )
    optical = plan_summary(replace(finished, scenes=finished.scenes.role("optical")), newest="none")
    assert "radar  " not in optical


# --- what is refused, in one line ---------------------------------------------------------------------------------


@pytest.fixture
def items(archive, tmp_path):
    """A copy of the radar catalogue whose items may be changed."""
    shutil.copytree(archive.radar.parent, tmp_path / "s1")
    text = (tmp_path / "s1" / "collection.json").read_text().replace("../catalog.json", "./collection.json")
    (tmp_path / "s1" / "collection.json").write_text(text)

    def change(how):
        for path in (tmp_path / "s1").glob("*/*.json"):
            item = json.loads(path.read_text())
            how(item)
            path.write_text(json.dumps(item))
        return tmp_path / "s1" / "collection.json"

    return change


def refusal(configured, name, radar, **how):
    with pytest.raises(PipelineError) as caught:
        plan(configured(name, radar=radar, **how))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_polarisation_is_said(configured, items):
    said = refusal(configured, "vv", items(lambda item: item["assets"].pop("vh")))
    assert "has no pre-event radar scene" in said
    assert "left out: 4 with VV only" in said


def test_the_other_direction_is_said(configured, items):
    def turn(item):
        item["properties"].update({"sat:orbit_state": "ascending", "sat:relative_orbit": 103})

    said = refusal(configured, "ascending", items(turn))
    assert "of descending orbits" in said
    assert "left out: 4 of ascending orbits" in said


def test_an_orbit_that_cannot_see_the_place_is_said(configured, items):
    said = refusal(
        configured, "elsewhere", items(lambda i: i["properties"].update({"sat:relative_orbit": 7}))
    )
    assert "says relative orbit 7, from which its ground cannot be seen" in said


def test_amplitudes_and_a_second_correction_are_refused(configured, items, archive):
    def raw(item):
        item["properties"]["sar:product_type"] = "GRD"
        item["id"], item["collection"] = item["id"].replace("RTC", "GRD"), "grd"
        for asset in item["assets"].values():
            asset["raster:bands"] = [{"data_type": "uint16", "nodata": 0}]

    assert "amplitudes that nobody calibrated" in refusal(configured, "raw", items(raw))
    said = refusal(configured, "twice", archive.radar, more='[cube.radar]\nslope_correction = "volume"')
    assert "would correct slopes twice" in said


def test_a_search_that_is_known_refuses_as_one_that_is_made(configured, archive, finished):
    """The scenes of a plan that was allowed are found again by one that is not."""
    known = configured("known", radar=archive.radar, workspace="shared")
    assert plan(known).layers
    more = '[cube.radar]\nslope_correction = "volume"'
    with pytest.raises(PipelineError, match="would correct slopes twice"):
        plan(configured("known", radar=archive.radar, more=more, workspace="shared"))


def test_a_radar_model_without_a_radar_source_is_refused(configured):
    assert "reads Sentinel-1; name a source of it" in refusal(configured, "nothing", None)


@pytest.mark.slow
def test_sigma0_is_corrected_by_the_model_of_the_configuration(configured, items, finished):
    def sigma(item):
        item["properties"]["sar:product_type"] = "GRD"
        item["id"], item["collection"] = item["id"].replace("RTC", "GRD"), "grd"

    catalogue = items(sigma)
    more = '[cube.radar]\nslope_correction = "{}"'
    made = {
        model: plan(configured(f"sigma-{model}", radar=catalogue, model="rdndvi", more=more.format(model)))
        for model in ("volume", "surface")
    }
    for one in made.values():
        run(one, stages=("cube",), progress=False)
    plain, _ = layer(finished, "post")
    volume, surface = (layer(one, "post")[0] for one in made.values())

    both = (plain["count"] > 0) & (volume["count"] > 0) & (surface["count"] > 0)
    assert both.mean() > 0.01
    for corrected in (volume, surface):
        change = (corrected["VV"].astype(float) - plain["VV"])[both]
        assert np.corrcoef(change, plain["lia_deg"][both])[0, 1] > 0.8, "what faces away is brightened"
    assert (volume["VV"] != surface["VV"])[both].any()
