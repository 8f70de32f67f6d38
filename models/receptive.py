"""How far a network looks: measured, because nobody adds up strides and kernels of a hundred encoders.

Axes: c channel, y row, x column.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

WINDOW_MAX_PX = 512
"""A chunk of the cubes: windows have 513 px at most and sides are multiples of 32."""
_DRAWS = 3
_STEP_PX = 32


def influence_yx(module: nn.Module, channels: int, window_px: int) -> np.ndarray:
    """How strongly the window's central pixels depend on each other pixel, by its offset from them.

    The absolute gradient of a logit, summed over channels, over random windows (a ReLU or a maximum hides some paths
    in one of them) and over the phases of a stride of 32 px (networks that halve look further to one side).
    module : as built; its weights and mode are left as they are
    Returns (2 w - 1, 2 w - 1) float64, offset 0 in the middle. Raises ValueError for windows below 64 px.
    """
    if window_px < 2 * _STEP_PX:
        raise ValueError(f"a window of {window_px} px is too small to measure in")
    total = np.zeros((2 * window_px - 1,) * 2)
    first = (window_px - _STEP_PX) // 2
    device = next(module.parameters()).device
    with _evaluating(module):
        generator = torch.Generator().manual_seed(0)
        for draw in range(_DRAWS):
            phase = first + draw * (_STEP_PX - 1) // (_DRAWS - 1)
            x_1cyx = torch.randn(1, channels, window_px, window_px, generator=generator).to(device)
            x_1cyx.requires_grad_()
            (gradient_1cyx,) = torch.autograd.grad(module(x_1cyx)[0, 0, phase, phase], x_1cyx)
            corner = window_px - 1 - phase
            place = slice(corner, corner + window_px)
            total[place, place] += gradient_1cyx[0].abs().sum(dim=0).double().cpu().numpy()
    return total


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def receptive_px(module: nn.Module, channels: int, window_px: int) -> int:
    """Side of the square around a pixel outside of which nothing changes its logit, in pixels.

    Returns 0 where that is the whole window, or more than the window can show: every pixel then depends on where
    windows lie. Always odd otherwise.
    """
    influence = influence_yx(module, channels, window_px)
    reach = _reach(influence > 0)
    # a phase near the middle sees this far on both sides
    if reach >= (window_px - _STEP_PX) // 2:
        return 0
    return 2 * reach + 1


def effective_px(module: nn.Module, channels: int, window_px: int, *, share: float = 0.95) -> int:
    """Side of the smallest square around a pixel that holds a share of all influence on its logit.

    Source: Luo et al. 2016, Understanding the effective receptive field, who show it to be a fraction of the whole.
    """
    influence = influence_yx(module, channels, window_px)
    rings = np.bincount(_distance(influence.shape[0]).ravel(), weights=influence.ravel())
    within = np.cumsum(rings)
    return 2 * int(np.searchsorted(within, share * within[-1])) + 1


def _distance(side_px: int) -> np.ndarray:
    """Chessboard distance from the middle."""
    offset = np.abs(np.arange(side_px) - side_px // 2)
    return np.maximum.outer(offset, offset)


def _reach(seen_yx: np.ndarray) -> int:
    return int(_distance(seen_yx.shape[0])[seen_yx].max(initial=0))


def window_for(receptive: int, *, patch_px: int = 128) -> tuple[int, int]:
    """Suggest a window and its margin, in pixels, for a receptive field.

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
    window = min(max(-(-8 * margin // 32) * 32, least), WINDOW_MAX_PX)
    return window, margin
