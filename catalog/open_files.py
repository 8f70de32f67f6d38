"""Files of this machine that stay open: a tile's blocks read each of them many times over.

GDAL keeps what it decoded with the open file, so that the next block finds the pixels at its rim. Pixels do not depend
on it.
"""

from __future__ import annotations

import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import rasterio

_STALE_S = 20.0  # unused for so long, a file gives its place to another
_SHARE_OF_LIMIT = 4  # a quarter of the files that a process may open

Opener = Callable[[str], rasterio.DatasetReader]
_Key = tuple[int, str]


@dataclass(slots=True)
class _Kept:
    dataset: rasterio.DatasetReader
    file: tuple[int, int, int]
    used: float


class OpenFiles:
    """Datasets by thread and path: one of GDAL's may be used by a single thread.

    most : that are kept; others are closed after their use
    """

    def __init__(self, most: int | None = None) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(soft // _SHARE_OF_LIMIT, 0) if most is None else most
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @contextmanager
    def opened(self, path: str, opener: Opener) -> Iterator[rasterio.DatasetReader]:
        """Lend a dataset; one whose file was changed or removed since, or that failed, is opened anew the next time."""
        key = (threading.get_ident(), path)
        file = _file(path)
        with self._lock:
            kept = self._kept.pop(key, None)
        if kept is not None and (file is None or kept.file != file):
            kept.dataset.close()
            kept = None
        dataset = kept.dataset if kept is not None else opener(path)
        try:
            yield dataset
        except BaseException:
            dataset.close()
            raise
        if file is None or not self._keep(key, _Kept(dataset, file, time.monotonic())):
            dataset.close()

    def _keep(self, key: _Key, kept: _Kept) -> bool:
        """Put a dataset back, the last of all; False where there is no room for it."""
        with self._lock:
            while self._kept and next(iter(self._kept.values())).used < kept.used - _STALE_S:
                self._kept.popitem(last=False)[1].dataset.close()  # whoever's: what lies here, nobody reads
            if len(self._kept) >= self._most:
                return False
            if (twin := self._kept.pop(key, None)) is not None:  # a block opened it within another's use
                twin.dataset.close()
            self._kept[key] = kept
            return True


def _file(path: str) -> tuple[int, int, int] | None:
    """What tells a file from another one of its name, None where it is none of this machine's."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
