"""The contract that every network and ensemble keeps: one value a pixel, whatever is computed at once, and by whom."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import dask
import numpy as np
import pytest
import torch
import xarray as xr

from slidecube.models import network as network_code
from slidecube.models.backends import BATCH, TOLERANCE, EngineCache
from slidecube.models.ensembles import Ensemble
from slidecube.models.errors import ModelError
from slidecube.models.network import Network, engine_of, network_module, standardised
from slidecube.models.network_card import Calibration, read_card
from slidecube.models.predict import predict
from slidecube.models.registry import load_model, save_ensemble, shipped_root
from slidecube.models.uncertainty import tta_views
from slidecube.models.windows import Region, WindowLattice

NAMES = ("rdndvi", "slope_deg")
OTHERS = ("slope_deg", "dndvi")
RANGES = {"rdndvi": (-60, 60), "slope_deg": (0, 50), "dndvi": (-1, 1)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, save_untrained):
    """A network without and one with global pooling, and an ensemble of members with other inputs and windows."""
    root = tmp_path_factory.mktemp("models")
    made = {
        "resunet": save_untrained(root / "resunet@1", NAMES),
        "pspnet": save_untrained(root / "pspnet@1", NAMES, architecture="pspnet", arguments={"width": 32}),
    }
    other = save_untrained(root / "other@1", OTHERS, window_px=80, margin_px=24, seed=1)
    members = [made["resunet"], other]
    card = read_card(made["resunet"]).model_dump(
        exclude={"weights", "architecture", "members"}, by_alias=True, exclude_none=True
    )
    names = ("dndvi", *NAMES)
    inputs = {"names": names, "units": ("1",) * 3, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    save_ensemble(root / "both@1", members, {**card, "name": "both", "inputs": inputs})
    return made | {"ensemble": root / "both@1"}


@pytest.fixture(scope="module", params=["resunet", "pspnet", "ensemble"])
def model(request, folders):
    return load_model(folders[request.param])


@pytest.fixture(scope="module")
def resunet(folders):
    return Network.from_folder(folders["resunet"])


def cube(*, shape=(100, 120), seed=0, holes=0.02):
    """Smooth plausible features with holes."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, (low, high) in RANGES.items():
        coarse = rng.uniform(low, high, (shape[0] // 8 + 2, shape[1] // 8 + 2))
        values = np.kron(coarse, np.ones((8, 8)))[: shape[0], : shape[1]].astype(np.float32)
        values[rng.random(shape) < holes] = np.nan
        made[name] = (("y", "x"), values)
    return xr.Dataset(made)


def arrays(dataset):
    return [dataset[name].to_numpy() for name in dataset]


# --- one value a pixel -------------------------------------------------------------------------------------------


def test_in_all_views_the_ground_may_be_turned_and_the_answer_turns_with_it(save_untrained, tmp_path):
    """A network alone answers otherwise, so that this can fail; directions turn with the ground."""
    names = ("rdndvi", "aspect_deg")
    card = save_untrained(tmp_path / "aspect@1", names)
    network = Network.from_folder(card)
    side = network.lattice.side_px  # windows lie symmetrically around it
    rng = np.random.default_rng(1)
    x = np.stack([rng.uniform(-60, 60, (side, side)), rng.uniform(0, 360, (side, side))]).astype(np.float32)

    def answer(model, planes):
        return model.predict_region(list(planes), origin_px=(0, 0), margin_px=0)

    both = network.computed_by(None, None, tta=True)
    want = answer(both, x)
    for view in tta_views(names)[1:]:
        seen = view.see(x)
        np.testing.assert_allclose(view.back(answer(both, seen)), want, atol=1e-4)
        assert np.abs(view.back(answer(network, seen))[0] - answer(network, x)[0]).max() > 1e-3
    assert both.variables == ("probability", "spread")
    assert want[1].max() > 1e-3
    assert want.shape == (2, side, side)


def test_probability_is_between_0_and_1_and_unknown_where_an_input_is(model):
    features = cube()

    found = predict(model, features)

    unknown = np.any([np.isnan(features[name]) for name in model.card.inputs.names], axis=0)
    assert 0 < unknown.mean() < 1
    for name in found:
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(np.isnan(found[name]), unknown)
        assert found[name].min() >= 0
        assert found[name].max() <= 1
    assert np.unique(found["probability"]).size > 1000
    assert set(found) == set(model.variables)


@pytest.mark.parametrize("origin_px", [(37, 500), (-3, -700)])
def test_a_pixel_is_the_same_to_the_bit_whatever_threads_chunks_window_and_origin(model, origin_px):
    whole = cube(shape=(210, 230), seed=3)
    want = predict(model, whole, origin_px=origin_px)

    xr.testing.assert_identical(predict(model, whole, origin_px=origin_px, threads=3), want)
    lazy = predict(model, whole.chunk(y=100, x=71), origin_px=origin_px)
    assert dask.is_dask_collection(lazy)
    xr.testing.assert_identical(lazy.compute(scheduler="threads"), want)
    c = model.card.window_px // 2
    rows, cols = slice(20, 210), slice(11, 200)
    window = whole.isel(y=rows, x=cols)
    part = predict(
        model, window, origin_px=(origin_px[0] + rows.start, origin_px[1] + cols.start), margin_px=c
    )
    inner = whole.isel(y=slice(rows.start + c, rows.stop - c), x=slice(cols.start + c, cols.stop - c))
    assert part.sizes == inner.sizes
    for name in want:
        wanted = want[name][rows.start + c : rows.stop - c, cols.start + c : cols.stop - c]
        np.testing.assert_array_equal(part[name], wanted)


def test_views_are_the_same_to_the_bit_whatever_threads_and_chunks(resunet):
    both, whole = resunet.computed_by(None, None, tta=True), cube(shape=(70, 90), seed=3)
    want = predict(both, whole, origin_px=(37, -20))
    assert set(want) == {"probability", "spread"}

    xr.testing.assert_identical(predict(both, whole, origin_px=(37, -20), threads=3), want)
    lazy = predict(both, whole.chunk(y=40, x=71), origin_px=(37, -20))
    xr.testing.assert_identical(lazy.compute(scheduler="threads"), want)


def test_chunks_of_a_large_cube_are_no_seam(resunet, monkeypatch):
    monkeypatch.setattr("slidecube.models.predict.CHUNK_PX", 128)  # as if 2048 px were 512
    whole = cube(shape=(560, 150), seed=4)

    lazy = predict(resunet, whole.chunk(y=97, x=150), origin_px=(-70, 60))

    assert len(lazy["probability"].chunks[0]) > 1
    xr.testing.assert_identical(
        lazy.compute(scheduler="threads"), predict(resunet, whole, origin_px=(-70, 60))
    )


def test_context_outside_the_window_is_unknown(model):
    whole = cube(shape=(40, 50), holes=0)
    c = model.card.window_px // 2
    framed = whole.pad(y=c, x=c, constant_values=np.nan)

    want = predict(model, framed, origin_px=(-c, -c))

    found = predict(model, whole)
    for name in found:
        np.testing.assert_array_equal(found[name], want[name][c : 40 + c, c : 50 + c])


def test_threads_may_predict_at_once(model):
    cubes = [cube(seed=seed, shape=(90, 80)) for seed in range(4)]
    want = [predict(model, one) for one in cubes]

    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda one: predict(model, one), cubes * 2), want * 2, strict=True):
            xr.testing.assert_identical(found, wanted)


def test_it_travels_in_a_pickle_and_answers_the_same(model):
    travelled = pickle.loads(pickle.dumps(model))

    assert travelled == model
    xr.testing.assert_identical(predict(travelled, cube()), predict(model, cube()))


def test_a_block_is_asked_as_of_every_detector(model):
    c = model.card.window_px // 2
    features = cube(shape=(2 * c + 70, 2 * c + 60))
    planes = np.stack([features[name] for name in model.card.inputs.names])

    found = model.predict_block(planes)

    np.testing.assert_array_equal(
        found, predict(model, features, origin_px=(-c, -c), margin_px=c)["probability"]
    )


def test_extremes_are_no_warning_and_no_hole(model):
    ends = np.array([-np.inf, -3e38, -1e5, 0, 1e5, 3e38, np.inf], np.float32)
    features = cube(shape=(64, 64), holes=0)
    for k, name in enumerate(features):
        features[name].to_numpy()[10 + k, :7] = ends

    found = predict(model, features)["probability"]

    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("shape", [(70, 80), (1, 1)])
def test_where_nothing_is_known_nothing_is_said(model, shape, monkeypatch):
    monkeypatch.setattr(network_code, "engine_of", lambda _: pytest.fail("nothing is to be computed"))

    found = predict(model, cube(shape=shape, holes=1.1))

    assert all(np.isnan(found[name]).all() for name in found)


def test_windows_without_a_known_pixel_are_left_out_and_change_no_bit(resunet, monkeypatch):
    features = cube(shape=(300, 300), holes=0)
    features["rdndvi"].to_numpy()[:, 150:] = np.nan
    want = predict(resunet, features)
    asked = []
    compute = network_code._window_logits
    monkeypatch.setattr(
        network_code, "_window_logits", lambda *given: asked.append(len(given[-1])) or compute(*given)
    )

    found = predict(resunet, features)

    xr.testing.assert_identical(found, want)
    every = WindowLattice(side_px=64, margin_px=8).windows(
        Region(row=0, col=0, height=300, width=300, above=0, left=0, planes=(300, 300)),
        np.ones((300, 300), bool),
    )
    assert sum(asked) < 0.7 * len(every)


# --- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side_px", "margin_px"), [(64, 0), (64, 8), (64, 16), (96, 30), (33, 16), (512, 64)]
)
def test_weights_of_all_windows_over_a_pixel_sum_to_one(side_px, margin_px):
    lattice = WindowLattice(side_px=side_px, margin_px=margin_px)
    region = Region(row=-70, col=1000, height=90, width=75, above=0, left=0, planes=(90, 75))
    total = np.zeros((90, 75))

    placed = lattice.windows(region, np.ones((90, 75), bool))
    for at in placed:
        total[at.out_rows, at.out_cols] += lattice.weights_yx()[at.of_rows, at.of_cols]

    np.testing.assert_allclose(total, 1, rtol=1e-6)
    # every window that holds a pixel of the region, and no other: counted from the lattice's definition
    stride = side_px - 2 * margin_px
    rows = [k for k in range(-999, 999) if k * stride < 20 and k * stride + side_px > -70]
    cols = [k for k in range(-999, 9999) if k * stride < 1075 and k * stride + side_px > 1000]
    assert len(placed) == len(rows) * len(cols)


def test_the_ramp_between_two_windows_is_a_hann_window():
    weights = WindowLattice(side_px=64, margin_px=8).weights_yx()
    row = weights[32] / weights[32, 32]

    ramp = np.hanning(2 * 16 + 1)[:17]  # of numpy: of points, ours of the middles of pixels
    middles = np.interp(np.arange(16) + 0.5, np.arange(17), ramp)
    np.testing.assert_allclose(row[:16], middles, atol=3e-3)
    np.testing.assert_allclose(row[16:48], 1)
    np.testing.assert_allclose(row[::-1], row, rtol=1e-6)


def test_one_window_says_what_the_network_says_of_it(resunet):
    features = cube(shape=(64, 64), holes=0)
    stack = standardised(arrays(features[list(NAMES)]), resunet.about.inputs.mean, resunet.about.inputs.std)
    single = replace(resunet, about=_with_margin(resunet.about, 0))

    found = predict(single, features)["probability"]

    with torch.inference_mode():
        logits = network_module(resunet.about, resunet.weights)(
            torch.from_numpy(stack).permute(2, 0, 1)[None]
        )
    np.testing.assert_allclose(found, torch.sigmoid(logits)[0, 0], atol=1e-5)


def test_blended_logits_are_the_weighted_sum_of_the_windows(resunet):
    """Against a plain loop over the lattice, written anew."""
    features = cube(shape=(120, 110), holes=0)
    x = np.stack(arrays(features[list(NAMES)]))
    mean, std = np.array(resunet.about.inputs.mean), np.array(resunet.about.inputs.std)
    x = ((x - mean[:, None, None]) / std[:, None, None]).astype(np.float32)
    module = network_module(resunet.about, resunet.weights)
    total, weights = np.zeros((120, 110)), resunet.lattice.weights_yx()
    padded = np.pad(x, ((0, 0), (64, 64), (64, 64)))
    for top in range(-48, 120, 48):
        for left in range(-48, 110, 48):
            window = torch.from_numpy(padded[None, :, top + 64 : top + 128, left + 64 : left + 128].copy())
            with torch.inference_mode():
                logits = module(window)[0, 0].numpy()
            for i in range(max(top, 0), min(top + 64, 120)):
                js = np.arange(max(left, 0), min(left + 64, 110))
                total[i, js] += weights[i - top, js - left] * logits[i - top, js - left]

    found = predict(resunet, features)["probability"]

    np.testing.assert_allclose(found, 1 / (1 + np.exp(-total)), atol=1e-5)


def _with_margin(about, margin_px):
    made = about.architecture.model_copy(update={"margin_px": margin_px})
    return about.model_copy(update={"architecture": made})


# --- ensembles ---------------------------------------------------------------------------------------------------


def test_an_ensemble_is_the_mean_and_the_spread_of_its_members(folders):
    ensemble, features = Ensemble.from_folder(folders["ensemble"]), cube()

    found = predict(ensemble, features)

    each = np.stack([predict(member, features)["probability"] for member in ensemble.members]).astype(
        np.float64
    )
    np.testing.assert_allclose(found["probability"], each.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found["spread"], each.std(axis=0), atol=1e-6)
    assert found["spread"].max() > 0.01


def test_an_ensemble_takes_its_own_members_only(folders):
    ensemble = Ensemble.from_folder(folders["ensemble"])
    with pytest.raises(ModelError, match=r"both@1 was made of other members than these, or in another order"):
        Ensemble.of(ensemble.members[::-1], ensemble.about)


# --- cards, weights, backends ------------------------------------------------------------------------------------


def test_the_card_says_what_it_is(model):
    card = model.card
    assert card.window_px == 2 * (max(m.lattice.side_px for m in getattr(model, "members", (model,))) - 1) + 1
    assert card.content_sha256 == model.about.identity
    assert card.sample_patches == 0
    assert model.fit(np.zeros(0)) is model
    assert model.restore("nowhere") is model


def test_what_is_not_vouched_for_is_refused(folders, tmp_path):
    about = read_card(folders["resunet"])
    content = (folders["resunet"] / about.weights.file).read_bytes()
    with pytest.raises(
        ModelError, match=r"Weights of model resunet@1 are not those that its card vouches for"
    ):
        Network.of(about, content[:-1] + b"\0")


def test_tensors_of_another_network_are_refused(folders, save_untrained, tmp_path):
    wide = Network.from_folder(save_untrained(tmp_path / "wide@1", (*NAMES, "dndvi")))
    narrow = read_card(folders["resunet"]).inputs
    with pytest.raises(
        ModelError, match=r"Weights of model wide@1: tensor .* has the shape \(4, 3, 3, 3\) and not"
    ):
        network_module(wide.about.model_copy(update={"inputs": narrow}), wide.weights)


def test_a_network_that_gives_no_numbers_is_an_error_and_no_hole(resunet, monkeypatch):
    monkeypatch.setattr(
        network_code, "_blended", lambda *given, **_: np.full(given[2].planes, np.nan, np.float32)
    )
    with pytest.raises(ModelError, match=r"resunet@1 gives numbers that are not finite in float32"):
        predict(resunet, cube())


def test_a_missing_feature_is_named(model):
    with pytest.raises(ModelError, match=rf"{model.card.address} needs.*missing: rdndvi"):
        predict(model, cube().drop_vars("rdndvi"))


def shipped(name):
    return Network.from_folder(shipped_root() / name)


def ground(network):
    """Features of a plausible spread around a network's own normalisation: patches of eight pixels, and noise."""
    inputs, rng = network.about.inputs, np.random.default_rng(7)
    made = {}
    for name, mean, std in zip(inputs.names, inputs.mean, inputs.std, strict=True):
        coarse = np.kron(rng.normal(size=(20, 20)), np.ones((8, 8)))
        made[name] = (
            ("y", "x"),
            (mean + std * (coarse + 0.1 * rng.normal(size=coarse.shape))).astype(np.float32),
        )
    return xr.Dataset(made)


def test_onnx_agrees_within_the_stated_tolerance(resunet):
    """On drawn weights, whose logits are steeper than any that were trained."""
    features = cube()
    want = predict(resunet, features)["probability"]

    other = resunet.computed_by("onnx", None)
    found = predict(other, features)["probability"]

    assert 0 < float(np.nanmax(np.abs(found - want))) <= TOLERANCE["float32"]
    xr.testing.assert_identical(predict(other, features, threads=2)["probability"], found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sim-small@1", "sim-post@1"])
def test_half_precision_agrees_within_what_is_stated_of_trained_networks(name, dtype):
    network = shipped(name)
    features = ground(network)
    want = predict(network, features)["probability"]

    other = network.computed_by("torch", dtype)
    found = predict(other, features)["probability"]

    assert 0 < float(np.abs(found - want).max()) <= TOLERANCE[dtype]
    xr.testing.assert_identical(predict(other, features, threads=2)["probability"], found)


@pytest.mark.slow
def test_compiled_it_agrees_within_the_stated_tolerance(resunet):
    features = cube()
    want = predict(resunet, features)["probability"]

    compiled = resunet.computed_by("compile", None)
    found = predict(compiled, features)["probability"]

    assert float(np.nanmax(np.abs(found - want))) <= TOLERANCE["float32"]
    xr.testing.assert_identical(predict(compiled, features, threads=2)["probability"], found)


def test_onnx_computes_in_full_precision_alone(resunet):
    with pytest.raises(
        ModelError, match=r"resunet@1 by backend = 'onnx' computes in float32; got dtype = 'bfloat16'"
    ):
        resunet.computed_by("onnx", "bfloat16")


def test_a_network_is_built_once_and_the_least_used_is_forgotten():
    built, cache = [], EngineCache(kept=2)

    def get(key):
        return cache.get((key,), lambda: built.append(key) or object())

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)

    assert built == ["a", "b", "c", "b"]


def test_members_of_an_ensemble_are_built_once_however_many(folders, monkeypatch):
    ensemble, built, build = load_model(folders["ensemble"]), [], network_code._engine
    cards = [ensemble.members[0].about.model_copy(update={"name": f"member-{k}"}) for k in range(5)]
    cards = [
        c.model_copy(update={"calibration": Calibration(temperature=k + 1)}) for k, c in enumerate(cards)
    ]
    many = replace(ensemble, members=tuple(replace(ensemble.members[0], about=card) for card in cards))
    monkeypatch.setattr(network_code, "ENGINES", EngineCache(kept=2))
    monkeypatch.setattr(
        network_code, "_engine", lambda member: built.append(member.about.name) or build(member)
    )

    planes = arrays(cube(shape=(32, 32)))
    for _ in range(3):
        many.predict_region(planes, origin_px=(0, 0), margin_px=0)

    assert built == [card.name for card in cards]


def test_an_ensemble_that_is_left_keeps_no_more_than_its_share():
    built, cache = [], EngineCache(kept=2)

    def get(keys):
        for key in keys:
            cache.get((key,), lambda key=key: built.append(key) or object())

    cache.reserve([("a",), ("b",), ("c",), ("d",)])
    get("abcd" * 2)
    assert built == list("abcd")
    get("x")  # another network: of the ensemble only the last used one stays beside it
    built.clear()
    get("xdcba")
    assert built == list("cba")


# --- want of memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_without_memory_the_batch_is_halved_and_it_goes_on(resunet, monkeypatch, error):
    features = cube()
    want = predict(resunet, features)["probability"]
    monkeypatch.setattr(network_code, "ENGINES", EngineCache())
    engine = engine_of(resunet)
    engine.batch = 8
    forward, seen = engine.forward, []

    def greedy(x_bcyx):
        seen.append(len(x_bcyx))
        if len(x_bcyx) > 2:
            raise error
        return forward(x_bcyx)

    engine.forward = greedy

    found = predict(resunet, features)["probability"]

    np.testing.assert_allclose(found, want, atol=TOLERANCE["float32"])
    assert seen[:3] == [8, 4, 2]
    assert set(seen[2:]) == {2}, "what fits is remembered"
    assert engine.batch == 2


def test_one_window_that_does_not_fit_is_one_clear_line(resunet, monkeypatch):
    monkeypatch.setattr(network_code, "ENGINES", EngineCache())
    engine = engine_of(resunet)
    assert engine.batch == BATCH["cpu"] == 1

    def greedy(x_bcyx):
        raise MemoryError

    engine.forward = greedy
    with pytest.raises(
        ModelError, match=r"resunet@1 does not fit into the memory of its worker, one window at a time"
    ):
        predict(resunet, cube())


def test_other_errors_of_a_network_stay_what_they_are(resunet, monkeypatch):
    monkeypatch.setattr(network_code, "ENGINES", EngineCache())

    def broken(x_bcyx):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    engine_of(resunet).forward = broken
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        predict(resunet, cube())
