"""Profiles as they are read."""

from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from slidecube.cluster.clusters import jobqueue_arguments, open_cluster
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import load_profile


def written(tmp_path, text: str) -> str:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "address",
    ["tcp://10.0.0.5:8786", "node-1.example.org:8786", "tls://[fe80::1]:8786", "ucx://ib0_node:8786"],
)
def test_addresses_of_schedulers(tmp_path, address):
    profile = load_profile(written(tmp_path, f'runner = "dask-address"\naddress = "{address}"\n'))
    assert profile.options["address"] == address


@pytest.mark.parametrize(
    "address",
    ["scheduler", "tcp://10.0.0.5", "http://10.0.0.5:8786", "tcp://node:port", "tcp//node:8786", " "],
)
def test_an_address_that_is_none_is_refused_before_anything_is_asked(tmp_path, address):
    with pytest.raises(
        ClusterError, match=r"address: .*allowed: tcp://host:port, such as .*, got '"
    ) as refused:
        load_profile(written(tmp_path, f'runner = "dask-address"\naddress = "{address}"\n'))
    assert repr(address) in str(refused.value)


JOBS = {
    "slurm": (
        "SLURMJob",
        [
            "#SBATCH -J slidecube",
            "#SBATCH -A maps",
            "#SBATCH -p long",
            "#SBATCH --gres=gpu:2",
            "#SBATCH -t 02:30:00",
        ],
    ),
    "pbs": (
        "PBSJob",
        ["#PBS -N slidecube", "#PBS -A maps", "#PBS -q long", "#PBS -l select=1:ncpus=4:mem=16gb:ngpus=2"],
    ),
    "lsf": (
        "LSFJob",
        [
            "#BSUB -J slidecube",
            '#BSUB -P "maps"',
            "#BSUB -q long",
            '#BSUB -gpu "num=2"',
            "#BSUB -W 02:30",
            "#BSUB -n 4",
        ],
    ),
}


@pytest.mark.parametrize("system", JOBS)
def test_what_is_asked_for_stands_in_the_script_of_a_job(tmp_path, system):
    """Out of the very class that writes it: no two of them name things alike."""
    kind, lines = JOBS[system]
    text = f'extends = "{system}"\ngpus = 2\ntime_min = 150\n[jobqueue]\naccount = "maps"\nqueue = "long"\n'
    arguments = jobqueue_arguments(load_profile(written(tmp_path, text)))
    job = getattr(import_module(f"dask_jobqueue.{system}"), kind)("tcp://127.0.0.1:1", **arguments)
    assert set(lines) <= set(job.job_script().splitlines())


def test_as_many_workers_with_gpus_as_the_profile_says(tmp_path, monkeypatch):
    """And not one for each GPU of the machine: threads and memory were shared out among these."""
    asked = {}

    def started(**how):
        asked.update(how)
        raise RuntimeError("enough")

    monkeypatch.setitem(sys.modules, "dask_cuda", SimpleNamespace(LocalCUDACluster=started))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    profile = load_profile(written(tmp_path, 'extends = "dask-cuda"\nworkers = 2\n'))
    with pytest.raises(ClusterError, match="do not start"):
        open_cluster(profile)
    assert asked["n_workers"] == profile.workers == 2
