"""Sides of any length for networks that halve them.

Axes: b batch, c channel, y row, x column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class Padded(_Module):
    """A network in front of whose `forward` maps grow to a multiple of its stride, and shrink again behind it.

    It stands before the network among the bases of a class, so that names of weights stay as they are. What is added
    lies below and on the right, and is 0, the mean of every channel, as unknown pixels are: reflection would invent
    landslides in nodata.

    multiple_px : sides become multiples of it; least_px : and at least this. Sides that already are stay as they are.
    Shape: (b, c, y, x) -> (b, 1, y, x) for any y, x >= 1.
    """

    multiple_px: int
    least_px: int

    def forward(self, x_bcyx: torch.Tensor) -> torch.Tensor:
        """Compute logits: (b, c, y, x) -> (b, 1, y, x)."""
        y_px, x_px = x_bcyx.shape[-2:]
        below, right = self._missing_px(y_px), self._missing_px(x_px)
        if not below and not right:
            whole: torch.Tensor = super().forward(x_bcyx)
            return whole
        grown: torch.Tensor = super().forward(nn.functional.pad(x_bcyx, (0, right, 0, below)))
        return grown[..., :y_px, :x_px]

    def _missing_px(self, side_px: int) -> int:
        return max(-(-side_px // self.multiple_px) * self.multiple_px, self.least_px) - side_px
