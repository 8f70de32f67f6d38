"""What computes a network: torch, torch compiled, or ONNX Runtime, on the CPU or a GPU, in full or half precision.

Every engine takes and gives float32. `TOLERANCE` says how far they agree with torch in float32 on one thread of the
CPU; equal bits are promised only of one backend, dtype, device, CPU and set of libraries.

Axes: b batch, c channel, y row, x column.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from slidecube.models.devices import Device
from slidecube.models.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

Backend = Literal["torch", "compile", "onnx"]
Dtype = Literal["float32", "bfloat16", "float16"]

BATCH: Mapping[Device, int] = {"cpu": 1, "cuda": 16}
"""Windows that are computed at once. On the CPU one: more gain nothing on one thread, and a window's bits would depend
on its place among the others."""

TOLERANCE: Mapping[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""How far a probability may lie from that of torch in float32 on the CPU. In float32 it holds for any network; in half
precision it is twice what was measured on the networks that ship, and steeper logits may lie further apart."""

Forward = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(slots=True, kw_only=True)
class Engine:
    """A network that is ready to compute; several threads may use it at once.

    forward : (b, c, y, x) float32 on the device, channels last -> (b, 1, y, x) logits
    batch : windows at once; halved, and kept so, where memory does not suffice
    """

    address: str
    device: Device
    forward: Forward
    batch: int
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def logits(self, x_bcyx: torch.Tensor) -> torch.Tensor:
        """Logits of windows: (b, y, x) float32 on the device. Raises MemoryError where memory does not suffice."""
        import torch  # noqa: PLC0415  it takes seconds

        try:
            with torch.inference_mode():
                return self.forward(x_bcyx)[:, 0].float()
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            said = " ".join(str(error).split())[:160]
        if self.device == "cuda":  # here, where the error no longer holds what it failed with
            torch.cuda.empty_cache()
        raise MemoryError(said)

    def halve(self, batch: int) -> None:
        """Take half as many windows at once as were too many.

        Raises ModelError when one window was too many already.
        """
        if batch == 1:
            memory = "GPU" if self.device == "cuda" else "worker"
            raise ModelError(
                f"Model {self.address} does not fit into the memory of its {memory}, one window at a time; give a "
                "worker more memory or fewer threads, or take a model of smaller windows"
            )
        with self._lock:
            self.batch = min(self.batch, batch // 2)


_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "bad allocation",
                  "failed to allocate")  # fmt: skip


def _out_of_memory(error: Exception) -> bool:
    """Tell want of memory from other errors, which each library says in its own words."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def require_backend(address: str, backend: Backend, dtype: Dtype) -> None:
    """Raise ModelError for a dtype that a backend does not compute in."""
    if backend == "onnx" and dtype != "float32":
        raise ModelError(
            f"Model {address} by backend = 'onnx' computes in float32; got dtype = {dtype!r} in [detect]; leave it "
            "out, or take backend = 'torch'"
        )


def torch_forward(module: nn.Module, *, device: Device, dtype: Dtype, compiled: bool) -> Forward:
    """Bring a network to a device; in half precision it decides layer by layer what to compute in it (autocast)."""
    import torch  # noqa: PLC0415

    placed = module.eval().to(device).to(memory_format=torch.channels_last)
    run = torch.compile(placed, dynamic=False) if compiled else placed
    if dtype == "float32":
        return run
    half = getattr(torch, dtype)

    def forward(x_bcyx: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=half):
            found: torch.Tensor = run(x_bcyx)
        return found

    return forward


def compiled_once(forward: Forward) -> Forward:
    """Let one thread compile while the others wait; compiled code may then run in all of them."""
    lock, shapes = threading.Lock(), set[tuple[int, ...]]()

    def guarded(x_bcyx: torch.Tensor) -> torch.Tensor:
        if tuple(x_bcyx.shape) in shapes:
            return forward(x_bcyx)
        with lock:
            found = forward(x_bcyx)
            shapes.add(tuple(x_bcyx.shape))
        return found

    return guarded


def onnx_content(module: nn.Module, *, channels: int, side_px: int) -> bytes:
    """Write a network as ONNX, for any number of windows: `x` (b, c, side, side) -> `logits` (b, 1, side, side)."""
    import torch  # noqa: PLC0415

    x_bcyx = torch.zeros((2, channels, side_px, side_px))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # it tells of its own deprecations, and of shapes that are fixed on purpose
        torch.onnx.export(
            module, (x_bcyx,), buffer,  # type: ignore[arg-type]  # as its manual has it
            input_names=["x"], output_names=["logits"], dynamo=False,
            dynamic_axes={"x": {0: "b"}, "logits": {0: "b"}},
        )  # fmt: skip
    return buffer.getvalue()


def onnx_forward(content: bytes, *, address: str, device: Device) -> Forward:
    """Let ONNX Runtime compute, on one thread.

    Raises ModelError where it cannot read the network, or lacks the device.
    """
    import torch  # noqa: PLC0415

    session = _session(content, address, device)
    name = session.get_inputs()[0].name

    def forward(x_bcyx: torch.Tensor) -> torch.Tensor:
        (found,) = session.run(None, {name: x_bcyx.contiguous().cpu().numpy()})
        return torch.from_numpy(found).to(x_bcyx.device)

    return forward


def _session(content: bytes, address: str, device: Device) -> Any:
    try:
        import onnxruntime  # noqa: PLC0415  an extra
    except ImportError:
        raise ModelError(
            f"Model {address} by backend = 'onnx' needs ONNX Runtime: pip install 'slidecube[nets]'"
        ) from None
    wanted = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise ModelError(
            f"device = {device!r} needs {wanted} of ONNX Runtime, and {onnxruntime.__version__} as installed here has "
            f"{', '.join(onnxruntime.get_available_providers())}; install onnxruntime-gpu, or take backend = 'torch'"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=[wanted])
    except Exception as error:  # noqa: BLE001  its own classes derive from nothing in particular
        said = " ".join(str(error).split())[:160]
        raise ModelError(f"Model {address} is no network that ONNX Runtime can compute: {said}") from None


_KEPT = 16
"""Networks of which a process keeps the engines, besides the members of an ensemble that is being computed."""

EngineKey = tuple[str, ...]


class EngineCache:
    """Engines of this process, the last used ones: a network is built once and not for every tile."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._reserved: frozenset[EngineKey] = frozenset()
        self._engines: OrderedDict[EngineKey, Engine] = OrderedDict()
        self._lock = threading.Lock()

    def reserve(self, keys: Iterable[EngineKey]) -> None:
        """Keep all of these, however many, until other ones are reserved or built.

        An ensemble goes round: with fewer places than members, each would be forgotten just before its turn.
        """
        with self._lock:
            self._reserved = frozenset(keys)

    def get(self, key: EngineKey, build: Callable[[], Engine]) -> Engine:
        """Return the engine of a key; one thread builds it, the others wait."""
        with self._lock:
            if key not in self._engines:
                self._engines[key] = build()
                self._forget(key)
            self._engines.move_to_end(key)
            return self._engines[key]

    def _forget(self, built: EngineKey) -> None:
        """Forget the least used ones; whoever builds another network is done with the ensemble, or comes back to it."""
        if built not in self._reserved:
            self._reserved = frozenset()
        others = [key for key in self._engines if key not in self._reserved]
        for key in others[: max(len(others) - self._kept, 0)]:
            del self._engines[key]


ENGINES = EngineCache()
