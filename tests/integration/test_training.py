"""`slidecube train` over tiny patches that lie in memory: from the TOML to a model, a leaderboard and an ensemble."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slidecube.models.card import FeatureSpec
from slidecube.models.network_card import read_card
from slidecube.pipeline.sweep import Driver
from slidecube.pipeline.train_config import load_train_config
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
        said = f"{self.names} {self.seed} {self.n} {self.noise}"
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @property
    def regions(self):
        return tuple(f"region-{i % self.regions_n}" for i in range(self.n))

    def __len__(self):
        return self.n

    def read(self, index, *, seed=0):
        rng = np.random.default_rng([self.seed, index])
        labels = np.zeros((PX, PX), np.uint8)
        for _ in range(2):
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


def test_one_training_gives_a_model(tmp_path):
    report = driver_of(tmp_path).single()
    card = read_card(report.models[0])
    assert report.trained == 1
    assert card.address == "tiny@1"
    assert card.inputs.names == ("rdndvi", "slope_deg")
    assert card.calibration.method == "temperature"
    assert card.metrics["f1"] > 0.5
    assert card.metrics["validation"]["f1"] > 0.5
    again = driver_of(tmp_path).single()
    assert (again.trained, again.there) == (0, 1)
    assert read_card(again.models[0]) == card


def test_sweep_ranks_chooses_and_saves(tmp_path):
    report = driver_of(tmp_path).sweep()
    assert (report.trained, report.complete) == (8, True)
    assert [folder.name for folder in report.models] == ["tiny@1", "tiny-ensemble@1"]
    assert len(read_card(report.models[1]).members) in (2, 3)
    print(report.tables)
