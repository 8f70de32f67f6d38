"""The same scars, laid into real scenes: injection, to learn what a detector finds where the ground is real."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from scipy import ndimage

from slidecube.catalog.items import datetime_of, normalised
from slidecube.catalog.local import local_items, root_of
from slidecube.catalog.sources import asset_bands, find_source, offset_of
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.simulate import fields, write
from slidecube.pipeline.simulate.changes import MATERIALS, Change, coverage, scar_change, to_frame
from slidecube.pipeline.simulate.light import Sun
from slidecube.pipeline.simulate.optics import NATIVE_M, sampler, spread_px
from slidecube.pipeline.simulate.parameters import Parameters, load_parameters
from slidecube.pipeline.simulate.scars import landslides
from slidecube.pipeline.simulate.terrain import gradients, read_dem, slope_deg

_FINE_M = 2.5
_REACH_PX = 3  # pixels beyond an outline that the point spread still reaches
_NOTE = "SIMULATED landslides implanted into a real scene by slidecube; every other pixel is as it was"


@dataclass(frozen=True, slots=True, kw_only=True)
class Implanted:
    """Scars for one place, ready to be laid into any of its scenes.

    changes : the scars; dem_m : (y, x) on geobox, metres; core : outline of the event core
    """

    parameters: Parameters
    seed: int
    geobox: GeoBox
    dem_m: np.ndarray
    changes: tuple[Change, ...]
    core: shapely.Polygon

    @property
    def truth(self) -> gpd.GeoDataFrame:
        """Outlines of the scars, as `changes.to_frame`."""
        return to_frame(self.changes, self.geobox, landslides=True)


def draw_scars(
    dem_m: np.ndarray,
    geobox: GeoBox,
    event: dt.date,
    *,
    ndvi: np.ndarray | None = None,
    seed: int = 0,
    parameters: Parameters | None = None,
) -> Implanted:
    """Draw landslides on a real terrain by the simulation's laws.

    dem_m : (y, x) metres on the GeoBox (square pixels, metres), sea and nodata 0 or below
    ndvi : (y, x) before the event, on the GeoBox; decides how fast a scar greens; None = forest everywhere
    Raises PipelineError where no ground is steep enough for a landslide.
    """
    p = parameters or load_parameters()
    if dem_m.shape != geobox.shape:
        raise PipelineError(
            f"The DEM has shape {dem_m.shape}, its GeoBox {geobox.shape}; give one on the other"
        )
    dem = np.nan_to_num(dem_m.astype(np.float32))
    steepest = float(np.max(np.where(dem > 0, slope_deg(dem, abs(geobox.affine.a)), 0)))
    if steepest < p.landslides.source_slope_min_deg:
        raise PipelineError(
            f"No landslide fits here: the steepest slope is {steepest:.0f} degrees, sources need "
            f"{p.landslides.source_slope_min_deg:.0f}; choose steeper ground"
        )
    scars, core = landslides(p.landslides, dem, geobox, seed)
    changes = []
    for number, scar in enumerate(scars):
        surface = _surface(p, ndvi, geobox, scar.outline)
        rng = fields.generator(seed, "implant", number)
        changes.append(scar_change(p, scar, surface, event, rng))
    return Implanted(parameters=p, seed=seed, geobox=geobox, dem_m=dem, changes=tuple(changes), core=core)


def _surface(p: Parameters, ndvi: np.ndarray | None, geobox: GeoBox, outline: shapely.Polygon) -> str:
    if ndvi is None:
        return "forest"
    rows, cols, share = coverage(outline, geobox)
    weight = share * np.isfinite(ndvi[rows, cols])
    if not weight.any():
        return "forest"
    mean = float(np.average(np.nan_to_num(ndvi[rows, cols]), weights=weight))
    return next((name for name, least in p.into.surface_ndvi.items() if mean >= least), "bare")


def lay(
    scars: Implanted,
    band: str,
    reflectance: np.ndarray,
    geobox: GeoBox,
    day: dt.date,
    *,
    scl: np.ndarray | None = None,
    sun: Sun | None = None,
) -> np.ndarray:
    """Lay the scars into one band of one scene: (y, x) float32, a copy.

    reflectance : (y, x), NaN = nodata; geobox : its pixels, of any size, in the CRS of the scars
    scl : (y, x) scene classification on the same pixels: scars stay hidden under its clouds, dark in its shadows
    sun : lights scars by their slope; None = as on flat ground
    Raises PipelineError if the band has no spectrum. Pixels beyond the reach of a scar are not touched.
    """
    p = scars.parameters
    if band not in p.spectra.bands:
        raise PipelineError(f"No scar spectrum for band {band!r}; bands: {', '.join(p.spectra.bands)}")
    out = reflectance.astype(np.float32, copy=True)
    number = p.spectra.bands.index(band)
    light = _light(scars, p.light.diffuse[number], sun)
    rng = fields.generator(scars.seed, "implant texture")
    rough = 1 + p.spectra.speckle_sd * rng.standard_normal((64, 64), dtype=np.float32)
    for change in scars.changes:
        age = (day - change.day).days
        if age < 0:
            continue
        rows, cols, share = _seen_share(change.outline, geobox, p)
        if not share.size:
            continue
        pure = sum(
            m * getattr(p.spectra, name)[number] for m, name in zip(change.mix, MATERIALS, strict=True)
        )
        lit: np.ndarray = np.asarray(_at(light, scars.geobox, change.outline))
        texture = rough[np.arange(rows.start, rows.stop)[:, None] % 64, np.arange(cols.start, cols.stop) % 64]
        bare = share * np.float32(change.bareness * np.exp(-age / change.regrowth_days))
        if scl is not None:
            visible, shade = _air(p, scl[rows, cols])
            bare, lit = bare * visible, lit * shade
        part = out[rows, cols]
        part += bare * (np.float32(pure) * lit * texture - part)
    return out


def _seen_share(outline: shapely.Polygon, geobox: GeoBox, p: Parameters) -> tuple[slice, slice, np.ndarray]:
    """Share of each pixel that the optics see of an outline, in its window: rows, columns, (y, x) float32."""
    pixel_m = abs(geobox.affine.a)
    k = max(1, round(pixel_m / _FINE_M))
    xmin, ymin, xmax, ymax = outline.bounds
    inverse = ~geobox.affine
    c0, r0 = inverse @ (xmin, ymax)
    c1, r1 = inverse @ (xmax, ymin)
    rows = slice(max(int(r0) - _REACH_PX, 0), min(int(r1) + 1 + _REACH_PX, geobox.shape[0]))
    cols = slice(max(int(c0) - _REACH_PX, 0), min(int(c1) + 1 + _REACH_PX, geobox.shape[1]))
    if rows.stop <= rows.start or cols.stop <= cols.start:
        return slice(0, 0), slice(0, 0), np.zeros((0, 0), np.float32)
    shape = ((rows.stop - rows.start) * k, (cols.stop - cols.start) * k)
    window = geobox.affine @ Affine.translation(cols.start, rows.start) @ Affine.scale(1 / k)
    fine = np.zeros(shape, np.float32)
    fr, fc, share = coverage(outline, GeoBox(shape, window, geobox.crs))
    fine[fr, fc] = share / np.float32(255)
    mtf = p.optics.mtf_nyquist
    sigma = spread_px(mtf[min(mtf, key=lambda m: abs(m - pixel_m))])
    down, across = (sampler(n, pixel_m / k, pixel_m, sigma, 0.0) for n in shape)
    return rows, cols, np.asarray((across @ (down @ fine).T).T, dtype=np.float32)


def _light(scars: Implanted, diffuse: float, sun: Sun | None) -> np.ndarray | None:
    """Light on the ground relative to flat ground, after the partial correction: (y, x) float32."""
    if sun is None:
        return None
    east, north = gradients(scars.dem_m, abs(scars.geobox.affine.a))
    length = np.sqrt(1 + east**2 + north**2)
    x, y, z = sun.towards
    direct = np.maximum((z - east * x - north * y) / length, 0) / z
    seen = (1 - diffuse) * direct + diffuse * (1 + 1 / length) / 2
    return np.asarray(np.clip(seen, 0.1, 3) ** (1 - scars.parameters.light.corrected_share), np.float32)


def _at(light: np.ndarray | None, geobox: GeoBox, outline: shapely.Polygon) -> np.float32:
    if light is None:
        return np.float32(1)
    rows, cols, share = coverage(outline, geobox)
    if not share.any():
        return np.float32(1)
    return np.float32(np.average(light[rows, cols], weights=share))


def _air(p: Parameters, scl: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the ground that the air lets through, and the light below it, by scene class."""
    visible, shade = np.ones(12, np.float32), np.ones(12, np.float32)
    for name, opacity in p.into.opacity.items():
        visible[name] = 1 - opacity
    visible[[0, 1, 11]] = 0
    for name, light in p.into.shade.items():
        shade[name] = light
    code = np.minimum(scl, 11)
    return visible[code], shade[code]


def reclassify(
    scars: Implanted, scl: np.ndarray, red: np.ndarray, geobox: GeoBox, day: dt.date
) -> np.ndarray:
    """Scene classification after the scars: bare where it was green, and cloud where it is fresh and bright.

    scl, red : (y, x) on the same GeoBox, red with the scars. Returns a copy.
    """
    p = scars.parameters
    out = scl.copy()
    noise = fields.smooth_noise(scl.shape, fields.generator(scars.seed, "implant scl", day), patch_px=1.5)
    for change in scars.changes:
        if day < change.day:
            continue
        rows, cols, share = _seen_share(change.outline, geobox, p)
        part = out[rows, cols]
        bare = (share * change.bareness > 0.5) & np.isin(part, (4, 5, 7))
        bright = red[rows, cols] + p.scl.bright_width * noise[rows, cols] > p.scl.bright_red
        part[bare] = 5
        part[bare & bright] = 8
    return out


def implant(
    cube: xr.Dataset,
    dem: xr.DataArray | np.ndarray,
    *,
    event: dt.date,
    seed: int = 0,
    scl: str = "SCL",
    sun: Mapping[dt.date, Sun] | None = None,
    parameters: Parameters | None = None,
) -> tuple[xr.Dataset, gpd.GeoDataFrame]:
    """Implant scars into a cube of reflectances held in memory.

    cube : (time, y, x) or (y, x, taken as after the event) float variables named B01..B12, NaN = nodata, with CRS
        and coordinates (`cube.odc.geobox`); a variable named `scl` is read and changed too; others stay
    dem : (y, x) metres on the same pixels
    sun : by date, where it is known
    Returns a new cube and the outlines of the scars; steps before the event are as they were.
    Raises PipelineError if the cube has no CRS or no known band, or no ground is steep enough.
    """
    geobox = cube.odc.geobox
    if geobox is None or geobox.crs is None:
        raise PipelineError("The cube has no CRS; give it one with `odc.geo.xr.assign_crs`")
    p = parameters or load_parameters()
    bands = [str(b) for b in cube.data_vars if b in p.spectra.bands]
    if not bands:
        known = ", ".join(p.spectra.bands)
        raise PipelineError(
            f"The cube has no band to implant into: {', '.join(map(str, cube))}; bands: {known}"
        )
    scars = draw_scars(
        np.asarray(dem), geobox, event, ndvi=_ndvi_before(cube, event), seed=seed, parameters=p
    )
    out = cube.copy(deep=True)
    for step, day in enumerate(_days(cube)):
        if day is not None and day < event:
            continue
        where: dict[str, int] = {} if day is None else {"time": step}
        _implant_step(scars, out, bands, where, day=day or event, scl=scl, sun=(sun or {}).get(day or event))
    return out.assign_attrs(simulated=_NOTE), scars.truth


def _days(cube: xr.Dataset) -> list[dt.date | None]:
    if "time" not in cube.dims:
        return [None]
    return [dt.date.fromisoformat(str(t)[:10]) for t in cube["time"].to_numpy()]


def _ndvi_before(cube: xr.Dataset, event: dt.date) -> np.ndarray | None:
    """Highest NDVI before the event, (y, x); of the only step where there is no other."""
    if not {"B04", "B08"} <= set(cube.data_vars):
        return None
    red, nir = cube["B04"], cube["B08"]
    ndvi = ((nir - red) / (nir + red)).where(nir + red > 0)
    if "time" not in ndvi.dims:
        return np.asarray(ndvi)
    before = [day is not None and day < event for day in _days(cube)]
    return np.asarray(ndvi.isel(time=before).max("time")) if any(before) else None


def _implant_step(
    scars: Implanted,
    cube: xr.Dataset,
    bands: list[str],
    where: dict[str, int],
    *,
    day: dt.date,
    scl: str,
    sun: Sun | None,
) -> None:
    classes = np.asarray(cube[scl].isel(where)).astype(np.uint8) if scl in cube else None
    for band in bands:
        before = np.asarray(cube[band].isel(where), np.float32)
        after = lay(scars, band, before, scars.geobox, day, scl=classes, sun=sun)
        cube[band][where] = after.astype(cube[band].dtype)
    if classes is not None and "B04" in bands:
        red = np.asarray(cube["B04"].isel(where), np.float32)
        cube[scl][where] = reclassify(scars, classes, red, scars.geobox, day).astype(cube[scl].dtype)


def into(
    catalog: Path,
    out: Path,
    *,
    event: dt.date,
    dem: Path,
    seed: int = 0,
    bounds: tuple[float, float, float, float] | None = None,
    parameters: Parameters | None = None,
) -> Path:
    """Implant scars into the scenes of a catalogue after an event, and write a new catalogue with the truth.

    catalog : a local STAC catalogue or ItemCollection of Sentinel-2 items, all in one CRS; hrefs may be remote
    out : gets archive/catalog.json, truth/landslides.parquet; dem : raster of heights in metres, any CRS
    bounds : of the scars, in the scenes' CRS; left out, the steepest part that `into.widest_km` allows
    Scenes before the event are taken over unchanged. Returns the new catalogue.
    Raises PipelineError if there is no scene on one side of the event, or no ground is steep enough.
    """
    p = parameters or load_parameters()
    items = _items(catalog)
    days = [datetime_of(item).date() for item in items]
    if not any(day >= event for day in days):
        raise PipelineError(
            f"No scene of {str(catalog)!r} lies on or after the event {event}; nothing to implant into"
        )
    geobox = _implant_geobox(items, dem, bounds, p)
    scars = draw_scars(read_dem(dem, geobox), geobox, event, seed=seed, parameters=p)
    folder = out / "archive" / "scenes"
    paths = [_take_over(scars, item, folder, event) for item in items]
    boxes = np.array([item["bbox"] for item in items])
    span = (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, -2:].max(axis=0).tolist())
    write.write_collection(
        folder,
        "implanted",
        title="SIMULATED landslides in real scenes",
        items=paths,
        bbox=span,
        days=(min(days).isoformat(), max(days).isoformat()),
        credit=_NOTE,
    )
    root = write.write_root(out / "archive" / "catalog.json", [folder / "collection.json"], _NOTE)
    (out / "truth").mkdir(parents=True, exist_ok=True)
    scars.truth.to_parquet(out / "truth" / "landslides.parquet")
    return root


def _items(catalog: Path) -> list[dict[str, Any]]:
    source = find_source(str(catalog))
    root = root_of(catalog)
    found = [
        normalised(item, source, folder=folder, root=root)
        for item, folder in local_items(catalog)
        if "B04" in asset_bands(item, source)
    ]
    if not found:
        raise PipelineError(f"Catalogue {str(catalog)!r} holds no optical scene")
    return sorted(found, key=lambda item: (datetime_of(item), str(item["id"])))


def _implant_geobox(
    items: list[dict[str, Any]], dem: Path, bounds: tuple[float, float, float, float] | None, p: Parameters
) -> GeoBox:
    """10 m pixels of the first scene's grid where the scars go."""
    with rasterio.open(items[0]["assets"][asset_bands(items[0])["B04"]]["href"]) as file:
        whole = GeoBox((file.height, file.width), file.transform, str(file.crs))
    if bounds is not None:
        rows, cols = _window(whole, bounds)
        return whole[rows, cols]
    side = round(p.into.widest_km * 1000 / abs(whole.affine.a))
    if max(whole.shape) <= side:
        return whole
    coarse = whole.zoom_out(16)
    steep = slope_deg(read_dem(dem, coarse), abs(coarse.affine.a))
    mean = ndimage.uniform_filter(steep, side // 16, mode="constant")
    y, x = (int(v) for v in np.unravel_index(int(mean.argmax()), mean.shape))
    top, left = (
        int(np.clip(16 * at - side // 2, 0, max(n - side, 0)))
        for at, n in zip((y, x), whole.shape, strict=True)
    )
    return whole[top : top + side, left : left + side]


def _window(whole: GeoBox, bounds: tuple[float, float, float, float]) -> tuple[slice, slice]:
    inverse = ~whole.affine
    c0, r0 = inverse @ (bounds[0], bounds[3])
    c1, r1 = inverse @ (bounds[2], bounds[1])
    rows = slice(max(round(r0), 0), min(round(r1), whole.shape[0]))
    cols = slice(max(round(c0), 0), min(round(c1), whole.shape[1]))
    if rows.stop - rows.start < 32 or cols.stop - cols.start < 32:
        raise PipelineError(
            f"bounds={bounds} meet less than 32 pixels of the scenes; give metres in {whole.crs}"
        )
    return rows, cols


def _take_over(scars: Implanted, item: dict[str, Any], folder: Path, event: dt.date) -> Path:
    """Copy one item into the new catalogue, with the scars if it was taken after the event."""
    day = datetime_of(item).date()
    new = deepcopy(item)
    new["collection"] = "implanted"
    new["links"] = []
    after = day >= event
    if after:
        new["id"] = f"{item['id']}_SIMULATED_SCARS"
        new["properties"]["title"] = f"SIMULATED scars in {item['id']}"
    new["properties"] |= {"description": _NOTE, "slidecube:simulated": after}
    home = folder / new["id"]
    home.mkdir(parents=True, exist_ok=True)
    if after:
        _implant_item(scars, new, home, day)
    for asset in new["assets"].values():
        if not asset["href"].startswith((".", "http", "s3")):
            name = Path(asset["href"]).name
            shutil.copyfile(asset["href"], home / name)
            asset["href"] = f"./{name}"
    return write.write_json(home / f"{new['id']}.json", new)


def _implant_item(scars: Implanted, item: dict[str, Any], home: Path, day: dt.date) -> None:
    """Rewrite the bands of an item that has the scars, in place."""
    offset = offset_of(item).value
    bands = asset_bands(item)
    sun = _sun_of(item)
    classes = _read(item, bands["SCL"]) if "SCL" in bands else None
    red: tuple[np.ndarray, GeoBox] | None = None
    for band, key in bands.items():
        if band not in NATIVE_M:
            continue
        dn, geobox = _read(item, key)
        if geobox.crs != scars.geobox.crs:
            raise PipelineError(
                f"Scene {item['id']!r} is in {geobox.crs}, the scars in {scars.geobox.crs}; give scenes of one CRS"
            )
        rho = np.where(dn == 0, np.nan, dn * np.float32(1e-4) + np.float32(offset))
        scl = None if classes is None else _nearest(*classes, geobox)
        after = lay(scars, band, rho, geobox, day, scl=scl, sun=sun)
        # pixels that no scar reaches keep their very number
        made = np.where(after == rho, dn, write.to_dn(after, offset)).astype(dn.dtype)
        _save(item, key, home, np.where(dn == 0, 0, made).astype(dn.dtype), geobox)
        red = (after, geobox) if band == "B04" else red
    if classes is not None and red is not None:
        scl, geobox = classes
        _save(item, bands["SCL"], home, reclassify(scars, scl, _nearest(*red, geobox), geobox, day), geobox)


def _read(item: dict[str, Any], key: str) -> tuple[np.ndarray, GeoBox]:
    with rasterio.open(item["assets"][key]["href"]) as file:
        return np.asarray(file.read(1)), GeoBox((file.height, file.width), file.transform, str(file.crs))


def _save(item: dict[str, Any], key: str, home: Path, values: np.ndarray, geobox: GeoBox) -> None:
    name = f"{key}.tif"
    write.write_cog(
        home / name,
        values,
        crs=str(geobox.crs),
        transform=geobox.affine,
        nodata=0,
        tags={"SIMULATED": "YES", "DESCRIPTION": _NOTE},
    )
    item["assets"][key]["href"] = f"./{name}"


def _nearest(values: np.ndarray, geobox: GeoBox, wanted: GeoBox) -> np.ndarray:
    """Values on other pixels of the same CRS, by their centres; beyond the edge, those of the edge."""
    x, y = (np.asarray(xr_coords(wanted)[name]) for name in ("x", "y"))
    cols = np.clip(((x - geobox.affine.c) / geobox.affine.a).astype(int), 0, geobox.shape[1] - 1)
    rows = np.clip(((y - geobox.affine.f) / geobox.affine.e).astype(int), 0, geobox.shape[0] - 1)
    return np.asarray(values[np.ix_(rows, cols)])


def _sun_of(item: dict[str, Any]) -> Sun | None:
    properties = item["properties"]
    elevation, azimuth = properties.get("view:sun_elevation"), properties.get("view:sun_azimuth")
    if elevation is None and properties.get("s2:mean_solar_zenith") is not None:
        elevation, azimuth = 90 - properties["s2:mean_solar_zenith"], properties.get("s2:mean_solar_azimuth")
    if elevation is None or azimuth is None:
        return None
    return Sun(elevation_deg=float(elevation), azimuth_deg=float(azimuth))
