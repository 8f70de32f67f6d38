"""A classification tree (CART) as plain data: grown by scikit-learn, kept as JSON, applied by numpy.

Axes: n sample or pixel, f feature.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from slidecube.models.errors import ModelError

_FOLDS = 5
_LEAF = -1


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A grown tree.

    features : that it reads, in order; classes : codes, ascending
    feature : (node,) index of the feature that a node asks, -1 of a leaf; threshold : at most which goes left
    left, right : (node,) numbers of the nodes below; leaf : (node,) code of the class that is most frequent there
    accuracy : share of the samples that trees of the other folds name rightly, None where a class has too few for it
    """

    features: tuple[str, ...]
    classes: tuple[int, ...]
    feature: tuple[int, ...]
    threshold: tuple[float, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    leaf: tuple[int, ...]
    accuracy: float | None

    def __post_init__(self) -> None:
        n = len(self.feature)
        inner = [i for i in range(n) if self.feature[i] != _LEAF]
        if {len(self.threshold), len(self.left), len(self.right), len(self.leaf)} != {n} or not n:
            raise ModelError(f"A tree of {n} nodes needs as many thresholds, branches and classes")
        # a child comes after its parent, so that every walk ends
        if any(not i < below < n for i in inner for below in (self.left[i], self.right[i])):
            raise ModelError("A tree's nodes must point to later ones")
        if any(self.feature[i] not in range(len(self.features)) for i in inner):
            raise ModelError("A tree asks for a feature that it does not name")

    def predict(self, x_nf: np.ndarray) -> np.ndarray:
        """Code of the class of each sample: (n, f) float32 without NaN -> (n,) int64."""
        feature, threshold, left, right, leaf = self._arrays
        at = np.zeros(len(x_nf), np.int64)
        walking = np.arange(len(x_nf))
        while len(walking := walking[feature[at[walking]] != _LEAF]):
            node = at[walking]
            # scikit-learn compares float32 values with float64 thresholds
            goes_left = x_nf[walking, feature[node]].astype(np.float64) <= threshold[node]
            at[walking] = np.where(goes_left, left[node], right[node])
        found: np.ndarray = leaf[at]
        return found

    def to_json(self) -> str:
        """Return it as JSON; numbers come back as they were, to the last bit."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Tree:
        """Read what `to_json` wrote; raises ModelError for anything else."""
        try:
            raw = json.loads(text)
            lists = {name: tuple(value) for name, value in raw.items() if name != "accuracy"}
            return cls(**lists, accuracy=raw["accuracy"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"This is no classification tree, or a damaged one ({error})") from None

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return (
            np.array(self.feature, np.int64),
            np.array(self.threshold, np.float64),
            np.array(self.left, np.int64),
            np.array(self.right, np.int64),
            np.array(self.leaf, np.int64),
        )


def grow(x_nf: np.ndarray, class_n: np.ndarray, features: Sequence[str], *, min_leaf: int = 1) -> Tree:
    """Grow a tree by the Gini impurity, without pruning.

    x_nf : (n, f) float32 without NaN; class_n : (n,) codes; min_leaf : samples that a leaf holds at least
    The order of the samples decides nothing.
    Raises ModelError for fewer than two classes, or samples that are unknown.
    Source: Breiman et al. 1984; as `ee.Classifier.smileCart` without limits in Ganerod et al. 2023, section 3.2.
    """
    from sklearn.tree import DecisionTreeClassifier  # noqa: PLC0415  takes a second, which a plan need not spend

    x_nf, class_n = np.asarray(x_nf, np.float32), np.asarray(class_n)
    if len(np.unique(class_n)) < 2:
        raise ModelError("A tree needs samples of two classes or more")
    if not np.isfinite(x_nf).all():
        raise ModelError("A tree cannot learn from samples that are unknown")
    order = np.lexsort((*x_nf.T[::-1], class_n))
    x_nf, class_n = x_nf[order], class_n[order]

    def new() -> DecisionTreeClassifier:
        # among equal splits a number decides, always the same one
        return DecisionTreeClassifier(min_samples_leaf=min_leaf, random_state=0)

    found = new().fit(x_nf, class_n)
    grown = found.tree_
    classes = tuple(int(code) for code in found.classes_)
    return Tree(
        features=tuple(features),
        classes=classes,
        feature=tuple(int(f) if f >= 0 else _LEAF for f in grown.feature),
        threshold=tuple(
            float(t) if f >= 0 else 0.0 for t, f in zip(grown.threshold, grown.feature, strict=True)
        ),
        left=tuple(int(i) for i in grown.children_left),
        right=tuple(int(i) for i in grown.children_right),
        leaf=tuple(classes[i] for i in grown.value[:, 0, :].argmax(axis=1)),
        accuracy=_accuracy(new, x_nf, class_n),
    )


def _accuracy(new: object, x_nf: np.ndarray, class_n: np.ndarray) -> float | None:
    """Share of right answers by trees that did not see the sample: folds of equal shares of the classes."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict  # noqa: PLC0415

    fewest = int(np.unique(class_n, return_counts=True)[1].min())
    if fewest < _FOLDS:
        return None
    assert callable(new)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    told = cross_val_predict(new(), x_nf, class_n, cv=folds)
    return round(float((told == class_n).mean()), 4)
