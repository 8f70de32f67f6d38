"""The lazy functions on one big cube across a cluster make the very cube that the batch run wrote."""

from __future__ import annotations

import dask
import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster

from slidecube.models.predict import predict
from slidecube.pipeline.features import Layers, build_features, mnf_image
from slidecube.pipeline.inventory import PROBABILITY_SCALE
from slidecube.pipeline.moments import moments
from slidecube.pipeline.open import open_inventory, open_plan
from slidecube.pipeline.store import open_layer
from slidecube.pipeline.tasks import fitted_statistics

LEARNS = {"sample": 4000, "epochs": 3, "batch": 1000}
BANDS = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]


@pytest.fixture(scope="module")
def client():
    """Two worker processes."""
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("model", "chunk"),
    [
        ("rdndvi", 300),
        *(
            pytest.param(*how, marks=pytest.mark.slow)
            for how in [("cae-kmeans", 512), ("cae-kmeans-change", 300)]
        ),
    ],
)
def test_one_big_cube_on_a_cluster_is_what_the_batch_run_wrote(workspaces, client, model, chunk):
    plan = open_plan(workspaces(model))
    epoch = plan.epochs[0]
    tiles = list(plan.tiles)
    layers = {
        side: open_layer(plan.workspace.layer(plan.grid, name), tiles=tiles).chunk(chunk)
        for side, name in (("pre", epoch.pre), ("post", epoch.post), ("terrain", epoch.terrain))
    }
    written = open_inventory(plan.workspace.root).isel(epoch=0)
    inside = (written["observability"] >= 2).chunk(chunk)
    fitted = fitted_statistics(plan, epoch)
    first = min(t.row for t in tiles) * plan.grid.tile_px, min(t.col for t in tiles) * plan.grid.tile_px

    features = build_features(fitted.detector.card.inputs, Layers(**layers, mnf=fitted.mnf))
    probability = predict(fitted.detector, features.where(inside), origin_px=first)["probability"]
    assert dask.is_dask_collection(probability)
    (found,) = client.compute([probability], sync=True)

    known = written["observability"].values == 3
    assert known.sum() > 50_000
    stored = np.rint(written["probability"].values[known] / PROBABILITY_SCALE).astype(int)
    np.testing.assert_array_equal(
        np.floor(found.values[known].astype(np.float64) / PROBABILITY_SCALE).astype(int), stored
    )
    assert np.unique(stored).size > 100


@pytest.mark.slow
def test_the_moments_of_one_big_cube_are_those_of_the_tiles(workspaces, client):
    """Summed by a tree of tasks on the cluster, or tile by tile and merged: the same fit, to the bit."""
    plan = open_plan(workspaces("cae-kmeans-change"))
    epoch = plan.epochs[0]
    fitted = fitted_statistics(plan, epoch)
    layers = {
        side: open_layer(plan.workspace.layer(plan.grid, name), tiles=list(plan.tiles)).chunk(333)
        for side, name in (("pre", epoch.pre), ("post", epoch.post))
    }
    inside = (open_inventory(plan.workspace.root)["observability"].isel(epoch=0) >= 2).chunk(333)
    cube = mnf_image("change", Layers(**layers, terrain=xr.Dataset())).where(inside)

    sums = moments(cube)

    assert client.scheduler_info()["workers"]
    assert sums.pixels == fitted.mnf["change"].pixels
    assert tuple(sums.mean.tolist()) == fitted.mnf["change"].whole.mean


@pytest.fixture(scope="module")
def workspaces(desk_in, tmp_path_factory):
    """One desk, run with one model after another; its cubes are made once."""
    folder = tmp_path_factory.mktemp("big") / "desk"
    desk = desk_in(folder, cube={"bands": BANDS}, detect={"min_area_m2": 2000})

    def of(model: str):
        desk.write(detect={"model": model, "parameters": LEARNS if model != "rdndvi" else {}})
        desk.write(detect={"landslide_clusters": None})
        if model != "rdndvi":
            for stage in ("cube", "fit"):
                assert desk.cli(stage, desk.toml, "--quiet").code == 0
            key = open_plan(desk.workspace).epochs[0].stat_key
            desk.write(detect={"landslide_clusters": {key: [0]}})
        done = desk.cli("run", desk.toml, "--quiet")
        assert done.code == 0, done.err
        return desk.workspace

    return of
