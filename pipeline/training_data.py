"""Training data: the patches that [[data]] and [patches] of a training's TOML ask for.

Of cubes the plan of a run is used as it is: nothing is searched, and no scene is read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from slidecube.models.card import FeatureSpec
from slidecube.models.patches import Patches
from slidecube.models.splits import PARTS, Joined, Part, Subset, join, share_out
from slidecube.pipeline.benchmark_patches import DerivedPatches, open_benchmark
from slidecube.pipeline.confusers import is_polygons
from slidecube.pipeline.cube_data import LEARNING, Blocks, OpenCube, crops, open_cube, side_by_side
from slidecube.pipeline.cube_patches import CubePatches
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.sample import pixel_hash
from slidecube.pipeline.training_tables import DataTable, PatchTable, Use


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Patches to learn from, to choose by, and to judge by once; each may be empty."""

    training: Patches
    validation: Patches
    test: Patches

    def part(self, name: Part) -> Patches:
        """Return the patches of a part by its name, of `PARTS`."""
        return {"train": self.training, "validation": self.validation, "test": self.test}[name]


def open_data(table: DataTable, patches: PatchTable, features: FeatureSpec, *, base: Path) -> Data:
    """Open one [[data]]; base : the folder that its paths start from.

    Raises PipelineError, CatalogError or ModelError, in one line.
    """
    return open_all_data([table], patches, features, base=base)


def open_all_data(
    tables: Sequence[DataTable], patches: PatchTable, features: FeatureSpec, *, base: Path
) -> Data:
    """Open all [[data]] of a training as one; patches to learn from are shared equally among its cubes.

    base : the folder that their paths start from
    Raises PipelineError, CatalogError or ModelError, in one line: what one table refuses, or two of them on the same
    ground in different parts.
    """
    cubes = [open_cube(table, features, patches, base=base) for table in tables if table.kind == "cube"]
    _require_apart(cubes)
    found: dict[Part, list[Patches]] = {part: [] for part in PARTS}
    shared = _shared_blocks(cubes, patches)
    learning = [cube for cube in cubes if cube.used in LEARNING]
    _require_confusers(learning, patches)
    for position, cube in enumerate(learning):
        count = patches.count // len(learning) + (position < patches.count % len(learning))
        if count:
            found["train"].append(crops(cube, count, blocks=_own(cube, shared, "train")))
    for part in PARTS[1:]:
        judging = [cube for cube in cubes if cube.used in (part, "blocks")]
        found[part] += [side_by_side(cube, blocks=_own(cube, shared, part)) for cube in judging]
    for table in (table for table in tables if table.kind != "cube"):
        for part, one in open_benchmark(table, patches, features, base=base).items():
            found[part].append(one)
    every = [patches for of in found.values() for patches in of]
    if not every:
        raise PipelineError("[[data]]: none is given; name a cube or a benchmark's folder")
    made = {part: join(of, like=every[0]) for part, of in found.items()}
    return Data(training=made["train"], validation=made["validation"], test=made["test"])


def leave_one_out(tables: Sequence[DataTable]) -> Iterator[tuple[str, list[DataTable]]]:
    """Yield for each region the tables of a training that has not seen it: it is the test.

    Of the others those that were for validation stay so; where none is left, the next region validates. All others are
    learnt from, whole: blocks of theirs for a test would be mixed with the region that is left out.
    Raises PipelineError where fewer than three regions are named.
    """
    names = [table.named for table in tables]
    regions = list(dict.fromkeys(names))
    if len(regions) < 3:
        raise PipelineError(
            f"Leaving one region out needs 3 regions and more (to learn, to validate, to test); [[data]] names "
            f"{len(regions)}: {', '.join(regions)}"
        )
    for at, held in enumerate(regions):
        others = [table.used for table, name in zip(tables, names, strict=True) if name != held]
        following = "" if "validation" in others else regions[(at + 1) % len(regions)]
        turned = []
        for table, name in zip(tables, names, strict=True):
            validates = table.used == "validation" or name == following
            use: Use = "test" if name == held else "validation" if validates else "train"
            turned.append(table.model_copy(update={"use": use}))
        yield held, turned


def explain(data: Data) -> list[dict[str, Any]]:
    """Say what is in each part: a row for each set of patches, JSON types."""
    rows: list[dict[str, Any]] = []
    for part in PARTS:
        found = data.part(part)
        for member in found.members if isinstance(found, Joined) else (found,):
            row = {
                "part": part,
                "regions": dict(sorted(Counter(member.regions).items())),
                "patches": len(member),
            }
            rows.append(row | _facts(member))
    return rows


def _facts(patches: Patches) -> dict[str, int]:
    """Counts of a set of patches for people."""
    if isinstance(patches, CubePatches):
        return patches.facts
    if isinstance(patches, DerivedPatches):
        return _facts(patches.of)
    if isinstance(patches, Subset):
        landslide_px = getattr(patches.of, "landslide_px", ())
        own = [landslide_px[i] for i in patches.indices if landslide_px]
        return {"landslide pixels": sum(own), "with landslides": sum(px > 0 for px in own)}
    return {}


def explain_text(data: Data) -> str:
    """Return the same as lines of text."""
    lines = []
    for row in explain(data):
        where = ", ".join(f"{region} ({n})" for region, n in row["regions"].items())
        facts = ", ".join(f"{name} {n:,}" for name, n in row.items() if isinstance(n, int))
        lines.append(f"{row['part']:<11} {where}: {facts}")
    lines += [f"{part:<11} no patches" for part in PARTS if not len(data.part(part))]
    return "\n".join(lines)


def _require_apart(cubes: Sequence[OpenCube]) -> None:
    """Refuse cubes that share ground and are in different parts: what is judged would have been learnt."""
    outlines = [cube.cube.plan.aoi.to_crs("EPSG:4326") for cube in cubes]
    for (one, first), (other, second) in combinations(zip(cubes, outlines, strict=True), 2):
        if one.table.world != other.table.world:
            continue
        together = one.used == other.used and (one.used != "blocks" or one.ground == other.ground)
        if not together and shapely.area(shapely.intersection(first, second)) > 0:
            raise PipelineError(
                f"[[data]] {one.region!r} ({one.used}) and {other.region!r} ({other.used}) share ground, so what one "
                "teaches the other would be judged by; put both into one part, both into blocks on one grid, or draw "
                "their areas apart"
            )


def _require_confusers(learning: Sequence[OpenCube], patches: PatchTable) -> None:
    """Refuse a file of confusers that has polygons in no cube: nobody would miss them."""
    for name in patches.confusers if patches.hard and learning else ():
        if is_polygons(name) and not any(name in cube.confusers for cube in learning):
            raise PipelineError(
                f"[patches] confusers: {name!r} has no polygon in the area of any cube that is learnt from; name "
                "another file, or correct its CRS"
            )


_Shared = dict[tuple[str, float, str], dict[tuple[int, int], Part]]
"""Part of each spatial block, by the ground that it lies on."""


def _shared_blocks(cubes: Sequence[OpenCube], patches: PatchTable) -> _Shared:
    """Share the spatial blocks of each ground among the parts, together for all cubes on it."""
    found: dict[tuple[str, float, str], dict[tuple[int, int], bool]] = defaultdict(dict)
    for cube in (cube for cube in cubes if cube.used == "blocks"):
        for block, holds in cube.blocks().items():
            found[cube.ground][block] = found[cube.ground].get(block, False) or holds
    shared: _Shared = {}
    for ground, blocks in found.items():
        at = sorted(blocks)
        places = np.array(at, np.int64)
        hash_b = pixel_hash(places[:, 0], places[:, 1], patches.seed)
        part_b = share_out(hash_b, np.array([blocks[block] for block in at]), patches.shares)
        shared[ground] = {block: PARTS[part] for block, part in zip(at, part_b.tolist(), strict=True)}
    return shared


def _own(cube: OpenCube, shared: _Shared, part: Part) -> Blocks | None:
    """Spatial blocks of a part; None where the whole cube is in one."""
    if cube.used != "blocks":
        return None
    return frozenset(block for block, of in shared[cube.ground].items() if of == part)
