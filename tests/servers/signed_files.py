"""Planetary Computer on this machine: storage that demands a signature, and the service that gives tokens.

The addresses are the provider's own; a process reaches this server under them since it is told that it is its proxy.
So the provider's library, GDAL and our code are those of a true run.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

HOST = "sentinel2l2a01.blob.core.windows.net"
WORD = "tOkEnOfThePlanet"
"""In every signature: whoever finds it anywhere has found a secret."""


class SignedFiles(ThreadingHTTPServer):
    """Files below a folder, readable with a token that is young enough.

    life_s : how long a token is good; told_s : how long the service says that it is
    broken : words of paths -> status they get whatever the token
    tokens : given so far; refused : requests with none, or an old one; served : paths of the others
    """

    daemon_threads = True

    def __init__(self, folder: Path, *, life_s: float, told_s: float = 3600.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.life_s, self.told_s = folder, life_s, told_s
        self.broken: dict[str, int] = {}
        self.tokens: dict[str, float] = {}
        self.refused = 0
        self.served: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a process takes this server for the provider."""
        here = f"http://127.0.0.1:{self.server_port}"
        return {"http_proxy": here, "no_proxy": "127.0.0.1", "PC_SDK_SAS_URL": f"{here}/token"}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are part of the tests."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def new_token(self) -> dict[str, str]:
        with self.lock:
            signature = f"{WORD}{len(self.tokens)}"
            self.tokens[signature] = time.monotonic()
        until = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self.told_s)
        return {"msft:expiry": until.isoformat(), "token": f"se={until:%Y-%m-%d}&sp=r&sig={signature}"}

    def accepts(self, query: str) -> bool:
        given = self.tokens.get(parse_qs(query).get("sig", [""])[0])
        good = given is not None and time.monotonic() - given < self.life_s
        with self.lock:
            self.refused += not good
        return good


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SignedFiles

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path.startswith("/token/"):
            self._answer(200, json.dumps(self.server.new_token()).encode())
            return
        assert parts.hostname == HOST, self.path
        status = next((s for word, s in self.server.broken.items() if word in parts.path), 0)
        if not self.server.accepts(parts.query):
            self._answer(403, b"")
            return
        if status:
            self._answer(status, b"")
            return
        self.server.served.append(parts.path)
        data = (self.server.folder / parts.path.split("/", 2)[2]).read_bytes()
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


def publish(archive: Path, folder: Path, *, query: str = "") -> Path:
    """Write the catalogue of an archive's scenes as a user saved it from the provider; returns the ItemCollection.

    query : of every href, such as an old signature
    """
    items = []
    for path in sorted((archive / "archive" / "sentinel-2-l2a").glob("*/*.json")):
        item = json.loads(path.read_text())
        item["links"] = []
        for asset in item["assets"].values():
            name = Path(asset["href"]).name
            asset["href"] = f"http://{HOST}/sentinel2-l2/{path.stem}/{name}{query}"
        items.append(item)
    saved = folder / "saved.json"
    saved.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return saved
