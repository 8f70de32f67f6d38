"""A real Slurm on this machine: munged, slurmctld and a slurmd a pretended node, on loopback, in a folder of its own.

Each has its own ports, key and socket, so that several test processes have one each and none touches what a machine
may have in /etc/slurm. No systemd, no cgroups: an out-of-memory kill is Dask's or the test's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PACKAGES = ("slurm-wlm", "munge")
"""Of Debian and Ubuntu."""

CPUS, MEMORY_MB = 2, 8000  # of a node
_START_S = 60.0

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits cred_expire + 1 s before it may start again, by default two minutes
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=3600
KillWait=5
Waittime=0
ReturnToService=2
JobRequeue=1
MaxArraySize=1001
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
# the emptier node first, so that two jobs have one each
SelectTypeParameters=CR_Core_Memory,CR_LLN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=-1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
SlurmdParameters=config_overrides
DebugFlags=NO_CONF_HASH
{nodes}
PartitionName=normal Nodes=ALL Default=YES MaxTime=3-00:00:00 DefMemPerCPU=256 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=1-00:00:00 DefMemPerCPU=256 PriorityTier=10 PreemptMode=OFF
"""


class SlurmMissingError(Exception):
    """Slurm cannot be had on this machine; the message says why."""


@dataclass(slots=True, kw_only=True)
class Slurm:
    """A running Slurm.

    root : folder of its state and logs; daemons : by name, "munged", "slurmctld" and the names of the nodes
    """

    root: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def configuration(self) -> Path:
        """Value of SLURM_CONF, by which every command of Slurm finds it."""
        return self.root / "slurm.conf"

    def call(self, *command: object, timeout_s: float = 20) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | {"SLURM_CONF": str(self.configuration)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"
        return done.stdout.strip()

    def jobs(self, *states: str) -> list[dict[str, str]]:
        """Tasks of jobs, ended ones too: id ("12_0", or "12"), array job, name, state, node, times it was requeued."""
        lines = self.call(
            "squeue", "-h", "-r", "-t", ",".join(states) or "all", "-o", "%i|%F|%j|%T|%N"
        ).splitlines()
        names = ("id", "job", "name", "state", "node")
        return [dict(zip(names, line.split("|"), strict=True)) for line in lines]

    def wait(self, *jobs: str, timeout_s: float = 120) -> None:
        """Wait for the end of jobs, of all of them unless some are named."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = [
                job
                for job in self.jobs(
                    "PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED"
                )
                if not jobs or job["job"] in jobs
            ]
            if not left:
                return
            assert time.monotonic() < deadline, f"still there after {timeout_s:.0f} s: {left}"
            time.sleep(0.3)

    def clear(self) -> None:
        """Cancel what is queued or running, and bring back nodes that were lost."""
        for node in ("n1", "n2"):
            if self.daemons[node].poll() is not None:
                self.start_node(node)
        ids = {job["job"] for job in self.jobs("PENDING", "RUNNING", "COMPLETING", "SUSPENDED")}
        if ids:
            self.call("scancel", *ids)
            self.wait()
        self._wait_for_nodes()

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def cut_off(self, node: str) -> None:
        """Kill the daemon of a node alone: what runs there runs on, and nobody hears of it."""
        self.daemons[node].kill()
        self.daemons[node].wait()

    def lose_node(self, node: str) -> None:
        """Kill the daemon of a node and everything that its jobs started, as a power failure does."""
        self.cut_off(node)
        self._kill(node)

    def stop(self) -> None:
        """End the daemons, and what jobs may have left behind."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        self._kill()
        shutil.rmtree(self.root, ignore_errors=True)

    def _kill(self, node: str | None = None) -> None:
        """Kill what was started for jobs of this Slurm, by their environment, on one node or on both."""
        at_work, daemons = [], []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                found = process.environ()
                if found.get("SLURM_CONF") != str(self.configuration) or "SLURM_JOB_ID" not in found:
                    continue
                if node in {None, found.get("SLURMD_NODENAME")}:
                    at_work.append(process)
                    daemons += [parent for parent in process.parents() if parent.name() == "slurmstepd"]
        # the daemons of its steps first: they would live to tell the controller that their job has failed
        for process in (*daemons, *at_work):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _start(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command,
                env=os.environ | {"SLURM_CONF": str(self.configuration)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(AssertionError):
                states = self.call("sinfo", "-h", "-p", "normal", "-N", "-o", "%T").split()
                if states and set(states) <= {"idle", "mixed", "allocated"}:
                    return
                self.call("scontrol", "update", "nodename=n[1-2]", "state=resume")
            assert time.monotonic() < deadline, "\n".join(
                path.read_text(errors="replace")[-800:] for path in self.root.glob("*.log")
            )
            time.sleep(0.2)


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """Start a Slurm of two nodes and stop it at the end; raises SlurmMissingError."""
    _install()
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    server = Slurm(root=root)
    try:
        _configure(root)
        server._start("munged", "munged", "--foreground", "--force", *_munge_files(root))
        _wait_for_munge(root)
        server._start("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            server.start_node(node)
        server._wait_for_nodes()
        yield server
    finally:
        server.stop()


def _install() -> None:
    """Install what is missing, one process at a time."""
    if _have():
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SlurmMissingError(f"Slurm is not installed, and only root can do it: {' '.join(PACKAGES)}")
    with Path(tempfile.gettempdir(), "slidecube-tests-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _have():
            return
        for arguments in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", *arguments],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
        if done.returncode != 0:
            raise SlurmMissingError(f"apt-get does not install {' '.join(PACKAGES)}: {done.stderr[-300:]}")


def _have() -> bool:
    os.environ["PATH"] += "".join(
        f":{folder}" for folder in ("/usr/sbin", "/sbin") if folder not in os.environ["PATH"].split(":")
    )
    if os.geteuid() != 0 and all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        raise SlurmMissingError("Slurm is installed, but its daemons want to be started by root")
    return all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged")))


def _configure(root: Path) -> None:
    root.chmod(0o755)
    (root / "state").mkdir()
    key = root / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(3)
    nodes = "\n".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs={CPUS} Boards=1 "
        f"SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY_MB} Gres=gpu:1"
        for i in (1, 2)
    )
    (root / "slurm.conf").write_text(
        _CONFIGURATION.format(host=host, root=root, ctld_port=ports[0], nodes=nodes, user="root")
    )
    # a device file of which every machine has one
    (root / "gres.conf").write_text("".join(f"NodeName=n{i} Name=gpu File=/dev/null\n" for i in (1, 2)))


def _munge_files(root: Path) -> list[str]:
    return [
        f"--key-file={root}/munge.key",
        f"--socket={root}/munge.socket",
        f"--pid-file={root}/munged.pid",
        f"--log-file={root}/munged.log",
        f"--seed-file={root}/munge.seed",
    ]


def _wait_for_munge(root: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not (root / "munge.socket").exists():
        assert time.monotonic() < deadline, (root / "munged.out").read_text()
        time.sleep(0.05)


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
