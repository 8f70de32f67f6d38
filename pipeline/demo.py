"""The demonstration: an inventory of a simulated event, from nothing to a report, in one command."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from slidecube.pipeline.config import load_config
from slidecube.pipeline.errors import IncompleteError, PipelineError
from slidecube.pipeline.plan import plan
from slidecube.pipeline.report_stage import evaluate_workspace, evaluation_json, report_workspace
from slidecube.pipeline.run import run
from slidecube.pipeline.simulate import SimulatedArchive, simulate_archive
from slidecube.pipeline.storage import Place, write_atomic

EPOCH = "event"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demonstration left behind.

    report : index.html; picture : PNG; table : the scores as text; seconds : of each step
    """

    report: Place
    picture: Place
    table: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        steps = ", ".join(f"{name} {s:.0f} s" for name, s in self.seconds.items())
        return (
            f"\n{self.table}\n\n"
            "These numbers are against SIMULATED truth: they say how the program works, "
            "not how it does on the ground.\n"
            f"Time: {steps}.\nReport: {self.report}\nPicture: {self.picture}"
        )


def demo(out: Path, *, seed: int = 0, size: str = "default", say: TextIO | None = None) -> Demo:
    """Simulate an archive with known landslides, map it, and compare.

    out : becomes the workspace; it gets archive/, truth/, demo.toml and everything that a run leaves
    A second call goes on where the first one stopped.
    """
    told = say or sys.stderr
    seconds: dict[str, float] = {}
    clock = time.monotonic()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.monotonic()
        seconds[name] = now - clock
        clock = now

    toml, stamp = out / "demo.toml", f"# SIMULATED archive: seed {seed}, size {size}\n"
    if toml.exists() and not toml.read_text(encoding="utf-8").startswith(stamp):
        there = toml.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        raise PipelineError(
            f"{out} holds another demonstration ({there}); name another folder with --out, or empty it"
        )
    if not toml.exists():
        print(f"simulating an archive of scenes (seed {seed}) ...", file=told)
        archive = simulate_archive(out, seed=seed, size=size)
        toml.write_text(stamp + archive_toml(archive), encoding="utf-8")
    lap("simulation")
    config = load_config(toml)
    made = plan(config)
    report = run(made, say=told)
    lap("run")
    if not report.complete:
        first = report.reasons[0]
        raise IncompleteError(f"The demonstration is incomplete: {first[0]}: {first[1]}")
    scores = evaluate_workspace(out, out / "truth" / "landslides.parquet")
    folder = made.workspace.products(made.inventory)
    write_atomic(folder / "evaluation.json", evaluation_json(scores))
    picture = folder / "inventory.png"
    index = report_workspace(out, evaluations=scores, picture=picture)
    lap("evaluation and report")
    return Demo(report=index, picture=picture, table=scores[EPOCH].table(), seconds=seconds)


def write_toml(archive: SimulatedArchive) -> Path:
    """Write the TOML of a run over a simulated archive beside it, and leave one that is there as it is."""
    toml = archive.root / "simulated.toml"
    if not toml.exists():
        toml.write_text(archive_toml(archive), encoding="utf-8")
    return toml


def archive_toml(archive: SimulatedArchive) -> str:
    """Write the TOML of a run over a simulated archive, for a file in the archive's folder, which is its workspace."""
    radar = archive.radar.exists()
    optical = archive.optical if radar else archive.catalog  # the root would hold radar items as well
    sources = {"optical": optical, "dem": archive.dem, **({"radar": archive.radar} if radar else {})}
    lines = "\n".join(f'{role} = "{path.relative_to(archive.root)}"' for role, path in sources.items())
    return f"""\
[area]
aoi = "truth/area.geojson"

[[epoch]]
name = "{EPOCH}"
pre = ["{archive.pre[0]}", "{archive.pre[1]}"]
post = ["{archive.post[0]}", "{archive.post[1]}"]
event = "{archive.event}"

[sources]
{lines}

[cube]
composite = "greenest"
tile_px = 512

[detect]
model = "rdndvi"

[output]
workspace = "."
"""
