"""Peak memory of a fresh worker against the plan's prediction, and the tile program's throughput.

Tiles of 1024 and 2048 px, 6 and 24 dates of 10 bands, and 60 dates of 12 bands by three composites: each case is one
`slidecube cube` and `slidecube detect` in a fresh process. The dates share six sets of files. Prints predicted,
measured and their ratio, and seconds a megapixel. Usage: make bench, or
python tests/benchmarks/tile_memory.py [OUT]
"""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds

LEFT, TOP = 491_520.0, 5_324_800.0  # a corner of the grid's largest tiles
BANDS = {
    "B02": 10,
    "B03": 10,
    "B04": 10,
    "B08": 10,
    "B05": 20,
    "B06": 20,
    "B07": 20,
    "B8A": 20,
    "B11": 20,
    "B12": 20,
    "SCL": 20,
    "B01": 60,
    "B09": 60,
}
TEN = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
TWELVE = tuple(sorted(set(BANDS) - {"SCL"}))
DATES, FILES = 60, 6
LIMIT_GB = 6.0
SIDE_PX = 2048


def main() -> None:
    """Run all cases."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="slidecube-bench-"))
    items = archive(out)
    print(
        f"{'model':<12} {'tile':>5} {'dates':>5} {'predicted':>10} {'measured':>9} {'ratio':>6} {'s/Mpx/date':>11}"
    )
    for composite in ("greenest", "medoid", "geomedian"):
        many(out, items, composite)
    cases = [("rdndvi", 1024, 6), ("rdndvi", 1024, 24), ("rdndvi", 2048, 6), ("rdndvi", 2048, 24)]
    for model, tile_px, dates in [*cases, ("cae-kmeans", 1024, 6), ("cae-kmeans", 2048, 6)]:
        made = case(out, items, tile_px, dates, model=model)
        per = made.seconds / (tile_px**2 / 1e6) / dates
        print(f"{model:<12} {tile_px:>5} {dates:>5} {compared(made.predicted, made.measured)} {per:>11.3f}")
        if made.fit_predicted:
            print(f"{'  its fit':<24} {compared(made.fit_predicted, made.fit_measured)}")


def many(out: Path, items: Path, composite: str) -> None:
    """Run and print the case of many dates and bands."""
    made = case(out, items, 2048, DATES, model="rdndvi", bands=TWELVE, composite=composite)
    per = made.seconds / (2048**2 / 1e6) / DATES
    print(f"{composite:<12} {2048:>5} {DATES:>5} {compared(made.predicted, made.measured)} {per:>11.3f}")
    print(f"{'':<24} {'below' if made.measured < LIMIT_GB else 'ABOVE'} {LIMIT_GB:.0f} GB")


def compared(predicted: float, measured: float) -> str:
    """Format a prediction beside what was measured, GB."""
    return f"{predicted:>7.2f} GB {measured:>6.2f} GB {predicted / measured:>6.2f}"


def archive(out: Path) -> Path:
    """Write DATES scenes of one MGRS tile, and a DEM, once."""
    path = out / "items.json"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    features = []
    for i in range(DATES + 1):
        stamp = day(i).replace("-", "") + "T100000"
        name = f"S2A_MSIL2A_{stamp}_N0301_R051_T33UVP_{stamp}"
        assets, first = {}, f"{i % FILES:02d}"
        for band, resolution in BANDS.items():
            assets[band] = {"href": f"{first}/{band}.tif", "type": "image/tiff; application=geotiff"}
            if i >= FILES:
                continue
            n = -(-SIDE_PX * 10 // resolution)
            smooth = np.kron(rng.integers(500, 4000, (-(-n // 16),) * 2), np.ones((16, 16), int))[:n, :n]
            values = np.where(smooth > 3500, 9, 4) if band == "SCL" else smooth + rng.integers(0, 200, (n, n))
            write(
                out / first / f"{band}.tif",
                values.astype("uint8" if band == "SCL" else "uint16"),
                resolution,
                0,
            )
        properties = {
            "datetime": f"{day(i)}T10:00:00Z", "platform": "sentinel-2a", "s2:mgrs_tile": "33UVP",
            "s2:processing_baseline": "03.01",
            "s2:datatake_id": f"GS2A_{stamp}_030000_N03.01",
            "s2:datastrip_id": f"S2A_OPER_MSI_L2A_DS_XXXX_{stamp}_S{stamp}_N03.01",
            "s2:generation_time": f"{day(i)}T12:00:00Z",
        }  # fmt: skip
        features.append(feature(name, "bench-s2", properties, assets))
    n = SIDE_PX // 3 + 20
    z = np.add.outer(np.arange(n) * 8.0, np.arange(n) * 3.0).astype("float32")
    write(out / "dem" / "dem.tif", z, 30, -9999)
    dem = {"elevation": {"href": "dem/dem.tif", "type": "image/tiff; application=geotiff"}}
    features.append(feature("dem-bench", "dem", {"datetime": "2015-01-01T00:00:00Z"}, dem))
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


@dataclass(frozen=True, kw_only=True)
class Case:
    """Predicted and measured GB of the workers and of the fit, and seconds of the pre-event layer."""

    predicted: float
    measured: float
    fit_predicted: float
    fit_measured: float
    seconds: float


def case(
    out: Path,
    items: Path,
    tile_px: int,
    dates: int,
    *,
    model: str,
    bands: tuple[str, ...] = TEN,
    composite: str = "greenest",
) -> Case:
    """Plan and run one tile, each stage in a fresh process."""
    workspace = Path(tempfile.mkdtemp(prefix=f"w{tile_px}-{dates}-", dir=out))
    side = tile_px * 10
    box = transform_bounds(
        "EPSG:32633", "EPSG:4326", LEFT + 200, TOP - side + 200, LEFT + side - 200, TOP - 200
    )
    toml = workspace / "bench.toml"
    toml.write_text(
        f"""
[area]
bbox = [{", ".join(map(str, box))}]
crs = "EPSG:32633"
[[epoch]]
name = "bench"
pre = ["{day(0)}", "{day(dates - 1)}"]
post = ["{day(DATES)}", "{day(DATES)}"]
[sources]
optical = "{items}"
dem = "{items}"
[cube]
tile_px = {tile_px}
composite = "{composite}"
bands = {json.dumps(bands)}
[detect]
model = "{model}"
parameters = {{ {"epochs = 2" if model.startswith("cae") else ""} }}
[cluster]
threads_per_worker = 1
[output]
workspace = "."
"""
    )
    peak = {verb: peak_gb("slidecube", verb, str(toml)) for verb in ("plan", "cube", "fit", "detect")}
    plan = json.loads(next(workspace.glob("plans/*/plan.json")).read_text())
    records = [json.loads(p.read_text()) for p in workspace.glob("layers/*/*.ledger/*.json")]
    records += [json.loads(p.read_text()) for p in workspace.glob("inventories/*.ledger/*/*.json")]
    assert all(r["state"] == "done" for r in records), [r["reason"] for r in records]
    fullest = max(records, key=lambda r: len(r["scenes"]))
    assert len(fullest["scenes"]) == dates
    return Case(
        predicted=plan["estimate"]["peak_mem_gb"],
        measured=max(r["peak_mem_gb"] for r in records),
        fit_predicted=plan["estimate"]["fit_mem_gb"],
        fit_measured=peak["fit"],
        seconds=fullest["seconds"],
    )


def peak_gb(*command: str) -> float:
    """Run a command; returns the peak of its resident memory."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = code  # it has been waited for
    assert code == 0, command
    return usage.ru_maxrss * 1.024 / 1e6


def day(i: int) -> str:
    """Day of the i-th scene; the last one lies after the event."""
    return (dt.date(2021, 1, 5) + dt.timedelta(days=5 * i)).isoformat()


def write(path: Path, values: np.ndarray, resolution: int, nodata: float) -> None:
    """Write one tiled GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff", "width": values.shape[1], "height": values.shape[0], "count": 1, "dtype": values.dtype.name,
        "crs": "EPSG:32633", "transform": from_origin(LEFT, TOP, resolution, resolution), "nodata": nodata,
        "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(values, 1)


def feature(name: str, collection: str, properties: dict, assets: dict) -> dict:
    """Make a STAC item."""
    side = SIDE_PX * 10
    west, south, east, north = transform_bounds("EPSG:32633", "EPSG:4326", LEFT, TOP - side, LEFT + side, TOP)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection,
        "bbox": [west, south, east, north],
        "stac_extensions": ["https://stac-extensions.github.io/projection/v2.0.0/schema.json"], "links": [],
        "geometry": {"type": "Polygon", "coordinates": [ring]}, "assets": assets,
        "properties": {**properties, "proj:code": "EPSG:32633", "proj:epsg": 32633},
    }  # fmt: skip


if __name__ == "__main__":
    main()
