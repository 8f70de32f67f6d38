"""Products open in other people's readers, hold what was given, and come out the same twice."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import sqlite3
from pathlib import Path
from xml.etree import ElementTree as ET

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pyogrio
import pystac
import pystac.validation
import pytest
import rasterio
import rioxarray  # noqa: F401
import xarray as xr
import zarr
from affine import Affine
from odc.geo.geobox import GeoBox

from slidecube.catalog.scenes import Window
from slidecube.pipeline import publish, styles
from slidecube.pipeline.cog import CogSpec, write_cog
from slidecube.pipeline.config import Ground
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.ground import SHIFTS, strata
from slidecube.pipeline.inventory import finish_inventory, geobox_of, open_stored, stored
from slidecube.pipeline.lineage import Lineage, LineageEpoch, LineageScene
from slidecube.pipeline.mosaic import TileRasters, label_objects
from slidecube.pipeline.polygons import SCHEMA
from slidecube.pipeline.stac import bbox_lonlat, outline_lonlat

LAEA = "+proj=laea +lat_0=36 +lon_0=138 +x_0=0 +y_0=0 +datum=WGS84 +units=m +no_defs"
AFFINE = Affine(10, 0, 300_000, 0, -10, 4_800_000)
FRAME = GeoBox((4096, 4096), AFFINE, "EPSG:32633")
GEOBOX = FRAME[:96, :80]


def fields(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    landslide = np.zeros((96, 80), np.uint8)
    landslide[10:20, 10:14] = landslide[50:58, 60:70] = 1
    landslide[:, 75:] = 255
    probability = rng.integers(0, 10001, landslide.shape).astype(np.uint16)
    probability[:, 75:] = 65535
    observability = np.where(landslide == 255, 1, 3).astype(np.uint8)
    return {
        "probability": probability,
        "spread": (probability // 20).astype(np.uint16),
        "landslide": landslide,
        "observability": observability,
        "reason": np.where(landslide == 255, 0, 10).astype(np.uint8),
        "ground": rng.integers(0, 256, landslide.shape).astype(np.uint8),
    }


@pytest.fixture
def inventory_path(tmp_path: Path) -> Path:
    path = tmp_path / "inventories" / "test.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=3)
    for name, values in fields().items():
        fill = {"probability": 65535, "spread": 65535, "landslide": 255}.get(name, 0)
        array = group.create_array(
            name,
            shape=(1, *values.shape),
            shards=(1, 96, 80),
            chunks=(1, 32, 16),
            dtype=values.dtype,
            fill_value=fill,
            dimension_names=("epoch", "y", "x"),
        )
        array[0] = values
    finish_inventory(path, geobox=GEOBOX, epochs=["e1"])
    return path


@pytest.fixture
def objects() -> gpd.GeoDataFrame:
    f = fields()
    tile = TileRasters(
        key="t",
        offset_px=(0, 0),
        landslide=f["landslide"],
        attributes={
            "probability": f["probability"],
            "pre_date": np.full((96, 80), 17775, np.uint16),
            "post_date": np.zeros((96, 80), np.uint16),
        },
    )
    return label_objects([tile], frame=FRAME, epoch="e1", model="rdndvi@1", detect_key="k" * 16)


@pytest.fixture
def lineage() -> Lineage:
    scene = LineageScene(
        id="S2A_33T",
        source="earth-search/sentinel-2-l2a",
        datetime=dt.datetime(2018, 9, 1, 10, tzinfo=dt.UTC),
        use="pre",
    )
    return Lineage(
        name="test",
        run="demo-0123abcd",
        created=dt.datetime(2026, 11, 20, tzinfo=dt.UTC),
        grid="epsg32633-10m-2048px-b512",
        epochs=(
            LineageEpoch(
                name="e1",
                pre=Window(start=dt.date(2018, 5, 1), end=dt.date(2018, 9, 5)),
                post=Window(start=dt.date(2018, 9, 7), end=dt.date(2018, 11, 15)),
            ),
        ),
        model={"name": "rdndvi", "version": 1, "threshold": 0.5},
        keys={"detect": "k" * 16},
        scenes=(
            scene,
            LineageScene(
                id="S2B_33T",
                source="x",
                datetime=scene.datetime,
                use="post",
                href="https://example.com/S2B_33T",
            ),
        ),
        licences={"earth-search/sentinel-2-l2a": "Copernicus Sentinel data terms"},
        attributions=("Contains modified Copernicus Sentinel data 2018",),
    )


@pytest.mark.parametrize("crs", ["EPSG:32633", LAEA])
def test_a_finished_inventory_opens_in_xarray_and_rioxarray_without_a_warning(tmp_path, crs):
    geobox = GeoBox((40, 30), AFFINE, crs)
    group = zarr.open_group(tmp_path / "i.zarr", mode="w", zarr_format=3)
    for name, dtype, fill in (
        ("probability", "uint16", 65535),
        ("landslide", "uint8", 255),
        ("reason", "uint8", 0),
    ):
        group.create_array(
            name,
            shape=(2, 40, 30),
            chunks=(1, 10, 10),
            dtype=dtype,
            fill_value=fill,
            dimension_names=("epoch", "y", "x"),
        )[1, :20] = 1
    finish_inventory(tmp_path / "i.zarr", geobox=geobox, epochs=["a", "b"])
    before = (tmp_path / "i.zarr" / "zarr.json").read_bytes()
    finish_inventory(tmp_path / "i.zarr", geobox=geobox, epochs=["a", "b"])
    assert (tmp_path / "i.zarr" / "zarr.json").read_bytes() == before
    decoded = xr.open_zarr(tmp_path / "i.zarr", consolidated=False)
    assert decoded["probability"].rio.crs == rasterio.crs.CRS.from_user_input(crs)
    assert decoded["probability"].rio.transform() == geobox.affine
    assert decoded.rio.bounds() == geobox.boundingbox.bbox
    p = decoded["probability"].sel(epoch="b").to_numpy()
    assert p[0, 0] == pytest.approx(1e-4)
    assert np.isnan(p[30, 0])
    assert decoded["reason"].dtype == np.uint8  # 0 is a meaning, not nodata
    assert geobox_of(decoded) == geobox
    part = open_stored(tmp_path / "i.zarr").isel(y=slice(4, 9), x=slice(2, 7))
    assert geobox_of(part) == geobox[4:9, 2:7]
    for name in ("probability", "landslide", "reason"):
        raw = stored(open_stored(tmp_path / "i.zarr"), name, epoch=1)
        again = stored(decoded, name, epoch=1)
        assert raw.dtype == again.dtype
        np.testing.assert_array_equal(raw, again)


def test_geozarr_attributes_say_the_grid(inventory_path):
    attrs = zarr.open_group(inventory_path, mode="r").attrs
    assert attrs["proj:code"] == "EPSG:32633"
    assert attrs["spatial:transform"] == list(AFFINE)[:6]
    assert attrs["spatial:shape"] == [96, 80]
    assert {c["name"] for c in attrs["zarr_conventions"]} == {"proj:", "spatial:"}


def test_an_inventory_of_another_shape_is_refused(inventory_path):
    with pytest.raises(PipelineError, match="epochs and grid say"):
        finish_inventory(inventory_path, geobox=GEOBOX, epochs=["e1", "e2"])


def test_geoparquet_holds_the_table_and_comes_out_the_same_twice(tmp_path, objects):
    a = publish.write_geoparquet(tmp_path / "a.parquet", objects)
    b = publish.write_geoparquet(tmp_path / "b.parquet", objects.copy())
    assert a.read_bytes() == b.read_bytes()
    back = gpd.read_parquet(a)
    assert list(back.columns) == [*SCHEMA, "geometry"]
    assert back.crs == objects.crs
    assert back.geometry.geom_equals_exact(objects.geometry, 0).all()
    assert back["pre_date"].tolist() == [dt.date(2018, 9, 1)] * 2
    assert back["post_date"].isna().all()
    geo = json.loads(pq.read_schema(a).metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    assert "covering" in geo["columns"]["geometry"]
    assert str(pq.read_schema(a).field("post_date").type) == "date32[day]"


def test_an_empty_table_keeps_its_types(tmp_path, objects):
    none = publish.write_geoparquet(tmp_path / "none.parquet", objects.iloc[:0])
    some = publish.write_geoparquet(tmp_path / "some.parquet", objects)
    assert [f.type for f in pq.read_schema(none)][:-1] == [f.type for f in pq.read_schema(some)][:-1]


@pytest.mark.parametrize("n", [0, 2])
def test_geopackage_opens_with_a_style(tmp_path, objects, lineage, n):
    path = publish.write_geopackage(tmp_path / "l.gpkg", objects.iloc[:n], lineage)
    back = gpd.read_file(path, layer="landslides")
    assert len(back) == n
    assert back.crs == objects.crs
    assert set(back["id"]) == set(objects["id"][:n])
    info = pyogrio.read_info(path, layer="landslides")
    types = dict(zip(info["fields"], info["dtypes"], strict=True))
    assert types["pre_date"].startswith("datetime64")
    with sqlite3.connect(path) as db:
        name, qml, default = db.execute(
            "SELECT f_table_name, styleQML, useAsDefault FROM layer_styles"
        ).fetchone()
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert (name, default) == ("landslides", 1)
    renderer = ET.fromstring(qml).find("renderer-v2")
    assert renderer.get("attr") == "probability"
    assert len(renderer.findall("ranges/range")) == len(renderer.findall("symbols/symbol")) == 5
    assert not list(tmp_path.glob(".*partial*"))


def test_cogs_are_valid_placed_and_hold_what_is_stored(tmp_path, inventory_path, lineage):
    inventory = xr.open_zarr(inventory_path, consolidated=False)
    made = publish.write_cogs(tmp_path / "cog", inventory, lineage)
    assert set(made) == {f"e1/{name}" for name in publish.COGS}
    for key, path in made.items():
        with rasterio.open(path) as src:
            assert src.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert src.transform == AFFINE
            assert src.crs == rasterio.crs.CRS.from_epsg(32633)
            np.testing.assert_array_equal(src.read(1), fields()[key.split("/")[1]])
    with rasterio.open(made["e1/probability"]) as src:
        assert (src.nodata, src.scales) == (65535, (1e-4,))
        assert src.tags()["STATUS"] == "unreviewed"
    with rasterio.open(made["e1/landslide"]) as src:
        assert src.nodata == 255
        assert src.colormap(1)[1][:3] == styles.rgb(styles.FOUND)
    with rasterio.open(made["e1/observability"]) as src:
        assert src.nodata is None
        assert src.colormap(1)[2][:3] == styles.rgb(styles.OBSERVABILITY[2])
    assert not list((tmp_path / "cog").glob(".*"))
    ET.parse(tmp_path / "cog" / "e1-probability.qml")


def test_a_cog_larger_than_a_window_has_overviews_that_never_mix_categories(tmp_path):
    values = np.zeros((2100, 2300), np.uint8)
    values[::3] = 3
    lazy = xr.DataArray(values, dims=("y", "x")).chunk({"y": 512, "x": 512})
    geobox = FRAME[:2100, :2300]
    path = write_cog(tmp_path / "c.tif", lazy, geobox=geobox, spec=CogSpec(nodata=None, description="c"))
    with rasterio.open(path) as src:
        np.testing.assert_array_equal(src.read(1), values)
        assert src.overviews(1) == [2, 4, 8]
        assert set(np.unique(src.read(1, out_shape=(525, 575)))) == {0, 3}


def test_a_failed_write_leaves_the_old_file_and_no_new_one(tmp_path, objects, monkeypatch):
    path = publish.write_geoparquet(tmp_path / "a.parquet", objects)
    before = path.read_bytes()

    def full(self, partial, **_):
        Path(partial).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpd.GeoDataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="No space"):
        publish.write_geoparquet(path, objects)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_products_and_an_item_that_lists_them(tmp_path, objects, inventory_path, lineage):
    made = publish.write_products(
        tmp_path / "products" / "test",
        objects=objects,
        inventory=open_stored(inventory_path),
        lineage=lineage,
        inventory_path=inventory_path,
    )
    text = made["item"].read_text()
    assert str(tmp_path) not in text
    body = json.loads(text)
    # the core schema ships with pystac; those of the extensions lie on the network
    pystac.validation.validate_dict({**body, "stac_extensions": []})
    with pytest.raises(pystac.errors.STACValidationError):
        pystac.validation.validate_dict({**body, "stac_extensions": [], "geometry": 7})
    item = pystac.Item.from_file(made["item"])
    for key, asset in item.assets.items():
        path = Path(asset.get_absolute_href())
        assert path.exists(), key
        assert asset.media_type
        assert asset.roles == ["data"]
        if path.is_file():
            assert (
                asset.extra_fields["file:checksum"] == "1220" + hashlib.sha256(path.read_bytes()).hexdigest()
            )
    assert set(item.assets) == {"objects", "geopackage", "inventory", *(f"e1/{n}" for n in publish.COGS)}
    p = item.properties
    assert p["unreviewed"] is True
    assert p["slidecube:model"]["name"] == "rdndvi"
    assert [s["id"] for s in p["slidecube:scenes"]] == ["S2A_33T", "S2B_33T"]
    assert p["slidecube:attributions"] == ["Contains modified Copernicus Sentinel data 2018"]
    assert (p["start_datetime"], p["end_datetime"]) == ("2018-05-01T00:00:00Z", "2018-11-15T23:59:59Z")
    assert [link.target for link in item.get_links("derived_from")] == ["https://example.com/S2B_33T"]
    assert [c["name"] for c in item.assets["objects"].extra_fields["table:columns"]] == list(SCHEMA)
    (reason,) = item.assets["e1/reason"].extra_fields["bands"]
    told = {c["value"]: c["description"] for c in reason["classification:classes"]}
    assert told[10] == "No clear date on one side of the event: snow"
    (ground,) = item.assets["e1/ground"].extra_fields["bands"]
    fields_of = {f["name"]: f for f in ground["classification:bitfields"]}
    for factor in SHIFTS:
        field = fields_of.pop(factor)
        names = {c["value"]: c["name"] for c in field["classes"]}
        for stratum in strata(Ground()):
            byte = np.uint8(stratum.value << SHIFTS[stratum.factor])
            if stratum.factor == factor:
                value = (int(byte) >> field["offset"]) & (2 ** field["length"] - 1)
                assert names[value] == stratum.name.removeprefix("slope_")
    assert not fields_of
    assert item.geometry["type"] == "Polygon"
    again = publish.write_products(
        tmp_path / "products" / "test",
        objects=objects,
        inventory=open_stored(inventory_path),
        lineage=lineage,
        formats=["stac"],
    )
    assert set(again) == {"item"}


def test_an_unknown_format_is_named(tmp_path, objects, lineage):
    with pytest.raises(PipelineError, match="'kml' is not known"):
        publish.write_products(
            tmp_path, objects=objects, inventory=xr.Dataset(), lineage=lineage, formats=["kml"]
        )


def test_an_outline_across_the_antimeridian_is_split():
    geobox = GeoBox((100, 200), Affine(1000, 0, 700_000, 0, -1000, 8_100_000), "EPSG:32701")
    split = outline_lonlat(GeoBox((100, 200), Affine(1000, 0, 100_000, 0, -1000, 8_100_000), "EPSG:32701"))
    assert split.geom_type == "MultiPolygon"
    assert split.is_valid
    west, _, east, _ = bbox_lonlat(split)
    assert west > 0 > east
    whole = outline_lonlat(geobox)
    assert whole.geom_type == "Polygon"
    assert bbox_lonlat(whole) == pytest.approx(list(whole.bounds))
    assert split.area == pytest.approx(1.8 * 0.9, rel=0.1)
