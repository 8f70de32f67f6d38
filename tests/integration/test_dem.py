"""A country's own DEM in place of GLO-30: one file, its date and its datum, in keys and in every product."""

from __future__ import annotations

import datetime as dt
import json
import re

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import rasterio.warp
import shapely
from affine import Affine

from slidecube.catalog.aoi import read_aoi
from slidecube.catalog.errors import CatalogError
from slidecube.catalog.grid import TileGrid
from slidecube.catalog.rasters import dem_scene
from slidecube.catalog.sources import is_raster
from slidecube.pipeline import load_config, plan, run
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.mosaic_stage import lineage
from slidecube.pipeline.plan_dem import DemFacts, dem_facts
from slidecube.pipeline.polygons import SCHEMA
from slidecube.pipeline.simulate import simulate_archive
from slidecube.pipeline.summaries import plan_summary
from slidecube.pipeline.terrain import terrain


def lidar(path, box, *, step=2.0, crs="EPSG:32632", dtype="float32", tag=None, slope=0.5):
    """A plane that rises to the east."""
    west, south, east, north = box
    n = int((east - west) / step), int((north - south) / step)
    heights = np.broadcast_to((np.arange(n[0]) * step * slope)[None], n[::-1]).astype(dtype)
    at = Affine(step, 0, west, 0, -step, north)
    shape = {"width": n[0], "height": n[1], "count": 1, "dtype": dtype}
    with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=at, **shape) as file:
        file.write(heights, 1)
        if tag:
            file.update_tags(TIFFTAG_DATETIME=tag)
    return path


def test_a_name_is_told_from_a_file():
    for name in ("a.tif", "/x/b.TIFF", "https://h.org/dem.tif", "s3://b/dem.tif", "c.jp2"):
        assert is_raster(name)
    for name in ("earth-search/cop-dem-glo-30", "catalog.json", "https://h.org/v1/collections/dem", "dem"):
        assert not is_raster(name)


def test_a_compound_crs_gives_the_datum_and_stays_out_of_the_way(shared_data):
    (path,) = (shared_data / "dem_rome").glob("*.tif")
    with rasterio.open(path) as file:
        middle, heights = file.lnglat(), file.read(1)
        assert file.crs.to_epsg() == 9707
    aoi = read_aoi((middle[0] - 0.01, middle[1] - 0.01, middle[0] + 0.01, middle[1] + 0.01))
    scene = dem_scene(str(path), aoi)
    tile = TileGrid(crs="EPSG:32633", resolution_m=10.0, tile_px=512).tiles(aoi)[0]

    made = terrain([scene], tile.geobox)["elevation"].compute()

    assert dem_facts_of(scene).vertical_datum == "EGM96 height"
    assert scene.item["properties"]["proj:code"] == "EPSG:4326"
    known = made[~np.isnan(made)]
    assert known.size > 1000
    assert heights.min() - 5 <= known.min() <= known.max() <= heights.max() + 5


def dem_facts_of(scene):
    class Nothing:
        class sources:
            dem_date = None
            dem_datum = None

    return dem_facts(Nothing, [scene])


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(
        tmp_path_factory.mktemp("archive"), seed=5, size="small", extent_km=1.6, overpasses=2
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, archive):
    made = tmp_path_factory.mktemp("runs")
    west, south, east, north = gpd.read_file(archive.aoi).to_crs("EPSG:32632").total_bounds
    box = (west - 6000, south - 6000, east + 6000, north + 6000)
    lidar(made / "lidar.tif", box, step=4.0, tag="2017:03:04 00:00:00")
    lidar(made / "undated.tif", box, step=8.0)
    lidar(made / "far.tif", (600_000, 5_000_000, 601_000, 5_001_000))
    lidar(made / "complex.tif", box, step=40.0, dtype="complex64")
    return made


@pytest.fixture
def configured(archive, folder):
    def make(dem, more=""):
        (folder / "run.toml").write_text(
            f'[area]\naoi = "{archive.aoi}"\ncrs = "EPSG:32632"\n'
            '[[epoch]]\nname = "event"\npre = ["2018-06-01", "2018-09-06"]\npost = ["2018-09-08", "2018-11-20"]\n'
            f'event = "2018-09-07"\n[sources]\noptical = "{archive.optical}"\ndem = "{dem}"\n{more}\n'
            '[cube]\ntile_px = 512\nbands = ["B04", "B08"]\n[detect]\nparameters = { loss_pct = 5 }\n'
            '[output]\nworkspace = "ws"\nformats = ["parquet", "gpkg", "stac"]\n'
        )
        return load_config(folder / "run.toml")

    return make


def test_a_file_of_another_resolution_gives_its_slopes_and_stands_in_every_product(configured, folder):
    made = plan(configured("lidar.tif", 'dem_datum = "national levelling"'))
    report = run(made, progress=False)

    assert report.complete, report.reasons
    said = "lidar.tif, measured 2017-03-04, heights above national levelling"
    assert lineage(made).dem == said
    assert f"dem         {said}" in plan_summary(made, newest="")
    item = json.loads(next((report.products / "stac").glob("*.json")).read_text())
    assert item["properties"]["slidecube:dem"] == said
    parquet = gpd.read_parquet(report.products / "landslides.parquet")
    gpkg = gpd.read_file(report.products / "landslides.gpkg", layer="landslides")
    for table in (parquet, gpkg):
        assert len(table)
        assert set(table["dem_source"]) == {"lidar.tif"}
        assert {str(day)[:10] for day in table["dem_date"]} == {"2017-03-04"}
        assert table["event_after_dem"].astype(bool).all()
    assert list(parquet.columns) == [*SCHEMA, "geometry"]
    # half a metre a metre
    np.testing.assert_allclose(parquet["slope_deg"].dropna(), np.degrees(np.arctan(0.5)), atol=0.02)


def test_the_content_of_the_file_decides_what_is_due_and_its_date_does_not(configured, folder, archive):
    lidar_plan, simulated = plan(configured("lidar.tif")), plan(configured(archive.dem))
    dated = plan(configured("lidar.tif", 'dem_date = "2020-01-01"'))
    (folder / "moved").mkdir(exist_ok=True)
    (folder / "moved" / "same.tif").write_bytes((folder / "lidar.tif").read_bytes())
    moved = plan(configured("moved/same.tif"))
    other = plan(configured("undated.tif"))

    def keys(made):
        return set(made.keys[made.epochs[0].terrain].values())

    assert keys(lidar_plan) == keys(moved)
    assert keys(lidar_plan) == keys(dated)
    assert keys(other).isdisjoint(keys(lidar_plan))
    assert lidar_plan.inventory == moved.inventory
    assert len({made.inventory for made in (lidar_plan, other, simulated)}) == 3, "two DEMs can be compared"
    assert keys(simulated).isdisjoint(keys(lidar_plan))


def test_a_dem_that_leaves_out_a_part_of_the_area_is_warned_of(configured, folder, archive):
    with rasterio.open(folder / "lidar.tif") as whole:
        half = whole.read(1)[: whole.height // 2]
        profile = whole.profile | {"height": len(half)}
    with rasterio.open(folder / "half.tif", "w", **profile) as file:
        file.write(half, 1)

    (said,) = [
        line
        for line in plan_summary(plan(configured("half.tif")), newest="").splitlines()
        if "DEM covers" in line
    ]
    share = int(re.search(r"covers (\d+)%", said)[1])
    assert 30 < share < 70
    assert "DEM covers" not in plan_summary(plan(configured("lidar.tif")), newest="")


def test_what_gathers_water_reads_the_next_item_of_the_dem_as_far_as_it_looks(configured, folder, archive):
    """A tile that ends a kilometre before the seam of two items: its rivers come from beyond."""
    west, south, east, north = gpd.read_file(archive.aoi).to_crs("EPSG:32632").total_bounds
    seam, items = east + 1500, []
    for name, box in (
        ("west", (west - 9000, south - 9000, seam, north + 9000)),
        ("east", (seam, south - 9000, east + 9000, north + 9000)),
    ):
        path = lidar(folder / f"{name}.tif", box, step=20.0)
        with rasterio.open(path) as file:
            bounds = rasterio.warp.transform_bounds(file.crs, "EPSG:4326", *file.bounds)
        outline = shapely.geometry.mapping(shapely.box(*bounds))
        items.append(
            {
                "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "dem", "links": [],
                "bbox": list(bounds), "geometry": outline, "properties": {"datetime": "2015-01-01T00:00:00Z"},
                "assets": {"elevation": {"href": f"{name}.tif", "type": "image/tiff; application=geotiff"}},
            }
        )  # fmt: skip
    (folder / "two.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))

    def read(more):
        made = plan(configured("two.json", more))
        reads = made.reads[made.epochs[0].terrain]
        assert made.tiles[0].geobox.boundingbox.right < seam
        return {made.scenes.scenes[i].id for i in reads[made.tiles[0].key]}

    assert read("") == {"west"}
    assert read("[ground]\nriver_corridor_m = 5\n") == {"west", "east"}


def facts(made):
    return dem_facts(made.config, made.scenes.role("dem"))


def test_what_is_known_of_a_dem_and_what_is_not(configured, archive):
    event = dt.date(2018, 9, 7)
    undated = facts(plan(configured("undated.tif")))
    assert (undated.first, undated.last, undated.later_event(event)) == (None, None, None)
    assert "of unknown date, vertical datum unknown" in str(undated)
    later = facts(plan(configured("undated.tif", 'dem_date = "2019-05-01"')))
    assert later.later_event(event) is False
    assert later.later_event(dt.date(2019, 5, 1)) is False, "the day itself is not surely later"
    simulated = facts(plan(configured(archive.dem)))
    assert simulated.last == dt.date(2014, 12, 31)
    assert simulated.later_event(event) is True


def test_glo_30_was_measured_before_it_was_published():
    item = {"properties": {"datetime": "2021-04-22T00:00:00Z"}}

    class Tile:
        source, datetime = "earth-search/cop-dem-glo-30", dt.datetime(2021, 4, 22, tzinfo=dt.UTC)

    Tile.item = item
    found = dem_facts_of(Tile)
    assert found == DemFacts(
        sources=("earth-search/cop-dem-glo-30",),
        first=dt.date(2010, 12, 12),
        last=dt.date(2015, 1, 16),
        vertical_datum="EGM2008",
    )


BAD = {
    "gone.tif": "gone.tif' cannot be read",
    "far.tif": "sources.dem: .*covers nothing of",
    "complex.tif": "holds complex64, and heights are real numbers",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_dem_is_refused_in_one_line(configured, name):
    with pytest.raises((PipelineError, CatalogError), match=BAD[name]) as caught:
        plan(configured(name))
    assert "\n" not in str(caught.value)
