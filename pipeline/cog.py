"""Cloud-optimised GeoTIFFs: the door for GDAL and QGIS, which read sharded Zarr only from GDAL 3.13 on."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
import xarray as xr
from odc.geo.geobox import GeoBox
from rasterio.windows import Window

from slidecube.pipeline.disk import naming_a_full_disk

WINDOW_PX = 2048
BLOCK_PX = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CogSpec:
    """How one variable becomes a GeoTIFF.

    nodata : stored value of nodata, None where every value means something
    scale : value = stored x scale
    colours : stored value -> (red, green, blue, alpha), for categories
    overview : how overviews are made; a category must not be averaged
    """

    nodata: int | None
    description: str
    scale: float = 1.0
    colours: Mapping[int, tuple[int, int, int, int]] = field(default_factory=dict)
    overview: str = "nearest"


def write_cog(
    path: Path, values: xr.DataArray, *, geobox: GeoBox, spec: CogSpec, tags: Mapping[str, str] | None = None
) -> Path:
    """Write one raster window by window, so that a nation never lies in memory.

    values : (y, x) unsigned integers as stored, lazy or not; geobox : its pixels
    The file appears whole or not at all: temporary names, then a rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.partial"):  # of a writer that was killed
        stale.unlink(missing_ok=True)
    plain = path.with_name(f".{path.name}.{secrets.token_hex(4)}.plain.partial")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with naming_a_full_disk(path.parent):
            _write_plain(plain, values, geobox, spec, tags or {})
            rasterio.shutil.copy(
                str(plain),
                str(partial),
                driver="COG",
                compress="DEFLATE",
                predictor="YES",
                blocksize=BLOCK_PX,
                bigtiff="IF_SAFER",
                overview_resampling=spec.overview,
            )
            _require_whole(partial, plain)
        partial.replace(path)
    finally:
        for leftover in (plain, partial):
            leftover.unlink(missing_ok=True)
    return path


def _write_plain(
    path: Path, values: xr.DataArray, geobox: GeoBox, spec: CogSpec, tags: Mapping[str, str]
) -> None:
    height, width = values.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=height,
        width=width,
        count=1,
        dtype=values.dtype,
        crs=str(geobox.crs),
        transform=geobox.affine,
        nodata=spec.nodata,
        tiled=True,
        blockxsize=BLOCK_PX,
        blockysize=BLOCK_PX,
        compress="LZW",
        sparse_ok=True,
        bigtiff="IF_SAFER",
    ) as dst:
        dst.scales = (spec.scale,)
        dst.set_band_description(1, spec.description)
        dst.update_tags(**tags)
        if spec.colours:
            dst.write_colormap(1, dict(spec.colours))
        for rows, cols in _windows(height, width):
            block = np.asarray(values[rows, cols].to_numpy())
            dst.write(
                block,
                1,
                window=Window(cols.start, rows.start, cols.stop - cols.start, rows.stop - rows.start),
            )


def _require_whole(made: Path, source: Path) -> None:
    """Read a raster back: GDAL may close a file that it could not write to its end without a word."""
    with rasterio.open(made) as one, rasterio.open(source) as two:
        for rows, cols in _windows(*one.shape):
            window = Window(cols.start, rows.start, cols.stop - cols.start, rows.stop - rows.start)
            if not np.array_equal(one.read(1, window=window), two.read(1, window=window)):
                raise OSError(f"{made.name} differs from what was written")


def _windows(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    for r in range(0, height, WINDOW_PX):
        for c in range(0, width, WINDOW_PX):
            yield slice(r, min(r + WINDOW_PX, height)), slice(c, min(c + WINDOW_PX, width))
