"""Judgement of networks: scores, intervals, ensembles, uncertainty, diagram; against scikit-learn and brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from PIL import Image

from slidecube.models import ensemble_choice as ec
from slidecube.models.calibration import ScoreHistogram
from slidecube.models.diagrams import Point, f1_curve, write_performance_diagram
from slidecube.models.errors import ModelError
from slidecube.models.evaluation import Tally, expected_error, judge
from slidecube.models.intervals import bootstrap, wilson
from slidecube.models.uncertainty import entropy_bits, spread, tta_views
from slidecube.pipeline.detect import without_small


def patches(n=6, side=40, seed=0):
    """Probabilities and labels of patches with square landslides, unknown pixels and ignored ones."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((n, side, side), np.uint8)
    for one in labels:
        row, col = rng.integers(2, side - 12, 2)
        one[row : row + 9, col : col + 9] = 1
    p = np.clip(0.2 + 0.5 * labels + rng.normal(0, 0.15, labels.shape), 0.01, 0.99).astype(np.float32)
    labels[:, :2] = 255
    p[:, -1] = np.nan
    return p, labels


def test_scores_are_those_of_scikit_learn():
    p, labels = patches()
    found = judge(p, labels, threshold=0.5).metrics(resamples=50)
    known = np.isfinite(p) & (labels <= 1)
    y, score = labels[known], p[known]
    called = score >= 0.5
    for name, oracle in (
        ("f1", sklearn.metrics.f1_score(y, called)),
        ("precision", sklearn.metrics.precision_score(y, called)),
        ("recall", sklearn.metrics.recall_score(y, called)),
        ("iou_landslide", sklearn.metrics.jaccard_score(y, called)),
        ("brier", sklearn.metrics.brier_score_loss(y, score)),
    ):
        assert found[name] == pytest.approx(oracle, abs=1e-5), name
    assert found["average_precision"] == pytest.approx(
        sklearn.metrics.average_precision_score(y, score), abs=2e-3
    )
    tn, fp, fn, tp = sklearn.metrics.confusion_matrix(y, called).ravel()
    assert [found[k] for k in ("tn", "fp", "fn", "tp")] == [tn, fp, fn, tp]


def test_precision_at_a_prevalence_is_bayes():
    p, labels = patches()
    found = judge(p, labels, threshold=0.5).metrics(resamples=50)
    recall, rate = found["recall"], found["false_positive_rate"]
    expected = 0.001 * recall / (0.001 * recall + 0.999 * rate)
    assert found["precision_at_0.1_pct"] == pytest.approx(expected, rel=1e-4)
    assert found["precision_at_1_pct"] > found["precision_at_0.1_pct"] > found["precision_at_0.01_pct"]


def test_two_tallies_join_to_the_one_of_all():
    p, labels = patches()
    whole = judge(p, labels, threshold=0.5, regions=list("abcdef"))
    first = judge(p[:2], labels[:2], threshold=0.5, regions=["a", "b"])
    first.join(judge(p[2:], labels[2:], threshold=0.5, regions=["c", "d", "e", "f"]))
    ours, others = whole.metrics(resamples=50), first.metrics(resamples=50)
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
        assert others[name] == same, name


def test_what_is_not_defined_is_left_out():
    found = judge(np.full((2, 8, 8), 0.1, np.float32), np.zeros((2, 8, 8), np.uint8), threshold=0.5).metrics()
    assert "f1" not in found
    assert "recall" not in found
    assert "object_f1" not in found
    assert found["false_positive_rate"] == 0
    empty = judge(np.full((1, 8, 8), np.nan, np.float32), np.ones((1, 8, 8), np.uint8), threshold=0.5)
    assert "brier" not in empty.metrics()


def test_objects_are_matched_by_a_fifth_of_their_own_area():
    labels = np.zeros((1, 20, 20), np.uint8)
    labels[0, 2:7, 2:7] = 1  # found: 10 of 25 pixels
    labels[0, 12:17, 2:7] = 1  # missed
    p = np.full(labels.shape, 0.05, np.float32)
    p[0, 2:4, 2:7] = 0.9
    p[0, 12:14, 12:17] = 0.9  # false
    p[0, 18, 18] = 0.9  # smaller than what is reported
    tally = judge(p, labels, threshold=0.5, min_area_px=5)
    found = tally.metrics(resamples=20)
    counts = [found[k] for k in ("truth_found", "truth_missed", "predicted_right", "predicted_wrong")]
    assert counts == [1, 1, 1, 1]
    assert found["object_f1"] == 0.5
    assert found["ece_of_objects"] == pytest.approx(abs(0.9 - 0.5), abs=1e-6)


def test_objects_hang_together_over_corners_as_in_the_inventory():
    labels = np.zeros((1, 20, 20), np.uint8)
    labels[0, 2:5, 2:5] = labels[0, 5:8, 5:8] = 1
    found = judge(np.where(labels, 0.9, 0.1).astype(np.float32), labels, threshold=0.5).metrics(resamples=20)
    assert (found["truth_found"], found["predicted_right"]) == (1, 1)


def test_pixels_are_judged_after_small_objects_are_removed_as_detection_removes_them():
    rng = np.random.default_rng(0)
    p = rng.random((1, 60, 60)).astype(np.float32)
    p[0, :1] = p[0, -1:] = p[0, :, :1] = p[0, :, -1:] = 0.1
    labels = (rng.random(p.shape) < 0.3).astype(np.uint8)
    found = judge(p, labels, threshold=0.8, min_area_px=4).metrics(resamples=20)
    kept = without_small(p[0] >= 0.8, 4)
    assert 0 < kept.sum() < (p >= 0.8).sum()
    assert (found["tp"], found["fp"]) == ((kept & (labels[0] == 1)).sum(), (kept & (labels[0] == 0)).sum())


def test_pixels_that_the_edge_of_a_patch_cuts_count_whatever_their_object_is():
    p = np.full((1, 8, 8), 0.1, np.float32)
    p[0, 0, 3] = p[0, 4, 4] = 0.9
    found = judge(p, np.zeros((1, 8, 8), np.uint8), threshold=0.5, min_area_px=4).metrics(resamples=20)
    assert (found["fp"], found["predicted_wrong"]) == (1, 0)


def test_the_share_of_landslides_at_which_scores_hold_is_told():
    p, labels = patches()
    known = np.isfinite(p) & (labels <= 1)
    found = judge(p, labels, threshold=0.5).metrics(resamples=20)
    assert found["landslide_share"] == pytest.approx(labels[known].mean(), rel=1e-5)


def test_expected_calibration_error_is_the_gap_of_its_bins():
    rng = np.random.default_rng(0)
    p = rng.random(50_000).astype(np.float32).reshape(1, 250, 200)
    honest = judge(p, (rng.random(p.shape) < p).astype(np.uint8), threshold=0.5).metrics(resamples=5)
    boastful = judge(p, (rng.random(p.shape) < p / 2).astype(np.uint8), threshold=0.5).metrics(resamples=5)
    assert honest["ece_above_0.1"] < 0.02
    assert boastful["ece_above_0.1"] == pytest.approx(0.275, abs=0.02)  # the mean of p / 2 above .1
    assert expected_error(np.zeros((3, 10))) is None


def test_other_sides_are_refused():
    with pytest.raises(ModelError, match="do not belong together"):
        Tally(threshold=0.5).add(np.zeros((4, 4), np.float32), np.zeros((5, 4), np.uint8))


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (40, 1000)])
def test_wilson_is_scipys(hits, trials):
    oracle = scipy.stats.binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson(hits, trials) == pytest.approx((oracle.low, oracle.high), abs=1e-9)
    assert wilson(0, 0) is None


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        values = rng.normal(3, 1, 60)
        rows = np.stack([values, np.ones(60)], axis=1)
        low, high = bootstrap(rows, lambda k: k[:, 0] / k[:, 1], resamples=300)
        inside += low <= 3 <= high
    assert 178 <= inside <= 198
    assert bootstrap(np.ones((1, 2)), lambda k: k[:, 0]) is None


def test_regions_are_the_units_where_there_are_enough():
    """Patches of one region are alike: drawn as regions, the interval is wider."""
    p, labels = patches(n=40)
    p[:20] = 0.5 * p[:20] + 0.4  # regions differ from each other, patches within them do not
    own = judge(p, labels, threshold=0.5, regions=[f"r{i // 8}" for i in range(40)]).metrics(resamples=300)
    all_alone = judge(p, labels, threshold=0.5, regions=["one"] * 40).metrics(resamples=300)
    width = {id(m): m["precision_interval"][1] - m["precision_interval"][0] for m in (own, all_alone)}
    assert width[id(own)] > 1.5 * width[id(all_alone)]


def test_patches_beside_each_other_are_one_unit_where_their_place_is_known():
    p, labels = patches(n=40)
    p[:20] = 0.5 * p[:20] + 0.4  # blocks differ from each other, patches within them do not
    near = [f"here {i // 8} 0" for i in range(40)]
    found = {}
    for blocks in (near, [], [*near[:-1], ""], ["here 0 0"] * 40):
        said = judge(p, labels, threshold=0.5, regions=["here"] * 40, blocks=blocks).metrics(resamples=300)
        low, high = said["precision_interval"]
        found.setdefault(said["interval_unit"], []).append(high - low)
    assert {unit: len(widths) for unit, widths in found.items()} == {"block": 1, "patch": 3}
    assert found["block"][0] > 1.5 * max(found["patch"])
    many = judge(p, labels, threshold=0.5, regions=[f"r{i % 5}" for i in range(40)], blocks=near)
    assert many.metrics(resamples=20)["interval_unit"] == "region"


# --- ensembles


def members(n=6, px=4_000, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random(px) < 0.2).astype(np.uint8)
    noise = rng.uniform(0.15, 0.6, n)
    ps = [np.clip(0.3 + 0.4 * labels + rng.normal(0, s, px), 0, 1).astype(np.float32) for s in noise]
    scores = [ScoreHistogram.of(p, labels).best_f1()[0] for p in ps]
    return [ec.pack(p) for p in ps], labels, scores


def f1_of(packed, labels, chosen):
    mean = np.mean([ec.unpack(packed[i]) for i in chosen], axis=0, dtype=np.float64)
    precision, recall, _ = sklearn.metrics.precision_recall_curve(labels, mean)
    return (2 * precision * recall / np.maximum(precision + recall, 1e-9)).max()


def test_k_best_is_the_mean_of_the_k_first():
    packed, labels, scores = members()
    order = sorted(range(6), key=lambda i: -scores[i])
    found = ec.k_best(packed.__getitem__, labels, scores, [2, 3, 5, 40])
    assert [choice.members for choice in found] == [tuple(order[:k]) for k in (2, 3, 5)]
    for choice in found:
        assert choice.f1 == pytest.approx(f1_of(packed, labels, choice.members), abs=0.01)


def test_greedy_takes_the_best_next_member_each_time():
    packed, labels, scores = members()
    found = ec.greedy(packed.__getitem__, labels, scores, [2, 3])
    start = int(np.argmax(scores))
    pairs = {(start, i): f1_of(packed, labels, (start, i)) for i in range(6) if i != start}
    assert found[0].members[0] == start
    assert pairs[found[0].members] == pytest.approx(max(pairs.values()), abs=0.01)
    assert found[1].members[:2] == found[0].members
    best_of_all = max(f1_of(packed, labels, some) for some in combinations(range(6), 3))
    assert found[1].f1 <= best_of_all + 0.01


def test_equal_candidates_are_chosen_in_their_order():
    packed, labels, _ = members(n=3)
    same = [packed[0]] * 4
    for choose in (ec.k_best, ec.greedy):
        assert choose(same.__getitem__, labels, [0.5] * 4, [2])[0].members == (0, 1)


def test_packed_probabilities_come_back():
    p = np.array([0, 1e-6, 0.25, 0.5, 1, np.nan], np.float32)
    assert ec.unpack(ec.pack(p))[:5] == pytest.approx(p[:5], abs=1 / 131070 + 1e-9)
    assert ec.unpack(ec.pack(p))[5] == 0


@pytest.mark.parametrize("sizes", [[1], [91]])
def test_sizes_of_ensembles_are_bounded(sizes):
    packed, labels, scores = members(n=3)
    with pytest.raises(ModelError, match="2 to 90"):
        ec.k_best(packed.__getitem__, labels, scores, sizes)


def test_too_few_candidates_make_no_ensemble():
    packed, labels, scores = members(n=1)
    assert ec.greedy(packed.__getitem__, labels, scores, [2]) == []
    assert ec.k_best(packed.__getitem__, labels, scores, [2]) == []


# --- uncertainty


def test_entropy_is_that_of_scipy():
    p = np.array([0, 0.1, 0.5, 0.9, 1], np.float32)
    oracle = [scipy.stats.entropy([v, 1 - v], base=2) for v in p.astype(float)]
    assert entropy_bits(p) == pytest.approx(oracle, abs=1e-6)
    assert np.isnan(entropy_bits(np.array([np.nan])))


def test_members_that_agree_lie_nowhere_apart():
    agreed = np.full((4, 3), 0.3)
    split = np.array([[0.0, 0.0], [1.0, 1.0]])
    assert spread(agreed) == pytest.approx(0)
    assert spread(split) == pytest.approx(0.5)


def test_views_turn_back_to_where_they_were():
    x = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    views = tta_views(("a", "b", "c"))
    assert len(views) == 8
    assert len({view.see(x).tobytes() for view in views}) == 8
    for view in views:
        assert np.array_equal(view.back(view.see(x)[1]), x[1])


def test_aspect_turns_with_the_ground():
    """A plane that falls to the east: its aspect as computed from the turned heights is the turned aspect."""

    def aspect_deg(z_yx):
        south, east = np.gradient(z_yx)
        return np.degrees(np.arctan2(-east, south)) % 360  # downhill, clockwise from north

    row, col = np.mgrid[0:8, 0:8].astype(np.float32)
    z = -3 * col + row
    x = np.stack([z, aspect_deg(z)]).astype(np.float32)
    for view in tta_views(("elevation", "aspect_deg")):
        seen = view.see(x)
        assert seen[1] == pytest.approx(aspect_deg(seen[0]), abs=1e-3), view
        where_they_were = view.in_place(list(x))
        assert np.array_equal(where_they_were[0], x[0])
        assert np.array_equal(where_they_were[1], view.back(seen[1]))


# --- diagram


def test_curves_of_equal_f1_give_that_f1():
    precision = np.linspace(0.05, 1, 60)
    recall = f1_curve(0.6, precision)
    known = np.isfinite(recall)
    assert known.any()
    assert 2 * precision[known] * recall[known] / (precision[known] + recall[known]) == pytest.approx(0.6)


def test_diagram_is_a_picture_that_shows_its_points(tmp_path):
    few, more = tmp_path / "few.png", tmp_path / "more.png"
    point = Point(label="single", group="S2", precision=0.5, recall=0.6, main=True)
    write_performance_diagram(few, [], title="empty")
    write_performance_diagram(more, [point], title="empty")
    pictures = [np.asarray(Image.open(path).convert("L")) for path in (few, more)]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).sum() > 100
    first = more.read_bytes()
    write_performance_diagram(more, [point], title="empty")
    assert more.read_bytes() == first
