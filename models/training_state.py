"""All that the next step of a training depends on, kept in one file, from which it goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from slidecube.models.train_settings import TrainSettings
from slidecube.models.weights import write_whole

Row = dict[str, float]
"""An epoch of the history; see `curves.COLUMNS`."""


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """A network in training, its optimiser, and what came of it so far.

    average : of the weights, which is judged in their place; None without one
    step : steps done; losses : (iterations,) float32, of the steps of this epoch, on the device
    rows : finished epochs; best : weights of the best one, best_row its place among them, -1 = none yet
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    losses: torch.Tensor
    step: int = 0
    rows: list[Row] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_row: int = -1

    @property
    def judged(self) -> nn.Module:
        """The network that is judged and kept."""
        return self.module if self.average is None else self.average.module

    def ended(self, settings: TrainSettings) -> bool:
        """Tell whether all epochs are done, or too many passed without a better one."""
        since = len(self.rows) - 1 - self.best_row
        return len(self.rows) >= settings.epochs or since >= settings.patience

    def close_epoch(self, row: Row) -> None:
        """Take an epoch's row, and its weights where it is better than all before it; the first one wins a tie."""
        self.rows.append(row)
        if self.best_row < 0 or row["f1"] > self.rows[self.best_row]["f1"]:
            self.best_row = len(self.rows) - 1
            self.best = {name: plain(tensor) for name, tensor in self.judged.state_dict().items()}

    def save(self, path: Path, origin: str) -> None:
        """Keep the state, whole or not at all; origin : digest of all that decides this training."""
        tensors = {f"network.{name}": tensor for name, tensor in self.module.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            for what, value in self.optimizer.state[parameter].items():
                if value is not None:
                    tensors[f"optimizer.{name}/{what}"] = value
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()} | {"losses": self.losses}
        plains = {name: plain(tensor) for name, tensor in tensors.items()}
        said = json.dumps(
            {
                "origin": origin,
                "step": self.step,
                "rows": self.rows,
                "best_row": self.best_row,
                "scaler": self.scaler.state_dict(),
            }
        )
        metadata = {"state": said, "sha256": _digest(said, plains)}
        write_whole(path, safetensors.torch.save(plains, metadata))

    def load(self, path: Path, origin: str) -> str:
        """Take up a kept state. Returns "" where it did or where there is none, else why it is not used."""
        if not path.exists():
            return ""
        try:
            said, tensors = _read(path)
        except (OSError, KeyError, ValueError, safetensors.SafetensorError):
            return "the kept state is damaged"
        if said["origin"] != origin:
            return "the kept state is of other data, settings, versions, threads or device"
        self.module.load_state_dict(_under("network.", tensors))
        if self.average is not None:
            self.average.load_state_dict(_under("average.", tensors))
        self._load_optimizer(_under("optimizer.", tensors))
        self.scaler.load_state_dict(said["scaler"])
        self.losses.copy_(tensors["losses"])
        self.best, self.step = _under("best.", tensors), said["step"]
        self.rows, self.best_row = said["rows"], said["best_row"]
        return ""

    def _load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill the optimiser's memory, laid out as it makes it itself: the layout decides the last bits."""
        parameters = dict(self.module.named_parameters())
        for key, tensor in tensors.items():
            name, what = key.rsplit("/", 1)
            parameter = parameters[name]
            if tensor.shape == parameter.shape and tensor.ndim:
                tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)  # noqa: PLW2901  same thing
            self.optimizer.state[parameter][what] = tensor


def new_state(
    module: nn.Module, settings: TrainSettings, *, iterations: int, device: torch.device
) -> TrainingState:
    """State before the first step; the module is on its device already."""
    average = None
    if settings.ema:
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))  # type: ignore[no-untyped-call]
    return TrainingState(
        module=module,
        optimizer=_optimizer(module.parameters(), settings),
        scaler=torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16"),
        average=average,
        losses=torch.zeros(iterations, device=device),
    )


def _optimizer(parameters: Iterable[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=rate, weight_decay=decay)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in main memory that shares nothing, as files want it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    content = path.read_bytes()
    tensors = safetensors.torch.load(content)
    head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    if head["sha256"] != _digest(head["state"], tensors):
        raise ValueError("sha256")
    said: dict[str, Any] = json.loads(head["state"])
    return said, tensors


def _digest(said: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(said.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
