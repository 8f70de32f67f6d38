"""An archive behind HTTP that can be made to stall, so that a tile is in work for as long as a test wants."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Gate(ThreadingHTTPServer):
    """Files below a folder, over HTTP with ranges; while the gate is shut, every request waits.

    waiting : requests that stand before the gate
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.open = threading.Event()
        self.open.set()
        self.waiting = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed are what this is for."""

    def close(self) -> None:
        self.open.set()
        self.shutdown()
        self.server_close()

    def publish(self, archive: Path, saved: Path) -> Path:
        """Write the catalogue of an archive's scenes with addresses of this server; returns the ItemCollection."""
        items = []
        for path in sorted((archive / "archive" / "sentinel-2-l2a").glob("*/*.json")):
            item = json.loads(path.read_text())
            item["links"] = []
            for asset in item["assets"].values():
                file = (path.parent / asset["href"]).resolve().relative_to(self.folder.resolve())
                asset["href"] = f"http://127.0.0.1:{self.server_port}/{file}"
            items.append(item)
        saved.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
        return saved


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gate

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if not self.server.open.is_set():
            with self.server.lock:
                self.server.waiting += 1
            self.server.open.wait()
            with self.server.lock:
                self.server.waiting -= 1
        try:
            data = (self.server.folder / self.path.lstrip("/")).read_bytes()
        except FileNotFoundError:
            self._answer(404, b"")
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            self._answer(200, data)
            return
        start, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        self._answer(206, data[start : end + 1], f"bytes {start}-{end}/{len(data)}")

    do_HEAD = do_GET

    def _answer(self, status: int, data: bytes, span: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
