"""Reading onto a grid that the source's own pixels divide: copying and whole-number magnification.

Most Sentinel-2 reads are of this kind (20 m and 60 m bands onto 10 m in one UTM zone). GDAL's warper gives the same
pixels several times slower; a test holds the two equal, bit for bit, nodata and edges included.
"""

from __future__ import annotations

import numpy as np
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.crs import CRS
from rasterio.windows import Window

_EXACT = 1e-6  # of a pixel: rounding of coordinates, no shift


def magnification(asset: rasterio.DatasetReader, geobox: GeoBox) -> int | None:
    """How many of the grid's pixels lie on one side of the asset's, when that is a whole number and edges coincide.

    None when the asset needs a warp: another CRS, a rotation, a fraction, or shifted pixels.
    """
    a, b = asset.transform, geobox.affine
    if a.b or a.d or b.b or b.d or a.a <= 0 or a.e >= 0 or asset.crs != CRS.from_user_input(str(geobox.crs)):
        return None
    ratios = (a.a / b.a, a.e / b.e)
    factor = round(ratios[0])
    shifts = ((b.c - a.c) / b.a, (b.f - a.f) / b.e)
    if factor < 1 or any(abs(ratio - factor) > _EXACT / max(geobox.shape) for ratio in ratios):
        return None
    return factor if all(abs(shift - round(shift)) < _EXACT for shift in shifts) else None


def on_binary_grid(asset: rasterio.DatasetReader) -> bool:
    """Tell whether the origin is a whole number of quarter pixels, as those of Sentinel-2's products are.

    Only then are pixel positions exact in binary, and GDAL's halves the halves of whole-number arithmetic.
    """
    a = asset.transform
    quarters = (4 * a.c / a.a, 4 * a.f / a.e)
    return all(q == round(q) for q in quarters)


def read_magnified(
    asset: rasterio.DatasetReader,
    band: int,
    geobox: GeoBox,
    *,
    factor: int,
    kernel: str,
    nodata: float | None,
) -> np.ndarray:
    """Read a band onto a grid that is `factor` times finer.

    kernel : "nearest" or, for unsigned integers and a factor of 2, "bilinear" (the weights of other factors are not
        exact in binary, and GDAL rounds their halves either way)
    nodata : value that counts as none, and fills what lies outside the asset (0 when None)
    Returns (y, x) in the asset's dtype. Bilinear as GDAL's warper: weights of pixels without data are left out and
    the rest made whole, a pixel whose nearest source pixel has no data has none, halves are rounded up.
    """
    a, b = asset.transform, geobox.affine
    first = round((b.f - a.f) / b.e), round((b.c - a.c) / b.a)
    if kernel == "nearest" or factor == 1:
        rows, cols = ((start + np.arange(n)) // factor for start, n in zip(first, geobox.shape, strict=True))
        source = _read_around(asset, band, rows, cols, nodata)
        return source[np.ix_(rows - rows[0], cols - cols[0])]
    below, above = zip(
        *(_neighbours(s, n, factor) for s, n in zip(first, geobox.shape, strict=True)), strict=True
    )
    rows, cols = (np.append(i, i[-1] + 1) for i in below)
    source = _read_around(asset, band, rows, cols, nodata)
    weights = _Weights(below=below, above=above, factor=factor)
    return weights.blend(source, 0 if nodata is None else int(nodata))


def _neighbours(start: int, n: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Source index before each pixel centre, and the weight of the one after it, in units of 1 / (2 factor)."""
    position = (
        2 * (start + np.arange(n)) + 1 - factor
    )  # of the centre, in half grid pixels from source centre 0
    return position // (2 * factor), position % (2 * factor)


class _Weights:
    """Bilinear weights as whole numbers, so that sums, and halves, are exact."""

    def __init__(self, *, below: tuple[np.ndarray, ...], above: tuple[np.ndarray, ...], factor: int) -> None:
        self._at = [index - index[0] for index in below]
        self._after = [weight.astype(np.int32) for weight in above]
        self._before = [2 * factor - weight for weight in self._after]
        self._nearest = [at + (after >= factor) for at, after in zip(self._at, self._after, strict=True)]
        self._whole = (2 * factor) ** 2

    def blend(self, source: np.ndarray, nodata: int) -> np.ndarray:
        """Magnify a source window that reaches one pixel beyond the last index."""
        valid = source != nodata
        total = self._sum(np.where(valid, source, 0).astype(np.int32))
        if valid.all():
            out: np.ndarray = (total + self._whole // 2) // self._whole
        else:
            weight = self._sum(valid.astype(np.int32))
            out = (2 * total + weight) // np.maximum(2 * weight, 1)
            out[~valid[np.ix_(*self._nearest)]] = nodata
        return out.astype(source.dtype, copy=False)

    def _sum(self, values: np.ndarray) -> np.ndarray:
        (row, col), (row_after, col_after) = self._at, self._after
        row_before, col_before = self._before
        lines = values[row] * row_before[:, None] + values[row + 1] * row_after[:, None]
        total: np.ndarray = lines[:, col] * col_before + lines[:, col + 1] * col_after
        return total


def _read_around(
    asset: rasterio.DatasetReader, band: int, rows: np.ndarray, cols: np.ndarray, nodata: float | None
) -> np.ndarray:
    """Read the rectangle from the first to the last index; what lies outside the asset is nodata."""
    shape = (int(rows[-1] - rows[0]) + 1, int(cols[-1] - cols[0]) + 1)
    out = np.full(shape, 0 if nodata is None else nodata, asset.dtypes[band - 1])
    top, left = max(int(rows[0]), 0), max(int(cols[0]), 0)
    bottom, right = min(int(rows[-1]) + 1, asset.height), min(int(cols[-1]) + 1, asset.width)
    if top < bottom and left < right:
        part = asset.read(band, window=Window(left, top, right - left, bottom - top))
        out[top - rows[0] : bottom - rows[0], left - cols[0] : right - cols[0]] = part
    return out
