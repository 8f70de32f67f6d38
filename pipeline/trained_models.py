"""Trained networks as models: folders with a card, weights and what they may be trusted with."""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidecube.catalog.errors import CatalogError
from slidecube.models.card import FeatureSpec
from slidecube.models.errors import ModelError
from slidecube.models.network_card import CARD_FILE, NetworkCard, read_card
from slidecube.models.registry import load_model, save_ensemble, save_network
from slidecube.pipeline.config import load_config
from slidecube.pipeline.cube_patches import CubePatches
from slidecube.pipeline.ensembles_chosen import ENSEMBLE_VERSION
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.leaderboard import EnsembleRow
from slidecube.pipeline.lineage import is_simulated
from slidecube.pipeline.null_run import null_run, require_ready
from slidecube.pipeline.plan import plan
from slidecube.pipeline.train_config import TrainConfig
from slidecube.pipeline.training import Work, arguments_of, judged_of, network_of, settings_of, trained_of
from slidecube.pipeline.training_data import Data, explain

MODEL_VERSION = 1
"""Version of what the card of a trained model says; a change makes another model of the same training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """Where and from what models are saved.

    simulated : it was trained on simulated scenes; rows : of what the data are, for the card
    """

    config: TrainConfig
    out: Path
    simulated: bool
    rows: Sequence[Mapping[str, Any]]
    threads: int

    def folder(self, name: str) -> Path:
        """Folder of a model of this training."""
        return self.out / "models" / f"{name}@{self.config.tables.version}"


def saving_of(config: TrainConfig, out: Path, data: Data, *, threads: int) -> Saving:
    """Look at the data for what their models' cards must say."""
    return Saving(
        config=config, out=out, simulated=is_simulated_data(data), rows=explain(data), threads=threads
    )


def is_simulated_data(data: Data) -> bool:
    """Tell whether any of the patches are of simulated scenes."""
    parts = (data.training, data.validation, data.test)
    members = [member for part in parts for member in getattr(part, "members", (part,))]
    return any(
        is_simulated(scene.item)
        for member in members
        if isinstance(member, CubePatches)
        for scene in member.cube.plan.scenes.role("optical")
    )


def is_saved(config: TrainConfig, out: Path, name: str, key: str) -> bool:
    """Tell whether a model is saved already.

    Raises PipelineError where its version is another one's, before hours are spent on it.
    """
    folder = out / "models" / f"{name}@{config.tables.version}"
    if not (folder / CARD_FILE).is_file():
        return False
    if read_card(folder).training.get("key") != key:
        raise PipelineError(
            f"{folder} holds another model (of another training, null run, windows or card), and a saved version never "
            f"changes; raise version in {config.path.name}, which trains nothing that is trained already"
        )
    return True


def require_null_run(config: TrainConfig, works: Iterable[Work]) -> None:
    """Refuse a [null_run] that cannot be made of these candidates, before hours are spent on them."""
    table = config.tables.null_run
    if table is None:
        return
    with _of_null_run():
        made = plan(load_config(config.resolve(table.run)))
        for names in dict.fromkeys(work.candidate.features for work in works):
            require_ready(made, FeatureSpec(names=names), epoch=table.epoch)


@contextmanager
def _of_null_run() -> Iterator[None]:
    try:
        yield
    except (ModelError, PipelineError, CatalogError) as error:
        raise PipelineError(f"The null run of [null_run] cannot be made: {error}") from None


def save_single(saving: Saving, work: Work, *, name: str, key: str) -> Path:
    """Save a candidate as a model, with its null run.

    key : of the training that chose it. Returns its folder, which stays as it is where it holds this very model.
    """
    folder = saving.folder(name)
    if (folder / CARD_FILE).is_file() and read_card(folder).training.get("key") == key:
        return folder
    fields = _single_fields(saving, work, name=name, key=key)
    weights = network_of(saving.out, work.key).weights
    if saving.config.tables.null_run is not None:
        with tempfile.TemporaryDirectory(prefix="slidecube-") as scratch:
            trial = Path(scratch) / folder.name
            save_network(trial, fields, weights)
            fields["null_run"] = _null_run(saving, trial)
    save_network(folder, fields, weights)
    return folder


def _single_fields(saving: Saving, work: Work, *, name: str, key: str) -> dict[str, Any]:
    trained, judged = trained_of(saving.out, work.key), judged_of(saving.out, work.key)
    settings = settings_of(saving.config, work.candidate, threads=saving.threads)
    said = {
        "architecture": {
            "name": trained["architecture"],
            "arguments": trained["arguments"],
            **_windows(saving, work, trained["patch_px"]),
        },
        "inputs": {
            "names": trained["features"],
            "units": trained["units"],
            "mean": trained["mean"],
            "std": trained["std"],
            "resolution_m": trained["resolution_m"],
        },
        "calibration": judged["calibration"],
        "output": {"threshold": judged["threshold"], "chosen": judged["chosen"]},
    }
    said["output"]["min_area_m2"] = saving.config.tables.threshold.min_area_m2
    training = {
        "settings": settings.deciding(),
        **{name: trained[name] for name in ("epoch", "epochs_run", "score", "data")},
        "seconds": round(trained["seconds"], 1),
        "training_key": work.key,
    }
    return {**_about(saving, name, key, training), **said, "metrics": _metrics(judged)}


def _about(saving: Saving, name: str, key: str, training: Mapping[str, Any]) -> dict[str, Any]:
    tables = saving.config.tables
    where = "Trained on simulated scenes. " * saving.simulated
    return {
        "name": name,
        "version": tables.version,
        "description": where
        + (tables.description or f"Trained by slidecube from {saving.config.path.name}."),
        "licence": tables.licence,
        "simulated": saving.simulated,
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "training": {"key": key, **training, "patches": [dict(row) for row in saving.rows]},
    }


def _metrics(judged: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of the test, where there is one, and those of validation, by which it was chosen, under their own name."""
    return {**(judged["test"] or {}), "validation": judged["validation"]}


def _windows(saving: Saving, work: Work, patch_px: int) -> dict[str, int]:
    """Windows in which it maps: the TOML's, or by the receptive field that is measured."""
    from slidecube.models.judging import windows_of  # noqa: PLC0415  torch is slow to import

    network = saving.config.tables.network
    candidate = work.candidate
    window_px, margin_px, receptive = windows_of(
        candidate.architecture, arguments_of(candidate), len(candidate.features), patch_px=patch_px
    )
    if network.window_px is not None:
        window_px, margin_px = network.window_px, min(margin_px, network.window_px // 8)
    if network.margin_px is not None:
        margin_px = network.margin_px
    return {"window_px": window_px, "margin_px": margin_px, "receptive_px": receptive}


def save_chosen_ensemble(saving: Saving, row: EnsembleRow, *, name: str, key: str) -> Path:
    """Save an ensemble, its members within it; returns its folder, as `save_single`."""
    folder = saving.folder(name)
    if (folder / CARD_FILE).is_file() and read_card(folder).training.get("key") == key:
        return folder
    saving.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".members-", dir=saving.out) as scratch:
        own = [
            _member(saving, work, f"member-{place:02d}", Path(scratch))
            for place, work in enumerate(row.members, start=1)
        ]
        fields = _ensemble_fields(saving, read_card(own[0]), row, (name, key))
        if saving.config.tables.null_run is not None:
            trial = Path(scratch) / folder.name
            save_ensemble(trial, own, fields)
            fields["null_run"] = _null_run(saving, trial)
        save_ensemble(folder, own, fields)
    return folder


def _member(saving: Saving, work: Work, name: str, scratch: Path) -> Path:
    folder = scratch / f"{name}@{saving.config.tables.version}"
    fields = _single_fields(saving, work, name=name, key=work.judged_key)
    save_network(folder, fields, network_of(saving.out, work.key).weights)
    return folder


def _ensemble_fields(
    saving: Saving, first: NetworkCard, row: EnsembleRow, named: tuple[str, str]
) -> dict[str, Any]:
    """Fields of an ensemble's card; the normalisation of its inputs is that of its first member."""
    labels = [work.candidate.label for work in row.members]
    training = {"setting": row.setting, "members": labels, "score": row.score}
    return {
        **_about(saving, *named, training),
        "inputs": first.inputs.model_dump(),
        "calibration": row.calibration.model_dump(),
        "output": {
            "threshold": row.threshold,
            "chosen": row.chosen,
            "min_area_m2": saving.config.tables.threshold.min_area_m2,
        },
        "metrics": _metrics({"test": row.test, "validation": row.validation}),
    }


def _null_run(saving: Saving, folder: Path) -> dict[str, Any]:
    table = saving.config.tables.null_run
    assert table is not None
    with _of_null_run():
        made = plan(load_config(saving.config.resolve(table.run)))
        return null_run(made, load_model(folder), epoch=table.epoch, threads=saving.threads).to_dict()


def single_key(work: Work, config: TrainConfig) -> str:
    """Key of the model of one candidate."""
    return _model_key(config, work.judged_key)


def sweep_key(works: Sequence[Work], config: TrainConfig) -> str:
    """Key of the models that are chosen from the candidates of a sweep."""
    table, judged = config.tables.sweep, [work.judged_key for work in works]
    return _model_key(config, "chosen", ENSEMBLE_VERSION, judged, sorted(table.best), table.choose)


def _model_key(config: TrainConfig, *chosen: Any) -> str:
    """Key of a saved model: of what it was chosen from, and of all else that its card holds."""
    tables = config.tables
    null, quiet = tables.null_run, None
    if null is not None:
        with _of_null_run():
            quiet = [load_config(config.resolve(null.run)).science(), null.epoch]
    windows = [tables.network.window_px, tables.network.margin_px]
    return content_key("model", MODEL_VERSION, chosen, windows, tables.description, tables.licence, quiet)
