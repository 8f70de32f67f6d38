"""The frozen scene list: lossless, ordered, atomic, and the footprints that decide which tile reads what."""

from __future__ import annotations

import datetime as dt
import json
import pickle
import random
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import stac_geoparquet.arrow
from odc.geo.geobox import GeoBox

from slidecube.catalog.errors import CatalogError
from slidecube.catalog.items import normalised, scene_of
from slidecube.catalog.scenes import Alternate, Scene, SceneTable, Sourcing, Window, footprints
from slidecube.catalog.sources import SOURCES
from slidecube.pipeline.keys import task_key

FILES = {
    "earth-search-sentinel-2-l2a": ("earth-search/sentinel-2-l2a", "optical"),
    "earth-search-sentinel-2-l1c": ("earth-search/sentinel-2-l1c", "optical"),
    "planetary-computer-sentinel-2-l2a": ("planetary-computer/sentinel-2-l2a", "optical"),
    "earth-search-cop-dem-glo-30": ("earth-search/cop-dem-glo-30", "dem"),
    "planetary-computer-sentinel-1-rtc": ("planetary-computer/sentinel-1-rtc", "radar"),
}


@pytest.fixture(scope="session")
def scenes(repo_root):
    """Real scenes of five collections, two of them with schemas of their own."""
    found = []
    for stem, (name, role) in FILES.items():
        source = SOURCES[name]
        document = json.loads((repo_root / "tests" / "data" / "stac_items" / f"{stem}.json").read_text())
        found += [scene_of(normalised(item, source), source, role) for item in document["features"]]
    return found


@pytest.fixture(scope="session")
def table(scenes):
    return SceneTable(scenes=tuple(scenes))


def scene_at(geometry, *, epsg=None, id_="a", day="2020-01-01", **fields):
    properties = {"datetime": f"{day}T10:00:00Z"} | ({"proj:epsg": epsg} if epsg else {})
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": id_,
        "geometry": geometry if isinstance(geometry, dict) else shapely.geometry.mapping(geometry),
        "properties": properties,
        "links": [],
        "assets": {"B04": {"href": "https://example.org/B04.tif", "type": "image/tiff"}},
    }
    given = {
        "id": id_,
        "role": "optical",
        "source": "test",
        "datetime": dt.datetime.fromisoformat(properties["datetime"]),
        "identity": id_,
        "datatake": "",
        "version": "",
        "offset": None,
        "bands": {"B04": "B04"},
        "item": item,
    }
    return Scene(**(given | fields))


# --- round trip ---------------------------------------------------------------------------------------------------


def test_a_table_of_mixed_providers_comes_back_equal(table, tmp_path):
    assert len(table) == 11
    table.to_parquet(tmp_path / "plan" / "scenes.parquet")
    back = SceneTable.read_parquet(tmp_path / "plan" / "scenes.parquet")
    assert back == table
    assert back.digest == table.digest
    assert [s.item for s in back] == [s.item for s in table]
    assert all(s.datetime.tzinfo is not None for s in back)
    assert [p.name for p in (tmp_path / "plan").iterdir()] == ["scenes.parquet"]


def standing_by(scene):
    other = Alternate(
        source="b/é",
        id="other",
        version=scene.version,
        offset=scene.offset,
        hrefs={"B04": "https://b.org/é.tif"},
    )
    return replace(scene, alternates=(other, replace(other, source="c", offset=None)))


def test_alternates_and_sourcing_come_back_equal(scenes, tmp_path):
    sourcing = (
        Sourcing(role="optical", asked="a", used="b", failed=(("a", "503"),), alternates=(("c", 3),)),
        Sourcing(role="dem", asked="d", used="d", unsearched=(("e", "no"), ("f", "never"))),
    )
    table = SceneTable(scenes=(standing_by(scenes[0]), *scenes[1:]), sourcing=sourcing)
    table.to_parquet(tmp_path / "x.parquet")
    back = SceneTable.read_parquet(tmp_path / "x.parquet")
    assert back == table
    assert back.sourcing == sourcing
    assert back.source_of("optical", "a") == "b"
    assert back.source_of("dem", "./d") == "./d", "as it was asked for, when it answered"


def test_alternates_make_another_list_and_another_pixel_of_none(scenes, table):
    helped = SceneTable(scenes=(standing_by(scenes[0]), *scenes[1:]))
    assert helped.digest != table.digest
    assert task_key("layer", "r000c000", helped) == task_key("layer", "r000c000", table)


def test_a_list_of_before_there_were_alternates_is_read(table, tmp_path):
    table.to_parquet(tmp_path / "new.parquet")
    new = pq.read_table(tmp_path / "new.parquet")
    pq.write_table(new.drop_columns(["slidecube:alternates"]), tmp_path / "old.parquet")
    assert SceneTable.read_parquet(tmp_path / "old.parquet") == table


def test_other_programs_read_it_as_stac_geoparquet(table, tmp_path):
    path = tmp_path / "scenes.parquet"
    table.to_parquet(path)
    frame = gpd.read_parquet(path)
    assert frame.crs.to_epsg() == 4326
    assert list(frame["id"]) == [s.id for s in table]
    assert frame.geometry[3].equals(shapely.geometry.shape(table.scenes[3].item["geometry"]))
    items = list(stac_geoparquet.arrow.stac_table_to_items(pq.read_table(path)))
    assert [i["id"] for i in items] == [s.id for s in table]
    for item, scene in zip(items, table, strict=True):
        assert {k: a["href"] for k, a in item["assets"].items() if a} == {
            k: a["href"] for k, a in scene.item["assets"].items()
        }
        assert item["properties"]["platform"] == scene.item["properties"]["platform"]


def test_the_file_is_the_same_bytes_again(table, tmp_path):
    for name in ("one", "two"):
        table.to_parquet(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_empty_table(tmp_path):
    empty = SceneTable(scenes=())
    empty.to_parquet(tmp_path / "x.parquet")
    assert SceneTable.read_parquet(tmp_path / "x.parquet") == empty
    assert len(empty.touching(GeoBox.from_bbox((0, 0, 1, 1), "EPSG:4326", shape=(4, 4)))) == 0


def test_a_failed_write_leaves_what_was_there(table, tmp_path):
    path = tmp_path / "scenes.parquet"
    table.role("dem").to_parquet(path)
    broken = replace(table.scenes[0], item={**table.scenes[0].item, "id": object()})
    with pytest.raises(TypeError):
        SceneTable(scenes=(broken,)).to_parquet(path)
    assert SceneTable.read_parquet(path) == table.role("dem")
    assert [p.name for p in tmp_path.iterdir()] == ["scenes.parquet"]


def test_files_that_are_no_scene_table(table, tmp_path):
    with pytest.raises(CatalogError, match="cannot be read"):
        SceneTable.read_parquet(tmp_path / "missing.parquet")
    path = tmp_path / "scenes.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(CatalogError, match="cannot be read"):
        SceneTable.read_parquet(path)
    gpd.GeoDataFrame(geometry=[shapely.Point(0, 0)], crs=4326).to_parquet(path)
    with pytest.raises(CatalogError, match="not a scene table"):
        SceneTable.read_parquet(path)


def test_a_table_that_was_changed_is_refused(table, tmp_path):
    path = tmp_path / "scenes.parquet"
    table.to_parquet(path)
    arrow = pq.read_table(path)
    pq.write_table(arrow.slice(1), path)
    with pytest.raises(CatalogError, match="was changed after it was frozen"):
        SceneTable.read_parquet(path)


def test_tables_travel_to_workers(table):
    list(table.touching_each([]))
    assert pickle.loads(pickle.dumps(table)) == table


# --- order and digest ---------------------------------------------------------------------------------------------


def test_order_of_finding_decides_nothing(scenes, table):
    shuffled = scenes[:]
    random.Random(3).shuffle(shuffled)
    again = SceneTable(scenes=tuple(shuffled))
    assert again == table
    assert again.digest == table.digest


def test_the_digest_follows_what_decides_the_pixels(table):
    first = table.role("optical").scenes[0]
    others = tuple(s for s in table if s is not first)

    def digest(**changes):
        return SceneTable(scenes=(*others, replace(first, **changes))).digest

    assert digest() == table.digest
    assert digest(source="elsewhere") == table.digest
    assert digest(item={**first.item, "links": [1]}) == table.digest
    changes = [
        {"identity": "other"},
        {"version": "99"},
        {"role": "radar"},
        {"id": "other"},
        {"offset": replace(first.offset, value=-0.2)},
        {"offset": replace(first.offset, applied=not first.offset.applied)},
        {"offset": None},
    ]
    digests = {digest(**change) for change in changes}
    assert len(digests) == len(changes)
    assert table.digest not in digests
    assert SceneTable(scenes=others).digest not in digests | {table.digest}


def test_a_scene_twice_is_refused(table):
    with pytest.raises(CatalogError, match="stands twice"):
        SceneTable(scenes=(*table.scenes, table.scenes[0]))


def test_roles_and_windows(table):
    assert {s.role for s in table} == {"optical", "radar", "dem"}
    assert sum(len(table.role(r)) for r in ("optical", "radar", "dem")) == len(table)
    days = [s.datetime.date() for s in table.role("optical")]
    window = Window(start=min(days), end=min(days))
    assert [s.datetime.date() for s in table.role("optical").within(window)] == [
        d for d in days if d == min(days)
    ]


def test_windows_are_days_in_utc():
    day = Window(start=dt.date(2020, 2, 29), end=dt.date(2020, 2, 29))
    assert dt.datetime(2020, 2, 29, tzinfo=dt.UTC) in day
    assert dt.datetime(2020, 2, 29, 23, 59, 59, 999_999, tzinfo=dt.UTC) in day
    assert dt.datetime(2020, 3, 1, tzinfo=dt.UTC) not in day
    assert dt.datetime(2020, 3, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=2))) in day
    assert "2020-02-29" not in day
    with pytest.raises(CatalogError, match="swap"):
        Window(start=dt.date(2020, 2, 1), end=dt.date(2020, 1, 1))


# --- footprints ---------------------------------------------------------------------------------------------------


def utm_box(x, y, size, epsg):
    return GeoBox.from_bbox((x, y, x + size, y + size), f"EPSG:{epsg}", resolution=10)


def test_a_tile_touches_the_scenes_over_it_in_another_zone():
    """A grid in zone 33 read over a scene of zone 32, ten kilometres beyond the seam at 12 degrees east."""
    scene = scene_at(shapely.box(11.5, 46, 12.5, 47), epsg=32632)
    inside = utm_box(280_000, 5_150_000, 20_480, 32633)
    outside = utm_box(380_000, 5_150_000, 20_480, 32633)
    table = SceneTable(scenes=(scene,))
    assert [len(t) for t in table.touching_each([inside, outside])] == [1, 0]


@pytest.mark.parametrize(
    "geometry",
    [
        # split as RFC 7946 asks, running on past 180, and the classic fault: an edge around the whole globe
        shapely.MultiPolygon([shapely.box(178.5, 65.7, 180, 66.7), shapely.box(-180, 65.7, -179, 66.7)]),
        shapely.box(178.5, 65.7, 181, 66.7),
        shapely.Polygon([(178.5, 65.7), (-179, 65.7), (-179, 66.7), (178.5, 66.7)]),
    ],
)
@pytest.mark.parametrize("epsg", [32601, None])
def test_footprints_over_the_antimeridian(geometry, epsg):
    table = SceneTable(scenes=(scene_at(geometry, epsg=epsg),))
    east = utm_box(400_000, 7_340_000, 10_240, 32601)  # about 179.2 W
    west = utm_box(600_000, 7_340_000, 10_240, 32660)  # about 179.2 E
    over = utm_box(365_000, 7_340_000, 20_480, 32601)  # over the line
    far = utm_box(500_000, 7_340_000, 10_240, 32632)
    hits = [len(t) for t in table.touching_each([east, west, over, far])]
    assert hits[1:3] == [1, 1]
    assert hits[3] == 0
    assert footprints(table.scenes)[0].bounds[0] >= -180
    assert footprints(table.scenes)[0].bounds[2] <= 180
    assert footprints(table.scenes)[0].area < 5


def test_a_dem_tile_at_the_pole_and_a_polar_geobox(table):
    polar = GeoBox.from_bbox((-500_000, -500_000, 500_000, 500_000), "EPSG:3031", resolution=1000)
    assert {s.role for s in table.touching(polar)} == {"dem"}
    north = GeoBox.from_bbox((-500_000, -500_000, 500_000, 500_000), "EPSG:3995", resolution=1000)
    assert "dem" not in {s.role for s in table.touching(north)}


def test_touching_one_by_one_equals_touching_all_at_once(table):
    boxes = [utm_box(300_000 + 20_480 * i, 6_400_000, 20_480, 32660) for i in range(6)]
    assert [t.scenes for t in table.touching_each(boxes)] == [table.touching(b).scenes for b in boxes]
    assert sum(len(table.touching(b)) for b in boxes) > 0


def test_many_tiles_are_answered_at_once(table):
    many = [
        scene_at(
            shapely.box(lon, lat, lon + 1.2, lat + 1.2), id_=f"{lon}-{lat}-{day}", day=f"2020-01-{day:02d}"
        )
        for lon in range(-10, 10, 2)
        for lat in range(40, 50, 2)
        for day in range(1, 4)
    ]
    nation = SceneTable(scenes=tuple(many))
    boxes = [
        utm_box(200_000 + 5_120 * (i % 100), 4_500_000 + 5_120 * (i // 100), 5_120, 32631)
        for i in range(5_000)
    ]
    began = dt.datetime.now(dt.UTC)
    hits = [len(t) for t in nation.touching_each(boxes)]
    seconds = (dt.datetime.now(dt.UTC) - began).total_seconds()
    assert np.count_nonzero(hits) > 1000
    assert seconds < 20  # 5,000 tiles; measured .7 s on an idle core


def test_a_geobox_outside_its_crs_is_refused(table):
    with pytest.raises(CatalogError, match="outside the area"):
        table.touching(GeoBox.from_bbox((1e9, 1e9, 1.1e9, 1.1e9), "EPSG:3035", resolution=1e6))
