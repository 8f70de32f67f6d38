"""Files of what was learnt: safetensors only, which hold numbers and run nothing, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from slidecube.models.errors import ModelError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def read_file(path: Path, what: str) -> bytes:
    """Read a file; raises ModelError where it is missing."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{what} cannot be read from {path}: {error.strerror}") from None


def is_pickle(content: bytes) -> bool:
    """Tell whether a file is what torch.save writes, by its first bytes."""
    return content[:2] == b"PK" or content[:1] == b"\x80"


def tensors_of(content: bytes, what: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Take tensors out of a safetensors file, and exactly these.

    shapes : by name
    Raises ModelError when it is no such file, or a tensor is missing, too many, of another shape, or not finite.
    """
    try:
        tensors = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError):
        raise ModelError(f"{what} is no safetensors file, or a damaged one") from None
    if set(tensors) != set(shapes):
        names = ", ".join(sorted(set(tensors) ^ set(shapes)))
        raise ModelError(f"{what} holds other tensors than it should; missing or too many: {names}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ModelError(f"{what}: tensor {name} has the shape {tensors[name].shape} and not {shape}")
        if not np.isfinite(tensors[name]).all():
            raise ModelError(f"{what}: tensor {name} is not finite")
    return tensors
