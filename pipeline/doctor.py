"""`slidecube doctor`: what this machine has, and what it lacks, a line each."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warn", "fail"]

OLDEST_PYTHON = (3, 11)

LIBRARIES = (
    "dask",
    "distributed",
    "geopandas",
    "numpy",
    "odc-stac",
    "pyogrio",
    "pystac-client",
    "rasterio",
    "rioxarray",
    "shapely",
    "stackstac",
    "torch",
    "xarray",
    "zarr",
)
"""Distributions that the core cannot do without."""

EXTRAS = {
    "nets": ("segmentation_models_pytorch", "timm", "torchvision"),
    "gpu": ("dask_cuda",),
    "hpc": ("dask_jobqueue",),
    "kubernetes": ("dask_kubernetes",),
}
"""What each optional extra brings, by import name."""

RASTER_DRIVERS: dict[str, Level] = {"GTiff": "fail", "COG": "fail", "JP2OpenJPEG": "warn"}
VECTOR_DRIVERS: dict[str, Level] = {
    "GPKG": "fail",
    "GeoJSON": "fail",
    "ESRI Shapefile": "fail",
    "FlatGeobuf": "warn",
}
"""GDAL drivers, and how bad it is to be without: JPEG 2000 is read for Level-1C only, FlatGeobuf is a convenience."""

MIN_FREE_GB = 10.0
"""Below this a region does not fit: a layer of ten bands takes about 0.1 GB a tile, a workspace holds dozens."""

MIN_MEMORY_GB = 4.0
"""What one worker may need for a tile of 2048 px and 24 dates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the doctor: a name, "ok", "warn" or "fail", and what was found."""

    name: str
    level: Level
    text: str


def checks() -> Iterator[Check]:
    """Look at this machine; a check that breaks is a finding, not an error."""
    for name, check in _CHECKS.items():
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001  # a broken library is what the doctor is there to find
            yield Check(
                name=name, level="fail", text=f"{type(error).__name__}: {' '.join(str(error).split())}"
            )


def _python() -> Iterator[Check]:
    level: Level = "ok" if sys.version_info[:2] >= OLDEST_PYTHON else "fail"
    yield Check(name="python", level=level, text=f"{sys.version.split()[0]} at {sys.executable}")


def _slidecube() -> Iterator[Check]:
    yield Check(name="slidecube", level="ok", text=metadata.version("slidecube"))


def _libraries() -> Iterator[Check]:
    for name in LIBRARIES:
        try:
            yield Check(name=name, level="ok", text=metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name=name, level="fail", text="not installed; install slidecube again")


def _drivers() -> Iterator[Check]:
    pyogrio = importlib.import_module("pyogrio")
    rasterio = importlib.import_module("rasterio")
    with rasterio.Env() as env:
        rasters = env.drivers()
    yield from _missing("GDAL rasters", rasterio.__gdal_version__, RASTER_DRIVERS, rasters)
    gdal = ".".join(map(str, pyogrio.__gdal_version__))
    vectors = {name for name, can in pyogrio.list_drivers().items() if "w" in can}
    yield from _missing("GDAL vectors", gdal, VECTOR_DRIVERS, vectors)


def _missing(name: str, version: str, wanted: dict[str, Level], found: Container[str]) -> Iterator[Check]:
    absent = [driver for driver in wanted if driver not in found]
    if not absent:
        yield Check(name=name, level="ok", text=f"{version} with {', '.join(wanted)}")
        return
    level: Level = "fail" if any(wanted[driver] == "fail" for driver in absent) else "warn"
    yield Check(name=name, level=level, text=f"{version} lacks {', '.join(absent)}")


def _disk() -> Iterator[Check]:
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    level: Level = "ok" if free_gb >= MIN_FREE_GB else "warn"
    yield Check(name="disk", level=level, text=f"{free_gb:.1f} GB free in {Path.cwd()}")


def _temporary() -> Iterator[Check]:
    with tempfile.TemporaryFile() as file:
        file.write(b"slidecube")
    yield Check(name="temporary files", level="ok", text=f"writable: {tempfile.gettempdir()}")


def _memory() -> Iterator[Check]:
    limits = importlib.import_module("slidecube.cluster.limits")
    free_gb = limits.free_memory_gb()
    level: Level = "ok" if free_gb >= MIN_MEMORY_GB else "warn"
    yield Check(name="memory", level=level, text=f"{free_gb:.1f} of {limits.memory_gb():.1f} GB free")


def _cores() -> Iterator[Check]:
    limits = importlib.import_module("slidecube.cluster.limits")
    yield Check(name="cores", level="ok", text=f"{limits.cores()} usable of {os.cpu_count()}")


def _gpu() -> Iterator[Check]:
    torch = importlib.import_module("torch")
    found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Check(name="gpu", level="ok", text=", ".join(found) or "none; models run on the CPU")


def _extras() -> Iterator[Check]:
    for extra, modules in EXTRAS.items():
        absent = [name for name in modules if find_spec(name) is None]
        text = (
            f"without {', '.join(absent)}; optional: pip install 'slidecube[{extra}]'"
            if absent
            else "installed"
        )
        yield Check(name=f"extra {extra}", level="ok", text=text)


_CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "python": _python,
    "slidecube": _slidecube,
    "libraries": _libraries,
    "GDAL": _drivers,
    "disk": _disk,
    "temporary files": _temporary,
    "memory": _memory,
    "cores": _cores,
    "gpu": _gpu,
    "extras": _extras,
}
