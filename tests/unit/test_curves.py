"""Curves beside what they are read with: pandas, TensorBoard's own reader, Pillow."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import f1_score

from slidecube.models.curves import (
    COLUMNS,
    Pictured,
    best_and_worst,
    f1_of_patches,
    open_events,
    write_history,
    write_panel,
)
from slidecube.models.errors import ModelError
from slidecube.models.patches import IGNORE


def row(epoch):
    return {name: float(epoch) if name != "f1" else epoch / 10 for name in COLUMNS.names}


def test_the_history_is_read_back_as_it_was(tmp_path):
    write_history(tmp_path / "history.parquet", [row(1), row(2)])
    found = pd.read_parquet(tmp_path / "history.parquet")
    assert list(found) == COLUMNS.names
    assert list(found["f1"]) == [0.1, 0.2]
    assert found["epoch"].dtype == np.int32
    assert [path.name for path in tmp_path.iterdir()] == ["history.parquet"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_each_epoch_once_also_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    write = open_events(tmp_path, done=0)
    for epoch in (1, 2, 3):
        write(row(epoch))
    write = open_events(tmp_path, done=1)
    for epoch in (2, 3, 4):
        write(row(epoch))

    read = EventAccumulator(str(tmp_path)).Reload()
    assert read.Tags()["scalars"] == COLUMNS.names[2:]
    assert [event.step for event in read.Scalars("f1")] == [1, 2, 3, 4]
    assert [event.value for event in read.Scalars("f1")] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_without_tensorboard_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ModelError, match=r"tensorboard = true needs TensorBoard: pip install 'slidecube\[nets\]'"
    ):
        open_events(tmp_path, done=0)


def test_f1_of_patches_is_scikit_learns():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 8, 8)).astype(np.float32), rng.integers(0, 2, (6, 8, 8), np.uint8)
    labels[:, 0] = IGNORE
    logits[5], labels[5, 1:] = -9, 0
    found = f1_of_patches(logits, labels, 0.6)
    for i in range(5):
        guess = logits[i, 1:] >= np.log(0.6 / 0.4)
        assert found[i] == pytest.approx(f1_score(labels[i, 1:].ravel(), guess.ravel()))
    assert np.isnan(found[5]), "nothing to find and nothing found says nothing"


@pytest.mark.parametrize(
    ("f1", "count", "want"),
    [
        ([0.1, 0.9, 0.5, 0.7], 1, ([1], [0])),
        ([0.1, 0.9, 0.5, 0.7], 9, ([1, 3], [0, 2])),
        ([0.1, np.nan, 0.5], 4, ([2], [0])),
        ([0.5, 0.5, 0.5], 1, ([0], [2])),
        ([0.3], 4, ([0], [])),
        ([np.nan], 4, ([], [])),
    ],
)
def test_best_and_worst_are_never_the_same(f1, count, want):
    assert best_and_worst(np.array(f1), np.ones(len(f1), bool), count) == want


def pictured(names, unknown):
    rng = np.random.default_rng(1)
    x = rng.random((len(names), 32, 32)).astype(np.float32)
    y = np.zeros((32, 32), np.uint8)
    y[4:9, 4:9] = 1
    x[:, unknown], y[unknown] = np.nan, IGNORE
    return Pictured(title="best: patch 0", x_fyx=x, y_yx=y, probability_yx=rng.random((32, 32)))


def test_a_patch_without_a_landslide_is_never_the_best():
    f1, holds = np.array([0.0, 0.0, np.nan, 0.8]), np.array([False, True, False, True])
    assert best_and_worst(f1, holds, 2) == ([3, 1], [0])
    assert best_and_worst(f1[:1], holds[:1], 2) == ([], [0])


@pytest.mark.parametrize(
    "names", [("B04_post", "B03_post", "B02_post", "slope_deg"), ("rdndvi", "slope_deg")]
)
def test_the_panel_shows_colours_and_hides_what_is_unknown(tmp_path, names):
    nothing, all_of_it = np.zeros((32, 32), bool), np.ones((32, 32), bool)
    write_panel(tmp_path / "one.png", [pictured(names, nothing), pictured(names, all_of_it)], names, 0.5)

    image = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).astype(int)
    assert image.shape[1] > 600
    upper, lower = image[: len(image) // 2], image[len(image) // 2 :]
    grey = (image.max(axis=-1) - image.min(axis=-1) <= 2) & (abs(image[..., 0] - 191) <= 3)
    assert grey[len(image) // 2 :].mean() > 0.3, "all is grey where nothing is known"
    assert grey[: len(image) // 2].mean() < 0.1
    assert len(np.unique(upper.reshape(-1, 3), axis=0)) > 2 * len(np.unique(lower.reshape(-1, 3), axis=0))


def test_no_patch_to_show_is_no_error(tmp_path):
    write_panel(tmp_path / "none.png", [], ("rdndvi",), 0.5)
    assert not (tmp_path / "none.png").exists()
