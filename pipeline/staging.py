"""One tile on its way into a store: encoded and brought to the disk beside its place, then moved there in a moment.

Between the question whether a driver still holds its workspace and the last byte of a tile lie seconds, and a frozen
process may lie there for hours. So whatever takes time is done before the question is asked (ADR 11).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore, WrapperStore

from slidecube.pipeline.errors import PassingError, PipelineError
from slidecube.pipeline.storage import ObjectPath, Place, create, stamp, swap, zarr_store


class _Beside(WrapperStore[Store]):
    """A store whose chunks stay in memory, for whoever carries them to their place."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.chunks = MemoryStore()

    def _of(self, key: str) -> Store:
        return self.chunks if "/c/" in key else self._store

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return await self._of(key).get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        return await self._of(key).exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        await self._of(key).set(key, value)

    async def delete(self, key: str) -> None:
        await self._of(key).delete(key)

    def take(self, key: str) -> bytes | None:
        """Give a chunk out, None where all is fill."""
        found = sync(self.chunks.get(key, default_buffer_prototype()))
        sync(self.chunks.delete(key))
        return None if found is None else found.to_bytes()


@dataclass(slots=True)
class StagedTile:
    """A tile that nobody reads yet.

    checksums : variable -> that of its stored bytes, "empty" where all is fill (nothing is stored then)
    size : bytes that it will take
    """

    checksums: dict[str, str] = field(default_factory=dict)
    size: int = 0
    _files: dict[Path, Path | None] = field(default_factory=dict)
    _objects: dict[ObjectPath, tuple[bytes | None, str | None]] = field(default_factory=dict)

    def add(self, place: Place, content: bytes | None) -> None:
        """Take in the content of a file; None = the file goes. Raises PipelineError when it cannot be read back."""
        if isinstance(place, Path):
            self._files[place] = None if content is None else _beside(place, content)
        else:
            self._objects[place] = (content, stamp(place))
        self.size += len(content or b"")

    def commit(self, held: Callable[[], None] = lambda: None) -> None:
        """Bring all to its place. On a disk nobody may take the workspace over meanwhile.

        held : asked before each object; raises FencedError when the right to write is gone
        Raises PassingError when an object is not the one of before: another attempt at the tile has written it.
        """
        for place, partial in self._files.items():
            _move(partial, place)
        self._files.clear()
        for at, (content, tag) in self._objects.items():
            held()
            if content is None:
                if stamp(at) == tag:
                    at.unlink(missing_ok=True)
            elif not (create(at, content) if tag is None else swap(at, content, tag)):
                held()
                raise PassingError(f"{at} was written by another attempt meanwhile", "transient")
        self._objects.clear()

    def discard(self) -> None:
        """Remove what lies beside its place."""
        for partial in filter(None, self._files.values()):
            partial.unlink(missing_ok=True)
        self._files.clear()
        self._objects.clear()


def stage_tile(
    path: Place,
    data: Mapping[str, np.ndarray],
    *,
    at_px: tuple[int, int],
    shard: int,
    leading: tuple[int, ...] = (),
) -> StagedTile:
    """Encode one tile of several variables, each exactly one shard, and bring it to the disk beside its place.

    data : variable -> (y, x) of the tile's shape, {} for a tile of which nothing is stored; at_px : row and column in
    the array of its first pixel; shard : side of a tile
    Raises PipelineError when the tile is not exactly one shard, or when the read-back differs.
    """
    staged = StagedTile()
    try:
        for name, content in _encoded(path, data, at_px=at_px, leading=leading):
            staged.add(shard_file(path, name, at_px=at_px, shard=shard, leading=leading), content)
            staged.checksums[name] = "empty" if content is None else checksum(content)
        if not data:
            for folder in path.glob("*/c"):
                name = folder.parent.name
                staged.add(shard_file(path, name, at_px=at_px, shard=shard, leading=leading), None)
    except BaseException:
        staged.discard()
        raise
    return staged


def _encoded(
    path: Place, data: Mapping[str, np.ndarray], *, at_px: tuple[int, int], leading: tuple[int, ...]
) -> Iterator[tuple[str, bytes | None]]:
    beside = _Beside(zarr_store(path))
    group = zarr.open_group(beside, mode="r+")
    for name, values in data.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        _require_shard(path, name, array, values, at_px)
        region: tuple[int | slice, ...] = (
            *leading,
            slice(at_px[0], at_px[0] + values.shape[0]),
            slice(at_px[1], at_px[1] + values.shape[1]),
        )
        array[region] = values
        if not _same(np.asarray(array[region]), values):
            raise PipelineError(
                f"Read-back of {path.name}/{name} differs from what was written; check the memory of this machine"
            )
        key = [*leading, at_px[0] // values.shape[0], at_px[1] // values.shape[1]]
        yield name, beside.take("/".join((name, "c", *map(str, key))))


def _beside(place: Path, content: bytes) -> Path:
    """Write a file beside its place and bring it to the disk: a record must not outlive its data in a power cut."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        whole = partial.read_bytes() == content
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if not whole:
        partial.unlink(missing_ok=True)
        raise PipelineError(f"Read-back of {place} differs from what was written; check the disk")
    return partial


def _move(partial: Path | None, place: Path) -> None:
    if partial is None:
        place.unlink(missing_ok=True)
    else:
        partial.replace(place)


def shard_file(
    path: Place, name: str, *, at_px: tuple[int, int], shard: int, leading: tuple[int, ...] = ()
) -> Place:
    """File of a tile's one shard of a variable."""
    return path.joinpath(name, "c", *map(str, [*leading, at_px[0] // shard, at_px[1] // shard]))


def checksum(content: bytes) -> str:
    """Checksum of stored bytes: 32 hex digits of BLAKE2b."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _require_shard(
    path: Place, name: str, array: zarr.Array[Any], values: np.ndarray, at_px: tuple[int, int]
) -> None:
    assert array.shards is not None
    shard = array.shards[-2:]
    if values.shape != shard or at_px[0] % shard[0] or at_px[1] % shard[1]:
        raise PipelineError(
            f"Region at {at_px} of {values.shape} does not align with shards {shard} of {path.name}/{name}"
        )


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
