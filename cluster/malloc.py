"""The allocator of a worker process: memory that is freed stays with it for the next array."""

from __future__ import annotations

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_MB = 1 << 20


@cache
def keep_freed_memory() -> None:
    """Set what glibc comes to by itself after some large arrays: of 32 MB on from the kernel, 64 MB kept.

    Dask's nannies start a worker with a threshold of 64 KB, at which every array goes back to the kernel and comes
    again page by page: arithmetic on large arrays then takes up to twice its time. Elsewhere than on glibc nothing
    is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, 32 * _MB)
    mallopt(_TRIM_THRESHOLD, 64 * _MB)
