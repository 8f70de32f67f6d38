"""Networks: detectors that a card and a file of weights make, computed window by window on the grid's lattice.

Axes: v variable, b batch, f feature, c channel, y row, x column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from slidecube.models.backends import (
    BATCH,
    ENGINES,
    Backend,
    Dtype,
    Engine,
    EngineKey,
    compiled_once,
    onnx_content,
    onnx_forward,
    require_backend,
    torch_forward,
)
from slidecube.models.calibration import calibrated
from slidecube.models.card import ModelCard
from slidecube.models.devices import Device, require_device
from slidecube.models.errors import ModelError
from slidecube.models.network_card import NetworkCard, model_card, read_card, read_weights
from slidecube.models.predict import Progress
from slidecube.models.uncertainty import View, spread, tta_views
from slidecube.models.weights import tensors_of
from slidecube.models.windows import Placed, Region, WindowLattice

if TYPE_CHECKING:
    import torch
    from torch import nn

EXTREME = 100.0
"""Standard deviations from the mean; an input beyond counts as this far: a broken pixel must not make infinities."""

_ROWS_AT_ONCE = 64  # of a region that is standardised: what stays in the processor's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A trained network: its card, its weights, and what computes it. A value; nothing is built until it is asked.

    card : what the pipeline knows of it; about : the whole of card.toml; weights : content of its file
    tta : each window is seen turned and mirrored, too (test-time augmentation): the mean of the views' logits counts,
        and the spread of their probabilities is told
    Unknown inputs count as the mean. A pixel of which an input is unknown is NaN.
    """

    card: ModelCard
    about: NetworkCard
    weights: bytes = field(repr=False)
    device: Device = "cpu"
    backend: Backend = "torch"
    dtype: Dtype = "float32"
    tta: bool = False

    @property
    def variables(self) -> tuple[str, ...]:
        """See `predict.WindowedDetector`; the spread of a single network is that of its views."""
        return ("probability", "spread") if self.tta else ("probability",)

    @classmethod
    def of(
        cls,
        about: NetworkCard,
        content: bytes,
        *,
        threshold: float | None = None,
        min_area_m2: float | None = None,
    ) -> Self:
        """Make it of a card and the content of its file of weights; None = the card's own.

        Raises ModelError when the content is not what the card vouches for.
        """
        if about.architecture is None or about.weights is None:
            raise ModelError(f"Model {about.address} is an ensemble and no network; load its folder")
        if hashlib.sha256(content).hexdigest() != about.weights.sha256:
            raise ModelError(
                f"Weights of model {about.address} are not those that its card vouches for; take both again from where "
                "they came"
            )
        card = model_card(about, threshold=threshold, min_area_m2=min_area_m2)
        backend: Backend = "onnx" if about.architecture.name == "onnx" else "torch"
        return cls(card=card, about=about, weights=content, backend=backend)

    @classmethod
    def from_folder(
        cls, folder: Path, *, threshold: float | None = None, min_area_m2: float | None = None
    ) -> Self:
        """Read it from a folder of a card and its weights.

        Raises ModelError for what is missing, damaged, or was changed.
        """
        about = read_card(folder)
        if about.weights is None:
            raise ModelError(f"{folder} holds the ensemble {about.address} and no network")
        content = read_weights(folder, about)
        return cls.of(about, content, threshold=threshold, min_area_m2=min_area_m2)

    @property
    def lattice(self) -> WindowLattice:
        """Its windows on the grid."""
        assert self.about.architecture is not None
        made = self.about.architecture
        return WindowLattice(side_px=made.window_px, margin_px=made.margin_px)

    def fit(
        self, patches_nfyx: np.ndarray, *, checkpoint: Path | None = None, progress: Progress | None = None
    ) -> Self:
        """Return itself: a network is trained beforehand."""
        del patches_nfyx, checkpoint, progress
        return self

    def save(self, folder: Path) -> None:
        """Write nothing: a network learns nothing from a cube."""

    def restore(self, folder: Path) -> Self:
        """Return itself."""
        del folder
        return self

    def on(self, device: Device) -> Self:
        """Return it on a device; see `Detector.on`."""
        require_device(device)
        return replace(self, device=device)

    def computed_by(self, backend: Backend | None, dtype: Dtype | None, *, tta: bool = False) -> Self:
        """Return it with another backend or dtype; None = as it is. Raises ModelError for what cannot be."""
        assert self.about.architecture is not None
        chosen, number = backend or self.backend, dtype or self.dtype
        if self.about.architecture.name == "onnx" and chosen != "onnx":
            raise ModelError(
                f"Model {self.card.address} is an ONNX file; got backend = {chosen!r} in [detect]; 'onnx' is allowed"
            )
        require_backend(self.card.address, chosen, number)
        return replace(self, backend=chosen, dtype=number, tta=tta)

    def predict_block(self, features_fyx: np.ndarray) -> np.ndarray:
        """Probability of one block whose first core pixel begins a window; see `Detector.predict_block`."""
        margin = self.card.window_px // 2
        found: np.ndarray = self.predict_region(list(features_fyx), origin_px=(0, 0), margin_px=margin)[0]
        return found

    def predict_region(
        self, planes_yx: Sequence[np.ndarray], *, origin_px: tuple[int, int], margin_px: int, threads: int = 1
    ) -> np.ndarray:
        """Probability of a region, and with `tta` its spread: (v, y, x) float32; see `predict.WindowedDetector`."""
        where = {"origin_px": origin_px, "margin_px": margin_px, "threads": threads}
        views = tta_views(self.card.inputs.names) if self.tta else (None,)
        seen = [self._seen(planes_yx, view, **where) for view in views]
        known_yx = seen[0][1]
        probability_vyx = np.stack(
            [self._calibrated(logits_yx, planes_yx, margin_px) for logits_yx, _ in seen]
        )
        if not self.tta:
            probability_vyx[:, ~known_yx] = np.nan
            return probability_vyx
        mean_yx = np.stack([logits_yx for logits_yx, _ in seen]).mean(axis=0, dtype=np.float64)
        found_vyx = np.stack(
            [self._calibrated(mean_yx.astype(np.float32), planes_yx, margin_px), spread(probability_vyx)]
        )
        found_vyx[:, ~known_yx] = np.nan
        return found_vyx

    def _seen(
        self, planes_yx: Sequence[np.ndarray], view: View | None, **where: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits of a region seen in a view; None = as it is."""
        if view is not None:
            planes_yx = view.in_place(planes_yx)
        return self.logits_region(planes_yx, view=view, **where)

    def _calibrated(
        self, logits_yx: np.ndarray, planes_yx: Sequence[np.ndarray], margin_px: int
    ) -> np.ndarray:
        strata_yx = None
        if self.about.calibration.strata:
            core = (
                slice(margin_px, margin_px + logits_yx.shape[0]),
                slice(margin_px, margin_px + logits_yx.shape[1]),
            )
            strata_yx = planes_yx[self.card.inputs.names.index(self.about.calibration.by)][core]
        return calibrated(self.about.calibration, logits_yx, strata_yx)

    def logits_region(
        self,
        planes_yx: Sequence[np.ndarray],
        *,
        origin_px: tuple[int, int],
        margin_px: int,
        threads: int = 1,
        view: View | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Blended logits of a region, (y, x) float32, and where they are known, (y, x) bool; elsewhere they are 0.

        view : in which each window is looked at, the values of directions being turned already
        Raises ModelError for logits that are not finite.
        """
        channels = [planes_yx[self.card.inputs.names.index(name)] for name in self.about.inputs.names]
        height, width = (size - 2 * margin_px for size in channels[0].shape)
        core = np.s_[margin_px : margin_px + height, margin_px : margin_px + width]
        known_yx = np.ones((height, width), bool)
        for plane_yx in channels:
            known_yx &= ~np.isnan(plane_yx[core])
        if not known_yx.any():
            return np.zeros((height, width), np.float32), known_yx
        region = Region(
            row=origin_px[0], col=origin_px[1], height=height, width=width, above=margin_px, left=margin_px,
            planes=(channels[0].shape[0], channels[0].shape[1]),
        )  # fmt: skip
        logits_yx = _blended(self, channels, region, known_yx, threads=threads, view=view)
        if not np.isfinite(logits_yx[known_yx]).all():
            raise ModelError(
                f"Model {self.card.address} gives numbers that are not finite in {self.dtype}; "
                + (
                    "its weights are unusable"
                    if self.dtype == "float32"
                    else "take dtype = 'float32' in [detect]"
                )
            )
        logits_yx[~known_yx] = 0
        return logits_yx, known_yx


def network_module(about: NetworkCard, content: bytes) -> nn.Module:
    """Build a network with its weights, in eval mode.

    Raises ModelError unless the file holds exactly the tensors of its architecture, all finite.
    """
    import torch  # noqa: PLC0415  it takes seconds

    from slidecube.models.architectures import build_network  # noqa: PLC0415

    made = about.architecture
    assert made is not None
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and forgotten
        module = build_network(made.name, len(about.inputs.names), made.arguments)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tensors = tensors_of(content, f"Weights of model {about.address}", shapes)
    module.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    return module.eval()


def require_computable(networks: Iterable[Network]) -> None:
    """Say once, before any tile does, that weights are not those of the architecture that a card names.

    Raises ModelError, in one line; an ONNX file has its own architecture, and is left to its backend.
    """
    for network in networks:
        if network.about.architecture is not None and network.about.architecture.name != "onnx":
            network_module(network.about, network.weights)


def engine_of(network: Network) -> Engine:
    """Return what computes a network, built once a process."""
    return ENGINES.get(_engine_key(network), partial(_engine, network))


def reserve_engines(networks: Iterable[Network]) -> None:
    """Let this process keep what computes some networks that take turns."""
    ENGINES.reserve(_engine_key(network) for network in networks)


def _engine_key(network: Network) -> EngineKey:
    return network.about.identity, network.device, network.backend, network.dtype


def _engine(network: Network) -> Engine:
    about, address = network.about, network.card.address
    assert about.architecture is not None
    if about.architecture.name == "onnx":
        forward = onnx_forward(network.weights, address=address, device=network.device)
    elif network.backend == "onnx":
        module = network_module(about, network.weights)
        content = onnx_content(module, channels=len(about.inputs.names), side_px=about.architecture.window_px)
        forward = onnx_forward(content, address=address, device=network.device)
    else:
        module = network_module(about, network.weights)
        compiled = network.backend == "compile"
        forward = torch_forward(module, device=network.device, dtype=network.dtype, compiled=compiled)
        forward = compiled_once(forward) if compiled else forward
    return Engine(address=address, device=network.device, forward=forward, batch=BATCH[network.device])


def standardised(planes_yx: Sequence[np.ndarray], mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(planes - mean) / std as a network reads them: (y, x, c) float32, unknown ones at the mean, which is 0."""
    out_yxc = np.empty((*planes_yx[0].shape, len(planes_yx)), np.float32)
    for top in range(0, len(out_yxc), _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        for c, (plane_yx, m, s) in enumerate(zip(planes_yx, mean, std, strict=True)):
            with np.errstate(over="ignore"):
                part_yx = (np.asarray(plane_yx[rows], np.float32) - np.float32(m)) / np.float32(s)
            np.clip(part_yx, -EXTREME, EXTREME, out=part_yx)
            part_yx[np.isnan(part_yx)] = 0
            out_yxc[rows, :, c] = part_yx
    return out_yxc


def _blended(
    network: Network,
    channels: Sequence[np.ndarray],
    region: Region,
    known_yx: np.ndarray,
    *,
    threads: int,
    view: View | None,
) -> np.ndarray:
    """Logits of all windows of a region by their weights, added up in the order of the lattice."""
    import torch  # noqa: PLC0415

    from slidecube.models.nets.cae import one_thread  # noqa: PLC0415

    engine, lattice = engine_of(network), network.lattice
    windows = lattice.windows(region, known_yx)
    inputs = network.about.inputs
    with one_thread(), torch.inference_mode():
        x_yxc = torch.from_numpy(standardised(channels, inputs.mean, inputs.std)).to(network.device)
        weights_yx = torch.from_numpy(lattice.weights_yx()).to(network.device)
        out_yx = torch.zeros((region.height, region.width), device=network.device)
        compute = partial(_window_logits, engine, x_yxc, lattice.side_px, view)
        groups = [windows[k : k + engine.batch] for k in range(0, len(windows), engine.batch)]
        for group, logits_byx in zip(groups, _in_order(compute, groups, threads), strict=True):
            for at, logits_yx in zip(group, logits_byx, strict=True):
                of = at.of_rows, at.of_cols
                out_yx[at.out_rows, at.out_cols] += weights_yx[of] * logits_yx[of]
        found: np.ndarray = out_yx.cpu().numpy()
    return found


def _in_order(
    compute: Callable[[list[Placed]], torch.Tensor], groups: list[list[Placed]], threads: int
) -> Iterator[torch.Tensor]:
    """Compute groups of windows in several threads, and give the results in order, never many at once."""
    if threads == 1 or len(groups) == 1:
        yield from map(compute, groups)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead = 2 * threads
        waiting = [pool.submit(compute, group) for group in groups[:ahead]]
        for k in range(len(groups)):
            yield waiting.pop(0).result()
            if k + ahead < len(groups):
                waiting.append(pool.submit(compute, groups[k + ahead]))


def _window_logits(
    engine: Engine, x_yxc: torch.Tensor, side_px: int, view: View | None, windows: list[Placed]
) -> torch.Tensor:
    """Logits of windows: (b, y, x) float32, seen in a view and turned back.

    Each batch is a new array of one shape, aligned as torch aligns, because the last bits depend on both; what of a
    window is not known, and windows that are not there, are 0.
    """
    import torch  # noqa: PLC0415

    from slidecube.models.nets.cae import one_thread  # noqa: PLC0415

    found: list[torch.Tensor] = []
    with one_thread(), torch.inference_mode():
        while len(found) < len(windows):
            batch = engine.batch
            part = windows[len(found) : len(found) + batch]
            x_byxc = torch.zeros((batch, side_px, side_px, x_yxc.shape[2]), device=x_yxc.device)
            for window_yxc, at in zip(x_byxc, part, strict=False):
                window_yxc[at.in_rows, at.in_cols] = x_yxc[at.rows, at.cols]
            try:
                logits_byx = engine.logits(_turned(x_byxc, view).permute(0, 3, 1, 2))
            except MemoryError:
                engine.halve(batch)
                continue
            found.extend(_turned_back(logits_byx[: len(part)], view))
    return torch.stack(found)


def _turned(x_byxc: torch.Tensor, view: View | None) -> torch.Tensor:
    """Windows as they are seen in a view: a new array, aligned as the one of no view."""
    import torch  # noqa: PLC0415

    if view is None:
        return x_byxc
    seen = x_byxc.flip(2) if view.mirror else x_byxc
    return torch.rot90(seen, view.quarters, (1, 2)).contiguous()


def _turned_back(logits_byx: torch.Tensor, view: View | None) -> torch.Tensor:
    import torch  # noqa: PLC0415

    if view is None:
        return logits_byx
    seen = torch.rot90(logits_byx, -view.quarters, (1, 2))
    return seen.flip(2) if view.mirror else seen
