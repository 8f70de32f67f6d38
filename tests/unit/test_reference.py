"""Known landslides on pixels, against rasterio; and files that are none, in one line."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import rasterio.features
import shapely

from slidecube.catalog.grid import TileGrid
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.reference import lay_on_pixels, read_polygons

GRID = TileGrid(crs="EPSG:32632", tile_px=512)
AREA = shapely.box(500_000, 5_000_000, 505_000, 5_005_000)


def blobs(n, seed, radius_m=(2.0, 120.0)):
    drawn = np.random.default_rng(seed)
    middles = drawn.uniform((500_200, 5_000_200), (504_800, 5_004_800), (n, 2))
    return [
        shapely.affinity.scale(shapely.Point(*m).buffer(r), 1.0, drawn.uniform(0.2, 1.0))
        for m, r in zip(middles, drawn.uniform(*radius_m, n), strict=True)
    ]


def window_of(area):
    left, _, _, top = area.bounds
    col, row = (round(v) for v in ~GRID.frame.affine @ (left, top))
    return row, col, GRID.frame[row : row + 500, col : col + 500]


def test_pixels_are_rasterios_and_the_smallest_keep_one():
    shapes = blobs(120, seed=1)
    laid = lay_on_pixels(shapes, GRID)
    row, col, box = window_of(AREA)
    wanted = (
        rasterio.features.rasterize(shapes, out_shape=box.shape, transform=box.affine, dtype="uint8") == 1
    )
    per_shape = [
        rasterio.features.rasterize([s], out_shape=box.shape, transform=box.affine, dtype="uint8").sum()
        for s in shapes
    ]
    small = [i for i, n in enumerate(per_shape) if n == 0]
    assert small  # or the test would say nothing of them
    got = np.zeros(box.shape, bool)
    got[laid.rows - row, laid.cols - col] = True
    assert (got & wanted).sum() == wanted.sum()
    assert (got & ~wanted).sum() <= len(small)
    sizes = np.diff(laid.starts)
    np.testing.assert_array_equal(sizes, np.maximum(per_shape, 1))
    for i in small:
        at = laid.starts[i]
        x, y = GRID.frame.affine @ (laid.cols[at] + 0.5, laid.rows[at] + 0.5)
        assert shapely.box(x - 5, y - 5, x + 5, y + 5).intersects(shapes[i])


def test_parts_of_the_pixels_keep_their_objects_and_the_digest_is_of_the_place():
    shapes = blobs(30, seed=2, radius_m=(20, 90))
    laid = lay_on_pixels(shapes, GRID)
    keep = laid.rows % 3 > 0
    part = laid.within(keep)
    assert len(part.rows) == keep.sum()
    for new, old in enumerate(part.ids):
        mine = laid.objects == old
        np.testing.assert_array_equal(part.rows[part.objects == new], laid.rows[mine & keep])
    turned = lay_on_pixels(shapes[::-1], GRID)
    assert turned.digest == laid.digest
    assert part.digest != laid.digest
    assert len(laid.within(np.zeros(len(laid.rows), bool)).ids) == 0


@pytest.mark.parametrize("ending", ["gpkg", "geojson", "shp", "fgb", "parquet"])
def test_any_vector_file_and_crs_gives_the_same_ground(tmp_path, ending):
    shapes = blobs(20, seed=3, radius_m=(40, 90))
    crs = "EPSG:4326" if ending == "geojson" else "EPSG:3035"
    table = gpd.GeoDataFrame({"name": range(20)}, geometry=shapes, crs=GRID.crs).to_crs(crs)
    path = tmp_path / f"known.{ending}"
    table.to_parquet(path) if ending == "parquet" else table.to_file(path)
    found = read_polygons(path, area=AREA, grid=GRID)
    got, wanted = lay_on_pixels(found, GRID), lay_on_pixels(shapes, GRID)
    both = [set(zip(laid.rows.tolist(), laid.cols.tolist(), strict=True)) for laid in (got, wanted)]
    assert len(both[0] & both[1]) > 0.995 * len(both[0] | both[1])  # a written coordinate is rounded


def test_invalid_polygons_are_repaired_and_those_elsewhere_left_out(tmp_path):
    bow = shapely.Polygon(
        [(501_000, 5_001_000), (501_200, 5_001_200), (501_200, 5_001_000), (501_000, 5_001_200)]
    )
    far = shapely.box(600_000, 5_001_000, 600_100, 5_001_100)
    path = tmp_path / "known.gpkg"
    gpd.GeoDataFrame(geometry=[bow, far, None, shapely.Polygon()], crs=GRID.crs).to_file(path)
    found = read_polygons(path, area=AREA, grid=GRID)
    assert len(found) == 1
    assert found[0].is_valid
    assert found[0].area == pytest.approx(20_000)


def table(geometry, crs="EPSG:32632"):
    return gpd.GeoDataFrame(geometry=geometry, crs=crs)


HERE = shapely.box(501_000, 5_001_000, 501_100, 5_001_100)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, r"no such file"),
        (lambda p: p.write_bytes(b"SQLite format 3\0garbage"), r"cannot be read as a vector file"),
        (lambda p: table([HERE.centroid]).to_file(p), r"holds Point; only polygons"),
        (lambda p: table([HERE], "EPSG:4326").to_file(p), r"no polygon in the area|do not fit its CRS"),
        (lambda p: table([shapely.box(6, 50, 7, 51)], "EPSG:4326").to_file(p), r"has no polygon in the area"),
        (lambda p: table([shapely.Polygon()]).to_file(p), r"holds no polygon"),
        (lambda p: (table([HERE]).to_file(p, layer="a"), table([HERE]).to_file(p, layer="b")), r"2 layers \(a, b\)"),
    ],
)  # fmt: skip
def test_files_that_are_no_reference_are_one_line(tmp_path, write, message):
    path = tmp_path / "known.gpkg"
    write(path)
    with pytest.raises(PipelineError, match=message) as refused:
        read_polygons(path, area=AREA, grid=GRID)
    assert "\n" not in str(refused.value)
    assert "known.gpkg" in str(refused.value)


def test_a_table_without_geometries_is_one_line(tmp_path):
    path = tmp_path / "known.csv"
    path.write_text("name,area\na,1\n", encoding="utf-8")
    with pytest.raises(PipelineError, match=r"known\.csv' is a table without geometries"):
        read_polygons(path, area=AREA, grid=GRID)


def test_a_shapefile_without_crs_and_a_layer_that_is_not_there(tmp_path):
    path = tmp_path / "known.shp"
    table([HERE]).to_file(path)
    path.with_suffix(".prj").unlink()
    with pytest.raises(PipelineError, match=r"has no CRS"):
        read_polygons(path, area=AREA, grid=GRID)
    with pytest.raises(PipelineError, match=r"has no layer 'other'; layers: known"):
        read_polygons(path, area=AREA, grid=GRID, layer="other")
    several = tmp_path / "known.gpkg"
    table([HERE]).to_file(several, layer="a")
    table([HERE.buffer(500)]).to_file(several, layer="b")
    assert read_polygons(several, area=AREA, grid=GRID, layer="a")[0].area == pytest.approx(10_000)
