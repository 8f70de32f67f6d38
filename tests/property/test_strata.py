"""Strata: whose fit a pixel takes, and how fits blend, depends on nothing but the ground."""

from __future__ import annotations

import functools
import json

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import scipy.ndimage
import shapely
import xarray as xr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.mnf import fit_mnf
from slidecube.pipeline.mnf_strata import StratifiedMnf, fit_strata
from slidecube.pipeline.moments import moments
from slidecube.pipeline.strata import Strata, blend_weights, read_strata

BANDS = ("B02", "B03", "B04", "B08", "B11")
CRS = "EPSG:32632"
BOX = (500_000.0, 5_000_000.0, 501_000.0, 5_001_000.0)
unhurried = settings(max_examples=12)


def scene(seed, shape=(80, 60)):
    rng = np.random.default_rng(seed)
    maps = np.stack([scipy.ndimage.gaussian_filter(rng.normal(size=shape), sigma) for sigma in (2, 5, 9)])
    maps /= maps.std(axis=(1, 2), keepdims=True)
    values = 3000 + np.einsum("bm,myx->byx", rng.normal(0, 300, (len(BANDS), 3)), maps)
    values += rng.normal(size=(len(BANDS), *shape)) * np.linspace(20, 60, len(BANDS))[:, None, None]
    return xr.Dataset(
        {
            n: (("y", "x"), v.round().clip(1, 65535).astype(np.float32))
            for n, v in zip(BANDS, values, strict=True)
        }
    )


# --- weights ----------------------------------------------------------------------------------------------------------

codes_of_patches = st.integers(0, 2**32 - 1).map(
    lambda seed: np.kron(np.random.default_rng(seed).integers(0, 4, (6, 5)), np.ones((9, 9), int)).astype(
        np.uint16
    )
)


@unhurried
@given(codes_of_patches, st.floats(0, 8), st.integers(0, 12), st.integers(0, 9))
def test_weights_add_up_and_do_not_depend_on_the_window(codes, half_px, top, left):
    margin = int(np.ceil(half_px)) + 1
    whole = blend_weights(np.pad(codes, margin, mode="edge"), margin_px=margin, half_px=half_px)
    np.testing.assert_allclose(np.sum(list(whole.values()), axis=0), 1, atol=1e-6)
    part = np.pad(codes, margin, mode="edge")[top : top + 24 + 2 * margin, left : left + 20 + 2 * margin]
    cut = blend_weights(part, margin_px=margin, half_px=half_px)
    for code, weight in whole.items():
        expected = weight[top : top + 24, left : left + 20]
        np.testing.assert_array_equal(cut.get(code, np.zeros_like(expected)), expected)


@unhurried
@given(codes_of_patches, st.floats(0, 8))
def test_a_pixel_weighs_most_in_its_own_stratum_and_alone_beyond_the_band(codes, half_px):
    margin = int(np.ceil(half_px)) + 1
    found = blend_weights(np.pad(codes, margin, mode="edge"), margin_px=margin, half_px=half_px)
    for code, weight in found.items():
        mine = codes == code
        others = np.max([w for c, w in found.items() if c != code] or [np.zeros(codes.shape)], axis=0)
        assert (weight[mine] >= others[mine]).all()
        far = np.pad(mine, margin, mode="edge")
        far = scipy.ndimage.distance_transform_edt(far)[margin:-margin, margin:-margin] > half_px + 0.5
        assert (weight[mine & far] == 1).all()


def test_along_a_straight_border_the_weight_is_a_ramp():
    codes = np.ones((40, 60), np.uint16)
    codes[:, 30:] = 2
    weight = blend_weights(codes, margin_px=5, half_px=4)[1][0]
    centres = 30 - 5 - (np.arange(50) + 0.5)  # distance to the border, positive inside
    np.testing.assert_allclose(weight, np.clip(0.5 + centres / 8, 0, 1), atol=1e-7)


# --- fits -------------------------------------------------------------------------------------------------------------


@functools.cache
def halves():
    cube = scene(1)
    other = scene(2)
    joined = cube.where(xr.DataArray(np.arange(60) < 30, dims="x"), other)
    return joined, {"a": joined.isel(x=slice(0, 30)), "b": joined.isel(x=slice(30, 60))}


@functools.cache
def fitted_halves():
    joined, parts = halves()
    return fit_strata(moments(joined), {n: moments(p) for n, p in parts.items()}, bands=BANDS, components=3)


@functools.cache
def sums_of_scene():
    return moments(scene(3))


def test_each_stratum_is_fitted_to_its_own_pixels_alone_and_turned_to_the_whole():
    joined, parts = halves()
    fits = fitted_halves()
    assert fits.whole == fit_mnf(moments(joined), bands=BANDS)
    for name, part in parts.items():
        alone = fit_mnf(moments(part), bands=BANDS)
        assert fits.of(name).eigenvalues == alone.eigenvalues
        np.testing.assert_array_equal(np.abs(fits.of(name).weights), np.abs(alone.weights))
        own, whole = (m.transform(part, components=5) for m in (fits.of(name), fits.whole))
        for k in own:
            assert np.corrcoef(own[k].values.ravel(), whole[k].values.ravel())[0, 1] > 0
        weights, inverse = np.array(fits.of(name).weights), np.array(fits.of(name).inverse_weights)
        np.testing.assert_allclose(weights @ inverse, np.eye(5), atol=1e-12)


def test_too_few_pixels_or_a_constant_stratum_take_the_whole_and_say_so():
    joined, parts = halves()
    flat = xr.zeros_like(parts["b"]) + 1000
    sums = {
        "lake": moments(flat),
        "small": moments(parts["a"].isel(y=slice(0, 4))),
        "large": moments(parts["b"]),
    }
    fits = fit_strata(moments(joined), sums, bands=BANDS, components=3, least_px=1000)
    assert set(fits.strata) == {"large"}
    assert fits.fallback["small"] == "120 pixels, fewer than strata_min_px = 1000"
    assert "constant" in fits.fallback["lake"]
    assert fits.of("lake") is fits.whole


@unhurried
@given(st.floats(0.05, 1))
def test_components_hold_the_share_and_one_fewer_does_not(share):
    mnf = fit_strata(sums_of_scene(), {}, bands=BANDS, components=5, share=share).whole
    held = np.cumsum(mnf.shares)
    assert held[mnf.components - 1] >= share - 1e-9
    assert mnf.components == 1 or held[mnf.components - 2] < share
    assert fit_strata(sums_of_scene(), {}, bands=BANDS, components=2, share=share).whole.components <= 2


def test_what_is_not_kept_is_nought_and_unknown_where_the_bands_are():
    cube = scene(3)
    cube["B04"][4, 5] = np.nan
    fits = fit_strata(moments(cube), {}, bands=BANDS, components=5, share=0.05)
    assert fits.whole.components == 1
    found = fits.components(cube, xr.Dataset(), suffix="post", count=3)
    xr.testing.assert_identical(found["mnf1_post"], fits.whole.transform(cube, suffix="post")["mnf1_post"])
    for name in ("mnf2_post", "mnf3_post"):
        assert np.argwhere(np.isnan(found[name].values)).tolist() == [[4, 5]]
        assert (found[name].fillna(0) == 0).all()


@unhurried
@given(st.integers(7, 80), st.integers(7, 60))
def test_blended_components_are_the_weighted_sum_whatever_the_chunks(y, x):
    joined, _ = halves()
    fits = fitted_halves()
    codes = np.ones((80 + 22, 60 + 22), np.uint16)
    codes[:, 41:] = 2
    found = blend_weights(codes, margin_px=11, half_px=10)
    weights = xr.Dataset({"ab"[code - 1]: (("y", "x"), weight) for code, weight in found.items()})
    whole = fits.components(joined, weights, count=3)
    for k in whole:
        alone = {n: fits.of(n).transform(joined)[k].values for n in "ab"}
        expected = sum(weights[n].values * alone[n].astype(np.float64) for n in "ab")
        np.testing.assert_array_equal(whole[k].values, expected.astype(np.float32))
        np.testing.assert_array_equal(whole[k].values[:, :20], alone["a"][:, :20])
        np.testing.assert_array_equal(whole[k].values[:, 40:], alone["b"][:, 40:])
    lazy = fits.components(joined.chunk(y=y, x=x), weights.chunk(y=y, x=x), count=3).compute()
    xr.testing.assert_identical(lazy, whole)
    again = StratifiedMnf.from_json(fits.whole.to_json(), fits.strata_json())
    assert again == fits


# --- files ------------------------------------------------------------------------------------------------------------


def polygons(path, crs=CRS, **columns):
    left, bottom, right, top = BOX
    middle = (left + right) / 2
    shapes = [
        shapely.box(left - 1e4, bottom - 1e4, middle, top + 1e4),
        shapely.box(middle, bottom, right, top),
    ]
    gpd.GeoDataFrame(columns, geometry=shapes, crs=CRS).to_crs(crs).to_file(path)
    return path


def raster(path, values=((7, 7), (9, 0)), dtype="int16", crs=CRS):
    a = Affine(500, 0, BOX[0], 0, -500, BOX[3])
    with rasterio.open(
        path, "w", driver="GTiff", width=2, height=2, count=1, dtype=dtype, crs=crs, transform=a, nodata=0
    ) as file:
        file.write(np.array(values, dtype), 1)
    return path


def geobox(top=0, left=0, size=100):
    return GeoBox((size, size), Affine(10, 0, BOX[0] + 10 * left, 0, -10, BOX[3] - 10 * top), CRS)


@pytest.mark.parametrize("crs", [CRS, "EPSG:4326"])
def test_polygons_are_strata_by_their_attribute(tmp_path, crs):
    path = polygons(tmp_path / "zones.geojson", crs, zone=["moor", None])
    found = read_strata(path, field="zone", bounds=BOX, crs=CRS)
    assert found.names == ("moor",)
    codes = found.codes(geobox())
    assert (codes[:, :49] == 1).all()
    assert (codes[:, 51:] == 0).all()
    found.write(tmp_path, CRS)
    again = Strata.read(tmp_path, found.names)
    np.testing.assert_array_equal(again.codes(geobox()), codes)
    numbered = read_strata(path, field=None, bounds=BOX, crs=CRS)
    assert numbered.names == ("1", "2")


def test_a_raster_s_classes_are_strata(tmp_path):
    found = read_strata(raster(tmp_path / "zones.tif"), field=None, bounds=BOX, crs=CRS)
    assert found.names == ("7", "9")
    codes = found.codes(geobox())
    assert codes[0, 0] == codes[0, 99] == 1
    assert codes[99, 0] == 2
    assert codes[99, 99] == 0
    found.write(tmp_path, CRS)
    np.testing.assert_array_equal(Strata.read(tmp_path, found.names).codes(geobox()), codes)


@pytest.mark.parametrize(
    ("make", "field", "says"),
    [
        (lambda d: polygons(d / "z.gpkg", zone=["a", "b"]), "zon", "no attribute 'zon'; they have: zone"),
        (lambda d: raster(d / "z.tif"), "zone", "leave strata_field out"),
        (lambda d: raster(d / "z.tif", dtype="float32"), None, "hold float32; whole numbers"),
        (lambda d: raster(d / "z.tif", values=((0, 0), (0, 0))), None, "do not meet the area"),
        (lambda d: d / "no.tif", None, "cannot be read"),
        (lambda d: d / "no.gpkg", None, "cannot be read"),
    ],
)
def test_files_that_do_not_serve_are_refused_in_one_line(tmp_path, make, field, says):
    with pytest.raises(PipelineError, match=says) as told:
        read_strata(make(tmp_path), field=field, bounds=BOX, crs=CRS)
    assert "\n" not in str(told.value)


def test_lines_and_strata_elsewhere_are_refused(tmp_path):
    line = gpd.GeoDataFrame({"a": [1]}, geometry=[shapely.LineString([BOX[:2], BOX[2:]])], crs=CRS)
    line.to_file(tmp_path / "line.gpkg")
    with pytest.raises(PipelineError, match="are polygons; got LineString"):
        read_strata(tmp_path / "line.gpkg", field=None, bounds=BOX, crs=CRS)
    far = tuple(v + 1e5 for v in BOX)
    with pytest.raises(PipelineError, match="do not meet the area"):
        read_strata(raster(tmp_path / "z.tif"), field=None, bounds=far, crs=CRS)
    assert (
        json.loads(fit_strata(moments(scene(1)), {}, bands=BANDS, components=2).strata_json())["strata"] == {}
    )
