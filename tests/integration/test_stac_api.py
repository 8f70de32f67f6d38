"""Planning over a real STAC API: stac-fastapi-pgstac on PostgreSQL, with five thousand items on many pages.

The API holds the simulated archive and thousands of invented acquisitions beside it. It is also killed between two
pages: what is found then must be what is found in peace.
"""

from __future__ import annotations

import datetime as dt
import http.client
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slidecube.catalog import search as search_module
from slidecube.catalog.aoi import read_aoi
from slidecube.catalog.errors import CatalogDownError
from slidecube.catalog.scenes import Window
from slidecube.catalog.search import Retries, find
from slidecube.catalog.sources import find_source
from slidecube.pipeline.open import open_plan

ITEMS = 5_000
COLLECTION = "simulated-sentinel-2-l2a"
WINDOWS = [
    Window(start=dt.date(2018, 5, 1), end=dt.date(2018, 9, 5)),
    Window(start=dt.date(2018, 9, 7), end=dt.date(2018, 11, 15)),
]
AREA = [6.50, 0.20, 6.70, 0.40]


@pytest.fixture(scope="module")
def archive_items(small_archive):
    """The items of the simulated archive, as a provider would publish them."""
    items = []
    for path in sorted((small_archive / "archive" / "sentinel-2-l2a").glob("*/*.json")):
        item = json.loads(path.read_text())
        item["links"] = []
        for asset in item["assets"].values():
            asset["href"] = f"https://files.invalid/{path.stem}/{Path(asset['href']).name}"
        items.append(item)
    return items


@pytest.fixture(scope="module")
def items(archive_items):
    """All that the API holds: every fourth invented item is cloudy, and each tenth lies outside the windows."""
    made = list(archive_items)
    pattern = next(i for i in archive_items if i["properties"]["s2:processing_baseline"] == "05.00")
    text = json.dumps(pattern)
    stamp = pattern["id"].split("_")[3]
    for n in range(ITEMS - len(made)):
        day = dt.date(2019, 2, 1) if n % 10 == 9 else WINDOWS[n % 2].start + dt.timedelta(days=n % 60)
        when = dt.datetime.combine(day, dt.time(n // 3600 % 24, n // 60 % 60, n % 60))
        item = json.loads(
            text.replace(stamp[:8], f"{day:%Y%m%d}")
            .replace("T100031", f"T{when:%H%M%S}")
            .replace(
                "_S" + pattern["properties"]["s2:datastrip_id"].split("_S")[-1].split("_")[0],
                f"_S{when:%Y%m%dT%H%M%S}",
            )
        )
        item["id"] = f"{item['id']}_{n:04d}"
        item["properties"] |= {
            "datetime": f"{when:%Y-%m-%dT%H:%M:%SZ}",
            "eo:cloud_cover": 90.0 if n % 4 == 3 else 10.0,
        }
        made.append(item)
    assert len({item["id"] for item in made}) == len(made) == ITEMS
    return made


@pytest.fixture(scope="module")
def api(items, servers):
    """The running API with all items."""
    module = servers("stac_api")
    try:
        running = module.stac_api()
        server = running.__enter__()
    except module.CannotStart as reason:
        pytest.skip(str(reason))
    try:
        collection = {
            "type": "Collection", "id": COLLECTION, "stac_version": "1.0.0", "description": "x", "license": "other",
            "links": [],
            "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}},
        }  # fmt: skip
        server.load(collection, items)
        yield server
    finally:
        running.__exit__(None, None, None)


def source_at(url):
    return f"{url}/collections/{COLLECTION}"


def wanted_ids(items, max_cloud_pct):
    """Ids of all items, of every version, that are within a window and not too cloudy."""
    return {
        item["id"]
        for item in items
        if item["properties"]["eo:cloud_cover"] <= max_cloud_pct
        and any(dt.datetime.fromisoformat(item["properties"]["datetime"]) in w for w in WINDOWS)
    }


@pytest.mark.slow
def test_five_thousand_items_are_planned(
    api, items, archive_items, desk_in, small_archive, tmp_path, command
):
    """Every page is read, clouds are filtered, and the archive's scenes are those of its local catalogue."""
    desk = desk_in(
        tmp_path / "remote",
        sources={"optical": source_at(api.url)},
        cube={"max_cloud_pct": 60},
        cluster={"failure_budget": 0},
    )
    planned = command("plan", desk.toml)
    assert planned.code == 0, planned.err
    remote = open_plan(desk.workspace).scenes.role("optical")

    near = desk_in(tmp_path / "local", cube={"max_cloud_pct": 60})
    assert command("plan", near.toml).code == 0
    local = open_plan(near.workspace).scenes.role("optical")

    own = {item["id"] for item in archive_items}
    invented = {scene.id for scene in remote} - own
    assert invented == wanted_ids(items, 60) - own
    assert len(invented) > 3_000
    fields = ("id", "datetime", "identity", "datatake", "version", "offset", "bands")
    there = {scene.id: scene for scene in remote if scene.id in own}
    assert there.keys() == {scene.id for scene in local}
    for scene in local:
        other = there[scene.id]
        assert [getattr(scene, name) for name in fields] == [getattr(other, name) for name in fields]
        assert scene.item["geometry"] == other.item["geometry"]
        assert scene.item["properties"] == other.item["properties"]
        assert scene.item["assets"].keys() == other.item["assets"].keys()


# --- an API that dies between two pages -----------------------------------------------------------------------------


class _Proxy(ThreadingHTTPServer):
    """Hands requests on to the API; at the search number `dies_at` it kills the API and cuts the connection.

    back_after_s : the API is started again after that time; None = never
    """

    daemon_threads = True

    def __init__(self, api, dies_at, back_after_s):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.api, self.dies_at, self.back_after_s = api, dies_at, back_after_s
        self.searches, self.killed, self.lock = 0, 0, threading.Lock()
        self.reviver = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def kill(self):
        self.api.kill()
        self.killed += 1
        if self.back_after_s is not None:
            self.reviver = threading.Timer(self.back_after_s, self.api.start)
            self.reviver.start()

    def handle_error(self, request, client_address):
        """Clients that give up are part of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy = self.server
        with proxy.lock:
            proxy.searches += self.command == "POST"
            if self.command == "POST" and proxy.searches == proxy.dies_at:
                proxy.kill()
        try:
            answer, data = self._ask(body)
        except (OSError, http.client.HTTPException):
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def _ask(self, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.api.port, timeout=30)
        try:
            headers = {
                k: v for k, v in self.headers.items() if k.lower() not in ("connection", "accept-encoding")
            }
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()


@pytest.fixture
def dying(api):
    """Make a proxy before the API, which dies there."""
    proxies = []

    def make(dies_at, back_after_s):
        proxy = _Proxy(api, dies_at, back_after_s)
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        proxies.append(proxy)
        return proxy

    yield make
    for proxy in proxies:
        if proxy.reviver is not None:
            proxy.reviver.join()
        proxy.shutdown()
        proxy.server_close()
    if api.process is None:
        api.start()


def test_an_api_that_dies_between_two_pages_and_comes_back_loses_nothing(dying, items):
    proxy = dying(dies_at=7, back_after_s=1.5)
    patient = Retries(attempts=8, first_s=0.2, longest_s=5.0, timeout_s=20.0)
    found = find(
        find_source(source_at(proxy.url)), read_aoi(AREA), WINDOWS, max_cloud_pct=60, retries=patient
    )
    assert proxy.killed == 1
    assert proxy.searches > 20
    assert found.counts["seen"] == len(wanted_ids(items, 100)), "an item came twice, or not at all"
    assert {scene.id for scene in found.scenes} == wanted_ids(items, 60) - _superseded(items)
    assert len(found.scenes) == len({scene.id for scene in found.scenes})


def _superseded(items):
    """Older versions of an acquisition that the archive holds twice."""
    old = {i["id"] for i in items if i["properties"]["s2:processing_baseline"] < "05.00"}
    new = {i["id"].rsplit("_", 1)[0] for i in items if i["properties"]["s2:processing_baseline"] >= "05.00"}
    return {name for name in old if name.rsplit("_", 1)[0] in new}


def test_an_api_that_never_comes_back_is_one_line_and_leaves_nothing(
    dying, desk_in, tmp_path, command, monkeypatch
):
    quick = partial(search_module.Retries, attempts=3, first_s=0.05, longest_s=0.2, timeout_s=5.0)
    monkeypatch.setattr(search_module, "Retries", quick)
    proxy = dying(dies_at=4, back_after_s=None)
    desk = desk_in(tmp_path / "desk", sources={"optical": source_at(proxy.url)})
    refused = command("plan", desk.toml)
    assert proxy.killed == 1
    assert refused.code == 1
    assert (
        f"Catalogue {proxy.url} (collection {COLLECTION!r}) cannot be reached after 3 attempts"
        in refused.refusal
    )
    assert not [path for path in desk.workspace.rglob("*") if path.is_file() and "plan" in str(path)]
    with pytest.raises(CatalogDownError) as caught:
        find(find_source(source_at(proxy.url)), read_aoi(AREA), WINDOWS)
    assert caught.value.fault == "transient"
