"""Watching a run: its pace out of the events, and its metrics as Prometheus reads them."""

from __future__ import annotations

import datetime as dt
import json
import os
import threading
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slidecube.pipeline import cli
from slidecube.pipeline import drivers as drivers_module
from slidecube.pipeline import pace as pace_module
from slidecube.pipeline.drivers import Drivers
from slidecube.pipeline.lock import Lock
from slidecube.pipeline.pace import pace
from slidecube.pipeline.status import _minutes_left
from slidecube.pipeline.storage import Place, matching, place_of, write_atomic
from slidecube.pipeline.summaries import prometheus_text, status_summary

NOW = dt.datetime(2026, 11, 21, 12, 0, tzinfo=dt.UTC)


@pytest.fixture(params=["folder", "bucket"])
def folder(request, tmp_path) -> Place:
    """An empty place for events."""
    return place_of(request.getfixturevalue("s3") if request.param == "bucket" else tmp_path) / "events"


def tell(path: Place, *events: tuple[float, str, dict[str, str]]) -> None:
    """Append to a file, or write one more object of a folder, as the drivers do."""
    lines = ""
    for minutes_ago, name, fields in events:
        when = (NOW - dt.timedelta(minutes=minutes_ago)).isoformat(timespec="milliseconds")
        lines += json.dumps({"time": when, "event": name, **fields}) + "\n"
    append(path, lines)


def append(path: Place, text: str) -> None:
    if not isinstance(path, Path):
        write_atomic(path / f"{len(matching(path, '*')) + 1:08d}-0123.jsonl", text)
        return
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def task(minutes_ago: float, stage: str = "cube", status: str = "done"):
    return minutes_ago, "task", {"stage": stage, "status": status}


def test_the_pace_is_that_of_the_last_quarter_of_an_hour(folder):
    tell(folder / "a-1.jsonl", *[task(60)] * 500, *[task(m) for m in range(10)], task(1, status="failed"))

    assert pace(folder, "a-1", now=NOW) == {"cube": round(10 / 9, 2)}


def test_shards_add_up_and_other_runs_do_not(folder):
    tell(folder / "a-1.jsonl", task(10))
    tell(folder / "a-1.cube-0of2.jsonl", task(10), task(5))
    tell(folder / "a-1.detect-1of2.jsonl", task(2, "detect"))
    tell(folder / "a-11.jsonl", *[task(3)] * 100)

    assert pace(folder, "a-1", now=NOW) == {"cube": 0.3, "detect": 0.1}


def test_a_run_that_has_just_begun_has_the_pace_since_it_began(folder):
    tell(folder / "a-1.jsonl", (2, "stage_started", {"stage": "cube"}), task(0.5), task(0.25))

    assert pace(folder, "a-1", now=NOW) == {"cube": 1.0}


def test_nothing_done_has_no_pace(folder):
    assert pace(folder, "a-1", now=NOW) == {}
    tell(folder / "a-1.jsonl", (1, "run_started", {}))
    assert pace(folder, "a-1", now=NOW) == {}


def test_only_the_end_of_a_long_file_is_read_and_half_lines_do_no_harm(tmp_path, monkeypatch):
    tell(tmp_path / "a-1.jsonl", *[task(8)] * 50, *[task(4)] * 4)
    line = len((tmp_path / "a-1.jsonl").read_bytes()) // 54
    monkeypatch.setattr(pace_module, "_TAIL_BYTES", line * 4 + line // 2)
    append(tmp_path / "a-1.jsonl", '{"time": "2026')

    assert pace(tmp_path, "a-1", now=NOW) == {"cube": 1.0}


def test_only_the_newest_objects_of_many_are_read_and_half_lines_do_no_harm(s3, monkeypatch):
    folder = place_of(s3)
    for _ in range(9):
        tell(folder / "a-1.jsonl", *[task(8)] * 50)
    tell(folder / "a-1.jsonl", task(4), task(3))
    append(folder / "a-1.jsonl", '{"time": "2026')
    tell(folder / "a-1.jsonl", task(2), task(1))
    monkeypatch.setattr(pace_module, "_TAIL_OBJECTS", 3)

    assert pace(folder, "a-1", now=NOW) == {"cube": 1.0}


@pytest.mark.parametrize(
    ("cube", "detect", "speed", "minutes"),
    [
        ((10, 2), (0, 0), {"cube": 4.0}, 3.0),
        ((10, 2), (12, 0), {"cube": 4.0}, None),
        ((10, 2), (12, 0), {"cube": 4.0, "detect": 6.0}, 5.0),
        ((0, 0), (0, 0), {"cube": 4.0}, None),
    ],
)
def test_what_is_left(cube, detect, speed, minutes):
    tiles = {
        stage: {"due": due, "running": running}
        for stage, (due, running) in {"cube": cube, "detect": detect}.items()
    }
    assert _minutes_left(tiles, speed) == minutes


STATE = {
    "run": "a-1",
    "tiles": {"cube": {"done": 3, "due": 1, "failed": 0, "running": 2}},
    "pace": {"cube": 1.5},
    "minutes_left": 200.0,
    "scene_reads": 12,
    "drivers": 2,
    "dashboards": [],
    "land_cover": [],
    "shifts": {},
    "silent": [],
    "jobs": [],
    "running": "a-1",
    "used": {"bytes": 2_000_000_000, "task_hours": 1.25, "peak_mem_gb": 3.2},
    "predicted": {"bytes": 4_000_000_000, "cpu_hours": 2.0, "peak_mem_gb": 4.0},
    "complete": False,
    "statistics": [],
    "observability": {},
    "not_observable": {},
    "failures": [],
    "lost": [],
    "substituted": [],
}


def test_metrics_are_what_prometheus_reads():
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(prometheus_text(STATE))
        for sample in family.samples
    }
    run = ("run", "a-1")
    assert found["slidecube_tiles", run, ("stage", "cube"), ("state", "running")] == 2
    assert found["slidecube_tiles_per_minute", run, ("stage", "cube")] == 1.5
    assert found["slidecube_stored_bytes", run] == 2e9
    assert found["slidecube_complete", run] == 0
    assert {name for name, *_ in found} >= {
        "slidecube_drivers",
        "slidecube_scene_reads",
        "slidecube_task_hours",
    }


def test_the_summary_tells_pace_rest_and_use():
    text = status_summary(STATE)

    assert "running     2 drivers: cube 1.5 tiles a minute; 3.3 hours left" in text
    assert "used        1.25 hours of tiles, 2.00 GB stored, 3.2 GB of memory (predicted 2.00 hours" in text


BEAT_S, SILENT_S = 0.1, 1.5


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(drivers_module, "BEAT_S", BEAT_S)
    monkeypatch.setattr(drivers_module, "SILENT_S", SILENT_S)


def plant(locks: Place, *, beat: int = 3, **changes: object) -> Place:
    """The lock of a shard on another machine."""
    lock = {
        "token": "other", "run": "a-1", "shard": "0/4 of cube", "job": "", "restarts": 0, "host": "node17",
        "machine": "another", "pid": 1, "started": 1.0, "beat": beat, "running": 1, "dashboard": "",
    } | changes  # fmt: skip
    place = locks / "shard-cube-0of4.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(place, json.dumps(lock))
    return place


def test_a_driver_elsewhere_that_died_falls_silent(folder, quick):
    """On the first look its file is fresh; then its beat stays the same, or the file is old when we come."""
    plant(folder)
    drivers = Drivers()
    first, none = drivers.look(folder)
    assert ([lock["host"] for lock in first], none) == (["node17"], [])
    time.sleep(SILENT_S + 1)  # a server tells whole seconds

    for looking in (drivers, Drivers(), drivers):
        at_work, silent = looking.look(folder)
        assert at_work == []
        assert SILENT_S < silent[0]["silent_s"] + 0.5 < 60

    plant(folder, beat=4)  # it was a network that was down
    assert [len(locks) for locks in drivers.look(folder)] == [1, 0]


@pytest.mark.parametrize("clock_s", [-7200, 7200])
def test_a_clock_that_differs_kills_no_driver_and_keeps_none_alive(tmp_path, quick, clock_s):
    """The file's time is two hours off: a beat that comes is believed, and one that does not."""

    def beating(beat: int) -> None:
        place = plant(tmp_path, beat=beat)
        os.utime(place, (time.time() + clock_s,) * 2)

    beating(3)
    timer = threading.Timer(1.5 * BEAT_S, beating, [4])
    timer.start()
    alive = Drivers().look(tmp_path)
    timer.join()
    dead = Drivers().look(tmp_path)

    assert [len(locks) for locks in alive] == [1, 0]
    assert [len(locks) for locks in dead] == [0, 1]
    assert dead[1][0]["silent_s"] == pytest.approx(max(-clock_s, 0), abs=2)


def test_a_driver_of_this_machine_is_at_work_however_old_its_lock(tmp_path, quick):
    """It was stopped, or its disk is slow: its process is there."""
    with Lock(tmp_path, run="a-1") as lock:
        pass
    plant(tmp_path, **json.loads(lock._content()))
    os.utime(tmp_path / "shard-cube-0of4.json", (1, 1))

    assert [len(locks) for locks in Drivers().look(tmp_path)] == [1, 0]


def test_a_silent_shard_is_told_and_watched_no_longer(desk, command, quick):
    assert command("plan", desk.toml).code == 0
    run = json.loads(command("status", desk.workspace, "--json").out)["run"]
    os.utime(plant(desk.workspace / "locks", run=run), (time.time() - 3 * 3600,) * 2)

    shown = command("status", desk.workspace, "--watch", "--every", 1)

    assert shown.code == 0
    assert f"silent      shard 0/4 of cube of run {run!r} on node17, for 3.0 hours" in shown.out
    assert "running " not in shown.out.replace("due  running  failed", "")
    assert json.loads(command("status", desk.workspace, "--json").out)["drivers"] == 0


@pytest.mark.parametrize(("gap_s", "idle"), [(0.0, 1), (2.5, 3)])
def test_between_two_drivers_it_is_watched_on_for_a_while(desk, command, monkeypatch, gap_s, idle):
    """Work is due and its driver has gone: the next one may be on its way, and does not come."""
    monkeypatch.setattr(cli, "_GAP_S", gap_s)
    assert command("plan", desk.toml).code == 0
    with Lock(desk.workspace / "locks", run="a-1") as driver:
        lock = plant(desk.workspace / "locks", **json.loads(driver._content()))
    gone = iter([lock.unlink])
    monkeypatch.setattr(cli.time, "sleep", lambda s, sleep=time.sleep: (next(gone, int)(), sleep(s)))

    watched = command("status", desk.workspace, "--watch", "--every", 1, "--json")

    looks = watched.out.replace("}\n{", "}\n\0{").split("\0")
    assert [json.loads(look)["running"] for look in looks] == ["a-1", *[None] * idle]
