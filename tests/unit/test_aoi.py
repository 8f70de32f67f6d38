"""AOIs of every kind of source; every unusable one gets one clear line."""

from __future__ import annotations

import json
import warnings

import geopandas as gpd
import pyproj
import pytest
import shapely

from slidecube.catalog.aoi import Aoi, read_aoi, split_at_antimeridian
from slidecube.catalog.errors import CatalogError

SQUARE = shapely.box(10.0, 46.0, 11.0, 47.0)
BOWTIE = [[[0, 0], [1, 1], [1, 0], [0, 1], [0, 0]]]


def geojson(*geometries, **extra):
    features = [{"type": "Feature", "properties": {}, "geometry": g} for g in geometries]
    return {"type": "FeatureCollection", "features": features, **extra}


def polygon(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


def square(x, y, size=1.0):
    return [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]


@pytest.fixture
def write(tmp_path):
    def put(document, name="area.geojson"):
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
        return path

    return put


def refused(source, **options):
    with pytest.raises(CatalogError) as caught:
        read_aoi(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# --- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".geojson", ".json", ".gpkg", ".shp", ".fgb"])
def test_every_file_format_gives_the_same_polygon(tmp_path, suffix):
    path = tmp_path / f"my valley{suffix}"
    gpd.GeoDataFrame(geometry=[SQUARE], crs="EPSG:4326").to_file(
        path, **({"driver": "GeoJSON"} if "json" in suffix else {})
    )
    aoi = read_aoi(path)
    assert aoi.name == "my-valley"
    assert aoi.crs == "EPSG:4326"
    assert aoi.geometry.equals(SQUARE)
    assert read_aoi(str(path), name="other").name == "other"


@pytest.mark.parametrize(
    "source",
    [
        [10, 46, 11, 47],
        (10.0, 46.0, 11.0, 47.0),
        "10, 46, 11, 47",
        "[10 46 11 47]",
        "POLYGON ((10 46, 11 46, 11 47, 10 47, 10 46))",
        "SRID=4326;MULTIPOLYGON (((10 46, 11 46, 11 47, 10 47, 10 46)))",
        "POLYGON Z ((10 46 5, 11 46 5, 11 47 5, 10 47 5, 10 46 5))",
        json.dumps(polygon(square(10, 46))),
        json.dumps(geojson(polygon(square(10, 46)))),
    ],
)
def test_bbox_and_text(source):
    aoi = read_aoi(source)
    assert aoi.geometry.equals(SQUARE)
    assert not aoi.geometry.has_z
    assert aoi.name == "aoi"


def test_several_features_are_unioned_and_empty_ones_skipped(write):
    path = write(geojson(polygon(square(0, 0)), None, polygon(square(0.5, 0)), polygon(square(5, 5))))
    aoi = read_aoi(path)
    assert aoi.geometry.geom_type == "MultiPolygon"
    assert aoi.geometry.area == pytest.approx(1.5 + 1)


def test_a_projected_aoi_stays_exactly_where_it_was_drawn(tmp_path):
    box = shapely.box(600_000, 5_000_000, 620_480, 5_020_480)
    path = tmp_path / "utm.gpkg"
    gpd.GeoDataFrame(geometry=[box], crs="EPSG:32632").to_file(path)
    aoi = read_aoi(path)
    assert pyproj.CRS(aoi.crs).to_epsg() == 32632
    assert aoi.geometry.equals(box)


def test_old_geojson_with_a_crs_member(write):
    member = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    path = write(geojson(polygon(square(600_000, 5_000_000, 1000)), crs=member))
    aoi = read_aoi(path)
    assert pyproj.CRS(aoi.crs).to_epsg() == 32632
    assert aoi.to_crs("EPSG:4326").bounds == pytest.approx((10.27, 45.144, 10.283, 45.153), abs=0.01)


def test_another_datum_becomes_wgs84(tmp_path):
    path = tmp_path / "jgd.gpkg"
    gpd.GeoDataFrame(geometry=[shapely.box(141, 42, 142, 43)], crs="EPSG:6668").to_file(path)
    assert read_aoi(path).crs == "EPSG:4326"


def test_a_shapefile_without_prj_is_read_with_the_crs_that_is_given(tmp_path):
    path = tmp_path / "bare.shp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpd.GeoDataFrame(geometry=[SQUARE]).to_file(path)
    assert "has no CRS" in refused(path)
    assert ".prj" in refused(path)
    assert read_aoi(path, crs="EPSG:4326").geometry.equals(SQUARE)


def test_layers(tmp_path):
    path = tmp_path / "two.gpkg"
    for name, shape in (("north", SQUARE), ("south", shapely.box(0, 0, 1, 1))):
        gpd.GeoDataFrame(geometry=[shape], crs="EPSG:4326").to_file(path, layer=name)
    assert "north, south" in refused(path)
    assert read_aoi(path, layer="south").geometry.bounds == (0, 0, 1, 1)
    assert "no layer 'west'; layers: north, south" in refused(path, layer="west")


# --- the antimeridian ---------------------------------------------------------------------------------------------


def test_a_bbox_with_west_above_east_is_split():
    fiji = read_aoi([177, -19, -178, -16])
    assert fiji.geometry.geom_type == "MultiPolygon"
    assert fiji.geometry.area == pytest.approx(5 * 3)
    assert fiji.geometry.bounds == (-180, -19, 180, -16)


def test_a_split_multipolygon_is_taken_as_it_is(write):
    path = write(geojson({"type": "MultiPolygon", "coordinates": [[square(179, 0)], [square(-180, 0)]]}))
    assert read_aoi(path).geometry.area == pytest.approx(2)


@pytest.mark.parametrize(
    ("ring", "words"),
    [
        ([[179, 0], [-179, 0], [-179, 1], [179, 1], [179, 0]], ["unsplit", "RFC 7946", "feature 1"]),
        ([[179, 0], [181, 0], [181, 1], [179, 1], [179, 0]], ["181", "RFC 7946"]),
    ],
)
def test_unsplit_polygons_are_refused(write, ring, words):
    message = refused(write(geojson(polygon(ring))))
    assert all(word in message for word in words), message


def test_a_bbox_around_the_globe_names_the_other_reading():
    message = refused([-178, -19, 177, -16])
    assert "355 degrees" in message
    assert "[177.0, -19.0, -178.0, -16.0]" in message


def test_a_projected_aoi_over_the_antimeridian_comes_back_split():
    aoi = Aoi(name="taveuni", geometry=shapely.box(750_000, 8_100_000, 900_000, 8_200_000), crs="EPSG:32760")
    lonlat = aoi.to_crs("EPSG:4326")
    assert lonlat.geom_type == "MultiPolygon"
    assert lonlat.bounds[0] == -180
    assert lonlat.bounds[2] == 180
    geod = pyproj.Geod(ellps="WGS84")
    assert abs(geod.geometry_area_perimeter(lonlat)[0]) == pytest.approx(150e3 * 100e3, rel=0.01)
    back = Aoi(name="back", geometry=lonlat).to_crs("EPSG:32760")
    assert back.symmetric_difference(aoi.geometry).area < 1e-4 * aoi.geometry.area


def test_splitting_keeps_the_area_and_the_range():
    wide = shapely.box(170, 0, 200, 10)
    parts = split_at_antimeridian(wide)
    assert parts.area == pytest.approx(wide.area)
    assert parts.bounds == (-180, 0, 180, 10)
    assert split_at_antimeridian(SQUARE) is SQUARE


def test_long_edges_stay_true_in_a_projection():
    """The north edge of a wide bbox is a parallel, not a chord: half a degree of it bulges by a kilometre."""
    lonlat = shapely.box(0, 60, 20, 61)
    projected = Aoi(name="wide", geometry=lonlat).to_crs("EPSG:3035")
    to = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:3035", always_xy=True)
    for lon in (3.3, 9.99, 17.123):
        on_edge = shapely.Point(to.transform(lon, 61))
        assert projected.exterior.distance(on_edge) < 1.0, lon


# --- what is repaired, and what is not ----------------------------------------------------------------------------


def test_unambiguous_faults_are_repaired(write):
    open_ring = square(0, 0)[:-1]
    assert read_aoi(write(geojson(polygon(open_ring)))).geometry.area == pytest.approx(1)
    doubled = [p for p in square(0, 0) for _ in range(2)]
    assert read_aoi(write(geojson(polygon(doubled)))).geometry.area == pytest.approx(1)
    spike = [[0, 0], [1, 0], [1, 1], [1, 2], [1, 1], [0, 1], [0, 0]]
    assert read_aoi(write(geojson(polygon(spike)))).geometry.area == pytest.approx(1)
    touching = [[0, 0], [2, 0], [1, 1], [2, 2], [0, 2], [1, 1], [0, 0]]
    assert read_aoi(write(geojson(polygon(touching)))).geometry.area == pytest.approx(2)
    overlapping = {"type": "MultiPolygon", "coordinates": [[square(0, 0)], [square(0.5, 0)]]}
    assert read_aoi(write(geojson(overlapping))).geometry.area == pytest.approx(1.5)


@pytest.mark.parametrize(
    "rings",
    [
        BOWTIE,
        [square(0, 0), square(5, 5)],  # a hole outside its shell
        [[[0, 0], [3, 0], [3, 1], [1, -1], [0, 1], [0, 0]]],  # crosses itself twice
    ],
)
def test_ambiguous_faults_are_refused_with_their_place(write, rings):
    message = refused(write(geojson(polygon(square(9, 9)), polygon(*rings))))
    assert "feature 2 is not a valid polygon" in message
    assert "[" in message


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (geojson(), "is empty"),
        (geojson(None), "is empty"),
        (geojson(polygon([[0, 0], [1, 1], [0, 0], [0, 0]])), "not a valid polygon"),
        (geojson({"type": "Point", "coordinates": [1, 2]}), "holds Point"),
        (geojson({"type": "LineString", "coordinates": [[1, 2], [2, 3]]}), "holds LineString"),
        (geojson(polygon([[0, 0], [1, 0]])), "Too few points"),
        (geojson(polygon([["a", 0], [1, 0], [1, 1], ["a", 0]])), "broken geometry"),
        (geojson({"type": "Polygon"}), "broken geometry"),
        (geojson({"type": "Circle", "coordinates": []}), "broken geometry"),
        (geojson(polygon([[0, 0], [float("nan"), 0], [1, 1], [0, 0]])), "not a finite number"),
        (geojson(polygon(square(46, 139))), "swapped"),
        (geojson(polygon(square(600_000, 5_000_000, 1000))), "projected metres"),
        ({"type": "FeatureCollection"}, "no list of 'features'"),
        ({"hello": 1}, "not GeoJSON"),
        ([1, 2, 3], "not GeoJSON"),
        ('{"type": "FeatureCollection", "features": [', "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_unusable_geojson(write, document, words):
    assert words in refused(write(document))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([1, 2, 3], "has 3 values"),
        ([1, 2, "x", 3], "not made of numbers"),
        ([1, 2, float("inf"), 3], "four"),
        ([0, 10, 1, 5], "upside down"),
        ([0, 0, 0, 1], "empty"),
        ([35, 139, 36, 140], "swapped"),
        ([600_000, 5_000_000, 620_000, 5_020_000], "projected metres"),
        ("POLYGON ((0 0, 1 0", "cannot be read"),
        ("POINT (1 2)", "holds Point"),
        ("POLYGON EMPTY", "is empty"),
    ],
)
def test_unusable_bbox_and_wkt(source, words):
    assert words in refused(source)


def test_a_projected_bbox():
    aoi = read_aoi([600_000, 5_000_000, 620_000, 5_020_000], crs="EPSG:32632")
    assert aoi.geometry.area == 20_000**2


def test_a_wrong_crs_is_named():
    assert "EPSG:99999" in refused([0, 0, 1, 1], crs="EPSG:99999")
    far = refused([1e9, 1e9, 1.1e9, 1.1e9], crs="EPSG:32632")
    assert "outside the area" in far


def test_a_crs_that_contradicts_the_file(tmp_path):
    path = tmp_path / "a.gpkg"
    gpd.GeoDataFrame(geometry=[SQUARE], crs="EPSG:4326").to_file(path)
    assert "EPSG:4326" in refused(path, crs="EPSG:32632")
    assert read_aoi(path, crs="OGC:CRS84").geometry.equals(SQUARE)


def test_misspelt_paths(tmp_path, write):
    write(geojson(polygon(square(0, 0))), "hokkaido.geojson")
    assert "did you mean" in refused(tmp_path / "hokaido.geojson")
    assert "hokkaido.geojson'" in refused(tmp_path / "hokaido.geojson")
    assert "there is no folder" in refused(tmp_path / "areas" / "hokkaido.geojson")
    assert "is a folder" in refused(tmp_path)
    assert "unknown ending '.txt'" in refused(write("x", "notes.txt"))


@pytest.mark.parametrize("suffix", [".gpkg", ".shp", ".fgb", ".zip"])
def test_files_that_are_not_what_they_say(write, suffix):
    assert "cannot be read" in refused(write("not a vector file", f"fake{suffix}"))


def test_names_are_safe_in_file_names(write):
    aoi = read_aoi(write(geojson(polygon(square(0, 0))), "北海道 (2018).geojson"))
    assert aoi.name == "北海道-2018"
    assert read_aoi([0, 0, 1, 1], name="../../etc/passwd").name == "etc-passwd"
