"""Preprocessing step by step on simulated archives: each detector on the defaults, and with one step changed.

`python -m slidecube.pipeline.simulate.steps DOCUMENT.md [SEED ...]`

Differences are of one seed with itself, and are printed whatever their sign.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from slidecube.pipeline.simulate.ablation import READING, SAMPLE
from slidecube.pipeline.simulate.archive import SimulatedArchive, simulate_archive
from slidecube.pipeline.simulate.baselines import score
from slidecube.pipeline.simulate.detectors import detection_of, run_model

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
    Step(label="topographic correction", key="sun.correction", on='"scs+c"', off='"none"', default=False),
)
"""Steps that are changed one by one: a row of the table each."""

DEFAULTS, NONE = "the defaults", "none of them"

_NUMBERS = {
    "px_precision": "pixel P",
    "px_recall": "R",
    "px_f1": "F1",
    "object_precision": "object P",
    "object_recall": "R",
    "object_f1": "F1",
    "observed": "observed",
}
_OF_DIFFERENCE = ("px_f1", "object_f1", "observed")


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
) -> pd.DataFrame:
    """Run every model with every variant on the archive of every seed; layers that agree are made once.

    epochs : of the auto-encoder, None for the paper's
    Returns one row a seed, model and variant, with scores, NaN where undefined, and the observed share.
    """
    rows: list[dict[str, float | str]] = []
    known = variants(steps)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            archive = simulate_archive(Path(scratch), seed=seed, size=size, overpasses=overpasses)
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
    found = detection_of(archive, run_model(archive, model=model, parameters=parameters, settings=settings))
    result = score(archive, found)
    values = {
        name: getattr(result.pixels if name.startswith("px") else result.objects, name.partition("_")[2])
        for name in _NUMBERS
        if name != "observed"
    }
    seen = 1.0 if found.observed is None else float(found.observed.mean())
    return {**{name: np.nan if value is None else value for name, value in values.items()}, "observed": seen}


_ABOUT = (
    "Each detector runs through the pipeline on the defaults, with one step changed, and with none of them. Parameters "
    f"are those of the cards, but for a sample of {SAMPLE:,.0f} patches. Nothing was tuned on these seeds. `observed` "
    "is the share of the archive's pixels that could be judged: a step that hides more shows here. A dash: nothing "
    "was mapped, so there is no precision."
)


def markdown(table: pd.DataFrame, *, note: str = "") -> str:
    """Write the tables: the scores, and the differences from the defaults, seed by seed."""
    seeds = ", ".join(map(str, sorted(set(table["seed"]))))
    which = f"**SIMULATED data**, archives of the seeds {seeds}; mean (least to most) over them."
    parts = [
        "# Preprocessing, step by step",
        f"{which} Made by `make ablation`.",
        _ABOUT + (f" {note}" if note else ""),
    ]
    for model in dict.fromkeys(table["model"]):
        part = table[table["model"] == model]
        parts += [
            f"## {model}",
            _score_table(part),
            "Less the defaults, of the same seed:",
            _difference_table(part),
        ]
    return "\n\n".join(parts) + "\n"


def _score_table(part: pd.DataFrame) -> str:
    lines = ["| variant | " + " | ".join(_NUMBERS.values()) + " |", "|---" * (len(_NUMBERS) + 1) + "|"]
    for label in dict.fromkeys(part["variant"]):
        rows = part[part["variant"] == label]
        lines.append(f"| {label} | " + " | ".join(_cell(rows[name], "{:.3f}") for name in _NUMBERS) + " |")
    return "\n".join(lines)


def _difference_table(part: pd.DataFrame) -> str:
    heads = ["pixel F1", "object F1", "observed"]
    lines = ["| variant | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    whole = part[part["variant"] == DEFAULTS].set_index("seed")
    for label in dict.fromkeys(part["variant"]):
        if label != DEFAULTS:
            own = part[part["variant"] == label].set_index("seed")
            cells = [_cell(own[name] - whole[name], "{:+.4f}") for name in _OF_DIFFERENCE]
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
    """Write the document; arguments : file to write, then seeds (0 to 4 where none is given)."""
    if not arguments or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m slidecube.pipeline.simulate.steps DOCUMENT.md [SEED ...]\n")
        return 1
    seeds = [int(seed) for seed in arguments[1:]] or list(range(5))
    path = Path(arguments[0])
    text = markdown(measure(seeds=seeds))
    sys.stdout.write(text)
    written = path.read_text(encoding="utf-8") if path.exists() else ""
    _, mark, reading = written.partition(READING)
    path.write_text(text + (f"\n{mark}{reading}" if mark else ""), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
