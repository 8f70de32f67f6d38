"""Parameters of the simulation, read from `parameters.toml` and checked."""

from __future__ import annotations

import datetime as dt
import tomllib
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from slidecube.catalog.radar import OrbitState
from slidecube.pipeline.errors import PipelineError

_FILE = Path(__file__).with_name("parameters.toml")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Size(_Section):
    """A named extent: centre in the scene's CRS and side, metres."""

    centre_m: tuple[float, float]
    extent_m: float


class Area(_Section):
    """Where the scene lies and how its terrain is refined."""

    crs: str
    fine_m: float
    dem_m: float
    margin_m: float
    fractal_hurst: float
    fractal_rms_m: float
    sizes: dict[str, Size]


class DetectorDem(_Section):
    """How the DEM that a detector gets differs from the true one."""

    resolution_arcsec: float
    smooth_m: float
    canopy_share: float
    canopy_height_m: dict[str, float]
    canopy_sd: float
    canopy_patch_m: float
    noise_flat_m: float
    noise_steep_m: float
    noise_patch_m: float


class Landcover(_Section):
    """Shares of the land by class, and the sizes of rivers, roads and fields."""

    built: float
    river_min_area_m2: float
    river_width_m: float
    river_width_max_m: float
    road_spacing_m: float
    cropland: float
    orchard: float
    grass: float
    shrub: float
    plantation: float
    bare: float
    parcel_m: float


class Landslides(_Section):
    """Sizes, shares, routing and surface of the landslides."""

    rho: float
    a_m2: float
    s_m2: float
    min_area_m2: float
    max_area_m2: float
    core_share: float
    core_area_share: float
    core_aspect: float
    outside_share: float
    source_slope_min_deg: float
    source_slope_mid_deg: float
    source_slope_width_deg: float
    hollow_weight: float
    length_width_median: float
    length_width_sigma: float
    stop_slope_deg: float
    inertia: float
    edge_roughness: float
    bare_alpha: float
    bare_beta: float
    bare_texture: float
    wet_share: float
    regrowth_days: dict[str, float]
    regrowth_sigma: float
    old_per_slide: float
    old_age_days: tuple[float, float]


class Confusers(_Section):
    """Changes that are no landslides."""

    per_slide: float
    share: dict[str, float]
    median_m2: dict[str, float]
    sigma: dict[str, float]
    road_width_m: tuple[float, float]
    road_length_m: tuple[float, float]
    bank_width_m: tuple[float, float]
    bank_length_m: tuple[float, float]
    first_day: dt.date
    last_day: dt.date
    bareness: dict[str, float]
    bareness_sd: float


class Season(_Section):
    """Sun, event and windows."""

    latitude_deg: float
    overpass_solar_hour: float
    event: dt.date
    pre: tuple[dt.date, dt.date]
    post: tuple[dt.date, dt.date]


class Overpass(_Section):
    """One acquisition; two baselines mean that it was processed twice."""

    day: dt.date
    platform: str
    baselines: tuple[str, ...]
    cloud: float
    swath_edge: float | None = None


class Spectra(_Section):
    """Reflectance of endmembers by band, and the texture around them."""

    bands: tuple[str, ...]
    forest: tuple[float, ...]
    plantation: tuple[float, ...]
    orchard: tuple[float, ...]
    shrub: tuple[float, ...]
    grass: tuple[float, ...]
    cropland: tuple[float, ...]
    soil_dark: tuple[float, ...]
    soil_bright: tuple[float, ...]
    litter: tuple[float, ...]
    rock: tuple[float, ...]
    scar_wet: tuple[float, ...]
    scar_dry: tuple[float, ...]
    char: tuple[float, ...]
    gravel: tuple[float, ...]
    built: tuple[float, ...]
    quarry: tuple[float, ...]
    water: tuple[float, ...]
    cloud: tuple[float, ...]
    cirrus: tuple[float, ...]
    texture_sd: float
    texture_band_sd: float
    soil_patch_m: float
    speckle_sd: float


class Phenology(_Section):
    """Green cover by class and season."""

    green_high: dict[str, float]
    green_low: dict[str, float]
    green_sd: dict[str, float]
    fall_day: dict[str, float]
    fall_width_days: float
    fall_spread_days: dict[str, float]
    summer_dip: dict[str, float]
    summer_dip_day: float
    summer_dip_days: float
    dead_share: float
    patch_m: float


class Light(_Section):
    """Direct and diffuse light on the terrain."""

    diffuse: tuple[float, ...]
    corrected_share: float
    shadow_soft_px: float


class Optics(_Section):
    """Point spread and geolocation."""

    mtf_nyquist: dict[int, float]
    shift_new_m: tuple[float, float]
    shift_old_m: tuple[float, float]
    band_shift_m: float


class Radiometry(_Section):
    """Residuals of calibration and atmospheric correction."""

    gain_sd: float
    gain_band_sd: float
    path_sd: tuple[float, ...]
    haze_patch_m: float
    brdf_slope: float
    tile_path_sd: float
    noise_floor: float
    noise_relative: float


class Clouds(_Section):
    """Clouds, veils and their shadows."""

    patch_m: float
    edge: float
    orographic: float
    height_m: tuple[float, float]
    shadow_strength: float
    cirrus_share: float
    cirrus_max: float


class Scl(_Section):
    """Thresholds and errors of the scene classification."""

    cloud_opacity: float
    medium_opacity: float
    cirrus_opacity: float
    opacity_noise: float
    shadow_found: float
    dark_b08: float
    veg_ndvi: float
    bare_ndvi: float
    bright_red: float
    bright_width: float
    bright_patch_m: float


class Items(_Section):
    """The two MGRS-like tiles."""

    west: str
    east: str
    west_edge: float
    east_edge: float
    relative_orbit: int


class SlopeOnly(_Section):
    """The baseline that knows nothing but slope."""

    threshold_deg: float


class Into(_Section):
    """How scars are laid under the clouds and shadows of a real scene."""

    opacity: dict[int, float]
    shade: dict[int, float]
    surface_ndvi: dict[str, float]
    widest_km: float


class Radar(_Section):
    """Sentinel-1: tracks, speckle, backscatter by class, and what terrain correction leaves."""

    relative_orbit: dict[OrbitState, int]
    first_day: dict[OrbitState, dt.date]
    repeat_days: int
    looks: float
    smear_m: float
    noise_db: float
    gain_sd_db: float
    moisture_sd_db: float
    vv_db: dict[str, float]
    vh_db: dict[str, float]
    leaf_db: dict[str, float]
    texture_db: float
    scar_db: dict[str, float]
    scar_sd_db: dict[str, float]
    tilled_db: dict[str, float]
    flattening_residual: float
    layover_sd_db: float
    layover_smear_m: float
    zero_filled: float


class Parameters(_Section):
    """Everything the simulation is made of; each value's source stands beside it in the TOML."""

    version: int
    area: Area
    detector_dem: DetectorDem
    landcover: Landcover
    landslides: Landslides
    confusers: Confusers
    season: Season
    overpass: tuple[Overpass, ...]
    spectra: Spectra
    phenology: Phenology
    light: Light
    optics: Optics
    radiometry: Radiometry
    clouds: Clouds
    scl: Scl
    items: Items
    slope_only: SlopeOnly
    into: Into
    radar: Radar


@lru_cache(maxsize=4)
def load_parameters(path: Path = _FILE) -> Parameters:
    """Read the parameters.

    Raises PipelineError if the file cannot be read, or has a key that is missing, unknown or of the wrong kind.
    """
    try:
        with path.open("rb") as file:
            return Parameters.model_validate(tomllib.load(file))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise PipelineError(f"Cannot read the simulation's parameters {path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise PipelineError(f"Simulation parameter {key!r} in {path}: {first['msg']}") from None
