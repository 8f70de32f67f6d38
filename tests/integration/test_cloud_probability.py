"""A provider's cloud probability: what it calls cloud is cloud, whatever the classification says."""

from __future__ import annotations

import json
import shutil

import numpy as np
import rasterio

from slidecube.pipeline.inventory import Observability
from slidecube.pipeline.open import open_detected, open_plan

BOX = [6.585, 0.283, 6.598, 0.2955]  # in one tile
PLAIN = {"readmit": False, "cloud_heights_m": [], "dilation_px": 0}
ASKED = {"composite": "median", "mask": {"cloud_pct": 60, **PLAIN}}


def doubting(root, west_pct: int, east_pct: int) -> None:
    """Give every scene a cloud probability: of the west of the box, and of its east."""
    for item in (root / "archive" / "sentinel-2-l2a").glob("*/*.json"):
        path = item.with_name("CLD.tif")
        with rasterio.open(item.with_name("SCL.tif")) as scl:
            profile, shape = scl.profile, scl.shape
            to_lonlat = rasterio.warp.transform_bounds(scl.crs, "EPSG:4326", *scl.bounds)
        middle = round(((BOX[0] + BOX[2]) / 2 - to_lonlat[0]) / (to_lonlat[2] - to_lonlat[0]) * shape[1])
        values = np.full(shape, west_pct, np.uint8)
        values[:, middle:] = east_pct
        with rasterio.open(path, "w", **profile) as out:
            out.write(values, 1)
        said = json.loads(item.read_text())
        said["assets"]["CLD"] = said["assets"]["SCL"] | {
            "href": "./CLD.tif",
            "title": "SIMULATED cloud probability",
        }
        item.write_text(json.dumps(said))


def test_what_it_calls_cloud_is_not_looked_at(desk_in, small_archive, tmp_path, command):
    root = tmp_path / "own"
    shutil.copytree(small_archive, root)
    doubting(root, 60, 59)
    area = {"area": {"aoi": None, "bbox": BOX, "crs": "EPSG:32632"}}
    desks = [
        desk_in(tmp_path / name, archive=root).write(**area, cube={**ASKED, "mask": mask})
        for name, mask in (("asked", ASKED["mask"]), ("plain", PLAIN))
    ]
    assert [command("run", desk.toml, "--quiet").code for desk in desks] == [0, 0]

    asked, plain = (
        open_detected(open_plan(desk.workspace)).isel(epoch=0)["observability"].values for desk in desks
    )
    cols = np.flatnonzero((asked > Observability.OUTSIDE_AOI).any(axis=0))
    west, east = np.s_[:, cols[0] : cols[len(cols) // 2 - 4]], np.s_[:, cols[len(cols) // 2 + 4] : cols[-1]]
    assert not (asked[west] == Observability.OBSERVED).any(), "all its dates are cloud"
    assert (plain[west] == Observability.OBSERVED).mean() > 0.1
    np.testing.assert_array_equal(asked[east], plain[east])


def test_who_does_not_offer_it_is_refused_with_what_to_do(desk_in, small_archive, tmp_path, command):
    desk = desk_in(tmp_path / "desk").write(cube=ASKED)

    refused = command("plan", desk.toml)

    assert refused.code == 1
    assert (
        "has no cloud probability (CLD), which [cube.mask] cloud_pct asks for; leave it out"
        in refused.refusal
    )
