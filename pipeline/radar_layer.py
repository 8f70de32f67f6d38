"""The radar layer of a window: scenes, geometry and composite of one orbit direction, block by block on the lattice.

Each track has its own geometry. An observation counts where its track sees the ground, in neither layover nor shadow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import dask
import dask.array as da
import numpy as np
import shapely
from odc.geo.geobox import GeoBox

from slidecube.catalog.load import Loader, ReadLog, load
from slidecube.catalog.radar import OrbitState, acquisition_of
from slidecube.catalog.scenes import Scene
from slidecube.pipeline.blocks import touching
from slidecube.pipeline.composite import observations
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.radar import (
    COUNT_VARIABLES,
    SpeckleFilter,
    days_of,
    known_everywhere,
    of_overpasses,
    radar_block,
    stored_of_power,
)
from slidecube.pipeline.radar_geometry import (
    INCIDENCE_RANGE_DEG,
    Track,
    block_geometry,
    padded,
    slope_factor,
    view,
)
from slidecube.pipeline.sensors import by_blocks_of, differences, sensor_of, sensor_pairs, thinned
from slidecube.pipeline.terrain import terrain_block

BANDS = ("VV", "VH")
"""Polarisations of a radar layer; a scene that lacks one of them is not read."""

ANGLE_NODATA = 65535
MASK_NODATA = 255
VARIABLES = (*BANDS, *COUNT_VARIABLES, "lia_deg", "layover", "shadow")
"""Stored variables of a radar layer."""

SlopeCorrection = Literal["none", "volume", "surface"]
_PARTS = ("lia_deg", "layover", "shadow", "factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class RadarSettings:
    """How the observations of a window become one radar layer.

    slope_correction : of sigma0, after Vollrath, Mullissa & Reiche 2020
    """

    slope_correction: SlopeCorrection = "none"
    speckle: SpeckleFilter = field(default_factory=SpeckleFilter)


def track_of(scene: Scene) -> Track:
    """Track from which a scene was taken.

    A direction that the item does not say follows from its place: only one of the two passes there.
    Raises PipelineError where the relative orbit cannot see the scene's ground.
    """
    said = acquisition_of(scene)
    centre = shapely.geometry.shape(scene.item["geometry"]).centroid
    states: tuple[OrbitState, ...] = (said.orbit_state,) if said.orbit_state else ("ascending", "descending")
    low, high = INCIDENCE_RANGE_DEG
    seen: dict[Track, float] = {}
    for state in states:
        track = Track(relative_orbit=said.relative_orbit, orbit_state=state)
        incidence = float(view(track, np.array(centre.x), np.array(centre.y)).incidence_deg)
        if low <= incidence <= high:
            return track
        seen[track] = incidence
    tried = ", ".join(f"{t.orbit_state} {angle:.0f}" for t, angle in seen.items())
    raise PipelineError(
        f"Item {scene.id!r} says relative orbit {said.relative_orbit}, from which its ground cannot be seen: incidence "
        f"in degrees would be {tried}, allowed are {low:g} to {high:g}; correct sat:relative_orbit and "
        "sat:orbit_state, or leave it out"
    )


def radar_layer(
    scenes: Sequence[Scene],
    dem: Sequence[Scene],
    geobox: GeoBox,
    *,
    settings: RadarSettings,
    block_px: int,
    log: ReadLog | None = None,
    loader: Loader = "odc-stac",
    gaps: bool = False,
) -> dict[str, da.Array]:
    """Composite of radar scenes over a window, lazily, block by block on the lattice.

    scenes : of one window of time and one orbit direction; dem : DEM items under the window and `HALO_M` around it
    geobox : on the lattice's blocks; gaps : add `gaps` where two satellites took the scenes: VV's and VH's mismatch by
        block, see `sensors.differences`, of what goes into the medians, in hundredths of a decibel, track by track
    Returns (y, x): "VV", "VH" uint16 (see `radar_composite`), `count`, `date_first`, `date_last` uint16; `lia_deg`
    uint16, local incidence angle in hundredths of a degree, the mean of the observations' (of all tracks where there is
    none), 65535 = nodata; `layover`, `shadow` uint8: 1 where no track sees the ground and one of them for this reason,
    255 where no scene looked.
    """
    tracks = sorted({track_of(scene) for scene in scenes})
    which = np.array([tracks.index(track_of(scene)) for scene in scenes])
    cube = load(scenes, geobox, BANDS, block_px=block_px, log=log, loader=loader)
    geometry = _geometry(tracks, list(dem), geobox, settings, block_px=block_px, log=log, loader=loader)
    vv, vh = (cube[band].data for band in BANDS)
    touches_tji = touching(scenes, geobox, vv, block_px)
    days, groups = days_of(scenes), observations(scenes)

    def observed(
        parts: np.ndarray, bands: Sequence[np.ndarray], there: np.ndarray
    ) -> tuple[_Looked, Sequence[np.ndarray], np.ndarray]:
        looked = _Looked(
            parts=parts.reshape(len(tracks), len(_PARTS), *parts.shape[1:]), which=which, there=there
        )
        power = [band / looked.factor() for band in bands] if settings.slope_correction != "none" else bands
        return looked, power, looked.usable()

    def block(
        parts: np.ndarray, *bands: np.ndarray, block_id: tuple[int, int, int] = (0, 0, 0)
    ) -> np.ndarray:
        looked, power, usable = observed(parts, bands, touches_tji[:, block_id[1], block_id[2]])
        made = radar_block(power, usable, days=days, groups=groups, speckle=settings.speckle)
        return np.concatenate([made, looked.summary(known_everywhere(power, usable))])

    pairs = sensor_pairs(scenes) if gaps else []
    sensors, views = [sensor_of(scenes[g[0]]) for g in groups], [int(which[g[0]]) for g in groups]

    def compared(
        parts: np.ndarray, *bands: np.ndarray, block_id: tuple[int, int, int] = (0, 0, 0)
    ) -> np.ndarray:
        few = [thinned(band) for band in bands]
        _, power, usable = observed(thinned(parts), few, touches_tji[:, block_id[1], block_id[2]])
        known = known_everywhere(power, usable)
        stored = [stored_of_power(of_overpasses(band, known, groups)) for band in power]
        return np.concatenate([differences(s, sensors, views, pairs) for s in stored])[:, None, None]

    out = da.map_blocks(
        block,
        geometry,
        vv,
        vh,
        dtype=np.uint16,
        chunks=((len(VARIABLES),), *vv.chunks[1:]),
        meta=np.empty((0, 0, 0), np.uint16),
    )
    made = {name: out[i] for i, name in enumerate(VARIABLES)}
    made |= {name: made[name].astype(np.uint8) for name in ("layover", "shadow")}
    if pairs:
        made["gaps"] = by_blocks_of(compared, [geometry, vv, vh], n=2 * len(pairs) * len(BANDS))
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Looked:
    """How the scenes of a block looked at it.

    parts : (track, part, y, x) float32; which : (t,) number of each scene's track; there : (t,) bool, whether the
    scene's footprint touches the block
    """

    parts: np.ndarray
    which: np.ndarray
    there: np.ndarray

    def _part(self, name: str) -> np.ndarray:
        part: np.ndarray = self.parts[:, _PARTS.index(name)]
        return part

    def usable(self) -> np.ndarray:
        """Pixels that each scene sees: (t, y, x) bool."""
        hidden = (self._part("layover") > 0) | (self._part("shadow") > 0)
        seen: np.ndarray = ~hidden[self.which] & self.there[:, None, None]
        return seen

    def factor(self) -> np.ndarray:
        """What slopes make of each scene's sigma0: (t, y, x), NaN where it cannot be said."""
        return np.asarray(self._part("factor")[self.which])

    def summary(self, known_tyx: np.ndarray) -> np.ndarray:
        """Local incidence in hundredths of a degree, layover, shadow: (3, y, x) uint16."""
        out = np.zeros((3, *known_tyx.shape[1:]), np.uint16)
        out[0], out[1:] = ANGLE_NODATA, MASK_NODATA
        tracks = np.unique(self.which[self.there])
        if not len(tracks):
            return out
        angles = self._part("lia_deg")[tracks]
        weights = np.stack([known_tyx[self.which == track].sum(axis=0) for track in tracks])
        weights = np.where(weights.sum(axis=0) > 0, weights, 1)
        # whole numbers, so that the order of dates leaves no trace
        hundredths = np.rint(np.nan_to_num(angles) * 100).astype(np.int64)
        mean = np.rint((weights * hundredths).sum(axis=0) / weights.sum(axis=0))
        out[0] = np.where(np.isnan(angles).any(axis=0), ANGLE_NODATA, mean)
        folded, dark = (self._part(name)[tracks] > 0 for name in ("layover", "shadow"))
        hidden = (folded | dark).all(axis=0)
        out[1], out[2] = hidden & folded.any(axis=0), hidden & dark.any(axis=0)
        return out


def _geometry(
    tracks: list[Track],
    dem: list[Scene],
    geobox: GeoBox,
    settings: RadarSettings,
    *,
    block_px: int,
    log: ReadLog | None,
    loader: Loader,
) -> da.Array:
    """Geometry of each track, lazily: (track * part, y, x) float32, one block of the lattice at a time."""
    rows, cols = ([slice(i, min(i + block_px, n)) for i in range(0, n, block_px)] for n in geobox.shape)
    read = dask.delayed(_geometry_block, pure=False)
    n = len(tracks) * len(_PARTS)

    def block(r: slice, c: slice) -> da.Array:
        part = geobox[r, c]
        made: da.Array = da.from_delayed(
            read(tracks, dem, part, model=settings.slope_correction, log=log, loader=loader),
            (n, *part.shape),
            np.float32,
        )
        return made

    return da.block([[block(r, c) for c in cols] for r in rows])


def _geometry_block(
    tracks: list[Track],
    dem: list[Scene],
    geobox: GeoBox,
    *,
    model: SlopeCorrection,
    log: ReadLog | None,
    loader: Loader,
) -> np.ndarray:
    on_grid = terrain_block(dem, geobox, log, loader)
    heights = terrain_block(dem, padded(geobox), log, loader)[0]
    out = []
    for track in tracks:
        seen = block_geometry(track, geobox, on_grid, heights)
        factor = np.ones(geobox.shape, np.float32)
        if model != "none":
            factor = slope_factor(seen.incidence_deg, seen.slopes, model)
        out += [seen.local_incidence_deg, seen.layover, seen.shadow, factor]
    return np.stack(out).astype(np.float32)
