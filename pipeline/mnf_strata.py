"""One MNF a stratum beside that of the whole, and the components of an image where strata meet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.mnf import Mnf, component_names, fit_mnf, mapped, picked
from slidecube.pipeline.moments import Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class StratifiedMnf:
    """The MNF of an image, of the whole area and of its strata; frozen with its run.

    whole : of all pixels, also those in no stratum
    strata : name -> its own MNF, each component turned to the sign of the whole's
    fallback : name -> why a stratum takes the MNF of the whole
    """

    whole: Mnf
    strata: Mapping[str, Mnf] = field(default_factory=dict)
    fallback: Mapping[str, str] = field(default_factory=dict)

    def of(self, stratum: str) -> Mnf:
        """MNF of a stratum: its own, or that of the whole."""
        return self.strata.get(stratum, self.whole)

    @property
    def pixels(self) -> int:
        """Pixels of the whole from which it was fitted."""
        return self.whole.pixels

    def components(
        self,
        image: Mapping[str, xr.DataArray] | xr.Dataset,
        weights: xr.Dataset,
        *,
        suffix: str = "",
        count: int,
    ) -> xr.Dataset:
        """Components of an image, lazily where it is lazy, strata blended into each other.

        image : (y, x) bands, NaN = unknown; weights : (y, x) by name of a stratum, adding up to 1; empty: the whole
        count : so many; those that a stratum does not keep are 0 there: its mean, which tells nothing
        Returns (y, x) float32 mnf1_<suffix>, ...; the sum of weight times component of each stratum.
        """
        arrays = picked(image, self.whole.bands)
        names = [str(name) for name in weights.data_vars]
        if not names:
            return mapped(
                lambda *bands: self.whole.kept_of(bands, count), arrays, component_names(count, suffix)
            )
        parts, bands = [self.of(name) for name in names], len(arrays)

        def block(*given: np.ndarray) -> np.ndarray:
            out = np.zeros((count, *given[0].shape))
            for part, weight in zip(parts, given[bands:], strict=True):
                if weight.any():
                    out += weight * part.kept_of(given[:bands], count).astype(np.float64)
            return out.astype(np.float32)

        return mapped(block, [*arrays, *(weights[name] for name in names)], component_names(count, suffix))

    def strata_json(self) -> str:
        """Write what is fitted to the strata, exactly; the whole has a file of its own."""
        fits = {name: json.loads(mnf.to_json()) for name, mnf in self.strata.items()}
        return json.dumps({"strata": fits, "fallback": dict(self.fallback)})

    @classmethod
    def from_json(cls, whole: str, strata: str = "") -> StratifiedMnf:
        """Read what `Mnf.to_json` and `strata_json` wrote."""
        said = json.loads(strata or '{"strata": {}, "fallback": {}}')
        fits = {name: Mnf.from_json(json.dumps(fit)) for name, fit in said["strata"].items()}
        return cls(whole=Mnf.from_json(whole), strata=fits, fallback=said["fallback"])


def fit_strata(
    whole: Moments,
    strata: Mapping[str, Moments],
    *,
    bands: tuple[str, ...],
    components: int,
    share: float | None = None,
    least_px: int = 0,
) -> StratifiedMnf:
    """Fit the whole, and each stratum that has enough pixels.

    components : to be kept, of share : of the sum of eigenvalues that the kept ones hold, each fit for itself, at most
        `components` of them; None: always so many
    least_px : of a stratum; one with fewer, or that cannot be fitted alone, takes the whole's, and that is said
    Raises PipelineError when the whole cannot be fitted.
    """

    def kept(mnf: Mnf) -> Mnf:
        return mnf if share is None else mnf.holding(share, most=components)

    general = kept(fit_mnf(whole, bands=bands, components=components))
    own, fallback = {}, {}
    for name, sums in sorted(strata.items()):
        if sums.pixels < least_px:
            fallback[name] = f"{sums.pixels} pixels, fewer than strata_min_px = {least_px}"
            continue
        try:
            fitted = fit_mnf(sums, bands=bands, components=components)
        except PipelineError as error:
            fallback[name] = str(error)
            continue
        own[name] = kept(fitted).turned_to(general, sums.covariance)
    return StratifiedMnf(whole=general, strata=own, fallback=fallback)
