"""Records: whole or absent, equal text for equal work, and a damaged one counts for nothing."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from slidecube.pipeline import ledger as ledger_module
from slidecube.pipeline.ledger import VOLATILE, Ledger, Record, write_atomic

RECORD = Record(
    tile="r001c002",
    key="0123456789abcdef",
    state="done",
    scenes=("S2A_X", "S2B_Y"),
    scene_reads=2,
    lost=(("S2A_X", "red", "truncated"),),
    substituted=(("S2A_X", "blue", "planetary-computer/sentinel-2-l2a", "HTTP response code: 503"),),
    checksums={"B04": "ff", "B02": "empty"},
    numbers={"px": 4},
    bytes=12,
    seconds=1.5,
    attempts=2,
    host="here",
    written_at="2026-11-20T00:00:00+00:00",
)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger.of(tmp_path / "optical.zarr", "iburi")


def test_a_record_comes_back_equal(ledger, tmp_path):
    ledger.write(RECORD)

    assert ledger.read("r001c002") == RECORD
    assert list(ledger) == [RECORD]
    assert ledger.folder == tmp_path / "optical.ledger" / "iburi"
    assert [p.name for p in ledger.folder.iterdir()] == ["r001c002.json"]


def test_a_record_of_before_there_were_substitutions_counts(ledger):
    ledger.write(RECORD)
    path = ledger.folder / "r001c002.json"
    old = json.loads(path.read_text())
    del old["substituted"]
    path.write_text(json.dumps(old))

    assert ledger.read("r001c002") == dataclasses.replace(RECORD, substituted=())


def test_nothing_is_known_of_an_unwritten_tile(ledger):
    assert ledger.read("r001c002") is None
    assert not ledger.complete("r001c002", RECORD.key)
    assert list(ledger) == []


@pytest.mark.parametrize(
    ("state", "key", "complete"),
    [
        ("done", RECORD.key, True),
        ("empty", RECORD.key, True),
        ("failed", RECORD.key, False),
        ("done", "another", False),
    ],
)
def test_a_record_counts_under_its_key_alone(ledger, state, key, complete):
    ledger.write(dataclasses.replace(RECORD, state=state))

    assert ledger.complete("r001c002", key) is complete


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "12",
        '{"tile": "r001c002"}',
        '{"unknown": 1}',
        '{"scenes": 1, "lost": []}',
        "\x00" * 50,
    ],
)
def test_a_damaged_record_is_work_to_do(ledger, text):
    ledger.write(RECORD)
    path = ledger.folder / "r001c002.json"
    path.write_text(text)

    found = ledger.read("r001c002")

    assert found is not None
    assert (found.state, found.key) == ("failed", "")
    assert found.reason.startswith("damaged record r001c002.json: ")
    assert not ledger.complete("r001c002", RECORD.key)
    assert not ledger.complete("r001c002", "")
    ledger.write(RECORD)
    assert ledger.complete("r001c002", RECORD.key)


def test_a_record_with_bytes_that_are_no_text_is_damaged(ledger):
    ledger.write(RECORD)
    (ledger.folder / "r001c002.json").write_bytes(b"\xff\xfe{")

    assert not ledger.complete("r001c002", RECORD.key)


def test_a_forgotten_tile_is_due(ledger):
    ledger.write(RECORD)
    ledger.forget("r001c002")
    ledger.forget("r001c002")

    assert ledger.read("r001c002") is None


def test_only_the_volatile_fields_differ_between_two_runs_of_one_work(ledger):
    again = dataclasses.replace(
        RECORD, seconds=9.0, peak_mem_gb=3.0, attempts=1, host="there", written_at="2027-01-01T00:00:00+00:00"
    )
    texts = []
    for record in (RECORD, again):
        ledger.write(record)
        texts.append(json.loads((ledger.folder / "r001c002.json").read_text()))
    for raw in texts:
        for name in VOLATILE:
            del raw[name]

    assert json.dumps(texts[0]) == json.dumps(texts[1])
    assert set(VOLATILE) <= {f.name for f in dataclasses.fields(Record)}


@pytest.mark.parametrize("dies_in", ["fsync", "replace"])
def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch, dies_in):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def die(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if dies_in == "fsync" else (ledger_module.Path, "replace")), die)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")

    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
