"""Ensembles: the mean of several networks' probabilities, and how far they lie apart.

Axes: v variable, y row, x column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import scipy.special

from slidecube.models.backends import Backend, Dtype
from slidecube.models.calibration import calibrated
from slidecube.models.card import ModelCard
from slidecube.models.devices import Device, require_device
from slidecube.models.errors import ModelError
from slidecube.models.network import Network, reserve_engines
from slidecube.models.network_card import NetworkCard, model_card, read_card, read_members
from slidecube.models.predict import Progress

_SURE = 1e-7  # nearest to 0 and 1 that a mean is calibrated from: float32 knows no nearer neighbour of 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Networks of which each may read other features and other windows.

    A pixel's probability is the mean of its members', calibrated where the card says so; its spread their standard
    deviation (of the members themselves, ddof 0). What one member cannot say, the ensemble does not say.
    """

    card: ModelCard
    about: NetworkCard
    members: tuple[Network, ...] = field(repr=False)

    variables = ("probability", "spread")

    @classmethod
    def of(
        cls,
        members: Sequence[Network],
        about: NetworkCard,
        *,
        threshold: float | None = None,
        min_area_m2: float | None = None,
    ) -> Self:
        """Make it of its members, in the order of its card; None = the card's own.

        Raises ModelError for other members than the card's, and for features that the card does not name.
        """
        if [one.about.identity for one in members] != [one.identity for one in about.members]:
            raise ModelError(
                f"Model {about.address} was made of other members than these, or in another order"
            )
        cards = [one.about for one in members]
        card = model_card(about, threshold=threshold, min_area_m2=min_area_m2, members=cards)
        for member in members:
            unread = [name for name in member.card.inputs.names if name not in card.inputs.names]
            if unread or member.card.inputs.version != card.inputs.version:
                what = ", ".join(unread) or "features of another version"
                raise ModelError(
                    f"Member {member.card.address} reads {what}, which the card of {about.address} does not name"
                )
        return cls(card=card, about=about, members=tuple(members))

    @classmethod
    def from_folder(
        cls, folder: Path, *, threshold: float | None = None, min_area_m2: float | None = None
    ) -> Self:
        """Read it from a folder of a card and its members' folders.

        Raises ModelError for what is missing, damaged, or was changed.
        """
        about = read_card(folder)
        read_members(folder, about)  # refuses members that it was not made of
        members = [Network.from_folder(folder / one.folder) for one in about.members]
        return cls.of(members, about, threshold=threshold, min_area_m2=min_area_m2)

    def fit(
        self, patches_nfyx: np.ndarray, *, checkpoint: Path | None = None, progress: Progress | None = None
    ) -> Self:
        """Return itself: its members are trained beforehand."""
        del patches_nfyx, checkpoint, progress
        return self

    def save(self, folder: Path) -> None:
        """Write nothing: an ensemble learns nothing from a cube."""

    def restore(self, folder: Path) -> Self:
        """Return itself."""
        del folder
        return self

    def on(self, device: Device) -> Self:
        """Return it with its members on a device; see `Detector.on`."""
        require_device(device)
        return replace(self, members=tuple(member.on(device) for member in self.members))

    @property
    def backend(self) -> str:
        """What computes its members; one from elsewhere may need another one than the rest."""
        return "+".join(sorted({member.backend for member in self.members}))

    @property
    def dtype(self) -> str:
        """In which numbers its members are computed."""
        return "+".join(sorted({member.dtype for member in self.members}))

    @property
    def tta(self) -> bool:
        """Whether its members look at their windows in several views."""
        return self.members[0].tta

    def computed_by(self, backend: Backend | None, dtype: Dtype | None, *, tta: bool = False) -> Self:
        """Return it with other backends or another dtype; see `Network.computed_by`."""
        members = tuple(member.computed_by(backend, dtype, tta=tta) for member in self.members)
        return replace(self, members=members)

    def predict_block(self, features_fyx: np.ndarray) -> np.ndarray:
        """Probability of one block whose first core pixel begins a window; see `Detector.predict_block`."""
        margin = self.card.window_px // 2
        found: np.ndarray = self.predict_region(list(features_fyx), origin_px=(0, 0), margin_px=margin)[0]
        return found

    def predict_region(
        self, planes_yx: Sequence[np.ndarray], *, origin_px: tuple[int, int], margin_px: int, threads: int = 1
    ) -> np.ndarray:
        """Mean and spread of a region: (2, y, x) float32; see `predict.WindowedDetector`.

        One member after another, so that memory does not grow with their number.
        Source: Welford 1962, updating of mean and sum of squares
        """
        reserve_engines(self.members)
        shape = [size - 2 * margin_px for size in planes_yx[0].shape]
        mean_yx, squares_yx = np.zeros(shape), np.zeros(shape)
        place = dict(zip(self.card.inputs.names, planes_yx, strict=True))
        for n, member in enumerate(self.members, start=1):
            planes = [place[name] for name in member.card.inputs.names]
            p_yx = member.predict_region(planes, origin_px=origin_px, margin_px=margin_px, threads=threads)[0]
            apart_yx = p_yx - mean_yx
            mean_yx += apart_yx / n
            squares_yx += apart_yx * (p_yx - mean_yx)
        spread_yx = np.sqrt(np.maximum(squares_yx, 0) / len(self.members))
        if self.about.calibration.method != "none":
            mean_yx = self._calibrated(mean_yx, place, margin_px)
        return np.stack([mean_yx, spread_yx]).astype(np.float32)

    def _calibrated(self, mean_yx: np.ndarray, planes: dict[str, np.ndarray], margin_px: int) -> np.ndarray:
        """Calibrate a mean by its logit."""
        settings, strata_yx = self.about.calibration, None
        if settings.strata:
            height, width = mean_yx.shape
            core = np.s_[margin_px : margin_px + height, margin_px : margin_px + width]
            strata_yx = planes[settings.by][core]
        logits_yx = scipy.special.logit(np.clip(mean_yx, _SURE, 1 - _SURE)).astype(np.float32)
        found: np.ndarray = calibrated(settings, logits_yx, strata_yx)
        return found
