"""Pixels that do not serve, by a table: what each run says of them, in the inventory, in status or in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

from slidecube.pipeline.inventory import REASONS
from slidecube.pipeline.open import open_detected, open_plan
from slidecube.pipeline.simulate import simulate_archive

SCENES, DEM = "archive/sentinel-2-l2a", "archive/dem"
BOX = [6.585, 0.283, 6.598, 0.2955]  # in one tile


def rewritten(path: Path, change: Callable[[np.ndarray], np.ndarray], window: Window | None = None) -> None:
    """Write a raster anew, its values changed, its dtype that of the result, its extent a window of it."""
    with rasterio.open(path) as src:
        profile, values = src.profile, change(src.read(1, window=window))
        transform = src.transform if window is None else src.window_transform(window)
    height, width = values.shape
    profile.update(
        driver="GTiff", interleave="band", dtype=values.dtype, transform=transform, height=height, width=width
    )
    with rasterio.open(path, "w", **profile) as out:
        out.write(values, 1)


def band(root: Path, name: str, day_from: str = "2000") -> list[Path]:
    found = sorted((root / SCENES).glob(f"*/{name}.tif"), key=lambda p: p.parent.name.split("_")[3])
    return [p for p in found if p.parent.name.split("_")[3][:8] >= day_from]


def dem_of(root: Path) -> Path:
    (path,) = (root / DEM).glob("*/*.tif")
    return path


def all_snow(root):
    for path in band(root, "SCL"):
        rewritten(path, lambda v: np.where(v == 0, 0, 11).astype(v.dtype))


def all_water(root):
    for path in band(root, "SCL"):
        rewritten(path, lambda v: np.where(v == 0, 0, 6).astype(v.dtype))
    for path in band(root, "B08"):  # darker than red, by whatever offset
        shutil.copy(path.with_name("B04.tif"), path)
        rewritten(path, lambda v: np.where(v == 0, 0, np.maximum(v // 8, 1)).astype(v.dtype))


def small_dem(root):
    """The western part of it, item and file: the tile reaches beyond."""
    path = dem_of(root)
    with rasterio.open(path) as src:
        _, col = src.index((BOX[0] + BOX[2]) / 2, BOX[1])
        window = Window(0, 0, col, src.height)
        bounds = list(rasterio.windows.bounds(window, src.transform))
        shape, transform = [src.height, col], list(src.transform)[:6]
    rewritten(path, lambda v: v, window)
    (item,) = path.parent.glob("*.json")
    said = json.loads(item.read_text())
    left, bottom, right, top = bounds
    ring = [[left, bottom], [right, bottom], [right, top], [left, top], [left, bottom]]
    said |= {"bbox": bounds, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    said["properties"] |= {"proj:shape": shape, "proj:transform": transform}
    item.write_text(json.dumps(said))


def striped_dem(root):
    def stripes(values):
        values = values.astype(np.float32)
        values[:, ::16] = np.nan
        return values

    rewritten(dem_of(root), stripes)


def reflectance_as_float(root):
    for path in band(root, "B08", "20180907"):
        rewritten(path, lambda v: np.where(v == 0, np.nan, v / 10_000).astype(np.float32))


def striped_float(root):
    def stripes(values):
        values = values.astype(np.float32)
        values[::10] = np.nan
        return values

    rewritten(band(root, "B04", "20180907")[0], stripes)
    rewritten(band(root, "B04", "20180907")[1], stripes)


def corrupt_blocks(root):
    """The middle of the file is noise, its header whole: the first overpass after the event."""
    first = band(root, "B08", "20180907")[0].parent.name.split("_")[3]
    for path in band(root, "B08", "20180907"):
        if path.parent.name.split("_")[3] == first:
            content = bytearray(path.read_bytes())
            half = len(content) // 2
            noise = np.random.default_rng(0).bytes(half // 2)
            content[half // 2 : half // 2 + len(noise)] = noise
            path.write_bytes(bytes(content))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """spoil : the archive; code : of the run; says : in its one line; reasons : words of those that must occur

    whole : no pixel may be observed; lost : an asset that status must name
    """

    spoil: Callable[[Path], None]
    code: int = 0
    says: str = ""
    reasons: tuple[str, ...] = ()
    whole: bool = False
    lost: str = ""
    changes: dict[str, Any] = field(default_factory=dict)


CASES = {
    "all snow": Case(spoil=all_snow, reasons=("snow",), whole=True),
    "all water": Case(spoil=all_water, reasons=("water",), whole=True),
    "a DEM smaller than the tile": Case(spoil=small_dem, reasons=("no terrain",)),
    "stripes without heights": Case(spoil=striped_dem, reasons=("no terrain",)),
    "reflectance as float": Case(spoil=reflectance_as_float, code=2, says="it holds float32, and whole"),
    "float with NaN stripes": Case(
        spoil=striped_float, code=2, says="it holds float32", changes={"cube": {"max_lost_scenes": 0}}
    ),
    "corrupt blocks, none may be lost": Case(
        spoil=corrupt_blocks, code=2, says="asset 'B08' of item", changes={"cube": {"max_lost_scenes": 0}}
    ),
    "corrupt blocks within the budget": Case(spoil=corrupt_blocks, lost="B08"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bad_pixels_are_told(desk_in, small_archive, tmp_path, command, name):
    case = CASES[name]
    root = tmp_path / "own"
    shutil.copytree(small_archive, root)
    case.spoil(root)
    area = {"area": {"aoi": None, "bbox": BOX, "crs": "EPSG:32632"}}
    desk = desk_in(tmp_path / "desk", archive=root).write(**area, **case.changes)

    found = command("run", desk.toml, "--quiet")

    assert found.code == case.code, found.err
    if case.code:
        assert case.says in found.refusal
        state = json.loads(command("status", desk.workspace, "--json").out)
        assert not state["complete"]
        assert state["tiles"]["cube"]["failed"] > 0
        return
    plan = open_plan(desk.workspace)
    inventory = open_detected(plan).isel(epoch=0)
    seen, why, slide = (inventory[n].values for n in ("observability", "reason", "landslide"))
    hidden = seen == 2
    assert (why[hidden] != 0).all(), "what could not be seen has a reason"
    assert not (slide[hidden] <= 1).any(), "and says nothing of landslides"
    told = [text for value, text in REASONS.items() if (why[hidden] == value).any()]
    for words in case.reasons:
        assert any(word in text for word in words.split("|") for text in told), told
    if case.whole:
        assert not (seen == 3).any()
    else:
        assert (seen == 3).any()
    if case.lost:
        state = json.loads(command("status", desk.workspace, "--json").out)
        assert case.lost in {loss["asset"] for loss in state["lost"]}


# --- radar ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def radar_archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("radar")
    return simulate_archive(root, seed=5, size="small", extent_km=2.4, overpasses=3, radar=True)


def one_polarisation(item, _):
    for key in [k for k in item["assets"] if k.lower() == "vh"]:
        del item["assets"][key]
    if "sar:polarizations" in item["properties"]:
        item["properties"]["sar:polarizations"] = ["VV"]


def ascending(item, orbit):
    item["properties"] |= {"sat:orbit_state": "ascending", "sat:relative_orbit": orbit}


def lying(item, _):
    item["properties"]["sat:orbit_state"] = "ascending"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "window", "says"),
    [
        (one_polarisation, None, "with VV only"),
        (ascending, None, "of ascending orbits"),
        (lying, None, "from which its ground cannot be seen"),
        (None, ["2018-09-08", "2018-09-09"], "scene between 2018-09-08 and 2018-09-09"),
    ],
    ids=["one polarisation", "the wrong orbit", "an orbit that cannot be", "an empty window"],
)
def test_radar_that_does_not_serve_is_refused_by_the_plan(
    radar_archive, tmp_path, command, change, window, says
):
    root = tmp_path / "own"
    shutil.copytree(radar_archive.root, root)
    radar = root / radar_archive.radar.relative_to(radar_archive.root)
    items = [p for p in radar.parent.rglob("*.json") if json.loads(p.read_text()).get("type") == "Feature"]
    read = {path: json.loads(path.read_text()) for path in items}
    ascending_orbit = next(
        item["properties"]["sat:relative_orbit"]
        for item in read.values()
        if item["properties"]["sat:orbit_state"] == "ascending"
    )
    for path, item in read.items() if change else ():
        change(item, ascending_orbit)
        path.write_text(json.dumps(item))
    optical, dem, aoi = (
        root / Path(p).relative_to(radar_archive.root)
        for p in (radar_archive.optical, radar_archive.dem, radar_archive.aoi)
    )
    post = json.dumps(window or ["2018-09-08", "2018-11-20"])
    (tmp_path / "run.toml").write_text(
        f'[area]\naoi = "{aoi}"\ncrs = "EPSG:32632"\n'
        f'[[epoch]]\nname = "event"\npre = ["2018-06-01", "2018-09-06"]\npost = {post}\n'
        f'[sources]\noptical = "{optical}"\ndem = "{dem}"\nradar = "{radar}"\n'
        '[cube]\ntile_px = 512\n[output]\nworkspace = "ws"\n'
    )
    refused = command("plan", tmp_path / "run.toml")
    assert refused.code == 1
    assert says in refused.refusal
