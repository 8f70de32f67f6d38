"""Outlines of hand-made shapes, and the schema."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import shapely
from affine import Affine

from slidecube.pipeline.polygons import (
    SCHEMA,
    corners_only,
    geodesic_areas_m2,
    merge_parts,
    objects_frame,
    oriented_sizes_m,
    pixel_polygons,
    to_frame,
)


def outline(rows: list[str]) -> shapely.Geometry:
    labels = np.array([[ch == "#" for ch in row] for row in rows]).astype(np.int32)
    of, parts = pixel_polygons(labels)
    return merge_parts(parts, of - 1)[0]


def test_a_square_has_four_corners():
    assert outline(["....", ".##.", ".##.", "...."]).equals_exact(
        shapely.normalize(shapely.box(1, 1, 3, 3)), tolerance=0
    )


def test_a_ring_keeps_its_hole():
    ring = outline(["###", "#.#", "###"])
    assert ring.area == 8
    assert len(ring.interiors) == 1


@pytest.mark.parametrize(
    ("rows", "parts", "holes"),
    [
        (["#.", ".#"], 2, 0),  # a corner joins nothing
        (["###", "#.#", "##."], 1, 1),  # the hole touches the shell in a corner: a hole, not a pinched shell
        (["####", "#.##", "##.#", "####"], 1, 2),  # two holes that touch in a corner
        (["#####", "#.#.#", "##.##", "#.#.#", "#####"], 3, None),
        ([".#.", "#.#", ".#."], 4, 0),
    ],
)
def test_corners_that_touch_stay_valid(rows, parts, holes):
    shape = outline(rows)
    assert shape.is_valid
    assert shape.area == sum(row.count("#") for row in rows)
    pieces = shapely.get_parts(shape)
    assert parts is None or holes is None or len(pieces) == parts
    assert holes is None or shapely.get_num_interior_rings(pieces).sum() == holes


def test_vertices_on_straight_edges_go_also_at_the_start_of_a_ring():
    dense = shapely.Polygon([(1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (0, 1), (0, 0)])
    lean = corners_only(np.array([dense], dtype=object))[0]
    assert shapely.get_num_coordinates(lean) == 5
    assert lean.equals(dense)


def test_parts_of_several_objects_go_to_their_own():
    boxes = shapely.box([0, 9, 1, 5], 0, [1, 10, 2, 6], 1)
    merged = merge_parts(boxes, np.array([1, 0, 1, 0]))
    assert merged[0].geom_type == "MultiPolygon"
    assert merged[0].area == 2
    assert merged[1].equals(shapely.box(0, 0, 2, 1))


def test_frame_pixels_become_map_metres():
    moved = to_frame(np.array([shapely.box(2, 3, 4, 4)], dtype=object), Affine(10, 0, 1000, 0, -10, 5000))
    assert moved[0].bounds == (1020, 4960, 1040, 4970)


def test_holes_are_not_counted_in_the_area():
    whole, hole = (
        shapely.box(5e5, 5e6, 5e5 + 300, 5e6 + 300),
        shapely.box(5e5 + 100, 5e6 + 100, 5e5 + 200, 5e6 + 200),
    )
    areas = geodesic_areas_m2(
        shapely.normalize(np.array([whole, hole, whole - hole], dtype=object)), "EPSG:32633"
    )
    assert areas[0] - areas[1] == pytest.approx(areas[2], abs=0.02)
    assert areas[0] == pytest.approx(300**2 / 0.9996**2, rel=1e-5)  # the zone's scale on its central meridian


def test_area_of_shapes_longer_than_the_densified_edge():
    equal_area = "+proj=laea +lat_0=46 +lon_0=8 +datum=WGS84 +units=m +no_defs"
    band = np.array([shapely.box(400_000, 300_000, 500_000, 300_100)], dtype=object)
    assert geodesic_areas_m2(shapely.normalize(band), equal_area)[0] == pytest.approx(1e7, rel=1e-5)


def test_length_and_width_of_a_diagonal_object():
    bar = shapely.affinity.rotate(shapely.box(0, 0, 500, 40), 30)
    length, width = oriented_sizes_m(np.array([bar], dtype=object))
    assert length[0] == pytest.approx(500, abs=0.1)
    assert width[0] == pytest.approx(40, abs=0.1)


def test_every_column_says_its_type_unit_and_meaning():
    table = objects_frame({}, np.empty(0, dtype=object), "EPSG:32633")
    for name, column in SCHEMA.items():
        assert table[name].dtype == pd.api.types.pandas_dtype(column.dtype)
        assert column.description
        assert name.islower()
