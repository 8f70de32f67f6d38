"""Weights from elsewhere: what fits is taken, what does not is refused in one line, and no code of theirs is run."""

from __future__ import annotations

import io
import os
import pickle
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from slidecube.models.errors import ModelError
from slidecube.models.importing import import_state, parse_arguments
from slidecube.models.onnx_files import import_onnx


@pytest.fixture(scope="module")
def small(servers):
    return servers("small_networks")


@pytest.fixture
def take(small):
    def run(path, *, channels=2, arguments=None, architecture="resunet"):
        return import_state(
            path, architecture=architecture, channels=channels, arguments=arguments or small.ARGUMENTS
        )

    return run


def same(content: bytes, state: dict[str, torch.Tensor]) -> bool:
    found = safetensors.torch.load(content)
    return set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.ckpt", "w.safetensors"])
def test_a_state_dict_is_taken_as_it_is(tmp_path, small, take, name):
    state = small.module().state_dict()
    if name.endswith("safetensors"):
        safetensors.torch.save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    found = take(tmp_path / name)

    assert same(found.content, state)
    assert found.told == ()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.net."])
def test_what_wrappers_put_before_the_names_is_taken_off_and_told(tmp_path, small, take, prefix):
    state = small.module().state_dict()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "w.pt")
    found = take(tmp_path / "w.pt")

    assert same(found.content, state)
    assert found.told == (f"took {prefix!r} off the names of the tensors",)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_weights_of_a_checkpoint_are_found_and_told(tmp_path, small, take, key):
    state = small.module().state_dict()
    torch.save({key: state, "epoch": 7, "optimizer": {"lr": 1.0}}, tmp_path / "w.ckpt")
    found = take(tmp_path / "w.ckpt")

    assert same(found.content, state)
    assert found.told == (f"took the weights from {key!r} of the checkpoint",)


def test_half_precision_is_told(tmp_path, small, take):
    state = {n: t.half() if t.is_floating_point() else t for n, t in small.module().state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    found = take(tmp_path / "w.pt")

    assert found.told == ("weights of torch.float16 are kept in the precision of the network",)
    assert {t.dtype for t in safetensors.torch.load(found.content).values()} == {torch.float32, torch.int64}


def test_tensors_that_share_memory_are_kept_apart(tmp_path, small, take):
    state = small.module().state_dict()
    names = [name for name, t in state.items() if t.shape == (8,)]
    assert len(names) > 1
    shared = {**state, names[0]: state[names[1]]}
    torch.save(shared, tmp_path / "w.pt")

    assert same(take(tmp_path / "w.pt").content, shared)


class Trap:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.where,)


def pickled(value: object) -> bytes:
    return pickle.dumps(value)


def zipped(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


@pytest.mark.parametrize("write", [pickled, zipped], ids=["pickle", "zip"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_pickle_runs_no_code(tmp_path, take, write, name):
    """A trap in a .pt, and one that is called safetensors: neither is sprung."""
    (tmp_path / name).write_bytes(write({"a": Trap(str(tmp_path / "sprung"))}))

    said = (
        "is a pickle that is called safetensors"
        if name.endswith("safetensors")
        else "holds more than tensors"
    )
    with pytest.raises(ModelError, match=said):
        take(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickled(Trap(str(tmp_path / "sprung"))))  # the trap is one
    assert (tmp_path / "sprung").exists()


CONTENTS = {
    "empty": b"",
    "text": b"these are the weights\n" * 10,
    "half a zip": zipped({"a": torch.zeros(1000)})[:300],
    "json": b'{"a": 1}',
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=list(CONTENTS))
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_what_is_no_file_of_weights_is_refused(tmp_path, take, content, name):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ModelError) as refused:
        take(tmp_path / name)
    assert "\n" not in str(refused.value)
    assert str(tmp_path / name) in str(refused.value)


def test_other_kinds_of_files_are_named(tmp_path, take):
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"w\.h5: cannot be imported; allowed: \.pt, \.pth"):
        take(tmp_path / "w.h5")
    with pytest.raises(ModelError, match=r"cannot be read from .*none\.pt: No such file"):
        take(tmp_path / "none.pt")


def without(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


def test_missing_and_unexpected_tensors_are_named(tmp_path, small, take):
    state = small.module().state_dict()
    first = next(iter(state))
    torch.save({**without(state, first), "head.extra": torch.zeros(1)}, tmp_path / "w.pt")

    with pytest.raises(ModelError) as refused:
        take(tmp_path / "w.pt")
    said = str(refused.value)
    assert f"1 missing ({first})" in said
    assert "1 unexpected (head.extra)" in said
    assert "resunet of 2 channels" in said


def test_weights_of_another_network_name_the_first_few(tmp_path, take):
    torch.save({f"layer{k}.weight": torch.zeros(1) for k in range(9)}, tmp_path / "w.pt")

    with pytest.raises(ModelError, match=r"missing \(.*, \.\.\.\) and 9 unexpected \(layer0.weight, layer1"):
        take(tmp_path / "w.pt")


def test_another_number_of_channels_is_said_as_such(tmp_path, small, take):
    torch.save(small.module(channels=5).state_dict(), tmp_path / "w.pt")

    with pytest.raises(ModelError, match=r"reads 5 channels; name 5 features"):
        take(tmp_path / "w.pt")


def test_other_arguments_are_a_matter_of_shape_or_names(tmp_path, small, take):
    torch.save(small.module().state_dict(), tmp_path / "w.pt")

    with pytest.raises(ModelError, match=r"has the shape .*, not .*; check architecture and arguments"):
        take(tmp_path / "w.pt", arguments={"width": 16, "depth": 2})
    with pytest.raises(ModelError, match=r"check architecture and arguments"):
        take(tmp_path / "w.pt", arguments={"width": 8, "depth": 3})
    with pytest.raises(ModelError, match="No architecture 'resnet'"):
        take(tmp_path / "w.pt", architecture="resnet")


def test_weights_that_are_not_finite_are_refused(tmp_path, small, take):
    state = small.module().state_dict()
    name = next(iter(state))
    torch.save({**state, name: torch.full_like(state[name], float("nan"))}, tmp_path / "w.pt")

    with pytest.raises(ModelError, match=f"tensor {name} is not finite"):
        take(tmp_path / "w.pt")


def test_what_is_no_state_dict_says_what_it_holds(tmp_path, take):
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="is no state dict: it holds epoch, loss"):
        take(tmp_path / "w.pt")
    torch.save(torch.zeros(3), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="is no state dict: it holds a Tensor"):
        take(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_of_nothing_is_refused(tmp_path, take, name):
    if name.endswith("safetensors"):
        safetensors.torch.save_file({}, tmp_path / name)
    else:
        torch.save({}, tmp_path / name)
    with pytest.raises(ModelError, match=r"holds no(thing| tensors)"):
        take(tmp_path / name)


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path, take):
    around: dict = {"epoch": 1}
    around["model"] = around
    torch.save(around, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="is no state dict: it holds epoch, model"):
        take(tmp_path / "w.pt")


def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path, small, take):
    state = small.module().state_dict()
    name = next(iter(state))
    for other in (state[name].to_sparse(), state[name].to(torch.complex64), state[name].to("meta")):
        torch.save({**state, name: other}, tmp_path / "w.pt")
        with pytest.raises(ModelError, match=f"is no state dict: it holds {name}"):
            take(tmp_path / "w.pt")


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A folder of good files of all kinds."""
    folder, state = tmp_path_factory.mktemp("whole"), small.module().state_dict()
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "w.safetensors")
    (folder / "m.onnx").write_bytes(onnx_of(Maps()))
    return folder


HEAD = 4000
"""Bytes at each end of a file, where its structure lies; in between are numbers."""


@st.composite
def damages(draw):
    """Where from either end, what is written there, and whether the file ends there."""
    change = st.tuples(st.integers(-HEAD, HEAD - 1), st.binary(min_size=1, max_size=8))
    return draw(st.lists(change, max_size=4)), draw(st.one_of(st.none(), st.integers(0, HEAD)))


@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "w.safetensors", "m.onnx"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages())
def test_a_damaged_file_is_taken_or_refused_in_one_line(tmp_path, whole, take, take_onnx, name, damage):
    changes, end = damage
    content = bytearray((whole / name).read_bytes())
    for place, written in changes:
        at = place % len(content)
        content[at : at + len(written)] = written
    (tmp_path / name).write_bytes(content[:end])

    said = ""
    try:
        if name.endswith("onnx"):
            take_onnx(bytes(content[:end]))
        else:
            take(tmp_path / name)
    except ModelError as error:
        said = str(error)
    assert said.isprintable()


def test_arguments_are_read_as_what_they_look_like():
    text = ["encoder=resnet18", "depth=3", "rate=0.5", "attention=true", "pre=0,2"]

    assert parse_arguments(text) == {
        "encoder": "resnet18",
        "depth": 3,
        "rate": 0.5,
        "attention": True,
        "pre": "0,2",
    }
    with pytest.raises(ModelError, match="'depth' is no argument; write key=value"):
        parse_arguments(["depth"])


# ---- ONNX


class Maps(nn.Module):
    """A convolution that gives so many maps, as probabilities or not; strict : of one window at a time."""

    def __init__(self, maps: int = 1, *, sigmoid: bool = False, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.convolution = nn.Conv2d(channels, maps, 3, padding=1)
        self.sigmoid = sigmoid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convolution(x)
        return y.sigmoid() if self.sigmoid else y


def onnx_of(module: nn.Module, *, side: int = 64, free: bool = True, channels: int = 3) -> bytes:
    content = io.BytesIO()
    axes = {"dynamic_axes": {"x": {0: "n", 2: "h", 3: "w"}}} if free else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = (torch.zeros(1, channels, side, side),)
        torch.onnx.export(module.eval(), example, content, input_names=["x"], dynamo=False, **axes)
    return content.getvalue()


@pytest.fixture
def take_onnx(tmp_path):
    def run(content: bytes, *, output="logit", channels=3, window_px=64):
        (tmp_path / "m.onnx").write_bytes(content)
        return import_onnx(tmp_path / "m.onnx", channels=channels, output=output, window_px=window_px)

    return run


def computed(content: bytes, x_bcyx: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x_bcyx})[0]


@pytest.mark.parametrize("free", [True, False], ids=["free", "fixed"])
@pytest.mark.parametrize(("output", "maps"), [("logit", 1), ("probability", 1), ("classes", 2)])
def test_an_onnx_gives_logits_whatever_it_gave(take_onnx, output, maps, free):
    module = Maps(maps, sigmoid=output == "probability")
    found = take_onnx(onnx_of(module, free=free), output=output)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 64, 64)).astype(np.float32))
    with torch.no_grad():
        raw = module.convolution(x)

    wanted = raw[:, 1:] - raw[:, :1] if output == "classes" else raw
    np.testing.assert_allclose(computed(found.content, x.numpy()), wanted.numpy(), atol=1e-4)
    assert found.side_px == (None if free else 64)


def test_a_probability_of_one_has_a_logit(take_onnx):
    module = Maps(sigmoid=True)
    with torch.no_grad():
        module.convolution.bias.fill_(1e4)
    found = take_onnx(onnx_of(module), output="probability")

    assert np.isfinite(computed(found.content, np.zeros((1, 3, 64, 64), np.float32))).all()


def test_numbers_that_may_be_probabilities_are_told(take_onnx):
    told = take_onnx(onnx_of(Maps(sigmoid=True)), output="logit").told
    assert any("if they are probabilities" in line for line in told)


def test_onnx_that_does_not_fit_is_refused(take_onnx):
    plain = onnx_of(Maps())
    cases = [
        ({"channels": 5}, plain, "reads 3 channels, and 5 features are named"),
        ({"output": "classes"}, plain, r"gives \(1, 1, 64, 64\) .*not \(1, 2, 64, 64\)"),
        ({}, onnx_of(Maps(2)), "if these are the logits of two classes, say so"),
        ({"output": "probability"}, plain, r"gives numbers from -.* which are no probabilities"),
        ({"window_px": 128}, onnx_of(Maps(), free=False), "reads windows of 64 px, and window_px is 128"),
        ({}, b"", "is no ONNX file"),
        ({}, b"not a network", "is no ONNX file"),
        ({}, plain[: len(plain) // 2], "is no ONNX file|is no valid ONNX"),
        ({}, pickled({"a": 1}), "is no ONNX file"),
    ]
    for given_as, content, said in cases:
        with pytest.raises(ModelError, match=said) as refused:
            take_onnx(content, **given_as)
        assert "\n" not in str(refused.value)


class OneAtATime(nn.Module):
    """Its answer depends on what else is in the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] - x.mean()


def test_a_network_whose_windows_depend_on_each_other_is_refused(take_onnx):
    with pytest.raises(ModelError, match="another answer when two windows are computed at once"):
        take_onnx(onnx_of(OneAtATime()))


def edited(content: bytes, edit) -> bytes:
    model = onnx.load_model_from_string(content)
    edit(model)
    return model.SerializeToString()


def older(model) -> None:
    model.opset_import[0].version = 7


def outside(model) -> None:
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL


def second_input(model) -> None:
    model.graph.input.append(model.graph.input[0])
    model.graph.input[1].name = "when"


def doubles(model) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 11


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (older, "is of opset 7; export it with opset 11 or later"),
        (outside, "keeps its weights in other files; save it as one file"),
        (second_input, r"reads 2 arrays \(x, when\); one is needed"),
        (doubles, "reads double; float32 is needed"),
    ],
)
def test_onnx_of_another_form_is_refused(take_onnx, edit, said):
    with pytest.raises(ModelError, match=said):
        take_onnx(edited(onnx_of(Maps()), edit))
