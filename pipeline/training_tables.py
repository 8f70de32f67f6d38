"""The tables of a training's TOML that say what is learnt from: [[data]] and [patches]."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from slidecube.pipeline.config import Slug

Kind = Literal["cube", "landslide4sense", "sen12landslides"]
Use = Literal["train", "validation", "test", "blocks", "split"]


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _three(value: object) -> object:
    """Take a list of three; of another length pydantic would name a key that nobody wrote."""
    if isinstance(value, list | tuple) and len(value) != 3:
        raise ValueError("")
    return _tuple(value)


Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataTable(_Table):
    """One source of labelled patches: a cube of our own with known landslides, or a benchmark's folder."""

    kind: Kind = Field(description='"cube", "landslide4sense" or "sen12landslides"')
    run: Text | None = Field(
        None, description="of a cube, the path of the TOML of a run whose layers are made"
    )
    epoch: Slug | None = Field(
        None, description="of a cube, the name of the run's epoch; left out, its only one"
    )
    reference: Text | None = Field(
        None, description="of a cube, the path of a vector file with polygons of known landslides, in any CRS"
    )
    layer: Text | None = Field(None, description="the layer of the reference, of a file with several")
    complete: bool = Field(
        True,
        description="true or false: whether the reference holds every landslide of the area; of an incomplete one the "
        "ground outside of it is unlabelled",
    )
    folder: Text | None = Field(None, description="of a benchmark, the path of its folder")
    split: Literal["competition", "paper"] = Field(
        "competition",
        description='of landslide4sense with use = "split": "competition" (TrainData, ValidData, TestData) or "paper" '
        "(959 patches to learn from, 2,840 to test on)",
    )
    modality: Literal["s2", "s1asc", "s1dsc"] = Field(
        "s2", description='of sen12landslides: "s2", "s1asc" or "s1dsc"'
    )
    pairing: Literal["nearest", "clearest", "greenest"] = Field(
        "greenest",
        description='of sen12landslides, how its series become a pair: "nearest", "clearest" or "greenest"',
    )
    region: Slug | None = Field(
        None, description="the name of the region or event, by which data are left out and samples balanced"
    )
    use: Use | None = Field(
        None,
        description='"train", "validation", "test", "blocks" (spatial blocks share it) or "split" (a benchmark\'s own)'
        '; left out, "blocks" of a cube and "split" of a benchmark',
    )
    world: Slug | None = Field(
        None,
        description="of a cube of simulated scenes, the name of its world: cubes of different worlds may lie at "
        "the same coordinates",
    )

    @pydantic.model_validator(mode="after")
    def _fits_its_kind(self) -> DataTable:
        cube = self.kind == "cube"
        wanted, foreign = (("run", "reference"), ("folder",)) if cube else (("folder",), ("run", "reference"))
        foreign = (*foreign, *(() if cube else ("epoch", "layer", "world")))
        for key in wanted:
            if getattr(self, key) is None:
                raise ValueError(f"kind {self.kind!r} needs {' and '.join(wanted)}; {key} is missing")
        for key in foreign:
            if getattr(self, key) is not None:
                raise ValueError(f"{key} is nothing of kind {self.kind!r}; leave it out")
        if cube and self.use == "split":
            raise ValueError('use = "split" is a benchmark\'s own; of a cube use "blocks"')
        if not cube and not self.complete:
            raise ValueError(f"complete = false is nothing of kind {self.kind!r}; leave it out")
        return self

    @property
    def named(self) -> str:
        """Name of its region: as it is given, or of its epoch, its run's file, its benchmark."""
        if self.kind != "cube":
            return self.region or self.kind
        return self.region or self.epoch or Path(self.run or "").stem

    @property
    def used(self) -> Use:
        """What it is used for."""
        return self.use or ("blocks" if self.kind == "cube" else "split")


class PatchTable(_Table):
    """How patches are taken.

    Of cubes those to learn from are random crops: some hold a landslide ("smart" crops of Ganerod et al. 2023), some a
    named confuser, the others lie anywhere. Those to judge by are fixed and share no pixel.
    """

    px: int = Field(128, ge=32, le=512, description="the side of a patch, 32 to 512 pixels")
    count: int = Field(
        2_000, ge=1, le=1_000_000, description="a whole number of patches to learn from, over all cubes"
    )
    positive: Share = Field(0.5, description="the share of them that hold a landslide, 0 to 1")
    hard: Share = Field(
        0.25, description="the share of them that hold a confuser, 0 to 1; without confusers there are none"
    )
    confusers: Annotated[tuple[Text, ...], BeforeValidator(_tuple)] = Field(
        (), description="a list of rules such as 'flat-loss', and of paths of vector files of polygons"
    )
    judged: int = Field(
        1_000,
        ge=1,
        le=1_000_000,
        description="the most patches, of each cube, in validation and in test each",
    )
    shares: Annotated[tuple[Share, Share, Share], BeforeValidator(_three)] = Field(
        (0.7, 0.15, 0.15),
        description='three shares of the spatial blocks, for training, validation and test, where use = "blocks"; they '
        "add up to 1",
    )
    block_px: int | None = Field(
        None,
        ge=32,
        description="the side of a spatial block in pixels, at least px + 2 gap_px; left out, 4 px + 2 gap_px",
    )
    gap_px: int = Field(
        16,
        ge=1,
        le=512,
        description="how many pixels at each edge of a spatial block no patch reaches, 1 to 512",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="a whole number: another one chooses other patches")
    cache_mb: int = Field(
        512, ge=1, description="megabytes of features kept in memory by each process, at least one block"
    )

    @pydantic.model_validator(mode="after")
    def _adds_up(self) -> PatchTable:
        if self.positive + self.hard > 1 + 1e-9:
            raise ValueError(
                f"positive = {self.positive:g} and hard = {self.hard:g} are more than 1; lower one of them"
            )
        if abs(sum(self.shares) - 1) > 1e-6 or self.shares[0] == 0:
            raise ValueError(
                f"shares: got {list(self.shares)}; allowed: three that add up to 1, the first above 0"
            )
        if self.side_px < self.px + 2 * self.gap_px:
            raise ValueError(
                f"block_px = {self.block_px} holds no patch of {self.px} px with gaps of {self.gap_px} px; allowed: at "
                f"least {self.px + 2 * self.gap_px}"
            )
        return self

    @property
    def side_px(self) -> int:
        """Side of a spatial block."""
        return self.block_px or 4 * self.px + 2 * self.gap_px
