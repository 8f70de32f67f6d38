"""The convolutional auto-encoder of Shahabi et al. 2021, to the letter of its Table 2.

Axes: n patch, b batch, c channel, d input feature, y row, x column.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

from slidecube.models.predict import Progress
from slidecube.models.weights import write_whole

PATCH_PX = 7
DEEP = 12
"""Maps of the bottleneck: the deep features (optimum of the paper's search among 10 to 15)."""
CHECKPOINT_EPOCHS = 5
_ENCODE_BATCH = 10_000


class Cae(nn.Module):
    """The network: 7 x 7 x D to 12 deep features and back to a patch of one colour.

    The shape of PReLU is not stated: one slope a channel, so that it knows no position, which starts at He's .25.

    Shape: (b, d, 7, 7) -> (b, d, 7, 7). Source: Shahabi et al. 2021, Table 2.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(inputs, 8, 3),
            nn.PReLU(8),
            nn.Conv2d(8, DEEP, 3),
            nn.PReLU(DEEP),
            nn.BatchNorm2d(DEEP),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(DEEP, 8, 1),
            nn.PReLU(8),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, inputs, 1),
            nn.PReLU(inputs),
            nn.BatchNorm2d(inputs),
        )

    def encode(self, x_bdyx: torch.Tensor) -> torch.Tensor:
        """Deep features of patches.

        Valid 2 x 2 pooling of 3 x 3 drops its last row and column: six by six pixels are seen, half a pixel north-west.
        Shape: (b, d, 7, 7) -> (b, 12, 1, 1)
        """
        deep: torch.Tensor = nn.functional.max_pool2d(self.features(x_bdyx), 2)
        return deep

    def encode_dense(self, x_bdyx: torch.Tensor) -> torch.Tensor:
        """Deep features of every pixel at once: pooling by steps of one gives each patch's own maps.

        Shape: (b, d, y + 6, x + 6) -> (b, 12, y, x)
        """
        seen = x_bdyx[..., :-1, :-1]  # no patch sees the last row and column
        maps = self.features(seen)
        # MaxPool2d(2, stride=1), a third of the encoder's time in channels_last, by two comparisons of the whole
        pairs = torch.maximum(maps[..., :-1, :], maps[..., 1:, :])
        return torch.maximum(pairs[..., :-1], pairs[..., 1:])

    def forward(self, x_bdyx: torch.Tensor) -> torch.Tensor:
        """Reconstruct patches."""
        rebuilt: torch.Tensor = self.decoder(self.encode(x_bdyx))
        return rebuilt.expand(-1, -1, PATCH_PX, PATCH_PX)  # up-sampling of a single pixel, without its copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the network is trained; defaults of the paper."""

    epochs: int = 100
    batch: int = 10_000
    learning_rate: float = 0.1
    seed: int = 0


_users = 0
_threads_before = 1
_lock = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread alone: the bits of a training depend on the number of threads.

    torch keeps a number for each thread and one for those that come; both are put back by the last one that leaves.
    """
    global _users, _threads_before  # noqa: PLW0603  as torch's own number is of the process
    with _lock:
        own = (
            torch.get_num_threads()
        )  # also makes this thread take its number now and not at its first convolution
        if not _users:
            _threads_before = own
        _users += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            torch.set_num_threads(_threads_before)


def train(
    patches_ndyx: np.ndarray,
    training: Training,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[bytes, list[float]]:
    """Train on standardised patches.

    patches_ndyx : (n, d, 7, 7) float32 without NaN, n >= 2
    checkpoint : the state is kept in this file every few epochs; a state of other patches or numbers, or a damaged one,
        is not used. What is resumed ends in the same bits as what was never interrupted.
    progress : told of each epoch
    Returns the weights as safetensors, and each epoch's mean Huber loss.
    """
    with one_thread():
        state = _State(inputs=patches_ndyx.shape[1], training=training)
        origin = _digest(patches_ndyx, training)
        losses = state.load(checkpoint, origin) if checkpoint else []
        for epoch in range(len(losses), training.epochs):
            losses.append(state.epoch(patches_ndyx, epoch))
            if checkpoint and (epoch + 1) % CHECKPOINT_EPOCHS == 0:
                state.save(checkpoint, origin, losses)
            if progress:
                progress(epoch + 1, training.epochs)
        weights = {name: tensor.numpy() for name, tensor in state.network.state_dict().items()}
    return safetensors.numpy.save(weights), losses


class _State:
    """A network in training and its optimiser."""

    def __init__(self, *, inputs: int, training: Training) -> None:
        self.training = training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.network = Cae(inputs).to(memory_format=torch.channels_last).train()
        self.parameters = dict(self.network.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=training.learning_rate)

    def epoch(self, patches_ndyx: np.ndarray, number: int) -> float:
        """Pass once over all patches in an order of the epoch's own; returns the mean loss."""
        n = len(patches_ndyx)
        order = np.random.default_rng([self.training.seed, number]).permutation(n)
        total = 0.0
        for batch in _batches(order, self.training.batch):
            x_bdyx = torch.from_numpy(patches_ndyx[batch]).contiguous(memory_format=torch.channels_last)
            self.optimizer.zero_grad()
            loss = nn.functional.huber_loss(self.network(x_bdyx), x_bdyx)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += float(loss.detach()) * len(batch)
        return total / n

    def save(self, path: Path, origin: bytes, losses: list[float]) -> None:
        """Keep everything that the next epoch depends on."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for name, parameter in self.parameters.items():
            for what, tensor in self.optimizer.state[parameter].items():
                tensors[f"adam.{what}.{name}"] = tensor
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        tensors["origin"] = torch.tensor(list(origin), dtype=torch.uint8)
        write_whole(path, safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}))

    def load(self, path: Path, origin: bytes) -> list[float]:
        """Take up a kept state; returns the losses so far, none when there is no state of this very training."""
        try:
            tensors = safetensors.torch.load(path.read_bytes())
            if bytes(tensors["origin"].tolist()) != origin:
                return []
            adam = {
                index: {what: tensors[f"adam.{what}.{name}"] for what in ("step", "exp_avg", "exp_avg_sq")}
                for index, name in enumerate(self.parameters)
            }
        except (OSError, KeyError, safetensors.SafetensorError):
            return []
        self.network.load_state_dict({name: tensors[f"network.{name}"] for name in self.network.state_dict()})
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": adam})
        return [float(loss) for loss in tensors["losses"]]


def _batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Batches of a size; a single patch that is left joins the last one, because batch norm needs two."""
    cuts = list(range(size, len(order), size))
    if cuts and len(order) - cuts[-1] == 1:
        cuts.pop()
    return np.split(order, cuts)


def _digest(patches_ndyx: np.ndarray, training: Training) -> bytes:
    """What a training's result depends on."""
    digest = hashlib.sha256(f"cae {patches_ndyx.shape} {training} torch {torch.__version__}".encode())
    digest.update(np.ascontiguousarray(patches_ndyx).data)
    return digest.digest()


def encode(weights: bytes, patches_ndyx: np.ndarray) -> np.ndarray:
    """Deep features of standardised patches: (n, d, 7, 7) -> (n, 12) float32."""
    out = np.empty((len(patches_ndyx), DEEP), np.float32)
    with one_thread(), torch.inference_mode():
        network = _network(weights, "cpu")
        for start in range(0, len(out), _ENCODE_BATCH):
            part = slice(start, start + _ENCODE_BATCH)
            x_bdyx = torch.from_numpy(patches_ndyx[part]).contiguous(memory_format=torch.channels_last)
            out[part] = network.encode(x_bdyx)[:, :, 0, 0].numpy()
    return out


def encode_dense(weights: bytes, planes_dyx: np.ndarray, *, device: str = "cpu") -> np.ndarray:
    """Deep features of every pixel of standardised planes: (d, y + 6, x + 6) -> (12, y, x) float32.

    device : of torch; on another than the CPU the bits differ, by less than 1e-3 of a probability
    """
    with one_thread(), torch.inference_mode():
        x_bdyx = torch.from_numpy(planes_dyx)[None].contiguous(memory_format=torch.channels_last)
        if device != "cpu":
            # pinned, the copy is faster and the network is launched meanwhile; no window overlaps with the next one,
            # because its result is waited for below
            x_bdyx = x_bdyx.pin_memory().to(device, non_blocking=True)
        deep: np.ndarray = _network(weights, device).encode_dense(x_bdyx)[0].contiguous().cpu().numpy()
    return deep


def shapes(inputs: int) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the weights of a network."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Cae(inputs).state_dict().items()}


@lru_cache(maxsize=8)
def _network(weights: bytes, device: str) -> Cae:
    """The network of these weights, built once a process; it is only read, so that threads may share it."""
    tensors = safetensors.torch.load(weights)
    network = Cae(tensors["features.0.weight"].shape[1])
    network.load_state_dict(tensors)
    return network.to(memory_format=torch.channels_last).to(device).eval()


def flops_a_pixel(inputs: int) -> tuple[int, int]:
    """Multiply-adds of the encoder's convolutions for one pixel: dense, and patch by patch."""
    first, second = 9 * inputs * 8, 9 * 8 * DEEP
    return first + second, first * 25 + second * 9
