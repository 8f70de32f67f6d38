"""An asset read at another source against the same asset read at its own: equal to the bit, in any projection."""

from __future__ import annotations

import datetime as dt
import logging
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.transform import from_origin

from slidecube.catalog import read as read_module
from slidecube.catalog.errors import AssetReadError, CatalogError
from slidecube.catalog.load import LOADERS, ReadLog, load
from slidecube.catalog.read import shifted_dn
from slidecube.catalog.scenes import Alternate, Offset, Scene

WEST, NORTH, SIDE_M = 399_960.0, 5_300_040.0, 20_480
ZONE = "EPSG:32633"
LAEA = "+proj=laea +lat_0=48 +lon_0=14 +x_0=0 +y_0=0 +datum=WGS84 +units=m +no_defs"
BANDS = {"B04": 10, "B11": 20, "B09": 60, "SCL": 20}
IN_DN = Offset(value=-0.1, applied=False, reason="test")
REMOVED = Offset(value=0.0, applied=True, reason="test")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files of one scene twice: with the offset in the digital numbers, and without it, as two providers have them."""
    root = tmp_path_factory.mktemp("places")
    rng = np.random.default_rng(11)
    for band, resolution in BANDS.items():
        n = SIDE_M // resolution
        coarse = np.kron(rng.integers(1001, 6000, (n // 8 + 2, n // 8 + 2)), np.ones((8, 8), int))[:n, :n]
        dn = coarse + rng.integers(0, 300, (n, n))
        dn[rng.random((n, n)) < 0.01] = 0
        dn[: n // 5, : n // 7] = 0
        if band == "SCL":
            dn %= 12
        for name, offset_dn in (("in_dn", 0), ("removed", 0 if band == "SCL" else 1000)):
            (root / name).mkdir(exist_ok=True)
            values = np.where(dn == 0, 0, dn - offset_dn).astype("uint8" if band == "SCL" else "uint16")
            with rasterio.open(
                root / name / f"{band}.tif", "w", driver="GTiff", width=n, height=n, count=1, dtype=values.dtype,
                crs=ZONE, nodata=0 if name == "in_dn" else None, tiled=True, blockxsize=256, blockysize=256,
                transform=from_origin(WEST, NORTH, resolution, resolution), compress="deflate",
            ) as out:  # fmt: skip
                out.write(values, 1)
    return root


def scene_at(folder, offset, *others):
    lonlat = (
        GeoBox.from_bbox((WEST, NORTH - SIDE_M, WEST + SIDE_M, NORTH), crs=ZONE, resolution=1000)
        .extent.to_crs("EPSG:4326")
        .geom.buffer(0.01)
    )
    item = {
        "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": "S2A_TEST", "collection": "x",
        "geometry": shapely.geometry.mapping(lonlat), "bbox": list(lonlat.bounds), "links": [],
        "properties": {"datetime": "2021-07-01T10:00:00Z", "proj:epsg": 32633, "proj:code": ZONE},
        "assets": {b: {"href": str(folder / f"{b}.tif"), "type": "image/tiff"} for b in BANDS},
    }  # fmt: skip
    return Scene(
        id="S2A_TEST", role="optical", source="first", datetime=dt.datetime(2021, 7, 1, 10, tzinfo=dt.UTC),
        identity="i", datatake="d", version="05.00/x", offset=offset, bands={b: b for b in BANDS}, item=item,
        alternates=others,
    )  # fmt: skip


def stand_by(folder, offset, name="second"):
    hrefs = {band: str(folder / f"{band}.tif") for band in BANDS}
    return Alternate(source=name, id="other", version="05.00/y", offset=offset, hrefs=hrefs)


def block_at(crs, at, resolution_m=10):
    x, y = Transformer.from_crs(ZONE, crs, always_xy=True).transform(WEST + SIDE_M * at, NORTH - SIDE_M * at)
    step = 512 * resolution_m
    return GeoBox(
        (512, 512), from_origin(x // step * step, -(-y // step) * step, resolution_m, resolution_m), crs
    )


@pytest.mark.parametrize("resolution_m", [10, 40])
@pytest.mark.parametrize("crs", [ZONE, "EPSG:32632", LAEA])
@pytest.mark.parametrize("kernel", ["nearest", "bilinear", "cubic"])
@pytest.mark.parametrize("first", ["in_dn", "removed"])
def test_the_digital_numbers_are_those_of_the_first_source(
    places, tmp_path, crs, kernel, first, resolution_m
):
    offsets = {"in_dn": IN_DN, "removed": REMOVED}
    second = "removed" if first == "in_dn" else "in_dn"
    whole = scene_at(places / first, offsets[first])
    broken = scene_at(tmp_path, offsets[first], stand_by(places / second, offsets[second]))
    kernels = {"*": kernel, "SCL": "nearest"}
    for at in (0.5, 0.12, 0.97):
        box, log = block_at(crs, at, resolution_m), ReadLog()
        want = load([whole], box, list(BANDS), resampling=kernels)
        got = load([broken], box, list(BANDS), resampling=kernels, log=log)
        for band in BANDS:
            assert want[band].values.any()
            np.testing.assert_array_equal(got[band].values, want[band].values, err_msg=f"{band} at {at}")
        assert {(s, a, src) for s, a, src, _ in log.substituted} == {("S2A_TEST", b, "second") for b in BANDS}
        assert all("No such file" in why for *_, why in log.substituted)
        assert not log.lost
        assert log.read == {"S2A_TEST"}


@given(
    dn=arrays("uint16", (5, 7), elements=st.integers(0, 65535)),
    shift=st.sampled_from([-1000, 1000, 0, -70000, 70000]),
)
@settings(max_examples=200)
def test_what_is_seen_stays_seen_and_nodata_stays_nodata(dn, shift):
    moved = shifted_dn(dn, shift, 0)
    assert moved.dtype == dn.dtype
    np.testing.assert_array_equal(moved == 0, dn == 0)
    exact = dn.astype(int) + shift
    fits = (dn > 0) & (exact >= 1) & (exact <= 65535)
    np.testing.assert_array_equal(moved[fits], exact[fits])
    assert set(np.unique(moved[(dn > 0) & ~fits])) <= {1, 65535}


def test_the_places_are_tried_in_their_order(places, tmp_path):
    (tmp_path / "half").mkdir()
    data = (places / "in_dn" / "B04.tif").read_bytes()
    (tmp_path / "half" / "B04.tif").write_bytes(data[: len(data) // 2])
    # the half file's second part cannot be read; of the first source there is nothing
    third = stand_by(places / "in_dn", IN_DN, "third")
    scene = scene_at(tmp_path, IN_DN, stand_by(tmp_path / "half", IN_DN), third)
    box = block_at(ZONE, 0.5).pad(512 * 2)
    whole = load([scene_at(places / "in_dn", IN_DN)], box, ["B04"])["B04"].values
    log = ReadLog()
    np.testing.assert_array_equal(load([scene], box, ["B04"], log=log)["B04"].values, whole)
    assert "third" in {src for _, _, src, _ in log.substituted}
    log = ReadLog()
    two = scene_at(tmp_path, IN_DN, stand_by(places / "removed", REMOVED), third)
    np.testing.assert_array_equal(load([two], box, ["B04"], log=log)["B04"].values, whole)
    assert {src for _, _, src, _ in log.substituted} == {"second"}

    half = replace(scene, alternates=(stand_by(tmp_path / "half", IN_DN),))
    log = ReadLog()
    got = load([half], box, ["B04"], log=log)["B04"].values
    ((_, _, why),) = {(s, a, w.split(":")[0]) for s, a, w in log.lost}
    assert "; nor from second: " in next(iter(log.lost))[2]
    assert why
    assert 0 < (got != 0).mean() < (whole != 0).mean(), "blocks that the half file holds are still read"
    with pytest.raises(AssetReadError, match=r"asset 'B04' of item 'S2A_TEST': .*; nor from second: "):
        load([half], box, ["B04"]).compute(scheduler="synchronous")


def test_a_band_that_the_other_lacks_is_lost(places, tmp_path):
    lacking = stand_by(places / "in_dn", IN_DN)
    scene = scene_at(tmp_path, IN_DN, replace(lacking, hrefs={"B11": lacking.hrefs["B11"]}))
    log = ReadLog()
    load([scene], block_at(ZONE, 0.5), ["B04", "B11"], log=log).compute(scheduler="synchronous")
    assert {asset for _, asset, _ in log.lost} == {"B04"}
    assert {asset for _, asset, _, _ in log.substituted} == {"B11"}


@pytest.mark.parametrize("loader", LOADERS)
def test_without_a_log_it_is_told_on_the_log_of_python(places, tmp_path, caplog, loader):
    scene = scene_at(tmp_path, IN_DN, stand_by(places / "removed", REMOVED))
    box = block_at(ZONE, 0.5)
    with caplog.at_level(logging.WARNING):
        got = load([scene], box, ["B04"], loader=loader)["B04"].values
    np.testing.assert_array_equal(got, load([scene_at(places / "in_dn", IN_DN)], box, ["B04"])["B04"].values)
    assert "asset 'B04' of item 'S2A_TEST' is read from second: " in caplog.text


@pytest.mark.parametrize("loader", LOADERS)
def test_a_provider_that_gives_no_token_is_one_that_cannot_be_read(places, monkeypatch, loader):
    """Signing happens when a block is read; without a token nothing of that provider can be."""

    def sign(href, source):
        if source == "first":
            raise CatalogError("no access token")
        return href

    monkeypatch.setattr(read_module, "sign_href", sign)
    log = ReadLog()
    alone = scene_at(places / "in_dn", IN_DN)
    load([alone], block_at(ZONE, 0.5), ["B04"], log=log, loader=loader).compute(scheduler="synchronous")
    assert log.lost == {("S2A_TEST", "B04", "no access token")}
    log = ReadLog()
    helped = replace(alone, alternates=(stand_by(places / "removed", REMOVED),))
    got = load([helped], block_at(ZONE, 0.5), ["B04"], log=log, loader=loader)["B04"].values
    assert got.any()
    assert log.substituted == {("S2A_TEST", "B04", "second", "no access token")}
