"""The ledger: what is done, said by one small record a tile that is written last.

A record counts only if its key is the plan's. Nothing reads a cube without asking its ledger; a file that exists
proves nothing (ADR 3).
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

State = Literal["done", "empty", "failed"]

VOLATILE = ("seconds", "peak_mem_gb", "attempts", "host", "written_at")
"""Fields that differ between two runs of the same work; every other field is equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of one tile of one layer.

    key : content key of the work
    state : "done", "empty" (done, and there was nothing to see, with a reason) or "failed"
    reason : one line, for "empty" and "failed"; traceback : for "failed"
    scene_reads : scenes of which pixels were read; lost : assets that could not be read, [scene, asset, reason]
    substituted : assets that were read from another source, [scene, asset, source, why not from its own]; the pixels
        are the same, so it changes no key
    checksums : variable -> checksum of the stored bytes; numbers : counts of pixels, by name
    seconds, peak_mem_gb, attempts, host, written_at : of the run that wrote it
    """

    tile: str
    key: str
    state: State
    reason: str = ""
    traceback: str = ""
    scenes: tuple[str, ...] = ()
    scene_reads: int = 0
    lost: tuple[tuple[str, str, str], ...] = ()
    substituted: tuple[tuple[str, str, str, str], ...] = ()
    checksums: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0
    peak_mem_gb: float = 0.0
    attempts: int = 1
    host: str = ""
    written_at: str = ""

    @property
    def complete(self) -> bool:
        """True when nothing is left to do for this key."""
        return self.state != "failed"


@dataclass(frozen=True, slots=True)
class Ledger:
    """The records of one layer or inventory: a folder of small files beside its Zarr group."""

    folder: Path

    @classmethod
    def of(cls, zarr_path: Path, *parts: str) -> Ledger:
        """Ledger of a Zarr group; parts name a sub-ledger, such as an epoch's."""
        return cls(zarr_path.with_suffix(".ledger").joinpath(*parts))

    def read(self, tile: str) -> Record | None:
        """Record of a tile, None when there is none; a damaged one counts for nothing and says so."""
        try:
            return _parse(self.folder / f"{tile}.json")
        except FileNotFoundError:
            return None

    def write(self, record: Record) -> None:
        """Write a record: temporary name, flushed to the disk, then renamed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(
            self.folder / f"{record.tile}.json",
            json.dumps(dataclasses.asdict(record), sort_keys=True, indent=1),
        )

    def forget(self, tile: str) -> None:
        """Remove a tile's record: its data is about to change, and whoever reads meanwhile must not trust it."""
        (self.folder / f"{tile}.json").unlink(missing_ok=True)

    def complete(self, tile: str, key: str) -> bool:
        """True when the tile is done under this very key."""
        record = self.read(tile)
        return record is not None and record.key == key and record.complete

    def __iter__(self) -> Iterator[Record]:
        """All records, by tile."""
        if self.folder.exists():
            for path in sorted(self.folder.glob("*.json")):
                yield _parse(path)


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the new one, and nothing else, whatever dies."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _parse(path: Path) -> Record:
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record = Record(
            **{
                **raw,
                "scenes": tuple(raw["scenes"]),
                "lost": tuple((a, b, c) for a, b, c in raw["lost"]),
                "substituted": tuple((a, b, c, d) for a, b, c, d in raw.get("substituted", ())),
            }
        )
    except (ValueError, TypeError, KeyError) as error:
        return _damaged(path, str(error))
    return record if record.state in get_args(State) else _damaged(path, f"unknown state {record.state!r}")


def _damaged(path: Path, why: str) -> Record:
    """One bad file must not stop a nation: under an empty key it is nobody's work, so the tile is done again."""
    return Record(tile=path.stem, key="", state="failed", reason=f"damaged record {path.name}: {why}")
