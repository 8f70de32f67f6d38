"""One real Sentinel-2 item of mixed resolution, read by slidecube and by rasterio's WarpedVRT."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import drawing
import numpy as np
import rasterio
import scipy.ndimage
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from slidecube.catalog.items import normalised, scene_of
from slidecube.catalog.load import load
from slidecube.catalog.scenes import Scene
from slidecube.catalog.sources import find_source, offset_of
from slidecube.pipeline.composite import Compositing
from slidecube.pipeline.masks import MaskRule
from slidecube.pipeline.tile import optical_layer

FOLDER = "sentinel_cogs/sentinel-cogs/sentinel-s2-l2a-cogs/29/R/KH/2020/2/S2A_29RKH_20200219_0_L2A"
NAME = "S2A_29RKH_20200219_0_L2A"
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
KERNELS = ("nearest", "bilinear")
MASK = MaskRule()
# one block of the lattice of a grid of 100 m pixels in the item's own zone, and one of the zone beside it
BLOCK_M = 512 * 100
BLOCKS = {"EPSG:32629": (5, 55), "EPSG:32628": (17, 55)}


def measure(shared: Path, scratch: Path, images: Path | None = None) -> dict[str, Any]:
    """Read the item on two grids, band by band, and compare with WarpedVRT; composite it, and compare with numpy."""
    del scratch
    scene = real_scene(shared)
    grids = {}
    for crs in BLOCKS:
        differing = {kernel: _differing(scene, block(crs), kernel) for kernel in KERNELS}
        grids[crs] = {"differing_px": differing, "covered_pct": round(100 * _covered(scene, block(crs)), 1)}
    box = block("EPSG:32629")
    clear, want = expected(scene, box)
    got = layer(scene, box)
    classes, counts = np.unique(scl_around(scene, box, 0), return_counts=True)
    offset = offset_of(scene.item)
    if images is not None:
        _draw(scene, box, got, images / "real-sentinel-item.png")
    return {
        "item": NAME,
        "pixel_m": _pixel_sizes(scene),
        "offset": {"value": offset.value, "applied": offset.applied, "reason": offset.reason},
        "block_px": 512,
        "bands": len(BANDS) + 1,
        "grids": grids,
        "scl_px": {str(c): int(n) for c, n in zip(classes, counts, strict=True)},
        "clear_pct": round(100 * float(clear.mean()), 2),
        "composite_values_compared": sum(values.size for values in want.values()),
        "composite_values_differing": sum(int((got[name] != want[name]).sum()) for name in want),
    }


def real_scene(shared: Path) -> Scene:
    """Make the scene of the real STAC item, its hrefs turned to the reduced files that lie beside it."""
    folder = shared / FOLDER
    item = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    for asset in item["assets"].values():
        asset["href"] = PurePosixPath(urlsplit(asset["href"]).path).name
    source = find_source("earth-search/sentinel-2-l2a")
    return scene_of(normalised(item, source, folder=folder, root=folder), source, "optical")


def block(crs: str) -> GeoBox:
    """One block of the lattice of 100 m pixels: desert, partly under cloud, at the edge of the item."""
    col, row = BLOCKS[crs]
    return GeoBox((512, 512), Affine(100, 0, col * BLOCK_M, 0, -100, row * BLOCK_M), crs)


def warped(scene: Scene, band: str, box: GeoBox, kernel: str) -> np.ndarray:
    """What rasterio's WarpedVRT makes of one asset on a block."""
    with (
        rasterio.open(scene.item["assets"][scene.bands[band]]["href"]) as asset,
        WarpedVRT(
            asset,
            crs=str(box.crs),
            transform=box.affine,
            width=box.shape[1],
            height=box.shape[0],
            resampling=Resampling[kernel],
            nodata=0,
        ) as vrt,
    ):
        pixels: np.ndarray = vrt.read(1)
    return pixels


def layer(scene: Scene, box: GeoBox) -> dict[str, np.ndarray]:
    """The optical layer that slidecube makes of the one scene, as stored."""
    lazy = optical_layer([scene], box, BANDS, how=Compositing(method="greenest"), mask=MASK, block_px=512)
    return {str(name): array.to_numpy() for name, array in lazy.compute(scheduler="synchronous").items()}


def expected(scene: Scene, box: GeoBox) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Mask and optical layer of the one scene by WarpedVRT, scipy and numpy."""
    scl = scl_around(scene, box, 512)
    side = 2 * MASK.dilation_px + 1
    wide = scipy.ndimage.binary_dilation(np.isin(scl, (3, 8, 9, 10)), np.ones((side, side), bool))
    clear = ~(wide | np.isin(scl, MASK.scl_classes))[512:-512, 512:-512]
    planes = {band: warped(scene, band, box, "bilinear") for band in BANDS}
    clear &= np.all([plane != 0 for plane in planes.values()], axis=0)
    want = {band: np.where(clear, plane + 1000, 0).astype(np.uint16) for band, plane in planes.items()}
    return clear, {**want, "clear_count": clear.astype(np.uint16)}


def scl_around(scene: Scene, box: GeoBox, halo_px: int) -> np.ndarray:
    """Scene classes of a block and a halo, by WarpedVRT, block by block of the lattice."""
    wide = box.pad(halo_px) if halo_px else box
    rows = []
    for top in range(0, wide.shape[0], 512):
        row = [
            warped(scene, "SCL", wide[top : top + 512, left : left + 512], "nearest")
            for left in range(0, wide.shape[1], 512)
        ]
        rows.append(np.hstack(row))
    return np.vstack(rows)


def _differing(scene: Scene, box: GeoBox, kernel: str) -> int:
    names = [*BANDS, "SCL"]
    cube = load([scene], box, names, resampling=dict.fromkeys(names, kernel)).isel(time=0)
    return sum(int((cube[band].to_numpy() != warped(scene, band, box, kernel)).sum()) for band in names)


def _covered(scene: Scene, box: GeoBox) -> float:
    return float((warped(scene, "B02", box, "nearest") != 0).mean())


def _pixel_sizes(scene: Scene) -> dict[str, float]:
    sizes = {}
    for band in (*BANDS, "SCL"):
        with rasterio.open(scene.item["assets"][scene.bands[band]]["href"]) as asset:
            sizes[band] = float(asset.transform.a)
    return sizes


def _draw(scene: Scene, box: GeoBox, made: dict[str, np.ndarray], path: Path) -> None:
    raw = [warped(scene, band, box, "bilinear") / 10_000 for band in ("B04", "B03", "B02")]
    kept = [
        np.where(made[b] == 0, np.nan, (made[b].astype(float) - 1000) / 10_000) for b in ("B04", "B03", "B02")
    ]
    figure, axes = drawing.panels(3, width=4.2, height=4.6)
    axes[0].imshow(drawing.true_colour(*raw, white=0.55))
    drawing.plain(axes[0], "as delivered")
    shown = axes[1].imshow(
        scl_around(scene, box, 0), cmap="tab20", vmin=-0.5, vmax=19.5, interpolation="nearest"
    )
    bar = figure.colorbar(
        shown, ax=axes[1], location="bottom", shrink=0.8, ticks=range(12), boundaries=np.arange(13) - 0.5
    )
    bar.ax.tick_params(labelsize=8)
    drawing.plain(axes[1], "scene classes")
    axes[2].imshow(drawing.true_colour(*kept, white=0.55))
    drawing.plain(axes[2], "as stored: cloud, cirrus and their edges are black")
    drawing.save(figure, path)
