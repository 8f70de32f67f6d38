"""Curvature, relief, position and drainage against analytic surfaces, gdaldem and scipy; and their layer."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import subprocess

import dask
import numpy as np
import pyproj
import pytest
import rasterio
import rioxarray
import scipy.ndimage
import xarray as xr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from slidecube.pipeline.drainage import height_above_drainage
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.landform import CHANNEL_KM2, curvatures, relief, topographic_position
from slidecube.pipeline.terrain import (
    TERRAIN_ALWAYS,
    TERRAIN_VARIABLES,
    convergence_deg,
    derived,
    slope_deg,
    terrain,
    terrain_block,
)

SHAPES = tuple(name for name in TERRAIN_VARIABLES if name not in TERRAIN_ALWAYS)


@pytest.fixture(scope="session")
def dems(repo_root):
    """What the tests of slope and aspect make their DEMs with."""
    spec = importlib.util.spec_from_file_location(
        "test_terrain_dems", repo_root / "tests/oracle/test_terrain.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def heights(repo_root):
    """The real GLO-30 heights that the package ships, (y, x) float32, and their affine in degrees."""
    with rioxarray.open_rasterio(
        repo_root / "pipeline/simulate/data/glo30_sao_tome.tif", mask_and_scale=True
    ) as source:
        plane = source.isel(band=0).load()
    return plane.values, plane.rio.transform()


def around(shape=(61, 61), cell=10.0):
    """Coordinates east and north of the middle of a raster."""
    row, col = np.indices(shape)
    return (col - shape[1] // 2) * cell, (shape[0] // 2 - row) * cell


# --- curvature ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dx", "dy"), [(10.0, 10.0), (10.0, 4.0)])
def test_curvature_of_a_paraboloid(sign, dx, dy):
    """A hill or a bowl z = -a d^2: along the slope 2 a / (1 + 4 a^2 d^2)^1.5, around it 1 / d. The fit is exact."""
    x, y = around()[0] * dx / 10, around()[1] * dy / 10
    d, a = np.hypot(x, y), 0.002

    profile, plan = (sign * c[1:-1, 1:-1] for c in curvatures(-sign * a * d**2, dx, dy))

    d = d[1:-1, 1:-1]
    off = d > 0
    np.testing.assert_allclose(profile[off], (2 * a / (1 + 4 * a**2 * d**2) ** 1.5)[off], rtol=1e-5)
    np.testing.assert_allclose(plan[off], 1 / d[off], rtol=1e-5)
    assert np.isnan(profile[~off]).all(), "the top is flat"


def test_curvature_of_a_sphere_a_cone_and_a_plane():
    x, y = around(cell=1.0)
    d = np.hypot(x, y)
    far = np.s_[5:-5, 35:-5]

    profile, plan = curvatures(np.sqrt(200.0**2 - d**2), 1.0, 1.0)
    np.testing.assert_allclose(profile[far], 1 / 200, rtol=2e-3)
    np.testing.assert_allclose(plan[far], 1 / d[far], rtol=1e-2)

    profile, plan = curvatures(-0.5 * d, 1.0, 1.0)
    np.testing.assert_allclose(plan[far], 1 / d[far], rtol=5e-2)
    assert np.abs(profile[far]).max() < 0.02 * plan[far].max()

    profile, plan = curvatures(0.3 * x + 0.1 * y, 1.0, 1.0)
    inner = np.s_[1:-1, 1:-1]
    assert max(np.abs(profile[inner]).max(), np.abs(plan[inner]).max()) < 1e-12


# --- relief and position -----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("gdaldem") is None, reason="gdaldem is not installed")
@pytest.mark.parametrize(("what", "ours"), [("TPI", topographic_position), ("roughness", relief)])
def test_equals_gdaldem(heights, dems, tmp_path, what, ours):
    """In windows of 3 x 3 cells; roughness is gdaldem's word for the range of heights."""
    z = heights[0][300:800, 300:800]
    dem = dems.as_dem(z, Affine(30, 0, 200_000, 0, -30, 40_000), "EPSG:32632", np.float32)
    path, out = tmp_path / "dem.tif", tmp_path / "out.tif"
    dem.rio.to_raster(path)
    subprocess.run(["gdaldem", what, path, out, "-q"], check=True)
    with rasterio.open(out) as made:
        want = made.read(1, masked=True).filled(np.nan)[1:-1, 1:-1]

    found = ours(z, 30.0, 30.0, radius_m=30.0)[1:-1, 1:-1]

    # gdaldem sums in float32: eight heights of hundreds of metres are good to half a millimetre
    np.testing.assert_allclose(found, want, atol=5e-4)
    assert np.ptp(want) > 20


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(5, 70), st.sampled_from([(10.0, 10.0), (10.0, 20.0)]))
def test_windows_equal_scipys_cell_by_cell(seed, radius_m, cell):
    rng = np.random.default_rng(seed)
    z = rng.normal(500, 100, (17, 19))
    z[rng.random(z.shape) < 0.1] = np.nan
    size = tuple(2 * max(round(radius_m / side), 1) + 1 for side in cell[::-1])
    middle = size[0] * size[1] // 2

    def position(cells):
        others = np.delete(cells, middle)
        return cells[middle] - np.nanmean(others) if np.isfinite(others).any() else np.nan

    wants = [
        scipy.ndimage.generic_filter(z, of, size, mode="constant", cval=np.nan)
        for of in (
            lambda cells: np.nanmax(cells) - np.nanmin(cells) if np.isfinite(cells).any() else np.nan,
            position,
        )
    ]

    for ours, want in zip((relief, topographic_position), wants, strict=True):
        found = ours(z, cell[0], cell[1], radius_m=radius_m)
        np.testing.assert_allclose(found, np.where(np.isnan(z), np.nan, want), rtol=1e-5, atol=1e-4)


def test_windows_are_as_wide_on_the_ground_at_every_latitude():
    """At 60 degrees north a cell of a second is half as wide as at the equator: twice as many lie in the window."""
    col = np.broadcast_to(np.arange(200.0), (3, 200))

    found = relief(col, np.array([30.0, 15.0, 15.0]), 30.0, radius_m=300.0)

    assert found[:, 100].tolist() == [20, 40, 40]


# --- drainage ----------------------------------------------------------------------------------------------------


def valley(shape=(200, 121), cell=30.0, side=0.4, along=0.002):
    """A straight valley that drains to the south, and the height of its sides above the floor."""
    x, y = around(shape, cell)
    above = side * np.abs(x)
    return (above + along * (y - y.min()) + 100).astype(np.float32), above


def test_height_above_the_floor_of_a_valley():
    z, above = valley()

    found = height_above_drainage(z, 30.0, 30.0)

    row = 30  # from here on the floor drains enough
    assert (found >= 0).all()
    assert (found[row:, 60] == 0).all(), "the floor is the drainage"
    # D8 goes to the lowest neighbour: obliquely, and so a few cells down the valley
    np.testing.assert_allclose(found[row:-70, 1:-1], above[row:-70, 1:-1], atol=60 * 30 * 0.002 + 0.1)
    assert found[row:-70, 1:-1].max() > 600


def test_a_pit_in_the_slope_is_filled_and_a_void_is_none():
    z, above = valley()
    z[100, 30] -= 50
    z[120:124, 80:84] = np.nan

    found = height_above_drainage(z, 30.0, 30.0)

    np.testing.assert_array_equal(np.isnan(found), np.isnan(z))
    assert found[100, 30] == pytest.approx(above[100, 31], abs=20), "as high as where it spills over"
    assert np.isnan(height_above_drainage(np.full((5, 5), np.nan), 30.0, 30.0)).all()


def test_drainage_begins_by_area_on_the_ground_and_not_by_cells():
    z, _ = valley()

    first = [
        int(np.argmax(height_above_drainage(z, dx, 30.0)[:, 60] == 0))
        for dx in (np.full(200, 30.0), np.full(200, 90.0))
    ]

    # water of the sides comes obliquely, so n cells down the floor n squared cells have drained into it
    assert first == [int(np.sqrt(CHANNEL_KM2 * 1e6 / (dx * 30))) for dx in (30, 90)]


def test_a_dem_too_fine_for_drainage_is_refused():
    with pytest.raises(PipelineError, match=r"hand_m looks at 6 million cells of 1\.0 m.*name a coarser DEM"):
        height_above_drainage(np.zeros((2000, 3000), np.float32), 1.0, 1.0)


def test_a_dem_too_fine_for_what_looks_far_is_refused_before_it_is_read(dems, tmp_path):
    scene = dems.dem_scene(
        tmp_path, "dem", np.zeros((40, 40), np.float32), Affine(1e-5, 0, 6.5, 0, -1e-5, 0.31)
    )
    wide = GeoBox((600, 600), Affine(40, 0, 222_000, 0, -40, 40_000), "EPSG:32632")

    with pytest.raises(
        PipelineError, match=r"has 468 million cells in a window of 24 km.*Name a coarser one"
    ):
        terrain_block([scene], wide, variables=("elevation",))


# --- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_turning_the_dem_turns_aspect_and_nothing_else(heights, dems, quarter):
    """By quarters, to the left: what faced north faces west."""
    z = heights[0][500:700, 500:700]
    affine = Affine(
        30, 0, 499_000, 0, -30, 40_000
    )  # on the central meridian of its zone: no convergence to speak of
    upright, turned = (dems.as_dem(v, affine, "EPSG:32632") for v in (z, np.rot90(z, quarter)))

    for name in TERRAIN_VARIABLES:
        if name == "hand_m":  # of equally low neighbours the flow takes the first one
            continue
        want, got = np.rot90(derived(upright, name).values, quarter), derived(turned, name).values
        if name == "aspect_deg":
            turn = (want - 90 * quarter - got + 180) % 360 - 180
            assert np.nanmax(np.abs(turn)) < 0.1
            np.testing.assert_array_equal(np.isnan(want), np.isnan(got))
        else:
            np.testing.assert_allclose(
                got, want, rtol=1e-3, atol=1e-3 if name.endswith("_m") else 1e-6, err_msg=name
            )


@pytest.mark.parametrize("name", [n for n in TERRAIN_VARIABLES if n not in ("elevation", "hand_m")])
def test_a_higher_datum_changes_nothing(heights, dems, name):
    z = heights[0][500:600, 500:600].astype(np.float64)
    affine = Affine(30, 0, 499_000, 0, -30, 40_000)

    low, high = (derived(dems.as_dem(z + up, affine), name).values for up in (0, 1000))

    np.testing.assert_allclose(high, low, rtol=1e-5, atol=2e-3 if name.endswith(("_m", "_deg")) else 1e-6)


def test_unknown_variables_arrays_without_a_crs_and_flipped_ones_are_refused(dems):
    z, affine = dems.plane(0, 10)
    with pytest.raises(PipelineError, match="No terrain variable 'slope'; there are: elevation, slope_deg, "):
        derived(dems.as_dem(z, affine), "slope")
    with pytest.raises(PipelineError, match="no CRS, so its pixel size in metres is unknown"):
        derived(dems.as_dem(z, affine).drop_vars("spatial_ref"), "tpi_m")
    with pytest.raises(PipelineError, match="rows must run to the south"):
        derived(dems.as_dem(z[::-1], affine @ Affine.translation(0, 12) @ Affine.scale(1, -1)), "tpi_m")


@pytest.mark.parametrize("name", TERRAIN_VARIABLES)
def test_what_is_stored_is_what_was_there_to_half_a_step(name):
    variable = TERRAIN_VARIABLES[name]
    if variable.dtype == "float32":
        return
    info = np.iinfo(variable.dtype)
    ends = sorted({info.min, info.max} - {int(variable.nodata)})
    low, high = (
        ends[0] if ends[0] == info.min else info.min + 1,
        ends[-1] if ends[-1] == info.max else info.max - 1,
    )
    values = np.array([[np.nan, low * variable.scale, 0.0, 12.3456 * variable.scale, 2e6, -2e6]], np.float32)

    stored = variable.stored(values)
    back = variable.values(xr.DataArray(stored, dims=("y", "x"))).values

    assert stored.dtype == variable.dtype
    assert np.isnan(back[0, 0])
    np.testing.assert_allclose(back[0, 1:4], values[0, 1:4], atol=variable.scale * 0.51)
    np.testing.assert_allclose(
        back[0, 4:], [high * variable.scale, low * variable.scale], rtol=1e-5, atol=1e-9
    )


# --- true north --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crs", "x", "y"), [("EPSG:32632", 950_000, 5_400_000), ("EPSG:3413", 500_000, -1_200_000)]
)
def test_convergence_is_projs(crs, x, y):
    """Far off the central meridian, and on a polar grid; PROJ counts it the other way round, from the grid."""
    box = GeoBox((70, 90), Affine(30, 0, x, 0, -30, y), crs)
    col, row = np.meshgrid(np.arange(90) + 0.5, np.arange(70) + 0.5)
    lon, lat = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(
        x + 30 * col, y - 30 * row
    )
    want = pyproj.Proj(crs).get_factors(lon, lat).meridian_convergence

    turn = (convergence_deg(box) - want + 180) % 360 - 180

    assert np.abs(turn).max() < 0.01
    assert np.abs(want).max() > 3


def test_aspect_is_from_true_north_whatever_the_grid_of_the_dem(heights, dems, tmp_path):
    """One hill in degrees, and warped onto a zone three zones away: the same directions."""
    z, affine = heights[0][300:800, 300:800], heights[1] @ Affine.translation(300, 300)
    affine = Affine.translation(0, 45) @ affine  # to 45 degrees north
    degrees = dems.dem_scene(tmp_path, "degrees", z, affine)
    far = dems.as_dem(z, affine, "EPSG:4326", np.float32).rio.write_nodata(np.nan)
    far = far.rio.reproject("EPSG:32629", resolution=25, resampling=rasterio.enums.Resampling.cubic)
    other = dems.dem_scene(tmp_path, "other", far.values, far.rio.transform(), "EPSG:32629")
    lon, lat = affine @ (250, 250)
    box = dems.window(lon, lat, "EPSG:32632")

    a, b = (terrain_block([scene], box, variables=("slope_deg", "aspect_deg")) for scene in (degrees, other))

    steep = (a[0] > 15) & (b[0] > 15)
    turn = (b[1] - a[1] + 180) % 360 - 180
    assert steep.mean() > 0.2
    assert abs(np.median(turn[steep])) < 0.3
    assert abs(convergence_deg(GeoBox(far.shape, far.rio.transform(), "EPSG:32629"))).min() > 5


# --- the layer ---------------------------------------------------------------------------------------------------


def stored(scenes, box, variables=tuple(TERRAIN_VARIABLES), block_px=512):
    lazy = terrain(scenes, box, variables=variables, block_px=block_px)
    return dask.compute(lazy, scheduler="synchronous")[0]


def test_blocks_equal_the_window_and_asking_for_more_changes_nothing(heights, dems, tmp_path):
    scene = dems.dem_scene(tmp_path, "dem", *heights)
    box = dems.window(6.55, 0.3, "EPSG:32632", side_px=1024)

    whole = stored([scene], box)

    assert [array.dtype.name for array in whole.values()] == [v.dtype for v in TERRAIN_VARIABLES.values()]
    for r, c in ((0, 512), (512, 0)):
        at = np.s_[r : r + 512, c : c + 512]
        for names in (tuple(TERRAIN_VARIABLES), TERRAIN_ALWAYS, ("tpi_m", "slope_deg"), ("hand_m",)):
            for name, values in stored([scene], box[at], names).items():
                np.testing.assert_array_equal(values, whole[name][at], err_msg=f"{name} of {names}")


def test_a_dem_in_several_tiles_with_voids_is_one_dem(heights, dems, tmp_path):
    """Cut in two, one with a hole that the other's copy fills; a hole that nothing fills stays one, and says so."""
    z, affine = heights[0].copy(), heights[1]
    box = dems.window(6.55, 0.3, "EPSG:32632")
    middle = box.extent.centroid.to_crs("EPSG:4326").coords[0]
    row, col = (round(v) for v in (~affine @ middle)[::-1])
    holed = z.copy()
    holed[row - 20 : row, col - 20 : col] = np.nan
    west, east = (
        dems.dem_scene(tmp_path, "west", holed[:, :col], affine),
        dems.dem_scene(tmp_path, "east", z[:, col:], affine @ Affine.translation(col, 0)),
    )
    again = dems.dem_scene(tmp_path, "again", z[:, : col + 60], affine)

    want = stored([dems.dem_scene(tmp_path, "whole", z, affine)], box)
    for name, values in stored([west, east, again], box).items():
        np.testing.assert_array_equal(values, want[name], err_msg=name)
    for name, values in stored([west, east], box).items():
        known, all_known = (
            TERRAIN_VARIABLES[name].values(xr.DataArray(stored)).notnull().values
            for stored in (values, want[name])
        )
        assert 0.005 < (all_known & ~known).mean() < 0.04, name


def test_the_real_dem_of_rome_with_its_vertical_crs(shared_data, dems, tmp_path):
    """EPSG:9707 is EPSG:4326 and EGM96 heights; an item without projection fields leaves it to the file to say so."""
    file = shared_data / "dem_rome/Rome-30m-DEM.tif"
    with rasterio.open(file) as source:
        z, affine = source.read(1).astype(np.float32), source.transform
        assert source.crs.to_epsg() == 9707
    real = dems.dem_scene(tmp_path, "real", z, affine, projection=False)
    real.item["assets"]["data"]["href"] = str(file)
    x, y = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:32633", always_xy=True).transform(12.5, 42.0)
    box = GeoBox((512, 512), Affine(10, 0, round(x, -1) - 2560, 0, -10, round(y, -1) + 2560), "EPSG:32633")

    found, want = stored([real], box), stored([dems.dem_scene(tmp_path, "plain", z, affine)], box)

    for name, values in want.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert np.isfinite(found["elevation"]).all()
    assert 0 <= np.nanmin(found["elevation"]) < np.nanmax(found["elevation"]) < 200


@pytest.mark.parametrize(("halo_m", "changed"), [(300.0, (0.05, 1.0)), (6000.0, (0.0, 0.01))])
def test_what_the_halo_of_drainage_sees(heights, dems, tmp_path, monkeypatch, halo_m, changed):
    """A tenth of the halo is too little; twice as much tells no more on a mountain island."""
    scene = dems.dem_scene(tmp_path, "dem", *heights)
    box = dems.window(6.55, 0.3, "EPSG:32632")
    seen = terrain_block([scene], box, variables=("hand_m",))[0]

    other = dataclasses.replace(TERRAIN_VARIABLES["hand_m"], halo_m=halo_m)
    monkeypatch.setattr(
        "slidecube.pipeline.terrain.TERRAIN_VARIABLES", {**TERRAIN_VARIABLES, "hand_m": other}
    )
    found = terrain_block([scene], box, variables=("hand_m",))[0]

    share = (np.abs(found - seen) > 1).mean()
    assert changed[0] <= share <= changed[1]


def test_slope_of_the_layer_is_still_the_slope_of_the_dem(heights, dems):
    z = heights[0][300:500, 300:500]
    dem = dems.as_dem(z, heights[1], "EPSG:4326")

    np.testing.assert_array_equal(derived(dem, "slope_deg").values, slope_deg(dem).values)
