"""The training loop beside a minimal one, on the same network and patches in memory, the same threads, in one run.

The minimal loop holds all patches as one normalised tensor: index, forward, loss, backward, step; nothing is read,
checked, varied, kept or measured. Ours reads, checks, normalises, turns and flips each patch, and sums its losses. Both
in channels-last, in turns.
Usage: make bench, or python tests/benchmarks/train_speed.py [cpu|cuda]
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from slidecube.models.architectures import build_network
from slidecube.models.batches import normalise, survey
from slidecube.models.card import FeatureSpec
from slidecube.models.losses import loss_function
from slidecube.models.together import ALONE
from slidecube.models.train import Job, TrainSettings, _Loop, _network, fixed_threads
from slidecube.models.training_state import new_state

FEATURES = 8
ROUNDS = 3
NETWORKS = ("resunet", "unet", "pspnet")


@dataclass(frozen=True)
class InMemory:
    """Simulated patches in memory."""

    count: int
    patch_px: int
    features = FeatureSpec(
        names=(*(f"B0{i}_post" for i in range(1, FEATURES - 1)), "slope_deg", "aspect_deg")
    )
    units = ("1",) * FEATURES
    resolution_m = 10.0
    digest = "simulated"

    @property
    def regions(self) -> tuple[str, ...]:
        """One."""
        return ("simulated",) * self.count

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All of them."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(self.count, FEATURES, self.patch_px, self.patch_px)).astype(np.float32)
        return x, (x[:, 0] > 2).astype(np.uint8)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """One of them."""
        x, y = self.arrays
        return x[index], y[index]


def main(device: str = "cpu") -> None:
    """Time both in turns; print medians and the ratio."""
    side, batch, steps = (128, 32, 60) if device == "cuda" else (64, 8, 6)
    data = InMemory(count=64, patch_px=side)
    settings = TrainSettings(batch=batch, iterations=steps, device=device, learning_rate=1e-4, panel=0)  # type: ignore[arg-type]
    print(
        f"torch {torch.__version__}, {device}, patches of {side} px, {FEATURES} features, batch {batch}, 1 thread"
    )
    for name in NETWORKS:
        job = Job(
            architecture=name,
            arguments={},
            training=data,
            validation=data,
            settings=settings,
            folder=Path(tempfile.gettempdir()),
            initial=None,
            survey=survey(data, most=16, seed=0),
        )
        with fixed_threads(1):
            ways = {"ours": ours(job), "minimal": minimal(job)}
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(ROUNDS + 1):
                for way, run in ways.items():
                    start = time.perf_counter()
                    run()
                    if turn:  # the first one warms up
                        taken[way].append(time.perf_counter() - start)
        speed = {way: batch * steps / float(np.median(seconds)) for way, seconds in taken.items()}
        print(
            f"{name:>8}: ours {speed['ours']:7.1f} samples/s, minimal {speed['minimal']:7.1f}, "
            f"ratio {speed['ours'] / speed['minimal']:.2f}"
        )


def ours(job: Job):
    """Make a function that does an epoch's steps of our loop, without its validation."""
    device = torch.device(job.settings.device)
    state = new_state(_network(job, device), job.settings, iterations=job.iterations, device=device)
    loop = _Loop(job, state, ALONE, device)

    def run() -> None:
        loop.model.train()
        end = state.step + job.iterations
        made = loop._batches(range(state.step, end))
        for step in range(state.step, end):
            state.losses[step % job.iterations] = loop._step(step, made)
            state.step = step + 1
        loop._require_finite()

    return run


def minimal(job: Job):
    """Make a function that does as many steps of the minimal loop."""
    s, device = job.settings, torch.device(job.settings.device)
    x_nfyx, y_nyx = job.training.arrays  # type: ignore[attr-defined]
    ready = np.empty_like(x_nfyx)
    for x_fyx, out in zip(x_nfyx, ready, strict=True):
        normalise(x_fyx, job.survey.mean, job.survey.std, out)
    x, y = torch.from_numpy(ready).to(device), torch.from_numpy(y_nyx).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    network = (
        build_network(job.architecture, FEATURES, {}).to(device, memory_format=torch.channels_last).train()
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=s.learning_rate)
    loss_of = loss_function("bce")

    def run() -> None:
        for _ in range(job.iterations):
            chosen = torch.randint(len(x), (s.batch,), device=device)
            optimizer.zero_grad()
            loss_of(network(x[chosen].contiguous(memory_format=torch.channels_last)), y[chosen]).backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
