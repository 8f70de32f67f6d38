"""Detection by a network on a device, beside the CPU and beside a bare torch loop over the same windows, in one run.

The bare loop does what no detection can do without: windows to the device, the network, features back. Bounds (issue
4): probabilities as on the CPU to 1e-3, at most 1.15 of the bare loop, GPU busy for 80 % or more of the time. Without a
GPU the device is the CPU, and the GPU's share is not printed. Noise stands for a cube: no accuracy is in it.
Usage: make bench, or python tests/benchmarks/device_detect.py [--device cuda] [--side 2048]
"""

from __future__ import annotations

import argparse
import subprocess
import threading
import time
from typing import Self

import numpy as np
import torch
import xarray as xr
from scipy import ndimage

from slidecube.models.nets import cae
from slidecube.models.predict import UNIT_PX, predict
from slidecube.models.unsupervised import Kmeans
from slidecube.models.zoo import build_model

ROUNDS = 3


class Busy:
    """Share of the time in which a GPU computes, as its driver counts, sampled while a block runs."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        ask = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
        while not self._done.wait(0.2):
            said = subprocess.run(ask, capture_output=True, text=True, check=True)
            self.samples.append(float(said.stdout))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def fitted() -> Kmeans:
    """Fit a network and its clusters to noise, and name some of them."""
    rng = np.random.default_rng(0)
    quick = {"epochs": 1, "sample": 5000, "batch": 500}
    model = build_model("cae-kmeans", threshold=None, min_area_m2=None, parameters=quick)
    assert isinstance(model, Kmeans)
    side = model.card.window_px
    learned = model.fit(rng.normal(size=(5000, len(model.card.inputs.names), side, side)).astype(np.float32))
    return learned.with_landslide((0, 1, 2))


def bare(model: Kmeans, planes_fyx: np.ndarray, device: str) -> None:
    """Windows to the device, the network, features back; nothing else."""
    assert model.fitted is not None
    margin = model.card.window_px // 2
    side = UNIT_PX + 2 * margin
    for y in range(0, planes_fyx.shape[1] - side + 1, UNIT_PX):
        for x in range(0, planes_fyx.shape[2] - side + 1, UNIT_PX):
            cae.encode_dense(model.fitted.network, planes_fyx[:, y : y + side, x : x + side], device=device)


def objects(probability_yx: np.ndarray, threshold: float) -> int:
    """Count the connected pixels at or above the threshold."""
    return int(ndimage.label(probability_yx >= threshold)[1])


def main() -> None:
    """Print times, ratios and differences."""
    options = argparse.ArgumentParser()
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--side", type=int, default=1024)
    given = options.parse_args()
    there = fitted()
    here = there.on(given.device)
    name = torch.cuda.get_device_name() if given.device == "cuda" else "CPU, one thread"
    rng = np.random.default_rng(1)
    names, margin = here.card.inputs.names, here.card.window_px // 2
    planes = rng.normal(size=(len(names), given.side + 2 * margin, given.side + 2 * margin)).astype(
        np.float32
    )
    core = slice(margin, margin + given.side)
    cube = xr.Dataset({n: (("y", "x"), plane[core, core]) for n, plane in zip(names, planes, strict=True)})
    predict(here, cube.isel(y=slice(256), x=slice(256)))  # whatever is set up once
    taken: dict[str, list[float]] = {"detect": [], "bare loop": []}
    for _ in range(ROUNDS):
        for way, what in (
            ("detect", lambda: predict(here, cube)),
            ("bare loop", lambda: bare(here, planes, given.device)),
        ):
            began = time.perf_counter()
            what()
            taken[way].append(time.perf_counter() - began)
    medians = {way: float(np.median(seconds)) for way, seconds in taken.items()}
    for way, seconds in medians.items():
        print(f"{way:<12} {seconds / given.side**2 * 1e6:8.4f} s/Mpx on {name}")
    print(f"{'ratio':<12} {medians['detect'] / medians['bare loop']:8.2f} of the bare loop (bound 1.15)")
    if given.device == "cuda":
        with Busy() as busy:
            predict(here, cube)
        print(f"{'busy':<12} {np.mean(busy.samples):8.0f} % of the GPU (bound 80)")
        found, expected = (predict(model, cube)["probability"].to_numpy() for model in (here, there))
        print(f"{'apart':<12} {np.nanmax(np.abs(found - expected)):8.1e} in probability at most (bound 1e-3)")
        counts = [objects(p, here.card.threshold) for p in (found, expected)]
        print(f"{'objects':<12} {counts[0]} on the device, {counts[1]} on the CPU")


if __name__ == "__main__":
    main()
