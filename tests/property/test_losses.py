"""Losses: what is not to be learnt from changes nothing; values against torch, numpy and the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import log_loss

from slidecube.models.errors import ModelError
from slidecube.models.losses import LOSSES, check_loss, loss_function
from slidecube.models.patches import IGNORE, LANDSLIDE, STABLE, UNLABELLED

NUMBERS = {"weighted-ce": {"positive_weight": 3.0}, "pu": {"prior": 0.1}}
NAMES = tuple(LOSSES)


def numbers_of(name):
    return {key: value for part in name.split("+") for key, value in NUMBERS.get(part, {}).items()}


def make(name):
    return loss_function(name, **numbers_of(name))


def scene(seed, *, classes=(STABLE, LANDSLIDE, UNLABELLED, IGNORE), shape=(2, 6, 7), scale=3.0):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.choice(np.array(classes, np.uint8), shape))
    logits = torch.from_numpy(rng.normal(0, scale, shape).astype(np.float32))[:, None]
    return logits, labels


def value_and_gradient(name, logits, labels):
    leaf = logits.clone().requires_grad_()
    loss = make(name)(leaf, labels)
    loss.backward()
    return float(loss.detach()), leaf.grad[:, 0]


def left_out(name, labels):
    ignored = labels == IGNORE
    return ignored if name == "pu" else ignored | (labels == UNLABELLED)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), name=st.sampled_from([*NAMES, "bce+dice", "pu+lovasz"]))
def test_what_is_left_out_changes_neither_loss_nor_gradient(seed, name):
    logits, labels = scene(seed)
    out = left_out(name.split("+")[0], labels)
    value, gradient = value_and_gradient(name, logits, labels)
    assert np.isfinite(value)
    assert not gradient[out].any()
    rng = np.random.default_rng(seed + 1)
    other = logits.clone()
    strange = rng.choice([np.nan, np.inf, -np.inf, 1e30, 0.0], int(out.sum()))
    other[:, 0][out] = torch.from_numpy(strange.astype(np.float32))
    value_other, gradient_other = value_and_gradient(name, other, labels)
    assert value_other == value
    assert torch.equal(gradient_other, gradient)


@pytest.mark.parametrize("name", [*NAMES, "bce+dice"])
@pytest.mark.parametrize("logit", [0.0, np.inf, np.nan])
def test_a_batch_of_nothing_that_counts_is_exactly_0(name, logit):
    logits = torch.full((2, 1, 4, 4), logit)
    labels = torch.full((2, 4, 4), IGNORE, dtype=torch.uint8)
    value, gradient = value_and_gradient(name, logits, labels)
    assert value == 0
    assert torch.equal(gradient, torch.zeros(2, 4, 4))


@pytest.mark.parametrize("classes", [(0,), (1,), (0, 1), (1, 254), (254,), (0, 254)])
@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_extremes_are_finite(name, scale, classes):
    value, gradient = value_and_gradient(name, *scene(0, classes=classes, scale=scale))
    assert np.isfinite(value)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_right_map_costs_less_than_an_undecided_one_and_that_less_than_a_wrong_one(name):
    _, labels = scene(0, classes=(0, 1))
    truth = (2.0 * labels.float() - 1)[:, None]
    right, undecided, wrong = (float(make(name)(scale * truth, labels)) for scale in (9, 0, -9))
    assert right < undecided < wrong
    assert right < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_gradients_lead_down(name):
    """A short step against the gradient lowers the loss; the one of `pu` below 0 is the paper's and tested apart."""
    logits, labels = scene(3, classes=(0, 1))
    value, gradient = value_and_gradient(name, logits, labels)
    step = 1e-2 / float(gradient.norm())
    lower, _ = value_and_gradient(name, logits - step * gradient[:, None], labels)
    assert lower < value


def test_values_are_those_of_the_peers():
    logits, labels = scene(5)
    counts = (labels < UNLABELLED).numpy()
    truth, probability = labels.numpy()[counts], expit(logits[:, 0].double().numpy()[counts])
    assert float(make("bce")(logits, labels)) == pytest.approx(log_loss(truth, probability), rel=1e-5)
    weights = np.where(truth == 1, 3.0, 1.0)
    weighted = -np.mean(weights * np.log(np.where(truth == 1, probability, 1 - probability)))
    assert float(make("weighted-ce")(logits, labels)) == pytest.approx(weighted, rel=1e-5)
    both = (truth * probability).sum()
    dice = 1 - 2 * both / (truth.sum() + probability.sum())
    assert float(make("dice")(logits, labels)) == pytest.approx(dice, rel=1e-5)
    jaccard = 1 - both / (truth.sum() + probability.sum() - both)
    assert float(make("jaccard")(logits, labels)) == pytest.approx(jaccard, rel=1e-5)
    of_truth = np.where(truth == 1, probability, 1 - probability)
    focal = -np.mean((1 - of_truth) ** 2 * np.log(of_truth))
    assert float(make("focal")(logits, labels)) == pytest.approx(focal, rel=1e-5)


def test_lovasz_of_hard_errors_is_the_jaccard_loss():
    """Its defining property (Berman et al. 2018, eq. 6): with errors of 0 and 1 it is 1 - IoU of the batch."""
    _, labels = scene(0, classes=(0, 1))
    _, called = scene(1, classes=(0, 1))
    # hinge errors 1 - logit * sign: logit = sign where right, 0 where wrong
    sign = 2.0 * labels.float() - 1
    logits = torch.where(labels == called, sign, 0.0)[:, None]
    iou = ((labels == 1) & (called == 1)).sum() / ((labels == 1) | (called == 1)).sum()
    assert float(make("lovasz")(logits, labels)) == pytest.approx(1 - float(iou), rel=1e-5)


def test_sums_are_sums():
    logits, labels = scene(7)
    parts = [float(make(name)(logits, labels)) for name in ("weighted-ce", "dice", "focal")]
    assert float(make("weighted-ce+dice+focal")(logits, labels)) == pytest.approx(sum(parts), rel=1e-6)


def kiryo(positive, unlabelled, prior):
    """Eq. 6 of Kiryo et al. 2017 with the sigmoid loss, before the maximum is taken."""
    missed = prior * expit(-positive).mean() if len(positive) else 0.0
    negative = expit(unlabelled).mean() - (prior * expit(positive).mean() if len(positive) else 0.0)
    return missed, negative


def test_positive_unlabelled_risk_is_that_of_the_paper():
    logits, labels = scene(11, classes=(LANDSLIDE, UNLABELLED, IGNORE), shape=(4, 16, 16))
    values, classes = logits[:, 0].double().numpy(), labels.numpy()
    missed, negative = kiryo(values[classes == LANDSLIDE], values[classes == UNLABELLED], 0.1)
    assert negative > 0
    assert float(make("pu")(logits, labels)) == pytest.approx(missed + negative, rel=1e-5)


def test_a_negative_risk_below_0_is_walked_up():
    """Algorithm 1: the step then goes along -gradient of the risk of negatives, and nothing else."""
    labels = torch.tensor([[[LANDSLIDE, LANDSLIDE, UNLABELLED, UNLABELLED]]], dtype=torch.uint8)
    logits = torch.tensor([[[[3.0, 2.0, -4.0, -5.0]]]])
    value, gradient = value_and_gradient("pu", logits, labels)
    missed, negative = kiryo(np.array([3.0, 2.0]), np.array([-4.0, -5.0]), 0.1)
    assert negative < 0
    assert value == pytest.approx(missed, rel=1e-5)
    slope = expit(logits.numpy().ravel()) * expit(-logits.numpy().ravel())
    expected = -slope / 2 * np.array([-0.1, -0.1, 1, 1])
    np.testing.assert_allclose(gradient.numpy().ravel(), expected, rtol=1e-4)


def test_positive_unlabelled_risk_estimates_that_of_full_labels():
    """Unlabelled ground that holds `prior` of landslides: the risk is the one of all labels (eq. 2 of the paper)."""
    rng = np.random.default_rng(0)
    prior, n = 0.2, 200_000
    truth = rng.random(n) < prior
    logits = np.where(truth, rng.normal(1, 1, n), rng.normal(-1, 1, n))
    full = np.mean(np.where(truth, expit(-logits), expit(logits)))
    known = rng.normal(1, 1, n)
    tensor = torch.from_numpy(np.concatenate([logits, known]).astype(np.float32))[None, None, None]
    labels = torch.tensor([UNLABELLED] * n + [LANDSLIDE] * n, dtype=torch.uint8)[None, None]
    loss = loss_function("pu", prior=prior)(tensor, labels)
    assert float(loss) == pytest.approx(full, abs=0.005)
    # every unlabelled pixel called stable is another risk altogether
    assert abs(float(loss_function("bce")(tensor, labels)) - full) > 0.1


def test_known_stable_ground_enters_by_its_share():
    logits, labels = scene(13, classes=(STABLE, LANDSLIDE, UNLABELLED), shape=(4, 16, 16))
    values, classes = logits[:, 0].double().numpy(), labels.numpy()
    positive, unlabelled, stable = (values[classes == c] for c in (LANDSLIDE, UNLABELLED, STABLE))
    missed, negative = kiryo(positive, unlabelled, 0.1)
    share = len(unlabelled) / (len(unlabelled) + len(stable))
    expected = missed + share * negative + (1 - share) * 0.9 * expit(stable).mean()
    assert float(make("pu")(logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_half_precision_is_computed_in_single():
    logits, labels = scene(2)
    half = logits.bfloat16()
    loss = make("bce+dice")(half, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == float(make("bce+dice")(half.float(), labels))


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        (
            "dise",
            {},
            "No loss 'dise' \\(did you mean 'dice'\\?\\); losses, which \\+ adds: bce, weighted-ce, ",
        ),
        ("bce+", {}, "No loss ''"),
        ("bce+bce", {}, "names one twice"),
        ("weighted-ce", {}, "needs positive_weight"),
        ("bce", {"positive_weight": 2.0}, "takes no positive_weight"),
        ("pu", {}, "needs prior"),
        ("pu", {"prior": 1.0}, "no share of landslides"),
        ("weighted-ce", {"positive_weight": float("nan")}, "not above 0"),
    ],
)
def test_what_is_no_loss_is_refused(name, numbers, message):
    with pytest.raises(ModelError, match=message):
        check_loss(name, **numbers)
