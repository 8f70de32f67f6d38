"""Sabotage one tile of whatever process imports the product: this file is its `sitecustomize`.

SABOTAGE : path of a file with the key of the tile, absent for none; beside it `.taken` gets the pid of whoever took it
SABOTAGE_HOW : "kill" or "hang", each time; "eat" all memory, once, in the cgroup SABOTAGE_CGROUP
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path


def sabotaged(make):
    """Wrap what makes a tile of a layer."""

    def made(plan, task, context):
        where = Path(os.environ["SABOTAGE"])
        if where.exists() and task.tile == where.read_text() and task.layer.startswith("terrain"):
            with where.with_suffix(".taken").open("a") as taken:
                taken.write(f"{os.getpid()}\n")
            WAYS[os.environ["SABOTAGE_HOW"]](where)
        return make(plan, task, context)

    return made


def kill(_where):
    """Die at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang(_where):
    """Never end."""
    time.sleep(600)


def eat(where):
    """Eat until the kernel ends it."""
    where.unlink()  # once
    Path(os.environ["SABOTAGE_CGROUP"], "cgroup.procs").write_text(str(os.getpid()))
    eaten = []
    while True:
        eaten.append(b"x" * (16 << 20))


WAYS = {"kill": kill, "hang": hang, "eat": eat}


class Finder:
    """Finds the module of the stages, and changes it when it is loaded."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Give back the real module's spec, with a loader that wraps the stage."""
        if name != "slidecube.pipeline.tile":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module

        def exec_module(module):
            real(module)
            module._STAGES["cube"] = sabotaged(module._STAGES["cube"])

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
