"""Networks on simulated worlds: trained, chosen and judged on ground of their own, beside the detectors of the zoo.

`python -m slidecube.pipeline.simulate.networks DOCUMENT.md [--small] [--out FOLDER] [--ship FOLDER]`

Everything goes through the doors that users have: runs, `slidecube train --sweep`, detection, evaluation. What a folder
holds is not made again, so a command that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w

from slidecube.models.network_card import CARD_FILE, NetworkCard, read_card, read_members, write_card
from slidecube.models.registry import copy_model, files_of
from slidecube.models.weights import write_whole
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.evaluate import Evaluation
from slidecube.pipeline.leaderboard import PARQUET
from slidecube.pipeline.null_run import NullRun, null_run
from slidecube.pipeline.run import RunReport, run
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.simulate.ablation import READING, SAMPLE
from slidecube.pipeline.simulate.archive import SimulatedArchive
from slidecube.pipeline.simulate.baselines import score
from slidecube.pipeline.simulate.detectors import detection_of
from slidecube.pipeline.simulate.worlds import EVENT, QUIET, WORLDS, World, make_worlds, plan_of
from slidecube.pipeline.sweep import Driver, TrainReport
from slidecube.pipeline.train_config import load_train_config

_BANDS = ("B02", "B03", "B04", "B08", "B11", "B12")
CHANGE = (*(f"{band}_{side}" for side in ("pre", "post") for band in _BANDS), "dndvi", "slope_deg")
"""What networks of two images read. Nothing that is undefined where there is light: an unknown input makes a pixel
unknown, and relative changes are unknown over water."""
POST = (*(f"{band}_post" for band in _BANDS), "slope_deg")
"""What a network of a single image reads; Landslide4Sense has all of it."""

SINGLE, ENSEMBLE, SINGLE_IMAGE = "sim-small", "sim-ensemble", "sim-post"
"""Models that ship."""
DRAWN = ("rdndvi", SINGLE, ENSEMBLE)
"""Detectors whose maps are drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is simulated, trained and judged.

    extent_km, overpasses : of a world; count : patches to learn from; sizes : of the ensembles that are tried
    shipped : sizes of the ensemble that ships; width : of every ResU-Net; encoder : of the other architectures
    detectors : of the zoo, name -> parameters
    """

    worlds: tuple[World, ...] = WORLDS
    extent_km: float = 8.1
    overpasses: int | None = None
    architectures: tuple[str, ...] = ("resunet", "linknet", "pspnet")
    losses: tuple[str, ...] = ("bce", "dice", "focal", "jaccard", "lovasz")
    sizes: tuple[int, ...] = (2, 3, 5, 8, 12, 15)
    shipped: tuple[int, ...] = (3, 4)
    px: int = 64
    batch: int = 8
    count: int = 2400
    judged: int = 200
    iterations: int = 100
    epochs: int = 8
    width: int = 16
    encoder: str | None = "mobilenet_v2"
    detectors: Mapping[str, Mapping[str, float]] = field(
        default_factory=lambda: {"rdndvi": {}, "aldi": {}, "cae-kmeans": {"sample": SAMPLE}}
    )

    def of(self, use: str) -> list[World]:
        """Worlds for one use."""
        return [world for world in self.worlds if world.use == use]


FULL = Scale()
"""What docs/networks.md is made of."""
SMALL = Scale(
    worlds=(
        World(terrain="north", seed=10, use="train"),
        World(terrain="east", seed=20, use="validation"),
        World(terrain="south", seed=30, use="test"),
    ),
    extent_km=2.4,
    overpasses=4,
    architectures=("resunet",),
    losses=("bce", "dice"),
    sizes=(2,),
    shipped=(2,),
    px=64,
    batch=4,
    count=32,
    judged=16,
    iterations=3,
    epochs=1,
    width=4,
    encoder=None,
    detectors={"rdndvi": {}},
)
"""The same in a minute, whose numbers say nothing: for tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A detector that is judged on whole maps.

    label : its name in tables; model : of [detect]; lines : further ones of it
    """

    label: str
    model: str
    lines: str = ""

    @property
    def stem(self) -> str:
        """Name of its TOML."""
        return self.label.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that the document is made of.

    singles, ensembles : rows of the leaderboard; greedy : ensembles of greedy choice; detectors : a row a detector and
        held-out world; drawn : label -> evaluation on the first of these; archive, layers : of that world
    models : label -> folder; seconds : of all trainings, of one core each
    """

    scale: Scale
    singles: pd.DataFrame
    ensembles: pd.DataFrame
    greedy: pd.DataFrame
    detectors: pd.DataFrame
    drawn: Mapping[str, Evaluation]
    archive: SimulatedArchive
    layers: RunPlan
    models: Mapping[str, Path]
    seconds: float


def networks(folder: Path, scale: Scale = FULL, *, workers: int = 2) -> Outcome:
    """Simulate, train, choose and judge; what the folder holds already is kept.

    workers : trainings at once, of one thread each
    """
    archives = make_worlds(
        folder / "worlds", scale.worlds, extent_km=scale.extent_km, overpasses=scale.overpasses
    )
    _say("training the sweep")
    best = _train(folder, scale, "networks", sweep=_sweep(scale, "best"), workers=workers)
    board = pd.read_parquet(folder / "training" / PARQUET)
    _train(folder, scale, "networks-greedy", sweep=_sweep(scale, "greedy"), workers=workers)
    greedy_board = pd.read_parquet(folder / "training" / PARQUET)
    _say("training what ships")
    only = {**_sweep(scale, "best"), "architectures": ["resunet"], "best": list(scale.shipped)}
    small = _train(folder, scale, "sim", sweep=only, whole_maps=True, workers=workers)
    post = _train(folder, scale, SINGLE_IMAGE, features=POST, whole_maps=True, workers=workers)
    models = {SINGLE: small.models[0], ENSEMBLE: small.models[1], SINGLE_IMAGE: post.models[0]}
    if read_card(best.models[0]).weights != read_card(small.models[0]).weights:
        models = {"best single network": best.models[0], **models}
    judged = _detectors(scale, models)
    rows = [_row(archives[world], world, one) for world in scale.of("test") for one in judged]
    first = archives[scale.of("test")[0]]
    drawn = {one.label: _evaluation(first, one)[1] for one in judged if one.label in DRAWN}
    single = board["kind"] == "single"
    return Outcome(
        scale=scale,
        singles=board[single],
        ensembles=board[~single],
        greedy=greedy_board[greedy_board["kind"] != "single"],
        detectors=pd.DataFrame(rows),
        drawn=drawn,
        archive=first,
        layers=plan_of(first, EVENT),
        models=models,
        seconds=float(board.loc[single, "seconds"].sum()),
    )


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def _sweep(scale: Scale, choose: str) -> dict[str, Any]:
    return {
        "architectures": list(scale.architectures),
        "losses": list(scale.losses),
        "learning_rates": [0.001],
        "best": list(scale.sizes),
        "choose": choose,
    }


def _train(
    folder: Path,
    scale: Scale,
    name: str,
    *,
    sweep: Mapping[str, Any] | None = None,
    features: Sequence[str] = CHANGE,
    whole_maps: bool = False,
    workers: int,
) -> TrainReport:
    """Train by a TOML that lies in the folder, as `slidecube train` does; equal trainings of two TOMLs are one."""
    toml = folder / f"{name}.toml"
    tables = training_tables(
        scale, name, features=features, sweep=sweep, whole_maps=whole_maps, workers=workers
    )
    write_whole(toml, tomli_w.dumps(tables).encode())
    driver = Driver(config=load_train_config(toml), out=folder / "training", say=sys.stderr)
    report = driver.single() if sweep is None else driver.sweep()
    if not report.complete:
        why = [f"{work.candidate.label}: {reason}" for work, reason in report.failed]
        raise PipelineError(f"{toml}: {why[0] if why else 'every training diverged'}")
    return report


def training_tables(
    scale: Scale,
    name: str,
    *,
    features: Sequence[str] = CHANGE,
    sweep: Mapping[str, Any] | None = None,
    whole_maps: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """Tables of the TOML of a training; its paths start from the folder that holds the worlds.

    whole_maps : of a model that ships: with its null run, and windows larger than what it learnt from
    """
    images = "two images" if features == CHANGE else "a single image"
    network: dict[str, Any] = {"architecture": "resunet", "arguments": {"width": scale.width}}
    if (
        sweep and scale.encoder is not None
    ):  # ResU-Nets of a sweep then have their own default, the same width
        others = [name for name in scale.architectures if name != "resunet"]
        network = {"architecture": others[0], "arguments": {"encoder": scale.encoder}}
    tables: dict[str, Any] = {
        "name": name,
        "description": f"{images.capitalize()} of Sentinel-2 and the slope; it has never seen the earth.",
        "licence": "Apache-2.0",
        "data": [
            {
                "kind": "cube",
                "run": f"worlds/{world.name}/{EVENT}.toml",
                "reference": f"worlds/{world.name}/truth/landslides.parquet",
                "region": world.name,
                "use": world.use,
            }
            for world in scale.worlds
        ],
        "patches": {
            "px": scale.px,
            "count": scale.count,
            "judged": scale.judged,
            "positive": 0.5,
            "hard": 0.25,
            "confusers": ["flat-loss", "steep-loss"] if features == CHANGE else ["bare-after"],
        },
        "features": {"names": list(features)},
        "network": network,
        "training": {
            "loss": "bce+dice",
            "learning_rate": 0.001,
            "schedule": "cosine",
            "batch": scale.batch,
            "iterations": scale.iterations,
            "epochs": scale.epochs,
            "patience": scale.epochs,
            "threads": 1,
            "loaders": 1,
            "panel": 2,
        },
        "cluster": {"workers": workers, "threads_per_worker": 1, "mem_gb": 4.0},
    }
    if whole_maps:
        tables["null_run"] = {"run": f"worlds/{scale.of('test')[0].name}/{QUIET}.toml", "epoch": QUIET}
        network |= {"window_px": 128, "margin_px": 16}
    return {**tables, "sweep": dict(sweep)} if sweep else tables


def _detectors(scale: Scale, models: Mapping[str, Path]) -> list[Judged]:
    """Detectors of the zoo, and the networks."""
    found = []
    for name, parameters in scale.detectors.items():
        said = ", ".join(f"{key} = {value}" for key, value in parameters.items())
        found.append(Judged(label=name, model=name, lines=f"parameters = {{ {said} }}\n"))
    return found + [Judged(label=label, model=str(path.resolve())) for label, path in models.items()]


def _evaluation(archive: SimulatedArchive, one: Judged) -> tuple[RunPlan, Evaluation]:
    """Run a detector across the event, and judge its map."""
    made = plan_of(archive, EVENT, model=one.model, detect=one.lines, name=one.stem)
    _complete(run(made, progress=False), one)
    return made, score(archive, detection_of(archive, made))


def _row(archive: SimulatedArchive, world: World, one: Judged) -> dict[str, float | str]:
    """Scores of a detector on one world and before any event, NaN where undefined; kept beside the world."""
    quiet = plan_of(archive, QUIET, model=one.model, detect=one.lines, name=f"{one.stem}-{QUIET}")
    made = plan_of(archive, EVENT, model=one.model, detect=one.lines, name=one.stem)
    kept = archive.root / "scores" / f"{one.stem}-{made.inventory[-8:]}-{quiet.inventory[-8:]}.json"
    if not kept.exists():
        _say(f"{world.name}: {one.label}")
        _complete(run(quiet, stages=("cube", "fit"), progress=False), one)
        false = null_run(quiet)
        _, found = _evaluation(archive, one)
        kept.parent.mkdir(exist_ok=True)
        write_whole(kept, json.dumps(_numbers(found, false)).encode())
    values = json.loads(kept.read_text(encoding="utf-8"))
    known = {name: float("nan") if value is None else value for name, value in values.items()}
    return {"detector": one.label, "world": world.name, **known}


def _numbers(found: Evaluation, false: NullRun) -> dict[str, float | None]:
    p, o = found.pixels, found.objects
    return {
        "px_precision": p.precision,
        "px_recall": p.recall,
        "px_f1": p.f1,
        "object_precision": o.precision,
        "object_recall": o.recall,
        "object_f1": o.f1,
        "false_per_100_km2": found.false_per_100_km2,
        "null_per_100_km2": false.per_100_km2,
        "precision_at_0.1_pct": p.precision_at(0.001),
    }


def _complete(report: RunReport, one: Judged) -> None:
    if not report.complete:
        raise PipelineError(f"The run of {one.label} is incomplete: {report.reasons[0]}")


def ship(outcome: Outcome, folder: Path) -> None:
    """Copy the models that ship, each under its own name, with what the whole pipeline made of the held-out worlds."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SINGLE, ENSEMBLE, SINGLE_IMAGE):
        source = outcome.models[name]
        card = read_card(source)
        target = folder / f"{name}@{card.version}"
        with tempfile.TemporaryDirectory(dir=folder, prefix=".ship-") as scratch:
            copy_model(source, Path(scratch), files_of(card, read_members(source, card)))
            (Path(scratch) / CARD_FILE).unlink()
            write_card(Path(scratch), _shipped(card, name, outcome.detectors))
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(scratch, target)


def _shipped(card: NetworkCard, name: str, detectors: pd.DataFrame) -> NetworkCard:
    """Card under another name, with the scores of whole maps; what decides a pixel stays as it is."""
    rows = detectors[detectors["detector"] == name]
    columns = [c for c in rows.columns if c not in ("detector", "world")]
    means = {c: round(float(rows[c].mean()), 4) for c in columns if rows[c].notna().any()}
    whole = {"worlds": list(rows["world"]), "mean": means}
    return card.model_copy(update={"name": name, "metrics": {**card.metrics, "whole_maps": whole}})


def write_page(path: Path, text: str) -> None:
    """Write the document; what a person wrote under the heading of its reading is kept."""
    written = path.read_text(encoding="utf-8") if path.exists() else ""
    _, mark, reading = written.partition(READING)
    path.write_text(text + (f"\n{mark}{reading}" if mark else ""), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Make the document; see the module."""
    options = argparse.ArgumentParser(prog="python -m slidecube.pipeline.simulate.networks")
    options.add_argument("document", type=Path, metavar="DOCUMENT.md")
    options.add_argument("--small", action="store_true", help="in a minute; its numbers say nothing")
    options.add_argument(
        "--out", type=Path, metavar="FOLDER", help="keeps worlds and trainings there; run again to resume"
    )
    options.add_argument("--ship", type=Path, metavar="FOLDER", help="copies the models that ship there")
    options.add_argument("--workers", type=int, default=2, help="trainings at once, 2 where it is not given")
    given = options.parse_args(arguments)
    from slidecube.pipeline.simulate.networks_page import draw, markdown  # noqa: PLC0415  draws only at the end

    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.out or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        outcome = networks(folder, SMALL if given.small else FULL, workers=given.workers)
        if given.ship is not None:
            ship(outcome, given.ship)
        draw(outcome, given.document.parent / "images")
        write_page(given.document, text := markdown(outcome))
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
