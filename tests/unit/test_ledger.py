"""Records: whole or absent, equal text for equal work, and a damaged one counts for nothing."""

from __future__ import annotations

import dataclasses
import json
import os

import pyarrow.parquet as pq
import pytest

from slidecube.pipeline import ledger as ledger_module
from slidecube.pipeline import storage
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.ledger import PACKED, VOLATILE, Ledger, Record
from slidecube.pipeline.storage import write_atomic

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
    driver="0011223344556677",
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

    monkeypatch.setattr(*((os, "fsync") if dies_in == "fsync" else (storage.Path, "replace")), die)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")

    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def many(ledger, monkeypatch) -> dict[str, Record]:
    """Twelve records that are written loose, and enough of them to be folded."""
    monkeypatch.setattr(ledger_module, "PACK_FROM", 10)
    records = {
        f"r000c{n:03d}": dataclasses.replace(
            RECORD,
            tile=f"r000c{n:03d}",
            key=f"{n:016x}",
            state=("done", "empty", "failed")[n % 3],
            numbers={"px": n},
            driver=f"driver-{n % 2}",
        )
        for n in range(12)
    }
    for record in records.values():
        ledger.write(record)
    return records


def known(ledger: Ledger) -> dict[str, Record]:
    """What every way of reading says, which is the same."""
    loaded = ledger.load()
    assert loaded == {tile: record for tile in loaded if (record := ledger.read(tile)) is not None}
    assert ledger.keys() == {tile: (r.key, r.complete) for tile, r in loaded.items()}
    assert ledger.table()["tile"].to_pylist() == sorted(loaded)
    assert sum(ledger.table()["bytes"].to_pylist()) == sum(r.bytes for r in loaded.values())
    drivers = ledger.table("driver")
    assert dict(zip(*(drivers[name].to_pylist() for name in ("tile", "driver")), strict=True)) == {
        tile: record.driver for tile, record in loaded.items()
    }
    return loaded


def loose(ledger: Ledger) -> list[str]:
    return sorted(p.name for p in ledger.folder.glob("*.json"))


def test_folded_records_come_back_equal(ledger, many):
    before = known(ledger)

    assert ledger.pack() == 12
    assert loose(ledger) == []
    assert known(ledger) == before == many
    assert ledger.read("r999c999") is None
    assert ledger.complete("r000c000", many["r000c000"].key)
    assert not ledger.complete("r000c002", many["r000c002"].key), "failed"


def test_a_table_of_before_there_were_drivers_is_nobodys(ledger, many):
    ledger.pack()
    old = pq.read_table(ledger.folder / PACKED).drop_columns("driver")
    pq.write_table(old, ledger.folder / PACKED)

    assert known(ledger) == {tile: dataclasses.replace(record, driver="") for tile, record in many.items()}


def test_few_records_stay_loose(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "PACK_FROM", 2)
    ledger.write(RECORD)

    assert ledger.pack() == 0
    assert loose(ledger) == ["r001c002.json"]


def test_a_loose_record_wins_and_is_folded_again(ledger, many, monkeypatch):
    ledger.pack()
    newer = dataclasses.replace(many["r000c004"], key="f" * 16, state="done")
    ledger.write(newer)
    ledger.write(RECORD)

    assert known(ledger) == {**many, newer.tile: newer, RECORD.tile: RECORD}

    monkeypatch.setattr(ledger_module, "PACK_FROM", 1)
    assert ledger.pack() == 2
    assert known(ledger) == {**many, newer.tile: newer, RECORD.tile: RECORD}
    assert loose(ledger) == []


def test_forgetting_wins_over_the_table_and_over_the_next_folding(ledger, many, monkeypatch):
    ledger.pack()
    ledger.forget("r000c003")
    ledger.forget("r000c003")
    ledger.forget("never written")
    left = {tile: record for tile, record in many.items() if tile != "r000c003"}

    assert ledger.read("r000c003") is None
    assert known(ledger) == left

    monkeypatch.setattr(ledger_module, "PACK_FROM", 1)
    ledger.pack()
    assert known(ledger) == left
    assert loose(ledger) == []
    ledger.write(many["r000c003"])
    assert known(ledger) == many


def test_a_damaged_loose_record_is_work_to_do_though_the_table_has_it(ledger, many):
    ledger.pack()
    (ledger.folder / "r000c000.json").write_text("{")

    assert not ledger.complete("r000c000", many["r000c000"].key)
    assert ledger.keys()["r000c000"] == ("", False)


def test_a_damaged_table_is_named(ledger, many):
    ledger.pack()
    (ledger.folder / PACKED).write_bytes(b"PAR1 nothing")

    with pytest.raises(
        PipelineError, match=r"packed\.parquet is damaged .*remove it, and its tiles are made anew"
    ):
        ledger.read("r000c000")


class Killed(BaseException):
    """Ends a step as kill -9 would: nothing that follows is done."""


@pytest.mark.parametrize("step", range(9))
def test_a_folding_that_is_killed_between_its_steps_loses_nothing(ledger, many, monkeypatch, step):
    """The steps are: reading, writing the table (fsync, rename), and each file that goes."""
    ledger.write(dataclasses.replace(many["r000c001"], key="e" * 16))
    before = known(ledger)
    left = [step]

    def mortal(do):
        def wrapped(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return do(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "read_tagged", mortal(ledger_module.read_tagged))
        patch.setattr(storage.os, "fsync", mortal(os.fsync))
        patch.setattr(storage.Path, "replace", mortal(storage.Path.replace))
        patch.setattr(storage.Path, "unlink", mortal(storage.Path.unlink))
        with pytest.raises(Killed):
            ledger.pack()

    assert known(ledger) == before, "while it lies half folded"
    ledger.pack()
    assert known(ledger) == before
    monkeypatch.setattr(ledger_module, "PACK_FROM", 1)
    ledger.pack()
    assert loose(ledger) == []
    assert known(ledger) == before


def test_a_record_that_changes_while_it_is_folded_stays(ledger, many, monkeypatch):
    newer = dataclasses.replace(many["r000c007"], key="d" * 16)
    create = ledger_module.create

    def meanwhile(place, content):
        ledger.write(newer)
        return create(place, content)

    monkeypatch.setattr(ledger_module, "create", meanwhile)
    ledger.pack()

    assert known(ledger)["r000c007"] == newer


def test_of_two_that_fold_one_does_and_nothing_is_lost(ledger, many, monkeypatch):
    create = ledger_module.create

    def second_first(place, content):
        monkeypatch.setattr(ledger_module, "create", create)
        assert ledger.pack() == 12
        return create(place, content)

    monkeypatch.setattr(ledger_module, "create", second_first)

    assert ledger.pack() == 0
    assert known(ledger) == many
