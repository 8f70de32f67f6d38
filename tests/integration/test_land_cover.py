"""Land cover from a user's points: grown once, applied by tiles, the same whatever they are; bad points in a line."""

from __future__ import annotations

import json
import re
import shutil

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import xarray as xr
from scipy import ndimage
from sklearn.tree import DecisionTreeClassifier

from slidecube.models.card import FeatureSpec
from slidecube.pipeline import load_config, plan, run
from slidecube.pipeline.auxiliary import CLASS_NODATA
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import Layers, build_features, required_variables
from slidecube.pipeline.land_cover import read_tree, tree_features, tree_lines
from slidecube.pipeline.pixels import PixelWindow, read_stored
from slidecube.pipeline.plan_files import read_plan
from slidecube.pipeline.run_plan import LAND_COVER
from slidecube.pipeline.simulate import simulate_archive
from slidecube.pipeline.simulate.archive import build_world
from slidecube.pipeline.simulate.landscape import CLASSES
from slidecube.pipeline.simulate.parameters import load_parameters
from slidecube.pipeline.status import status
from slidecube.pipeline.store import open_layer
from slidecube.pipeline.summaries import plan_summary
from slidecube.pipeline.tasks import layer_ledger


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(
        tmp_path_factory.mktemp("archive"), seed=5, size="small", extent_km=2.4, overpasses=3, radar=True
    )


@pytest.fixture(scope="module")
def truth():
    """Names of the simulated ground's classes, (y, x), and its first pixel's corner."""
    p = load_parameters()
    size = p.area.sizes["small"].model_copy(update={"extent_m": 2400.0})
    land = build_world(p, 5, size).landscape
    return np.array(CLASSES)[land.cover10], land.geobox


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def points(truth, folder):
    """Twenty-five pixels of each of three classes, in the middle of a patch of it."""
    names, geobox = truth
    rng = np.random.default_rng(0)
    found = []
    for name in ("forest", "cropland", "grass"):
        same = ndimage.binary_erosion(names == name, iterations=2)
        rows, cols = np.nonzero(same)
        chosen = rng.permutation(len(rows))[:25]
        found += [(name, *(geobox.affine @ (cols[i] + 0.5, rows[i] + 0.5))) for i in chosen]
    assert len(found) == 75
    table = gpd.GeoDataFrame(
        {"class": [f[0] for f in found], "number": range(len(found))},
        geometry=[shapely.Point(x, y) for _, x, y in found],
        crs=str(geobox.crs),
    )
    table.to_file(folder / "points.gpkg")
    table.to_crs("EPSG:4326").to_file(folder / "points.geojson")
    return table


@pytest.fixture(scope="module")
def configured(archive, folder, points):
    def make(
        name, *, cover='points = "points.gpkg"', radar=False, tile_px=512, detect='model = "rdndvi"', more=""
    ):
        source = f'radar = "{archive.radar}"' if radar else ""
        (folder / f"{name}.toml").write_text(
            f'[area]\naoi = "{archive.aoi}"\ncrs = "EPSG:32632"\n'
            '[[epoch]]\nname = "event"\npre = ["2018-06-01", "2018-09-06"]\npost = ["2018-09-08", "2018-11-20"]\n'
            f'[sources]\noptical = "{archive.optical}"\ndem = "{archive.dem}"\n{source}\n'
            f'[cube]\ntile_px = {tile_px}\nbands = ["B02", "B03", "B04", "B08", "B11", "B12"]\n{more}\n'
            f"[land_cover]\n{cover}\n[detect]\n{detect}\n"
            f'[output]\nworkspace = "{name}"\nformats = ["parquet"]\n'
        )
        return load_config(folder / f"{name}.toml")

    return make


@pytest.fixture(scope="module")
def finished(configured):
    made = plan(configured("whole"))
    report = run(made, stages=("cube", "fit"), progress=False)
    assert report.complete, report.reasons
    return made


def stored_cover(made):
    # the tiles alone: the array is as large as a UTM zone
    layer = open_layer(made.workspace.layer(made.grid, made.epochs[0].land_cover), tiles=list(made.tiles))
    return layer["land_cover"], layer["land_cover"].attrs


def test_the_map_is_what_scikit_learn_makes_of_the_same_features(finished, points):
    epoch = finished.epochs[0]
    spec = tree_features(finished, epoch)
    assert spec.names == (*(f"{b}_pre" for b in finished.config.cube.bands), "elevation", "slope_deg")
    needed = required_variables(spec)
    x, at = [], []
    for tile in finished.tiles:
        window = PixelWindow.of_tile(finished.grid, tile)
        sides = {"pre": epoch.pre, "terrain": epoch.terrain}
        read = {side: read_stored(finished, name, needed[side], window) for side, name in sides.items()}
        made = build_features(spec, Layers(post=xr.Dataset(), **read)).to_dataarray().to_numpy()
        x.append(made.reshape(len(spec.names), -1).T)
        got = read_stored(finished, epoch.land_cover, ["land_cover"], window)["land_cover"].to_numpy()
        at.append(got.ravel())
    x, got = np.concatenate(x), np.concatenate(at)
    row = {name: i for i, name in enumerate(sorted(set(points["class"])), start=1)}
    px, keys = finished.grid.tile_px, [tile.key for tile in finished.tiles]
    codes = np.array(finished.points.codes)
    rows, cols = np.array(finished.points.rows), np.array(finished.points.cols)
    which = [
        keys.index(f"r{r // px:03d}c{c // px:03d}") * px * px + (r % px) * px + c % px
        for r, c in zip(rows, cols, strict=True)
    ]
    learnt, known = x[which], np.isfinite(x[which]).all(axis=1)
    learnt, codes = learnt[known], codes[known]
    order = np.lexsort((*learnt.T[::-1], codes))
    oracle = DecisionTreeClassifier(random_state=0).fit(learnt[order], codes[order])
    seen = np.isfinite(x).all(axis=1)

    assert finished.points.names == {code: name for name, code in row.items()}
    np.testing.assert_array_equal(got[seen], oracle.predict(x[seen]))
    assert (got[~seen] == CLASS_NODATA).all()
    assert seen.sum() > 20_000
    assert len(np.unique(got[seen])) == 3


def test_it_finds_the_simulated_forest_and_says_how_often_it_is_right(finished, truth):
    names, geobox = truth
    cover, attrs = stored_cover(finished)
    x, y = (geobox.coordinates[dim].values for dim in ("x", "y"))  # noqa: PD011  not pandas
    found = cover.sel(x=x, y=y, method="nearest").to_numpy()
    words = dict(zip(attrs["flag_values"], attrs["flag_meanings"].split(), strict=True))
    assert words == {1: "cropland", 2: "forest", 3: "grass"}

    of_three = np.isin(names, list(words.values())) & (found != CLASS_NODATA)
    right = np.vectorize(words.get)(found[of_three]) == names[of_three]
    assert right.mean() > 0.75, "on pixels that it did not see, borders of patches included"
    (line,) = tree_lines(finished)
    assert re.search(
        r"from cropland \d+, forest \d+, grass \d+; \d+ hidden by clouds; right on \d+% of", line
    )


def test_the_tree_is_plain_data_and_enters_the_keys(finished, configured, folder, points):
    epoch = finished.epochs[0]
    about = json.loads((finished.workspace.statistics(epoch.tree_key) / "tree.json").read_text())
    assert set(about) == {"classes", "points", "unseen_points", "tree"}
    assert read_tree(finished, epoch).features == tree_features(finished, epoch).names
    plain = plan(configured("plain", cover='points = "points.geojson"'))
    moved = points.iloc[::-1]
    moved.to_file(folder / "turned.gpkg")
    turned = plan(configured("turned", cover='points = "turned.gpkg"'))
    assert plain.points == turned.points == finished.points
    assert {e.tree_key for e in (plain.epochs[0], turned.epochs[0])} == {epoch.tree_key}
    fewer = points.iloc[1:]
    fewer.to_file(folder / "fewer.gpkg")
    other = plan(configured("fewer", cover='points = "fewer.gpkg"')).epochs[0]
    assert other.tree_key != epoch.tree_key
    assert other.detect_key == epoch.detect_key, "rdndvi does not read it"
    assert read_plan(finished.workspace, finished.run).points == finished.points


def test_a_frozen_tree_knows_its_columns_whatever_the_order_of_the_bands(finished, folder):
    """The order of bands in a TOML is in no key: a tile that is made later is classified as those before it."""
    before = stored_cover(finished)[0].to_numpy()
    written = json.dumps(list(finished.config.cube.bands))
    toml = finished.config.text.replace(written, json.dumps(list(reversed(finished.config.cube.bands))))
    (folder / "turned-bands.toml").write_text(toml)
    made = plan(load_config(folder / "turned-bands.toml"))
    assert made.epochs[0].tree_key == finished.epochs[0].tree_key
    assert tree_features(made, made.epochs[0]) != tree_features(finished, finished.epochs[0])
    layer_ledger(made, made.epochs[0].land_cover).forget(made.tiles[0].key)
    report = run(made, stages=("fit",), progress=False)
    assert report.done == {"classify": 1}

    np.testing.assert_array_equal(stored_cover(made)[0].to_numpy(), before)


def test_nothing_is_due_twice_and_status_tells_of_it(finished):
    again = run(plan(finished.config), stages=("cube", "fit"), progress=False)

    assert not again.done
    assert status(finished.workspace.root)["tiles"]["classify"] == {
        "done": len(finished.tiles),
        "due": 0,
        "failed": 0,
        "running": 0,
    }
    assert "land cover  from points: cropland 25, forest 25, grass 25" in plan_summary(finished, newest="")


@pytest.mark.slow
def test_it_reads_radar_from_before_the_event_where_there_is_some(configured):
    made = plan(configured("radar", radar=True))
    without = plan(configured("without", radar=True, cover='points = "points.gpkg"\nradar = false'))
    spec = tree_features(made, made.epochs[0])

    assert spec.names[-4:] == ("vv_pre", "vh_pre", "elevation", "slope_deg")
    assert made.by_layer[made.epochs[0].tree_radar].window == made.config.epochs[0].pre
    assert without.epochs[0].tree_radar is None
    report = run(made, stages=("cube", "fit"), progress=False)
    assert report.complete, report.reasons
    assert read_tree(made, made.epochs[0]).features == spec.names
    assert (stored_cover(made)[0].to_numpy() != CLASS_NODATA).sum() > 10_000


@pytest.mark.slow
def test_tiles_and_threads_change_no_pixel(finished, configured):
    large = plan(configured("large", tile_px=1024, more="\n[cluster]\nthreads_per_worker = 2"))
    run(large, stages=("cube", "fit"), progress=False)
    one, two = stored_cover(finished)[0], stored_cover(large)[0]

    one, two = xr.align(one, two, join="inner")
    assert one.size > 200 * 200
    both = np.isin(one.values, [1, 2, 3])
    assert both.any()
    np.testing.assert_array_equal(one.to_numpy()[both], two.to_numpy()[both])


@pytest.mark.slow
def test_a_model_reads_it_and_a_whole_run_ends(configured):
    how = 'model = "kmeans-change"\nfeatures = ["dndvi", "slope_deg", "land_cover"]\nparameters = { sample = 500 }'
    config = configured("read", detect=how)
    report = run(plan(config), progress=False)

    assert report.complete, report.reasons
    made = plan(config)
    assert made.epochs[0].auxiliary == {"land_cover": made.epochs[0].land_cover}
    assert FeatureSpec(names=("dndvi", "slope_deg", "land_cover")) == made.model.card.inputs
    assert LAND_COVER.name in made.model.card.inputs.names
    assert not run(plan(config), progress=False).done


@pytest.mark.parametrize("farmland", ['"corn"', "7"])
def test_farmland_that_is_no_class_of_the_points_is_refused_before_anything_is_made(
    configured, folder, farmland
):
    config = configured("fields", more=f"[ground]\nfarmland = [{farmland}]")
    with pytest.raises(
        PipelineError, match=r"farmland names the class .*; the points have cropland, forest, grass"
    ):
        plan(config)
    assert not (folder / "fields").exists()


def test_detection_that_reads_it_waits_for_the_fit(configured):
    how = 'model = "kmeans-change"\nfeatures = ["dndvi", "slope_deg", "land_cover"]\nparameters = { sample = 500 }'
    made = plan(configured("early", detect=how))

    assert made.epochs[0].land_cover in made.epochs[0].layers
    report = run(made, stages=("fit",), progress=False)

    assert not report.complete
    assert any("lacks layer" in why and "run `slidecube cube`" in why for _, why in report.reasons)


def bad(points, case):
    table = points.copy()
    match case:
        case "column":
            return table.rename(columns={"class": "kind"})
        case "outside":
            table.loc[3, "geometry"] = shapely.Point(500_000, 5_000_000)
        case "polygons":
            table["geometry"] = table.geometry.buffer(5)
        case "null":
            table.loc[2, "class"] = None
        case "few":
            return table.iloc[:40]
        case "one":
            return table.iloc[:20]
        case "twice":
            twin = table.iloc[[0]].assign(**{"class": "grass"})
            return pd.concat([table, twin], ignore_index=True)
        case "fractions":
            return table.assign(**{"class": np.linspace(0.5, 9, len(table))})
        case "empty":
            return table.iloc[:0]
    return table


BAD = {
    "column": "has no column 'class'; its columns: kind, number",
    "outside": r"1 of 75 points of .* lie outside the area's tiles, the first is number 4, at 9\.0",
    "polygons": "holds Polygon; points are needed",
    "null": "1 points of .* have no 'class'",
    "few": "too few points for a land cover: cropland 15, forest 25; at least 20 points of each class are needed",
    "one": "forest 20; two classes or more are needed",
    "twice": "points of forest and of grass on one pixel|points of grass and of forest on one pixel",
    "fractions": "holds numbers that are no classes",
    "empty": "holds no points",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_points_are_refused_in_one_line(configured, folder, points, case):
    bad(points, case).to_file(folder / f"{case}.gpkg")
    config = configured("bad", cover=f'points = "{case}.gpkg"\nmin_points = 20')

    with pytest.raises(PipelineError, match=BAD[case]) as caught:
        plan(config)
    assert "\n" not in str(caught.value)


CONFIG = {
    "missing": ({"cover": 'points = "gone.gpkg"'}, r"land_cover\.points: .*gone\.gpkg' cannot be read"),
    "text": ({"cover": 'points = "bad.toml"'}, "cannot be read"),
    "raster": (
        {"cover": 'points = "r.tif"'},
        r"bad\.toml: Points .*r\.tif' cannot be read \(not recognized as being in a supported file format\); name a G",
    ),
    "both": (
        {"more": '[[layer]]\nname = "land_cover"\nhref = "a.tif"\nkind = "categorical"\n'},
        r"got 'land_cover', which \[land_cover\] makes as well",
    ),
}


@pytest.mark.parametrize("case", CONFIG)
def test_what_cannot_be_a_land_cover_is_refused(configured, folder, archive, case):
    how, said = CONFIG[case]
    shutil.copy(next(archive.dem.parent.rglob("*.tif")), folder / "r.tif")
    with pytest.raises(PipelineError, match=said):
        plan(configured("bad", **how))
