"""One overpass: ground, light, optics, air and clouds become the digital numbers of a scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse

from slidecube.pipeline.simulate import fields
from slidecube.pipeline.simulate.ground import Ground
from slidecube.pipeline.simulate.landscape import Landscape
from slidecube.pipeline.simulate.light import Illumination, Sun
from slidecube.pipeline.simulate.optics import NATIVE_M, sampler, spread_px
from slidecube.pipeline.simulate.parameters import Overpass, Parameters

STRIP_PX = 240  # rows of 10 m in a strip: whole pixels of every band
_HALO_PX = 12  # two pixels of 60 m: more than the reach of the point spread and the shift
_CLOUD_STEP = 4  # clouds are drawn on 40 m pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Sky:
    """Clouds of one overpass on 10 m pixels, all (y, x) float16 in 0..1.

    opacity : of clouds; veil : of cirrus; shade : share of the direct light that clouds take
    """

    opacity: np.ndarray
    veil: np.ndarray
    shade: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the satellite saw of the whole scene.

    reflectance : band -> (y, x) float32 at the band's own pixel size, without offset; NaN beyond the swath
    scl : (y, x) uint8 scene classification, 20 m, 0 beyond the swath
    """

    reflectance: dict[str, np.ndarray]
    scl: np.ndarray


def draw_sky(parameters: Parameters, landscape: Landscape, overpass: Overpass, sun: Sun, seed: int) -> Sky:
    """Clouds with soft edges that prefer the heights, a veil of cirrus, and the shadows of both."""
    p = parameters.clouds
    rng = fields.generator(seed, "sky", overpass.day)
    shape = landscape.cover10.shape
    pixel_m = abs(landscape.geobox.affine.a) * _CLOUD_STEP
    coarse = tuple(-(-n // _CLOUD_STEP) for n in shape)
    height = fields.block_mean(_padded(landscape.terrain.scene_dem_m, _CLOUD_STEP), _CLOUD_STEP)
    height = (height - height.mean()) / max(float(height.std()), 1e-6)
    patch_px = min(p.patch_m / pixel_m, 0.7 * min(coarse))
    lump = fields.fractal(coarse, rng, patch_px=patch_px, hurst=0.4) + p.orographic * height
    lump /= float(lump.std())
    opacity = _ramp((lump - np.quantile(lump, 1 - overpass.cloud)) / p.edge + 0.5)
    thin = fields.fractal(coarse, rng, patch_px=2 * patch_px, hurst=0.9)
    veil = p.cirrus_max * _ramp((thin - np.quantile(thin, 1 - p.cirrus_share)) / 1.5)
    base_m = float(rng.uniform(*p.height_m)) / np.tan(np.radians(sun.elevation_deg))
    east, north, _ = sun.towards
    flat = float(np.hypot(east, north))
    away = (base_m * north / flat / pixel_m, -base_m * east / flat / pixel_m)
    shadow = ndimage.shift(np.maximum(opacity, 0.5 * veil), away, order=1, mode="nearest")
    shade = np.clip(shadow * (1 - opacity), 0, 1) * p.shadow_strength
    return Sky(opacity=_layer(opacity, shape), veil=_layer(veil, shape), shade=_layer(shade, shape))


def _layer(coarse: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Cloud layer on 10 m pixels, in half precision: three of them are held while all bands are worked."""
    return np.asarray(fields.enlarge(coarse, _CLOUD_STEP, shape), dtype=np.float16)


def _padded(a: np.ndarray, step: int) -> np.ndarray:
    return np.pad(a, [(0, -n % step) for n in a.shape], mode="edge")


def _ramp(x: np.ndarray) -> np.ndarray:
    """Smooth step from 0 at 0 to 1 at 1."""
    t = np.clip(x, 0, 1).astype(np.float32)
    return np.asarray(t * t * (3 - 2 * t))


def clean(
    ground: Ground,
    light: Illumination | None,
    bands: tuple[str, ...],
    shift_m: dict[str, tuple[float, float]],
) -> dict[str, np.ndarray]:
    """Reflectance of the ground through the optics, before air, clouds and noise.

    light : None = as if all ground were flat and sunlit
    shift_m : band -> metres to the east and to the north
    Returns band -> (y, x) float32 at the band's own pixel size; worked strip by strip, so memory stays small.
    """
    p = ground.parameters
    fine_m, rows_m = p.area.fine_m, p.area.dem_m
    n = ground.landscape.cover10.shape[0]
    names = p.spectra.bands
    across = {b: _sampler(p, b, ground.landscape.cover.shape[1], shift_m[b][0]) for b in bands}
    out = {b: np.zeros((round(n * rows_m / NATIVE_M[b]), across[b].shape[0]), np.float32) for b in bands}
    for start in range(0, n, STRIP_PX):
        stop = min(start + STRIP_PX, n)
        halo = slice(max(start - _HALO_PX, 0), min(stop + _HALO_PX, n))
        strip = ground.strip(halo)
        for band in bands:
            number = names.index(band)
            rho = strip.band(number)
            if light is not None:
                rho *= fields.repeat(light.factor(p.light, number, halo), round(rows_m / fine_m))
            down = _sampler(p, band, rho.shape[0], -shift_m[band][1])
            size = NATIVE_M[band] / rows_m
            keep = slice(round((start - halo.start) / size), round((stop - halo.start) / size))
            rows = slice(round(start / size), round(stop / size))
            out[band][rows] = (across[band] @ (down[keep] @ rho).T).T
    return out


def _sampler(p: Parameters, band: str, n_fine: int, shift_m: float) -> sparse.csr_matrix:
    pixel_m = NATIVE_M[band]
    return sampler(n_fine, p.area.fine_m, pixel_m, spread_px(p.optics.mtf_nyquist[pixel_m]), shift_m)


def observe(
    parameters: Parameters,
    landscape: Landscape,
    overpass: Overpass,
    *,
    reflectance: dict[str, np.ndarray],
    sky: Sky,
    seed: int,
) -> Observed:
    """Add air, clouds, noise and the swath's edge to clean reflectance, and classify the scene.

    reflectance : band -> (y, x) float32, changed in place
    """
    rng = fields.generator(seed, "air", overpass.day)
    p = parameters.radiometry
    shape = landscape.cover10.shape
    haze = fields.smooth_noise(shape, rng, patch_px=p.haze_patch_m / parameters.area.dem_m)
    common, path = p.gain_sd * rng.standard_normal(), abs(rng.standard_normal())
    gains = 1 + common + p.gain_band_sd * rng.standard_normal(len(parameters.spectra.bands))
    lean = p.brdf_slope * rng.uniform(-1, 1) * np.linspace(-1, 1, shape[1], dtype=np.float32)
    for band, rho in reflectance.items():
        number = parameters.spectra.bands.index(band)
        factor = round(NATIVE_M[band] / parameters.area.dem_m)
        tilt = 1 + fields.block_mean(lean[None, :].repeat(factor, 0), factor)
        np.multiply(rho, np.float32(gains[number]) * tilt, out=rho)
        air = np.float32(path - 0.5) + 0.5 * fields.block_mean(haze, factor)
        _add_air(parameters, number, rho, sky, np.float32(p.path_sd[number]) * air)
        noise = rng.standard_normal(rho.shape, dtype=np.float32)
        size = np.sqrt(np.float32(p.noise_floor) ** 2 + (np.float32(p.noise_relative) * rho) ** 2)
        np.add(rho, noise * size, out=rho)
    scl = classify(parameters, overpass, reflectance, sky=sky, seed=seed)
    _cut_swath(overpass, reflectance, scl)
    return Observed(reflectance=reflectance, scl=scl)


def _add_air(parameters: Parameters, number: int, rho: np.ndarray, sky: Sky, path: np.ndarray) -> None:
    """Shade, path radiance, veil and cloud of one band, in place."""
    factor = round(sky.shade.shape[0] / rho.shape[0])
    direct = 1 - np.float32(parameters.light.diffuse[number])
    np.multiply(rho, 1 - direct * fields.block_mean(sky.shade, factor), out=rho)
    np.add(rho, path, out=rho)
    spectra = parameters.spectra
    for what, spectrum in ((sky.veil, spectra.cirrus), (sky.opacity, spectra.cloud)):
        share = fields.block_mean(what, factor)
        np.add(rho, share * (np.float32(spectrum[number]) - rho), out=rho)


def classify(
    parameters: Parameters, overpass: Overpass, reflectance: dict[str, np.ndarray], *, sky: Sky, seed: int
) -> np.ndarray:
    """Scene classification with the errors that the real one makes: (y, x) uint8, 20 m.

    Thin cloud below `cirrus_opacity` is missed; bright bare soil is called cloud; a part of the shadow is not found.
    Source of the classes: Sen2Cor, L2A ATBD; of the errors: parameters.toml.
    """
    p = parameters.scl
    rng = fields.generator(seed, "scl", overpass.day)
    b03, b04, b08 = (fields.block_mean(reflectance[b], 2) for b in ("B03", "B04", "B08"))
    shape = b04.shape
    ndvi = (b08 - b04) / np.maximum(b08 + b04, 1e-3)
    patch_px = p.bright_patch_m / 20
    always = fields.smooth_noise(shape, fields.generator(seed, "bright"), patch_px=patch_px)
    noise = fields.smooth_noise(shape, rng, patch_px=patch_px)
    scl = np.full(shape, 7, np.uint8)
    scl[ndvi > p.veg_ndvi] = 4
    scl[(ndvi < p.bare_ndvi) | ((ndvi <= p.veg_ndvi) & (noise > 0))] = 5
    scl[(b08 < p.dark_b08) & (ndvi > -0.1)] = 2
    scl[(b08 < 0.6 * p.dark_b08) & (b03 > b08)] = 6
    # Sen2Cor calls the same bright soil cloud on most dates, so most of the error stays in place
    bright = b04 + p.bright_width * (0.8 * always + 0.6 * noise) > p.bright_red
    scl[bright & (ndvi < p.bare_ndvi)] = 8
    opacity, veil, shade = (fields.block_mean(a, 2) for a in (sky.opacity, sky.veil, sky.shade))
    hidden = fields.smooth_noise(shape, rng, patch_px=8.0)
    found = hidden < np.quantile(hidden, p.shadow_found)
    scl[(shade > 0.35) & found] = 3
    opacity = opacity + veil + p.opacity_noise * noise * (opacity + veil > 0.02)
    scl[opacity > p.cirrus_opacity] = 10
    scl[opacity > p.medium_opacity] = 8
    scl[opacity > p.cloud_opacity] = 9
    return scl


def _cut_swath(overpass: Overpass, reflectance: dict[str, np.ndarray], scl: np.ndarray) -> None:
    """Blank what lies beyond the swath's slanting edge."""
    if overpass.swath_edge is None:
        return
    for a, empty in [*((rho, np.nan) for rho in reflectance.values()), (scl, 0)]:
        y = (np.arange(a.shape[0])[:, None] + 0.5) / a.shape[0]
        x = (np.arange(a.shape[1])[None, :] + 0.5) / a.shape[1]
        a[x > overpass.swath_edge - 0.18 * (y - 0.5)] = empty  # the orbit leans 10 degrees from north
