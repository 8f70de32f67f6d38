"""Training of a network: one loop, which ends in the same bits however often it was killed on the way.

What is drawn, how it is varied and torch's own random numbers follow from the seed and the step alone, so that a kept
state needs to hold none of them. Bits are promised on the CPU at a fixed number of threads; on a GPU some kernels add
in an order of their own.
Axes: n patch, b patch of a batch, f feature, y row, x column.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from slidecube.models import curves
from slidecube.models.architectures import build_network, complete_arguments
from slidecube.models.augment import augmented
from slidecube.models.batches import (
    Batch,
    Sampler,
    Survey,
    ahead,
    empty_batch,
    normalise,
    read_patch,
    require_judgeable,
    survey,
    torch_seed,
    validation_batches,
)
from slidecube.models.devices import require_device
from slidecube.models.errors import DivergedError, ModelError
from slidecube.models.losses import loss_function
from slidecube.models.network_card import Argument
from slidecube.models.patches import LANDSLIDE, Patches
from slidecube.models.thresholds import best_threshold, empty_histogram, logit_histogram
from slidecube.models.together import ALONE, Peers, require_devices, run_together
from slidecube.models.train_settings import AugmentSettings, TrainSettings
from slidecube.models.training_state import Row, TrainingState, new_state
from slidecube.models.weights import tensors_of

__all__ = ["TRAIN_VERSION", "AugmentSettings", "Progress", "TrainSettings", "Trained", "logits_of", "train"]

TRAIN_VERSION = 2
"""Of this loop: part of the key of every training."""
STATE_FILE, HISTORY_FILE, PANEL_FILE = "state.safetensors", "history.parquet", "panel.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What came of a training.

    weights : safetensors of the best epoch; mean, std : (f,) of the normalisation; threshold, score : of that epoch, F1
        on validation at its best threshold; epoch : the best one, counted from 1; epochs_run : in all
    history : Parquet of `curves.COLUMNS`
    """

    weights: bytes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    threshold: float
    score: float
    epoch: int
    epochs_run: int
    history: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A line for people, and the epoch that it tells of; row : of the history, None where it is about none."""

    text: str
    epoch: int = 0
    epochs: int = 0
    row: Row | None = None


Told = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training that is checked and may start: what each of its processes is given."""

    architecture: str
    arguments: Mapping[str, Argument]
    training: Patches
    validation: Patches
    settings: TrainSettings
    folder: Path
    initial: bytes | None
    survey: Survey

    @property
    def iterations(self) -> int:
        """Steps of an epoch."""
        return self.settings.iterations or -(-len(self.training) // self.settings.batch)

    @property
    def origin(self) -> str:
        """Digest of all that decides the bits of its result."""
        decides = {
            "version": TRAIN_VERSION,
            "torch": torch.__version__,
            "architecture": [self.architecture, dict(sorted(self.arguments.items()))],
            "settings": self.settings.deciding(),
            "features": asdict(self.training.features),
            "data": [self.training.digest, self.validation.digest],
            "initial": hashlib.sha256(self.initial).hexdigest() if self.initial else "",
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def train(
    architecture: str,
    arguments: Mapping[str, Argument],
    training: Patches,
    validation: Patches,
    settings: TrainSettings,
    *,
    folder: Path,
    initial: bytes | None = None,
    progress: Told | None = None,
) -> Trained:
    """Train a network; trainings of one process wait for each other, because torch's random numbers are the process's.

    folder : of its state, history and picture. A training that was killed goes on from there and ends in the same
        weights and curves as one that was not (on the CPU); a finished one is not repeated. A state of other data,
        settings or versions, or a damaged one, is not used, and `progress` is told so.
    initial : safetensors of weights to start from; progress : told of each epoch
    Raises ModelError, in one line, before it starts: for data that nothing can be learnt from or judged by, settings
    that do not fit; and on the way: for a damaged patch, and DivergedError for a loss that is not finite.
    """
    require_device(settings.device, table="[training]")
    require_devices(settings)
    require_alike(training, validation)
    require_judgeable(validation, "validation")
    job = Job(
        architecture=architecture,
        arguments=complete_arguments(architecture, training.features.names, arguments),
        training=training,
        validation=validation,
        settings=settings,
        folder=folder,
        initial=initial,
        survey=survey(training, most=settings.survey_patches, seed=settings.seed),
    )
    told = progress or (lambda _: None)
    if settings.processes > 1:
        run_together(job, settings.processes, lambda news: told(Progress(**news)))
    return run(job, told)


def run(job: Job, told: Told, peers: Peers = ALONE) -> Trained:
    """Run a checked training to its end; a finished one is taken from its state."""
    settings = job.settings
    device = peers.device(settings.device)
    with _one_at_a_time(settings, device), _in_one_line(settings):
        _seed_torch(device, settings.seed)
        module = peers.prepared(_network(job, device), device)
        state = new_state(module, settings, iterations=job.iterations, device=device)
        unused = state.load(job.folder / STATE_FILE, job.origin)
        if unused and not peers.rank:
            told(Progress(text=f"{unused[0].upper()}{unused[1:]} and not used: the training starts anew"))
        drawn = state.ended(settings) and (job.folder / PANEL_FILE).exists()  # or it was killed just before
        if not state.ended(settings):
            loop = _Loop(job, state, peers, device)
            while not state.ended(settings):
                loop.epoch()
                if not peers.rank:
                    told(_news(state, settings))
            loop.save()
        if settings.panel and not drawn and not peers.rank:
            _picture(job, state, device)
    return _trained(job, state)


class _Loop:
    """The steps of a training and what is done between them."""

    def __init__(self, job: Job, state: TrainingState, peers: Peers, device: torch.device) -> None:
        self.job, self.state, self.peers, self.device = job, state, peers, device
        self.settings = s = job.settings
        self.layout = _layout(state.module, device)
        model = peers.joined(state.module)
        self.model: nn.Module = torch.compile(model) if s.compile else model  # type: ignore[assignment]
        self.loss = loss_function(s.loss, positive_weight=s.positive_weight, prior=s.prior)
        self.sampler = Sampler(patches=len(job.training), seed=s.seed)
        self.saved = time.monotonic()
        self.write: Callable[[Row], None] = lambda _: None
        if s.tensorboard and not peers.rank:
            self.write = curves.open_events(job.folder / "tensorboard", done=len(state.rows))

    def epoch(self) -> None:
        """Do the steps that are left of an epoch, and judge it."""
        start, state, n = time.monotonic(), self.state, self.job.iterations
        end = (len(state.rows) + 1) * n
        self.model.train()
        batches = self._batches(range(state.step, end))
        for step in range(state.step, end):
            state.losses[step % n] = self._step(step, batches)
            state.step = step + 1
            if time.monotonic() - self.saved >= 60 * self.settings.checkpoint_min:
                self.save()
        self._require_finite()
        row = {
            "epoch": len(state.rows) + 1,
            "iteration": state.step,
            "loss": float(state.losses.double().mean()),
            "learning_rate": self.settings.rate(end - 1, n * self.settings.epochs),
            **self._judged(),
            "seconds": time.monotonic() - start,
        }
        state.close_epoch(row)
        if not self.peers.rank:
            curves.write_history(self.job.folder / HISTORY_FILE, state.rows)
            self.write(row)

    def _step(self, step: int, batches: Iterator[Batch]) -> torch.Tensor:
        """One step of the optimiser; returns the mean loss of its parts."""
        s, state = self.settings, self.state
        for group in state.optimizer.param_groups:
            group["lr"] = s.rate(step, self.job.iterations * s.epochs)
        state.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for part in range(s.accumulate):
            x_bfyx, y_byx = next(batches)
            _seed_torch(self.device, torch_seed(s.seed, step, part, self.peers.rank))
            last = part == s.accumulate - 1
            with nullcontext() if last else self.peers.apart(self.model):
                with _autocast(s, self.device):
                    logits = self.model(x_bfyx)
                loss = self.loss(logits.float(), y_byx) / s.accumulate
                state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if s.clip_norm:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.module.parameters(), s.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            state.average.update_parameters(state.module)
        return self.peers.mean(total)

    def _batches(self, steps: range) -> Iterator[Batch]:
        """Batches of steps, part after part, this process's share of each, made in threads."""
        s = self.settings
        firsts = (
            step * s.batch + (part * s.processes + self.peers.rank) * s.part
            for step in steps
            for part in range(s.accumulate)
        )
        draws = (range(first, first + s.part) for first in firsts)
        for x_bfyx, y_byx in ahead(self._batch, draws, threads=s.loaders):
            yield x_bfyx.to(self.device, non_blocking=True), y_byx.to(self.device, non_blocking=True)

    def _batch(self, draws: Sequence[int]) -> Batch:
        """Read, vary and normalise the patches of some draws."""
        training, s, seen = self.job.training, self.settings, self.job.survey
        names = training.features.names
        x_bfyx, y_byx = empty_batch(
            len(draws),
            len(names),
            training.patch_px,
            layout=self.layout,
            pinned=self.device.type != "cpu",
        )
        for i, draw in enumerate(draws):
            x_fyx, y_yx = read_patch(training, self.sampler.patch(draw), seed=self.sampler.crop(draw))
            x_fyx, y_byx[i].numpy()[...] = augmented(
                x_fyx, y_yx, names, self.sampler.augment(draw), settings=s.augment, donor=self._donor
            )
            normalise(x_fyx, seen.mean, seen.std, x_bfyx[i].numpy())
        return x_bfyx, y_byx

    def _donor(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw a patch with a landslide."""
        donors = self.job.survey.donors
        return read_patch(self.job.training, donors[int(rng.integers(len(donors)))])

    def _judged(self) -> Row:
        """Loss on validation, and F1 at its best threshold."""
        job, s = self.job, self.settings
        counts, loss = empty_histogram(), np.zeros(1)
        module = self.state.judged.eval()
        self.peers.share_buffers(module)
        batches = validation_batches(
            job.validation,
            range(self.peers.rank, len(job.validation), self.peers.size),
            mean=job.survey.mean,
            std=job.survey.std,
            batch=s.part,
            device=self.device,
            layout=self.layout,
            loaders=s.loaders,
        )
        for part, logits_b1yx, y_byx in _logits(module, batches):
            counts += logit_histogram(logits_b1yx.cpu().numpy(), y_byx.cpu().numpy())
            loss += float(self.loss(logits_b1yx, y_byx)) * len(part)
        counts, loss = (self.peers.total(one, self.device) for one in (counts, loss))
        return {"validation_loss": float(loss[0]) / len(job.validation), **asdict(best_threshold(counts))}

    def save(self) -> None:
        """Keep the state."""
        self._require_finite()
        if not self.peers.rank:
            self.state.save(self.job.folder / STATE_FILE, self.job.origin)
        self.saved = time.monotonic()

    def _require_finite(self) -> None:
        done = (self.state.step - 1) % self.job.iterations + 1 if self.state.step else 0
        bad = torch.nonzero(~torch.isfinite(self.state.losses[:done]))
        if len(bad):
            raise _diverged(self.settings, f"iteration {int(bad[0]) + 1} of epoch {len(self.state.rows) + 1}")


def _diverged(settings: TrainSettings, where: str) -> DivergedError:
    also = "" if settings.dtype == "fp32" else ", or dtype = 'fp32'"
    return DivergedError(
        f"The loss is not finite in {where}; lower learning_rate ({settings.learning_rate}), or set warmup or "
        f"clip_norm = 1{also}"
    )


def logits_of(
    module: nn.Module,
    mean: Sequence[float] | np.ndarray,
    std: Sequence[float] | np.ndarray,
    patches: Patches,
    indices: Sequence[int],
    *,
    batch: int = 8,
    device: str = "cpu",
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of patches beside their labels: (n, y, x) float32 and (n, y, x) uint8, in the order of the indices.

    module : put on the device and into eval mode. Labels are IGNORE where an input is unknown.
    Memory: 5 bytes a pixel for what is returned, 65 MB for 800 patches of 128 px, and a few batches of features; give
    indices in parts where that is too much. Equal batch, threads and torch give equal bits on the CPU.
    Raises ModelError for a damaged patch, and for logits that are not finite.
    """
    module.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    side = patches.patch_px
    logits_nyx = np.empty((len(indices), side, side), np.float32)
    labels_nyx = np.empty((len(indices), side, side), np.uint8)
    batches = validation_batches(
        patches,
        indices,
        mean=np.asarray(mean, np.float32),
        std=np.asarray(std, np.float32),
        batch=batch,
        device=torch.device(device),
    )
    at = 0
    with fixed_threads(threads):
        for part, logits_b1yx, y_byx in _logits(module, batches):
            here = slice(at, at := at + len(part))
            logits_nyx[here], labels_nyx[here] = logits_b1yx[:, 0].cpu().numpy(), y_byx.cpu().numpy()
    return logits_nyx, labels_nyx


def _logits(
    module: nn.Module, batches: Iterator[tuple[Sequence[int], Batch]]
) -> Iterator[tuple[Sequence[int], torch.Tensor, torch.Tensor]]:
    """Float32 logits and labels, batch by batch, without what a batch was filled up with."""
    with torch.no_grad():
        for part, (x_bfyx, y_byx) in batches:
            logits_b1yx = module(x_bfyx)[: len(part)].float()
            if not torch.isfinite(logits_b1yx).all():
                raise DivergedError(f"The network's logits of patch {part[0]} or one after it are not finite")
            yield part, logits_b1yx, y_byx[: len(part)]


def _network(job: Job, device: torch.device) -> nn.Module:
    """Build the network, with the initial weights if there are any."""
    module = build_network(job.architecture, len(job.training.features.names), job.arguments)
    if job.initial is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        tensors_of(job.initial, "The initial weights", shapes)
        module.load_state_dict(safetensors.torch.load(job.initial))
    placed: nn.Module = module.to(device=device, memory_format=_layout(module, device))  # type: ignore[call-overload]
    return placed


_NARROW = 8
"""Channels; see `_layout`."""


def _layout(module: nn.Module, device: torch.device) -> torch.memory_format:
    """Order of memory: channels last, in which convolutions are faster, wherever that is safe.

    On the CPU, torch (2.15) writes past the end of its memory in the backward pass of a 1 x 1 convolution by steps of
    two in that order, where it has 4 or 8 input channels (not where it has 9 or more): in narrow ResU-Nets.
    """
    narrow = device.type == "cpu" and any(
        max(one.stride) > 1 and max(one.kernel_size) == 1 and one.in_channels <= _NARROW
        for one in module.modules()
        if isinstance(one, nn.Conv2d)
    )
    return torch.contiguous_format if narrow else torch.channels_last


def require_alike(training: Patches, validation: Patches) -> None:
    """Raise ModelError unless both kinds of patches have the same features, pixels and side."""
    for what in ("features", "units", "resolution_m", "patch_px"):
        ours, theirs = getattr(training, what), getattr(validation, what)
        if ours != theirs:
            raise ModelError(
                f"Training patches have {what} {ours} and validation patches {theirs}; one is needed"
            )


def _seed_torch(device: torch.device, seed: int) -> None:
    """Seed the generators that are used; torch.manual_seed keeps a traceback of every call where CUDA sleeps."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _autocast(settings: TrainSettings, device: torch.device) -> torch.autocast | nullcontext[None]:
    if settings.dtype == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.float16 if settings.dtype == "fp16" else torch.bfloat16)


_TRAINING = threading.Lock()


@contextmanager
def _one_at_a_time(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Hold the process's random numbers and threads, and put them back."""
    with (
        _TRAINING,
        torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),
        fixed_threads(settings.threads),
    ):
        yield


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """Let torch compute on so many threads, and put the number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _in_one_line(settings: TrainSettings) -> Iterator[None]:
    """Say in one line what a user can change."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ModelError(
            f"The GPU's memory is too small for {settings.part} patches at once; raise accumulate, or lower batch"
        ) from None
    except OSError as error:
        raise ModelError(f"The training cannot go on: {error.filename or error}: {error.strerror}") from None
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ModelError(
            f"{settings.part} patch(es) at once are too few for this network's batch norm; raise batch, or lower "
            "accumulate or processes"
        ) from None


def _picture(job: Job, state: TrainingState, device: torch.device) -> None:
    """Draw the best and the worst validation patches of the best epoch, a part of them in memory at once."""
    seen, patches, s = job.survey, job.validation, job.settings
    module = state.judged
    module.load_state_dict(state.best)
    threshold = state.rows[state.best_row]["threshold"]

    def logits(indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return logits_of(
            module, seen.mean, seen.std, patches, indices, batch=s.part, device=str(device), threads=s.threads
        )

    parts = [range(i, min(i + 64, len(patches))) for i in range(0, len(patches), 64)]
    scored = []
    for part in parts:
        logits_nyx, labels_nyx = logits(part)
        holds = (labels_nyx == LANDSLIDE).any(axis=(1, 2))
        scored.append((curves.f1_of_patches(logits_nyx, labels_nyx, threshold), holds))
    f1, holds = (np.concatenate(column) for column in zip(*scored, strict=True))
    best, worst = curves.best_and_worst(f1, holds, s.panel)
    rows = []
    for i in best + worst:
        (logits_yx,), (labels_yx,) = logits([i])
        how = f"F1 {f1[i]:.2f}" if holds[i] else "no landslide"
        title = f"{'best' if i in best else 'worst'}: patch {i} of {patches.regions[i]}, {how}"
        probability_yx = 1 / (1 + np.exp(-logits_yx.astype(np.float64)))
        x_fyx, _ = read_patch(patches, i)
        rows.append(curves.Pictured(title=title, x_fyx=x_fyx, y_yx=labels_yx, probability_yx=probability_yx))
    curves.write_panel(job.folder / PANEL_FILE, rows, patches.features.names, threshold)


def _news(state: TrainingState, settings: TrainSettings) -> Progress:
    row, best = state.rows[-1], state.rows[state.best_row]
    text = (
        f"epoch {len(state.rows)} of {settings.epochs}: loss {row['loss']:.4f}, on validation "
        f"{row['validation_loss']:.4f}, F1 {row['f1']:.4f} (best {best['f1']:.4f} in epoch {state.best_row + 1}), "
        f"{row['seconds']:.0f} s"
    )
    return Progress(text=text, epoch=len(state.rows), epochs=settings.epochs, row=row)


def _trained(job: Job, state: TrainingState) -> Trained:
    best = state.rows[state.best_row]
    return Trained(
        weights=safetensors.torch.save(state.best),
        mean=tuple(job.survey.mean.tolist()),
        std=tuple(job.survey.std.tolist()),
        threshold=best["threshold"],
        score=best["f1"],
        epoch=state.best_row + 1,
        epochs_run=len(state.rows),
        history=job.folder / HISTORY_FILE,
    )
