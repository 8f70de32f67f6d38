"""Architectures: name -> builder, one explicit table; each takes any number of channels and gives one map of logits.

Axes: b batch, c channel, y row, x column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from slidecube.models.errors import ModelError
from slidecube.models.network_card import Argument

Build = Callable[..., nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One row of the table.

    build : (channels, **arguments) -> module, (b, c, y, x) float32 -> (b, 1, y, x) logits; sides are multiples of
        `multiple_px`
    arguments : that a user may set, with their defaults; source : paper
    """

    build: Build
    multiple_px: int = 32
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    source: str = ""


def _smp(name: str) -> Build:
    def build(channels: int, *, encoder: str) -> nn.Module:
        import segmentation_models_pytorch as smp  # noqa: PLC0415  an extra, and slow to import

        made: nn.Module = getattr(smp, name)(
            encoder_name=encoder, encoder_weights=None, in_channels=channels, classes=1
        )
        return made

    return build


ARCHITECTURES: Mapping[str, Architecture] = {
    "unet": Architecture(build=_smp("Unet"), arguments={"encoder": "resnet18"}),
    "fpn": Architecture(build=_smp("FPN"), arguments={"encoder": "resnet18"}),
    "pspnet": Architecture(build=_smp("PSPNet"), arguments={"encoder": "resnet18"}),
}


def build_network(name: str, channels: int, arguments: Mapping[str, Argument] | None = None) -> nn.Module:
    """Build a network with fresh weights; the caller seeds torch.

    Raises ModelError for an unknown name, unknown arguments, or channels that it cannot take.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"No architecture {name!r}; architectures: {', '.join(ARCHITECTURES)}")
    row = ARCHITECTURES[name]
    return row.build(channels, **{**row.arguments, **(arguments or {})})
