"""The simulated archive: a static STAC catalogue of scenes and a DEM, and the truth beside it."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from odc.geo.geobox import GeoBox

from slidecube.catalog.radar import OrbitState
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.simulate import fields, write
from slidecube.pipeline.simulate.changes import ChangeMap, all_changes, draw, fine_geobox, to_frame
from slidecube.pipeline.simulate.ground import ground_on
from slidecube.pipeline.simulate.landscape import Landscape, build_landscape
from slidecube.pipeline.simulate.light import Illumination, Sun, illuminate, sun_on
from slidecube.pipeline.simulate.optics import NATIVE_M, draw_shift, sampler, spread_px
from slidecube.pipeline.simulate.parameters import Overpass, Parameters, Size, load_parameters
from slidecube.pipeline.simulate.radar import RadarPass, backscatter, passes, scene_geometry
from slidecube.pipeline.simulate.radar import look as look_radar
from slidecube.pipeline.simulate.scene import Observed, clean, draw_sky, observe
from slidecube.pipeline.simulate.terrain import detector_dem, scene_geobox, true_terrain

_THREADS = 2
_LARGE_PX = 8_000_000  # above, one scene at a time: each takes about 60 bytes a pixel
_TILE_SNAP_PX = 6  # 60 m: items start on whole pixels of every band


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedArchive:
    """Where a simulated archive lies and what it holds.

    root : holds archive/ and truth/
    geobox : 10 m pixels of the scene
    seed : of its random numbers
    event : day of the landslides; pre, post : windows that suit it, both ends inclusive
    """

    root: Path
    geobox: GeoBox
    seed: int
    event: dt.date
    pre: tuple[dt.date, dt.date]
    post: tuple[dt.date, dt.date]

    @property
    def catalog(self) -> Path:
        """Root catalogue."""
        return self.root / "archive" / "catalog.json"

    @property
    def optical(self) -> Path:
        """Collection of the scenes: a source of optical items."""
        return self.root / "archive" / "sentinel-2-l2a" / "collection.json"

    @property
    def radar(self) -> Path:
        """Collection of the radar scenes, where they were asked for: a source of radar items."""
        return self.root / "archive" / "sentinel-1-rtc" / "collection.json"

    @property
    def dem(self) -> Path:
        """Collection of the DEM that a detector gets: a source of terrain."""
        return self.root / "archive" / "dem" / "collection.json"

    @property
    def landslides(self) -> Path:
        """Truth: outlines of the landslides, GeoParquet."""
        return self.root / "truth" / "landslides.parquet"

    @property
    def confusers(self) -> Path:
        """Every other change, GeoParquet."""
        return self.root / "truth" / "confusers.parquet"

    @property
    def oracle(self) -> Path:
        """Noise-free image, GeoTIFF: see `docs/simulation.md`."""
        return self.root / "truth" / "noise_free.tif"

    @property
    def aoi(self) -> Path:
        """Outline of the scene, GeoJSON in longitude and latitude."""
        return self.root / "truth" / "area.geojson"

    def __str__(self) -> str:
        return f"SIMULATED archive {self.catalog}, truth {self.landslides}"


def simulate_archive(
    out: Path,
    *,
    seed: int = 0,
    size: str = "default",
    extent_km: float | None = None,
    overpasses: int | None = None,
    radar: bool = False,
    parameters: Parameters | None = None,
) -> SimulatedArchive:
    """Simulate a Sentinel-2 archive over a real DEM, with landslides whose outlines are known.

    out : gets archive/ (STAC catalogue, COGs) and truth/; files of an earlier simulation are overwritten
    size : "default" (16 km), "small" (3.6 km, for tests) or "island"; extent_km : another side, same centre
    overpasses : keep only so many, the clearest, a third of them after the event; 0 = truth and DEM alone (for tests)
    radar : add Sentinel-1 of both directions, of each as many dates as `overpasses` says; nothing else changes but
        the root catalogue's links
    Raises PipelineError if the size is unknown, the extent leaves the DEM, or the folder cannot be made.
    The same arguments give the same bytes on the same machine and versions.
    """
    p = parameters or load_parameters()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PipelineError(f"Folder {out} cannot be made: {error.strerror}; name another") from None
    world = build_world(p, seed, _size(p, size, extent_km))
    archive = SimulatedArchive(
        root=out,
        geobox=world.landscape.geobox,
        seed=seed,
        event=p.season.event,
        pre=p.season.pre,
        post=p.season.post,
    )
    _write_truth(archive, world)
    children = _write_scenes(archive, world, _some(p.overpass, p.season.event, overpasses))
    if radar:
        after = max(1, (overpasses or 0) // 3)
        most = (max(1, overpasses - after), after) if overpasses else None
        children.append(_write_radar(archive, world, passes(p, most)))
    write.write_root(archive.catalog, children)
    return archive


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything that is on the ground, before a satellite looks."""

    parameters: Parameters
    seed: int
    landscape: Landscape
    changes: ChangeMap


def build_world(parameters: Parameters, seed: int, size: Size) -> World:
    """Make terrain, land cover and changes."""
    terrain = true_terrain(parameters, scene_geobox(parameters.area, size), seed)
    if not (terrain.scene_dem_m > 0).any():
        raise PipelineError(
            f"No land lies within {size.extent_m / 1000:g} km of {size.centre_m}; move the centre"
        )
    landscape = build_landscape(parameters, terrain, seed)
    return World(
        parameters=parameters,
        seed=seed,
        landscape=landscape,
        changes=all_changes(parameters, landscape, seed),
    )


def _size(p: Parameters, name: str, extent_km: float | None) -> Size:
    if name not in p.area.sizes:
        raise PipelineError(f"Unknown size {name!r} of the simulation; sizes: {', '.join(p.area.sizes)}")
    size = p.area.sizes[name]
    if extent_km is None:
        return size
    if not 1.2 <= extent_km <= 60:
        raise PipelineError(f"extent_km={extent_km} is not allowed; use 1.2 to 60")
    return Size(centre_m=size.centre_m, extent_m=extent_km * 1000)


def _some(all_: tuple[Overpass, ...], event: dt.date, count: int | None) -> tuple[Overpass, ...]:
    """The clearest overpasses of each side, in order; a third after the event."""
    if count is None or count >= len(all_):
        return all_
    if count == 0:
        return ()
    if count < 2:
        raise PipelineError(f"overpasses={count} is not allowed; use 0, or 2 and more to see both sides")
    after = max(1, count // 3)
    sides = ([o for o in all_ if o.day < event], count - after), ([o for o in all_ if o.day >= event], after)
    return tuple(
        o for side, n in sides for o in sorted(sorted(side, key=lambda o: o.cloud)[:n], key=lambda o: o.day)
    )


def _write_scenes(archive: SimulatedArchive, world: World, overpasses: tuple[Overpass, ...]) -> list[Path]:
    """Write scenes and DEM; returns their collections."""
    folder = archive.optical.parent
    jobs = [(o, baseline) for o in overpasses for baseline in o.baselines]
    large = archive.geobox.shape[0] * archive.geobox.shape[1] > _LARGE_PX
    workers = 1 if large else min(_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(lambda job: list(_scene(world, folder, *job)), jobs))
    items = [path for paths in done for path in paths]
    dem, transform = detector_dem(
        world.parameters.detector_dem,
        world.landscape.terrain,
        world.landscape.canopy_m(world.parameters),
        world.seed,
    )
    write.write_dem(archive.dem.parent, dem, transform)
    children = [archive.dem]
    if overpasses:
        children.insert(0, archive.optical)
        write.write_collection(
            folder,
            write.OPTICAL,
            title="SIMULATED Sentinel-2 level 2A",
            items=items,
            bbox=_outline(archive.geobox).bounds,
            days=(overpasses[0].day.isoformat(), overpasses[-1].day.isoformat()),
        )
    return children


def _write_radar(archive: SimulatedArchive, world: World, seen: list[RadarPass]) -> Path:
    p, folder = world.parameters, archive.radar.parent
    states: tuple[OrbitState, ...] = ("ascending", "descending")
    geometry = {state: scene_geometry(p, world.landscape.terrain, state) for state in states}
    items = []
    for one in seen:
        rasters = {
            band: look_radar(p, clean_power, geometry[one.orbit_state], one, seed=world.seed, band=band)
            for band, clean_power in backscatter(p, world.landscape, world.changes, one, seed=world.seed)
        }
        orbit = p.radar.relative_orbit[one.orbit_state]
        item = write.RadarItem(
            day=one.day, orbit_state=one.orbit_state, relative_orbit=orbit, looks=p.radar.looks
        )
        items.append(write.write_radar(folder, item, rasters, geobox=archive.geobox))
    return write.write_collection(
        folder,
        write.RADAR,
        title="SIMULATED Sentinel-1 gamma0, terrain corrected",
        items=items,
        bbox=_outline(archive.geobox).bounds,
        days=(p.season.pre[0].isoformat(), p.season.post[1].isoformat()),
    )


def _scene(world: World, folder: Path, overpass: Overpass, baseline: str) -> Iterator[Path]:
    """Observe one overpass with one baseline and write its two items."""
    p, land = world.parameters, world.landscape
    sun = sun_on(p.season, overpass.day)
    light = illuminate(land.terrain, sun, p.light)
    seen = look(world, overpass, baseline, sun, light)
    for tile, cols in _tiles(p, land.geobox):
        part = _Part(overpass=overpass, baseline=baseline, sun=sun, tile=tile, cols=cols)
        yield _granule(world, folder, part, seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Which part of an overpass becomes an item: columns of 10 m, processed with one baseline."""

    overpass: Overpass
    baseline: str
    sun: Sun
    tile: str
    cols: slice


def look(world: World, overpass: Overpass, baseline: str, sun: Sun, light: Illumination) -> Observed:
    """Render one overpass over the whole scene."""
    p = world.parameters
    rng = fields.generator(world.seed, "shift", overpass.day, baseline)
    east, north = draw_shift(p.optics, baseline, rng)
    shift = {
        band: (
            east + p.optics.band_shift_m * float(rng.standard_normal()),
            north + p.optics.band_shift_m * float(rng.standard_normal()),
        )
        for band in p.spectra.bands
    }
    ground = ground_on(p, world.landscape, world.changes, overpass.day)
    rho = clean(ground, light, p.spectra.bands, shift)
    sky = draw_sky(p, world.landscape, overpass, sun, world.seed)
    return observe(p, world.landscape, overpass, reflectance=rho, sky=sky, seed=world.seed)


def _tiles(p: Parameters, geobox: GeoBox) -> list[tuple[str, slice]]:
    """The two overlapping tiles and their columns of 10 m."""
    n = geobox.shape[1]
    west = min(-(-round(p.items.west_edge * n) // _TILE_SNAP_PX) * _TILE_SNAP_PX, n)
    east = round(p.items.east_edge * n) // _TILE_SNAP_PX * _TILE_SNAP_PX
    return [(p.items.west, slice(0, west)), (p.items.east, slice(east, n))]


def _granule(world: World, folder: Path, part: _Part, seen: Observed) -> Path:
    p, cols, baseline = world.parameters, part.cols, part.baseline
    scl = seen.scl[:, cols.start // 2 : cols.stop // 2]
    valid = max(int((scl > 0).sum()), 1)
    granule = write.Granule(
        overpass=part.overpass,
        baseline=baseline,
        tile=part.tile,
        sun=part.sun,
        relative_orbit=p.items.relative_orbit,
        cloud_pct=100 * float(np.isin(scl, (8, 9, 10)).sum()) / valid,
        nodata_pct=100 * float((scl == 0).mean()),
        new_style=float(baseline) >= 4 and part.overpass.platform.endswith("a"),
        seed=world.seed,
    )
    # aerosol is retrieved a tile at a time: neighbours differ a little where they overlap
    rng = fields.generator(world.seed, "tile", part.tile, part.overpass.day, baseline)
    aerosol = p.radiometry.tile_path_sd * float(rng.standard_normal())
    rasters: dict[str, np.ndarray] = {}
    for number, band in enumerate(p.spectra.bands):
        k = NATIVE_M[band] // 10
        rho = seen.reflectance[band][:, cols.start // k : cols.stop // k]
        haze = np.float32(aerosol * p.radiometry.path_sd[number] / p.radiometry.path_sd[0])
        rasters[band] = write.to_dn(rho + haze, granule.offset)
    rasters["SCL"] = scl
    affine = world.landscape.geobox.affine
    corner = (affine.c + cols.start * affine.a, affine.f)
    return write.write_granule(folder, granule, rasters, crs=str(world.landscape.geobox.crs), corner=corner)


def _write_truth(archive: SimulatedArchive, world: World) -> None:
    folder = archive.root / "truth"
    folder.mkdir(parents=True, exist_ok=True)
    changes, geobox = world.changes.changes, archive.geobox
    to_frame(changes, geobox, landslides=True).to_parquet(archive.landslides)
    to_frame(changes, geobox, landslides=False).to_parquet(archive.confusers)
    image = noise_free(world)
    tags = {
        "SIMULATED": "YES",
        "DESCRIPTION": "Noise-free image: share of fresh scar, NDVI before, NDVI after, true elevation",
    }
    write.write_cog(
        archive.oracle, image, crs=str(geobox.crs), transform=geobox.affine, nodata=None, tags=tags
    )
    area = {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {"name": "simulated", "event": archive.event.isoformat()},
                "geometry": shapely.geometry.mapping(_outline(geobox)),
            }
        ],
    }
    archive.aoi.write_text(json.dumps(area) + "\n", encoding="utf-8")
    core = shapely.geometry.mapping(world.changes.event_core)
    (folder / "event_core.json").write_text(
        json.dumps({"crs": str(geobox.crs), "geometry": core}) + "\n", encoding="utf-8"
    )


def noise_free(world: World) -> np.ndarray:
    """What perfect eyes would see: no air, clouds, slope, misregistration or noise, only the optics.

    Returns (4, y, x) float32 on the scene's 10 m pixels: share of fresh scar through the point spread; NDVI on the
    day before the event; NDVI a day after it with every change since the pre-event window began; true elevation, m.
    """
    p, event = world.parameters, world.parameters.season.event
    at_rest = dict.fromkeys(("B04", "B08"), (0.0, 0.0))
    before = clean(
        ground_on(p, world.landscape, world.changes, event, only=""), None, ("B04", "B08"), at_rest
    )
    day = event + dt.timedelta(days=1)
    after = clean(ground_on(p, world.landscape, world.changes, day), None, ("B04", "B08"), at_rest)
    ndvi = [(i["B08"] - i["B04"]) / np.maximum(i["B08"] + i["B04"], 1e-4) for i in (before, after)]
    return np.stack([scar_share(world), *ndvi, world.landscape.terrain.scene_dem_m]).astype(np.float32)


def scar_share(world: World) -> np.ndarray:
    """Share of each 10 m pixel that fresh scars cover, as the optics mix it: (y, x) float32."""
    geobox = fine_geobox(world.landscape.geobox)
    fresh = [c.outline for c in world.changes.changes if c.kind == "landslide"]
    _, share = draw(fresh, geobox)
    p = world.parameters
    sigma = spread_px(p.optics.mtf_nyquist[10])
    down = sampler(geobox.shape[0], p.area.fine_m, 10, sigma, 0.0)
    across = sampler(geobox.shape[1], p.area.fine_m, 10, sigma, 0.0)
    return np.asarray((across @ (down @ (share.astype(np.float32) / 255)).T).T, dtype=np.float32)


def _outline(geobox: GeoBox) -> shapely.Polygon:
    return write.lonlat_outline(geobox.extent.boundingbox.bbox, str(geobox.crs))
