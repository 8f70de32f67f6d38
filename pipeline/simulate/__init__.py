"""Simulated archives with known landslides, and scars implanted into real ones.

`simulate_archive` writes scenes, a DEM and the truth; `implant` and `into` lay the same scars into real cubes and
catalogues; `report` scores detectors on the archives of several seeds. See docs/simulation.md.
"""

from __future__ import annotations

from slidecube.pipeline.simulate.archive import SimulatedArchive, simulate_archive
from slidecube.pipeline.simulate.baselines import BASELINES, Detection, report, score
from slidecube.pipeline.simulate.implant import implant, into
from slidecube.pipeline.simulate.parameters import Parameters, load_parameters

__all__ = [
    "BASELINES",
    "Detection",
    "Parameters",
    "SimulatedArchive",
    "implant",
    "into",
    "load_parameters",
    "report",
    "score",
    "simulate_archive",
]
