"""Networks of segmentation_models.pytorch (smp), with any of its encoders and of timm's.

Nothing is ever downloaded: weights are fresh, and `models/pretrained.py` fills them from a file.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from slidecube.models.errors import ModelError
from slidecube.models.nets.batch_norm import make_patient
from slidecube.models.nets.padding import Padded

MULTIPLE_PX = 32
"""Five halvings; networks of fewer are padded no worse."""
_UNBUILDABLE = (
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    NotImplementedError,
    AttributeError,
    AssertionError,
)


def segmentation_library() -> ModuleType:
    """Import smp, which is an extra. Raises ModelError where it is not installed."""
    try:
        import segmentation_models_pytorch as smp  # noqa: PLC0415  an extra, and slow to import
    except ImportError:
        raise ModelError(
            "segmentation_models_pytorch is not installed; it comes with: pip install slidecube[nets]"
        ) from None
    module: ModuleType = smp
    return module


@lru_cache(maxsize=1)
def encoder_names() -> tuple[str, ...]:
    """Encoders by name: smp's own, and timm's as `tu-<name>`; what smp itself calls deprecated is left out."""
    segmentation_library()
    import timm  # noqa: PLC0415  comes with smp
    from segmentation_models_pytorch.encoders import get_encoder_names  # noqa: PLC0415

    own = [name for name in get_encoder_names() if not name.startswith("timm-")]
    return (*own, *(f"tu-{name}" for name in timm.list_models()))


def check_encoder(name: str) -> None:
    """Raise ModelError, with near matches, for an encoder that is not there."""
    names = encoder_names()
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f"near: {', '.join(near)}" if near else "for example: resnet18, mit_b0, tu-convnext_atto"
    raise ModelError(f"No encoder {name!r} among {len(names)} of smp and timm (tu-...); {hint}")


def build(kind: str, channels: int, *, encoder: str, **settings: Any) -> nn.Module:
    """Build a network of smp with fresh weights, that takes sides of any length and batches of one.

    kind : name of smp's class; settings : its own arguments
    Shape: (b, c, y, x) -> (b, 1, y, x) logits.
    Raises ModelError where smp is missing, does not know the encoder, or cannot join the two.
    """
    base: Any = getattr(segmentation_library(), kind)
    check_encoder(encoder)
    network_class = type(kind, (Padded, base), {})
    try:
        network: Any = network_class(
            encoder_name=encoder, encoder_weights=None, in_channels=channels, classes=1, **settings
        )
        network.multiple_px = MULTIPLE_PX
        # PAN pools three times behind a stride of 16; of less than 128 px nothing is left
        network.least_px = 128 if kind == "PAN" else MULTIPLE_PX
        shallow = settings.get("encoder_depth", 5) < 5
        if shallow or encoder.startswith("tu-"):
            _try(network, channels, freeze=shallow)
    except _UNBUILDABLE as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{kind} cannot be built with the encoder {encoder!r} and {settings}: {why[0]}"
        ) from None
    made: nn.Module = make_patient(network)
    return made


def _try(network: Any, channels: int, *, freeze: bool) -> None:
    """Compute once: some encoders of timm take one side only, and say so no earlier.

    freeze : take from training what a shallow encoder keeps and never computes; gradients in step would wait for it
    """
    network.eval()
    with torch.set_grad_enabled(freeze):
        logits = network(torch.zeros(1, channels, 2 * network.least_px, 3 * network.least_px))
    if freeze:
        logits.sum().backward()
        for parameter in network.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
    network.train()
