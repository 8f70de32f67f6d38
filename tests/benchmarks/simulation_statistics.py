"""Tables and pictures of docs/simulation.md: `python tests/benchmarks/simulation_statistics.py ARCHIVE SHARED OUT`.

ARCHIVE : folder of a default simulated archive (holds archive/ and truth/); SHARED : the folder of real fixtures;
OUT : gets simulation-*.png and simulation-statistics.md.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import geopandas as gpd
import h5py
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import rasterio
import rasterio.warp
from matplotlib.colors import ListedColormap
from PIL import Image
from rasterio.windows import Window

mpl.use("Agg")
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
SCL_COLOURS = ("k", "r", "#404040", "#604020", "g", "y", "b", "gray", "#aaaaaa", "w", "#66ffff", "#ff99ff")
RAYLEIGH = np.array(
    [0.06, 0.035, 0.017, 0.013, 0.008, 0.006, 0.004, 0.004, 0, 0]
)  # path of L1C, parameters.toml


def simulated_scene(folder: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """Date, (y, x, 10) reflectance and (y, x) SCL on 20 m pixels."""
    item = json.loads(next(folder.glob("*.json")).read_text())
    offset = item["assets"]["B04"]["raster:bands"][0]["offset"]
    layers = []
    for band in BANDS:
        with rasterio.open(folder / f"{band}.tif") as file:
            values = file.read(1) * 1e-4 + offset
        if item["assets"][band]["gsd"] == 10:
            values = values.reshape(values.shape[0] // 2, 2, values.shape[1] // 2, 2).mean((1, 3))
        layers.append(values.astype(np.float32))
    with rasterio.open(folder / "SCL.tif") as file:
        return item["properties"]["datetime"][:10], np.stack(layers, -1), file.read(1)


def real_series(shared: Path) -> tuple[np.ndarray, np.ndarray]:
    """(n, 10) reflectance and (n,) SCL of site 31UDS."""
    site = shared / "worldcereal_series" / "site_31UDS"
    with (
        h5py.File(next(site.glob("S2_L2A_10m*"))) as fine,
        h5py.File(next(site.glob("S2_L2A_20m*"))) as coarse,
    ):
        layers = []
        for band in BANDS:
            values = (fine if band in fine else coarse)[band][:].astype(np.float32) / 1e4
            if values.shape[1] == 64:
                values = values.reshape(-1, 32, 2, 32, 2).mean((2, 4))
            layers.append(values)
        return np.stack(layers, -1).reshape(-1, 10), coarse["SCL"][:].ravel()


def ndvi(rho: np.ndarray) -> np.ndarray:
    return (rho[:, 6] - rho[:, 2]) / (rho[:, 6] + rho[:, 2])


def row(name: str, rho: np.ndarray) -> str:
    cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(rho.mean(0), rho.std(0), strict=True)]
    pick = [cells[BANDS.index(b)] for b in ("B02", "B03", "B04", "B08", "B11", "B12")]
    index = ndvi(rho)
    return f"| {name} | " + " | ".join(pick) + f" | {index.mean():.2f} ± {index.std():.2f} |"


def table(archive: Path, shared: Path) -> str:
    scenes = [simulated_scene(p) for p in sorted((archive / "archive" / "sentinel-2-l2a").glob("*T32NKF*"))]
    rho = np.concatenate([r.reshape(-1, 10)[::3] for _, r, _ in scenes])
    scl = np.concatenate([s.ravel()[::3] for _, _, s in scenes])
    real, real_scl = real_series(shared)
    slovenia = np.load(shared / "eolearn_slovenia" / "REFERENCE_SCENES.npy")[2:5][
        ..., [1, 2, 3, 4, 5, 6, 7, 8, 11, 12]
    ]
    cover = np.load(shared / "eolearn_slovenia" / "TestEOPatch" / "mask_timeless" / "LULC.npy").squeeze()
    segments = pd.read_csv(shared / "kaikoura_change" / "df4ML.csv")
    slides = segments[segments["Type"] == 1]
    with rasterio.open(archive / "truth" / "noise_free.tif") as file:
        share = file.read(1)
    share = share.reshape(share.shape[0] // 2, 2, share.shape[1] // 2, 2).mean((1, 3))
    scars = np.concatenate(
        [
            r[(share[:, : s.shape[1]] > 0.9) & np.isin(s, (4, 5, 7))]
            for day, r, s in scenes
            if "2018-09-07" < day < "2018-11-01"
        ]
    )
    lines = [
        "| pixels | B02 | B03 | B04 | B08 | B11 | B12 | NDVI |",
        "|---|---|---|---|---|---|---|---|",
        row("simulated, SCL 4 (vegetation), all dates", rho[scl == 4]),
        row("real 31UDS, SCL 4", real[real_scl == 4]),
        row("real Slovenia, forest (L1C minus path)", slovenia[:, cover == 2].reshape(-1, 10) - RAYLEIGH),
        row("real Slovenia, grassland (L1C minus path)", slovenia[:, cover == 3].reshape(-1, 10) - RAYLEIGH),
        row("simulated, SCL 5 (bare)", rho[scl == 5]),
        row("real 31UDS, SCL 5", real[real_scl == 5]),
        row("simulated scars, whole pixels, seen clear", scars),
        "| real Kaikoura, 185 landslide segments (before atmospheric correction) | "
        + " | ".join(
            f"{slides[b].mean() / 1e4:.3f} ± {slides[b].std() / 1e4:.3f}" for b in ("b2", "b3", "b4", "b8")
        )
        + f" | | | {slides['ndvi'].mean():.2f} ± {slides['ndvi'].std():.2f} |",
        row("simulated, SCL 9 (cloud)", rho[scl == 9]),
        row("real 31UDS, SCL 9", real[real_scl == 9]),
        row("simulated, SCL 10 (cirrus)", rho[scl == 10]),
        row("real 31UDS, SCL 10", real[real_scl == 10]),
        row("simulated, SCL 3 (shadow)", rho[scl == 3]),
        row("real 31UDS, SCL 3", real[real_scl == 3]),
    ]
    return "\n".join(lines) + "\n"


def rgb(folder: Path, window: Window) -> np.ndarray:
    item = json.loads(next(folder.glob("*.json")).read_text())
    offset = item["assets"]["B04"]["raster:bands"][0]["offset"]
    layers = []
    for band in ("B04", "B03", "B02"):
        with rasterio.open(folder / f"{band}.tif") as file:
            layers.append(file.read(1, window=window) * 1e-4 + offset)
    return np.clip(np.stack(layers, -1) / 0.22, 0, 1) ** 0.7


def save(figure, path: Path, dpi: int) -> None:
    """Write a small PNG: 128 colours are enough for a quick look."""
    figure.tight_layout()
    memory = io.BytesIO()
    figure.savefig(memory, dpi=dpi)
    Image.open(memory).convert("RGB").quantize(128).save(path, optimize=True)


def bare(axis, title: str) -> None:
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def picture_scenes(archive: Path, out: Path) -> None:
    folders = sorted(
        (archive / "archive" / "sentinel-2-l2a").glob("*T32NKF*"), key=lambda p: p.name.split("_")[3]
    )
    folders = [f for f in folders if not f.name.endswith("20180718T100031_N0208")]
    figure, axes = plt.subplots(4, 6, figsize=(10, 7))
    for axis in axes.ravel():
        axis.axis("off")
    whole = Window(0, 0, 1000, 1600)
    for number, folder in enumerate(folders[:12]):
        top, side = number // 6 * 2, number % 6
        axes[top, side].imshow(rgb(folder, whole)[::4, ::4])
        bare(axes[top, side], f"SIMULATED {folder.name.split('_')[3][:8]} {folder.name[-5:]}")
        with rasterio.open(folder / "SCL.tif") as file:
            classes = file.read(1)[:800:2, :500:2]
        axes[top + 1, side].imshow(
            classes, cmap=ListedColormap(SCL_COLOURS), vmin=0, vmax=11, interpolation="nearest"
        )
    save(figure, out / "simulation-scenes.png", 75)


def picture_core(archive: Path, out: Path) -> None:
    slides = gpd.read_parquet(archive / "truth" / "landslides.parquet")
    others = gpd.read_parquet(archive / "truth" / "confusers.parquet")
    with rasterio.open(archive / "truth" / "noise_free.tif") as file:
        share, transform = file.read(1), file.transform
    density = np.add.reduceat(
        np.add.reduceat(share, np.arange(0, share.shape[0], 90), 0), np.arange(0, 900, 90), 1
    )
    r, c = np.unravel_index(density.argmax(), density.shape)
    r, c = max(r * 90 - 70, 0), max(c * 90 - 70, 0)
    window = Window(c, r, 230, 230)
    left, top = transform @ (c, r)
    box = (left, left + 2300, top - 2300, top)
    scenes = archive / "archive" / "sentinel-2-l2a"
    before, after = (next(scenes.glob(f"*T32NKF_{day}*")) for day in ("20180802", "20181031"))
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6))
    for axis, folder, title in (
        (axes[0], before, "before"),
        (axes[1], after, "after"),
        (axes[2], after, "truth"),
    ):
        axis.imshow(rgb(folder, window), extent=box)
        bare(axis, f"SIMULATED, {title}: {folder.name.split('_')[3][:8]}")
    slides.boundary.plot(ax=axes[2], color="red", linewidth=0.8)
    others.boundary.plot(ax=axes[2], color="cyan", linewidth=0.6)
    axes[2].set_xlim(box[:2])
    axes[2].set_ylim(box[2:])
    save(figure, out / "simulation-core.png", 80)


def shade(dem: np.ndarray, pixel_m: float) -> np.ndarray:
    down, east = np.gradient(dem, pixel_m)
    return np.clip(0.7 - 0.5 * east + 0.5 * down, 0, 1.5)


def picture_dem(archive: Path, out: Path) -> None:
    with rasterio.open(archive / "truth" / "noise_free.tif") as file:
        true = file.read(4)[800:1100, 300:600]
        x, y = file.transform @ (450, 950)
    with rasterio.open(next((archive / "archive" / "dem").glob("*/DEM.tif"))) as file:
        lon, lat = rasterio.warp.transform("EPSG:32632", "EPSG:4326", [x], [y])
        r, c = file.index(lon[0], lat[0])
        given = file.read(1)[r - 50 : r + 50, c - 50 : c + 50]
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.7))
    axes[0].imshow(shade(true, 10), cmap="gray")
    bare(axes[0], "SIMULATED true terrain, 10 m")
    axes[1].imshow(shade(given, 30), cmap="gray")
    bare(axes[1], "SIMULATED surface model for the detector, 30 m")
    save(figure, out / "simulation-dem.png", 75)


def main() -> None:
    archive, shared, out = (Path(a) for a in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    (out / "simulation-statistics.md").write_text(table(archive, shared))
    picture_scenes(archive, out)
    picture_core(archive, out)
    picture_dem(archive, out)


if __name__ == "__main__":
    main()
