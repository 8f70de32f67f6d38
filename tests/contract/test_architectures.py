"""The contract that every architecture of the table keeps; networks are small here, and fresh.

Peers: smp itself, and ONNX Runtime.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import weakref
from functools import lru_cache
from io import BytesIO

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slidecube.models.architectures import (
    ARCHITECTURES,
    build_network,
    complete_arguments,
    pre_post_pairs,
)
from slidecube.models.errors import ModelError
from slidecube.models.judging import count_weights
from slidecube.models.nets.batch_norm import PatientBatchNorm2d
from slidecube.models.nets.cae import one_thread
from slidecube.models.nets.resunet import ResUnet

NAMES = tuple(ARCHITECTURES)
SIAMESE = tuple(name for name in NAMES if ARCHITECTURES[name].siamese)
EXTRA = tuple(name for name in NAMES if ARCHITECTURES[name].extra and name not in SIAMESE)
SMALL_ENCODER = "tu-mobilenetv3_small_050"
PEERS = {
    "unet": "Unet",
    "unetplusplus": "UnetPlusPlus",
    "manet": "MAnet",
    "linknet": "Linknet",
    "fpn": "FPN",
    "pspnet": "PSPNet",
    "pan": "PAN",
    "deeplabv3": "DeepLabV3",
    "deeplabv3plus": "DeepLabV3Plus",
    "segformer": "Segformer",
    "upernet": "UPerNet",
}


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def small(name, channels):
    """Arguments of a small network."""
    arguments = {}
    if "encoder" in ARCHITECTURES[name].arguments and name != "segformer":
        arguments["encoder"] = SMALL_ENCODER
    if "width" in ARCHITECTURES[name].arguments:
        arguments["width"] = 8 if "unet" in name else 32
    if ARCHITECTURES[name].siamese:
        pairs = max(channels // 3, 1)
        arguments["pre"] = ",".join(str(2 * i) for i in range(pairs))
        arguments["post"] = ",".join(str(2 * i + 1) for i in range(pairs))
    return arguments


def build(name, channels=3, seed=0):
    torch.manual_seed(seed)
    return build_network(name, channels, small(name, channels))


@lru_cache
def network(name, channels=3):
    """A network in evaluation, of which nothing may change."""
    return build(name, channels).eval()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(module, x_bcyx):
    with torch.inference_mode():
        return module(x_bcyx).numpy().copy()


def channels_of(name):
    return (2, 3, 13) if name in SIAMESE else (1, 3, 13)


@pytest.mark.parametrize("name", NAMES)
def test_a_map_of_logits_for_any_channels_and_sides(name):
    for channels in channels_of(name):
        for sides in ((64, 64), (37, 51)):
            out = logits(network(name, channels), noise(2, channels, *sides))
            assert out.shape == (2, 1, *sides)
            assert out.dtype == np.float32
            assert np.isfinite(out).all()
            assert out.std() > 0


@pytest.mark.parametrize("name", NAMES)
def test_odd_sides_are_the_corner_of_a_map_filled_with_means(name):
    if ARCHITECTURES[name].multiple_px == 1:
        pytest.skip("takes sides of any length as they are")
    module = network(name)
    whole_px = 128
    assert whole_px % ARCHITECTURES[name].multiple_px == 0
    x_bcyx = noise(1, 3, 113, 101)
    filled = torch.zeros(1, 3, whole_px, whole_px)
    filled[..., :113, :101] = x_bcyx
    if module.multiple_px == 8:
        filled = filled[..., :120, :104]
    np.testing.assert_array_equal(logits(module, x_bcyx), logits(module, filled)[..., :113, :101])


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_gets_a_finite_gradient(name):
    """In batches of one, too; what a network never computes is not for training."""
    module = build(name).train()
    for batch in (1, 2):
        module.zero_grad()
        module(noise(batch, 3, 64, 64)).square().mean().backward()
        learnt = [(key, weight) for key, weight in module.named_parameters() if weight.requires_grad]
        for key, weight in learnt:
            assert weight.grad is not None, key
            assert torch.isfinite(weight.grad).all(), key
        share = sum(bool(weight.grad.any()) for _, weight in learnt) / len(learnt)
        assert (
            share > 0.75
        )  # behind a pooling to one pixel some are 0: ReLU, and attention over a single place


@pytest.mark.parametrize("name", NAMES)
def test_every_channel_counts(name):
    x_bcyx = noise(1, 13, 64, 64)
    before = logits(network(name, 13), x_bcyx)
    for channel in range(13):
        other = x_bcyx.clone()
        other[:, channel] += 3
        assert not np.array_equal(logits(network(name, 13), other), before), channel


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_build_equal_networks_and_saved_is_loaded_to_the_bit(name):
    weights, x_bcyx = network(name).state_dict(), noise(1, 3, 64, 64)
    again = build(name).eval()
    assert {key: tensor.numpy().tobytes() for key, tensor in again.state_dict().items()} == {
        key: tensor.numpy().tobytes() for key, tensor in weights.items()
    }
    np.testing.assert_array_equal(logits(network(name), x_bcyx), logits(again, x_bcyx))
    other = build(name, seed=1).eval()
    assert not np.array_equal(logits(network(name), x_bcyx), logits(other, x_bcyx))
    content = safetensors.torch.save({key: tensor.contiguous() for key, tensor in weights.items()})
    other.load_state_dict(safetensors.torch.load(content))
    np.testing.assert_array_equal(logits(network(name), x_bcyx), logits(other, x_bcyx))


@pytest.mark.parametrize("name", NAMES)
def test_its_weights_are_counted(name):
    module = network(name)
    state = torch.get_rng_state()
    counted = count_weights(name, small(name, 3), 3)
    learnt = [weight for weight in module.parameters() if weight.requires_grad]
    assert 0 < counted == sum(weight.numel() for weight in learnt)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_in_a_batch_do_not_matter_in_evaluation(name):
    module = network(name)
    x_bcyx, others = noise(4, 3, 64, 64), noise(4, 3, 64, 64, seed=2)
    others[1] = x_bcyx[1]
    np.testing.assert_array_equal(logits(module, x_bcyx)[1], logits(module, others)[1])


@pytest.mark.parametrize("name", NAMES)
def test_moves_between_devices(name):
    module = copy.deepcopy(network(name)).to("meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert module(torch.zeros(2, 3, 37, 51, device="meta")).shape == (2, 1, 37, 51)
    if torch.cuda.is_available():
        x_bcyx = noise(1, 3, 64, 64)
        with torch.inference_mode():
            there = copy.deepcopy(network(name)).to("cuda")(x_bcyx.to("cuda")).cpu().numpy()
        np.testing.assert_allclose(there, logits(network(name), x_bcyx), atol=1e-2)


class _Peak(TorchDispatchMode):
    """Bytes of all storages that live at once, whatever the device: nothing is computed on `meta`."""

    def __init__(self):
        super().__init__()
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize("name", NAMES)
def test_memory_of_a_forward_is_bounded_for_each_pixel(name):
    """Networks at their defaults hold at most 300 float32 a pixel at once: 300 MB for a window of 512 px."""
    arguments = {"pre": "0", "post": "1"} if name in SIAMESE else {}
    module = build_network(name, 4, arguments).eval().to("meta")
    with torch.inference_mode(), _Peak() as memory:
        module(torch.zeros(1, 4, 256, 256, device="meta"))
    assert 4 * 256**2 * 4 <= memory.peak <= 300 * 256**2 * 4


def _onnx(module, x_bcyx):
    file = BytesIO()
    torch.onnx.export(module, (x_bcyx,), file, dynamo=True, verbose=False)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_runtime_computes_the_same(name):
    x_bcyx = noise(2, 3, 128, 128)
    session = onnxruntime.InferenceSession(_onnx(network(name), x_bcyx), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x_bcyx.numpy()})
    want = logits(network(name), x_bcyx)
    # rounding errors grow with the numbers, and logits of drawn weights reach 80
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("name", PEERS)
def test_equal_to_smp_with_the_same_names_of_weights(name):
    encoder = "mit_b0" if name == "segformer" else SMALL_ENCODER
    torch.manual_seed(0)
    ours = build_network(name, 4, {"encoder": encoder}).eval()
    torch.manual_seed(0)
    peer = getattr(smp, PEERS[name])(encoder, encoder_weights=None, in_channels=4).eval()
    assert list(ours.state_dict()) == list(peer.state_dict())
    x_bcyx = noise(1, 4, 128, 128)
    np.testing.assert_array_equal(logits(ours, x_bcyx), logits(peer, x_bcyx))


def test_every_network_of_smp_has_a_peer_here():
    assert set(PEERS) == set(EXTRA)


def test_resunet_has_the_layers_of_the_paper():
    """Table I of Zhang et al. 2018: 224 px, 64 maps at the finest scale, 512 at the bridge."""
    module = ResUnet(3, width=64).eval()
    shapes = []
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3):
            part.register_forward_hook(lambda _m, _x, out: shapes.append((out.shape[1], out.shape[2])))
    logits(module, noise(1, 3, 224, 224))
    encoder = [(64, 224), (64, 224), (128, 112), (128, 112), (256, 56), (256, 56), (512, 28), (512, 28)]
    decoder = [(256, 56), (256, 56), (128, 112), (128, 112), (64, 224), (64, 224)]
    assert shapes == encoder + decoder


@pytest.mark.parametrize("name", SIAMESE)
def test_siamese_networks_see_no_skip_where_nothing_changed(name):
    """Both sides equal: all that the decoder sees of the finer scales is 0; another after, and it is not."""
    module = network(name, 5)
    seen = []
    handle = module.decoder.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    x_bcyx = noise(1, 5, 64, 64)
    x_bcyx[:, module.post] = x_bcyx[:, module.pre]
    logits(module, x_bcyx)
    x_bcyx[:, module.post[0]] += 1
    logits(module, x_bcyx)
    handle.remove()
    equal, changed = seen
    assert not any(skip.any() for skip in equal[:-1])
    assert equal[-1].any()
    assert all(skip.any() for skip in changed[:-1])


def test_siamese_channels_come_from_the_features_names():
    names = ["slope_deg", "B04_post", "B04_pre", "B08_pre", "B08_post", "rdndvi", "ndvi_pre"]
    assert pre_post_pairs(names) == [(2, 1), (3, 4)]
    assert complete_arguments("resunet-siamese", names, {"width": 4}) == {
        "width": 4,
        "depth": 3,
        "pre": "2,3",
        "post": "1,4",
    }
    module = build_network(
        "resunet-siamese", len(names), complete_arguments("resunet-siamese", names, {"width": 4})
    )
    # what is of neither side enters both, a side without the other too
    assert module.pre.tolist() == [2, 3, 0, 5, 6]
    assert module.post.tolist() == [1, 4, 0, 5, 6]
    assert complete_arguments("resunet", names) == {"width": 16, "depth": 3}
    # what is written by hand stays
    assert complete_arguments("unet-siamese", names, {"pre": "0", "post": "3"})["pre"] == "0"


@pytest.mark.parametrize(
    ("name", "channels", "arguments", "message"),
    [
        ("unett", 3, {}, "No architecture 'unett' \\(did you mean 'unet'\\?\\); there are: resunet, unet, "),
        (
            "resunet",
            3,
            {"widht": 4},
            "resunet has no argument 'widht' \\(did you mean 'width'\\?\\); there are: width, depth",
        ),
        ("resunet", 3, {"width": "16"}, "resunet: width = '16' is no int"),
        ("resunet", 3, {"width": True}, "resunet: width = True is no int"),
        ("resunet", 3, {"depth": 0}, "resunet: depth = 0 is below 1"),
        ("resunet", 0, {}, "resunet cannot be built for 0 channels"),
        ("unet", 3, {"encoder": "resnet19"}, "No encoder 'resnet19' among .* near: resnet18"),
        (
            "unet",
            3,
            {"encoder": "convnext_atto"},
            "No encoder 'convnext_atto' among .* near: tu-convnext_atto",
        ),
        ("unet", 3, {"encoder": "tu-hf_hub:someone/something"}, "No encoder 'tu-hf_hub"),
        (
            "unet",
            3,
            {"depth": 9},
            "Unet cannot be built with the encoder 'resnet18' and .*depth should be in range",
        ),
        ("deeplabv3", 3, {"stride": 32}, "DeepLabV3 cannot be built .*output stride 8 or 16"),
        ("linknet", 3, {"encoder": "mit_b0"}, "Linknet cannot be built .*not supported"),
        (
            "fpn",
            3,
            {"encoder": "tu-swin_tiny_patch4_window7_224"},
            "FPN cannot be built .*doesn't match model \\(224\\)",
        ),
        ("unet-siamese", 3, {}, "pre = '' is no list of channels"),
        ("unet-siamese", 3, {"pre": "0", "post": "1,2"}, "are no pairs of channels"),
        ("unet-siamese", 3, {"pre": "0,1", "post": "1,2"}, "are no pairs of channels"),
        ("unet-siamese", 3, {"pre": "0", "post": "3"}, "post = '3' names a channel twice, or one of 3"),
        ("resunet-siamese", 3, {"pre": "0,0", "post": "1,2"}, "pre = '0,0' names a channel twice"),
        ("resunet-siamese", 3, {"pre": "-1", "post": "1"}, "pre = '-1' is no list"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name, channels, arguments, message):
    with pytest.raises(ModelError, match=message) as caught:
        build_network(name, channels, arguments)
    assert "\n" not in str(caught.value)


def test_features_without_pairs_are_refused():
    with pytest.raises(
        ModelError, match="before and after, such as B04_pre and B04_post; got rdndvi, slope_deg"
    ):
        complete_arguments("resunet-siamese", ["rdndvi", "slope_deg"])


def test_what_ships_needs_no_extra():
    """The table, our own networks, their losses and the receptive field, where smp, timm and torchvision are not."""
    code = """
        import sys
        for name in ("segmentation_models_pytorch", "timm", "torchvision", "onnx", "onnxruntime", "h5py"):
            sys.modules[name] = None
        from slidecube.models.architectures import ARCHITECTURES, build_network, check_arguments
        assert check_arguments("unet")["encoder"] == "resnet18"
        assert "torch" not in sys.modules
        import torch
        from slidecube.models.errors import ModelError
        from slidecube.models.losses import loss_function
        labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
        labels[:, :4] = 1
        for name, row in ARCHITECTURES.items():
            arguments = {"pre": "0", "post": "1"} if row.siamese else {}
            try:
                module = build_network(name, 3, arguments)
            except ModelError as error:
                assert row.extra and "pip install slidecube[nets]" in str(error)
            else:
                assert not row.extra
                loss_function("bce")(module(torch.zeros(1, 3, 16, 16)), labels).backward()
        try:
            loss_function("bce+dice")
        except ModelError as error:
            assert "pip install slidecube[nets]" in str(error)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_batch_norm_of_one_value_takes_what_it_has_learnt_so_far():
    plain, patient = nn.BatchNorm2d(3), PatientBatchNorm2d(3)
    for x_bcyx in (noise(4, 3, 5, 5), noise(1, 3, 2, 1, seed=2), noise(2, 3, 1, 1, seed=3)):
        np.testing.assert_array_equal(plain(x_bcyx).detach(), patient(x_bcyx).detach())
    kept = {key: tensor.clone() for key, tensor in patient.state_dict().items()}
    one = noise(1, 3, 1, 1)
    out = patient(one)
    np.testing.assert_array_equal(out.detach(), plain.eval()(one).detach())
    assert all(torch.equal(tensor, patient.state_dict()[key]) for key, tensor in kept.items())
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm2d(3)(one)
