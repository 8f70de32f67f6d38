"""What a training is told: one frozen table of numbers, from which its bits follow."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from slidecube.models.errors import ModelError

Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "cosine", "step"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentSettings:
    """How patches are varied; see `augment`.

    flips, turns : mirrored, and turned by quarters, at random
    jitter_gain, jitter_offset : standard deviations of the gain, and of the offset in standard deviations of the patch
    clouds, scars : share of patches with a pasted cloud, and with a landslide implanted from another patch
    """

    flips: bool = True
    turns: bool = True
    jitter_gain: float = 0.0
    jitter_offset: float = 0.0
    clouds: float = 0.0
    scars: float = 0.0

    def __post_init__(self) -> None:
        for name in ("clouds", "scars"):
            if not 0 <= getattr(self, name) <= 1:
                raise ModelError(f"{name} = {getattr(self, name)} is not allowed; a share from 0 to 1 is")
        for name in ("jitter_gain", "jitter_offset"):
            if not 0 <= getattr(self, name) < 1:
                raise ModelError(f"{name} = {getattr(self, name)} is not allowed; 0 to below 1 is")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a network is trained; defaults after Ganerod et al. 2023 (ENS), whose encoder and optimiser are not stated.

    loss : of `losses.LOSSES`, with its positive_weight and prior
    step_iterations, step_factor : of the schedule "step"; warmup : iterations in which the learning rate rises
    batch : patches of one step of the optimiser, in all parts and processes together; accumulate : parts that they are
        computed in, one after the other, each with a loss (and a batch norm) of its own
    iterations : steps of an epoch, 0 = every patch once; patience : epochs without a better validation F1 until the end
    ema : decay of the mean of the weights, which is what is judged and kept; 0 = the weights themselves
    clip_norm : largest norm of a gradient, 0 = any
    dtype : of the arithmetic; fp16 on cuda only
    threads : of torch, which decide the last bits; loaders : threads that read ahead, which do not
    processes : on one machine, each with a share of the batch and, on cuda, a GPU of its own
    timeout_s : after which a process that waits for a dead one gives up
    checkpoint_min : minutes between two kept states
    survey_patches : training patches that mean, standard deviation and donors of scars are taken from, at most
    tensorboard : event files are written, too; panel : best and worst patches in the picture
    """

    loss: str = "bce"
    positive_weight: float | None = None
    prior: float | None = None
    optimizer: Optimizer = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    step_iterations: int = 15_000
    step_factor: float = 0.1
    warmup: int = 0
    batch: int = 4
    accumulate: int = 1
    iterations: int = 1000
    epochs: int = 500
    patience: int = 50
    seed: int = 0
    ema: float = 0.0
    clip_norm: float = 0.0
    dtype: Precision = "fp32"
    compile: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    loaders: int = 2
    processes: int = 1
    timeout_s: float = 600.0
    checkpoint_min: float = 10.0
    survey_patches: int = 1000
    tensorboard: bool = False
    panel: int = 4
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ModelError(f"{name} = {getattr(self, name)!r} is not allowed; {', '.join(allowed)} are")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not (low <= value < high):
                text = f"{low} or more" if math.isinf(high) else f"{low} to below {high}"
                raise ModelError(f"{name} = {value} is not allowed; {text} is")
        if not self.learning_rate > 0:
            raise ModelError(f"learning_rate = {self.learning_rate} is not allowed; above 0 is")
        if self.batch % (self.accumulate * self.processes):
            raise ModelError(
                f"batch = {self.batch} cannot be shared by {self.processes} process(es) in {self.accumulate} "
                "part(s) each; make it a multiple"
            )
        if self.dtype == "fp16" and self.device != "cuda":
            raise ModelError("dtype = 'fp16' trains on device = 'cuda' only; set dtype = 'bf16' or 'fp32'")

    @property
    def part(self) -> int:
        """Patches that one process computes at once."""
        return self.batch // (self.accumulate * self.processes)

    def deciding(self) -> dict[str, Any]:
        """All that a training's bits depend on, JSON types."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_DECIDING}

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step of so many in all: a function of nothing else, so that it needs no state.

        Cosine: to 0 at the end, Loshchilov & Hutter 2017, eq. 5 without restarts. Warm-up: linear.
        """
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "cosine":
            warm *= 0.5 * (1 + math.cos(math.pi * step / steps))
        if self.schedule == "step":
            warm *= self.step_factor ** (step // self.step_iterations)
        return self.learning_rate * warm


_INF = math.inf
_CHOICES = {
    "optimizer": ("adam", "adamw", "sgd"),
    "schedule": ("constant", "cosine", "step"),
    "dtype": ("fp32", "bf16", "fp16"),
    "device": ("cpu", "cuda"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0, _INF),
    "momentum": (0, 1),
    "weight_decay": (0, _INF),
    "step_iterations": (1, _INF),
    "step_factor": (0, 1),
    "warmup": (0, _INF),
    "batch": (1, _INF),
    "accumulate": (1, _INF),
    "iterations": (0, _INF),
    "epochs": (1, _INF),
    "patience": (1, _INF),
    "seed": (0, _INF),
    "ema": (0, 1),
    "clip_norm": (0, _INF),
    "threads": (1, _INF),
    "loaders": (1, _INF),
    "processes": (1, _INF),
    "timeout_s": (1, _INF),
    "checkpoint_min": (0, _INF),
    "survey_patches": (1, _INF),
    "panel": (0, _INF),
}
_NOT_DECIDING = {"loaders", "timeout_s", "checkpoint_min", "tensorboard", "panel"}
