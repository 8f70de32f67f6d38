"""The byte of the ground, and accuracy by stratum against counts made one pixel and one object at a time."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import shapely
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from slidecube.pipeline.config import Ground
from slidecube.pipeline.evaluate import evaluate
from slidecube.pipeline.ground import GROUND_CF, SHIFTS, answer, pack, strata, yes_no
from slidecube.pipeline.inventory import Observability
from slidecube.pipeline.mosaic import TileRasters, label_objects

BOX = GeoBox.from_bbox((0, 0, 500, 400), "EPSG:32632", resolution=10)
KINDS = strata(Ground(river_corridor_m=5.0))


def drawn(seed):
    rng = np.random.default_rng(seed)
    answers = {factor: rng.integers(0, 4 if factor == "slope_class" else 3, BOX.shape) for factor in SHIFTS}
    return rng, answers, pack(answers)


def inventory(ground, observability):
    data = {"ground": ground, "observability": observability}
    coords = xr_coords(BOX)
    made = xr.Dataset(
        {n: (("epoch", "y", "x"), v[None].astype(np.uint8)) for n, v in data.items()}, coords=coords
    )
    return made.assign_attrs({"spatial:transform": list(BOX.affine)[:6]})


def squares(rng, n):
    rows, cols = rng.integers(0, 34, n), rng.integers(0, 44, n)
    sizes = rng.integers(1, 6, n)
    boxes = [
        shapely.box(c * 10, 400 - (r + s) * 10, (c + s) * 10, 400 - r * 10)
        for r, c, s in zip(rows, cols, sizes, strict=True)
    ]
    parts = [p for p in shapely.get_parts(shapely.union_all(boxes)) if p.area]
    return gpd.GeoDataFrame(geometry=parts, crs="EPSG:32632")


@settings(max_examples=30)
@given(seed=st.integers(0, 9999))
def test_what_is_packed_is_told_again_and_each_stratum_is_one_answer(seed):
    _, answers, ground = drawn(seed)

    for factor, values in answers.items():
        np.testing.assert_array_equal(answer(ground, factor), values)
        if factor != "slope_class":
            np.testing.assert_array_equal(yes_no(ground, factor), np.array([255, 0, 1])[values])
        held = sum(kind.holds(ground).astype(int) for kind in KINDS if kind.factor == factor)
        np.testing.assert_array_equal(held, values > 0)


def test_the_flags_of_the_byte_are_those_of_the_strata():
    names = GROUND_CF["flag_meanings"].split()
    assert len(GROUND_CF["flag_masks"]) == len(GROUND_CF["flag_values"]) == len(names) == len(KINDS)
    every = np.arange(256, dtype=np.uint8)
    for mask, value, name in zip(GROUND_CF["flag_masks"], GROUND_CF["flag_values"], names, strict=True):
        (kind,) = [k for k in KINDS if k.name.removeprefix("slope_") == name]
        np.testing.assert_array_equal(kind.holds(every), every & mask == value)


@settings(max_examples=15)
@given(seed=st.integers(0, 9999))
def test_rows_are_what_counting_one_by_one_gives(seed):
    rng, _, ground = drawn(seed)
    seen = np.where(rng.random(BOX.shape) < 0.8, Observability.OBSERVED, Observability.NOT_OBSERVABLE)
    ours, theirs = squares(rng, 6), squares(rng, 6)

    found = evaluate(ours, theirs, inventory=inventory(ground, seen), ground=Ground(river_corridor_m=5.0))

    y, x = np.mgrid[395:0:-10, 5:500:10]
    mine, real = (shapely.contains_xy(shapely.union_all(t.geometry.to_numpy()), x, y) for t in (ours, theirs))
    rows = {row.stratum.name: row for row in found.by_stratum}
    for kind in KINDS:
        on = kind.holds(ground) & (seen == Observability.OBSERVED)
        row = rows.get(kind.name)
        assert (row is None) == (not on.any())
        if row is None:
            continue
        assert (row.pixels.tp, row.pixels.fp) == ((on & mine & real).sum(), (on & mine & ~real).sum())
        assert (row.pixels.fn, row.pixels.tn) == ((on & ~mine & real).sum(), (on & ~mine & ~real).sum())
        assert row.observed_km2 == pytest.approx(on.sum() * 1e-4)
    for factor in SHIFTS:
        own = [k for k in KINDS if k.factor == factor]
        for table, good, bad in (
            (found.truth, "truth_found", "truth_missed"),
            (found.predicted, "predicted_right", "predicted_wrong"),
        ):
            want = dict.fromkeys((k.name for k in own), 0)
            for shape, status in zip(table.geometry, table["status"], strict=True):
                inside = shapely.contains_xy(shape, x, y)
                counts = [int((inside & k.holds(ground)).sum()) for k in own]
                if status != "unobserved" and any(counts):
                    want[own[int(np.argmax(counts))].name] += 1
            for name, n in want.items():
                objects = rows[name].objects if name in rows else None
                assert n == (getattr(objects, good) + getattr(objects, bad) if objects else 0)


def test_an_inventory_that_does_not_say_has_no_rows():
    rng, _, ground = drawn(0)
    seen = np.full(BOX.shape, Observability.OBSERVED)
    found = evaluate(squares(rng, 3), squares(rng, 3), inventory=inventory(ground, seen).drop_vars("ground"))

    assert found.by_stratum == ()
    assert found.to_dict()["by_stratum"] == []
    assert "ground, objects" not in found.table()


def test_an_object_has_what_half_of_its_known_pixels_have():
    mask = np.zeros((8, 8), np.uint8)
    mask[1, 1:5] = mask[4, 1:5] = mask[6, 1:5] = 1
    low = np.full(mask.shape, 255, np.uint8)
    low[1, 1:5] = [1, 1, 0, 0]
    low[4, 1:5] = [1, 0, 0, 255]
    frame = GeoBox((8, 8), BOX.affine, "EPSG:32632")

    table = label_objects(
        [TileRasters(key="a", offset_px=(0, 0), landslide=mask, attributes={"low_vegetation": low})],
        frame=frame,
        epoch="e",
    )

    assert table["low_vegetation"].tolist()[:2] == [True, False]
    assert table["low_vegetation"].isna().tolist() == [False, False, True]
    assert table["farmland"].isna().all()
