"""Random fields: one generator a purpose, so that adding a purpose changes no other."""

from __future__ import annotations

import zlib

import numpy as np
from scipy import fft, ndimage

FloatArray = np.ndarray


def generator(seed: int, *purpose: object) -> np.random.Generator:
    """Return the random generator of a purpose; the same seed and purpose give the same numbers."""
    return np.random.default_rng([seed, zlib.crc32(" ".join(map(str, purpose)).encode())])


def fractal(
    shape: tuple[int, int], rng: np.random.Generator, *, patch_px: float, hurst: float = 0.7
) -> FloatArray:
    """Self-affine field below a patch size and uncorrelated above it.

    Returns (y, x) float32 with mean 0 and standard deviation 1.
    Source: spectral synthesis, Turcotte 1997, ch. 7; amplitude (k^2 + k0^2)^-(H+1)/2.
    """
    rows, cols = (fft.next_fast_len(n + int(patch_px), real=True) for n in shape)
    noise = rng.standard_normal((rows, cols), dtype=np.float32)
    ky = fft.fftfreq(rows)[:, None].astype(np.float32)
    kx = fft.rfftfreq(cols)[None, :].astype(np.float32)
    filtered = fft.irfft2(
        fft.rfft2(noise) * (ky**2 + kx**2 + np.float32(1 / patch_px) ** 2) ** np.float32(-(hurst + 1) / 2),
        s=(rows, cols),
    )[: shape[0], : shape[1]]
    return np.asarray((filtered - filtered.mean()) / filtered.std(), dtype=np.float32)


def smooth_noise(shape: tuple[int, int], rng: np.random.Generator, *, patch_px: float) -> FloatArray:
    """Gaussian noise correlated over a patch: (y, x) float32, mean 0, standard deviation 1."""
    step = max(1, int(patch_px / 4))
    coarse_shape = tuple(n // step + 4 for n in shape)
    coarse = ndimage.gaussian_filter(
        rng.standard_normal(coarse_shape, dtype=np.float32), patch_px / step / 2.5, mode="wrap"
    )
    field = enlarge(coarse, step, (shape[0] + 2 * step, shape[1] + 2 * step))[: shape[0], : shape[1]]
    return np.asarray((field - field.mean()) / max(float(field.std()), 1e-9), dtype=np.float32)


def enlarge(coarse: FloatArray, factor: int, shape: tuple[int, int]) -> FloatArray:
    """Bilinear enlargement by a whole factor, pixel areas kept in place: (y, x) float32 of `shape`."""
    if factor == 1:
        return np.asarray(coarse[: shape[0], : shape[1]], dtype=np.float32)
    return _interp_axis(_interp_axis(coarse, factor, shape[0], 0), factor, shape[1], 1)


def _interp_axis(a: FloatArray, factor: int, size: int, axis: int) -> FloatArray:
    at = np.clip((np.arange(size) + 0.5) / factor - 0.5, 0, a.shape[axis] - 1)
    low = np.minimum(at.astype(int), a.shape[axis] - 2) if a.shape[axis] > 1 else np.zeros(size, int)
    weight = (at - low).astype(np.float32)
    weight = weight[:, None] if axis == 0 else weight[None, :]
    high = np.minimum(low + 1, a.shape[axis] - 1)
    out: FloatArray = np.take(a, low, axis).astype(np.float32) * (1 - weight)
    out += np.take(a, high, axis) * weight
    return out


def repeat(a: FloatArray, factor: int) -> FloatArray:
    """Each pixel as a block of `factor` x `factor` pixels."""
    return a if factor == 1 else np.repeat(np.repeat(a, factor, axis=0), factor, axis=1)


def block_mean(a: FloatArray, factor: int) -> FloatArray:
    """Mean over blocks of `factor` x `factor` pixels: (y, x) float32."""
    if factor == 1:
        return np.asarray(a, dtype=np.float32)
    rows, cols = a.shape[0] // factor, a.shape[1] // factor
    blocks = a[: rows * factor, : cols * factor].reshape(rows, factor, cols, factor)
    return np.asarray(blocks.mean(axis=(1, 3), dtype=np.float32))
