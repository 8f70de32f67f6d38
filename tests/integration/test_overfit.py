"""Opt-in: every architecture learns eight patches by heart, of simulated blobs, in a bounded number of steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from slidecube.models.architectures import ARCHITECTURES, build_network, complete_arguments
from slidecube.models.losses import loss_function
from slidecube.models.nets.cae import one_thread

FEATURES = ("B04_pre", "B04_post", "B08_pre", "B08_post", "slope_deg")
PATCHES, SIDE_PX = 8, 64
STEPS_MAX, CHECK_STEPS = 500, 20
ENCODERS = {"segformer": "mit_b0"}
SMALL_ENCODER = "tu-mobilenetv3_small_050"


def ellipses(rng):
    """(y, x) bool: one ellipse somewhere."""
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    middle_y, middle_x = rng.uniform(16, 48, 2)
    axis_y, axis_x = rng.uniform(8, 16, 2)
    return ((y - middle_y) / axis_y) ** 2 + ((x - middle_x) / axis_x) ** 2 < 1


def beside(other_yx, rng):
    """(y, x) bool: an ellipse that shares no pixel with another."""
    while ((drawn_yx := ellipses(rng)) & other_yx).any():
        pass
    return drawn_yx


def simulated_patches(seed=0):
    """Patches with a scar that is there only afterwards, and a bare field elsewhere that was there before.

    Networks of an output stride of 8 cannot draw what is left of a scar that a field cuts: they share no pixel.
    Returns (n, c, y, x) float32 and (n, y, x) uint8.
    """
    rng = np.random.default_rng(seed)
    x_ncyx = rng.normal(0, 0.3, (PATCHES, len(FEATURES), SIDE_PX, SIDE_PX)).astype(np.float32)
    scars = np.stack([ellipses(rng) for _ in range(PATCHES)])
    fields = np.stack([beside(scar, rng) for scar in scars])
    x_ncyx[:, 0] += 1.5 * fields
    x_ncyx[:, 1] += 1.5 * (fields | scars)
    x_ncyx[:, 2] -= 1.5 * fields
    x_ncyx[:, 3] -= 1.5 * (fields | scars)
    return torch.from_numpy(x_ncyx), torch.from_numpy(scars.astype(np.uint8))


def f1(module, x_ncyx, labels_nyx):
    module.eval()
    with torch.inference_mode():
        called = module(x_ncyx)[:, 0] > 0
    module.train()
    truth = labels_nyx == 1
    return float(2 * (called & truth).sum() / (called.sum() + truth.sum()).clamp(min=1))


def learn(module, x_ncyx, labels_nyx):
    """Steps until it knows the patches by heart, and its F1."""
    loss = loss_function("bce+dice")
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS_MAX)
    for step in range(1, STEPS_MAX + 1):
        optimizer.zero_grad()
        loss(module(x_ncyx), labels_nyx).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % CHECK_STEPS == 0 and (score := f1(module, x_ncyx, labels_nyx)) >= 0.95:
            return step, score
    return STEPS_MAX, f1(module, x_ncyx, labels_nyx)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eight_patches_are_learnt_by_heart(name):
    arguments = {}
    if "encoder" in ARCHITECTURES[name].arguments:
        arguments["encoder"] = ENCODERS.get(name, SMALL_ENCODER)
    x_ncyx, labels_nyx = simulated_patches()
    torch.manual_seed(0)
    module = build_network(name, len(FEATURES), complete_arguments(name, FEATURES, arguments))
    assert f1(module, x_ncyx, labels_nyx) < 0.8
    with one_thread():
        steps, score = learn(module.train(), x_ncyx, labels_nyx)
    print(f"{name}: F1 {score:.3f} after {steps} steps", flush=True)
    assert score >= 0.95
