"""What a run was not asked to look for, in words: nobody shall take it for looked for and not found."""

from __future__ import annotations

from slidecube.pipeline.config import Config


def not_looked_for(config: Config) -> list[str]:
    """Return a short line for each thing that was not looked for, and the setting that decides it."""
    lines = []
    if not config.cube.sun.cast_shadow:
        lines.append("cast shadow: [cube.sun] cast_shadow = false")
    if config.ground.river_corridor_m is None:
        lines.append("river corridor: [ground] river_corridor_m is not set")
    return lines
