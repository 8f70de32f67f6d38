"""A network that ships maps an archive out of the box, and one command makes the document of the networks."""

from __future__ import annotations

import pytest

from slidecube.pipeline.config import load_config
from slidecube.pipeline.demo import archive_toml
from slidecube.pipeline.open import open_inventory
from slidecube.pipeline.plan import plan
from slidecube.pipeline.run import run
from slidecube.pipeline.simulate import networks
from slidecube.pipeline.simulate.archive import simulate_archive


@pytest.mark.slow
@pytest.mark.parametrize("model", [networks.SINGLE, networks.ENSEMBLE, networks.SINGLE_IMAGE])
def test_a_run_names_it_and_gets_a_map(tmp_path_factory, model):
    archive = simulate_archive(tmp_path_factory.mktemp(model), seed=31, extent_km=2.4, overpasses=6)
    toml = archive.root / "run.toml"
    text = archive_toml(archive).replace('model = "rdndvi"', f'model = "{model}"')
    toml.write_text(text + 'formats = ["parquet"]\n', encoding="utf-8")
    made = plan(load_config(toml))

    assert run(made, progress=False).complete

    inventory = open_inventory(archive.root).isel(epoch=0)
    observed = inventory["observability"] == 3
    probability = inventory["probability"].where(observed)
    assert float(observed.mean()) > 0.01
    assert 0 <= float(probability.min()) < float(probability.max()) <= 1
    assert made.model.card.address == f"{model}@1"
    assert (made.workspace.models / f"{model}@1" / "card.toml").is_file()


@pytest.mark.slow
def test_one_command_makes_document_pictures_and_models(tmp_path, capsys):
    page = tmp_path / "docs" / "networks.md"
    page.parent.mkdir()
    page.write_text("# old\n\n## Reading\n\nBy hand.\n", encoding="utf-8")
    command = [
        str(page),
        "--small",
        "--out",
        str(tmp_path / "keep"),
        "--ship",
        str(tmp_path / "ship"),
        "--workers",
        "1",
    ]

    assert networks.main(command) == 0
    text = page.read_text(encoding="utf-8")
    assert networks.main(command) == 0, "what is there is kept"

    assert page.read_text(encoding="utf-8") == text
    assert "SIMULATED" in text
    assert text.endswith("## Reading\n\nBy hand.\n")
    assert {path.name for path in (page.parent / "images").iterdir()} == {
        "networks-diagram.png",
        "networks-maps.png",
    }
    assert {path.name for path in (tmp_path / "ship").iterdir()} == {
        "sim-small@1",
        "sim-ensemble@1",
        "sim-post@1",
    }
    assert "best on validation" in capsys.readouterr().out
