"""What must hold of every grid, whatever its CRS, tile size and area."""

from __future__ import annotations

from functools import lru_cache

import geopandas as gpd
import numpy as np
import pyproj
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.catalog.aoi import Aoi, read_aoi
from slidecube.catalog.errors import CatalogError
from slidecube.catalog.grid import TILE_SIZES_PX, TileGrid, choose_crs, lattice

LAEA = "+proj=laea +lat_0=43 +lon_0=143 +x_0=0 +y_0=0 +datum=WGS84 +units=m +no_defs"
PLACES = {  # CRS -> an interior point, lon/lat
    "EPSG:32632": (9.0, 46.5),
    "EPSG:32733": (15.0, -12.0),
    "EPSG:32760": (178.5, -17.0),
    "EPSG:3035": (11.0, 47.0),
    "EPSG:6680": (143.0, 43.0),
    "EPSG:2193": (173.0, -42.0),
    "EPSG:3413": (-45.0, 75.0),
    LAEA: (142.5, 43.2),
}

crss = st.sampled_from(sorted(PLACES))
sizes = st.sampled_from(TILE_SIZES_PX)
shifts_m = st.floats(-30_000, 30_000)
lengths_m = st.floats(20, 120_000)


@lru_cache
def centre(crs):
    return pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(*PLACES[crs])


@st.composite
def areas(draw, crs=None):
    """An AOI of up to three boxes and triangles near the interior point of a CRS, drawn in that CRS."""
    crs = crs or draw(crss)
    x0, y0 = centre(crs)
    shapes = []
    for _ in range(draw(st.integers(1, 3))):
        x, y = x0 + draw(shifts_m), y0 + draw(shifts_m)
        w, h = draw(lengths_m), draw(lengths_m)
        box = shapely.box(x, y, x + w, y + h)
        shapes.append(box if draw(st.booleans()) else shapely.Polygon([(x, y), (x + w, y), (x, y + h)]))
    return Aoi(name="drawn", geometry=shapely.union_all(shapes), crs=crs)


def extent(tile):
    return tile.geobox.extent.geom


@given(areas(), sizes)
@settings(max_examples=60)
def test_tiles_cover_the_area_and_none_is_idle(aoi, tile_px):
    grid = TileGrid(crs=aoi.crs, tile_px=tile_px)
    tiles = grid.tiles(aoi)
    union = shapely.union_all([extent(t) for t in tiles])
    assert shapely.difference(aoi.geometry, union).area <= 1e-9 * aoi.geometry.area
    for tile in tiles:
        assert shapely.intersection(extent(tile), aoi.geometry).area > 0


@given(areas(), sizes)
@settings(max_examples=60)
def test_no_pixel_lies_in_two_tiles(aoi, tile_px):
    grid = TileGrid(crs=aoi.crs, tile_px=tile_px)
    tiles = grid.tiles(aoi)
    corners = [grid.offset_px(t.geobox) for t in tiles]
    assert len({t.key for t in tiles}) == len(set(corners)) == len(tiles)
    for tile, (row, col) in zip(tiles, corners, strict=True):
        assert tile.geobox.shape == (tile_px, tile_px)
        assert (row, col) == (tile.row * tile_px, tile.col * tile_px)
        # exactly on the frame's pixels, not merely near them
        assert tile.geobox == grid.frame[row : row + tile_px, col : col + tile_px]
    assert [(t.row, t.col) for t in tiles] == sorted((t.row, t.col) for t in tiles)


@given(crss.flatmap(lambda crs: st.tuples(areas(crs), areas(crs))), sizes)
@settings(max_examples=60)
def test_keys_stay_when_the_area_grows(pair, tile_px):
    aoi, more = pair
    grid = TileGrid(crs=aoi.crs, tile_px=tile_px)
    grown = Aoi(name="grown", geometry=aoi.geometry.union(more.geometry), crs=aoi.crs)
    before = {t.key: t.geobox for t in grid.tiles(aoi)}
    after = {t.key: t.geobox for t in grid.tiles(grown)}
    assert before.items() <= after.items()
    assert grid.key == TileGrid(crs=aoi.crs, tile_px=tile_px).key


@given(areas(), sizes)
@settings(max_examples=40)
def test_tiles_are_a_sequence_of_tiles_that_are_made_when_asked_for(aoi, tile_px):
    grid = TileGrid(crs=aoi.crs, tile_px=tile_px)
    tiles = grid.tiles(aoi)
    listed = list(tiles)
    assert [tile.key for tile in listed] == list(tiles.keys)
    assert [grid.tile(tile.row, tile.col) for tile in listed] == listed
    assert grid.tiles_at(tiles.rows, tiles.cols) == tiles
    assert list(tiles[1:]) == listed[1:]
    assert list(tiles[::-1]) == listed[::-1]
    assert tiles[-1] == listed[-1]
    assert listed[0] in tiles
    assert tiles[1:] != tiles
    with pytest.raises(IndexError):
        tiles[len(tiles)]


@pytest.mark.parametrize("place", [(-1, 0), (0, -1), (10_000, 0), (0, 10_000)])
def test_a_tile_outside_the_frame_is_refused(place):
    with pytest.raises(
        CatalogError, match=f"Tile row {place[0]}, column {place[1]} lies outside the frame of "
    ):
        TileGrid(crs="EPSG:32632", tile_px=2048).tile(*place)


@pytest.mark.parametrize("crs", sorted(PLACES))
def test_all_tile_sizes_share_one_frame(crs):
    frames = {TileGrid(crs=crs, tile_px=px).frame for px in TILE_SIZES_PX}
    assert len(frames) == 1
    frame = frames.pop()
    assert all(n % max(TILE_SIZES_PX) == 0 for n in frame.shape)
    assert frame.affine.c % (10 * max(TILE_SIZES_PX)) == 0
    assert frame.affine.f % (10 * max(TILE_SIZES_PX)) == 0


@given(areas())
@settings(max_examples=40)
def test_small_tiles_lie_within_large_ones(aoi):
    large = {(t.row, t.col) for t in TileGrid(crs=aoi.crs, tile_px=2048).tiles(aoi)}
    small = {(t.row // 4, t.col // 4) for t in TileGrid(crs=aoi.crs, tile_px=512).tiles(aoi)}
    assert small == large


@given(
    st.integers(1, 2500),
    st.integers(1, 2500),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.sampled_from([64, 512, 1024]),
)
@settings(max_examples=80)
def test_the_lattice_is_a_partition_on_fixed_lines(rows, cols, row0, col0, block):
    times = np.zeros((rows, cols), np.uint8)
    for ys, xs in lattice((rows, cols), (row0, col0), block):
        times[ys, xs] += 1
        for cut, offset, size in ((ys, row0, rows), (xs, col0, cols)):
            assert 0 < cut.stop - cut.start <= block
            assert cut.start == 0 or (cut.start + offset) % block == 0
            assert cut.stop == size or (cut.stop + offset) % block == 0
    assert (times == 1).all()


@given(areas(), sizes)
@settings(max_examples=30)
def test_every_tile_size_is_cut_into_the_same_blocks(aoi, tile_px):
    """The blocks of all tiles are those of the frame: a block never crosses a tile's edge."""
    grid = TileGrid(crs=aoi.crs, tile_px=tile_px)
    for tile in grid.tiles(aoi)[:3]:
        offset = grid.offset_px(tile.geobox)
        blocks = list(lattice(tile.geobox.shape, offset, grid.block_px))
        assert len(blocks) == (tile_px // grid.block_px) ** 2
        assert {(ys.stop - ys.start, xs.stop - xs.start) for ys, xs in blocks} == {(512, 512)}


@given(st.floats(-179, 179), st.floats(-79, 83), st.floats(0.01, 2.5), st.floats(0.01, 1.0))
@settings(max_examples=60)
def test_a_crs_is_found_for_every_place(lon, lat, width, height):
    aoi = Aoi(name="any", geometry=shapely.box(lon, lat, min(180, lon + width), lat + height))
    crs = choose_crs(aoi)
    tiles = TileGrid(crs=crs, tile_px=4096).tiles(aoi)
    assert tiles
    if crs.startswith("EPSG:"):  # the zone that holds the whole area
        area = pyproj.CRS(crs).area_of_use
        assert area is not None
        assert area.west - 1e-9 <= aoi.geometry.bounds[0]
        assert aoi.geometry.bounds[2] <= area.east + 1e-9
    else:  # equal area, whatever the place
        projected = aoi.to_crs(crs)
        true_m2 = abs(
            pyproj.Geod(ellps="WGS84").geometry_area_perimeter(shapely.segmentize(aoi.geometry, 0.05))[0]
        )
        assert projected.area == pytest.approx(true_m2, rel=2e-3)


@pytest.mark.parametrize(
    ("bbox", "crs"),
    [
        ([177.0, -19.0, -179.0, -16.0], None),
        ([179.2, -17.5, -179.8, -16.5], None),
        ([-179.9, 51.0, -179.0, 52.0], "EPSG:32601"),
        ([174.1, -18.0, 179.9, -17.0], "EPSG:32760"),
    ],
)
def test_areas_at_the_antimeridian(bbox, crs):
    aoi = read_aoi(bbox)
    chosen = choose_crs(aoi)
    assert chosen == crs or (crs is None and chosen.startswith("+proj=laea"))
    grid = TileGrid(crs=chosen)
    union = shapely.union_all([extent(t) for t in grid.tiles(aoi)])
    assert shapely.difference(aoi.to_crs(chosen), union).area < 1.0
    width_km = (bbox[2] - bbox[0]) % 360 * 111.3 * np.cos(np.radians((bbox[1] + bbox[3]) / 2))
    assert len(grid.tiles(aoi)) < 3 * (width_km / 20 + 2) * (abs(bbox[3] - bbox[1]) * 111 / 20 + 2)


def test_an_area_that_only_touches_a_tile_does_not_need_it():
    grid = TileGrid(crs="EPSG:32632", tile_px=512)
    one = grid.tiles(
        Aoi(name="in", geometry=shapely.box(500_000, 5_100_000, 500_010, 5_100_010), crs=grid.crs)
    )[0]
    exact = Aoi(name="exact", geometry=extent(one), crs=grid.crs)
    assert [t.key for t in grid.tiles(exact)] == [one.key]


def test_areas_outside_the_crs_are_refused():
    aoi = Aoi(name="japan", geometry=shapely.box(140, 40, 141, 41))
    with pytest.raises(CatalogError, match="another crs"):
        TileGrid(crs="EPSG:32632").tiles(aoi)


def test_real_patches_of_thirteen_inventories(shared_data):
    """Every 128 px footprint of Sen12Landslides lies in the tiles of its inventory, on the chosen grid."""
    path = shared_data / "sen12landslides_footprints" / "LD_harmonized_s2_patch_locations.geojson"
    patches = gpd.read_file(path)
    assert len(patches) == 4_988
    for name, group in patches.groupby("inventory"):
        zone = group["crs_original"].mode()[0]
        squares = group.to_crs(zone).buffer(640, cap_style="square")
        aoi = Aoi(name=str(name), geometry=squares.union_all(), crs=zone)
        for crs in {zone, choose_crs(aoi)}:
            grid = TileGrid(crs=crs, tile_px=1024)
            tiles = grid.tiles(aoi)
            projected = aoi.to_crs(crs)
            union = shapely.union_all([extent(t) for t in tiles])
            assert shapely.difference(projected, union).area <= 1e-9 * projected.area, name
            some = Aoi(name="some", geometry=squares.iloc[: len(squares) // 2].union_all(), crs=zone)
            assert {t.key for t in grid.tiles(some)} <= {t.key for t in tiles}
            assert all(projected.intersects(extent(t)) for t in tiles)
