"""Objects do not depend on the tiling, and equal what a flood fill by hand gives."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import geopandas as gpd
import numpy as np
import pyproj
import pytest
import rasterio.features
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.mosaic import TileRasters, label_objects
from slidecube.pipeline.polygons import SCHEMA

FRAME = GeoBox((4096, 8192), Affine(10, 0, 300_000, 0, -10, 4_800_000), "EPSG:32633")


def rasters(shape: tuple[int, int], seed: int, density: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    landslide = (rng.random(shape) < density).astype(np.uint8)
    landslide[rng.random(shape) < 0.02] = 255
    out: dict[str, np.ndarray] = {
        "landslide": landslide,
        "probability": rng.integers(0, 10001, shape).astype(np.uint16),
        "spread": rng.integers(0, 3000, shape).astype(np.uint16),
        "slope_deg": rng.integers(0, 9000, shape).astype(np.uint16),
        "elevation": rng.normal(1000, 300, shape).astype(np.float32),
        "pre_date": rng.integers(17000, 17100, shape).astype(np.uint16),
        "post_date": rng.integers(17100, 17200, shape).astype(np.uint16),
    }
    out["slope_deg"][rng.random(shape) < 0.1] = 65535
    out["elevation"][rng.random(shape) < 0.1] = np.nan
    out["post_date"][rng.random(shape) < 0.1] = 0
    return out


def cut(
    whole: dict[str, np.ndarray], origin: tuple[int, int], row_cuts: list[int], col_cuts: list[int]
) -> list[TileRasters]:
    height, width = whole["landslide"].shape
    rows = [0, *sorted({r for r in row_cuts if 0 < r < height}), height]
    cols = [0, *sorted({c for c in col_cuts if 0 < c < width}), width]
    tiles = []
    for i, (r0, r1) in enumerate(pairwise(rows)):
        for j, (c0, c1) in enumerate(pairwise(cols)):
            part = {name: a[r0:r1, c0:c1] for name, a in whole.items()}
            landslide = part.pop("landslide")
            tiles.append(
                TileRasters(
                    key=f"r{i}c{j}",
                    offset_px=(origin[0] + r0, origin[1] + c0),
                    landslide=landslide,
                    attributes=part,
                )
            )
    return tiles


def label(tiles: list[TileRasters]) -> gpd.GeoDataFrame:
    return label_objects(tiles, frame=FRAME, epoch="e1", model="m@1", detect_key="k")


def flood(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Objects by breadth-first search, in order of their first pixel."""
    seen = np.zeros_like(mask, dtype=bool)
    found = []
    for start in zip(*np.nonzero(mask), strict=True):
        if seen[start]:
            continue
        seen[start] = True
        queue, pixels = deque([start]), []
        while queue:
            r, c = queue.popleft()
            pixels.append((int(r), int(c)))
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    q = (r + dr, c + dc)
                    inside = 0 <= q[0] < mask.shape[0] and 0 <= q[1] < mask.shape[1]
                    if inside and mask[q] and not seen[q]:
                        seen[q] = True
                        queue.append(q)
        found.append(pixels)
    return found


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.45, 0.7, 0.97]),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    row_cuts=st.lists(st.integers(1, 23), max_size=5),
    col_cuts=st.lists(st.integers(1, 23), max_size=5),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_tiling_in_any_order_gives_the_same_bytes(seed, density, shape, row_cuts, col_cuts, shuffle):
    whole = rasters(shape, seed, density)
    origin = (1000, 2000)
    expected = label(cut(whole, origin, [], []))
    tiles = cut(whole, origin, row_cuts, col_cuts)
    shuffle.shuffle(tiles)
    got = label(tiles)
    assert (
        shapely.to_wkb(got.geometry.to_numpy()).tolist()
        == shapely.to_wkb(expected.geometry.to_numpy()).tolist()
    )
    assert got.drop(columns="geometry").equals(expected.drop(columns="geometry"))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    density=st.sampled_from([0.1, 0.3, 0.5, 0.8]),
    row_cuts=st.lists(st.integers(1, 17), max_size=3),
    col_cuts=st.lists(st.integers(1, 20), max_size=3),
)
def test_objects_equal_a_flood_fill_and_their_outlines_its_pixels(seed, density, row_cuts, col_cuts):
    whole = rasters((18, 21), seed, density)
    origin = (40, 60)
    got = label(cut(whole, origin, row_cuts, col_cuts))
    objects = flood(whole["landslide"] == 1)
    assert len(got) == len(objects)
    assert got.is_valid.all()
    assert list(got["id"]) == sorted(got["id"])
    box = FRAME[origin[0] : origin[0] + 18, origin[1] : origin[1] + 21]
    for row, pixels in zip(got.itertuples(), objects, strict=True):
        r, c = np.array(pixels).T
        assert row.id == f"e1-r{r[0] + 40:07d}c{c[0] + 60:07d}"
        assert row.n_px == len(pixels)
        burnt = rasterio.features.rasterize([row.geometry], out_shape=(18, 21), transform=box.affine)
        assert sorted(zip(*np.nonzero(burnt), strict=True)) == sorted(pixels)
        assert row.geometry.area == 100 * len(pixels)
        assert row.probability == pytest.approx(whole["probability"][r, c].mean() * 1e-4, rel=1e-6)
        assert row.probability_max == pytest.approx(whole["probability"][r, c].max() * 1e-4, rel=1e-6)
        slope = whole["slope_deg"][r, c]
        slope = slope[slope != 65535] * 0.01
        assert (
            (row.slope_deg == pytest.approx(slope.mean(), rel=1e-6))
            if slope.size
            else np.isnan(row.slope_deg)
        )
        height = whole["elevation"][r, c]
        height = height[~np.isnan(height)]
        if height.size:
            assert row.elevation_max_m == height.max()
            assert row.elevation_range_m == pytest.approx(float(height.max()) - float(height.min()), abs=1e-3)
        else:
            assert np.isnan(row.elevation_range_m)
        days = (np.datetime64("1970-01-01") + whole["pre_date"][r, c].astype("timedelta64[D]")).astype(object)
        assert row.pre_date == days.max()
        assert row.pre_date_min == days.min()


def test_an_object_over_four_tiles_that_meet_in_a_corner_is_one():
    whole = rasters((4, 4), 0, 0.0)
    whole["landslide"][:] = np.eye(4, dtype=np.uint8)  # a diagonal: connected through corners alone
    whole["landslide"][0, 3] = 1
    got = label(cut(whole, (8, 8), [1, 2], [2, 3]))
    assert list(got["n_px"]) == [4, 1]
    assert got.geometry[0].geom_type == "MultiPolygon"
    assert got.geometry[0].is_valid


def test_an_outline_has_corners_only_across_tiles_and_where_the_ring_starts():
    whole = rasters((6, 6), 0, 0.0)
    whole["landslide"][1:5, 1:5] = 1
    got = label(cut(whole, (0, 0), [2, 3], [2, 4]))
    assert len(shapely.get_coordinates(got.geometry[0])) == 5


def test_pixels_at_both_ends_of_the_frame_are_not_neighbours():
    left, right = np.zeros((2, 4), np.uint8), np.zeros((2, 4), np.uint8)
    right[0, 3] = left[1, 0] = 1
    tiles = [
        TileRasters(key="a", offset_px=(0, 0), landslide=left),
        TileRasters(key="b", offset_px=(0, FRAME.shape[1] - 4), landslide=right),
    ]
    assert len(label(tiles)) == 2


@pytest.mark.parametrize(
    "crs", ["EPSG:32633", "EPSG:6680", "+proj=laea +lat_0=36 +lon_0=138 +datum=WGS84 +units=m +no_defs"]
)
def test_area_equals_the_sum_of_the_pixels_geodesic_areas(crs):
    frame = GeoBox((400, 400), Affine(10, 0, 350_000, 0, -10, -310_000 if "laea" in crs else 4_000_000), crs)
    rng = np.random.default_rng(1)
    mask = np.zeros((30, 40), np.uint8)
    mask[3:27, 4:35] = rng.random((24, 31)) < 0.8
    got = label_objects([TileRasters(key="t", offset_px=(7, 9), landslide=mask)], frame=frame, epoch="e")
    projected = pyproj.CRS(crs)
    to = pyproj.Transformer.from_crs(projected, projected.geodetic_crs, always_xy=True)
    geod = projected.get_geod()
    total = 0.0
    for r, c in zip(*np.nonzero(mask), strict=True):
        x, y = frame.affine @ (np.array([0, 1, 1, 0]) + c + 9, np.array([1, 1, 0, 0]) + r + 7)
        total += geod.polygon_area_perimeter(*to.transform(x, y))[0]
    assert got["area_m2"].sum() == pytest.approx(total, rel=1e-6)
    assert total != pytest.approx(100.0 * mask.sum(), rel=1e-6) or "laea" in crs


def test_no_landslide_gives_an_empty_table_with_the_same_types():
    empty = label([TileRasters(key="t", offset_px=(0, 0), landslide=np.zeros((4, 4), np.uint8))])
    some = label([TileRasters(key="t", offset_px=(0, 0), landslide=np.ones((4, 4), np.uint8))])
    assert len(empty) == 0
    assert list(empty.columns) == [*SCHEMA, "geometry"]
    assert empty.dtypes.equals(some.dtypes)
    assert empty.crs == FRAME.crs
    assert label([]).dtypes.equals(some.dtypes)


def test_a_tile_given_twice_and_tiles_that_overlap_are_refused():
    mask = np.ones((4, 4), np.uint8)
    a = TileRasters(key="a", offset_px=(0, 0), landslide=mask)
    with pytest.raises(PipelineError, match="both start at"):
        label([a, TileRasters(key="b", offset_px=(0, 0), landslide=mask)])
    with pytest.raises(PipelineError, match="overlap at row 3"):
        label([a, TileRasters(key="b", offset_px=(3, 0), landslide=mask)])


def test_wrong_attributes_are_named():
    mask = np.ones((4, 4), np.uint8)
    with pytest.raises(PipelineError, match="'colour'"):
        TileRasters(key="a", offset_px=(0, 0), landslide=mask, attributes={"colour": mask})
    with pytest.raises(PipelineError, match="must be equal"):
        TileRasters(key="a", offset_px=(0, 0), landslide=mask, attributes={"spread": mask[:2]})
    tiles = [
        TileRasters(key="a", offset_px=(0, 0), landslide=mask, attributes={"spread": mask}),
        TileRasters(key="b", offset_px=(4, 0), landslide=mask),
    ]
    with pytest.raises(PipelineError, match="earlier tiles"):
        label(tiles)
