"""Losses by name, for labels of which some pixels are not to be learnt from.

Every loss sees only the pixels that it may: what is ignored changes neither its value nor any gradient.
Axes: b batch, y row, x column; n pixels that count.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from slidecube.models.errors import ModelError
from slidecube.models.nets.segmentation import segmentation_library
from slidecube.models.patches import IGNORE, LANDSLIDE, UNLABELLED

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (b, 1, y, x), labels (b, y, x) uint8 of 0, 1, 254, 255) -> mean loss, float32"""
_Pixels = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (n,), labels (n,) uint8) -> loss, n > 0"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossKind:
    """One row of the table.

    make : (positive_weight, prior) -> loss of the pixels that count
    needs : the one of "positive_weight" and "prior" that it takes
    unlabelled : it learns from unlabelled pixels; extra : it needs `pip install slidecube[nets]`; source : paper
    """

    make: Callable[[float, float], _Pixels]
    needs: str = ""
    unlabelled: bool = False
    extra: bool = False
    source: str


def _bce(_weight: float, _prior: float) -> _Pixels:
    def loss(logits_n: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
        return functional.binary_cross_entropy_with_logits(logits_n, _targets(logits_n, labels_n))

    return loss


def _weighted_ce(weight: float, _prior: float) -> _Pixels:
    def loss(logits_n: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
        return functional.binary_cross_entropy_with_logits(
            logits_n, _targets(logits_n, labels_n), pos_weight=logits_n.new_tensor(weight)
        )

    return loss


def _smp(kind: str, **settings: Any) -> Callable[[float, float], _Pixels]:
    def make(_weight: float, _prior: float) -> _Pixels:
        module: Callable[..., torch.Tensor] = getattr(segmentation_library().losses, kind)(
            mode="binary", **settings
        )

        def loss(logits_n: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
            return module(logits_n[None, None], _targets(logits_n, labels_n)[None, None])

        return loss

    return make


def _pu(_weight: float, prior: float) -> _Pixels:
    """Non-negative risk of positive and unlabelled pixels, joined with the risk of labelled ones where there are any.

    Sigmoid loss, beta 0 and gamma 1 as in the paper: where the risk of negatives falls below 0, the step goes up it.
    A batch without positives keeps the risk of its unlabelled pixels alone, as the authors' code does. Known stable
    pixels enter by the share that they have of all that are not positive.
    Source: Kiryo et al. 2017, eq. 6 and algorithm 1; share: Sakai et al. 2017, eq. 9 (PNU).
    """

    def loss(logits_n: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
        positive = logits_n[labels_n == LANDSLIDE]
        unlabelled = logits_n[labels_n == UNLABELLED]
        stable = logits_n[(labels_n != LANDSLIDE) & (labels_n != UNLABELLED)]
        missed = prior * _mean(torch.sigmoid(-positive))
        negative = _mean(torch.sigmoid(unlabelled)) - prior * _mean(torch.sigmoid(positive))
        above = missed.detach() + negative.detach() - negative  # its gradient is that of -negative
        risk = torch.where(negative < 0, above, missed + negative)
        labelled = missed + (1 - prior) * _mean(torch.sigmoid(stable))
        share = len(unlabelled) / max(len(unlabelled) + len(stable), 1)
        return share * risk + (1 - share) * labelled

    return loss


def _mean(values_n: torch.Tensor) -> torch.Tensor:
    """Mean; of nothing 0, with a gradient of 0."""
    return values_n.sum() / max(len(values_n), 1)


def _targets(logits_n: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
    return (labels_n == LANDSLIDE).to(logits_n.dtype)


LOSSES: Mapping[str, LossKind] = {
    "bce": LossKind(make=_bce, source="binary cross-entropy"),
    "weighted-ce": LossKind(
        make=_weighted_ce,
        needs="positive_weight",
        source="cross-entropy with landslides weighted, the mean over all pixels (torch's pos_weight)",
    ),
    "dice": LossKind(
        make=_smp("DiceLoss"), extra=True, source="Milletari, Navab & Ahmadi 2016, V-Net, eq. 2"
    ),
    "jaccard": LossKind(make=_smp("JaccardLoss"), extra=True, source="Rahman & Wang 2016"),
    "focal": LossKind(
        make=_smp("FocalLoss", gamma=2.0), extra=True, source="Lin et al. 2017, eq. 4, gamma 2, no alpha"
    ),
    "lovasz": LossKind(
        make=_smp("LovaszLoss", per_image=False),
        extra=True,
        source="Berman, Triki & Blaschko 2018, Lovasz hinge over the batch",
    ),
    "pu": LossKind(make=_pu, needs="prior", unlabelled=True, source="Kiryo et al. 2017, non-negative PU"),
}
"""Dice and Jaccard are 0 on a batch without landslides, as smp defines them; `bce+dice` learns from such batches."""


def check_loss(
    name: str, *, positive_weight: float | None = None, prior: float | None = None
) -> tuple[str, ...]:
    """Take a name such as `bce+dice` apart.

    Raises ModelError for unknown losses, one named twice, and numbers that are missing, not allowed or not wanted.
    """
    parts = tuple(part.strip() for part in name.split("+"))
    for part in parts:
        if part not in LOSSES:
            near = difflib.get_close_matches(part, LOSSES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ModelError(f"No loss {part!r}{hint}; losses, which + adds: {', '.join(LOSSES)}")
    if len(set(parts)) < len(parts):
        raise ModelError(f"Loss {name!r} names one twice")
    needs = {LOSSES[part].needs for part in parts}
    for key, value in (("positive_weight", positive_weight), ("prior", prior)):
        if key in needs and value is None:
            raise ModelError(f"Loss {name!r} needs {key}")
        if key not in needs and value is not None:
            raise ModelError(f"Loss {name!r} takes no {key}; got {value}")
    if positive_weight is not None and not 0 < positive_weight < float("inf"):
        raise ModelError(f"positive_weight = {positive_weight} is not above 0")
    if prior is not None and not 0 < prior < 1:
        raise ModelError(f"prior = {prior} is no share of landslides between 0 and 1")
    return parts


def loss_function(name: str, *, positive_weight: float | None = None, prior: float | None = None) -> Loss:
    """Return a loss, or a sum of several such as `bce+dice`.

    positive_weight : of a landslide's pixel against another's, of weighted-ce
    prior : share of landslides among unlabelled pixels, of pu
    A batch without any pixel that counts gives exactly 0, and gradients of 0. Computes in float32.
    Raises ModelError as `check_loss`, and where a loss of smp is wanted and smp is not installed.
    """
    parts = check_loss(name, positive_weight=positive_weight, prior=prior)
    weight = 1.0 if positive_weight is None else positive_weight
    pixels = [(LOSSES[part], LOSSES[part].make(weight, prior or 0.0)) for part in parts]

    def loss(logits_b1yx: torch.Tensor, labels_byx: torch.Tensor) -> torch.Tensor:
        logits_byx = logits_b1yx[:, 0].float()
        total = logits_byx[:0].sum()  # 0, whatever the logits are, and still a part of the graph
        for kind, of_pixels in pixels:
            counts = labels_byx != IGNORE
            if not kind.unlabelled:
                counts &= labels_byx != UNLABELLED
            logits_n = logits_byx[counts]
            if len(logits_n):
                total = total + of_pixels(logits_n, labels_byx[counts])
        return total

    return loss
