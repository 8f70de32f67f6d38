"""Land cover and the static fields of the ground."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from odc.geo.geobox import GeoBox
from rasterio.features import rasterize, shapes
from scipy import ndimage

from slidecube.pipeline.simulate import fields
from slidecube.pipeline.simulate import terrain as relief
from slidecube.pipeline.simulate.parameters import Parameters
from slidecube.pipeline.simulate.terrain import Terrain

CLASSES = (
    "water",
    "forest",
    "plantation",
    "orchard",
    "shrub",
    "grass",
    "cropland",
    "bare",
    "built",
    "road",
    "river",
)
CODE = {name: code for code, name in enumerate(CLASSES)}
COVER_OF = {"road": "built", "river": "bare"}  # classes that share another one's phenology and regrowth
_DRAIN_STEP = 3  # drainage is computed on 30 m cells
_STRIP_PX = 512  # rows worked at a time on the fine grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Landscape:
    """The ground before any change.

    terrain : the true terrain
    cover : (2y, 2x) uint8 codes of CLASSES on the fine grid (5 m)
    cover10 : (y, x) uint8 codes without roads and rivers, 10 m
    slope_deg : (y, x) float32 of the true terrain, 10 m
    parcel : (y, x) int32 number of the field a pixel lies in
    soil, stand, fall, bright, tint_a, tint_b : (y, x) float16 fields of soil brightness (0..1), green cover, day of
        leaf fall (both in standard deviations), brightness and two of colour
    speckle : (2y, 2x) float16, brightness from crown to crown
    river_lines : channel reaches with their width in metres
    """

    terrain: Terrain
    cover: np.ndarray
    cover10: np.ndarray
    slope_deg: np.ndarray
    parcel: np.ndarray
    soil: np.ndarray
    stand: np.ndarray
    fall: np.ndarray
    bright: np.ndarray
    tint_a: np.ndarray
    tint_b: np.ndarray
    speckle: np.ndarray
    river_lines: tuple[tuple[shapely.LineString, float], ...]

    @property
    def geobox(self) -> GeoBox:
        """10 m pixels of the scene."""
        return self.terrain.geobox

    def canopy_m(self, parameters: Parameters) -> np.ndarray:
        """Mean canopy height on the terrain's pixels, margin included (the margin repeats the edge)."""
        heights = np.zeros(len(CLASSES), np.float32)
        for name, height in parameters.detector_dem.canopy_height_m.items():
            heights[CODE[name]] = height
        return np.pad(fields.block_mean(heights[self.cover], 2), self.terrain.margin_px, mode="edge")


def build_landscape(parameters: Parameters, terrain: Terrain, seed: int) -> Landscape:
    """Cover the terrain with forests, farms, rivers and roads."""
    pixel_m = abs(terrain.geobox.affine.a)
    dem = terrain.scene_dem_m
    shape = dem.shape
    slope = relief.slope_deg(terrain.dem_m, pixel_m)[terrain.inner]
    parcel = _parcels(shape, parameters.landcover.parcel_m / pixel_m, seed)
    cover10 = _cover(parameters, dem, slope, parcel, seed)
    lines = _rivers(parameters, terrain)
    cover = _with_lines(parameters, cover10, slope=slope, lines=lines, geobox=terrain.geobox, seed=seed)

    def field(name: str, patch_m: float) -> np.ndarray:
        rng = fields.generator(seed, "field", name)
        return fields.fractal(shape, rng, patch_px=patch_m / pixel_m).astype(np.float16)

    stand_m = parameters.phenology.patch_m
    by_parcel = np.isin(cover10, [CODE["cropland"], CODE["grass"]])
    speckle = fields.generator(seed, "speckle").standard_normal(cover.shape, dtype=np.float32)
    return Landscape(
        terrain=terrain,
        cover=cover,
        cover10=cover10,
        slope_deg=slope,
        parcel=parcel,
        soil=np.clip(0.5 + 0.25 * field("soil", parameters.spectra.soil_patch_m), 0, 1),
        stand=np.where(by_parcel, _by_parcel(parcel, seed, "stand"), field("stand", stand_m)),
        fall=np.where(by_parcel, _by_parcel(parcel, seed, "fall"), field("fall", stand_m)),
        bright=field("bright", stand_m),
        tint_a=field("tint a", stand_m),
        tint_b=field("tint b", stand_m),
        speckle=speckle.astype(np.float16),
        river_lines=lines,
    )


def parcels_of(landscape: Landscape, name: str) -> list[shapely.Polygon]:
    """Outlines of the fields of a class, in map coordinates."""
    wanted = landscape.cover10 == CODE[name]
    found = shapes(landscape.parcel, mask=wanted, transform=landscape.geobox.affine)
    return [shapely.Polygon(shape["coordinates"][0]) for shape, _ in found]


def _parcels(shape: tuple[int, int], side_px: float, seed: int) -> np.ndarray:
    """Fields: a grid of cells bent by noise, numbered."""
    rng = fields.generator(seed, "parcels")
    bend = [fields.smooth_noise(shape, rng, patch_px=side_px * 3) * side_px * 0.8 for _ in range(2)]
    angle = rng.uniform(0, np.pi / 2)
    y, x = (a.astype(np.float32) for a in np.ogrid[: shape[0], : shape[1]])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = np.floor((x * cos + y * sin + bend[0]) / side_px).astype(np.int32)
    v = np.floor((y * cos - x * sin + bend[1]) / (side_px * 0.7)).astype(np.int32)
    width = int(np.ptp(u)) + 1
    return np.asarray((v - v.min()) * width + (u - u.min()) + 1, dtype=np.int32)


def _by_parcel(parcel: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    values = fields.generator(seed, "by parcel", purpose).standard_normal(
        int(parcel.max()) + 1, dtype=np.float32
    )
    return np.asarray(values.astype(np.float16)[parcel])


def _cover(
    parameters: Parameters, dem: np.ndarray, slope: np.ndarray, parcel: np.ndarray, seed: int
) -> np.ndarray:
    """Give each class its share of the land, class by class, where its score is highest."""
    shares = parameters.landcover
    cover = np.full(dem.shape, CODE["forest"], np.uint8)
    land = dem > 0
    cover[~land] = CODE["water"]
    free = land.copy()

    def noise(name: str, patch_px: float) -> np.ndarray:
        return fields.fractal(dem.shape, fields.generator(seed, "cover", name), patch_px=patch_px)

    smooth_slope = ndimage.gaussian_filter(slope, 3.0)
    patchy = _by_parcel(parcel, seed, "cover")
    scores = {
        "built": -smooth_slope / 8 - dem / 250 + 1.5 * noise("built", 40),
        "cropland": -smooth_slope / 8 - dem / 500 + noise("cropland", 150) + 0.5 * patchy,
        "orchard": -smooth_slope / 14 + noise("orchard", 120) + 0.4 * patchy,
        "bare": slope / 9 + dem / 700 + noise("bare", 60),
        "grass": -smooth_slope / 22 + noise("grass", 120) + 0.6 * patchy,
        "plantation": noise("plantation", 150) + 0.4 * patchy,
        "shrub": noise("shrub", 50),
    }
    for name, score in scores.items():
        share = float(getattr(shares, name))
        wanted = min(share * land.sum() / max(int(free.sum()), 1), 1.0)
        taken = free & (score > np.quantile(score[free], 1 - wanted)) if free.any() else free
        cover[taken] = CODE[name]
        free &= ~taken
    return cover


def _rivers(parameters: Parameters, terrain: Terrain) -> tuple[tuple[shapely.LineString, float], ...]:
    """Channel reaches between confluences, as lines with a width that grows downstream."""
    shares = parameters.landcover
    cell_m = abs(terrain.geobox.affine.a) * _DRAIN_STEP
    coarse = fields.block_mean(terrain.dem_m, _DRAIN_STEP)
    down, count = relief.drainage(coarse)
    channel = (count * cell_m**2 >= shares.river_min_area_m2) & (coarse.ravel() > 0)
    feeders = np.bincount(down[channel & (down >= 0)], minlength=down.size)
    heads = np.flatnonzero(channel & (feeders != 1))
    affine = terrain.geobox.pad(terrain.margin_px).affine
    lines = []
    for head in heads.tolist():
        cells = [head]
        while down[cells[-1]] >= 0 and (len(cells) == 1 or feeders[cells[-1]] == 1):
            cells.append(int(down[cells[-1]]))
        if len(cells) > 2:
            y, x = np.divmod(np.array(cells), coarse.shape[1])
            at = np.column_stack([x + 0.5, y + 0.5]) * _DRAIN_STEP
            at[1:-1] = 0.25 * at[:-2] + 0.5 * at[1:-1] + 0.25 * at[2:]  # no staircase
            xs = affine.c + affine.a * at[:, 0]
            ys = affine.f + affine.e * at[:, 1]
            width = shares.river_width_m * np.sqrt(count[head] * cell_m**2 / shares.river_min_area_m2)
            line = shapely.LineString(np.column_stack([xs, ys]))
            lines.append((line, float(min(width, shares.river_width_max_m))))
    return tuple(lines)


def _with_lines(
    parameters: Parameters,
    cover10: np.ndarray,
    *,
    slope: np.ndarray,
    lines: tuple[tuple[shapely.LineString, float], ...],
    geobox: GeoBox,
    seed: int,
) -> np.ndarray:
    """Fine land cover: the 10 m classes with roads and rivers drawn on top."""
    cover = fields.repeat(cover10, 2)
    affine = geobox.affine @ geobox.affine.scale(0.5)
    water = cover == CODE["water"]
    _draw_roads(cover, parameters, slope, abs(geobox.affine.a), seed)
    if lines:
        beds = [(line.buffer(width / 2), CODE["river"]) for line, width in lines]
        drawn = rasterize(beds, cover.shape, transform=affine, dtype="uint8")
        cover = np.where(drawn > 0, drawn, cover)
    return np.where(water, np.uint8(CODE["water"]), cover)


def _draw_roads(
    cover: np.ndarray, parameters: Parameters, slope: np.ndarray, pixel_m: float, seed: int
) -> None:
    """Draw roads in place, strip by strip; they follow the zero line of a smooth field, so they wind on and on."""
    patch_px = parameters.landcover.road_spacing_m / pixel_m
    level = fields.smooth_noise(slope.shape, fields.generator(seed, "roads"), patch_px=patch_px)
    level += ndimage.gaussian_filter(slope, 5.0) / 60
    for start in range(0, slope.shape[0], _STRIP_PX):
        stop = min(start + _STRIP_PX, slope.shape[0])
        low, high = (
            max(start - 2, 0),
            min(stop + 2, slope.shape[0]),
        )  # two rows of halo: gradient, interpolation
        fine = fields.enlarge(level[low:high], 2, (2 * (high - low), cover.shape[1]))
        gy, gx = np.gradient(fine)
        on_road = np.abs(fine) < 0.7 * np.hypot(gx, gy)
        on_road &= fields.repeat(slope[low:high], 2) < 22.0  # [chosen] steeper ground has no lasting road
        keep = slice(2 * (start - low), 2 * (stop - low))
        cover[2 * start : 2 * stop][on_road[keep]] = CODE["road"]
