"""Peak memory of a fresh worker against the plan's prediction, and the tile program's throughput.

Tiles of 1024 and 2048 px, 6 and 24 dates of 10 bands, and 60 dates of 12 bands by three composites: each case is one
`slidecube cube` and `slidecube detect` in a fresh process. First 60 dates of Sentinel-2, 12 bands, and 60 of
Sentinel-1 over one tile: the worker that makes all layers, and two that make the optical and the radar layer alone.
The dates share six sets of files. Prints predicted, measured and their ratio, and seconds a megapixel. Usage: make
bench, or python tests/benchmarks/tile_memory.py [OUT] ["both" for the first case alone, "networks" for theirs]
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
from typing import TYPE_CHECKING

import numpy as np
import rasterio
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds

if TYPE_CHECKING:
    from slidecube.pipeline.lock import Lock
    from slidecube.pipeline.run_plan import RunPlan
    from slidecube.pipeline.tasks import TileContext

GIB = 2**30 / 1e9  # in GB
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
LIMIT_GIB = 6.0
SIDE_PX = 2048
RADAR_MARGIN_PX = 640  # a radar looks at the heights 5 km around a tile
RADAR_ORBITS = (22, 95)  # descending tracks that see the tile at 39 and 29 degrees of incidence


def main() -> None:
    """Run all cases."""
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), sys.argv[3])
        return
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="slidecube-bench-"))
    out.mkdir(parents=True, exist_ok=True)
    items = archive(out)
    alone = sys.argv[2:]
    if alone != ["networks"]:
        both(out, items)
    if alone == ["both"]:
        return
    print(
        f"{'model':<12} {'tile':>5} {'dates':>5} {'predicted':>11} {'measured':>10} {'ratio':>6} {'s/Mpx/date':>11}"
    )
    cases = [("sim-small", 1024, 6), ("sim-small", 2048, 6), ("sim-ensemble", 2048, 6)]
    if not alone:
        for composite in ("greenest", "medoid", "geomedian"):
            many(out, items, composite)
        rules = [("rdndvi", 1024, 6), ("rdndvi", 1024, 24), ("rdndvi", 2048, 6), ("rdndvi", 2048, 24)]
        cases = [*rules, ("cae-kmeans", 1024, 6), ("cae-kmeans", 2048, 6), *cases]
    for model, tile_px, dates in cases:
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
    print(f"{'':<24} {limited(made.measured)}")


def compared(predicted: float, measured: float) -> str:
    """Format a prediction beside what was measured, both in GB, in GiB."""
    return f"{predicted / GIB:>7.2f} GiB {measured / GIB:>6.2f} GiB {predicted / measured:>6.2f}"


def limited(measured: float) -> str:
    """Say on which side of the limit GB lie."""
    return f"{'below' if measured / GIB < LIMIT_GIB else 'ABOVE'} {LIMIT_GIB:.0f} GiB"


def both(out: Path, items: Path) -> None:
    """Run and print the case of both sensors: the worker of all layers, then those of one layer."""
    made = case(out, items, 2048, DATES, model="rdndvi", bands=TWELVE, radar=radar_archive(out))
    title = f"2048 px, {DATES} dates of Sentinel-2 by {len(TWELVE)} bands and {DATES} of Sentinel-1"
    print(f"{title:<66} {'predicted':>11} {'measured':>10} {'ratio':>6}")
    rows = {"all layers and the detection, one after another": (made.predicted, made.measured)}
    for kind, predicted in made.layers_predicted.items():
        answer = subprocess.run(
            [sys.executable, __file__, "--worker", str(made.toml), kind],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        rows[f"the {kind} layer alone"] = (predicted, json.loads(answer))
    for name, (predicted, measured) in rows.items():
        print(f"{name:<66} {compared(predicted, measured)} {limited(measured)}")


def context_of(made: RunPlan, lock: Lock) -> TileContext:
    """Give a task what a driver gives it, for one thread."""
    from slidecube.pipeline.tasks import TileContext

    return TileContext(
        workspace=made.workspace.root, run=made.run, lock=lock.path.name, token=lock.token, threads=1
    )


def worker(toml: Path, kind: str) -> None:
    """Make the fullest layer of a kind anew, and print the peak of this process in GB; it did nothing before."""
    from slidecube.pipeline.config import load_config
    from slidecube.pipeline.lock import Lock
    from slidecube.pipeline.plan import plan
    from slidecube.pipeline.tasks import ledger_of, tasks_of
    from slidecube.pipeline.tile import run_task

    made = plan(load_config(toml))
    layers = {layer.name for layer in made.layers if layer.kind == kind}
    tasks = [task for task, _ in tasks_of(made, "cube") if task.layer in layers]
    task = max(tasks, key=lambda task: len(made.scenes_of(task.layer, task.tile)))
    ledger_of(made, task).forget(task.tile)
    with Lock(made.workspace.locks, run=made.run) as lock:
        context = context_of(made, lock)
        result = run_task(context, task)
    assert result.status == "done", result.reason
    print(json.dumps(result.peak_mem_gb))


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
    """Predicted and measured GB of the workers and of the fit, and seconds of the pre-event layer.

    layers_predicted : GB of a worker that makes the layer of one kind alone
    """

    toml: Path
    predicted: float
    measured: float
    layers_predicted: dict[str, float]
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
    radar: Path | None = None,
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
dem = "{radar or items}"
{f'radar = "{radar}"' if radar else ""}
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
    optical = [r for r in records if any(scene.startswith("S2A") for scene in r["scenes"])]
    fullest = max(optical, key=lambda r: len(r["scenes"]))
    assert len(fullest["scenes"]) == dates
    return Case(
        toml=toml,
        predicted=plan["estimate"]["peak_mem_gb"],
        measured=max(r["peak_mem_gb"] for r in records),
        layers_predicted=layers_gb(tile_px, dates, bands=bands) if radar else {},
        fit_predicted=plan["estimate"]["fit_mem_gb"],
        fit_measured=peak["fit"],
        seconds=fullest["seconds"],
    )


def layers_gb(tile_px: int, dates: int, *, bands: tuple[str, ...]) -> dict[str, float]:
    """Predict a worker that makes one layer and nothing else, by the terms of the plan's estimate, GB."""
    from slidecube.catalog.grid import BLOCK_PX
    from slidecube.pipeline import estimate

    optical = estimate.tile_mem_gb(tile_px, bands=len(bands), dates=dates)
    optical += estimate.block_mem_gb(block_px=BLOCK_PX, dates=dates, bands=len(bands))
    radar = estimate.radar_tile_mem_gb(tile_px) + estimate.radar_block_mem_gb(block_px=BLOCK_PX, dates=dates)
    return {"optical": estimate.BASE_GB + optical, "radar": estimate.BASE_GB + radar}


def peak_gb(*command: str) -> float:
    """Run a command; returns the peak of its resident memory."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = code  # it has been waited for
    assert code == 0, command
    return usage.ru_maxrss * 1.024 / 1e6


def radar_archive(out: Path) -> Path:
    """Write DATES scenes of two tracks, as Planetary Computer's are laid out, and a DEM that reaches farther."""
    path = out / "radar.json"
    if path.exists():
        return path
    rng = np.random.default_rng(1)
    features = []
    for i in range(DATES + 1):
        stamp = day(i).replace("-", "") + "T053411"
        first = f"s1-{i % FILES:02d}"
        for band, mean in (("vv", 0.1), ("vh", 0.02)) if i < FILES else ():
            speckle = rng.gamma(4.4, mean / 4.4, (SIDE_PX, SIDE_PX)).astype("float32")
            write(out / first / f"{band}.tif", speckle, 10, -32768)
        properties = {
            "datetime": f"{day(i)}T05:34:11Z", "platform": "sentinel-1a", "constellation": "sentinel-1",
            "sar:instrument_mode": "IW", "sar:product_type": "RTC", "sar:polarizations": ["VV", "VH"],
            "sar:looks_equivalent_number": 4.4, "sat:orbit_state": "descending",
            "sat:relative_orbit": RADAR_ORBITS[i % len(RADAR_ORBITS)], "s1:datatake_id": f"BENCH-{stamp}",
        }  # fmt: skip
        assets = {
            band: {
                "href": f"{first}/{band}.tif", "type": "image/tiff; application=geotiff",
                "raster:bands": [{"data_type": "float32", "nodata": -32768}],
            }
            for band in ("vv", "vh")
        }  # fmt: skip
        name = f"S1A_IW_GRDH_1SDV_{stamp}_RTC"
        features.append(feature(name, "sentinel-1-rtc", properties, assets))
    n = (SIDE_PX + 2 * RADAR_MARGIN_PX) // 3
    z = np.add.outer(np.arange(n) * 8.0, np.arange(n) * 3.0).astype("float32")
    write(out / "dem-wide" / "dem.tif", z, 30, -9999, margin_px=RADAR_MARGIN_PX)
    dem = {"elevation": {"href": "dem-wide/dem.tif", "type": "image/tiff; application=geotiff"}}
    when = {"datetime": "2015-01-01T00:00:00Z"}
    features.append(feature("dem-wide", "dem", when, dem, margin_px=RADAR_MARGIN_PX))
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def day(i: int) -> str:
    """Day of the i-th scene; the last one lies after the event."""
    return (dt.date(2021, 1, 5) + dt.timedelta(days=5 * i)).isoformat()


def write(path: Path, values: np.ndarray, resolution: int, nodata: float, *, margin_px: int = 0) -> None:
    """Write one tiled GeoTIFF; margin_px : of 10 m, by which it begins before the tile."""
    left, top = LEFT - margin_px * 10, TOP + margin_px * 10
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff", "width": values.shape[1], "height": values.shape[0], "count": 1, "dtype": values.dtype.name,
        "crs": "EPSG:32633", "transform": from_origin(left, top, resolution, resolution), "nodata": nodata,
        "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(values, 1)


def feature(name: str, collection: str, properties: dict, assets: dict, *, margin_px: int = 0) -> dict:
    """Make a STAC item of the tile, and of a margin of pixels of 10 m around it."""
    side, more = SIDE_PX * 10, margin_px * 10
    west, south, east, north = transform_bounds(
        "EPSG:32633", "EPSG:4326", LEFT - more, TOP - side - more, LEFT + side + more, TOP + more
    )
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
