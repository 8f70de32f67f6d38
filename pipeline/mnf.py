"""Minimum noise fraction: the directions in the space of bands that hold most signal and least noise (Green 1988).

Axes in names: b band, k component, y, x.

One fit serves a whole run: fitted tile by tile, components would turn and change sign from tile to tile. It needs
the sums of `slidecube.pipeline.moments` alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
import scipy.linalg
import xarray as xr

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.moments import Moments, block_moments, merge, moments

__all__ = ["Mnf", "Moments", "block_moments", "fit_mnf", "merge", "moments"]

# of the noise's correlation: bands that repeat others leave 1e-16 in float64 and 4e-12 in float32, real ones 1e-3
_SINGULAR = 1e-9
_STEADY = 1e-6
_STRIP_PX = 1 << 14

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mnf:
    """A fitted transform, frozen with its run.

    bands : names, in the order of all that follows
    mean : of each band, subtracted first
    eigenvalues : of all components, falling: the variance of a component whose noise has variance 1, so 1 + SNR
    weights : (k, b) of all components; inverse : (b, k)
    components : so many are kept by `transform`
    pixels : from so many it was fitted
    """

    bands: tuple[str, ...]
    mean: tuple[float, ...]
    eigenvalues: tuple[float, ...]
    weights: Matrix
    inverse_weights: Matrix
    components: int
    pixels: int

    def __post_init__(self) -> None:
        if not 1 <= self.components <= len(self.bands):
            raise PipelineError(
                f"{self.components} components of {len(self.bands)} bands; 1 to {len(self.bands)} are allowed"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """Each eigenvalue's part of their sum, the "data variance" of CAE's Table 3."""
        total = sum(self.eigenvalues)
        return tuple(value / total for value in self.eigenvalues)

    def transform(
        self,
        cube: xr.Dataset | Mapping[str, xr.DataArray],
        *,
        suffix: str = "",
        components: int | None = None,
        nodata: float | None = None,
    ) -> xr.Dataset:
        """Components of a cube, lazily where the cube is lazy.

        cube : (y, x) bands by name, any real type, in the units of the fit; NaN and `nodata` = unknown
        suffix : "post" names the variables mnf1_post, mnf2_post, ...; "" mnf1, mnf2, ...
        components : so many; None: `self.components`

        Returns (y, x) float32, in units of the component's noise, NaN where any band is unknown. A pixel's value
        depends on that pixel alone: sums run over the bands in their order, without a matrix product, whose rounding
        would depend on the size of the chunk.
        Raises PipelineError for a missing band.
        """
        count = self.components if components is None else components
        if not 1 <= count <= len(self.bands):
            raise PipelineError(f"components={count} is not allowed; 1 to {len(self.bands)} are")
        arrays = picked(cube, self.bands)
        mean, weights = np.array(self.mean), np.array(self.weights[:count])

        def block(*bands: np.ndarray) -> np.ndarray:
            return _weighted(bands, weights, before=mean, nodata=nodata)

        return mapped(block, arrays, component_names(count, suffix))

    def kept_of(self, bands: Sequence[np.ndarray], count: int) -> np.ndarray:
        """First components of one block: (count, ...) float32; those beyond `components` hold nothing, and are 0.

        bands : arrays in the order of the fit; NaN = unknown, which makes all components NaN
        """
        kept = min(count, self.components)
        found = _weighted(bands, np.array(self.weights[:kept]), before=np.array(self.mean))
        if kept == count:
            return found
        rest = np.where(np.isnan(found[:1]), found[:1], np.float32(0))
        return np.concatenate([found, *[rest] * (count - kept)])

    def holding(self, share: float, *, most: int) -> Mnf:
        """Keep the fewest components that hold a share of the sum of eigenvalues, at most so many."""
        held = np.cumsum(self.shares) >= share - 1e-12  # the last one is 1 but for rounding
        fewest = int(held.argmax()) + 1 if held.any() else len(self.bands)
        return replace(self, components=min(fewest, most))

    def turned_to(self, other: Mnf, covariance: np.ndarray) -> Mnf:
        """Give each component the sign with which it correlates with the same component of another fit.

        covariance : (b, b) of the pixels of this fit
        """
        mine, theirs = np.array(self.weights), np.array(other.weights)
        signs = np.where(np.einsum("kb,bc,kc->k", mine, covariance, theirs) < 0, -1.0, 1.0)
        return replace(
            self,
            weights=tuple(_tuple(row) for row in mine * signs[:, None]),
            inverse_weights=tuple(_tuple(row) for row in np.array(self.inverse_weights) * signs),
        )

    def inverse(self, components: xr.Dataset | Mapping[str, xr.DataArray], *, suffix: str = "") -> xr.Dataset:
        """Bands again, from all components or, smoothed, from the first ones that are given.

        components : mnf1, mnf2, ... (with `suffix`) as `transform` returns them, without a gap
        Returns (y, x) float32 bands, NaN where any component is.
        Raises PipelineError when the first component is missing, or one between others.
        """
        names = component_names(len(self.bands), suffix)
        given = [name in components for name in names]
        count = sum(given)
        if not count or not all(given[:count]):
            got = ", ".join(name for name in names if name in components) or "none"
            raise PipelineError(f"The inverse needs {names[0]} and those after it without a gap; got {got}")
        after, weights = np.array(self.mean), np.array(self.inverse_weights)[:, :count]

        def block(*parts: np.ndarray) -> np.ndarray:
            return _weighted(parts, weights, after=after)

        return mapped(block, picked(components, names[:count]), self.bands)

    def to_json(self) -> str:
        """Write as JSON, exactly: numbers in hexadecimal."""
        said = {
            "bands": self.bands,
            "mean": _hex(self.mean),
            "eigenvalues": _hex(self.eigenvalues),
            "weights": [_hex(row) for row in self.weights],
            "inverse_weights": [_hex(row) for row in self.inverse_weights],
            "components": self.components,
            "pixels": self.pixels,
        }
        return json.dumps(said)

    @classmethod
    def from_json(cls, text: str) -> Mnf:
        """Read what `to_json` wrote."""
        said = json.loads(text)
        return cls(
            bands=tuple(said["bands"]),
            mean=_numbers(said["mean"]),
            eigenvalues=_numbers(said["eigenvalues"]),
            weights=tuple(_numbers(row) for row in said["weights"]),
            inverse_weights=tuple(_numbers(row) for row in said["inverse_weights"]),
            components=int(said["components"]),
            pixels=int(said["pixels"]),
        )


def component_names(count: int, suffix: str = "") -> tuple[str, ...]:
    """Names of components: mnf1_post, mnf2_post, ..."""
    return tuple(f"mnf{k + 1}{'_' if suffix else ''}{suffix}" for k in range(count))


def fit_mnf(sums: Moments, *, bands: Sequence[str], components: int = 3) -> Mnf:
    """Fit the transform: whiten the noise, then rotate onto the axes of the signal.

    sums : moments of all pixels; bands : their names, in order; components : to be kept by `Mnf.transform`

    Eigenvalues are those of noise^-1 covariance, falling, as SPy's `mnf` has them. Components have noise of variance 1.
    Sign: the band that correlates most with a component does so positively; among bands within a millionth of that
    correlation, the first. The sign belongs to the fit, which is frozen, so it never changes within a run. Between
    fits of similar data it changes only if bands of opposite sign exchange the first place, and then the component
    stands for both alike; weights, of which neighbouring bands have large ones of opposite sign, are less steady.

    Raises PipelineError when bands are constant, have no noise, or repeat each other, when there are fewer pixels than
    the bands need, and when sums are not finite.
    Source: Green 1988, eq. 4-10; noise by shift differences, as SPy 0.25 `noise_from_diffs`.
    """
    names = tuple(bands)
    _refuse_unfit(sums, names)
    covariance, noise = sums.covariance, sums.noise_covariance
    _refuse_singular(covariance, noise, sums.mean, names)
    # in units of each band's noise, so that neither scale nor unit of a band matters to the rounding
    noise_std = np.sqrt(np.diag(noise))
    values, vectors = scipy.linalg.eigh(noise / np.outer(noise_std, noise_std))
    whitening = vectors / np.sqrt(values) / noise_std[:, None]
    signal = whitening.T @ covariance @ whitening
    eigenvalues, axes = scipy.linalg.eigh((signal + signal.T) / 2)
    weights_bk = whitening @ axes[:, ::-1]
    weights_bk *= _signs(covariance @ weights_bk / np.sqrt(np.diag(covariance))[:, None])
    return Mnf(
        bands=names,
        mean=_tuple(sums.mean),
        eigenvalues=_tuple(eigenvalues[::-1]),
        weights=tuple(_tuple(row) for row in weights_bk.T),
        inverse_weights=tuple(_tuple(row) for row in noise @ weights_bk),  # weights' noise weights = 1
        components=components,
        pixels=sums.pixels,
    )


def _refuse_unfit(sums: Moments, names: tuple[str, ...]) -> None:
    if len(names) != sums.bands or len(set(names)) != len(names):
        raise PipelineError(
            f"MNF of moments of {sums.bands} bands got the names {', '.join(names)}; give as many, none twice"
        )
    least = len(names) + 1
    if sums.pixels < least or sums.pairs < least:
        raise PipelineError(
            f"MNF of {', '.join(names)} needs {least} pixels or more of which every band is known, and as many that "
            f"have a known neighbour; got {sums.pixels} and {sums.pairs}"
        )


def _refuse_singular(
    covariance: np.ndarray, noise: np.ndarray, mean: np.ndarray, names: tuple[str, ...]
) -> None:
    # what rounding leaves of a constant is 1e-16 of it
    floor = (1e-12 * np.abs(mean)) ** 2
    for matrix, what in (
        (covariance, "constant"),
        (noise, "without noise (no pixel differs from its neighbour)"),
    ):
        flat = [name for name, bad in zip(names, np.diag(matrix) <= floor, strict=True) if bad]
        if flat:
            raise PipelineError(f"MNF cannot use {', '.join(flat)}: {what}; leave such bands out")
    std = np.sqrt(np.diag(noise))
    values, vectors = scipy.linalg.eigh(noise / np.outer(std, std))
    if values[0] < _SINGULAR:
        null = np.abs(vectors[:, values < _SINGULAR]).max(axis=1)
        tied = [name for name, weight in zip(names, null, strict=True) if weight > 1e-3]
        raise PipelineError(
            f"MNF cannot use {', '.join(tied)} together: each is a combination of the others; leave one out"
        )


def _signs(correlation_bk: np.ndarray) -> np.ndarray:
    """+1 or -1 for each component, so that its strongest correlation with a band is positive."""
    size = np.abs(correlation_bk)
    first = np.argmax(size >= size.max(axis=0) * (1 - _STEADY), axis=0)
    signs: np.ndarray = np.where(correlation_bk[first, np.arange(len(first))] < 0, -1.0, 1.0)
    return signs


def picked(cube: xr.Dataset | Mapping[str, xr.DataArray], names: Sequence[str]) -> list[xr.DataArray]:
    """Arrays of a cube by name; raises PipelineError for a missing one."""
    missing = [name for name in names if name not in cube]
    if missing:
        raise PipelineError(
            f"The cube lacks {', '.join(missing)}; it has {', '.join(map(str, cube))}; the transform was fitted on "
            f"{', '.join(names)}"
        )
    return [cube[name] for name in names]


def mapped(
    block: Callable[..., np.ndarray], arrays: Sequence[xr.DataArray], names: Sequence[str]
) -> xr.Dataset:
    """Apply (y, x), ... -> (name, y, x) to whole arrays, or to chunk after chunk of lazy ones."""
    like = arrays[0]
    if any(a.dims != like.dims or a.shape != like.shape for a in arrays):
        shapes = ", ".join(f"{a.name} {dict(a.sizes)}" for a in arrays)
        raise PipelineError(f"Arrays of one cube have one shape; got {shapes}")
    data: list[Any] = [a.data for a in arrays]
    if any(isinstance(array, da.Array) for array in data):
        axes = "yx"[-like.ndim :]
        lazy = da.unify_chunks(*(v for a in data for v in (da.asarray(a), axes)))[1]
        out: Any = da.map_blocks(
            block,
            *lazy,
            dtype=np.float32,
            new_axis=0,
            chunks=((len(names),), *lazy[0].chunks),
            meta=np.empty((0,) * (like.ndim + 1), np.float32),
        )
    else:
        out = block(*data)
    return xr.Dataset({n: (like.dims, out[i]) for i, n in enumerate(names)}, coords=like.coords)


def _weighted(
    arrays: Sequence[np.ndarray],
    weights_oi: np.ndarray,
    *,
    before: np.ndarray | None = None,
    after: np.ndarray | None = None,
    nodata: float | None = None,
) -> np.ndarray:
    """Sums of arrays by weights, (o, ...) float32: out = weights (arrays - before) + after, in float64 on the way.

    Centred first: the weights of like bands have opposite signs, and large means would cancel at a cost.
    """
    shape, n = arrays[0].shape, arrays[0].size
    flat = [array.reshape(-1) for array in arrays]
    out = np.empty((len(weights_oi), n), np.float32)
    sums, centred, product = (np.empty((rows, min(n, _STRIP_PX))) for rows in (len(weights_oi), 1, 1))
    for start in range(0, n, _STRIP_PX):
        at = slice(start, min(start + _STRIP_PX, n))
        d, p, total = (a[:, : at.stop - start] for a in (centred, product, sums))
        for i, array in enumerate(flat):
            np.subtract(array[at], 0.0 if before is None else before[i], out=d[0])
            if nodata is not None:
                d[0][array[at] == nodata] = np.nan
            for o, weight in enumerate(weights_oi[:, i]):
                if i == 0:
                    np.multiply(d[0], weight, out=total[o])
                else:
                    np.multiply(d[0], weight, out=p[0])
                    total[o] += p[0]
        if after is not None:
            total += after[:, None]
        out[:, at] = total
    return out.reshape(-1, *shape)


def _hex(values: Sequence[float]) -> list[str]:
    return [value.hex() for value in values]


def _numbers(values: Sequence[str]) -> tuple[float, ...]:
    return tuple(float.fromhex(value) for value in values)


def _tuple(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
