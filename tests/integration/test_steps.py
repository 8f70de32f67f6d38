"""The ablation of the preprocessing: each row differs by one key, and the document says what its table does."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from slidecube.pipeline.config import load_config
from slidecube.pipeline.demo import archive_toml
from slidecube.pipeline.simulate.archive import simulate_archive
from slidecube.pipeline.simulate.detectors import run_model
from slidecube.pipeline.simulate.steps import DEFAULTS, NONE, STEPS, markdown, measure, variants


def test_a_row_differs_from_the_defaults_by_one_key():
    rows = variants()
    assert len(rows) == len(STEPS) + 2
    for step in STEPS:
        own = rows[f"{'without' if step.default else 'with'} {step.label}"]
        assert {key for key in own if own[key] != rows[DEFAULTS][key]} == {step.key}
    assert all(rows[NONE][step.key] == step.off != step.on for step in STEPS)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(tmp_path_factory.mktemp("steps"), seed=92, size="small", overpasses=2)


def test_every_key_is_one_of_the_toml_and_only_the_first_row_is_the_default(archive):
    text = archive_toml(archive)
    plain = archive.root / "plain.toml"
    plain.write_text(text, encoding="utf-8")
    default = load_config(plain)
    for label, settings in variants().items():
        toml = archive.root / "row.toml"
        own = "".join(f"{name} = {value}\n" for name, value in settings.items())
        toml.write_text(text.replace("[cube]\n", f"[cube]\n{own}"), encoding="utf-8")
        assert (load_config(toml).cube == default.cube) == (label == DEFAULTS), label  # each key is known


def test_settings_reach_the_plan(archive):
    made = run_model(archive, model="rdndvi", settings={"mask.readmit": "false", "greenest_of": "0"})
    assert not made.config.cube.mask.readmit
    assert made.config.cube.greenest_of == 0


def test_the_document_prints_differences_of_either_sign_seed_by_seed():
    rows = [
        {"seed": seed, "model": "rdndvi", "variant": variant, "px_precision": np.nan, "px_recall": 0.5,
         "px_f1": f1 + seed / 10, "object_precision": 0.1, "object_recall": 0.1, "object_f1": 0.2, "observed": 0.75}
        for seed in (0, 1)
        for variant, f1 in ((DEFAULTS, 0.30), ("without a", 0.35), ("without b", 0.10))
    ]  # fmt: skip
    text = markdown(pd.DataFrame(rows))
    assert "**SIMULATED data**, archives of the seeds 0, 1, size `default`" in text
    assert "| without a | +0.0500 (+0.0500 to +0.0500) | +0.0000 (+0.0000 to +0.0000)" in text
    assert "| without b | -0.2000 (-0.2000 to -0.2000)" in text
    assert "| the defaults | - | 0.500 (0.500 to 0.500) | 0.350 (0.300 to 0.400)" in text


@pytest.mark.slow
def test_one_seed_runs_through():
    found = measure(seeds=[7], models=("rdndvi",), steps=STEPS[:1], size="small", overpasses=2)
    assert list(found["variant"]) == [DEFAULTS, "without equal clear counts", NONE]
    assert found["observed"].between(0, 1).all()
    assert "## rdndvi" in markdown(found)
