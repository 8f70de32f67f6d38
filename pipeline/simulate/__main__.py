"""The report over seeds: `python -m slidecube.pipeline.simulate REPORT.md [SEED ...]`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from slidecube.pipeline.simulate.baselines import Detector, markdown, report


def main(arguments: list[str]) -> int:
    """Write the report of the baselines, and of every detector that the pipeline registers.

    arguments : file to write, then seeds (0 to 4 where none is given)
    A module `slidecube.pipeline.simulate_detectors` with a dict DETECTORS (name -> function of the archive) joins in.
    """
    if not arguments or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m slidecube.pipeline.simulate REPORT.md [SEED ...]\n")
        return 1
    detectors: dict[str, Detector] = {}
    name = "slidecube.pipeline.simulate_detectors"
    if importlib.util.find_spec(name) is not None:
        detectors = dict(importlib.import_module(name).DETECTORS)
    seeds = [int(seed) for seed in arguments[1:]] or list(range(5))
    # the baselines read no scene
    table = report(detectors, seeds=seeds, overpasses=None if detectors else 0)
    text = f"SIMULATED data, seeds {', '.join(map(str, seeds))}: mean (least to most).\n\n{markdown(table)}\n"
    Path(arguments[0]).write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
