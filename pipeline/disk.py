"""Full disks: what the libraries do not say."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slidecube.pipeline.errors import PipelineError

_NO_ROOM_BYTES = 4 * 2**20  # more than any library writes at once here


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Turn a failed write into what the system would say, when there is no room left.

    GDAL and SQLite hide the reason of a failed write; to be used where the half-written file still lies there.
    Raises OSError (ENOSPC) in place of the library's error.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        told = (
            isinstance(error, OSError) and error.errno is not None
        )  # rasterio's CPLE errors number differently
        if not told and shutil.disk_usage(folder).free < _NO_ROOM_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
