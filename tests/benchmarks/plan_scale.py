"""The plan of a nation of 100,000 tiles over a simulated item list: seconds and memory of making and of reading it.

Run with `python tests/benchmarks/plan_scale.py [--tiles N] [--dates N] [--profile FILE]`. Bounds (issue 4): made in
under 300 s and 4 GiB. The items are squares of 109.8 km in the UTM zones of the area, as Sentinel-2's are.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime as dt
import json
import math
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyproj

from slidecube.pipeline.config import load_config
from slidecube.pipeline.plan import plan
from slidecube.pipeline.plan_files import read_plan
from slidecube.pipeline.tile import peak_rss_gb

TILE_PX = 512
WEST, SOUTH = 60.0, 44.0
STEP_M, SIDE_M = 100_000, 109_800
WINDOWS = {"pre": ("2024-05-01", "2024-07-31"), "post": ("2025-05-01", "2025-07-31")}


def area(tiles: int) -> list[float]:
    """Return a bounding box of about that many tiles, twice as wide as high."""
    side_km = TILE_PX * 10 / 1000
    high_km = math.sqrt(tiles * side_km**2 / 2)
    north = SOUTH + high_km / 111.2
    east = WEST + 2 * high_km / (111.2 * math.cos(math.radians((SOUTH + north) / 2)))
    return [WEST, SOUTH, round(east, 4), round(north, 4)]


def optical(box: list[float], dates: int) -> list[dict[str, object]]:
    """Items of `dates` overpasses in each window over every square that touches the area."""
    items = []
    for zone in range(int((box[0] + 180) // 6) + 1, int((box[2] + 180) // 6) + 2):
        epsg = 32600 + zone
        to = pyproj.Transformer.from_crs(epsg, 4326, always_xy=True)
        back = pyproj.Transformer.from_crs(4326, epsg, always_xy=True)
        left = [back.transform(max(box[0], zone * 6 - 186), lat)[0] for lat in (box[1], box[3])]
        right = [back.transform(min(box[2], zone * 6 - 180), lat)[0] for lat in (box[1], box[3])]
        low, high = (back.transform(zone * 6 - 183, lat)[1] for lat in (box[1], box[3]))
        for x in range(int(min(left) // STEP_M), int(max(right) // STEP_M) + 1):
            for y in range(int(low // STEP_M), int(high // STEP_M) + 1):
                square = f"{zone:02d}T{chr(65 + x % 8)}{'ABCDEFGHJK'[y % 10]}"
                x0, y0 = x * STEP_M, y * STEP_M - 9_800
                ring = [(x0, y0), (x0 + SIDE_M, y0), (x0 + SIDE_M, y0 + SIDE_M), (x0, y0 + SIDE_M), (x0, y0)]
                corners = [[round(v, 6) for v in to.transform(*p)] for p in ring]
                items += [scene(f"{square}{y}", square, corners, epsg, day) for day in days(dates)]
    return items


def days(dates: int) -> list[dt.date]:
    """Days of overpasses, evenly over each window."""
    found = []
    for first, last in WINDOWS.values():
        start, end = dt.date.fromisoformat(first), dt.date.fromisoformat(last)
        found += [
            start + dt.timedelta(days=round(d)) for d in np.linspace(0, (end - start).days, dates).tolist()
        ]
    return found


def scene(name: str, square: str, corners: list[list[float]], epsg: int, day: dt.date) -> dict[str, object]:
    """Return one item as Planetary Computer would give it."""
    # rows ten apart have one name in MGRS, as squares of other zones have; the minute tells them apart
    stamp = f"{day:%Y%m%d}T06{int(name[-2:]) % 60:02d}00"
    strip = f"S2A_OPER_MSI_L2A_DS_X_{day:%Y%m%d}T120000_S{stamp}_N05.11"
    properties = {
        "datetime": f"{day}T06:00:00Z",
        "platform": "sentinel-2a",
        "constellation": "sentinel-2",
        "eo:cloud_cover": 10.0,
        "s2:mgrs_tile": square,
        "s2:processing_baseline": "05.11",
        "s2:datatake_id": f"GS2A_{stamp}_012345_N05.11",
        "s2:datastrip_id": strip,
        "s2:product_uri": f"S2A_MSIL2A_{stamp}_N0511_R020_T{square}_{day:%Y%m%d}T120000.SAFE",
        "proj:epsg": epsg,
    }
    bands = ("B02", "B03", "B04", "B08", "SCL")
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": f"S2A_{name}_{day:%Y%m%d}",
        "collection": "s2",
        "geometry": {"type": "Polygon", "coordinates": [corners]},
        "links": [],
        "properties": properties,
        "assets": {
            band: {"href": f"https://files.invalid/{name}/{day}/{band}.tif", "type": "image/tiff"}
            for band in bands
        },
        "bbox": bounds(corners),
    }


def dem(box: list[float]) -> list[dict[str, object]]:
    """Items of one degree."""
    items = []
    for lon in range(math.floor(box[0]) - 1, math.ceil(box[2]) + 1):
        for lat in range(math.floor(box[1]) - 1, math.ceil(box[3]) + 1):
            ring = [[lon, lat], [lon + 1, lat], [lon + 1, lat + 1], [lon, lat + 1], [lon, lat]]
            name = f"Copernicus_DSM_COG_10_N{lat}_E{lon}_DEM"
            items.append(
                {
                    "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": name, "links": [],
                    "collection": "cop-dem-glo-30", "bbox": [lon, lat, lon + 1, lat + 1],
                    "geometry": {"type": "Polygon", "coordinates": [ring]},
                    "properties": {"datetime": "2021-04-22T00:00:00Z", "proj:epsg": 4326},
                    "assets": {"data": {"href": f"https://files.invalid/{name}.tif", "type": "image/tiff"}},
                }
            )  # fmt: skip
    return items


def bounds(corners: list[list[float]]) -> list[float]:
    """Return west, south, east, north."""
    xs, ys = zip(*corners, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


def make_nation(root: Path, *, tiles: int, dates: int) -> Path:
    """Write the items and the TOML of a nation; returns the TOML."""
    box = area(tiles)
    for name, items in (("optical", optical(box, dates)), ("dem", dem(box))):
        document = {"type": "FeatureCollection", "features": items}
        (root / f"{name}.json").write_text(json.dumps(document))
        print(f"{name:<12}{len(items):>9} items", flush=True)
    epoch = "\n".join(f"{name} = {list(window)!r}" for name, window in WINDOWS.items())
    toml = root / "nation.toml"
    toml.write_text(
        f"[area]\nbbox = {box}\n[[epoch]]\nname = 'nation'\n{epoch}\n"
        "[sources]\noptical = 'optical.json'\ndem = 'dem.json'\n"
        f"[cube]\ntile_px = {TILE_PX}\nbands = ['B02', 'B03', 'B04', 'B08']\n[output]\nworkspace = 'ws'\n"
    )
    return toml


def main() -> None:
    """Print what a plan costs."""
    options = argparse.ArgumentParser()
    options.add_argument("--tiles", type=int, default=100_000)
    options.add_argument("--dates", type=int, default=6)
    options.add_argument("--profile", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        toml = make_nation(root, tiles=given.tiles, dates=given.dates)
        before_gb, began = peak_rss_gb(), time.monotonic()
        config = load_config(toml)
        profile = cProfile.Profile() if given.profile else None
        with profile or nullcontext():
            made = plan(config)
        took_s = time.monotonic() - began
        if profile:
            profile.dump_stats(given.profile)
        peak_gb = peak_rss_gb()
        print(f"{'tiles':<12}{len(made.tiles):>9}, {len(made.scenes)} scenes, {len(made.layers)} layers")
        print(f"{'made':<12}{took_s:>9.1f} s (bound 300)")
        print(f"{'peak':<12}{peak_gb:>9.2f} GB (bound 4.3), {before_gb:.2f} before")
        began = time.monotonic()
        again = plan(config)
        print(f"{'found again':<12}{time.monotonic() - began:>9.1f} s")
        began = time.monotonic()
        read = read_plan(made.workspace, made.run)
        print(f"{'read':<12}{time.monotonic() - began:>9.1f} s")
        assert again.keys == made.keys == read.keys
        for name, each in read.reads.items():
            assert each.keys() == made.reads[name].keys() == again.reads[name].keys()
            assert all(indices == made.reads[name][tile] for tile, indices in each.items()), name
        size = sum(p.stat().st_size for p in (root / "ws" / "plans").rglob("*") if p.is_file())
        print(f"{'on disk':<12}{size / 1e6:>9.1f} MB")


if __name__ == "__main__":
    main()
