"""The radiometric offset of every real STAC item at hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slidecube.catalog.errors import OffsetError
from slidecube.catalog.sources import baseline_of, offset_of

FOLDERS = ("stac_items", "sentinel_cogs")


def measure(shared: Path, scratch: Path, images: Path | None = None) -> dict[str, Any]:
    """Decide each Sentinel-2 item once, and count by provider, collection, baseline and decision."""
    del scratch, images
    rows: Counter[tuple[str, ...]] = Counter()
    others: Counter[str] = Counter()
    for item in items(shared):
        collection = str(item.get("collection") or "sentinel-2-l2a")
        if not collection.startswith("sentinel-2") and not collection.startswith("sentinel-s2"):
            others[collection] += 1
            continue
        rows[row_of(item)] += 1
    head = ("provider", "collection", "baseline", "flag", "decision", "why")
    return {
        "items": sum(rows.values()),
        "undecided": sum(n for row, n in rows.items() if row[4] == "refused"),
        "rows": [{**dict(zip(head, row, strict=True)), "items": n} for row, n in sorted(rows.items())],
        "not_sentinel_2": dict(sorted(others.items())),
    }


def row_of(item: dict[str, Any]) -> tuple[str, ...]:
    """What decides, and the decision, as text."""
    baseline = baseline_of(item)
    flags = [value for key, value in item["properties"].items() if key.endswith("boa_offset_applied")]
    try:
        offset = offset_of(item)
        decision = f"{offset.value:+.1f}" if offset.value else "0"
        decision += ", removed already" if offset.applied else ""
        why = (
            offset.reason.split(":")[-1].strip()
            if "no offset" in offset.reason
            else offset.reason.split(" (")[0]
        )
    except OffsetError:
        decision, why = "refused", "no raster offset: a partial page without assets"
    return (
        provider_of(item),
        str(item.get("collection") or "sentinel-2-l2a"),
        "none" if baseline is None else f"{baseline[0]:02d}.{baseline[1]:02d}",
        "none" if not flags else str(flags[0]).lower(),
        decision,
        why,
    )


def provider_of(item: dict[str, Any]) -> str:
    """Who serves the item, by its links and hrefs."""
    text = json.dumps([item.get("links"), item.get("assets")])
    if "planetarycomputer" in text or "blob.core.windows.net" in text:
        return "Planetary Computer"
    return "Earth Search"


def items(shared: Path) -> Iterator[dict[str, Any]]:
    """Yield every item below the folders, also those inside recorded HTTP answers, each id of a collection once."""
    seen = set()
    for folder in FOLDERS:
        for path in sorted((shared / folder).rglob("*json")):
            for item in _items_in(json.loads(path.read_text(encoding="utf-8"))):
                key = (provider_of(item), item.get("collection"), item["id"], bool(item.get("assets")))
                if key not in seen:
                    seen.add(key)
                    yield item


def _items_in(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, str) and document[:1] in ("{", "["):
        try:
            document = json.loads(document)
        except ValueError:
            return
    if isinstance(document, dict) and document.get("type") == "Feature" and "id" in document:
        yield document
    elif isinstance(document, dict | list):
        for part in document.values() if isinstance(document, dict) else document:
            yield from _items_in(part)
