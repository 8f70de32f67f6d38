"""What the engine costs a tile, and a nation that is done: tiles that do nothing, and 100,000 tiles of records.

Run with `python tests/benchmarks/engine_overhead.py [--tiles N]`. Bounds (issue 4): 5 ms a tile on threads, 20 on two
Dask workers, a finished nation found finished in 30 s, `status` in 2 s. The nation is that of `plan_scale.py`; its
records are made up, and nothing of it is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from plan_scale import make_nation

from slidecube.cluster.runner import TaskResult, TileTask
from slidecube.pipeline import ledger
from slidecube.pipeline.config import load_config
from slidecube.pipeline.layers import create_stores
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.plan import plan
from slidecube.pipeline.run import run
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.status import status
from slidecube.pipeline.storage import write_atomic
from slidecube.pipeline.tasks import wanted_of

run_module = importlib.import_module("slidecube.pipeline.run")  # the package shows the function of that name
NOTHING = {"threads": (2000, 5.0), "dask-local": (1000, 20.0)}


def nothing(_: object, task: TileTask) -> TaskResult:
    """Do nothing."""
    return TaskResult(task=task, status="done")


def first_tiles(made: RunPlan, n: int) -> RunPlan:
    """Cut a plan down to its first tiles, with an inventory of their extent."""
    tiles = made.tiles[:n]
    keys = {name: {tile: by[tile] for tile in tiles.keys} for name, by in made.keys.items()}
    return dataclasses.replace(made, tiles=tiles, keys=keys, inventory=f"{made.inventory}-{n}")


def overhead(made: RunPlan, profile: str, n: int) -> float:
    """Milliseconds a tile of a run whose tiles do nothing: runner, events, heartbeat, results; without the start."""
    real, run_module.run_task = run_module.run_task, nothing
    try:
        seconds = []
        for part in (first_tiles(made, 2), first_tiles(made, n)):
            began = time.monotonic()
            done = run(part, stages=("cube",), profile=profile, progress=False).done["cube"]
            seconds.append((time.monotonic() - began, done))
    finally:
        run_module.run_task = real
    (start_s, few_done), (all_s, all_done) = seconds
    return 1000 * (all_s - start_s) / (all_done - few_done)


def finish(made: RunPlan) -> None:
    """Record every task of a plan as done, folded as the end of a run leaves it."""
    create_stores(made)
    for stage in ("cube", "detect"):
        for wanted in wanted_of(made, stage):
            numbers = {"observed": 512 * 512} if stage == "detect" else {"px": 512 * 512}
            records = {
                tile: Record(tile=tile, key=key, state="done", numbers=numbers, seconds=1.0)
                for tile, key in wanted.keys.items()
            }
            content = ledger._written(ledger._joined(ledger._SCHEMA.empty_table(), records))
            wanted.ledger.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(wanted.ledger.folder / ledger.PACKED, content)


def main() -> None:
    """Print each figure beside its bound."""
    options = argparse.ArgumentParser()
    options.add_argument("--tiles", type=int, default=100_000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        toml = make_nation(Path(folder), tiles=given.tiles, dates=6)
        made = plan(load_config(toml))
        print(f"{len(made.tiles)} tiles, {len(made.layers)} layers", flush=True)
        for profile, (n, bound_ms) in NOTHING.items():
            cost = overhead(made, profile, n)
            print(f"{profile:<12} {cost:7.2f} ms a tile that does nothing (bound {bound_ms:g})", flush=True)
        began = time.monotonic()
        finish(made)
        print(f"{'recorded':<12} {time.monotonic() - began:7.1f} s to make the records up", flush=True)
        for name, bound_s, what in (
            ("resume", 30, lambda: run(load_config(toml), stages=("cube", "detect"), progress=False)),
            ("status", 2, lambda: status(made.workspace.root)),
        ):
            began = time.monotonic()
            what()
            print(f"{name:<12} {time.monotonic() - began:7.1f} s with all done (bound {bound_s})", flush=True)
        began = time.monotonic()
        command = [
            str(Path(sys.executable).with_name("slidecube")),
            "status",
            str(made.workspace.root),
            "--json",
        ]
        told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        print(
            f"{'command':<12} {time.monotonic() - began:7.1f} s of `slidecube status`, start of Python included"
        )
        assert not told["tiles"]["detect"]["due"], told["tiles"]


if __name__ == "__main__":
    main()
