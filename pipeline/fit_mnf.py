"""The MNF of a fit: moments tile by tile, of the whole and of each stratum, then the merge and the transform."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import shapely
import xarray as xr

from slidecube.cluster.runner import TileTask
from slidecube.pipeline.features import MNF_BANDS, Layers, mnf_image, mnf_images
from slidecube.pipeline.fit_steps import RunTasks, Step, run_step
from slidecube.pipeline.ledger import Record
from slidecube.pipeline.mnf_strata import StratifiedMnf, fit_strata
from slidecube.pipeline.moments import Moments, block_moments, merge
from slidecube.pipeline.pixels import PixelWindow, aoi_mask, read_layers, stratum_codes
from slidecube.pipeline.report.spectrum import write_spectrum
from slidecube.pipeline.run_plan import EpochPlan, RunPlan
from slidecube.pipeline.sample import pixel_hash
from slidecube.pipeline.statistics import mnf_file, read_mnf, sha256_of, strata_file
from slidecube.pipeline.storage import Place, staged, write_atomic
from slidecube.pipeline.strata import NO_STRATUM
from slidecube.pipeline.tasks import TileContext, require_lock

SEAM_BLOCKS = 16
"""Lattice blocks in which the seams between strata are measured, chosen by a hash of their place."""


def moments_tile(plan: RunPlan, task: TileTask, context: TileContext) -> Record:
    """Sum the moments of each image that the model needs the MNF of, over the tile's pixels in the area.

    Where the plan has strata, a second file holds those of each stratum; both pixels of a difference lie in it.
    """
    epoch, tile = plan.by_epoch[task.epoch], plan.by_tile[task.tile]
    folder = plan.workspace.statistics(task.layer) / "moments"
    folder.mkdir(parents=True, exist_ok=True)
    window = PixelWindow.of_tile(plan.grid, tile).padded(1)
    inside, codes = aoi_mask(plan, window), stratum_codes(plan, window)
    layers = read_layers(plan, epoch.name, window)
    numbers, checksums = {}, {}
    for image in mnf_images(plan.card.inputs):
        whole, strata = _moments(plan, image, layers, inside, codes)
        require_lock(plan, context)
        files = {f"{tile.key}-{image}.json": whole.to_json()}
        if plan.strata is not None:
            by_name = {plan.strata.name_of(code): json.loads(sums.to_json()) for code, sums in strata.items()}
            files[f"{tile.key}-{image}.strata.json"] = json.dumps(by_name)
        for name, text in files.items():
            write_atomic(folder / name, text)
            checksums[name] = sha256_of(folder / name)
        numbers[f"{image}_px"] = whole.pixels
    seen = sum(numbers.values())
    return Record(
        tile=task.tile,
        key=task.key,
        state="done" if seen else "empty",
        reason="" if seen else "no pixel of which every band is known",
        numbers=numbers,
        checksums=checksums,
    )


def _moments(
    plan: RunPlan, image: str, layers: Layers, inside: np.ndarray, codes: np.ndarray
) -> tuple[Moments, dict[int, Moments]]:
    """Moments of a tile: of all pixels, and of each stratum by its code."""
    whole, strata = Moments.none(len(MNF_BANDS)), dict[int, Moments]()
    for at in _blocks_with_next(plan.grid.tile_px, plan.grid.block_px):
        bands = _bands_of(image, layers, at)
        block = block_moments(bands, valid_yx=inside[at])
        whole = whole.merged(block)
        there = [int(code) for code in np.unique(codes[at]) if code]
        for code in there:
            mine = codes[at] == code
            sums = block if mine.all() else block_moments(bands, valid_yx=inside[at] & mine)
            strata[code] = strata[code].merged(sums) if code in strata else sums
    return whole, dict(sorted(strata.items()))


def _bands_of(image: str, layers: Layers, at: tuple[slice, slice]) -> np.ndarray:
    """Bands of a part of an image, (band, y, x): a whole tile of floats would take more than its detection."""
    part = {"y": at[0], "x": at[1]}
    cut = replace(
        layers, post=layers.post.isel(part), pre=layers.pre.isel(part) if layers.pre else layers.pre
    )
    return np.stack([band.values for band in mnf_image(image, cut).data_vars.values()])


def _blocks_with_next(tile_px: int, block_px: int) -> Iterator[tuple[slice, slice]]:
    """Lattice blocks of a tile within its window of one pixel more on each side, with the row and column after each."""
    for r in range(1, tile_px + 1, block_px):
        for c in range(1, tile_px + 1, block_px):
            yield slice(r, r + block_px + 1), slice(c, c + block_px + 1)


def fit_images(
    plan: RunPlan, epoch: EpochPlan, run_tasks: RunTasks, fence: Callable[[], None]
) -> tuple[dict[str, StratifiedMnf], dict[str, Any]]:
    """Fit the MNF of each image that the model reads components of, and write them.

    Returns the fits, and what the manifest says of strata: {} without any.
    """
    images = mnf_images(plan.card.inputs)
    if not images:
        return {}, {}
    folder = plan.workspace.statistics(epoch.stat_key)
    kinds = ("json", "strata.json") if plan.strata is not None else ("json",)
    names = [f"-{image}.{kind}" for image in images for kind in kinds]
    made = run_step(plan, epoch, run_tasks, step=Step(stage="moments", names=names))
    fit = plan.config.fit
    for image, components in images.items():
        sums = merge(Moments.from_json(text) for text in _texts(made, f"-{image}.json"))
        mnf = fit_strata(
            sums,
            _merged_strata(_texts(made, f"-{image}.strata.json")),
            bands=MNF_BANDS,
            components=components,
            share=fit.mnf_variance,
            least_px=fit.strata_min_px,
        )
        fence()
        with staged(folder / f"mnf-{image}") as local:
            write_spectrum(mnf.whole, local, title=f"MNF of {image}, epoch {epoch.name}")
            if plan.strata is not None:
                (local / "strata.csv").write_text(strata_table(mnf), encoding="utf-8")
        write_atomic(mnf_file(folder, image), mnf.whole.to_json())
        if plan.strata is not None:
            write_atomic(strata_file(folder, image), mnf.strata_json())
    fits = read_images(plan, folder)
    return fits, _said(plan, epoch, fits)


def read_images(plan: RunPlan, folder: Place) -> dict[str, StratifiedMnf]:
    """Read the MNF of each image that the plan's model reads components of."""
    return {image: read_mnf(folder, image) for image in mnf_images(plan.card.inputs)}


def said_of(mnf: StratifiedMnf) -> list[str]:
    """What of a fit decides what follows from it."""
    return [mnf.whole.to_json(), *([mnf.strata_json()] if mnf.strata or mnf.fallback else [])]


def _texts(made: list[Place], ending: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in made if path.name.endswith(ending)]


def _merged_strata(texts: list[str]) -> dict[str, Moments]:
    """Moments of each stratum over all tiles."""
    parts: dict[str, list[Moments]] = {}
    for text in texts:
        for name, said in json.loads(text).items():
            parts.setdefault(name, []).append(Moments.from_json(json.dumps(said)))
    return {name: merge(found) for name, found in sorted(parts.items())}


def strata_table(mnf: StratifiedMnf) -> str:
    """Write pixels, kept components and eigenvalues of each stratum as CSV, the whole first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    numbers = [f"eigenvalue_{k + 1}" for k in range(len(mnf.whole.bands))]
    writer.writerow(["stratum", "pixels", "components", "share", *numbers, "takes_the_whole"])
    fits = {"(whole)": mnf.whole, **mnf.strata}
    for name, one in fits.items():
        share = sum(one.shares[: one.components])
        writer.writerow([name, one.pixels, one.components, f"{share:.6f}", *one.eigenvalues, ""])
    for name, reason in mnf.fallback.items():
        writer.writerow([name, "", mnf.whole.components, "", *[""] * len(numbers), reason])
    return out.getvalue()


def _said(plan: RunPlan, epoch: EpochPlan, fits: Mapping[str, StratifiedMnf]) -> dict[str, Any]:
    if plan.strata is None:
        return {}
    strata = {
        image: {
            "fitted": {n: {"pixels": m.pixels, "components": m.components} for n, m in mnf.strata.items()},
            "take the whole": dict(mnf.fallback),
        }
        for image, mnf in fits.items()
    }
    return {"strata": strata, "seams": measure_seams(plan, epoch, fits)}


def measure_seams(
    plan: RunPlan, epoch: EpochPlan, fits: Mapping[str, StratifiedMnf]
) -> dict[str, dict[str, Any]]:
    """Measure the step across borders of strata, hard and blended, against steps inside the strata.

    A step is the absolute difference of a component between two neighbouring pixels; the median counts. `inside`: pairs
    beyond the band, of one stratum; `hard`, `blended`: pairs across the border; `band`: blended, of one stratum, in the
    band. Of at most `SEAM_BLOCKS` lattice blocks that hold a border.
    Returns component -> {"pairs", "inside", "hard", "blended", "band"}; {} where no two strata meet in the area.
    """
    steps: dict[str, dict[str, list[np.ndarray]]] = {}
    found = 0
    for row, col in lattice_places(plan):
        px = plan.grid.block_px
        window = PixelWindow(row=row * px, col=col * px, height=px, width=px)
        codes = stratum_codes(plan, window)
        if (codes == codes[0, 0]).all():
            continue
        layers = read_layers(plan, epoch.name, window, mnf=fits)
        known = xr.DataArray(aoi_mask(plan, window), dims=("y", "x"))
        for name, by_kind in _block_steps(plan, layers, fits, codes, known).items():
            for kind, values in by_kind.items():
                steps.setdefault(name, {}).setdefault(kind, []).append(values)
        found += 1
        if found == SEAM_BLOCKS:
            break
    return {name: _medians(by_kind) for name, by_kind in sorted(steps.items())}


def _block_steps(
    plan: RunPlan,
    layers: Layers,
    fits: Mapping[str, StratifiedMnf],
    codes: np.ndarray,
    known: xr.DataArray,
) -> dict[str, dict[str, np.ndarray]]:
    names = [NO_STRATUM, *(plan.strata.names if plan.strata else ())]
    hard = xr.Dataset(
        {names[code]: (("y", "x"), (codes == code).astype(np.float32)) for code in np.unique(codes)}
    )
    blended_yx = np.maximum.reduce([weight.values for weight in layers.strata.data_vars.values()]) < 1
    out: dict[str, dict[str, np.ndarray]] = {}
    for image, count in mnf_images(plan.card.inputs).items():
        bands = mnf_image(image, layers).where(known)
        both = {
            kind: fits[image].components(bands, weights, suffix=image, count=count)
            for kind, weights in (("hard", hard), ("blended", layers.strata))
        }
        for name in both["hard"].data_vars:
            h, b = (np.asarray(both[kind][name].values, np.float64) for kind in ("hard", "blended"))
            out[str(name)] = _steps(h, b, codes, blended_yx)
    return out


def _steps(
    hard: np.ndarray, blended: np.ndarray, codes: np.ndarray, band: np.ndarray
) -> dict[str, np.ndarray]:
    out: dict[str, list[np.ndarray]] = {"inside": [], "hard": [], "blended": [], "band": []}
    for axis in (0, 1):
        across = np.diff(codes.astype(np.int32), axis=axis) != 0
        first, second = (np.s_[:-1], np.s_[1:]) if axis == 0 else (np.s_[:, :-1], np.s_[:, 1:])
        near = band[first] | band[second]
        h, b = (np.abs(np.diff(values, axis=axis)) for values in (hard, blended))
        for kind, values, chosen in (
            ("inside", h, ~across & ~near),
            ("hard", h, across),
            ("blended", b, across),
            ("band", b, ~across & near),
        ):
            out[kind].append(values[chosen & np.isfinite(values)])
    return {kind: np.concatenate(parts) for kind, parts in out.items()}


def _medians(by_kind: Mapping[str, list[np.ndarray]]) -> dict[str, Any]:
    joined = {kind: np.concatenate(parts) for kind, parts in by_kind.items()}
    medians = {kind: round(float(np.median(v)), 6) if v.size else None for kind, v in joined.items()}
    return {"pairs": int(joined["hard"].size), **medians}


def lattice_places(plan: RunPlan) -> Iterator[tuple[int, int]]:
    """Rows and columns of the lattice blocks that share area with the area of interest, in the order of their hash."""
    per_tile, block_px = plan.grid.tile_px // plan.grid.block_px, plan.grid.block_px
    offsets = np.arange(per_tile)
    rows = np.repeat(plan.tiles.rows[:, None] * per_tile + offsets, per_tile, axis=1).ravel()
    cols = np.tile(plan.tiles.cols[:, None] * per_tile + offsets, (1, per_tile)).ravel()
    a, side_m = plan.grid.frame.affine, block_px * plan.grid.resolution_m
    left, top = a.c + cols * side_m, a.f - rows * side_m
    meets = shapely.intersects(plan.aoi_shape, shapely.box(left, top - side_m, left + side_m, top))
    rows, cols = rows[meets], cols[meets]
    order = np.argsort(pixel_hash(rows, cols), kind="stable")
    yield from zip(rows[order].tolist(), cols[order].tolist(), strict=True)
