"""The TOML of a training: each mistake is one line that names the key and what is allowed."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from slidecube.models.train_settings import TrainSettings
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.train_config import (
    Training,
    candidates,
    check_losses,
    load_train_config,
)

LEAST = """
name = "tiny"
[[data]]
kind = "cube"
run = "run.toml"
reference = "known.gpkg"
[features]
names = ["rdndvi", "slope_deg"]
"""


def loaded(folder, text):
    path = folder / "training.toml"
    path.write_text(text)
    return load_train_config(path)


def test_the_least_toml_is_enough(tmp_path):
    config = loaded(tmp_path, LEAST)
    assert config.tables.network.architecture == "resunet"
    assert [one.label for one in candidates(config, sweep=False)] == ["features resunet bce 0.001"]


def test_a_sweep_is_that_of_the_paper(tmp_path):
    """Ganeroed et al. 2023: 9 x 5 x 2 x 4 = 360."""
    settings = (
        '[sweep]\nsettings = { s1 = ["dvv"], s2 = ["dndvi"], s1s2 = ["dvv", "dndvi"], all = ["elevation"] }'
    )
    found = candidates(loaded(tmp_path, f"{LEAST}{settings}"), sweep=True)
    assert len(found) == 360
    assert len({one.label for one in found}) == 360


def test_the_template_is_a_training_with_the_defaults_that_it_shows(tmp_path):
    text = resources.files("slidecube.pipeline").joinpath("train_template.toml").read_text(encoding="utf-8")
    shown = loaded(tmp_path, text).tables
    # uncommented, every default that it shows is the default
    opened = re.sub(r"(?m)^# (?=[a-z_]+ = )", "", text.replace("# [sweep]", "[sweep]"))
    opened = re.sub(
        r'(?m)^(pretrained|window_px|margin_px|by|run = "quiet|epoch|layer|settings|region) ?=?.*$',
        "",
        opened,
    )
    again = loaded(tmp_path, opened).tables
    for name in ("patches", "features", "network", "calibration", "threshold", "sweep"):
        assert getattr(again, name) == getattr(shown, name), name
    assert again.training.settings(threads=1) == shown.training.settings(threads=1)


def test_every_setting_of_the_loop_can_be_written():
    ours, theirs = set(Training.model_fields), set(TrainSettings.__dataclass_fields__)
    assert ours == theirs


REFUSALS = {
    'name = "Tiny"': ("name", "lower-case"),
    "version = 0": ("version", "1 or more"),
    'nam = "x"': ("nam", "did you mean 'name'"),
    "[network]\nwidth = 3": ("network.width", "allowed: architecture"),
    '[network]\narchitecture = "unett"': ("network.architecture", "did you mean 'unet'"),
    "[network]\narguments = { wide = 3 }": ("network.arguments", "width"),
    '[network]\npretrained = "weights.pth"': ("network.pretrained", "safetensors"),
    '[network]\npretrained = "none.safetensors"': ("network.pretrained", "no file"),
    "[training]\nlearning_rate = -1": ("training.learning_rate", "above 0"),
    '[training]\nlearning_rate = "fast"': ("training.learning_rate", "above 0"),
    "[training]\naugment = { flip = true }": ("training.augment.flip", "flips"),
    '[training]\ndtype = "fp16"': ("training", "cuda"),
    "[training]\nbatch = 3\naccumulate = 2": ("training", "multiple"),
    '[calibration]\nmethod = "platt"': ("calibration.method", "isotonic"),
    '[calibration]\nby = "land_cover"': ("calibration.by", "rdndvi, slope_deg"),
    '[calibration]\nby = "slope_deg"': ("calibration.by: got 'slope_deg'", "a layer of classes"),
    '[calibration]\nmethod = "isotonic"\nby = "slope_deg"': ("calibration.by", "temperature"),
    "[threshold]\nprecision = 1.0": ("threshold.precision", "below 1"),
    "[sweep]\nbest = [1]": ("sweep.best", "2 to 90"),
    "[sweep]\nbest = [2, 2]": ("sweep.best", "twice"),
    '[sweep]\narchitectures = ["unet", "vgg"]': ("sweep.architectures", "'vgg'"),
    "[sweep]\nlosses = []": ("sweep.losses", "a list of losses"),
    '[cluster]\nprofile = "slurm-array"': ("cluster.profile", "array of jobs"),
    '[cluster]\nprofile = "moon"': ("cluster.profile", "profiles:"),
    "[cluster]\ndeadline_min = 3": ("cluster.deadline_min", "allowed: profile"),
    "[patches]\npx = 8": ("patches.px", "32 to 512"),
}


@pytest.mark.parametrize("extra", REFUSALS)
def test_a_mistake_is_one_line_with_its_key(tmp_path, extra):
    key, word = REFUSALS[extra]
    text = (
        LEAST.replace('name = "tiny"', extra)
        if extra.startswith("name")
        else (LEAST + extra if extra.startswith("[") else extra + LEAST)
    )
    with pytest.raises(PipelineError) as error:
        loaded(tmp_path, text)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(f"{tmp_path / 'training.toml'}: {key}")
    assert word in said


@pytest.mark.parametrize(
    ("extra", "sweep", "word"),
    [
        ('[training]\nloss = "bcd"', False, "training.loss"),
        ('[training]\nloss = "weighted-ce"', False, "positive_weight"),
        ('[training]\nloss = "bce"\nprior = 0.1', False, "prior"),
        ('[sweep]\nlosses = ["bce", "pu"]', True, "prior"),
        ('[sweep]\nlosses = ["bce", "lovas"]', True, "lovasz"),
    ],
)
def test_losses_are_checked_before_anything_is_read(tmp_path, extra, sweep, word):
    config = loaded(tmp_path, LEAST + extra)
    with pytest.raises(PipelineError, match=word):
        check_losses(config.path, config.tables, sweep=sweep)


def test_a_run_is_not_taken_for_a_training(tmp_path):
    text = '[area]\nbbox = [1, 1, 2, 2]\n[[epoch]]\nname = "a"\n'
    with pytest.raises(PipelineError, match="init --training"):
        loaded(tmp_path, text)


def test_a_missing_file_says_how_to_write_one(tmp_path):
    with pytest.raises(PipelineError, match="init --training"):
        load_train_config(tmp_path / "none.toml")
