"""Any field of any type: a broken item is left out with its reason, and the sound one beside it is found."""

from __future__ import annotations

import builtins
import contextlib
import copy
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import shapely

from slidecube.catalog import search as search_module
from slidecube.catalog.aoi import Aoi
from slidecube.catalog.errors import CatalogDownError, CatalogError
from slidecube.catalog.items import normalised
from slidecube.catalog.search import Retries, find
from slidecube.catalog.sources import SOURCES

WORLD = Aoi(name="world", geometry=shapely.box(-180, -85, 180, 85))
BROKEN = [5, "x", None, [], {}, [5], "//[bad", float("-inf")]


@pytest.fixture(scope="module")
def item(repo_root):
    path = repo_root / "tests" / "data" / "stac_items" / "planetary-computer-sentinel-2-l2a.json"
    found = json.loads(path.read_text())
    one = found["features"][0] if "features" in found else found
    for asset in one["assets"].values():
        asset["href"] = "B04.tif"
    return one


def places(value, before=()):
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield (*before, key)
        yield from places(inner, (*before, key))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("broken", BROKEN, ids=repr)
def test_one_broken_field_never_stops_a_search(item, tmp_path, broken):
    path = tmp_path / "items.json"
    for place in places(item):
        bad = copy.deepcopy(item)
        inner = bad
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = broken
        sound = {**item, "id": "SOUND_" + item["id"]}
        path.write_text(json.dumps({"type": "FeatureCollection", "features": [bad, sound]}))
        try:
            found = find(str(path), WORLD, None)
        except CatalogError:
            continue  # an address that leads elsewhere stops the whole catalogue, in one line
        assert len(found.scenes) >= 1, place


@pytest.mark.parametrize(
    "document",
    [
        {"type": "Catalog", "links": 5},
        {"type": "Catalog", "links": [5]},
        {"type": "FeatureCollection", "features": 5},
    ],
)
def test_a_broken_list_is_empty(tmp_path, document):
    path = tmp_path / "catalog.json"
    path.write_text(json.dumps(document))
    assert not find(str(path), WORLD, None).scenes


def test_a_link_that_is_no_address_is_refused(tmp_path):
    path = tmp_path / "catalog.json"
    path.write_text(json.dumps({"type": "Catalog", "links": [{"rel": "child", "href": "//[bad"}]}))
    with pytest.raises(CatalogError, match="is no address"):
        find(str(path), WORLD, None)


# --- what a remote catalogue may not do -------------------------------------------------------------------------------

REMOTE = SOURCES["planetary-computer/sentinel-2-l2a"]


@pytest.mark.parametrize(
    "href",
    [
        "/etc/passwd",
        "etc/passwd",
        "../../etc/passwd",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file://localhost/etc/passwd",
        "/vsicurl/http://127.0.0.1/x.tif",
        "/vsizip//etc/x.zip/x.tif",
        "/vsisubfile/0_100,/etc/passwd",
        "/vsistdin/",
        "vrt:///etc/passwd?bands=1",
        "VRT://x.tif",
        "NETCDF:/etc/passwd:band",
        "HDF5:/etc/passwd://x",
        "GTIFF_DIR:1:/etc/passwd",
        "JP2:/etc/passwd",
        "zip+file:///etc/x.zip!x.tif",
        "gs://bucket/x.tif",
        "ftp://host/x.tif",
        "data:image/tiff;base64,AAAA",
        "<VRTDataset/>",
        "http:///etc/passwd",
        "https://user:password@host/x.tif",
        "https://host/x.vrt",
        "https://host/x.tif\r\nHost: evil",
    ],
)
def test_a_remote_catalogue_names_no_file_of_this_machine_and_no_driver(item, href):
    bad = copy.deepcopy(item)
    bad["assets"]["B04"]["href"] = href
    with pytest.raises(CatalogError) as refused:
        normalised(bad, REMOTE)
    assert "\n" not in str(refused.value)
    assert "password@" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": "x" * 10_000_000}, "an id of 10000000 characters"),
        ({"id": "a\nb"}, "all printable"),
        ({"id": "\u202egnp.exe"}, "all printable"),
        ({"properties": {"title": "x" * 10_000_000}}, "has 10.0 MB, more than 1"),
        ({"assets": {"B04": {"href": "https://host/" + "x" * 10_000_000 + ".tif"}}}, "above 4000 characters"),
    ],
    ids=["long id", "line in id", "turned id", "long text", "long href"],
)
def test_what_no_scene_needs_is_refused_in_one_short_line(item, change, says):
    bad = copy.deepcopy(item)
    for asset in bad["assets"].values():
        asset["href"] = "https://host/x.tif"
    for key, value in change.items():
        if isinstance(value, dict):
            for name, inner in value.items():
                old = bad[key].get(name)
                bad[key][name] = {**old, **inner} if isinstance(old, dict) else inner
        else:
            bad[key] = value
    with pytest.raises(CatalogError, match=says) as refused:
        normalised(bad, REMOTE)
    assert len(str(refused.value)) < 600
    assert str(refused.value).isprintable()


@pytest.fixture
def answering():
    """Start servers that answer every search with some bytes, and everything else with a catalogue's root."""
    servers = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            root = f"http://127.0.0.1:{self.server.server_port}"
            core = "https://api.stacspec.org/v1.0.0/"
            self.answer(
                json.dumps(
                    {
                        "type": "Catalog", "id": "t", "description": "t", "stac_version": "1.0.0",
                        "conformsTo": [core + "core", core + "item-search"],
                        "links": [
                            {"rel": "self", "href": root}, {"rel": "root", "href": root},
                            {"rel": "search", "href": self.server.search or f"{root}/search", "method": "POST"},
                        ],
                    }
                ).encode()
            )  # fmt: skip

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            if callable(self.server.page):
                self.server.page(self)
            else:
                self.answer(self.server.page)

        def answer(self, data):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            """Clients that give up are part of the test."""

    def start(page, search=""):
        server = Server(("127.0.0.1", 0), Handler)
        server.page, server.search = page, search
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return replace(REMOTE, endpoint=f"http://127.0.0.1:{server.server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


QUICK = Retries(attempts=2, first_s=0.001, longest_s=0.01, timeout_s=5.0)


@pytest.mark.parametrize("depth", [2_000, 500_000])
def test_absurd_nesting_is_one_line(answering, depth):
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    page = (
        b'{"type": "FeatureCollection", "features": [{"id": "x", "properties": '
        + nested
        + b'}], "links": []}'
    )
    with pytest.raises(CatalogDownError, match="is not a STAC API") as refused:
        find(answering(page), WORLD, None, retries=QUICK)
    assert len(str(refused.value)) < 400


def test_an_endless_answer_is_given_up(answering, monkeypatch):
    monkeypatch.setattr(search_module, "_LONGEST_ANSWER", 3 << 20)

    def endless(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:
            handler.wfile.write(b"100000\r\n" + b" " * 0x100000 + b"\r\n")

    with pytest.raises(CatalogDownError, match="more than 3 MB as one page"):
        find(answering(endless), WORLD, None, retries=QUICK)


@pytest.mark.parametrize("link", ["file:///etc/passwd", "/etc/passwd", "ftp://127.0.0.1/x", "//etc/passwd"])
def test_a_catalogue_that_links_to_a_file_reads_none(answering, tmp_path, monkeypatch, link, item):
    """As its search, and as its next page; what is opened is told by Python itself."""
    one = {**item, "assets": {k: {**a, "href": "https://host/x.tif"} for k, a in item["assets"].items()}}
    page = {"type": "FeatureCollection", "features": [one], "links": [{"rel": "next", "href": link}]}
    opened = []
    real = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda file, *a, **k: opened.append(str(file)) or real(file, *a, **k)
    )
    with pytest.raises(CatalogDownError, match="may link to http and https only"):
        find(answering(json.dumps(page).encode()), WORLD, None, retries=QUICK)
    with contextlib.suppress(CatalogDownError):  # a link without a scheme is one of the server's own
        assert not find(answering(b"{}", search=link), WORLD, None, retries=QUICK).scenes
    assert not [path for path in opened if "passwd" in path]


def test_ids_of_any_type_stop_no_page(answering, item):
    odd = [{**item, "id": value} for value in ([], {}, None, 5, 5.0, True)]
    sound = {**item, "assets": {k: {**a, "href": "https://host/x.tif"} for k, a in item["assets"].items()}}
    page = {"type": "FeatureCollection", "features": [*odd, sound, *odd], "links": []}
    assert len(find(answering(json.dumps(page).encode()), WORLD, None, retries=QUICK).scenes) == 1
