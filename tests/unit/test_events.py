"""Events: a line each, whatever half lines a killed driver or a full disk left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slidecube.pipeline.events import read_events, unfinished, write_event


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


def test_what_was_told_and_whose_runs_are_unfinished(tmp_path):
    path = tmp_path / "a.jsonl"
    assert unfinished(path) == (set(), set())
    write_event(path, "run_started", driver="first")
    write_event(path, "task", key="k1", driver="first")
    assert unfinished(path) == ({("first", "k1")}, {"first"})
    write_event(path, "run_started", driver="second")  # the first one was killed, and the second, too
    assert unfinished(path) == ({("first", "k1")}, {"first", "second"})
    write_event(path, "task", key="k1", driver="second")
    assert unfinished(path) == ({("first", "k1"), ("second", "k1")}, {"first", "second"})
    write_event(path, "run_ended")
    assert unfinished(path) == (set(), set())


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
