"""Devices on which networks compute."""

from __future__ import annotations

from typing import Literal

from slidecube.models.errors import ModelError

Device = Literal["cpu", "cuda"]


def require_device(device: str, *, table: str = "[detect]") -> None:
    """Raise ModelError, in one line, when torch cannot compute on a device here. table : of the TOML that names it."""
    if device == "cpu":
        return
    import torch  # noqa: PLC0415  it takes seconds

    if not torch.cuda.is_available():
        why = "finds no NVIDIA GPU" if torch.version.cuda else "was built without CUDA"
        raise ModelError(
            f"device = {device!r} needs a GPU, and torch {torch.__version__} {why} on this worker; "
            f"set device = 'cpu' in {table}, or run where there is one, such as profile 'dask-cuda'"
        )
