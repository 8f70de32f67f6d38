"""A trained network over patches: its logits, part by part, and the windows in which it will map.

Axes: n patch, y row, x column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import safetensors.torch
from torch import nn

from slidecube.models.architectures import build_network
from slidecube.models.network_card import Argument
from slidecube.models.patches import Patches
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


def windows_of(network: TrainedNetwork, *, patch_px: int, threads: int = 1) -> tuple[int, int, int]:
    """Return side and margin of the windows in which it maps, and the receptive field that was measured, in pixels.

    A field that reaches further than the window in which it is measured shows as the whole of it, so larger ones are
    tried in turn: a small network is known at a sixteenth of the cost.
    """
    module, receptive, side = network.module(), 0, WINDOW_MAX_PX // 4
    with fixed_threads(threads):
        while not receptive and side <= WINDOW_MAX_PX:
            receptive = receptive_px(module, len(network.mean), side)
            side *= 2
    return *window_for(receptive, patch_px=patch_px), receptive
