"""Make docs/real-data.md, docs/real-data.json and docs/images/real-*.png from the folder of real fixtures.

Usage: python docs/real_data [FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import document
import flanders
import flanders_clusters
import kaikoura
import networks
import offsets
import patches
import sao_tome
import segments
import sentinel_item
import slovenia

DOCS = Path(__file__).resolve().parents[1]
SECTIONS = (
    flanders,
    sentinel_item,
    kaikoura,
    segments,
    slovenia,
    flanders_clusters,
    patches,
    networks,
    offsets,
    sao_tome,
)


def main(argv: list[str]) -> int:
    """Measure each section, then write numbers and document; returns an exit code."""
    shared = Path(argv[0]) if argv else DOCS.parents[1] / "shared" / "data"
    if not shared.is_dir():
        sys.stderr.write(
            f"there is no folder of real fixtures {str(shared)!r}; name it: make real-data DATA=FOLDER\n"
        )
        return 1
    numbers = {}
    with tempfile.TemporaryDirectory() as scratch:
        for section in SECTIONS:
            started = time.monotonic()
            folder = Path(scratch) / section.__name__
            folder.mkdir()
            numbers[section.__name__] = section.measure(shared, folder, DOCS / "images")
            sys.stderr.write(f"{section.__name__}: {time.monotonic() - started:.0f} s\n")
    text = json.dumps(numbers, indent=1, ensure_ascii=False)
    (DOCS / "real-data.json").write_text(text + "\n", encoding="utf-8")
    (DOCS / "real-data.md").write_text(document.render(numbers), encoding="utf-8")
    sys.stdout.write(f"{DOCS / 'real-data.md'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
