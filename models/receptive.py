"""How far a network looks: measured, because nobody adds up strides and kernels of a hundred encoders.

Axes: c channel, y row, x column.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

WINDOW_MAX_PX = 512
"""A chunk of the cubes: windows have 513 px at most, and their sides are multiples of 32."""
_STEP_PX = 32
"""Networks that halve look further from some pixels than from others; after so many all have had their turn."""
_SHARES = (4, 2, 1)
"""Windows in which is measured first, as parts of the one that is asked for: most of what is small shows there."""


def receptive_px(module: nn.Module, channels: int, window_px: int) -> int:
    """Side of the square around a pixel outside of which nothing changes its logit, in pixels.

    One pixel is disturbed as much as numbers can be, by NaN, which no ReLU, maximum or weight of 0 stops: the pixels
    that it reaches follow from strides and kernels alone, and not from what was learnt. It wanders over the phases of a
    stride of 32 px; the largest distance counts. On a CPU, with torch's own kernels, this is exact.
    module : is left as it is, and in its mode
    Returns an odd side, or 0 for the whole window: what pools over it, and what reaches further than half of it.
    Raises ValueError for windows below 128 px.
    """
    if window_px < 4 * _STEP_PX:
        raise ValueError(f"a window of {window_px} px is too small to measure in")
    with _evaluating(module), torch.inference_mode():
        for share in _SHARES:
            side_px = max(window_px // share // _STEP_PX, 4) * _STEP_PX
            reach = _reach_px(module, channels, side_px)
            if reach is not None:
                return 2 * reach + 1
    return 0


def _reach_px(module: nn.Module, channels: int, side_px: int) -> int | None:
    """Largest distance at which a pixel near the middle is felt; None where that is the edge of the window."""
    first, reach = (side_px - _STEP_PX) // 2, 0
    device = next(module.parameters()).device
    # rows and columns are alike: one pass serves two phases
    for phase in range(0, _STEP_PX, 2):
        place = torch.tensor([first + phase, first + phase + 1])
        x_1cyx = torch.zeros(1, channels, side_px, side_px)
        x_1cyx[..., place[0], place[1]] = torch.nan
        felt = torch.isnan(module(x_1cyx.to(device)))[0, 0].cpu().nonzero()
        reach = max(reach, int((felt - place).abs().max()))
        if reach >= first:
            return None
    return reach


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def window_for(receptive: int, *, patch_px: int = 128) -> tuple[int, int]:
    """Suggest the side of windows and their margin, in pixels, for a receptive field.

    Rule: the margin is half of the receptive field, rounded up to 8 px, and 64 px at most; the window is eight
    margins, between the patches of the training and 512 px, a multiple of 32, so that overlaps cost 1.8 times the
    area at most. What looks at its whole window (0) is given windows as large as the patches that it learnt from, with
    an eighth of them as margin, because what it pools is a mean over just that.
    patch_px : side of the patches of the training
    Returns (window_px, margin_px), window_px - 2 * margin_px >= window_px * 3 / 4.
    """
    least = min(max(-(-patch_px // 32) * 32, 64), WINDOW_MAX_PX)
    if receptive == 0:
        return least, least // 8
    margin = min(-(-(receptive // 2) // 8) * 8, WINDOW_MAX_PX // 8)
    return max(-(-8 * margin // 32) * 32, least), margin
