"""Simulated archives with known landslides, and scars implanted into real ones."""

from __future__ import annotations

from slidecube.pipeline.simulate.archive import SimulatedArchive, simulate_archive
from slidecube.pipeline.simulate.parameters import Parameters, load_parameters

__all__ = ["Parameters", "SimulatedArchive", "load_parameters", "simulate_archive"]
