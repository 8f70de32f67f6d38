"""The quality report of a run: what it counts agrees with the inventory, and a planted seam is the only one."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest
import zarr

from slidecube.pipeline.inventory import REASONS
from slidecube.pipeline.open import open_detected, open_inventory, open_plan
from slidecube.pipeline.quality import quality_of
from slidecube.pipeline.report_stage import report_workspace
from slidecube.pipeline.store import open_layer


@pytest.fixture(scope="module")
def finished(desk_in, tmp_path_factory):
    made = desk_in(tmp_path_factory.mktemp("quality") / "desk", output={"formats": ["parquet", "report"]})
    assert made.cli("run", made.toml, "--quiet").code == 0
    return made


def test_the_numbers_are_those_of_the_inventory_and_the_layers(finished):
    plan = open_plan(finished.workspace)
    found = quality_of(plan)
    (whole,) = found.epochs
    inventory = open_inventory(finished.workspace).isel(epoch=0)
    seen, why = inventory["observability"].values, open_detected(plan)["reason"].isel(epoch=0).values
    assert whole["expected_px"] == (seen != 1).sum()
    assert whole["observed_px"] == (seen == 3).sum() > 0
    assert whole["missing_px"] == 0
    for value in REASONS:
        if value:
            assert whole[f"reason_{value}_px"] == ((seen == 2) & (why == value)).sum()
    assert len(found.tiles) == len(plan.tiles) == 4
    for side in ("pre", "post"):
        layer = open_layer(
            plan.workspace.layer(plan.grid, getattr(plan.epochs[0], side)), tiles=list(plan.tiles)
        )
        counts = layer["clear_count"].values[seen != 1]
        assert max(row[f"{side}_clear_max"] for row in found.tiles) == counts.max()
        assert whole[f"{side}_unseen_px"] == (counts == 0).sum()
        assert all(row[f"{side}_scenes"] > 0 for row in found.tiles)
        days = layer["date_first"].values[(seen != 1) & (layer["date_first"].values > 0)]
        assert whole[f"{side}_first"] == str(np.datetime64(int(days.min()), "D"))


def test_the_report_holds_it_as_page_table_json_and_pictures(finished):
    (folder,) = (finished.workspace / "products").glob("*/report")
    said = json.loads((folder / "quality.json").read_text())
    assert said["epochs"][0]["tiles"] == 4
    rows = list(csv.DictReader(io.StringIO((folder / "quality.csv").read_text())))
    assert [row["tile"] for row in rows] == [row["tile"] for row in said["tiles"]]
    page = (folder / "index.html").read_text()
    assert "Quality of the observation" in page
    for name in ("quality-event.png", "quality-edges.png"):
        assert (folder / "img" / name).stat().st_size > 5000
        assert f"img/{name}" in page


def test_a_planted_step_is_the_only_seam_between_tiles(finished, tmp_path):
    copied = tmp_path / "ws"
    shutil.copytree(finished.workspace, copied)
    plan = open_plan(copied)
    before = [edge for edge in quality_of(plan).edges if edge.kind == "tile"]
    assert len(before) >= 4, "an edge that clouds hide on most of its length is not audited"
    assert not any(edge.seam for edge in before), [edge.row() for edge in before if edge.seam]

    tile, px = plan.tiles[0], plan.grid.tile_px
    path = plan.workspace.layer(plan.grid, plan.epochs[0].pre)
    at = (slice(tile.row * px, (tile.row + 1) * px), slice(tile.col * px, (tile.col + 1) * px))
    band = zarr.open_group(path, mode="r+")["B08"]
    stored = band[at]
    band[at] = np.where(stored == 0, 0, stored + 300).astype(stored.dtype)  # .03 of reflectance

    after = {(e.layer, e.first, e.second): e for e in quality_of(plan).edges if e.kind == "tile"}
    seams = {key for key, edge in after.items() if edge.seam}
    assert seams == {key for key in after if key[0] == plan.epochs[0].pre and tile.key in key[1:]} != set()
    for key in seams:
        assert after[key].measured.step == pytest.approx(-0.03, abs=0.01), "it lies before the others"
    index = report_workspace(copied)
    assert "Seams: " in index.read_text()
