"""The one configuration: a TOML file, read once, checked whole, and frozen.

Every problem is one line: the file, the key, what was got and what is allowed. The sentence of what is allowed is the
field's own description, so the message, the documentation and the check cannot drift apart.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf

from slidecube.catalog.errors import CatalogError
from slidecube.catalog.grid import TILE_SIZES_PX, TileGrid
from slidecube.catalog.scenes import Window
from slidecube.catalog.sources import is_raster
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import load_profile
from slidecube.models.backends import Backend, Dtype
from slidecube.models.card import THRESHOLDS
from slidecube.models.devices import Device
from slidecube.pipeline.composite import METHODS
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.masks import MaskRule
from slidecube.pipeline.published import FEATURE_SETS
from slidecube.pipeline.refusals import did_you_mean, refusal
from slidecube.pipeline.storage import SCHEME, Place, place_of

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
"""Canonical names of Sentinel-2's bands."""

DEFAULT_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""The ten bands of 10 m and 20 m: what a Level-2A product holds without the atmosphere's own bands."""

FORMATS = ("parquet", "gpkg", "cog", "stac", "report")
"""What `publish` can write."""

T = TypeVar("T")

Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


def _window(value: object) -> Window:
    if isinstance(value, Window):
        return value
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("")
    start, end = (_day(day) for day in value)
    try:
        return Window(start=start, end=end)
    except CatalogError as error:
        raise ValueError(str(error)) from None


def _season(value: object) -> Window:
    """Read two days, or a list of such pairs."""
    pairs = (
        isinstance(value, list | tuple) and value and all(isinstance(part, list | tuple) for part in value)
    )
    if not pairs:
        return _window(value)
    assert isinstance(value, list | tuple)
    try:
        return Window.of(map(_window, value))
    except CatalogError as error:
        raise ValueError(str(error)) from None


def _day(value: object) -> dt.date:
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        return value
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        try:
            return dt.date.fromisoformat(value)
        except ValueError:
            raise ValueError(f"there is no day {value!r}") from None
    raise ValueError("")  # the field's description says what is allowed


def _bbox(value: object) -> tuple[float, float, float, float]:
    numbers = list(value) if isinstance(value, list | tuple) else []
    if len(numbers) != 4 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise ValueError("")
    west, south, east, north = (float(n) for n in numbers)
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south < north <= 90 and west != east):
        raise ValueError("")
    return west, south, east, north


def _distinct(value: object) -> object:
    """Pass a list on as a tuple; anything twice in it is a mistake."""
    if not isinstance(value, list):
        return value
    twice = sorted({str(item) for item in value if value.count(item) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is named twice")
    return tuple(value)


def _features(value: object) -> object:
    """Pass a list on with the features of a set in its place; a feature twice among them is a mistake."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(item, str) for item in value):
        return tuple(value)
    parts = [FEATURE_SETS[item].names if item in FEATURE_SETS else (item,) for item in value]
    names = [name for part in parts for name in part]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        sets = [repr(item) for item in value if item in FEATURE_SETS and twice in FEATURE_SETS[item].names]
        within = f" (it is in the set{'s' * (len(sets) > 1)} {' and '.join(sets)})" if sets else ""
        raise ValueError(f"{twice} is named twice{within}")
    return tuple(names)


Distinct = BeforeValidator(_distinct)
FeatureNames = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(_features)
]
Days = Annotated[InstanceOf[Window], BeforeValidator(_window)]
Season = Annotated[InstanceOf[Window], BeforeValidator(_season)]
Day = Annotated[dt.date, BeforeValidator(_day)]


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _one_of(known: Sequence[T]) -> AfterValidator:
    """Refuse what is not in a list; the type stays the plain one, which dictionaries of callers want."""

    def check(value: T) -> T:
        if value not in known:
            raise ValueError("")
        return value

    return AfterValidator(check)


Band = Annotated[str, _one_of(BANDS)]
Fallback = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_distinct)]
Format = Annotated[str, _one_of(FORMATS)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Area(_Section):
    """What is mapped, and on which grid."""

    aoi: str | None = Field(
        None,
        min_length=1,
        description="the path of a GeoJSON, GeoPackage or shapefile, from the TOML's folder, or WKT or GeoJSON text",
    )
    bbox: Annotated[tuple[float, float, float, float], BeforeValidator(_bbox)] | None = Field(
        None, description="[west, south, east, north] in degrees of WGS84, south below north"
    )
    crs: str | None = Field(None, min_length=1, description="a projected CRS in metres, such as 'EPSG:32632'")
    resolution_m: float = Field(10.0, ge=0.1, le=1000, description="a number of metres, 0.1 to 1000")


class Epoch(_Section):
    """One inventory: what changed between two windows of days, both ends inclusive."""

    name: Slug = Field(
        description="lower-case letters, digits, '-' and '_', at most 63, such as 'iburi-2018'"
    )
    pre: Season | None = Field(
        None,
        description='two days, first and last, such as ["2018-05-01", "2018-09-05"], or a list of such pairs, of which '
        "none share a day; left out with pre_years_back, no scene from before the event is read, and the model must "
        "not need one",
    )
    pre_years_back: Annotated[tuple[Annotated[int, Field(ge=1, le=20)], ...], BeforeValidator(_distinct)] = (
        Field(
            (),
            description="a list of whole numbers, 1 to 20, none twice: instead of pre, the days of post so many years "
            "earlier, such as [1] or [1, 2]",
        )
    )
    post: Days = Field(description='two days, first and last, such as ["2018-09-07", "2018-11-15"]')
    event: Day | None = Field(None, description='the day of the event, such as "2018-09-06"')

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Epoch:
        if self.pre is not None and self.pre_years_back:
            raise ValueError("got both pre and pre_years_back; give one of them")
        try:
            before = None if self.before is None else self.before.end
        except CatalogError as error:  # post is longer than a year
            raise ValueError(str(error)) from None
        if before is not None and before >= self.post.start:
            raise ValueError(
                f"pre ends {before}, which is not before post starts, {self.post.start}; "
                "the two windows may not share a day"
            )
        if self.event is not None and not (before or self.event) <= self.event <= self.post.start:
            raise ValueError(
                f"event {self.event} does not lie between the end of pre, {before}, "
                f"and the start of post, {self.post.start}"
            )
        return self

    @property
    def windows(self) -> dict[str, Window]:
        """Windows of time by side, "pre" (where there is one) and "post"."""
        return {side: w for side, w in (("pre", self.before), ("post", self.post)) if w is not None}

    @property
    def before(self) -> Window | None:
        """The window before the event: as it is named, or the days of post some years earlier; None = none.

        Plants look alike at one time of the year: what changes with the season is no change of the ground.
        """
        if self.pre_years_back:
            return Window.of(self.post.years_back(years) for years in self.pre_years_back)
        return self.pre


class Sources(_Section):
    """Where scenes come from: a name in the table of sources, or a local catalogue's path from the TOML's folder."""

    optical: str = Field(
        "earth-search/sentinel-2-l2a",
        min_length=1,
        description="a source's name, or a local catalogue's path",
    )
    dem: str = Field(
        "earth-search/cop-dem-glo-30",
        min_length=1,
        description="a source's name, a local catalogue's path, or the path or address of one GeoTIFF of heights in "
        "metres, such as a country's LiDAR",
    )
    dem_date: Day | None = Field(
        None,
        description='the day on which the DEM was measured, such as "2019-05-01"; left out, what it says itself',
    )
    dem_datum: str | None = Field(
        None,
        min_length=1,
        max_length=80,
        description="what its heights count from; left out, what it says itself",
    )
    radar: str | None = Field(
        None,
        min_length=1,
        description="a source's name, or a local catalogue's path; left out, no Sentinel-1 is read",
    )
    fallback: Fallback = Field(
        (),
        description="a list of sources, none twice: asked in this order when `optical` does not answer, and read where "
        "an asset of it cannot be",
    )
    fallback_dem: Fallback = Field(
        (), description="a list of sources, none twice: asked in this order when `dem` does not answer"
    )

    @pydantic.model_validator(mode="after")
    def _no_fallback_on_itself(self) -> Sources:
        for key, first, others in (
            ("fallback", self.optical, self.fallback),
            ("fallback_dem", self.dem, self.fallback_dem),
        ):
            if first in others:
                raise ValueError(f"{key} names {first!r}, which is asked first already; name other sources")
        return self


LAYER_NAME = r"^[a-z][a-z0-9_]{0,62}$"
"""What a layer may be called."""

Kernel = Literal["mode", "nearest", "bilinear", "cubic", "average"]
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "categorical": ("mode", "nearest"),
    "continuous": ("bilinear", "nearest", "cubic", "average"),
}
"""Kind of a layer -> kernels that fit it, the default first."""


class Layer(_Section):
    """A raster of your own, brought onto the grid and read as a feature by its name; repeat the table for more."""

    name: str = Field(
        pattern=LAYER_NAME,
        description="lower-case letters, digits and '_', at most 63, no name of a feature, such as 'climate'",
    )
    href: str | None = Field(
        None,
        min_length=1,
        description="a GeoTIFF's path from the TOML's folder, or its address (http, https, s3)",
    )
    mirrors: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_distinct)] = Field(
        (), description="a list of places of the very same file, none twice: read where `href` cannot be"
    )
    source: str | None = Field(
        None,
        min_length=1,
        description="instead of href, a local catalogue's path, or the address of a STAC API's collection",
    )
    asset: str = Field("data", min_length=1, description="key of the asset of the source's items")
    band: int = Field(1, ge=1, description="the whole number of the file's band, from 1")
    kind: Literal["categorical", "continuous"] = Field(
        description='"categorical" (classes, whole numbers 0 to 65534) or "continuous" (quantities)'
    )
    resampling: Kernel | None = Field(
        None,
        description='"mode" or "nearest" of classes, "bilinear", "nearest", "cubic" or "average" of quantities; left '
        "out, the first of them",
    )
    units: str = Field("1", min_length=1, max_length=40, description="the unit of a quantity, such as 'm'")
    nodata: Annotated[tuple[float, ...], BeforeValidator(_distinct)] = Field(
        (), description="a list of numbers, none twice, that mean nothing, beside what the file says itself"
    )
    year: int | None = Field(
        None, ge=1900, le=2200, description="the year of the data; of a source it chooses the items"
    )

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Layer:
        if (self.href is None) == (self.source is None):
            got = "neither" if self.href is None else "both"
            raise ValueError(f"got {got} of href and source; allowed: exactly one of them")
        if self.mirrors and self.href is None:
            raise ValueError("mirrors are other places of an href; of a source leave them out")
        if self.resampling is not None and self.resampling not in KERNELS[self.kind]:
            raise ValueError(
                f"resampling {self.resampling!r} does not fit {self.kind} values; "
                f"allowed: {', '.join(KERNELS[self.kind])}"
            )
        return self

    @property
    def kernel(self) -> Kernel:
        """The kernel by which it is brought onto the grid."""
        return self.resampling or KERNELS[self.kind][0]


class LandCover(_Section):
    """Land cover before each event, learnt from points whose class you name; a feature `land_cover`."""

    points: str = Field(
        min_length=1, description="the path of a GeoJSON or GeoPackage of points, from the TOML's folder"
    )
    column: str = Field(
        "class", min_length=1, description="the column of the class: names, or whole numbers 0 to 65534"
    )
    min_points: int = Field(
        10, ge=1, description="the whole number of points that each class needs, 1 or more"
    )
    min_leaf: int = Field(
        1, ge=1, description="the whole number of points that a leaf of the tree holds at least"
    )
    radar: bool = Field(
        default=True, description="true or false: whether it reads Sentinel-1, where [sources] radar names it"
    )


class Ground(_Section):
    """Strata of the ground, in which an inventory is judged apart."""

    low_vegetation_ndvi: float = Field(
        0.3,
        ge=-1,
        le=1,
        description="the NDVI before the event, -1 to 1, below which there is little to lose",
    )
    river_corridor_m: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="metres above the nearest drainage below which a river's corridor lies, above 0; left out, it is "
        "not looked at",
    )
    farmland: Annotated[tuple[int | str, ...], BeforeValidator(_distinct)] = Field(
        (),
        description="a list of classes of the layer `land_cover` that are farmland, none twice, by number or name",
    )
    slope_edges_deg: Annotated[tuple[float, float], BeforeValidator(_tuple)] = Field(
        (10.0, 25.0), description="two slopes in degrees, ascending, that part gentle, moderate and steep"
    )

    @pydantic.model_validator(mode="after")
    def _ascending(self) -> Ground:
        low, high = self.slope_edges_deg
        if not 0 < low < high < 90:
            raise ValueError(
                f"slope_edges_deg: got {[low, high]}; allowed: two slopes above 0, ascending, below 90"
            )
        return self


class Mask(_Section):
    """Which pixels of a scene are not looked at."""

    scl_classes: Annotated[tuple[Annotated[int, Field(ge=0, le=11)], ...], BeforeValidator(_distinct)] = (
        Field((0, 1, 3, 8, 9, 10, 11), description="a list of Sentinel-2 scene classes, 0 to 11, none twice")
    )
    dilation_px: int = Field(
        3,
        ge=0,
        le=100,
        description="a whole number of grid pixels, 0 to 100, by which clouds and shadows grow",
    )
    cloud_heights_m: Annotated[
        tuple[Annotated[float, Field(ge=0, le=20_000)], ...], BeforeValidator(_tuple)
    ] = Field(
        (200.0, 3000.0),
        description="the lowest and the highest cloud, in metres above the ground, whose shadow is looked for "
        "where the sun throws it, and kept where B08 is dark, and darker than on other dates; [] looks for none",
    )
    readmit: bool = Field(
        True,
        description="true, or false: whether what is called cloud is used where it proves to be bright ground, the "
        "same on three dates, by B02, B04 and B08",
    )
    cloud_pct: int | None = Field(
        None,
        ge=1,
        le=100,
        description="a whole number, 1 to 100: the per cent of the provider's cloud probability (band CLD, of "
        "earth-search/sentinel-2-c1-l2a) from which on a pixel counts as cloud whatever its scene class; left out, it "
        "is not read",
    )

    @pydantic.field_validator("cloud_heights_m")
    @classmethod
    def _two_heights(cls, heights: tuple[float, ...]) -> tuple[float, ...]:
        if heights and (len(heights) != 2 or heights[0] > heights[1]):
            raise ValueError(
                f"got {list(heights)}; allowed: two heights in metres, ascending, or [] for none"
            )
        return heights

    def rule(self) -> MaskRule:
        """Return it as the masks take it."""
        heights = self.cloud_heights_m
        return MaskRule(
            scl_classes=self.scl_classes,
            dilation_px=self.dilation_px,
            cloud_heights_m=(heights[0], heights[1]) if heights else None,
            readmit=self.readmit,
            cloud_pct=self.cloud_pct,
        )


class Radar(_Section):
    """How Sentinel-1 is read, where [sources] radar names it."""

    orbit: Literal["descending", "ascending"] = Field(
        "descending", description='"descending" or "ascending": the two are never mixed'
    )
    slope_correction: Literal["none", "volume", "surface"] = Field(
        "none",
        description='"none", or the model by which slopes are corrected, "volume" (vegetation) or "surface" (bare '
        "ground), on sigma0 only: gamma0 is corrected already",
    )
    speckle_window_px: Annotated[int, _one_of((0, 3, 5, 7, 9, 11, 13, 15))] = Field(
        0,
        description="0, or an odd number of grid pixels, 3 to 15, of the window of the multitemporal speckle filter",
    )


class SunSettings(_Section):
    """What is made of the place of the sun over each scene."""

    min_elevation_deg: float = Field(
        25.0, ge=0, lt=90, description="degrees, 0 to 90: a scene of a lower sun is not used"
    )
    cast_shadow: bool = Field(
        False,
        description="true or false: whether what lies in the shadow of ridges, as the DEM has them, is not used",
    )
    correction: Literal["none", "c", "scs+c"] = Field(
        "none",
        description='"none", or how the light on slopes is taken out of every band of every scene: "c" or "scs+c" '
        "(forest)",
    )

    @property
    def reads_heights(self) -> bool:
        """Whether optical layers read the DEM."""
        return self.cast_shadow or self.correction != "none"


class Coregistration(_Section):
    """How the images before and after the event are held to one place, where a model compares them."""

    check: bool = Field(True, description="true or false: whether the shift between them is measured")
    band: Band = Field("B08", description="the band that it is measured on, one of [cube] bands")
    warn_px: float = Field(
        0.5, ge=0, le=8, description="the shift in grid pixels, 0 to 8, above which a block is warned of"
    )
    exclude_px: float = Field(
        1.5,
        gt=0,
        le=8,
        description="the shift in grid pixels, above 0, to 8, above which a block is not observable; not below warn_px",
    )
    correct: bool = Field(
        False,
        description="true or false: whether blocks above warn_px are moved onto the image after the event",
    )

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Coregistration:
        if self.warn_px > self.exclude_px:
            raise ValueError(
                f"warn_px {self.warn_px:g} is above exclude_px {self.exclude_px:g}; warn at a smaller shift"
            )
        if self.correct and not self.check:
            raise ValueError(
                "correct = true moves nothing with check = false, for no shift is measured; set check to true"
            )
        return self


class Cube(_Section):
    """How the observations of a window become one layer."""

    composite: Literal["greenest", "median", "medoid", "geomedian", "nearest-clear"] = Field(
        "greenest", description=f"one of {', '.join(METHODS)}"
    )
    greenest_of: int = Field(
        2,
        ge=0,
        le=50,
        description="of greenest: a fixed high rank of NDVI, that of the greenest of so many dates, the same however "
        "many are clear; a whole number, 0 to 50, 0 for the greenest of all",
    )
    max_cloud_pct: float = Field(
        80.0, ge=0, le=100, description="the largest cloud share of a scene, 0 to 100 per cent"
    )
    bands: Annotated[tuple[Band, ...], BeforeValidator(_distinct)] = Field(
        DEFAULT_BANDS, min_length=1, description=f"a list of bands, none twice, out of {', '.join(BANDS)}"
    )
    mask: Mask = Field(
        default_factory=Mask,
        description="a table with scl_classes, dilation_px, cloud_heights_m, readmit and cloud_pct",
    )
    radar: Radar = Field(
        default_factory=Radar, description="a table with orbit, slope_correction and speckle_window_px"
    )
    sun: SunSettings = Field(
        default_factory=SunSettings, description="a table with min_elevation_deg, cast_shadow and correction"
    )
    coregistration: Coregistration = Field(
        default_factory=Coregistration,
        description="a table with check, band, warn_px, exclude_px and correct",
    )
    tile_px: Annotated[int, _one_of(TILE_SIZES_PX)] = Field(
        2048, description=f"one of {', '.join(map(str, TILE_SIZES_PX))}"
    )
    max_lost_scenes: int = Field(
        2, ge=0, description="the whole number of unreadable scenes that a tile may go without, 0 or more"
    )


def _models(value: object) -> object:
    """Take one name, or a list of them as a tuple; a list of one is that one."""
    named = [value] if isinstance(value, str) else value
    if not isinstance(named, list) or not named or not all(isinstance(text, str) and text for text in named):
        raise ValueError  # the description says what is allowed
    found = _distinct(named)
    assert isinstance(found, tuple)
    return found[0] if len(found) == 1 else found


class Detect(_Section):
    """Which model looks for landslides; what is left out is the model card's."""

    model: Annotated[str | tuple[str, ...], BeforeValidator(_models)] = Field(
        "rdndvi",
        description="a model's name, such as 'rdndvi', 'sim-small' or 'sim-small@1', the path of a model's folder, "
        "such as './sim-small@1', or a list of networks, none twice, which are averaged",
    )
    threshold: float | None = Field(
        None,
        ge=THRESHOLDS[0],
        le=THRESHOLDS[1],
        description="the probability from which a pixel counts as landslide, 0.0001 to 0.9999; they are kept in steps "
        "of 0.0001",
    )
    min_area_m2: float | None = Field(
        None, ge=0, description="the smallest area of a landslide in square metres, 0 or more"
    )
    parameters: dict[str, float] = Field(
        default_factory=dict,
        description="a table of numbers, the model's own parameters; its card names them",
    )
    features: (
        Annotated[
            tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(_features)
        ]
        | None
    ) = Field(
        None,
        description="a list of features, layers of [[layer]] and sets of features, none twice, of models that cluster; "
        "left out, the model's own",
    )
    device: Device = Field(
        "cpu", description='"cpu" or "cuda", on which a network detects; a GPU gives other last digits'
    )
    backend: Backend | None = Field(
        None,
        description='"torch", "compile" or "onnx", by which a network is computed; left out, the profile\'s, else '
        '"torch"',
    )
    dtype: Dtype | None = Field(
        None,
        description='"float32", "bfloat16" or "float16", in which a network is computed; left out, the profile\'s, '
        'else "float32"',
    )
    tta: bool = Field(
        default=False,
        description="true or false: whether a network looks at each window turned and mirrored, too, which takes four "
        "or eight times as long; the mean counts, and the spread of a single network is stored",
    )
    landslide_clusters: (
        dict[
            Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")],
            Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_distinct)],
        ]
        | None
    ) = Field(
        None,
        description="a table from the key of a fit to a list of clusters, none twice, [] for none, as its cluster "
        "sheet shows it; of models that cluster; left out, a rule names them",
    )


class Fit(_Section):
    """What the model learns from the cube itself."""

    statistics: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{16}$",
        description="the key of statistics that were fitted earlier in this workspace, such as '0123456789abcdef'; "
        "left out, they are fitted to the layers of each epoch",
    )
    mnf_components: int | None = Field(
        None,
        ge=1,
        le=len(DEFAULT_BANDS),
        description="the whole number of MNF components that a model reads in place of its own, "
        f"1 to {len(DEFAULT_BANDS)}",
    )
    mnf_variance: float | None = Field(
        None,
        gt=0,
        le=1,
        description="the share of the sum of eigenvalues, above 0, at most 1, that the kept MNF components hold, in "
        "place of a fixed number; a model then reads all components, or mnf_components of them, and those that are "
        "not kept are 0",
    )
    strata: str | None = Field(
        None,
        min_length=1,
        description="the path of polygons (GeoJSON, GeoPackage, shapefile, FlatGeobuf, GeoParquet) or of a raster of "
        "whole numbers, from the TOML's folder: an MNF is fitted to each stratum; left out, one serves the whole area",
    )
    strata_field: str | None = Field(
        None,
        min_length=1,
        description="the attribute of the polygons that names their stratum; left out, each is one of its own",
    )
    strata_blend_m: float = Field(
        500.0,
        ge=0,
        le=10_000,
        description="metres on each side of a border in which two strata blend, 0 (a hard border) to 10000",
    )
    strata_min_px: int = Field(
        10_000,
        ge=100,
        description="the fewest pixels of a stratum that is fitted alone, a whole number, 100 or more; one of fewer "
        "takes the fit of the whole",
    )

    @pydantic.model_validator(mode="after")
    def _field_of_strata(self) -> Fit:
        if self.strata_field is not None and self.strata is None:
            raise ValueError(
                "strata_field names an attribute of strata, which are left out; name their file, too"
            )
        return self


class Output(_Section):
    """Where results lie, and in which formats."""

    workspace: str = Field(
        "workspace", min_length=1, description="a folder, from the TOML's folder, or s3://bucket/prefix"
    )
    formats: Annotated[tuple[Format, ...], BeforeValidator(_distinct)] = Field(
        FORMATS, description=f"a list, none twice, out of {', '.join(FORMATS)}"
    )

    @pydantic.field_validator("workspace")
    @classmethod
    def _a_place(cls, workspace: str) -> str:
        if re.match(r"[a-z][a-z0-9+.-]+://", workspace):
            try:
                place_of(workspace)
            except PipelineError as error:
                raise ValueError(str(error)) from None
        return workspace


class Cluster(_Section):
    """Where the work runs: settings of the machine, which never decide what is due."""

    profile: str = Field("threads", min_length=1, description="a profile's name, such as 'threads'")
    workers: int | None = Field(None, ge=1, description="a whole number of tiles in work at once, 1 or more")
    threads_per_worker: int | None = Field(
        None, ge=1, description="a whole number of threads for one tile, 1 or more"
    )
    loader: Literal["odc-stac", "stackstac"] = Field(
        "odc-stac", description='"odc-stac" or "stackstac", which lay out cubes of equal pixels'
    )
    mem_gb: float | None = Field(None, gt=0, description="memory of one worker in gigabytes, above 0")
    deadline_min: float | None = Field(
        None, gt=0, description="the minutes that one tile may take, above 0, in place of the profile's"
    )
    failure_budget: int = Field(
        0, ge=0, description="the whole number of tiles that may fail in a run that still counts as complete"
    )


class Sections(_Section):
    """What a TOML holds."""

    area: Area = Field(description="a table with aoi or bbox")
    epochs: Annotated[tuple[Epoch, ...], BeforeValidator(_tuple)] = Field(
        validation_alias="epoch",
        min_length=1,
        description="at least one [[epoch]] table with name, pre and post",
    )
    sources: Sources = Field(default_factory=Sources, description="a table")
    cube: Cube = Field(default_factory=Cube, description="a table")
    layers: Annotated[tuple[Layer, ...], BeforeValidator(_tuple)] = Field(
        (), validation_alias="layer", description="[[layer]] tables, each with name, kind, and href or source"
    )
    land_cover: LandCover | None = Field(None, description="a table with points")
    ground: Ground = Field(default_factory=Ground, description="a table")
    fit: Fit = Field(default_factory=Fit, description="a table")
    detect: Detect = Field(default_factory=Detect, description="a table")
    output: Output = Field(default_factory=Output, description="a table")
    cluster: Cluster = Field(default_factory=Cluster, description="a table")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A checked configuration, and where it was read.

    path : the TOML, absolute; text : as it was written; base : the folder that relative paths start from
    """

    path: Path
    text: str
    base: Path
    area: Area
    epochs: tuple[Epoch, ...]
    sources: Sources
    cube: Cube
    layers: tuple[Layer, ...]
    land_cover: LandCover | None
    ground: Ground
    fit: Fit
    detect: Detect
    output: Output
    cluster: Cluster

    @property
    def stem(self) -> str:
        """Name of the TOML without its ending, from which the run's name starts."""
        return self.path.stem

    @property
    def workspace(self) -> Place:
        """The workspace's place: a folder, absolute, or a prefix of a bucket."""
        text = self.output.workspace
        return place_of(text) if text.startswith(SCHEME) else self.resolve(text)

    def resolve(self, text: str) -> Path:
        """Return a path of the TOML as an absolute path."""
        return (self.base / Path(text).expanduser()).resolve()

    def source(self, name: str) -> str:
        """Return a source as the catalogue takes it: a local catalogue's path made absolute, a name as it is."""
        path = self.resolve(name)
        return str(path) if path.exists() else name

    @property
    def aoi(self) -> str | Path | tuple[float, float, float, float]:
        """The area as it is to be read: WKT text, a file's absolute path, or a bbox in degrees of WGS84."""
        if self.area.bbox is not None:
            return self.area.bbox
        text = self.area.aoi or ""
        return text if _is_geometry(text) else self.resolve(text)

    def search_terms(self) -> dict[str, Any]:
        """Return what decides the scene search, as canonical JSON types: area, windows, sources, cloud limit."""
        orbit = {"orbit": self.cube.radar.orbit} if self.sources.radar else {}
        return {
            "area": self._area_terms(),
            "windows": sorted({str(w) for epoch in self.epochs for w in epoch.windows.values()}),
            "sources": self._source_terms(),
            "max_cloud_pct": self.cube.max_cloud_pct,
            **orbit,
            **({"layers": self._layer_terms()} if self.layers else {}),
        }

    def science(self) -> dict[str, Any]:
        """Return what decides the results, as canonical JSON types, defaults filled in.

        Settings of the machine ([cluster]) and of the products ([output]) are left out: they change nothing of what
        is due. An AOI file counts by its content, so that a moved one is the same area.
        """
        epochs = [
            {
                "name": epoch.name,
                "pre": None if epoch.before is None else str(epoch.before),
                "post": str(epoch.post),
                "event": None if epoch.event is None else epoch.event.isoformat(),
            }
            for epoch in self.epochs
        ]
        return {
            "area": self._area_terms(),
            "epochs": epochs,
            "sources": self._source_terms(),
            # settings of what is not read decide nothing
            "cube": self.cube.model_dump(mode="json", exclude=set() if self.sources.radar else {"radar"}),
            "fit": {"statistics": self.fit.statistics, **self.fit_terms()},
            # whoever names no features and no layers has the keys of before they could be named
            "detect": self.detect.model_dump(
                mode="json",
                exclude={k for k in ("features", "backend", "dtype", "tta") if not getattr(self.detect, k)},
            )
            | {"model": self._model_terms()},
            **({"layers": self._layer_terms()} if self.layers else {}),
            **({"land_cover": self._land_cover_terms()} if self.land_cover else {}),
            **self.ground_terms(),
        }

    @property
    def models(self) -> tuple[str, ...]:
        """Models that detect, as they are named; a path made absolute."""
        named = self.detect.model
        return tuple(
            str(self.resolve(text)) if is_path(text) else text
            for text in ((named,) if isinstance(named, str) else named)
        )

    def _model_terms(self) -> str | list[str]:
        """Models as they are named: what a folder holds is pinned when the plan is made, and counts there."""
        return self.models[0] if isinstance(self.detect.model, str) else list(self.models)

    def ground_terms(self) -> dict[str, Any]:
        """Strata of the ground that are not the default's."""
        return {} if self.ground == Ground() else {"ground": self.ground.model_dump(mode="json")}

    def fit_terms(self) -> dict[str, Any]:
        """Return what decides a fit beside its layers and its model, of what is set; strata count by their content."""
        fit = self.fit
        kept = {"mnf_components": fit.mnf_components, "mnf_variance": fit.mnf_variance}
        terms: dict[str, Any] = {name: value for name, value in kept.items() if value is not None}
        if fit.strata is not None:
            terms |= {
                "strata": _file_digest(self.resolve(fit.strata), self, key="fit.strata"),
                "strata_field": fit.strata_field,
                "strata_blend_m": fit.strata_blend_m,
                "strata_min_px": fit.strata_min_px,
            }
        return terms

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Features that its layers bring."""
        return (*(layer.name for layer in self.layers), *(("land_cover",) if self.land_cover else ()))

    def _land_cover_terms(self) -> dict[str, Any]:
        assert self.land_cover is not None
        digest = file_digest(self.resolve(self.land_cover.points), f"{self.path}: land_cover.points")
        return {**self.land_cover.model_dump(mode="json"), "points": digest}

    def _source_terms(self) -> dict[str, str | list[str]]:
        """Sources as the catalogue takes them: the same words in two folders may mean two local catalogues.

        Fallbacks count where there are any: they decide what a plan knows of other places, and no key of a layer.
        """
        sources = self.sources
        others: dict[str, str | list[str]] = {
            key: [self.source(name) for name in names]
            for key, names in (("fallback", sources.fallback), ("fallback_dem", sources.fallback_dem))
            if names
        }
        radar = {"radar": self.source(sources.radar)} if sources.radar else {}
        said = {"dem_date": sources.dem_date and str(sources.dem_date), "dem_datum": sources.dem_datum}
        others |= {key: value for key, value in said.items() if value}
        dem = self.source(sources.dem)
        if is_raster(dem) and "://" not in dem:
            dem = file_digest(self.resolve(dem), f"{self.path}: sources.dem")
        return {"optical": self.source(sources.optical), "dem": dem, **radar, **others}

    def _layer_terms(self) -> list[dict[str, Any]]:
        """Layers of the TOML; a local file counts by its content, so that a moved one is the same."""
        terms = []
        for layer in self.layers:
            said = layer.model_dump(mode="json", exclude={"mirrors", "href"})
            if layer.source is not None:
                said["source"] = self.source(layer.source)
            else:
                place = self.place(layer.href or "")
                what = f"{self.path}: layer {layer.name!r}"
                said["href"] = place if "://" in place else file_digest(Path(place), what)
                said["mirrors"] = [self.place(text) for text in layer.mirrors]
            terms.append(said)
        return terms

    def place(self, href: str) -> str:
        """Return an href as it is read: a path made absolute, an address as it is."""
        return href if "://" in href else str(self.resolve(href))

    def _area_terms(self) -> dict[str, Any]:
        aoi = self.aoi
        if isinstance(aoi, Path):
            aoi = _file_digest(aoi, self, key="area.aoi")
        return {
            "aoi": list(aoi) if isinstance(aoi, tuple) else aoi,
            **self.area.model_dump(mode="json", include={"crs", "resolution_m"}),
        }


def load_config(path: str | Path, *, base: Path | None = None) -> Config:
    """Read and check a TOML.

    path : the file; base : the folder that its relative paths start from, the file's own unless given (a copy in a
    workspace still means the paths of the original)
    Raises PipelineError with one line: the file, the key, what was got and what is allowed.
    """
    path = Path(path)
    text = _read_text(path)
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = str(error).replace("(at end of document)", f"(at line {text.count(chr(10)) + 1}, the end)")
        raise PipelineError(f"{path}: not valid TOML: {where[:1].lower()}{where[1:]}") from None
    folder = (path.parent if base is None else base).resolve()
    try:
        sections = Sections.model_validate(tables)
    except pydantic.ValidationError as error:
        raise PipelineError(f"{path}: {refusal(error, tables, Sections)}") from None
    config = Config(**dict(sections), path=path.resolve(), text=text, base=folder)
    _check_across(path, config)
    return _with_profile(path, config)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PipelineError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except FileNotFoundError:
        near = [p.name for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        raise PipelineError(
            f"{path}: no such file{did_you_mean(path.name, near)}; `slidecube init {path}` writes one"
        ) from None
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_across(path: Path, config: Config) -> None:
    """Check what needs more than one key."""
    area = config.area
    if (area.aoi is None) == (area.bbox is None):
        got = "both" if area.bbox is not None else "neither"
        raise PipelineError(f"{path}: area: got {got} of aoi and bbox; allowed: exactly one of them")
    names = [epoch.name for epoch in config.epochs]
    for name in names:
        if names.count(name) > 1:
            raise PipelineError(
                f"{path}: epoch.name: got {name!r} {names.count(name)} times; allowed: each name once"
            )
    if config.cube.radar != Radar() and config.sources.radar is None:
        raise PipelineError(
            f"{path}: cube.radar: sets how Sentinel-1 is read, and none is; name a source of it as radar in [sources], "
            "such as 'planetary-computer/sentinel-1-rtc', or leave [cube.radar] out"
        )
    _check_layers(path, config)
    if area.crs is not None:
        try:
            TileGrid(crs=area.crs, resolution_m=area.resolution_m, tile_px=config.cube.tile_px)
        except CatalogError as error:
            raise PipelineError(f"{path}: area.crs: {error}") from None


def _with_profile(path: Path, config: Config) -> Config:
    """Let the profile say how networks are computed where [detect] leaves it open: it is a part of what is made."""
    try:
        profile = load_profile(config.cluster.profile, base=config.base)
    except ClusterError as error:
        raise PipelineError(f"{path}: cluster.profile: {error}") from None
    said = {"backend": profile.backend, "dtype": profile.dtype}
    open_ones = {key: value for key, value in said.items() if value and getattr(config.detect, key) is None}
    if not open_ones:
        return config
    return replace(config, detect=config.detect.model_copy(update=open_ones))


def _check_layers(path: Path, config: Config) -> None:
    """Check that the names of layers are one each, and that there is a before whose land cover can be learnt."""
    for layer in config.layers:
        if sum(other.name == layer.name for other in config.layers) > 1:
            raise PipelineError(f"{path}: layer.name: got {layer.name!r} twice; allowed: each name once")
        if layer.name == "land_cover" and config.land_cover is not None:
            raise PipelineError(
                f"{path}: layer.name: got 'land_cover', which [land_cover] makes as well; allowed: one of them"
            )
    if config.ground.farmland and "land_cover" not in config.layer_names:
        raise PipelineError(
            f"{path}: ground.farmland: names classes, and there is no land cover; add [land_cover], or a [[layer]] "
            "named 'land_cover'"
        )
    for epoch in config.epochs:
        if config.land_cover is not None and epoch.before is None:
            raise PipelineError(
                f"{path}: land_cover: epoch {epoch.name!r} has no pre window, and land cover is that before the event"
            )


def is_path(text: str) -> bool:
    """Tell the path of a model's folder from its name."""
    return "/" in text or text.startswith((".", "~"))


def _is_geometry(text: str) -> bool:
    """Tell WKT (or EWKT) and GeoJSON text from a file's name."""
    return re.match(r"\s*(\{|(SRID=\d+;\s*)?[A-Z]+\s*(Z\s*)?(\(|EMPTY))", text, re.IGNORECASE) is not None


def file_digest(path: Path, what: str) -> str:
    """Digest of a file's content; raises PipelineError when there is none. what : it is read for, for the message."""
    try:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        near = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        raise PipelineError(
            f"{what}: {str(path)!r} cannot be read ({error.strerror or error}){did_you_mean(path.name, near)}"
        ) from None


def _file_digest(path: Path, config: Config, *, key: Literal["area.aoi", "fit.strata"]) -> str:
    """Digest of a file of polygons or classes; what lies beside a shapefile counts, too."""
    digest = hashlib.sha256()
    section, got = (Area, config.area.aoi) if key == "area.aoi" else (Fit, config.fit.strata)
    beside = (".prj",) if key == "area.aoi" else (".prj", ".dbf")
    try:
        digest.update(path.read_bytes())
        for suffix in beside if path.suffix.lower() == ".shp" else ():
            if path.with_suffix(suffix).is_file():
                digest.update(path.with_suffix(suffix).read_bytes())
    except OSError as error:
        near = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        raise PipelineError(
            f"{config.path}: {key}: got {got!r}, which cannot be read ({error.strerror or error})"
            f"{did_you_mean(path.name, near)}; allowed: {section.model_fields[key.partition('.')[2]].description}"
        ) from None
    return f"sha256:{digest.hexdigest()}"
