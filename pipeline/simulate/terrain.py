"""The terrain of the simulation: a refined true DEM, and the poorer one that a detector gets."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.warp import reproject, transform_bounds
from scipy import ndimage

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.simulate import fields
from slidecube.pipeline.simulate.parameters import Area, DetectorDem, Parameters, Size

DEM_FILE = Path(__file__).parent / "data" / "glo30_sao_tome.tif"
_SNAP_M = 60.0  # the coarsest band's pixel: every band of an item starts on one corner


@dataclass(frozen=True, slots=True, kw_only=True)
class Terrain:
    """The true terrain, on 10 m pixels with a margin on all four sides.

    geobox : of the scene, without the margin
    margin_px : width of the margin
    dem_m : (y, x) float32 metres above EGM2008, margin included; 0 and below is sea
    """

    geobox: GeoBox
    margin_px: int
    dem_m: np.ndarray

    @property
    def inner(self) -> tuple[slice, slice]:
        """Slices that cut the margin off."""
        m = self.margin_px
        return slice(m, self.dem_m.shape[0] - m), slice(m, self.dem_m.shape[1] - m)

    @property
    def scene_dem_m(self) -> np.ndarray:
        """DEM of the scene itself."""
        return self.dem_m[self.inner]


def scene_geobox(area: Area, size: Size) -> GeoBox:
    """10 m pixels of a named size, its corner on the pixels of the 60 m bands."""
    half = size.extent_m / 2
    left = np.floor((size.centre_m[0] - half) / _SNAP_M) * _SNAP_M
    top = np.ceil((size.centre_m[1] + half) / _SNAP_M) * _SNAP_M
    n = round(size.extent_m / _SNAP_M) * round(_SNAP_M / area.dem_m)
    return GeoBox((n, n), Affine(area.dem_m, 0, left, 0, -area.dem_m, top), area.crs)


def true_terrain(parameters: Parameters, geobox: GeoBox, seed: int, source: Path = DEM_FILE) -> Terrain:
    """Refine a real DEM to the scene's pixels and add self-affine detail where it is steep."""
    area = parameters.area
    margin_px = round(area.margin_m / area.dem_m)
    dem = read_dem(source, geobox.pad(margin_px))
    detail = fields.fractal(
        dem.shape, fields.generator(seed, "relief"), patch_px=9.0, hurst=area.fractal_hurst
    )
    slope = np.minimum(slope_deg(ndimage.gaussian_filter(dem, 2.0), area.dem_m), 60.0)
    land = ndimage.gaussian_filter((dem > 0.5).astype(np.float32), 1.0)
    refined = dem + detail * area.fractal_rms_m * (slope / 25.0) * land
    return Terrain(
        geobox=geobox, margin_px=margin_px, dem_m=np.where(dem > 0.5, np.maximum(refined, 0.6), 0.0)
    )


def read_dem(source: Path, geobox: GeoBox) -> np.ndarray:
    """Heights of a DEM file on a GeoBox, cubic: (y, x) float32 metres; sea and nodata are 0.

    Raises PipelineError when the file cannot be opened.
    """
    try:
        opened = rasterio.open(source)
    except rasterio.errors.RasterioIOError as error:
        raise PipelineError(
            f"DEM {str(source)!r} cannot be opened: {error}; give a raster of heights"
        ) from None
    with opened as file:
        heights = file.read(1).astype(np.float32)
        nodata = file.nodata
        if nodata is not None:
            heights[heights == np.float32(nodata)] = 0.0
        heights *= np.float32(file.scales[0])
        out = np.zeros(geobox.shape, np.float32)
        reproject(
            heights,
            out,
            src_transform=file.transform,
            src_crs=file.crs,
            dst_transform=geobox.affine,
            dst_crs=str(geobox.crs),
            resampling=Resampling.cubic,
            tolerance=0.0,
        )
    return np.where(out > 0, out, np.float32(0))


def gradients(dem_m: np.ndarray, pixel_m: float) -> tuple[np.ndarray, np.ndarray]:
    """Rise to the east and to the north, metres a metre: two (y, x) float32."""
    down, east = np.gradient(dem_m.astype(np.float32), np.float32(pixel_m))
    return np.asarray(east, np.float32), np.asarray(-down, np.float32)


def slope_deg(dem_m: np.ndarray, pixel_m: float) -> np.ndarray:
    """Slope by central differences: (y, x) float32 degrees."""
    east, north = gradients(dem_m, pixel_m)
    return np.asarray(np.degrees(np.arctan(np.hypot(east, north))), np.float32)


def detector_dem(
    parameters: DetectorDem, terrain: Terrain, canopy_m: np.ndarray, seed: int
) -> tuple[np.ndarray, Affine]:
    """Derive the surface model that a detector gets: smoothed, with canopy and noise.

    canopy_m : (y, x) metres, mean canopy height of each 10 m pixel of the scene, margin included
    Returns (y, x) float32 metres on a lon/lat grid of one arcsecond, and its transform.
    """
    pixel_m = abs(terrain.geobox.affine.a)
    rng = fields.generator(seed, "detector dem")
    shape = terrain.dem_m.shape
    stand = 1 + parameters.canopy_sd * fields.smooth_noise(
        shape, rng, patch_px=parameters.canopy_patch_m / pixel_m
    )
    steep = slope_deg(terrain.dem_m, pixel_m) > 20.0  # the handbook's border between its two accuracies
    noise = fields.smooth_noise(shape, rng, patch_px=parameters.noise_patch_m / pixel_m)
    noise *= np.where(steep, parameters.noise_steep_m, parameters.noise_flat_m) * (terrain.dem_m > 0)
    surface = terrain.dem_m + np.maximum(stand, 0) * canopy_m * parameters.canopy_share
    surface = ndimage.gaussian_filter(surface, parameters.smooth_m / pixel_m) + noise
    return _to_lonlat(surface.astype(np.float32), terrain, parameters.resolution_arcsec / 3600)


def _to_lonlat(surface: np.ndarray, terrain: Terrain, step: float) -> tuple[np.ndarray, Affine]:
    padded = terrain.geobox.pad(terrain.margin_px)
    west, south, east, north = transform_bounds(str(padded.crs), "EPSG:4326", *padded.boundingbox)
    left, top = np.ceil(west / step) * step, np.floor(north / step) * step
    shape = (int((top - south) / step), int((east - left) / step))
    out = np.zeros(shape, np.float32)
    transform = Affine(step, 0, left, 0, -step, top)
    reproject(
        surface,
        out,
        src_transform=padded.affine,
        src_crs=str(padded.crs),
        dst_transform=transform,
        dst_crs="EPSG:4326",
        resampling=Resampling.bilinear,
        tolerance=0.0,
    )
    return out, transform


def drainage(dem_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drain every cell to the sea or the edge.

    dem_m : (y, x) metres, coarse (30 m): the loop is in Python.
    Returns the downstream neighbour of each cell as a flat index (-1 = none), and the cells that drain through it,
    both (y * x).
    Source: priority flood, Barnes 2014, algorithm 1.
    """
    rows, cols = dem_m.shape
    flat = dem_m.ravel().tolist()
    down = [-2] * (rows * cols)
    heap: list[tuple[float, int]] = []
    edge = np.zeros((rows, cols), bool)
    edge[[0, -1], :] = edge[:, [0, -1]] = True
    for cell in np.flatnonzero((edge | (dem_m <= 0)).ravel()).tolist():
        down[cell] = -1
        heap.append((flat[cell], cell))
    heapq.heapify(heap)
    order: list[int] = []
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    while heap:
        level, cell = heapq.heappop(heap)
        order.append(cell)
        y, x = divmod(cell, cols)
        for dy, dx in steps:
            if 0 <= y + dy < rows and 0 <= x + dx < cols:
                other = cell + dy * cols + dx
                if down[other] == -2:
                    down[other] = cell
                    heapq.heappush(heap, (max(level, flat[other]), other))
    count = [1] * (rows * cols)
    for cell in reversed(order):
        if down[cell] >= 0:
            count[down[cell]] += count[cell]
    return np.array(down), np.array(count)
