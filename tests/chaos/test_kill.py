"""Kill -9 at random moments, then the same command: nothing lost, nothing done twice, every byte the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SEED = 20180906


def kill(desk, witness, after_s: float, whom: str) -> bool:
    """Start a run and kill it; tells whether it was still alive to be killed."""
    process, began = witness.started(desk)
    while process.poll() is None and time.monotonic() - began < after_s:
        time.sleep(0.005)
    if process.poll() is not None:
        return False
    children = psutil.Process(process.pid).children(recursive=True)
    if whom == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    # who has ended and was not asked for is no worker any more
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not alive, "workers outlived their driver"
    return True


def snapshot(desk) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in desk.workspace.rglob("*")
        if path.is_file()
    }


def kill_and_resume(desk, witness, moments_s, whom: str) -> int:
    """Kill one run again and again, resume it, and compare; returns how often it was alive to be killed."""
    kills = 0
    for after_s in moments_s:
        before = witness.records(desk) if desk.workspace.exists() else {}
        kills += kill(desk, witness, after_s, whom)
        here = snapshot(desk)
        now = witness.records(desk)
        assert {name: now.get(name) for name in before} == before, "a finished record was written again"
        time.sleep(0.7)
        assert snapshot(desk) == here, "something went on writing after its driver was killed"
    before = witness.records(desk)
    last = desk.cli("run", desk.toml, "--quiet")
    assert last.code == 0, last
    assert {name: witness.records(desk)[name] for name in before} == before, "a finished tile was done again"
    witness.assert_whole(desk)
    return kills


def moments(n: int, span_s: float, seed: int) -> list[float]:
    """Random moments, one in each n-th of a span."""
    rng = random.Random(seed)
    return [(i + rng.random()) / n * span_s for i in range(n)]


@pytest.mark.parametrize(
    ("profile", "whom", "times"),
    [
        pytest.param("threads", "group", 3, marks=pytest.mark.slow),  # the short soak kills that way, too
        ("dask-local", "driver", 2),
        pytest.param("dask-local", "group", 3, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(desk_in, tmp_path, witness, profile, whom, times):
    """Again and again in one workspace: what was done is not done again, so each attempt gets further."""
    desk = desk_in(tmp_path / "desk", cluster=witness.cluster(profile), **witness.settings)
    start_s = 6.0 if profile == "dask-local" else 0.0  # of workers

    kills = kill_and_resume(
        desk, witness, [start_s + m for m in moments(times, witness.span_s / 2, SEED)], whom
    )

    assert kills >= times - 1


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize(
    ("profile", "whom"), [("threads", "group"), ("dask-local", "group"), ("dask-local", "driver")]
)
def test_killed_once_at_any_moment(desk_in, tmp_path, witness, profile, whom, number):
    desk = desk_in(tmp_path / "desk", cluster=witness.cluster(profile), **witness.settings)
    span_s = witness.span_s * (3 if profile == "dask-local" else 1)

    kill_and_resume(desk, witness, [moments(10, span_s, SEED + len(whom))[number]], whom)


@pytest.mark.slow
def test_a_worker_killed_alone_is_replaced(desk_in, tmp_path, witness):
    """As the kernel does when memory ends: the driver goes on, and the tile is tried again."""
    desk = desk_in(tmp_path / "desk", cluster=witness.cluster("dask-local"), **witness.settings)
    process, _ = witness.started(desk)
    events = desk.workspace / "events"
    deadline = time.monotonic() + 60
    while not any('"task"' in path.read_text() for path in events.glob("*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in cmdline(p)]
    os.kill(workers[0].pid, signal.SIGKILL)

    assert process.wait(120) == 0
    witness.assert_same(desk)
    witness.assert_told_once(desk)


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


ZYGOTE = """
import importlib, json, os, signal, sys, threading
import slidecube.pipeline.cli as cli
for name in ("plan", "run", "status", "mosaic_stage", "layers", "publish", "cog", "tile"):
    importlib.import_module("slidecube.pipeline." + name)
import zarr.storage._local as local

def kill_at(target, number):
    "Kill this process where a function is called for so many times; a file is left half written."
    module, _, path = target.partition(":")
    holder = importlib.import_module(module)
    *owners, name = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    real, calls = getattr(holder, name), []
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) < number:
            return real(*args, **kwargs)
        if name == "_put":
            args[0].parent.mkdir(parents=True, exist_ok=True)
            args[0].with_suffix(".0123.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    for module in list(sys.modules.values()):  # wherever it was imported to
        if getattr(module, "__name__", "").startswith(("slidecube", "zarr.storage")) and not owners:
            if getattr(module, name, None) is real:
                setattr(module, name, counted)
    setattr(holder, name, counted)

for line in sys.stdin:
    argv, target, number = json.loads(line)
    assert threading.active_count() == 1
    child = os.fork()
    if not child:
        if target:
            kill_at(target, number)
        cli.main(argv)
    print(json.dumps(os.waitpid(child, 0)[1]), flush=True)
"""

STEPS = (
    # where, and at which call of what is left to do
    ("slidecube.catalog.scenes:SceneTable.to_parquet", 1),  # half a plan
    ("slidecube.pipeline.plan_files:Index.remember", 1),  # a plan that no index knows
    ("slidecube.pipeline.store:create_arrays", 3),  # some stores
    ("zarr.storage._local:_put", 7),  # an array's metadata half written
    ("slidecube.pipeline.inventory:_coordinate", 2),  # an inventory without coordinates
    ("slidecube.pipeline.events:write_event", 1),  # nothing told
    ("slidecube.pipeline.staging:_beside", 5),  # some bands of a tile beside their places
    ("slidecube.pipeline.staging:StagedTile.commit", 2),  # a whole tile beside its place
    ("slidecube.pipeline.staging:_move", 4),  # some bands in their places
    ("slidecube.pipeline.ledger:Ledger.write", 2),  # data without its record
    ("slidecube.pipeline.events:write_event", 5),  # a record that was not told
    ("slidecube.pipeline.ledger:Ledger.write", 9),  # a detection without its record
    ("slidecube.pipeline.publish:write_products", 1),  # no table
    ("slidecube.pipeline.cog:write_cog", 2),  # some rasters
    ("slidecube.pipeline.mosaic_stage:_remove_stale", 1),  # products without their record
    ("slidecube.pipeline.lock:Lock.__exit__", 1),  # a lock that nobody gave back
)


FIT_STEPS = (
    ("slidecube.pipeline.ledger:Ledger.write", 1),  # moments without their record
    ("slidecube.pipeline.report.spectrum:write_spectrum", 1),  # moments that nobody merged
    ("slidecube.pipeline.mnf:Mnf.to_json", 1),  # a spectrum without its transform
    ("slidecube.pipeline.sample:gather", 1),  # a sample that nobody learnt from
    ("slidecube.models.unsupervised:Kmeans.save", 1),  # a trained network, and its checkpoint alone
    ("slidecube.pipeline.clusters:describe_clusters", 1),  # clusters without names
    ("slidecube.pipeline.statistics:freeze", 1),  # everything but the manifest
    ("slidecube.pipeline.ledger:Ledger.write", 1),  # a detection without its record
)
"""As STEPS, for a model that learns; the cubes are there."""

CAE = {
    "cube": {"bands": ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]},
    "detect": {"model": "cae-kmeans", "parameters": {"sample": 4000, "epochs": 3, "batch": 1000}},
}


@pytest.fixture(scope="module")
def zygote():
    """A process that has imported everything and forks for each command: (argv, target, number) -> wait status."""
    with subprocess.Popen(
        [sys.executable, "-c", ZYGOTE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:

        def call(argv: list[object], target: str = "", number: int = 0) -> int:
            process.stdin.write(json.dumps([[str(a) for a in argv], target, number]) + "\n")
            process.stdin.flush()
            while not (line := process.stdout.readline()).strip().isdigit():
                assert line, process.stderr.read()
            return int(line)

        yield call
        process.stdin.close()


def test_killed_between_any_two_steps(desk_in, tmp_path, witness, zygote):
    """Where a random moment seldom falls: between data, checksum, record and event, and inside a file."""
    desk = desk_in(tmp_path / "desk", **witness.settings)
    argv = ["run", desk.toml, "--quiet"]
    for target, number in (*STEPS, ("", 0)):
        before = witness.records(desk)
        status = zygote(argv, target, number)
        now = witness.records(desk)
        assert {name: now[name] for name in before} == before, f"done again: killed at {target} {number}"
        assert (os.WTERMSIG(status) == signal.SIGKILL) == bool(target), f"never reached: {target} {number}"

    assert status == 0
    witness.assert_same(desk)
    witness.assert_told_once(desk)


@pytest.mark.slow
def test_a_fit_killed_between_its_steps(desk_in, tmp_path, zygote, witness):
    """What it learns, and what is found by it, is to the last byte that of a fit that nobody disturbed."""
    calm = desk_in(tmp_path / "calm", output={"formats": ["parquet", "cog"]}, **CAE)
    assert zygote(["cube", calm.toml, "--quiet"]) == 0
    shutil.copytree(calm.folder, tmp_path / "desk")
    desk = dataclasses.replace(calm, folder=tmp_path / "desk", sections=copy.deepcopy(calm.sections)).write()
    assert zygote(["run", calm.toml, "--quiet"]) == 0

    for target, number in (*FIT_STEPS, ("", 0)):
        before = witness.records(desk)
        status = zygote(["run", desk.toml, "--quiet"], target, number)
        now = witness.records(desk)
        assert {name: now[name] for name in before} == before, f"done again: killed at {target} {number}"
        assert (os.WTERMSIG(status) == signal.SIGKILL) == bool(target), f"never reached: {target} {number}"

    assert status == 0
    witness.assert_same(desk, calm)
    witness.assert_told_once(desk)


def test_records_are_the_same_text_each_time(witness):
    """Sorted keys, fixed layout: a record can be compared as text once its volatile fields are gone."""
    desk = witness.desk
    for name, text in witness.records(desk).items():
        record = json.loads(text)
        assert text.decode() == json.dumps(record, sort_keys=True, indent=1), name
        assert record["attempts"] == 1
        assert Path(name).stem == record["tile"]
