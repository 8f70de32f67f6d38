"""Small networks of fresh weights, as tests need them: saved in a moment, and of no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from slidecube.models.architectures import build_network
from slidecube.models.network_card import NetworkCard
from slidecube.models.registry import save_network
from slidecube.pipeline.features import feature

ARGUMENTS = {"width": 8, "depth": 2}


def fields(**changes: Any) -> dict[str, Any]:
    """Fields of a card without weights."""
    names = changes.pop("names", ["rdndvi", "slope_deg"])
    return {
        "name": "small",
        "version": 1,
        "description": "Fresh weights of a test",
        "licence": "CC0-1.0",
        "simulated": True,
        "inputs": {
            "names": names,
            "units": [feature(name).unit for name in names],
            "mean": [0.0] * len(names),
            "std": [10.0] * len(names),
        },
        "architecture": {"name": "resunet", "arguments": ARGUMENTS, "window_px": 64, "margin_px": 8},
        "output": {"threshold": 0.5, "min_area_m2": 500.0},
        "metrics": {"f1": 0.25},
        **changes,
    }


def module(channels: int = 2, seed: int = 0) -> torch.nn.Module:
    """The network itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network("resunet", channels, ARGUMENTS).eval()


def weights(channels: int = 2, seed: int = 0) -> bytes:
    """Content of a file of weights."""
    return safetensors.torch.save(module(channels, seed).state_dict())


def save(root: Path, *, seed: int = 0, **changes: Any) -> NetworkCard:
    """Save one into a root, under its address."""
    said = fields(**changes)
    folder = root / f"{said['name']}@{said['version']}"
    return save_network(folder, said, weights(len(said["inputs"]["names"]), seed))
