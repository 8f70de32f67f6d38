"""Preprocessing step by step on simulated archives: each detector on the defaults, and with one step changed.

`python -m slidecube.pipeline.simulate.steps DOCUMENT.md [--size small] [SEED ...]`

Differences are of one seed with itself, and are printed whatever their sign.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
from affine import Affine

from slidecube.models.unsupervised import Kmeans
from slidecube.pipeline.simulate.ablation import READING, SAMPLE, best_cluster, cluster_map
from slidecube.pipeline.simulate.archive import SimulatedArchive, simulate_archive
from slidecube.pipeline.simulate.baselines import score, truth_mask
from slidecube.pipeline.simulate.detectors import detection_of, run_model
from slidecube.pipeline.simulate.parameters import load_parameters

MODELS = ("rdndvi", "aldi", "cae-kmeans")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of the preprocessing.

    key : of [cube]; on, off : its value with and without the step, as TOML writes it; default : whether it is taken
    """

    label: str
    key: str
    on: str
    off: str
    default: bool = True


STEPS = (
    Step(label="equal clear counts", key="greenest_of", on="2", off="0"),
    Step(label="re-admission of bright ground", key="mask.readmit", on="true", off="false"),
    Step(label="shadows of clouds along the sun", key="mask.cloud_heights_m", on="[200.0, 3000.0]", off="[]"),
    Step(label="co-registration gate", key="coregistration.check", on="true", off="false"),
    Step(label="co-registration moved", key="coregistration.correct", on="true", off="false", default=False),
    Step(label="shadows of the ground", key="sun.cast_shadow", on="true", off="false", default=False),
    Step(label="topographic correction", key="sun.correction", on='"scs+c"', off='"none"', default=False),
)
"""Steps that are changed one by one: a row of the table each."""

ON_MOVED = tuple(step for step in STEPS if step.key.startswith("coregistration."))
"""Steps that are changed on archives whose scenes after the event lie elsewhere."""

MOVED_M = (10.0, 20.0)
"""How far to the east they lie then: a pixel, which is warned of, and two, which are excluded."""

DEFAULTS, NONE = "the defaults", "none of them"

_NUMBERS = {
    "px_precision": "pixel P",
    "px_recall": "R",
    "px_f1": "F1",
    "object_precision": "object P",
    "object_recall": "R",
    "object_f1": "F1",
    "observed": "observed",
    "best_f1": "best cluster F1",
}
_OF_DIFFERENCE = {
    "px_f1": "pixel F1",
    "object_f1": "object F1",
    "observed": "observed",
    "best_f1": "best cluster F1",
}


def variants(steps: Iterable[Step] = STEPS) -> dict[str, dict[str, str]]:
    """Settings of each row: the defaults, each step changed, and none taken."""
    known = tuple(steps)
    whole = {step.key: step.on if step.default else step.off for step in known}
    changed = {
        f"{'without' if step.default else 'with'} {step.label}": {
            **whole,
            step.key: step.off if step.default else step.on,
        }
        for step in known
    }
    return {DEFAULTS: whole, **changed, NONE: {step.key: step.off for step in known}}


def measure(
    *,
    seeds: Iterable[int] = range(5),
    models: Iterable[str] = MODELS,
    steps: Iterable[Step] = STEPS,
    size: str = "default",
    epochs: float | None = None,
    overpasses: int | None = None,
    moved_m: float = 0.0,
) -> pd.DataFrame:
    """Run every model with every variant on the archive of every seed; layers that agree are made once.

    epochs : of the auto-encoder, None for the paper's; moved_m : by which scenes after the event lie to the east
    Returns one row a seed, model and variant, with scores, NaN where undefined, and the observed share.
    """
    rows: list[dict[str, float | str]] = []
    known = variants(steps)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            archive = simulate_archive(Path(scratch), seed=seed, size=size, overpasses=overpasses)
            if moved_m:
                _move_after(archive, moved_m)
            for label, settings in known.items():
                for model in models:
                    started = time.monotonic()
                    found = _scores(archive, model, settings, epochs)
                    named: dict[str, float | str] = {"seed": seed, "model": model, "variant": label}
                    rows.append(named | found)
                    took = time.monotonic() - started
                    sys.stderr.write(f"seed {seed}, {model}, {label}: {took:.0f} s\n")
    return pd.DataFrame(rows)


def _scores(
    archive: SimulatedArchive, model: str, settings: Mapping[str, str], epochs: float | None
) -> dict[str, float | str]:
    parameters = {}
    if model.startswith("cae"):
        parameters = {"sample": SAMPLE} | ({} if epochs is None else {"epochs": epochs})
    plan = run_model(archive, model=model, parameters=parameters, settings=settings)
    found = detection_of(archive, plan)
    result = score(archive, found)
    values = {
        name: getattr(result.pixels if name.startswith("px") else result.objects, name.partition("_")[2])
        for name in _NUMBERS
        if name.startswith(("px_", "object_"))
    }
    values["observed"] = 1.0 if found.observed is None else float(found.observed.mean())
    if isinstance(plan.model, Kmeans):
        observed = np.ones(archive.geobox.shape, bool) if found.observed is None else found.observed
        _, best = best_cluster(archive, plan, found, cluster_map(archive, plan))
        truth = truth_mask(archive) & observed
        values["best_f1"] = 2 * float((best & truth).sum()) / max(float(best.sum() + truth.sum()), 1.0)
    return {name: np.nan if value is None else value for name, value in values.items()}


def _move_after(archive: SimulatedArchive, east_m: float) -> None:
    """Let the scenes after the event lie elsewhere, as a provider's wrong georeference has it."""
    last = archive.pre[1]
    for item in sorted(archive.optical.parent.glob("*/*.json")):
        body = json.loads(item.read_text(encoding="utf-8"))
        if (
            body.get("type") != "Feature"
            or dt.date.fromisoformat(body["properties"]["datetime"][:10]) <= last
        ):
            continue
        for part in (body["properties"], *body["assets"].values()):
            if "proj:transform" in part:
                part["proj:transform"][2] += east_m
        item.write_text(json.dumps(body), encoding="utf-8")
        for path in item.parent.glob("*.tif"):
            with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
                file.transform = Affine.translation(east_m, 0) @ file.transform


_ABOUT = (
    "Each detector runs through the pipeline on the defaults, with one step changed, and with none of them. Parameters "
    f"are those of the cards, but for a sample of {SAMPLE:,.0f} patches. Nothing was tuned on these seeds. `observed` "
    "is the share of the archive's pixels that could be judged: a step that hides more shows here. A dash: nothing "
    "was mapped, so there is no precision. `best cluster F1` is pixel F1 of the cluster that maps best, picked with "
    "the truth at hand, where a model clusters: the rule that names clusters often names none, and then only this "
    "shows what a step does to the clusters."
)
_MOVED = (
    "Scenes of one window are simulated with errors of their place of 3 to 12 m each, which a composite mixes. Here "
    "all scenes after the event lie {moved:.0f} m further east as well."
)


def markdown(
    table: pd.DataFrame, *, moved: Mapping[float, pd.DataFrame] | None = None, size: str = "default"
) -> str:
    """Write the tables: the scores, and the differences from the defaults, seed by seed.

    moved : tables of archives whose scenes after the event lie elsewhere, by metres
    """
    seeds = ", ".join(map(str, sorted(set(table["seed"]))))
    which = (
        f"**SIMULATED data**, archives of the seeds {seeds}, size `{size}`; mean (least to most) over them."
    )
    parts = ["# Preprocessing, step by step", f"{which} Made by `make ablation SIZE={size}`.", _ABOUT]
    parts += _of_models(table, "##")
    for metres, other in (moved or {}).items():
        parts += [f"## Scenes after the event moved by {metres:.0f} m", _MOVED.format(moved=metres)]
        parts += _of_models(other, "###")
    return "\n\n".join(parts) + "\n"


def _of_models(table: pd.DataFrame, level: str) -> list[str]:
    parts = []
    for model in dict.fromkeys(table["model"]):
        part = table[table["model"] == model]
        parts += [
            f"{level} {model}",
            _score_table(part),
            "Less the defaults, of the same seed:",
            _difference_table(part),
        ]
    return parts


def _score_table(part: pd.DataFrame) -> str:
    shown = _shown(part, _NUMBERS)
    lines = ["| variant | " + " | ".join(shown.values()) + " |", "|---" * (len(shown) + 1) + "|"]
    for label in dict.fromkeys(part["variant"]):
        rows = part[part["variant"] == label]
        lines.append(f"| {label} | " + " | ".join(_cell(rows[name], "{:.3f}") for name in shown) + " |")
    return "\n".join(lines)


def _shown(part: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, str]:
    """Columns of a model: the best cluster of those alone that cluster."""
    clusters = "best_f1" in part and part["best_f1"].notna().any()
    return {name: head for name, head in columns.items() if name != "best_f1" or clusters}


def _difference_table(part: pd.DataFrame) -> str:
    shown = _shown(part, _OF_DIFFERENCE)
    lines = ["| variant | " + " | ".join(shown.values()) + " |", "|---" * (len(shown) + 1) + "|"]
    whole = part[part["variant"] == DEFAULTS].set_index("seed")
    for label in dict.fromkeys(part["variant"]):
        if label != DEFAULTS:
            own = part[part["variant"] == label].set_index("seed")
            cells = [_cell(own[name] - whole[name], "{:+.4f}") for name in shown]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: pd.Series[float], form: str) -> str:
    known = values.dropna()
    if known.empty:
        return "-"
    if len(known) == 1:
        return form.format(known.iloc[0])
    return f"{form.format(known.mean())} ({form.format(known.min())} to {form.format(known.max())})"


def main(arguments: list[str]) -> int:
    """Write the document; see the module."""
    options = argparse.ArgumentParser(prog="python -m slidecube.pipeline.simulate.steps")
    options.add_argument("document", type=Path, metavar="DOCUMENT.md")
    options.add_argument("seeds", type=int, nargs="*", metavar="SEED", help="0 to 4 where none is given")
    options.add_argument("--size", choices=sorted(load_parameters().area.sizes), default="default")
    given = options.parse_args(arguments)
    seeds = given.seeds or list(range(5))
    table = measure(seeds=seeds, size=given.size)
    moved = {
        metres: measure(seeds=seeds, size=given.size, models=MODELS[:1], steps=ON_MOVED, moved_m=metres)
        for metres in MOVED_M
    }
    text = markdown(table, moved=moved, size=given.size)
    sys.stdout.write(text)
    path: Path = given.document
    written = path.read_text(encoding="utf-8") if path.exists() else ""
    _, mark, reading = written.partition(READING)
    path.write_text(text + (f"\n{mark}{reading}" if mark else ""), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
