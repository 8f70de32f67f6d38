"""Calibration and thresholds: oracles are scikit-learn, brute force and what is known by construction."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit
from sklearn.isotonic import IsotonicRegression

from slidecube.models import calibration as c
from slidecube.models.card import THRESHOLDS
from slidecube.models.errors import ModelError
from slidecube.models.network_card import Calibration
from slidecube.models.thresholds import landslide_from, on_step, steps_of


def drawn(n=40_000, *, temperature=1.0, seed=0):
    """Logits that are `temperature` times what they should be, and labels."""
    rng = np.random.default_rng(seed)
    true = rng.normal(-2, 2, n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-true))).astype(np.uint8)
    return (true * temperature).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_recovers_a_known_one(temperature):
    logits, labels = drawn(temperature=temperature)
    found = c.fit_calibration(logits, labels, method="temperature")
    assert found.temperature == pytest.approx(temperature, rel=0.05)


def test_temperature_is_the_minimum_of_the_log_loss():
    logits, labels = drawn(5_000, temperature=2.0)
    best = c.fit_temperature(logits, labels == 1)

    def loss(temperature):
        return sklearn.metrics.log_loss(labels, 1 / (1 + np.exp(-logits.astype(float) / temperature)))

    assert loss(best) <= min(loss(best * 0.98), loss(best * 1.02))


def test_temperature_stays_in_its_range_where_nothing_is_wrong():
    logits = np.array([-5.0, -4, 4, 5], np.float32)
    low, high = c.TEMPERATURES
    assert low <= c.fit_calibration(logits, np.array([0, 0, 1, 1]), method="temperature").temperature <= high


def test_isotonic_equals_scikit_learn():
    logits, labels = drawn()
    found = c.fit_calibration(logits, labels, method="isotonic")
    oracle = IsotonicRegression(out_of_bounds="clip").fit(logits, labels)
    ours = c.calibrated(found, logits)
    # ours gathers logits into bins first, which costs little beside the noise of the labels
    assert np.abs(ours - oracle.predict(logits)).mean() < 0.01
    assert len(found.logits) <= 400


def test_each_stratum_has_its_own_temperature():
    a, labels_a = drawn(temperature=1.0, seed=1)
    b, labels_b = drawn(temperature=4.0, seed=2)
    logits, labels = np.r_[a, b], np.r_[labels_a, labels_b]
    strata = np.repeat([7.0, 9.0], len(a)).astype(np.float32)
    strata[:5] = np.nan
    found = c.fit_calibration(logits, labels, method="temperature", by="land_cover", strata=strata)
    assert found.strata["7"] == pytest.approx(1, rel=0.1)
    assert found.strata["9"] == pytest.approx(4, rel=0.1)
    p = c.calibrated(found, logits, strata)
    assert p[10] == pytest.approx(1 / (1 + np.exp(-logits[10] / found.strata["7"])), rel=1e-5)
    assert p[0] == pytest.approx(1 / (1 + np.exp(-logits[0] / found.temperature)), rel=1e-5)


def test_strata_that_are_no_classes_are_refused():
    """Cut to whole numbers, two values would have the same name."""
    logits, labels = drawn(4_000)
    strata = np.repeat(np.float32([10.2, 10.7]), 2_000)
    with pytest.raises(ModelError, match=r"has the value 10\.2; classes are whole numbers"):
        c.fit_calibration(logits, labels, method="temperature", by="slope", strata=strata)


ANY = [
    Calibration(),
    Calibration(method="temperature", temperature=2.5),
    Calibration(method="isotonic", logits=(-3.0, 0.0, 2.0), probabilities=(0.01, 0.01, 0.9)),
]


@settings(max_examples=60)
@given(st.lists(st.floats(-90, 90, width=32), min_size=2, max_size=60), st.sampled_from(ANY))
def test_calibration_never_falls_and_does_not_depend_on_the_place(values, how):
    logits = np.sort(np.array(values, np.float32))
    p = c.calibrated(how, logits)
    assert p.dtype == np.float32
    assert (np.diff(p) >= 0).all()
    assert ((p >= 0) & (p <= 1)).all()
    # equal bits, wherever in memory and beside whatever else a logit lies
    assert np.array_equal(np.concatenate([c.calibrated(how, logits[i : i + 1]) for i in range(len(p))]), p)
    assert np.array_equal(c.calibrated(how, logits[1:]), p[1:])


def test_unknown_stays_unknown():
    for how in ANY:
        assert np.isnan(c.calibrated(how, np.array([np.nan], np.float32))).all()


def test_only_stable_and_landslide_pixels_teach():
    logits, labels = drawn()
    spoilt_labels, spoilt = labels.copy(), logits.copy()
    spoilt_labels[::3], spoilt_labels[1::3] = 255, 254
    spoilt[::3], spoilt[1::3] = 50, np.nan
    kept = np.arange(len(labels)) % 3 == 2
    for method in ("temperature", "isotonic"):
        assert c.fit_calibration(spoilt, spoilt_labels, method=method) == c.fit_calibration(
            logits[kept], labels[kept], method=method
        )


@pytest.mark.parametrize(("value", "word"), [(0, "no landslide pixel"), (1, "are landslide")])
def test_one_class_alone_is_refused(value, word):
    labels = np.full(50, value, np.uint8)
    with pytest.raises(ModelError, match=word):
        c.fit_calibration(np.zeros(50, np.float32), labels, method="temperature")
    with pytest.raises(ModelError, match=word):
        c.choose_threshold(c.ScoreHistogram.of(np.full(50, 0.3, np.float32), labels))


def test_average_precision_is_that_of_scikit_learn():
    logits, labels = drawn()
    p = c.calibrated(Calibration(), logits)
    ours = c.ScoreHistogram.of(p, labels).average_precision()
    assert ours == pytest.approx(sklearn.metrics.average_precision_score(labels, p), abs=1e-3)


def test_histograms_add_up():
    logits, labels = drawn(999)
    p = c.calibrated(Calibration(), logits)
    parts = [c.ScoreHistogram.of(p[i::3], labels[i::3]) for i in range(3)]
    assert np.array_equal(c.ScoreHistogram.sum_of(parts).counts_ks, c.ScoreHistogram.of(p, labels).counts_ks)


def test_best_f1_is_that_of_all_thresholds():
    logits, labels = drawn(3_000)
    p = c.calibrated(Calibration(), logits)
    found = c.choose_threshold(c.ScoreHistogram.of(p, labels))
    precision, recall, _ = sklearn.metrics.precision_recall_curve(labels, p)
    at = sklearn.metrics.f1_score(labels, p >= found.threshold)
    assert at == pytest.approx((2 * precision * recall / (precision + recall)).max(), abs=0.004)
    assert c.ScoreHistogram.of(p, labels).best_f1()[0] == pytest.approx(at, abs=1e-9)


def test_precision_is_reached_at_the_prevalence_that_is_asked_for():
    rng = np.random.default_rng(0)
    labels = (np.arange(200_000) % 10 == 0).astype(np.uint8)
    p = np.clip(np.where(labels, 0.8, 0.15) + rng.normal(0, 0.15, labels.size), 0.01, 0.99).astype(np.float32)
    histogram = c.ScoreHistogram.of(p, labels)
    thresholds = []
    for prevalence in (0.1, 0.01):
        found = c.choose_threshold(histogram, rule="precision", precision=0.8, prevalence=prevalence)
        called = p >= found.threshold
        recall, false_rate = called[labels == 1].mean(), called[labels == 0].mean()
        precision = prevalence * recall / (prevalence * recall + (1 - prevalence) * false_rate)
        assert precision == pytest.approx(0.8, abs=0.02)
        assert precision >= 0.8 - 1e-9
        thresholds.append(found.threshold)
    assert thresholds[1] > thresholds[0]  # rarer landslides want a surer call


def test_a_precision_out_of_reach_is_one_clear_line():
    logits, labels = drawn(5_000)
    histogram = c.ScoreHistogram.of(c.calibrated(Calibration(), logits), labels)
    with pytest.raises(ModelError, match=r"precision of 0.9 .* 0.01 % .* highest is .* rule = 'max-f1'"):
        c.choose_threshold(histogram, rule="precision", precision=0.9, prevalence=0.0001)


def test_no_false_pixel_among_few_proves_no_precision():
    p, labels = np.array([0.1] * 50 + [0.9] * 5, np.float32), np.array([0] * 50 + [1] * 5, np.uint8)
    with pytest.raises(ModelError, match="highest"):
        c.choose_threshold(c.ScoreHistogram.of(p, labels), rule="precision", precision=0.9, prevalence=0.001)


@pytest.mark.parametrize(("stable", "landslide"), [(0.88, 0.9975), (0.0, 1.0), (0.99, 1.0), (0.0, 0.02)])
def test_the_threshold_of_what_is_separated_lies_in_the_middle_of_the_gap(stable, landslide):
    rng = np.random.default_rng(0)
    p = np.r_[rng.uniform(0, stable, 500), stable, rng.uniform(landslide, 1, 50), landslide].astype(
        np.float32
    )
    labels = np.r_[np.zeros(501), np.ones(51)].astype(np.uint8)
    found = c.choose_threshold(c.ScoreHistogram.of(p, labels)).threshold
    low, high = logit(np.clip([stable, landslide], *THRESHOLDS))
    assert logit(found) == pytest.approx((low + high) / 2, abs=0.05)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=40), st.sampled_from(["max-f1", "precision"]))
def test_a_chosen_threshold_means_on_the_map_what_it_meant_when_it_was_chosen(values, rule):
    """Maps keep probabilities in steps, downwards, and compare those."""
    p = np.array([*values, 0.99999, 0.00001], np.float32)
    labels = (np.arange(len(p)) % 2).astype(np.uint8)
    labels[-2:] = 1, 0
    histogram = c.ScoreHistogram.of(p, labels)
    found = c.choose_threshold(histogram, rule=rule, precision=0.3, prevalence=0.5).threshold
    assert THRESHOLDS[0] <= found <= THRESHOLDS[1]
    assert on_step(found) == found
    assert np.array_equal(steps_of(p) >= landslide_from(found), p.astype(np.float64) >= found)
    if rule == "max-f1":
        at = sklearn.metrics.f1_score(labels, steps_of(p) >= landslide_from(found))
        assert at == pytest.approx(histogram.best_f1()[0])


@pytest.mark.parametrize(
    ("value", "kept"), [(1e-9, 0.0001), (0.99995, 0.9999), (0.12341, 0.1235), (0.3, 0.3)]
)
def test_a_threshold_is_rounded_up_to_a_step(value, kept):
    assert on_step(value) == kept
