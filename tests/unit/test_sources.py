"""The table of sources against real items, and the offset rule over every one of them."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter

import pystac
import pytest

from slidecube.catalog import sources as module
from slidecube.catalog.errors import CatalogError, OffsetError
from slidecube.catalog.sources import (
    REFLECTANCE_BANDS,
    SOURCES,
    asset_bands,
    baseline_of,
    find_source,
    offset_of,
    sign_href,
)

L2A_BANDS = {"B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12", "SCL"}

# Written by hand from what each provider says of its pixels, not from the code: (value, applied), None = refused.
PRESENT, REMOVED, NEVER = (-0.1, False), (0.0, True), (0.0, False)
ALWAYS_ON = {
    "earth-search-sentinel-2-l2a.json": [REMOVED, REMOVED, NEVER],
    "earth-search-sentinel-2-c1-l2a.json": [PRESENT, PRESENT, None, None],
    "earth-search-sentinel-2-l1c.json": [PRESENT],
    "earth-search-v0-sentinel-s2-l2a-cogs.json": [REMOVED, NEVER, NEVER],
    "planetary-computer-sentinel-2-l2a.json": [NEVER, NEVER, PRESENT, PRESENT],
    "earth-search-cop-dem-glo-30.json": [None, None],
    "planetary-computer-cop-dem-glo-30.json": [None],
    "planetary-computer-sentinel-1-rtc.json": [None],
    "earth-search-sentinel-1-grd.json": [None],
}
ALL_REAL = {
    "stac_items/odc_stac/S2A_28QCH_20200714_0_L2A.json": {NEVER: 1},
    "stac_items/odc_stac/S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531.json": {NEVER: 1},
    "stac_items/odc_stac/S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531_raster_ext.json": {NEVER: 1},
    "stac_items/odc_stac/site1-20200606-tall-strip-africa.geojson": {NEVER: 9},
    "stac_items/odc_stac/site2-2020_jun_jul-35MNM.geojson": {NEVER: 13},
    "stac_items/pystac_client_cassettes/earthsearch_cop-dem-glo-30.json": {None: 10},
    "stac_items/pystac_client_cassettes/earthsearch_sentinel-1-grd.json": {None: 3},
    "stac_items/pystac_client_cassettes/earthsearch_sentinel-2-c1-l2a.json": {PRESENT: 6, None: 10},
    "stac_items/pystac_client_cassettes/earthsearch_sentinel-2-l1c.json": {PRESENT: 5},
    "stac_items/pystac_client_cassettes/earthsearch_sentinel-2-l2a.json": {REMOVED: 7},
    "stac_items/pystac_client_cassettes/earthsearch_sentinel-s2-l2a-cogs.json": {REMOVED: 1},
    "stac_items/pystac_client_cassettes/pc_sentinel-2-l2a.json": {NEVER: 33},
    "stac_items/stac_geoparquet/cop-dem-glo-30-pc.json": {None: 4},
    "stac_items/stac_geoparquet/sentinel-1-rtc-pc.json": {None: 4},
    "stac_items/stac_geoparquet/sentinel-2-item.json": {PRESENT: 1},
    "stac_items/stac_geoparquet/sentinel-2-l2a-pc.json": {PRESENT: 4},
}


def items_in(document):
    """Every STAC item in a document, however deep, also in recorded HTTP bodies."""
    if isinstance(document, str) and document[:1] in "{[" and len(document) > 200:
        document = json.loads(document)
    if isinstance(document, list):
        return [item for part in document for item in items_in(part)]
    if not isinstance(document, dict):
        return []
    if document.get("type") == "Feature":
        return [document]
    return [item for part in document.values() for item in items_in(part)]


def decided(item):
    try:
        offset = offset_of(item)
    except OffsetError:
        return None
    assert offset.reason
    return (offset.value, offset.applied)


@pytest.fixture(scope="session")
def real(repo_root):
    folder = repo_root / "tests" / "data" / "stac_items"

    def read(name, i=0):
        return copy.deepcopy(items_in(json.loads((folder / name).read_text()))[i])

    read.folder = folder
    return read


def in_new_spelling(item):
    new = copy.deepcopy(item)
    if new["properties"].get("proj:epsg"):
        new["properties"]["proj:code"] = f"EPSG:{new['properties'].pop('proj:epsg')}"
    return new


# --- offsets ------------------------------------------------------------------------------------------------------


def test_the_table_names_every_file(real):
    assert {p.name for p in real.folder.glob("*.json")} == set(ALWAYS_ON)


@pytest.mark.parametrize("name", ALWAYS_ON)
def test_offsets_of_real_items(real, name):
    items = items_in(json.loads((real.folder / name).read_text()))
    assert [decided(item) for item in items] == ALWAYS_ON[name]
    assert [decided(in_new_spelling(item)) for item in items] == ALWAYS_ON[name]


@pytest.mark.parametrize("name", ALWAYS_ON)
def test_offsets_survive_pystac(real, name):
    """pystac rewrites raster:bands and proj:epsg on reading; the decision must not move."""
    for item, expected in zip(
        items_in(json.loads((real.folder / name).read_text())), ALWAYS_ON[name], strict=True
    ):
        item.setdefault("geometry", None)
        item.setdefault("links", [])
        item.setdefault("assets", {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert decided(pystac.Item.from_dict(item)) == expected


def test_offsets_of_every_real_item(shared_data):
    found = {}
    for path in sorted((shared_data / "stac_items").rglob("*json")):
        items = items_in(json.loads(path.read_text()))
        if items:
            found[path.relative_to(shared_data).as_posix()] = dict(Counter(decided(item) for item in items))
    assert found == ALL_REAL


def test_the_reason_names_the_rule(real):
    assert "boa_offset_applied is true" in offset_of(real("earth-search-sentinel-2-l2a.json")).reason
    assert "below 04.00" in offset_of(real("planetary-computer-sentinel-2-l2a.json")).reason
    assert "raster offset" in offset_of(real("earth-search-sentinel-2-c1-l2a.json")).reason


def test_earth_search_with_the_flag_false_takes_its_raster_offset(real):
    item = real("earth-search-sentinel-2-l2a.json")
    item["properties"]["earthsearch:boa_offset_applied"] = False
    assert decided(item) == PRESENT
    for asset in item["assets"].values():
        for band in asset.get("raster:bands", []):
            band.pop("offset", None)
    assert decided(item) is None


def test_earth_search_without_a_flag_is_refused(real):
    item = real("earth-search-sentinel-2-l2a.json")
    del item["properties"]["earthsearch:boa_offset_applied"]
    with pytest.raises(OffsetError, match=r"undecided .*baseline 05.11.*absent"):
        offset_of(item)


def test_assets_that_disagree_are_refused(real):
    item = real("earth-search-sentinel-2-c1-l2a.json")
    item["assets"]["red"]["raster:bands"][0]["offset"] = 0
    with pytest.raises(OffsetError, match="several offsets"):
        offset_of(item)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("00.01", NEVER),
        ("02.07", NEVER),
        ("03.01", NEVER),
        ("3.01", NEVER),
        ("04.00", PRESENT),
        ("4.00", PRESENT),
        (4.0, PRESENT),
        ("05.00", PRESENT),
        ("05.10", PRESENT),
        (5.1, PRESENT),
        ("10.00", PRESENT),  # a string comparison would call it older than 04.00
        ("99.99", None),  # Sen2Cor by hand
        ("", None),
        (None, None),
    ],
)
def test_baselines_are_numbers(real, baseline, expected):
    item = real("planetary-computer-sentinel-2-l2a.json", 2)
    for key in ("s2:product_uri", "s2:granule_id", "s2:datastrip_id", "s2:datatake_id"):
        del item["properties"][key]
    for asset in item["assets"].values():
        asset["href"] = asset["href"].replace("_N0400_", "_")
    item["properties"]["s2:processing_baseline"] = baseline
    assert decided(item) == expected


def test_the_product_name_gives_the_baseline_where_no_property_does(real):
    item = real("planetary-computer-sentinel-2-l2a.json", 2)
    del item["properties"]["s2:processing_baseline"]
    assert baseline_of(item) == (4, 0)
    assert decided(item) == PRESENT


def test_the_acquisition_date_decides_nothing(real):
    """Collection 1 reprocesses old acquisitions: their DN have the offset."""
    item = real("planetary-computer-sentinel-2-l2a.json", 2)
    item["properties"]["datetime"] = "2016-06-12T18:29:19Z"
    assert decided(item) == PRESENT
    old = real("planetary-computer-sentinel-2-l2a.json", 0)
    old["properties"]["datetime"] = "2025-06-12T18:29:19Z"
    assert decided(old) == NEVER


def test_the_property_decides_before_the_name(real):
    item = real("planetary-computer-sentinel-2-l2a.json", 2)
    item["properties"]["s2:processing_baseline"] = "02.14"
    assert decided(item) == NEVER


def test_two_flags_that_disagree_are_refused(real):
    item = real("earth-search-sentinel-2-l2a.json")
    item["properties"]["sentinel:boa_offset_applied"] = False
    with pytest.raises(OffsetError, match="disagree"):
        offset_of(item)


@pytest.mark.parametrize("value", [True, "true", "True", 1])
def test_flags_of_every_spelling(real, value):
    item = real("earth-search-sentinel-2-l2a.json")
    item["properties"]["earthsearch:boa_offset_applied"] = value
    assert decided(item) == REMOVED


def test_a_true_flag_on_an_old_baseline_removed_nothing(real):
    item = real("earth-search-sentinel-2-l2a.json", 2)
    item["properties"]["earthsearch:boa_offset_applied"] = True
    assert decided(item) == NEVER


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        ("2020-08-28T04:30:59Z", NEVER),
        ("2022-01-24T23:59:59Z", NEVER),
        ("2022-01-25T00:00:00Z", None),
        (None, None),
    ],
)
def test_version_0_without_flag_and_baseline_goes_by_its_creation(real, created, expected):
    item = real("earth-search-v0-sentinel-s2-l2a-cogs.json", 2)
    item["properties"]["sentinel:product_id"] = ""
    item["properties"]["created"] = created
    assert decided(item) == expected


def test_version_0_with_a_new_baseline_and_no_flag_is_refused(real):
    item = real("earth-search-v0-sentinel-s2-l2a-cogs.json", 0)
    del item["properties"]["sentinel:boa_offset_applied"]
    assert decided(item) is None


def test_esas_own_files_in_a_local_catalogue():
    item = {
        "type": "Feature",
        "id": "S2A_T01WCP_20230625T234624_L2A",
        "properties": {
            "platform": "sentinel-2a",
            "s2:processing_baseline": "05.09",
            "proj:code": "EPSG:32601",
        },
        "assets": {"red": {"href": "./R10m/B04.jp2", "type": "image/jp2", "eo:bands": [{"name": "B04"}]}},
    }
    assert decided(item) == PRESENT
    # the same file rewritten by somebody: nobody knows what they did to the DN
    item["assets"]["red"].update(href="./B04.tif", type="image/tiff; application=geotiff")
    assert decided(item) is None
    item["properties"]["s2:product_uri"] = "S2A_MSIL2A_20230625T234621_N0509_R073_T01WCP_20230626T022157.SAFE"
    assert decided(item) == PRESENT
    item["assets"]["red"]["raster:bands"] = [{"scale": 0.0001, "offset": 0}]
    with pytest.raises(OffsetError, match="harmonised"):
        offset_of(item)


def test_what_is_no_item_is_refused():
    with pytest.raises(OffsetError, match="not a STAC item"):
        offset_of(7)
    with pytest.raises(OffsetError, match="not a Sentinel-2 item"):
        offset_of({})


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "bands"),
    [
        ("earth-search/sentinel-2-l2a", "earth-search-sentinel-2-l2a.json", L2A_BANDS),
        ("earth-search/sentinel-2-c1-l2a", "earth-search-sentinel-2-c1-l2a.json", L2A_BANDS | {"CLD"}),
        ("earth-search/sentinel-2-l1c", "earth-search-sentinel-2-l1c.json", (L2A_BANDS | {"B10"}) - {"SCL"}),
        ("planetary-computer/sentinel-2-l2a", "planetary-computer-sentinel-2-l2a.json", L2A_BANDS),
        ("earth-search/cop-dem-glo-30", "earth-search-cop-dem-glo-30.json", {"elevation"}),
        ("planetary-computer/cop-dem-glo-30", "planetary-computer-cop-dem-glo-30.json", {"elevation"}),
    ],
)
def test_the_table_agrees_with_real_items(real, source, name, bands):
    """The same asset keys whether the table names them or the item is asked."""
    item = real(name)
    table = SOURCES[source]
    assert set(table.bands) == bands
    assert item["collection"] == table.collection
    assert asset_bands(item, table) == dict(table.bands)
    # an asset "cloud" may be anything, or lie in a bucket whose readers pay: only the table knows it
    assert asset_bands(item) == {band: key for band, key in table.bands.items() if band != "CLD"}


def test_every_source_is_whole():
    for name, source in SOURCES.items():
        assert name == source.name
        assert source.endpoint.startswith("https://")
        assert source.licence
        assert source.attribution
        assert (source.mask_asset == "SCL") == ("SCL" in source.bands)
        assert source.scale == (1e-4 if source.kind == "optical" else 1.0)
    assert {s.name for s in SOURCES.values() if s.kind == "dem"} == {
        "earth-search/cop-dem-glo-30",
        "planetary-computer/cop-dem-glo-30",
    }
    assert {s.name: s.quantity for s in SOURCES.values() if s.kind == "radar"} == {
        "planetary-computer/sentinel-1-rtc": "gamma0",
        "earth-search/sentinel-1-grd": "dn",
        "cdse/sentinel-1-grd": "dn",
        "asf/opera-rtc-s1": "gamma0",
    }
    assert [s.name for s in SOURCES.values() if s.reader_pays] == [
        "earth-search/sentinel-2-l1c",
        "earth-search/sentinel-1-grd",
    ]
    assert len(SOURCES) == 12


def test_bands_of_cdse_items_are_the_native_resolution():
    """Every band comes at several resolutions, under the same name in STAC 1.1 `bands`."""
    assets = {}
    for band in ("B02", "B05", "SCL"):
        for resolution in (10, 20, 60):
            assets[f"{band}_{resolution}m"] = {
                "href": f"s3://eodata/x/{band}_{resolution}m.jp2",
                "type": "image/jp2",
                "bands": [{"name": band}] if band != "SCL" else None,
                "raster:offset": -0.1,
            }
    assets["TCI_10m"] = {
        "href": "s3://eodata/x/TCI.jp2",
        "type": "image/jp2",
        "bands": [{"name": b} for b in "RGB"],
    }
    item = {"id": "S2B_MSIL2A_x", "properties": {}, "assets": assets}
    assert asset_bands(item) == {"B02": "B02_10m", "B05": "B05_20m", "SCL": "SCL_20m"}
    assert asset_bands(item, SOURCES["cdse/sentinel-2-l2a"])["SCL"] == "SCL_20m"


def test_cog_before_jpeg2000_twin_and_no_pictures(real):
    item = real("earth-search-sentinel-2-l2a.json")
    keys = list(item["assets"])
    item["assets"] = {key: item["assets"][key] for key in reversed(keys)}
    bands = asset_bands(item)
    assert bands["B04"] == "red"
    assert not {"visual", "thumbnail", "preview", "aot", "wvp"} & set(bands.values())
    assert set(bands) >= set(REFLECTANCE_BANDS) - {"B10"}


def test_common_names_that_name_several_bands_decide_nothing():
    asset = {"href": "x.tif", "type": "image/tiff", "eo:bands": [{"name": "nr 6", "common_name": "rededge"}]}
    assert asset_bands({"id": "x", "assets": {"somewhere": asset}}) == {}
    asset["eo:bands"][0]["common_name"] = "swir16"
    assert asset_bands({"id": "x", "assets": {"somewhere": asset}}) == {"B11": "somewhere"}


# --- names and signing --------------------------------------------------------------------------------------------


def test_unknown_sources_list_all():
    with pytest.raises(CatalogError, match="did you mean 'earth-search/sentinel-2-l2a'") as caught:
        find_source("earth-search/sentinel2-l2a")
    assert all(name in str(caught.value) for name in SOURCES)
    with pytest.raises(
        CatalogError, match="holds dem data, not optical; use one of earth-search/sentinel-2-l2a"
    ):
        find_source("earth-search/cop-dem-glo-30")


def test_local_catalogues_and_other_apis(tmp_path):
    local = find_source(str(tmp_path))
    assert local.is_local
    assert local.mask_asset == "SCL"
    assert find_source(str(tmp_path), kind="dem").nodata is None
    api = find_source("https://stac.example.org/v1/collections/s2")
    assert (api.endpoint, api.collection, api.is_local) == ("https://stac.example.org/v1", "s2", False)


def test_only_planetary_computer_is_signed(real, monkeypatch):
    monkeypatch.setattr(module._planetary_computer(), "sign_url", lambda href: f"{href}?sig=secret")
    item = real("planetary-computer-sentinel-2-l2a.json")
    tiles = item["assets"]["tilejson"]["href"]
    assert sign_href(tiles, SOURCES["planetary-computer/sentinel-2-l2a"]) == tiles
    href = item["assets"]["B04"]["href"]
    assert sign_href(href, "planetary-computer/sentinel-2-l2a").endswith("?sig=secret")
    assert sign_href(href, "earth-search/sentinel-2-l2a") == href
    assert sign_href(href, "/data/saved-search.json").endswith("?sig=secret")
    assert sign_href("https://other.blob.core.windows.net/x.tif", "/data/catalog.json").endswith("x.tif")
    trap = "https://evil.example.org/x.blob.core.windows.net/B04.tif"
    assert sign_href(trap, "planetary-computer/sentinel-2-l2a") == trap


def test_a_refused_token_is_one_line(real, monkeypatch):
    def fail(_):
        raise OSError("no\nroute to host")

    monkeypatch.setattr(module._planetary_computer(), "sign_url", fail)
    href = real("planetary-computer-sentinel-2-l2a.json")["assets"]["B04"]["href"]
    with pytest.raises(CatalogError, match=r"no access token .*: no route to host"):
        sign_href(href, "planetary-computer/sentinel-2-l2a")
