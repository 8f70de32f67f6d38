"""Landslides: how many, how large, where from, how far, and their outlines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from odc.geo.geobox import GeoBox
from scipy import ndimage, stats
from shapely.geometry.base import BaseGeometry

from slidecube.pipeline.simulate import fields
from slidecube.pipeline.simulate.parameters import Landslides
from slidecube.pipeline.simulate.terrain import gradients, slope_deg

SIZE_EDGES_M2 = (
    400.0,
    1000.0,
    3000.0,
    10000.0,
)  # 4 pixels, the usual smallest mapped slide, the mean, a hectare
SIZE_NAMES = ("<400", "400-1000", "1000-3000", "3000-10000", ">=10000")
_STEP_M = 5.0
_TRIES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Scar:
    """One landslide.

    outline : in map coordinates; inside_core : whether its source lies in the event core
    source_slope_deg : of the true terrain at the crown; drop_m : from crown to toe
    """

    outline: shapely.Polygon
    inside_core: bool
    source_slope_deg: float
    drop_m: float


def draw_areas(
    parameters: Landslides, total_m2: float, rng: np.random.Generator, *, count: int | None = None
) -> np.ndarray:
    """Areas by the inverse-gamma law until they sum to a total: (n,) float64 m2, in the order drawn.

    count : at most so many
    Source: Malamud 2004, eq. 3: (area - s) / a is inverse-gamma distributed with shape rho.
    """
    law = stats.invgamma(parameters.rho, loc=parameters.s_m2, scale=parameters.a_m2)
    areas: list[float] = []
    left = total_m2
    while left > parameters.min_area_m2 and (count is None or len(areas) < count):
        area = float(law.ppf(rng.uniform()))
        # one that would overshoot the share twofold is drawn again
        if parameters.min_area_m2 <= area <= min(parameters.max_area_m2, max(2 * left, 80.0)):
            areas.append(area)
            left -= area
    return np.array(areas)


def size_class(area_m2: float) -> str:
    """Name of the size class of an area."""
    return SIZE_NAMES[int(np.searchsorted(SIZE_EDGES_M2, area_m2, side="right"))]


class ScarField:
    """Terrain prepared for tracing landslides."""

    def __init__(self, parameters: Landslides, dem_m: np.ndarray, geobox: GeoBox, seed: int) -> None:
        self.parameters = parameters
        self.geobox = geobox
        self.seed = seed
        self.pixel_m = abs(geobox.affine.a)
        self.dem_m = dem_m
        self.slope_deg = slope_deg(dem_m, self.pixel_m)
        self.east, self.north = gradients(ndimage.gaussian_filter(dem_m, 1.0), self.pixel_m)
        self.weight = self._source_weight()

    def _source_weight(self) -> np.ndarray:
        """Chance of a pixel to be a source: steep, preferably a hollow, on land: (y, x) float32."""
        p = self.parameters
        steep = 1 / (1 + np.exp(-(self.slope_deg - p.source_slope_mid_deg) / p.source_slope_width_deg))
        smooth = ndimage.gaussian_filter(self.dem_m, 3.0)
        concave = ndimage.laplace(smooth)
        concave /= max(float(concave.std()), 1e-9)
        patchy = fields.fractal(self.dem_m.shape, fields.generator(self.seed, "soil depth"), patch_px=30.0)
        weight = steep * np.exp(p.hollow_weight * np.clip(concave, -2, 2) + 0.5 * patchy)
        weight[(self.slope_deg < p.source_slope_min_deg) | (self.dem_m <= 0)] = 0
        weight[:3], weight[-3:], weight[:, :3], weight[:, -3:] = 0, 0, 0, 0
        return np.asarray(weight, np.float32)

    def core(self, rng: np.random.Generator) -> tuple[np.ndarray, shapely.Polygon]:
        """Event core: an ellipse where the terrain can slide: mask (y, x) and outline."""
        p = self.parameters
        rows, cols = self.dem_m.shape
        area_px = p.core_area_share * float((self.dem_m > 0).sum())
        short = np.sqrt(area_px / np.pi / p.core_aspect)
        long = short * p.core_aspect
        prone = ndimage.gaussian_filter(self.weight, short / 2)
        edge = int(min(long, 0.45 * min(rows, cols)))
        inside = np.zeros_like(prone)
        inside[edge : rows - edge, edge : cols - edge] = prone[edge : rows - edge, edge : cols - edge]
        flat = (
            inside.ravel() >= np.quantile(inside[inside > 0], 0.9)
            if inside.any()
            else np.ones(prone.size, bool)
        )
        y0, x0 = divmod(int(rng.choice(np.flatnonzero(flat))), cols)
        angle = float(rng.uniform(0, np.pi))
        t = np.linspace(0, 2 * np.pi, 73)[:-1]
        u, v = long * np.cos(t), short * np.sin(t)
        xs = x0 + u * np.cos(angle) - v * np.sin(angle) + 0.5
        ys = y0 + u * np.sin(angle) + v * np.cos(angle) + 0.5
        px, py = self.geobox.affine @ (xs, ys)
        y, x = np.ogrid[:rows, :cols]
        du = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
        dv = (y - y0) * np.cos(angle) - (x - x0) * np.sin(angle)
        return (du / long) ** 2 + (dv / short) ** 2 <= 1, shapely.Polygon(np.column_stack([px, py]))

    def place(
        self, areas_m2: np.ndarray, where: np.ndarray, rng: np.random.Generator, taken: list[shapely.Polygon]
    ) -> list[tuple[shapely.Polygon, float, float]]:
        """Find a source and trace a landslide for each area; large ones first, since they need the room.

        where : (y, x) bool, sources allowed; taken : outlines that must not be overlapped, grows.
        Returns outline, source slope in degrees and drop in metres; areas for which no place is found are left out.
        """
        chance = np.where(where, self.weight, 0).ravel().astype(np.float64)
        if chance.sum() <= 0:
            return []
        cumulative = np.cumsum(chance) / chance.sum()
        found = []
        for area in np.sort(areas_m2)[::-1]:
            for source in np.searchsorted(cumulative, rng.uniform(size=_TRIES)):
                y, x = divmod(int(source), where.shape[1])
                outline = self.trace(y, x, float(area), rng)
                if outline is None or _hits(outline[0], taken):
                    continue
                taken.append(outline[0])
                found.append((outline[0], float(self.slope_deg[y, x]), outline[1]))
                break
        return found

    def trace(
        self, row: int, col: int, area_m2: float, rng: np.random.Generator
    ) -> tuple[shapely.Polygon, float] | None:
        """Trace one landslide downhill from its crown: outline and drop, or None where it does not fit."""
        p = self.parameters
        ratio = p.length_width_median * np.exp(p.length_width_sigma * rng.standard_normal())
        ratio = float(np.clip(ratio, 1.2, 12.0))
        length = max(np.sqrt(area_m2 * ratio / 0.85), 1.2 * np.sqrt(area_m2))
        path = self._path(row + rng.uniform(), col + rng.uniform(), length)
        if path is None:
            return None
        reached = float(np.hypot(*np.diff(path, axis=0).T).sum())
        width = area_m2 / (0.85 * max(reached, 1.0))
        if width > 1.1 * reached:  # it stopped at once: slides are longer than wide
            return None
        outline = _outline(path, width, area_m2, p.edge_roughness, rng)
        if outline is None or not shapely.box(*self.geobox.boundingbox).buffer(-_STEP_M).contains(outline):
            return None
        ends = [self.dem_m[self._cell(path[0])], self.dem_m[self._cell(path[-1])]]
        return outline, float(ends[0] - ends[1])

    def _path(self, row: float, col: float, length_m: float) -> np.ndarray | None:
        """Steps of steepest descent with inertia: (n, 2) map coordinates, until its length or gentle ground."""
        p = self.parameters
        x, y = self.geobox.affine @ (col, row)
        step = min(_STEP_M, length_m / 4)
        points = [(x, y)]
        direction = np.zeros(2)
        gentle = 0
        for _ in range(int(np.ceil(length_m / step))):
            r, c = self._cell((x, y))
            if (
                not (1 <= r < self.dem_m.shape[0] - 1 and 1 <= c < self.dem_m.shape[1] - 1)
                or self.dem_m[r, c] <= 0
            ):
                return None
            fall = -np.array([self.east[r, c], self.north[r, c]], dtype=float)
            norm = float(np.hypot(*fall))
            gentle = gentle + 1 if np.degrees(np.arctan(norm)) < p.stop_slope_deg else 0
            if gentle > 3:
                break
            direction = p.inertia * direction + (1 - p.inertia) * fall / max(norm, 1e-6)
            direction /= max(float(np.hypot(*direction)), 1e-6)
            x, y = x + step * direction[0], y + step * direction[1]
            points.append((x, y))
        return np.array(points) if len(points) > 2 else None

    def _cell(self, point: np.ndarray | tuple[float, float]) -> tuple[int, int]:
        col, row = (~self.geobox.affine) @ (float(point[0]), float(point[1]))
        return int(row), int(col)


def _outline(
    path: np.ndarray, width_m: float, area_m2: float, roughness: float, rng: np.random.Generator
) -> shapely.Polygon | None:
    """Polygon about a path: a wide source, a narrower track, a spread toe, rough edges, and exactly its area."""
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    nodes = int(np.clip(along[-1] / max(width_m / 2, 2.5), 4, 40))
    at = np.linspace(0, along[-1], nodes)
    centre = np.column_stack([np.interp(at, along, path[:, i]) for i in (0, 1)])
    t = at / along[-1]
    profile = 1.15 * np.exp(-(((t - 0.18) / 0.25) ** 2)) + 0.75 * np.clip(4 * t, 0, 1) + 0.35 * (t > 0.8)
    rough = 1 + roughness * ndimage.gaussian_filter1d(rng.standard_normal(nodes), 0.7)
    half = np.maximum(0.5 * width_m * profile / profile.mean() * rough, 0.15 * width_m)
    centre[1:-1] += rng.standard_normal((nodes - 2, 2)) * 0.1 * width_m
    circles = shapely.buffer(shapely.points(centre), half, quad_segs=3)
    links = shapely.convex_hull(shapely.union(circles[:-1], circles[1:]))
    return _to_area(shapely.union_all(links), area_m2)


def _to_area(shape: BaseGeometry, area_m2: float) -> shapely.Polygon | None:
    """Grow or shrink an outline by a rim, then scale it, until its area is right to a part in a million."""
    for _ in range(3):
        if shape.is_empty or not isinstance(shape, shapely.Polygon):
            return None
        shape = shape.buffer((area_m2 - shape.area) / shape.length, quad_segs=3)
    if shape.is_empty or not isinstance(shape, shapely.Polygon):
        return None
    shape = shapely.Polygon(shape.exterior)
    scale = float(np.sqrt(area_m2 / shape.area))
    x0, y0 = shape.centroid.x, shape.centroid.y
    scaled = shapely.transform(shape, lambda xy: (xy - [x0, y0]) * scale + [x0, y0])
    return scaled if scaled.is_valid else None


def _hits(outline: shapely.Polygon, taken: list[shapely.Polygon]) -> bool:
    if not taken:
        return False
    shapely.prepare(outline)
    return bool(shapely.intersects(outline, np.array(taken)).any())


def landslides(
    parameters: Landslides, dem_m: np.ndarray, geobox: GeoBox, seed: int, *, core_only: bool = False
) -> tuple[list[Scar], shapely.Polygon]:
    """Draw all landslides of one event on a DEM.

    dem_m : (y, x) metres, 0 and below = sea, on the GeoBox
    core_only : none outside the event core
    Returns the landslides and the outline of the event core.
    """
    field = ScarField(parameters, dem_m, geobox, seed)
    rng = fields.generator(seed, "landslides")
    core, outline = field.core(rng)
    land_m2 = (dem_m > 0).astype(np.float64) * field.pixel_m**2
    taken: list[shapely.Polygon] = []
    scars: list[Scar] = []
    shares = [(core, parameters.core_share)]
    if not core_only:
        shares.append((~core, parameters.outside_share))
    for where, share in shares:
        areas = draw_areas(parameters, share * float(land_m2[where].sum()), rng)
        for polygon, slope, drop in field.place(areas, where, rng, taken):
            scars.append(
                Scar(outline=polygon, inside_core=where is core, source_slope_deg=slope, drop_m=drop)
            )
    return scars, outline
