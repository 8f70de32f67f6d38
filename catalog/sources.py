"""Where scenes come from: one table of sources, their bands, and the radiometric offset of each item.

Names follow "provider/collection". Band names are canonical (`B02`..`B12`, `SCL`, `CLD`, `elevation`, `VV`, `VH`); each
source says under which asset key it keeps them, and the item itself is asked where it does not.
"""

from __future__ import annotations

import datetime as dt
import difflib
import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from slidecube.catalog.errors import CatalogError, OffsetError, SigningError
from slidecube.catalog.scenes import Offset

Kind = Literal["optical", "radar", "dem", "layer"]
Signing = Literal["none", "planetary-computer", "aws-requester-pays", "cdse-s3", "earthdata"]
Quantity = Literal["", "gamma0", "sigma0", "dn"]

# Native ground sampling distance, metres: Sentinel-2 Products Specification Document, table 1.
BAND_RESOLUTION_M: dict[str, float] = {
    **dict.fromkeys(("B02", "B03", "B04", "B08"), 10.0),
    **dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12", "SCL", "CLD"), 20.0),
    **dict.fromkeys(("B01", "B09", "B10"), 60.0),
    **dict.fromkeys(("VV", "VH", "HH", "HV"), 10.0),
    "elevation": 30.0,
}
REFLECTANCE_BANDS = (
    "B01",
    "B02",
    "B03",
    "B04",
    "B05",
    "B06",
    "B07",
    "B08",
    "B8A",
    "B09",
    "B10",
    "B11",
    "B12",
)

_COMMON: dict[str, str] = {
    "coastal": "B01",
    "blue": "B02",
    "green": "B03",
    "red": "B04",
    "rededge1": "B05",
    "rededge2": "B06",
    "rededge3": "B07",
    "nir": "B08",
    "nir08": "B8A",
    "nir09": "B09",
    "cirrus": "B10",
    "swir16": "B11",
    "swir22": "B12",
    "scl": "SCL",
    "cld": "CLD",
    "vv": "VV",
    "vh": "VH",
    "hh": "HH",
    "hv": "HV",
}
_DEM_KEYS = ("data", "elevation", "dem", "dsm")
_ES_BANDS = {
    band: key for key, band in _COMMON.items() if band in (*REFLECTANCE_BANDS, "SCL") and band != "B10"
}
_ES_C1_BANDS = {**_ES_BANDS, "CLD": "cloud"}
_ES_L1C_BANDS = {band: key for key, band in _COMMON.items() if band in REFLECTANCE_BANDS}
_PC_BANDS = {band: band for band in _ES_BANDS}
_CDSE_L2A_BANDS = {band: f"{band}_{BAND_RESOLUTION_M[band]:.0f}m" for band in _ES_BANDS}
_CDSE_L1C_BANDS = {band: band for band in _ES_L1C_BANDS}

_S2_LICENCE = "https://sentinel.esa.int/documents/247904/690755/Sentinel_Data_Legal_Notice"
_S2_ATTRIBUTION = "Contains modified Copernicus Sentinel data"
_DEM_LICENCE = (
    "https://docs.sentinel-hub.com/api/latest/static/files/data/dem/resources/license/License-COPDEM-30.pdf"
)
_DEM_ATTRIBUTION = (
    "(c) DLR e.V. 2010-2014 and (c) Airbus Defence and Space GmbH 2014-2018, provided under COPERNICUS by the "
    "European Union and ESA; all rights reserved"
)
_EARTH_SEARCH = "https://earth-search.aws.element84.com/v1"
_PLANETARY = "https://planetarycomputer.microsoft.com/api/stac/v1"
_PLANETARY_ACCOUNTS = ("sentinel2l2a01", "sentinel1euwest", "sentinel1euwestrtc", "elevationeuwest")
_ASF = "https://cmr.earthdata.nasa.gov/stac/ASF"
_CDSE = "https://stac.dataspace.copernicus.eu/v1"
_S3_OPTIONS: dict[Signing, dict[str, str]] = {
    "none": {"AWS_NO_SIGN_REQUEST": "YES"},
    "planetary-computer": {},
    "aws-requester-pays": {"AWS_REQUEST_PAYER": "requester"},
    "cdse-s3": {"AWS_S3_ENDPOINT": "eodata.dataspace.copernicus.eu", "AWS_VIRTUAL_HOSTING": "FALSE"},
    "earthdata": {},
}
RADAR_BANDS = ("VV", "VH", "HH", "HV")
_S1_BANDS = {"VV": "vv", "VH": "vh", "HH": "hh", "HV": "hv"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One collection of one provider.

    name : "provider/collection", or the path of a local catalogue as the user wrote it
    endpoint : STAC API, or the local folder or file
    collection : id of the STAC collection; "" takes every collection of a local catalogue
    kind : optical, radar, dem, or layer, any other raster
    bands : canonical band name -> asset key; {} = ask each item
    scale : physical value = DN * scale + offset (the offset is decided item by item)
    nodata : DN of missing pixels; None = the file says
    mask_asset : canonical name of the classification band, None where there is none
    licence, attribution : of the pixels, as the provider asks
    signing : how hrefs are made readable, when they are read and never before
    quantity : of radar backscatter: "gamma0", "sigma0", or "dn", amplitudes that nobody calibrated; "" = ask each item
    acquired : of a DEM, first and last day on which its heights were measured, None = its items say
    vertical_datum : of a DEM, "" = nobody says
    note : what a user should know
    """

    name: str
    endpoint: str
    collection: str
    kind: Kind
    bands: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0
    nodata: float | None = None
    mask_asset: str | None = None
    licence: str = ""
    attribution: str = ""
    signing: Signing = "none"
    quantity: Quantity = ""
    acquired: tuple[dt.date, dt.date] | None = None
    vertical_datum: str = ""
    note: str = ""

    @property
    def reader_pays(self) -> bool:
        """Whether whoever reads its files is charged for it."""
        return self.signing == "aws-requester-pays"

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is a folder or a file."""
        return not self.endpoint.startswith(("http://", "https://"))


def _s2(
    name: str, endpoint: str, bands: Mapping[str, str], signing: Signing = "none", note: str = ""
) -> Source:
    return Source(
        name=name,
        endpoint=endpoint,
        collection=name.split("/")[1],
        kind="optical",
        bands=bands,
        scale=1e-4,
        nodata=0.0,
        mask_asset="SCL" if "SCL" in bands else None,
        licence=_S2_LICENCE,
        attribution=_S2_ATTRIBUTION,
        signing=signing,
        note=note,
    )


def _glo30(name: str, endpoint: str, signing: Signing = "none") -> Source:
    return Source(
        name=name,
        endpoint=endpoint,
        collection="cop-dem-glo-30",
        kind="dem",
        bands={"elevation": "data"},
        licence=_DEM_LICENCE,
        attribution=_DEM_ATTRIBUTION,
        signing=signing,
        # the items of both providers say when they were published
        acquired=(dt.date(2010, 12, 12), dt.date(2015, 1, 16)),
        vertical_datum="EGM2008",
        note="metres above the EGM2008 geoid, a surface model; tiles of open sea do not exist",
    )


def _s1(
    name: str, endpoint: str, *, quantity: Quantity, signing: Signing, note: str, collection: str = ""
) -> Source:
    return Source(
        name=name,
        endpoint=endpoint,
        collection=collection or name.split("/")[1],
        kind="radar",
        bands={} if collection else _S1_BANDS,
        nodata=0.0,
        licence=_S2_LICENCE,
        attribution="Contains modified Copernicus Sentinel data",
        signing=signing,
        quantity=quantity,
        note=note,
    )


_TABLE = (
    _s2(
        "earth-search/sentinel-2-l2a",
        _EARTH_SEARCH,
        _ES_BANDS,
        note="its items say raster offset -0.1 although the offset was removed from the DN (boa_offset_applied)",
    ),
    _s2(
        "earth-search/sentinel-2-c1-l2a",
        _EARTH_SEARCH,
        _ES_C1_BANDS,
        note="Collection 1; the offset is in the DN; offers a cloud probability (CLD)",
    ),
    _s2(
        "earth-search/sentinel-2-l1c",
        _EARTH_SEARCH,
        _ES_L1C_BANDS,
        "aws-requester-pays",
        "top of atmosphere, JPEG 2000 in a bucket whose readers pay; no cloud mask",
    ),
    _s2(
        "planetary-computer/sentinel-2-l2a",
        _PLANETARY,
        _PC_BANDS,
        "planetary-computer",
        "the offset is in the DN from baseline 04.00 on",
    ),
    _s2(
        "cdse/sentinel-2-l2a",
        _CDSE,
        _CDSE_L2A_BANDS,
        "cdse-s3",
        "JPEG 2000 of ESA; reading needs CDSE S3 keys, as AWS keys or a profile",
    ),
    _s2(
        "cdse/sentinel-2-l1c",
        _CDSE,
        _CDSE_L1C_BANDS,
        "cdse-s3",
        "top of atmosphere, JPEG 2000 of ESA; reading needs CDSE S3 keys; no cloud mask",
    ),
    _glo30("earth-search/cop-dem-glo-30", _EARTH_SEARCH),
    _glo30("planetary-computer/cop-dem-glo-30", _PLANETARY, "planetary-computer"),
    _s1(
        "planetary-computer/sentinel-1-rtc",
        _PLANETARY,
        quantity="gamma0",
        signing="planetary-computer",
        note="gamma0, terrain corrected, 10 m; zero is nodata; lacks Sentinel-1C and some scenes",
    ),
    _s1(
        "earth-search/sentinel-1-grd",
        _EARTH_SEARCH,
        quantity="dn",
        signing="aws-requester-pays",
        note="amplitudes in radar geometry, not calibrated, in a bucket whose readers pay; on slopes misplaced by "
        "height / tan(incidence)",
    ),
    _s1(
        "cdse/sentinel-1-grd",
        _CDSE,
        quantity="dn",
        signing="cdse-s3",
        note="amplitudes in radar geometry, not calibrated; reading needs CDSE S3 keys",
    ),
    _s1(
        "asf/opera-rtc-s1",
        _ASF,
        quantity="gamma0",
        signing="earthdata",
        collection="OPERA_L2_RTC-S1_V1_1",
        note="gamma0, terrain corrected, 30 m, an item a burst; reading needs an Earthdata token in EARTHDATA_TOKEN",
    ),
)
SOURCES: dict[str, Source] = {source.name: source for source in _TABLE}


def find_source(name: str, *, kind: Kind = "optical") -> Source:
    """Return the source with a name, or the local catalogue at a path.

    name : a key of SOURCES; a folder, catalog.json, collection.json or ItemCollection file; or the address of any
        STAC API's collection, `https://host/v1/collections/NAME`
    kind : what a local catalogue or another API holds
    Raises CatalogError listing every source.
    """
    if name in SOURCES:
        source = SOURCES[name]
        if source.kind != kind:
            raise CatalogError(f"Source {name!r} holds {source.kind} data, not {kind}; {_of_kind(kind)}")
        return source
    address = urlsplit(name)
    if address.scheme in ("http", "https") and ("@" in address.netloc or address.query or address.fragment):
        raise CatalogError(
            f"Source at {address.hostname!r} carries a user, a password or a query in its address, which would be "
            "written into plans and events; give the plain address"
        )
    api = re.fullmatch(r"(https?://.+?)/collections/([^/]+)/?", name)
    if api:
        return _unlisted(name, api[1], api[2], kind)
    if Path(name).expanduser().exists():
        return _unlisted(name, str(Path(name).expanduser()), "", kind)
    near = difflib.get_close_matches(name, SOURCES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise CatalogError(
        f"Source {name!r} is neither known nor an existing folder or file; {hint}known: {', '.join(SOURCES)}; or give "
        "the path of a local STAC catalogue"
    )


def is_raster(name: str) -> bool:
    """Tell a raster's path or address from a source's name and from a catalogue's."""
    path = urlsplit(name).path if "://" in name else name
    return path.lower().endswith((".tif", ".tiff", ".jp2"))


def _of_kind(kind: Kind) -> str:
    names = [s.name for s in SOURCES.values() if s.kind == kind]
    return f"use one of {', '.join(names)}" if names else "use a local catalogue"


def _unlisted(name: str, endpoint: str, collection: str, kind: Kind) -> Source:
    return Source(
        name=name,
        endpoint=endpoint,
        collection=collection,
        kind=kind,
        scale=1e-4 if kind == "optical" else 1.0,
        nodata=0.0 if kind == "optical" else None,
        mask_asset="SCL" if kind == "optical" else None,
        note="bands are taken from each item",
    )


# --- bands -------------------------------------------------------------------------------------------------------


def asset_bands(item: Mapping[str, Any], source: Source | None = None) -> dict[str, str]:
    """Map canonical band names to the item's asset keys.

    A band is known by the source's table, then by its name in `eo:bands` or STAC 1.1 `bands`, then by the asset key
    (`B04`, `B04_10m`, `red`, `nir08`, `scl`). Of several resolutions of a band the native one is taken, and a cloud
    optimised file before its JPEG 2000 twin. Assets of several bands (true colour) are never taken.
    """
    assets = item.get("assets") or {}
    found: dict[str, str] = {}
    best: dict[str, tuple[Any, ...]] = {}
    for key, asset in assets.items():
        band = _band_of(key, asset, item)
        if band is None:
            continue
        rank = _rank(key, asset, band)
        if band not in best or rank < best[band]:
            best[band], found[band] = rank, key
    if source is not None:
        found.update({band: key for band, key in source.bands.items() if key in assets})
    return dict(sorted(found.items()))


def _band_of(key: str, asset: Mapping[str, Any], item: Mapping[str, Any]) -> str | None:
    if {"thumbnail", "overview", "metadata", "visual"} & set(asset.get("roles") or ()):
        return None
    if not _is_raster(asset):
        return None
    bands = asset.get("eo:bands") or asset.get("bands") or []
    if len(bands) > 1:
        return None
    stem = re.sub(r"(?i)([-_](jp2|\d+m))+$", "", key)
    # OPERA's keys carry the whole product's name before the polarisation
    stem = re.sub(r"(?i)^.*[-_](vv|vh|hh|hv)$", r"\1", stem)
    if _is_dem(item):
        return "elevation" if stem.lower() in _DEM_KEYS else None
    names = [str(bands[0].get("name", ""))] if bands else []
    for name in (*names, stem):
        if band := _canonical(name):
            return band
    common = bands[0].get("common_name", bands[0].get("eo:common_name", "")) if bands else ""
    # 'rededge' names three bands, and B8A where a provider has no 'nir08': it decides nothing
    return _COMMON.get(str(common).lower())


def _canonical(name: str) -> str | None:
    if match := re.fullmatch(r"(?i)B0?(\d{1,2})(A?)", name):
        band = f"B8{match[2].upper()}" if match[2] else f"B{int(match[1]):02d}"
        return band if band in REFLECTANCE_BANDS else None
    return _COMMON.get(name.lower())


def _is_raster(asset: Mapping[str, Any]) -> bool:
    media = str(asset.get("type") or "").split(";")[0].strip().lower()
    if media:
        return media in (
            "image/tiff",
            "image/geotiff",
            "image/jp2",
            "image/vnd.stac.geotiff",
            "application/x-zarr",
        )
    path = urlsplit(str(asset.get("href", ""))).path.lower()
    return path.endswith((".tif", ".tiff", ".jp2"))


def _rank(key: str, asset: Mapping[str, Any], band: str) -> tuple[Any, ...]:
    native = BAND_RESOLUTION_M.get(band, 10.0)
    resolution = _resolution_m(key, asset)
    off = abs(math.log(resolution / native)) if resolution else 0.0
    return (key.lower().endswith("jp2"), round(off, 6), len(key), key)


def _resolution_m(key: str, asset: Mapping[str, Any]) -> float | None:
    if match := re.search(r"_(\d+)m", key):
        return float(match[1])
    transform = asset.get("proj:transform") or [None]
    for value in (asset.get("gsd"), transform[0]):
        if isinstance(value, int | float) and value > 0:
            return float(value)
    return None


def _is_dem(item: Mapping[str, Any]) -> bool:
    name = f"{item.get('collection') or ''} {item.get('id') or ''}".lower()
    return "dem" in re.split(r"[^a-z]+", name) or "copernicus_dsm" in name


# --- radiometric offset ------------------------------------------------------------------------------------------

_BASELINE_WITH_OFFSET = (4, 0)  # 04.00, from 25 January 2022 on
_OFFSET = -0.1  # BOA_ADD_OFFSET and RADIO_ADD_OFFSET are -1000 of 10000 in every product since
_V0_LAST_DAY = "2022-01-25"
_PRODUCT = re.compile(r"S2[A-D]_MSIL(?:1C|2A)_\d{8}T\d{6}_N(\d{2})(\d{2})_R\d{3}_T\d{2}[A-Z]{3}_\d{8}T\d{6}")
_ESA_NAME = re.compile(r"S2[A-D]_(?:MSIL(?:1C|2A)_\d{8}T\d{6}_|OPER_MSI_L(?:1C|2A)_TL_)")
_C1 = ("sentinel-2-c1-l2a", "sentinel-2-pre-c1-l2a")


def offset_of(item: Any) -> Offset:
    """Decide the additive reflectance offset of a Sentinel-2 item; the reflectance is DN * 1e-4 + value.

    item : a STAC item as a dict, or a pystac.Item
    The rules, first match decides; the acquisition date never does, since Collection 1 reprocesses old dates:
    1. a flag `boa_offset_applied` that is true: 0, the offset was removed from the stored DN
    2. processing baseline below 04.00: 0, no offset existed
    3. Earth Search Collection 1, and version 1 with the flag false: the item's raster offset
    4. Planetary Computer or ESA's own files from 04.00 on: -0.1
    5. Earth Search version 0 with neither flag nor baseline: 0 if created before 2022-01-25
    Raises OffsetError where none of them decides, or where the item contradicts itself.
    Source: ESA, Sentinel-2 Products Specification Document, baseline 04.00, RADIO_ADD_OFFSET and BOA_ADD_OFFSET.
    """
    raw = _as_dict(item)
    name = str(raw.get("id", "?"))
    if not _is_sentinel2(raw):
        raise OffsetError(f"Item {name!r} is not a Sentinel-2 item; only those have a radiometric offset")
    flag, baseline = _flag(raw), baseline_of(raw)
    said = f"baseline {_text(baseline)}" if baseline else "no baseline"
    if flag is True:
        existed = baseline is None or baseline >= _BASELINE_WITH_OFFSET
        return Offset(value=0.0, applied=existed, reason=f"flag boa_offset_applied is true ({said})")
    if baseline is not None and baseline < _BASELINE_WITH_OFFSET:
        return Offset(value=0.0, applied=False, reason=f"{said} is below 04.00: no offset existed")
    provider = _provider(raw)
    if provider == "earth-search-c1" or (provider == "earth-search-v1" and flag is False):
        value = _raster_offset(raw)
        if value is None:
            raise OffsetError(
                f"Item {name!r} ({provider}, {said}) has no raster offset in its assets; a partial page of the "
                "catalogue? search again without a selection of fields"
            )
        return Offset(value=value, applied=False, reason=f"raster offset of {provider} ({said})")
    if provider == "native" and baseline is not None:
        return _native_offset(raw, name, said)
    if provider == "earth-search-v0" and flag is None and baseline is None:
        created = str(raw["properties"].get("created") or "")
        if created and created[:10] < _V0_LAST_DAY:
            return Offset(
                value=0.0, applied=False, reason=f"Earth Search v0, created {created[:10]}: no offset existed"
            )
    raise OffsetError(
        f"The radiometric offset of item {name!r} is undecided ({provider}, {said}, flag boa_offset_applied "
        f"{'false' if flag is False else 'absent'}); add the flag or the baseline to the item, or leave it out"
    )


def baseline_of(item: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the processing baseline (major, minor), from the properties, or else from the product's own name."""
    stated = (_parsed(value) for value in _stated(item.get("properties") or {}))
    named = (_named(name) for name in _names(item))
    return next((b for b in (*stated, *named) if b is not None), None)


def _as_dict(item: Any) -> dict[str, Any]:
    if isinstance(item, Mapping):
        return dict(item)
    try:
        # links stay unresolved: resolving one reads from the network
        return dict(item.to_dict(include_self_link=False, transform_hrefs=False))
    except (AttributeError, TypeError):
        raise OffsetError(
            f"{type(item).__name__} is not a STAC item; give its dict or a pystac.Item"
        ) from None


def _stated(properties: Mapping[str, Any]) -> Iterator[Any]:
    for key in ("s2:processing_baseline", "sentinel:processing_baseline", "processing_baseline"):
        yield properties.get(key)
    if str(properties.get("constellation", "")).lower().startswith("sentinel"):
        yield properties.get("processing:version")


def _parsed(value: Any) -> tuple[int, int] | None:
    match = re.fullmatch(r"N?(\d{1,2})\.(\d{1,2})", str(value).strip())
    if match is None:
        return None
    baseline = int(match[1]), int(match[2].ljust(2, "0"))
    # 99.99 is Sen2Cor run by hand on any level-1 product: it says nothing
    return baseline if baseline[0] < 90 else None


def _named(name: str) -> tuple[int, int] | None:
    match = _PRODUCT.search(name) or re.search(r"_N(\d{2})\.(\d{2})$", name)
    return _parsed(f"{match[1]}.{match[2]}") if match else None


def _names(item: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the ESA product in an item, the most trusted first."""
    properties = item.get("properties") or {}
    for key in (
        "s2:product_uri",
        "sentinel:product_id",
        "title",
        "s2:granule_id",
        "s2:tile_id",
        "s2:datastrip_id",
        "eopf:datastrip_id",
        "s2:datatake_id",
        "eopf:datatake_id",
    ):
        if isinstance(properties.get(key), str):
            yield properties[key]
    yield str(item.get("id", ""))
    for asset in (item.get("assets") or {}).values():
        yield urlsplit(str(asset.get("href", ""))).path


def _text(baseline: tuple[int, int]) -> str:
    return f"{baseline[0]:02d}.{baseline[1]:02d}"


def _is_sentinel2(item: Mapping[str, Any]) -> bool:
    properties = item.get("properties") or {}
    words = (
        str(item.get("collection") or ""),
        str(properties.get("constellation") or ""),
        str(properties.get("platform") or ""),
        str(item.get("id") or ""),
    )
    return any(re.match(r"(?i)(sentinel[- ]?(s?2)|S2[A-D]_)", w) for w in words)


def _flag(item: Mapping[str, Any]) -> bool | None:
    seen = set()
    for key, value in (item.get("properties") or {}).items():
        if key.split(":")[-1] == "boa_offset_applied" and value is not None:
            seen.add(value if isinstance(value, bool) else str(value).strip().lower() in ("true", "1", "yes"))
    if len(seen) > 1:
        raise OffsetError(
            f"Item {item.get('id')!r} has two flags boa_offset_applied that disagree; leave it out"
        )
    return seen.pop() if seen else None


def _provider(item: Mapping[str, Any]) -> str:
    """Name the convention that an item's DN follow."""
    collection = str(item.get("collection") or "")
    properties = item.get("properties") or {}
    hrefs = [str(a.get("href", "")) for a in (item.get("assets") or {}).values()]
    if collection == "sentinel-s2-l2a-cogs" or any(k.startswith("sentinel:") for k in properties):
        return "earth-search-v0"
    if collection in _C1 or any("/sentinel-2-c1-l2a/" in h or "/sentinel-2-pre-c1-l2a/" in h for h in hrefs):
        return "earth-search-c1"
    level_1c = properties.get("s2:product_type") == "S2MSI1C" or collection == "sentinel-2-l1c"
    earth_search = any(k.startswith("earthsearch:") for k in properties) or any(
        "sentinel-cogs" in h for h in hrefs
    )
    if earth_search and not level_1c:  # its level 1C is ESA's own files
        return "earth-search-v1"
    if _is_native(item, hrefs, properties):
        return "native"
    return "unknown provider"


def _is_native(item: Mapping[str, Any], hrefs: list[str], properties: Mapping[str, Any]) -> bool:
    assets = item.get("assets") or {}
    reflectance = [assets[k] for b, k in asset_bands(item).items() if b in REFLECTANCE_BANDS]
    jp2 = any("jp2" in str(a.get("type")) or str(a.get("href")).lower().endswith(".jp2") for a in reflectance)
    hosted = any(
        ".blob.core.windows.net/" in h or "//eodata/" in h or "dataspace.copernicus.eu" in h or ".SAFE/" in h
        for h in hrefs
    )
    esa_name = bool(_ESA_NAME.match(str(item.get("id") or "")))
    safe = str(properties.get("s2:product_uri") or "").upper().rstrip("/").endswith(".SAFE")
    return jp2 or hosted or esa_name or safe


def _native_offset(item: Mapping[str, Any], name: str, said: str) -> Offset:
    raster = _raster_offset(item)
    if raster == 0.0:  # ESA's name, but somebody's rewritten pixels
        raise OffsetError(
            f"Item {name!r} contradicts itself: {said} has an offset of -0.1, but its assets say 0; if its DN were "
            "harmonised, add the flag boa_offset_applied = true"
        )
    extra = "" if raster in (None, _OFFSET) else f"; its raster offset {raster} is not that of any product"
    return Offset(value=_OFFSET, applied=False, reason=f"ESA's own DN, {said} is 04.00 or above{extra}")


def _raster_offset(item: Mapping[str, Any]) -> float | None:
    """Return the offset that the reflectance assets state, None where they state none."""
    assets = item.get("assets") or {}
    values: dict[float, str] = {}
    for band, key in asset_bands(item).items():
        if band not in REFLECTANCE_BANDS:
            continue
        asset = assets[key]
        for part in (asset, *(asset.get("raster:bands") or ()), *(asset.get("bands") or ())):
            value = part.get("raster:offset", None if part is asset else part.get("offset"))
            if isinstance(value, int | float):
                values[float(value)] = key
    if len(values) > 1:
        shown = ", ".join(f"{key} {value}" for value, key in values.items())
        raise OffsetError(
            f"The assets of item {item.get('id')!r} state several offsets ({shown}); leave it out"
        )
    return next(iter(values), None)


# --- signing, when hrefs are read ---------------------------------------------------------------------------------


def sign_href(href: str, source: Source | str, *, refused: str = "") -> str:
    """Return an href that can be read now; only Planetary Computer's are changed, and nothing is stored.

    source : a Source, or the name a Scene carries; of a local catalogue that a user saved from Planetary Computer, the
        storage account says it
    refused : a signed href that the provider did not accept; its token is thrown away
    Raises SigningError where the provider gives no token.
    """
    name = source if isinstance(source, str) else source.name
    known = SOURCES.get(name)
    ours = _account(href) in _PLANETARY_ACCOUNTS or name.startswith(_PLANETARY)
    signs = known.signing == "planetary-computer" if known else ours
    if not signs or not _account(href):
        return href
    try:
        signed = str(_planetary_computer().sign_url(href))
        if signed == refused:
            with _ONE_RENEWS:
                # another thread may have renewed it meanwhile
                signed = str(_planetary_computer().sign_url(href))
                if signed == refused:
                    _forget_token(href)
                    signed = str(_planetary_computer().sign_url(href))
    except (OSError, ValueError) as error:  # those of requests, urllib3 and pydantic
        message = " ".join(str(error).split())[:160]
        raise SigningError(f"Planetary Computer gave no access token for {href!r}: {message}") from None
    return signed


_ONE_RENEWS = threading.Lock()


def _forget_token(href: str) -> None:
    """Drop the token of an href's container: the library keeps it until a minute before the end that it was told."""
    account, container = _planetary_computer().sas.parse_blob_url(urlsplit(href))
    tokens = _planetary_computer().sas.TOKEN_CACHE
    for address in [key for key in tokens if key.endswith(f"/{account}/{container}")]:
        tokens.pop(address, None)


def s3_options(href: str, source: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return GDAL's settings for an `s3://` href of a source; {} of any other href.

    environment : of the process; an endpoint that it names is a site's own mirror, and stands
    What the table holds unsigned is public and is read without credentials; all else, and catalogues that the table
    does not know, by the standard chain (environment, profile, instance). Only the latter can lie at the endpoint that
    a site names for its own stores.
    """
    if not href.startswith("s3://"):
        return {}
    known = SOURCES.get(source)
    options = _S3_OPTIONS[known.signing] if known else _own_endpoint(environment)
    if "AWS_SHARED_CREDENTIALS_FILE" in environment:  # every other program's name of it
        options = {**options, "CPL_AWS_CREDENTIALS_FILE": environment["AWS_SHARED_CREDENTIALS_FILE"]}
    return {k: v for k, v in options.items() if k not in environment}


def https_options(href: str, source: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return GDAL's settings for an `https://` href of a source that wants a token; {} of any other href."""
    known = SOURCES.get(source)
    token = environment.get("EARTHDATA_TOKEN", "")
    if known is None or known.signing != "earthdata" or not token or not href.startswith("https://"):
        return {}
    return {"GDAL_HTTP_AUTH": "BEARER", "GDAL_HTTP_BEARER": token}


def _own_endpoint(environment: Mapping[str, str]) -> dict[str, str]:
    """Return GDAL's settings for the endpoint that other programs are told of by AWS_ENDPOINT_URL."""
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    parts = urlsplit(endpoint)
    if not parts.netloc or "AWS_S3_ENDPOINT" in environment:
        return {}
    https = "NO" if parts.scheme == "http" else "YES"
    return {"AWS_S3_ENDPOINT": parts.netloc, "AWS_HTTPS": https, "AWS_VIRTUAL_HOSTING": "FALSE"}


@lru_cache(maxsize=1)
def _planetary_computer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its models' configuration, on import
        import planetary_computer  # noqa: PLC0415  # needed by one provider only
    return planetary_computer


def _account(href: str) -> str:
    """Return the storage account of an Azure href, "" of any other."""
    host = urlsplit(href).hostname or ""
    return host.split(".")[0] if host.endswith(".blob.core.windows.net") else ""
