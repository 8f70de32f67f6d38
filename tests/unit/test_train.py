"""Training: killed at any step it ends in the same bits, and what it cannot learn from is one line before it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score
from torch import nn

from slidecube.models import architectures
from slidecube.models import train as training_loop
from slidecube.models.architectures import Architecture
from slidecube.models.batches import Sampler, ahead, normalise, survey
from slidecube.models.card import FeatureSpec
from slidecube.models.errors import ModelError
from slidecube.models.network import standardised
from slidecube.models.patches import IGNORE, LANDSLIDE, STABLE, UNLABELLED
from slidecube.models.thresholds import best_threshold, logit_histogram, on_step
from slidecube.models.together import run_together
from slidecube.models.train import (
    HISTORY_FILE,
    STATE_FILE,
    AugmentSettings,
    TrainSettings,
    logits_of,
    train,
)
from slidecube.models.train_settings import TrainSettings as Settings
from slidecube.pipeline.errors import PipelineError

SIDE = 32


@dataclass(frozen=True)
class Simulated:
    """Patches of noise with a rectangle that is darker; a pixel in ten is unknown."""

    count: int = 12
    seed: int = 0
    side: int = SIDE

    features = FeatureSpec(names=("ndvi_post", "slope_deg", "aspect_deg"))
    units = ("1", "degree", "degree")
    resolution_m = 10.0

    @property
    def patch_px(self):
        return self.side

    @property
    def digest(self):
        return f"{self.count:08d}{self.seed:08d}"

    @property
    def regions(self):
        return ("here",) * self.count

    def __len__(self):
        return self.count

    def read(self, index, *, seed=0):
        rng = np.random.default_rng([self.seed, index])
        x = rng.normal(size=(3, self.side, self.side)).astype(np.float32)
        x[1:] *= 20
        y = np.zeros((self.side, self.side), np.uint8)
        row, col = rng.integers(4, self.side // 2, 2)
        y[row : row + 9, col : col + 12] = LANDSLIDE
        y[:2] = UNLABELLED
        x[0][y == LANDSLIDE] -= 3
        x[0][rng.random(y.shape) < 0.1] = np.nan
        return x, y


@dataclass(frozen=True)
class Changed(Simulated):
    """Patches of which some are spoilt by a function (index, x, y) -> (x, y)."""

    spoil: object = None

    def read(self, index, *, seed=0):
        return self.spoil(index, *super().read(index, seed=seed))


class Tiny(nn.Module):
    """Two convolutions with all that has a state: batch norm, dropout."""

    def __init__(self, channels, width=6):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout2d(0.2),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, x):
        return self.layers(x)


TABLE = {
    **architectures.ARCHITECTURES,
    "tiny": Architecture(build=lambda channels, **_: Tiny(channels), extra=False, source="tests"),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The table of architectures with a network that trains at once."""
    monkeypatch.setattr(architectures, "ARCHITECTURES", TABLE)


QUICK = TrainSettings(iterations=6, epochs=3, learning_rate=0.01, checkpoint_min=1e6, panel=0)
RICH = replace(
    QUICK,
    optimizer="adamw",
    weight_decay=0.01,
    schedule="cosine",
    warmup=3,
    ema=0.9,
    clip_norm=1.0,
    accumulate=2,
    dtype="bf16",
    augment=AugmentSettings(jitter_gain=0.1, clouds=0.5, scars=0.5),
)
TRAINING, VALIDATION = Simulated(), Simulated(count=5, seed=1)


def go(folder, settings=QUICK, *, training=TRAINING, validation=VALIDATION, **more):
    return train("tiny", {}, training, validation, settings, folder=folder, **more)


def curve(trained):
    return pd.read_parquet(trained.history).drop(columns="seconds")


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """The training that was never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "ARCHITECTURES", TABLE)
        return go(tmp_path_factory.mktemp("rich"), RICH)


def same(one, other):
    """Weights, threshold and curve, to the bit."""
    pd.testing.assert_frame_equal(curve(one), curve(other), check_exact=True)
    return replace(one, history=Path()) == replace(other, history=Path())


# --- learning ----------------------------------------------------------------------------------------------------


def test_it_learns_and_says_how_well(tmp_path):
    said = []
    made = go(tmp_path, replace(QUICK, iterations=40, epochs=4), progress=said.append)

    history = pd.read_parquet(made.history)
    assert history["loss"].iloc[-1] < 0.5 * history["loss"].iloc[0]
    assert made.score > 0.85
    assert made.score == history["f1"].max()
    assert made.epoch == history["f1"].idxmax() + 1
    assert made.epochs_run == len(history) == 4
    assert list(history["iteration"]) == [40, 80, 120, 160]
    assert [news.epoch for news in said] == [1, 2, 3, 4]
    assert said[0].row == pytest.approx(dict(history.iloc[0]))
    assert said[-1].text.startswith("epoch 4 of 4: loss 0.")


def test_its_score_is_that_of_its_weights_at_its_threshold_by_scikit_learn(tmp_path):
    made = go(tmp_path, replace(RICH, iterations=30, dtype="fp32"))
    module = Tiny(3)
    module.load_state_dict(safetensors.torch.load(made.weights))
    logits, labels = logits_of(module, made.mean, made.std, VALIDATION, range(5), batch=2)

    judged = labels <= LANDSLIDE
    found = 1 / (1 + np.exp(-logits[judged].astype(float))) >= made.threshold
    row = pd.read_parquet(made.history).iloc[made.epoch - 1]
    assert f1_score(labels[judged], found) == pytest.approx(made.score, abs=1e-3)
    assert precision_score(labels[judged], found) == pytest.approx(row["precision"], abs=1e-3)
    assert recall_score(labels[judged], found) == pytest.approx(row["recall"], abs=1e-3)


def test_logits_follow_the_indices_in_equal_bits(tmp_path):
    made = go(tmp_path)
    module = Tiny(3)
    module.load_state_dict(safetensors.torch.load(made.weights))

    def of(indices):
        return logits_of(module, made.mean, made.std, VALIDATION, indices, batch=2)

    logits, labels = of([4, 0, 3])
    for i, index in enumerate([4, 0, 3]):
        np.testing.assert_array_equal(of([index])[0][0], logits[i])
        x, y = VALIDATION.read(index)
        np.testing.assert_array_equal(labels[i], np.where(np.isnan(x).any(axis=0), IGNORE, y))


def test_early_stopping_keeps_the_best_weights(tmp_path, monkeypatch):
    f1 = iter([0.2, 0.5, 0.5, 0.4, 0.6, 0.1, 0.1, 0.1, 0.1])
    original = training_loop.best_threshold
    monkeypatch.setattr(
        training_loop, "best_threshold", lambda counts: replace(original(counts), f1=next(f1))
    )
    made = go(tmp_path, replace(QUICK, epochs=9, patience=3))
    assert (made.epoch, made.epochs_run, made.score) == (5, 8, 0.6)

    f1 = iter([0.2, 0.5, 0.5, 0.4, 0.5])
    again = go(tmp_path / "again", replace(QUICK, epochs=9, patience=3))
    assert (again.epoch, again.epochs_run) == (2, 5), "a tie is not better"
    two = go(tmp_path / "two", replace(QUICK, epochs=2)) if (f1 := iter([0.2, 0.5])) else None
    assert two.weights == again.weights


def test_its_panel_and_its_events_lie_beside_its_history(tmp_path):
    said = go(tmp_path, replace(QUICK, iterations=20, panel=2, tensorboard=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "history.parquet",
        "panel.png",
        "state.safetensors",
        "tensorboard",
    ]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert said == go(tmp_path, replace(QUICK, iterations=20)), "neither decides a bit"


def test_a_panel_that_a_kill_left_out_is_drawn(tmp_path, monkeypatch):
    settings = replace(QUICK, iterations=2, epochs=1, panel=1)
    go(tmp_path, settings)
    drawn = (tmp_path / "panel.png").read_bytes()
    (tmp_path / "panel.png").unlink()
    monkeypatch.setattr(training_loop._Loop, "_step", None)
    go(tmp_path, settings)
    assert (tmp_path / "panel.png").read_bytes() == drawn
    monkeypatch.setattr(training_loop, "_picture", None)
    go(tmp_path, settings)


def test_initial_weights_are_where_it_starts(tmp_path):
    first = go(tmp_path / "a")
    still = replace(QUICK, epochs=1, iterations=1, learning_rate=1e-12)
    second = go(tmp_path / "b", still, initial=first.weights)
    a, b = (safetensors.torch.load(one.weights) for one in (first, second))
    torch.testing.assert_close(b["layers.0.weight"], a["layers.0.weight"])
    with pytest.raises(ModelError, match="The initial weights is no safetensors file"):
        go(tmp_path / "c", initial=b"no weights")


def test_ema_is_the_mean_by_its_formula(tmp_path):
    """Five steps by hand: each average is decay * average + (1 - decay) * weights."""
    settings = replace(QUICK, epochs=1, ema=0.5)
    kept, original = [], training_loop._Loop._step

    def spied(self, step, made):
        loss = original(self, step, made)
        kept.append(self.state.module.layers[0].weight.detach().clone())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop._Loop, "_step", spied)
        made = go(tmp_path, settings)
    want = kept[0]
    for weight in kept[1:]:
        want = 0.5 * want + 0.5 * weight
    torch.testing.assert_close(safetensors.torch.load(made.weights)["layers.0.weight"], want)


def test_accumulated_parts_are_one_batch(tmp_path):
    """Without batch norm and dropout, parts with the same number of known pixels make the same step."""
    plain = Simulated(count=8)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    def known(_index, x, y):
        return np.nan_to_num(x), np.where(y == UNLABELLED, 0, y).astype(np.uint8)

    data = Changed(count=plain.count, spoil=known)
    row = Architecture(build=lambda *_, **__: Plain(), extra=False, source="tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "ARCHITECTURES", {"tiny": row})
        one, other = (
            go(tmp_path / str(n), replace(QUICK, accumulate=n), training=data, validation=data)
            for n in (1, 4)
        )
    a, b = (safetensors.torch.load(made.weights)["conv.weight"] for made in (one, other))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.slow  # it compiles for a minute or two
def test_compiled_it_learns_the_same(tmp_path):
    plain, compiled = (
        curve(
            train(
                "resunet",
                {"width": 4, "depth": 2},
                TRAINING,
                VALIDATION,
                replace(QUICK, compile=compiles),
                folder=tmp_path / str(compiles),
            )
        )
        for compiles in (False, True)
    )
    np.testing.assert_allclose(compiled["loss"], plain["loss"], rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_each_optimizer_learns(tmp_path, optimizer):
    settings = replace(QUICK, optimizer=optimizer, iterations=15)
    history = curve(go(tmp_path, settings))
    assert history["loss"].iloc[-1] < 0.9 * history["loss"].iloc[0]


BACKWARD = """
import os
import torch
from slidecube.models.architectures import build_network
from slidecube.models.train import _layout

torch.set_num_threads(1)
for width in (4, 8, 16):
    network = build_network("resunet", 5, {"width": width})
    layout = _layout(network, torch.device("cpu"))
    print(width, layout)
    network.to(memory_format=layout)
    for _ in range(20):
        network(torch.randn(2, 5, 64, 64).contiguous(memory_format=layout)).mean().backward()
os._exit(0)
"""


def test_no_step_of_a_residual_network_writes_past_its_memory():
    checker = next(iter(Path("/usr/lib").glob("*/libc_malloc_debug.so.0")), None)
    if checker is None:
        pytest.skip("the C library's checks of memory are not installed")
    done = subprocess.run(
        [sys.executable, "-u", "-c", BACKWARD],
        check=False,
        env={**os.environ, "LD_PRELOAD": str(checker), "MALLOC_CHECK_": "3"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "4 torch.contiguous_format",
        "8 torch.contiguous_format",
        "16 torch.channels_last",
    ]


def test_rates_follow_their_schedules():
    def rates(steps=10, **settings):
        made = replace(Settings(learning_rate=1.0), **settings)
        return [made.rate(i, steps) for i in range(steps)]

    assert rates() == [1.0] * 10
    assert rates(warmup=3)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(schedule="step", step_iterations=4) == pytest.approx([1] * 4 + [0.1] * 4 + [0.01] * 2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    want = []
    for _ in range(10):
        want += oracle.get_last_lr()
        optimizer.step()
        oracle.step()
    assert rates(schedule="cosine") == pytest.approx(want)


# --- the same bits -----------------------------------------------------------------------------------------------


def test_two_runs_are_the_same_and_the_seed_changes_them(tmp_path, rich):
    assert same(rich, go(tmp_path / "b", replace(RICH, loaders=5, checkpoint_min=0)))
    assert go(tmp_path / "c", replace(RICH, seed=1)).weights != rich.weights


def test_random_numbers_and_threads_outside_change_nothing_and_are_not_changed(tmp_path, rich):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002  the old numbers of the process are not to matter
        state = torch.get_rng_state()
        assert same(go(tmp_path, RICH), rich)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(before)


def test_two_trainings_at_once_do_not_mix_their_random_numbers(tmp_path, rich):
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: go(tmp_path / str(i), RICH)})) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(rich, found[0])
    assert same(rich, found[1])


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs in the loop."""


def killed_after(folder, steps, settings, monkeypatch):
    original, count = training_loop._Loop._step, iter(range(steps))

    def step(self, number, made):
        if next(count, None) is None:
            raise Killed
        return original(self, number, made)

    with monkeypatch.context() as patch:
        patch.setattr(training_loop._Loop, "_step", step)
        with pytest.raises(Killed):
            go(folder, settings)


@pytest.mark.parametrize("steps", [1, 5, 6, 7, 12, 17])
def test_resumed_at_any_checkpoint_equals_uninterrupted(tmp_path, monkeypatch, steps, rich):
    settings = replace(RICH, checkpoint_min=0)
    killed_after(tmp_path / "killed", steps, settings, monkeypatch)

    steps_run, original = [], training_loop._Loop._step
    monkeypatch.setattr(
        training_loop._Loop,
        "_step",
        lambda self, number, made: steps_run.append(number) or original(self, number, made),
    )
    resumed = go(tmp_path / "killed", settings)

    assert steps_run == list(range(steps, 18))
    assert same(resumed, rich)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_optimizer_goes_on_in_the_same_bits_and_more_than_once(tmp_path, monkeypatch, optimizer):
    settings = replace(QUICK, optimizer=optimizer, checkpoint_min=0, weight_decay=0.01)
    for steps in (2, 3, 5, 1):
        killed_after(tmp_path / "killed", steps, settings, monkeypatch)
    assert same(go(tmp_path / "killed", settings), go(tmp_path / "whole", settings))


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_train
from slidecube.models import architectures
architectures.ARCHITECTURES = test_train.TABLE
test_train.go(Path(sys.argv[1]), test_train.LONG)
"""
LONG = replace(QUICK, iterations=12, epochs=8, ema=0.9, checkpoint_min=0)


@pytest.mark.slow
def test_a_killed_process_is_resumed(tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env={**os.environ})
    deadline = time.monotonic() + 120
    while not (tmp_path / HISTORY_FILE).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed in the middle"

    resumed = go(tmp_path, LONG)
    assert len(pd.read_parquet(resumed.history)) == resumed.epochs_run == 8
    assert same(resumed, go(tmp_path / "whole", replace(LONG, checkpoint_min=1e6)))


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    first = go(tmp_path)
    monkeypatch.setattr(training_loop._Loop, "_step", None)
    assert same(go(tmp_path), first)


@pytest.mark.parametrize(
    "spoil", ["other data", "other settings", "other torch", "cut", "empty", "a bit", "weights"]
)
def test_a_state_of_another_training_or_a_damaged_one_is_not_used(tmp_path, monkeypatch, spoil):
    want = go(tmp_path / "whole")
    folder, said = tmp_path / "spoilt", []
    with monkeypatch.context() as patch:
        if spoil == "other torch":
            patch.setattr(torch, "__version__", "1.0")
        go(
            folder,
            replace(QUICK, seed=3) if spoil == "other settings" else QUICK,
            training=Simulated(seed=7) if spoil == "other data" else TRAINING,
        )
    path = folder / STATE_FILE
    content = bytearray(path.read_bytes())
    content[-9] ^= spoil == "a bit"
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "weights": want.weights}
    path.write_bytes(damaged.get(spoil, content))

    assert same(go(folder, progress=said.append), want)
    why = "of other data, settings, versions, threads or device" if spoil.startswith("other") else "damaged"
    assert said[0].text.endswith("and not used: the training starts anew")
    assert why in said[0].text
    assert len(said) == 4


# --- bad input ---------------------------------------------------------------------------------------------------


def spoilt(change, count=12, seed=0):
    return Changed(count=count, seed=seed, spoil=change)


def unknown(_index, x, y):
    return np.full_like(x, np.nan), y


def unlabelled(_index, x, y):
    return x, np.where(y == STABLE, UNLABELLED, y).astype(np.uint8)


def without(_index, x, y):
    return x, np.where(y == LANDSLIDE, 0, y).astype(np.uint8)


@pytest.mark.parametrize(
    ("training", "validation", "says"),
    [
        (
            spoilt(without),
            VALIDATION,
            "The training patches hold no landslide pixel whose inputs are all known",
        ),
        (TRAINING, spoilt(without), "The validation patches hold no landslide pixel whose inputs"),
        (TRAINING, spoilt(unknown), "The validation patches hold no landslide pixel whose inputs"),
        (
            TRAINING,
            spoilt(unlabelled),
            "The validation patches hold no stable pixel whose inputs are all known",
        ),
        (spoilt(unknown), VALIDATION, "No training patch knows a value of ndvi_post, slope_deg, aspect_deg"),
        (Simulated(count=0), VALIDATION, "There is no training patch"),
        (TRAINING, Simulated(count=0), "The validation patches hold no landslide"),
        (TRAINING, Simulated(side=64), "Training patches have patch_px 32 and validation patches 64"),
        (
            spoilt(lambda i, x, y: (x, np.full_like(y, 7) if i == 4 else y)),
            VALIDATION,
            "Patch 4 has the labels 7; allowed are 0",
        ),
        (
            spoilt(lambda _, x, y: (x, y.astype(np.int16) - 1)),
            VALIDATION,
            "Patch 0 has the labels -1, 253; allowed are 0",
        ),
        (spoilt(lambda _, x, y: (x, y[1:])), VALIDATION, r"labels of \(31, 32\); .* \(32, 32\) are needed"),
        (spoilt(lambda _, x, y: (x[:2], y)), VALIDATION, r"features of the shape \(2, 32, 32\)"),
        (spoilt(lambda _, x, y: (x / 0 if x.any() else x, y)), VALIDATION, "Patch 0 has infinite values"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_data_that_nothing_can_be_learnt_from_is_one_line_before_it_starts(
    tmp_path, monkeypatch, training, validation, says
):
    monkeypatch.setattr(training_loop._Loop, "_step", None)
    with pytest.raises(ModelError, match=says) as error:
        go(tmp_path, training=training, validation=validation)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_patches_that_are_all_unknown_among_others_change_no_weight(tmp_path):
    """They are drawn, but no pixel of them is learnt from, and a batch of them alone is no error."""
    half = spoilt(lambda i, x, y: (x, y) if i < 6 else unknown(i, x, y))
    made = go(tmp_path, replace(QUICK, batch=1, iterations=24), training=half)
    assert made.score > 0
    only = spoilt(lambda i, x, y: (x, y) if i < 6 else (x, np.full_like(y, IGNORE)))
    assert survey(half, most=100, seed=0).donors == survey(only, most=100, seed=0).donors == tuple(range(6))


@pytest.mark.parametrize("kind", [ModelError, PipelineError])
def test_a_patch_that_cannot_be_read_on_the_way_is_its_own_line(tmp_path, kind):
    reads = iter(range(10**6))

    def spoil(index, x, y):
        if next(reads) > 40:
            raise kind(f"Patch {index} of the file is damaged")
        return x, y

    with pytest.raises(kind, match=r"^Patch \d+ of the file is damaged$"):
        go(tmp_path, training=spoilt(spoil))


def test_divergence_is_one_line_with_the_knob_to_turn_and_keeps_no_state(tmp_path):
    with pytest.raises(
        ModelError, match=r"not finite in iteration \d+ of epoch \d+; lower learning_rate"
    ) as error:
        go(tmp_path, replace(QUICK, optimizer="sgd", learning_rate=1e30, checkpoint_min=0))
    assert "\n" not in str(error.value)
    state = tmp_path / STATE_FILE
    assert (
        not state.exists()
        or np.isfinite(
            [float(t.double().abs().sum()) for t in safetensors.torch.load_file(state).values()]
        ).all()
    )


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"The training cannot go on: .*file"):
        go(tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optimizer": "lion"}, "optimizer = 'lion' is not allowed; adam, adamw, sgd are"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0 is not allowed; above 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan is not allowed"),
        ({"ema": 1.0}, "ema = 1.0 is not allowed; 0 to below 1"),
        ({"epochs": 0}, "epochs = 0 is not allowed; 1 or more"),
        ({"batch": 6, "accumulate": 4}, "batch = 6 cannot be shared by 1 process"),
        ({"dtype": "fp16"}, "dtype = 'fp16' trains on device = 'cuda' only"),
        ({"schedule": "plateau"}, "schedule = 'plateau' is not allowed; constant, cosine, step"),
    ],
)
def test_settings_that_mean_nothing_are_one_line(settings, says):
    with pytest.raises(ModelError, match=says):
        TrainSettings(**settings)


def test_a_gpu_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="device = 'cuda' needs a GPU"):
        go(tmp_path, replace(QUICK, device="cuda"))


class Talkative:
    """A job that prints as libraries do, in Python and below it, while it is unpacked and when it is begun."""

    def __reduce__(self):
        return Talkative.talk, ()

    @staticmethod
    def talk():
        print("INFO of a library")
        os.write(1, b"node:1 [0] NCCL INFO Bootstrap\n")
        return Talkative()

    @property
    def settings(self):
        print('{"loss": 1}')
        raise PipelineError("its own line")  # as patches of cubes do


def test_what_libraries_print_in_a_process_of_a_training_is_no_news_and_its_errors_are_a_line(monkeypatch):
    monkeypatch.setattr(cloudpickle, "dumps", partial(_by_value, cloudpickle.dumps))
    told = []
    with pytest.raises(ModelError, match=r"^its own line$"):
        run_together(Talkative(), 1, told.append)
    assert told == []


def _by_value(dumps, job):
    """Pickle it so that a process can unpack it that knows nothing of this module."""
    module = sys.modules[Talkative.__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        return dumps(job)
    finally:
        cloudpickle.unregister_pickle_by_value(module)


# --- its parts ---------------------------------------------------------------------------------------------------


def test_normalisation_is_that_of_all_known_pixels(tmp_path):
    x_nfyx = np.stack([TRAINING.read(i)[0] for i in range(12)]).astype(float)
    made = go(tmp_path, replace(QUICK, epochs=1))
    np.testing.assert_allclose(made.mean, np.nanmean(x_nfyx, axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(made.std, np.nanstd(x_nfyx, axis=(0, 2, 3)), rtol=1e-6)


def test_a_network_learns_from_the_very_numbers_that_it_will_read():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 70, 70)) * 1e3).astype(np.float32)
    x[rng.random(x.shape) < 0.1], x[0, 0, 0] = np.nan, 3e38
    mean, std = np.float32([0.1, -7, 900]), np.float32([0.3, 40, 1e-3])
    out = np.empty_like(x)
    normalise(x, mean, std, out)
    np.testing.assert_array_equal(out, standardised(x, mean.tolist(), std.tolist()).transpose(2, 0, 1))


def test_a_survey_of_some_patches_is_of_the_same_ones_each_time_and_of_constants_1():
    flat = spoilt(lambda _, x, y: (np.concatenate([x[:2], np.full_like(x[:1], 1e6)]), y))
    found = survey(flat, most=5, seed=0)
    assert found.std[2] == 1
    assert found.mean[2] == 1e6
    assert len(found.donors) == 5
    assert survey(flat, most=5, seed=0).donors == found.donors
    assert survey(flat, most=5, seed=1).donors != found.donors


def test_a_landslide_that_the_survey_did_not_meet_is_looked_for():
    rare = spoilt(lambda i, x, y: (x, y) if i == 7 else without(i, x, y))
    assert all(survey(rare, most=1, seed=s).donors == (7,) for s in range(5))


@given(st.integers(1, 50), st.integers(0, 100), st.integers(0, 3))
def test_every_patch_is_drawn_once_before_any_is_drawn_again(patches, start, seed):
    sampler = Sampler(patches=patches, seed=seed)
    first = start * patches
    assert sorted(sampler.patch(first + i) for i in range(patches)) == list(range(patches))
    assert sampler.crop(start) == Sampler(patches=patches, seed=seed).crop(start)
    assert sampler.crop(start) != sampler.crop(start + 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-30, 30), min_size=4, max_size=60), st.integers(0, 2**32 - 1))
def test_the_best_threshold_is_the_best_of_all_by_scikit_learn(levels, seed):
    logits = np.float32(levels) / 2
    labels = np.random.default_rng(seed).integers(0, 2, len(levels)).astype(np.uint8)
    labels[0] = 1
    ignored = np.append(labels, [UNLABELLED, IGNORE]).astype(np.uint8)

    best = best_threshold(logit_histogram(np.append(logits, [9, 9]).astype(np.float32), ignored))

    found = 1 / (1 + np.exp(-logits.astype(float))) >= best.threshold
    assert f1_score(labels, found) == pytest.approx(best.f1)
    assert precision_score(labels, found, zero_division=0) == pytest.approx(best.precision)
    assert recall_score(labels, found) == pytest.approx(best.recall)
    assert on_step(best.threshold) == best.threshold  # a map keeps what it says
    inside = [x for x in {*logits.tolist()} if -9 <= x <= 9]
    others = [f1_score(labels, logits >= cut) for cut in inside]
    assert best.f1 >= max(others, default=0) - 1e-12


def test_things_made_ahead_come_in_order_and_an_error_in_its_place():
    def make(i):
        time.sleep(0.002 * (i % 3))
        if i == 7:
            raise ModelError("the seventh")
        return i

    running = ahead(make, range(20), threads=4)
    assert [next(running) for _ in range(7)] == list(range(7))
    with pytest.raises(ModelError, match="the seventh"):
        next(running)
    running = ahead(make, range(7), threads=3)
    assert list(running) == list(range(7))
    assert not [t for t in threading.enumerate() if t.name.startswith("patches")]


def test_few_things_wait_in_memory():
    begun = []
    running = ahead(lambda i: begun.append(i) or i, range(100), threads=3)
    for taken in range(1, 20):
        next(running)
        time.sleep(0.001)
        assert len(begun) <= taken + 4
    running.close()
