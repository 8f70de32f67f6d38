"""Search: a real HTTP server that speaks STAC API, and local catalogues; both give the same scenes."""

from __future__ import annotations

import copy
import datetime as dt
import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import shapely
from pystac_client.exceptions import APIError

from slidecube.catalog.aoi import Aoi, read_aoi
from slidecube.catalog.errors import CatalogDownError, CatalogError
from slidecube.catalog.local import local_items
from slidecube.catalog.scenes import Window
from slidecube.catalog.search import (
    Retries,
    _intervals,
    _sendable,
    deduplicate,
    find,
    newest_scene,
    scenes_by_tile,
    search,
)
from slidecube.catalog.sources import SOURCES, find_source

QUICK = Retries(attempts=4, first_s=0.001, longest_s=0.01, timeout_s=0.5)
SOURCE = SOURCES["planetary-computer/sentinel-2-l2a"]
YEAR = Window(start=dt.date(2019, 1, 1), end=dt.date(2019, 12, 31))
PLACE = read_aoi([173.0, 57.0, 175.0, 59.0])


class StacApi(ThreadingHTTPServer):
    """STAC API with item search by POST and paging by token.

    items : what it holds; faults : what it does at the next searches ("ok", "429", "503", "hang", "cut", "html");
    asked : the bodies of the searches that it answered
    """

    daemon_threads = True

    def __init__(self, items, *, page=2):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.items, self.page = items, page
        self.faults, self.asked, self.hits, self.retry_after = [], [], 0, None
        self.loops = False
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Clients that give up are part of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        root = self.server.url
        self._answer(
            {
                "type": "Catalog",
                "id": "test",
                "description": "a test",
                "stac_version": "1.0.0",
                "conformsTo": [
                    "https://api.stacspec.org/v1.0.0/core",
                    "https://api.stacspec.org/v1.0.0/item-search",
                ],
                "links": [
                    {"rel": "self", "href": root},
                    {"rel": "root", "href": root},
                    {"rel": "search", "href": f"{root}/search", "method": "POST"},
                ],
            }
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.hits += 1
        fault = self.server.faults.pop(0) if self.server.faults else "ok"
        if fault != "ok":
            self._misbehave(fault)
            return
        self.server.asked.append(body)
        start = 0 if self.server.loops else int(body.get("token", 0))
        area, span = shapely.geometry.shape(body["intersects"]), body.get("datetime", "")
        held = [
            i for i in self.server.items if shapely.box(*i["bbox"]).intersects(area) and _in_span(i, span)
        ]
        stop = start + min(self.server.page, body["limit"])
        answer = {"type": "FeatureCollection", "features": held[start:stop], "links": []}
        if stop < len(held) or self.server.loops:
            following = {"rel": "next", "href": f"{self.server.url}/search", "method": "POST", "merge": True}
            answer["links"].append({**following, "body": {"token": str(stop)}})
        self._answer(answer)

    def _misbehave(self, fault):
        if fault == "hang":
            time.sleep(1.0)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"type": "Fea')
            self.close_connection = True
        elif fault == "html":
            self._answer("<html>Sign in to the hotel's network</html>")
        else:
            self._answer({"code": fault, "description": "later, please"}, status=int(fault))

    def _answer(self, document, status=200):
        data = document.encode() if isinstance(document, str) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.server.retry_after and status != 200:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(data)


def _in_span(item, span):
    start, _, end = span.partition("/")
    return not span or start <= item["properties"]["datetime"] <= end


@pytest.fixture
def api():
    servers = []

    def start(items, **options):
        server = StacApi(items, **options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server, replace(SOURCE, endpoint=server.url)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def real(repo_root):
    path = repo_root / "tests" / "data" / "stac_items" / "planetary-computer-sentinel-2-l2a.json"
    return json.loads(path.read_text())["features"][0]


@pytest.fixture
def series(real):
    """Nine real-shaped items of one tile, one a month, the last three cloudy."""
    return [acquisition(real, month, cloud_pct=90 if month > 6 else 10) for month in range(1, 10)]


def acquisition(
    real, month, *, strip="235957", baseline="02.12", made="20201007T214652", cloud_pct=10, tile="60VUK"
):
    item = copy.deepcopy(real)
    day = f"2019{month:02d}01"
    item["id"] = f"S2A_MSIL2A_{day}T000001_R116_T{tile}_{made}_{strip}_{baseline}"
    number = baseline.replace(".", "")
    item["properties"] |= {
        "datetime": f"2019-{month:02d}-01T00:00:01.024000Z",
        "eo:cloud_cover": cloud_pct,
        "s2:mgrs_tile": tile,
        "s2:processing_baseline": baseline,
        "s2:product_uri": f"S2A_MSIL2A_{day}T000001_N{number}_R116_T{tile}_{made}.SAFE",
        "s2:granule_id": f"S2A_OPER_MSI_L2A_TL_ESRI_{made}_A018417_T{tile}_N{baseline}",
        "s2:datatake_id": f"GS2A_{day}T000001_018417_N{baseline}",
        "s2:datastrip_id": f"S2A_OPER_MSI_L2A_DS_ESRI_{made}_S{day}T{strip}_N{baseline}",
        "s2:generation_time": f"{made[:4]}-{made[4:6]}-{made[6:8]}T00:00:00Z",
    }
    return item


def saved(tmp_path, items, name="items.json"):
    path = tmp_path / name
    path.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return str(path)


# --- paging, retries, errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [1, 2, 4, 100])
def test_every_page_is_read(api, series, page):
    server, source = api(series, page=page)
    found = find(source, PLACE, [YEAR], max_cloud_pct=50, retries=QUICK)
    assert [s.datetime.month for s in found.scenes] == [1, 2, 3, 4, 5, 6]
    assert found.counts["seen"] == 9
    assert found.counts["cloudy"] == 3
    assert str(found) == "6 scenes of 9 items (3 cloudy)"
    assert len(server.asked) == -(-9 // page)
    assert server.asked[0]["collections"] == ["sentinel-2-l2a"]


@pytest.mark.parametrize(
    "faults", [["429"], ["503", "502", "500"], ["hang"], ["cut"], ["cut", "503", "429"], ["504", "hang"]]
)
def test_passing_faults_are_waited_out(api, series, faults):
    server, source = api(series)
    server.faults = list(faults)
    assert len(search(source, PLACE, [YEAR], retries=QUICK)) == 9
    assert server.hits == 5 + len(faults)


def test_a_fault_in_the_middle_of_the_pages(api, series):
    server, source = api(series)
    server.faults = ["ok", "ok", "503", "cut"]
    scenes = search(source, PLACE, [YEAR], retries=QUICK)
    assert len({s.id for s in scenes}) == 9
    assert server.hits == 5 + 2
    assert server.faults == []


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (["503"] * 9, "still answered 503 after 4 attempts"),
        (["429"] * 9, "still answered 429"),
        (["hang"] * 9, "cannot be reached after 4 attempts"),
        (["cut"] * 9, "cannot be reached after 4 attempts"),
        (["400"], "refused the search with status 400: "),
        (["404"], "status 404"),
        (["html"], "not a STAC API"),
    ],
)
def test_lasting_faults_are_one_line(api, series, faults, words):
    server, source = api(series)
    server.faults = faults
    with pytest.raises(CatalogError, match=words) as caught:
        search(source, PLACE, [YEAR], retries=QUICK)
    assert "\n" not in str(caught.value)
    assert server.url in str(caught.value)
    assert caught.value.__cause__ is None


def test_retry_after_is_obeyed_but_not_for_ever(api, series):
    server, source = api(series)
    server.faults, server.retry_after = ["429"], "1"
    began = time.monotonic()
    assert len(search(source, PLACE, [YEAR], retries=QUICK)) == 9
    assert time.monotonic() - began >= 1


def test_a_server_that_repeats_its_page_is_left(api, series):
    server, source = api(series)
    server.loops = True
    with pytest.raises(CatalogError, match="same page again and again"):
        search(source, PLACE, [YEAR], retries=QUICK)


def test_nobody_listens(series, api):
    _, source = api(series)
    gone = replace(source, endpoint="http://127.0.0.1:9/v1")
    with pytest.raises(CatalogError, match="cannot be reached"):
        search(gone, PLACE, [YEAR], retries=QUICK)


def test_nothing_found_is_no_error(api, series):
    _, source = api(series)
    nowhere = read_aoi([0, 0, 1, 1])
    assert search(source, nowhere, [YEAR], retries=QUICK) == []
    later = Window(start=dt.date(2020, 1, 1), end=dt.date(2020, 2, 1))
    assert search(source, PLACE, [later], retries=QUICK) == []


# --- filters: the same for an API and for files -------------------------------------------------------------------


def test_files_and_api_give_the_same_scenes(api, series, tmp_path):
    _, source = api(series)
    remote = search(source, PLACE, [YEAR], max_cloud_pct=50, retries=QUICK)
    local = search(saved(tmp_path, series), PLACE, [YEAR], max_cloud_pct=50)
    assert [s.item for s in local] == [s.item for s in remote]
    assert [s.identity for s in local] == [s.identity for s in remote]


def test_both_days_of_a_window_are_included(series, tmp_path):
    series[0]["properties"]["datetime"] = "2019-01-01T23:59:59.999000Z"
    path = saved(tmp_path, series)
    windows = [
        Window(start=dt.date(2019, 1, 1), end=dt.date(2019, 1, 1)),
        Window(start=dt.date(2019, 3, 1), end=dt.date(2019, 4, 1)),
    ]
    assert [s.datetime.month for s in search(path, PLACE, windows)] == [1, 3, 4]


def test_items_are_dropped_for_a_reason_that_is_counted(series, tmp_path, real):
    partial = {k: v for k, v in series[1].items() if k != "assets"}
    elsewhere = copy.deepcopy(series[2])
    elsewhere["geometry"] = shapely.geometry.mapping(shapely.box(0, 0, 1, 1))
    found = find(saved(tmp_path, [series[0], partial, elsewhere, series[8]]), PLACE, [YEAR], max_cloud_pct=50)
    assert found.counts == {
        "seen": 4,
        "partial": 1,
        "other_collection": 0,
        "outside_windows": 0,
        "outside_area": 1,
        "cloudy": 1,
        "refused": 0,
        "superseded": 0,
        "other_mission": 0,
    }


def undecidable(item, id_):
    """The item with a baseline that says nothing, pixels from anywhere, and no name of ESA's."""
    item["properties"] |= {"s2:processing_baseline": "99.99", "s2:product_uri": "", "s2:granule_id": ""}
    for key in ("s2:datatake_id", "s2:datastrip_id"):
        item["properties"][key] = item["properties"][key].removesuffix("_N02.12")
    item["assets"] = {"B04": {**item["assets"]["B04"], "href": "https://example.org/B04.tif"}}
    return item | {"id": id_}


def test_items_that_cannot_be_decided_stop_the_search(series, tmp_path):
    series[0] = undecidable(series[0], "S2A_T60VUK_strange")
    path = saved(tmp_path, series)
    with pytest.raises(
        CatalogError, match=r"^The radiometric offset of item 'S2A_T60VUK_strange' is undecided"
    ):
        search(path, PLACE, [YEAR])
    found = find(path, PLACE, [YEAR])
    assert len(found.scenes) == 8
    assert list(found.refused) == ["S2A_T60VUK_strange"]
    assert "1 refused" in str(found)
    series[1] = undecidable(series[1], "S2A_T60VUK_odd")
    with pytest.raises(CatalogError, match=r"^2 of 9 items cannot be used, first: The radiometric"):
        search(saved(tmp_path, series), PLACE, [YEAR])


def test_the_newest_scene_passes_over_what_cannot_be_used(series, tmp_path):
    series[8] = undecidable(series[8], "S2A_T60VUK_strange")
    now = dt.datetime(2019, 9, 11, 12, tzinfo=dt.UTC)
    assert newest_scene(saved(tmp_path, series), PLACE, now=now).datetime.month == 8


# --- one version of each acquisition ------------------------------------------------------------------------------


def test_the_newest_version_is_kept_and_other_datastrips_too(real, tmp_path):
    items = [
        acquisition(real, 1, baseline="02.12", made="20210101T000000"),
        acquisition(real, 1, baseline="05.00", made="20200101T000000"),
        acquisition(real, 1, baseline="05.00", made="20230101T000000"),
        acquisition(real, 1, baseline="03.00", made="20240101T000000"),
        acquisition(real, 1, strip="000512", baseline="02.12"),
        acquisition(real, 1, tile="60VUJ", baseline="02.12"),
    ]
    for order in (items, items[::-1]):
        found = find(saved(tmp_path, order), PLACE, [YEAR])
        assert {(s.identity.split("/", 1)[1], s.version) for s in found.scenes} == {
            ("60VUK/20190101T000001/20190101T235957", "05.00/2023-01-01T00:00:00Z"),
            ("60VUK/20190101T000001/20190101T000512", "02.12/2020-10-07T00:00:00Z"),
            ("60VUJ/20190101T000001/20190101T235957", "02.12/2020-10-07T00:00:00Z"),
        }
        assert found.counts["superseded"] == 3
        assert len({s.datatake for s in found.scenes}) == 1


def test_deduplication_over_providers_does_not_depend_on_order(repo_root):
    folder = repo_root / "tests" / "data" / "stac_items"
    place = read_aoi([-61, -61, -58, -60])
    day = Window(start=dt.date(2025, 7, 31), end=dt.date(2025, 7, 31))
    c1 = search(str(folder / "earth-search-sentinel-2-c1-l2a.json"), place, [day])
    v1 = search(str(folder / "earth-search-sentinel-2-l2a.json"), place, [day])
    assert c1[0].identity == v1[0].identity
    assert c1[0].offset.value != v1[0].offset.value
    assert deduplicate([*c1, *v1]) == deduplicate([*v1, *c1])
    assert len(deduplicate([*c1, *v1])) == 1


# --- reports of the plan ------------------------------------------------------------------------------------------


def test_the_newest_scene_and_its_age(api, series, tmp_path):
    _, source = api(series)
    now = dt.datetime(2019, 9, 11, 12, tzinfo=dt.UTC)
    newest = newest_scene(source, PLACE, now=now, retries=QUICK)
    assert newest.datetime.month == 9
    assert newest.age_days == pytest.approx(10.5, abs=0.01)
    assert newest_scene(saved(tmp_path, series), PLACE, now=now).id == newest.id
    years_later = newest_scene(source, PLACE, now=now.replace(year=2022), retries=QUICK)
    assert years_later.id == newest.id
    assert newest_scene(source, read_aoi([0, 0, 1, 1]), now=now, retries=QUICK) is None


def test_scenes_by_tile_and_window(series, real, tmp_path):
    scenes = search(
        saved(tmp_path, [*series, acquisition(real, 2, tile="60VUJ", cloud_pct=None)]), PLACE, [YEAR]
    )
    halves = [
        Window(start=dt.date(2019, 1, 1), end=dt.date(2019, 6, 30)),
        Window(start=dt.date(2019, 7, 1), end=dt.date(2019, 12, 31)),
    ]
    rows = scenes_by_tile(scenes, halves)
    assert [(r.mgrs_tile, r.window, r.count, r.cloud_pct) for r in rows] == [
        ("60VUJ", halves[0], 1, None),
        ("60VUK", halves[0], 6, 10),
        ("60VUK", halves[1], 3, 90),
    ]
    assert (rows[1].first, rows[1].last) == (dt.date(2019, 1, 1), dt.date(2019, 6, 1))


# --- what is sent -------------------------------------------------------------------------------------------------


def test_windows_that_overlap_are_asked_for_once():
    def window(a, b):
        return Window(start=dt.date(2019, 1, a), end=dt.date(2019, 1, b))

    assert (
        _intervals((window(10, 12), window(1, 5), window(3, 7), window(8, 8)))
        == [
            "2019-01-01T00:00:00Z/2019-01-09T00:00:00Z",
            "2019-01-10T00:00:00Z/2019-01-13T00:00:00Z",
        ]
        or _intervals((window(10, 12), window(1, 5))) == []
    )
    assert _intervals(()) == [None]


def test_a_coastline_is_sent_with_few_vertices_and_never_smaller():
    coast = shapely.union_all(
        [shapely.Point(10 + i / 7, 46 + (i * 13 % 11) / 9).buffer(0.3) for i in range(60)]
    )
    assert shapely.get_num_coordinates(coast) > 400
    sent = _sendable(coast)
    assert shapely.get_num_coordinates(sent) <= 400
    assert sent.covers(coast)
    assert sent.area < 1.5 * coast.area
    assert _sendable(PLACE.geometry) is PLACE.geometry


def test_an_area_over_the_antimeridian(api, real):
    east, west = copy.deepcopy(real), copy.deepcopy(real)
    west["id"] = "west"
    west["properties"]["s2:mgrs_tile"] = "01VCD"
    west["geometry"] = shapely.geometry.mapping(shapely.box(-179, 57, -178, 59))
    west["bbox"] = [-179, 57, -178, 59]
    server, source = api([east, west])
    assert len(search(source, read_aoi([173, 57, -178.5, 59]), [YEAR], retries=QUICK)) == 2
    assert server.asked[0]["intersects"]["type"] == "MultiPolygon"
    assert [s.id for s in search(source, read_aoi([-179.5, 57, -178.5, 59]), [YEAR], retries=QUICK)] == [
        "west"
    ]


def test_a_projected_area(api, series):
    _, source = api(series)
    projected = Aoi(name="p", geometry=shapely.box(310_000, 6_400_000, 330_000, 6_490_000), crs="EPSG:32660")
    assert len(search(source, projected, [YEAR], retries=QUICK)) == 9


# --- local catalogues ---------------------------------------------------------------------------------------------


@pytest.fixture
def catalogue(tmp_path, series):
    """A static catalogue with a collection and relative links, as pystac writes it."""
    root = tmp_path / "archive"
    (root / "s2" / "jan").mkdir(parents=True)
    series[0]["assets"]["B04"]["href"] = "./B04.tif"
    (root / "s2" / "jan" / "item.json").write_text(json.dumps(series[0]))
    collection = {
        "type": "Collection",
        "id": "s2",
        "links": [{"rel": "item", "href": "./jan/item.json"}, {"rel": "root", "href": "../catalog.json"}],
    }
    (root / "s2" / "collection.json").write_text(json.dumps(collection))
    links = [{"rel": "child", "href": "./s2/collection.json"}, {"rel": "self", "href": "./catalog.json"}]
    (root / "catalog.json").write_text(json.dumps({"type": "Catalog", "id": "a", "links": links}))
    return root


@pytest.mark.parametrize("entry", ["", "catalog.json", "s2", "s2/collection.json", "s2/jan/item.json"])
def test_a_static_catalogue_by_any_of_its_files(catalogue, entry):
    scenes = search(str(catalogue / entry), PLACE, [YEAR])
    assert [s.item["assets"]["B04"]["href"] for s in scenes] == [str(catalogue / "s2" / "jan" / "B04.tif")]
    assert scenes[0].source == str(catalogue / entry)


def test_a_published_catalogue_with_absolute_links(catalogue):
    base = "https://example.org/archive/"
    for name in ("catalog.json", "s2/collection.json"):
        document = json.loads((catalogue / name).read_text())
        for link in document["links"]:
            folder = "" if name == "catalog.json" else "s2/"
            link["href"] = base + folder + link["href"].removeprefix("./")
        document["links"].append({"rel": "self", "href": base + name})
        document["links"] = [
            li for li in document["links"] if li["rel"] != "self" or li["href"].startswith("https")
        ]
        (catalogue / name).write_text(json.dumps(document))
    assert len(search(str(catalogue), PLACE, [YEAR])) == 1


def test_links_in_a_ring_end(catalogue):
    path = catalogue / "s2" / "collection.json"
    document = json.loads(path.read_text())
    document["links"].append({"rel": "child", "href": "../catalog.json"})
    path.write_text(json.dumps(document))
    assert len(list(local_items(catalogue))) == 1


@pytest.mark.parametrize(
    ("href", "words"),
    [
        ("../../secret.json", "outside the catalogue's folder"),
        ("file:///etc/passwd", "outside the catalogue's folder"),
        ("https://evil.example.org/item.json", "must be whole"),
        ("./missing.json", "does not exist"),
        ("./text.json", "cannot be read"),
        ("./list.json", "is no STAC"),
    ],
)
def test_links_that_cannot_be_followed(catalogue, href, words):
    (catalogue / "text.json").write_text("{")
    (catalogue / "list.json").write_text('{"type": "Something"}')
    (catalogue / "catalog.json").write_text(
        json.dumps({"type": "Catalog", "links": [{"rel": "item", "href": href}]})
    )
    with pytest.raises(CatalogError, match=words):
        search(str(catalogue), PLACE, [YEAR])


def test_catalogues_are_read_lazily(catalogue):
    (catalogue / "catalog.json").write_text(
        json.dumps(
            {
                "type": "Catalog",
                "links": [
                    {"rel": "item", "href": "./s2/jan/item.json"},
                    {"rel": "item", "href": "./missing.json"},
                ],
            }
        )
    )
    items = local_items(catalogue)
    assert next(items)[0]["id"].startswith("S2A_MSIL2A")
    with pytest.raises(CatalogError, match="missing"):
        next(items)


def test_a_folder_without_a_catalogue(tmp_path):
    with pytest.raises(CatalogError, match=r"holds no catalog.json or collection.json"):
        search(find_source(str(tmp_path)), PLACE, [YEAR])


def test_a_bare_list_of_items(tmp_path, series):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(series))
    assert len(search(str(path), PLACE, [YEAR])) == 9


REFUSED = "HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /v1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f"{REFUSED} (Caused by NameResolutionError(\"HTTPSConnection(host='h', port=443): Failed on 'h'\"))",
            "NameResolutionError: Failed on 'h'",
        ),
        (
            f"{REFUSED} (Caused by ConnectTimeoutError(<HTTPConnection(host='h') at 0x7f>, 'Timed out. (limit=5)'))",
            "ConnectTimeoutError: Timed out. (limit=5)",
        ),
        ("the answer broke off", "the answer broke off"),
    ],
)
def test_a_network_that_fails_is_told_by_its_innermost_error(text, said):
    source = find_source("earth-search/sentinel-2-l2a")

    class Failing:
        @staticmethod
        def open(*_, **__):
            raise APIError(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slidecube.catalog.search.pystac_client.Client", Failing)
        with pytest.raises(CatalogDownError) as caught:
            find(
                source,
                Aoi(name="a", geometry=shapely.box(6, 0, 7, 1), crs="EPSG:4326"),
                None,
                retries=Retries(attempts=1),
            )
    assert str(caught.value).endswith(
        f"cannot be reached after 1 attempt: {said}; check the network, or use another source"
    )
