"""Networks from elsewhere as ONNX files, brought to one form: `x` (b, c, y, x) float32 -> `logits` (b, 1, y, x).

What follows a network's own output, such as the logit of a probability, is written into the file when it is imported,
so that whatever computes it later needs to know nothing of where it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from slidecube.models.errors import ModelError
from slidecube.models.network_card import CARD_FILE, NetworkCard, card_text
from slidecube.models.weights import read_file

if TYPE_CHECKING:
    import onnx

Meaning = Literal["logit", "probability", "classes"]
"""What a network gives: one map of logits or probabilities, or two maps of logits, the second of landslide."""

MEANINGS: tuple[Meaning, ...] = get_args(Meaning)

ONNX_FILE = "model.onnx"

_SURE = 1e-6
"""Probabilities nearer than this to 0 or 1 count as this near: their logit would be infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedOnnx:
    """A network that gives logits; content : of the file; side_px : of its windows, None for any."""

    content: bytes
    side_px: int | None
    told: tuple[str, ...]


def import_onnx(path: Path, *, channels: int, output: Meaning, window_px: int) -> ImportedOnnx:
    """Read a network, bring it to logits, and try it on windows of numbers.

    Raises ModelError, in one line, for what is no ONNX, keeps its weights elsewhere, reads other channels or windows,
    takes one window at a time, or gives other maps than `output` says.
    """
    model = _model_of(path)
    _require_opset(model, path)
    told: list[str] = []
    side_px = _require_input(model, path, channels, window_px)
    _free_batch(model)
    told += _try(model.SerializeToString(), path, (channels, side_px or window_px), output)
    _append_logits(model, output)
    if output != "logit":
        told.append(f"wrote the logit of its {output} into the file")
    content = model.SerializeToString()
    _run(content, np.zeros((1, channels, window_px, window_px), np.float32), path)
    return ImportedOnnx(content=content, side_px=side_px, told=tuple(told))


def _model_of(path: Path) -> onnx.ModelProto:
    onnx = _onnx()
    content = read_file(path, "Network")
    try:
        model = onnx.load_model_from_string(content)
    except Exception:  # noqa: BLE001  protobuf's own classes
        raise ModelError(f"{path}: is no ONNX file, or a damaged one") from None
    if not model.graph.node:
        raise ModelError(f"{path}: is no ONNX file, or a damaged one")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ModelError(f"{path}: keeps its weights in other files; save it as one file")
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # noqa: BLE001  its own class derives from nothing in particular
        raise ModelError(f"{path}: is no valid ONNX: {_one_line(str(error))}") from None
    return model  # type: ignore[no-any-return]


def _one_line(said: str) -> str:
    """Shorten what others say; they repeat names of the file, in which a damaged one has anything."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(said.split()))[:160]


def _onnx() -> Any:
    try:
        import onnx  # noqa: PLC0415  an extra
        import onnxruntime  # noqa: F401, PLC0415
    except ImportError:
        raise ModelError("ONNX files need two more packages: pip install 'slidecube[nets]'") from None
    return onnx


def _require_opset(model: onnx.ModelProto, path: Path) -> None:
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions or versions[0] < _OLDEST_OPSET:
        got = f"opset {versions[0]}" if versions else "no opset of ONNX"
        raise ModelError(f"{path}: is of {got}; export it with opset {_OLDEST_OPSET} or later")


_OLDEST_OPSET = 11


def _require_input(model: onnx.ModelProto, path: Path, channels: int, window_px: int) -> int | None:
    """Check what a network reads; returns the side of its windows, None where any will do."""
    onnx = _onnx()
    weights = {tensor.name for tensor in model.graph.initializer}
    read = [value for value in model.graph.input if value.name not in weights]
    if len(read) != 1 or len(model.graph.output) < 1:
        names = _one_line(", ".join(value.name for value in read))
        raise ModelError(f"{path}: reads {len(read)} arrays ({names}); one is needed")
    tensor = read[0].type.tensor_type
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise ModelError(f"{path}: reads {kind.lower()}; float32 is needed")
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    if len(sizes) != 4:
        raise ModelError(
            f"{path}: reads an array of {len(sizes)} dimensions; (batch, channel, y, x) is needed"
        )
    if sizes[1] not in (None, channels):
        hint = "; it may want its channels last" if sizes[3] == channels else ""
        raise ModelError(f"{path}: reads {sizes[1]} channels, and {channels} features are named{hint}")
    if sizes[2] != sizes[3]:
        raise ModelError(f"{path}: reads windows of {sizes[2]} x {sizes[3]} px; square ones are needed")
    if sizes[2] is not None and sizes[2] != window_px:
        raise ModelError(
            f"{path}: reads windows of {sizes[2]} px, and window_px is {window_px}; set it to {sizes[2]}, or export "
            "the network with free sizes"
        )
    return sizes[2]


def _free_batch(model: onnx.ModelProto) -> None:
    """Name the first dimension of input and outputs instead of fixing it; whether that holds is tried afterwards."""
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].ClearField("dim_value")
            dims[0].dim_param = "b"
    del model.graph.value_info[:]


def _append_logits(model: onnx.ModelProto, output: Meaning) -> None:
    """Turn the first output into one map of logits, called `logits`."""
    helper = _onnx().helper
    graph, name = model.graph, model.graph.output[0].name
    taken = {node_output for node in graph.node for node_output in node.output}
    prefix = "slidecube"
    while any(other.startswith(prefix) for other in taken):
        prefix += "_"
    for node in _LOGIT_NODES[output](helper, name, prefix):
        graph.node.append(node)
    del graph.output[:]
    shape = ["b", 1, "y", "x"]
    graph.output.append(helper.make_tensor_value_info(f"{prefix}_logits", 1, shape))


def _constants(helper: Any, prefix: str, values: Mapping[str, np.ndarray]) -> list[Any]:
    return [
        helper.make_node(
            "Constant",
            [],
            [f"{prefix}_{key}"],
            value=_onnx().numpy_helper.from_array(value, f"{prefix}_{key}"),
        )
        for key, value in values.items()
    ]


def _of_logit(helper: Any, name: str, prefix: str) -> list[Any]:
    return [helper.make_node("Identity", [name], [f"{prefix}_logits"])]


def _of_probability(helper: Any, name: str, prefix: str) -> list[Any]:
    low, high, one = (np.array(value, np.float32) for value in (_SURE, 1 - _SURE, 1))
    p = f"{prefix}_p"
    return [
        *_constants(helper, prefix, {"low": low, "high": high, "one": one}),
        helper.make_node("Clip", [name, f"{prefix}_low", f"{prefix}_high"], [p]),
        helper.make_node("Sub", [f"{prefix}_one", p], [f"{prefix}_q"]),
        helper.make_node("Div", [p, f"{prefix}_q"], [f"{prefix}_odds"]),
        helper.make_node("Log", [f"{prefix}_odds"], [f"{prefix}_logits"]),
    ]


def _of_classes(helper: Any, name: str, prefix: str) -> list[Any]:
    """Softmax of two logits is the sigmoid of their difference."""
    bounds = {"from0": 0, "from1": 1, "to2": 2, "axis": 1}
    values = {key: np.array([value], np.int64) for key, value in bounds.items()}
    stable, landslide = f"{prefix}_stable", f"{prefix}_landslide"
    return [
        *_constants(helper, prefix, values),
        helper.make_node("Slice", [name, f"{prefix}_from0", f"{prefix}_from1", f"{prefix}_axis"], [stable]),
        helper.make_node("Slice", [name, f"{prefix}_from1", f"{prefix}_to2", f"{prefix}_axis"], [landslide]),
        helper.make_node("Sub", [landslide, stable], [f"{prefix}_logits"]),
    ]


_LOGIT_NODES: Mapping[Meaning, Callable[[Any, str, str], list[Any]]] = {
    "logit": _of_logit,
    "probability": _of_probability,
    "classes": _of_classes,
}


def _try(content: bytes, path: Path, reads: tuple[int, int], output: Meaning) -> list[str]:
    """Run a network on one window and on two: its maps must be what they are said to be, and a window's the same.

    reads : channels and side of its windows. Returns what seems odd.
    """
    channels, side_px = reads
    x_bcyx = np.random.default_rng(0).standard_normal((2, channels, side_px, side_px)).astype(np.float32)
    one, two = (_run(content, x_bcyx[:batch], path) for batch in (1, 2))
    maps = 2 if output == "classes" else 1
    if one.shape != (1, maps, side_px, side_px):
        hint = "; if these are the logits of two classes, say so: classes" if one.shape[1:2] == (2,) else ""
        raise ModelError(
            f"{path}: gives {one.shape} of a window of {side_px} px, and not (1, {maps}, {side_px}, {side_px}), as "
            f"{output!r} means{hint}"
        )
    if two.shape[0] != 2 or not np.allclose(one[0], two[0], atol=1e-3):
        raise ModelError(
            f"{path}: gives another answer when two windows are computed at once; export it in eval mode, with a free "
            "batch"
        )
    if not np.isfinite(two).all():
        raise ModelError(f"{path}: gives numbers that are not finite")
    between = bool(two.min() >= 0 and two.max() <= 1)
    if output == "probability" and not between:
        raise ModelError(
            f"{path}: gives numbers from {two.min():.3g} to {two.max():.3g}, which are no probabilities; say what they "
            "are: logit"
        )
    odd = output == "logit" and between
    return (
        ["all its numbers lay between 0 and 1: if they are probabilities, import it as such"] if odd else []
    )


def _run(content: bytes, x_bcyx: np.ndarray, path: Path) -> np.ndarray:
    import onnxruntime  # noqa: PLC0415  an extra

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is said below
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        found = np.asarray(session.run(None, {session.get_inputs()[0].name: x_bcyx})[0])
    except Exception as error:  # noqa: BLE001  its own classes derive from nothing in particular
        why = (
            "takes one window at a time; export it with a free batch"
            if len(x_bcyx) > 1
            else "cannot be computed"
        )
        raise ModelError(f"{path}: {why} (ONNX Runtime: {_one_line(str(error))})") from None
    return found


def export_onnx(card: NetworkCard, content: bytes) -> bytes:
    """Write a network as ONNX that tells its own card: scaled features -> logits; one that is an ONNX is as it is."""
    assert card.architecture is not None
    onnx = _onnx()
    if card.architecture.name == "onnx":
        return content
    from slidecube.models.backends import onnx_content  # noqa: PLC0415  torch is slow to import
    from slidecube.models.network import network_module  # noqa: PLC0415

    made = onnx_content(
        network_module(card, content), channels=len(card.inputs.names), side_px=card.architecture.window_px
    )
    model = onnx.load_model_from_string(made)
    onnx.helper.set_model_props(model, {"slidecube": card.address, CARD_FILE: card_text(card)})
    written: bytes = model.SerializeToString()
    return written
