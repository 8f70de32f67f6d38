"""Reading a tile by `load` beside odc-stac alone and bare rasterio, on the same files in one run.

Ten bands (four of 10 m, six of 20 m) of a number of dates onto one tile of 1024 px in the scenes' own zone, on one
thread, in 512 px blocks. Bare rasterio reads each file's native pixels and resamples nothing: a floor, not a peer.
Usage: make bench, or python tests/benchmarks/read_speed.py [OUT]
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pystac
import rasterio
from odc.geo.geobox import GeoBox
from odc.stac import load as odc_load
from rasterio.transform import from_origin
from rasterio.windows import from_bounds

from slidecube.catalog.load import load

DATES = 8
ROUNDS = 3


def main() -> None:
    """Time the three, three times each, in turns; print the median of each and the ratios."""
    here = Path(__file__).resolve()
    spec = importlib.util.spec_from_file_location("tile_memory", here.with_name("tile_memory.py"))
    archive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(archive)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="slidecube-bench-"))
    path = archive.archive(out)
    items = [f for f in json.loads(path.read_text())["features"] if f["collection"] == "bench-s2"][:DATES]
    for item in items:
        for asset in item["assets"].values():
            asset["href"] = str(out / asset["href"])
    bands = [band for band in archive.BANDS if band != "SCL"]
    box = GeoBox((1024, 1024), from_origin(archive.LEFT, archive.TOP, 10, 10), "EPSG:32633")
    ways = {"load": _ours, "odc-stac": _odc, "bare rasterio": _bare}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way(items, box, bands)
            taken[name].append(time.perf_counter() - start)
    for band in bands:
        assert np.array_equal(found["load"][band], found["odc-stac"][band]), band
    mpx = box.shape[0] * box.shape[1] / 1e6 * len(bands) * DATES
    medians = {name: float(np.median(seconds)) for name, seconds in taken.items()}
    for name, seconds in medians.items():
        print(
            f"{name:>14} {seconds:7.2f} s  {seconds / mpx:.4f} s/Mpx  {seconds / medians['odc-stac']:.2f} of odc-stac"
        )
    print("load and odc-stac gave equal pixels in every band")


def _ours(items, box, bands):
    cube = load(items, box, bands).compute(scheduler="synchronous")
    return {band: cube[band].values for band in bands}


def _odc(items, box, bands):
    kinds = {"*": {"data_type": "uint16", "nodata": 0}}
    cube = odc_load(
        [pystac.Item.from_dict(item) for item in items], bands=bands, geobox=box, groupby="id",
        chunks={"time": -1, "y": 512, "x": 512}, resampling="bilinear", stac_cfg={"bench-s2": {"assets": kinds}},
    ).compute(scheduler="synchronous")  # fmt: skip
    return {band: cube[band].values for band in bands}


def _bare(items, box, bands):
    left, bottom, right, top = box.boundingbox.bbox
    for item in items:
        for band in bands:
            with rasterio.open(item["assets"][band]["href"]) as file:
                file.read(1, window=from_bounds(left, bottom, right, top, file.transform))
    return {}


if __name__ == "__main__":
    main()
