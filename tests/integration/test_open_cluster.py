"""Clusters that cannot be started: one line each, soon, and nothing left behind."""

from __future__ import annotations

import time

import pytest

SLURM = """
extends = "slurm"
workers = 3

[jobqueue]
interface = "lo"
"""


@pytest.fixture
def check(desk, monkeypatch):
    """Run `cluster check` of a profile with programs of our own, as a process: what it leaves for its end is seen."""
    monkeypatch.setenv("PATH", f"{desk.folder}:/usr/bin:/bin")

    def run(profile: str, **programs: str):
        for name, text in programs.items():
            (desk.folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (desk.folder / name).chmod(0o755)
        (desk.folder / "site.toml").write_text(profile)
        return desk.cli("cluster", "check", desk.folder / "site.toml", timeout_s=150)

    return run


def test_jobs_that_are_refused_are_told_in_the_batch_systems_words(check):
    began = time.monotonic()
    ended = check(
        SLURM, sbatch="echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1"
    )

    assert ended.code == 1, ended
    assert ended.refusal == (
        "`sbatch` refuses the jobs of the workers: sbatch: error: Batch job submission failed: Invalid account; "
        "change [jobqueue] in the profile"
    )
    assert time.monotonic() - began < 100, "not the hour that a queue may take"


ONE_JOB = """
mkdir "${0%/*}/taken" 2>/dev/null || { echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }
echo Submitted batch job 7
"""


def test_jobs_beyond_a_limit_leave_the_others(check, desk):
    """The one that is taken never starts here: it is waited for, and called back."""
    ended = check(SLURM + "wait_min = 0.1\n", sbatch=ONE_JOB, scancel='echo "$@" >> "${0%/*}/cancelled"')

    assert ended.code == 1, ended
    assert ended.refusal.startswith("Not one of 3 workers is there, and none came in 6 s; look at the queue")
    assert (desk.folder / "cancelled").read_text().split() == ["7"]


def test_a_client_that_cannot_connect_is_closed(check):
    began = time.monotonic()
    ended = check('runner = "dask-address"\naddress = "tls://127.0.0.1:9"\n')

    assert ended.code == 1, ended
    assert ended.err.count("\n") == 1, ended.err
    assert "No Dask scheduler answers at 'tls://127.0.0.1:9' (TLS expects a `ssl_context`" in ended.refusal
    assert time.monotonic() - began < 60


def test_an_interface_that_is_not_there_is_one_line(check):
    ended = check(SLURM.replace('"lo"', '"ib9"'), sbatch="exit 1")

    assert ended.code == 1, ended
    assert ended.err.count("\n") == 1, ended.err
    assert "does not start (Cluster failed to start: 'ib9' is not a valid network interface" in ended.refusal


def test_kubernetes_without_credentials_is_one_line(check, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    ended = check('extends = "kubernetes"\n[kubernetes]\nimage = "registry.example.org/slidecube:0.1.0"\n')

    assert ended.code == 1, ended
    assert ended.err.count("\n") == 1, ended.err
    assert ended.refusal.startswith("Kubernetes does not start the cluster of profile"), ended


@pytest.mark.slow
def test_workers_that_die_as_they_start_are_one_line(check):
    ended = check('extends = "dask-local"\nworkers = 1\nmem_gb = 0.01\n')

    assert ended.code == 1, ended
    assert "raise mem_gb" in ended.refusal
