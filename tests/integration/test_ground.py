"""Strata of the ground in a run: in the inventory, in the polygons, in the evaluation and in the report."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from affine import Affine

from slidecube.pipeline import load_config, plan, run
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.ground import yes_no
from slidecube.pipeline.open import open_detected
from slidecube.pipeline.report_stage import evaluate_workspace, report_workspace
from slidecube.pipeline.simulate import simulate_archive
from slidecube.pipeline.store import open_layer


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(
        tmp_path_factory.mktemp("archive"), seed=5, size="small", extent_km=1.6, overpasses=2
    )


@pytest.fixture(scope="module")
def configured(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    west, _, _, north = gpd.read_file(archive.aoi).to_crs("EPSG:32632").total_bounds
    with rasterio.open(
        folder / "cover.tif",
        "w",
        driver="GTiff",
        width=40,
        height=40,
        count=1,
        dtype="uint8",
        crs="EPSG:32632",
        transform=Affine(50, 0, west - 200, 0, -50, north + 200),
    ) as file:
        file.write(np.where(np.arange(40) < 20, 40, 10).astype(np.uint8)[None].repeat(40, 0), 1)

    def make(ground, layers='[[layer]]\nname = "land_cover"\nhref = "cover.tif"\nkind = "categorical"\n'):
        (folder / "run.toml").write_text(
            f'[area]\naoi = "{archive.aoi}"\ncrs = "EPSG:32632"\n'
            '[[epoch]]\nname = "event"\npre = ["2018-06-01", "2018-09-06"]\npost = ["2018-09-08", "2018-11-20"]\n'
            f'[sources]\noptical = "{archive.optical}"\ndem = "{archive.dem}"\n'
            f'[cube]\ntile_px = 512\nbands = ["B04", "B08"]\n{layers}\n[ground]\n{ground}\n'
            "[detect]\nparameters = { loss_pct = 5 }\n"
            '[output]\nworkspace = "ws"\nformats = ["parquet"]\n'
        )
        return load_config(folder / "run.toml")

    return make


def test_what_is_asked_for_decides_what_is_due(configured):
    plain, other = plan(configured("")), plan(configured("slope_edges_deg = [5, 30]"))
    rivers, fields = plan(configured("river_corridor_m = 5")), plan(configured("farmland = [40]"))

    assert plain.layers == other.layers
    assert plain.epochs[0].detect_key != other.epochs[0].detect_key
    assert "hand_m" in rivers.terrain_variables()
    assert "hand_m" not in plain.terrain_variables()
    assert plain.epochs[0].land_cover == fields.epochs[0].land_cover
    assert (plain.epochs[0].auxiliary, list(fields.epochs[0].auxiliary)) == ({}, ["land_cover"])


def test_a_run_flags_pixels_and_objects_and_judges_them_apart(configured, archive):
    config = configured("river_corridor_m = 5\nfarmland = [40]\nslope_edges_deg = [12, 30]")
    made = plan(config)
    report = run(made, progress=False)
    assert report.complete, report.reasons

    ground = open_detected(made)["ground"].isel(epoch=0)
    cover = open_layer(made.workspace.layer(made.grid, made.epochs[0].land_cover))["land_cover"]
    farmland = yes_no(ground.to_numpy(), "farmland")
    beside = cover.sel(x=ground.x, y=ground.y).to_numpy()
    np.testing.assert_array_equal(farmland == 1, beside == 40)
    np.testing.assert_array_equal(farmland == 0, beside == 10)
    assert {0, 1} <= set(np.unique(yes_no(ground.to_numpy(), "river_corridor")))
    objects = gpd.read_parquet(report.products / "landslides.parquet")
    west_of = (
        objects.representative_point().x
        < gpd.read_file(archive.aoi).to_crs("EPSG:32632").total_bounds[0] + 800
    )
    assert (objects["farmland"] == west_of).mean() > 0.9
    steep = objects["slope_deg"] >= 30
    assert ((objects["slope_class"] == "steep") == steep).all()
    (found,) = evaluate_workspace(made.workspace.root, archive.landslides).values()
    rows = {row.stratum.name: row for row in found.by_stratum}
    assert {"farmland", "other_land", "slope_steep", "vegetated"} <= set(rows)
    assert rows["farmland"].pixels.tp + rows["other_land"].pixels.tp == found.pixels.tp
    assert "slope of 30 degrees and more" in found.table()
    page = report_workspace(made.workspace.root, evaluations={"event": found}).read_text()
    assert "By the ground that they lie on" in page
    assert all(row.stratum.label in page for row in found.by_stratum)


BAD = {
    "farmland without land cover": (
        "farmland = [40]",
        "",
        r"ground\.farmland: names classes, and there is no land",
    ),
    "edges": ("slope_edges_deg = [25, 10]", "", "allowed: two slopes above 0, ascending"),
    "ndvi": ("low_vegetation_ndvi = 3", "", "low_vegetation_ndvi: got 3; allowed: the NDVI before"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_one_line(configured, case):
    ground, layers, said = BAD[case]
    with pytest.raises(PipelineError, match=said) as caught:
        configured(ground, layers)
    assert "\n" not in str(caught.value)


def test_a_name_of_a_class_of_a_raster_is_refused_before_anything_is_made(configured):
    with pytest.raises(PipelineError, match="names the class 'wheat'; classes of a raster are numbers"):
        plan(configured('farmland = ["wheat"]'))
