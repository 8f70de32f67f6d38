"""Scenes behind HTTP: range reads, and errors that name item and asset without the signature."""

from __future__ import annotations

import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.transform import from_origin

from slidecube.catalog.errors import AssetReadError
from slidecube.catalog.load import ReadLog, load

LEFT, TOP, SIDE = 491_520.0, 5_324_800.0, 1024


class _Ranges(SimpleHTTPRequestHandler):
    """A file server that honours Range, and answers 503 to every third request of a name with 'busy' in it."""

    protocol_version = "HTTP/1.1"
    served: ClassVar[list[tuple[str, str | None]]] = []
    busy = 0

    def do_GET(self):
        path = self.translate_path(self.path)
        type(self).served.append((self.path, self.headers.get("Range")))
        if "busy" in self.path:
            type(self).busy += 1
            if type(self).busy % 3 == 1:
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            self.send_error(404)
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (int(span[1]), int(span[2] or len(data) - 1)) if span else (0, len(data) - 1)
        part = data[start : end + 1]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    values = np.random.default_rng(0).integers(1, 5000, (SIDE, SIDE)).astype("uint16")
    profile = {
        "driver": "COG", "width": SIDE, "height": SIDE, "count": 1, "dtype": "uint16", "crs": "EPSG:32633",
        "transform": from_origin(LEFT, TOP, 10, 10), "nodata": 0, "blocksize": 256, "compress": "deflate",
    }  # fmt: skip
    for name in ("B04.tif", "busy-B08.tif"):
        with rasterio.open(tmp_path / name, "w", **profile) as file:
            file.write(values, 1)
    _Ranges.served, _Ranges.busy = [], 0
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: _Ranges(*a, directory=str(tmp_path)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", values
    httpd.shutdown()
    httpd.server_close()


def _item(**hrefs):
    box = (
        GeoBox((SIDE, SIDE), from_origin(LEFT, TOP, 10, 10), "EPSG:32633")
        .extent.to_crs("EPSG:4326")
        .boundingbox
    )
    w, s, e, n = box.bbox
    ring = [[w, s], [e, s], [e, n], [w, n], [w, s]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": "S2A_HTTP", "links": [],
        "collection": "c", "geometry": {"type": "Polygon", "coordinates": [ring]}, "bbox": [w, s, e, n],
        "properties": {"datetime": "2021-06-01T10:00:00Z", "proj:epsg": 32633, "proj:code": "EPSG:32633"},
        "assets": {k: {"href": v, "type": "image/tiff; application=geotiff"} for k, v in hrefs.items()},
    }  # fmt: skip


BOX = GeoBox((512, 512), from_origin(LEFT, TOP, 10, 10), "EPSG:32633")


def test_a_block_is_read_by_ranges_and_a_busy_server_is_asked_again(server):
    url, values = server
    cube = load([_item(B04=f"{url}/B04.tif", B08=f"{url}/busy-B08.tif")], BOX, ["B04", "B08"])
    cube = cube.compute(scheduler="synchronous")
    np.testing.assert_array_equal(cube["B04"].values[0], values[:512, :512])
    np.testing.assert_array_equal(cube["B08"].values[0], values[:512, :512])
    assert _Ranges.busy > 1
    ranges = [span for path, span in _Ranges.served if path.endswith("/B04.tif") and span]
    assert ranges, "the whole file was fetched"


def test_a_missing_file_is_named_without_its_signature(server, caplog, capfd):
    url, _ = server
    item = _item(B04=f"{url}/gone.tif?sig=SECRET&se=2030")
    log = ReadLog()
    load([item], BOX, ["B04"], log=log).compute(scheduler="synchronous")
    ((scene, asset, reason),) = log.lost
    assert (scene, asset) == ("S2A_HTTP", "B04")
    assert "gone.tif" in reason or "404" in reason
    assert "SECRET" not in reason
    with pytest.raises(AssetReadError) as caught:
        load([item], BOX, ["B04"]).compute(scheduler="synchronous")
    assert "SECRET" not in str(caught.value)
    assert "SECRET" not in caplog.text + "".join(capfd.readouterr())
