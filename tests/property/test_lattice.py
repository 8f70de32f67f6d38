"""Prediction lies on the grid's lattice: every pixel at the same place of a unit of one shape, with its own context."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.models.card import FeatureSpec, ModelCard
from slidecube.models.errors import ModelError
from slidecube.models.predict import CHUNK_PX, UNIT_PX, on_lattice, predict


def card(window_px):
    return ModelCard(
        name="made", version=1, architecture="none", inputs=FeatureSpec(names=("b", "a")), window_px=window_px,
        threshold=0.5, min_area_m2=0,
    )  # fmt: skip


class Made:
    """A detector that notes the shapes it is given."""

    def __init__(self, window_px, answer):
        self.card, self.answer, self.shapes = card(window_px), answer, set()

    def predict_block(self, features_fyx):
        self.shapes.add(features_fyx.shape)
        return self.answer(features_fyx).astype(np.float32)


def place(features_fyx):
    """Where a pixel lies in its unit."""
    return 1000 * np.arange(UNIT_PX)[:, None] + np.arange(UNIT_PX)


def cube(shape, seed=0):
    rng = np.random.default_rng(seed)
    return xr.Dataset(
        {name: (("y", "x"), rng.normal(size=shape).astype(np.float32)) for name in ("a", "b", "c")}
    )


windows = {
    "origin_px": st.tuples(st.integers(-2000, 2000), st.integers(-2000, 2000)),
    "shape": st.tuples(st.integers(1, 400), st.integers(1, 400)),
    "chunks": st.none() | st.tuples(st.integers(40, 500), st.integers(40, 500)),
}


@settings(max_examples=40)
@given(**windows, window_px=st.sampled_from([1, 7]))
def test_every_pixel_lies_where_the_lattice_puts_it(origin_px, shape, chunks, window_px):
    detector = Made(window_px, place)
    features = cube(shape) if chunks is None else cube(shape).chunk(y=chunks[0], x=chunks[1])

    found = predict(detector, features, origin_px=origin_px)["probability"].compute(scheduler="synchronous")

    rows, cols = (
        np.arange(first, first + size) % UNIT_PX for first, size in zip(origin_px, shape, strict=True)
    )
    np.testing.assert_array_equal(found, (1000 * rows[:, None] + cols).astype(np.float32))
    assert detector.shapes == {(2, UNIT_PX + window_px - 1, UNIT_PX + window_px - 1)}


@settings(max_examples=25)
@given(**windows, window_px=st.sampled_from([1, 3, 7, 65, 301]))
def test_every_pixel_sees_its_own_context_and_nothing_beyond_the_window(origin_px, shape, chunks, window_px):
    def mean(features_fyx):
        """Of the known values of the first feature minus the second in the window around."""
        c = window_px // 2
        values = features_fyx[0].astype(float) - features_fyx[1]
        mean = scipy.ndimage.uniform_filter(np.nan_to_num(values), window_px, mode="constant")
        return mean[c : mean.shape[0] - c, c : mean.shape[1] - c]

    whole = cube(shape)
    features = whole if chunks is None else whole.chunk(y=chunks[0], x=chunks[1])

    found = predict(Made(window_px, mean), features, origin_px=origin_px)["probability"]

    difference = whole["b"].to_numpy().astype(float) - whole["a"].to_numpy()
    want = scipy.ndimage.uniform_filter(difference, window_px, mode="constant")
    np.testing.assert_allclose(found.compute(scheduler="synchronous"), want, atol=1e-5)


def test_units_of_which_nothing_is_known_are_not_computed():
    features = cube((3 * UNIT_PX, UNIT_PX))
    features["a"][: 2 * UNIT_PX] = np.nan
    features["b"][: 2 * UNIT_PX - 1] = np.nan
    rows = []
    detector = Made(7, lambda block: (rows.append(1), place(block))[1])

    found = predict(detector, features)["probability"]

    assert len(rows) == 2, "one unit knows one row of one feature"
    assert np.isnan(found[:UNIT_PX]).all()
    assert not np.isnan(found[UNIT_PX:]).any()


def test_a_large_lazy_cube_is_a_small_graph_of_chunks():
    lazy = cube((3000, 2000)).chunk(y=700, x=900)

    found = predict(Made(7, place), lazy, origin_px=(100, 600))["probability"]

    assert {size for sizes in found.chunks for size in sizes[1:-1]} == {CHUNK_PX}
    assert found.chunks[0][0] == CHUNK_PX - 100
    assert len(found.data.dask) < 100 * found.data.npartitions


def test_context_wider_than_a_chunk_is_refused():
    features, detector = cube((3, 3)), Made(2 * CHUNK_PX + 3, place)
    with pytest.raises(
        ModelError, match=f"needs context of {2 * CHUNK_PX + 3} px; up to {2 * CHUNK_PX + 1} are"
    ):
        predict(detector, features)


def test_coordinates_stay_and_other_types_are_taken():
    features = cube((5, 4)).assign_coords(x=np.arange(4) * 10.0, spatial_ref=0)

    found = on_lattice(
        lambda block: np.ones(block.shape[1:], np.uint8),
        features.astype("int16"),
        card=card(1),
        origin_px=(0, 0),
        unknown=np.uint8(9),
    )

    assert found.dtype == np.uint8
    assert (found == 1).all()
    assert set(found.coords) == {"x", "spatial_ref"}


@pytest.mark.parametrize("window_px", [0, 2, -1])
def test_a_window_has_a_middle(window_px):
    with pytest.raises(ModelError, match=f"window_px={window_px} is not allowed; an odd number of pixels is"):
        card(window_px)
