"""The TOML of a training: what is learnt from, by which network, how it is judged, and what a sweep tries.

Problems are one line each, as of a run's TOML (`config`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field

from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import Profile, load_profile, read_profile
from slidecube.models.architectures import ARCHITECTURES, check_arguments
from slidecube.models.calibration import Method, Rule
from slidecube.models.devices import Device
from slidecube.models.ensemble_choice import SIZES
from slidecube.models.errors import ModelError
from slidecube.models.network_card import Argument
from slidecube.models.train_settings import (
    AugmentSettings,
    Optimizer,
    Precision,
    Schedule,
    TrainSettings,
)
from slidecube.pipeline.config import Distinct, FeatureNames, Slug
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import is_built_in
from slidecube.pipeline.refusals import did_you_mean, refusal
from slidecube.pipeline.training_tables import DataTable, PatchTable

ENS_ARCHITECTURES = (
    "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "pan", "deeplabv3", "deeplabv3plus",
)  # fmt: skip
ENS_LOSSES = ("bce", "dice", "focal", "jaccard", "lovasz")
ENS_LEARNING_RATES = (0.01, 0.001)
"""What Ganeroed et al. 2023 (ENS) combine, with four settings of features: 360 trainings."""

HUB_CACHE = "imagenet"
"""In place of a file: an encoder's published weights, as the user's hub cache holds them."""

_DEFAULT = TrainSettings()


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class _Table(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Features(_Table):
    """What the network reads."""

    names: FeatureNames = Field(
        description="a list of features, layers of [[layer]] and sets of features, none twice"
    )


class NetworkTable(_Table):
    """What computes."""

    architecture: str = Field("resunet", min_length=1, description=f"one of {', '.join(ARCHITECTURES)}")
    arguments: dict[str, Argument] = Field(
        default_factory=dict, description="a table of the architecture's arguments, such as { width = 16 }"
    )
    pretrained: str | None = Field(
        None,
        min_length=1,
        description="the path of a safetensors file of weights to start from, of a network or an encoder, from the "
        "TOML's folder, or 'imagenet' for what the hub cache of this machine holds of the encoder",
    )
    window_px: int | None = Field(
        None,
        ge=32,
        le=513,
        description="the side of the windows in which a map is computed, 32 to 513 pixels; left out, by the receptive "
        "field that is measured",
    )
    margin_px: int | None = Field(
        None,
        ge=0,
        le=256,
        description="pixels at each side of a window that blend into the next one, less than half a window",
    )


class Augment(_Table):
    """How patches are varied."""

    flips: bool = Field(default=True, description="true or false: mirrored at random")
    turns: bool = Field(default=True, description="true or false: turned by quarters at random")
    jitter_gain: float = Field(0.0, ge=0, lt=1, description="0 to below 1: how much spectra are multiplied")
    jitter_offset: float = Field(
        0.0, ge=0, lt=1, description="0 to below 1: how much is added to spectra, in standard deviations"
    )
    clouds: float = Field(0.0, ge=0, le=1, description="the share of patches with a pasted cloud, 0 to 1")
    scars: float = Field(0.0, ge=0, le=1, description="the share of patches with an implanted scar, 0 to 1")


class Training(_Table):
    """How it learns; what is left out is as in ENS."""

    loss: str = Field(
        _DEFAULT.loss, min_length=1, description="a loss such as 'bce' or 'dice', or a sum such as 'bce+dice'"
    )
    positive_weight: float | None = Field(
        None, gt=0, description="of weighted-ce, how much more a landslide pixel weighs, above 0"
    )
    prior: float | None = Field(
        None, gt=0, lt=1, description="of pu, the share of landslides, above 0, below 1"
    )
    optimizer: Optimizer = Field(_DEFAULT.optimizer, description='"adam", "adamw" or "sgd"')
    learning_rate: float = Field(_DEFAULT.learning_rate, gt=0, description="a number above 0")
    momentum: float = Field(_DEFAULT.momentum, ge=0, lt=1, description="of sgd, 0 to below 1")
    weight_decay: float = Field(_DEFAULT.weight_decay, ge=0, description="0 or more")
    schedule: Schedule = Field(_DEFAULT.schedule, description='"constant", "cosine" or "step"')
    step_iterations: int = Field(_DEFAULT.step_iterations, ge=1, description="of step, a whole number")
    step_factor: float = Field(_DEFAULT.step_factor, ge=0, lt=1, description="of step, 0 to below 1")
    warmup: int = Field(
        _DEFAULT.warmup, ge=0, description="a whole number of steps in which the learning rate rises"
    )
    batch: int = Field(_DEFAULT.batch, ge=1, description="a whole number of patches in a step, 1 or more")
    accumulate: int = Field(
        _DEFAULT.accumulate, ge=1, description="a whole number of parts in which a batch is computed"
    )
    iterations: int = Field(
        _DEFAULT.iterations, ge=0, description="steps in an epoch, a whole number; 0: every patch once"
    )
    epochs: int = Field(_DEFAULT.epochs, ge=1, description="a whole number of epochs, 1 or more")
    patience: int = Field(
        _DEFAULT.patience, ge=1, description="epochs without a better F1 on validation until it stops"
    )
    seed: int = Field(_DEFAULT.seed, ge=0, lt=2**32, description="a whole number, 0 or more")
    ema: float = Field(_DEFAULT.ema, ge=0, lt=1, description="decay of the mean of the weights; 0: no mean")
    clip_norm: float = Field(
        _DEFAULT.clip_norm, ge=0, description="the largest norm of a gradient; 0: any is taken"
    )
    dtype: Precision = Field(_DEFAULT.dtype, description='"fp32", "bf16" or "fp16" (on cuda)')
    compile: bool = Field(default=_DEFAULT.compile, description="true or false: compiled by torch")
    device: Device = Field(_DEFAULT.device, description='"cpu" or "cuda"')
    threads: int | None = Field(
        None, ge=1, description="threads of torch, which decide the last bits; left out, the worker's"
    )
    loaders: int = Field(_DEFAULT.loaders, ge=1, description="threads that read patches ahead")
    processes: int = Field(
        _DEFAULT.processes, ge=1, description="processes that share a batch, one for each GPU"
    )
    timeout_s: float = Field(_DEFAULT.timeout_s, ge=1, description="seconds, 1 or more")
    checkpoint_min: float = Field(_DEFAULT.checkpoint_min, ge=0, description="minutes, 0 or more")
    survey_patches: int = Field(
        _DEFAULT.survey_patches, ge=1, description="patches from which mean and deviation are taken, at most"
    )
    tensorboard: bool = Field(default=_DEFAULT.tensorboard, description="true or false")
    panel: int = Field(_DEFAULT.panel, ge=0, description="best and worst patches in the picture")
    augment: Augment = Field(default_factory=Augment, description="a table")

    def settings(self, *, threads: int, **changes: Any) -> TrainSettings:
        """Settings of the loop. threads : where the table names none; changes : of a candidate of a sweep."""
        said = {name: getattr(self, name) for name in type(self).model_fields}
        said |= {"threads": self.threads or threads, "augment": AugmentSettings(**dict(self.augment))}
        return TrainSettings(**{**said, **changes})


class CalibrationTable(_Table):
    """How logits become probabilities."""

    method: Method = Field("temperature", description='"temperature", "isotonic" or "none"')
    by: str | None = Field(
        None,
        min_length=1,
        description="of temperature, a layer of classes among the names, such as 'land_cover'; each class has its own",
    )


class Threshold(_Table):
    """From which probability a pixel is landslide."""

    rule: Rule = Field("max-f1", description='"max-f1" or "precision"')
    precision: float = Field(
        0.9, gt=0, lt=1, description="of precision, what it is at least; above 0, below 1"
    )
    prevalence: float = Field(
        0.001, gt=0, lt=1, description="of precision, the share of land under landslides; above 0, below 1"
    )
    min_area_m2: float = Field(500.0, ge=0, description="the smallest landslide in square metres, 0 or more")


class Sweep(_Table):
    """What is combined; left out, as in ENS."""

    architectures: Annotated[tuple[str, ...], Distinct, Field(min_length=1)] = Field(
        ENS_ARCHITECTURES, description=f"a list, none twice, out of {', '.join(ARCHITECTURES)}"
    )
    losses: Annotated[tuple[str, ...], Distinct, Field(min_length=1)] = Field(
        ENS_LOSSES, description="a list of losses, none twice, such as 'bce' or 'bce+dice'"
    )
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Distinct, Field(min_length=1)] = (
        Field(ENS_LEARNING_RATES, description="a list of numbers above 0, none twice")
    )
    settings: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_+-]{0,30}$")], FeatureNames] = Field(
        default_factory=dict,
        description="a table from a name in lower case to a list of features; left out, [features] names alone",
    )
    best: Annotated[
        tuple[Annotated[int, Field(ge=SIZES[0], le=SIZES[1])], ...], Distinct, Field(min_length=1)
    ] = Field(
        (2, 5, 10, 20, 40), description=f"a list of sizes of ensembles, {SIZES[0]} to {SIZES[1]}, none twice"
    )
    choose: Literal["best", "greedy"] = Field(
        "best",
        description='"best" (the K best on validation) or "greedy" (what raises the F1 of the mean most)',
    )


class NullRunTable(_Table):
    """Ground and time in which nothing happened."""

    run: str = Field(min_length=1, description="the path of the TOML of a run whose layers are made")
    epoch: Slug | None = Field(
        None, description="the name of an epoch of it before any event; left out, its only one"
    )


class ClusterTable(_Table):
    """Where trainings run: settings of the machine, which never decide what is due."""

    profile: str = Field("threads", min_length=1, description="a profile's name, such as 'threads'")
    workers: int | None = Field(None, ge=1, description="a whole number of trainings at once, 1 or more")
    threads_per_worker: int | None = Field(
        None, ge=1, description="a whole number of threads for one training, 1 or more"
    )
    mem_gb: float | None = Field(None, gt=0, description="memory of one worker in gigabytes, above 0")
    failure_budget: int = Field(
        0, ge=0, description="the whole number of trainings that may fail in a sweep that still counts"
    )


class TrainSections(_Table):
    """What the TOML of a training holds."""

    name: Slug = Field(description="lower-case letters, digits, '-' and '_', at most 63, of the model")
    version: int = Field(1, ge=1, description="a whole number, 1 or more; a saved version never changes")
    description: str = Field("", description="a sentence on the model")
    licence: str = Field("not stated", min_length=1, description="the licence of the weights")
    data: Annotated[tuple[DataTable, ...], BeforeValidator(_tuple)] = Field(
        min_length=1, description="at least one [[data]] table with kind"
    )
    patches: PatchTable = Field(default_factory=PatchTable, description="a table")
    features: Features = Field(description="a table with names")
    network: NetworkTable = Field(default_factory=NetworkTable, description="a table")
    training: Training = Field(default_factory=Training, description="a table")
    calibration: CalibrationTable = Field(default_factory=CalibrationTable, description="a table")
    threshold: Threshold = Field(default_factory=Threshold, description="a table")
    sweep: Sweep = Field(default_factory=Sweep, description="a table")
    null_run: NullRunTable | None = Field(None, description="a table with run")
    cluster: ClusterTable = Field(default_factory=ClusterTable, description="a table")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A checked training, and where it was read.

    path : the TOML, absolute; base : the folder that relative paths start from; tables : its sections
    """

    path: Path
    base: Path
    tables: TrainSections

    def resolve(self, text: str) -> Path:
        """Return a path of the TOML as an absolute path."""
        return (self.base / Path(text).expanduser()).resolve()

    def profile(self, name: str | None = None) -> Profile:
        """Profile of the trainings; name : in place of the TOML's. Raises ClusterError."""
        cluster = self.tables.cluster
        if name is not None:
            return load_profile(name)
        return load_profile(
            cluster.profile,
            base=self.base,
            workers=cluster.workers,
            threads_per_worker=cluster.threads_per_worker,
            mem_gb=cluster.mem_gb,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One training: what distinguishes it from the others of its TOML.

    setting : name of its features; held_out : region that a fold leaves out, "" = none
    """

    setting: str
    features: tuple[str, ...]
    architecture: str
    arguments: Mapping[str, Argument]
    loss: str
    learning_rate: float
    held_out: str = ""

    @property
    def label(self) -> str:
        """Its name in tables."""
        said = f"{self.setting} {self.architecture} {self.loss} {self.learning_rate:g}"
        return f"{said} without {self.held_out}" if self.held_out else said


ALONE = "features"
"""Setting of [features] names, where a sweep names none."""


def candidates(config: TrainConfig, *, sweep: bool) -> list[Candidate]:
    """List what is trained: the one network, or everything that a sweep combines, setting by setting."""
    tables = config.tables
    if not sweep:
        network, training = tables.network, tables.training
        combined = [(network.architecture, training.loss, training.learning_rate)]
        settings: Mapping[str, tuple[str, ...]] = {ALONE: tables.features.names}
    else:
        table = tables.sweep
        combined = list(product(table.architectures, table.losses, table.learning_rates))
        settings = table.settings or {ALONE: tables.features.names}
    return [
        Candidate(
            setting=setting,
            features=names,
            architecture=architecture,
            arguments=_own_arguments(architecture, tables.network),
            loss=loss,
            learning_rate=rate,
        )
        for setting, names in settings.items()
        for architecture, loss, rate in combined
    ]


def _own_arguments(architecture: str, network: NetworkTable) -> dict[str, Argument]:
    """Arguments of [network] that an architecture has; those of its own architecture all, so that a wrong one shows."""
    if architecture == network.architecture:
        return dict(network.arguments)
    known = ARCHITECTURES[architecture].arguments
    return {key: value for key, value in network.arguments.items() if key in known}


def load_train_config(path: str | Path, *, base: Path | None = None) -> TrainConfig:
    """Read and check the TOML of a training.

    Raises PipelineError with one line: the file, the key, what was got and what is allowed.
    """
    path = Path(path)
    text = _read(path)
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PipelineError(f"{path}: not valid TOML: {str(error)[:1].lower()}{str(error)[1:]}") from None
    if "epoch" in tables and "data" not in tables:
        raise PipelineError(
            f"{path}: this is the TOML of a run, not of a training; `slidecube init --training` writes one of those"
        )
    try:
        sections = TrainSections.model_validate(tables)
    except pydantic.ValidationError as error:
        raise PipelineError(f"{path}: {refusal(error, tables, TrainSections)}") from None
    folder = (path.parent if base is None else base).resolve()
    config = TrainConfig(path=path.resolve(), base=folder, tables=sections)
    _check_across(path, config)
    return config


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PipelineError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except FileNotFoundError:
        near = [p.name for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        raise PipelineError(
            f"{path}: no such file{did_you_mean(path.name, near)}; `slidecube init --training {path}` writes one"
        ) from None
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_across(path: Path, config: TrainConfig) -> None:
    """Check what needs more than one key, and what tables elsewhere know."""
    tables = config.tables
    for key, names in (
        ("network.architecture", (tables.network.architecture,)),
        ("sweep.architectures", tables.sweep.architectures),
    ):
        for name in names:
            if name not in ARCHITECTURES:
                near = did_you_mean(name, ARCHITECTURES)
                raise PipelineError(f"{path}: {key}: got {name!r}{near}; allowed: {', '.join(ARCHITECTURES)}")
    try:
        check_arguments(tables.network.architecture, tables.network.arguments)
    except ModelError as error:
        raise PipelineError(f"{path}: network.arguments: {error}") from None
    try:
        tables.training.settings(threads=1)
    except ModelError as error:
        raise PipelineError(f"{path}: training: {error}") from None
    _check_calibration(path, tables)
    _check_pretrained(path, config)
    try:
        file = read_profile(tables.cluster.profile, base=config.base)
    except ClusterError as error:
        raise PipelineError(f"{path}: cluster.profile: {error}") from None
    require_runnable(file.runner, f"{path}: cluster.profile: got {tables.cluster.profile!r}")


def require_runnable(runner: str, what: str) -> None:
    """Raise PipelineError for a profile that is submitted and not run. what : begins the message."""
    if runner == "array":
        raise PipelineError(
            f"{what}, an array of jobs, which `slidecube train` cannot submit; allowed: a profile of workers, such as "
            "threads, dask-local, dask-cuda, slurm, pbs, lsf or kubernetes"
        )


def check_losses(path: Path, tables: TrainSections, *, sweep: bool) -> None:
    """Check losses and what they need; apart from the reading, because torch is slow to import."""
    from slidecube.models.losses import check_loss  # noqa: PLC0415

    training = tables.training
    for key, losses in (
        ("sweep.losses", tables.sweep.losses if sweep else ()),
        ("training.loss", () if sweep else (training.loss,)),
    ):
        for loss in losses:
            try:
                # a sweep's losses share what only some of them need
                needs = (
                    {} if sweep else {"positive_weight": training.positive_weight, "prior": training.prior}
                )
                check_loss(loss, **(needs or loss_numbers(loss, training)))
            except ModelError as error:
                raise PipelineError(f"{path}: {key}: {error}") from None


def loss_numbers(loss: str, training: Training) -> dict[str, float | None]:
    """Numbers of [training] that a loss takes; of a sweep, where another one may take others."""
    parts = {part.strip() for part in loss.split("+")}
    return {
        "positive_weight": training.positive_weight if "weighted-ce" in parts else None,
        "prior": training.prior if "pu" in parts else None,
    }


def _check_calibration(path: Path, tables: TrainSections) -> None:
    by = tables.calibration.by
    if by is None:
        return
    if tables.calibration.method != "temperature":
        raise PipelineError(
            f"{path}: calibration.by: got {by!r} with method = {tables.calibration.method!r}; allowed: with "
            "'temperature' only"
        )
    for names in (tables.features.names, *tables.sweep.settings.values()):
        if by not in names:
            raise PipelineError(
                f"{path}: calibration.by: got {by!r}; allowed: a feature that the network reads: {', '.join(names)}"
            )
    if is_built_in(by):
        raise PipelineError(
            f"{path}: calibration.by: got {by!r}, a quantity; allowed: a layer of classes, such as 'land_cover'"
        )


def _check_pretrained(path: Path, config: TrainConfig) -> None:
    name = config.tables.network.pretrained
    if name is None or name == HUB_CACHE:
        return
    if not name.endswith(".safetensors"):
        raise PipelineError(
            f"{path}: network.pretrained: got {name!r}; allowed: 'imagenet', or a file *.safetensors, which "
            "holds numbers and runs nothing"
        )
    if not config.resolve(name).is_file():
        raise PipelineError(f"{path}: network.pretrained: got {name!r}, which is no file")
