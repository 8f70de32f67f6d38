"""Fail-over: a provider whose catalogue is down, one whose files cannot be read, and another that has the same.

Two providers stand on this machine, each a STAC API and a file server. A holds the simulated scenes as ESA would
(offset in the digital numbers of baseline 05.00); B holds the same acquisitions under other ids and asset keys, with
the offset removed, as Earth Search does.
"""

from __future__ import annotations

import copy
import datetime as dt
import json
import re
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely

from slidecube.catalog import read as read_module
from slidecube.catalog import search as search_module
from slidecube.catalog.aoi import read_aoi
from slidecube.catalog.errors import CatalogDownError, CatalogError
from slidecube.catalog.failover import seek
from slidecube.catalog.scenes import SceneTable, Window
from slidecube.catalog.sources import SOURCES, Source
from slidecube.pipeline.config import load_config
from slidecube.pipeline.open import open_plan
from slidecube.pipeline.run import run
from slidecube.pipeline.store import open_layer

BANDS = ("B02", "B03", "B04", "B08")
KEYS = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "SCL": "scl"}
EVERYWHERE = read_aoi([6.0, 0.0, 7.0, 1.0])

SILENT, MUTE = -1, -2
"""In place of a status: the request is taken and never answered; its head is answered, and its body never ends."""


class Provider(ThreadingHTTPServer):
    """A STAC API at /v1 and files at /files.

    items : what it holds, hrefs below /files; down : status of every search, 0 = it answers
    broken : words of paths of files -> status they get, or SILENT or MUTE
    served : paths of the files that were asked for
    """

    daemon_threads = True

    def __init__(self, folder: Path, items: list[dict]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.down, self.searches = folder, 0, 0
        self.broken: dict[str, int] = {}
        self.served: list[str] = []
        self.items = [self._placed(item) for item in items]

    @property
    def name(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/collections/s2"

    def _placed(self, item):
        item = copy.deepcopy(item)
        for asset in item["assets"].values():
            asset["href"] = f"http://127.0.0.1:{self.server_port}/files/{asset['href']}"
        return item

    def handle_error(self, request, client_address):
        """Clients that give up are part of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.startswith("/files/"):
            self._file(self.path.removeprefix("/files/").split("?")[0])
            return
        root = f"http://127.0.0.1:{self.server.server_port}/v1"
        core = "https://api.stacspec.org/v1.0.0/"
        self._answer(
            {
                "type": "Catalog", "id": "p", "description": "p", "stac_version": "1.0.0",
                "conformsTo": [core + "core", core + "item-search"],
                "links": [
                    {"rel": "self", "href": root}, {"rel": "root", "href": root},
                    {"rel": "search", "href": f"{root}/search", "method": "POST"},
                ],
            }
        )  # fmt: skip

    do_HEAD = do_GET

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.searches += 1
        if self.server.down:
            self._answer({"description": "closed"}, status=self.server.down)
            return
        area, (start, _, end) = shapely.geometry.shape(body["intersects"]), body["datetime"].partition("/")
        held = [
            item
            for item in self.server.items
            if shapely.box(*item["bbox"]).intersects(area) and start <= item["properties"]["datetime"] <= end
        ]
        self._answer({"type": "FeatureCollection", "features": held, "links": []})

    def _file(self, name):
        self.server.served.append(name)
        status = next((status for word, status in self.server.broken.items() if word in name), 0)
        if status > 0:
            self._answer({}, status=status)
            return
        if status == SILENT:
            self.rfile.read(1)  # until the client hangs up
            return
        data = (self.server.folder / name).read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (
            (int(span[1]), min(int(span[2] or len(data)), len(data) - 1)) if span else (0, len(data) - 1)
        )
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(end + 1 - start))
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.end_headers()
        if self.command == "GET" and status == MUTE:
            self.wfile.write(data[start : start + 10])
            self.rfile.read(1)
        elif self.command == "GET":
            self.wfile.write(data[start : end + 1])

    def _answer(self, document, status=200):
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture(scope="module")
def holdings(small_archive, tmp_path_factory):
    """Folder and items of the two providers: B's files have the offset of baseline 05.00 removed.

    What is darker than reflectance 0 is lifted in both; no number without the offset could say it.
    """
    a, b = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    items = {"a": [], "b": []}
    for path in sorted((small_archive / "archive" / "sentinel-2-l2a").glob("*/*.json")):
        item = json.loads(path.read_text())
        item["collection"] = "s2"
        item["assets"] = {k: v for k, v in item["assets"].items() if k in KEYS}
        other = copy.deepcopy(item)
        other["id"] = f"mirror-{path.stem}"
        other["properties"]["mirror:boa_offset_applied"] = (
            item["properties"]["s2:processing_baseline"] >= "04.00"
        )
        other["assets"] = {KEYS[k]: v for k, v in other["assets"].items()}
        for band, key in KEYS.items():
            item["assets"][band]["href"] = other["assets"][key]["href"] = f"{path.stem}/{band}.tif"
            removed = other["properties"]["mirror:boa_offset_applied"] and band != "SCL"
            for to, offset_dn in ((a, 0), (b, 1000)):
                file = to / path.stem / f"{band}.tif"
                file.parent.mkdir(exist_ok=True)
                if removed:
                    _without_offset(path.parent / f"{band}.tif", file, offset_dn)
                else:
                    shutil.copy(path.parent / f"{band}.tif", file)
        items["a"].append(item)
        items["b"].append(other)
    return {"a": (a, items["a"]), "b": (b, items["b"])}


def _without_offset(path, to, offset_dn):
    with rasterio.open(path) as src:
        dn, profile = src.read().astype(int), src.profile
    with rasterio.open(to, "w", **profile) as out:
        out.write(np.where(dn == 0, 0, np.maximum(dn, 1001) - offset_dn).astype("uint16"))


@pytest.fixture
def start(holdings, monkeypatch):
    """Start A or B on a port of its own: GDAL keeps what it has read of an address for the life of the process."""
    quick = partial(search_module.Retries, attempts=2, first_s=0.001, longest_s=0.01, timeout_s=5.0)
    monkeypatch.setattr(search_module, "Retries", quick)
    monkeypatch.setattr(read_module, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setitem(read_module.GDAL_OPTIONS, "GDAL_HTTP_MAX_RETRY", "0")
    servers = []

    def begin(name):
        server = Provider(*holdings[name])
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def providers(start):
    return start("a"), start("b")


@pytest.fixture
def desk_of(desk_in, tmp_path):
    """Make a desk whose scenes come from some providers, in that order."""

    def make(name, first, *others, **changes):
        sources = {"optical": first.name, "fallback": [other.name for other in others]}
        return desk_in(tmp_path / name, **{**changes, "sources": {**changes.get("sources", {}), **sources}})

    return make


def arrays(desk):
    """Every stored variable of the optical layers, by window, and the inventory."""
    plan = open_plan(desk.workspace)
    found = {}
    for layer in plan.layers:
        if layer.kind == "optical":
            stored = open_layer(plan.workspace.layer(plan.grid, layer.name))
            rows = [tile.geobox for tile in plan.tiles]
            extent = rows[0]
            for box in rows:
                extent = extent | box
            row, col = plan.grid.offset_px(extent)
            window = stored.isel(y=slice(row, row + extent.shape[0]), x=slice(col, col + extent.shape[1]))
            found |= {(str(layer.window), name): window[name].values for name in window.data_vars}
    return found


def records(desk):
    plan = open_plan(desk.workspace)
    return {
        (layer.name, path.stem): json.loads(path.read_text())
        for layer in plan.layers
        for path in sorted(plan.workspace.layer(plan.grid, layer.name).with_suffix(".ledger").glob("*.json"))
    }


@pytest.fixture(scope="module")
def undisturbed(holdings, desk_in, tmp_path_factory):
    """Layers and records of a run over one provider alone, once for each."""
    made = {}

    def of(name):
        if name not in made:
            server = Provider(*holdings[name])
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            desk = desk_in(tmp_path_factory.mktemp("calm") / name, sources={"optical": server.name})
            assert run(load_config(desk.toml), stages=["cube"], progress=False).complete
            server.shutdown()
            server.server_close()
            made[name] = arrays(desk), records(desk)
        return made[name]

    return of


def assert_equal_arrays(one, two):
    assert one.keys() == two.keys()
    assert len(one) > 8
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name], err_msg=str(name))


# --- a catalogue that is down ---------------------------------------------------------------------------------------


def test_the_next_source_is_asked_and_the_result_is_the_same(providers, undisturbed, desk_of, command):
    a, b = providers
    a.down = 503
    desk = desk_of("desk", a, b, output={"formats": ["parquet", "stac", "report"]})
    planned = command("plan", desk.toml)
    assert planned.code == 0
    assert f"sources     optical from {b.name}, since {a.name} did not answer: " in planned.out
    assert "503" in planned.out
    assert "newest of the provider: mirror-" in planned.out
    assert command("run", desk.toml, "--quiet").code == 0
    assert_equal_arrays(undisturbed("a")[0], arrays(desk))

    (item,) = [json.loads(p.read_text()) for p in desk.workspace.glob("products/*/stac/*.json")]
    optical, dem = item["properties"]["slidecube:sources"]
    assert (optical["asked"], optical["used"]) == (a.name, b.name)
    ((name, reason),) = optical["failed"]
    assert name == a.name
    assert "503" in reason
    assert dem["failed"] == []
    scenes = item["properties"]["slidecube:scenes"]
    assert {s["source"] for s in scenes if s["use"] != "dem"} == {b.name}
    plan = json.loads((desk.workspace / "plans" / open_plan(desk.workspace).run / "plan.json").read_text())
    assert plan["sources"] == item["properties"]["slidecube:sources"]
    (page,) = desk.workspace.glob("products/*/report/index.html")
    assert f"optical from {b.name}, since {a.name} did not answer" in page.read_text()


def test_a_layer_is_of_the_source_that_was_read(providers, desk_in, tmp_path, command, monkeypatch):
    """What was made while the first was down lies beside its layers, and they are found again when it is back."""
    for server, name in zip(providers, ("a/s2", "b/s2"), strict=True):
        endpoint = server.name.removesuffix("/collections/s2")
        source = Source(name=name, endpoint=endpoint, collection="s2", kind="optical", scale=1e-4, nodata=0.0)
        monkeypatch.setitem(SOURCES, name, source)
    desk = desk_in(tmp_path / "desk", sources={"optical": "a/s2", "fallback": ["b/s2"]})

    def layers(*options):
        assert command("plan", desk.toml, *options).code == 0
        made = open_plan(desk.workspace)
        return {layer.name for layer in made.layers if layer.kind == "optical"}, made.by_epoch[
            "event"
        ].terrain

    before, terrain = layers()
    providers[0].down = 503
    assert layers() == (before, terrain), "an unchanged TOML searches nothing"
    meanwhile = layers("--refresh")
    assert not before & meanwhile[0]
    assert meanwhile[1] == terrain
    providers[0].down = 0
    assert layers("--refresh") == (before, terrain)


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_refused_search_is_an_outage(providers, status):
    a, b = providers
    a.down = status
    found = _seek(a, b)
    assert found.sourcing.used == b.name
    assert found.sourcing.alternates == ()
    assert {scene.source for scene in found.scenes} == {b.name}


def test_one_source_alone_fails_as_ever_and_all_down_names_all(providers):
    a, b = providers
    a.down = b.down = 503
    window = [Window(start=dt.date(2018, 5, 1), end=dt.date(2018, 11, 15))]
    with pytest.raises(CatalogDownError, match=r"^Catalogue \S+ .* still answered 503 after 2 attempts"):
        seek([a.name], EVERYWHERE, window)
    with pytest.raises(
        CatalogDownError, match=rf"None of 2 sources answers: {a.name}: .*503.*; {b.name}: .*503"
    ):
        seek([a.name, b.name], EVERYWHERE, window)


def test_a_wrong_name_is_refused_although_it_is_not_needed(providers, desk_of, command):
    a, _ = providers
    desk = desk_of("desk", a).write(sources={"fallback": ["planetary-computer/sentinel-2-l2b"]})
    refused = command("plan", desk.toml)
    assert refused.code == 1
    assert "did you mean 'planetary-computer/sentinel-2-l2a'" in refused.refusal
    assert a.searches == 0


def test_items_that_cannot_be_used_are_no_outage(providers):
    a, b = providers
    del a.items[0]["properties"]["platform"]
    for key in [k for k in a.items[0]["properties"] if k.startswith("s2:")]:
        del a.items[0]["properties"][key]
    window = [Window(start=dt.date(2018, 5, 1), end=dt.date(2018, 11, 15))]
    with pytest.raises(CatalogError, match="does not say its") as caught:
        seek([a.name, b.name], EVERYWHERE, window)
    assert not isinstance(caught.value, CatalogDownError)


def test_an_empty_answer_is_no_outage_and_who_has_more_is_said(providers, desk_of, command):
    a, b = providers
    a.items = [item for item in a.items if item["properties"]["datetime"] > "2018-09-06"]
    desk = desk_of("desk", a, b)
    refused = command("plan", desk.toml)
    assert refused.code == 1
    assert "Epoch 'event' has no pre-event scene between 2018-05-01 and 2018-09-05" in refused.refusal
    assert re.search(rf"or name another source as optical \('{b.name}' holds \d+ there", refused.refusal)


def test_a_fallback_that_does_not_answer_stops_no_plan(providers, desk_of, command):
    a, b = providers
    b.down = 503
    desk = desk_of("desk", a, b)
    planned = command("plan", desk.toml)
    assert planned.code == 0
    assert f"sources     {b.name} could not be asked what it holds of them: " in planned.out
    assert "warning     `slidecube plan --refresh` asks again" in planned.out
    made = open_plan(desk.workspace)
    assert not any(scene.alternates for scene in made.scenes)
    assert command("plan", desk.toml).out.count("could not be asked") == 1, (
        "the plan that is found says it, too"
    )
    b.down = 0
    again = command("plan", desk.toml, "--refresh")
    assert f"{b.name} stands by with 12 of the same scenes" in again.out
    other = open_plan(desk.workspace)
    assert all(scene.alternates for scene in other.scenes.role("optical"))
    assert (other.keys, other.reads) == (made.keys, made.reads), "alternates change no key"
    assert other.run != made.run, "and yet the plan that knows them is another one"


def test_the_dem_has_a_fallback_of_its_own(providers, desk_of, command, small_archive):
    a, _ = providers
    a.down = 503
    local = str(small_archive / "archive" / "dem" / "collection.json")
    sources = {"dem": a.name.replace("s2", "dem"), "fallback_dem": [local]}
    desk = desk_of("desk", a)
    optical = str(small_archive / "archive" / "sentinel-2-l2a" / "collection.json")
    desk.write(sources={**sources, "optical": optical, "fallback": []})
    planned = command("plan", desk.toml)
    assert planned.code == 0, planned.err
    assert f"sources     dem from {local}, since {a.name.replace('s2', 'dem')} did not answer" in planned.out
    assert command("cube", desk.toml, "--quiet").code == 0


# --- who holds the same ---------------------------------------------------------------------------------------------


def _seek(a, b):
    window = [Window(start=dt.date(2018, 5, 1), end=dt.date(2018, 11, 15))]
    return seek([a.name, b.name], EVERYWHERE, window)


def test_alternates_are_the_same_acquisition_of_the_same_baseline(providers):
    a, b = providers
    found = _seek(a, b)
    assert found.sourcing.alternates == ((b.name, len(found.scenes)),)
    for scene in found.scenes:
        (other,) = scene.alternates
        assert other.id == f"mirror-{scene.id}"
        assert other.version == scene.version
        assert other.offset.value == 0.0
        assert set(other.hrefs) == set(KEYS)
        assert other.hrefs["B04"].endswith(f"{scene.id}/B04.tif")
    # the same day was processed twice: the newer one is read, and B's newer one stands by
    twice = [s for s in found.scenes if s.id.endswith("20180718T100031_N0500")]
    assert len(twice) == 2
    assert all(s.alternates[0].id.endswith("N0500") for s in twice)


def test_another_baseline_level_or_acquisition_is_none(providers):
    a, b = providers
    newer = [i for i in b.items if i["properties"]["s2:processing_baseline"] == "05.00"]
    b.items = [i for i in b.items if i not in newer]
    assert {bool(s.alternates) for s in _seek(a, b).scenes if s.version.startswith("05.00")} == {False}
    for item in b.items:
        del item["assets"]["scl"]  # as Level-1C
    assert not any(s.alternates for s in _seek(a, b).scenes)
    b.items = newer
    for item in newer:
        item["properties"]["s2:datastrip_id"] = item["properties"]["s2:datastrip_id"].replace(
            "_S2018", "_S2019"
        )
    assert not any(s.alternates for s in _seek(a, b).scenes)


def test_the_list_is_frozen_with_its_alternates(providers, tmp_path):
    a, b = providers
    found = _seek(a, b)
    table = SceneTable(scenes=found.scenes, sourcing=(found.sourcing,))
    table.to_parquet(tmp_path / "scenes.parquet")
    assert SceneTable.read_parquet(tmp_path / "scenes.parquet") == table
    assert SceneTable(scenes=_seek(a, a).scenes).digest != table.digest


# --- files that cannot be read --------------------------------------------------------------------------------------


BROKEN = {
    "S2A_SIMULATED_T32NKF_20180926T100031_N0500/B04": 503,
    "S2B_SIMULATED_T32NLF_20180901T100031_N0208/B08": 404,
    "S2B_SIMULATED_T32NKF_20181031T100031_N0500/SCL": 404,
}
"""One band of a post- and of a pre-event scene, and a classification."""


def substituted_of(told, source):
    entries = [entry for record in told.values() for entry in record["substituted"]]
    assert {from_ for _, _, from_, _ in entries} <= {source}
    return {f"{scene.removeprefix('mirror-')}/{asset}": why for scene, asset, _, why in entries}


@pytest.mark.parametrize("loader", ["odc-stac", "stackstac"])
@pytest.mark.parametrize("primary", ["a", "b"])
def test_what_cannot_be_read_is_read_elsewhere(providers, undisturbed, desk_of, command, primary, loader):
    """From B for A, where an offset is added, and from A for B, where it is taken away."""
    first, second = providers if primary == "a" else providers[::-1]
    desk = desk_of("desk", first, second, cluster={"loader": loader})
    assert command("plan", desk.toml).code == 0
    first.broken = BROKEN
    assert command("cube", desk.toml, "--quiet").code == 0
    calm, quiet = undisturbed(primary)
    assert_equal_arrays(calm, arrays(desk))

    told = records(desk)
    for name in ("key", "checksums", "scenes", "numbers", "lost"):
        assert {k: r[name] for k, r in told.items()} == {k: r[name] for k, r in quiet.items()}
    assert not any(r["substituted"] for r in quiet.values())
    found = substituted_of(told, second.name)
    keys = {band: band if primary == "a" else key for band, key in KEYS.items()}
    want = {f"{path.split('/')[0]}/{keys[path.split('/')[1]]}": status for path, status in BROKEN.items()}
    assert found.keys() == want.keys()
    for path, status in want.items():
        assert f"code: {status}" in found[path]


@pytest.mark.parametrize("how", [SILENT, pytest.param(MUTE, marks=pytest.mark.slow)])
def test_a_server_that_stalls_is_given_up(providers, undisturbed, desk_of, command, monkeypatch, how):
    """Without a limit the first read would never end, and nobody would be asked instead."""
    monkeypatch.setitem(read_module.GDAL_OPTIONS, "GDAL_HTTP_LOW_SPEED_TIME", "1")
    monkeypatch.setattr(read_module, "_PATIENCE_S", 0.5)
    a, b = providers
    desk = desk_of("desk", a, b)
    assert command("plan", desk.toml).code == 0
    (word,) = [path for path, status in BROKEN.items() if status == 503]
    a.broken = {word: how}
    assert command("cube", desk.toml, "--quiet").code == 0
    assert_equal_arrays(undisturbed("a")[0], arrays(desk))
    told = records(desk)
    assert substituted_of(told, b.name).keys() == {word}
    if how == SILENT:  # told where it happened; then GDAL remembers that there is no such file
        assert any("too slow" in why for record in told.values() for *_, why in record["substituted"])


def test_what_was_read_elsewhere_is_told(providers, desk_of, command):
    a, b = providers
    desk = desk_of("desk", a, b, output={"formats": ["parquet", "stac", "report"]})
    assert command("plan", desk.toml).code == 0
    a.broken = BROKEN
    assert command("run", desk.toml, "--quiet").code == 0
    (item,) = [json.loads(p.read_text()) for p in desk.workspace.glob("products/*/stac/*.json")]
    lineage = item["properties"]["slidecube:substituted"]
    assert {f"{s['scene']}/{s['asset']}" for s in lineage} == BROKEN.keys()
    told = records(desk)
    for entry in lineage:
        tiles = sum(
            s == entry["scene"] and k == entry["asset"]
            for r in told.values()
            for s, k, *_ in r["substituted"]
        )
        assert (entry["source"], entry["tiles"]) == (b.name, tiles)
        assert entry["reason"]
    assert "3 of their assets were read from another source" in item["properties"]["processing:lineage"]
    (page,) = desk.workspace.glob("products/*/report/index.html")
    assert "3 assets read from another source, with the same pixels" in page.read_text()
    assert f"{b.name} stands by with 12 of the same scenes" in page.read_text()


def test_no_source_has_it_and_the_scene_is_lost(providers, desk_of, command):
    a, b = providers
    desk = desk_of("desk", a, b)
    assert command("plan", desk.toml).code == 0
    a.broken = b.broken = {"S2A_SIMULATED_T32NKF_20180926T100031_N0500/B04": 404}
    assert command("cube", desk.toml, "--quiet").code == 0
    lost = {tuple(entry) for record in records(desk).values() for entry in record["lost"]}
    assert {(scene, asset) for scene, asset, _ in lost} == {
        ("S2A_SIMULATED_T32NKF_20180926T100031_N0500", "B04")
    }
    assert all(why.count("code: 404") == 2 and f"; nor from {b.name}: " in why for *_, why in lost)
    assert not any(record["substituted"] for record in records(desk).values())
    desk.write(cube={"max_lost_scenes": 0, "composite": "median"})
    failed = command("cube", desk.toml, "--quiet")
    assert failed.code == 2
    assert "more than max_lost_scenes=0" in failed.err


def test_a_provider_whose_files_are_all_down_is_soon_left_alone(providers, desk_of, command):
    """Each try of a dead server takes a minute: after three assets of a tile the others are read elsewhere at once."""
    a, b = providers
    desk = desk_of("desk", a, b, cluster={"threads_per_worker": 1})
    assert command("plan", desk.toml).code == 0
    a.broken = {"": 503}
    assert command("cube", desk.toml, "--quiet").code == 0
    told = [record for record in records(desk).values() if record["substituted"]]
    assert told
    for record in told:
        assets = {(scene, asset) for scene, asset, *_ in record["substituted"]}
        assert len(assets) == len(record["scenes"]) * 5
    held = {asset["href"] for item in a.items for asset in item["assets"].values()}
    assert len(set(a.served)) <= 3 * len(told) < len(held)


# --- the loader -------------------------------------------------------------------------------------------------------


def test_a_grid_that_the_loader_does_not_know_is_refused_before_anything_is_read(desk, command):
    desk.write(
        area={"crs": "+proj=laea +lat_0=0 +lon_0=7 +datum=WGS84 +units=m"}, cluster={"loader": "stackstac"}
    )
    refused = command("run", desk.toml, "--quiet")
    assert refused.code == 1
    assert "by its EPSG code only" in refused.refusal
    assert "use loader 'odc-stac'" in refused.refusal
    assert not list(desk.workspace.glob("layers/*"))
    assert command("plan", desk.toml).code == 0
