"""Weights from elsewhere: a state dict of torch or a safetensors file, held against the network that it should fill.

Nothing is ever unpickled but by `torch.load(weights_only=True)`, which makes tensors and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidecube.models.errors import ModelError
from slidecube.models.network_card import Argument
from slidecube.models.weights import is_pickle, read_file

if TYPE_CHECKING:
    import torch

PICKLED = (".pt", ".pth", ".ckpt")
KINDS = (*PICKLED, ".safetensors", ".onnx")
"""Endings of what can be imported."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Keys under which trainers keep the weights of a checkpoint."""

_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
"""What DDP, `torch.compile` and trainers put before the name of every tensor."""

_NAMED = 3
"""Tensors that a refusal names."""

_LONGEST = 80
"""Characters of a name that are shown."""

_DEEPEST = 4
"""Wrappers within wrappers that are opened: a dict of a pickle may hold itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Weights that fit; content : of a safetensors file; told : what was done to them, a line each."""

    content: bytes
    told: tuple[str, ...]


def import_state(
    path: Path, *, architecture: str, channels: int, arguments: Mapping[str, Argument]
) -> Imported:
    """Read weights and hold them against a network of the zoo.

    Raises ModelError, in one line, for a file of another kind, a pickle of more than tensors, and weights that do not
    fit the architecture, its arguments or the number of channels.
    """
    import safetensors.torch  # noqa: PLC0415  torch is slow to import

    from slidecube.models.architectures import build_network  # noqa: PLC0415

    wanted = build_network(architecture, channels, arguments).state_dict()
    state, told = _tensors_of(path)
    state, stripped = _without_prefix(state, wanted)
    what = f"{path}: the weights do not fit {architecture} of {channels} channels"
    _require_names(state, wanted, what)
    _require_shapes(state, wanted, what, channels)
    cast = sorted({str(t.dtype) for name, t in state.items() if t.dtype != wanted[name].dtype})
    _require_finite(state, path)
    told += stripped
    told += [f"weights of {', '.join(cast)} are kept in the precision of the network"] if cast else []
    # a clone each: tensors of a file may share memory, and safetensors keeps none twice
    kept = {name: state[name].to(tensor.dtype).contiguous().clone() for name, tensor in wanted.items()}
    return Imported(content=safetensors.torch.save(kept), told=tuple(told))


def parse_arguments(text: Sequence[str]) -> dict[str, Argument]:
    """Read "key=value" pairs: whole numbers, numbers, true and false, and all else as text."""
    found: dict[str, Argument] = {}
    for pair in text:
        key, sign, value = pair.partition("=")
        if not (sign and key.isidentifier()):
            raise ModelError(f"{pair!r} is no argument; write key=value, such as encoder=resnet18")
        found[key] = _typed(value)
    return found


def _typed(value: str) -> Argument:
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Read a file's tensors, by what it is and not by what it is called."""
    if path.suffix.lower() not in KINDS:
        raise ModelError(f"{path}: cannot be imported; allowed: {', '.join(KINDS)}")
    content = read_file(path, "Weights")
    if path.suffix.lower() == ".safetensors":
        return _safetensors_of(content, path), []
    return _pickled_of(content, path)


def _safetensors_of(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch  # noqa: PLC0415  torch is slow to import

    if is_pickle(content):
        raise ModelError(
            f"{path}: is a pickle that is called safetensors; if you trust where it comes from, name it .pt, and only "
            "its tensors are read"
        )
    try:
        tensors = dict(safetensors.torch.load(content))
    except Exception:  # noqa: BLE001  a damaged header makes numbers and names of any kind, and as many errors
        raise ModelError(f"{path}: is no safetensors file, or a damaged one") from None
    if not tensors:
        raise ModelError(f"{path}: holds no tensors")
    return tensors


def _pickled_of(content: bytes, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    import torch  # noqa: PLC0415

    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of pickles that torch did not write; what they hold is looked at below
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path}: holds more than tensors, or is damaged, and nothing else is unpickled here; save "
            "`model.state_dict()` where it was made, best as safetensors"
        ) from None
    except Exception:  # noqa: BLE001  damaged bytes raise whatever the code they lead to raises
        raise ModelError(f"{path}: is no file of torch, or a damaged one") from None
    loaded, told = _unwrapped(loaded)
    others = (
        [str(key) for key, value in loaded.items() if not _is_plain(value)]
        if isinstance(loaded, dict)
        else ["a " + type(loaded).__name__]
    )
    if others or not loaded:
        raise ModelError(
            f"{path}: is no state dict: it holds {_listed(others) or 'nothing'}; save `model.state_dict()`"
        )
    return {str(key): value for key, value in loaded.items()}, told


def _unwrapped(loaded: Any) -> tuple[Any, list[str]]:
    """Take the weights out of a checkpoint, and tell from where."""
    told: list[str] = []
    while isinstance(loaded, dict) and len(told) < _DEEPEST:
        inside = [key for key in _WRAPPERS if isinstance(loaded.get(key), dict)]
        if not inside:
            break
        told.append(f"took the weights from {inside[0]!r} of the checkpoint")
        loaded = loaded[inside[0]]
    return loaded, told


def _is_plain(value: object) -> bool:
    """Tell a tensor of numbers from one that is quantised, sparse, complex, or holds no numbers at all."""
    import torch  # noqa: PLC0415

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
    )


def _without_prefix(
    state: dict[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Take off what stands before every name, as far as it brings the names nearer to those of the network."""
    best, prefix = state, ""
    for taken, candidate in _stripped(state):
        if len(set(candidate) & set(wanted)) > len(set(best) & set(wanted)):
            best, prefix = candidate, taken
    return best, [f"took {prefix!r} off the names of the tensors"] if prefix else []


def _stripped(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    taken = ""
    while found := [prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state)]:
        taken += found[0]
        state = {name.removeprefix(found[0]): tensor for name, tensor in state.items()}
        yield taken, state


def _listed(names: Sequence[str]) -> str:
    """Name the first few; of what is damaged a name may be of any length, and hold what no line can show."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:_NAMED]]
    return ", ".join(textwrap.shorten(name, _LONGEST, placeholder="...") for name in shown)


def _require_names(state: Mapping[str, object], wanted: Mapping[str, object], what: str) -> None:
    missing, unexpected = ([n for n in a if n not in b] for a, b in ((wanted, state), (state, wanted)))
    said = [
        f"{len(names)} {kind} ({_listed(names)}{', ...' if len(names) > _NAMED else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if said:
        raise ModelError(f"{what}: tensors {' and '.join(said)}; check architecture and arguments")


def _require_shapes(
    state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], what: str, channels: int
) -> None:
    for name, tensor in wanted.items():
        got, need = tuple(state[name].shape), tuple(tensor.shape)
        if got == need:
            continue
        others = [k for k in range(max(len(got), len(need))) if got[k : k + 1] != need[k : k + 1]]
        if (
            len(got) == len(need)
            and others == [1]
            and need[1] % channels == 0
            and not got[1] % max(need[1] // channels, 1)
        ):
            has = got[1] // (need[1] // channels)
            raise ModelError(f"{what}: {name} reads {has} channels; name {has} features")
        raise ModelError(f"{what}: {name} has the shape {got}, not {need}; check architecture and arguments")


def _require_finite(state: Mapping[str, torch.Tensor], path: Path) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{path}: tensor {name} is not finite; the training that made it failed")
