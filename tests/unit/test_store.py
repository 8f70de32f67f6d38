"""Stores: exactly one tile is written, read back, and reads as fill where nothing is."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import xarray as xr
import zarr

from slidecube.catalog.grid import TileGrid
from slidecube.pipeline import staging
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.ledger import Ledger, Record
from slidecube.pipeline.staging import stage_tile
from slidecube.pipeline.store import (
    Variable,
    Workspace,
    create_arrays,
    geobox_of,
    open_layer,
    read_window,
    remove_partials,
)


def write_tile(path, data, **where):
    """Stage a tile and bring it to its place; returns its checksums."""
    staged = stage_tile(path, data, shard=512, **where)
    staged.commit()
    return staged.checksums


GRID = TileGrid(crs="EPSG:32632", resolution_m=10.0, tile_px=512)
FRAME = GRID.frame[0 : 3 * 512, 0 : 2 * 512]
VARIABLES = {"red": Variable(dtype="uint16", fill=0), "height": Variable(dtype="float32", fill=float("nan"))}


@pytest.fixture
def layer(tmp_path):
    path = tmp_path / "layer.zarr"
    create_arrays(path, VARIABLES, geobox=FRAME, tile_px=512, block_px=512, attrs={"a": 1})
    return path


def values(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    height = rng.random((512, 512), np.float32)
    height[:3] = np.nan
    return {"red": rng.integers(1, 9000, (512, 512), np.uint16), "height": height}


def test_a_tile_comes_back_and_its_checksum_is_of_its_bytes(layer):
    data = values()
    sums = write_tile(layer, data, at_px=(512, 0))

    found = read_window(layer, ["red", "height"], window=(slice(512, 1024), slice(0, 512)))
    np.testing.assert_array_equal(found["red"], data["red"])
    np.testing.assert_array_equal(found["height"], data["height"])
    file = layer / "red" / "c" / "1" / "0"
    assert sums["red"] == hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    assert stage_tile(layer, {"red": data["red"]}, at_px=(512, 0), shard=512).size == file.stat().st_size
    assert sums == write_tile(layer, data, at_px=(512, 0)), "the same pixels are the same bytes"


def test_a_tile_of_fill_stores_nothing_and_removes_what_was_there(layer):
    write_tile(layer, values(), at_px=(0, 0))
    empty = {"red": np.zeros((512, 512), np.uint16), "height": np.full((512, 512), np.nan, np.float32)}

    assert write_tile(layer, empty, at_px=(0, 0)) == {"red": "empty", "height": "empty"}
    assert stage_tile(layer, empty, at_px=(0, 0), shard=512).size == 0


def test_an_erased_tile_reads_as_fill_and_its_neighbour_stays(layer):
    for at in ((0, 0), (0, 512)):
        write_tile(layer, values(), at_px=at)
    write_tile(layer, {}, at_px=(0, 0))
    write_tile(layer, {}, at_px=(1024, 512))

    found = read_window(layer, ["red"], window=(slice(0, 512), slice(0, 1024)))["red"]
    assert not found[:, :512].any()
    np.testing.assert_array_equal(found[:, 512:], values()["red"])


@pytest.mark.parametrize(
    ("shape", "at_px"),
    [
        ((512, 512), (256, 0)),
        ((512, 512), (0, 1)),
        ((512, 256), (0, 0)),
        ((1024, 512), (0, 0)),
        ((256, 256), (0, 0)),
    ],
)
def test_what_is_not_exactly_one_tile_is_refused(layer, shape, at_px):
    """Two writers in one shard lose pixels silently; xarray would take all of these."""
    with pytest.raises(PipelineError, match=r"does not align with shards \(512, 512\) of layer.zarr/red"):
        write_tile(layer, {"red": np.ones(shape, np.uint16)}, at_px=at_px)
    assert not (layer / "red" / "c").exists()


def test_a_disk_that_lies_is_found_out(layer, monkeypatch):
    real = zarr.Array.__setitem__

    def lie(self, region, data):
        data = data.copy()
        data[7, 7] += 1
        real(self, region, data)

    monkeypatch.setattr(zarr.Array, "__setitem__", lie)
    with pytest.raises(PipelineError, match=r"Read-back of layer\.zarr/red differs from what was written"):
        write_tile(layer, {"red": values()["red"]}, at_px=(0, 0))


def test_data_is_on_the_disk_before_its_checksum_is_told(layer, monkeypatch):
    flushed = []
    monkeypatch.setattr(staging.os, "fsync", flushed.append)
    write_tile(layer, values(), at_px=(0, 0))

    assert len(flushed) == 2


def test_a_halo_over_the_frames_edge_is_fill(layer):
    for at in ((0, 0), (1024, 512)):
        write_tile(layer, values(at[0]), at_px=at)

    corner = read_window(layer, ["red", "height"], window=(slice(-3, 512), slice(-5, 512)))
    assert corner["red"].shape == (515, 517)
    assert not corner["red"][:3].any()
    assert not corner["red"][:, :5].any()
    assert np.isnan(corner["height"][:3]).all()
    np.testing.assert_array_equal(corner["red"][3:, 5:], values(0)["red"])
    far = read_window(layer, ["red"], window=(slice(1024, 1540), slice(1000, 1030)))["red"]
    np.testing.assert_array_equal(far[:512, :24], values(1024)["red"][:, 488:])
    assert not far[512:].any()
    assert not far[:, 24:].any()
    outside = read_window(layer, ["red"], window=(slice(9000, 9004), slice(-9, -5)))["red"]
    assert outside.shape == (4, 4)
    assert not outside.any()


def test_a_leading_dimension_picks_one_step(tmp_path):
    path = tmp_path / "inventory.zarr"
    create_arrays(
        path,
        {"red": VARIABLES["red"]},
        geobox=FRAME,
        tile_px=512,
        block_px=512,
        attrs={},
        leading={"epoch": 2},
    )
    data = values()["red"]
    write_tile(path, {"red": data}, at_px=(512, 512), leading=(1,))

    window = (slice(512, 1024), slice(512, 1024))
    assert not read_window(path, ["red"], window=window, leading=(0,))["red"].any()
    np.testing.assert_array_equal(read_window(path, ["red"], window=window, leading=(1,))["red"], data)
    write_tile(path, {}, at_px=(512, 512), leading=(1,))
    assert not read_window(path, ["red"], window=window, leading=(1,))["red"].any()


def test_stores_are_made_once_and_a_lost_array_takes_its_records_along(layer):
    write_tile(layer, values(), at_px=(0, 0))
    ledger = Ledger.of(layer)
    ledger.write(Record(tile="r000c000", key="k", state="done"))
    again = {"geobox": FRAME, "tile_px": 512, "block_px": 512, "attrs": {"a": 2}}

    create_arrays(layer, VARIABLES, **again)
    assert ledger.complete("r000c000", "k")
    assert read_window(layer, ["red"], window=(slice(0, 512), slice(0, 512)))["red"].any()
    assert zarr.open_group(layer).attrs["a"] == 2

    (layer / "red" / "zarr.json").unlink()
    create_arrays(layer, VARIABLES, **again)
    assert not ledger.complete("r000c000", "k"), "a record of data that is gone"


def test_a_layer_knows_where_it_lies_and_opens_in_xarray(layer):
    write_tile(layer, values(), at_px=(512, 512))
    tiles = [GRID.tile(1, 0), GRID.tile(1, 1)]

    opened = open_layer(layer, tiles=tiles)

    assert geobox_of(layer) == FRAME
    assert opened["red"].shape == (512, 1024)
    assert opened.odc.geobox == FRAME[512:1024]
    np.testing.assert_array_equal(opened["red"][:, 512:].values, values()["red"])
    assert isinstance(xr.open_zarr(layer, consolidated=False), xr.Dataset)
    zarr.open_group(layer.with_name("other.zarr"), mode="w")
    with pytest.raises(PipelineError, match="it is not a slidecube layer"):
        geobox_of(layer.with_name("other.zarr"))


def test_only_our_own_temporary_files_are_removed(tmp_path):
    ours = (
        "layers/g/a.zarr/red/c/1/0.ab12.partial",
        "inventories/x.zarr/zarr.ab.partial",
        "products/p/.a.partial/b",
    )
    others = (
        "download.partial",
        "archive/x.partial",
        "plans/.a-1.77.partial/plan.json",
        "layers/g/a.zarr/red/c/1/0",
    )
    for name in (*ours, *others):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    assert remove_partials(Workspace.at(tmp_path)) == 3
    assert not any((tmp_path / name).exists() for name in ours)
    assert all((tmp_path / name).exists() for name in others)


def test_a_workspace_is_a_folder(tmp_path):
    assert Workspace.at(tmp_path).root == tmp_path
    with pytest.raises(PipelineError, match="neither a folder nor an s3:"):
        Workspace.at("gs://bucket/x")
