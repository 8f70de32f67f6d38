"""ResU-Net, the best network of Landslide4Sense, in plain torch.

Axes: b batch, c channel, y row, x column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from slidecube.models.nets.padding import Padded


class ResidualUnit(nn.Module):
    """Two 3 x 3 convolutions, each behind batch norm and ReLU, and a way around them.

    first : nothing stands before its first convolution, as in the first unit of the network
    Shape: (b, inputs, y, x) -> (b, outputs, y / stride, x / stride).
    Reference: He et al. 2016, Identity mappings, fig. 4e; Zhang et al. 2018, fig. 1b.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, first: bool = False) -> None:
        super().__init__()
        before = [] if first else [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(
            *before,
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.around = nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x_bcyx: torch.Tensor) -> torch.Tensor:
        """Compute maps."""
        around: torch.Tensor = self.around(x_bcyx)  # first: the body's ReLU must not change what it reads
        body: torch.Tensor = self.body(x_bcyx)
        return body + around


class Encoder(nn.Module):
    """Residual units, each but the first by steps of two.

    Shape: (b, c, y, x) -> maps of (b, width * 2**i, y / 2**i, x / 2**i) for i = 0 ... depth.
    """

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        inputs = (channels, *widths[:-1])
        self.units = nn.ModuleList(
            ResidualUnit(before, after, stride=2 if i else 1, first=not i)
            for i, (before, after) in enumerate(zip(inputs, widths, strict=True))
        )

    def forward(self, x_bcyx: torch.Tensor) -> list[torch.Tensor]:
        """Compute the maps of all scales, finest first."""
        maps = []
        for unit in self.units:
            x_bcyx = unit(x_bcyx)
            maps.append(x_bcyx)
        return maps


class Decoder(nn.Module):
    """Residual units over the nearest-neighbour enlarged coarser map beside the encoder's.

    Shape: maps of the encoder -> (b, width, y, x).
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            ResidualUnit(coarse + fine, fine)
            for coarse, fine in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Compute the finest map."""
        x_bcyx = maps[-1]
        for unit, skip_bcyx in zip(self.units, maps[-2::-1], strict=True):
            large_bcyx = nn.functional.interpolate(x_bcyx, scale_factor=2.0, mode="nearest")
            x_bcyx = unit(torch.cat([large_bcyx, skip_bcyx], dim=1))
        return x_bcyx


class _ResUnet(nn.Module):
    def __init__(self, channels: int, *, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.encoder = Encoder(channels, widths)
        self.decoder = Decoder(widths)
        self.segmentation_head = nn.Conv2d(width, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_bcyx: torch.Tensor) -> torch.Tensor:
        logits_b1yx: torch.Tensor = self.segmentation_head(self.decoder(self.encoder(x_bcyx)))
        return logits_b1yx


class ResUnet(Padded, _ResUnet):
    """U-Net of residual units with full pre-activation.

    The paper's has width 64 and depth 3 (8.2 M weights for three channels); width 16 has a sixteenth of them. The paper
    does not say how maps are enlarged: nearest neighbour, whose gradient has the same bits on every device.

    width : maps of the finest scale, doubled at each coarser one; depth : how often sides are halved
    Shape: (b, c, y, x) -> (b, 1, y, x) logits.
    Reference: Zhang, Liu & Wang 2018, Road extraction by deep residual U-Net, table I; in Landslide4Sense the best
    of eleven (Ghorbanzadeh et al. 2022, table 4).
    """

    def __init__(self, channels: int, *, width: int = 16, depth: int = 3) -> None:
        super().__init__(channels, width=width, depth=depth)
        self.multiple_px = self.least_px = 2**depth
