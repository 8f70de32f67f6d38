"""A trained network over patches: its logits, part by part, and the windows in which it will map.

Axes: n patch, y row, x column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import safetensors.torch
import torch
from torch import nn

from slidecube.models.architectures import build_network
from slidecube.models.network_card import Argument
from slidecube.models.patches import Patches
from slidecube.models.pretrained import cached_weights, load_pretrained
from slidecube.models.receptive import WINDOW_MAX_PX, receptive_px, window_for
from slidecube.models.train import fixed_threads, logits_of
from slidecube.models.weights import tensors_of

_PART = 128  # patches whose logits are in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedNetwork:
    """What came of a training: enough to compute with it.

    weights : safetensors; mean, std : of each feature
    """

    architecture: str
    arguments: Mapping[str, Argument]
    weights: bytes = field(repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def module(self) -> nn.Module:
        """Build it, in eval mode. Raises ModelError where the weights are not those of the architecture."""
        module = build_network(self.architecture, len(self.mean), self.arguments)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        tensors_of(self.weights, f"Weights of {self.architecture}", shapes)
        module.load_state_dict(safetensors.torch.load(self.weights))
        return module.eval()


def logits_in_parts(
    network: TrainedNetwork, patches: Patches, *, batch: int, device: str, threads: int
) -> Iterator[tuple[Sequence[int], np.ndarray, np.ndarray]]:
    """Yield patches, their logits (n, y, x) float32 and their labels (n, y, x) uint8, some at a time, in order."""
    module = network.module()
    for start in range(0, len(patches), _PART):
        part = range(start, min(start + _PART, len(patches)))
        found = logits_of(
            module, network.mean, network.std, patches, part, batch=batch, device=device, threads=threads
        )
        yield part, *found


def windows_of(
    architecture: str, arguments: Mapping[str, Argument], channels: int, *, patch_px: int
) -> tuple[int, int, int]:
    """Return side and margin of the windows in which it maps, and the receptive field that is measured, in pixels.

    The field follows from the architecture alone, whatever was learnt.
    """
    receptive = _receptive_px(architecture, tuple(sorted(arguments.items())), channels)
    return *window_for(receptive, patch_px=patch_px), receptive


@lru_cache(maxsize=64)
def _receptive_px(architecture: str, arguments: tuple[tuple[str, Argument], ...], channels: int) -> int:
    with fixed_threads(1), torch.random.fork_rng(devices=[]):
        return receptive_px(build_network(architecture, channels, dict(arguments)), channels, WINDOW_MAX_PX)


def count_weights(architecture: str, arguments: Mapping[str, Argument], channels: int) -> int:
    """Count the weights that a network learns."""
    # not on the device "meta": some networks measure themselves while they are built
    with torch.random.fork_rng(devices=[]):
        module = build_network(architecture, channels, arguments)
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def initial_weights(
    architecture: str,
    arguments: Mapping[str, Argument],
    channels: int,
    *,
    content: bytes | None,
    seed: int,
) -> bytes:
    """Fresh weights, filled from a file of a network or an encoder as far as it goes: safetensors.

    content : of the file; None = what the user's hub cache holds for the encoder
    Raises ModelError where it fits nowhere, or the cache holds none.
    """
    if content is None:
        content = cached_weights(str(arguments.get("encoder", architecture)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_network(architecture, channels, arguments)
    load_pretrained(module, content)
    return safetensors.torch.save(
        {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    )
