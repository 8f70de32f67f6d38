"""Which scene touches which GeoBox, against the projection of every sampled pixel."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyproj
import pytest
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from slidecube.catalog.scenes import Scene, SceneTable

SIDE_M = 109_800.0  # of a Sentinel-2 tile


def scene(epsg, left, top, *, id_):
    """A scene whose item names its four corners only, as Sentinel-2 items do."""
    to = pyproj.Transformer.from_crs(epsg, 4326, always_xy=True)
    corners = [
        (left, top),
        (left + SIDE_M, top),
        (left + SIDE_M, top - SIDE_M),
        (left, top - SIDE_M),
        (left, top),
    ]
    ring = [to.transform(*xy) for xy in corners]
    item = {
        "id": id_,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"proj:epsg": epsg},
        "assets": {},
    }
    return Scene(
        id=id_,
        role="optical",
        source="test",
        datetime=dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
        identity=id_,
        datatake="",
        version="",
        offset=None,
        bands={},
        item=item,
    )


def pixels(geobox, n=31):
    """Centres of n x n pixels over a GeoBox, the outermost ones included."""
    rows, cols = geobox.shape
    y_px = np.linspace(0, rows - 1, n).round() + 0.5
    x_px = np.linspace(0, cols - 1, n).round() + 0.5
    a, _, c, _, e, f = geobox.affine[:6]
    x, y = np.meshgrid(c + a * x_px, f + e * y_px)
    return x.ravel(), y.ravel()


def distance_m(geobox, epsg, left, top):
    """Smallest distance of the sampled pixels to the scene's rectangle, in the scene's CRS; 0 = one lies in it."""
    x, y = pyproj.Transformer.from_crs(geobox.crs.to_wkt(), epsg, always_xy=True).transform(*pixels(geobox))
    points = shapely.points(x[np.isfinite(x)], y[np.isfinite(x)])
    return float(
        shapely.distance(points, shapely.box(left, top - SIDE_M, left + SIDE_M, top)).min(initial=np.inf)
    )


def laea(lon, lat):
    return f"+proj=laea +lat_0={lat} +lon_0={lon} +datum=WGS84 +units=m"


CASES = [  # scene's zone and corner; CRS of the grid
    (32632, 600_000, 5_200_020, "EPSG:32632"),
    (32632, 699_960, 5_200_020, "EPSG:32633"),
    (32632, 699_960, 5_200_020, "EPSG:3035"),
    (32632, 600_000, 7_900_020, laea(9, 70)),
    (32636, 399_960, 60_000, "EPSG:32736"),
    (32719, 600_000, 4_500_000, laea(-67, -50)),
    (32601, 300_000, 7_400_040, "EPSG:32660"),
    (32601, 300_000, 7_400_040, laea(180, 66)),
    (32760, 699_960, 8_100_040, "EPSG:32701"),
]


@pytest.mark.parametrize(("epsg", "left", "top", "crs"), CASES)
def test_no_pixel_is_lost_and_few_scenes_are_read_in_vain(epsg, left, top, crs):
    table = SceneTable(scenes=(scene(epsg, left, top, id_="a"),))
    to = pyproj.Transformer.from_crs(epsg, crs, always_xy=True)
    rng = np.random.default_rng(7)
    boxes = []
    for _ in range(120):
        # around the edge of the scene, where a wrong footprint shows
        x, y = to.transform(left + rng.uniform(-0.15, 1.15) * SIDE_M, top - rng.uniform(-0.15, 1.15) * SIDE_M)
        size = rng.choice([512, 1024, 2048])
        x, y = np.round(x, -1), np.round(y, -1)
        boxes.append(GeoBox((size, size), GeoBox.from_bbox((x, y, x + 10, y + 10), crs, shape=1).affine, crs))
    touched = [len(t) == 1 for t in table.touching_each(boxes)]
    distances = [distance_m(box, epsg, left, top) for box in boxes]
    assert all(t for t, d in zip(touched, distances, strict=True) if d == 0), "a tile would lose pixels"
    # pixels are sampled every 2048 / 30 * 10 m; the two readings of the edge differ by 600 m at 70 degrees
    assert max(d for t, d in zip(touched, distances, strict=True) if t) < 1_200
    assert 20 < sum(touched) < 115


@pytest.mark.parametrize("top", [1_000_020, 5_200_020, 7_900_020])
def test_the_last_three_pixels_of_every_edge(top):
    """Half-way along an edge its corners, joined straight in longitude and latitude, leave the pixels outside."""
    left, px = 600_000, 64
    table = SceneTable(scenes=(scene(32632, left, top, id_="a"),))
    boxes = []
    for along in np.linspace(0.05, 0.95, 9).round(2) * SIDE_M:
        for x, y in (
            (left + along, top + (px - 3) * 10),  # its lower three rows over the northern edge
            (left + along, top - SIDE_M + 30),
            (left - (px - 3) * 10, top - along),
            (left + SIDE_M - 30, top - along),
        ):
            boxes.append(GeoBox((px, px), Affine(10, 0, x, 0, -10, y), "EPSG:32632"))
    assert [distance_m(box, 32632, left, top) for box in boxes] == [0] * len(boxes)
    assert [len(t) for t in table.touching_each(boxes)] == [1] * len(boxes)
