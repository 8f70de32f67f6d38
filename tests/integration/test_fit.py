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
KEY = "0123456789abcdef"
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
    key, shown = statistics(cae).name, {}
    sheet = (statistics(cae) / "sheet" / "index.html").read_text(encoding="utf-8")
    assert f'landslide_clusters = {{ "{key}" = [' in sheet, "the sheet says what to write"
    for clusters in ([0], [1, 2], [], [0, 1, 2, 3]):
        cae.write(detect={"landslide_clusters": {key: clusters}})
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
        ({"landslide_clusters": {KEY: [4]}}, "clusters 0 to 3; got 4"),
        ({"landslide_clusters": {KEY: [1, 1]}}, "named twice"),
        ({"landslide_clusters": {KEY: [-1]}}, "landslide_clusters"),
        ({"landslide_clusters": {"mine": [1]}}, "landslide_clusters"),
        ({"landslide_clusters": [1]}, "landslide_clusters"),
        ({"landslide_clusters": {KEY: [1]}}, f"names the fit {KEY}, and this plan uses"),
        ({"model": "rdndvi", "parameters": None, "landslide_clusters": {KEY: [1]}}, "does not cluster"),
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
    for changes in (
        {"sun": {"correction": "scs+c"}},
        {"sun": {"min_elevation_deg": 0}},
        {"composite": "median"},
    ):
        cae.write(fit={"statistics": key}, detect={"model": "cae-kmeans"}, cube=changes)
        elsewhere = command("run", cae.toml, "--quiet")
        assert elsewhere.code == 1
        assert f"were fitted to another cube: {next(iter(changes))} =" in elsewhere.refusal


@pytest.mark.slow
def test_damaged_statistics_are_named_and_come_back(cae, command):
    assert command("run", cae.toml, "--quiet").code == 0
    folder = statistics(cae)
    weights = folder / "model" / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    cae.write(detect={"threshold": 0.6})
    damaged = command("run", cae.toml, "--quiet")
    assert damaged.code == 2, damaged.err
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
    np.testing.assert_allclose(found.mnf["post"].whole.mean, values[:, known].mean(axis=1), rtol=1e-12)
    pairs = known[:-1, :-1] & known[1:, 1:]
    noise = np.cov((values[:, :-1, :-1] - values[:, 1:, 1:])[:, pairs]) / 2
    eigenvalues = np.linalg.eigvals(np.linalg.solve(noise, np.cov(values[:, known]))).real
    np.testing.assert_allclose(found.mnf["post"].whole.eigenvalues, np.sort(eigenvalues)[::-1], rtol=1e-6)
    assert read_manifest(plan.workspace.statistics(epoch.stat_key))["pixels"] == known.sum()


@pytest.mark.slow
def test_tiles_that_were_mended_after_the_freeze_are_told_and_fitted_again(cae, command):
    cae.write(cluster={"failure_budget": 1})
    plan = open_plan(cae.workspace)
    first = plan.tiles[0].key
    record = plan.workspace.layer(plan.grid, plan.epochs[0].post).with_suffix(".ledger") / f"{first}.json"
    kept = record.read_text()
    record.unlink()
    early = command("fit", cae.toml, "--quiet")
    assert early.code == 2
    assert "run `slidecube cube`" in early.refusal, "a tile that was not tried yet is no failure"
    record.write_text(json.dumps({**json.loads(kept), "state": "failed", "reason": "disk on fire"}))
    assert command("fit", cae.toml, "--quiet").code == 0
    frozen = read_manifest(statistics(cae))
    assert first not in frozen["contributed"]
    record.write_text(kept)

    assert status(command, cae)["statistics"][0]["repaired_tiles"] == [first]
    assert command("run", cae.toml, "--quiet").code == 0
    seen = cae.events()

    again = command("fit", cae.toml, "--again", "--quiet")

    assert again.code == 0, again.err
    assert status(command, cae)["statistics"][0]["repaired_tiles"] == []
    assert read_manifest(statistics(cae))["pixels"] > frozen["pixels"]
    assert command("run", cae.toml, "--quiet").code == 0
    assert told(cae, seen)["detect"] == len(plan.tiles), "what was learnt anew makes the detection due"
    cae.write(cluster={"failure_budget": 0}, detect={"parameters": {**QUICK, "k": 2}})
    record.write_text(json.dumps({**json.loads(kept), "state": "failed", "reason": "disk on fire"}))
    lacking = command("fit", cae.toml, "--quiet")
    assert lacking.code == 2
    assert "not fitted" in lacking.refusal


@pytest.mark.slow
def test_a_cut_off_file_of_a_step_is_made_again(cae, command):
    cae.write(detect={"parameters": {**QUICK, "epochs": 60}})
    process = cae.start("fit", cae.toml, "--quiet")
    deadline = time.monotonic() + 120
    while not list((cae.workspace / "statistics").glob("*/training-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for wanted in ("moments/*.json", "sample/*.npz"):
        path = next((cae.workspace / "statistics").glob(f"*/{wanted}"))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    done = command("fit", cae.toml, "--quiet")

    assert done.code == 0, done.err
    assert not list(statistics(cae).glob("training-*"))
    assert not any("training" in name for name in read_manifest(statistics(cae))["files"])


def test_the_smallest_area_is_a_part_of_the_naming_and_so_of_the_fit(cae, command):
    assert command("fit", cae.toml, "--quiet").code == 0
    one = statistics(cae).name
    cae.write(detect={"min_area_m2": 20000})
    assert command("fit", cae.toml, "--quiet").code == 0
    assert statistics(cae).name != one
    cae.write(detect={"min_area_m2": None, "threshold": 0.7})
    assert command("plan", cae.toml).code == 0
    assert statistics(cae).name == one, "the threshold is not"


def test_statistics_of_another_cube_are_refused(cae, command):
    assert command("fit", cae.toml, "--quiet").code == 0
    cae.write(fit={"statistics": statistics(cae).name}, cube={"composite": "median"})
    refused = command("plan", cae.toml)
    assert refused.code == 1
    assert "composite = 'greenest', not 'median'" in refused.refusal


def test_a_training_that_diverges_is_one_line(cae, command):
    cae.write(detect={"parameters": {**QUICK, "epochs": 30, "learning_rate": 1e30}})
    refused = command("fit", cae.toml, "--quiet")
    assert refused.code == 1
    assert "lower learning_rate" in refused.refusal
