"""A provider whose signatures last two seconds: a whole run over it signs anew, and ends as a run over files does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from slidecube.pipeline.open import open_inventory, open_plan
from slidecube.pipeline.store import open_layer


def arrays(desk):
    """Every variable of the optical layers and of the inventory."""
    made = open_plan(desk.workspace)
    found = {("inventory", n): v.values for n, v in open_inventory(desk.workspace).data_vars.items()}
    for layer in made.layers:
        if layer.kind == "optical":
            stored = open_layer(made.workspace.layer(made.grid, layer.name))
            extent = made.tiles[0].geobox
            for tile in made.tiles:
                extent = extent | tile.geobox
            row, col = made.grid.offset_px(extent)
            part = stored.isel(y=slice(row, row + extent.shape[0]), x=slice(col, col + extent.shape[1]))
            found |= {(str(layer.window), name): part[name].values for name in part.data_vars}
    return found


def lost(desk):
    return [
        entry
        for path in desk.workspace.glob("layers/*/*.ledger/*.json")
        for entry in json.loads(path.read_text()).get("lost", [])
    ]


def run(desk, provider):
    process = desk.start("run", desk.toml, "--quiet", env={**os.environ, **provider.environment})
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def calm(desk_in, tmp_path_factory):
    """The arrays of an undisturbed run over the same archive's files."""
    desk = desk_in(tmp_path_factory.mktemp("calm") / "desk")
    assert desk.cli("run", desk.toml, "--quiet").code == 0
    return arrays(desk)


@pytest.mark.parametrize(
    ("life_s", "told_s"),
    [
        pytest.param(2.0, 3600.0, id="ends-before-it-says"),
        pytest.param(2.0, 2.0, id="ends-as-it-says", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_signatures_that_expire_in_mid_run(servers, small_archive, desk_in, tmp_path, calm, life_s, told_s):
    module = servers("signed_files")
    provider = module.SignedFiles(small_archive / "archive" / "sentinel-2-l2a", life_s=life_s, told_s=told_s)
    try:
        desk = desk_in(tmp_path / "desk", sources={"optical": str(module.publish(small_archive, tmp_path))})
        code, _, err = run(desk, provider)
    finally:
        provider.close()
    assert code == 0, err
    assert lost(desk) == []
    assert len(provider.tokens) > 2
    assert provider.served
    if told_s > life_s:
        assert provider.refused, "no signature expired in mid-run: the test tests nothing"
    found = arrays(desk)
    assert found.keys() == calm.keys()
    for name, values in calm.items():
        np.testing.assert_array_equal(found[name], values, err_msg=str(name))


def test_a_provider_that_accepts_no_signature_is_a_passing_fault(servers, small_archive, tmp_path):
    module = servers("signed_files")
    provider = module.SignedFiles(small_archive / "archive" / "sentinel-2-l2a", life_s=0.0)
    try:
        saved = module.publish(small_archive, tmp_path)
        program = """
import sys
from slidecube.catalog.read import Place, PlaceReadError, with_opened
try:
    with_opened(Place(href=sys.argv[1], source="saved.json"), lambda opened: opened.read(1))
except PlaceReadError as error:
    print(error.fault, error)
"""
        item = json.loads(saved.read_text())["features"][0]
        done = subprocess.run(
            [sys.executable, "-c", program, item["assets"]["B04"]["href"]],
            env={**os.environ, **provider.environment},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        provider.close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("expired HTTP response code: 403")
    assert len(provider.tokens) >= 3
    assert module.WORD not in done.stdout + done.stderr
