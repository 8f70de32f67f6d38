"""A training in two processes beside the same in one: the same network, and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace

import cloudpickle
import numpy as np
import pandas as pd
import psutil
import pytest
import safetensors.torch
import torch

from slidecube.models.card import FeatureSpec
from slidecube.models.errors import ModelError
from slidecube.models.train import STATE_FILE, TrainSettings, train

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Simulated:
    """Patches of noise with a darker rectangle; every pixel is known, so that all shares weigh the same."""

    count: int
    seed: int
    broken: int = -1
    pause_s: float = 0.0

    features = FeatureSpec(names=("ndvi_post", "slope_deg"))
    units = ("1", "degree")
    resolution_m = 10.0
    patch_px = 32

    @property
    def digest(self):
        return f"{self.count:08d}{self.seed:08d}"

    @property
    def regions(self):
        return ("here",) * self.count

    def __len__(self):
        return self.count

    def read(self, index, *, seed=0):
        if seed and index == self.broken:
            raise ModelError(f"Patch {index} is damaged")
        time.sleep(self.pause_s if seed else 0)
        rng = np.random.default_rng([self.seed, index])
        x = rng.normal(size=(2, 32, 32)).astype(np.float32)
        y = np.zeros((32, 32), np.uint8)
        y[5:15, 6:20] = 1
        x[0][y == 1] -= 2
        return x, y


TRAINING, VALIDATION = Simulated(count=10, seed=0), Simulated(count=5, seed=1)
QUICK = TrainSettings(iterations=4, epochs=2, batch=4, checkpoint_min=1e6, panel=0, timeout_s=60)
ARGUMENTS = {"width": 4}


def go(folder, settings, training=TRAINING, **more):
    return train("resunet", ARGUMENTS, training, VALIDATION, settings, folder=folder, **more)


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(tmp_path):
    said = []
    one = go(tmp_path / "one", replace(QUICK, accumulate=2))
    two = go(tmp_path / "two", replace(QUICK, processes=2), progress=said.append)

    assert [news.epoch for news in said] == [1, 2]
    a, b = (safetensors.torch.load(made.weights) for made in (one, two))
    for name, tensor in a.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):  # each process's own
            torch.testing.assert_close(b[name], tensor, atol=2e-3, rtol=1e-2, msg=name)
    losses = [pd.read_parquet(made.history)["loss"] for made in (one, two)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)

    again = go(tmp_path / "again", replace(QUICK, processes=2))
    assert again.weights == two.weights
    assert go(tmp_path / "two", replace(QUICK, processes=2)) == two, "a finished one is not repeated"


@pytest.mark.slow
def test_a_dead_process_ends_all_in_one_line_and_the_training_goes_on_when_it_is_started_again(tmp_path):
    settings = replace(QUICK, processes=2, epochs=3, iterations=30, checkpoint_min=0)
    slow = replace(TRAINING, pause_s=0.02)
    done = threading.Event()

    def kill_one():
        while not done.is_set():
            children = psutil.Process().children()
            if len(children) == 2 and (tmp_path / "killed" / STATE_FILE).exists():
                os.kill(children[1].pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        with pytest.raises(
            ModelError, match=r"Process 2 of the training was killed by signal 9; start it again"
        ):
            go(tmp_path / "killed", settings, slow)
    finally:
        done.set()
        killer.join()
    assert not psutil.Process().children()

    resumed = go(tmp_path / "killed", settings, slow)
    whole = go(tmp_path / "whole", settings)
    assert resumed.weights == whole.weights
    pd.testing.assert_series_equal(*(pd.read_parquet(made.history)["loss"] for made in (resumed, whole)))


@pytest.mark.slow
def test_the_line_of_the_process_that_failed_is_the_one_that_is_told(tmp_path):
    with pytest.raises(ModelError, match=r"^Patch 3 is damaged$"):
        go(tmp_path, replace(QUICK, processes=2), replace(TRAINING, broken=3))
    assert not psutil.Process().children()


def test_too_few_gpus_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ModelError, match="processes = 2 need as many GPUs, and there are 1"):
        go(tmp_path, replace(QUICK, processes=2, device="cuda"))
