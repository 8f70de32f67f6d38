"""What a network costs to compute: counted on tensors without content, before anything is computed.

Axes: b batch, c channel, y row, x column.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from slidecube.models.ensembles import Ensemble
from slidecube.models.network import Network, network_module
from slidecube.models.uncertainty import tta_views

if TYPE_CHECKING:
    import torch

MULTIPLY_ADDS_PER_SECOND = 3.0e10
"""Of convolutions in float32 on one core, by torch with channels last."""
BYTES_PER_SECOND = 2.5e9
"""Of maps that are written: what norms, activations and copies take beside the convolutions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkCost:
    """Cost of a network, or of all members of an ensemble.

    seconds_per_mpx : on one core, every overlap of windows counted; weights_gb : of all members, as read and as built
    window_gb : most that one window holds at once, of the largest member; channels : most that one member reads
    views : of each window
    """

    seconds_per_mpx: float
    weights_gb: float
    window_gb: float
    channels: int
    views: int = 1


def cost_of(model: Network | Ensemble) -> NetworkCost:
    """Count what a model costs. Raises ModelError where a network cannot be built."""
    members = model.members if isinstance(model, Ensemble) else (model,)
    counted = [_counted(member) for member in members]
    views = len(tta_views(model.card.inputs.names)) if model.tta else 1
    return NetworkCost(
        seconds_per_mpx=views * sum(seconds for seconds, _ in counted),
        weights_gb=sum(2 * len(member.weights) for member in members) / 1e9,
        window_gb=max(held for _, held in counted),
        channels=max(len(member.about.inputs.names) for member in members),
        views=views,
    )


def _counted(network: Network) -> tuple[float, float]:
    """Seconds a megapixel, and GB of one window."""
    import torch  # noqa: PLC0415  it takes seconds
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    made, side = network.about.architecture, network.lattice.side_px
    assert made is not None
    shape = (1, len(network.about.inputs.names), side, side)
    if made.name == "onnx":  # nobody counts in a file from elsewhere: as a U-Net of its weights would take
        return len(network.weights) / 4 * side**2 / 100 / MULTIPLY_ADDS_PER_SECOND / _mpx(
            network
        ), side**2 * 4e-6
    module = network_module(network.about, network.weights).to("meta")
    held = _live_bytes()
    flops = FlopCounterMode(display=False)
    with torch.inference_mode(), flops, held:
        module(torch.empty(shape, device="meta"))
    seconds = flops.get_total_flops() / 2 / MULTIPLY_ADDS_PER_SECOND + held.written / BYTES_PER_SECOND
    return seconds / _mpx(network), held.most / 1e9


def _mpx(network: Network) -> float:
    """Megapixels that one window adds to a large region."""
    return network.lattice.stride_px**2 / 1e6


def _live_bytes() -> Any:
    """Counter of the bytes that tensors hold while it is entered: `most` at once, and `written` in all."""
    from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC0415
    from torch.utils._pytree import tree_leaves  # noqa: PLC0415

    class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.now = self.most = self.written = 0
            self._holders: Counter[int] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            found = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(found):
                if hasattr(tensor, "untyped_storage"):
                    self._hold(tensor)
            self.most = max(self.most, self.now)
            return found

        def _hold(self, tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            size, key = storage.nbytes(), storage._cdata  # noqa: SLF001  its address; a meta tensor has no other
            if not self._holders[key]:
                self.now += size
                self.written += size
            self._holders[key] += 1
            weakref.finalize(tensor, partial(self._free, key, size))

        def _free(self, key: int, size: int) -> None:
            self._holders[key] -= 1
            if not self._holders[key]:
                self.now -= size

    return LiveBytes()
