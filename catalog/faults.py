"""What a failed read says: its class, its reason in one line, and how long the server asks us to wait.

GDAL tells the status of an answer in words, and only where it was opening the file: while it reads, every answer but
the wanted one is a short read. Which status it was, the next attempt, which opens the file anew, finds out.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException

from slidecube.catalog.errors import CatalogError, Fault

_STATUS = re.compile(r"response code: (\d{3})|\b(?:HTTP|status)[ :]+(\d{3})\b")
# curl's and S3's words, and those of the C library for a file system that is away for a moment
_TRANSIENT = re.compile(
    r"(?i)curl error|timed? ?out|too slow|connection (was )?(reset|refused|closed)|could(n't| not) (connect|resolve)"
    r"|transfer closed|input/output error|stale file handle|too many open files|temporarily unavailable"
    r"|internal ?error|requesttimeout"
)
_THROTTLED = re.compile(r"(?i)slow ?down|reduce your request rate|too many requests|throttl")
_EXPIRED = re.compile(r"(?i)expiredtoken|token has expired|request has expired|signature (has )?expired")
# libtiff was given fewer bytes than the file's own directory promises
_CUT_OFF = re.compile(r"got (\d+) bytes, expected \d+|premature end|unexpected end of file")
_ASK_TIMEOUT_S = 5.0
_LONGEST_PAUSE_S = 120.0


def fault_of(error: BaseException, *, remote: bool, signed: bool) -> Fault:
    """Tell the class of a failed read.

    remote : of an address, not of a file: a local file that ends too early stays so
    signed : the address carried a signature
    """
    said = " ".join(_all_said(error))
    status = status_of(error)
    if isinstance(error, CatalogError):
        return error.fault
    if status == 429 or _THROTTLED.search(said):
        return "throttled"
    if _EXPIRED.search(said) or (signed and status in (401, 403)):
        return "expired"
    if status is not None:
        return "transient" if status >= 500 or status == 408 else "data"
    if _TRANSIENT.search(said) or isinstance(error, TimeoutError | ConnectionError):
        return "transient"
    return "transient" if remote and _CUT_OFF.search(said) else "data"


def status_of(error: BaseException) -> int | None:
    """Return the status of the server's answer, where the error tells one."""
    match = next((m for m in map(_STATUS.search, _all_said(error)) if m), None)
    return int(match[1] or match[2]) if match else None


def pieces_came(error: BaseException) -> bool:
    """Whether a body broke off in its middle: what came is sound. An answer that is none gives no byte at all."""
    return any(match and int(match[1] or 0) > 0 for match in map(_CUT_OFF.search, _all_said(error)))


def one_line(error: BaseException) -> str:
    """Say a reader's error in one line, without query strings (they hold signatures)."""
    cause = error.__cause__ or error
    return re.sub(r"\?[^\s'\"]*", "", " ".join(str(cause).split()))[:300]


def pause_asked_s(href: str) -> float | None:
    """Ask a busy server, with the smallest request, how long it wants to be left alone.

    GDAL keeps the headers of an answer to itself. Returns None where the server is not busy any more, or does not say.
    """
    if not href.startswith(("http://", "https://")):
        return None
    request = urllib.request.Request(href, headers={"Range": "bytes=0-0"})  # noqa: S310  http and https only
    try:
        with urllib.request.urlopen(request, timeout=_ASK_TIMEOUT_S):  # noqa: S310
            return None
    except urllib.error.HTTPError as error:
        with error:
            return _pause_s(error.headers.get("Retry-After") or "")
    except (OSError, HTTPException, ValueError):
        return None


def _pause_s(text: str) -> float | None:
    """Read a Retry-After: seconds, or a date."""
    try:
        asked_s = float(text)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return None
        asked_s = (until - dt.datetime.now(dt.UTC)).total_seconds()
    return min(max(asked_s, 0.0), _LONGEST_PAUSE_S)


def _all_said(error: BaseException) -> Iterator[str]:
    """Yield what an error and those behind it say."""
    seen: BaseException | None = error
    while seen is not None:
        yield str(seen)
        seen = seen.__cause__ or seen.__context__
