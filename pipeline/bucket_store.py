"""Zarr's door to a bucket: the library's own, with faults that say in one line what failed, and where."""

from __future__ import annotations

from collections.abc import Iterable

from obstore.store import S3Store
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from slidecube.pipeline.storage import ObjectPath, naming_faults


class BucketStore(ObjectStore[S3Store]):
    """Store of one Zarr group in a bucket."""

    def _at(self, key: str) -> ObjectPath:
        return ObjectPath(str(self.store.config["bucket"]), f"{self.store.prefix}/{key}")

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object, or a part of it; None where there is none."""
        with naming_faults(self._at(key)):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read parts of objects."""
        with naming_faults(self._at("")):
            return await super().get_partial_values(prototype, key_ranges)

    async def exists(self, key: str) -> bool:
        """Tell whether there is an object."""
        with naming_faults(self._at(key)):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object whole, by one request or in parts that count together."""
        with naming_faults(self._at(key)):
            await super().set(key, value)

    async def delete(self, key: str) -> None:
        """Remove an object."""
        with naming_faults(self._at(key)):
            await super().delete(key)
