"""Spectral indices: one table, name -> formula, bands and source, of plain functions of reflectance.

All take NumPy, Dask or xarray arrays of any equal shape, NaN = nodata, and take integers as floats. Their algebra:

* NaN in any band that an index reads makes it NaN; a band that it does not read never counts.
* A ratio is NaN where its denominator is 0 or less: without light there is nothing to compare.
* A normalised difference keeps to [-1, 1]: slightly negative reflectances (dark pixels after the offset of baseline
  04.00) would leave the range and are clipped to it. Scaling all its bands by one factor leaves it, scaling one does
  not. SAVI and the tasselled cap are functions of reflectance itself, in [0, 1], and change with its scale.
* A difference or relative difference is NaN where either side is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import xarray as xr

A = TypeVar("A", np.ndarray, xr.DataArray)


def normalised_difference(a: A, b: A) -> A:
    """(a - b) / (a + b), within [-1, 1]; NaN where either is NaN or where a + b <= 0."""
    a, b = _float(a), _float(b)
    return _where(a + b > 0, _clip((a - b) / _positive(a + b)))


def ndvi(red: A, nir: A) -> A:
    """Normalised difference vegetation index of B04 and B08. Source: Rouse et al. 1974."""
    return normalised_difference(nir, red)


def difference(pre: A, post: A) -> A:
    """Change of an index, post minus pre; of NDVI, negative is a loss. Source: ENS (Ganerod 2023), section 3.2."""
    change: A = post - pre
    return change


def relative_difference(pre: A, post: A) -> A:
    """Relative change of an index in per cent, 100 (post - pre) / sqrt(pre + post).

    Returns float; NaN where pre + post <= 0 (for NDVI water, rock, snow), where it is undefined. Published for NDVI;
    for the other indices it is the same formula, and of little use where these are mostly negative.
    Source: Scheip & Wegmann 2021 (HazMapper), eq. 1, doi:10.5194/nhess-21-1495-2021.
    """
    return _where(pre + post > 0, 100.0 * (post - pre) / np.sqrt(_positive(pre + post)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """One index.

    formula : of the bands' reflectances, as a reader writes it; bands : in the order that `compute` takes them
    within : the interval that it cannot leave, None where there is none
    """

    formula: str
    bands: tuple[str, ...]
    compute: Callable[..., Any]
    source: str
    within: tuple[float, float] | None = None


def _bsi(blue: A, red: A, nir: A, swir: A) -> A:
    blue, red, nir, swir = (_float(band) for band in (blue, red, nir, swir))
    return normalised_difference(swir + red, nir + blue)


def _savi(red: A, nir: A) -> A:
    red, nir = _float(red), _float(nir)
    total = nir + red + _SOIL
    return _where(total > 0, (1 + _SOIL) * (nir - red) / _positive(total))


def _weighted(weights: tuple[float, ...]) -> Callable[..., Any]:
    def compute(*bands: A) -> A:
        total = _float(bands[0]) * weights[0]
        for weight, band in zip(weights[1:], bands[1:], strict=True):
            total = total + _float(band) * weight
        return total

    return compute


def _normalised(first: str, second: str, source: str) -> Index:
    return Index(
        formula=f"({first} - {second}) / ({first} + {second})",
        bands=(first, second),
        compute=normalised_difference,
        source=source,
        within=(-1.0, 1.0),
    )


def _tasselled_cap(weights: tuple[float, ...]) -> Index:
    terms = [
        f"{'-' if w < 0 else '+'} {abs(w):.4f} * {band}" for w, band in zip(weights, _CAP_BANDS, strict=True)
    ]
    return Index(
        formula=" ".join(terms).removeprefix("+ "),
        bands=_CAP_BANDS,
        compute=_weighted(weights),
        source="Shi & Xu 2019, doi:10.1109/JSTARS.2019.2938388, six bands; derived from reflectance at the sensor",
    )


_SOIL = 0.5  # L of Huete 1988: intermediate cover
_CAP_BANDS = ("B02", "B03", "B04", "B08", "B11", "B12")

INDICES: Mapping[str, Index] = {
    "ndvi": _normalised("B08", "B04", "Rouse et al. 1974 (NASA SP-351, p. 309)"),
    "ndwi": _normalised("B03", "B08", "open water: McFeeters 1996, doi:10.1080/01431169608948714"),
    "ndmi": _normalised("B08", "B11", "moisture of leaves: Gao 1996, doi:10.1016/S0034-4257(96)00067-3"),
    "nbr": _normalised("B08", "B12", "burns: Garcia & Caselles 1991, doi:10.1080/10106049109354290"),
    "bsi": Index(
        formula="((B11 + B04) - (B08 + B02)) / ((B11 + B04) + (B08 + B02))",
        bands=("B02", "B04", "B08", "B11"),
        compute=_bsi,
        source="bare soil: Rikimaru et al. 2002 (Tropical Ecology 43, 39-47)",
        within=(-1.0, 1.0),
    ),
    "savi": Index(
        formula="1.5 * (B08 - B04) / (B08 + B04 + 0.5)",
        bands=("B04", "B08"),
        compute=_savi,
        source="Huete 1988, doi:10.1016/0034-4257(88)90106-X, L = 0.5",
    ),
    "tcb": _tasselled_cap((0.3510, 0.3813, 0.3437, 0.7196, 0.2396, 0.1949)),
    "tcg": _tasselled_cap((-0.3599, -0.3533, -0.4734, 0.6633, 0.0087, -0.2856)),
    "tcw": _tasselled_cap((0.2578, 0.2305, 0.0883, 0.1071, -0.7611, -0.5308)),
}
"""Indices by name; tcb, tcg and tcw are the tasselled cap's brightness, greenness and wetness.

As features: `<name>_pre`, `<name>_post`, `d<name>` (`difference`) and `rd<name>` (`relative_difference`).
"""


def _float(a: A) -> A:
    array: Any = a if hasattr(a, "dtype") else np.asarray(a)  # plain numbers and lists, too
    wide: A = array.astype(np.result_type(array.dtype, np.float32))
    return wide


def _positive(a: A) -> A:
    return _where(a > 0, a, 1.0)


def _clip(a: A) -> A:
    clipped: A = a.clip(-1.0, 1.0)
    return clipped


def _where(condition: Any, a: A, other: float = np.nan) -> A:
    chosen: Any = a.where(condition, other) if isinstance(a, xr.DataArray) else np.where(condition, a, other)
    found: A = chosen
    return found
