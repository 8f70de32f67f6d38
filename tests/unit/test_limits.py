"""What a process may use, on drawn file systems of control groups of both versions, and on this machine."""

from __future__ import annotations

import os

import psutil
import pytest

from slidecube.cluster import limits
from slidecube.cluster.limits import cores, free_memory_gb, memory_gb
from slidecube.cluster.resources import load_profile

V1 = "32 31 0:29 {inside} /sys/fs/cgroup/{name} rw,relatime shared:9 - cgroup cgroup rw,{name}\n"
V2 = "41 31 0:38 {inside} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Draw the root of a machine of 64 cores and 100 GB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    memory = psutil.virtual_memory()._replace(total=100 * GB, available=60 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    def draw(groups: str, mounts: str, **files: str):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        (tmp_path / "proc/self/mountinfo").write_text(f"23 1 8:1 / / rw - ext4 /dev/sda1 rw\n{mounts}")
        for name, text in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return draw


def test_version_2_up_to_the_outermost_group(machine):
    root = machine(
        "0::/slurm/job_7/step_0\n",
        V2.format(inside="/"),
        **{
            "slurm/job_7/step_0/memory.max": "max\n",
            "slurm/job_7/step_0/cpu.max": "max 100000\n",
            "slurm/job_7/memory.max": f"{8 * GB}\n",
            "slurm/job_7/memory.current": f"{6 * GB}\n",
            "slurm/job_7/memory.stat": f"anon 12\ninactive_file {3 * GB}\n",
            "slurm/cpu.max": "450000 100000\n",
            "slurm/memory.max": f"{50 * GB}\n",
            "other/memory.max": "1\n",
        },
    )
    assert (cores(root), memory_gb(root), free_memory_gb(root)) == (4, 8, 5)


def test_version_1_as_a_container_shows_it(machine):
    """Its own group is the outermost one that it sees, though it is told the name that it has outside."""
    root = machine(
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
        V1.format(name="memory", inside="/docker/abc") + V1.format(name="cpu,cpuacct", inside="/docker/abc"),
        **{
            "memory/memory.limit_in_bytes": f"{2 * GB}\n",
            "memory/memory.usage_in_bytes": f"{GB}\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert (cores(root), memory_gb(root), free_memory_gb(root)) == (1, 2, 1)


@pytest.mark.parametrize("inside", ["/../..", "/elsewhere"])
def test_a_group_of_which_only_the_mount_is_seen(machine, inside):
    root = machine("0::/../mine\n", V2.format(inside=inside), **{"memory.high": f"{5 * GB}\n"})
    assert memory_gb(root) == 5


def test_no_limit_is_the_machine_and_its_affinity(machine):
    v1 = V1.format(name="memory", inside="/") + V1.format(name="cpu", inside="/")
    root = machine(
        "2:memory:/\n1:cpu:/\n",
        v1,
        **{"memory/memory.limit_in_bytes": "9223372036854771712\n", "cpu/cpu.cfs_quota_us": "-1\n"},
    )
    assert (cores(root), memory_gb(root), free_memory_gb(root)) == (64, 100, 60)
    assert (cores(root / "none"), memory_gb(root / "none")) == (64, 100)


def test_a_profile_keeps_within_them(monkeypatch):
    monkeypatch.setattr(limits, "cores", lambda: 6)
    monkeypatch.setattr(limits, "memory_gb", lambda: 10.0)
    profile = load_profile("dask-local", workers=2)
    assert (profile.worker.cpus, profile.worker.mem_gb) == (3, 4.0)
