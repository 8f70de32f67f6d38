"""Everything that changes on the ground: landslides, old scars, and the confusers that outnumber them."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import geopandas as gpd
import numpy as np
import pyproj
import shapely
import shapely.ops
from odc.geo.geobox import GeoBox
from rasterio.features import rasterize

from slidecube.pipeline.simulate import fields
from slidecube.pipeline.simulate.landscape import CLASSES, CODE, COVER_OF, Landscape, parcels_of
from slidecube.pipeline.simulate.parameters import Confusers, Parameters
from slidecube.pipeline.simulate.scars import Scar, ScarField, draw_areas, landslides, size_class

MATERIALS = ("scar_wet", "scar_dry", "soil_dark", "soil_bright", "litter", "char", "gravel", "quarry")
_SUPERSAMPLING = 4  # 1.25 m in a fine pixel of 5 m
_TRIES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of the ground.

    kind : "landslide", "old_scar" or a confuser's name
    outline : in map coordinates
    day : when it happens
    bareness : share of the green cover that it removes at once
    regrowth_days : e-folding time of the recovery
    mix : share of each of MATERIALS in the new ground
    surface : class of the ground before
    group : "event", "background" or "" (not a landslide)
    source_slope_deg, drop_m : of a landslide, otherwise nan
    """

    kind: str
    outline: shapely.Polygon
    day: dt.date
    bareness: float
    regrowth_days: float
    mix: tuple[float, ...]
    surface: str
    group: str = ""
    source_slope_deg: float = float("nan")
    drop_m: float = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeMap:
    """Changes drawn on the fine grid.

    changes : number i is drawn as i + 1
    index : (2y, 2x) uint16, 0 = nothing changes here
    cover : (2y, 2x) uint8, share of the fine pixel that the change covers, in units of 1/255
    event_core : outline of the event core
    """

    changes: tuple[Change, ...]
    index: np.ndarray
    cover: np.ndarray
    event_core: shapely.Polygon


def all_changes(parameters: Parameters, landscape: Landscape, seed: int) -> ChangeMap:
    """Draw the landslides first, then old scars and confusers wherever there is room."""
    dem, geobox = landscape.terrain.scene_dem_m, landscape.geobox
    slides, core = landslides(parameters.landslides, dem, geobox, seed)
    changes = [_landslide(parameters, landscape, scar, i, seed) for i, scar in enumerate(slides)]
    taken = [change.outline for change in changes]
    changes += _old_scars(parameters, landscape, len(slides), taken, seed)
    changes += _confusers(parameters, landscape, len(slides), taken, seed)
    index, cover = draw([change.outline for change in changes], fine_geobox(geobox))
    return ChangeMap(changes=tuple(changes), index=index, cover=cover, event_core=core)


def fine_geobox(geobox: GeoBox) -> GeoBox:
    """The same area in pixels of half the size."""
    rows, cols = geobox.shape
    return GeoBox((rows * 2, cols * 2), geobox.affine @ geobox.affine.scale(0.5), geobox.crs)


def draw(outlines: list[shapely.Polygon], geobox: GeoBox) -> tuple[np.ndarray, np.ndarray]:
    """Number and area share of each outline on a grid; where two share a pixel, the larger share counts.

    Returns (y, x) uint16 number + 1 and (y, x) uint8 share in units of 1/255.
    """
    index = np.zeros(geobox.shape, np.uint16)
    cover = np.zeros(geobox.shape, np.uint8)
    for number, outline in enumerate(outlines, start=1):
        rows, cols, share = coverage(outline, geobox)
        part = cover[rows, cols]
        more = share > part
        part[more] = share[more]
        index[rows, cols][more] = number
    return index, cover


def coverage(outline: shapely.Polygon, geobox: GeoBox) -> tuple[slice, slice, np.ndarray]:
    """Share of each pixel that a polygon covers, in its window: rows, columns, (y, x) uint8 in units of 1/255."""
    xmin, ymin, xmax, ymax = outline.bounds
    c0, r0 = (~geobox.affine) @ (xmin, ymax)
    c1, r1 = (~geobox.affine) @ (xmax, ymin)
    r0, c0 = max(int(np.floor(r0)), 0), max(int(np.floor(c0)), 0)
    r1, c1 = min(int(np.ceil(r1)), geobox.shape[0]), min(int(np.ceil(c1)), geobox.shape[1])
    if r1 <= r0 or c1 <= c0:
        return slice(0, 0), slice(0, 0), np.zeros((0, 0), np.uint8)
    k = _SUPERSAMPLING
    affine = geobox.affine @ geobox.affine.translation(c0, r0) @ geobox.affine.scale(1 / k)
    hit = rasterize([(outline, 1)], ((r1 - r0) * k, (c1 - c0) * k), transform=affine, dtype="uint8")
    share = np.rint(fields.block_mean(hit, k) * 255).astype(np.uint8)
    return slice(r0, r1), slice(c0, c1), share


def bareness_on(changes: tuple[Change, ...], day: dt.date) -> np.ndarray:
    """Share of the green cover that each change has removed on a day: (n + 1,) float32, index 0 = 0."""
    out = np.zeros(len(changes) + 1, np.float32)
    for number, change in enumerate(changes, start=1):
        age = (day - change.day).days
        if age >= 0:
            out[number] = change.bareness * np.exp(-age / change.regrowth_days)
    return out


def to_frame(changes: tuple[Change, ...], geobox: GeoBox, *, landslides: bool) -> gpd.GeoDataFrame:
    """Table of the landslides, or of everything else, with exact outlines in the scene's CRS.

    Columns: id, epoch, kind, surface, event_date, area_m2 (plane area of the outline), area_geodesic_m2, size_class,
    bareness, source_slope_deg, drop_m, geometry.
    """
    rows = [
        (number, change)
        for number, change in enumerate(changes, start=1)
        if (change.kind == "landslide") == landslides
    ]
    crs = pyproj.CRS.from_user_input(str(geobox.crs))
    return gpd.GeoDataFrame(
        {
            "id": [f"simulated-{number:05d}" for number, _ in rows],
            "epoch": ["event" if landslides else "" for _ in rows],
            "kind": [change.group if landslides else change.kind for _, change in rows],
            "surface": [change.surface for _, change in rows],
            "event_date": [change.day.isoformat() for _, change in rows],
            "area_m2": [float(change.outline.area) for _, change in rows],
            "area_geodesic_m2": [geodesic_area_m2(change.outline, crs) for _, change in rows],
            "size_class": [size_class(change.outline.area) for _, change in rows],
            "bareness": [round(change.bareness, 4) for _, change in rows],
            "source_slope_deg": [round(change.source_slope_deg, 2) for _, change in rows],
            "drop_m": [round(change.drop_m, 2) for _, change in rows],
        },
        geometry=[change.outline for _, change in rows],
        crs=str(geobox.crs),
    )


def geodesic_area_m2(outline: shapely.Polygon, crs: pyproj.CRS) -> float:
    """Area on the ellipsoid, square metres."""
    to = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    x, y = np.array(outline.exterior.coords).T
    return abs(float(pyproj.Geod(ellps="WGS84").polygon_area_perimeter(*to.transform(x, y))[0]))


def surface_of(landscape: Landscape, outline: shapely.Polygon) -> str:
    """Class that covers most of an outline before it changes."""
    geobox = fine_geobox(landscape.geobox)
    rows, cols, share = coverage(outline, geobox)
    votes = np.bincount(landscape.cover[rows, cols].ravel(), weights=share.ravel(), minlength=len(CLASSES))
    return CLASSES[int(votes.argmax())]


def scar_change(
    parameters: Parameters, scar: Scar, surface: str, day: dt.date, rng: np.random.Generator
) -> Change:
    """Give a landslide its surface: how bare, how wet, how fast it greens."""
    p = parameters.landslides
    wet = float(np.clip(rng.beta(1.2, 1.2) + (p.wet_share - 0.5), 0, 1))
    days = p.regrowth_days[COVER_OF.get(surface, surface)] * np.exp(p.regrowth_sigma * rng.standard_normal())
    return Change(
        kind="landslide",
        outline=scar.outline,
        day=day,
        bareness=float(rng.beta(p.bare_alpha, p.bare_beta)),
        regrowth_days=float(days),
        mix=_mix(scar_wet=wet, scar_dry=1 - wet),
        surface=surface,
        group="event" if scar.inside_core else "background",
        source_slope_deg=scar.source_slope_deg,
        drop_m=scar.drop_m,
    )


def _landslide(parameters: Parameters, landscape: Landscape, scar: Scar, number: int, seed: int) -> Change:
    rng = fields.generator(seed, "scar", number)
    surface = surface_of(landscape, scar.outline)
    return scar_change(parameters, scar, surface, parameters.season.event, rng)


def _mix(**shares: float) -> tuple[float, ...]:
    return tuple(float(shares.get(name, 0.0)) for name in MATERIALS)


def _old_scars(
    parameters: Parameters, landscape: Landscape, slides: int, taken: list[shapely.Polygon], seed: int
) -> list[Change]:
    """Scars of earlier years: they look like landslides but do not change."""
    p = parameters.landslides
    rng = fields.generator(seed, "old scars")
    field = ScarField(p, landscape.terrain.scene_dem_m, landscape.geobox, seed + 1)
    count = round(slides * p.old_per_slide)
    areas = draw_areas(p, np.inf, rng, count=count)
    everywhere = np.ones(landscape.cover10.shape, bool)
    first = parameters.season.pre[0]
    changes = []
    for outline, slope, drop in field.place(areas, everywhere, rng, taken):
        scar = Scar(outline=outline, inside_core=False, source_slope_deg=slope, drop_m=drop)
        day = first - dt.timedelta(days=float(rng.uniform(*p.old_age_days)))
        change = scar_change(parameters, scar, surface_of(landscape, outline), day, rng)
        changes.append(
            Change(
                kind="old_scar",
                outline=outline,
                day=day,
                bareness=change.bareness,
                regrowth_days=change.regrowth_days,
                mix=change.mix,
                surface=change.surface,
            )
        )
    return changes


def _confusers(
    parameters: Parameters, landscape: Landscape, slides: int, taken: list[shapely.Polygon], seed: int
) -> list[Change]:
    """Draw each kind until its share of `per_slide` is reached or no room is left."""
    p = parameters.confusers
    changes: list[Change] = []
    for kind, share in p.share.items():
        rng = fields.generator(seed, "confuser", kind)
        wanted = int(np.ceil(slides * p.per_slide * share))
        tree = shapely.STRtree(taken)
        new: list[shapely.Polygon] = []
        for outline in _candidates(kind, parameters, landscape, wanted, rng):
            if len(new) == wanted:
                break
            if tree.query(outline, predicate="intersects").size or any(outline.intersects(o) for o in new):
                continue
            new.append(outline)
            changes.append(_confuser(kind, parameters, landscape, outline, rng))
        taken.extend(new)
    return changes


def _confuser(
    kind: str,
    parameters: Parameters,
    landscape: Landscape,
    outline: shapely.Polygon,
    rng: np.random.Generator,
) -> Change:
    p = parameters.confusers
    days = (p.last_day - p.first_day).days
    day = p.first_day + dt.timedelta(days=int(rng.integers(0, days + 1)))
    surface = surface_of(landscape, outline)
    u = float(rng.uniform())
    mixes = {
        "harvest": _mix(soil_dark=0.6 * u, soil_bright=0.6 * (1 - u), litter=0.4),
        "clear_cut": _mix(litter=0.55, soil_dark=0.25, soil_bright=0.2 * u, scar_dry=0.2 * (1 - u)),
        "river_bank": _mix(gravel=0.8, scar_wet=0.2),
        "road": _mix(scar_dry=0.7 * u + 0.15, soil_bright=0.85 - 0.7 * u),
        "burn": _mix(char=0.75 + 0.2 * u, soil_dark=0.25 - 0.2 * u),
        "quarry": _mix(quarry=0.8, scar_dry=0.2),
    }
    return Change(
        kind=kind,
        outline=outline,
        day=parameters.season.event if kind == "river_bank" else day,
        bareness=float(np.clip(p.bareness[kind] + p.bareness_sd * rng.standard_normal(), 0.2, 1.0)),
        regrowth_days=float(parameters.landslides.regrowth_days[COVER_OF.get(surface, surface)]),
        mix=mixes[kind],
        surface=surface,
    )


def _candidates(
    kind: str, parameters: Parameters, landscape: Landscape, wanted: int, rng: np.random.Generator
) -> list[shapely.Polygon]:
    p = parameters.confusers
    if kind == "harvest":
        return _harvests(p, landscape, rng)
    if kind == "river_bank":
        return _banks(p, landscape, wanted, rng)
    ground = {
        "clear_cut": ("forest", "plantation"),
        "burn": ("shrub", "grass", "forest"),
        "quarry": ("forest", "shrub", "grass", "bare"),
        "road": ("forest", "plantation", "shrub", "grass"),
    }[kind]
    steepest = {"clear_cut": 38.0, "burn": 45.0, "quarry": 40.0, "road": 35.0}[
        kind
    ]  # [chosen] where each is done
    allowed = np.isin(landscape.cover10, [CODE[name] for name in ground]) & (landscape.slope_deg < steepest)
    cells = np.flatnonzero(allowed)
    if not cells.size:
        return []
    out = []
    frame = shapely.box(*landscape.geobox.boundingbox).buffer(-10)
    for cell in rng.choice(cells, wanted * 4 + _TRIES).tolist():
        row, col = divmod(cell, landscape.cover10.shape[1])
        x, y = landscape.geobox.affine @ (col + 0.5, row + 0.5)
        if kind == "road":
            shape = _track(p, landscape, (float(x), float(y)), rng)
        else:
            shape = _patch(
                float(x), float(y), p.median_m2[kind] * np.exp(p.sigma[kind] * rng.standard_normal()), rng
            )
        if shape is not None and frame.contains(shape):
            out.append(shape)
    return out


def _harvests(p: Confusers, landscape: Landscape, rng: np.random.Generator) -> list[shapely.Polygon]:
    """Whole fields, in random order."""
    found = [f for f in parcels_of(landscape, "cropland") if f.area > 0.3 * p.median_m2["harvest"]]
    found += [f for f in parcels_of(landscape, "orchard") if f.area > 0.3 * p.median_m2["harvest"]]
    inner = [found[i].simplify(6.0).buffer(-3.0) for i in rng.permutation(len(found))]
    return [f for f in inner if isinstance(f, shapely.Polygon) and not f.is_empty]


def _banks(
    p: Confusers, landscape: Landscape, wanted: int, rng: np.random.Generator
) -> list[shapely.Polygon]:
    """Strips beside a channel."""
    frame = shapely.box(*landscape.geobox.boundingbox).buffer(-10)
    lines = [(line, width) for line, width in landscape.river_lines if line.intersects(frame)]
    if not lines:
        return []
    lengths = np.array([line.length for line, _ in lines])
    out = []
    for number in rng.choice(len(lines), wanted * 5 + _TRIES, p=lengths / lengths.sum()).tolist():
        line, width = lines[number]
        start = float(rng.uniform(0, line.length))
        reach = shapely.ops.substring(line, start, start + float(rng.uniform(*p.bank_length_m)))
        wide = float(rng.uniform(*p.bank_width_m))
        if not isinstance(reach, shapely.LineString) or reach.length < p.bank_length_m[0] / 2:
            continue
        strip = reach.offset_curve(float(rng.choice([-1, 1])) * (width + wide) / 2).buffer(
            wide / 2, cap_style="flat"
        )
        if (
            isinstance(strip, shapely.Polygon)
            and strip.is_valid
            and strip.area > 100
            and frame.contains(strip)
        ):
            out.append(strip)
    return out


def _patch(x: float, y: float, area_m2: float, rng: np.random.Generator) -> shapely.Polygon | None:
    """Rounded patch with a rough, stretched outline, its area exact."""
    t = np.linspace(0, 2 * np.pi, 33)[:-1]
    wave = sum(rng.normal(0, 0.25 / k) * np.cos(k * t + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3, 5))
    radius = np.maximum(1 + wave, 0.3)
    stretch = float(np.exp(0.3 * rng.standard_normal()))
    angle = float(rng.uniform(0, np.pi))
    u, v = radius * np.cos(t) * stretch, radius * np.sin(t) / stretch
    shape = shapely.Polygon(
        np.column_stack([u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)])
    )
    scale = float(np.sqrt(area_m2 / shape.area))
    return shapely.transform(shape, lambda xy: xy * scale + [x, y])


def _track(
    p: Confusers, landscape: Landscape, start: tuple[float, float], rng: np.random.Generator
) -> shapely.Polygon | None:
    """New road that keeps its height along the slope, with turns."""
    dem = landscape.terrain.scene_dem_m
    rows, cols = dem.shape
    length = float(rng.uniform(*p.road_length_m))
    x, y = start
    points = [start]
    side = float(rng.choice([-1, 1]))
    heading = float(rng.uniform(0, 2 * np.pi))
    for _ in range(int(length / 20)):
        col, row = (int(v) for v in (~landscape.geobox.affine) @ (x, y))
        if not (2 <= row < rows - 2 and 2 <= col < cols - 2) or dem[row, col] <= 0:
            return None
        east = float(dem[row, col + 2] - dem[row, col - 2])
        north = float(dem[row - 2, col] - dem[row + 2, col])
        if np.hypot(east, north) > 4:  # steeper than a tenth: follow the contour
            heading = float(np.arctan2(side * east, -side * north))
        heading += 0.25 * float(rng.standard_normal())
        x, y = x + 20 * np.cos(heading), y + 20 * np.sin(heading)
        points.append((float(x), float(y)))
    shape = (
        shapely.LineString(points)
        .simplify(3)
        .buffer(float(rng.uniform(*p.road_width_m)) / 2, cap_style="flat")
    )
    return shape if isinstance(shape, shapely.Polygon) and shape.is_valid else None
