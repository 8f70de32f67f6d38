"""Spectral indices: plain functions of reflectance arrays (NumPy, Dask or xarray)."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import xarray as xr

A = TypeVar("A", np.ndarray, xr.DataArray)


def ndvi(red: A, nir: A) -> A:
    """Normalised difference vegetation index, (nir - red) / (nir + red).

    red, nir : reflectance of B04 and B08, any equal shape, NaN = nodata. Integers are taken as floats.
    Returns float, within [-1, 1]; NaN where either is NaN or where nir + red <= 0. Slightly negative reflectances
    (dark pixels after the offset of baseline 04.00) would leave the range and are clipped to it.
    Source: Rouse et al. 1974.
    """
    red, nir = _float(red), _float(nir)
    return _where(nir + red > 0, _clip((nir - red) / _nonzero(nir + red)))


def dndvi(pre: A, post: A) -> A:
    """Change of NDVI, post minus pre; negative is a loss. Source: ENS (Ganerod 2023), section 3.2."""
    change: A = post - pre
    return change


def rdndvi(pre: A, post: A) -> A:
    """Relative change of NDVI in per cent, 100 (post - pre) / sqrt(pre + post).

    pre, post : NDVI. Returns float; negative is a loss; NaN where pre + post <= 0 (water, rock, snow), where the
    index is undefined.
    Source: Scheip & Wegmann 2021 (HazMapper), eq. 1.
    """
    return _where(pre + post > 0, 100.0 * (post - pre) / np.sqrt(_nonzero(pre + post)))


def _float(a: A) -> A:
    array: Any = a if hasattr(a, "dtype") else np.asarray(a)  # plain numbers and lists, too
    wide: A = array.astype(np.result_type(array.dtype, np.float32))
    return wide


def _nonzero(a: A) -> A:
    return _where(a > 0, a, 1.0)


def _clip(a: A) -> A:
    clipped: A = a.clip(-1.0, 1.0)
    return clipped


def _where(condition: Any, a: A, other: float = np.nan) -> A:
    chosen: Any = a.where(condition, other) if isinstance(a, xr.DataArray) else np.where(condition, a, other)
    found: A = chosen
    return found
