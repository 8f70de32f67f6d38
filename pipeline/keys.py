"""Keys: content, not names, decides what is done.

Every key is a hash over canonical JSON of what the result depends on, and of nothing else: machine settings (paths,
cores, partition) stay out, so a laptop and a cluster agree on what is due (ADR 3).
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from slidecube.catalog.scenes import Scene

SCHEMA_VERSION = 2
"""Version of what layers and inventories hold; a change makes every tile due."""

KEY_HEX = 16


def content_key(*parts: Any) -> str:
    """Hash of the parts as canonical JSON: 16 hex digits."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:KEY_HEX]


def text_keys(*columns: pa.Array | str) -> list[str]:
    """Hash each row of columns of texts without line breaks: 16 hex digits, at a tenth of `content_key`'s cost.

    columns : of a nation's tiles; one that is a text alone stands in every row
    """
    rows = pc.binary_join_element_wise(*columns, "\n").cast(pa.binary()).to_pylist()
    return [hashlib.sha256(row).hexdigest()[:KEY_HEX] for row in rows]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; dates as ISO, dataclasses as objects, anything else refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_jsonable, allow_nan=False
    )


def task_key(layer_key: str, tile: str, scenes: Iterable[Scene]) -> str:
    """Key of one tile of one layer: the layer, the tile, and what is read for it.

    Scenes count by identity, version and offset decision, so a reprocessed scene makes the tile due and a new
    signature or mirror of the same one does not.
    """
    read = sorted([s.identity, s.version, None if s.offset is None else s.offset.value] for s in scenes)
    return content_key(layer_key, tile, read)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dt.date):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no canonical JSON")
