"""The ablation: its map of clusters is what the pipeline detects with, and its document says what its table does."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from slidecube.pipeline.config import load_config
from slidecube.pipeline.demo import archive_toml
from slidecube.pipeline.detect import without_small
from slidecube.pipeline.open import open_inventory
from slidecube.pipeline.plan import plan
from slidecube.pipeline.run import run
from slidecube.pipeline.run_plan import minimum_size_px
from slidecube.pipeline.simulate import ablation
from slidecube.pipeline.simulate.archive import simulate_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(tmp_path_factory.mktemp("ablation"), seed=91, size="small", overpasses=2)


@pytest.mark.slow
def test_the_map_of_clusters_is_what_the_pipeline_detects_with(archive):
    toml = archive.root / "named.toml"
    model = 'model = "kmeans-change"\nparameters = { sample = 3000 }'
    text = archive_toml(archive).replace('model = "rdndvi"', model)
    toml.write_text(text, encoding="utf-8")
    key = plan(load_config(toml)).epochs[0].stat_key
    chosen = f'{model}\nlandslide_clusters = {{ "{key}" = [0, 2] }}'
    toml.write_text(text.replace(model, chosen), encoding="utf-8")
    made = plan(load_config(toml))
    assert run(made, progress=False).complete
    inventory = open_inventory(archive.root).isel(epoch=0)
    seen = ablation.detection_of(archive, made).observed
    a = archive.geobox.affine
    x = a.c + a.a * (np.arange(archive.geobox.shape[1]) + 0.5)
    y = a.f + a.e * (np.arange(archive.geobox.shape[0]) + 0.5)
    landslide = inventory["landslide"].sel(x=x, y=y).to_numpy() == 1

    clusters = ablation.cluster_map(archive, made)

    minimum_px = minimum_size_px(made.model.card.min_area_m2, made.grid.resolution_m)
    assert landslide.any()
    assert np.array_equal(without_small(np.isin(clusters, (0, 2)) & seen, minimum_px), landslide)


@pytest.mark.slow
def test_the_best_cluster_is_the_best(archive):
    table = ablation.ablation(ablation.VARIANTS[:2], seeds=[91], size="small", sample=3000.0, overpasses=2)

    rule, kmeans = (table[table["variant"] == v.label].iloc[0] for v in ablation.VARIANTS[:2])
    assert np.isnan(rule["best_px_f1"])
    assert kmeans["best_px_f1"] >= kmeans["px_f1"] or "," in kmeans["named"]
    assert 0 < kmeans["share_of_best"] < 1


def row(seed: int, label: str, named: str | float, f1: float) -> dict:
    scores = {f"{p}px_{n}": f1 for p in ("", "best_") for n in ablation._PIXELS}
    scores |= {f"{p}object_{n}": f1 for p in ("", "best_") for n in ablation._OBJECTS}
    return {"seed": seed, "variant": label, **scores, "named": named, "best": 3, "share_of_best": 0.17}


def test_the_document_says_the_table_and_keeps_what_a_person_wrote(tmp_path, monkeypatch, capsys):
    table = pd.DataFrame(
        [
            row(s, label, named, 0.1 * (s + 1))
            for s in (0, 1)
            for label, named in (("rule", np.nan), ("x", "1, 2"))
        ]
    )
    table.loc[table["variant"] == "x", "px_precision"] = [np.nan, 0.25]
    monkeypatch.setattr(ablation, "ablation", lambda *, seeds: table)
    path = tmp_path / "ablation.md"
    path.write_text("old\n\n## Reading\n\nIt fails.\n", encoding="utf-8")

    assert ablation.main([str(path), "0", "1"]) == 0

    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n## Reading\n\nIt fails.\n")
    assert "old" not in text
    assert "**SIMULATED data**, archives of the seeds 0, 1" in text
    assert "| x | 0.250 (0.250 to 0.250) | 0.150 (0.100 to 0.200) |" in text
    assert "| x | 1, 2; 3 (17 %) | 1, 2; 3 (17 %) |" in text
    assert "| rule |" not in text.split("## What the best single")[1]
    assert capsys.readouterr().out in text


def test_it_says_how_it_is_called(capsys):
    assert ablation.main([]) == 1
    assert "usage:" in capsys.readouterr().err
