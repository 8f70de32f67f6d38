"""How well an inventory was observed, tile by tile and of the whole, and where its layers have seams.

Pixels and shifts come from the records, counts and dates from the layers, one tile in memory.
"""

from __future__ import annotations

import csv
import datetime as dt
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import rasterio.features
import shapely
import xarray as xr

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.grid import Tile
from slidecube.catalog.scenes import Scene, footprints
from slidecube.pipeline.composite import SCALE
from slidecube.pipeline.coregistration import shifts_in
from slidecube.pipeline.inventory import REASONS
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.omissions import not_looked_for
from slidecube.pipeline.pixels import PixelWindow, aoi_mask, read_layers, read_stored
from slidecube.pipeline.radar import backscatter_db
from slidecube.pipeline.radar_layer import MASK_NODATA
from slidecube.pipeline.run_plan import EpochPlan, LayerPlan, RunPlan, coregistration_of
from slidecube.pipeline.seams import MARGIN_PX, EdgeStep, edge_steps
from slidecube.pipeline.sensors import SensorGap, audited_band, gaps_in, sensor_of
from slidecube.pipeline.tasks import layer_ledger, wanted_of

LEAST_STEP = {"optical": 0.005, "radar": 0.3}
"""Steps below are no seam, whatever their score: reflectance, and decibels."""

SIDES = {"pre": "clear", "post": "clear", "radar_pre": "count", "radar_post": "count"}
"""Sides of an epoch, and what the observations of a pixel are called in their columns."""

_EPOCH = dt.date(1970, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """One audited edge.

    layer, variable : in which it was measured; kind : "tile", "overpass", "sensor" or "block"
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
    """Quality of an inventory.

    tiles : a row a tile and epoch; epochs : a row an epoch; edges : as audited
    gaps : mismatch of sensors over the ground that both saw, a row a layer, variable and pair of sensors
    omissions : what was not looked for, see `omissions.not_looked_for`; outline : of the area, on the grid's map
    """

    tiles: tuple[Mapping[str, Any], ...]
    epochs: tuple[Mapping[str, Any], ...]
    edges: tuple[Edge, ...]
    gaps: tuple[Mapping[str, Any], ...] = ()
    omissions: tuple[str, ...] = ()
    outline: shapely.Geometry | None = None

    def seams(self) -> list[Edge]:
        """Edges that are seams, the largest score first."""
        return sorted((e for e in self.edges if e.seam), key=lambda e: (-e.measured.score, e.tile, e.layer))

    def sensors(self) -> list[dict[str, Any]]:
        """Step between two sensors along the edges where they meet, a row a layer: median of the tiles' steps."""
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
            "sensors": [dict(row) for row in self.gaps],
            "sensor_edges": self.sensors(),
            "not_looked_for": list(self.omissions),
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
    return Quality(
        tiles=tuple(tiles),
        epochs=tuple(epochs),
        edges=tuple(_edges(plan)),
        gaps=tuple(_gaps(plan)),
        omissions=tuple(not_looked_for(plan.config)),
        outline=plan.aoi_shape,
    )


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
    for side, layer in _sides(plan, epoch).items():
        about = _radar_side if plan.by_layer[layer].kind == "radar" else _optical_side
        found = (
            _common(plan, layer, tile) | about(plan, layer, window, inside) | _tile_gaps(plan, layer, tile)
        )
        row |= {f"{side}_{name}": value for name, value in found.items()}
    lengths = [shift.length_px for shift in shifts_in(numbers).values() if shift is not None]
    row["shift_blocks"] = len(lengths)
    row["shift_median_px"] = round(float(np.median(lengths)), 3) if lengths else None
    row["shift_largest_px"] = round(max(lengths), 3) if lengths else None
    return row


def _sides(plan: RunPlan, epoch: EpochPlan) -> dict[str, str]:
    """Layers of an epoch by "pre", "post", "radar_pre", "radar_post": those of radar, too, that no model reads."""
    found = {"pre": epoch.pre, "post": epoch.post}
    (own,) = [one for one in plan.config.epochs if one.name == epoch.name]
    radar = {layer.window: layer.name for layer in plan.layers if layer.kind == "radar"}
    found |= {f"radar_{side}": radar.get(window) for side, window in own.windows.items()}
    return {side: name for side, name in found.items() if name is not None}


def _current(plan: RunPlan, layer: str, tile: Tile) -> Record | None:
    record = layer_ledger(plan, layer).read(tile.key)
    return record if record is not None and record.key == plan.keys[layer][tile.key] else None


def _common(plan: RunPlan, layer: str, tile: Tile) -> dict[str, Any]:
    record, role = _current(plan, layer, tile), plan.by_layer[layer].kind
    if record is None:
        return {"scenes": 0, "lost_scenes": 0, "state": "not done", "reason": ""}
    of_role = {scene.id for scene in plan.scenes_of(layer, tile.key) if scene.role == role}
    return {
        "scenes": len(of_role & set(record.scenes)),  # the DEM under them is no scene
        "lost_scenes": len({scene for scene, _, _ in record.lost}),
        "state": record.state,
        "reason": record.reason,
    }


def _tile_gaps(plan: RunPlan, layer: str, tile: Tile) -> dict[str, Any]:
    record = _current(plan, layer, tile)
    out: dict[str, Any] = {}
    for (variable, first, second), gaps in _by_pair(gaps_in(record.numbers) if record else []).items():
        name = f"gap_{variable}_{first}_{second}"
        out[name] = _weighted_median([(gap.difference, gap.px) for gap in gaps])
        out[f"{name}_n"] = sum(gap.px for gap in gaps)
    return out


def _counted(name: str, counts: np.ndarray) -> dict[str, Any]:
    return {
        f"{name}_min": int(counts.min()) if counts.size else None,
        f"{name}_median": float(np.median(counts)) if counts.size else None,
        f"{name}_max": int(counts.max()) if counts.size else None,
        "unseen_px": int((counts == 0).sum()),
    }


def _day(days: np.ndarray, of: str) -> str | None:
    known = days[days > 0]
    if not known.size:
        return None
    return (_EPOCH + dt.timedelta(days=int(known.min() if of == "first" else known.max()))).isoformat()


def _optical_side(plan: RunPlan, layer: str, window: PixelWindow, inside: np.ndarray) -> dict[str, Any]:
    held = read_stored(plan, layer, ["clear_count", "date", "date_first", "date_last"], window)
    count, chosen, first, last = (array.values[inside] for array in held.data_vars.values())
    return {
        **_counted("clear", count),
        "first": _day(first, "first"),
        "last": _day(last, "last"),
        "chosen_first": _day(chosen, "first"),
        "chosen_last": _day(chosen, "last"),
    }


def _radar_side(plan: RunPlan, layer: str, window: PixelWindow, inside: np.ndarray) -> dict[str, Any]:
    """Tell of radar; shares of layover and shadow are of the pixels at which a scene looked."""
    held = read_stored(plan, layer, ["count", "date_first", "date_last", "layover", "shadow"], window)
    count, first, last, layover, shadow = (array.values[inside] for array in held.data_vars.values())
    found = {
        **_counted("count", count),
        "first": _day(first, "first"),
        "last": _day(last, "last"),
        "looked_px": int((layover != MASK_NODATA).sum()),
        "layover_px": int((layover == 1).sum()),
        "shadow_px": int((shadow == 1).sum()),
    }
    return found | _hidden_shares(found)


def _hidden_shares(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    looked = row[f"{prefix}looked_px"]
    return {
        f"{prefix}{name}_share": round(row[f"{prefix}{name}_px"] / looked, 6) if looked else None
        for name in ("layover", "shadow")
    }


def _epoch_row(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the rows of an epoch's tiles; medians are of the tiles', weighted by their expected pixels."""
    sums = [key for key in rows[0] if key.endswith("_px") and not key.startswith("shift")]
    out: dict[str, Any] = {"epoch": name, "tiles": len(rows)}
    out |= {key: sum(row[key] for row in rows) for key in sums}
    out["observed_share"] = round(out["observed_px"] / out["expected_px"], 6) if out["expected_px"] else None
    for side, count in SIDES.items():
        if f"{side}_{count}_median" not in rows[0]:
            continue
        counted = [(row[f"{side}_{count}_median"], row["expected_px"]) for row in rows if row["expected_px"]]
        out[f"{side}_{count}_median"] = _weighted_median(counted)
        for end, pick in (("first", min), ("last", max)):
            days = [row[f"{side}_{end}"] for row in rows if row[f"{side}_{end}"]]
            out[f"{side}_{end}"] = pick(days) if days else None
        if count == "count":
            out |= _hidden_shares(out, f"{side}_")
    lengths = [row["shift_largest_px"] for row in rows if row["shift_largest_px"] is not None]
    out["shift_largest_px"] = max(lengths) if lengths else None
    return out


def _weighted_median(counted: Sequence[tuple[float, int]]) -> float | None:
    if not counted:
        return None
    values, weights = (np.array(column) for column in zip(*sorted(counted), strict=True))
    return float(values[np.searchsorted(np.cumsum(weights), weights.sum() / 2)])


# --- sensors ----------------------------------------------------------------------------------------------------------


def _by_pair(gaps: Iterable[SensorGap]) -> dict[tuple[str, str, str], list[SensorGap]]:
    found: dict[tuple[str, str, str], list[SensorGap]] = {}
    for gap in gaps:
        found.setdefault((gap.variable, gap.first, gap.second), []).append(gap)
    return dict(sorted(found.items()))


def _gaps(plan: RunPlan) -> Iterator[dict[str, Any]]:
    """Sum the mismatch of sensors over all blocks of each layer: a median weighted by the pixels compared."""
    for layer in plan.layers:
        keys = plan.keys[layer.name]
        records = [r for tile, r in layer_ledger(plan, layer.name).load().items() if r.key == keys.get(tile)]
        found = _by_pair(gap for record in records for gap in gaps_in(record.numbers))
        for (variable, first, second), gaps in found.items():
            yield {
                "layer": layer.name,
                "variable": variable,
                "first": first,
                "second": second,
                "unit": "dB" if layer.kind == "radar" else "reflectance",
                "difference": _weighted_median([(gap.difference, gap.px) for gap in gaps]),
                "lowest": min(gap.difference for gap in gaps),
                "highest": max(gap.difference for gap in gaps),
                "blocks": len(gaps),
                "px": sum(gap.px for gap in gaps),
            }


# --- edges ------------------------------------------------------------------------------------------------------------


def _edges(plan: RunPlan) -> Iterator[Edge]:
    for layer in plan.layers:
        if layer.kind == "optical":
            variable = str(audited_band(plan.config.cube.bands))
        elif layer.kind == "radar":
            variable = "VV"
        else:
            continue
        for tile in plan.tiles:
            yield from _tile_edges(plan, layer, variable, tile)
            yield from _scene_edges(plan, layer, variable, tile)
            yield from _block_edges(plan, layer, variable, tile)


def _values(plan: RunPlan, layer: LayerPlan, variable: str, window: PixelWindow) -> np.ndarray:
    """Reflectance or decibels of a window, NaN = unknown."""
    return _decoded(layer, read_stored(plan, layer.name, [variable], window)[variable])


def _decoded(layer: LayerPlan, stored: xr.DataArray) -> np.ndarray:
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


def _block_edges(plan: RunPlan, layer: LayerPlan, variable: str, tile: Tile) -> Iterator[Edge]:
    """Audit the lattice's blocks within a tile, where something is fitted to each block, or cut at its edge."""
    px, side = plan.grid.tile_px, plan.grid.block_px
    if px == side or not (epochs := _block_wise(plan, layer)):
        return
    window = PixelWindow.of_tile(plan.grid, tile)
    codes = np.add.outer(np.arange(px) // side * (px // side), np.arange(px) // side) + 1
    for epoch in epochs:
        values = (
            _decoded(layer, read_layers(plan, epoch, window, also={"pre": (variable,)}).pre[variable])
            if epoch
            else _values(plan, layer, variable, window)
        )
        for step in edge_steps(values, codes):
            first, second = (
                f"block {tile.row * (px // side) + row} {tile.col * (px // side) + col}"
                for row, col in (divmod(code - 1, px // side) for code in (step.first, step.second))
            )
            yield Edge(
                layer=layer.name,
                variable=variable,
                kind="block",
                tile=tile.key,
                first=first,
                second=second,
                measured=step,
                seam=step.is_seam(LEAST_STEP[layer.kind]),
            )


def _block_wise(plan: RunPlan, layer: LayerPlan) -> list[str]:
    """Epochs whose reading of a layer is to be audited at blocks, "" for the layer as it is stored.

    The speckle's window is cut at a block's edge, a line of the sun's light is fitted to each block, and of an image
    before the event each block is moved by itself, when it is read.
    """
    cube = plan.config.cube
    if layer.kind == "radar":
        return [""] if cube.radar.speckle_window_px else []
    held = coregistration_of(plan.config, plan.card)
    moved = [e.name for e in plan.epochs if e.pre == layer.name] if held is not None and held.correct else []
    return moved or ([""] if cube.sun.correction != "none" else [])


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
    # by name: a hash would decide which of two sensors comes first, and the sign of the step with it
    found = sorted(np.unique(hashed[hashed > 0]), key=lambda value: names[int(value)])
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
