"""`load` against rasterio's WarpedVRT on the same block, and its promises about windows and failures."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT

from slidecube.catalog.errors import AssetReadError, CatalogError
from slidecube.catalog.load import ReadLog, load, on_lattice
from slidecube.catalog.scenes import Offset, Scene, SceneTable
from slidecube.pipeline.composite import Compositing
from slidecube.pipeline.masks import MaskRule
from slidecube.pipeline.tile import optical_layer

WEST, NORTH, SIDE_M = 399_960.0, 5_300_040.0, 30_720
LAEA = "+proj=laea +lat_0=48 +lon_0=14 +x_0=0 +y_0=0 +datum=WGS84 +units=m +no_defs"


def _write(path, resolution_m, seed, dtype="uint16"):
    n = SIDE_M // resolution_m
    rng = np.random.default_rng(seed)
    coarse = rng.integers(500, 6000, (n // 8 + 2, n // 8 + 2))
    data = np.kron(coarse, np.ones((8, 8), int))[:n, :n] + rng.integers(0, 300, (n, n))
    data[: n // 5, : n // 7] = 0  # nodata in a corner
    profile = {
        "driver": "GTiff", "width": n, "height": n, "count": 1, "dtype": dtype, "crs": "EPSG:32633", "nodata": 0,
        "transform": from_origin(WEST, NORTH, resolution_m, resolution_m), "tiled": True, "blockxsize": 256,
        "blockysize": 256, "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as out:
        out.write(data.astype(dtype) if dtype == "uint16" else (data % 12).astype(dtype), 1)
    return profile


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    assets = {}
    for band, resolution, dtype in (
        ("B04", 10, "uint16"),
        ("B11", 20, "uint16"),
        ("B09", 60, "uint16"),
        ("SCL", 20, "uint8"),
    ):
        _write(folder / f"{band}.tif", resolution, seed=resolution, dtype=dtype)
        assets[band] = {"href": str(folder / f"{band}.tif"), "type": "image/tiff; application=geotiff"}
    box = shapely.box(WEST, NORTH - SIDE_M, WEST + SIDE_M, NORTH)
    lonlat = GeoBox.from_bbox(box.bounds, crs="EPSG:32633", resolution=1000).extent.to_crs("EPSG:4326").geom
    item = {
        "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": "S2A_TEST", "collection": "x",
        "geometry": shapely.geometry.mapping(lonlat.buffer(0.01)), "bbox": list(lonlat.bounds), "links": [],
        "properties": {"datetime": "2021-07-01T10:00:00Z", "proj:code": "EPSG:32633", "proj:epsg": 32633},
        "assets": assets,
    }  # fmt: skip
    return Scene(
        id="S2A_TEST", role="optical", source="local", datetime=dt.datetime(2021, 7, 1, 10, tzinfo=dt.UTC),
        identity="S2A_TEST", datatake="D", version="03.01", offset=Offset(value=0.0, applied=False, reason="test"),
        bands={b: b for b in assets}, item=item,
    )  # fmt: skip


def _block(crs, at=0.5, resolution_m=10):
    """A block of the lattice that holds the point so far along the scene's diagonal."""
    centre = shapely.Point(WEST + SIDE_M * at, NORTH - SIDE_M * at)
    x, y = Transformer.from_crs("EPSG:32633", crs, always_xy=True).transform(centre.x, centre.y)
    step = 512 * resolution_m
    left, top = x // step * step, -(-y // step) * step
    return GeoBox((512, 512), from_origin(left, top, resolution_m, resolution_m), crs)


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:32632", LAEA])
@pytest.mark.parametrize("band", ["B04", "B11", "B09", "SCL"])
@pytest.mark.parametrize("kernel", ["nearest", "bilinear"])
@pytest.mark.parametrize("place", ["middle", "nodata corner", "outer corner"])
def test_equals_warped_vrt_on_the_same_block(scene, crs, band, kernel, place):
    box = _block(crs, {"middle": 0.5, "nodata corner": 0.1, "outer corner": 0.97}[place])
    got = load([scene], box, [band], resampling={band: kernel})[band].isel(time=0).values
    with (
        rasterio.open(scene.item["assets"][band]["href"]) as src,
        WarpedVRT(
            src,
            crs=str(box.crs),
            transform=box.affine,
            width=512,
            height=512,
            resampling=Resampling[kernel],
            nodata=0,
        ) as vrt,
    ):
        want = vrt.read(1)
    seen = (want != 0).mean()
    assert seen > 0.02
    assert place == "middle" or seen < 1
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("crs", ["EPSG:32633", LAEA])
def test_any_window_sees_the_pixels_of_the_lattice(scene, crs):
    """A window that starts anywhere, and cuts blocks, equals the same part of whole blocks."""
    box = _block(crs)
    big = box.pad(512)
    whole = load([scene], big, ["B04", "B11"])
    odd = big[300:1100, 77:900]
    part = load([scene], odd, ["B04", "B11"])
    for band in ("B04", "B11"):
        np.testing.assert_array_equal(part[band].values[0], whole[band].values[0, 300:1100, 77:900])


def test_a_truncated_asset_is_named_and_with_a_log_only_its_blocks_are_lost(scene, tmp_path):
    bad = tmp_path / "B04.tif"
    data = Path(scene.item["assets"]["B04"]["href"]).read_bytes()
    bad.write_bytes(data[: len(data) // 2])
    item = {**scene.item, "assets": {**scene.item["assets"], "B04": {"href": str(bad)}}}
    broken = Scene(**{f: getattr(scene, f) for f in Scene.__slots__} | {"item": item, "id": "S2A_TEST"})
    box = _block("EPSG:32633").pad(1024)
    with pytest.raises(AssetReadError, match="asset 'B04' of item 'S2A_TEST'"):
        load([broken], box, ["B04"]).compute(scheduler="synchronous")
    log = ReadLog()
    got = load([broken], box, ["B04"], log=log)["B04"].values[0]
    assert {(i, a) for i, a, _ in log.lost} == {("S2A_TEST", "B04")}
    good = load([scene], box, ["B04"])["B04"].values[0]
    kept = got != 0
    assert 0 < kept.mean() < (good != 0).mean()
    np.testing.assert_array_equal(got[kept], good[kept])
    missing = Scene(
        **{f: getattr(scene, f) for f in Scene.__slots__}
        | {"item": {**item, "assets": {**item["assets"], "B04": {"href": str(tmp_path / "nothing.tif")}}}}
    )
    with pytest.raises(AssetReadError, match=r"item 'S2A_TEST'.*nothing\.tif"):
        load([missing], box, ["B04"]).compute(scheduler="synchronous")


def test_unknown_band_and_no_scenes_are_one_line(scene):
    box = _block("EPSG:32633")
    with pytest.raises(CatalogError, match="no band B12; it has: B04, B09, B11, SCL"):
        load([scene], box, ["B12"])
    with pytest.raises(CatalogError, match="Band B13 cannot be loaded; bands: B01"):
        load([scene], box, ["B13"])
    with pytest.raises(CatalogError, match="No scenes"):
        load([], box, ["B04"])


@pytest.mark.parametrize("kernel", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    "origin", [(199_980.0, 3_600_000.0), (399_960.0, 5_300_040.0), (300_010.0, 5_300_030.0)]
)
@pytest.mark.parametrize("resolution", [20, 200])
def test_magnification_equals_the_warp_at_any_origin(tmp_path, scene, kernel, origin, resolution):
    """Where pixel positions are not exact in binary, GDAL's halves fall either way: the warp itself is used there."""
    rng = np.random.default_rng(7)
    path = tmp_path / "x.tif"
    profile = {
        "driver": "GTiff", "width": 300, "height": 300, "count": 1, "dtype": "uint16", "crs": "EPSG:32633", "nodata": 0,
        "transform": from_origin(*origin, resolution, resolution),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as out:
        out.write(rng.integers(0, 4, (300, 300)).astype("uint16") * 1001, 1)
    half = resolution / 2
    box = GeoBox(
        (512, 512), from_origin(origin[0] + 3 * half, origin[1] - 5 * half, half, half), "EPSG:32633"
    )
    item = {
        **scene.item,
        "assets": {"B11": {"href": str(path)}},
        "geometry": shapely.geometry.mapping(
            GeoBox((300, 300), profile["transform"], "EPSG:32633").extent.to_crs("EPSG:4326").geom.buffer(0.1)
        ),
    }
    got = load([item], box, ["B11"], resampling={"B11": kernel})["B11"].values[0]
    # the lattice puts a block's corner elsewhere: compare block by block as `load` reads them
    blocks, (rows, cols) = on_lattice(box, 512)
    want = np.zeros(blocks.shape, "uint16")
    for r in range(0, blocks.shape[0], 512):
        for c in range(0, blocks.shape[1], 512):
            part = blocks[r : r + 512, c : c + 512]
            with (
                rasterio.open(path) as src,
                WarpedVRT(
                    src,
                    crs="EPSG:32633",
                    transform=part.affine,
                    width=512,
                    height=512,
                    resampling=Resampling[kernel],
                    nodata=0,
                ) as vrt,
            ):
                want[r : r + 512, c : c + 512] = vrt.read(1)
    np.testing.assert_array_equal(got, want[rows, cols])


def test_an_asset_that_points_elsewhere_is_not_followed(scene, tmp_path):
    """A file named .tif whose content is a virtual raster of this machine's own files."""
    private = scene.item["assets"]["B04"]["href"]
    evil = tmp_path / "B04.tif"
    with rasterio.open(private) as src:
        t, n = src.transform, src.width
    evil.write_text(
        f'<VRTDataset rasterXSize="{n}" rasterYSize="{n}"><SRS>EPSG:32633</SRS>'
        f"<GeoTransform>{t.c}, {t.a}, 0, {t.f}, 0, {t.e}</GeoTransform>"
        f'<VRTRasterBand dataType="UInt16" band="1"><SimpleSource><SourceFilename>{private}</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with rasterio.open(evil) as src:
        assert src.read(1).any(), "GDAL itself follows it"
    item = {**scene.item, "assets": {"B04": {"href": str(evil)}}}
    with pytest.raises(AssetReadError, match="asset 'B04' of item 'S2A_TEST'"):
        load([item], _block("EPSG:32633"), ["B04"]).compute(scheduler="synchronous")


def test_pixels_beyond_the_outline_count_on_no_tile_size(scene):
    """The outline ends before a block's edge and the pixels go on: four small windows equal the large one."""
    box = _block("EPSG:32633").pad(0)[0:512, 0:512]
    large = GeoBox((1024, 1024), box.affine, "EPSG:32633")
    west, _, east, north = large.boundingbox.bbox
    outline = shapely.box(west - 5000, large.boundingbox.bottom - 5000, west + 4800, north + 5000)
    lonlat = shapely.transform(
        outline,
        lambda xy: np.column_stack(
            Transformer.from_crs("EPSG:32633", "EPSG:4326", always_xy=True).transform(*xy.T)
        ),
    )
    assert east > west + 5120
    short = replace(
        scene,
        item={**scene.item, "geometry": shapely.geometry.mapping(lonlat), "bbox": list(lonlat.bounds)},
    )
    mask = MaskRule(scl_classes=(11,), dilation_px=2)

    def made(window):
        touching = list(SceneTable(scenes=(short,)).touching(window))
        if not touching:
            return np.zeros(window.shape, "uint16")
        return optical_layer(
            touching, window, ["B04"], how=Compositing(method="median"), mask=mask, block_px=512
        )["B04"].values

    whole = made(large)
    assert whole[:, :512].any()
    for r in (0, 512):
        for c in (0, 512):
            np.testing.assert_array_equal(
                made(large[r : r + 512, c : c + 512]), whole[r : r + 512, c : c + 512]
            )
