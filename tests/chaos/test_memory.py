"""Memory that ends for good: the kernel kills a worker, or a shard's own process, in a real memory cgroup.

The sabotage comes from outside, when a process imports the product. The processes stand in a cgroup of
their own, or the kernel would look for its victim among the tests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LIMIT_MB = 400
"""Of the one process that eats; an honest worker holds less beside what it had before it came here."""


@pytest.fixture
def cgroup(tmp_path):
    """A cgroup below our own with little memory, of either version."""
    folder = _own_group() / f"slidecube-{os.getpid()}-{tmp_path.name[-20:]}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here, which takes root and a writable hierarchy: {error}")
    try:
        limit = next((f for f in ("memory.limit_in_bytes", "memory.max") if (folder / f).exists()), None)
        if limit is None:
            pytest.skip(f"the memory controller is not handed down to {folder}")
        (folder / limit).write_text(str(LIMIT_MB << 20))
        for swap in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            if (folder / swap).exists():
                (folder / swap).write_text(str(LIMIT_MB << 20) if "memsw" in swap else "0")
        yield folder
    finally:
        for _ in range(100):  # what was killed leaves it in its own time
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def _own_group() -> Path:
    """The cgroup of this process that counts memory."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path(f"/sys/fs/cgroup/memory{path}")
    return Path(f"/sys/fs/cgroup{path}")  # the last line is that of the one hierarchy


def kills(cgroup: Path) -> int:
    """How often the kernel killed in a cgroup for memory."""
    for name in ("memory.events", "memory.oom_control"):
        if (cgroup / name).exists():
            lines = dict(line.split() for line in (cgroup / name).read_text().splitlines())
            return int(lines.get("oom_kill", 0))
    raise AssertionError("the kernel does not tell")


@pytest.fixture
def glutton(sabotage, monkeypatch, cgroup, witness) -> Path:
    """File whose tile eats; it is gone after the meal."""
    monkeypatch.setenv("SABOTAGE_HOW", "eat")
    monkeypatch.setenv("SABOTAGE_CGROUP", str(cgroup))
    sabotage.write_text(min(Path(name).stem for name in witness.records(witness.desk)))
    return sabotage


def test_a_worker_that_the_kernel_kills_for_memory(desk_in, tmp_path, witness, glutton, cgroup):
    """The tile is tried again elsewhere, and nothing shows."""
    desk = desk_in(tmp_path / "desk", cluster=witness.cluster("dask-local"), **witness.settings)
    tile = glutton.read_text()

    ran = desk.cli("run", desk.toml, "--quiet")

    assert ran.code == 0, ran
    assert kills(cgroup) == 1, "it was another's doing"
    assert not Path("/proc", glutton.with_suffix(".taken").read_text().strip()).exists()
    retries = [e for e in desk.events() if e["event"] == "retry"]
    assert [(e["tile"], e["fault"]) for e in retries] == [(tile, "worker")]
    witness.assert_whole(desk)


def test_a_shard_whose_own_process_the_kernel_kills_for_memory(desk_in, tmp_path, witness, glutton, cgroup):
    """Exit code 137 as a batch system sees it; the same command goes on."""
    desk = desk_in(tmp_path / "desk", cluster=witness.cluster("threads"), **witness.settings)
    assert desk.cli("plan", desk.toml).code == 0
    shard = f"exec {Path(sys.executable).with_name('slidecube')} cube {desk.toml} --shard 0/2 --quiet"
    batch = ["bash", "-c", f"({shard}); exit $?"]

    first = subprocess.run(batch, cwd=desk.folder, capture_output=True, check=False, timeout=180)
    spoilt = witness.status(desk)
    second = subprocess.run(batch, cwd=desk.folder, capture_output=True, check=False, timeout=180)

    assert first.returncode == 128 + signal.SIGKILL, first
    assert kills(cgroup) == 1, "it was another's doing"
    assert not spoilt["complete"]
    assert spoilt["running"] is None
    assert second.returncode == 0, second
    rest = desk.cli("run", desk.toml, "--quiet")
    assert rest.code == 0, rest
    witness.assert_whole(desk)
