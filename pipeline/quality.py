"""How well an inventory was observed, tile by tile and of the whole, and where its layers have seams.

Pixels and shifts come from the records, counts and dates from the layers, one tile in memory.
"""

from __future__ import annotations

import csv
import datetime as dt
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import rasterio.features
import shapely

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.grid import Tile
from slidecube.catalog.scenes import Scene, footprints
from slidecube.pipeline.composite import SCALE
from slidecube.pipeline.coregistration import shifts_in
from slidecube.pipeline.inventory import REASONS
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.pixels import PixelWindow, aoi_mask, read_stored
from slidecube.pipeline.radar import backscatter_db
from slidecube.pipeline.run_plan import EpochPlan, LayerPlan, RunPlan
from slidecube.pipeline.seams import MARGIN_PX, EdgeStep, edge_steps
from slidecube.pipeline.tasks import layer_ledger, wanted_of

LEAST_STEP = {"optical": 0.005, "radar": 0.3}
"""Steps below are no seam, whatever their score: reflectance, and decibels."""

_EPOCH = dt.date(1970, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """One audited edge.

    layer, variable : in which it was measured; kind : "tile", "overpass" or "sensor"
    tile : in which it lies, or the first of the two; first, second : what meets there
    seam : beyond what texture explains, and of at least `LEAST_STEP`; line : ends of a tile's edge on the map, or None
    """

    layer: str
    variable: str
    kind: str
    tile: str
    first: str
    second: str
    measured: EdgeStep
    seam: bool
    line: tuple[tuple[float, float], tuple[float, float]] | None = None

    def row(self) -> dict[str, Any]:
        """Return its numbers, as JSON types."""
        numbers = {k: round(v, 6) for k, v in asdict(self.measured).items() if isinstance(v, float)}
        names = {
            name: getattr(self, name) for name in ("layer", "variable", "kind", "tile", "first", "second")
        }
        score = min(round(self.measured.score, 2), 1e6)
        return {**names, "pairs": self.measured.pairs, **numbers, "score": score, "seam": self.seam}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Quality of an inventory. tiles : a row a tile and epoch; epochs : a row an epoch; edges : as audited."""

    tiles: tuple[Mapping[str, Any], ...]
    epochs: tuple[Mapping[str, Any], ...]
    edges: tuple[Edge, ...]

    def seams(self) -> list[Edge]:
        """Edges that are seams, the largest score first."""
        return sorted((e for e in self.edges if e.seam), key=lambda e: (-e.measured.score, e.tile, e.layer))

    def sensors(self) -> list[dict[str, Any]]:
        """Mismatch of two sensors where they meet, a row a layer: median of the tiles' steps."""
        found: dict[tuple[str, str, str, str], list[Edge]] = {}
        for edge in self.edges:
            if edge.kind == "sensor":
                found.setdefault((edge.layer, edge.variable, edge.first, edge.second), []).append(edge)
        return [
            {
                **dict(zip(("layer", "variable", "first", "second"), key, strict=True)),
                "tiles": len(edges),
                "pairs": sum(e.measured.pairs for e in edges),
                "step": round(float(np.median([e.measured.step for e in edges])), 6),
                "seams": sum(e.seam for e in edges),
            }
            for key, edges in sorted(found.items())
        ]

    def to_json(self) -> str:
        """Write all of it as JSON."""
        said = {
            "epochs": [dict(row) for row in self.epochs],
            "tiles": [dict(row) for row in self.tiles],
            "edges": [edge.row() for edge in self.edges],
            "sensors": self.sensors(),
            "least_step": LEAST_STEP,
        }
        return json.dumps(said, indent=1) + "\n"

    def to_csv(self) -> str:
        """Write the rows of the tiles as CSV."""
        out = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.tiles for name in row))
        writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self.tiles)
        return out.getvalue()


def quality_of(plan: RunPlan) -> Quality:
    """Gather the quality of a plan's inventory, as far as it is done."""
    tiles = []
    for wanted in wanted_of(plan, "detect"):
        records = wanted.ledger.load()
        for tile in plan.tiles:
            record = records.get(tile.key)
            current = record if record is not None and record.key == wanted.keys[tile.key] else None
            tiles.append(_tile_row(plan, plan.by_epoch[wanted.what], tile, current))
    epochs = [
        _epoch_row(epoch.name, [row for row in tiles if row["epoch"] == epoch.name]) for epoch in plan.epochs
    ]
    return Quality(tiles=tuple(tiles), epochs=tuple(epochs), edges=tuple(_edges(plan)))


# --- tiles ------------------------------------------------------------------------------------------------------------


def _tile_row(plan: RunPlan, epoch: EpochPlan, tile: Tile, record: Record | None) -> dict[str, Any]:
    """Quality of one tile: pixels of the area that were expected, those observed, why not the others, and each side."""
    window = PixelWindow.of_tile(plan.grid, tile)
    inside = aoi_mask(plan, window)
    numbers = dict(record.numbers) if record is not None else {}
    row: dict[str, Any] = {
        "epoch": epoch.name,
        "tile": tile.key,
        "state": "not done" if record is None else record.state,
        "expected_px": int(inside.sum()),
        "observed_px": numbers.get("observed", 0),
        "not_observable_px": numbers.get("not_observable", 0),
    }
    row["missing_px"] = row["expected_px"] - row["observed_px"] - row["not_observable_px"]
    row |= {f"reason_{i:d}_px": numbers.get(f"reason {i:d}", 0) for i in REASONS if i}
    for side in ("pre", "post"):
        layer = getattr(epoch, side)
        if layer is not None:
            row |= {
                f"{side}_{name}": value for name, value in _side(plan, layer, tile, window, inside).items()
            }
    lengths = [shift.length_px for shift in shifts_in(numbers).values() if shift is not None]
    row["shift_blocks"] = len(lengths)
    row["shift_median_px"] = round(float(np.median(lengths)), 3) if lengths else None
    row["shift_largest_px"] = round(max(lengths), 3) if lengths else None
    return row


def _side(plan: RunPlan, layer: str, tile: Tile, window: PixelWindow, inside: np.ndarray) -> dict[str, Any]:
    record = layer_ledger(plan, layer).read(tile.key)
    current = record is not None and record.key == plan.keys[layer][tile.key]
    held = read_stored(plan, layer, ["clear_count", "date", "date_first", "date_last"], window)
    counts = held["clear_count"].values[inside]

    def day(name: str, of: str) -> str | None:
        values = held[name].values[inside]
        known = values[values > 0]
        if not known.size:
            return None
        return (_EPOCH + dt.timedelta(days=int(known.min() if of == "first" else known.max()))).isoformat()

    return {
        "scenes": len(record.scenes) if record is not None and current else 0,
        "lost_scenes": len({scene for scene, _, _ in record.lost}) if record is not None and current else 0,
        "state": record.state if record is not None and current else "not done",
        "reason": record.reason if record is not None and current else "",
        "clear_min": int(counts.min()) if counts.size else None,
        "clear_median": float(np.median(counts)) if counts.size else None,
        "clear_max": int(counts.max()) if counts.size else None,
        "unseen_px": int((counts == 0).sum()),
        "first": day("date_first", "first"),
        "last": day("date_last", "last"),
        "chosen_first": day("date", "first"),
        "chosen_last": day("date", "last"),
    }


def _epoch_row(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the rows of an epoch's tiles; medians are of the tiles', weighted by their expected pixels."""
    sums = [key for key in rows[0] if key.endswith("_px") and not key.startswith("shift")]
    out: dict[str, Any] = {"epoch": name, "tiles": len(rows)}
    out |= {key: sum(row[key] for row in rows) for key in sums}
    out["observed_share"] = round(out["observed_px"] / out["expected_px"], 6) if out["expected_px"] else None
    for side in ("pre", "post"):
        if f"{side}_clear_median" in rows[0]:
            counted = [
                (row[f"{side}_clear_median"], row["expected_px"]) for row in rows if row["expected_px"]
            ]
            out[f"{side}_clear_median"] = _weighted_median(counted)
            for end, pick in (("first", min), ("last", max)):
                days = [row[f"{side}_{end}"] for row in rows if row[f"{side}_{end}"]]
                out[f"{side}_{end}"] = pick(days) if days else None
    lengths = [row["shift_largest_px"] for row in rows if row["shift_largest_px"] is not None]
    out["shift_largest_px"] = max(lengths) if lengths else None
    return out


def _weighted_median(counted: Sequence[tuple[float, int]]) -> float | None:
    if not counted:
        return None
    values, weights = (np.array(column) for column in zip(*sorted(counted), strict=True))
    return float(values[np.searchsorted(np.cumsum(weights), weights.sum() / 2)])


# --- edges ------------------------------------------------------------------------------------------------------------


def _edges(plan: RunPlan) -> Iterator[Edge]:
    for layer in plan.layers:
        if layer.kind == "optical":
            variable = "B08" if "B08" in plan.config.cube.bands else plan.config.cube.bands[0]
        elif layer.kind == "radar":
            variable = "VV"
        else:
            continue
        for tile in plan.tiles:
            yield from _tile_edges(plan, layer, variable, tile)
            yield from _scene_edges(plan, layer, variable, tile)


def _values(plan: RunPlan, layer: LayerPlan, variable: str, window: PixelWindow) -> np.ndarray:
    """Reflectance or decibels of a window, NaN = unknown."""
    stored = read_stored(plan, layer.name, [variable], window)[variable]
    if layer.kind == "radar":
        return np.asarray(backscatter_db(stored).values, np.float32)
    return np.where(stored.values == 0, np.nan, stored.values.astype(np.float32) / SCALE)


def _tile_edges(plan: RunPlan, layer: LayerPlan, variable: str, tile: Tile) -> Iterator[Edge]:
    """Audit the right and the lower edge of a tile, where another one lies beyond."""
    px, corner, res = plan.grid.tile_px, plan.grid.frame.affine, plan.grid.resolution_m
    top, left = tile.row * px, tile.col * px
    for down, right in ((0, 1), (1, 0)):
        other = plan.by_tile.get(f"r{tile.row + down:03d}c{tile.col + right:03d}")
        if other is None:
            continue
        if right:
            window = PixelWindow(row=top, col=left + px - MARGIN_PX, height=px, width=2 * MARGIN_PX)
        else:
            window = PixelWindow(row=top + px - MARGIN_PX, col=left, height=2 * MARGIN_PX, width=px)
        regions = np.ones(window.shape, np.uint8)
        regions[(np.s_[:, MARGIN_PX:] if right else np.s_[MARGIN_PX:])] = 2
        ends = ((px, 0), (px, px)) if right else ((0, px), (px, px))
        (x0, y0), (x1, y1) = ((corner.c + (left + x) * res, corner.f - (top + y) * res) for x, y in ends)
        for step in edge_steps(_values(plan, layer, variable, window), regions):
            yield Edge(
                layer=layer.name,
                variable=variable,
                kind="tile",
                tile=tile.key,
                first=tile.key,
                second=other.key,
                measured=step,
                seam=step.is_seam(LEAST_STEP[layer.kind]),
                line=((x0, y0), (x1, y1)),
            )


def _scene_edges(plan: RunPlan, layer: LayerPlan, variable: str, tile: Tile) -> Iterator[Edge]:
    """Audit edges within a tile: of overpasses by their footprints, and of sensors by footprint or chosen date."""
    role = "radar" if layer.kind == "radar" else "optical"
    scenes = [scene for scene in plan.scenes_of(layer.name, tile.key) if scene.role == role]
    if not scenes:
        return
    window = PixelWindow.of_tile(plan.grid, tile)
    kinds: dict[str, dict[int, str]] = {}
    regions: dict[str, np.ndarray] = {}
    regions["overpass"], kinds["overpass"] = _covered_by(
        plan, window, scenes, {s.id: s.datatake or s.id for s in scenes}
    )
    if layer.kind == "radar":
        sensors = {s.id: sensor_of(s) for s in scenes}
        regions["sensor"], kinds["sensor"] = _covered_by(plan, window, scenes, sensors)
    else:
        chosen = read_stored(plan, layer.name, ["date"], window)["date"].values
        regions["sensor"], kinds["sensor"] = _chosen_sensor(chosen, scenes)
    values: np.ndarray | None = None
    for kind, codes in regions.items():
        if len(kinds[kind]) < 2:
            continue
        values = _values(plan, layer, variable, window) if values is None else values
        for step in edge_steps(values, codes):
            yield Edge(
                layer=layer.name,
                variable=variable,
                kind=kind,
                tile=tile.key,
                first=kinds[kind][step.first],
                second=kinds[kind][step.second],
                measured=step,
                seam=step.is_seam(LEAST_STEP[layer.kind]),
            )


def sensor_of(scene: Scene) -> str:
    """Name of the satellite, such as "sentinel-2b", or "" where an item does not say."""
    return str((scene.item.get("properties") or {}).get("platform") or "").lower()


def _covered_by(
    plan: RunPlan, window: PixelWindow, scenes: Sequence[Scene], groups: Mapping[str, str]
) -> tuple[np.ndarray, dict[int, str]]:
    """Which groups of scenes cover each pixel: codes from 1 by set, and the sets in words."""
    geobox = window.geobox(plan.grid)
    shapes = footprints(scenes)
    hashed = np.zeros(window.shape, np.uint64)
    names: dict[int, str] = {0: "none"}
    for group in sorted(set(groups.values())):
        union = shapely.union_all(
            [shape for shape, s in zip(shapes, scenes, strict=True) if groups[s.id] == group]
        )
        outline = Aoi(name=group or "unnamed", geometry=union).to_crs(plan.grid.crs)
        covered = rasterio.features.geometry_mask(
            [outline], out_shape=window.shape, transform=geobox.affine, invert=True
        )
        mine = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "little")
        hashed[covered] ^= np.uint64(mine)
        names |= {known ^ mine: _joined(said, group) for known, said in list(names.items())}
        there = {int(value) for value in np.unique(hashed)}
        names = {known: said for known, said in names.items() if known in there or known == 0}
    found = np.unique(hashed[hashed > 0])
    codes = np.zeros(window.shape, np.int64)
    for code, value in enumerate(found, start=1):
        codes[hashed == value] = code
    return codes, {code: names[int(value)] for code, value in enumerate(found, start=1)}


def _joined(said: str, group: str) -> str:
    return group if said == "none" else f"{said} + {group}"


def _chosen_sensor(date_yx: np.ndarray, scenes: Sequence[Scene]) -> tuple[np.ndarray, dict[int, str]]:
    """Sensor of the chosen date of each pixel, 0 where none was chosen or two sensors saw that day."""
    by_day: dict[int, set[str]] = {}
    for scene in scenes:
        by_day.setdefault((scene.datetime.date() - _EPOCH).days, set()).add(sensor_of(scene))
    alone = {day: next(iter(found)) for day, found in by_day.items() if len(found) == 1}
    names = sorted(set(alone.values()) - {""})
    codes = np.zeros(date_yx.shape, np.int64)
    for day, name in alone.items():
        if name:
            codes[date_yx == day] = names.index(name) + 1
    return codes, dict(enumerate(names, start=1))
