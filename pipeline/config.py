"""The one configuration: a TOML file, read once, checked whole, and frozen.

Every problem is one line: the file, the key, what was got and what is allowed. The sentence of what is allowed is the
field's own description, so the message, the documentation and the check cannot drift apart.
"""

from __future__ import annotations

import datetime as dt
import difflib
import hashlib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf

from slidecube.catalog.errors import CatalogError
from slidecube.catalog.grid import TILE_SIZES_PX, TileGrid
from slidecube.catalog.scenes import Window
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import load_profile
from slidecube.pipeline.errors import PipelineError

Band = Literal["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
BANDS: tuple[Band, ...] = get_args(Band)
"""Canonical names of Sentinel-2's bands."""

DEFAULT_BANDS: tuple[Band, ...] = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""The ten bands of 10 m and 20 m: what a Level-2A product holds without the atmosphere's own bands."""

Format = Literal["parquet", "gpkg", "cog", "stac", "report"]
FORMATS: tuple[Format, ...] = get_args(Format)
"""What `publish` can write."""

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


Days = Annotated[InstanceOf[Window], BeforeValidator(_window)]
Day = Annotated[dt.date, BeforeValidator(_day)]


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _tile_size(value: int) -> int:
    if value not in TILE_SIZES_PX:
        raise ValueError("")
    return value


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
    resolution_m: float = Field(10.0, gt=0, description="a number of metres above 0")


class Epoch(_Section):
    """One inventory: what changed between two windows of days, both ends inclusive."""

    name: Slug = Field(
        description="lower-case letters, digits, '-' and '_', at most 63, such as 'iburi-2018'"
    )
    pre: Days = Field(description='two days, first and last, such as ["2018-05-01", "2018-09-05"]')
    post: Days = Field(description='two days, first and last, such as ["2018-09-07", "2018-11-15"]')
    event: Day | None = Field(None, description='the day of the event, such as "2018-09-06"')

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Epoch:
        if self.pre.end >= self.post.start:
            raise ValueError(
                f"pre ends {self.pre.end}, which is not before post starts, {self.post.start}; "
                "the two windows may not share a day"
            )
        if self.event is not None and not self.pre.end <= self.event <= self.post.start:
            raise ValueError(
                f"event {self.event} does not lie between the end of pre, {self.pre.end}, "
                f"and the start of post, {self.post.start}"
            )
        return self


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
        description="a source's name, or a local catalogue's path",
    )


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


class Cube(_Section):
    """How the observations of a window become one layer."""

    composite: Literal["greenest", "median"] = Field("greenest", description='"greenest" or "median"')
    max_cloud_pct: float = Field(
        80.0, ge=0, le=100, description="the largest cloud share of a scene, 0 to 100 per cent"
    )
    bands: Annotated[tuple[Band, ...], BeforeValidator(_distinct)] = Field(
        DEFAULT_BANDS, min_length=1, description=f"a list of bands, none twice, out of {', '.join(BANDS)}"
    )
    mask: Mask = Field(default_factory=Mask, description="a table with scl_classes and dilation_px")
    tile_px: Annotated[int, AfterValidator(_tile_size)] = Field(
        2048, description=f"one of {', '.join(map(str, TILE_SIZES_PX))}"
    )
    max_lost_scenes: int = Field(
        2, ge=0, description="the whole number of unreadable scenes that a tile may go without, 0 or more"
    )


class Detect(_Section):
    """Which model looks for landslides; what is left out is the model card's."""

    model: str = Field("rdndvi", min_length=1, description="a model's name, such as 'rdndvi'")
    threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the probability from which a pixel counts as landslide, above 0, below 1",
    )
    min_area_m2: float | None = Field(
        None, ge=0, description="the smallest area of a landslide in square metres, 0 or more"
    )
    parameters: dict[str, float] = Field(
        default_factory=dict,
        description="a table of numbers, the model's own parameters; its card names them",
    )


class Output(_Section):
    """Where results lie, and in which formats."""

    workspace: str = Field("workspace", min_length=1, description="a folder, from the TOML's folder")
    formats: Annotated[tuple[Format, ...], BeforeValidator(_distinct)] = Field(
        FORMATS, description=f"a list, none twice, out of {', '.join(FORMATS)}"
    )

    @pydantic.field_validator("workspace")
    @classmethod
    def _a_folder(cls, workspace: str) -> str:
        if re.match(r"[a-z][a-z0-9+.-]+://", workspace):
            raise ValueError("object stores are not supported yet; name a folder")
        return workspace


class Cluster(_Section):
    """Where the work runs: settings of the machine, which never decide what is due."""

    profile: str = Field("threads", min_length=1, description="a profile's name, such as 'threads'")
    workers: int | None = Field(None, ge=1, description="a whole number of tiles in work at once, 1 or more")
    threads_per_worker: int | None = Field(
        None, ge=1, description="a whole number of threads for one tile, 1 or more"
    )
    mem_gb: float | None = Field(None, gt=0, description="memory of one worker in gigabytes, above 0")
    failure_budget: int = Field(
        0, ge=0, description="the whole number of tiles that may fail in a run that still counts as complete"
    )


class Config(_Section):
    """A checked configuration, and where it was read.

    path : the TOML, absolute; text : as it was written; base : the folder that relative paths start from
    """

    path: Path
    text: str
    base: Path
    area: Area = Field(description="a table with aoi or bbox")
    epochs: Annotated[tuple[Epoch, ...], BeforeValidator(_tuple)] = Field(
        alias="epoch", min_length=1, description="at least one [[epoch]] table with name, pre and post"
    )
    sources: Sources = Field(default_factory=Sources, description="a table")
    cube: Cube = Field(default_factory=Cube, description="a table")
    detect: Detect = Field(default_factory=Detect, description="a table")
    output: Output = Field(default_factory=Output, description="a table")
    cluster: Cluster = Field(default_factory=Cluster, description="a table")

    @property
    def stem(self) -> str:
        """Name of the TOML without its ending, from which the run's name starts."""
        return self.path.stem

    @property
    def workspace(self) -> Path:
        """The workspace's folder, absolute."""
        return self.resolve(self.output.workspace)

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
        return {
            "area": self._area_terms(),
            "windows": sorted({str(window) for epoch in self.epochs for window in (epoch.pre, epoch.post)}),
            "sources": self.sources.model_dump(mode="json"),
            "max_cloud_pct": self.cube.max_cloud_pct,
        }

    def science(self) -> dict[str, Any]:
        """Return what decides the results, as canonical JSON types, defaults filled in.

        Settings of the machine ([cluster]) and of the products ([output]) are left out: they change nothing of what
        is due. An AOI file counts by its content, so that a moved one is the same area.
        """
        epochs = [
            {
                "name": epoch.name,
                "pre": str(epoch.pre),
                "post": str(epoch.post),
                "event": None if epoch.event is None else epoch.event.isoformat(),
            }
            for epoch in self.epochs
        ]
        return {
            "area": self._area_terms(),
            "epochs": epochs,
            **self.model_dump(mode="json", include={"sources", "cube", "detect"}),
        }

    def _area_terms(self) -> dict[str, Any]:
        aoi = self.aoi
        if isinstance(aoi, Path):
            aoi = _file_digest(aoi, self)
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
    _refuse_reserved(path, tables)
    folder = (path.parent if base is None else base).resolve()
    try:
        config = Config.model_validate({**tables, "path": path.resolve(), "text": text, "base": folder})
    except pydantic.ValidationError as error:
        raise PipelineError(f"{path}: {_one_line(error, tables)}") from None
    _check_across(path, config)
    return config


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PipelineError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except FileNotFoundError:
        near = [p.name for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        raise PipelineError(
            f"{path}: no such file{_did_you_mean(path.name, near)}; `slidecube init {path}` writes one"
        ) from None
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror or error}") from None


def _refuse_reserved(path: Path, tables: dict[str, Any]) -> None:
    """Refuse names that only the loader may set, as unknown as any other."""
    for name in ("path", "text", "base", "epochs"):
        if name in tables:
            raise PipelineError(f"{path}: {_unknown((name,), Config)}")


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
    if area.crs is not None:
        try:
            TileGrid(crs=area.crs, resolution_m=area.resolution_m, tile_px=config.cube.tile_px)
        except CatalogError as error:
            raise PipelineError(f"{path}: area.crs: {error}") from None
    try:
        load_profile(config.cluster.profile)
    except ClusterError as error:
        raise PipelineError(f"{path}: cluster.profile: {error}") from None


def _one_line(error: pydantic.ValidationError, tables: dict[str, Any]) -> str:
    """Render the first problem; the count of the others follows."""
    problems = error.errors(include_url=False)
    if len(problems) > 1:  # pydantic calls a list too short when its only item was refused
        problems = [problem for problem in problems if problem["type"] != "too_short"]
    # a misspelt key is the cause of a missing one, so it is named first
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    line = _problem(problems[0], tables)
    others = len(problems) - 1
    return line if others == 0 else f"{line} (and {others} more problem{'s' * (others > 1)})"


def _problem(problem: Any, tables: dict[str, Any]) -> str:
    loc, model, allowed = _locate(problem["loc"])
    where = f"{'.'.join(loc)}{_which_epoch(problem['loc'], tables)}"
    if problem["type"] == "extra_forbidden":
        return _unknown(loc, model, where)
    if problem["type"] == "missing":
        return f"{where}: missing; allowed: {allowed}"
    if problem["type"] == "value_error" and str(problem["ctx"]["error"]):
        return f"{where}: {problem['ctx']['error']}"
    return f"{where}: got {_short(_value_at(tables, problem['loc']))}; allowed: {allowed}"


def _locate(loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], type[BaseModel], str]:
    """Follow pydantic's location to the key: its dotted name, the section that holds it, what it allows."""
    model: type[BaseModel] = Config
    names: list[str] = []
    allowed = "a table"
    for part in loc:
        if isinstance(part, int):
            continue
        names.append(part)
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part not in fields:
            break
        allowed = fields[part].description or allowed
        if part not in _SECTIONS:
            break
        model = _SECTIONS[part]
    return tuple(names), model, allowed


_SECTIONS: dict[str, type[BaseModel]] = {
    "area": Area,
    "epoch": Epoch,
    "sources": Sources,
    "cube": Cube,
    "mask": Mask,
    "detect": Detect,
    "output": Output,
    "cluster": Cluster,
}


def _which_epoch(loc: tuple[int | str, ...], tables: dict[str, Any]) -> str:
    if loc[:1] != ("epoch",) or len(loc) < 2 or not isinstance(loc[1], int):
        return ""
    epoch = tables["epoch"][loc[1]]
    name = epoch.get("name") if isinstance(epoch, dict) else None
    return f" (epoch {loc[1] + 1}{f', {name!r}' if isinstance(name, str) else ''})"


def _unknown(loc: tuple[str, ...], model: type[BaseModel], where: str | None = None) -> str:
    hidden = ("path", "text", "base") if model is Config else ()
    known = [field.alias or name for name, field in model.model_fields.items() if name not in hidden]
    kind = "section" if model is Config else "key"
    guess = _did_you_mean(loc[-1], known)
    return f"{where or '.'.join(loc)}: unknown {kind}{guess}; allowed: {', '.join(known)}"


def _value_at(tables: dict[str, Any], loc: tuple[int | str, ...]) -> object:
    """Return what the user wrote for a key: a list whole, not the item that pydantic stumbled over."""
    value: Any = tables
    for part in loc:
        if isinstance(part, int) and not isinstance(value[part], dict):
            break
        if isinstance(value, dict) and part not in value:
            break
        value = value[part]
    return value


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _short(value: object) -> str:
    text = str(value) if isinstance(value, dt.date) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_geometry(text: str) -> bool:
    """Tell WKT (or EWKT) and GeoJSON text from a file's name."""
    return re.match(r"\s*(\{|(SRID=\d+;\s*)?[A-Z]+\s*(Z\s*)?(\(|EMPTY))", text, re.IGNORECASE) is not None


def _file_digest(path: Path, config: Config) -> str:
    """Digest of an AOI file; a shapefile's projection lies beside it and counts too."""
    digest = hashlib.sha256()
    try:
        digest.update(path.read_bytes())
        if path.suffix.lower() == ".shp" and path.with_suffix(".prj").is_file():
            digest.update(path.with_suffix(".prj").read_bytes())
    except OSError as error:
        near = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        raise PipelineError(
            f"{config.path}: area.aoi: got {config.area.aoi!r}, which cannot be read ({error.strerror or error})"
            f"{_did_you_mean(path.name, near)}; allowed: {Area.model_fields['aoi'].description}"
        ) from None
    return f"sha256:{digest.hexdigest()}"
