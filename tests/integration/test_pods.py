"""What the manifests would start in pods, started here: the same commands, in the same order, with as little around."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import urllib3
import yaml

from slidecube.cluster.clusters import DASK_SETTINGS
from slidecube.cluster.kubernetes import STAGES, manifests
from slidecube.cluster.resources import load_profile
from slidecube.pipeline import cli

pytestmark = pytest.mark.slow

SHARDS = 2
PROFILE = f"""\
extends = "kubernetes"
workers = {SHARDS}
threads_per_worker = 1
mem_gb = 2
[kubernetes]
image = "registry.example.org/slidecube:0.1.0"
"""


@pytest.fixture
def resources(tmp_path):
    path = tmp_path / "profile.toml"
    path.write_text(PROFILE)

    def make(plan=""):
        texts = manifests(load_profile(str(path)), DASK_SETTINGS, plan=plan)
        return {name: list(yaml.safe_load_all(text)) for name, text in texts.items()}

    return make


@pytest.fixture
def pod(tmp_path):
    """Start a container's command: its own environment, its own scratch, the config where it would be mounted."""
    started = []

    def start(container, folder, *, change=None, **env):
        scratch = tmp_path / f"scratch-{len(started)}"
        scratch.mkdir()
        words = [*container.get("command", ["slidecube"]), *container["args"]]
        env |= {entry["name"]: entry["value"] for entry in container["env"]}
        for old, new in {"/tmp": str(scratch), "/etc/slidecube": str(folder), **(change or {})}.items():
            words = [word.replace(old, new) for word in words]
            env = {key: value.replace(old, new) for key, value in env.items()}
        for key, value in env.items():  # as the kubelet does
            words = [word.replace(f"$({key})", value) for word in words]
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]],
            env={"PATH": os.environ["PATH"], "TMPDIR": str(scratch), **env},
            cwd=scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def only(resource):
    spec = resource["spec"]
    [container] = spec.get("template", {}).get("spec", spec)["containers"]
    return container


def ended(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def as_mounted(desk):
    """The TOML under the name by which pods know it, which is also that of the inventory."""
    return desk.toml.rename(desk.folder / "run.toml")


@pytest.fixture
def undisturbed(desk_in, tmp_path):
    one = desk_in(tmp_path / "one")
    assert one.cli("run", as_mounted(one)).code == cli.COMPLETE
    return one


def test_the_stages_make_what_a_run_makes(resources, pod, desk, undisturbed, assert_same_work):
    for stage, config in resources()["setup.yaml"][-1]["data"].items():
        (desk.folder / stage).write_text(config)
    as_mounted(desk)
    [job] = resources()["stages/1-plan.yaml"]
    name = re.search(r"^plan +(\S+)", ended(pod(only(job), desk.folder)), re.MULTILINE)[1]
    for n, stage in enumerate(STAGES[1:], start=2):
        [job] = resources(name)[f"stages/{n}-{stage}.yaml"]
        indices = range(job["spec"].get("completions", 1))
        assert len(indices) == (SHARDS if stage in {"cube", "detect"} else 1)
        at_work = [pod(only(job), desk.folder, JOB_COMPLETION_INDEX=str(i)) for i in indices]
        for process in at_work:
            ended(process)
    assert_same_work(desk.workspace, undisturbed.workspace)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def until_healthy(port):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if (
                urllib3.request("GET", f"http://127.0.0.1:{port}/health", retries=False, timeout=5).status
                == 200
            ):
                return
        except urllib3.exceptions.HTTPError:
            time.sleep(0.5)
    raise AssertionError(f"nobody healthy at {port}")


def test_the_containers_of_the_cluster_do_the_work(resources, pod, desk, undisturbed, assert_same_work):
    [cluster] = resources()["cluster.yaml"]
    scheduler, worker = (only(cluster["spec"][part]) for part in ("scheduler", "worker"))
    comm, http = free_port(), free_port()
    pod(scheduler, desk.folder, change={"8786": comm, "8787": http})
    until_healthy(http)
    for i in range(2):
        ports = {port: free_port() for port in ("8788", "8789", "8790")}
        env = {"DASK_WORKER_NAME": f"w{i}", "DASK_SCHEDULER_ADDRESS": f"tcp://127.0.0.1:{comm}"}
        pod(worker, desk.folder, change=ports, **env)
        until_healthy(ports["8788"])
    (desk.folder / "there.toml").write_text(
        f'runner = "dask-address"\naddress = "tcp://127.0.0.1:{comm}"\nworkers = 2\nmem_gb = 2\n'
    )
    found = desk.cli("run", as_mounted(desk), "--profile", desk.folder / "there.toml")
    assert found.code == cli.COMPLETE, found.err
    assert_same_work(desk.workspace, undisturbed.workspace)
