"""Local STAC catalogues: a folder, a catalogue file, or an ItemCollection file, read lazily and never left."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from slidecube.catalog.errors import CatalogError

_ENTRIES = ("catalog.json", "collection.json")


def local_items(entry: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield the items of a local catalogue, each with the folder that its hrefs are relative to.

    entry : a folder with catalog.json or collection.json, such a file, an ItemCollection, or one item
    Raises CatalogError where a file is missing, is no STAC, or a link leads out of the catalogue.
    """
    path = _entry_file(entry)
    yield from _crawl(path, root_of(entry), published=None, seen=set())


def root_of(entry: Path) -> Path:
    """Return the folder that no link and no href of a local catalogue may leave."""
    path = Path(os.path.normpath(entry.absolute()))  # symbolic links stay: data may lie on another disk
    return path if path.is_dir() else path.parent


def _entry_file(entry: Path) -> Path:
    path = Path(os.path.normpath(entry.absolute()))
    if not path.is_dir():
        return path
    for name in _ENTRIES:
        if (path / name).is_file():
            return path / name
    raise CatalogError(f"Folder {str(entry)!r} holds no {' or '.join(_ENTRIES)}; give the catalogue's file")


def _crawl(
    path: Path, root: Path, published: str | None, seen: set[Path]
) -> Iterator[tuple[dict[str, Any], Path]]:
    """Walk a catalogue depth first; `published` is the address under which its root was published, if any."""
    stack = [path]
    while stack:
        here = stack.pop()
        if here in seen:  # links may form a ring
            continue
        seen.add(here)
        document = _read(here)
        kind = document.get("type")
        if kind == "Feature":
            yield document, here.parent
        elif kind == "FeatureCollection":
            yield from ((item, here.parent) for item in _objects(document.get("features")))
        elif kind in ("Catalog", "Collection") or "links" in document:
            published = published or _published(document, here, root)
            links = [
                link
                for link in _objects(document.get("links"))
                if link.get("rel") in ("child", "item", "items")
            ]
            stack.extend(
                _target(str(link.get("href", "")), here, root, published) for link in reversed(links)
            )
        else:
            raise CatalogError(f"{str(here)!r} is no STAC catalogue, item or ItemCollection (type {kind!r})")


def _objects(value: Any) -> list[dict[str, Any]]:
    """Take the JSON objects of what should be a list of them."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _published(document: dict[str, Any], here: Path, root: Path) -> str | None:
    for link in _objects(document.get("links")):
        href = str(link.get("href", ""))
        if link.get("rel") == "self" and href.startswith(("http://", "https://")):
            inside = here.relative_to(root).as_posix()
            return href[: -len(inside)] if href.endswith(inside) else None
    return None


def _target(href: str, here: Path, root: Path, published: str | None) -> Path:
    if published and href.startswith(published):
        href = os.path.relpath(root / href[len(published) :], here.parent)
    try:
        parts = urlsplit(href)
    except ValueError as error:
        raise CatalogError(f"{str(here)!r} links to {href[:200]!r}, which is no address ({error})") from None
    if parts.scheme not in ("", "file"):
        raise CatalogError(
            f"{str(here)!r} links to {href!r}; a local catalogue must be whole: copy the linked file"
        )
    path = Path(os.path.normpath(here.parent / unquote(parts.path)))
    if not path.is_relative_to(root):
        raise CatalogError(f"{str(here)!r} links to {href!r}, outside the catalogue's folder {str(root)!r}")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CatalogError(f"STAC file {str(path)!r} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CatalogError(
            f"STAC file {str(path)!r} cannot be read: {' '.join(str(error).split())[:160]}"
        ) from None
    if isinstance(document, list):  # a bare list of items, as some programs save them
        document = {"type": "FeatureCollection", "features": document}
    if not isinstance(document, dict):
        raise CatalogError(
            f"STAC file {str(path)!r} holds a {type(document).__name__}, not a catalogue or items"
        )
    return document
