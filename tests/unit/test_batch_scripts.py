"""Batch scripts as text: compared with texts that were read by a person, and run by a real shell."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from slidecube.cluster.batch import SHARD, TASK, BatchJob, ranges
from slidecube.cluster.pbs import pbs_script
from slidecube.cluster.resources import StageRequest
from slidecube.cluster.slurm import slurm_script

DATA = Path(__file__).parents[1] / "data" / "batch"

ARRAY = BatchJob(
    name="slidecube-detect",
    command=("/opt/slide cube/bin/slidecube", "detect", "/home/a/it's.toml", "--shard", f"{SHARD}/8"),
    request=StageRequest(
        cpus=8,
        mem_gb=32,
        gpus=1,
        time_min=360,
        at_once=4,
        partition="gpu",
        account="p 1",
        qos="long",
        constraint="a100",
        directives=("--mail-type=FAIL",),
    ),
    log=f"/ws 100%/logs/detect-{TASK}.log",
    folder="/home/a",
    tasks=(0, 1, 2, 5, 7),
    prologue=("module load python/3.11", "source /home/a/venv/bin/activate"),
    scratch="/scratch/$USER/$SLURM_JOB_ID",
)
SINGLE = BatchJob(
    name="slidecube-mosaic",
    command=("/opt/bin/slidecube", "mosaic", "/home/a/run.toml"),
    request=StageRequest(),
    log="/ws/logs/mosaic.log",
    folder="/home/a",
)
ONE_SHARD = replace(ARRAY, tasks=(3,), prologue=(), scratch="", request=StageRequest())

CASES = {
    "slurm-array.sh": (slurm_script, ARRAY),
    "slurm-single.sh": (slurm_script, SINGLE),
    "pbs-array.sh": (pbs_script, ARRAY),
    "pbs-single.sh": (pbs_script, SINGLE),
    "pbs-one-shard.sh": (pbs_script, ONE_SHARD),
}


@pytest.mark.parametrize("name", CASES)
def test_the_text_of_a_script(name):
    write, job = CASES[name]
    assert write(job) == (DATA / name).read_text()
    subprocess.run(["bash", "-n"], input=write(job), text=True, check=True)


def test_indices_are_written_as_ranges():
    assert ranges([7]) == "7"
    assert ranges([3, 1, 0, 2, 7, 9, 10]) == "0-3,7,9-10"


WORK = """\
#!/bin/bash
echo $$ > work
trap 'echo drained; exit 75' USR1
echo begun
for i in $(seq 100); do sleep 0.1; done
"""


@pytest.fixture
def bench(tmp_path):
    """A folder with a program in place of slidecube, and a `scontrol` that only says what it was asked."""
    for name, text in {"work.sh": WORK, "scontrol": '#!/bin/bash\necho "scontrol $*"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(bench, write, **changes):
    job = replace(
        SINGLE, command=("bash", str(bench / "work.sh")), folder=str(bench), log=str(bench / "log"), **changes
    )
    script = bench / "script.sh"
    script.write_text(write(job))
    environment = {"PATH": f"{bench}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "PBS_JOBID": "12.server"}
    with (bench / "log").open("a") as log:
        process = subprocess.Popen(["bash", script], cwd=bench, env=environment, stdout=log)
    until(lambda: "begun" in (bench / "log").read_text())
    return process


def until(met):
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("restarts", ["", "49", "50"])
def test_what_is_drained_is_queued_again(bench, restarts):
    process = start(bench, slurm_script, prologue=(f"SLURM_RESTART_COUNT={restarts}",))
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75
    said = (bench / "log").read_text()
    assert "drained" in said
    assert ("scontrol requeue 12" in said) == (restarts != "50")


def test_the_work_hears_of_the_end_only_once(bench):
    """A batch system tells every process of a job: a shell that told the work again would disturb its tidying up."""
    process = start(bench, slurm_script)
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None
    os.kill(int((bench / "work").read_text()), signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert "requeue" not in (bench / "log").read_text()


def test_a_tile_that_outlasts_the_call_is_given_up_before_the_walltime(bench):
    (bench / "work.sh").write_text(WORK.replace("echo drained; exit 75", "echo busy"))
    process = start(bench, slurm_script, drain_s=2)
    process.send_signal(signal.SIGUSR1)
    until(lambda: "scontrol requeue 12" in (bench / "log").read_text())
    assert process.poll() is None
    os.kill(int((bench / "work").read_text()), signal.SIGKILL)
    assert process.wait(20) == 128 + signal.SIGKILL


def test_a_job_of_pbs_is_told_by_its_own_script(bench):
    process = start(bench, pbs_script, request=StageRequest(time_min=1), drain_s=58)
    assert process.wait(20) == 75
    assert "work is left: submit it again" in (bench / "log").read_text()


@pytest.mark.parametrize("write", [slurm_script, pbs_script])
@pytest.mark.parametrize("scratch", ["$NO_SUCH_VARIABLE", "/proc/nowhere", "$PWD/fast"])
def test_work_goes_on_without_a_scratch_folder(bench, write, scratch):
    text = write(
        replace(SINGLE, command=("env",), folder=str(bench), log=str(bench / "log"), scratch=scratch)
    )
    (bench / "script.sh").write_text(text)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": "/var/tmp"}
    done = subprocess.run(
        ["bash", bench / "script.sh"], cwd=bench, env=environment, capture_output=True, text=True, check=True
    )
    said = done.stdout + ((bench / "log").read_text() if (bench / "log").exists() else "")
    made = scratch == "$PWD/fast"
    assert f"TMPDIR={bench / 'fast' if made else '/var/tmp'}\n" in said
    assert ("no scratch folder" in said) != made
