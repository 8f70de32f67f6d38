"""The receptive field against arithmetic, and against a disturbance of every pixel of a window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slidecube.models.architectures import build_network
from slidecube.models.nets.cae import one_thread
from slidecube.models.nets.resunet import ResUnet
from slidecube.models.receptive import WINDOW_MAX_PX, receptive_px, window_for


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def conv(inputs=1, *, kernel=3, dilation=1):
    return nn.Conv2d(inputs, 1, kernel, padding=dilation * (kernel // 2), dilation=dilation)


@pytest.mark.parametrize(
    ("layers", "side"),
    [
        ([conv(2, kernel=1)], 1),
        ([conv(2)], 3),
        ([conv(2), nn.ReLU(), conv(kernel=5), nn.BatchNorm2d(1), conv(dilation=4)], 3 + 4 + 8),
        ([conv(2), nn.MaxPool2d(3, stride=1, padding=1)], 5),
    ],
)
def test_stacks_without_strides_are_sums_of_their_kernels(layers, side):
    assert receptive_px(nn.Sequential(*layers), 2, 128) == side


@pytest.mark.parametrize("depth", [1, 2])
def test_nothing_outside_of_it_reaches_a_pixel_and_something_on_its_rim_does(depth):
    """Every pixel of a window is disturbed, one at a time, in double precision."""
    torch.manual_seed(0)
    module = ResUnet(1, width=2, depth=depth).double().eval()
    reach = receptive_px(ResUnet(1, width=2, depth=depth), 1, 128) // 2
    side, furthest = 64, 0
    x_1cyx = torch.randn(1, 1, side, side, dtype=torch.float64)
    with torch.inference_mode():
        before = module(x_1cyx)[0, 0]
        for row in range(24, 40):
            for sign in (-100.0, 100.0):
                other = x_1cyx.clone()
                other[..., row, 32] += sign
                changed = (module(other)[0, 0] != before).nonzero()
                furthest = max(furthest, int((changed[:, 0] - row).abs().max()))
    assert furthest == reach


def test_what_was_learnt_does_not_change_it_and_it_changes_nothing():
    module = ResUnet(3, width=2, depth=2).train()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    side = receptive_px(module, 3, 256)
    assert module.training
    assert all(torch.equal(tensor, module.state_dict()[key]) for key, tensor in before.items())
    for weight in module.parameters():
        nn.init.zeros_(weight)
    assert receptive_px(module, 3, 512) == side


@pytest.mark.parametrize("name", ["pspnet", "manet"])
def test_what_pools_over_its_window_has_no_field_of_its_own(name):
    module = build_network(name, 2, {"encoder": "tu-mobilenetv3_small_050"})
    assert receptive_px(module, 2, 256) == 0


def test_small_windows_are_refused():
    with pytest.raises(ValueError, match="too small"):
        receptive_px(ResUnet(1), 1, 96)


@given(receptive=st.integers(0, 600), patch_px=st.integers(16, 700))
def test_windows_hold_their_margins(receptive, patch_px):
    window_px, margin_px = window_for(receptive, patch_px=patch_px)
    assert 64 <= window_px <= WINDOW_MAX_PX
    assert window_px % 32 == 0
    assert 4 * (window_px - 2 * margin_px) >= 3 * window_px
    if 0 < receptive <= 129:
        assert margin_px >= receptive // 2
    if receptive == 0 and 64 <= patch_px <= WINDOW_MAX_PX:
        assert 0 <= window_px - patch_px < 32
