"""Siamese difference: one encoder reads the ground before and after, and the decoder sees what changed.

Axes: b batch, c channel, y row, x column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from slidecube.models.nets.padding import Padded


class _Siamese(nn.Module):
    pre: torch.Tensor
    post: torch.Tensor

    def __init__(self, network: Any, channels: int, *, pre: Sequence[int], post: Sequence[int]) -> None:
        super().__init__()
        self.encoder: nn.Module = network.encoder
        self.decoder: nn.Module = network.decoder
        self.segmentation_head: nn.Module = network.segmentation_head
        shared = [index for index in range(channels) if index not in {*pre, *post}]
        # not among the weights: the card's arguments say them
        self.register_buffer("pre", torch.tensor([*pre, *shared]), persistent=False)
        self.register_buffer("post", torch.tensor([*post, *shared]), persistent=False)

    def forward(self, x_bcyx: torch.Tensor) -> torch.Tensor:
        # both in one batch: batch norm sees the two sides of a pair alike
        both = torch.cat([x_bcyx.index_select(1, self.pre), x_bcyx.index_select(1, self.post)])
        maps = []
        for map_bcyx in self.encoder(both):
            before, after = map_bcyx.chunk(2)
            maps.append((after - before).abs())
        maps[-1] = after
        logits_b1yx: torch.Tensor = self.segmentation_head(self.decoder(maps))
        return logits_b1yx


class Siamese(Padded, _Siamese):
    """FC-Siam-diff over the encoder and decoder of another network.

    The coarsest map is the one after, each skip the absolute difference of the two sides. Channels that are of neither
    side (terrain, differences) enter both.

    network : has encoder, decoder and segmentation_head, made for one side's channels; pre, post : indices of channels
    Shape: (b, c, y, x) -> (b, 1, y, x) logits.
    Reference: Daudt, Le Saux & Boulch 2018, Fully convolutional siamese networks for change detection, fig. 1c.
    """

    def __init__(self, network: Any, channels: int, *, pre: Sequence[int], post: Sequence[int]) -> None:
        super().__init__(network, channels, pre=pre, post=post)
        self.multiple_px, self.least_px = network.multiple_px, network.least_px
