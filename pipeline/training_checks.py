"""What is checked before hours are spent, by the dry run as by the run itself; and what a user should look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from slidecube.models.architectures import check_stride
from slidecube.models.errors import ModelError
from slidecube.models.splits import PARTS, Part
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.train_config import Candidate, TrainConfig
from slidecube.pipeline.training import Work, arguments_of, initial_of, settings_of
from slidecube.pipeline.training_data import Data, explain

DataOf = Callable[[Candidate], Data]

FEW_LANDSLIDES = 10
"""Fewer in a part that judges say little: one more or less found moves recall by a tenth and more."""

MUCH_LANDSLIDE = 0.2
"""Share of the judged ground under landslides above which a reference is more likely an outline of something else."""

_HERE = ("threads", "dask-local")
"""Runners whose workers are on this machine, so that its devices are theirs."""


def check_trainings(config: TrainConfig, works: Sequence[Work], data_of: DataOf, *, runner: str) -> None:
    """Check all that a training refuses before its first step, of each candidate once.

    runner : of the profile; devices are looked for where its workers are on this machine
    Raises PipelineError, with the TOML and the table.
    """
    try:
        _check_device(config, works, runner)
        for data in _each_data(works, data_of):
            _require_parts(config, data)
        for work in _each_network(works):
            _check_network(config, work.candidate)
    except ModelError as error:
        raise PipelineError(f"{config.path}: {error}") from None


def _check_device(config: TrainConfig, works: Sequence[Work], runner: str) -> None:
    from slidecube.models.devices import require_device  # noqa: PLC0415  torch is slow to import
    from slidecube.models.together import require_devices  # noqa: PLC0415

    if runner in _HERE:
        require_device(config.tables.training.device, table="[training]")
        require_devices(settings_of(config, works[0].candidate, threads=1))


def _require_parts(config: TrainConfig, data: Data) -> None:
    """Refuse data with nothing to learn from or to choose by, before workers are started and 360 of them fail."""
    from slidecube.models.batches import (  # noqa: PLC0415  torch is slow to import
        require_judgeable,
        require_landslide,
    )
    from slidecube.models.train import require_alike  # noqa: PLC0415

    needed: dict[Part, str] = {"train": "learn from", "validation": "choose by"}
    for part, what in needed.items():
        if not len(data.part(part)):
            raise PipelineError(
                f"{config.path}: data: no table gives patches to {what}; {_why(config, part)}"
            )
    require_alike(data.training, data.validation)
    require_landslide(data.training, "training")
    require_judgeable(data.validation, "validation")


def _why(config: TrainConfig, part: Part) -> str:
    """Say what leaves a part empty."""
    patches = config.tables.patches
    if not any(table.used == "blocks" for table in config.tables.data):
        return f'give one use = "{part}", or leave use out of a cube, so that its spatial blocks are shared'
    if not patches.shares[PARTS.index(part)]:
        return f"[patches] shares = {list(patches.shares)} leaves {part} none"
    return (
        f"spatial blocks of {patches.side_px} px that hold a patch of {patches.px} px are too few on this ground; "
        "lower px or block_px in [patches]"
    )


def _check_network(config: TrainConfig, candidate: Candidate) -> None:
    from slidecube.models.architectures import build_network  # noqa: PLC0415

    check_stride(candidate.architecture, arguments_of(candidate), config.tables.patches.px)
    if config.tables.network.pretrained is None:
        build_network(candidate.architecture, len(candidate.features), arguments_of(candidate))
    else:
        initial_of(config, candidate)


def network_sizes(works: Sequence[Work]) -> dict[tuple[str, int], int]:
    """Numbers of weights that are learnt, by architecture and number of features."""
    from slidecube.models.judging import count_weights  # noqa: PLC0415  torch is slow to import

    candidates = [work.candidate for work in _each_network(works)]
    return {
        (one.architecture, len(one.features)): count_weights(
            one.architecture, arguments_of(one), len(one.features)
        )
        for one in candidates
    }


def warnings_of(config: TrainConfig, works: Sequence[Work], data_of: DataOf) -> list[str]:
    """Say what is allowed and yet likely wrong, a line each."""
    found = [line for data in _each_data(works, data_of) for line in _warnings(config, data)]
    return list(dict.fromkeys(found))


def _warnings(config: TrainConfig, data: Data) -> Iterable[str]:
    rows = explain(data)
    for part in PARTS:
        counts = [row["landslides"] for row in rows if row["part"] == part and "landslides" in row]
        few = sum(counts) < FEW_LANDSLIDES and len(counts) == sum(row["part"] == part for row in rows)
        if part != "train" and len(data.part(part)) and few:
            yield (
                f"{part} holds {sum(counts)} landslide{'s' * (sum(counts) != 1)}, fewer than {FEW_LANDSLIDES}: its "
                "scores say little; give more ground, or other shares"
            )
    for row in rows:
        yield from _of_cube(config, row)


def _of_cube(config: TrainConfig, row: Mapping[str, object]) -> Iterable[str]:
    where = ", ".join(row["regions"]) if isinstance(row["regions"], dict) else ""
    share = row.get("percent landslide")
    if row["part"] == "train" and isinstance(share, int) and share > 100 * MUCH_LANDSLIDE:
        yield (
            f"{where}: {share} % of the ground is labelled landslide; is the reference one of landslides, and not of "
            "an area?"
        )
    patches = config.tables.patches
    if row["part"] == "train" and patches.confusers and patches.hard and row.get("on confusers") == 0:
        yield (
            f"{where}: the confusers {', '.join(patches.confusers)} were found nowhere, so hard = {patches.hard:g} of "
            "the patches lie anywhere"
        )


def _each_data(works: Sequence[Work], data_of: DataOf) -> Iterable[Data]:
    """Data of the candidates, each once."""
    firsts = {(work.candidate.features, work.candidate.held_out): work.candidate for work in works}
    return map(data_of, firsts.values())


def _each_network(works: Sequence[Work]) -> Iterable[Work]:
    """A candidate of each network that is built."""
    firsts: dict[tuple[str, tuple[str, ...]], Work] = {}
    for work in works:
        firsts.setdefault((work.candidate.architecture, work.candidate.features), work)
    return firsts.values()
