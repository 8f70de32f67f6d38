"""A soak of `kill -9`: a worker, a nanny, the scheduler, a driver, a shard, whichever comes; then everything is there.

A site's service manager starts again what has died, and the user gives the same command again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil
import pytest

SHARDS = (("cube", "--shard", "0/2"), ("cube", "--shard", "1/2"))
KINDS = {"threads": [("run",)], "dask-local": [("run",)], "site": [*SHARDS, ("run",)]}
"""Commands of a run: all shards together, then the others."""

KILLS_OF_ONE = 6
PATIENCE_S = 300


@dataclass(slots=True, kw_only=True)
class Soak:
    """One workspace, whatever is killed meanwhile.

    site : of Dask, None where a driver has its own workers or none; killed : how often which role was, here and before
    kills : of them here
    """

    desk: object
    rng: random.Random
    kind: str
    site: object = None
    killed: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    drivers: dict[tuple[str, ...], subprocess.Popen[str]] = field(default_factory=dict)
    deadline: float = 0.0

    def go_through(self, kills: int, span_s: float) -> None:
        """Run to the end, with so many kills on the way as long as it lasts."""
        commands = KINDS[self.kind]
        shards = [command for command in commands if "--shard" in command]
        try:
            for together in filter(None, (shards, [c for c in commands if c not in shards])):
                # shards first, and some kills are left for what comes after them
                upto = kills if together[0] not in shards else (kills + 1) // 2
                self._together(together, upto, span_s)
        finally:
            for driver in self.drivers.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()

    def _together(self, commands: list[tuple[str, ...]], kills: int, span_s: float) -> None:
        self.deadline = time.monotonic() + PATIENCE_S
        self.drivers.clear()
        while not all(self._done(command) for command in commands):
            for command in commands:
                if not self._done(command) and not self._alive(command):
                    self._start(command)
            if self.kills < kills and self._until(self._at_work):
                until = time.monotonic() + self.rng.random() * span_s
                if self._until(lambda until=until: time.monotonic() >= until):
                    self._kill()
            else:
                self._until(lambda: False)

    def _until(self, met) -> bool:
        """Wait until something is so, and start again what dies of the site; tells whether no driver ended first."""
        alive = [driver for driver in self.drivers.values() if driver.poll() is None]
        while not met():
            assert time.monotonic() < self.deadline, f"it does not come to its end: {self.log()}"
            if any(driver.poll() is not None for driver in alive):
                return False
            if self.site is not None and (begun := self.site.mend()):
                print(f"    started again: {', '.join(begun)}")
            time.sleep(0.02)
        return True

    def _at_work(self) -> bool:
        """Tell whether all drivers that run hold a lock: before that there is nothing to disturb."""
        held = []
        for path in self.desk.workspace.glob("locks/*.json"):
            with contextlib.suppress(FileNotFoundError):  # given back meanwhile
                held.append(json.loads(path.read_text())["pid"])
        return {driver.pid for driver in self.drivers.values() if driver.poll() is None} <= set(held)

    def _start(self, command: tuple[str, ...]) -> None:
        with (self.desk.folder / "drivers.log").open("a") as log:
            self.drivers[command] = self.desk.start(
                command[0], self.desk.toml, "--quiet", *command[1:], stdout=log, stderr=log
            )

    def _alive(self, command: tuple[str, ...]) -> bool:
        driver = self.drivers.get(command)
        return driver is not None and driver.poll() is None

    def _done(self, command: tuple[str, ...]) -> bool:
        """Tell whether a command came to its end; one that was killed or could not go on is to be given again."""
        driver = self.drivers.get(command)
        if driver is None or (code := driver.poll()) is None:
            return False
        # one that comes while the scheduler is dead finds none to connect to, and says so
        unconnected = code == 1 and "No Dask scheduler answers" in self.log()
        assert code in {0, 2, -signal.SIGKILL} or unconnected, (code, self.log())
        return code == 0

    def _kill(self) -> None:
        roles = self._victims()
        # a role that was killed seldom comes first: there are fewer schedulers than workers
        least = min(self.killed[role] for role in roles)
        role = self.rng.choice([role for role in roles if self.killed[role] == least])
        victim = self.rng.choice(roles[role])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            self.killed[role] += 1
            self.kills += 1
            print(f"  killed {role} {victim} of {self.kind}")
        for process in [*self.drivers.values(), *(self.site.processes if self.site is not None else ())]:
            if process.pid == victim:
                process.wait()

    def _victims(self) -> dict[str, list[int]]:
        alive = {command: d.pid for command, d in self.drivers.items() if d.poll() is None}
        roles = {
            "shard": [pid for command, pid in alive.items() if "--shard" in command],
            "driver": [pid for command, pid in alive.items() if "--shard" not in command],
            "worker": [p.pid for pid in alive.values() for p in workers_of(pid)],
        }
        if self.site is not None:
            roles["worker"] = [p.pid for p in self.site.worker_processes]
            roles["nanny"] = [nanny.pid for nanny in self.site.nannies]
            roles["scheduler"] = [self.site.scheduler.pid]
        return {role: pids for role, pids in roles.items() if pids}

    def log(self) -> str:
        path = self.desk.folder / "drivers.log"
        return path.read_text() if path.exists() else ""


def workers_of(pid: int) -> list[psutil.Process]:
    """Worker processes below a driver."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return []


@pytest.fixture
def soak(desk_in, tmp_path, witness, servers):
    """Go through one run of a kind, and hold it to the undisturbed one; killed : counts who was."""
    number = 0

    def once(kind: str, rng: random.Random, kills: int, killed: Counter[str]) -> None:
        nonlocal number
        number += 1
        folder = tmp_path / f"{number}-{kind}"
        with contextlib.ExitStack() as stack:
            site, profile = None, kind
            if kind == "site":
                site = stack.enter_context(servers("dask_site").DaskSite(folder / "site"))
                profile = str(site.profile)
            desk = desk_in(folder / "desk", cluster=witness.cluster(profile), **witness.settings)
            one = Soak(desk=desk, rng=rng, kind=kind, site=site, killed=killed)
            print(f"{number}: {kind}")
            one.go_through(kills, witness.span_s * (1 if kind == "threads" else 2))
        assert "Traceback" not in one.log(), one.log()
        witness.assert_whole(desk)

    return once


def test_everything_is_killed_once(soak):
    rng, killed = random.Random(20181106), Counter[str]()
    everything = {"shard", "worker", "nanny", "scheduler"}
    for _ in range(12):  # a run may come to its end before all have had their turn
        soak("site", rng, 6, killed)
        if set(killed) >= everything:
            break

    assert set(killed) >= everything


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_random_kills(soak):
    rng = random.Random(20180906)
    killed = Counter[str]()
    while killed.total() < 50:
        soak(rng.choice(list(KINDS)), rng, rng.randint(3, KILLS_OF_ONE), killed)
        print(f"{killed.total()} kills: {dict(killed)}", flush=True)

    assert set(killed) == {"shard", "driver", "worker", "nanny", "scheduler"}
