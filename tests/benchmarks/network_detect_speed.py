"""Detection by a network beside a bare torch loop over the same windows in memory, in one run, on one core.

The bare loop cuts windows out of standardised planes and computes them, and does nothing else. Then the other backends
and dtypes, each with its largest difference in probability to torch in float32; and, where it is installed (extra
`bench`), terratorch's tiled inference around the same module. Bound (issue 6): .9 of the bare loop's throughput or
more. Seconds are of the CPU, because
a busy machine's clock tells of its other work. Noise stands for a cube: no accuracy is in it.
Usage: make bench, or python tests/benchmarks/network_detect_speed.py [--side 1024] [--architecture resunet]
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xarray as xr

from slidecube.models.architectures import build_network, complete_arguments
from slidecube.models.errors import ModelError
from slidecube.models.nets.cae import one_thread
from slidecube.models.network import Network, engine_of, network_module, standardised
from slidecube.models.network_card import NetworkCard
from slidecube.models.predict import predict

ROUNDS = 3
NAMES = ("rdndvi", "dndvi", "ndvi_pre", "ndvi_post", "slope_deg", "elevation")


def untrained(architecture: str, window_px: int, margin_px: int) -> Network:
    """Make a network with drawn weights."""
    torch.manual_seed(0)
    arguments = complete_arguments(architecture, NAMES)
    content = safetensors.torch.save(
        {
            k: v.contiguous()
            for k, v in build_network(architecture, len(NAMES), arguments).state_dict().items()
        }
    )
    n = len(NAMES)
    card = {
        "schema": 1, "name": "untrained", "version": 1, "description": "drawn weights", "licence": "CC0-1.0",
        "inputs": {"names": NAMES, "units": ("1",) * n, "mean": (0.0,) * n, "std": (1.0,) * n},
        "architecture": {
            "name": architecture, "arguments": arguments, "window_px": window_px, "margin_px": margin_px,
        },
        "output": {"threshold": 0.5},
        "weights": {"file": "w.safetensors", "sha256": hashlib.sha256(content).hexdigest()},
    }  # fmt: skip
    return Network.of(NetworkCard.model_validate(card), content)


def starts(network: Network, side_px: int) -> list[int]:
    """First pixels of the windows that touch a cube which begins at global pixel 0."""
    lattice = network.lattice
    least = -((lattice.side_px - 1) // lattice.stride_px) * lattice.stride_px
    return list(range(least, side_px, lattice.stride_px))


def bare(module: torch.nn.Module, network: Network, x_cyx: np.ndarray, side_px: int) -> None:
    """Cut windows out of padded planes and compute them, one at a time."""
    px, pad = network.lattice.side_px, network.lattice.side_px
    planes = torch.from_numpy(x_cyx)
    with one_thread(), torch.inference_mode():
        for top in starts(network, side_px):
            for left in starts(network, side_px):
                window = planes[None, :, top + pad : top + pad + px, left + pad : left + pad + px]
                module(window.contiguous(memory_format=torch.channels_last))


def terratorch_way(module: torch.nn.Module, network: Network, x_cyx: np.ndarray, side_px: int) -> None:
    """Compute terratorch's tiled inference over the same planes, with the same windows and overlaps."""
    from terratorch.tasks.tiled_inference import tiled_inference

    px, stride, pad = network.lattice.side_px, network.lattice.stride_px, network.lattice.side_px
    core = torch.from_numpy(x_cyx[None, :, pad : pad + side_px, pad : pad + side_px].copy())
    with one_thread(), torch.inference_mode():
        tiled_inference(module, core, out_channels=1, h_crop=px, w_crop=px, h_stride=stride, w_stride=stride)


def detected(network: Network, cube: xr.Dataset) -> np.ndarray:
    """Probability of a cube in memory."""
    found: np.ndarray = predict(network, cube)["probability"].to_numpy()
    return found


def timed(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Least CPU time of each way in a few rounds, one way after another in each, in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, what in ways.items():
            began = time.process_time()
            what()
            seconds[name].append(time.process_time() - began)
    return {name: min(taken) for name, taken in seconds.items()}


def others(network: Network, *, compiled: bool) -> dict[str, Network]:
    """The same network by other backends and in other numbers, as far as they are installed."""
    found = {}
    for backend, dtype in (("torch", "bfloat16"), ("torch", "float16"), ("onnx", None), ("compile", None)):
        if backend == "compile" and not compiled:
            continue
        try:
            other = network.computed_by(backend, dtype)  # type: ignore[arg-type]
            engine_of(other)
        except ModelError as error:
            print(f"{backend}: {error}")
            continue
        found[f"detection, {backend} {dtype or 'float32'}"] = other
    return found


def main() -> None:
    """Print times, ratios, differences and the peak of memory."""
    options = argparse.ArgumentParser()
    options.add_argument("--side", type=int, default=768)
    options.add_argument("--architecture", default="resunet")
    options.add_argument("--window", type=int, default=256)
    options.add_argument("--margin", type=int, default=32)
    options.add_argument("--compile", action="store_true")
    given = options.parse_args()
    network = untrained(given.architecture, given.window, given.margin)
    rng = np.random.default_rng(1)
    cube = xr.Dataset(
        {name: (("y", "x"), rng.normal(size=(given.side, given.side)).astype(np.float32)) for name in NAMES}
    )
    planes = [cube[name].to_numpy() for name in NAMES]
    x_cyx = np.moveaxis(standardised(planes, network.about.inputs.mean, network.about.inputs.std), 2, 0)
    x_cyx = np.pad(x_cyx, ((0, 0), (given.window,) * 2, (given.window,) * 2))
    module = network_module(network.about, network.weights).to(memory_format=torch.channels_last)
    made = others(network, compiled=given.compile)
    want = detected(network, cube)
    apart = {name: float(np.nanmax(np.abs(detected(one, cube) - want))) for name, one in made.items()}
    ways: dict[str, Callable[[], Any]] = {
        "bare torch loop": partial(bare, module, network, x_cyx, given.side),
        "detection, float32": partial(detected, network, cube),
        **{name: partial(detected, one, cube) for name, one in made.items()},
    }
    try:
        terratorch_way(module, network, x_cyx, given.side)
        ways["terratorch, tiled"] = partial(terratorch_way, module, network, x_cyx, given.side)
    except ImportError as error:
        print(f"terratorch is not installed ({error}): pip install -e '.[bench]'")
    taken = timed(ways)
    windows = len(starts(network, given.side)) ** 2
    print(
        f"{given.architecture}: {windows} windows of {given.window} px, margins of {given.margin} px, one core"
    )
    print(
        f"{'':<28} {'s/window':>9} {'throughput: of the loop':>24} {'of detection':>13} {'apart at most':>14}"
    )
    for name, seconds in taken.items():
        loop, own = taken["bare torch loop"] / seconds, taken["detection, float32"] / seconds
        difference = f"{apart[name]:>14.1e}" if name in apart else ""
        print(f"{name:<28} {seconds / windows:>9.4f} {loop:>24.2f} {own:>13.2f} {difference}")
    print(f"{'peak memory':<28} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:>9.2f} GiB")


if __name__ == "__main__":
    main()
