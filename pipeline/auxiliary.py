"""Auxiliary layers: rasters that the TOML names, brought onto the grid with a kernel that fits what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import dask
import dask.array as da
import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox

from slidecube.catalog.load import ReadLog
from slidecube.catalog.read import Asset, Pixels, Place, read_asset
from slidecube.catalog.scenes import Scene
from slidecube.pipeline.blocks import touching
from slidecube.pipeline.config import Layer
from slidecube.pipeline.errors import PipelineError

CLASS_NODATA = 65535
"""Stored where a categorical layer says nothing; a continuous one holds NaN."""


def auxiliary(
    scenes: Sequence[Scene], geobox: GeoBox, layer: Layer, *, block_px: int, log: ReadLog | None = None
) -> da.Array:
    """Bring a layer onto a window, lazily, one block of the lattice at a time.

    scenes : that touch the window; where they overlap, the newest that has a value counts, then the first by id
    geobox : on the lattice's blocks
    Returns (y, x): uint16 classes, `CLASS_NODATA` = none, or float32 quantities, NaN = none. The most frequent class
    of what a pixel covers is taken ("mode"), or a mean of what is around its centre, as wide as the grid's pixel where
    the source is finer ("bilinear", as GDAL's warp has it).
    Raises PipelineError when computed, where a categorical layer holds what is no class.
    """
    ordered = sorted(scenes, key=lambda s: (-s.datetime.timestamp(), s.id))
    shape = geobox.shape
    blocks = da.empty((max(len(ordered), 1), *shape), chunks=(-1, block_px, block_px))
    touches_tji = touching(ordered, geobox, blocks, block_px)
    read = dask.delayed(_block, pure=False)
    dtype = dtype_of(layer)
    rows, cols = ([slice(i, min(i + block_px, n)) for i in range(0, n, block_px)] for n in shape)

    def block(j: int, i: int) -> da.Array:
        part = geobox[rows[j], cols[i]]
        there = [scene for scene, hit in zip(ordered, touches_tji[:, j, i], strict=True) if hit]
        made: da.Array = da.from_delayed(read(there, part, layer, log), part.shape, dtype)
        return made

    whole: da.Array = da.block([[block(j, i) for i in range(len(cols))] for j in range(len(rows))])
    return whole


def dtype_of(layer: Layer) -> str:
    """Type in which a layer is stored."""
    return "uint16" if layer.kind == "categorical" else "float32"


def nodata_of(layer: Layer) -> float:
    """Value of a stored layer that means nothing."""
    return CLASS_NODATA if layer.kind == "categorical" else float("nan")


def values_of(stored: xr.DataArray) -> xr.DataArray:
    """Decode what is stored of a layer: float32, NaN = nodata."""
    if stored.dtype == np.float32:
        return stored
    return stored.astype(np.float32).where(stored != CLASS_NODATA)


def _block(scenes: Sequence[Scene], geobox: GeoBox, layer: Layer, log: ReadLog | None) -> np.ndarray:
    values = np.full(geobox.shape, np.nan, np.float32)
    pixels = Pixels(
        dtype="float32",
        kernel=layer.kernel,
        nodata=None,
        fill=float("nan"),
        band=layer.band,
        holes=layer.nodata,
    )
    for scene in scenes:
        found = read_asset(_asset(scene, layer.name), geobox, pixels, log)
        if found is not None:
            np.copyto(values, found, where=np.isnan(values))
        if not np.isnan(values).any():
            break
    return _classes(values, layer.name) if layer.kind == "categorical" else values


def _asset(scene: Scene, name: str) -> Asset:
    key = scene.bands[name]
    first = Place(href=scene.item["assets"][key]["href"].removeprefix("file://"), source=scene.source)
    others = (Place(href=other.hrefs[name], source=other.source) for other in scene.alternates)
    return Asset(item=scene.id, asset=key, places=(first, *others))


def _classes(values: np.ndarray, name: str) -> np.ndarray:
    known = ~np.isnan(values)
    held = values[known]
    wrong = held[(held != np.rint(held)) | (held < 0) | (held >= CLASS_NODATA)]
    if wrong.size:
        raise PipelineError(
            f"Layer {name!r} holds {float(wrong[0]):g}; classes are whole numbers from 0 to {CLASS_NODATA - 1}: name "
            "it in nodata if it means nothing, or say kind = 'continuous'"
        )
    out = np.full(values.shape, CLASS_NODATA, np.uint16)
    out[known] = held.astype(np.uint16)
    return out
