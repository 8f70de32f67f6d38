"""Which acquisition an item is, and the form in which it is kept."""

from __future__ import annotations

import copy
import datetime as dt
import json
from pathlib import Path

import pytest

from slidecube.catalog.errors import CatalogError
from slidecube.catalog.items import (
    datetime_of,
    identity_of,
    is_partial,
    mgrs_tile,
    normalised,
    platform_of,
    scene_of,
    version_of,
)
from slidecube.catalog.sources import SOURCES, find_source

PC = SOURCES["planetary-computer/sentinel-2-l2a"]
ES = SOURCES["earth-search/sentinel-2-l2a"]


@pytest.fixture(scope="session")
def real(repo_root):
    folder = repo_root / "tests" / "data" / "stac_items"

    def read(name, i=0):
        return copy.deepcopy(json.loads((folder / f"{name}.json").read_text())["features"][i])

    return read


# --- identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "i", "identity", "version"),
    [
        (
            "earth-search-sentinel-2-l2a",
            0,
            "sentinel-2b/20EPT/20250731T131909/20250731T131905",
            "05.11/2025-07-31T14:39:19Z",
        ),
        (
            "earth-search-sentinel-2-c1-l2a",
            0,
            "sentinel-2b/20EPT/20250731T131909/20250731T131905",
            "05.11/2025-07-31T14:39:19Z",
        ),
        (
            "planetary-computer-sentinel-2-l2a",
            0,
            "sentinel-2a/60VUK/20190101T000001/20181231T235957",
            "02.12/2020-10-07T21:46:52Z",
        ),
        (
            "planetary-computer-sentinel-2-l2a",
            2,
            "sentinel-2b/24XWR/20220612T182919/20220612T182920",
            "04.00/2022-06-13T12:32:51Z",
        ),
    ],
)
def test_identity_of_real_items(real, name, i, identity, version):
    item = real(name, i)
    assert identity_of(item, "optical") == (identity, "_".join(identity.split("/")[::2][:2]))
    assert version_of(item) == version


def test_two_providers_call_one_acquisition_the_same(real):
    l2a, c1, l1c = (real(f"earth-search-sentinel-2-{n}") for n in ("l2a", "c1-l2a", "l1c"))
    assert len({identity_of(item, "optical") for item in (l2a, c1, l1c)}) == 1


def test_identity_is_parsed_from_names_and_paths(real):
    """A Planetary Computer item without its s2: properties still says all in its id and granule folder."""
    item = real("planetary-computer-sentinel-2-l2a", 0)
    whole = identity_of(item, "optical")
    item["properties"] = {"datetime": item["properties"]["datetime"]}
    assert identity_of(item, "optical") == whole
    assert version_of(item) == "02.12/2020-10-07T21:46:52Z"


def test_an_item_that_does_not_say_is_refused(real):
    with pytest.raises(CatalogError, match="does not say its datastrip sensing start; add s2:product_uri"):
        identity_of(real("earth-search-v0-sentinel-s2-l2a-cogs"), "optical")
    with pytest.raises(CatalogError, match="platform, MGRS tile, datatake, datastrip"):
        identity_of({"id": "x", "properties": {}}, "optical")


def test_other_roles_are_what_their_id_says(real):
    assert (
        identity_of(real("earth-search-cop-dem-glo-30"), "dem")[0]
        == "Copernicus_DSM_COG_10_S90_00_W180_00_DEM"
    )
    assert identity_of(real("planetary-computer-sentinel-1-rtc"), "radar")[1] == "425458"


@pytest.mark.parametrize(
    ("item", "tile"),
    [
        ({"properties": {"grid:code": "MGRS-1WCP"}}, "01WCP"),
        ({"properties": {"grid:code": "MGRS-20EPT"}}, "20EPT"),
        ({"properties": {"grid:code": "MGRS-T20QRF"}}, "20QRF"),
        ({"properties": {"s2:mgrs_tile": "60VUK"}}, "60VUK"),
        ({"properties": {"mgrs:utm_zone": 1, "mgrs:latitude_band": "W", "mgrs:grid_square": "CP"}}, "01WCP"),
        ({"id": "S2A_29RKH_20200219_0_L2A", "properties": {}}, "29RKH"),
        ({"id": "S2A_1WCP_20200219_0_L2A", "properties": {}}, "01WCP"),
        ({"id": "S2B_T13TDE_20250731T175521_L2A", "properties": {}}, "13TDE"),
        ({"id": "S2A_OPER_MSI_L2A_TL_2APS_20240108T121951_A044635_T34VEL", "properties": {}}, "34VEL"),
        ({"id": "nothing", "properties": {}}, None),
    ],
)
def test_mgrs_tiles(item, tile):
    assert mgrs_tile(item) == tile


@pytest.mark.parametrize(
    ("platform", "id_", "expected"),
    [
        ("Sentinel-2B", "", "sentinel-2b"),
        ("sentinel-2c", "", "sentinel-2c"),
        ("S2A", "", "sentinel-2a"),
        ("", "S2C_MSIL2A_20250101T000000_N0511_R001_T01WCP_20250101T000000", "sentinel-2c"),
        ("landsat-8", "LC08", None),
    ],
)
def test_platforms(platform, id_, expected):
    assert platform_of({"id": id_, "properties": {"platform": platform}}) == expected


def test_versions_sort_from_old_to_new(real):
    item = real("planetary-computer-sentinel-2-l2a", 0)
    versions = []
    for baseline, made in (
        ("02.12", "2021"),
        ("02.14", "2020"),
        ("05.00", "2020"),
        ("05.10", "2023"),
        ("05.10", "2024"),
    ):
        item["properties"] |= {
            "s2:processing_baseline": baseline,
            "s2:generation_time": f"{made}-01-01T00:00:00Z",
        }
        item["properties"] |= {
            "s2:product_uri": "",
            "s2:granule_id": "",
            "s2:datatake_id": "",
            "s2:datastrip_id": "",
        }
        versions.append(version_of(item))
    assert versions == sorted(versions)


def test_datetimes():
    item = {"id": "x", "properties": {"datetime": "2025-07-31T15:19:22.930+02:00"}}
    assert datetime_of(item) == dt.datetime(2025, 7, 31, 13, 19, 22, 930_000, dt.UTC)
    span = {"id": "x", "properties": {"datetime": None, "start_datetime": "2024-04-19 04:59:04"}}
    assert datetime_of(span) == dt.datetime(2024, 4, 19, 4, 59, 4, tzinfo=dt.UTC)
    with pytest.raises(CatalogError, match="no usable datetime"):
        datetime_of({"id": "x", "properties": {"datetime": "yesterday"}})


# --- the form in which items are kept -----------------------------------------------------------------------------


def test_only_bands_are_kept_with_what_reading_needs(real):
    item = real("earth-search-sentinel-2-l2a")
    kept = normalised(item, ES)
    assert set(kept["assets"]) == set(ES.bands.values())
    red = kept["assets"]["red"]
    for field in ("href", "type", "gsd", "proj:shape", "proj:transform", "raster:bands", "eo:bands"):
        assert red[field] == item["assets"]["red"][field]
    assert kept["geometry"] == item["geometry"]
    assert kept["properties"].items() >= item["properties"].items()
    assert json.loads(json.dumps(kept)) == kept
    assert len(json.dumps(kept)) < 0.6 * len(json.dumps(item))


@pytest.mark.parametrize(
    ("given", "epsg"),
    [
        ({"proj:epsg": 32632}, 32632),
        ({"proj:code": "EPSG:32632"}, 32632),
        ({"proj:code": "epsg:32632", "proj:epsg": None}, 32632),
        ({"proj:code": 32632}, 32632),
    ],
)
@pytest.mark.parametrize("at", ["properties", "assets"])
def test_both_spellings_of_the_projection(real, given, epsg, at):
    item = real("earth-search-sentinel-2-l2a")
    del item["properties"]["proj:epsg"]
    for fields in [item["properties"]] if at == "properties" else item["assets"].values():
        fields.update(given)
    kept = normalised(item, ES)
    assert kept["properties"]["proj:epsg"] == epsg
    assert kept["properties"]["proj:code"] == f"EPSG:{epsg}"


def test_a_projection_without_a_code_is_left_alone(real):
    item = real("earth-search-sentinel-2-l2a")
    item["properties"].update({"proj:epsg": None, "proj:wkt2": "PROJCRS[...]"})
    kept = normalised(item, ES)
    assert kept["properties"]["proj:epsg"] is None
    assert "proj:code" not in kept["properties"]


def test_signatures_are_not_kept(real):
    item = real("planetary-computer-sentinel-2-l2a")
    bare = item["assets"]["B04"]["href"]
    item["assets"]["B04"]["href"] = f"{bare}?st=2025-01-01&se=2025-01-02&sp=rl&sig=SECRET"
    item["assets"]["B03"]["href"] = "https://bucket.s3.amazonaws.com/B03.tif?X-Amz-Signature=SECRET"
    item["assets"]["B02"]["href"] = "https://tiles.example.org/raster.tif?band=2"
    kept = normalised(item, PC)
    assert kept["assets"]["B04"]["href"] == bare
    assert kept["assets"]["B02"]["href"].endswith("?band=2")
    assert "SECRET" not in json.dumps(kept)


HOSTILE = [
    "file:///etc/passwd",
    "/etc/passwd",
    "../../../etc/passwd",
    "/vsicurl/https://example.org/B04.tif",
    "vrt://etc/passwd",
    "zip+https://example.org/x.zip!B04.tif",
    "ftp://example.org/B04.tif",
    "https:///B04.tif",
    "//example.org/B04.tif",
    "https://user:password@example.org/B04.tif",
    "https://example.org/B04.vrt",
    "https://example.org/B04.tif\n/etc/passwd",
    "<VRTDataset/>",
    "",
]


@pytest.mark.parametrize("href", HOSTILE)
def test_hostile_hrefs_of_a_remote_catalogue(real, href):
    item = real("earth-search-sentinel-2-l2a")
    item["assets"]["red"]["href"] = href
    with pytest.raises(CatalogError, match="'red' of item 'S2B_20EPT_20250731_0_L2A'") as caught:
        normalised(item, ES)
    assert "password@" not in str(caught.value)


@pytest.mark.parametrize("href", [h for h in HOSTILE if h != "<VRTDataset/>"])
def test_hostile_hrefs_of_a_local_catalogue(real, tmp_path, href):
    item = real("earth-search-sentinel-2-l2a")
    item["assets"]["red"]["href"] = href
    with pytest.raises(CatalogError, match="'red' of item"):
        normalised(item, find_source(str(tmp_path)), folder=tmp_path / "items", root=tmp_path)


@pytest.mark.parametrize(
    "href",
    [
        "./pixels/B04.tif",
        "pixels/B04.tif",
        "../items/pixels/B04.tif",
        "{root}/items/pixels/B04.tif",
        "file://{root}/items/pixels/B04.tif",
    ],
)
def test_files_of_a_local_catalogue_become_absolute(real, tmp_path, href):
    item = real("earth-search-sentinel-2-l2a")
    item["assets"]["red"]["href"] = href.format(root=tmp_path)
    kept = normalised(item, find_source(str(tmp_path)), folder=tmp_path / "items", root=tmp_path)
    assert Path(kept["assets"]["red"]["href"]) == tmp_path / "items" / "pixels" / "B04.tif"


def test_partial_items(real):
    assert [is_partial(real("earth-search-sentinel-2-c1-l2a", i)) for i in range(4)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_missing_geometry_is_the_bbox(real):
    item = real("earth-search-sentinel-2-l2a")
    item["geometry"] = None
    item["bbox"] = [178.5, 65.6, -178.9, 66.7]
    assert normalised(item, ES)["geometry"]["type"] == "Polygon"
    assert scene_of(normalised(item, ES), ES, "optical").bands["B04"] == "red"


# --- CDSE, after its published layout: no real item of it lies here ----------------------------------------------


@pytest.mark.parametrize("strip_in", ["property", "path"])
def test_items_of_cdse(strip_in):
    """STAC 1.1: baseline in processing:version, projection and offset on the assets, ESA's folders in the hrefs."""
    source = SOURCES["cdse/sentinel-2-l2a"]
    product = "S2B_MSIL2A_20250302T095029_N0511_R079_T33UXP_20250302T104753"
    folder = (
        f"s3://eodata/Sentinel-2/MSI/L2A/2025/03/02/{product}.SAFE/GRANULE/L2A_T33UXP_A041714_20250302T095025"
    )
    item = {
        "type": "Feature",
        "stac_version": "1.1.0",
        "id": product,
        "collection": "sentinel-2-l2a",
        "geometry": {"type": "Polygon", "coordinates": [[[16, 48], [17, 48], [17, 49], [16, 49], [16, 48]]]},
        "properties": {
            "datetime": "2025-03-02T09:50:29.024Z",
            "platform": "sentinel-2b",
            "constellation": "sentinel-2",
            "grid:code": "MGRS-33UXP",
            "processing:version": "05.11",
            "processing:datetime": "2025-03-02T10:47:53.000000Z",
        },
        "assets": {
            key: {
                "href": f"{folder}/IMG_DATA/R{key[4:]}/T33UXP_20250302T095029_{key}.jp2",
                "type": "image/jp2",
                "bands": [{"name": band}],
                "proj:code": "EPSG:32633",
                "raster:scale": 0.0001,
                "raster:offset": -0.1,
                "alternate": {"https": {"href": "https://download.dataspace.copernicus.eu/x"}},
            }
            for band, key in source.bands.items()
        },
    }
    if strip_in == "property":
        strip = "S2B_OPER_MSI_L2A_DS_2BPS_20250302T104753_S20250302T095025_N05.11"
        item["properties"]["eopf:datastrip_id"] = strip
    scene = scene_of(normalised(item, source), source, "optical")
    assert scene.identity == "sentinel-2b/33UXP/20250302T095029/20250302T095025"
    assert scene.version == "05.11/2025-03-02T10:47:53Z"
    assert (scene.offset.value, scene.offset.applied) == (-0.1, False)
    assert scene.bands == dict(source.bands)
    assert scene.item["properties"]["proj:epsg"] == 32633
    assert "alternate" not in scene.item["assets"]["B02_10m"]
