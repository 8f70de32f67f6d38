"""Slope, aspect and the terrain layer against analytic planes, scipy and gdaldem, and across every kind of seam."""

from __future__ import annotations

import datetime as dt
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio
import rioxarray
import scipy.ndimage
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from slidecube.catalog.scenes import Scene
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.terrain import SLOPE_NODATA, aspect_deg, slope_deg, terrain

GEOD = pyproj.Geod(ellps="WGS84")
HORN_EAST = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], float) / 8
HORN_NORTH = np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]], float) / 8
ARCSECOND = 1 / 3600


@pytest.fixture(scope="session")
def cut_out(repo_root):
    """The real GLO-30 heights that the package ships: the north of Sao Tome, EPSG:4326."""
    with rioxarray.open_rasterio(
        repo_root / "pipeline/simulate/data/glo30_sao_tome.tif", mask_and_scale=True
    ) as source:
        return source.isel(band=0).load()


def as_dem(z, affine, crs="EPSG:32632", dtype=np.float64):
    box = GeoBox(z.shape, affine, crs)
    return xr.DataArray(z.astype(dtype), coords=xr_coords(box), dims=box.dimensions)


def plane(azimuth_deg, slope, *, shape=(12, 15), dx=10.0, dy=10.0):
    """Heights of a plane that falls towards an azimuth, and its affine."""
    affine = Affine(dx, 0, 500_000, 0, -dy, 5_000_000)
    col, row = np.meshgrid(np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5)
    x, y = affine.c + dx * col, affine.f - dy * row
    towards = np.radians(azimuth_deg)
    z = -np.tan(np.radians(slope)) * (np.sin(towards) * (x - x.mean()) + np.cos(towards) * (y - y.mean()))
    return z, affine


# --- slope and aspect on the DEM's own grid ----------------------------------------------------------------------


@pytest.mark.parametrize("azimuth_deg", [0, 45, 90, 135, 180, 225, 270, 315, 359.9])
@pytest.mark.parametrize(("slope", "dy"), [(1.0, 10.0), (30.0, 10.0), (30.0, 25.0), (85.0, 10.0)])
def test_planes_in_every_direction(azimuth_deg, slope, dy):
    z, affine = plane(azimuth_deg, slope, dy=dy)

    found = slope_deg(as_dem(z, affine)).values, aspect_deg(as_dem(z, affine)).values

    np.testing.assert_allclose(found[0][1:-1, 1:-1], slope, atol=1e-4)
    turn = (found[1][1:-1, 1:-1] - azimuth_deg + 180) % 360 - 180
    np.testing.assert_allclose(turn, 0, atol=1e-3)
    assert ((found[1][1:-1, 1:-1] >= 0) & (found[1][1:-1, 1:-1] < 360)).all()
    for values in found:
        edge = np.ones(z.shape, bool)
        edge[1:-1, 1:-1] = False
        np.testing.assert_array_equal(np.isnan(values), edge)


def test_a_south_up_or_east_left_array_is_the_same_terrain():
    z, affine = plane(30, 20)
    height, width = z.shape
    whole = slope_deg(as_dem(z, affine)).values, aspect_deg(as_dem(z, affine)).values

    south_up = as_dem(z[::-1], affine @ Affine.translation(0, height) @ Affine.scale(1, -1))
    mirrored = as_dem(z[:, ::-1], affine @ Affine.translation(width, 0) @ Affine.scale(-1, 1))

    for one, want in zip((slope_deg, aspect_deg), whole, strict=True):
        np.testing.assert_array_equal(one(south_up).values[::-1], want)
        np.testing.assert_array_equal(one(mirrored).values[:, ::-1], want)


def test_flat_ground_has_slope_zero_and_no_aspect():
    z, affine = plane(0, 0)

    assert (slope_deg(as_dem(z, affine)).values[1:-1, 1:-1] == 0).all()
    assert np.isnan(aspect_deg(as_dem(z, affine)).values).all()


@pytest.mark.parametrize("how", ["nan", "nodata", "_FillValue"])
def test_nodata_takes_its_nine_neighbours_and_no_more(how):
    z, affine = plane(200, 15)
    z[5, 7] = np.nan if how == "nan" else -32767
    dem = as_dem(z, affine)
    if how == "nodata":
        dem = dem.rio.write_nodata(-32767)
    elif how == "_FillValue":
        dem.attrs["_FillValue"] = -32767
    want = np.ones(z.shape, bool)
    want[1:-1, 1:-1] = False
    want[4:7, 6:9] = True

    np.testing.assert_array_equal(np.isnan(slope_deg(dem).values), want)
    np.testing.assert_array_equal(np.isnan(aspect_deg(dem).values), want)


def test_slope_equals_scipy_and_ignores_the_height_of_the_datum():
    rng = np.random.default_rng(1)
    z = scipy.ndimage.gaussian_filter(rng.normal(0, 400, (80, 90)), 3)
    affine = Affine(30, 0, 500_000, 0, -20, 5_000_000)
    east = scipy.ndimage.correlate(z, HORN_EAST) / 30
    north = scipy.ndimage.correlate(z, HORN_NORTH) / 20
    want = np.degrees(np.arctan(np.hypot(east, north)))

    found = slope_deg(as_dem(z, affine)).values
    np.testing.assert_allclose(found[1:-1, 1:-1], want[1:-1, 1:-1], atol=1e-5)
    assert np.ptp(want) > 10
    np.testing.assert_allclose(slope_deg(as_dem(z + 4000, affine)).values, found, atol=1e-5)


def test_a_dem_in_degrees_is_measured_on_the_ellipsoid_row_by_row(cut_out):
    """Against pixel sizes by pyproj's geodesics and Horn's kernels by scipy; real heights moved to 60 degrees north."""
    z = cut_out.values.astype(float)[600:900, 200:500]
    for north in (0.4, 60.0, -75.0):
        affine = Affine(ARCSECOND, 0, 6.0, 0, -ARCSECOND, north)
        lat = north - ARCSECOND * (np.arange(z.shape[0]) + 0.5)
        lon = np.full_like(lat, 6.0)
        # over half a degree, as an arc of a parallel is longer than the geodesic between its ends
        dx = GEOD.inv(lon, lat, lon + ARCSECOND, lat)[2][:, None]
        dy = GEOD.inv(lon, lat - 0.01, lon, lat + 0.01)[2][:, None] / 0.02 * ARCSECOND
        east, north_ = scipy.ndimage.correlate(z, HORN_EAST) / dx, scipy.ndimage.correlate(z, HORN_NORTH) / dy
        want = np.degrees(np.arctan(np.hypot(east, north_)))[1:-1, 1:-1]
        facing = np.degrees(np.arctan2(-east, -north_))[1:-1, 1:-1]

        dem = as_dem(z, affine, "EPSG:4326")
        np.testing.assert_allclose(slope_deg(dem).values[1:-1, 1:-1], want, atol=2e-3)
        turn = (aspect_deg(dem).values[1:-1, 1:-1] - facing + 180) % 360 - 180
        assert np.nanmax(np.abs(turn)) < 5e-3
        assert want.max() > 30


def test_a_vertical_datum_beside_the_crs_changes_nothing():
    """EPSG:9707 is EPSG:4326 with heights above EGM96."""
    z, _ = plane(70, 20)
    affine = Affine(ARCSECOND, 0, 12.5, 0, -ARCSECOND, 41.9)

    one, two = (slope_deg(as_dem(z, affine, crs)).values for crs in ("EPSG:4326", "EPSG:9707"))

    np.testing.assert_array_equal(one, two)


def test_pixels_in_feet_are_turned_into_metres():
    z, affine = plane(70, 20)
    foot = 1200 / 3937

    metres = slope_deg(as_dem(z, affine)).values
    feet = slope_deg(as_dem(z, Affine.scale(1 / foot) @ affine, "EPSG:2263")).values

    np.testing.assert_allclose(feet, metres, rtol=1e-5)


def test_what_has_no_metres_is_refused():
    z, affine = plane(0, 10)
    with pytest.raises(PipelineError, match="no CRS"):
        slope_deg(xr.DataArray(z, dims=("y", "x")))
    with pytest.raises(PipelineError, match="neither projected nor geographic"):
        slope_deg(as_dem(z, affine).rio.write_crs("EPSG:4978"))
    with pytest.raises(PipelineError, match="two dimensions"):
        slope_deg(as_dem(z, affine).expand_dims(band=[1, 2]))


def test_the_one_band_of_a_file_is_the_dem():
    z, affine = plane(70, 20)
    dem = as_dem(z, affine)

    np.testing.assert_array_equal(slope_deg(dem.expand_dims("band")).values, slope_deg(dem).values)


@pytest.mark.skipif(shutil.which("gdaldem") is None, reason="gdaldem is not installed")
@pytest.mark.parametrize("what", ["slope", "aspect"])
def test_equals_gdaldem(cut_out, tmp_path, what):
    """Real heights on 30 m pixels."""
    z = cut_out.values[300:800, 300:800]
    dem = as_dem(z, Affine(30, 0, 200_000, 0, -30, 40_000), "EPSG:32632", np.float32)
    path, out = tmp_path / "dem.tif", tmp_path / "out.tif"
    dem.rio.to_raster(path)
    subprocess.run(["gdaldem", what, path, out, "-q"], check=True)
    with rasterio.open(out) as made:
        want = made.read(1, masked=True).filled(np.nan)

    found = {"slope": slope_deg, "aspect": aspect_deg}[what](dem).values

    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
    turn = np.abs((found - want + 180) % 360 - 180)
    # gdaldem computes in float32: where it is almost flat, its aspect is less certain
    sure = slope_deg(dem).values > 1
    assert sure.mean() > 0.9
    assert np.nanmax(turn[sure]) < 0.02
    assert np.nanmax(turn) < 0.1


# --- the terrain layer -------------------------------------------------------------------------------------------


def dem_scene(folder, name, z, affine, crs="EPSG:4326", *, projection=True):
    """Write heights as an item of a DEM collection, GLO-30's way or without projection fields."""
    path = Path(folder) / f"{name}.tif"
    as_dem(z, affine, crs, np.float32).rio.to_raster(path)
    box = GeoBox(z.shape, affine, crs).extent.to_crs("EPSG:4326").boundingbox
    ring = [[box.left, box.bottom], [box.right, box.bottom], [box.right, box.top], [box.left, box.top]]
    fields = {"proj:code": crs, "proj:transform": list(affine)[:6], "proj:shape": list(z.shape)}
    item = {
        "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": name, "collection": "dem",
        "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}, "bbox": list(box.bbox), "links": [],
        "properties": {"datetime": "2021-04-22T00:00:00Z", **(fields if projection else {})},
        "assets": {"data": {"href": str(path), "type": "image/tiff; application=geotiff"}},
    }  # fmt: skip
    return Scene(
        id=name, role="dem", source="local", datetime=dt.datetime(2021, 4, 22, tzinfo=dt.UTC), identity=name,
        datatake="", version="", offset=None, bands={"elevation": "data"}, item=item,
    )  # fmt: skip


def window(lon, lat, crs, *, side_px=512, resolution_m=10.0):
    """A window of the lattice that holds a point near its middle."""
    x, y = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    step = 512 * resolution_m
    left, top = np.floor((x - side_px * 5) / step) * step, np.ceil((y + side_px * 5) / step) * step
    return GeoBox((side_px, side_px), Affine(resolution_m, 0, left, 0, -resolution_m, top), crs)


def made(scenes, box):
    lazy = terrain(scenes, box)
    return {name: array.compute(scheduler="synchronous") for name, array in lazy.items()}


def lonlat(z_shape, affine):
    col, row = np.meshgrid(np.arange(z_shape[1]) + 0.5, np.arange(z_shape[0]) + 0.5)
    return affine.c + affine.a * col, affine.f + affine.e * row


def rising_north(shape, affine, slope=20.0, lat0=50.0):
    """Heights above a parallel that rise towards the north by one slope, along the ellipsoid's meridian."""
    lat = affine.f + affine.e * (np.arange(shape[0]) + 0.5)
    metres = GEOD.inv(np.zeros_like(lat), np.full_like(lat, lat0), np.zeros_like(lat), lat)[2] * np.sign(
        lat - lat0
    )
    return np.broadcast_to((np.tan(np.radians(slope)) * metres)[:, None], shape)


def test_blocks_equal_the_window(cut_out, tmp_path):
    scene = dem_scene(tmp_path, "dem", cut_out.values, cut_out.rio.transform())
    box = window(6.55, 0.3, "EPSG:32632", side_px=1024)

    whole = made([scene], box)

    assert (whole["slope_deg"] != SLOPE_NODATA).all()
    for r in (0, 512):
        for c in (0, 512):
            part = made([scene], box[r : r + 512, c : c + 512])
            for name, values in part.items():
                np.testing.assert_array_equal(values, whole[name][r : r + 512, c : c + 512], err_msg=name)


@pytest.mark.parametrize("projection", [True, False])
def test_two_tiles_have_no_seam(cut_out, tmp_path, projection):
    """A DEM cut in two gives the bytes of the whole one, with or without projection fields in its items."""
    z, affine = cut_out.values, cut_out.rio.transform()
    col = 500
    box = window(affine.c + col * affine.a, 0.25, "EPSG:32632")
    halves = [
        dem_scene(tmp_path, "west", z[:, :col], affine, projection=projection),
        dem_scene(tmp_path, "east", z[:, col:], affine @ Affine.translation(col, 0), projection=projection),
    ]

    want = made([dem_scene(tmp_path, "whole", z, affine)], box)
    got = made(halves, box)

    assert (want["slope_deg"] != SLOPE_NODATA).all()
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


def test_tiles_of_another_spacing_have_no_seam(tmp_path):
    """GLO-30 is 1.5 times wider spaced north of 50 degrees: slopes go on across that parallel."""
    scenes, half = [], ARCSECOND / 2
    for name, north, width in (("south", 50.0, 1.0), ("north", 50.1, 1.5)):
        affine = Affine(ARCSECOND * width, 0, 4.9 - half * width, 0, -ARCSECOND, north + half)
        shape = (360, round(720 / width))
        scenes.append(dem_scene(tmp_path, name, rising_north(shape, affine), affine))
    box = window(5.0, 50.0, "EPSG:32631")

    for order in (scenes, scenes[::-1]):
        got = made(order, box)

        assert (got["slope_deg"] != SLOPE_NODATA).all()
        np.testing.assert_allclose(got["slope_deg"] / 100, 20, atol=0.2)
        turn = (got["aspect_deg"] / 100.0 - 180 + 180) % 360 - 180
        assert np.abs(turn).max() < 1
        assert np.isfinite(got["elevation"]).all()


@pytest.mark.parametrize("crs", ["EPSG:32601", "EPSG:32660", "EPSG:3832"])
def test_the_antimeridian_is_no_seam(tmp_path, crs):
    """Tiles of 179 east and 180 west, a block across the line between them."""
    scenes, half = [], ARCSECOND / 2
    for name, west in (("east", 179.9), ("west", -180.0)):
        affine = Affine(ARCSECOND, 0, west - half, 0, -ARCSECOND, -16.7 + half)
        scenes.append(dem_scene(tmp_path, name, rising_north((720, 360), affine, lat0=-16.8), affine))
    box = window(179.9999, -16.8, crs)

    got = made(scenes, box)

    assert (got["slope_deg"] != SLOPE_NODATA).all()
    np.testing.assert_allclose(got["slope_deg"] / 100, 20, atol=0.2)
    assert np.isfinite(got["elevation"]).all()


def test_where_no_tile_is_there_is_no_terrain(cut_out, tmp_path):
    """Tiles of open sea do not exist: nodata beyond the last pixel, and terrain up to it."""
    z, affine = cut_out.values[:, :300], cut_out.rio.transform()
    edge = affine.c + 300 * affine.a
    box = window(edge, 0.25, "EPSG:32632")

    got = made([dem_scene(tmp_path, "dem", z, affine)], box)

    x = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:32632", always_xy=True).transform(edge, 0.25)[0]
    col = int((x - box.affine.c) / 10)
    assert (got["slope_deg"][:, col + 5 :] == SLOPE_NODATA).all()
    assert np.isnan(got["elevation"][:, col + 5 :]).all()
    assert (got["slope_deg"][:, : col - 8] != SLOPE_NODATA).all()
    assert np.isfinite(got["elevation"][:, : col - 2]).all()


def test_the_first_of_two_overlapping_dems_counts(tmp_path):
    affine = Affine(30, 0, 400_000, 0, -30, 5_200_000)
    col = np.broadcast_to(np.arange(300) * 30.0, (300, 300))
    steep = dem_scene(tmp_path, "steep", col * np.tan(np.radians(40)), affine, "EPSG:32632")
    gentle = dem_scene(tmp_path, "gentle", col * np.tan(np.radians(10)), affine, "EPSG:32632")
    box = GeoBox((512, 512), Affine(10, 0, 401_920, 0, -10, 5_196_800), "EPSG:32632")

    for order, want in (([steep, gentle], 4000), ([gentle, steep], 1000)):
        assert (made(order, box)["slope_deg"] == want).all()


def test_aspect_across_north_does_not_turn_south(tmp_path):
    """Slopes that face 358 and 2 degrees: in between lies north, not the mean of the numbers."""
    affine = Affine(30, 0, 400_000, 0, -30, 5_200_000)
    x, y = lonlat((300, 300), affine)
    z = -0.5 * (y - y.mean()) - 1e-4 * (x - x.mean()) ** 2 / 20
    box = GeoBox((512, 512), Affine(10, 0, 401_920, 0, -10, 5_196_800), "EPSG:32632")

    aspect = made([dem_scene(tmp_path, "dem", z, affine, "EPSG:32632")], box)["aspect_deg"]

    assert aspect.max() < 36_000
    away_from_north = np.minimum(aspect, 36_000 - aspect.astype(int))
    assert (aspect > 18_000).any()
    assert (aspect < 18_000).any()
    assert away_from_north.max() < 500


def test_slope_is_made_before_it_is_resampled(cut_out, tmp_path):
    """Heights copied onto 10 m pixels first would be stairs: flat treads and cliffs."""
    scene = dem_scene(tmp_path, "dem", cut_out.values, cut_out.rio.transform())
    box = window(6.55, 0.25, "EPSG:32632")

    ours = made([scene], box)["slope_deg"] / 100

    native = slope_deg(cut_out).values
    lon, lat = pyproj.Transformer.from_crs("EPSG:32632", "EPSG:4326", always_xy=True).transform(
        *lonlat(box.shape, box.affine)
    )
    col, row = ~cut_out.rio.transform() @ (lon, lat)
    at = [np.asarray(row) - 0.5, np.asarray(col) - 0.5]
    want = scipy.ndimage.map_coordinates(native, at, order=1)
    # gdal's warp is exact to an eighth of a pixel
    assert np.percentile(np.abs(ours - want), 99) < 0.5
    stairs = cut_out.values[np.rint(at[0]).astype(int), np.rint(at[1]).astype(int)]
    cliffs = slope_deg(as_dem(stairs, box.affine)).values
    assert np.nanpercentile(cliffs, 90) > np.percentile(ours, 90) + 5
