"""What becomes of a run and a profile before anything is sent."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from slidecube.cluster import slurm
from slidecube.cluster.resources import StageRequest, load_profile, read_profile
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.estimate import Estimate
from slidecube.pipeline.open import open_plan
from slidecube.pipeline.queue import SentJob, Submission, jobs_of, record_submission
from slidecube.pipeline.submit import fit_workers, stage_profile


def cost(*, peak: float = 2.0, thread: float = 0.5, fit: float = 0.0) -> Estimate:
    return Estimate(
        tiles=4, scenes=10, scene_reads=40, max_dates=5, read_gb=1, stored_gb=1, files=10, peak_mem_gb=peak,
        thread_mem_gb=thread, fit_mem_gb=fit, cpu_hours=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "asked", "fit", "expected"),
    [
        ("cube", {"cpus": 4, "mem_gb": 16}, 0, (4, 1, 3.82)),  # a process a core where they fit
        ("cube", {"cpus": 4, "mem_gb": 6}, 0, (2, 2, 2.65)),  # fewer, with more threads each
        ("cube", {"cpus": 4, "mem_gb": 3.3}, 0, (1, 2, 2.59)),  # one, with fewer threads than cores
        ("fit", {"cpus": 4, "mem_gb": 16}, 10.0, (3, 1, 2.0)),  # beside the process that learns
        ("detect", {"cpus": 8, "mem_gb": 16, "gpus": 2}, 0, (2, 4, 7.65)),  # a process a GPU
        ("detect", {"cpus": 4, "mem_gb": 4, "runner": "threads"}, 0, (1, 4, 4.0)),
        ("mosaic", {"cpus": 4, "mem_gb": 4}, 0, (1, 1, 4.0)),
    ],
)
def test_as_many_workers_as_the_memory_of_a_job_holds(stage, asked, fit, expected):
    assert fit_workers(stage, StageRequest(**asked), cost(fit=fit)) == pytest.approx(expected)


def test_a_job_in_which_no_tile_fits_is_refused():
    with pytest.raises(
        PipelineError, match=r"2\.7 GB of a job of stage cube exceeds its mem_gb=2\.5; raise .*array\.cube"
    ):
        fit_workers("cube", StageRequest(cpus=4, mem_gb=2.5), cost())


@pytest.mark.parametrize(
    ("stage", "asked", "runner"),
    [
        ("cube", {}, "dask-local"),
        ("detect", {"gpus": 1}, "dask-cuda"),
        ("detect", {"gpus": 1, "runner": "threads"}, "threads"),
        ("mosaic", {}, "threads"),
    ],
)
def test_the_profile_inside_a_job_can_be_read(tmp_path, stage, asked, runner):
    request = StageRequest(time_min=60, **asked)
    path = tmp_path / "stage.toml"
    path.write_text(stage_profile(stage, request, cost(), deadline_min=240))
    inside = load_profile(str(path))
    assert inside.runner == runner
    assert inside.workers * inside.worker.cpus <= request.cpus
    assert inside.workers * inside.worker.mem_gb <= request.mem_gb
    assert inside.deadline_min == 60  # a tile may not outlast its job


@pytest.mark.parametrize("page", ["slurm.md", "pbs.md"])
def test_the_profile_on_a_page_is_one(repo_root, tmp_path, page):
    text = (repo_root / "deploy" / page).read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "mysite.toml"
    path.write_text(block)
    array = read_profile(str(path)).array
    assert array is not None
    assert array.system == page.removesuffix(".md")
    assert array.cube.shards == 8
    assert array.cube.account == "myproject"


@pytest.mark.parametrize("system", ["slurm", "pbs"])
def test_a_key_of_a_stage_leaves_its_others_as_they_are(tmp_path, system):
    path = tmp_path / "site.toml"
    path.write_text(f'extends = "{system}-array"\n[array.cube]\nmem_gb = 32\n[array.detect]\ngpus = 1\n')
    array = read_profile(str(path)).array
    assert array is not None
    assert (array.cube.mem_gb, array.cube.shards) == (32, 8)
    assert (array.detect.gpus, array.detect.shards) == (1, 4)


def test_a_walltime_that_is_over_before_it_begins_is_refused(desk, command):
    (desk.folder / "site.toml").write_text('extends = "slurm-array"\n[array.detect]\ntime_min = 5\n')
    refused = command("submit", desk.toml, "--profile", desk.folder / "site.toml", "--dry-run")
    assert refused.code == 1
    assert "Stage detect: time_min=5 leaves nothing before drain_s=300" in refused.refusal


def stand_in(folder: Path, name: str, text: str) -> None:
    """A program in place of one of Slurm's, for answers that a small Slurm does not give."""
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_more_shards_than_the_site_allows_become_fewer_with_more_tiles(programs, desk, command):
    stand_in(programs, "scontrol", "echo 'MaxArraySize            = 3'")
    stand_in(programs, "sbatch", "echo 'sbatch: Job 7 to start at noon' >&2")
    (desk.folder / "site.toml").write_text('extends = "slurm-array"\n[array.cube]\nshards = 100\n')

    shown = command("submit", desk.toml, "--profile", desk.folder / "site.toml", "--dry-run")

    assert shown.code == 0, shown
    assert (
        "note        cube: 3 shards instead of 12, each with more tiles: an array has at most 3 tasks"
        in shown.out
    )
    assert "#SBATCH --array=0-2\n" in shown.out
    assert "${SLURM_ARRAY_TASK_ID}/3" in shown.out
    assert "cube        Job 7 to start at noon" in shown.out


def test_scripts_for_pbs_are_written_with_the_lines_that_send_them(desk, command):
    (desk.folder / "site.toml").write_text('extends = "pbs-array"\n[array.cube]\nshards = 2\n')

    sent = command("submit", desk.toml, "--profile", desk.folder / "site.toml")

    assert sent.code == 0, sent
    scripts = {path.name: path for path in desk.workspace.glob("submits/*/*/*.sh")}
    assert sorted(scripts) == ["cube.sh", "detect.sh", "mosaic.sh"]
    assert f"cube=$(qsub {scripts['cube.sh']})" in sent.out
    assert f"mosaic=$(qsub -W depend=afterany:$detect {scripts['mosaic.sh']})" in sent.out
    assert scripts["cube.sh"].with_suffix(".toml").exists()
    assert (scripts["cube.sh"].parent / "logs").is_dir()
    assert not list(desk.workspace.glob("submits/*/latest.json"))


def test_nothing_secret_stands_in_scripts(desk, command, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "CDSE_PASSWORD"):
        monkeypatch.setenv(name, "sEcReT")
    shown = command("submit", desk.toml, "--profile", "slurm-array", "--dry-run")
    assert shown.code == 0, shown
    assert "sEcReT" not in shown.out + shown.err


def test_what_the_queue_has_forgotten_the_accounting_tells(programs, desk, command):
    assert command("plan", desk.toml).code == 0
    workspace = open_plan(desk.workspace).workspace
    jobs = (SentJob(stage="cube", id="7", tasks=4), SentJob(stage="mosaic", id="8", tasks=1))
    record_submission(
        workspace,
        Submission(
            run="r",
            system="slurm",
            profile="p",
            submitted_at="2026-01-01T00:00:00+00:00",
            folder="/f",
            jobs=jobs,
        ),
    )
    stand_in(programs, "squeue", "echo '7|3|RUNNING|None'; echo '8|N/A|PENDING|Dependency'")
    stand_in(
        programs,
        "sacct",
        "echo '7_0|COMPLETED'; echo '7_1|OUT_OF_MEMORY'; echo '7_2|CANCELLED by 1000'; echo '7_3|RUNNING'",
    )

    cube, mosaic = jobs_of(workspace, "r")

    assert cube == {
        "run": "r", "stage": "cube", "id": "7", "asked": True, "pending": 0, "running": 1, "done": 1, "failed": 2,
        "gone": 0, "reasons": ["out of memory", "cancelled"],
    }  # fmt: skip
    assert mosaic["pending"] == 1
    assert mosaic["reasons"] == ["Dependency"]
    assert [job["run"] for job in jobs_of(workspace, "another")] == ["r", "r"], (
        "they are at work in the workspace"
    )


def test_jobs_that_cannot_be_asked_about_may_be_there_still(programs, desk, command):
    """A second set of shards would stand in their way: a queue that does not answer is not an empty one."""
    (desk.folder / "site.toml").write_text('extends = "slurm-array"\n')
    send = ("submit", desk.toml, "--profile", desk.folder / "site.toml")
    stand_in(programs, "sbatch", "echo 7")
    assert command(*send).code == 0
    stand_in(
        programs, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    stand_in(programs, "sacct", "exit 1")

    refused = command(*send)

    assert refused.code == 1
    assert "Jobs 7 7 7 of run 'small-" in refused.refusal
    (record,) = desk.workspace.glob("submits/*/latest.json")
    assert f"remove {record} first" in refused.refusal
    shown = command("status", desk.workspace)
    assert shown.out.count("7: the queue does not answer") == 3
    record.unlink()
    assert command(*send).code == 0


def test_jobs_in_the_queue_are_watched_before_any_has_begun(programs, desk, command):
    """Pending on the first two looks, and gone on the third."""
    (desk.folder / "site.toml").write_text('extends = "slurm-array"\n')
    stand_in(programs, "sbatch", "echo 7")
    stand_in(programs, "sacct", "exit 1")
    looks = programs / "looks"
    stand_in(
        programs,
        "squeue",
        f"echo >> {looks}; [ $(wc -l < {looks}) -gt 2 ] || echo '7|N/A|PENDING|Priority'",
    )
    assert command("submit", desk.toml, "--profile", desk.folder / "site.toml").code == 0
    assert not looks.exists()

    watched = command("status", desk.workspace, "--watch", "--every", 1)

    assert watched.out.count("7: 1 pending (Priority)") == 2 * 3, "three stages, of one id"
    assert watched.out.count("7: not known to the queue any more") == 3


@pytest.mark.parametrize(
    ("squeue", "expected"),
    [
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", []),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None),
    ],
)
def test_a_queue_that_knows_nothing_is_not_one_that_does_not_answer(programs, squeue, expected):
    stand_in(programs, "squeue", squeue)
    stand_in(programs, "sacct", "exit 1")
    assert slurm.queued(["7"]) == expected


def test_a_job_goes_on_with_its_plan_whatever_became_of_the_toml(desk, command):
    """Edited while the jobs were waiting: they do what was submitted, and search for nothing."""
    assert command("plan", desk.toml).code == 0
    before = open_plan(desk.workspace).run
    desk.write(cube={"max_cloud_pct": 37.0})

    ran = command("cube", desk.toml, "--plan", before, "--quiet")

    assert ran.code == 0, ran
    assert f"run         {before}" in ran.out
    assert [path.name for path in (desk.workspace / "plans").iterdir() if path.is_dir()] == [before]
    other = command("cube", desk.toml, "--plan", "another", "--quiet")
    assert other.code == 1
    assert "No plan 'another'" in other.refusal


def test_a_damaged_record_of_a_submission_says_nothing(desk, command):
    assert command("plan", desk.toml).code == 0
    workspace = open_plan(desk.workspace).workspace
    place = desk.workspace / "submits" / "r" / "latest.json"
    place.parent.mkdir(parents=True)
    place.write_text("{half")
    assert jobs_of(workspace, "r") == []
    place.write_text(json.dumps({"jobs": []}))
    assert jobs_of(workspace, "r") == []
