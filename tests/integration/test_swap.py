"""A new model reads no scene: the cubes of a rule serve a network that pools over windows, and an ensemble."""

from __future__ import annotations

import numpy as np
import pytest

from slidecube.pipeline.config import load_config
from slidecube.pipeline.demo import archive_toml
from slidecube.pipeline.open import open_inventory, open_plan
from slidecube.pipeline.report_stage import read_objects
from slidecube.pipeline.run import run
from slidecube.pipeline.simulate.archive import simulate_archive

NAMES = ("rdndvi", "slope_deg")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(tmp_path_factory.mktemp("swap"), seed=92, size="small", overpasses=2)


@pytest.fixture(autouse=True)
def networks(tmp_path, monkeypatch, save_untrained):
    root = tmp_path / "networks"
    save_untrained(root / "first@1", NAMES, window_px=96)
    save_untrained(
        root / "pooling@1", NAMES, architecture="pspnet", arguments={"width": 32}, window_px=96, seed=1
    )
    monkeypatch.setenv("SLIDECUBE_MODELS", str(root))


def test_a_network_and_an_ensemble_take_the_place_of_a_rule_and_read_no_scene(archive):
    toml = archive.root / "swap.toml"
    text = archive_toml(archive).replace('"rdndvi"', "MODEL") + 'formats = ["parquet"]\n'
    assert "MODEL" in text

    def ran(model):
        toml.write_text(text.replace("MODEL", model), encoding="utf-8")
        config = load_config(toml)
        report = run(config, progress=False)
        assert report.complete, report.reasons
        return open_plan(config.workspace)

    before = ran('"rdndvi"')
    for scene in archive.root.rglob("*.tif"):
        scene.unlink()  # whoever reads one now, fails

    keys = {before.epochs[0].detect_key}
    for model in ('"pooling"', '["first", "pooling"]'):
        made = ran(model)
        assert [layer.key for layer in made.layers] == [layer.key for layer in before.layers]
        keys.add(made.epochs[0].detect_key)
        inventory = open_inventory(made.config.workspace)
        spread, known = inventory["spread"].values, inventory["observability"].values == 3
        assert known.any()
        assert np.unique(inventory["probability"].values[known]).size > 100
        if model.startswith("["):
            assert np.isfinite(spread[known]).all()
            assert spread[known].max() > 0
            assert read_objects(made)["spread"].notna().all()
        else:
            assert np.isnan(spread).all()
        assert made.estimate.peak_mem_gb > before.estimate.peak_mem_gb
    assert len(keys) == 3
