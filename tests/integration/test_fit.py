"""The fit: once, frozen, resumed where it was killed; what is due when a model, a cluster or a scene changes."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from slidecube.pipeline.open import open_inventory, open_plan
from slidecube.pipeline.statistics import load_statistics, read_manifest
from slidecube.pipeline.store import open_layer

QUICK = {"sample": 4000, "epochs": 3, "batch": 1000}
BANDS = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]


@pytest.fixture(scope="module")
def cubed(desk_in, tmp_path_factory):
    """A desk whose cubes are made, and nothing else."""
    folder = tmp_path_factory.mktemp("cubed") / "desk"
    made = desk_in(folder, cube={"bands": BANDS}, detect={"model": "cae-kmeans", "parameters": QUICK})
    assert made.cli("cube", made.toml, "--quiet").code == 0
    return made


@pytest.fixture
def cae(cubed, tmp_path):
    """A copy of it, with a model that learns from the cube."""
    folder = tmp_path / "desk"
    shutil.copytree(cubed.folder, folder)
    return dataclasses.replace(cubed, folder=folder, sections=copy.deepcopy(cubed.sections)).write()


def status(command, desk) -> dict:
    return json.loads(command("status", desk.workspace, "--json").out)


def statistics(desk):
    plan = open_plan(desk.workspace)
    return plan.workspace.statistics(plan.epochs[0].stat_key)


def told(desk, before: list[dict]) -> dict[str, int]:
    """How many tasks of each stage were told of since."""
    tasks = [e["stage"] for e in desk.events() if e["event"] == "task" and e not in before]
    return {stage: tasks.count(stage) for stage in sorted(set(tasks))}


def test_the_fit_is_a_stage_of_its_own(cae, command):
    early = command("detect", cae.toml, "--quiet")
    assert early.code == 1
    assert "run `slidecube fit` first" in early.refusal

    fit = command("fit", cae.toml, "--quiet")

    assert fit.code == 0, fit.err
    assert "named by rule" in fit.out
    state = status(command, cae)
    assert state["tiles"]["fit"] == {"done": 1, "due": 0, "failed": 0, "running": 0}
    assert state["statistics"][0]["frozen"]
    assert (statistics(cae) / "sheet" / "index.html").is_file()
    assert command("run", cae.toml, "--quiet").code == 0
    assert status(command, cae)["complete"]


def test_a_second_run_fits_nothing_again(cae, command):
    assert command("run", cae.toml, "--quiet").code == 0
    before, seen = cae.files("statistics"), cae.events()
    assert command("run", cae.toml, "--quiet").code == 0
    assert cae.files("statistics") == before
    assert told(cae, seen) == {}


def test_another_model_reads_no_scene_again(cae, command):
    assert command("run", cae.toml, "--quiet").code == 0
    reads, seen = status(command, cae)["scene_reads"], cae.events()
    for change in (
        {"parameters": {**QUICK, "k": 3}},
        {"model": "cae-kmeans-change"},
        {"model": "kmeans", "parameters": {"sample": 4000}},
        {"model": "rdndvi", "parameters": None},
    ):
        cae.write(detect=change)
        assert command("run", cae.toml, "--quiet").code == 0
    assert status(command, cae)["scene_reads"] == reads > 0
    assert "cube" not in told(cae, seen)


def test_a_person_overrules_the_rule_and_only_what_follows_runs_again(cae, command):
    assert command("run", cae.toml, "--quiet").code == 0
    before, seen = cae.files("statistics", "layers"), cae.events()
    ruled = open_inventory(cae.workspace)["probability"].values
    shown = {}
    for clusters in ([0], [1, 2], [], [0, 1, 2, 3]):
        cae.write(detect={"landslide_clusters": clusters})
        done = command("run", cae.toml, "--quiet")
        assert done.code == 0, done.err
        assert f"landslide = {', '.join(map(str, clusters)) or 'none'} (named by person)" in done.out
        shown[tuple(clusters)] = open_inventory(cae.workspace)["probability"].values
    assert cae.files("statistics", "layers") == before
    assert set(told(cae, seen)) == {"detect"}
    seen_px = np.isfinite(ruled)
    assert seen_px.any()
    for values in shown.values():
        np.testing.assert_array_equal(np.isfinite(values), seen_px)
    assert (shown[()][seen_px] == 0).all()
    assert (shown[0, 1, 2, 3][seen_px] == 1).all()
    overlap = (shown[(0,)] >= 0.5) & (shown[1, 2] >= 0.5)
    assert not overlap[seen_px].any(), "a pixel has one cluster"


@pytest.mark.parametrize(
    ("detect", "says"),
    [
        ({"landslide_clusters": [4]}, "clusters 0 to 3; got 4"),
        ({"landslide_clusters": [1, 1]}, "named twice"),
        ({"landslide_clusters": [-1]}, "landslide_clusters"),
        ({"model": "rdndvi", "parameters": None, "landslide_clusters": [1]}, "does not cluster"),
        ({"parameters": {"k": 9}}, "k=9"),
    ],
)
def test_impossible_clusters_are_refused_before_anything_runs(cae, command, detect, says):
    cae.write(detect=detect)
    refused = command("run", cae.toml)
    assert refused.code == 1
    assert says in refused.refusal
    assert "statistics" not in {path.name for path in cae.workspace.iterdir()}


def test_statistics_that_were_fitted_earlier_are_used_as_they_are(cae, command):
    assert command("run", cae.toml, "--quiet").code == 0
    key = statistics(cae).name
    frozen, seen = cae.files("statistics"), cae.events()

    cae.write(fit={"statistics": key}, epoch={"post": ["2018-09-07", "2018-10-20"]})
    assert command("run", cae.toml, "--quiet").code == 0

    assert cae.files("statistics") == frozen, "nothing was fitted to the other window"
    assert statistics(cae).name == key
    assert told(cae, seen)["detect"] == 4
    cae.write(fit={"statistics": "0123456789abcdef"})
    unknown = command("run", cae.toml, "--quiet")
    assert unknown.code == 1
    assert f"there are: {key}" in unknown.refusal
    cae.write(fit={"statistics": key}, detect={"model": "cae-kmeans-change"})
    other = command("run", cae.toml, "--quiet")
    assert other.code == 1
    assert "were fitted for cae-kmeans@1" in other.refusal


def test_damaged_statistics_are_named_and_come_back(cae, command):
    assert command("run", cae.toml, "--quiet").code == 0
    folder = statistics(cae)
    weights = folder / "model" / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    cae.write(detect={"threshold": 0.6})
    damaged = command("run", cae.toml, "--quiet")
    assert damaged.code == 2
    assert "weights.safetensors is not what was frozen" in damaged.refusal
    weights.write_bytes(whole)
    assert command("run", cae.toml, "--quiet").code == 0


def test_a_single_image_needs_no_scene_from_before(cae, command):
    assert command("run", cae.toml, "--quiet").code == 0
    both = status(command, cae)["scene_reads"]
    judged = open_inventory(cae.workspace)["observability"].values

    alone = cae.write(output={"workspace": "alone"}, epoch={"pre": None})
    assert command("run", alone.toml, "--quiet").code == 0

    state = json.loads(command("status", alone.folder / "alone", "--json").out)
    assert state["complete"]
    assert 0 < state["scene_reads"] < both
    again = open_inventory(alone.folder / "alone")
    np.testing.assert_array_equal(again["observability"].values, judged)
    assert np.isin(again["reason"].values, (0, 2, 4, 5)).all(), "never for want of a scene from before"
    alone.write(detect={"model": "rdndvi", "parameters": None})
    refused = command("run", alone.toml)
    assert refused.code == 1
    assert "epoch 'event' has no pre window" in refused.refusal


def test_a_killed_fit_ends_as_if_it_had_not_been(cae, tmp_path, command):
    """Killed at several moments between the first moments and the freeze, and then run to its end."""
    long = {**QUICK, "epochs": 60}
    cae.write(detect={"parameters": long})
    shutil.copytree(cae.folder, tmp_path / "other")
    undisturbed = dataclasses.replace(cae, folder=tmp_path / "other")
    assert command("run", undisturbed.toml, "--quiet").code == 0
    for wanted in ("moments/*.json", "sample/*.npz", "training-*.safetensors", "model/*"):
        process = cae.start("fit", cae.toml, "--quiet")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if list((cae.workspace / "statistics").glob(f"*/{wanted}")):
                break
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    assert command("run", cae.toml, "--quiet").code == 0

    kept = "statistics", "inventories"
    one, two = cae.files(*kept), undisturbed.files(*kept)
    volatile = (".ledger/",)
    names = {n for n in one if not any(v in n for v in volatile)}
    assert names == {n for n in two if not any(v in n for v in volatile)}
    assert {n: one[n] for n in names} == {n: two[n] for n in names}


def test_what_was_learnt_is_what_the_cube_holds(cae, command):
    """Means and eigenvalues of the frozen MNF against plain numpy over the stored layer."""
    assert command("run", cae.toml, "--quiet").code == 0
    plan = open_plan(cae.workspace)
    epoch = plan.epochs[0]
    found = load_statistics(plan.workspace.statistics(epoch.stat_key), plan.model)
    stored = open_layer(plan.workspace.layer(plan.grid, epoch.post), tiles=list(plan.tiles))
    inventory = open_inventory(cae.workspace)
    inside = inventory["observability"].isel(epoch=0).values >= 2
    values = np.stack([stored[b].values for b in BANDS]).astype(float)
    known = (values != 0).all(axis=0) & inside

    assert found.pixels == known.sum()
    np.testing.assert_allclose(found.mnf["post"].mean, values[:, known].mean(axis=1), rtol=1e-12)
    pairs = known[:-1, :-1] & known[1:, 1:]
    noise = np.cov((values[:, :-1, :-1] - values[:, 1:, 1:])[:, pairs]) / 2
    eigenvalues = np.linalg.eigvals(np.linalg.solve(noise, np.cov(values[:, known]))).real
    np.testing.assert_allclose(found.mnf["post"].eigenvalues, np.sort(eigenvalues)[::-1], rtol=1e-6)
    assert read_manifest(plan.workspace.statistics(epoch.stat_key))["pixels"] == known.sum()


def test_tiles_that_were_mended_after_the_freeze_are_told(cae, command):
    cae.write(cluster={"failure_budget": 1})
    plan = open_plan(cae.workspace)
    layer = plan.epochs[0].post
    record = plan.workspace.layer(plan.grid, layer).with_suffix(".ledger") / f"{plan.tiles[0].key}.json"
    kept = record.read_text()
    record.unlink()
    assert command("fit", cae.toml, "--quiet").code == 0
    assert plan.tiles[0].key not in read_manifest(statistics(cae))["contributed"]
    record.write_text(kept)

    assert status(command, cae)["statistics"][0]["repaired_tiles"] == [plan.tiles[0].key]

    cae.write(cluster={"failure_budget": 0}, detect={"parameters": {**QUICK, "k": 2}})
    assert command("plan", cae.toml).code == 0
    record.unlink()
    lacking = command("fit", cae.toml, "--quiet")
    assert lacking.code == 2
    assert "not fitted" in lacking.refusal
