"""Errors of the catalogue: one line each, saying what was wrong, what was got and what is allowed."""

from __future__ import annotations


class CatalogError(Exception):
    """A user's AOI, grid, source, search or scene is unusable; the message is one clear line."""


class CatalogDownError(CatalogError):
    """A provider's catalogue does not answer, or not as a STAC API: another provider may have the same scenes."""


class OffsetError(CatalogError):
    """The radiometric offset of a scene cannot be decided from its metadata."""


class AssetReadError(CatalogError):
    """An asset of a scene could not be read.

    item : id of the STAC item
    asset : asset key
    reason : what the reader said, one line, without credentials
    """

    def __init__(self, item: str, asset: str, reason: str) -> None:
        super().__init__(f"Cannot read asset {asset!r} of item {item!r}: {reason}")
        self.item = item
        self.asset = asset
        self.reason = reason

    def __reduce__(self) -> tuple[type[AssetReadError], tuple[str, str, str]]:
        """Pickle by the three constructor arguments (workers send these to the driver)."""
        return (type(self), (self.item, self.asset, self.reason))
