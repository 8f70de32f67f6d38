"""The two loaders against each other and against rasterio's WarpedVRT, over one list of fixtures."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
import shapely
import xarray as xr
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT

from slidecube.catalog.errors import AssetReadError, CatalogError
from slidecube.catalog.items import normalised, scene_of
from slidecube.catalog.load import DTYPES, LOADERS, NODATA, RESAMPLING, ReadLog, load, on_lattice
from slidecube.catalog.sources import Source
from slidecube.pipeline.terrain import terrain_block

WEST, NORTH, SIDE_M = 399_960.0, 5_300_040.0, 15_360
ZONE, NEXT_ZONE = "EPSG:32633", "EPSG:32632"
LAEA_EUROPE = "EPSG:3035"
BANDS = {"B04": 10, "B11": 20, "B09": 60, "SCL": 20}
DEM_WEST, DEM_NORTH, DEM_PX = 13.6, 47.9, 720


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixture:
    """One way in which an item says where its pixels lie."""

    stac: str
    item: tuple[str, ...] = ()  # fields of the projection on the item
    asset: tuple[str, ...] = ()  # and on each asset
    raster_bands: bool = False


FIXTURES = {
    "epsg, STAC 1.0": Fixture(stac="1.0.0", item=("proj:epsg",)),
    "code, STAC 1.1": Fixture(stac="1.1.0", item=("proj:code",)),
    "epsg, STAC 1.1": Fixture(stac="1.1.0", item=("proj:epsg",)),
    "code, STAC 1.0": Fixture(stac="1.0.0", item=("proj:code",)),
    "both spellings": Fixture(stac="1.1.0", item=("proj:epsg", "proj:code")),
    "nothing": Fixture(stac="1.0.0"),
    "shape and transform": Fixture(
        stac="1.1.0", item=("proj:code",), asset=("proj:shape", "proj:transform"), raster_bands=True
    ),
    "all on the asset": Fixture(
        stac="1.1.0", asset=("proj:code", "proj:shape", "proj:transform"), raster_bands=True
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    rng = np.random.default_rng(3)
    for band, resolution in BANDS.items():
        n = SIDE_M // resolution
        coarse = np.kron(rng.integers(500, 6000, (n // 8 + 2, n // 8 + 2)), np.ones((8, 8), int))[:n, :n]
        data = coarse + rng.integers(0, 300, (n, n))
        data[: n // 5, : n // 7] = 0
        dtype = DTYPES.get(band, "uint16")
        _write(
            folder / f"{band}.tif",
            (data % 12 if band == "SCL" else data).astype(dtype),
            ZONE,
            from_origin(WEST, NORTH, resolution, resolution),
            0,
        )
    heights = rng.normal(800, 300, (DEM_PX, DEM_PX)).cumsum(0).cumsum(1).astype("float32") / 1e3
    heights[:60, :60] = -9999
    step = 1 / 3600
    _write(folder / "dem.tif", heights, "EPSG:4326", from_origin(DEM_WEST, DEM_NORTH, step, step), -9999)
    return folder


def _write(path, data, crs, transform, nodata):
    with rasterio.open(
        path, "w", driver="GTiff", width=data.shape[1], height=data.shape[0], count=1, dtype=data.dtype, crs=crs,
        nodata=nodata, transform=transform, tiled=True, blockxsize=256, blockysize=256, compress="deflate",
    ) as out:  # fmt: skip
        out.write(data, 1)


def item_of(
    files, fixture: Fixture, *, bands=tuple(BANDS), name="S2A_TEST", day="2021-07-01", shrink_deg=-0.01
):
    """A raw item, not normalised: with those fields of the projection that the fixture names, and no other."""
    assets: dict[str, Any] = {}
    for band in bands:
        with rasterio.open(files / f"{band}.tif") as src:
            fields = {
                "proj:epsg": 32633, "proj:code": ZONE, "proj:shape": list(src.shape),
                "proj:transform": list(src.transform)[:6],
            }  # fmt: skip
        assets[band] = {
            "href": str(files / f"{band}.tif"),
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            **{key: fields[key] for key in fixture.asset},
        }
        if fixture.raster_bands:
            assets[band]["raster:bands"] = [
                {"nodata": 0, "scale": 1e-4, "offset": -0.1, "data_type": "uint16"}
            ]
    box = GeoBox.from_bbox((WEST, NORTH - SIDE_M, WEST + SIDE_M, NORTH), crs=ZONE, resolution=1000)
    lonlat = box.extent.to_crs("EPSG:4326").geom.buffer(-shrink_deg)
    version = "v2.0.0" if fixture.stac == "1.1.0" else "v1.1.0"
    return {
        "type": "Feature", "stac_version": fixture.stac, "id": name, "collection": "x", "links": [],
        "stac_extensions": [f"https://stac-extensions.github.io/projection/{version}/schema.json"],
        "geometry": shapely.geometry.mapping(lonlat), "bbox": list(lonlat.bounds),
        "properties": {"datetime": f"{day}T10:00:00.123456Z", **{key: fields[key] for key in fixture.item}},
        "assets": assets,
    }  # fmt: skip


def block_at(crs, at, *, resolution_m=10):
    """The block of the lattice that holds the point so far along the scene's diagonal."""
    x, y = Transformer.from_crs(ZONE, crs, always_xy=True).transform(WEST + SIDE_M * at, NORTH - SIDE_M * at)
    step = 512 * resolution_m
    return GeoBox(
        (512, 512), from_origin(x // step * step, -(-y // step) * step, resolution_m, resolution_m), crs
    )


def warped(path, box, kernel, *, dtype=None, nodata=0.0):
    """What rasterio's own warp gives for each block of the lattice under a window."""
    blocks, crop = on_lattice(box, 512)
    out = np.full(blocks.shape, nodata, dtype or "uint16")
    for row in range(0, blocks.shape[0], 512):
        for col in range(0, blocks.shape[1], 512):
            part = blocks[row : row + 512, col : col + 512]
            with (
                rasterio.open(path) as src,
                WarpedVRT(
                    src, crs=str(part.crs), transform=part.affine, width=512, height=512,
                    resampling=Resampling[kernel], nodata=nodata, dtype=dtype,
                ) as vrt,
            ):  # fmt: skip
                out[row : row + 512, col : col + 512] = vrt.read(1)
    return out[crop]


def computed(*args, **kw) -> dict[str, xr.Dataset]:
    return {name: load(*args, loader=name, **kw).compute(scheduler="synchronous") for name in LOADERS}


@pytest.mark.parametrize("crs", [ZONE, NEXT_ZONE, LAEA_EUROPE])
@pytest.mark.parametrize("place", ["middle", "nodata corner", "edge"])
@pytest.mark.parametrize("fixture", FIXTURES.values(), ids=FIXTURES)
def test_both_loaders_equal_the_warp(files, fixture, crs, place):
    box = block_at(crs, {"middle": 0.5, "nodata corner": 0.12, "edge": 0.97}[place])
    found = computed([item_of(files, fixture)], box, list(BANDS))
    xr.testing.assert_equal(*found.values())
    for band in BANDS:
        kernel = RESAMPLING.get(band, RESAMPLING["*"])
        want = warped(files / f"{band}.tif", box, kernel, dtype=DTYPES.get(band, "uint16"))
        assert place != "edge" or (want == 0).any()
        assert (want != 0).mean() > 0.02
        for name in LOADERS:
            assert found[name][band].dtype == want.dtype
            np.testing.assert_array_equal(found[name][band].values[0], want, err_msg=f"{name} {band}")


@pytest.mark.parametrize("kernel", ["nearest", "cubic"])
def test_kernels_and_windows_that_cut_blocks(files, kernel):
    box = block_at(NEXT_ZONE, 0.5).pad(300)[17:900, 44:1000]
    kernels = dict.fromkeys(BANDS, kernel)
    found = computed([item_of(files, FIXTURES["both spellings"])], box, list(BANDS), resampling=kernels)
    xr.testing.assert_equal(*found.values())
    for band in BANDS:
        want = warped(files / f"{band}.tif", box, kernel, dtype=DTYPES.get(band, "uint16"))
        np.testing.assert_array_equal(found["stackstac"][band].values[0], want)


def test_many_scenes_in_the_order_given(files):
    """Out of order, twice at one time, one elsewhere: no step of time is sorted, merged or dropped."""
    fixture = FIXTURES["epsg, STAC 1.0"]
    far = item_of(files, fixture, name="far")
    far["geometry"] = shapely.geometry.mapping(shapely.box(100, 10, 101, 11))
    far["bbox"] = [100, 10, 101, 11]
    items = [
        item_of(files, fixture, name="late", day="2021-09-01"),
        item_of(files, fixture, name="early", day="2020-09-01"),
        far,
        item_of(files, fixture, name="twin", day="2020-09-01"),
    ]
    found = computed(items, block_at(ZONE, 0.5), ["B04", "SCL"])
    xr.testing.assert_equal(*found.values())
    assert list(found["stackstac"]["scene"].values) == ["late", "early", "far", "twin"]
    assert list((found["stackstac"]["B04"] != 0).any(("y", "x")).values) == [True, True, False, True]
    lazy = {name: load(items, block_at(ZONE, 0.5).pad(512), ["B04", "SCL"], loader=name) for name in LOADERS}
    assert lazy["stackstac"].chunks == lazy["odc-stac"].chunks


def test_what_lies_beyond_the_outline_is_left_out_by_both(files):
    """The outline holds the scene's middle alone, the file goes on: no loader reads the blocks beyond."""
    item = item_of(files, FIXTURES["epsg, STAC 1.0"], shrink_deg=0.05)
    whole = block_at(ZONE, 0.5).pad(1024)
    found = computed([item], whole, ["B04", "B11"])
    xr.testing.assert_equal(*found.values())
    everything = warped(files / "B04.tif", whole, "bilinear")
    assert 0 < (found["stackstac"]["B04"].values[0] != 0).mean() < (everything != 0).mean()


def test_a_pystac_item_and_its_migrated_projection(files):
    """pystac turns proj:epsg into proj:code; stackstac alone then finds no CRS."""
    raw = item_of(files, FIXTURES["epsg, STAC 1.0"])
    item = pystac.Item.from_dict(copy.deepcopy(raw))
    assert "proj:epsg" not in item.properties
    box = block_at(ZONE, 0.5)
    from_pystac, from_raw = (load([i], box, ["B04"], loader="stackstac") for i in (item, raw))
    np.testing.assert_array_equal(from_pystac["B04"].values, from_raw["B04"].values)


@pytest.mark.parametrize("crs", ["EPSG:4326", ZONE])
@pytest.mark.parametrize("kernel", ["nearest", "bilinear", "cubic"])
def test_a_dem_in_degrees(files, crs, kernel):
    corner = from_origin(DEM_WEST, DEM_NORTH, 1 / 3600, 1 / 3600)
    if crs == "EPSG:4326":
        box = GeoBox((400, 500), corner @ corner.translation(-20, 30), crs)
    else:
        x, y = Transformer.from_crs(4326, crs, always_xy=True).transform(DEM_WEST + 0.1, DEM_NORTH - 0.1)
        box = GeoBox((512, 512), from_origin(x // 5120 * 5120, -(-y // 5120) * 5120, 10, 10), crs)
    item = dem_item(files)
    found = computed([item], box, ["elevation"], resampling={"elevation": kernel})
    xr.testing.assert_equal(*found.values())
    want = warped(files / "dem.tif", box, kernel, dtype="float32", nodata=NODATA["elevation"])
    assert np.isfinite(want).mean() > 0.2
    # the grid's own pixels are copied, where a warp interpolates with weights of rounding errors
    copied = crs == "EPSG:4326" and kernel != "nearest"
    for name in LOADERS:
        got = found[name]["elevation"].values[0]
        np.testing.assert_allclose(got, want, rtol=1e-6 if copied else 0, atol=1e-3 if copied else 0)


def dem_item(files):
    outline = shapely.box(DEM_WEST, DEM_NORTH - 0.2, DEM_WEST + 0.2, DEM_NORTH)
    return {
        "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": "dem", "links": [],
        "collection": "cop-dem-glo-30", "geometry": shapely.geometry.mapping(outline), "bbox": list(outline.bounds),
        "properties": {"datetime": "2021-04-22T00:00:00Z", "proj:epsg": 4326},
        "assets": {"data": {"href": str(files / "dem.tif"), "type": "image/tiff; application=geotiff"}},
    }  # fmt: skip


@pytest.mark.parametrize("crs", [ZONE, NEXT_ZONE])
def test_a_file_that_declares_no_nodata_has_it_all_the_same(files, tmp_path, crs):
    """Sentinel-2's 0 is no number to interpolate with, whether the provider's file says so or not."""
    item, bare = (item_of(files, FIXTURES["both spellings"]) for _ in range(2))
    for band in BANDS:
        with rasterio.open(files / f"{band}.tif") as src:
            _write(tmp_path / f"{band}.tif", src.read(1), src.crs, src.transform, None)
        bare["assets"][band]["href"] = str(tmp_path / f"{band}.tif")
    box = block_at(crs, 0.12)
    said, unsaid = computed([item], box, list(BANDS)), computed([bare], box, list(BANDS))
    for name in LOADERS:
        xr.testing.assert_equal(unsaid[name], said["odc-stac"])


def test_a_dem_of_whole_metres_without_nodata(files, tmp_path):
    with rasterio.open(files / "dem.tif") as src:
        _write(tmp_path / "dem.tif", src.read(1).astype("int16"), src.crs, src.transform, None)
    item = dem_item(files)
    item["assets"]["data"]["href"] = str(tmp_path / "dem.tif")
    x, y = Transformer.from_crs(4326, ZONE, always_xy=True).transform(DEM_WEST + 0.2, DEM_NORTH - 0.1)
    box = GeoBox((512, 512), from_origin(x // 5120 * 5120, -(-y // 5120) * 5120, 10, 10), ZONE)
    found = computed([item], box, ["elevation"])
    xr.testing.assert_equal(*found.values())
    heights = found["stackstac"]["elevation"].values
    assert 0.05 < np.isnan(heights).mean() < 0.95, "beyond its edge there is none, and none is made up"


# --- errors, and what a cluster needs ------------------------------------------------------------------------------


def test_a_grid_without_a_code_names_the_other_loader(files):
    laea = "+proj=laea +lat_0=48 +lon_0=14 +x_0=0 +y_0=0 +datum=WGS84 +units=m +no_defs"
    items = [item_of(files, FIXTURES["both spellings"])]
    with pytest.raises(
        CatalogError, match=r"by its EPSG code only, and '\+proj=laea .*; use loader 'odc-stac'"
    ):
        load(items, block_at(laea, 0.5), ["B04"], loader="stackstac")
    assert load(items, block_at(laea, 0.5), ["B04"])["B04"].values.any()
    with pytest.raises(CatalogError, match="Loader 'gdal' does not exist; loaders: odc-stac, stackstac"):
        load(items, block_at(ZONE, 0.5), ["B04"], loader="gdal")


def test_errors_and_the_log_are_the_same(files, tmp_path):
    bad = tmp_path / "B04.tif"
    data = (files / "B04.tif").read_bytes()
    bad.write_bytes(data[: len(data) // 2])
    item = item_of(files, FIXTURES["both spellings"])
    item["assets"]["B04"]["href"] = str(bad)
    box = block_at(ZONE, 0.5).pad(512)
    said, logs, cubes = {}, {}, {}
    for name in LOADERS:
        with pytest.raises(AssetReadError) as caught:
            load([item], box, ["B04"], loader=name).compute(scheduler="synchronous")
        said[name], logs[name] = str(caught.value), ReadLog()
        cube = load([item], box, ["B04", "B11"], log=logs[name], loader=name)
        cubes[name] = cube.compute(scheduler="synchronous")
    assert said["stackstac"].split(":")[0] == said["odc-stac"].split(":")[0]
    assert "asset 'B04' of item 'S2A_TEST'" in said["stackstac"]
    xr.testing.assert_equal(*cubes.values())
    assert cubes["stackstac"]["B04"].values.any()
    assert logs["stackstac"].read == logs["odc-stac"].read == {"S2A_TEST"}
    assert logs["stackstac"].lost == logs["odc-stac"].lost
    assert logs["stackstac"].lost


@pytest.mark.parametrize("name", LOADERS)
def test_a_lazy_cube_travels(files, name):
    cube = load([item_of(files, FIXTURES["both spellings"])], block_at(ZONE, 0.5), ["B04"], loader=name)
    there = pickle.loads(pickle.dumps(cube))
    np.testing.assert_array_equal(there["B04"].values, cube["B04"].values)


def test_terrain_is_the_same(files):
    x, y = Transformer.from_crs(4326, ZONE, always_xy=True).transform(DEM_WEST + 0.1, DEM_NORTH - 0.1)
    box = GeoBox((512, 512), from_origin(x // 5120 * 5120, -(-y // 5120) * 5120, 10, 10), ZONE)
    source = Source(name="local", endpoint=str(files), collection="cop-dem-glo-30", kind="dem")
    scene = scene_of(normalised(dem_item(files), source, folder=files, root=files), source, "dem")
    made = [terrain_block([scene], box, loader=name) for name in LOADERS]
    assert np.isfinite(made[0]).any()
    np.testing.assert_array_equal(*made)
