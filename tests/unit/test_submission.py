"""A submission is whole or nothing, whatever becomes of the scheduler, the disk or us in its midst."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest

from slidecube.cluster import slurm
from slidecube.pipeline import submit
from slidecube.pipeline.config import load_config
from slidecube.pipeline.errors import InUseError, PipelineError
from slidecube.pipeline.open import open_plan
from slidecube.pipeline.queue import SentJob, Submission, jobs_of, record_submission
from slidecube.pipeline.status import under_way

SLURM = {
    "sbatch": """
name=$(grep -o 'job-name=.*' "${!#}" | cut -d= -f2)
[ ! -e {box}/before ] || . {box}/before
exec 9> {box}/lock; flock 9
id=$((100 + $(cat {box}/count 2> /dev/null || echo 0) + 1)); echo $((id - 100)) > {box}/count
echo "$id|$name" >> {box}/queue
flock -u 9
[ ! -e {box}/after ] || . {box}/after
echo $id
""",
    "squeue": """
touch {box}/queue
for word in "$@"; do case $word in
  --name=*) for name in $(echo "${word#--name=}" | tr , ' '); do grep "|$name\\$" {box}/queue; done; exit 0 ;;
esac; done
while IFS='|' read -r id name; do echo "$id|N/A|PENDING|Priority"; done < {box}/queue
""",
    "scancel": """
for id in "$@"; do sed -i "/^$id|/d" {box}/queue; echo "$id" >> {box}/cancelled; done
""",
    "sacct": "exit 1",
    "scontrol": "exit 1",
}
"""A Slurm that keeps its queue in a file; `before` and `after` are what happens around a submission."""


@pytest.fixture
def box(tmp_path, monkeypatch):
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in SLURM.items():
        (folder / name).write_text("#!/bin/bash\n" + text.replace("{box}", str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def queue(box):
    place = box / "queue"
    return place.read_text().splitlines() if place.exists() else []


@pytest.fixture
def words(desk):
    (desk.folder / "site.toml").write_text('extends = "slurm-array"\n')
    return ("submit", desk.toml, "--profile", desk.folder / "site.toml")


@pytest.mark.slow
def test_two_at_the_same_time_send_one_set(box, desk, command, words):
    """Both look at an empty queue; one of them waits with its first job for the other to look."""
    assert command("plan", desk.toml).code == 0
    (box / "before").write_text("sleep 1")
    both = [desk.start(*words) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert len(queue(box)) == 3, said
    assert sorted(process.returncode for process in both) == [0, 1]
    refusal = said[0][1] + said[1][1]
    assert "is in use by run" in refusal or "are queued or running in this workspace" in refusal


def test_the_queue_is_looked_at_again_before_anything_is_sent(box, desk, words):
    """As two submissions do that both saw an empty queue while they made their plans."""
    profile = str(words[-1])
    first, second = (submit.prepare(load_config(desk.toml), profile=profile) for _ in range(2))
    submit.send(first)
    with pytest.raises(PipelineError, match="are queued or running in this workspace: 101 102 103"):
        submit.send(second)
    assert len(queue(box)) == 3


def test_a_second_one_is_refused_while_the_first_sends(box, desk, words, monkeypatch):
    prepared = submit.prepare(load_config(desk.toml), profile=str(words[-1]))

    def meanwhile(*_, after):
        del after
        with pytest.raises(InUseError, match="is in use by run"):
            submit.send(prepared)
        return "7"

    monkeypatch.setattr(slurm, "submit", meanwhile)
    assert [job.id for job in submit.send(prepared).jobs] == ["7"] * 3


def test_a_signal_between_two_jobs_takes_the_first_back(box, command, words, monkeypatch):
    real = slurm.submit

    def stopped(script, *, after):
        if after:
            raise KeyboardInterrupt
        return real(script, after=after)

    monkeypatch.setattr(slurm, "submit", stopped)
    assert command(*words).code == 130
    assert (queue(box), (box / "cancelled").read_text()) == ([], "101\n")
    monkeypatch.setattr(slurm, "submit", real)
    assert command(*words).code == 0


def test_a_job_whose_id_was_never_recorded_is_found_by_its_name(box, desk, command, words):
    """What a submission leaves that is killed between Slurm's answer and its record."""
    prepared = submit.prepare(load_config(desk.toml), profile=str(words[-1]))
    jobs = tuple(SentJob(stage=e.stage, id="", tasks=1, name=e.job.name) for e in prepared.jobs)
    record_submission(prepared.made.workspace, replace(submit._submission(prepared, []), jobs=jobs))
    (box / "queue").write_text(f"101|{jobs[0].name}\n")
    refused = command(*words)
    assert "cancel them by `scancel 101`" in refused.refusal
    (box / "queue").write_text("")
    assert command(*words).code == 0


@pytest.mark.slow
def test_asked_to_end_between_two_jobs_it_takes_the_first_back(box, desk, command, words):
    assert command("plan", desk.toml).code == 0
    (box / "before").write_text(f"[ ! -s {box}/queue ] || {{ touch {box}/second; sleep 5; }}")
    process = desk.start(*words)
    deadline = time.monotonic() + 60
    while not (box / "second").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (box / "cancelled").read_text().split()[0] == "101"
    (box / "before").unlink()
    again = command(*words)
    assert again.code == 0, again
    assert len({name for _, name in (line.split("|") for line in queue(box))}) >= 3


def test_a_full_disk_leaves_no_job_behind(box, command, words, monkeypatch):
    real = submit.record_submission

    def full(workspace, sent):
        if sent.jobs[0].id:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "latest.json")
        real(workspace, sent)

    monkeypatch.setattr(submit, "record_submission", full)
    refused = command(*words)
    assert (refused.code, queue(box)) == (2, [])
    assert "No space left on device" in refused.refusal
    monkeypatch.setattr(submit, "record_submission", real)
    assert command(*words).code == 0


def test_a_job_that_was_taken_without_an_answer_is_found_by_its_name(box, command, words):
    (box / "after").write_text(
        "[ $id != 102 ] || { echo 'Socket timed out on send/recv operation' >&2; exit 1; }"
    )
    sent = command(*words)
    assert sent.code == 0, sent
    assert len(queue(box)) == 3
    assert "scancel 101 102 103" in sent.out


def test_no_answer_in_time_is_no_refusal(box, command, words, monkeypatch):
    monkeypatch.setattr(slurm, "_ANSWER_S", 2.0)
    (box / "after").write_text("[ $id != 102 ] || exec sleep 6")
    sent = command(*words)
    assert sent.code == 0, sent
    assert [line.split("|")[0] for line in queue(box)] == ["101", "102", "103"]


@pytest.mark.slow
def test_what_a_killed_submission_sent_is_found_by_the_next(box, desk, command, words):
    assert command("plan", desk.toml).code == 0
    (box / "after").write_text("kill -9 $PPID; sleep 1")
    assert desk.cli(*words).code == -signal.SIGKILL
    (record,) = desk.workspace.glob("submits/*/latest.json")
    assert [job["id"] for job in json.loads(record.read_text())["jobs"]] == ["", "", ""]
    (box / "after").unlink()

    refused = command(*words)

    assert refused.code == 1
    assert "cancel them by `scancel 101`" in refused.refusal
    state = json.loads(command("status", desk.workspace, "--json").out)
    assert [(job["id"], job["pending"]) for job in state["jobs"]] == [("101", 1)]
    subprocess.run(["scancel", "101"], check=True)
    assert command(*words).code == 0


def test_what_cannot_be_taken_back_is_named(box, command, words):
    (box / "before").write_text(f"[ ! -s {box}/queue ] || {{ echo no >&2; exit 1; }}")
    (box / "scancel").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    refused = command(*words)
    assert refused.code == 1
    assert "Stage detect is not submitted" in refused.refusal
    assert "cancel them by `scancel --name=slidecube-cube-" in refused.refusal


def test_jobs_of_another_cluster_are_asked_about_there(box, command, words):
    (box / "sbatch").write_text(f'#!/bin/bash\necho "$*" >> {box}/said\necho "7;north"\n')
    (box / "squeue").write_text(
        '#!/bin/bash\n[ "$3" = --name ] || [[ "$*" == *--clusters=north* ]] || exit 1\n'
        "echo 'CLUSTER: north'; echo '7|N/A|RUNNING|None'\n"
    )
    sent = command(*words)
    assert sent.code == 0, sent
    assert "`scancel --clusters=north 7`" in sent.out
    assert "--clusters=north --dependency=afterany:7" in (box / "said").read_text()
    assert [(task.job, task.state) for task in slurm.queued(["7;north"])] == [("7;north", "running")]


def test_tasks_that_wait_are_counted_one_by_one(box):
    """The accounting writes those that have not begun as one line."""
    (box / "squeue").write_text("#!/bin/bash\necho '7|0|RUNNING|None'; echo '7|1|PENDING|Priority'\n")
    (box / "sacct").write_text(
        "#!/bin/bash\necho '7_0|RUNNING'; echo '7_[1-3,6%2]|PENDING'; echo '8|RESV_DEL_HOLD'\n"
    )
    found = slurm.queued(["7", "8"])
    assert [(task.job, task.task, task.state) for task in found] == [
        ("7", "0", "running"), ("7", "1", "pending"), ("7", "2", "pending"), ("7", "3", "pending"),
        ("7", "6", "pending"), ("8", "", "pending"),
    ]  # fmt: skip


def test_jobs_of_an_older_plan_are_watched_and_keep_it(box, desk, command, words):
    assert command(*words).code == 0
    older = open_plan(desk.workspace).run
    desk.write(cube={"max_cloud_pct": 37.0})
    assert command("plan", desk.toml).code == 0
    newer = open_plan(desk.workspace).run
    assert newer != older

    state = json.loads(command("status", desk.workspace, "--json").out)
    assert [job["run"] for job in state["jobs"]] == [older] * 3
    assert under_way(state)
    assert f"101 of run {older!r}: " in command("status", desk.workspace).out
    assert "nothing is superseded" in command("clean", desk.workspace).out
    assert (desk.workspace / "plans" / older).is_dir()

    subprocess.run(["scancel", "101", "102", "103"], check=True)
    assert json.loads(command("status", desk.workspace, "--json").out)["jobs"] == []
    command("clean", desk.workspace)
    assert not (desk.workspace / "plans" / older).exists()


def test_a_job_that_was_never_sent_is_not_told_of(box, desk, command):
    assert command("plan", desk.toml).code == 0
    workspace = open_plan(desk.workspace).workspace
    record_submission(
        workspace,
        Submission(
            run="r", system="slurm", profile="p", submitted_at="2026-01-01T00:00:00+00:00", folder="/f",
            jobs=(SentJob(stage="cube", id="", tasks=4, name="slidecube-cube-0"),),
        ),
    )  # fmt: skip
    assert jobs_of(workspace, "r") == []
    (box / "squeue").write_text("#!/bin/bash\nexit 1\n")
    assert [job["asked"] for job in jobs_of(workspace, "r")] == [False]


NETWORK = {
    "cube": {"bands": ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]},
    "detect": {"model": "cae-kmeans"},
}


@pytest.mark.parametrize(
    ("site", "device", "expected"),
    [
        ("gpus = 1", "cuda", "package 'dask_cuda' is not installed"),
        ("", "cuda", 'device = "cuda" in [detect], and the jobs of stage detect ask for no GPU'),
        ('gpus = 1\nrunner = "threads"', "cpu", 'device = "cpu" leaves its GPU idle'),
        ('gpus = 1\nrunner = "threads"', "cuda", ""),
        ('directives = ["--gpus=1"]', "cuda", ""),
    ],
)
def test_a_gpu_is_asked_for_where_it_is_used(box, desk, command, words, monkeypatch, site, device, expected):
    monkeypatch.setattr(submit, "find_spec", lambda _: None)
    detect = {**NETWORK["detect"], "device": device}
    desk.write(cube=NETWORK["cube"], detect=detect)
    (desk.folder / "site.toml").write_text(f'extends = "slurm-array"\n[array.detect]\n{site}\n')
    shown = command(*words, "--dry-run")
    assert shown.code == (1 if expected and device == "cuda" else 0), shown
    assert expected in shown.out + shown.err
    assert ("idle" in shown.out) == ("idle" in expected)


def test_a_rule_needs_no_gpu(box, desk, command, words):
    (desk.folder / "site.toml").write_text(
        'extends = "slurm-array"\n[array.detect]\ngpus = 1\nrunner = "threads"\n'
    )
    shown = command(*words, "--dry-run")
    assert "note        detect: model rdndvi" in shown.out, shown


def test_an_array_is_checked_as_far_as_it_can_be(box, command, tmp_path):
    site = tmp_path / "site.toml"
    site.write_text(
        'extends = "slurm-array"\n[array]\nscratch = "/fast"\n[array.detect]\npartition = "moon"\n'
    )
    (box / "sbatch").write_text(
        "#!/bin/bash\n"
        "if grep -q partition=moon; then echo 'error: invalid partition specified: moon' >&2; exit 1; fi\n"
        "echo 'sbatch: Job 7 to start at noon' >&2\n"
    )
    found = command("cluster", "check", site)
    assert found.code == 1
    rows = {line[6:26].strip(): (line[:4].strip(), line[28:]) for line in found.out.splitlines()}
    assert rows["cube"] == ("ok", "Job 7 to start at noon")
    assert rows["detect"][0] == "fail"
    assert "invalid partition specified: moon" in rows["detect"][1]
    assert rows["scratch"][1].startswith("/fast")
    assert command("cluster", "check", "slurm-array").code == 0


def test_an_array_is_checked_without_a_scheduler(command, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = command("cluster", "check", "slurm-array")
    assert found.code == 1
    assert "fail  commands              sbatch, squeue, scancel, scontrol not on this machine" in found.out
