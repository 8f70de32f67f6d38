"""Moments and components of one big cube on the processes of a cluster are those of one thread, bit for bit."""

from __future__ import annotations

import sys

import cloudpickle
import dask.array as da
import numpy as np
import xarray as xr
from distributed import Client, LocalCluster

from slidecube.pipeline.mnf import fit_mnf
from slidecube.pipeline.moments import moments

BANDS = ("B02", "B03", "B04", "B08")

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test


def block(bands, block_info=None):
    """Stored numbers by their place alone, with holes."""
    (y0, y1), (x0, x1) = block_info[None]["array-location"][-2:]
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.uint64)
    hashed = ((y * 2654435761 + x * 40503) ** 2 >> np.uint64(7)) & np.uint64(0xFFFFFFFF)
    waves = [2000 + 900 * np.sin(y / 40) + 500 * np.cos(x / (20 + 7 * b)) for b in range(bands)]
    noise = [((hashed >> np.uint64(5 * b)) % 97).astype(float) for b in range(bands)]
    values = np.stack([(w + n).astype(np.uint16) for w, n in zip(waves, noise, strict=True)])
    values[:, hashed % 11 == 0] = 0
    return values


def cube(chunk):
    def local(block_info=None):  # pickled by value, as workers need it: they cannot import a test
        return block(len(BANDS), block_info)

    array = da.map_blocks(
        local, chunks=((len(BANDS),), *da.core.normalize_chunks(chunk, (300, 450))), dtype=np.uint16
    )
    return xr.Dataset({name: (("y", "x"), array[i]) for i, name in enumerate(BANDS)})


def test_two_processes_give_the_bits_of_one_thread():
    whole = cube((300, 450)).compute()
    expected = moments(whole, nodata=0)
    mnf = fit_mnf(expected, bands=BANDS)
    components = mnf.transform(whole, nodata=0)

    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1"
        ) as cluster,
        Client(cluster) as client,
    ):
        lazy = cube((128, 100))
        found = moments(lazy, nodata=0)
        on_cluster = fit_mnf(found, bands=BANDS).transform(lazy, nodata=0).compute()
        assert len(client.scheduler_info()["workers"]) == 2

    assert found == expected
    xr.testing.assert_identical(on_cluster, components)
