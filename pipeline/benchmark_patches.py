"""Benchmarks as the pipeline's features: indices, changes and published scalings of what their patches hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xarray as xr

from slidecube.models.benchmarks.landslide4sense import CHANNELS as L4S_CHANNELS
from slidecube.models.benchmarks.landslide4sense import open_landslide4sense
from slidecube.models.benchmarks.sen12landslides import CHANNELS as S12_CHANNELS
from slidecube.models.benchmarks.sen12landslides import open_sen12landslides
from slidecube.models.card import FeatureSpec
from slidecube.models.patches import IGNORE, Patches
from slidecube.models.splits import PARTS, Part
from slidecube.pipeline.composite import SCALE, SHIFT
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import SIDES, Layers, build_features, feature, mnf_images, required_variables
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.radar import DB_PER_STEP, DB_SHIFT
from slidecube.pipeline.terrain import TERRAIN_VARIABLES
from slidecube.pipeline.training_tables import DataTable, PatchTable


@dataclass(frozen=True, kw_only=True)
class DerivedPatches:
    """Patches whose features are made of those of others, by the very functions that make them of cubes.

    of : patches of what is measured, such as B04_post and slope_deg
    """

    of: Patches
    features: FeatureSpec

    @property
    def units(self) -> tuple[str, ...]:
        """Units of the features."""
        return tuple(feature(name).unit for name in self.features.names)

    @property
    def resolution_m(self) -> float:
        """Side of a pixel."""
        return self.of.resolution_m

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        return self.of.patch_px

    @cached_property
    def digest(self) -> str:
        """Of all that decides what is read."""
        return content_key("derived", self.of.digest, self.features)

    @property
    def regions(self) -> tuple[str, ...]:
        """Region of each patch."""
        return self.of.regions

    def __len__(self) -> int:
        return len(self.of)

    def read(self, index: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Read a patch: (f, y, x) float32, NaN = unknown, and (y, x) uint8 labels, 255 where anything is unknown."""
        measured_fyx, labels_yx = self.of.read(index, seed=seed)
        sides: dict[str, xr.Dataset] = {side: xr.Dataset() for side in SIDES}
        for name, values in zip(self.of.features.names, measured_fyx, strict=True):
            side, variable = _place(name)
            sides[side][variable] = (("y", "x"), _stored(side, variable, values))
        built = build_features(self.features, Layers(**sides))  # type: ignore[arg-type]  # by the names of SIDES
        x_fyx = np.stack([built[name].values for name in self.features.names]).astype(np.float32)
        return x_fyx, np.where(np.isfinite(x_fyx).all(axis=0), labels_yx, np.uint8(IGNORE))


def open_benchmark(
    table: DataTable, settings: PatchTable, features: FeatureSpec, *, base: Path
) -> dict[Part, Patches]:
    """Open a benchmark's folder; base : the folder that its path starts from.

    Raises PipelineError for features that cannot be made of it, ModelError for its files, each in one line.
    """
    assert table.folder is not None
    folder = (base / Path(table.folder).expanduser()).resolve()
    if not folder.is_dir():
        raise PipelineError(f"[[data]] folder: {folder} is no folder; name that of {table.kind}")
    held = set(L4S_CHANNELS if table.kind == "landslide4sense" else S12_CHANNELS[table.modality])
    measured = features if set(features.names) <= held else _measured(features, held, table)
    if table.kind == "landslide4sense":
        found = open_landslide4sense(
            folder,
            measured,
            use=table.used,
            split=table.split,
            shares=settings.shares,
            region=table.region or "landslide4sense",
        )
    else:
        found = open_sen12landslides(
            folder,
            measured,
            modality=table.modality,
            pairing=table.pairing,
            use=table.used,
            shares=settings.shares,
            region=table.region,
        )
    if measured is features:
        return {part: found[part] for part in PARTS if part in found}
    return {part: DerivedPatches(of=found[part], features=features) for part in PARTS if part in found}


def _measured(features: FeatureSpec, held: set[str], table: DataTable) -> FeatureSpec:
    """Name what features are made of; raises PipelineError where a benchmark does not hold it."""
    if mnf_images(features):
        raise PipelineError(
            "MNF components are fitted to one run, and to no benchmark; name bands or indices"
        )
    wanted = {
        name: [_name(*read.partition(".")[::2]) for read in feature(name).reads] for name in features.names
    }
    for name, reads in wanted.items():
        lacking = [read for read in reads if read not in held]
        if lacking:
            raise PipelineError(
                f"Feature {name!r} needs {', '.join(lacking)}, and {table.kind}"
                f"{f' ({table.modality})' if table.kind == 'sen12landslides' else ''} has only "
                f"{', '.join(sorted(held))}"
            )
    needed = required_variables(features)
    names = [_name(side, variable) for side in SIDES for variable in needed[side]]
    return FeatureSpec(names=tuple(names))


def _name(side: str, variable: str) -> str:
    """Name by which benchmarks know a stored variable."""
    if side in ("pre", "post"):
        return f"{variable}_{side}"
    return f"{variable.lower()}_{side.removeprefix('radar_')}" if side.startswith("radar") else variable


def _place(name: str) -> tuple[str, str]:
    """Side and stored variable of what a benchmark measures: the other way round."""
    first, _, side = name.rpartition("_")
    if side not in ("pre", "post"):
        return "terrain", name
    return (f"radar_{side}", first.upper()) if first in ("vv", "vh") else (side, first)


def _stored(side: str, variable: str, values_yx: np.ndarray) -> np.ndarray:
    """Bring measured values onto the scale of layers; what is not known is their nodata."""
    if side == "terrain":
        return TERRAIN_VARIABLES[variable].stored(values_yx)
    steps = values_yx / DB_PER_STEP + DB_SHIFT if side.startswith("radar") else values_yx * SCALE + SHIFT
    known = np.isfinite(steps)
    return np.where(known, np.clip(np.rint(np.where(known, steps, 0.0)), 1, 65_535), 0).astype(np.uint16)
