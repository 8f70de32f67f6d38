"""The dense encoder beside patch by patch, on the same standardised planes, the same threads, in one run.

Patch by patch as one would write it well: 10,000 patches at once, gathered through a sliding window, in inference mode,
in the faster of torch's two memory formats. Dense is what `predict` runs: units of 128 px with their context, one
torch thread in each, so many units at once as there are threads.
Usage: make bench, or python tests/benchmarks/encoder_speed.py
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from slidecube.models.nets import cae
from slidecube.models.predict import UNIT_PX

SIDE_PX = 768
INPUTS = 5
BATCH = 10_000
ROUNDS = 3


def main() -> None:
    """Time both on one and two threads, in turns; print medians, ratios, and what the arithmetic alone would give."""
    rng = np.random.default_rng(0)
    planes = rng.normal(size=(INPUTS, SIDE_PX + 6, SIDE_PX + 6)).astype(np.float32)
    weights, _ = cae.train(rng.normal(size=(2000, INPUTS, 7, 7)).astype(np.float32), cae.Training(epochs=1))
    dense_flops, patch_flops = cae.flops_a_pixel(INPUTS)
    print(
        f"multiply-adds a pixel: {dense_flops} dense, {patch_flops} by patch, ratio {patch_flops / dense_flops:.1f}"
    )
    ways = {
        "dense": lambda threads: dense(weights, planes, threads),
        "by patch": lambda threads: by_patch(weights, planes, threads, torch.contiguous_format),
        "by patch, channels last": lambda threads: by_patch(weights, planes, threads, torch.channels_last),
    }
    for threads in (1, 2):
        taken: dict[str, list[float]] = {name: [] for name in ways}
        found = {}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way(threads)
                taken[name].append(time.perf_counter() - start)
        medians = {name: float(np.median(seconds)) for name, seconds in taken.items()}
        for name in ways:
            apart = np.abs(found[name] - found["dense"]).max()
            print(
                f"{threads} thread(s)  {name:>24} {medians[name] / SIDE_PX**2 * 1e6:7.3f} s/Mpx"
                f"  {medians[name] / medians['dense']:5.1f} of dense  largest difference {apart:.1e}"
            )


def dense(weights: bytes, planes_dyx: np.ndarray, threads: int) -> np.ndarray:
    """Units on several threads."""
    out = np.empty((cae.DEEP, SIDE_PX, SIDE_PX), np.float32)

    def unit(at: tuple[int, int]) -> None:
        y, x = at
        around = planes_dyx[:, y : y + UNIT_PX + 6, x : x + UNIT_PX + 6]
        out[:, y : y + UNIT_PX, x : x + UNIT_PX] = cae.encode_dense(weights, around)

    starts = range(0, SIDE_PX, UNIT_PX)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(unit, [(y, x) for y in starts for x in starts]))
    return out


def by_patch(
    weights: bytes, planes_dyx: np.ndarray, threads: int, memory_format: torch.memory_format
) -> np.ndarray:
    """Batches of patches, row by row, with torch's own threads."""
    torch.set_num_threads(threads)
    network = cae._network(weights)
    windows = np.lib.stride_tricks.sliding_window_view(planes_dyx, (7, 7), axis=(1, 2)).transpose(
        1, 2, 0, 3, 4
    )
    out = np.empty((SIDE_PX**2, cae.DEEP), np.float32)
    with torch.inference_mode():
        for start in range(0, len(out), BATCH):
            y, x = np.divmod(np.arange(start, min(start + BATCH, len(out))), SIDE_PX)
            batch = torch.from_numpy(windows[y, x]).contiguous(memory_format=memory_format)
            out[start : start + BATCH] = network.encode(batch)[:, :, 0, 0].numpy()
    return out.T.reshape(cae.DEEP, SIDE_PX, SIDE_PX)


if __name__ == "__main__":
    main()
