"""Zarr's door to a bucket: the library's own, with faults that say in one line what failed, and where."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

from obstore.store import S3Store
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from slidecube.pipeline.storage import ObjectPath, asked_async


class BucketStore(ObjectStore[S3Store]):
    """Store of one Zarr group in a bucket."""

    def _at(self, key: str) -> ObjectPath:
        return ObjectPath(str(self.store.config["bucket"]), f"{self.store.prefix}/{key}")

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object, or a part of it; None where there is none."""
        ask = super().get
        return await asked_async(self._at(key), lambda: ask(key, prototype, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read parts of objects."""
        key_ranges = list(key_ranges)  # they may be asked for twice
        ask = super().get_partial_values
        return await asked_async(self._at(""), lambda: ask(prototype, key_ranges))

    async def exists(self, key: str) -> bool:
        """Tell whether there is an object."""
        ask = super().exists
        return await asked_async(self._at(key), lambda: ask(key))

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object whole, by one request or in parts that count together."""
        ask = super().set
        await asked_async(self._at(key), lambda: ask(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object where there is none."""
        ask = super().set_if_not_exists
        await asked_async(self._at(key), lambda: ask(key, value))

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yield names of what lies below a prefix, one level."""
        ask = super().list_dir

        async def names() -> list[str]:
            return [name async for name in ask(prefix)]

        for name in await asked_async(self._at(prefix), names):
            yield name

    async def delete(self, key: str) -> None:
        """Remove an object."""
        ask = super().delete
        await asked_async(self._at(key), lambda: ask(key))
