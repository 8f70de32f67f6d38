"""A workspace in a bucket of a real S3 server: the products of a folder, whatever the server or a driver does."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pytest

from slidecube.pipeline import storage
from slidecube.pipeline.config import load_config
from slidecube.pipeline.open import open_inventory
from slidecube.pipeline.run import run
from slidecube.pipeline.status import clean, status
from slidecube.pipeline.storage import Place, matching, place_of, sizes

FORMATS = ["parquet", "gpkg", "cog", "stac", "report"]
QUICK = {"sample": 2000, "epochs": 2, "batch": 1000}
BANDS = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
RULE = {"detect": {"model": "rdndvi"}, "output": {"formats": FORMATS}}
LEARNT = {
    "cube": {"bands": BANDS},
    "detect": {"model": "cae-kmeans", "parameters": QUICK},
    "output": {"formats": ["parquet"]},
}


@pytest.fixture(scope="module")
def folder_run(desk_in, tmp_path_factory):
    """The same run in a local folder, once: `folder_run(changes)` -> workspace."""
    made: dict[str, Place] = {}

    def once(changes: dict) -> Place:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            desk = desk_in(tmp_path_factory.mktemp("folder") / "desk", **changes)
            assert run(load_config(desk.toml), progress=False).complete
            made[key] = place_of(desk.workspace)
        return made[key]

    return once


@pytest.fixture
def in_bucket(desk_in, tmp_path, s3):
    """A desk whose workspace lies in a bucket: `in_bucket(changes)`."""

    def make(changes: dict):
        return desk_in(tmp_path / "desk", **changes).write(output={"workspace": s3})

    return make


@pytest.mark.parametrize(
    "changes",
    [pytest.param(RULE, id="rdndvi"), pytest.param(LEARNT, id="cae-kmeans", marks=pytest.mark.slow)],
)
def test_a_bucket_holds_what_a_folder_holds(folder_run, in_bucket, s3, changes, assert_same_work):
    desk = in_bucket(changes)

    report = run(load_config(desk.toml), progress=False)

    assert report.complete, report.reasons
    assert_same_work(folder_run(changes), place_of(s3))
    assert not desk.workspace.exists()
    state = status(s3)
    assert state["complete"]
    assert state["scene_reads"] == status(folder_run(changes))["scene_reads"] > 0
    inventory, reference = open_inventory(s3), open_inventory(folder_run(changes))
    np.testing.assert_array_equal(inventory["probability"].values, reference["probability"].values)
    again = run(load_config(desk.toml), progress=False)
    assert (again.complete, sum(again.done.values())) == (True, 0)
    assert clean(s3) == []


@pytest.mark.slow
def test_shards_that_start_together_make_the_stores_once(folder_run, in_bucket, s3, assert_same_work):
    desk = in_bucket(RULE)
    assert desk.cli("plan", desk.toml).code == 0
    shards = [desk.start("cube", desk.toml, "--quiet", "--shard", f"{i}/3") for i in range(3)]
    for shard in shards:
        out, err = shard.communicate(timeout=240)
        assert shard.returncode == 0, (out, err)

    report = run(load_config(desk.toml), progress=False)

    assert report.complete
    assert "cube" not in report.done, "the shards did it"
    assert_same_work(folder_run(RULE), place_of(s3))
    assert status(s3)["scene_reads"] == status(folder_run(RULE))["scene_reads"]


@pytest.mark.slow
def test_a_changed_plan_leaves_what_clean_removes(in_bucket, s3):
    desk = in_bucket({})
    run(load_config(desk.toml), progress=False)
    desk.write(detect={"threshold": 0.9})
    run(load_config(desk.toml), progress=False)
    before = sizes(place_of(s3), deep=True)

    removed = clean(s3)

    assert {path.parent.name for path, _ in removed} == {"plans", "inventories", "products"}
    after = sizes(place_of(s3), deep=True)
    assert sum(before.values()) - sum(after.values()) >= sum(size for _, size in removed) > 0
    assert status(s3)["complete"]


def records_there(s3: str) -> int:
    return len(matching(place_of(s3), "layers/*/*/*.json", "inventories/*.ledger/*/*.json"))


def start_and_wait(desk, s3: str, least: int):
    """Start a driver and wait until it has left some records; returns its process."""
    driver = desk.start("run", desk.toml, "--quiet")
    deadline = time.monotonic() + 120
    while records_there(s3) < least:
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return driver


@pytest.mark.parametrize("least", [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 13))])
def test_a_killed_driver_is_taken_over_and_its_work_goes_on(
    folder_run, in_bucket, s3, least, assert_same_work
):
    desk = in_bucket(RULE)
    driver = start_and_wait(desk, s3, least)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    kept = records_there(s3)

    report = run(load_config(desk.toml), progress=False)

    assert report.complete, report.reasons
    assert (
        report.done["cube"] + report.done["detect"] <= 16 - kept + 4
    )  # tiles in work when it died are done again
    assert_same_work(folder_run(RULE), place_of(s3))
    assert status(s3)["scene_reads"] >= status(folder_run(RULE))["scene_reads"]


def test_a_second_driver_is_refused_while_the_first_one_lives(folder_run, in_bucket, s3, assert_same_work):
    desk = in_bucket(RULE)
    driver = start_and_wait(desk, s3, 1)
    os.killpg(driver.pid, signal.SIGSTOP)  # it lives, and keeps its lock, however long the other takes
    try:
        refused = desk.cli("run", desk.toml, "--quiet")
        assert refused.code == 1
        assert "is in use by run" in refused.refusal
        assert s3 in refused.refusal
    finally:
        os.killpg(driver.pid, signal.SIGCONT)
    out, err = driver.communicate(timeout=180)
    assert driver.returncode == 0, (out, err)
    assert_same_work(folder_run(RULE), place_of(s3))


class FaultyProxy:
    """A proxy in front of an S3 server that spoils some requests, chosen by a seed; at the end it has counted them.

    faults : "500" before the request is passed on; "after" : it is obeyed, and the answer is 500 all the same; "slow"
        : 503 SlowDown; "cut" : half of the body; "stall" : silence
    """

    KINDS = ("500", "after", "slow", "cut", "stall")

    def __init__(self, upstream: str, *, share: float, stall_s: float, seed: int) -> None:
        self.upstream, self.share, self.stall_s = urlsplit(upstream), share, stall_s
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.seen: Counter[str] = Counter()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self):
                proxy.answer(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def draw(self) -> str:
        with self.lock:
            kind = self.random.choice(self.KINDS) if self.random.random() < self.share else "good"
            self.seen[kind] += 1
        return kind

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        kind = self.draw()
        if kind in {"500", "slow"}:
            code, name = (500, "InternalError") if kind == "500" else (503, "SlowDown")
            self.send(handler, code, f"<Error><Code>{name}</Code></Error>".encode())
            return
        if kind == "stall":
            time.sleep(self.stall_s)
            handler.close_connection = True
            return
        with closing(http.client.HTTPConnection(self.upstream.netloc, timeout=60)) as upstream:
            upstream.request(handler.command, handler.path, body, dict(handler.headers))
            got = upstream.getresponse()
            content, headers = got.read(), got.headers
        if kind == "after":
            self.send(handler, 500, b"<Error><Code>InternalError</Code></Error>")
            return
        self.send(handler, got.status, content, headers, cut=kind == "cut")

    def send(self, handler, code, content, headers=None, *, cut=False) -> None:
        handler.send_response_only(code)
        for name, value in (headers or {}).items():
            if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                handler.send_header(name, value)
        length = len(content) if handler.command != "HEAD" else int((headers or {}).get("Content-Length", 0))
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content[: len(content) // 2] if cut else content)
        handler.close_connection = cut


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_server_that_fails_at_every_tenth_request_changes_nothing(
    folder_run, in_bucket, s3, s3_server, monkeypatch, seed, assert_same_work
):
    monkeypatch.setattr(storage, "SILENT_S", 1.0)
    desk = in_bucket(RULE)
    with FaultyProxy(s3_server, share=0.1, stall_s=1.5, seed=seed) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        report = run(load_config(desk.toml), progress=False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)

    assert report.complete, report.reasons
    assert not report.failed
    assert min(proxy.seen[kind] for kind in FaultyProxy.KINDS) >= 5, proxy.seen
    assert_same_work(folder_run(RULE), place_of(s3))


def test_creators_behind_faults_still_find_one_winner(s3, s3_server, monkeypatch):
    """A request that was obeyed and answered with a fault is tried again, and must not take itself for another's."""
    monkeypatch.setattr(storage, "SILENT_S", 1.0)
    with FaultyProxy(s3_server, share=0.4, stall_s=1.2, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for n in range(12):
            place = place_of(s3) / f"lock-{n}.json"
            names = ["one", "two", "three"]
            with ThreadPoolExecutor(len(names)) as pool:
                won = pool.map(storage.create, [place] * len(names), [name.encode() for name in names])
            assert [name for name, made in zip(names, won, strict=True) if made] == [place.read_text()]
    assert proxy.seen["after"] > 0
