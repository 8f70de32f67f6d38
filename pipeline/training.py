"""One training, end to end: data, weights, calibration, threshold, scores. What is finished is not done again.

A candidate has a folder named by its key, which is content alone: architecture, settings, features, data, versions. Its
record in the ledger is written last. How it is judged has a key of its own, so that another threshold trains nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from slidecube.catalog.errors import CatalogError
from slidecube.cluster.faults import Fault, fault_of
from slidecube.cluster.runner import TaskResult, TileTask
from slidecube.models.architectures import complete_arguments, libraries_of
from slidecube.models.calibration import (
    Chosen,
    ScoreHistogram,
    calibrated,
    choose_threshold,
    fit_calibration,
)
from slidecube.models.card import FeatureSpec
from slidecube.models.ensemble_choice import pack
from slidecube.models.errors import DivergedError, ModelError
from slidecube.models.evaluation import Tally, judge
from slidecube.models.network_card import Argument, Calibration
from slidecube.models.patches import Patches, blocks_of
from slidecube.models.train_settings import TrainSettings
from slidecube.models.weights import read_file, write_whole
from slidecube.pipeline.errors import FencedError, PipelineError
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.ledger import Ledger, Record
from slidecube.pipeline.lock import holds
from slidecube.pipeline.train_config import HUB_CACHE, Candidate, Threshold, TrainConfig, loss_numbers
from slidecube.pipeline.training_data import Data, leave_one_out, open_all_data

JUDGE_VERSION = 3
"""Version of how a candidate is judged; a change makes the judgement due, and no training."""

WEIGHTS, TRAINED, JUDGED = "weights.safetensors", "trained.json", "judged.json"
VALIDATION, TEST = "validation.npz", "test.npz"
"""Calibrated probabilities of each patch, (n, y, x) uint16, compressed; see `ensemble_choice.pack`."""

Open = Callable[[TrainConfig, Candidate], Data]
Say = Callable[[str], None]


def open_candidate_data(config: TrainConfig, candidate: Candidate) -> Data:
    """Open the data of a candidate; a process keeps what it opened last."""
    tables = list(config.tables.data)
    if candidate.held_out:
        tables = dict(leave_one_out(tables))[candidate.held_out]
    wanted = content_key(
        [table.model_dump(mode="json") for table in tables],
        config.tables.patches.model_dump(mode="json"),
        list(candidate.features),
        str(config.base),
    )
    with _opening:
        if wanted not in _opened:
            _opened.clear()  # its cache of blocks is the larger part of a process
            spec = FeatureSpec(names=candidate.features)
            _opened[wanted] = open_all_data(tables, config.tables.patches, spec, base=config.base)
        return _opened[wanted]


_opened: dict[str, Data] = {}
_opening = threading.Lock()


def forget_data() -> None:
    """Let the next one open its data again: files may have changed since this process opened them."""
    with _opening:
        _opened.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A candidate with its keys. key : of its weights, which names its folder; judged_key : of how it is judged."""

    candidate: Candidate
    key: str
    judged_key: str


def work_of(config: TrainConfig, candidate: Candidate, data: Data) -> Work:
    """Compute the keys of a candidate; no path and no setting of the machine is a part of them.

    Raises ModelError for arguments that do not fit the features.
    """
    from slidecube.models.train import TRAIN_VERSION  # noqa: PLC0415  torch is slow to import

    tables = config.tables
    deciding = settings_of(config, candidate, threads=1).deciding()
    key = content_key(
        "training",
        TRAIN_VERSION,
        libraries_of(candidate.architecture),
        candidate.architecture,
        arguments_of(candidate),
        {name: value for name, value in deciding.items() if name not in _OF_THE_MACHINE},
        list(candidate.features),
        [data.training.digest, data.validation.digest],
        pretrained_digest(config, candidate),
    )
    return Work(
        candidate=candidate,
        key=key,
        judged_key=content_key(
            "judged",
            JUDGE_VERSION,
            key,
            tables.calibration.model_dump(mode="json"),
            tables.threshold.model_dump(mode="json"),
            data.test.digest,
        ),
    )


_OF_THE_MACHINE = {"device", "threads", "processes"}
"""Settings that decide last bits and no more."""


def arguments_of(candidate: Candidate) -> dict[str, Argument]:
    """Arguments of its network, defaults filled in. Raises ModelError."""
    return complete_arguments(candidate.architecture, candidate.features, candidate.arguments)


def settings_of(config: TrainConfig, candidate: Candidate, *, threads: int) -> TrainSettings:
    """Settings of its loop."""
    training = config.tables.training
    return training.settings(
        threads=threads,
        loss=candidate.loss,
        learning_rate=candidate.learning_rate,
        **loss_numbers(candidate.loss, training),
    )


def pretrained_digest(config: TrainConfig, candidate: Candidate) -> str:
    """Digest of the file that a training starts from: "" = fresh weights. Raises ModelError where it cannot be read."""
    name = config.tables.network.pretrained
    if name is None:
        return ""
    if name == HUB_CACHE:
        from slidecube.models.pretrained import cached_file  # noqa: PLC0415  torch is slow to import

        path = cached_file(str(arguments_of(candidate).get("encoder", candidate.architecture)))
    else:
        path = config.resolve(name)
    try:
        found = path.stat()
    except OSError:
        found = None
    # asked for each candidate of a sweep, of a file of some 100 MB
    return _file_digest(path, (found.st_size, found.st_mtime_ns, found.st_ino) if found else ())


@lru_cache(maxsize=64)
def _file_digest(path: Path, _stamp: tuple[int, ...]) -> str:
    return hashlib.sha256(read_file(path, "network.pretrained")).hexdigest()


def initial_of(config: TrainConfig, candidate: Candidate) -> bytes | None:
    """Weights that a candidate starts from, None = fresh ones.

    Raises ModelError where they cannot be read, or do not fit its network.
    """
    from slidecube.models.judging import initial_weights  # noqa: PLC0415  torch is slow to import

    name = config.tables.network.pretrained
    if name is None:
        return None
    try:
        return initial_weights(
            candidate.architecture,
            arguments_of(candidate),
            len(candidate.features),
            content=None if name == HUB_CACHE else _pretrained(config, name),
            seed=config.tables.training.seed,
        )
    except ModelError as error:
        raise ModelError(f"network.pretrained = {name!r} for {candidate.architecture}: {error}") from None


def _pretrained(config: TrainConfig, name: str) -> bytes:
    return read_file(config.resolve(name), "network.pretrained")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainContext:
    """What a worker needs for any candidate of a sweep; sent to other processes.

    out : folder of the trainings; threads : of one; lock, token : of the driver that may write
    tell : told of each epoch, in this process only
    """

    config: TrainConfig
    out: Path
    works: Mapping[str, Work]
    threads: int
    lock: Path
    token: str
    open: Open = open_candidate_data
    tell: Say | None = None

    def require(self) -> None:
        """Raise FencedError when another driver has taken over."""
        if not holds(self.lock, self.token):
            raise FencedError(
                f"Another `slidecube train` works in {self.out} now; this one may write no more"
            )


def ledger_of(out: Path) -> Ledger:
    """Ledger of the trainings of a folder."""
    return Ledger(out / "trainings.ledger")


def folder_of(out: Path, key: str) -> Path:
    """Folder of a training."""
    return out / "trainings" / key


def done_keys(out: Path, works: Iterable[Work]) -> set[str]:
    """Keys of the candidates of which nothing is left to do: their record and their files say so."""
    known = ledger_of(out).keys() if out.exists() else {}
    return {
        work.key
        for work in works
        if known.get(work.key) == (work.judged_key, True) and _is_done(folder_of(out, work.key), work)
    }


def _is_done(folder: Path, work: Work) -> bool:
    trained, judged = _read_json(folder / TRAINED), _read_json(folder / JUDGED)
    if not _is_trained(folder) or trained.get("diverged"):
        return _is_trained(folder)
    files = (VALIDATION, TEST) if judged.get("test_patches") else (VALIDATION,)
    return (
        judged.get("judged_key") == work.judged_key
        and judged.get("weights_sha256") == trained["weights_sha256"]
        and all((folder / name).is_file() for name in files)
    )


def _is_trained(folder: Path) -> bool:
    """Tell whether a training ended: with weights, or with none because it diverged."""
    trained = _read_json(folder / TRAINED)
    return bool(trained) and (bool(trained.get("diverged")) or (folder / WEIGHTS).is_file())


def train_task(context: TrainContext, task: TileTask) -> TaskResult:
    """Do one training, and record it; never raises for one that fails."""
    began = time.monotonic()
    try:
        record = _recorded(context, task)
    except Exception as error:  # noqa: BLE001  no room even for the record, say: it stays due
        return TaskResult(task=task, status="failed", reason=_reason(error), fault=fault_of(error))
    return TaskResult(
        task=task,
        status=record.state,
        seconds=time.monotonic() - began,
        reason=record.reason,
        fault=cast("Fault | None", record.fault or None),
    )


def _recorded(context: TrainContext, task: TileTask) -> Record:
    ledger, work = ledger_of(context.out), context.works[task.tile]
    if done_keys(context.out, [work]):  # its worker died after the record and before the answer
        return cast("Record", ledger.read(task.tile))
    began = time.monotonic()
    try:
        context.require()
        notes = make(context, work)
        record = Record(
            tile=task.tile,
            key=task.key,
            state="done",
            reason="; ".join(notes),
            seconds=time.monotonic() - began,
        )
    except Exception as error:
        if fault_of(error) == "fenced":
            raise
        expected = isinstance(error, ModelError | PipelineError | CatalogError)
        record = Record(
            tile=task.tile,
            key=task.key,
            state="failed",
            reason=_reason(error),
            fault="data" if isinstance(error, ModelError) else fault_of(error),
            traceback="" if expected else "".join(traceback.format_exception(error)),
            seconds=time.monotonic() - began,
        )
    context.require()
    ledger.write(record)
    return record


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    expected = isinstance(error, ModelError | PipelineError | CatalogError | OSError)
    return text if expected else f"{type(error).__name__}: {text} (its traceback is in trainings.ledger)"


def _data_of(context: TrainContext, work: Work) -> Data:
    """Open the data of a candidate, which are those of its key: what this process kept may be older, or newer."""
    for _ in range(2):
        data = context.open(context.config, work.candidate)
        found = work_of(context.config, work.candidate, data)
        if (found.key, found.judged_key) == (work.key, work.judged_key):
            return data
        forget_data()
    raise PipelineError(
        "The data changed since this training was planned, or the worker has other versions of libraries or other "
        "weights to begin with; start `slidecube train` again"
    )


def make(context: TrainContext, work: Work) -> list[str]:
    """Train and judge a candidate, each unless it is done; returns what a user should know of it, a line each."""
    notes: list[str] = []
    data = _data_of(context, work)
    folder = folder_of(context.out, work.key)
    if not _is_trained(folder):
        try:
            _train(context, work, data, notes)
        except DivergedError as error:  # a result, as any F1 is: the same settings diverge again
            _end_training(context, work, {"diverged": str(error)})
    context.require()
    if not _is_done(folder, work):
        _judge(context, work, data)
    return notes


def _train(context: TrainContext, work: Work, data: Data, notes: list[str]) -> None:
    from slidecube.models.train import Progress, train  # noqa: PLC0415

    candidate, folder = work.candidate, folder_of(context.out, work.key)
    settings = settings_of(context.config, candidate, threads=context.threads)
    tell = context.tell

    def told(news: Progress) -> None:
        context.require()  # a driver that was given up must not go on for hours
        if news.row is None:  # of no epoch: a half-done training that cannot go on here, say
            notes.append(news.text)
        if tell is not None:
            tell(news.text)

    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = train(
        candidate.architecture,
        arguments_of(candidate),
        data.training,
        data.validation,
        settings,
        folder=folder,
        initial=initial_of(context.config, candidate),
        progress=told,
    )
    context.require()
    write_whole(folder / WEIGHTS, found.weights)
    said = {
        "mean": found.mean,
        "std": found.std,
        "epoch": found.epoch,
        "epochs_run": found.epochs_run,
        "score": found.score,
        "weights_sha256": hashlib.sha256(found.weights).hexdigest(),
        "seconds": time.monotonic() - began,
        "units": data.training.units,
        "resolution_m": data.training.resolution_m,
        "patch_px": data.training.patch_px,
        "training_patches": len(data.training),
        "validation_patches": len(data.validation),
        "data": [data.training.digest, data.validation.digest],
    }
    _end_training(context, work, said)


def _end_training(context: TrainContext, work: Work, said: Mapping[str, Any]) -> None:
    """Write down what came of a training."""
    from slidecube.models.train import STATE_FILE  # noqa: PLC0415  torch is slow to import

    context.require()
    folder = folder_of(context.out, work.key)
    _write_json(folder / TRAINED, {**_candidate_json(work.candidate), "key": work.key, **said})
    # twice the weights and more, of hundreds of candidates
    (folder / STATE_FILE).unlink(missing_ok=True)


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        **{f.name: getattr(candidate, f.name) for f in dataclasses.fields(candidate)},
        "arguments": arguments_of(candidate),
    }


def _judge(context: TrainContext, work: Work, data: Data) -> None:
    tables, folder = context.config.tables, folder_of(context.out, work.key)
    (folder / JUDGED).unlink(missing_ok=True)  # what lies beside it is about to change
    logits_nyx, labels_nyx = _all_logits(context, work, data.validation)
    by = tables.calibration.by or ""
    strata = _plane(data.validation, by) if by else None
    calibration = fit_calibration(
        logits_nyx, labels_nyx, method=tables.calibration.method, by=by, strata=strata
    )
    probability_nyx = calibrated(calibration, logits_nyx, strata)
    histogram = ScoreHistogram.of(probability_nyx, labels_nyx)
    chosen, unmet = chosen_threshold(histogram, tables.threshold)
    min_px = min_area_px(tables.threshold.min_area_m2, data.validation.resolution_m)
    validation = judge(
        probability_nyx,
        labels_nyx,
        threshold=chosen.threshold,
        regions=data.validation.regions,
        blocks=blocks_of(data.validation),
        min_area_px=min_px,
    )
    _write_array(folder / VALIDATION, pack(probability_nyx))
    test = None
    if len(data.test):
        tally = Tally(threshold=chosen.threshold, min_area_px=min_px)
        test = _judge_test(context, work, data.test, (calibration, tally)).metrics()
    said = {
        "judged_key": work.judged_key,
        "key": work.key,
        "weights_sha256": trained_of(context.out, work.key)["weights_sha256"],
        "score": histogram.best_f1()[0],
        "threshold": chosen.threshold,
        "chosen": chosen.chosen,
        "unmet": unmet,
        "calibration": calibration.model_dump(mode="json"),
        "validation": validation.metrics(),
        "test": test,
        "test_patches": len(data.test),
    }
    context.require()
    _write_json(folder / JUDGED, said)


def chosen_threshold(histogram: ScoreHistogram, table: Threshold) -> tuple[Chosen, str]:
    """Choose the threshold that [threshold] asks for, or that of the highest F1 where there is none, and say why."""
    try:
        found = choose_threshold(
            histogram, rule=table.rule, precision=table.precision, prevalence=table.prevalence
        )
    except ModelError as error:
        if table.rule == "max-f1":
            raise
        found = choose_threshold(histogram)
        return replace(found, chosen=f"{found.chosen}, because: {error}"), str(error)
    return found, ""


def _judge_test(context: TrainContext, work: Work, patches: Patches, how: tuple[Calibration, Tally]) -> Tally:
    """Judge the test part by part, and keep its probabilities; how : calibration, and the tally that takes them."""
    calibration, tally = how
    regions, blocks, kept = patches.regions, blocks_of(patches), []
    by = calibration.by
    for part, logits_nyx, labels_nyx in _parts(context, work, patches):
        strata = _plane(patches, by, part) if by else None
        probability_nyx = calibrated(calibration, logits_nyx, strata)
        for i, index in enumerate(part):
            tally.add(probability_nyx[i], labels_nyx[i], region=regions[index], block=blocks[index])
        kept.append(pack(probability_nyx))
    _write_array(folder_of(context.out, work.key) / TEST, np.concatenate(kept))
    return tally


def _all_logits(context: TrainContext, work: Work, patches: Patches) -> tuple[np.ndarray, np.ndarray]:
    parts = [(logits, labels) for _, logits, labels in _parts(context, work, patches)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _parts(context: TrainContext, work: Work, patches: Patches) -> Any:
    from slidecube.models.judging import logits_in_parts  # noqa: PLC0415  torch is slow to import

    training = context.config.tables.training
    return logits_in_parts(
        network_of(context.out, work.key),
        patches,
        batch=training.batch,
        device=training.device,
        threads=training.threads or context.threads,
    )


def network_of(out: Path, key: str) -> Any:
    """Return what a training gave, `judging.TrainedNetwork`. Raises ModelError where its files were changed."""
    from slidecube.models.judging import TrainedNetwork  # noqa: PLC0415  torch is slow to import

    folder = folder_of(out, key)
    said, weights = trained_of(out, key), read_file(folder / WEIGHTS, "Weights of a training")
    if hashlib.sha256(weights).hexdigest() != said["weights_sha256"]:
        raise ModelError(
            f"{folder / WEIGHTS} is not what its training wrote; remove {folder}, and train again"
        )
    return TrainedNetwork(
        architecture=said["architecture"],
        arguments=said["arguments"],
        weights=weights,
        mean=tuple(said["mean"]),
        std=tuple(said["std"]),
    )


def trained_of(out: Path, key: str) -> dict[str, Any]:
    """What is known of a finished training."""
    return _read_json(folder_of(out, key) / TRAINED)


def refusal_of(out: Path, key: str) -> str:
    """Why a finished training gives no model by itself: it diverged, or has no threshold as asked for; "" = it does."""
    return str(trained_of(out, key).get("diverged") or judged_of(out, key).get("unmet") or "")


def judged_of(out: Path, key: str) -> dict[str, Any]:
    """How a finished training was judged."""
    return _read_json(folder_of(out, key) / JUDGED)


def probabilities_of(out: Path, key: str, part: str) -> np.ndarray:
    """Packed probabilities of a judged training; part : `VALIDATION` or `TEST`."""
    path = folder_of(out, key) / part
    try:
        with np.load(path, allow_pickle=False) as file:
            return np.asarray(file["packed"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} cannot be read ({error}); remove {path.parent}, and train again") from None


def labels_of(patches: Patches) -> np.ndarray:
    """Labels of fixed patches, (n, y, x) uint8, as they are judged: nothing where an input is unknown."""
    from slidecube.models.batches import read_patch  # noqa: PLC0415  torch is slow to import

    side = patches.patch_px
    labels_nyx = np.empty((len(patches), side, side), np.uint8)
    for i in range(len(patches)):
        labels_nyx[i] = read_patch(patches, i)[1]
    return labels_nyx


def _plane(patches: Patches, name: str, indices: range | None = None) -> np.ndarray:
    """Values of one feature in patches, (n, y, x)."""
    at = patches.features.names.index(name)
    chosen = range(len(patches)) if indices is None else indices
    return np.stack([patches.read(i)[0][at] for i in chosen])


def min_area_px(min_area_m2: float, resolution_m: float) -> int:
    """Pixels of the smallest object that is reported, 1 or more."""
    return max(1, math.ceil(min_area_m2 / resolution_m**2))


def _write_array(path: Path, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, packed=values)
    write_whole(path, buffer.getvalue())


def _write_json(path: Path, said: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(said, indent=1, allow_nan=False) + os.linesep).encode())


def _read_json(path: Path) -> dict[str, Any]:
    """Read what was written whole; {} where it is missing or damaged, so that it is done again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
