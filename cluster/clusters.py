"""Dask clusters: started on this machine, through a batch system, on Kubernetes, or found at an address."""

from __future__ import annotations

import atexit
import importlib
import logging
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed import Client, LocalCluster, Status, WorkerPlugin
from distributed.deploy.spec import close_clusters
from distributed.utils import LoopRunner, silence_logging_cmgr

from slidecube.cluster.credentials import fresh_security
from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import Profile

_NO_WORKERS_S = 60.0  # starting one takes seconds, and half a minute on a busy machine
_ASK_AGAIN_S = 10.0
_CONNECT_S = 30.0
_STARTS = 3
_SCRATCH = "slidecube-dask-"

DASK_SETTINGS = {
    "distributed.scheduler.allowed-failures": 0,  # the runner tries again, and knows better where
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": False,
    # a tile's own ceiling was projected before the run; pausing a worker that holds one would only wait
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.98,
    # after so long a worker that is gone is started anew, with its nanny or its job; its nanny by itself needs some
    # seconds, and on a machine that is busy more than the default, after which both would be gone
    "distributed.deploy.lost-worker-timeout": "30s",
}


@dataclass(slots=True)
class Opened:
    """A cluster and our client of it.

    cluster : None when it is somebody else's; patience_s : how long to wait for a first worker
    remedy : what to do when none comes; wanted : workers that the cluster is asked for again when they are lost
    kept : what is let go of when the cluster is closed
    """

    client: Client
    cluster: Any = None
    patience_s: float = _NO_WORKERS_S
    remedy: str = "start with `slidecube doctor`, raise mem_gb, or use profile 'threads'"
    wanted: int = 0
    kept: ExitStack = field(default_factory=ExitStack)
    _asked: float = field(default_factory=time.monotonic)

    def ask_for_missing(self, there: int) -> None:
        """Ask again for workers that are gone with their nannies or jobs: a cluster does not do so by itself."""
        if there >= self.wanted or time.monotonic() - self._asked < _ASK_AGAIN_S:
            return
        self._asked = time.monotonic()
        self.cluster.scale(self.wanted)

    def close(self, timeout_s: float) -> None:
        """Stop what was started, by force when it does not end in time."""
        nannies = self.cluster.workers.values() if isinstance(self.cluster, LocalCluster) else ()
        pids = [nanny.pid for nanny in nannies]
        with self.kept, suppress(TimeoutError):
            try:
                self.client.close(timeout=timeout_s)
                if self.cluster is not None:
                    self.cluster.close(timeout=timeout_s)
            except (TimeoutError, KeyboardInterrupt):
                for pid in filter(None, pids):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise


class _Client(Client):
    """A client that is closed when it does not connect: at the end of the process it would try so for minutes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        except BaseException:
            with suppress(Exception):
                self.close(timeout=_CONNECT_S)  # type: ignore[no-untyped-call]
            raise


class _DieWithDriver(WorkerPlugin):
    """A worker whose driver was killed must not go on writing: the kernel ends it too (Linux)."""

    def __init__(self, driver: int) -> None:
        self._driver = driver

    def setup(self, worker: Any) -> None:
        del worker
        try:
            import ctypes  # noqa: PLC0415

            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        except (OSError, AttributeError):  # not Linux: distributed's own watch on the parent's pipe remains
            return
        if os.getppid() != self._driver:  # it died before we asked
            os._exit(1)


def open_cluster(profile: Profile) -> Opened:
    """Start the cluster of a profile, or connect to it.

    Raises ClusterError when it cannot be had: a package, a GPU, a command or an address that is missing.
    """
    atexit.unregister(
        close_clusters
    )  # we close ours; it would wait for a half-started one, and end in a traceback
    kept = ExitStack()
    kept.enter_context(dask.config.set(DASK_SETTINGS))  # some are asked for while the cluster works
    # of a scheduler or a worker that is lost the run tells by itself, and in a line, not with their tracebacks
    kept.enter_context(silence_logging_cmgr(logging.CRITICAL))
    try:
        opened = _OPENERS[profile.runner](profile)
    except BaseException as error:
        kept.close()
        if isinstance(error, ClusterError | MemoryError) or not isinstance(error, Exception):
            raise
        raise ClusterError(
            f"The cluster of profile {profile.name!r} does not start ({_said(error)}); look at its settings with "
            f"`slidecube cluster show {profile.name}`"
        ) from error
    opened.kept.enter_context(kept)
    return opened


def _said(error: BaseException) -> str:
    """What an error says, in one line that is not endless."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _local(profile: Profile) -> Opened:
    return _on_this_machine(profile, LocalCluster, n_workers=profile.workers)


def _cuda(profile: Profile) -> Opened:
    """One worker a GPU, each of which sees its own."""
    dask_cuda = _import("dask_cuda", extra="gpu")
    try:
        opened = _on_this_machine(
            profile, dask_cuda.LocalCUDACluster, n_workers=profile.workers, rmm_pool_size=None
        )
    except Exception as error:
        if type(error).__name__.startswith("NVMLError") or "nvml" in str(error).lower():
            raise ClusterError(
                f"Profile {profile.name!r} needs an NVIDIA GPU, and its driver answers {str(error)!r}; use profile "
                "'dask-local' on this machine"
            ) from None
        raise
    return opened


def _on_this_machine(profile: Profile, kind: Callable[..., Any], **how: Any) -> Opened:
    """Start a cluster here. A worker that dies meanwhile ends the start, which is then made anew."""
    _remove_stale_scratch(Path(tempfile.gettempdir()), _SCRATCH)
    said = ""
    for _ in range(_STARTS):
        try:
            return _started(profile, kind, **how)
        except (RuntimeError, OSError) as error:  # what Dask says of a worker that died
            said = " ".join(str(error).split())
    raise ClusterError(
        f"The workers of profile {profile.name!r} do not start ({said}); ask `slidecube doctor`, raise mem_gb, or "
        "use profile 'threads'"
    )


def _started(profile: Profile, kind: Callable[..., Any], **how: Any) -> Opened:
    with ExitStack() as undo:
        kept = undo.enter_context(ExitStack())
        scratch = kept.enter_context(_scratch(_SCRATCH))
        loop = kept.enter_context(_loop())
        cluster = kind(
            loop=loop,
            security=fresh_security(),
            threads_per_worker=1,
            memory_limit=int(profile.worker.mem_gb * 1e9),
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
            local_directory=scratch,
            silence_logs=logging.CRITICAL,  # of its worker processes, which have loggers of their own
            **({"processes": True} if kind is LocalCluster else {}),
            **how,
        )
        undo.callback(cluster.close, timeout=_CONNECT_S)
        client = _Client(cluster, set_as_default=False)
        undo.callback(client.close, timeout=_CONNECT_S)
        client.register_plugin(_DieWithDriver(os.getpid()))
        undo.pop_all()
    return Opened(client=client, cluster=cluster, kept=kept, wanted=profile.workers)


@contextmanager
def _loop() -> Iterator[Any]:
    """Event loop of a cluster here, whose worker processes never hear of Ctrl-C: a terminal tells it to all of them.

    A process begins with the signals blocked that were so in the thread which started it.
    """
    resource_tracker.ensure_running()  # started by a worker's start, it would unblock the signal there
    before, children = signal.pthread_sigmask(signal.SIG_BLOCK, ()), set(multiprocessing.active_children())
    runner = LoopRunner()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    interrupted = True
    try:
        yield runner.loop
        interrupted = False
    finally:
        if interrupted:  # what its halves say of each other tells nobody anything
            runner.loop.asyncio_loop.set_exception_handler(lambda *_: None)
        runner.stop()
        if interrupted:
            for child in set(multiprocessing.active_children()) - children:
                child.kill()


@contextmanager
def _scratch(prefix: str, folder: Path | None = None) -> Iterator[str]:
    """Folder for our eyes alone."""
    with tempfile.TemporaryDirectory(
        prefix=f"{prefix}{os.getpid()}-", dir=folder, ignore_cleanup_errors=True
    ) as made:
        yield made


def _at_address(profile: Profile) -> Opened:
    address = profile.options["address"]
    try:
        client = _Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError) as error:  # the last: TLS without its settings
        raise ClusterError(
            f"No Dask scheduler answers at {address!r} ({' '.join(str(error).split())}); start one with "
            "`dask scheduler`, or set address in the profile"
        ) from None
    return Opened(
        client=client, remedy=f"start some with `dask worker {address}`", patience_s=_wait_s(profile)
    )


_JOBQUEUE = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster"}
_COMMANDS = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub"}


def _jobqueue(profile: Profile) -> Opened:
    """Workers as jobs of a batch system, one process a job."""
    options = profile.options
    system = str(options["system"])
    command = _COMMANDS[system]
    if shutil.which(command) is None:
        raise ClusterError(
            f"Profile {profile.name!r} submits jobs by `{command}`, which is not on this machine; start on a login node"
        )
    dask_jobqueue = _import("dask_jobqueue", extra="hpc")
    kind, answers = getattr(dask_jobqueue, _JOBQUEUE[system]), list[str]()
    prefix = (
        f".{_SCRATCH}{socket.gethostname()}-"  # seen by all nodes: a process of that number is not enough
    )
    _remove_stale_scratch(Path.cwd(), prefix)
    with ExitStack() as undo:
        kept = undo.enter_context(ExitStack())
        cluster = kind(
            job_cls=_heard(kind.job_cls, answers),
            security=fresh_security(Path(kept.enter_context(_scratch(prefix, Path.cwd())))),
            **jobqueue_arguments(profile),
        )
        undo.callback(cluster.close, timeout=_CONNECT_S)
        cluster.scale(profile.workers)
        _require_taken(answers, profile.workers, command)
        client = _Client(cluster, set_as_default=False)
        undo.pop_all()
    return Opened(
        client=client,
        cluster=cluster,
        kept=kept,
        wanted=profile.workers,
        patience_s=_wait_s(profile),
        remedy="look at the queue; raise wait_min in the profile when it is long",
    )


def _heard(job: Any, answers: list[str]) -> Any:
    """Class of a job whose refusal is kept as an answer, "" when it is taken: raised, it is a traceback in the log."""

    class Heard(job):  # type: ignore[misc]
        async def start(self) -> None:
            try:
                await super().start()
            except (RuntimeError, ValueError, OSError) as error:
                answers.append(_told(str(error)))
                self.status = Status.running
            else:
                answers.append("")

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

    return Heard


def _require_taken(answers: list[str], jobs: int, command: str) -> None:
    """Wait for the answers to the first jobs; some may be refused, such as those beyond a limit, but not all."""
    until = time.monotonic() + _CONNECT_S
    while len(answers) < jobs and time.monotonic() < until:
        time.sleep(0.05)
    if len(answers) >= jobs and all(answers):
        raise ClusterError(
            f"`{command}` refuses the jobs of the workers: {answers[0]}; change [jobqueue] in the profile"
        )


def _told(said: str) -> str:
    """What a batch system's command said, out of what dask-jobqueue says of its failure."""
    answers = re.search(r"^stdout:\n(.*)^stderr:\n(.*)", said, re.DOTALL | re.MULTILINE)
    told = " ".join(" ".join(answers.groups()).split()) if answers else ""
    return told or " ".join(said.split())


def jobqueue_arguments(profile: Profile) -> dict[str, Any]:
    """Arguments of a dask-jobqueue cluster, out of a profile."""
    options, worker = profile.options, profile.worker
    hours, minutes = divmod(worker.time_min or 240, 60)
    kwargs: dict[str, Any] = {
        "name": "slidecube",
        "job_name": "slidecube",
        "cores": 1,  # one task at a time; its threads are the worker's CPUs
        "processes": 1,
        "memory": f"{worker.mem_gb:g}GB",
        "walltime": f"{hours:02d}:{minutes:02d}:00",
        "queue": options.get("queue") or None,
        "account": options.get("account") or None,
        "interface": options.get("interface") or None,
        "local_directory": options.get("scratch") or None,
        "log_directory": options.get("logs") or None,
        "job_script_prologue": list(options.get("prologue", ())),
        "job_extra_directives": list(options.get("directives", ())),
        # without exec what the batch system says to a job would reach its shell alone
        "python": f"exec {shlex.quote(sys.executable)}",
        "death_timeout": 120,  # a worker without a scheduler for so long ends itself
    }
    if options["system"] == "slurm":
        kwargs["job_cpu"] = worker.cpus
        if worker.gpus:
            kwargs["job_extra_directives"].append(f"--gres=gpu:{worker.gpus}")
    elif options["system"] == "pbs":
        gpus = f":ngpus={worker.gpus}" if worker.gpus else ""
        kwargs["resource_spec"] = f"select=1:ncpus={worker.cpus}:mem={worker.mem_gb:g}gb{gpus}"
    else:
        kwargs["ncpus"] = worker.cpus
        kwargs["project"] = kwargs.pop("account")
        kwargs["walltime"] = f"{hours:02d}:{minutes:02d}"  # with seconds it is refused
        if worker.gpus:
            kwargs["job_extra_directives"].append(f'-gpu "num={worker.gpus}"')
    return kwargs


def _kubernetes(profile: Profile) -> Opened:
    operator = _import("dask_kubernetes.operator", extra="kubernetes")
    from slidecube.cluster.kubernetes import cluster_spec  # noqa: PLC0415

    spec = cluster_spec(profile, DASK_SETTINGS)
    try:
        cluster = operator.KubeCluster(
            custom_cluster_spec=spec,
            namespace=spec["metadata"]["namespace"],
            resource_timeout=int(_wait_s(profile)),  # a node that is new pulls an image of gigabytes first
            shutdown_on_close=True,  # also one that a driver left behind which was killed
            quiet=True,
        )
    except Exception as error:  # noqa: BLE001  the client's own classes say no more than their text
        _remove_half_made()
        raise ClusterError(
            f"Kubernetes does not start the cluster of profile {profile.name!r}: {_said(error)}; "
            "see deploy/kubernetes.md"
        ) from None
    cluster.scale(profile.workers)
    return Opened(
        client=_client_of(cluster),
        cluster=cluster,
        wanted=profile.workers,
        patience_s=_wait_s(profile),
        remedy="look at `kubectl get pods`; raise wait_min in the profile when the cluster is full",
    )


def _remove_half_made() -> None:
    """Remove what a failed start left on Kubernetes; at the end its library would, with a traceback where it cannot."""
    from dask_kubernetes.operator.kubecluster.kubecluster import reap_clusters  # noqa: PLC0415

    atexit.unregister(reap_clusters)
    with suppress(Exception):
        reap_clusters()


def _client_of(cluster: Any) -> Client:
    """A client of a cluster that we started, which ends with it where there can be none."""
    try:
        return _Client(cluster, set_as_default=False)
    except BaseException:
        cluster.close(timeout=_CONNECT_S)
        raise


_OPENERS: Mapping[str, Callable[[Profile], Opened]] = {
    "dask-local": _local,
    "dask-cuda": _cuda,
    "dask-address": _at_address,
    "dask-jobqueue": _jobqueue,
    "dask-kubernetes": _kubernetes,
}


def _wait_s(profile: Profile) -> float:
    return float(profile.options.get("wait_min", 10)) * 60


def _import(name: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ClusterError(
            f"Package {name.partition('.')[0]!r} is not installed ({error}); install it with "
            f"`pip install 'slidecube[{extra}]'`"
        ) from None


def _remove_stale_scratch(where: Path, prefix: str) -> None:
    """Remove the scratch folders of killed drivers, as far as they are ours."""
    for folder in where.glob(f"{prefix}*"):
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
