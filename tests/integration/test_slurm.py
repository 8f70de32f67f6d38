"""A run as arrays of jobs on a real Slurm of two nodes: the same products, and what status says meanwhile."""

from __future__ import annotations

import json

import pytest

from slidecube.pipeline.open import open_plan
from slidecube.pipeline.tasks import tasks_of

SITE = """
extends = "slurm-array"

[array]
drain_s = 30

[array.cube]
cpus = 1
mem_gb = 3
time_min = 10
shards = 2
at_once = 2

[array.fit]
cpus = 1
mem_gb = 3
time_min = 10

[array.detect]
cpus = 1
mem_gb = 3
time_min = 10
shards = 2
gpus = 1
runner = "threads"

[array.mosaic]
cpus = 1
mem_gb = 3
time_min = 10
"""

BANDS = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
PRODUCTS = {"formats": ["parquet", "gpkg", "cog", "stac"]}
LEARNT = {
    "cube": {"bands": BANDS},
    "detect": {"model": "cae-kmeans", "parameters": {"sample": 2000, "epochs": 2, "batch": 1000}},
}


def submit(desk, *options):
    (desk.folder / "site.toml").write_text(SITE)
    return desk.cli("submit", desk.toml, "--profile", desk.folder / "site.toml", *options)


def status(desk):
    return json.loads(desk.cli("status", desk.workspace, "--json").out)


def logs(desk) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(desk.workspace.glob("submits/*/*/logs/*.log"))}


@pytest.mark.parametrize(
    "changes", [{}, pytest.param(LEARNT, marks=pytest.mark.slow)], ids=["rule", "learnt"]
)
def test_arrays_of_jobs_make_what_threads_make(slurm, desk_in, tmp_path, assert_same_work, changes):
    plain = desk_in(tmp_path / "plain", output=PRODUCTS, **changes)
    assert plain.cli("run", plain.toml, "--quiet").code == 0
    desk = desk_in(tmp_path / "a site's folder", output=PRODUCTS, **changes)

    sent = submit(desk)

    assert sent.code == 0, sent
    stages = ["cube", *["fit"] * bool(changes), "detect", "mosaic"]
    jobs = json.loads(next(desk.workspace.glob("submits/*/latest.json")).read_text())["jobs"]
    assert [job["stage"] for job in jobs] == stages
    assert [job["id"] in sent.out for job in jobs] == [True] * len(stages)

    before = status(desk)["jobs"]
    again = submit(desk)
    assert again.code == 1
    assert f"scancel {jobs[0]['id']}" in again.refusal
    assert before[0]["pending"] + before[0]["running"] + before[0]["done"] == 2
    assert before[-1]["pending"] == 1
    assert before[-1]["reasons"] == ["Dependency"]

    slurm.wait(timeout_s=170)

    assert {job["state"] for job in slurm.jobs() if job["job"] in {j["id"] for j in jobs}} == {"COMPLETED"}, (
        logs(desk)
    )
    assert {job["node"] for job in slurm.jobs() if job["job"] == jobs[0]["id"]} == {"n1", "n2"}
    now = status(desk)
    assert now["complete"]
    assert [job["done"] for job in now["jobs"]] == [2, *[1] * bool(changes), 2, 1]
    assert_same_work(desk.workspace, plain.workspace)
    assert sorted(logs(desk)) == sorted(
        [f"cube-{i}.log" for i in range(2)]
        + [f"detect-{i}.log" for i in range(2)]
        + ["fit.log"] * bool(changes)
        + ["mosaic.log"]
    )
    assert not list(desk.workspace.glob("locks/*.json"))

    nothing = submit(desk)
    assert nothing.code == 0, nothing
    assert "nothing is due" in nothing.out


@pytest.mark.slow
def test_only_what_is_due_is_submitted(slurm, desk):
    """A detection of one tile is lost: its shard, and the collector."""
    assert desk.cli("run", desk.toml, "--quiet").code == 0
    made = open_plan(desk.workspace)
    lost = made.tiles[1].key
    forget(desk, lost)

    shown = submit(desk, "--dry-run")
    sent = submit(desk)

    assert "# ---- detect.sh" in shown.out
    assert "# ---- cube.sh" not in shown.out
    assert "#SBATCH --array=1\n" in shown.out
    assert sent.code == 0, sent
    slurm.wait()
    assert status(desk)["complete"]
    assert [job["stage"] for job in status(desk)["jobs"]] == ["detect", "mosaic"]


def forget(desk, tile: str) -> None:
    for task, ledger in tasks_of(open_plan(desk.workspace), "detect"):
        if task.tile == tile:
            ledger.forget(tile)


def test_a_dry_run_sends_nothing(slurm, desk):
    shown = submit(desk, "--dry-run")
    assert shown.code == 0, shown
    assert "#SBATCH --array=0-1%2" in shown.out
    assert slurm.jobs() == [] or {job["state"] for job in slurm.jobs()} <= {
        "COMPLETED",
        "CANCELLED",
        "FAILED",
    }
    assert not (desk.workspace / "submits").exists()
    assert not (desk.workspace / "layers").exists()


def test_what_slurm_refuses_is_one_line_and_nothing_is_left_in_the_queue(slurm, desk):
    (desk.folder / "site.toml").write_text(
        SITE.replace("[array.mosaic]", '[array.mosaic]\npartition = "moon"')
    )
    refused = desk.cli("submit", desk.toml, "--profile", desk.folder / "site.toml")
    assert refused.code == 1
    assert "Stage mosaic is not submitted, and no other is" in refused.refusal
    assert "invalid partition" in refused.refusal
    assert all(job["state"] not in {"PENDING", "RUNNING"} for job in slurm.jobs())


def test_a_tile_that_does_not_fit_its_job_is_refused(desk):
    (desk.folder / "site.toml").write_text(SITE.replace("mem_gb = 3", "mem_gb = 0.8"))
    refused = desk.cli("submit", desk.toml, "--profile", desk.folder / "site.toml", "--dry-run")
    assert refused.code == 1
    assert "of a job of stage cube exceeds its mem_gb=0.8" in refused.refusal


def test_a_profile_that_is_no_array_is_refused(desk):
    refused = desk.cli("submit", desk.toml, "--profile", "threads")
    assert refused.code == 1
    assert "arrays: pbs-array, slurm-array" in refused.refusal


def test_status_answers_without_a_queue_and_submit_refuses(slurm, desk, monkeypatch):
    assert submit(desk).code == 0
    with monkeypatch.context() as without:
        without.setenv("PATH", "/nowhere")
        state = status(desk)
        text = desk.cli("status", desk.workspace).out
        again = submit(desk)
    assert [(job["asked"], job["gone"]) for job in state["jobs"]] == [(False, 0)] * 3
    assert text.count("the queue does not answer") == 3
    assert again.code == 1
    assert "Slurm cannot be asked" in again.refusal


def test_dask_workers_as_jobs_make_what_threads_make(slurm, desk_in, tmp_path, assert_same_work):
    plain = desk_in(tmp_path / "plain", output=PRODUCTS)
    assert plain.cli("run", plain.toml, "--quiet").code == 0
    desk = desk_in(tmp_path / "desk", output=PRODUCTS)
    (desk.folder / "site.toml").write_text(
        f"""
extends = "slurm"
workers = 2
threads_per_worker = 1
mem_gb = 3
time_min = 10

[jobqueue]
interface = "lo"
logs = "{desk.folder / "logs"}"
wait_min = 2
"""
    )

    ran = desk.cli("run", desk.toml, "--quiet", "--profile", desk.folder / "site.toml")

    assert ran.code == 0, (ran, [path.read_text()[-1500:] for path in (desk.folder / "logs").glob("*")])
    assert {job["node"] for job in slurm.jobs() if job["name"] == "slidecube"} == {"n1", "n2"}
    assert_same_work(desk.workspace, plain.workspace)
    slurm.wait(timeout_s=30)
