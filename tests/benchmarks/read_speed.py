"""Reading a tile by `load` beside odc-stac, stackstac and rasterio as one would use them, on the same files in one run.

Ten bands (four of 10 m, six of 20 m) of a number of dates onto one tile of 1024 px in the scenes' own zone, on one
thread, in 512 px blocks. `load` is timed with both of its loaders, odc-stac and stackstac with their own readers.
Bare rasterio is timed twice: the files' native pixels, which resamples nothing and is a floor, and warped block by
block to the very pixels that the others give. Usage: make bench, or python tests/benchmarks/read_speed.py [OUT]
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import dask
import numpy as np
import pystac
import rasterio
import stackstac
from odc.geo.geobox import GeoBox
from odc.stac import load as odc_load
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT
from rasterio.windows import from_bounds

from slidecube.catalog.load import load

DATES = 8
ROUNDS = 5
BLOCK_PX = 512


def main() -> None:
    """Time each way ROUNDS times, in turns after one round that is not counted; print the medians and the ratios."""
    items, bands, box = case(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    ways = {
        "load, by odc-stac": partial(_ours, loader="odc-stac"),
        "load, by stackstac": partial(_ours, loader="stackstac"),
        "odc-stac": _odc,
        "stackstac": _stackstac,
        "bare rasterio, warped": _warped,
        "bare rasterio, native": _native,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    with dask.config.set(scheduler="synchronous"):
        for counted in [False] + [True] * ROUNDS:
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way(items, box, bands)
                if counted:
                    taken[name].append(time.perf_counter() - start)
    mpx = box.shape[0] * box.shape[1] / 1e6 * len(bands) * DATES
    medians = {name: float(np.median(seconds)) for name, seconds in taken.items()}
    print(f"{'':>22} {'s':>6} {'s/Mpx':>8} {'of odc-stac':>12} {'of stackstac':>13}   pixels")
    for name, seconds in medians.items():
        ratios = f"{seconds / medians['odc-stac']:>12.2f} {seconds / medians['stackstac']:>13.2f}"
        print(f"{name:>22} {seconds:>6.2f} {seconds / mpx:>8.4f} {ratios}   {_agreement(found, name, bands)}")


def case(out: Path | None) -> tuple[list[dict], list[str], GeoBox]:
    """The archive of tile_memory.py: items, bands without SCL, and a tile."""
    here = Path(__file__).resolve()
    spec = importlib.util.spec_from_file_location("tile_memory", here.with_name("tile_memory.py"))
    archive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(archive)
    out = out or Path(tempfile.mkdtemp(prefix="slidecube-bench-"))
    path = archive.archive(out)
    items = [f for f in json.loads(path.read_text())["features"] if f["collection"] == "bench-s2"][:DATES]
    for item in items:
        for asset in item["assets"].values():
            asset["href"] = str(out / asset["href"])
    bands = [band for band in archive.BANDS if band != "SCL"]
    return items, bands, GeoBox((1024, 1024), from_origin(archive.LEFT, archive.TOP, 10, 10), "EPSG:32633")


def _agreement(found, name, bands):
    """Share of the pixels that differ from those of odc-stac."""
    if not found[name]:
        return "not on the grid"
    different = [(found[name][band] != found["odc-stac"][band]).mean() for band in bands]
    return "equal" if not any(different) else f"{100 * np.mean(different):.3g} % differ from odc-stac's"


def _ours(items, box, bands, *, loader):
    cube = load(items, box, bands, loader=loader).compute()
    return {band: cube[band].values for band in bands}


def _odc(items, box, bands):
    kinds = {"*": {"data_type": "uint16", "nodata": 0}}
    cube = odc_load(
        [pystac.Item.from_dict(item) for item in items], bands=bands, geobox=box, groupby="id",
        chunks={"time": -1, "y": BLOCK_PX, "x": BLOCK_PX}, resampling="bilinear",
        stac_cfg={"bench-s2": {"assets": kinds}},
    ).compute()  # fmt: skip
    return {band: cube[band].values for band in bands}


def _stackstac(items, box, bands):
    cube = stackstac.stack(
        items, assets=bands, epsg=32633, resolution=10, bounds=tuple(box.boundingbox.bbox), snap_bounds=False,
        resampling=Resampling.bilinear, chunksize=(-1, 1, BLOCK_PX, BLOCK_PX), dtype=np.dtype("uint16"),
        fill_value=np.uint16(0), rescale=False, sortby_date=False, xy_coords="center",
    ).compute()  # fmt: skip
    return {band: cube.sel(band=band).values for band in bands}


def _warped(items, box, bands):
    out = {band: np.empty((len(items), *box.shape), "uint16") for band in bands}
    for i, item in enumerate(items):
        for band in bands:
            for row in range(0, box.shape[0], BLOCK_PX):
                for col in range(0, box.shape[1], BLOCK_PX):
                    part = box[row : row + BLOCK_PX, col : col + BLOCK_PX]
                    with (
                        rasterio.open(item["assets"][band]["href"]) as file,
                        WarpedVRT(
                            file, crs=str(part.crs), transform=part.affine, width=BLOCK_PX, height=BLOCK_PX,
                            resampling=Resampling.bilinear, nodata=0,
                        ) as warped,
                    ):  # fmt: skip
                        out[band][i, row : row + BLOCK_PX, col : col + BLOCK_PX] = warped.read(1)
    return out


def _native(items, box, bands):
    left, bottom, right, top = box.boundingbox.bbox
    for item in items:
        for band in bands:
            with rasterio.open(item["assets"][band]["href"]) as file:
                file.read(1, window=from_bounds(left, bottom, right, top, file.transform))
    return {}


if __name__ == "__main__":
    main()
