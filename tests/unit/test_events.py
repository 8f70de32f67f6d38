"""Events: a line each, whatever half lines a killed driver or a full disk left."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from slidecube.pipeline import events as events_module
from slidecube.pipeline.events import Unfinished, read_events, unfinished, write_event
from slidecube.pipeline.storage import place_of


def test_events_are_lines_of_json_with_their_time(tmp_path):
    path = tmp_path / "events" / "a.jsonl"
    write_event(path, "run_started", profile="threads")
    write_event(path, "task", reason="kein Gelände")

    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["run_started", "task"]
    assert [e["event"] for e in read_events(path)] == ["run_started", "task"]
    assert "kein Gelände" in lines[1]


@pytest.mark.parametrize("half", [b'{"event": "ta', "{'event': 'Gelä".encode()[:-1], b"\n\n"])
def test_half_a_line_spoils_no_other(tmp_path, half):
    path = tmp_path / "a.jsonl"
    write_event(path, "run_started")
    with path.open("ab") as file:
        file.write(half)
    write_event(path, "run_ended")

    assert [e["event"] for e in read_events(path)] == ["run_started", "run_ended"]


def _left(begun=(), suspects=(), told=()):
    return Unfinished(begun=frozenset(begun), suspects=frozenset(suspects), told=frozenset(told))


def test_what_was_told_and_whose_runs_are_unfinished(tmp_path):
    path = tmp_path / "a.jsonl"
    assert unfinished(path) == _left()
    write_event(path, "run_started", driver="first")
    write_event(path, "task", key="k1", driver="first", status="done", fault="")
    assert unfinished(path) == _left({"first"}, {"first"}, {("first", "k1", True)})
    write_event(path, "run_started", driver="second")  # the first one was killed, and the second, too
    assert unfinished(path) == _left({"first", "second"}, {"first", "second"}, {("first", "k1", True)})
    write_event(path, "task", key="k1", driver="second", status="failed", fault="scene")
    told = {("first", "k1", True), ("second", "k1", False)}
    assert unfinished(path) == _left({"first", "second"}, {"first", "second"}, told)
    write_event(path, "run_ended")
    assert unfinished(path) == _left()


@pytest.mark.parametrize("fault", ["worker", "deadline"])
def test_a_driver_that_gave_up_a_task_is_suspected_beyond_its_end(tmp_path, fault):
    path = tmp_path / "a.jsonl"
    for driver in ("first", "second"):
        write_event(path, "run_started", driver=driver)
        write_event(path, "task", key="k1", driver=driver, status="done", fault="")
        write_event(
            path,
            "task",
            key="k2",
            driver=driver,
            status="failed",
            fault=fault if driver == "first" else "scene",
        )
        write_event(path, "run_ended")
    told = {("first", "k1", True), ("first", "k2", False)}
    assert unfinished(path) == _left((), {"first"}, told)
    write_event(path, "task", key="k2", driver="first", status="done", fault="")
    assert unfinished(path) == _left((), {"first"}, told | {("first", "k2", True)})


def test_a_full_disk_takes_no_events_and_other_errors_are_told(tmp_path, monkeypatch):
    def fail(number):
        def opened(*_, **__):
            raise OSError(number, "?")

        return opened

    monkeypatch.setattr(Path, "open", fail(28))
    write_event(tmp_path / "a.jsonl", "task")
    monkeypatch.setattr(Path, "open", fail(30))
    with pytest.raises(OSError, match="30"):
        write_event(tmp_path / "a.jsonl", "task")


def test_what_a_full_disk_did_not_take_is_told_when_there_is_room(tmp_path, monkeypatch):
    """Room is made while the run goes on: it ends well, and a tile that it did not tell would never be told."""
    path = tmp_path / "a.jsonl"
    write_event(path, "run_started", driver="first")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        write_event(path, "task", key="k1")
        write_event(path, "task", key="k2")
    write_event(path, "task", key="k3")
    write_event(path, "run_ended")

    told = [(e["event"], e.get("key", "")) for e in read_events(path)]
    assert told == [("run_started", ""), ("task", "k1"), ("task", "k2"), ("task", "k3"), ("run_ended", "")]


@pytest.fixture
def bucket(s3):
    """Place of a run's events in an empty bucket, and a driver's process that ends: `bucket.next_driver()`."""
    yield place_of(s3) / "events" / "a.jsonl"
    events_module._segment_of.cache_clear()


def test_events_in_a_bucket_stay_in_order_when_the_clock_is_set_back(bucket, monkeypatch):
    """Each driver goes on with the next number, whatever the time of day is."""
    for driver, year in (("first", 2027), ("second", 2026), ("third", 2025)):
        events_module._segment_of.cache_clear()  # a process of its own
        clock = SimpleNamespace(now=lambda zone, year=year: dt.datetime(year, 1, 1, tzinfo=zone))
        monkeypatch.setattr(events_module, "dt", SimpleNamespace(datetime=clock, UTC=dt.UTC))
        write_event(bucket, "run_started", driver=driver)
        write_event(bucket, "task", key="k", driver=driver)
        write_event(bucket, "run_ended", driver=driver)

    told = list(read_events(bucket))
    assert [e["driver"] for e in told] == ["first"] * 3 + ["second"] * 3 + ["third"] * 3
    assert [e["time"][:4] for e in told] == ["2027"] * 3 + ["2026"] * 3 + ["2025"] * 3
    names = sorted(place.name for place in bucket.iterdir())
    assert [name.partition("-")[0] for name in names] == ["00000001", "00000002", "00000003"]


def test_many_events_in_a_bucket_are_some_objects_in_order(bucket, monkeypatch):
    monkeypatch.setattr(events_module, "_LINES", 10)
    for number in range(34):
        write_event(bucket, "task", number=number)
    write_event(bucket, "run_ended", number=34)

    assert [e["number"] for e in read_events(bucket)] == list(range(35))
    assert [len(p.read_text().splitlines()) for p in sorted(bucket.iterdir(), key=str)] == [10, 10, 10, 5]


def test_two_drivers_at_once_overwrite_nothing_in_a_bucket(bucket):
    """A driver that was taken over may write once more before it knows; its successor takes the same number."""
    write_event(bucket, "run_started", driver="first")
    first = events_module._Segment(bucket)
    second = events_module._Segment(bucket)
    last = max(place.name for place in bucket.iterdir())
    for segment, driver in ((first, "first"), (second, "second")):
        segment.lines = []
        segment.add(json.dumps({"time": "", "event": "task", "driver": driver}), at_once=True)

    told = [e["driver"] for e in read_events(bucket)]
    assert sorted(told) == ["first", "first", "second"]
    assert told[0] == "first"
    assert last.startswith("00000001-")
