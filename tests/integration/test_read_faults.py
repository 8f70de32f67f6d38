"""Reading from a server that fails in every way: the class of a fault, and that a later attempt really asks again."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.transform import from_origin

from slidecube.catalog import faults as faults_module
from slidecube.catalog import read as read_module
from slidecube.catalog.errors import AssetReadError
from slidecube.catalog.hosts import PER_HOST
from slidecube.catalog.read import Asset, Pixels, Place, ReadLog, read_asset

LEFT, TOP, SIDE = 491_520.0, 5_324_800.0, 2048
PIXELS = Pixels(dtype="uint16", kernel="nearest", nodata=0, fill=0)
COPIED = GeoBox((512, 512), from_origin(LEFT + 9000, TOP - 9000, 10, 10), "EPSG:32633")
WARPED = COPIED.to_crs("EPSG:3035")

# of GDAL itself one attempt: what is tried again here is tried again by us
ONCE = {"GDAL_HTTP_MAX_RETRY": "0", "GDAL_HTTP_LOW_SPEED_TIME": "1"}


@dataclass
class Script:
    """What the server does, request by request.

    faults : done to the next requests, in order; a number is a status, "ok" serves
    after : what is done once they are over
    asked : range of each request, with its time
    in_hand : paths of the requests being answered; most_files : how many different ones there were at a time
    """

    data: bytes
    faults: list[str] = field(default_factory=list)
    after: str = "ok"
    retry_after: str = ""
    slow_s: float = 0.0
    asked: list[tuple[float, str]] = field(default_factory=list)
    in_hand: list[str] = field(default_factory=list)
    most_files: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        script = self.server.script
        with script.lock:
            script.asked.append((time.monotonic(), self.headers.get("Range") or ""))
            fault = script.faults.pop(0) if script.faults else script.after
            script.in_hand.append(self.path)
            script.most_files = max(script.most_files, len(set(script.in_hand)))
        try:
            time.sleep(script.slow_s)
            self._answer(script, fault)
        finally:
            with script.lock:
                script.in_hand.remove(self.path)

    do_HEAD = do_GET

    def _answer(self, script, fault):
        if fault.isdigit():
            self.send_response(int(fault))
            if script.retry_after:
                self.send_header("Retry-After", script.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == "silent":
            self.rfile.read(1)  # until the client hangs up
            self.close_connection = True
            return
        data = script.data
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (
            (int(span[1]), min(int(span[2] or len(data)), len(data) - 1)) if span else (0, len(data) - 1)
        )
        part = bytes(end + 1 - start) if fault == "rotten" else data[start : end + 1]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            cut = fault == "cut"
            self.wfile.write(part[: len(part) // 2] if cut else part)
            self.close_connection = cut


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients that give up are part of the test."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Bytes of a Cloud Optimised GeoTIFF of several megabytes."""
    path = tmp_path_factory.mktemp("scene") / "B04.tif"
    profile = {
        "driver": "COG", "width": SIDE, "height": SIDE, "count": 1, "dtype": "uint16", "crs": "EPSG:32633",
        "transform": from_origin(LEFT, TOP, 10, 10), "nodata": 0, "blocksize": 256, "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(np.random.default_rng(0).integers(1, 5000, (SIDE, SIDE)).astype("uint16"), 1)
    return path


@pytest.fixture
def server(scene, monkeypatch):
    """A server on a port of its own, and an asset there: GDAL's memory goes by address."""
    for name, value in ONCE.items():
        monkeypatch.setitem(read_module.GDAL_OPTIONS, name, value)
    monkeypatch.setattr(read_module, "_FIRST_WAIT_S", 0.001)
    httpd = _Server(("127.0.0.1", 0), _Handler)
    httpd.script = Script(data=scene.read_bytes())
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def asset_of(server, name="B04.tif"):
    href = f"http://127.0.0.1:{server.server_port}/{name}"
    return Asset(item="S2A_X", asset="red", places=(Place(href=href, source="loopback"),))


def local(scene, box):
    return read_asset(
        Asset(item="S2A_X", asset="red", places=(Place(href=str(scene), source="local"),)), box, PIXELS, None
    )


def requests_of_one_read(server, box):
    """How many requests an undisturbed read takes, and their count now."""
    read_asset(asset_of(server, f"undisturbed-{box.crs.epsg}.tif"), box, PIXELS, None)
    count = len(server.script.asked)
    server.script.asked.clear()
    return count


# --- the second attempt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [COPIED, WARPED], ids=["copied", "warped"])
@pytest.mark.parametrize("fault", ["403", "404", "410"])
def test_a_status_that_is_final_is_asked_for_once(server, box, fault):
    server.script.after = fault
    with pytest.raises(AssetReadError, match=f"HTTP response code: {fault}") as caught:
        read_asset(asset_of(server), box, PIXELS, None)
    assert caught.value.fault == "data"
    assert len(server.script.asked) == 1


@pytest.mark.parametrize("box", [COPIED, WARPED], ids=["copied", "warped"])
@pytest.mark.parametrize("fault", ["429", "500", "503", "reset", "silent", "cut", "rotten"])
def test_every_other_fault_is_mended_by_asking_again(server, scene, box, fault):
    """Any one request of the read goes wrong, the first or one in its middle."""
    count = requests_of_one_read(server, box)
    assert count > 2
    for at in (0, count - 1) if fault == "silent" else range(count):  # each silence is a second
        server.script.faults[:] = ["ok"] * at + [fault]
        found = read_asset(asset_of(server, f"at-{at}.tif"), box, PIXELS, None)
        np.testing.assert_array_equal(found, local(scene, box), err_msg=f"request {at}")
        assert not server.script.faults, f"request {at} was never sent"


def test_gdal_forgets_what_an_earlier_tile_could_not_open(server, scene):
    """All attempts fail on one tile; the next tile's first attempt must reach the server, which is back."""
    server.script.after = "503"
    log = ReadLog()
    assert read_asset(asset_of(server), COPIED, PIXELS, log) is None
    assert log.passing == {("S2A_X", "red")}
    assert len(server.script.asked) >= read_module._ATTEMPTS["transient"]
    server.script.after = "ok"
    before = len(server.script.asked)
    found = read_asset(asset_of(server), COPIED, PIXELS, ReadLog())
    np.testing.assert_array_equal(found, local(scene, COPIED))
    assert len(server.script.asked) > before


def test_what_came_before_a_body_broke_off_is_not_asked_for_again(server, scene):
    """With every fourth body cut, a read of many requests would else never come to its end."""
    server.script.faults[:] = ["ok", "ok", "ok", "cut"] * 4
    found = read_asset(asset_of(server), COPIED, PIXELS, None)
    np.testing.assert_array_equal(found, local(scene, COPIED))


# --- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "class_"),
    [
        ("500", "transient"),
        ("503", "transient"),
        ("408", "transient"),
        ("reset", "transient"),
        ("silent", "transient"),
        ("cut", "transient"),
        ("429", "throttled"),
        ("404", "data"),
        ("rotten", "data"),
    ],
)
def test_the_class_of_a_fault_that_stays(server, fault, class_, monkeypatch):
    monkeypatch.setattr(read_module, "_PATIENCE_S", 2.5)
    server.script.after = fault
    log = ReadLog()
    assert read_asset(asset_of(server), COPIED, PIXELS, log) is None
    assert log.passing == (set() if class_ == "data" else {("S2A_X", "red")})
    with pytest.raises(AssetReadError) as caught:
        read_asset(asset_of(server), COPIED, PIXELS, None)
    assert caught.value.fault == class_


def test_nobody_listens_and_a_local_file_is_broken(tmp_path, scene, monkeypatch):
    monkeypatch.setattr(read_module, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setitem(read_module.GDAL_OPTIONS, "GDAL_HTTP_MAX_RETRY", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    closed = Place(href=f"http://127.0.0.1:{port}/B04.tif", source="closed")
    half = tmp_path / "half.tif"
    half.write_bytes(scene.read_bytes()[: scene.stat().st_size // 3])
    broken = Place(href=str(half), source="local")
    faults = []
    for places in ((closed,), (broken,), (broken, closed)):
        with pytest.raises(AssetReadError) as caught:
            read_asset(Asset(item="S2A_X", asset="red", places=places), COPIED, PIXELS, None)
        faults.append(caught.value.fault)
    assert faults == ["transient", "data", "transient"], (
        "one place that may come back is worth another attempt"
    )


# --- patience -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("date", [False, True], ids=["seconds", "date"])
def test_a_server_that_asks_for_a_pause_gets_it(server, scene, date):
    pause_s = 1.5
    server.script.retry_after = (
        time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3)) if date else str(pause_s)
    )
    server.script.faults[:] = ["429", "429"]  # of the read, and of the question how long
    began = time.monotonic()
    found = read_asset(asset_of(server), COPIED, PIXELS, None)
    np.testing.assert_array_equal(found, local(scene, COPIED))
    assert time.monotonic() - began >= pause_s
    first, second, third = [when for when, _ in server.script.asked[:3]]
    assert second - first < 0.5, "it was asked at once how long"
    assert third - second >= pause_s - 0.1


def test_a_pause_holds_for_all_threads(server):
    server.script.retry_after = "1"
    server.script.faults[:] = ["429", "429"]
    threads = [
        threading.Thread(target=read_asset, args=(asset_of(server, f"{i}.tif"), COPIED, PIXELS, None))
        for i in range(3)
    ]
    threads[0].start()
    while len(server.script.asked) < 2:
        time.sleep(0.005)
    time.sleep(0.1)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    told = server.script.asked[1][0]
    assert all(when - told >= 0.9 for when, _ in server.script.asked[2:])


def test_a_longer_pause_than_our_patience_is_left_to_the_next_attempt_at_the_tile(server):
    server.script.retry_after = "100"
    server.script.after = "429"
    began = time.monotonic()
    log = ReadLog()
    assert read_asset(asset_of(server), COPIED, PIXELS, log) is None
    assert time.monotonic() - began < 5
    assert log.passing == {("S2A_X", "red")}


@pytest.mark.parametrize("text", ["", "soon", "-5", "1e9", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_a_strange_pause_is_bounded(text):
    pause_s = faults_module._pause_s(text)
    assert pause_s is None or 0 <= pause_s <= 120


def test_one_host_is_asked_by_a_few_threads_at_a_time(server):
    server.script.slow_s = 0.05
    threads = [
        threading.Thread(target=read_asset, args=(asset_of(server, f"many-{i}.tif"), COPIED, PIXELS, None))
        for i in range(3 * PER_HOST)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 < server.script.most_files <= PER_HOST
