"""Simulated worlds for networks: terrains to learn on, to choose by and to judge on, which share no ground.

The parameters of the simulation stay as they are; a world is another part of the island, and other random numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slidecube.pipeline.config import load_config
from slidecube.pipeline.demo import archive_toml
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.plan import plan
from slidecube.pipeline.run import run
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.simulate.archive import SimulatedArchive, simulate_archive
from slidecube.pipeline.simulate.parameters import Parameters, Size, load_parameters
from slidecube.pipeline.simulate.terrain import scene_geobox

Use = Literal["train", "validation", "test"]

CENTRES_M = {
    "north": (241_000.0, 40_000.0),
    "west": (226_000.0, 30_000.0),
    "east": (245_500.0, 28_500.0),
    "south": (233_000.0, 16_500.0),
}
"""Middles of the terrains, in the CRS of the simulation: squares of up to 8.4 km, with what throws shadow into them,
lie on different ground."""

EVENT, QUIET = "event", "quiet"
"""Epochs, each with a run of its own: across the event, and wholly before it."""

_QUIET_WINDOWS = """\
pre = ["2018-06-01", "2018-07-10"]
post = ["2018-07-11", "2018-09-06"]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A part of the island, with random numbers of its own, and what it is for."""

    terrain: str
    seed: int
    use: Use

    @property
    def name(self) -> str:
        """Name of its folder, and of its region in a training."""
        return f"{self.terrain}-{self.seed}"


WORLDS = (
    *(World(terrain=t, seed=s, use="train") for t in ("north", "west") for s in (10, 11)),
    *(World(terrain="east", seed=s, use="validation") for s in (20, 21)),
    *(World(terrain="south", seed=s, use="test") for s in (30, 31, 32)),
)
"""Networks learn in the north and the west, are chosen in the east, and are judged in the south."""


def make_worlds(
    folder: Path, worlds: Iterable[World], *, extent_km: float, overpasses: int | None = None
) -> dict[World, SimulatedArchive]:
    """Simulate worlds below a folder, and make the layers of both epochs; what is there is kept.

    extent_km, overpasses : as of `simulate_archive`
    """
    return {
        world: make_world(folder / world.name, world, extent_km=extent_km, overpasses=overpasses)
        for world in worlds
    }


def make_world(
    folder: Path, world: World, *, extent_km: float, overpasses: int | None = None
) -> SimulatedArchive:
    """Simulate one world, and make its layers."""
    parameters = _centred(world.terrain, extent_km)
    p = parameters.season
    archive = SimulatedArchive(
        root=folder,
        geobox=scene_geobox(parameters.area, parameters.area.sizes[world.terrain]),
        seed=world.seed,
        event=p.event,
        pre=p.pre,
        post=p.post,
    )
    if not archive.catalog.exists():  # it is written last
        sys.stderr.write(f"simulating {world.name}\n")
        archive = simulate_archive(
            folder, seed=world.seed, size=world.terrain, overpasses=overpasses, parameters=parameters
        )
    for epoch in (EVENT, QUIET):
        made = plan_of(archive, epoch)
        report = run(made, stages=("cube",), progress=False)
        if not report.complete:
            raise PipelineError(f"The cube of {world.name} is incomplete: {report.reasons[0]}")
    return archive


def plan_of(
    archive: SimulatedArchive, epoch: str, *, model: str = "rdndvi", detect: str = "", name: str = ""
) -> RunPlan:
    """Plan the run of one epoch of a world.

    model : of [detect]; detect : further lines of it; name : of the TOML, the epoch's when left out
    """
    text = archive_toml(archive).replace('model = "rdndvi"', f'model = "{model}"\n{detect}')
    if epoch == QUIET:
        start, end = text.index("[[epoch]]"), text.index("[sources]")
        text = f'{text[:start]}[[epoch]]\nname = "{QUIET}"\n{_QUIET_WINDOWS}\n{text[end:]}'
    toml = archive.root / f"{name or epoch}.toml"
    # the scores are of the objects; pictures and GeoTIFFs would take as long as the detection
    text += 'formats = ["parquet"]\n'
    if not toml.exists() or toml.read_text(encoding="utf-8") != text:
        toml.write_text(text, encoding="utf-8")
    return plan(load_config(toml))


def _centred(terrain: str, extent_km: float) -> Parameters:
    """Return the parameters with one more named size: a terrain."""
    if terrain not in CENTRES_M:
        raise PipelineError(f"No terrain {terrain!r}; terrains: {', '.join(CENTRES_M)}")
    if not 1.2 <= extent_km <= 8.4:
        raise PipelineError(
            f"extent_km={extent_km} is not allowed; use 1.2 to 8.4, so that no two terrains share ground"
        )
    p = load_parameters()
    sizes = {**p.area.sizes, terrain: Size(centre_m=CENTRES_M[terrain], extent_m=1000 * extent_km)}
    return p.model_copy(update={"area": p.area.model_copy(update={"sizes": sizes})})
