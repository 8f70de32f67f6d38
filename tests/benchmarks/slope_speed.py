"""Slope and aspect beside gdaldem and xarray-spatial, on the same DEM in one run and one thread.

4096 x 4096 px of 30 m, in a projected CRS; the file's reading and writing belong to gdaldem, as its user pays them
(`gdaldem` is Debian's gdal-bin), and are also added to ours in "file to file". xarray-spatial, where it is
installed (the extra `bench` has it, and `make bench` installs that), is timed after its compilation.
Times are of the processor, since others may use the machine.
Usage: make bench, or python tests/benchmarks/slope_speed.py
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", NUMBA_NUM_THREADS="1")

import importlib
import importlib.util
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import rioxarray
import scipy.ndimage
from rasterio.transform import from_origin

from slidecube.pipeline.terrain import slope_deg

SIDE_PX, ROUNDS = 4096, 3


def main() -> None:
    """Time all, in turns; print the fastest round of each, and the largest difference from ours."""
    with tempfile.TemporaryDirectory() as folder:
        path = _dem(Path(folder) / "dem.tif")
        dem = rioxarray.open_rasterio(path, masked=True).squeeze("band", drop=True).load()
        ways = {"slope_deg": lambda: slope_deg(dem).values}
        ways["slope_deg, file to file"] = lambda: _file_to_file(path)
        if importlib.util.find_spec("xrspatial"):
            xrspatial = importlib.import_module("xrspatial")
            plain = dem.drop_vars("spatial_ref").assign_attrs(res=(30.0, 30.0))
            xrspatial.slope(plain[:64, :64])
            ways["xarray-spatial"] = lambda: xrspatial.slope(plain).values
        else:
            print("xarray-spatial is not installed: make bench, or the extra [bench]")
        if shutil.which("gdaldem"):
            ways["gdaldem, file to file"] = lambda: _gdaldem(path)
        else:
            print("gdaldem is not installed: apt-get install gdal-bin")
        taken: dict[str, list[float]] = {name: [] for name in ways}
        found = {}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = _cpu_s()
                found[name] = way()
                taken[name].append(_cpu_s() - start)
    megapixels = SIDE_PX**2 / 1e6
    fastest = {name: min(seconds) for name, seconds in taken.items()}
    print(f"{'':>24} {'s/Mpx':>8} {'of ours':>8} {'degrees apart':>14}")
    inner = np.s_[1:-1, 1:-1]
    for name, seconds in fastest.items():
        own = "slope_deg, file to file" if "file" in name else "slope_deg"
        apart = np.abs(found[name][inner] - found["slope_deg"][inner]).max()
        print(f"{name:>24} {seconds / megapixels:>8.4f} {seconds / fastest[own]:>7.2f}x {apart:>14.5f}")
        assert apart < 2e-3, name


def _cpu_s() -> float:
    """Processor time of this process and of those that it started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _dem(path: Path) -> Path:
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(SIDE_PX // 64 + 4,) * 2) * 500
    z = scipy.ndimage.zoom(coarse, 64, order=3)[:SIDE_PX, :SIDE_PX] + rng.normal(size=(SIDE_PX, SIDE_PX))
    profile = {
        "driver": "GTiff", "width": SIDE_PX, "height": SIDE_PX, "count": 1, "dtype": "float32", "nodata": -9999,
        "crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 30, 30), "tiled": True,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(z.astype(np.float32), 1)
    return path


def _file_to_file(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        profile = {**file.profile, "nodata": np.nan}
    slope = slope_deg(rioxarray.open_rasterio(path, masked=True)).values
    with rasterio.open(path.with_name("ours.tif"), "w", **profile) as out:
        out.write(slope, 1)
    return slope


def _gdaldem(path: Path) -> np.ndarray:
    out = path.with_name("slope.tif")
    subprocess.run(["gdaldem", "slope", "-q", "-co", "TILED=YES", str(path), str(out)], check=True)
    with rasterio.open(out) as file:
        return file.read(1)


if __name__ == "__main__":
    main()
