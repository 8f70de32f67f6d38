"""Layers of the TOML: any raster on the grid, equal to GDAL's own warp, read as a feature, refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from slidecube.catalog.aoi import read_aoi
from slidecube.catalog.errors import CatalogError
from slidecube.catalog.grid import TileGrid
from slidecube.catalog.load import ReadLog
from slidecube.catalog.rasters import find_rasters, raster_scene
from slidecube.pipeline import load_config, plan, run
from slidecube.pipeline.auxiliary import CLASS_NODATA, auxiliary
from slidecube.pipeline.config import Layer
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.layers import create_stores
from slidecube.pipeline.mosaic_stage import lineage
from slidecube.pipeline.pixels import PixelWindow, features_of, read_layers
from slidecube.pipeline.plan_keys import auxiliary_layer_plan
from slidecube.pipeline.simulate import simulate_archive
from slidecube.pipeline.store import open_layer
from slidecube.pipeline.tasks import layer_ledger

WEST, NORTH = 229_760.0, 32_320.0
GRID = TileGrid(crs="EPSG:32632", resolution_m=10.0, tile_px=512)


def write(path, values, transform, *, crs="EPSG:32632", nodata=None, scale=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": 1, "dtype": values.dtype, "crs": crs, "nodata": nodata}
    height, width = values.shape
    with rasterio.open(path, "w", width=width, height=height, transform=transform, **profile) as file:
        file.write(values, 1)
        file.scales = (scale,)
    return path


def layer(name="mine", kind="categorical", **more):
    return Layer(name=name, kind=kind, href="x.tif", **more)


def box_of(tile):
    return read_aoi(tuple(tile.geobox.extent.to_crs("EPSG:4326").boundingbox.bbox))


def made(path, settings_, tile=None, log=None):
    tile = tile or GRID.tile_of(GRID.tiles(read_aoi((6.57, 0.27, 6.59, 0.29)))[0].key)
    scene = raster_scene(str(path), box_of(tile), name=settings_.name)
    return auxiliary([scene], tile.geobox, settings_, block_px=512, log=log).compute(), tile


@pytest.fixture(scope="module")
def tile():
    return GRID.tiles(read_aoi((6.57, 0.27, 6.59, 0.29)))[0]


@pytest.fixture
def corner(tile):
    box = tile.geobox.boundingbox
    return box.left, box.top


@pytest.mark.parametrize(
    ("kind", "kernel", "pixel_m"),
    [
        ("categorical", "mode", 4.0),
        ("categorical", "nearest", 4.0),
        ("categorical", "mode", 20.0),
        ("continuous", "bilinear", 4.0),
        ("continuous", "average", 4.0),
        ("continuous", "cubic", 25.0),
    ],
)
def test_is_what_gdal_s_warp_makes_of_the_same_file(tmp_path, tile, corner, kind, kernel, pixel_m):
    rng = np.random.default_rng(1)
    n = int(5120 / pixel_m) + 40
    values = rng.integers(1, 6, (n, n)).astype(np.uint8 if kind == "categorical" else np.float32)
    path = write(
        tmp_path / "a.tif", values, Affine(pixel_m, 0, corner[0] - 33, 0, -pixel_m, corner[1] + 21), nodata=3
    )

    found, _ = made(path, layer(kind=kind, resampling=kernel), tile)

    with (
        rasterio.open(path) as file,
        WarpedVRT(
            file,
            crs=GRID.crs,
            transform=tile.geobox.affine,
            width=512,
            height=512,
            resampling=Resampling[kernel],
            dtype="float32",
            nodata=np.nan,
        ) as warped,
    ):
        want = warped.read(1)
    if kind == "categorical":
        assert found.dtype == np.uint16
        want = np.where(np.isnan(want), CLASS_NODATA, want)
        assert set(np.unique(found)) <= {1, 2, 4, 5, CLASS_NODATA}
    np.testing.assert_array_equal(found, want.astype(found.dtype))


def test_mode_is_the_most_frequent_class_of_what_a_pixel_covers(tmp_path, tile, corner):
    fine = np.ones((5120 // 2, 5120 // 2), np.uint8)
    fine[::5, ::5] = 9  # nearest would take them, and no pixel is mostly of them
    fine[:500, 2::5] = fine[:500, 3::5] = fine[:500, 4::5] = 4
    path = write(tmp_path / "a.tif", fine, Affine(2, 0, corner[0], 0, -2, corner[1]))

    found, _ = made(path, layer(), tile)

    assert (found[:100] == 4).all()
    assert (found[100:] == 1).all()


def test_further_nodata_does_not_bleed_into_its_neighbours(tmp_path, tile, corner):
    """Canopy height maps say 101 for water: a mean with it would plant trees on the shore."""
    values = np.full((200, 200), 20.0, np.float32)
    values[:, 100:] = 101
    path = write(tmp_path / "a.tif", values, Affine(30, 0, corner[0], 0, -30, corner[1]))

    blended, _ = made(path, layer(kind="continuous"), tile)
    clean, _ = made(path, layer(kind="continuous", nodata=(101.0,)), tile)

    assert ((blended > 20) & (blended < 101)).any()
    assert set(np.unique(clean[~np.isnan(clean)])) == {20.0}
    assert np.isnan(clean[:, 302:]).all()
    assert (clean[:, :298] == 20).all()


@pytest.mark.parametrize("none", [1e20, -9999.9, 9.969209968386869e36])
def test_a_nodata_value_that_float32_cannot_hold_is_taken_out(tmp_path, tile, corner, none):
    values = np.full((200, 200), 20.0, np.float32)
    values[:, 100:] = none
    path = write(tmp_path / "a.tif", values, Affine(30, 0, corner[0], 0, -30, corner[1]))

    clean, _ = made(path, layer(kind="continuous", nodata=(none,)), tile)

    assert set(np.unique(clean[~np.isnan(clean)])) == {20.0}
    assert np.isnan(clean[:, 302:]).all()


def test_beyond_a_file_that_declares_no_nodata_there_is_none(tmp_path, tile, corner):
    path = write(
        tmp_path / "a.tif", np.full((50, 50), 7, np.int16), Affine(30, 0, corner[0], 0, -30, corner[1])
    )

    for kind in ("categorical", "continuous"):
        found, _ = made(path, layer(kind=kind), tile)
        none = np.isnan(found) if kind == "continuous" else found == CLASS_NODATA
        assert (found[:149, :149] == 7).all()
        assert none[151:].all()
        assert none[:, 151:].all()


def test_a_globe_in_degrees_is_read_where_it_is(tmp_path, tile):
    """Climate maps cover the whole earth, which has no outline on a map."""
    lat = np.linspace(89.5, -89.5, 180)
    classes = np.broadcast_to(np.where(np.abs(lat) < 23.5, 1, 2)[:, None], (180, 360)).astype(np.uint8)
    path = write(tmp_path / "world.tif", classes, Affine(1, 0, -180, 0, -1, 90), crs="EPSG:4326")
    assert (made(path, layer(), tile)[0] == 1).all()

    fiji = TileGrid(crs="EPSG:3460", resolution_m=10.0, tile_px=512)
    east = fiji.tiles(read_aoi((179.9, -17.0, 179.95, -16.95)))[0]
    assert (made(path, layer(), east)[0] == 1).all()
    from_zero = write(tmp_path / "zero.tif", classes, Affine(1, 0, 0, 0, -1, 90), crs="EPSG:4326")
    with pytest.raises(CatalogError, match="counts its longitudes from 0 to 360; write it from -180 to 180"):
        made(from_zero, layer(), tile)


@settings(max_examples=15)
@given(seed=st.integers(0, 999), px=st.sampled_from([1024, 2048]))
def test_tiles_change_no_pixel(tmp_path_factory, seed, px):
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(seed)
    pixel = float(rng.uniform(3, 60))
    values = rng.integers(0, 9, (600, 600)).astype(np.uint8)
    path = write(folder / "a.tif", values, Affine(pixel, 0, WEST, 0, -pixel, NORTH), crs="EPSG:32632")
    aoi = read_aoi((6.57, 0.27, 6.58, 0.28))
    small = GRID.tiles(aoi)[0]
    large = TileGrid(crs=GRID.crs, resolution_m=10.0, tile_px=px).tiles(aoi)[0]
    row, col = small.row * 512 - large.row * px, small.col * 512 - large.col * px

    one, _ = made(path, layer(), small)
    whole, _ = made(path, layer(), large)

    np.testing.assert_array_equal(one, whole[row : row + 512, col : col + 512])


def test_items_of_a_catalogue_mosaic_and_the_year_chooses(tmp_path, tile, corner):
    def item(name, year, value, shift_px):
        values = np.full((30, 30), value, np.uint8)
        values[:5] = 0
        at = Affine(100, 0, corner[0] + shift_px * 10, 0, -100, corner[1])
        write(tmp_path / f"{name}.tif", values, at, nodata=0)
        with rasterio.open(tmp_path / f"{name}.tif") as file:
            box = rasterio.warp.transform_bounds(file.crs, "EPSG:4326", *file.bounds)
        west, south, east, north = box
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        return {
            "type": "Feature",
            "stac_version": "1.0.0",
            "id": name,
            "bbox": list(box),
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"datetime": None, "start_datetime": f"{year}-01-01T00:00:00Z"},
            "links": [],
            "assets": {"map": {"href": f"./{name}.tif", "type": "image/tiff"}},
        }

    items = [item("west", 2020, 1, 0), item("east", 2020, 2, 200), item("old", 2015, 9, 0)]
    (tmp_path / "all.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    aoi = box_of(tile)
    source = str(tmp_path / "all.json")

    scenes = find_rasters(source, aoi, name="mine", asset="map", year=2020)
    found = auxiliary(scenes, tile.geobox, layer(), block_px=512).compute()

    assert [s.id for s in scenes] == ["east", "west"] or [s.id for s in scenes] == ["west", "east"]
    assert (found[60:299, :199] == 1).all()
    assert (found[60:299, 310:499] == 2).all()
    assert (found[60:290, 210:290] == 2).all(), "of equal dates the first by id counts"
    assert (found[:45] == CLASS_NODATA).all()
    with pytest.raises(
        CatalogError, match=r"has items of the years 2015, 2020 over .*; choose one with year"
    ):
        find_rasters(source, aoi, name="mine", asset="map")
    with pytest.raises(
        CatalogError, match=r"no item with an asset 'data' of 2020 over .*; 3 others have no such"
    ):
        find_rasters(source, aoi, name="mine", asset="data", year=2020)


def test_another_asset_or_catalogue_is_another_layer():
    """Items say nothing of their assets: the same id and the same day may be heights, and their errors."""

    def key(**given):
        given = {"name": "mine", "kind": "continuous", "units": "m"} | given
        return auxiliary_layer_plan(GRID, Layer(**given)).key

    one = key(source="https://a.invalid/collections/c", asset="height")
    assert one == key(source="https://a.invalid/collections/c", asset="height", year=2020)
    assert one != key(source="https://a.invalid/collections/c", asset="height_sd")
    assert one != key(source="https://b.invalid/collections/c", asset="height")
    assert key(source="here.json", asset="height") == key(source="moved/here.json", asset="height")
    assert key(href="a.tif") == key(href="b.tif"), "a file counts by its content"


def test_a_mirror_is_read_where_the_first_place_cannot_be(tmp_path, tile, corner):
    at = Affine(100, 0, corner[0], 0, -100, corner[1])
    values = np.random.default_rng(0).integers(1, 9, (60, 60)).astype(np.uint8)
    first, second = write(tmp_path / "a.tif", values, at), write(tmp_path / "b.tif", values, at)
    scene = raster_scene(str(first), box_of(tile), name="mine", mirrors=[str(second)])
    whole = auxiliary([scene], tile.geobox, layer(), block_px=512).compute()
    first.write_bytes(first.read_bytes()[:300])
    log = ReadLog()

    again = auxiliary([scene], tile.geobox, layer(), block_px=512, log=log).compute()

    np.testing.assert_array_equal(again, whole)
    assert [entry[:3] for entry in log.substituted] == [(scene.id, "data", "mirror")]
    assert not log.lost


def test_a_moved_file_is_the_same_and_a_changed_one_is_not(tmp_path, tile, corner):
    at = Affine(100, 0, corner[0], 0, -100, corner[1])
    values = np.ones((60, 60), np.uint8)
    one = raster_scene(str(write(tmp_path / "a.tif", values, at)), box_of(tile), name="mine")
    moved = raster_scene(str(write(tmp_path / "sub" / "b.tif", values, at)), box_of(tile), name="mine")
    values[3, 3] = 2
    changed = raster_scene(str(write(tmp_path / "a.tif", values, at)), box_of(tile), name="mine")

    assert (one.identity, one.version) == (moved.identity, moved.version)
    assert changed.identity == one.identity
    assert changed.version != one.version


# --- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(
        tmp_path_factory.mktemp("archive"), seed=5, size="small", extent_km=2.4, overpasses=2
    )


@pytest.fixture(scope="module")
def rasters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rasters")
    rng = np.random.default_rng(3)
    at = Affine(4, 0, WEST, 0, -4, NORTH)
    write(
        folder / "climate.tif", np.kron(rng.integers(1, 9, (70, 70)), np.ones((10, 10))).astype(np.uint8), at
    )
    # only the west of it
    write(
        folder / "canopy.tif",
        rng.uniform(0, 30, (100, 30)).astype(np.float32),
        Affine(30, 0, WEST, 0, -30, NORTH),
    )
    return folder


@pytest.fixture
def configured(archive, rasters, tmp_path):
    def make(layers, detect='model = "rdndvi"'):
        (rasters / "run.toml").write_text(
            f'[area]\naoi = "{archive.aoi}"\ncrs = "EPSG:32632"\n'
            '[[epoch]]\nname = "event"\npre = ["2018-06-01", "2018-09-06"]\npost = ["2018-09-08", "2018-11-20"]\n'
            f'[sources]\noptical = "{archive.optical}"\ndem = "{archive.dem}"\n'
            f'[cube]\ntile_px = 512\nbands = ["B04", "B08"]\n{layers}\n[detect]\n{detect}\n'
            f'[output]\nworkspace = "{tmp_path / "ws"}"\nformats = ["parquet"]\n'
        )
        return load_config(rasters / "run.toml")

    return make


CLIMATE = '[[layer]]\nname = "climate"\nhref = "climate.tif"\nkind = "categorical"\n'
CANOPY = (
    '[[layer]]\nname = "canopy_height"\nhref = "canopy.tif"\nkind = "continuous"\nunits = "m"\nyear = 2019\n'
)
READING = (
    'model = "kmeans-change"\nfeatures = ["dndvi", "slope_deg", "climate", "canopy_height"]\n'
    "parameters = { sample = 500 }"
)


def test_a_run_stores_them_reads_them_as_features_and_tells_of_them(configured, rasters):
    made_plan = plan(configured(CLIMATE + CANOPY, READING))
    report = run(made_plan, stages=("cube",), progress=False)

    assert report.complete, report.reasons
    assert made_plan.estimate.scene_reads > plan(configured("")).estimate.scene_reads
    by = {la.feature: la for la in made_plan.layers if la.kind == "auxiliary"}
    stored = open_layer(made_plan.workspace.layer(made_plan.grid, by["climate"].name))["climate"]
    assert (stored.dtype, stored.attrs["long_name"]) == (np.uint16, "climate")
    canopy = open_layer(made_plan.workspace.layer(made_plan.grid, by["canopy_height"].name))["canopy_height"]
    assert (canopy.attrs["units"], canopy.attrs["slidecube:year"]) == ("m", 2019)
    # the point of a class: 4 m pixels, ten in a row alike
    with rasterio.open(rasters / "climate.tif") as file:
        x, y = WEST + 1000.0, NORTH - 1500.0
        assert int(stored.sel(x=x, y=y, method="nearest")) == next(file.sample([(x, y)]))[0]
    spec = made_plan.model.card.inputs
    window = PixelWindow.of_tile(made_plan.grid, made_plan.tiles[0])
    seen = features_of(spec, read_layers(made_plan, "event", window), window, block_px=512, threads=1)
    assert list(seen) == ["dndvi", "slope_deg", "climate", "canopy_height"]
    assert seen["climate"].dtype == np.float32
    again = run(plan(configured(CLIMATE + CANOPY, READING)), stages=("cube",), progress=False)
    assert again.scene_reads == 0
    assert not again.done


@pytest.mark.slow
def test_a_model_learns_from_them_and_nothing_is_due_afterwards(configured):
    report = run(plan(configured(CLIMATE + CANOPY, READING)), progress=False)

    assert report.complete, report.reasons
    assert not run(plan(configured(CLIMATE + CANOPY, READING)), progress=False).done
    read = {(scene.use, scene.id) for scene in lineage(plan(configured(CLIMATE + CANOPY, READING))).scenes}
    assert {
        ("layer climate", "climate-climate.tif"),
        ("layer canopy_height", "canopy_height-canopy.tif"),
    } <= read


def test_another_order_another_name_and_another_file_make_due_what_they_touch_and_no_more(
    configured, rasters
):
    base = plan(configured(CLIMATE + CANOPY))
    swapped = plan(configured(CANOPY + CLIMATE))
    without = plan(configured(CLIMATE))

    assert {la.key for la in base.layers} == {la.key for la in swapped.layers}
    assert {la.key for la in without.layers} < {la.key for la in base.layers}
    assert base.epochs[0].detect_key == without.epochs[0].detect_key, "rdndvi does not read it"
    (climate,) = [la.name for la in base.layers if la.feature == "climate"]
    nearest = plan(configured(CLIMATE + 'resampling = "nearest"\n'))
    assert climate not in nearest.keys
    file = rasters / "climate.tif"
    before = file.read_bytes()
    try:
        with rasterio.open(file, "r+") as opened:
            opened.write(opened.read(1) + np.uint8(1), 1)
        changed = plan(configured(CLIMATE))
    finally:
        file.write_bytes(before)
    keys = zip(without.keys[climate].values(), changed.keys[climate].values(), strict=True)
    assert all(one != two for one, two in keys)
    assert plan(configured("")).keys.keys() < without.keys.keys()


def test_a_tile_without_the_raster_is_done_with_the_reason(configured):
    made_plan = plan(configured(CANOPY))
    run(made_plan, stages=("cube",), progress=False)
    (name,) = [la.name for la in made_plan.layers if la.feature == "canopy_height"]
    records = {t.key: layer_ledger(made_plan, name).read(t.key) for t in made_plan.tiles}
    reasons = {record.state: record.reason for record in records.values()}
    covered = {t.key for t in made_plan.tiles if t.geobox.boundingbox.left < WEST + 900}
    assert {key for key, record in records.items() if record.state == "done"} == covered
    assert reasons.get("empty", "") in {
        "",
        "no raster of layer 'canopy_height' touches this tile",
        "layer 'canopy_height' has no value here",
    }


BAD = {
    "missing": ('href = "gone.tif"\nkind = "categorical"', r"gone\.tif' cannot be read \(No such file"),
    "no crs": ('href = "nocrs.tif"\nkind = "categorical"', "has no CRS, so nobody knows where it lies"),
    "elsewhere": ('href = "far.tif"\nkind = "categorical"', "covers nothing of .*: it lies from 15"),
    "float classes": (
        'href = "canopy.tif"\nkind = "categorical"',
        "holds float32; a categorical layer holds whole",
    ),
    "complex": (
        'href = "complex.tif"\nkind = "continuous"',
        "holds complex64; a continuous layer holds real",
    ),
    "scaled": ('href = "scaled.tif"\nkind = "continuous"', r"holds scaled numbers \(x 0\.1 \+ 0\)"),
    "band": ('href = "climate.tif"\nkind = "categorical"\nband = 2', "has no band 2; it has 1 to 1"),
    "no raster": ('href = "run.toml"\nkind = "categorical"', "cannot be read: .*not recognized"),
    "source": ('source = "nowhere"\nkind = "categorical"', "'nowhere' is neither known nor an existing"),
    "vrt": ('href = "https://x.org/a.vrt"\nkind = "categorical"', "a file that names other files"),
    "password": ('href = "https://u:p@x.org/a.tif"\nkind = "categorical"', "carries a user name or password"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rasters_are_refused_in_one_line_with_the_layer_s_name(configured, rasters, case):
    at = Affine(4, 0, WEST, 0, -4, NORTH)
    write(rasters / "nocrs.tif", np.ones((9, 9), np.uint8), at, crs=None)
    write(rasters / "far.tif", np.ones((9, 9), np.uint8), Affine(4, 0, 500_000, 0, -4, 5e6), crs="EPSG:32633")
    write(rasters / "complex.tif", np.ones((700, 700), np.complex64), at)
    write(rasters / "scaled.tif", np.ones((700, 700), np.int16), at, scale=0.1)
    lines, said = BAD[case]

    with pytest.raises((PipelineError, CatalogError), match=said) as caught:
        plan(configured(f'[[layer]]\nname = "mine"\n{lines}\n'))

    assert "\n" not in str(caught.value)
    assert "mine" in str(caught.value)


NAMES = {
    "collides": ("slope_deg", "", "Layer 'slope_deg' has the name of a feature"),
    "collides too": ("mnf1_post", "", "Layer 'mnf1_post' has the name of a feature"),
    "unknown": ("mine", 'features = ["dndvi", "yours"]', "No feature 'yours'.*the layers mine; add a"),
    "typo": ("mine", 'features = ["dndvi", "slope_degg"]', r"'slope_degg' \(did you mean 'slope_deg'\?\)"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_are_checked_before_anything_is_searched(configured, case):
    name, more, said = NAMES[case]
    text = CLIMATE.replace('"climate"', f'"{name}"')

    with pytest.raises(PipelineError, match=said):
        plan(configured(text, f'model = "kmeans-change"\n{more}'))


def test_a_class_that_is_none_fails_its_tile_with_one_line(configured, rasters):
    at = Affine(40, 0, WEST, 0, -40, NORTH)
    write(rasters / "negative.tif", np.full((70, 70), -5, np.int16), at)
    made_plan = plan(configured('[[layer]]\nname = "mine"\nhref = "negative.tif"\nkind = "categorical"\n'))

    report = run(made_plan, stages=("cube",), progress=False)

    said = (
        "Layer 'mine' holds -5; classes are whole numbers from 0 to 65534: name it in nodata if it means nothing, or "
        "say kind = 'continuous'"
    )
    assert {why for _, why in report.reasons} == {said}


def test_stores_are_made_of_the_type_of_the_kind(configured):
    made_plan = plan(configured(CLIMATE + CANOPY))
    create_stores(made_plan)
    for la in made_plan.layers:
        if la.kind == "auxiliary":
            data = xr.open_zarr(str(made_plan.workspace.layer(made_plan.grid, la.name)), consolidated=False)
            assert data[la.feature].encoding.get("dtype", data[la.feature].dtype) in (np.uint16, np.float32)
