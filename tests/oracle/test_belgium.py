"""Twelve real monthly composites of Belgium, two of them wholly missing, as the dates of a run.

Source: WorldCereal/worldcereal-classification (MIT); contains modified Copernicus Sentinel data. The scenes behind the
months are not at hand, so that each month is one date: what our monthly median makes of it must be that month, and
what it makes of a quarter is numpy's median of its months.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from rasterio.warp import transform_bounds

from slidecube.pipeline import load_config, plan, run
from slidecube.pipeline.features import build_features
from slidecube.pipeline.inventory import Observability, open_stored
from slidecube.pipeline.pixels import PixelWindow, read_layers
from slidecube.pipeline.store import open_layer

BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B11", "B12")
MISSING = 65_535
MISSING_MONTHS = ("2020-12", "2021-01")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def months(shared_data):
    """(band, month, y, x) digital numbers, MISSING where there are none, and the twelve months."""
    path = shared_data / "worldcereal_series" / "monthly_composites_belgium.nc"
    with xr.open_dataset(path, mask_and_scale=False, engine="h5netcdf") as found:
        stack = np.stack([found[f"S2-L2A-{band}"].values.view(np.uint16) for band in BANDS])
        return (
            stack,
            [str(day)[:7] for day in found["t"].values],
            found["elevation"].values[0].astype(np.float32),
        )


@pytest.fixture(scope="module")
def archive(months, tmp_path_factory):
    """The months as items of one date each, the fifteenth; where one is missing, its scene holds nothing."""
    stack, names, height = months
    out = tmp_path_factory.mktemp("belgium")
    items = []
    for number, month in enumerate(names):
        dn = stack[:, number]
        scl = np.where((dn == MISSING).any(axis=0), 0, 4).astype(np.uint8)
        stamp = month.replace("-", "") + "15T105000"
        name = f"S2A_MSIL2A_{stamp}_N0214_R008_T31UFS_{stamp}"
        rasters = {**{b: np.where(v == MISSING, 0, v) for b, v in zip(BANDS, dn, strict=True)}, "SCL": scl}
        properties = {
            "datetime": f"{month}-15T10:50:00Z", "platform": "sentinel-2a", "eo:cloud_cover": 0.0,
            "s2:mgrs_tile": "31UFS", "s2:processing_baseline": "02.14", "s2:product_uri": f"{name}.SAFE",
            "s2:datatake_id": f"GS2A_{stamp}_030000_N02.14",
            "s2:datastrip_id": f"S2A_OPER_MSI_L2A_DS_XXXX_{stamp}_S{stamp}_N02.14",
            "s2:generation_time": f"{month}-16T00:00:00Z",
        }  # fmt: skip
        items.append(_item(out, name, "sentinel-2-l2a", properties, rasters))
    items.append(
        _item(out, "dem-belgium", "dem", {"datetime": "2015-01-01T00:00:00Z"}, {"elevation": height})
    )
    (out / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return out / "items.json"


LEFT, TOP = 664_000.0, 5_612_120.0


def _item(out, name, collection, properties, rasters):
    shape = next(iter(rasters.values())).shape
    assets = {}
    for band, values in rasters.items():
        path = out / name / f"{band}.tif"
        path.parent.mkdir(exist_ok=True)
        with rasterio.open(
            path, "w", driver="GTiff", width=shape[1], height=shape[0], count=1, dtype=values.dtype,
            crs="EPSG:32631", transform=Affine(10, 0, LEFT, 0, -10, TOP), nodata=None if band == "elevation" else 0,
        ) as file:  # fmt: skip
            file.write(values, 1)
        assets[band] = {
            "href": f"{name}/{band}.tif",
            "type": "image/tiff; application=geotiff",
            "roles": ["data"],
        }
    west, south, east, north = transform_bounds(
        "EPSG:32631", "EPSG:4326", LEFT, TOP - 10 * shape[0], LEFT + 10 * shape[1], TOP
    )
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": name, "collection": collection,
        "geometry": {"type": "Polygon", "coordinates": [ring]}, "bbox": [west, south, east, north], "links": [],
        "properties": {**properties, "proj:epsg": 32631}, "assets": assets,
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(archive, tmp_path_factory):
    """A run of a pair of windows, once each; the mask keeps what the months hold."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def of(pre, post):
        if (pre, post) not in done:
            box = transform_bounds("EPSG:32631", "EPSG:4326", LEFT + 20, TOP - 980, LEFT + 980, TOP - 20)
            toml = folder / f"{pre[0]}-{post[0]}.toml"
            toml.write_text(
                f'[area]\nbbox = {list(box)}\ncrs = "EPSG:32631"\n'
                f'[[epoch]]\nname = "e"\npre = {json.dumps(pre)}\npost = {json.dumps(post)}\n'
                f'[sources]\noptical = "{archive}"\ndem = "{archive}"\n'
                f'[cube]\ntile_px = 512\ncomposite = "median"\nbands = {json.dumps(BANDS)}\n'
                '[output]\nworkspace = "ws"\nformats = ["parquet"]\n'
            )
            done[pre, post] = plan(load_config(toml))
            assert run(done[pre, post]).complete
        return done[pre, post]

    return of


def layer(found, side):
    """The optical layer of a side on the hundred pixels of the months."""
    name = getattr(found.by_epoch["e"], side)
    stored = open_layer(found.workspace.layer(found.grid, name))
    affine = found.grid.frame.affine
    row, col = round((TOP - affine.f) / affine.e), round((LEFT - affine.c) / affine.a)
    return stored.isel(y=slice(row, row + 100), x=slice(col, col + 100)).load()


def test_a_month_of_one_date_is_that_month(months, made):
    stack, names, _ = months
    found = made(("2020-11-01", "2020-11-30"), ("2021-02-01", "2021-02-28"))
    for side, month in (("pre", "2020-11"), ("post", "2021-02")):
        ours, theirs = layer(found, side), stack[:, names.index(month)]
        for band, want in zip(BANDS, theirs, strict=True):
            np.testing.assert_array_equal(ours[band], want.astype(int) + 1000, err_msg=f"{month} {band}")
        assert (ours["clear_count"] == 1).all()


def test_a_quarter_is_the_median_of_its_months(months, made):
    stack, names, _ = months
    found = made(("2020-11-01", "2021-02-28"), ("2021-03-01", "2021-05-31"))
    for side, quarter in (("pre", ("2020-11", "2021-02")), ("post", ("2021-03", "2021-04", "2021-05"))):
        dn = stack[:, [names.index(month) for month in quarter]]
        known = (dn != 0).all(axis=0)  # a true zero is our nodata, and takes its date with it
        values = np.where(known, dn.astype(float) + 1000, np.nan)
        ours = layer(found, side)
        for band, want in zip(BANDS, np.rint(np.nanmedian(values, axis=1)), strict=True):
            np.testing.assert_array_equal(ours[band], want, err_msg=band)
        np.testing.assert_array_equal(ours["clear_count"], known.sum(axis=0))


def test_a_missing_month_is_not_observable_and_never_zero(made):
    found = made(("2020-12-01", "2021-01-31"), ("2021-02-01", "2021-02-28"))
    records = {r.state: r.reason for r in _ledger(found, "pre")}
    assert list(records) == ["empty"]
    assert "no clear observation in 2 scenes" in records["empty"]

    window = PixelWindow.of_tile(found.grid, found.tiles[0])
    layers = read_layers(found, "e", window)
    features = build_features(found.model.card.inputs, layers)
    for name, values in features.items():
        assert name == "slope_deg" or np.isnan(values).all(), name
    stored = open_stored(found.workspace.inventory(found.inventory)).isel(epoch=0)
    seen = stored["observability"].values
    inside = seen != Observability.OUTSIDE_AOI
    assert inside.sum() > 9_000
    assert (seen[inside] == Observability.NOT_OBSERVABLE).all()
    assert np.isin(stored["reason"].values[inside], (1, 3)).all()
    assert (stored["landslide"].values == 255).all()
    assert (stored["probability"].values == 65_535).all()


def _ledger(found, side):
    from slidecube.pipeline.tasks import layer_ledger  # noqa: PLC0415  one test needs it

    return layer_ledger(found, getattr(found.by_epoch["e"], side)).load().values()
