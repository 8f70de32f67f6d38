"""The contract that every model of the zoo keeps, and the rule `rdndvi` beside what it says it is.

Models that learn are fitted on a few plausible patches, with few epochs, once for all tests.
"""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from slidecube.models.errors import ModelError
from slidecube.models.predict import UNIT_PX, predict
from slidecube.models.rules import RDNDVI_DEFAULTS
from slidecube.models.zoo import ZOO, build_model
from slidecube.pipeline.features import feature

RANGES = {
    "rdndvi": (-120, 120),
    "slope_deg": (0, 89),
    "ndvi_loss_p": (0, 1),
    **{f"mnf{i}_{side}": (-50, 90) for i in (1, 2, 3) for side in ("post", "change")},
}
QUICK = {"epochs": 2.0, "batch": 100.0}


def cube(model, *, shape=(6, 9), seed=0, holes=0.2):
    """Plausible features with holes."""
    rng = np.random.default_rng(seed)
    made = {}
    for name in model.card.inputs.names:
        low, high = RANGES.get(name, (-1, 1))
        values = rng.uniform(low, high, shape).astype(np.float32)
        values[rng.random(shape) < holes] = np.nan
        made[name] = (("y", "x"), values)
    return xr.Dataset(made)


def patches_for(card, n=300, seed=1):
    """Plausible patches: smooth ones of varying level, with unknown pixels around known centres."""
    rng = np.random.default_rng(seed)
    low, high = np.array([RANGES.get(name, (-1, 1)) for name in card.inputs.names], float).T
    shape = (n, len(low), card.window_px, card.window_px)
    level = low + (high - low) * rng.uniform(size=shape[:2])
    patches = level[..., None, None] + rng.normal(size=shape)
    patches[rng.random(shape) < 0.1] = np.nan
    middle = card.window_px // 2
    patches[:, :, middle, middle] = np.nan_to_num(patches[:, :, middle, middle])
    return patches.astype(np.float32)


def quick(name):
    known = build_model(name).card.parameters
    return {key: value for key, value in QUICK.items() if key in known}


@lru_cache
def ready(name):
    """A model that can predict; it is a value, so that tests may share it."""
    model = build_model(name, parameters=quick(name))
    if not model.card.sample_patches:
        return model
    return model.fit(patches_for(model.card)).with_landslide((0,))


@pytest.fixture(params=list(ZOO))
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return ready(name)


def pad(model, planes_fyx, value=np.nan):
    c = model.card.window_px // 2
    return np.pad(planes_fyx, ((0, 0), (c, c), (c, c)), constant_values=value)


# --- the contract ------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is(model):
    card = build_model(model.card.name).card
    assert build_model(card.address).card == card
    assert card.version >= 1
    assert card.window_px % 2 == 1
    assert 0 < card.threshold < 1
    assert all((card.architecture, card.training, card.metrics, card.licence, card.source))
    for name in card.inputs.names:
        feature(name)  # known to the pipeline
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.version = 2


def test_probability_is_between_0_and_1_and_unknown_where_an_input_is(model):
    features = cube(model)

    found = predict(model, features)["probability"]

    assert found.dtype == np.float32
    unknown = np.any([np.isnan(features[name]) for name in model.card.inputs.names], axis=0)
    assert 0 < unknown.mean() < 1
    np.testing.assert_array_equal(np.isnan(found), unknown)
    assert found.min() >= 0
    assert found.max() <= 1


def test_extremes_are_no_warning_and_no_hole(model):
    ends = np.array([-np.inf, -3e38, -1e5, 0, 1e5, 3e38, np.inf], np.float32)
    grid = np.array(np.meshgrid(*[ends] * len(model.card.inputs.names))).reshape(
        len(model.card.inputs.names), 7, -1
    )

    found = model.predict_block(pad(model, grid))

    assert found.shape == grid.shape[1:]
    assert found.dtype == np.float32
    assert ((found >= 0) & (found <= 1)).all()


def test_lazy_equals_eager_whatever_the_chunks(model):
    features = cube(model)
    want = predict(model, features)

    for chunks in ({"y": 2, "x": 9}, {"y": 5, "x": 4}):
        lazy = predict(model, features.chunk(chunks))
        assert isinstance(lazy["probability"].data, da.Array)
        xr.testing.assert_identical(lazy.compute(scheduler="synchronous"), want)


def test_other_features_and_their_order_change_nothing(model):
    features = cube(model)
    shuffled = features[list(features)[::-1]].assign(other=(("y", "x"), np.ones((6, 9))))

    xr.testing.assert_identical(predict(model, shuffled), predict(model, features))


@pytest.mark.parametrize("origin_px", [(0, 0), (37, 500), (-3, -700)])
def test_a_pixel_is_the_same_to_the_bit_whatever_chunks_window_and_origin(model, origin_px):
    whole = cube(model, shape=(300, 290), seed=3)
    want = predict(model, whole, origin_px=origin_px)["probability"].to_numpy()
    assert np.unique(want).size > 20

    for chunks in ((100, 290), (64, 131), (300, 290)):
        lazy = predict(model, whole.chunk(y=chunks[0], x=chunks[1]), origin_px=origin_px)
        np.testing.assert_array_equal(lazy["probability"].compute(scheduler="threads"), want)
    c = model.card.window_px // 2
    for rows, cols in ((slice(5, 140), slice(0, 131)), (slice(129, 300), slice(77, 280))):
        window = whole.isel(y=rows, x=cols)
        part = predict(model, window, origin_px=(origin_px[0] + rows.start, origin_px[1] + cols.start))
        inner = np.s_[c : window.sizes["y"] - c, c : window.sizes["x"] - c]
        np.testing.assert_array_equal(part["probability"].to_numpy()[inner], want[rows, cols][inner])


def test_context_outside_the_window_is_unknown(model):
    whole = cube(model, shape=(20, 20), holes=0)
    c = model.card.window_px // 2
    framed = whole.pad(y=c, x=c, constant_values=np.nan)

    want = predict(model, framed, origin_px=(-c, -c))["probability"].to_numpy()

    np.testing.assert_array_equal(predict(model, whole)["probability"], want[c : 20 + c, c : 20 + c])


def test_threads_may_predict_at_once(model):
    rng = np.random.default_rng(5)
    side = UNIT_PX + model.card.window_px - 1
    blocks = [
        rng.normal(size=(len(model.card.inputs.names), side, side)).astype(np.float32) for _ in range(8)
    ]
    want = [model.predict_block(block) for block in blocks]

    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(
            pool.map(model.predict_block, blocks * 4), itertools.cycle(want), strict=False
        ):
            np.testing.assert_array_equal(found, wanted)


def test_it_travels_in_a_small_pickle_and_answers_the_same(model):
    travelled = pickle.dumps(model)

    assert len(travelled) < 50_000
    assert pickle.loads(travelled) == model
    xr.testing.assert_identical(predict(pickle.loads(travelled), cube(model)), predict(model, cube(model)))


def test_fit_gives_a_model_of_the_same_card_and_the_same_answers_each_time(name, model):
    unfitted = build_model(name, parameters=quick(name))

    again = unfitted.fit(patches_for(unfitted.card))

    assert dataclasses.replace(again.card, weights_sha256="") == unfitted.card
    assert again.card == model.card
    if model.card.sample_patches:
        again = again.with_landslide((0,))
        assert again.card.weights_sha256
    assert again == model


def test_what_was_learnt_is_saved_and_restored_to_the_bit(name, model, tmp_path):
    model.save(tmp_path / "model")

    found = build_model(name, parameters=quick(name)).restore(tmp_path / "model")

    if model.card.sample_patches:
        found = found.with_landslide((0,))
    else:
        assert not (tmp_path / "model").exists()
    assert found == model
    xr.testing.assert_identical(predict(found, cube(model)), predict(model, cube(model)))


def test_features_of_other_shapes_are_refused(model):
    features = cube(model)
    first = model.card.inputs.names[0]
    with pytest.raises(ModelError, match="two and the same dimensions"):
        predict(model, features.assign({first: features[first].expand_dims("time")}))


def test_a_missing_feature_is_named(model):
    first, *rest = model.card.inputs.names
    with pytest.raises(ModelError, match=rf"{model.card.address} needs.*missing: {first}$"):
        predict(model, cube(model)[rest])


def test_users_may_set_threshold_and_smallest_area(name):
    model = build_model(name)
    other = build_model(model.card.name, threshold=0.7, min_area_m2=0).card

    assert (other.threshold, other.min_area_m2) == (0.7, 0)
    assert (
        dataclasses.replace(other, threshold=model.card.threshold, min_area_m2=model.card.min_area_m2)
        == model.card
    )


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_an_impossible_threshold_is_refused(model, bad):
    with pytest.raises(ModelError, match=r"threshold=.* is not allowed"):
        build_model(model.card.name, threshold=bad)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_an_impossible_area_is_refused(model, bad):
    with pytest.raises(ModelError, match=r"min_area_m2=.* is not allowed"):
        build_model(model.card.name, min_area_m2=bad)


def test_an_unknown_parameter_is_refused_with_the_known_ones(model):
    known = ", ".join(model.card.parameters)
    with pytest.raises(ModelError, match=f"no parameter speed; it has: {known}"):
        build_model(model.card.name, parameters={"speed": 1.0})


@pytest.mark.parametrize(
    "address", ["nothing", "", "rdndvi@", "rdndvi@x", "RDNDVI", "rdndvi@1@1", "../rdndvi"]
)
def test_an_unknown_address_is_refused_with_the_known_ones(address):
    with pytest.raises(ModelError, match=r"No model .*; models: rdndvi"):
        build_model(address)


def test_a_version_that_is_not_there_is_refused_with_the_one_that_is():
    with pytest.raises(ModelError, match="No version 9 of model 'rdndvi'; there is rdndvi@1"):
        build_model("rdndvi@9")


# --- the rule ----------------------------------------------------------------------------------------------------


def rule(change_pct, slope_deg, parameters=None):
    planes = np.stack(np.broadcast_arrays(change_pct, slope_deg)).astype(np.float32)
    found = build_model("rdndvi", parameters=parameters).predict_block(planes.reshape(2, 1, -1))
    return found.reshape(planes.shape[1:])


@given(
    st.lists(st.tuples(st.floats(-150, 150, width=32), st.floats(0, 90, width=32)), min_size=1, max_size=50),
    st.sampled_from([(25.0, 10.0), (30.0, 7.5)]),
)
def test_at_threshold_one_half_it_is_exactly_the_rule(pixels, limits):
    change, slope = np.array(pixels, np.float32).T
    loss_pct, slope_deg = limits

    found = rule(change, slope, {"loss_pct": loss_pct, "slope_deg": slope_deg}) >= 0.5

    np.testing.assert_array_equal(found, (change <= -loss_pct) & (slope >= slope_deg))


def test_exactly_at_both_limits_is_one_half():
    p = RDNDVI_DEFAULTS
    assert rule(-p["loss_pct"], p["slope_deg"]) == 0.5
    next_to = np.nextafter(np.float32(p["slope_deg"]), np.float32(0))
    assert rule(-p["loss_pct"], next_to) < 0.5, "the nearest number below the limit is below it"


def test_it_is_the_smaller_of_two_logistic_memberships():
    p = RDNDVI_DEFAULTS
    change, slope = np.meshgrid(np.linspace(-80, 40, 25), np.linspace(0, 60, 31))

    loss = 1 / (1 + np.exp((change + p["loss_pct"]) / p["loss_width_pct"]))
    steep = 1 / (1 + np.exp(-(slope - p["slope_deg"]) / p["slope_width_deg"]))

    np.testing.assert_allclose(rule(change, slope), np.minimum(loss, steep), rtol=1e-5)


@given(st.floats(-100, 100), st.floats(0, 80), st.floats(0, 50), st.floats(0, 30))
def test_more_loss_or_more_slope_is_never_less_likely(change, slope, more_loss, more_slope):
    assert rule(change - more_loss, slope) >= rule(change, slope)
    assert rule(change, slope + more_slope) >= rule(change, slope)


def test_flat_ground_is_never_a_landslide_however_much_is_lost():
    assert rule(-200, 0) < 0.01


@pytest.mark.parametrize("name", RDNDVI_DEFAULTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_parameters_are_finite(name, bad):
    with pytest.raises(ModelError, match=f"Parameter {name}="):
        build_model("rdndvi", parameters={name: bad})


@pytest.mark.parametrize("name", ["loss_width_pct", "slope_width_deg"])
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_widths_are_positive(name, bad):
    with pytest.raises(ModelError, match=f"Parameter {name}=.*width above 0"):
        build_model("rdndvi", parameters={name: bad})


def test_parameters_stand_on_the_card():
    card = build_model("rdndvi", parameters={"loss_pct": 30.0}).card

    assert card.parameters == {**RDNDVI_DEFAULTS, "loss_pct": 30.0}
