"""`slidecube train` over tiny patches that lie in memory: from the TOML to a model, a leaderboard and an ensemble."""

from __future__ import annotations

import hashlib
import io
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from slidecube.models import architectures
from slidecube.models.card import FeatureSpec
from slidecube.models.errors import ModelError
from slidecube.models.network_card import Inputs, NetworkCard, read_card, write_card
from slidecube.pipeline import ensembles_chosen, leaderboard, sweep, trained_models, training, training_checks
from slidecube.pipeline.cli_train import dry_run_text, report_text
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.leave_one_out import leave_one_out_run
from slidecube.pipeline.sweep import Driver, TrainReport
from slidecube.pipeline.train_config import candidates, load_train_config
from slidecube.pipeline.training_data import Data

PX = 32


@dataclass(frozen=True, kw_only=True)
class TinyPatches:
    """Squares that are brighter in the first feature; SIMULATED."""

    names: tuple[str, ...]
    seed: int
    n: int = 8
    noise: float = 0.7
    regions_n: int = 2
    squares: int = 2
    patch_px: int = PX
    resolution_m: float = 10.0

    @property
    def features(self):
        return FeatureSpec(names=self.names)

    @property
    def units(self):
        return ("1",) * len(self.names)

    @property
    def digest(self):
        said = f"{self.names} {self.seed} {self.n} {self.noise} {self.squares}"
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @property
    def regions(self):
        return tuple(f"region-{i % self.regions_n}" for i in range(self.n))

    def __len__(self):
        return self.n

    def read(self, index, *, seed=0):
        rng = np.random.default_rng([self.seed, index])
        labels = np.zeros((PX, PX), np.uint8)
        for _ in range(self.squares):
            row, col = rng.integers(0, PX - 10, 2)
            labels[row : row + 8, col : col + 8] = 1
        x = rng.normal(0, self.noise, (len(self.names), PX, PX)).astype(np.float32)
        x[0] += 2 * labels
        return x, labels


def tiny_data(config, candidate):
    made = [TinyPatches(names=candidate.features, seed=seed, n=n) for seed, n in ((0, 8), (1, 6), (2, 6))]
    return Data(training=made[0], validation=made[1], test=made[2])


TOML = """
name = "tiny"
[[data]]
kind = "cube"
run = "run.toml"
reference = "known.gpkg"
[features]
names = ["rdndvi", "slope_deg"]
[network]
arguments = { width = 4, depth = 2 }
window_px = 64
margin_px = 8
[training]
learning_rate = 0.01
iterations = 6
epochs = 2
batch = 4
threads = 1
[threshold]
min_area_m2 = 0
[sweep]
architectures = ["resunet"]
losses = ["bce", "dice"]
learning_rates = [0.01, 0.003]
settings = { both = ["rdndvi", "slope_deg"], one = ["rdndvi"] }
best = [2, 3]
"""


def driver_of(folder: Path, text: str = TOML, **how) -> Driver:
    path = folder / "training.toml"
    path.write_text(text)
    return Driver(config=load_train_config(path), out=folder / "out", open=tiny_data, **how)


def only(text: str, **keys: str) -> str:
    """Change some keys of a TOML."""
    for key, value in keys.items():
        old = next(line for line in text.splitlines() if line.startswith(f"{key} ="))
        text = text.replace(old, f"{key} = {value}")
    return text


def test_one_training_gives_a_model_and_another_threshold_trains_nothing(tmp_path):
    report = driver_of(tmp_path).single()
    card = read_card(report.models[0])
    assert report.trained == 1
    assert card.address == "tiny@1"
    assert card.inputs.names == ("rdndvi", "slope_deg")
    assert card.calibration.method == "temperature"
    assert min(card.metrics["f1"], card.metrics["validation"]["f1"]) > 0.3
    assert card.metrics["patches"] == 6
    assert card.metrics["interval_unit"] == "patch"
    assert 0 < card.metrics["landslide_share"] < 1
    assert 0 < card.metrics["validation"]["landslide_share"] < 1
    low, high = card.metrics["f1_interval"]
    assert low <= card.metrics["f1"] <= high
    assert not list((tmp_path / "out").rglob("state.safetensors"))

    again = driver_of(tmp_path).single()
    assert (again.trained, again.there) == (0, 1)
    assert read_card(again.models[0]) == card

    weights = list((tmp_path / "out" / "trainings").glob("*/weights.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    other = TOML.replace(
        "min_area_m2 = 0", 'min_area_m2 = 0\nrule = "precision"\nprecision = 0.6\nprevalence = 0.1'
    )
    with pytest.raises(PipelineError, match="raise version"):
        driver_of(tmp_path, other).single()
    judged = driver_of(tmp_path, "version = 2\n" + other).single()
    assert [path.stat().st_mtime_ns for path in weights] == before
    assert len(list((tmp_path / "out" / "trainings").iterdir())) == 1
    assert "precision of 0.6" in read_card(judged.models[0]).output.chosen


def test_a_sweep_ranks_chooses_saves_and_goes_on_where_it_was(tmp_path, monkeypatch):
    text = only(TOML, settings='{ one = ["rdndvi"] }', epochs="1")
    monkeypatch.setattr(sweep, "progress", lambda *_, **__: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        driver_of(tmp_path, text, say=io.StringIO()).sweep()
    monkeypatch.undo()

    report = driver_of(tmp_path, text).sweep()
    assert (report.trained + report.there, report.complete) == (4, True)
    assert report.there >= 2
    assert [folder.name for folder in report.models] == ["tiny@1", "tiny-ensemble@1"]
    board = pd.read_parquet(tmp_path / "out" / "leaderboard.parquet")
    singles, ensembles = board[board["kind"] == "single"], board[board["kind"] == "ensemble"]
    assert list(singles["score"]) == sorted(singles["score"], reverse=True)
    assert list(ensembles["size"]) == [2, 3]
    assert list(ensembles["members"].iloc[0].split()) == list(singles["key"].iloc[:2])
    best, ensemble = (read_card(folder) for folder in report.models)
    assert best.training["training_key"] == singles["key"].iloc[0]
    assert len(ensemble.members) == ensembles.sort_values("score").iloc[-1]["size"]
    assert ensemble.calibration.method == "temperature"
    assert (tmp_path / "out" / "performance.png").stat().st_size > 10_000
    assert driver_of(tmp_path, text).sweep().tables == report.tables


class Interrupted:
    """A bar during which somebody presses Ctrl-C, after two trainings."""

    def __init__(self):
        self.n = 0

    def update(self):
        self.n += 1
        if self.n == 2:
            raise KeyboardInterrupt


def test_a_failed_training_leaves_its_reason_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(context, work):
        if work.candidate.loss == "dice":
            raise ModelError("The loss is not finite")
        return make(context, work)

    make = training.make
    monkeypatch.setattr(training, "make", fails)
    text = only(TOML, settings='{ one = ["rdndvi"] }', epochs="1", learning_rates="[0.01]")
    text = text.replace('["bce", "dice"]', '["bce", "bce+dice", "dice"]')
    report = driver_of(tmp_path, text).sweep()
    assert not report.complete
    assert [(work.candidate.loss, reason) for work, reason in report.failed] == [
        ("dice", "The loss is not finite")
    ]
    assert "one resunet dice 0.01: The loss is not finite" in report.tables
    assert report.models == ()
    monkeypatch.undo()
    within = driver_of(tmp_path, f"{text}[cluster]\nfailure_budget = 1\n")
    monkeypatch.setattr(training, "make", fails)
    report = within.sweep()
    assert (report.trained, report.there, report.complete, len(report.models)) == (0, 2, True, 2)


def test_leave_one_out_judges_each_region_by_a_network_that_has_not_seen_it(tmp_path):
    folds = "".join(
        f'[[data]]\nkind = "cube"\nrun = "run.toml"\nreference = "known.gpkg"\nregion = "{name}"\nuse = "train"\n'
        for name in "abc"
    )
    text = folds.join(TOML.split('[[data]]\nkind = "cube"\nrun = "run.toml"\nreference = "known.gpkg"\n'))
    seen = []

    def folded(config, candidate):
        seen.append(candidate.held_out)
        found = tiny_data(config, candidate)
        own = ord(candidate.held_out)
        return replace(
            found, training=replace(found.training, seed=own), test=replace(found.test, seed=10 + own)
        )

    driver = driver_of(tmp_path, only(text, epochs="1", iterations="3"))
    driver.open = folded
    report = leave_one_out_run(driver)
    table = pd.read_parquet(tmp_path / "out" / "leave-one-out.parquet")
    assert sorted(table["held_out"]) == ["a", "b", "c"]
    assert set(seen) == {"a", "b", "c"}
    assert f"| mean | {table['test_f1'].mean():.3f} |" in report.tables


def test_data_that_teach_nothing_are_refused_before_anything_starts(tmp_path):
    def without(part, **changes):
        def opened(config, candidate):
            found = tiny_data(config, candidate)
            return replace(found, **{part: replace(getattr(found, part), **changes)})

        driver = driver_of(tmp_path)
        driver.open = opened
        return driver

    with pytest.raises(PipelineError, match="no table gives patches to learn from"):
        without("training", n=0).single()
    with pytest.raises(PipelineError, match="no table gives patches to choose by"):
        without("validation", n=0).sweep()
    with pytest.raises(PipelineError, match=r"training\.toml: The validation patches hold no landslide"):
        without("validation", squares=0).sweep()
    assert not (tmp_path / "out" / "trainings").exists()


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"arguments": "{ width = 4, depth = 6 }"}, r"depth = 6 halves down to steps of 64 px.*px = 32"),
        ({"learning_rate": '0.01\ndevice = "cuda"'}, r"device = 'cuda' needs a GPU.*\[training\]"),
        ({"window_px": '64\npretrained = "foreign.safetensors"'}, r"network.pretrained = .*fit nowhere"),
        ({"window_px": '64\npretrained = "pickle.safetensors"'}, r"network.pretrained = .*are a pickle"),
        ({"reference": '"known.gpkg"\nuse = "train"'}, r'give one use = "validation"'),
        ({"name": '"tiny"\npatches.shares = [1.0, 0.0, 0.0]\npatches.px = 32'}, r"leaves validation none"),
        ({"name": '"tiny"\npatches.px = 512'}, r"blocks of 2080 px that hold a patch of 512 px are too few"),
    ],
)
def test_the_dry_run_refuses_what_the_run_refuses_in_the_same_line(tmp_path, monkeypatch, changes, refusal):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickle.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    text, empty = only(TOML, **changes), bool(set(changes) & {"name", "reference"})
    what = "no table gives patches to choose by; " if empty else ""
    said = []
    for verb in (Driver.single, lambda driver: dry_run_text(driver, sweep=False, leave_one_out=False)):
        driver = driver_of(tmp_path, text if "patches.px" in text else f"patches.px = 32\n{text}")
        driver.open = without_validation if empty else tiny_data
        with pytest.raises(PipelineError, match=rf"training\.toml: .*{what}.*{refusal}") as error:
            verb(driver)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert not (tmp_path / "out").exists()


def without_validation(config, candidate):
    found = tiny_data(config, candidate)
    return replace(found, validation=replace(found.validation, n=0))


def test_what_is_likely_wrong_is_told_before_and_after(tmp_path, monkeypatch):
    rows = [
        {
            "part": "train",
            "regions": {"here": 8},
            "landslides": 40,
            "on confusers": 0,
            "percent landslide": 73,
        },
        {"part": "validation", "regions": {"here": 6}, "landslides": 12},
        {"part": "test", "regions": {"here": 6}, "landslides": 1},
    ]
    monkeypatch.setattr(training_checks, "explain", lambda _: rows)
    monkeypatch.setattr(trained_models, "explain", lambda _: rows)
    text = 'patches.confusers = ["flat-loss"]\n' + QUICK
    heard = io.StringIO()
    planned = dry_run_text(driver_of(tmp_path, text), sweep=True, leave_one_out=False)
    assert "resunet of 1 feature: " in planned
    report = driver_of(tmp_path, text, say=heard).sweep()
    lines = report_text(report).splitlines()
    for text in (planned, heard.getvalue(), "\n".join(lines)):
        assert "warning: test holds 1 landslide, fewer than 10" in text
        assert "validation holds" not in text
        assert "here: 73 % of the ground is labelled landslide" in text
        assert "confusers flat-loss were found nowhere, so hard = 0.25" in text
    cards = [read_card(folder) for folder in report.models]
    assert (
        sum(line.startswith("map with it") for line in lines)
        + sum("not recommended" in line for line in lines)
        == 2
    )
    worse = [
        card.metrics["validation"]["f1"] < max(c.metrics["validation"]["f1"] for c in cards) for card in cards
    ]
    assert sum("not recommended" in line for line in lines) == sum(worse)
    f1, (low, high) = cards[0].metrics["f1"], cards[0].metrics["f1_interval"]
    assert any(f"tiny@1: test F1 {f1:.3f} ({low:.3f} to {high:.3f}), threshold" in line for line in lines)
    assert all("1 landslide" in line for line in lines if "threshold" in line and line.startswith("tiny"))


def test_an_ensemble_that_is_worse_than_the_single_is_not_recommended(tmp_path):
    folders = []
    for name, f1 in (("one", 0.6), ("one-ensemble", 0.5)):
        folder = tmp_path / f"{name}@1"
        inputs = Inputs(names=("rdndvi",), units=("1",), mean=(0.0,), std=(1.0,))
        write_card(
            folder,
            NetworkCard(
                name=name, version=1, description="SIMULATED.", licence="MIT", inputs=inputs,
                output={"threshold": 0.0049},
                architecture={"name": "resunet", "window_px": 64, "margin_px": 8},
                weights={"file": "weights.safetensors", "sha256": "0" * 64},
                metrics={"validation": {"f1": f1}},
            ),
        )  # fmt: skip
        folders.append(folder)
    lines = report_text(TrainReport(trained=0, there=1, models=tuple(folders))).splitlines()
    assert "one@1: validation F1 0.600, threshold 0.0049" in lines
    assert lines[-1].startswith(
        "one-ensemble@1 is worse on validation than the other one (F1 0.500 against 0.600)"
    )
    assert [line for line in lines if line.startswith("map with")] == [
        f'map with it: [detect] model = "{folders[0]}"'
    ]


def test_a_difference_in_percent_is_told_only_where_intervals_lie_apart():
    single = {"f1": 0.5, "f1_interval": [0.4, 0.6]}
    assert leaderboard._against({"f1": 0.55, "f1_interval": [0.5, 0.6]}, single) == "0.550"
    assert leaderboard._against({"f1": 0.75, "f1_interval": [0.7, 0.8]}, single) == "0.750 (+50 %)"
    assert leaderboard._against({"f1": 0.75}, single) == "0.750"


def test_without_a_test_the_card_says_only_how_validation_went(tmp_path):
    def opened(config, candidate):
        found = tiny_data(config, candidate)
        return replace(found, test=replace(found.test, n=0))

    driver = driver_of(tmp_path, only(TOML, epochs="1"))
    driver.open = opened
    card = read_card(driver.single().models[0])
    assert "f1" not in card.metrics
    assert card.metrics["validation"]["f1"] > 0


def test_a_precision_out_of_reach_fails_one_training_and_not_a_sweep(tmp_path):
    rule = 'min_area_m2 = 0\nrule = "precision"\nprecision = 0.999\nprevalence = 0.0001'
    text = only(TOML.replace("min_area_m2 = 0", rule), epochs="1", settings='{ one = ["rdndvi"] }')
    with pytest.raises(PipelineError, match=r"No threshold has a precision of 0\.999"):
        driver_of(tmp_path, text).single()
    report = driver_of(tmp_path, text).sweep()
    assert report.complete
    assert "because: No threshold has a precision of 0.999" in read_card(report.models[0]).output.chosen


def test_keys_are_content(tmp_path):
    """No path and no setting of the machine is a part of a key; what decides the weights is."""

    def key(text, where="a"):
        folder = tmp_path / where
        folder.mkdir(exist_ok=True)
        driver = driver_of(folder, text)
        return driver.works(candidates(driver.config, sweep=False))[0]

    first = key(TOML)
    assert key(TOML, where="b") == first
    assert key(only(TOML, threads="2\ncheckpoint_min = 1")).key == first.key
    other_rule = key(TOML.replace("min_area_m2 = 0", "min_area_m2 = 300"))
    assert (other_rule.key, other_rule.judged_key == first.judged_key) == (first.key, False)
    for change in ({"batch": "2"}, {"epochs": "3"}, {"names": '["rdndvi"]'}, {"arguments": "{ width = 8 }"}):
        assert key(only(TOML, **change)).key != first.key, change


def test_a_dry_run_trains_nothing(tmp_path):
    text = dry_run_text(driver_of(tmp_path), sweep=True, leave_one_out=False)
    assert "trainings: 8, of which 0 are done" in text
    assert "both resunet bce 0.01" in text
    assert not (tmp_path / "out").exists()


def test_changed_weights_are_not_taken_for_ours(tmp_path):
    driver = driver_of(tmp_path, only(TOML, epochs="1", iterations="2"))
    driver.single()
    (weights,) = (tmp_path / "out" / "trainings").glob("*/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    other = driver_of(tmp_path, "version = 2\n" + only(TOML, epochs="1", iterations="2"))
    with pytest.raises(ModelError, match="is not what its training wrote"):
        other.single()


@pytest.mark.slow
def test_a_killed_sweep_on_processes_goes_on(tmp_path):
    """Killed by SIGKILL on the way, the sweep ends as one that was not: equal weights, equal choice."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    text = TOML + "[cluster]\nworkers = 2\nthreads_per_worker = 1\n"
    script = (
        "import importlib.util as u, pathlib, sys; s = u.spec_from_file_location('tiny', sys.argv[1]); "
        "m = u.module_from_spec(s); sys.modules['tiny'] = m; s.loader.exec_module(m); "
        "m.driver_of(pathlib.Path(sys.argv[2]), m.TOML).sweep()"
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    process = subprocess.Popen([sys.executable, "-c", script, __file__, str(killed)])
    until = time.monotonic() + 300
    while len(list((killed / "out" / "trainings.ledger").glob("*.json"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = driver_of(killed, text).sweep()
    assert 0 < resumed.there < 8
    assert resumed.complete
    direct = driver_of(whole, TOML).sweep()
    assert resumed.tables == direct.tables
    for a, b in zip(resumed.models, direct.models, strict=True):
        assert read_card(a).identity == read_card(b).identity


QUICK = only(
    TOML, settings='{ one = ["rdndvi"] }', epochs="1", iterations="1\npanel = 0", learning_rates="[0.01]"
)


def test_what_is_recorded_under_a_key_was_learnt_from_the_data_of_that_key(tmp_path, monkeypatch):
    """A process keeps what it opened; where that is no longer what was planned, it opens again, or refuses."""
    seeds, opened = [0], []

    def open_all(tables, patches, spec, *, base):
        opened.append(seeds[0])
        made = [TinyPatches(names=spec.names, seed=seed, n=6) for seed in (seeds[0], 101, 102)]
        return Data(training=made[0], validation=made[1], test=made[2])

    monkeypatch.setattr(training, "open_all_data", open_all)
    driver = driver_of(tmp_path, QUICK)
    driver.open = training.open_candidate_data
    first = driver.works(candidates(driver.config, sweep=False))[0]
    seeds[0] = 7
    second = driver.works(candidates(driver.config, sweep=False))[0]
    assert (first.key == second.key, opened) == (False, [0, 7])

    seeds[0] = 8  # after the driver planned: the worker keeps what it opened, which is what was planned
    context = training.TrainContext(
        config=driver.config, out=tmp_path / "out", works={}, threads=1, lock=tmp_path, token=""
    )
    monkeypatch.setattr(training.TrainContext, "require", lambda _: None)
    training.make(context, second)
    assert (
        training.trained_of(tmp_path / "out", second.key)["data"][0]
        == TinyPatches(names=("rdndvi", "slope_deg"), seed=7, n=6).digest
    )
    seeds[0] = 0  # as in a worker that kept 7 of an earlier plan
    training.make(context, first)
    assert opened == [0, 7, 0]
    seeds[0] = 9
    with pytest.raises(PipelineError, match="The data changed since this training was planned"):
        training.make(context, second)


def test_a_model_is_what_its_card_says_and_a_null_run_is_asked_for_before_hours_are_spent(
    tmp_path, monkeypatch
):
    """Calibration as it was asked for, also of an ensemble; another card is another version, and trains nothing."""
    text = QUICK + '[calibration]\nmethod = "isotonic"\n'
    quiet = '[null_run]\nrun = "quiet.toml"\n'
    with pytest.raises(PipelineError, match=r"The null run of \[null_run\] cannot be made: .*quiet\.toml"):
        driver_of(tmp_path, text + quiet).sweep()
    assert not (tmp_path / "out").exists()

    report = driver_of(tmp_path, text).sweep()
    assert [read_card(folder).calibration.method for folder in report.models] == ["isotonic", "isotonic"]
    assert report_text(report).count("no null run: ") == 2
    assert driver_of(tmp_path, text).sweep().models == report.models
    for other in (f'licence = "MIT"\n{text}', text.replace("margin_px = 8", "margin_px = 4")):
        with pytest.raises(PipelineError, match="null run, windows or card"):
            driver_of(tmp_path, other).sweep()

    seen = []

    def ready(plan, inputs, *, epoch):
        seen.append((plan, inputs.names, epoch))

    class Quiet:
        def science(self):
            return {"name": "quiet"}

        def to_dict(self):
            return {"epoch": "quiet", "false_objects": 3, "km2": 1.0}

    monkeypatch.setattr(trained_models, "load_config", lambda _: Quiet())
    monkeypatch.setattr(trained_models, "plan", lambda _: "a plan")
    monkeypatch.setattr(trained_models, "require_ready", ready)
    monkeypatch.setattr(trained_models, "null_run", lambda *_, **__: Quiet())
    with pytest.raises(PipelineError, match="raise version"):
        driver_of(tmp_path, text + quiet).sweep()
    report = driver_of(tmp_path, "version = 2\n" + text + quiet).sweep()
    assert (report.trained, seen) == (0, [("a plan", ("rdndvi",), None)])
    assert [read_card(folder).null_run["false_objects"] for folder in report.models] == [3, 3]
    assert "no null run" not in report_text(report)
    monkeypatch.setattr(trained_models, "ENSEMBLE_VERSION", 0)  # as an older slidecube chose it
    with pytest.raises(PipelineError, match="raise version"):
        driver_of(tmp_path, "version = 2\n" + text + quiet).sweep()


def test_another_version_of_a_library_is_another_training(tmp_path, monkeypatch):
    def key(architecture):
        text = only(TOML, arguments=f'{{}}\narchitecture = "{architecture}"')
        driver = driver_of(tmp_path, text)
        return driver.works(candidates(driver.config, sweep=False))[0].key

    before = [key(name) for name in ("resunet", "unet")]
    version = architectures.metadata.version
    for library, changed in (
        ("timm", [False, True]),
        ("segmentation-models-pytorch", [False, True]),
        ("torch", [True, True]),
    ):
        monkeypatch.setattr(
            architectures.metadata, "version", lambda name, own=library: "0" if name == own else version(name)
        )
        assert [key(name) != old for name, old in zip(("resunet", "unet"), before, strict=True)] == changed


def test_what_was_asked_for_is_refused_also_after_a_sweep_did_without(tmp_path):
    """One folder, one judgement: a precision out of reach gives no single model, whoever judged first."""
    rule = 'min_area_m2 = 0\nrule = "precision"\nprecision = 0.999\nprevalence = 0.0001'
    text = QUICK.replace("min_area_m2 = 0", rule).replace('["bce", "dice"]', '["bce"]')
    text = only(text, names='["rdndvi"]', settings='{ features = ["rdndvi"] }')
    report = driver_of(tmp_path, text).sweep()
    assert (report.trained, report.complete) == (1, True)
    with pytest.raises(PipelineError, match=r"No threshold has a precision of 0\.999"):
        driver_of(tmp_path, f"version = 2\n{text}").single()

    # what a message asks a user to remove is made again, and what is damaged is not taken for done
    driver = driver_of(tmp_path, text)
    (work,) = driver.works(candidates(driver.config, sweep=True))
    folder = training.folder_of(driver.out, work.key)
    assert training.done_keys(driver.out, [work]) == {work.key}
    before = (folder / "weights.safetensors").read_bytes()
    for name in ("weights.safetensors", "trained.json", "judged.json", "validation.npz", "test.npz"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        assert not training.done_keys(driver.out, [work]), name
        (folder / name).write_bytes(kept)
    shutil.rmtree(folder)
    report = driver.sweep()
    assert (report.trained, report.failed, report.complete) == (1, (), True)
    assert (folder / "weights.safetensors").read_bytes() == before


def test_a_training_that_diverges_is_a_result_and_costs_no_sweep(tmp_path):
    text = QUICK.replace('["bce", "dice"]', '["bce"]')
    text = only(text, learning_rates="[0.01, 1e30]", iterations="3", best="[2]")
    report = driver_of(tmp_path, text).sweep()
    assert (report.complete, report.failed, len(report.models)) == (True, (), 1)
    assert "## Diverged: 1 of 2" in report.tables
    assert "one resunet bce 1e+30: diverged: The loss is not finite" in report.tables
    board = pd.read_parquet(tmp_path / "out" / "leaderboard.parquet")
    assert board["score"].isna().tolist() == [False, True]
    again = driver_of(tmp_path, text).sweep()
    assert (again.trained, again.there, again.tables) == (0, 2, report.tables)
    assert not list((tmp_path / "out").rglob("state.safetensors"))

    alone = only(text, names='["rdndvi"]', learning_rate="1e30")
    for _ in range(2):
        with pytest.raises(PipelineError, match="lower learning_rate"):
            driver_of(tmp_path, f"version = 2\n{alone}").single()
    assert len(list((tmp_path / "out" / "trainings").iterdir())) == 2


def test_weights_to_begin_with_count_by_content(tmp_path, monkeypatch):
    """Also those of the hub's cache, which are another file on another day."""
    monkeypatch.setattr("slidecube.models.pretrained.cached_file", lambda _: tmp_path / "cached")

    def key(pretrained, content):
        (tmp_path / "cached").write_bytes(content)
        text = only(TOML, arguments=f'{{}}\narchitecture = "unet"\npretrained = "{pretrained}"')
        driver = driver_of(tmp_path, text)
        return driver.works(candidates(driver.config, sweep=False))[0].key

    (tmp_path / "own.safetensors").write_bytes(b"one")
    assert key("imagenet", b"one") == key("own.safetensors", b"") != key("imagenet", b"another")


def test_ensembles_of_all_sizes_read_their_labels_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(ensembles_chosen, "labels_of", lambda p: read.append(p.seed) or training.labels_of(p))
    text = only(QUICK, losses='["bce", "dice", "focal"]')
    report = driver_of(tmp_path, text).sweep()
    assert (len(report.models), sorted(read)) == (2, [1, 2])


def test_a_half_done_training_that_cannot_go_on_here_is_told_of_also_in_a_sweep(tmp_path, monkeypatch):
    """Another number of threads gives other last bits, so it begins again: told in the report and in its record."""
    begun = only(QUICK, epochs="2", losses='["bce"]', best="[2]").replace(
        "threads = 1\n", "threads = 1\ncheckpoint_min = 0\n"
    )
    with monkeypatch.context() as killed:
        killed.setattr("slidecube.models.curves.write_history", None)
        assert driver_of(tmp_path, begun).sweep().failed
    assert list((tmp_path / "out").rglob("state.safetensors"))
    report = driver_of(tmp_path, begun.replace("threads = 1", "threads = 2")).sweep()
    assert (report.trained, report.failed) == (1, ())
    (told,) = [line for line in report_text(report).splitlines() if line.startswith("note: ")]
    assert "threads or device and not used: the training starts anew" in told
    (record,) = (training.ledger_of(tmp_path / "out").read(work.key) for work, _ in report.notes)
    assert record.reason in told
