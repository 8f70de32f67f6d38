"""Scores against loops by hand, scikit-learn, and cases whose answer is known."""

from __future__ import annotations

import json
import math

import geopandas as gpd
import numpy as np
import pytest
import rasterio.features
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from slidecube.pipeline import evaluate as ev
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.evaluate import ObjectScores, PixelScores, evaluate

AFFINE = Affine(10, 0, 300_000, 0, -10, 4_800_000)
GEOBOX = GeoBox((60, 80), AFFINE, "EPSG:32633")


def inventory(observability: np.ndarray | None = None) -> xr.Dataset:
    values = np.full(GEOBOX.shape, 3, np.uint8) if observability is None else observability
    return xr.Dataset(
        {"observability": (("epoch", "y", "x"), values[None])}, coords={**xr_coords(GEOBOX), "epoch": ["e1"]}
    )


def squares(*pixels: tuple[int, int, int, int]) -> gpd.GeoDataFrame:
    """Polygons of pixel boxes (first row, first column, rows, columns)."""
    shapes = [
        shapely.box(300_000 + 10 * c, 4_800_000 - 10 * (r + h), 300_000 + 10 * (c + w), 4_800_000 - 10 * r)
        for r, c, h, w in pixels
    ]
    return gpd.GeoDataFrame(geometry=shapes, crs="EPSG:32633")


def random_blobs(seed: int, n: int) -> gpd.GeoDataFrame:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(300_050, 300_750, n), rng.uniform(4_799_450, 4_799_950, n)
    radii = rng.uniform(4, 60, n)
    return gpd.GeoDataFrame(geometry=shapely.buffer(shapely.points(x, y), radii), crs="EPSG:32633")


@pytest.mark.parametrize("seed", range(6))
def test_pixels_equal_loops_and_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, truth = random_blobs(seed, 12), random_blobs(seed + 100, 9)
    observability = np.random.default_rng(seed).integers(0, 4, GEOBOX.shape).astype(np.uint8)
    got = evaluate(predicted, truth, inventory=inventory(observability))
    burn = [
        rasterio.features.rasterize(list(g.geometry), out_shape=GEOBOX.shape, transform=AFFINE) > 0
        for g in (truth, predicted)
    ]
    tally = {(t, p): 0 for t in (False, True) for p in (False, True)}
    where = dict.fromkeys(range(4), 0)
    for r in range(60):
        for c in range(80):
            if observability[r, c] == 3:
                tally[bool(burn[0][r, c]), bool(burn[1][r, c])] += 1
            if burn[0][r, c]:
                where[int(observability[r, c])] += 1
    p = got.pixels
    assert (p.tp, p.fp, p.fn, p.tn) == (
        tally[True, True], tally[False, True], tally[True, False], tally[False, False],
    )  # fmt: skip
    assert where == {
        0: got.shares.not_processed, 1: got.shares.outside_aoi,
        2: got.shares.not_observable, 3: got.shares.observed,
    }  # fmt: skip
    y_true, y_pred = burn[0][observability == 3], burn[1][observability == 3]
    assert p.precision == pytest.approx(metrics.precision_score(y_true, y_pred))
    assert p.recall == pytest.approx(metrics.recall_score(y_true, y_pred))
    assert p.f1 == pytest.approx(metrics.f1_score(y_true, y_pred))
    assert p.iou_landslide == pytest.approx(metrics.jaccard_score(y_true, y_pred))
    assert p.miou == pytest.approx(metrics.jaccard_score(y_true, y_pred, average="macro"))


@pytest.mark.parametrize("seed", range(6))
def test_covered_shares_equal_a_loop(seed):
    a, b = (random_blobs(s, 15).geometry.to_numpy() for s in (seed, seed + 50))
    union = shapely.union_all(b)
    expected = [shape.intersection(union).area / shape.area for shape in a]
    assert ev.covered_shares(a, b) == pytest.approx(expected)


def test_windows_do_not_change_anything(monkeypatch):
    predicted, truth = random_blobs(1, 20), random_blobs(2, 20)
    observability = np.random.default_rng(3).integers(0, 4, GEOBOX.shape).astype(np.uint8)
    whole = evaluate(predicted, truth, inventory=inventory(observability)).to_dict()
    monkeypatch.setattr(ev, "WINDOW_PX", 7)
    assert evaluate(predicted, truth, inventory=inventory(observability).chunk({"x": 9})).to_dict() == whole


def test_a_case_by_hand():
    truth = squares((0, 0, 10, 10), (20, 0, 10, 10), (40, 0, 5, 2), (0, 40, 10, 10))
    predicted = squares(
        (0, 0, 10, 2),  # covers exactly a fifth of the first: found
        (20, 0, 10, 1),  # covers a tenth of the second: missed, though itself right
        (30, 30, 2, 5),  # invented
        (0, 36, 30, 40),  # swallows the fourth: finds it, and is wrong itself
    )
    got = evaluate(predicted, truth, inventory=inventory())
    assert list(got.truth["status"]) == ["tp", "fn", "fn", "tp"]
    assert list(got.predicted["status"]) == ["tp", "tp", "fp", "fp"]
    assert got.truth["overlap"].tolist() == pytest.approx([0.2, 0.1, 0.0, 1.0])
    o = got.objects
    assert (o.precision, o.recall) == (0.5, 0.5)
    assert o.f1 == 0.5
    assert (o.omission, o.commission) == (0.5, 0.5)
    assert o.quality == pytest.approx(2 / (2 + 2 + 2))
    assert (got.pixels.tp, got.pixels.fp, got.pixels.fn) == (20 + 10 + 100, 10 + 1100, 80 + 90 + 10)
    assert got.pixels.tp + got.pixels.fp + got.pixels.fn + got.pixels.tn == 60 * 80
    assert got.observed_km2 == pytest.approx(0.48)
    assert got.false_per_100_km2 == pytest.approx(2 / 0.0048)
    sizes = {
        (s.low_m2, s.objects.truth_found, s.objects.truth_missed, s.objects.predicted_wrong)
        for s in got.by_size
    }
    # areas are geodesic: 100 pixels of 100 m2 are a little less than 10,000 m2 here
    assert got.truth["area_m2"][0] < 10_000
    assert sizes == {
        (0.0, 0, 1, 1),
        (1_000.0, 0, 0, 0),
        (3_000.0, 2, 1, 0),
        (10_000.0, 0, 0, 0),
        (30_000.0, 0, 0, 1),
    }


def test_a_stricter_rule_finds_less():
    truth, predicted = squares((0, 0, 10, 10)), squares((0, 0, 10, 3))
    assert evaluate(predicted, truth, inventory=inventory(), min_overlap=0.3).objects.truth_found == 1
    strict = evaluate(predicted, truth, inventory=inventory(), min_overlap=0.31)
    assert strict.objects.truth_found == 0
    assert "31%" in strict.rule


def test_what_was_not_observed_is_left_out_and_counted():
    observability = np.full(GEOBOX.shape, 3, np.uint8)
    observability[:, :20] = 2
    observability[:, 20:30] = 1
    truth = squares((0, 0, 10, 10), (0, 25, 10, 8), (0, 24, 10, 10), (0, 50, 10, 10))
    predicted = squares((30, 0, 10, 10), (0, 50, 10, 10))
    got = evaluate(predicted, truth, inventory=inventory(observability))
    # the second is seen by three eighths of it; of the third, four tenths
    assert list(got.truth["status"]) == ["unobserved", "unobserved", "unobserved", "tp"]
    assert list(got.predicted["status"]) == ["unobserved", "tp"]
    assert (got.objects.recall, got.objects.precision) == (1.0, 1.0)
    assert (got.truth_unobserved, got.predicted_unobserved) == (3, 1)
    assert (got.pixels.tp, got.pixels.fp, got.pixels.fn) == (100, 0, 40)
    assert got.shares.not_observable == 100
    assert got.shares.outside_aoi == 60
    assert got.shares.unobserved_share == pytest.approx(160 / 300)


def test_a_slide_smaller_than_a_pixel_is_judged_where_it_lies_and_one_outside_is_not():
    tiny = gpd.GeoDataFrame(
        geometry=[
            shapely.box(300_001, 4_799_996, 300_004, 4_799_999),  # holds no pixel centre
            shapely.box(299_000, 4_799_000, 299_100, 4_799_100),
        ],
        crs="EPSG:32633",
    )
    got = evaluate(squares((0, 0, 1, 1)), tiny, inventory=inventory())
    assert list(got.truth["status"]) == ["tp", "unobserved"]
    assert got.objects.predicted_wrong == 1  # nine of its hundred square metres are landslide
    hidden = np.full(GEOBOX.shape, 2, np.uint8)
    assert list(evaluate(squares(), tiny, inventory=inventory(hidden)).truth["status"]) == ["unobserved"] * 2


def test_another_crs_is_carried_over():
    truth, predicted = random_blobs(5, 12), random_blobs(6, 12)
    here = evaluate(predicted, truth, inventory=inventory())
    there = evaluate(predicted.to_crs("EPSG:4326"), truth.to_crs("EPSG:3035"), inventory=inventory())
    assert there.objects == here.objects
    assert there.pixels.tp == pytest.approx(here.pixels.tp, abs=2)


def test_an_invalid_reference_is_repaired():
    bow = shapely.Polygon(
        [(300_000, 4_800_000), (300_100, 4_799_900), (300_100, 4_800_000), (300_000, 4_799_900)]
    )
    assert not bow.is_valid
    got = evaluate(
        squares((0, 0, 10, 10)), gpd.GeoDataFrame(geometry=[bow], crs="EPSG:32633"), inventory=inventory()
    )
    assert got.truth.geometry[0].is_valid
    assert got.objects.truth_found == 1


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        (squares(), squares(), (None, None, None)),
        (squares((0, 0, 2, 2)), squares(), (0.0, None, None)),
        (squares(), squares((0, 0, 2, 2)), (None, 0.0, None)),
        (squares((0, 0, 2, 2)), squares((9, 9, 2, 2)), (0.0, 0.0, 0.0)),
    ],
)
def test_nothing_on_a_side_gives_none_and_never_nan(predicted, truth, expected):
    got = evaluate(predicted, truth, inventory=inventory())
    assert (got.objects.precision, got.objects.recall, got.objects.f1) == expected
    text = json.dumps(got.to_dict(), allow_nan=False)
    assert "NaN" not in text + got.table()
    assert "nan" not in got.table()


def test_nothing_observed_gives_none():
    got = evaluate(
        squares((0, 0, 2, 2)), squares((0, 0, 2, 2)), inventory=inventory(np.zeros(GEOBOX.shape, np.uint8))
    )
    assert (got.pixels.precision, got.pixels.miou, got.pixels.prevalence) == (None, None, None)
    assert got.false_per_100_km2 is None
    assert got.pixels.precision_at(0.01) is None
    json.dumps(got.to_dict(), allow_nan=False)


def test_precision_at_other_prevalences_is_the_papers():
    """L4S ResU-Net: P .76, R .68 at 2 % positives (METHODS section 5)."""
    n, r, p = 10_000_000, 0.68, 0.76
    tp = round(r * 0.02 * n)
    fp = round(tp * (1 - p) / p)
    scores = PixelScores(tp=tp, fp=fp, fn=round(0.02 * n) - tp, tn=round(0.98 * n) - fp)
    # METHODS rounds; from P, R and the share alone the rate is .0044
    assert scores.false_positive_rate == pytest.approx(0.0043, abs=1.5e-4)
    for prevalence, expected in ((0.01, 0.61), (0.002, 0.24), (0.0005, 0.07), (0.0001, 0.015)):
        assert scores.precision_at(prevalence) == pytest.approx(expected, abs=0.006)
    assert scores.precision_at(0.02) == pytest.approx(p, abs=1e-5)


def test_scores_of_the_cae_paper_follow_from_its_hectares():
    """CAE Table 4: P, R, F1 of India with deep features, .76 .91 .83, IoU .704 and mean .847 (METHODS section 2)."""
    total_ha = 25_000
    r, p = 0.91, 0.76
    truth_ha = 1_000.0
    tp = r * truth_ha
    scores = PixelScores(
        tp=round(tp * 100),
        fp=round(tp * (1 - p) / p * 100),
        fn=round((truth_ha - tp) * 100),
        tn=total_ha * 100,
    )
    assert scores.f1 == pytest.approx(0.83, abs=0.005)
    assert scores.iou_landslide == pytest.approx(0.704, abs=0.005)
    assert scores.miou == pytest.approx(0.847, abs=0.01)


def test_fstf_terms():
    o = ObjectScores(truth_found=71, truth_missed=29, predicted_right=80, predicted_wrong=27)
    assert o.recall == 0.71
    assert o.recall + o.omission == 1
    assert o.commission == 0.27
    assert o.quality == pytest.approx(71 / 127)
    assert o.precision == pytest.approx(80 / 107)


def test_text_says_the_rule_and_what_is_simulated():
    got = evaluate(squares((0, 0, 9, 9)), squares((0, 0, 9, 9)), inventory=inventory(), simulated=True)
    assert "SIMULATED truth" in got.table()
    assert "20%" in got.table()
    assert got.to_dict()["simulated"] is True
    assert ev.size_label(30_000, math.inf) == "30,000 and more"


def test_what_cannot_be_judged_is_refused():
    ok = squares((0, 0, 2, 2))
    with pytest.raises(PipelineError, match="reference polygons have no CRS"):
        evaluate(ok, ok.set_crs(None, allow_override=True), inventory=inventory())
    points = gpd.GeoDataFrame(geometry=[shapely.Point(0, 0)], crs="EPSG:32633")
    with pytest.raises(PipelineError, match="hold Point"):
        evaluate(ok, points, inventory=inventory())
    with pytest.raises(PipelineError, match="min_overlap=0"):
        evaluate(ok, ok, inventory=inventory(), min_overlap=0)


@pytest.mark.parametrize("n", [0, 3])
def test_extra_columns_survive(n):
    truth = squares(*[(0, 5 * i, 2, 2) for i in range(n)]).assign(name=[f"s{i}" for i in range(n)])
    assert list(evaluate(squares(), truth, inventory=inventory()).truth["name"]) == list(truth["name"])
