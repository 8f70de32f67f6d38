"""The report over seeds: `python -m slidecube.pipeline.simulate REPORT.md [SEED ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from slidecube.pipeline.simulate.baselines import markdown, report
from slidecube.pipeline.simulate.detectors import DETECTORS


def main(arguments: list[str]) -> int:
    """Write the report of the baselines and of the pipeline's detectors.

    arguments : file to write, then seeds (0 to 4 where none is given)
    """
    if not arguments or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m slidecube.pipeline.simulate REPORT.md [SEED ...]\n")
        return 1
    seeds = [int(seed) for seed in arguments[1:]] or list(range(5))
    table = report(DETECTORS, seeds=seeds)
    text = f"SIMULATED data, seeds {', '.join(map(str, seeds))}: mean (least to most).\n\n{markdown(table)}\n"
    Path(arguments[0]).write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
