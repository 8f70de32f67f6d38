"""The classification tree: scikit-learn's own answers from plain data, whatever the order of the points."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.tree import DecisionTreeClassifier

from slidecube.models.cart import Tree, grow
from slidecube.models.errors import ModelError


def samples(seed, n=200, features=4, classes=3):
    rng = np.random.default_rng(seed)
    codes = rng.integers(1, classes + 1, n)
    x = (rng.normal(size=(n, features)) + codes[:, None] * 0.7).astype(np.float32)
    return x, codes * 10


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), min_leaf=st.sampled_from([1, 5]))
def test_a_tree_answers_as_scikit_learn_s_whose_samples_stand_in_the_same_order(seed, min_leaf):
    x, codes = samples(seed)
    order = np.lexsort((*x.T[::-1], codes))
    oracle = DecisionTreeClassifier(min_samples_leaf=min_leaf, random_state=0).fit(x[order], codes[order])
    rng = np.random.default_rng(seed + 1)
    asked = np.concatenate([x, rng.normal(scale=3, size=(500, 4)).astype(np.float32)])
    thresholds = oracle.tree_.threshold[oracle.tree_.feature >= 0].astype(np.float32)
    asked = np.concatenate([asked, np.repeat(thresholds[:, None], 4, axis=1)])  # exactly on a split

    tree = grow(x, codes, "abcd", min_leaf=min_leaf)

    np.testing.assert_array_equal(tree.predict(asked), oracle.predict(asked))
    again = Tree.from_json(tree.to_json())
    assert again == tree
    np.testing.assert_array_equal(again.predict(asked), tree.predict(asked))


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_the_points_decides_nothing(seed):
    x, codes = samples(seed)
    shuffled = np.random.default_rng(seed).permutation(len(x))

    assert grow(x[shuffled], codes[shuffled], "abcd") == grow(x, codes, "abcd")


def test_accuracy_is_of_points_that_the_tree_did_not_see():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(300, 3)).astype(np.float32)
    codes = rng.integers(1, 3, 300)
    by_chance = grow(noise, codes, "abc")

    assert (by_chance.predict(noise) == codes).all(), "an unpruned tree knows its own points"
    assert 0.35 < by_chance.accuracy < 0.65
    x, codes = samples(1)
    assert grow(x + codes[:, None], codes, "abcd").accuracy > 0.95, "ten standard deviations apart"
    few = np.r_[0:20, 100:102]
    two = np.where(np.arange(200) < 100, 1, 2)
    assert grow(x[few], two[few], "abcd").accuracy is None


def test_what_is_no_sample_is_refused():
    x, codes = samples(0)
    with pytest.raises(ModelError, match="two classes or more"):
        grow(x, np.ones(len(x), int), "abcd")
    x[3, 2] = np.nan
    with pytest.raises(ModelError, match="unknown"):
        grow(x, codes, "abcd")


def damaged():
    tree = json.loads(grow(*samples(0), "abcd").to_json())
    loop = {**tree, "left": [0] * len(tree["left"])}
    beyond = {**tree, "right": [n + 10_000 for n in tree["right"]]}
    foreign = {**tree, "features": ["a"]}
    short = {**tree, "leaf": tree["leaf"][:-1]}
    return {"loop": loop, "beyond": beyond, "foreign": foreign, "short": short, "nothing": {}, "list": []}


@pytest.mark.parametrize("case", damaged())
def test_a_damaged_tree_is_refused_and_walks_no_circle(case):
    with pytest.raises(ModelError):
        Tree.from_json(json.dumps(damaged()[case]))
