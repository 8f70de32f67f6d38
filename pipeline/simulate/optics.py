"""From the fine ground to pixels: point spread, pixel size and misregistration in one step."""

from __future__ import annotations

import numpy as np
from scipy import sparse, special

from slidecube.pipeline.simulate.parameters import Optics

NATIVE_M = {
    **dict.fromkeys(("B02", "B03", "B04", "B08"), 10),
    **dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12"), 20),
    **dict.fromkeys(("B01", "B09"), 60),
}


def spread_px(mtf_nyquist: float) -> float:
    """Width (sigma, in pixels) of the Gaussian that, with the square pixel, gives an MTF at the Nyquist frequency.

    Source: the pixel's own MTF there is 2 / pi; that of a Gaussian is exp(-2 (pi sigma f)^2), f = 1/2.
    """
    return float(np.sqrt(-2 * np.log(mtf_nyquist * np.pi / 2)) / np.pi)


def sampler(n_fine: int, fine_m: float, pixel_m: float, sigma_px: float, shift_m: float) -> sparse.csr_matrix:
    """Matrix that turns a line of fine pixels into a line of pixels.

    shift_m : how far the content moves towards higher indices
    Returns (n_fine * fine_m / pixel_m, n_fine) float32; each row sums to 1, also at the edges.
    """
    n = round(n_fine * fine_m / pixel_m)
    sigma = sigma_px * pixel_m
    centre = (np.arange(n) + 0.5) * pixel_m - shift_m
    reach = pixel_m / 2 + 3 * sigma + fine_m
    taps = int(2 * reach / fine_m) + 1
    first = np.floor((centre - reach) / fine_m).astype(int)
    cell = first[:, None] + np.arange(taps)[None, :]
    at = (cell + 0.5) * fine_m - centre[:, None]
    half, width = pixel_m / 2, max(sigma, 1e-6) * np.sqrt(2)
    weight = special.erf((at + half) / width) - special.erf((at - half) / width)
    cell = np.clip(cell, 0, n_fine - 1)  # beyond the edge lies what lies at the edge
    weight /= weight.sum(axis=1, keepdims=True)
    rows = np.repeat(np.arange(n), taps)
    return sparse.csr_matrix((weight.ravel().astype(np.float32), (rows, cell.ravel())), shape=(n, n_fine))


def draw_shift(optics: Optics, baseline: str, rng: np.random.Generator) -> tuple[float, float]:
    """Misregistration of a scene, metres to the east and to the north."""
    low, high = (
        optics.shift_new_m if float(baseline) >= 3.0 else optics.shift_old_m
    )  # the reference image came then
    size, angle = float(rng.uniform(low, high)), float(rng.uniform(0, 2 * np.pi))
    return size * float(np.cos(angle)), size * float(np.sin(angle))
