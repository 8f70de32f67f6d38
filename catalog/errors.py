"""Errors of the catalogue: one line each, saying what was wrong, what was got and what is allowed."""

from __future__ import annotations

from typing import Literal, get_args

Fault = Literal["transient", "throttled", "expired", "data"]
"""Class of a fault: what may help against it.

transient : input and output, a time-out, a status of 500 or above, a connection or a body that broke off
throttled : the server asks for fewer requests
expired : the server refuses a signature although it was made anew
data : a broken or missing file, a wrong field, a user's error; it will not get better
"""

PASSING: frozenset[Fault] = frozenset(fault for fault in get_args(Fault) if fault != "data")
"""Faults that may be gone later."""


class CatalogError(Exception):
    """A user's AOI, grid, source, search or scene is unusable; the message is one clear line.

    fault : whether it may be gone later
    """

    fault: Fault = "data"


class OtherMissionError(CatalogError):
    """An item is of Sentinel-1 where one of Sentinel-2 is wanted, or the other way round."""


class CatalogDownError(CatalogError):
    """A provider's catalogue does not answer, or not as a STAC API: another provider may have the same scenes."""

    fault: Fault = "transient"


class SigningError(CatalogError):
    """A provider gave no signature for an address."""

    fault: Fault = "transient"


class OffsetError(CatalogError):
    """The radiometric offset of a scene cannot be decided from its metadata."""


class AssetReadError(CatalogError):
    """An asset of a scene could not be read.

    item : id of the STAC item
    asset : asset key
    reason : what the reader said, one line, without credentials
    fault : passing where any of the asset's places may be readable later
    """

    def __init__(self, item: str, asset: str, reason: str, fault: Fault = "data") -> None:
        super().__init__(f"Cannot read asset {asset!r} of item {item!r}: {reason}")
        self.item = item
        self.asset = asset
        self.reason = reason
        self.fault = fault

    def __reduce__(self) -> tuple[type[AssetReadError], tuple[str, str, str, Fault]]:
        """Pickle by the constructor's arguments (workers send these to the driver)."""
        return (type(self), (self.item, self.asset, self.reason, self.fault))
