"""One STAC item: which acquisition it is, which version of it, and the form in which it is kept.

Kept items are plain dicts: pystac rewrites the fields of older versions on reading, and one of the two loaders needs
the old spelling beside the new one.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import shapely

from slidecube.catalog.errors import CatalogError, OtherMissionError
from slidecube.catalog.scenes import Role, Scene
from slidecube.catalog.sources import Source, asset_bands, baseline_of, offset_of

MISSIONS: Mapping[Role, int] = {"optical": 2, "radar": 1}
"""Role of a scene -> number of the Sentinel that it must be of."""

_REMOTE_SCHEMES = ("http", "https", "s3")
_LONGEST_ID = 300  # the longest of the known providers have 110
_LARGEST_ITEM = 1_000_000  # characters of JSON; true ones have 10,000 to 60,000
_LONGEST_HREF = 4_000
_SIGNATURES = {
    "sig",
    "signature",
    "x-amz-signature",
    "x-goog-signature",
    "token",
    "awsaccesskeyid",
    "se",
    "skt",
}
_KEPT_ASSET_FIELDS = (
    "href",
    "type",
    "title",
    "roles",
    "gsd",
    "nodata",
    "data_type",
    "unit",
    "bands",
    "alternate",
)
_KEPT_PREFIXES = ("proj:", "raster:", "eo:", "file:", "storage:", "classification:")

# S2A_MSIL2A_20200219T112111_N0214_R037_T29RKH_20200219T123947; Planetary Computer leaves the baseline out
_PRODUCT = re.compile(
    r"(?P<sat>S2[A-D])_MSIL(?:1C|2A)_(?P<take>\d{8}T\d{6})_(?:N\d{4}_)?R\d{3}_T(?P<tile>\d{2}[A-Z]{3})"
    r"_(?P<made>\d{8}T\d{6})"
)
_DATASTRIP = re.compile(r"_DS_\w+?_(?P<made>\d{8}T\d{6})_S(?P<strip>\d{8}T\d{6})")
_DATATAKE = re.compile(r"GS2[A-D]_(?P<take>\d{8}T\d{6})_\d{6}")
_GRANULE_FOLDER = re.compile(r"/L(?:1C|2A)_T\d{2}[A-Z]{3}_A\d{6}_(?P<strip>\d{8}T\d{6})/")
_C1_ID = re.compile(r"S2[A-D]_T\d{2}[A-Z]{3}_(?P<strip>\d{8}T\d{6})_L(?:1C|2A)")
# S1A_IW_GRDH_1SDV_20240419T045904_20240419T045916_053498_067DF2, then a unique id, which changes when it is processed
# again, or the provider's own ending
_S1_PRODUCT = re.compile(
    r"(?P<sat>S1[A-D])_(?:IW|EW|S\d|WV)_GRD[FHM]_\dS(?:SH|SV|DH|DV)_(?P<start>\d{8}T\d{6})_\d{8}T\d{6}"
    r"_(?P<orbit>\d{6})_(?P<take>[0-9A-F]{6})"
)
_OPERA = re.compile(
    r"OPERA_L2_RTC-S1_(?P<burst>T(?P<track>\d{3})-\d{6}-IW\d)_(?P<start>\d{8}T\d{6})Z_(?P<made>\d{8}T\d{6})Z_"
    r"(?P<sat>S1[A-D])"
)
_TILE = re.compile(r"(?:^|[-_])T?(?P<zone>\d{1,2})(?P<square>[C-HJ-NP-X][A-HJ-NP-Z]{2})(?:_|$|\.)")


def scene_of(item: Mapping[str, Any], source: Source, role: Role) -> Scene:
    """Make a Scene of a normalised item.

    Raises CatalogError where the acquisition cannot be told from the item, OffsetError where its offset cannot.
    """
    identity, datatake = identity_of(item, role)
    return Scene(
        id=str(item["id"]),
        role=role,
        source=source.name,
        datetime=datetime_of(item),
        identity=identity,
        datatake=datatake,
        version=version_of(item) if role == "optical" else _version_of_other(item),
        offset=offset_of(item) if role == "optical" else None,
        bands=asset_bands(item, source),
        item=dict(item),
    )


def datetime_of(item: Mapping[str, Any]) -> dt.datetime:
    """Return the sensing time, UTC; the start of a span where there is no single time."""
    properties = item.get("properties") or {}
    text = properties.get("datetime") or properties.get("start_datetime")
    try:
        when = dt.datetime.fromisoformat(str(text))
    except ValueError:
        raise CatalogError(f"Item {item.get('id')!r} has no usable datetime: {text!r}") from None
    return when.astimezone(dt.UTC) if when.tzinfo else when.replace(tzinfo=dt.UTC)


# --- identity ----------------------------------------------------------------------------------------------------


def identity_of(item: Mapping[str, Any], role: Role) -> tuple[str, str]:
    """Return the canonical key of the acquisition, and its datatake.

    Sentinel-2: platform/MGRS tile/datatake/datastrip sensing start. One tile can have two datastrips of one
    datatake, each with a part of it: both are needed. Sentinel-1: platform/slice or burst/datatake, whatever the
    product was processed to last. Other items are what their id says.
    Raises CatalogError naming what is missing.
    """
    name = str(item.get("id", ""))
    require_mission(item, role)
    if role == "radar":
        return _radar_identity(item, name)
    if role != "optical":
        properties = item.get("properties") or {}
        return name, str(properties.get("eopf:datatake_id") or "")
    parts = {
        "platform": platform_of(item),
        "MGRS tile": mgrs_tile(item),
        "datatake": _first(item, (_DATATAKE, _PRODUCT), "take"),
        "datastrip sensing start": _first(item, (_DATASTRIP, _C1_ID, _GRANULE_FOLDER), "strip"),
    }
    missing = [what for what, value in parts.items() if not value]
    if missing:
        raise CatalogError(
            f"Item {name!r} does not say its {', '.join(missing)}; add s2:product_uri and s2:datastrip_id to it, or "
            "leave it out"
        )
    datatake = f"{parts['platform']}_{parts['datatake']}"
    return "/".join(str(v) for v in parts.values()), datatake


def mission_of(item: Mapping[str, Any]) -> int | None:
    """Return 1 or 2 where an item is evidently of Sentinel-1 or Sentinel-2."""
    properties = item.get("properties") or {}
    for key in ("platform", "constellation"):
        if match := re.match(r"(?i)(?:sentinel[- ]?|S)([12])(?![0-9])", str(properties.get(key) or "")):
            return int(match[1])
    name = str(item.get("id") or "")
    if _OPERA.search(name):
        return 1
    return int(match[1]) if (match := re.match(r"S([12])[A-D]_", name)) else None


def require_mission(item: Mapping[str, Any], role: Role) -> None:
    """Refuse an item of Sentinel-1 among optical ones, and one of Sentinel-2 among radar ones."""
    found, wanted = mission_of(item), MISSIONS.get(role)
    if found is not None and wanted is not None and found != wanted:
        raise OtherMissionError(
            f"Item {item.get('id')!r} is of Sentinel-{found}, and {role} takes Sentinel-{wanted}; name a catalogue of "
            f"Sentinel-{wanted} as {role}"
        )


def _radar_identity(item: Mapping[str, Any], name: str) -> tuple[str, str]:
    properties = item.get("properties") or {}
    stated = str(properties.get("s1:datatake_id") or properties.get("eopf:datatake_id") or "")
    if match := _S1_PRODUCT.search(name):
        return f"{match['sat']}/{match['start']}/{match['take']}", stated or f"{match['sat']}_{match['take']}"
    if match := _OPERA.search(name):
        # bursts of one pass lie beside each other; a pass takes minutes
        passed = f"{match['sat']}_T{match['track']}_{match['start'][:8]}"
        return f"{match['sat']}/{match['burst']}/{match['start']}", stated or passed
    return name, stated


def _version_of_other(item: Mapping[str, Any]) -> str:
    properties = item["properties"]
    made = _OPERA.search(str(item.get("id") or ""))
    stated = properties.get("s1:processing_datetime") or properties.get("updated")
    return str(stated or (made["made"] if made else ""))


def platform_of(item: Mapping[str, Any]) -> str | None:
    """Return the satellite in one spelling, `sentinel-2a`."""
    platform = str((item.get("properties") or {}).get("platform") or "")
    for text in (platform, *_texts(item)):
        if match := re.match(r"(?i)(?:sentinel[- ]?|S|GS)2([A-D])(?![a-z0-9])", text):
            return f"sentinel-2{match[1].lower()}"
    return None


def mgrs_tile(item: Mapping[str, Any]) -> str | None:
    """Return the MGRS tile with a zone of two digits, `01WCP`."""
    properties = item.get("properties") or {}
    for zone, band, square in (
        ("mgrs:utm_zone", "mgrs:latitude_band", "mgrs:grid_square"),
        ("sentinel:utm_zone", "sentinel:latitude_band", "sentinel:grid_square"),
    ):
        if all(properties.get(k) for k in (zone, band, square)):
            return f"{int(properties[zone]):02d}{properties[band]}{properties[square]}"
    codes = (properties.get("s2:mgrs_tile"), properties.get("grid:code"))
    for text in (*(str(c) for c in codes if c), *_texts(item)):
        if match := _TILE.search(text):
            return f"{int(match['zone']):02d}{match['square']}"
    return None


def version_of(item: Mapping[str, Any]) -> str:
    """Return processing baseline and generation time, `05.11/2025-07-31T14:39:19Z`; sorts from old to new."""
    baseline = baseline_of(item) or (0, 0)
    properties = item.get("properties") or {}
    stated = (properties.get(k) for k in ("s2:generation_time", "processing:datetime"))
    generated = next((t for t in map(_iso, stated) if t), None)
    generated = (
        generated or _iso(_first(item, (_PRODUCT, _DATASTRIP), "made")) or _iso(properties.get("created"))
    )
    return f"{baseline[0]:02d}.{baseline[1]:02d}/{generated or '0000'}"


def _iso(text: Any) -> str | None:
    try:
        when = dt.datetime.fromisoformat(str(text))
    except ValueError:
        return None
    when = when.astimezone(dt.UTC) if when.tzinfo else when.replace(tzinfo=dt.UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _first(item: Mapping[str, Any], patterns: tuple[re.Pattern[str], ...], group: str) -> str | None:
    for pattern in patterns:
        for text in (*_texts(item), *_paths(item)):
            if match := pattern.search(text):
                return match[group]
    return None


def _texts(item: Mapping[str, Any]) -> Iterator[str]:
    properties = item.get("properties") or {}
    for key in (
        "s2:datastrip_id",
        "eopf:datastrip_id",
        "s2:datatake_id",
        "eopf:datatake_id",
        "s2:product_uri",
        "sentinel:product_id",
        "s2:granule_id",
        "s2:tile_id",
        "title",
    ):
        if isinstance(properties.get(key), str):
            yield properties[key]
    yield str(item.get("id", ""))


def _paths(item: Mapping[str, Any]) -> Iterator[str]:
    for asset in (item.get("assets") or {}).values():
        yield urlsplit(str(asset.get("href", ""))).path


# --- the form in which items are kept -----------------------------------------------------------------------------


def is_partial(item: Mapping[str, Any]) -> bool:
    """Whether an item is a search page's excerpt, without the assets or the geometry that reading needs."""
    return not item.get("assets") or not (item.get("geometry") or item.get("bbox"))


def normalised(
    item: Mapping[str, Any], source: Source, *, folder: Path | None = None, root: Path | None = None
) -> dict[str, Any]:
    """Return an item as it is kept: its bands only, hrefs absolute and unsigned, both spellings of its projection.

    folder : of a local item, against which its hrefs are resolved
    root : of a local catalogue, which its hrefs must not leave
    Raises CatalogError where an href leaves the catalogue, carries a password, or has a scheme that is not read, and
    where the item is larger than any true one.
    """
    name = _safe_id(item)
    bands = asset_bands(item, source)
    assets = {}
    for key in dict.fromkeys(bands.values()):
        raw = item["assets"][key]
        asset = {k: v for k, v in raw.items() if k in _KEPT_ASSET_FIELDS or k.startswith(_KEPT_PREFIXES)}
        asset.pop("alternate", None)
        asset["href"] = _safe_href(
            str(raw.get("href", "")), f"{key[:_LONGEST_ID]!r} of item {name!r}", folder, root
        )
        assets[key] = _both_spellings(asset)
    properties = _both_spellings(dict(item["properties"]))
    _lift_projection(properties, assets)
    geometry = item.get("geometry") or _box(item)
    kept = {
        "type": "Feature",
        "stac_version": str(item.get("stac_version") or "1.0.0"),
        "stac_extensions": [str(e) for e in item.get("stac_extensions") or []],
        "id": name,
        "collection": item.get("collection") or source.collection,
        "geometry": geometry,
        "bbox": item.get("bbox") or list(shapely.geometry.shape(geometry).bounds),
        "properties": properties,
        "links": [],
        "assets": assets,
    }
    size = len(json.dumps(kept))
    if size > _LARGEST_ITEM:
        raise CatalogError(
            f"Item {name!r} has {size / 1e6:.1f} MB, more than {_LARGEST_ITEM / 1e6:g}; no scene needs that: leave it "
            "out"
        )
    return kept


def _safe_id(item: Mapping[str, Any]) -> str:
    """Return an item's id, which stands in records, tables and the report."""
    name = str(item["id"])
    if not name or len(name) > _LONGEST_ID or not name.isprintable():
        raise CatalogError(
            f"Item {name[:80]!r} has an id of {len(name)} characters; allowed are 1 to {_LONGEST_ID}, all printable"
        )
    return name


def _box(item: Mapping[str, Any]) -> dict[str, Any]:
    values = [float(v) for v in item["bbox"]]
    west, south, east, north = values if len(values) == 4 else (values[0], values[1], values[3], values[4])
    turn = 360.0 if west > east else 0.0
    box: dict[str, Any] = shapely.geometry.mapping(shapely.box(west, south, east + turn, north))
    return box


def _both_spellings(fields: dict[str, Any]) -> dict[str, Any]:
    """Write `proj:epsg` beside `proj:code` and the other way round, where either is known."""
    epsg, code = fields.get("proj:epsg"), fields.get("proj:code")
    if isinstance(code, str) and (match := re.fullmatch(r"(?i)epsg:(\d+)", code)):
        return {**fields, "proj:epsg": int(match[1]), "proj:code": f"EPSG:{match[1]}"}
    if isinstance(code, int) or (code is None and isinstance(epsg, int)):
        number = code if isinstance(code, int) else epsg
        return {**fields, "proj:epsg": number, "proj:code": f"EPSG:{number}"}
    return fields


def _lift_projection(properties: dict[str, Any], assets: dict[str, dict[str, Any]]) -> None:
    """Give the item the projection that all its assets share, where it has none itself."""
    if properties.get("proj:epsg") is None:
        codes = {asset.get("proj:epsg") for asset in assets.values()}
        if len(codes) == 1 and (code := codes.pop()) is not None:
            properties.update({"proj:epsg": code, "proj:code": f"EPSG:{code}"})


def _safe_href(href: str, what: str, folder: Path | None, root: Path | None) -> str:
    if not href or len(href) > _LONGEST_HREF or re.search(r"[\x00-\x1f\x7f]", href):
        raise CatalogError(
            f"Asset {what} has an empty or broken href, or one above {_LONGEST_HREF} characters"
        )
    parts = urlsplit(href)
    if parts.scheme in _REMOTE_SCHEMES and parts.netloc:
        return remote_href(href, what)
    if folder is None or root is None:
        raise CatalogError(
            f"Asset {what} points to {href[:200]!r}; a remote catalogue may give http, https and s3 only"
        )
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        raise CatalogError(
            f"Asset {what} points to {href[:200]!r}; allowed are files of the catalogue, http, https and s3"
        )
    path = Path(os.path.normpath(folder / (unquote(parts.path) if parts.scheme == "file" else href)))
    if not path.is_relative_to(root):
        raise CatalogError(
            f"Asset {what} points to {href[:200]!r}, outside the catalogue's folder {str(root)!r}"
        )
    return str(path)


def remote_href(href: str, what: str) -> str:
    """Return a remote address as it is kept, unsigned; raises CatalogError for one that is not read.

    what : of whose asset, for the message
    """
    parts = urlsplit(href)
    if parts.username or parts.password:
        raise CatalogError(
            f"Asset {what} carries a user name or password in its href; credentials are not stored"
        )
    if parts.path.lower().endswith((".vrt", ".xml", ".json", ".wms")):
        # GDAL follows what such a file names, local files included
        raise CatalogError(
            f"Asset {what} points to {parts.path[:200]!r}, a file that names other files; give the raster"
        )
    names = {name.lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    if names & _SIGNATURES:
        return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, parts.query, ""))
