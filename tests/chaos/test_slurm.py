"""A run as arrays of jobs while jobs are cancelled, queued again, preempted and lost with their node, in mid-tile.

The archive stands behind a server of the test's own that stalls, so that a tile is in work when it happens.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter

import psutil
import pytest

from slidecube.pipeline.tasks import FIT_STAGES

STAGE = """
cpus = 1
mem_gb = 3
time_min = {minutes}
runner = "{runner}"
"""

SITE = """
extends = "slurm-array"

[array]
drain_s = {drain_s}

[array.cube]
shards = 2
{stage}
[array.detect]
{stage}
[array.mosaic]
{stage}
"""


@pytest.fixture(scope="module")
def gate(servers, small_archive):
    gate = servers("gate").Gate(small_archive)
    yield gate
    gate.close()


@pytest.fixture(scope="module")
def catalogue(gate, small_archive, tmp_path_factory):
    return gate.publish(small_archive, tmp_path_factory.mktemp("catalogue") / "saved.json")


@pytest.fixture(scope="module")
def undisturbed(desk_in, catalogue, tmp_path_factory):
    desk = desk_in(tmp_path_factory.mktemp("undisturbed") / "desk", sources={"optical": str(catalogue)})
    assert desk.cli("run", desk.toml, "--quiet").code == 0
    return desk


@pytest.fixture
def site(desk_in, catalogue, tmp_path, gate, slurm):
    yield desk_in(tmp_path / "desk", sources={"optical": str(catalogue)})
    gate.open.set()


def submit(desk, *, minutes: int = 10, drain_s: int = 30, runner: str = "threads") -> dict[str, str]:
    """Submit and return the ids of the jobs by stage."""
    stage = STAGE.format(minutes=minutes, runner=runner)
    (desk.folder / "site.toml").write_text(SITE.format(drain_s=drain_s, stage=stage))
    sent = desk.cli("submit", desk.toml, "--profile", desk.folder / "site.toml")
    assert sent.code == 0, sent
    jobs = json.loads(next(desk.workspace.glob("submits/*/latest.json")).read_text())["jobs"]
    return {job["stage"]: job["id"] for job in jobs}


def until(met, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


def stalled(desk, gate) -> None:
    """Wait until both shards are in mid-tile, waiting for the archive."""
    until(lambda: gate.waiting >= 2 and all(lock(desk, i).get("running") for i in range(2)))


def lock(desk, shard: int) -> dict:
    """What a shard of the cubes wrote into its lock, {} when it holds none."""
    try:
        return json.loads((desk.workspace / "locks" / f"shard-cube-{shard}of2.json").read_text())
    except (OSError, ValueError):
        return {}


def states(slurm, job: str) -> Counter[str]:
    return Counter(task["state"] for task in slurm.jobs() if task["job"] == job)


def log(desk, name: str) -> str:
    return "".join(path.read_text() for path in sorted(desk.workspace.glob(f"submits/*/*/logs/{name}.log")))


def assert_whole(desk, undisturbed, assert_same_work) -> None:
    """Complete, equal to the undisturbed run, and each task done once and told once."""
    state = json.loads(desk.cli("status", desk.workspace, "--json").out)
    assert state["complete"], (state, log(desk, "*"))
    assert_same_work(desk.workspace, undisturbed.workspace)
    told = Counter(
        (e["layer"], e["epoch"], e["tile"], e["key"])
        for e in desk.events()
        if e["event"] == "task" and e["status"] != "failed" and e["stage"] not in FIT_STAGES
    )
    assert set(told.values()) == {1}
    assert not list(desk.workspace.glob("locks/*.json"))
    assert not list(desk.workspace.rglob("*.partial"))


@pytest.mark.slow
def test_cancelled_in_mid_tile_and_submitted_again(slurm, site, gate, undisturbed, assert_same_work):
    gate.open.clear()
    jobs = submit(site)
    stalled(site, gate)

    slurm.call("scancel", *jobs.values())
    slurm.wait()
    gate.open.set()
    assert "stopped; run the same command to resume" in log(site, "cube-0")
    submit(site)
    slurm.wait()

    assert_whole(site, undisturbed, assert_same_work)


@pytest.mark.slow
def test_a_node_is_lost_and_its_zombie_wakes_up(slurm, site, gate, undisturbed, assert_same_work):
    """Its jobs run on while the scheduler starts them elsewhere: what they write then must not count."""
    gate.open.clear()
    jobs = submit(site)
    stalled(site, gate)
    lost = next(t for t in slurm.jobs("RUNNING") if t["node"] == "n1")
    zombie = shard_process(lost["id"])
    slurm.cut_off("n1")
    until(lambda: states(slurm, jobs["cube"])["PENDING"] == 1)

    until(lambda: lock(site, int(lost["id"].partition("_")[2])).get("restarts") == 1)
    gate.open.set()
    psutil.wait_procs([zombie], timeout=60)
    slurm.wait()

    assert "was taken over by another driver" in log(site, f"cube-{lost['id'].partition('_')[2]}")
    assert_whole(site, undisturbed, assert_same_work)


def shard_process(task: str) -> psutil.Process:
    """The driver of a shard, by the job that it belongs to."""
    array, _, index = task.partition("_")
    for process in psutil.process_iter(["cmdline"]):
        try:
            found = process.environ()
            ours = found.get("SLURM_ARRAY_JOB_ID") == array and found.get("SLURM_ARRAY_TASK_ID") == index
            if ours and "--shard" in process.cmdline():
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"no process of {task}")


@pytest.mark.slow
def test_queued_again_in_mid_tile(slurm, site, gate, undisturbed, assert_same_work):
    gate.open.clear()
    jobs = submit(site)
    stalled(site, gate)

    slurm.call("scontrol", "requeue", f"{jobs['cube']}_0")
    until(lambda: states(slurm, jobs["cube"])["PENDING"] == 1)
    gate.open.set()
    slurm.wait(timeout_s=180)

    assert log(site, "cube-0").count("start ") == 2
    assert_whole(site, undisturbed, assert_same_work)


@pytest.mark.slow
def test_preempted_in_mid_tile(slurm, site, gate, undisturbed, assert_same_work):
    gate.open.clear()
    jobs = submit(site)
    stalled(site, gate)

    urgent = slurm.call(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--exclusive",
        "--nodes=2",
        "--output=/dev/null",
        "--wrap=sleep 2",
    )
    until(lambda: states(slurm, jobs["cube"])["PENDING"] >= 1)
    gate.open.set()
    slurm.wait(timeout_s=180)

    assert states(slurm, urgent) == {"COMPLETED": 1}
    assert any(log(site, f"cube-{i}").count("start ") == 2 for i in range(2))
    assert_whole(site, undisturbed, assert_same_work)


@pytest.mark.slow
def test_a_node_is_lost_with_all_it_runs(slurm, site, gate, undisturbed, assert_same_work):
    gate.open.clear()
    jobs = submit(site)
    stalled(site, gate)

    slurm.lose_node("n1")
    until(lambda: states(slurm, jobs["cube"])["PENDING"] == 1)
    gate.open.set()
    slurm.wait(timeout_s=240)  # on the other node, one after the other

    assert {t["node"] for t in slurm.jobs() if t["job"] == jobs["cube"]} == {"n2"}
    assert_whole(site, undisturbed, assert_same_work)


@pytest.mark.slow
def test_told_to_end_in_mid_tile(slurm, site, gate, undisturbed, assert_same_work):
    """The tile in work ends, nothing more is begun, and the job is queued again by itself."""
    gate.open.clear()
    jobs = submit(site)
    stalled(site, gate)

    slurm.call("scancel", "--batch", "--signal=USR1", f"{jobs['cube']}_0")
    time.sleep(1)
    gate.open.set()
    until(lambda: "work is left: queued again" in log(site, "cube-0"))
    slurm.wait(timeout_s=180)

    assert "asked to end early" in log(site, "cube-0")
    assert log(site, "cube-0").count("start ") == 2
    assert_whole(site, undisturbed, assert_same_work)


@pytest.mark.slow
def test_a_tile_outlasts_the_walltime(slurm, site, gate, undisturbed, assert_same_work):
    """It does not end in the time between the call and the walltime: the job is queued again before it is killed."""
    gate.open.clear()
    jobs = submit(site, minutes=2, drain_s=40)
    stalled(site, gate)

    until(lambda: "work is left: queued again" in log(site, "cube-0"), timeout_s=150)
    gate.open.set()
    slurm.wait(timeout_s=200)

    assert states(slurm, jobs["cube"]) == {"COMPLETED": 2}
    assert log(site, "cube-0").count("start ") == 2
    assert_whole(site, undisturbed, assert_same_work)


@pytest.mark.slow
def test_a_worker_in_a_shard_is_killed_as_by_the_kernel(slurm, site, gate, undisturbed, assert_same_work):
    """As when memory ends: the worker is gone, the shard goes on and tries the tile again."""
    gate.open.clear()
    jobs = submit(site, runner="dask-local")
    stalled(site, gate)

    driver = shard_process(f"{jobs['cube']}_0")
    workers = [p for p in driver.children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    workers[0].send_signal(signal.SIGKILL)
    time.sleep(1)
    gate.open.set()
    slurm.wait(timeout_s=180)

    assert states(slurm, jobs["cube"]) == {"COMPLETED": 2}
    assert log(site, "cube-0").count("start ") == 1
    assert any(e["event"] == "retry" and e["fault"] == "worker" for e in site.events())
    assert_whole(site, undisturbed, assert_same_work)
