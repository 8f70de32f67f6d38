"""Weights to begin with: from a file, or from what the user's hub cache already holds. Nothing is ever downloaded.

Axes: o output map, c channel, k, l kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from slidecube.models.errors import ModelError
from slidecube.models.nets.segmentation import check_encoder, segmentation_library
from slidecube.models.weights import is_pickle

_PREFIXES = ("", "encoder.", "encoder.model.")
"""Where a file's names may belong: to the whole network, to smp's encoder, or to timm's inside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """What a file of weights filled.

    loaded : names that took the file's values; adapted : first layers, repeated over the channels; fresh : names that
    the file does not have; unused : names of the file that the network does not have
    """

    loaded: tuple[str, ...]
    adapted: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def load_pretrained(module: nn.Module, content: bytes) -> Pretrained:
    """Fill a network, in place, with weights of safetensors.

    The file may be of a whole network, or of an encoder as smp and timm name its weights; the decoder then stays
    fresh. A first layer for other channels is repeated over ours and divided by how often, so that the sum over
    channels stays what it was: what timm and smp do; a single channel takes the sum.
    Raises ModelError, and leaves the network as it was, where the file is none, fits nowhere, leaves a part of the
    encoder out, or has more of it (a larger encoder of the same family).
    """
    tensors = _tensors(content)
    wanted = {name: tensor for name, tensor in module.state_dict().items() if not _counts(name)}
    prefix = max(_PREFIXES, key=lambda prefix: sum(f"{prefix}{name}" in wanted for name in tensors))
    given = {f"{prefix}{name}": tensor for name, tensor in tensors.items() if not _counts(name)}
    loaded = {name: tensor for name, tensor in given.items() if name in wanted}
    # in the network's order: a safetensors file keeps none
    adapted = tuple(name for name in wanted if name in loaded and _other_channels(loaded[name], wanted[name]))
    for name in adapted:
        loaded[name] = adapt_channels(loaded[name], wanted[name].shape[1])
    report = Pretrained(
        loaded=tuple(name for name in wanted if name in loaded),
        adapted=adapted,
        fresh=tuple(name for name in wanted if name not in loaded),
        unused=tuple(sorted(name for name in given if name not in wanted)),
    )
    _check(report, loaded, wanted, prefix)
    module.load_state_dict(
        {**module.state_dict(), **{name: tensor.to(wanted[name].dtype) for name, tensor in loaded.items()}}
    )
    return report


def adapt_channels(weight_ockl: torch.Tensor, channels: int) -> torch.Tensor:
    """Repeat the weights of a first layer over other channels: (o, c, k, l) -> (o, channels, k, l)."""
    before = weight_ockl.shape[1]
    if channels == 1:
        return weight_ockl.sum(dim=1, keepdim=True)
    return weight_ockl[:, torch.arange(channels) % before] * (before / channels)


def _tensors(content: bytes) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError):
        if is_pickle(content):
            raise ModelError(
                "pretrained weights are a pickle that is called safetensors; if you trust where it comes from, save "
                "its tensors with safetensors.torch.save_file"
            ) from None
        raise ModelError("pretrained weights are no safetensors file, or a damaged one") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"pretrained weights: tensor {name} is not finite")
    return tensors


def _counts(name: str) -> bool:
    """Say whether it only counts the batches that a batch norm has seen."""
    return name.endswith("num_batches_tracked")


def _other_channels(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Say whether it is a convolution that differs in its input channels alone."""
    if given.ndim != 4 or wanted.ndim != 4 or given.shape[1] == wanted.shape[1]:
        return False
    return given.shape[0] == wanted.shape[0] and given.shape[2:] == wanted.shape[2:]


def _check(
    report: Pretrained, loaded: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], prefix: str
) -> None:
    if not loaded:
        raise ModelError(
            f"pretrained weights fit nowhere: the file holds {_some(report.unused)}, the network {_some(list(wanted))}"
        )
    for name, tensor in loaded.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, the network's {tuple(wanted[name].shape)}"
            raise ModelError(f"pretrained weights: the shape of {name} is {shapes}")
    first = next(name for name, tensor in wanted.items() if tensor.ndim == 4)
    for name in report.adapted:
        if wanted[name].shape[1] != wanted[first].shape[1] or first not in report.adapted:
            raise ModelError(f"pretrained weights: {name} has other channels, and is no first layer")
    missing = [name for name in report.fresh if name.startswith(prefix or "encoder.")]
    if missing:
        raise ModelError(f"pretrained weights leave a part of the encoder out: {_some(missing)}")
    # what is deeper than the encoder, and classes of photographs, are left; more of one of its parts is another encoder
    parts = {_part(name, prefix) for name in loaded}
    strangers = [name for name in report.unused if _part(name, prefix) in parts]
    if strangers:
        raise ModelError(f"pretrained weights hold what the network has not: {_some(strangers)}")


def _part(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).partition(".")[0]


def _some(names: tuple[str, ...] | list[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def cached_weights(encoder: str) -> bytes:
    """Return an encoder's ImageNet weights as `cached_file` finds them. Raises ModelError."""
    return cached_file(encoder).read_bytes()


def cached_file(encoder: str) -> Path:
    """Find an encoder's ImageNet weights in the user's hub cache, without any network.

    Raises ModelError where the encoder is unknown, was never published with weights, or is not in the cache.
    """
    check_encoder(encoder)
    repository, revision = _published(encoder)
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  comes with smp and timm
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:
        path = hf_hub_download(repository, "model.safetensors", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise ModelError(
            f"Weights of the encoder {encoder!r} ({repository}) are not in the hub cache of this machine, and nothing "
            "is downloaded; fetch them yourself, or name a file"
        ) from None
    return Path(path)


def _published(encoder: str) -> tuple[str, str | None]:
    """Repository of the hub, and its revision, that holds an encoder's weights."""
    if encoder.startswith("tu-"):
        import timm  # noqa: PLC0415  comes with smp

        about = timm.get_pretrained_cfg(encoder.removeprefix("tu-"), allow_unregistered=True)
        if about is not None and about.hf_hub_id:
            return str(about.hf_hub_id), None
    else:
        settings: Mapping[str, Mapping[str, str]] = segmentation_library().encoders.encoders[encoder][
            "pretrained_settings"
        ]
        named = settings.get("imagenet") or next(iter(settings.values()), {})
        if "repo_id" in named:
            return named["repo_id"], named["revision"]
    raise ModelError(f"Encoder {encoder!r} has no published weights; name a file")
