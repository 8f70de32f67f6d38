"""How hard this process asks one host: a limit of reads at a time, and a pause when the host asks for one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import urlsplit

PER_HOST = 8
"""Reads at a time of one host. A read asks for its two or three ranges at once, so eight keep a node's line full; with
a hundred nodes on one provider, every further one brings its limit of requests nearer.
"""


class Gate:
    """The door to one host, shared by the threads of a process."""

    def __init__(self, at_once: int) -> None:
        self._slots = threading.BoundedSemaphore(at_once)
        self._lock = threading.Lock()
        self._shut_until = 0.0

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Hold one of the host's slots, after any pause that it asked for."""
        with self._slots:
            while (wait_s := self._shut_until - time.monotonic()) > 0:
                time.sleep(wait_s)
            yield

    def shut(self, seconds: float) -> None:
        """Let nobody begin for a while; a longer pause that was asked for before stands."""
        with self._lock:
            self._shut_until = max(self._shut_until, time.monotonic() + seconds)


@lru_cache(maxsize=1024)
def gate_of(host: str) -> Gate:
    """Return the door to a host; "" is this machine's own files, which need no limit."""
    return Gate(PER_HOST if host else 1_000_000)


def host_of(href: str) -> str:
    """Return the host of an address with its port, a bucket's name for S3, "" for a file."""
    parts = urlsplit(href)
    return parts.netloc.rpartition("@")[2] if parts.scheme in ("http", "https", "s3") else ""
