"""A Dask scheduler and workers with nannies as processes of their own, as a site starts them: each can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

PROFILE = """runner = "dask-address"
address = "{address}"
workers = {workers}
threads_per_worker = 1
mem_gb = 4.0
wait_min = 1.0
"""


class DaskSite:
    """One scheduler and some nannies with a worker each.

    folder : for their files; host, worker_host : addresses on which the scheduler and the workers listen
    inside, outside : words before the command of the scheduler and of the nannies, such as those that enter a network
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 2,
        host: str = "127.0.0.1",
        worker_host: str = "127.0.0.1",
        inside: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> None:
        self.folder, self.workers, self.host, self.worker_host = folder, workers, host, worker_host
        self.inside, self.outside = inside, outside
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://{host}:{free.getsockname()[1]}"
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.nannies: list[subprocess.Popen[bytes]] = []
        self.made = 0

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Those that were started here: the nannies and the scheduler."""
        return [*self.nannies, *([self.scheduler] if self.scheduler else [])]

    @property
    def profile(self) -> Path:
        """Write a profile that uses the site; returns its file."""
        path = self.folder / "site.toml"
        path.write_text(PROFILE.format(address=self.address, workers=self.workers), encoding="utf-8")
        return path

    @property
    def worker_processes(self) -> list[psutil.Process]:
        """The workers themselves, below their nannies."""
        found = []
        for nanny in self.nannies:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(nanny.pid).children(recursive=True)
                found += [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return found

    def mend(self) -> list[str]:
        """Start what has ended, as a service manager does; returns what."""
        begun = []
        if self.scheduler is None or self.scheduler.poll() is not None:
            port = self.address.rpartition(":")[2]
            words = ["dask_scheduler", "--host", self.host, "--port", port, "--no-dashboard"]
            self.scheduler = self._start(self.inside, words)
            begun.append("scheduler")
        self.nannies = [nanny for nanny in self.nannies if nanny.poll() is None]
        while len(self.nannies) < self.workers:
            self.made += 1
            words = ["dask_worker", self.address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard"]
            words += ["--name", f"w{self.made}", "--memory-limit", "4GB", "--death-timeout", "30"]
            words += ["--host", self.worker_host, "--local-directory", str(self.folder)]
            self.nannies.append(self._start(self.outside, words))
            begun.append(f"w{self.made}")
        return begun

    def until_there(self, timeout_s: float = 60) -> None:
        """Wait until there is a worker below each nanny."""
        deadline = time.monotonic() + timeout_s
        while len(self.worker_processes) < self.workers:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def log(self) -> str:
        """What they wrote."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def _start(self, before: Sequence[str], words: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{words[0]}.log").open("ab") as log:
            return subprocess.Popen(
                [*before, sys.executable, "-m", f"distributed.cli.{words[0]}", *words[1:]],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
