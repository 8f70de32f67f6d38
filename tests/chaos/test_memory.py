"""Memory that ends for good: the kernel kills a worker, or a shard's own process, in a real memory cgroup.

The tile that eats is brought in from outside, when a process imports the product. The processes stand in a cgroup of
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

GLUTTON = '''
"""Eat all memory on a tile of this process, once, in a cgroup that has little."""

import importlib.util
import os
import sys
from pathlib import Path

class Glutton:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "slidecube.pipeline.tile":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module

        def exec_module(module):
            real(module)
            make = module._STAGES["cube"]

            def eating(plan, task, context):
                menu = Path(os.environ["GLUTTON"])
                if menu.exists() and task.tile == menu.read_text() and task.layer.startswith("terrain"):
                    menu.rename(menu.with_suffix(".taken"))  # once
                    menu.with_suffix(".pid").write_text(str(os.getpid()))
                    Path(os.environ["GLUTTON_CGROUP"], "cgroup.procs").write_text(str(os.getpid()))
                    eaten = []
                    while True:
                        eaten.append(b"x" * (16 << 20))
                return make(plan, task, context)

            module._STAGES["cube"] = eating

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Glutton)
'''


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
def glutton(tmp_path, monkeypatch, cgroup, witness) -> Path:
    """File whose tile eats; it is gone after the meal."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(GLUTTON)
    monkeypatch.setenv("PYTHONPATH", str(hook))
    monkeypatch.setenv("GLUTTON", str(tmp_path / "glutton"))
    monkeypatch.setenv("GLUTTON_CGROUP", str(cgroup))
    (tmp_path / "glutton").write_text(min(Path(name).stem for name in witness.records(witness.desk)))
    return tmp_path / "glutton"


def test_a_worker_that_the_kernel_kills_for_memory(desk_in, tmp_path, witness, glutton, cgroup):
    """The tile is tried again elsewhere, and nothing shows."""
    desk = desk_in(tmp_path / "desk", cluster=witness.cluster("dask-local"), **witness.settings)
    tile = glutton.read_text()

    ran = desk.cli("run", desk.toml, "--quiet")

    assert ran.code == 0, ran
    assert kills(cgroup) == 1, "it was another's doing"
    assert not Path("/proc", glutton.with_suffix(".pid").read_text()).exists()
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
