"""Pixels of one asset on one block of the lattice: the one way to read a pixel, whichever loader asks.

Signing, retries, other places of the same asset, the choice between copying, magnifying and warping, nodata and the
one line of an error all stand here; `load` only decides which asset is read for which block.

GDAL remembers for the life of the process that a file could not be opened. A second attempt would be answered from
that memory, so an attempt that follows a failure has GDAL forget the file (CPL_VSIL_CURL_NON_CACHED).
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar
from urllib.parse import urlsplit

import numpy as np
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.session import DummySession
from rasterio.transform import GCPTransformer
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject, transform, transform_bounds
from rasterio.windows import Window, from_bounds

from slidecube.catalog.errors import PASSING, AssetReadError, CatalogError, Fault
from slidecube.catalog.faults import fault_of, one_line, pause_asked_s, pieces_came, status_of
from slidecube.catalog.hosts import Gate, gate_of, host_of
from slidecube.catalog.open_files import OpenFiles
from slidecube.catalog.sources import https_options, s3_options, sign_href
from slidecube.catalog.zoom import magnification, on_binary_grid, read_magnified

# these log a failed or repeated href as it is, signature included; our error names item and asset instead
for _name in ("rasterio._env", "rasterio._err"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

GDAL_OPTIONS = {
    # of decoded pixels, for all files of a process; GDAL's own choice is a twentieth of the machine's memory
    "GDAL_CACHEMAX": 64,
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1000",
    "GDAL_HTTP_LOW_SPEED_TIME": "30",
    "GDAL_HTTP_MAX_RETRY": "4",
    "GDAL_HTTP_RETRY_CODES": "500,502,503,504",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
}
"""Settings of GDAL under which assets are read.

A transfer below 1000 bytes/s over 30 s has stalled: GDAL gives it up at once. A connection that is not made within
10 s is tried again like an answer "busy", in all for about a minute. The status 429 comes to us at once: GDAL asks
again without regard to how long the server wants to be left alone.
"""

_ATTEMPTS: dict[Fault, int] = {"transient": 6, "throttled": 6, "expired": 3, "data": 2}
"""Attempts at one place, by the class of the last failure; a broken file is asked for once more, bytes can rot on
their way.
"""
_FIRST_WAIT_S = 0.5  # doubles with each attempt
_PATIENCE_S = 45.0  # no attempt begins later: with what GDAL takes, two minutes for a place
# assets of a source that failed on one tile: the source is down then, and each try of it costs a minute
_GIVEN_UP_AFTER = 3
_WHOLE = ("uint8", "uint16")
_UNREADABLE = (rasterio.errors.RasterioError, OSError, CatalogError)  # the last: no token to sign with
_FORGET = {"CPL_VSIL_CURL_NON_CACHED": "/vsicurl:/vsis3"}
_LOGGER = logging.getLogger(__name__)
_T = TypeVar("_T")

# addresses of which GDAL may remember a failure; a set's own operations are whole between threads
_failed_before: set[str] = set()
# rasterio silences a warning about its own helper arrays in a way that two threads undo for each other
_REPROJECT = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One place at which an asset lies.

    href : unsigned; source : name that the href is signed by
    shift_dn : added to every digital number but nodata, so that it is what the first place holds
    """

    href: str
    source: str
    shift_dn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """One asset of one scene.

    item, asset : id and key, for errors and the ledger; places : the first is read, the others where it cannot be
    """

    item: str
    asset: str
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """What is made of an asset's pixels.

    dtype : of the result; kernel : name of a rasterio resampling; band : of the file, from 1
    nodata : of a file that declares none, None = every pixel counts; fill : nodata of the result
    positive : what is zero or below is nodata, too, whatever a file declares
    holes : further values that are nodata, taken out before a warp, which would blend them into the rim
    """

    dtype: str
    kernel: str
    nodata: float | None
    fill: float
    band: int = 1
    positive: bool = False
    holes: tuple[float, ...] = ()


@dataclass(slots=True)
class ReadLog:
    """What was really read, and what could not be; filled by the readers of one process, from any thread.

    read : ids of scenes of which at least one asset was opened
    lost : (scene id, asset, reason) of each asset that failed on at least one block
    substituted : (scene id, asset, source, reason) of each asset that was read from another source on at least one
        block, and why not from its own
    """

    read: set[str] = field(default_factory=set)
    lost: set[tuple[str, str, str]] = field(default_factory=set)
    substituted: set[tuple[str, str, str, str]] = field(default_factory=set)
    _failed: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _faults: dict[tuple[str, str], Fault] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_read(self, scene: str) -> None:
        """Count a scene as read."""
        with self._lock:
            self.read.add(scene)

    def add_lost(self, error: AssetReadError) -> None:
        """Keep the name and the reason of a failed read."""
        with self._lock:
            self.lost.add((error.item, error.asset, error.reason))
            self._faults[error.item, error.asset] = error.fault

    @property
    def passing(self) -> set[tuple[str, str]]:
        """(scene id, asset) of what was lost to a fault that may be gone later: its last failure was of that kind."""
        with self._lock:
            return {lost for lost, fault in self._faults.items() if fault in PASSING}

    @property
    def passing_fault(self) -> Fault:
        """Class of what was lost to a passing fault; that of a busy server before others, it asks for the most time."""
        with self._lock:
            found = {fault for fault in self._faults.values() if fault in PASSING}
        return min(found, key=("throttled", "expired", "transient").index)

    def add_failed(self, asset: Asset, place: Place, reason: str) -> None:
        """Remember that an asset could not be read at a place, though another may have it."""
        with self._lock:
            self._failed.setdefault((place.source, asset.item, asset.asset), reason)

    def add_substituted(self, asset: Asset, place: Place, reason: str) -> None:
        """Keep that an asset was read at another place than its first; the first reason stands for all."""
        with self._lock:
            entry = (asset.item, asset.asset, place.source)
            if not any(known[:3] == entry for known in self.substituted):
                self.substituted.add((*entry, reason))

    def reason_against(self, asset: Asset, place: Place) -> str:
        """Say why a place is asked last: it failed for this asset, or for several others; "" when it did not."""
        with self._lock:
            own = self._failed.get((place.source, asset.item, asset.asset))
            if own:
                return own
            others = [why for (source, _, _), why in self._failed.items() if source == place.source]
            return others[0] if len(others) >= _GIVEN_UP_AFTER else ""


def read_asset(asset: Asset, geobox: GeoBox, pixels: Pixels, log: ReadLog | None) -> np.ndarray | None:
    """Read an asset onto a block, at its first place or, where that fails after retries, at the next.

    geobox : a whole block of the lattice
    log : given, what happens is written down there, and a place that failed before is asked last
    Returns (y, x) of the wanted dtype; None where no place can be read and a log has taken the reason.
    Raises AssetReadError where no place can be read and there is no log.
    """
    against = {place: log.reason_against(asset, place) for place in asset.places} if log else {}
    failures: dict[Place, PlaceReadError] = {}
    for place in sorted(asset.places, key=lambda p: bool(against.get(p))):
        try:
            found = with_opened(place, lambda opened: _moved_onto(opened, geobox, pixels, place.shift_dn))  # noqa: B023
        except PlaceReadError as error:
            failures[place] = error
            if log and len(asset.places) > 1:
                log.add_failed(asset, place, str(error))
            continue
        first = asset.places[0]
        if place is not first:
            _tell(asset, place, str(failures[first]) if first in failures else against[first], log)
        if log:
            log.add_read(asset.item)
        return found
    failure = _lost(asset, failures)
    if log is None:
        raise failure from None
    log.add_lost(failure)
    return None


def _tell(asset: Asset, place: Place, reason: str, log: ReadLog | None) -> None:
    if log:
        log.add_substituted(asset, place, reason)
    else:
        _LOGGER.warning(
            "asset %r of item %r is read from %s: %s", asset.asset, asset.item, place.source, reason
        )


def _lost(asset: Asset, failures: dict[Place, PlaceReadError]) -> AssetReadError:
    others = [f"; nor from {place.source}: {failures[place]}" for place in asset.places[1:]]
    passing = (error.fault for error in failures.values() if error.fault in PASSING)
    reason = str(failures[asset.places[0]]) + "".join(others)
    return AssetReadError(asset.item, asset.asset, reason, next(passing, "data"))


class PlaceReadError(CatalogError):
    """An asset could not be read at one place; the message is what the reader said, without credentials."""

    def __init__(self, reason: str, fault: Fault) -> None:
        super().__init__(reason)
        self.fault = fault


def with_opened(place: Place, use: Callable[[rasterio.DatasetReader], _T]) -> _T:
    """Open an asset at one place and use it, several times where that may help.

    use : called with the open dataset, once an attempt
    Raises PlaceReadError with what the last attempt said.
    """
    # a local file that is broken stays broken, and one that is away for a moment is the engine's to wait for
    gate, remote = gate_of(host_of(place.href)), bool(host_of(place.href))
    began, refused = time.monotonic(), ""
    for attempt in range(max(_ATTEMPTS.values())):
        href = place.href
        try:
            href = sign_href(place.href, place.source, refused=refused) if refused else _signed(place)
            with gate.passed(), _environment(place), _lent(href, remote=remote) as asset:
                found = use(asset)
        except _UNREADABLE as error:
            failure = _failure(error, remote=remote, signed=href != place.href)
            if not pieces_came(
                error
            ):  # else what came stays in GDAL's memory, and only the rest is asked for again
                _failed_before.add(place.href)
            refused = href if failure.fault == "expired" else refused
            wait_s = _wait_s(failure, attempt, gate, href)
            hopeless = failure.fault == "data" and status_of(error) is not None
            last = hopeless or not remote or attempt + 1 >= _ATTEMPTS[failure.fault]
            if last or time.monotonic() + wait_s > began + _PATIENCE_S:
                raise failure from error.__cause__
            time.sleep(wait_s)
        else:
            _failed_before.discard(place.href)
            return found
    raise AssertionError


def _signed(place: Place) -> str:
    return sign_href(place.href, place.source)


def _failure(error: Exception, *, remote: bool, signed: bool) -> PlaceReadError:
    return PlaceReadError(one_line(error), fault_of(error, remote=remote, signed=signed))


def _wait_s(failure: PlaceReadError, attempt: int, gate: Gate, href: str) -> float:
    """Seconds until the next attempt; a host that throttles is left alone by all threads."""
    if failure.fault == "expired" and attempt == 0:
        return 0.0  # a new signature is all that was missing
    wait_s: float = _FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311  jitter, not a secret
    if failure.fault == "throttled":
        wait_s = max(wait_s, pause_asked_s(href) or 0.0)
        gate.shut(wait_s)
    return wait_s


def _environment(place: Place) -> rasterio.Env:
    """GDAL's settings for one attempt; without a session: rasterio's would look for credentials at every block."""
    forget = _FORGET if place.href in _failed_before else {}
    access = {
        **s3_options(place.href, place.source, os.environ),
        **https_options(place.href, place.source, os.environ),
    }
    return rasterio.Env(DummySession(), **GDAL_OPTIONS, **access, **forget)


def _lent(href: str, *, remote: bool) -> AbstractContextManager[rasterio.DatasetReader]:
    """Open an asset for one use; a file of this machine stays open for the next."""
    return _opened(href) if remote else _OPEN.opened(href, _opened)


_OPEN = OpenFiles()


def _opened(href: str) -> rasterio.DatasetReader:
    # GDAL finds the credentials of S3 itself, by the standard chain
    path = f"/vsis3/{href.removeprefix('s3://')}" if href.startswith("s3://") else href
    opened: rasterio.DatasetReader = rasterio.open(path, sharing=False, driver=driver_of(href))
    return opened


def driver_of(href: str) -> str:
    """GDAL driver that opens an asset: GeoTIFF, or JPEG 2000 by its ending, and no other.

    Left to itself GDAL goes by the content, and some formats follow addresses in it: a hostile catalogue could have
    this machine's own files read.
    """
    return "JP2OpenJPEG" if urlsplit(href).path.lower().endswith(".jp2") else "GTiff"


def _moved_onto(asset: rasterio.DatasetReader, geobox: GeoBox, pixels: Pixels, shift_dn: int) -> np.ndarray:
    _require_whole_numbers(asset, pixels)
    if asset.crs is None and asset.gcps[0]:
        return _from_control_points(asset, geobox, pixels)
    if pixels.positive:
        return _positive_onto(asset, geobox, pixels)
    if pixels.holes:
        return _without_holes(asset, geobox, pixels)
    if not shift_dn:
        return _onto(asset, geobox, pixels)
    with _shifted(asset, geobox, pixels, shift_dn) as moved:
        return _onto(moved, geobox, pixels)


def _require_whole_numbers(asset: rasterio.DatasetReader, pixels: Pixels) -> None:
    """Refuse fractions where digital numbers are read: cut to whole numbers, reflectances of 0 to 1 would be nodata.

    Raises CatalogError.
    """
    stored = asset.dtypes[pixels.band - 1]
    if np.dtype(stored).kind in "fc" and np.dtype(pixels.dtype).kind in "ui":
        raise CatalogError(
            f"it holds {stored}, and whole digital numbers ({pixels.dtype}) are wanted: scaled already? read the "
            "product as it was delivered"
        )


def _onto(asset: rasterio.DatasetReader, geobox: GeoBox, pixels: Pixels) -> np.ndarray:
    """Read an asset onto a block: by copying or magnifying where its pixels allow, else by a warp as gdalwarp's.

    The warp sees the whole source. A source window cut to the block would give GDAL's automatic kernel another width
    than over the whole source, and the pixels of a neighbouring zone would differ from every other tool's.
    """
    band, kernel = pixels.band, pixels.kernel
    nodata = asset.nodata if asset.nodata is not None else pixels.nodata
    fill = pixels.fill
    factor = magnification(asset, geobox)
    exact = (
        factor == 1
        or kernel == "nearest"
        or (factor == 2 and asset.dtypes[band - 1] in _WHOLE and on_binary_grid(asset))
    )
    # a DEM that declares no nodata still has none beyond its edge: a height of 0 there would hide the next tile's
    outside = fill if nodata is None else nodata
    holds = not np.isnan(outside) or np.dtype(asset.dtypes[band - 1]).kind == "f"
    if factor is not None and exact and holds:
        read = read_magnified(asset, band, geobox, factor=factor, kernel=kernel, nodata=outside)
        return _with_nodata(read.astype(pixels.dtype, copy=False), outside, fill)
    with WarpedVRT(
        asset,
        crs=str(geobox.crs),
        transform=geobox.affine,
        width=geobox.shape[1],
        height=geobox.shape[0],
        resampling=Resampling[kernel],
        src_nodata=nodata,
        nodata=fill,
        dtype=pixels.dtype,
    ) as warped:
        found: np.ndarray = warped.read(band)
        return found


def _positive_onto(asset: rasterio.DatasetReader, geobox: GeoBox, pixels: Pixels) -> np.ndarray:
    """Read what is positive by its nature: zero-filled parts are nodata even where the file declares another value.

    They are taken out before a warp, which would blend them into the rim of what was seen.
    """
    nodata = asset.nodata if asset.nodata is not None else pixels.nodata
    zero_filled = nodata != 0 and magnification(asset, geobox) != 1
    if zero_filled:
        with _rewritten(asset, geobox, pixels.band, np.nan, _without_zeros(nodata)) as cleaned:
            found = _onto(cleaned, geobox, replace(pixels, band=1))
    else:
        found = _onto(asset, geobox, pixels)
    with np.errstate(invalid="ignore"):
        found[~(found > 0)] = pixels.fill
    return found


def _without_holes(asset: rasterio.DatasetReader, geobox: GeoBox, pixels: Pixels) -> np.ndarray:
    none = [v for v in (*pixels.holes, asset.nodata) if v is not None]

    def clean(values: np.ndarray) -> np.ndarray:
        # as the file stores them: 1e20 is no float32
        held = np.asarray(none, values.dtype if values.dtype.kind == "f" else np.float64)
        return np.where(np.isin(values, held), np.nan, values).astype(np.float32)

    with _rewritten(asset, geobox, pixels.band, np.nan, clean) as cleaned:
        return _onto(cleaned, geobox, replace(pixels, band=1, holes=()))


def _without_zeros(nodata: float | None) -> Callable[[np.ndarray], np.ndarray]:
    def clean(values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            known = (values > 0) & (values != nodata)
        return np.where(known, values, np.nan).astype(np.float32)

    return clean


def _from_control_points(asset: rasterio.DatasetReader, geobox: GeoBox, pixels: Pixels) -> np.ndarray:
    """Warp an image in radar geometry by its ground control points, as gdalwarp's polynomial does.

    The points lie on the ground as the product's own coarse DEM has it: slopes between them stay misplaced.
    """
    points, crs = asset.gcps
    out = np.full(geobox.shape, pixels.fill, pixels.dtype)
    window = _window_of_points(points, crs, asset.shape, geobox)
    if window.width <= 0 or window.height <= 0:
        return out
    nodata = asset.nodata if asset.nodata is not None else pixels.nodata
    moved = [
        GroundControlPoint(row=p.row - window.row_off, col=p.col - window.col_off, x=p.x, y=p.y, z=p.z)
        for p in points
    ]
    with _REPROJECT:
        reproject(
            asset.read(pixels.band, window=window).astype(pixels.dtype),
            out,
            gcps=moved,
            src_crs=crs,
            src_nodata=nodata,
            dst_transform=geobox.affine,
            dst_crs=str(geobox.crs),
            dst_nodata=pixels.fill,
            resampling=Resampling[pixels.kernel],
        )
    if pixels.positive:
        with np.errstate(invalid="ignore"):
            out[~(out > 0)] = pixels.fill
    return out


def _window_of_points(
    points: list[GroundControlPoint], crs: CRS, shape: tuple[int, int], geobox: GeoBox
) -> Window:
    """Pixels of an image in radar geometry below a block, with a margin for the kernel and for what is not linear."""
    rows, cols = (np.linspace(0, n, 9) for n in geobox.shape)
    col, row = (v.ravel() for v in np.meshgrid(cols, rows))
    a = geobox.affine
    x, y = transform(str(geobox.crs), crs, a.a * col + a.b * row + a.c, a.d * col + a.e * row + a.f)
    with GCPTransformer(points) as there:
        at = np.array(there.rowcol(x, y, op=float))
    margin = 16 + 0.1 * np.ptp(at, axis=1)
    top, left = (max(0, int(v)) for v in at.min(axis=1) - margin)
    bottom, right = (min(n, int(v) + 1) for n, v in zip(shape, at.max(axis=1) + margin, strict=True))
    return Window(left, top, max(0, right - left), max(0, bottom - top))


def _with_nodata(values: np.ndarray, nodata: float, fill: float) -> np.ndarray:
    """Replace the source's nodata by the cube's."""
    if nodata == fill or (np.isnan(nodata) and np.isnan(fill)):
        return values
    values[np.isnan(values) if np.isnan(nodata) else values == nodata] = fill
    return values


# --- digital numbers of another provider ---------------------------------------------------------------------------


@contextmanager
def _shifted(
    asset: rasterio.DatasetReader, geobox: GeoBox, pixels: Pixels, shift_dn: int
) -> Iterator[rasterio.DatasetReader]:
    """Open the same raster with its digital numbers shifted, whole around a block and empty elsewhere.

    Shifting before the resampling gives what the other provider's file would have given, to the last bit; shifting
    after it would round another way, and mix clamped numbers. The raster keeps the size of the whole source, for
    the reason that `_onto` gives; its unwritten tiles take no memory.
    """
    nodata = asset.nodata if asset.nodata is not None else pixels.nodata

    def shift(values: np.ndarray) -> np.ndarray:
        return shifted_dn(values, shift_dn, nodata)

    with _rewritten(asset, geobox, pixels.band, nodata, shift) as moved:
        yield moved


@contextmanager
def _rewritten(
    asset: rasterio.DatasetReader,
    geobox: GeoBox,
    band: int,
    nodata: float | None,
    change: Callable[[np.ndarray], np.ndarray],
) -> Iterator[rasterio.DatasetReader]:
    """Open the same raster with its pixels changed, whole around a block and empty elsewhere."""
    dtype = "float32" if nodata is not None and np.isnan(nodata) else asset.dtypes[band - 1]
    profile = {
        "driver": "GTiff", "width": asset.width, "height": asset.height, "count": 1, "crs": asset.crs,
        "dtype": dtype, "transform": asset.transform, "nodata": nodata, "tiled": True,
        "blockxsize": 256, "blockysize": 256, "sparse_ok": True,
    }  # fmt: skip
    window = _source_window(asset, geobox)
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile) as out:
            if window.width > 0 and window.height > 0:
                out.write(change(asset.read(band, window=window)), 1, window=window)
        with memory.open() as moved:
            yield moved


def shifted_dn(dn: np.ndarray, shift_dn: int, nodata: float | None) -> np.ndarray:
    """Shift digital numbers; nodata stays, and a number that would become nodata or less becomes the least above it.

    dn : unsigned integers. A reflectance below zero has no number where the offset has been removed, and 0 would make
    a seen pixel an unseen one.
    """
    moved = np.clip(dn.astype(np.int64) + shift_dn, 1, np.iinfo(dn.dtype).max).astype(dn.dtype)
    return moved if nodata is None else np.where(dn == nodata, dn, moved)


def _source_window(asset: rasterio.DatasetReader, geobox: GeoBox) -> Window:
    """Pixels of an asset below a block, with a margin that no kernel of the warp exceeds."""
    west, south, east, north = transform_bounds(
        str(geobox.crs), asset.crs, *geobox.boundingbox.bbox, densify_pts=33
    )
    below = from_bounds(west, south, east, north, transform=asset.transform)
    margin = [
        32 + 4 * int(n // m + 1) for n, m in zip((below.width, below.height), geobox.shape[::-1], strict=True)
    ]
    left, top = max(0, int(below.col_off) - margin[0]), max(0, int(below.row_off) - margin[1])
    right = min(asset.width, int(below.col_off + below.width) + margin[0])
    bottom = min(asset.height, int(below.row_off + below.height) + margin[1])
    return Window(left, top, max(0, right - left), max(0, bottom - top))
