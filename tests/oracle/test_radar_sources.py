"""Sentinel-1 items and files: real items of two providers, a real image in radar geometry, zeros that are nodata."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import replace

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.warp import reproject
from shapely.geometry import mapping

from slidecube.catalog.aoi import read_aoi
from slidecube.catalog.errors import CatalogError
from slidecube.catalog.items import identity_of, normalised, scene_of
from slidecube.catalog.load import load
from slidecube.catalog.radar import acquisition_of
from slidecube.catalog.scenes import Scene, Window
from slidecube.catalog.search import search
from slidecube.catalog.sources import SOURCES, find_source, https_options

NAN = float("nan")
OPERA = "OPERA_L2_RTC-S1_T102-217155-IW1_20240703T162341Z_20240703T220516Z_S1A_30_v1.0"


def real(repo_root, stem, source):
    document = json.loads((repo_root / "tests/data/stac_items" / f"{stem}.json").read_text())
    return [scene_of(normalised(i, SOURCES[source]), SOURCES[source], "radar") for i in document["features"]]


def scene(path, geobox, *, bands=("VV",), **properties):
    item = {
        "type": "Feature", "stac_version": "1.0.0", "id": "S1", "collection": "grd", "links": [],
        "geometry": mapping(geobox.geographic_extent.geom), "bbox": list(geobox.geographic_extent.boundingbox.bbox),
        "properties": {"datetime": "2020-01-01T00:00:00Z", **properties},
        "assets": {b.lower(): {"href": str(path), "type": "image/tiff"} for b in bands},
    }  # fmt: skip
    return Scene(
        id="S1", role="radar", source="local", datetime=dt.datetime(2020, 1, 1, tzinfo=dt.UTC), identity="S1",
        datatake="", version="", offset=None, bands={b: b.lower() for b in bands}, item=item,
    )  # fmt: skip


# --- items -------------------------------------------------------------------------------------------------------


def test_what_real_items_say(repo_root):
    (rtc,) = real(repo_root, "planetary-computer-sentinel-1-rtc", "planetary-computer/sentinel-1-rtc")
    (grd,) = real(repo_root, "earth-search-sentinel-1-grd", "earth-search/sentinel-1-grd")
    one, two = acquisition_of(rtc), acquisition_of(grd)

    assert (one.orbit_state, one.relative_orbit, one.polarisations) == ("descending", 51, ("VH", "VV"))
    assert (one.quantity, one.looks) == ("gamma0", 4.4)
    assert (two.orbit_state, two.relative_orbit, two.polarisations) == ("ascending", 56, ("HH",))
    assert two.quantity == "dn"


@pytest.mark.parametrize("drop", [(), ("sat:relative_orbit",), ("sat:relative_orbit", "sat:absolute_orbit")])
def test_a_relative_orbit_follows_from_the_product_s_name(repo_root, drop):
    for stem, source, want in (
        ("planetary-computer-sentinel-1-rtc", "planetary-computer/sentinel-1-rtc", 51),
        ("earth-search-sentinel-1-grd", "earth-search/sentinel-1-grd", 56),
    ):
        (found,) = real(repo_root, stem, source)
        said = {k: v for k, v in found.item["properties"].items() if k not in drop}
        assert acquisition_of(replace(found, item={**found.item, "properties": said})).relative_orbit == want


def test_an_item_that_does_not_say_is_refused_in_one_line(tmp_path):
    box = GeoBox((4, 4), Affine(10, 0, 500_000, 0, -10, 0), "EPSG:32632")
    with pytest.raises(CatalogError, match="'S1' does not say its relative orbit"):
        acquisition_of(scene(tmp_path / "x.tif", box))
    unknown = scene(tmp_path / "x.tif", box, **{"sat:relative_orbit": 5})
    with pytest.raises(CatalogError, match="whether its backscatter is gamma0 or sigma0"):
        acquisition_of(replace(unknown, item={**unknown.item, "collection": "s1"}))


def test_local_items_say_what_their_numbers_are(tmp_path):
    box = GeoBox((4, 4), Affine(10, 0, 500_000, 0, -10, 0), "EPSG:32632")
    for product, kind, want in (
        ("GRD", "float32", "sigma0"),
        ("GRD", "uint16", "dn"),
        ("RTC", "float32", "gamma0"),
    ):
        one = scene(tmp_path / "x.tif", box, **{"sat:relative_orbit": 5, "sar:product_type": product})
        one.item["assets"]["vv"]["raster:bands"] = [{"data_type": kind}]
        assert acquisition_of(one).quantity == want


def test_one_slice_processed_twice_is_one_acquisition_and_bursts_of_a_pass_are_one_overpass():
    name = "S1A_IW_GRDH_1SDV_20180716T004042_20180716T004107_022812_02792A"
    assert identity_of({"id": f"{name}_FD5B"}, "radar") == identity_of({"id": f"{name}_0000_rtc"}, "radar")
    later = OPERA.replace("20240703T220516Z", "20250101T000000Z")
    assert identity_of({"id": OPERA}, "radar") == identity_of({"id": later}, "radar")
    burst = OPERA.replace("217155-IW1", "217156-IW1").replace("T162341Z", "T162344Z")
    one, two = identity_of({"id": OPERA}, "radar"), identity_of({"id": burst}, "radar")
    assert one[0] != two[0]
    assert one[1] == two[1]


def test_bursts_of_opera_are_read_by_their_keys():
    source = find_source("asf/opera-rtc-s1", kind="radar")
    files = {
        f"{OPERA}_{p}": {"href": f"https://x.org/{p}.tif", "type": "image/tiff"} for p in ("VV", "VH", "mask")
    }
    said = {"datetime": "2024-07-03T16:23:41Z"}
    item = {"type": "Feature", "id": OPERA, "bbox": [0, 0, 1, 1], "properties": said, "assets": files}
    found = scene_of(normalised(item, source), source, "radar")

    assert set(found.bands) == {"VV", "VH"}
    said = acquisition_of(found)
    assert (said.relative_orbit, said.quantity, said.orbit_state) == (102, "gamma0", None)


def test_a_token_goes_to_its_own_provider_only():
    environment = {"EARTHDATA_TOKEN": "secret"}
    assert (
        https_options("https://x.org/a.tif", "asf/opera-rtc-s1", environment)["GDAL_HTTP_BEARER"] == "secret"
    )
    for href, source in (
        ("https://x.org/a.tif", "local"),
        ("s3://x/a.tif", "asf/opera-rtc-s1"),
        ("https://x.org/a.tif", "planetary-computer/sentinel-1-rtc"),
    ):
        assert https_options(href, source, environment) == {}
    assert https_options("https://x.org/a.tif", "asf/opera-rtc-s1", {}) == {}


def test_a_local_catalogue_of_real_items_is_searched(repo_root, tmp_path):
    document = json.loads(
        (repo_root / "tests/data/stac_items/planetary-computer-sentinel-1-rtc.json").read_text()
    )
    (tmp_path / "s1.json").write_text(json.dumps(document))
    window = Window(start=dt.date(2024, 4, 1), end=dt.date(2024, 4, 30))

    found = search(
        find_source(str(tmp_path / "s1.json"), kind="radar"),
        read_aoi((15.0, 30.2, 15.2, 30.4)),
        [window],
        role="radar",
    )

    assert [set(s.bands) for s in found] == [{"VV", "VH"}]
    assert acquisition_of(found[0]).quantity == "gamma0"


# --- files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grd(shared_data):
    folder = shared_data / "sentinel_cogs/sentinel-s1-l1c/GRD/2018/7/16/IW/DV"
    (path,) = folder.glob("*022812*/measurement/iw-vv.tiff")
    return path


@pytest.mark.parametrize("corner", [(680_000, 1_140_000), (785_000, 1_110_000)])
def test_a_real_image_with_control_points_is_warped_as_gdal_warps_the_whole_of_it(grd, corner):
    geobox = GeoBox((256, 256), Affine(200, 0, corner[0], 0, -200, corner[1]), "EPSG:32643")
    with rasterio.open(grd) as source:
        points, crs = source.gcps
        want = np.full(geobox.shape, np.nan, np.float32)
        reproject(
            source.read(1).astype(np.float32), want, gcps=points, src_crs=crs, src_nodata=0, dst_nodata=np.nan,
            dst_transform=geobox.affine, dst_crs="EPSG:32643", resampling=Resampling.bilinear,
        )  # fmt: skip

    found = load([scene(grd, geobox)], geobox, ["VV"], block_px=256)["VV"].values[0]

    assert 0.5 < (~np.isnan(want)).mean() < 1.01
    # GDAL approximates the polynomial along each line, to an eighth of a pixel, from other ends
    assert (np.isnan(found) != np.isnan(want)).mean() < 2e-4
    both = ~np.isnan(want) & ~np.isnan(found)
    assert np.median(np.abs(found - want)[both] / want[both]) < 0.01
    assert np.corrcoef(found[both], want[both])[0, 1] > 0.99


def test_control_points_come_to_lie_where_they_say(grd):
    """A point's own coordinates are within a pixel of where the fitted polynomial puts it: the scene is not flipped."""
    with rasterio.open(grd) as source:
        points, _ = source.gcps
        image = source.read(1)
    inner = [p for p in points if 100 < p.row < 737 and 100 < p.col < 1180][::17]
    for p in inner:
        box = GeoBox.from_bbox((p.x - 0.02, p.y - 0.02, p.x + 0.02, p.y + 0.02), crs=4326, resolution=0.0005)
        found = load([scene(grd, box)], box, ["VV"], block_px=128)["VV"].values[0]
        near = image[int(p.row) - 5 : int(p.row) + 6, int(p.col) - 5 : int(p.col) + 6]
        assert np.nanmean(found) == pytest.approx(near.mean(), rel=0.35)


@pytest.fixture
def rtc(tmp_path):
    """An RTC file as Planetary Computer's: -32768 outside the swath, and a part that is filled with zeros."""
    geobox = GeoBox((300, 300), Affine(10, 0, 500_000, 0, -10, 5_003_000), "EPSG:32632")
    power = np.full((300, 300), 0.25, np.float32)
    power[:, :60], power[200:] = -32768, 0
    power[10, 100] = np.nan
    with rasterio.open(
        tmp_path / "rtc.tif", "w", driver="GTiff", width=300, height=300, count=1, dtype="float32", nodata=-32768,
        crs="EPSG:32632", transform=geobox.affine,
    ) as out:  # fmt: skip
        out.write(power, 1)
    return tmp_path / "rtc.tif", geobox


@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:3035"])
def test_zeros_of_an_rtc_file_are_nodata_and_darken_no_rim(rtc, crs):
    path, geobox = rtc
    target = geobox if crs == "EPSG:32632" else geobox.to_crs(crs, resolution=10)

    found = load([scene(path, geobox)], target, ["VV"], block_px=512)["VV"].values[0]

    known = ~np.isnan(found)
    assert 0.3 < known.mean() < 0.6
    np.testing.assert_allclose(found[known], 0.25, rtol=1e-6)


def test_loaders_agree_on_radar(rtc):
    path, geobox = rtc
    one, two = (
        load([scene(path, geobox)], geobox, ["VV"], block_px=512, loader=loader)["VV"].values
        for loader in ("odc-stac", "stackstac")
    )
    np.testing.assert_array_equal(one, two)
