"""The ledger: what is done, said by one small record a tile that is written last.

A record counts only if its key is the plan's. Nothing reads a cube without asking its ledger; a file that exists
proves nothing (ADR 3).

A nation's records are too many for single files: file systems of clusters have quotas of inodes, and a bucket is asked
for each. So many loose records are folded into one table beside them. A loose record wins over its row in the table.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.storage import (
    Place,
    create,
    names,
    read_many,
    read_tagged,
    remove_many,
    stamp,
    swap,
    write_atomic,
)

State = Literal["done", "empty", "failed"]

VOLATILE = ("seconds", "peak_mem_gb", "attempts", "host", "written_at", "driver")
"""Fields that differ between two runs of the same work; every other field is equal."""

PACKED = "packed.parquet"
"""Name of the table of a ledger."""

PACK_FROM = 1000
"""Loose records from which on they are folded into the table."""

_ROWS = 1000
"""Rows of the table that are read at once for one record."""

_FORGOTTEN = '{"forgotten": true}'
"""Loose text in place of a record, where the table holds one that counts no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of one tile of one layer.

    key : content key of the work
    state : "done", "empty" (done, and there was nothing to see, with a reason) or "failed"
    reason : one line, for "empty" and "failed"; fault, traceback : for "failed"
    scene_reads : scenes of which pixels were read; lost : assets that could not be read, [scene, asset, reason]
    passing : how many of them because of a fault that passes: reading the tile again may mend it
    substituted : assets that were read from another source, [scene, asset, source, why not from its own]; the pixels
        are the same, so it changes no key
    checksums : variable -> checksum of the stored bytes; numbers : counts of pixels, by name
    seconds, peak_mem_gb, attempts, host, written_at : of the run that wrote it
    driver : token of the lock under which it was written: by it a next driver knows what a killed one did not tell
    """

    tile: str
    key: str
    state: State
    reason: str = ""
    fault: str = ""
    traceback: str = ""
    scenes: tuple[str, ...] = ()
    scene_reads: int = 0
    lost: tuple[tuple[str, str, str], ...] = ()
    passing: int = 0
    substituted: tuple[tuple[str, str, str, str], ...] = ()
    checksums: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0
    peak_mem_gb: float = 0.0
    attempts: int = 1
    host: str = ""
    written_at: str = ""
    driver: str = ""

    @property
    def complete(self) -> bool:
        """True when nothing is left to do for this key."""
        return self.state != "failed"


_NESTED = ("scenes", "lost", "substituted", "checksums", "numbers")
_SCHEMA = pa.schema(
    [
        (f.name, pa.float64() if f.type == "float" else pa.int64() if f.type == "int" else pa.string())
        for f in dataclasses.fields(Record)
    ]
)
"""Columns of the table: the fields of a record, those that are no number as text, lists and mappings as JSON."""

_BEGINS = {
    name: json.dumps(value) if name in _NESTED else value
    for name, value in dataclasses.asdict(Record(tile="", key="", state="done")).items()
}
"""What the columns hold of a record of which nothing is told."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The records of one layer or inventory: a folder of small files, and one table, beside its Zarr group."""

    folder: Place

    @classmethod
    def of(cls, zarr_path: Place, *parts: str) -> Ledger:
        """Ledger of a Zarr group; parts name a sub-ledger, such as an epoch's."""
        return cls(zarr_path.with_suffix(".ledger").joinpath(*parts))

    def read(self, tile: str) -> Record | None:
        """Record of a tile, None when there is none; a damaged one counts for nothing and says so."""
        try:
            loose = (self.folder / f"{tile}.json").read_bytes()
        except FileNotFoundError:
            # asked after the loose one: a record is in the table before its file goes
            packed = self._packed()
            return None if packed is None else packed.record(tile)
        return _parse(tile, loose)

    def write(self, record: Record) -> None:
        """Write a record, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"{record.tile}.json", _text(record))

    def forget(self, tile: str) -> None:
        """Remove a tile's record: its data is about to change, and whoever reads meanwhile must not trust it."""
        packed = self._packed()
        if packed is not None and tile in packed.rows:
            write_atomic(self.folder / f"{tile}.json", _FORGOTTEN)
        else:
            (self.folder / f"{tile}.json").unlink(missing_ok=True)

    def complete(self, tile: str, key: str) -> bool:
        """True when the tile is done under this very key."""
        try:
            record = _parse(tile, (self.folder / f"{tile}.json").read_bytes())
        except FileNotFoundError:
            packed = self._packed()
            return packed is not None and packed.keys.get(tile) == (key, True)
        return record is not None and record.key == key and record.complete

    def table(self, *columns: str) -> pa.Table:
        """All records as a table, by tile: a column a field, lists and mappings as JSON; for sums over a nation.

        columns : beside the tile; all when left out
        """
        loose = self._loose()
        packed = self._packed()  # after the loose ones, see `read`
        wanted = list(dict.fromkeys(("tile", *columns))) if columns else _SCHEMA.names
        known = _SCHEMA.empty_table().select(wanted) if packed is None else packed.table(wanted)
        return _joined(known, loose) if loose else known

    def keys(self) -> dict[str, tuple[str, bool]]:
        """Key of every tile's record, and whether it is complete; asked once for many tiles."""
        loose = self._loose()
        packed = self._packed()
        found = {} if packed is None else dict(packed.keys)
        for tile, record in loose.items():
            if record is None:
                found.pop(tile, None)
            else:
                found[tile] = (record.key, record.complete)
        return found

    def passing(self) -> set[str]:
        """Tiles that lack something because of a fault that passes."""
        found = self.table("passing")
        return {
            tile for tile, n in zip(found["tile"].to_pylist(), found["passing"].to_pylist(), strict=True) if n
        }

    def load(self) -> dict[str, Record]:
        """All records, by tile."""
        return {record.tile: record for record in self}

    def __iter__(self) -> Iterator[Record]:
        """All records, by tile."""
        for batch in self.table().to_batches(max_chunksize=_ROWS):
            for row in batch.to_pylist():
                yield _record(row)

    def pack(self) -> int:
        """Fold the loose records into the table when there are many; returns how many were folded.

        For the only writer of a workspace, when its tiles are done. Whatever dies in between, every record is found:
        the table is replaced whole and at once, and only then the files go that it holds.
        """
        tiles = self._loose_tiles()
        if len(tiles) < PACK_FROM:
            return 0
        place = self.folder / PACKED
        before = read_tagged(place)
        texts = self._texts(tiles)
        loose = {tile: _parse(tile, text) for tile, text in texts.items()}
        known = _SCHEMA.empty_table() if before is None else _Pack(place, before[0]).table(_SCHEMA.names)
        content = _written(_joined(known, loose))
        if not (create(place, content) if before is None else swap(place, content, before[1])):
            return 0  # another one folds; nothing is lost
        self._remove_unchanged(texts)
        return len(texts)

    def _remove_unchanged(self, folded: Mapping[str, bytes]) -> None:
        now = self._texts(list(folded))
        remove_many(self.folder / f"{tile}.json" for tile, text in now.items() if folded[tile] == text)

    def _loose_tiles(self) -> list[str]:
        return [name.removesuffix(".json") for name in names(self.folder) if name.endswith(".json")]

    def _loose(self) -> dict[str, Record | None]:
        """Loose records by tile, None for those that were forgotten."""
        return {tile: _parse(tile, text) for tile, text in self._texts(self._loose_tiles()).items()}

    def _texts(self, tiles: list[str]) -> dict[str, bytes]:
        found = read_many(self.folder / f"{tile}.json" for tile in tiles)
        return {tile: text for tile, text in zip(tiles, found, strict=True) if text is not None}

    def _packed(self) -> _Pack | None:
        """Table as it is now, None when there is none; read once a process while it stays the same."""
        place = self.folder / PACKED
        now = stamp(place)
        if now is None:
            return None
        with _reading:
            kept = _packs.get(place)
        if kept is not None and kept[0] == now:
            return kept[1]
        content = place.read_bytes()
        if stamp(place) != now:  # replaced in between
            return self._packed()
        pack = _Pack(place, content)
        with _reading:
            if len(_packs) >= _KEPT:
                _packs.clear()
            _packs[place] = (now, pack)
        return pack


@dataclass(frozen=True)
class _Pack:
    """The table of a ledger, compressed as it is stored: little of it is asked for at once."""

    place: Place
    content: bytes
    _groups: dict[int, pa.Table] = field(
        default_factory=dict
    )  # the one read last: neighbours are asked for together
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def table(self, columns: list[str]) -> pa.Table:
        """Columns of all rows; one that an earlier version did not know holds what a new record begins with."""
        try:
            # not read_table, which takes a column that is not there for damage
            found = pq.ParquetFile(pa.BufferReader(self.content)).read(columns=columns)
        except (OSError, ValueError, KeyError) as error:
            raise PipelineError(
                f"Ledger {self.place} is damaged ({' '.join(str(error).split())[:160]}); bring it back, or remove it, "
                "and its tiles are made anew"
            ) from None
        for field_ in (_SCHEMA.field(name) for name in columns if name not in found.column_names):
            value = pa.scalar(_BEGINS[field_.name], field_.type)
            found = found.append_column(field_, pa.repeat(value, len(found)))
        return found.select(columns)

    @cached_property
    def rows(self) -> dict[str, int]:
        return {tile: row for row, tile in enumerate(self.table(["tile"])["tile"].to_pylist())}

    @cached_property
    def keys(self) -> dict[str, tuple[str, bool]]:
        found = self.table(["tile", "key", "state"])
        columns = (found[name].to_pylist() for name in ("tile", "key", "state"))
        return {tile: (key, state != "failed") for tile, key, state in zip(*columns, strict=True)}

    def record(self, tile: str) -> Record | None:
        row = self.rows.get(tile)
        if row is None:
            return None
        with self._lock:
            if row // _ROWS not in self._groups:
                self._groups.clear()
                self._groups[row // _ROWS] = self._file.read_row_group(row // _ROWS)
            group = self._groups[row // _ROWS]
        return _record(group.slice(row % _ROWS, 1).to_pylist()[0])

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(pa.BufferReader(self.content))


_KEPT = 16
_packs: dict[Place, tuple[str, _Pack]] = {}
_reading = threading.Lock()


def _text(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), sort_keys=True, indent=1)


def _joined(known: pa.Table, loose: Mapping[str, Record | None]) -> pa.Table:
    """Rows of a table and loose records, which win, by tile."""
    kept = pa.array([tile not in loose for tile in known["tile"].to_pylist()], pa.bool_())
    fresh = _table(record for record in loose.values() if record is not None)
    return pa.concat_tables([known.filter(kept), fresh.select(known.column_names)]).sort_by("tile")


def _table(records: Iterable[Record]) -> pa.Table:
    rows = [
        {
            f.name: json.dumps(value, sort_keys=True) if f.name in _NESTED else value
            for f in dataclasses.fields(Record)
            for value in (getattr(record, f.name),)
        }
        for record in records
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _written(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=_ROWS, compression="zstd")
    return bytes(sink.getvalue())


def _record(row: Mapping[str, Any]) -> Record:
    return _made({**row, **{name: json.loads(row[name]) for name in _NESTED}})


def _made(raw: Mapping[str, Any]) -> Record:
    return Record(
        **{
            **raw,
            "scenes": tuple(raw["scenes"]),
            "lost": tuple((a, b, c) for a, b, c in raw["lost"]),
            "substituted": tuple((a, b, c, d) for a, b, c, d in raw.get("substituted", ())),
        }
    )


def _parse(tile: str, content: bytes) -> Record | None:
    """Read a loose record; None for one that was forgotten."""
    try:
        text = content.decode("utf-8")
        if text == _FORGOTTEN:
            return None
        record = _made(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        return _damaged(tile, str(error))
    return record if record.state in get_args(State) else _damaged(tile, f"unknown state {record.state!r}")


def _damaged(tile: str, why: str) -> Record:
    """One bad file must not stop a nation: under an empty key it is nobody's work, so the tile is done again."""
    return Record(tile=tile, key="", state="failed", reason=f"damaged record {tile}.json: {why}")
