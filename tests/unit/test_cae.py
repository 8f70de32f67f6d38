"""The auto-encoder beside Table 2 of its paper, written out by hand, and its training, which nothing may change."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slidecube.models.errors import ModelError
from slidecube.models.nets import cae
from slidecube.models.nets.cae import DEEP, PATCH_PX, Cae, Training, encode, encode_dense, one_thread, train
from slidecube.models.zoo import build_model

QUICK = Training(epochs=3, batch=64)


def patches(n=200, inputs=5, seed=0):
    rng = np.random.default_rng(seed)
    level = rng.normal(size=(n, inputs, 1, 1))
    return (level + 0.3 * rng.normal(size=(n, inputs, PATCH_PX, PATCH_PX))).astype(np.float32)


@pytest.fixture(scope="module")
def network():
    """A network whose every number matters: no weight, slope, mean or variance is at its start."""
    torch.manual_seed(4)
    made = Cae(5).eval()
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.3 * torch.rand(tensor.shape))
    return made


@pytest.fixture(scope="module")
def weights():
    return train(patches(), QUICK)[0]


# --- the network -------------------------------------------------------------------------------------------------


def by_hand(network, patch_dyx):
    """Table 2 in plain numpy: deep features and reconstruction of one patch."""
    w = {name: tensor.numpy().astype(float) for name, tensor in network.state_dict().items()}

    def conv(x, layer):
        kernel = w[f"{layer}.weight"]
        side = kernel.shape[-1]
        out = [
            [np.tensordot(kernel, x[:, i : i + side, j : j + side], 3) for j in range(x.shape[2] - side + 1)]
            for i in range(x.shape[1] - side + 1)
        ]
        return np.moveaxis(np.array(out), -1, 0) + w[f"{layer}.bias"][:, None, None]

    def prelu(x, layer):
        return np.where(x > 0, x, w[f"{layer}.weight"][:, None, None] * x)

    def norm(x, layer):
        a = {k: w[f"{layer}.{k}"][:, None, None] for k in ("weight", "bias", "running_mean", "running_var")}
        return (x - a["running_mean"]) / np.sqrt(a["running_var"] + 1e-5) * a["weight"] + a["bias"]

    x = prelu(conv(patch_dyx, "features.0"), "features.1")
    assert x.shape == (8, 5, 5)
    x = norm(prelu(conv(x, "features.2"), "features.3"), "features.4")
    assert x.shape == (12, 3, 3)
    deep = x[:, :2, :2].max(axis=(1, 2))
    x = norm(prelu(conv(deep[:, None, None], "decoder.0"), "decoder.1"), "decoder.2")
    assert x.shape == (8, 1, 1)
    x = norm(prelu(conv(x, "decoder.3"), "decoder.4"), "decoder.5")
    return deep, np.broadcast_to(x, (len(patch_dyx), 7, 7))


def test_it_is_the_table_of_the_paper(network):
    x = patches(3)
    with torch.inference_mode():
        deep, rebuilt = network.encode(torch.from_numpy(x)), network(torch.from_numpy(x))

    for i in range(3):
        want_deep, want_rebuilt = by_hand(network, x[i].astype(float))
        np.testing.assert_allclose(deep[i, :, 0, 0], want_deep, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rebuilt[i], want_rebuilt, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [1, 5, 8])
def test_its_size_follows_from_the_table(inputs):
    encoder = (9 * inputs * 8 + 8) + 8 + (9 * 8 * 12 + 12) + 12 + 2 * 12
    decoder = (12 * 8 + 8) + 8 + 2 * 8 + (8 * inputs + inputs) + inputs + 2 * inputs

    assert sum(p.numel() for p in Cae(inputs).parameters()) == encoder + decoder
    assert dict(cae.shapes(inputs)) == {k: tuple(v.shape) for k, v in Cae(inputs).state_dict().items()}


def test_dense_equals_patch_by_patch_and_belongs_to_the_same_pixel(weights):
    rng = np.random.default_rng(8)
    planes = rng.normal(size=(5, 30 + 6, 41 + 6)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(planes, (7, 7), axis=(1, 2))
    by_patch = encode(weights, np.ascontiguousarray(windows.transpose(1, 2, 0, 3, 4)).reshape(-1, 5, 7, 7))
    want = by_patch.reshape(30, 41, DEEP).transpose(2, 0, 1)

    found = encode_dense(weights, planes)

    np.testing.assert_allclose(found, want, atol=1e-5)
    assert found.std() > 0.1
    for shifted in (found[:, 1:] - want[:, :-1], found[:, :, 1:] - want[:, :, :-1]):
        assert np.abs(shifted).mean() > 0.05, "a neighbour's features are others"


def test_a_pixel_sees_six_by_six_pixels_half_a_pixel_north_west(network):
    noisy = torch.randn((1, 5, 13, 13), generator=torch.Generator().manual_seed(1))

    seen = np.zeros((13, 13), bool)
    with torch.inference_mode():
        base = network.encode_dense(noisy)[0, :, 3, 3]  # of the pixel (6, 6)
        for i in range(13):
            for j in range(13):
                other = noisy.clone()
                other[0, :, i, j] += 50
                seen[i, j] = not torch.equal(network.encode_dense(other)[0, :, 3, 3], base)

    rows, cols = np.nonzero(seen)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (3, 8, 3, 8)


# --- its training ------------------------------------------------------------------------------------------------


def test_it_learns():
    _, losses = train(patches(400), Training(epochs=30, batch=100))

    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]


def test_training_is_the_same_each_time_and_the_seed_changes_it():
    assert train(patches(), QUICK) == train(patches(), QUICK)
    assert train(patches(), QUICK)[0] != train(patches(), Training(epochs=3, batch=64, seed=1))[0]


def test_the_number_of_threads_outside_and_their_random_numbers_change_nothing_and_are_not_changed():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            state = torch.get_rng_state()
            found.append(train(patches(3000), Training(epochs=2, batch=1000)))
            assert torch.get_num_threads() == threads
            assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(before)

    assert found[0] == found[1] == found[2]


def test_every_thread_inside_has_one_and_gets_back_what_it_had():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:

        def work(i):
            with one_thread():
                time.sleep(0.002 * (i % 3))
                inside = torch.get_num_threads()
            return inside, torch.get_num_threads()

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(work, range(40))) == {(1, 2)}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@given(st.integers(2, 500), st.integers(2, 120))
def test_batches_hold_every_patch_once_and_never_one_alone(n, size):
    found = cae._batches(np.arange(n), size)

    np.testing.assert_array_equal(np.concatenate(found), np.arange(n))
    assert all(2 <= len(batch) <= size + 1 for batch in found)


def test_two_patches_are_enough():
    _, losses = train(patches(2), Training(epochs=2))
    assert np.isfinite(losses).all()


# --- interruption ------------------------------------------------------------------------------------------------

LONG = Training(epochs=60, batch=500)
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from slidecube.models.nets.cae import Training, train
train(np.load(sys.argv[1]), Training(epochs=60, batch=500), checkpoint=Path(sys.argv[2]))
"""


@pytest.fixture
def epochs_run(monkeypatch):
    """Numbers of the epochs that are really computed."""
    run, original = [], cae._State.epoch

    def counted(self, patches_ndyx, number):
        run.append(number)
        return original(self, patches_ndyx, number)

    monkeypatch.setattr(cae._State, "epoch", counted)
    return run


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, epochs_run):
    data, checkpoint = patches(1000), tmp_path / "training.safetensors"
    np.save(tmp_path / "patches.npy", data)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "patches.npy"), str(checkpoint)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2"})
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed in the middle"

    resumed = train(data, LONG, checkpoint=checkpoint)

    assert 0 < len(epochs_run) < LONG.epochs
    assert epochs_run[0] % cae.CHECKPOINT_EPOCHS == 0
    epochs_run.clear()
    assert resumed == train(data, LONG)
    assert epochs_run == list(range(LONG.epochs))


def test_a_finished_training_is_not_repeated(tmp_path, epochs_run):
    ten = Training(epochs=10, batch=64)
    first = train(patches(), ten, checkpoint=tmp_path / "state")
    epochs_run.clear()

    assert train(patches(), ten, checkpoint=tmp_path / "state") == first
    assert epochs_run == []


@pytest.mark.parametrize("spoil", ["other patches", "other numbers", "cut", "empty", "other tensors"])
def test_a_state_of_another_training_or_a_damaged_one_is_not_used(tmp_path, epochs_run, spoil):
    ten, path = Training(epochs=10, batch=64), tmp_path / "state"
    want = train(patches(), ten)
    train(
        patches(seed=1) if spoil == "other patches" else patches(),
        Training(epochs=10, batch=65) if spoil == "other numbers" else ten,
        checkpoint=path,
    )
    content = path.read_bytes()
    if spoil in {"cut", "empty"}:
        path.write_bytes(content[: len(content) // 2] if spoil == "cut" else b"")
    if spoil == "other tensors":
        path.write_bytes(want[0])
    epochs_run.clear()

    assert train(patches(), ten, checkpoint=path) == want
    assert epochs_run == list(range(10))


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    patches_nfyx = np.random.default_rng(0).random((600, 5, 7, 7), np.float32)
    quick = {"epochs": 1, "sample": 600, "batch": 200}
    model = build_model("cae-kmeans", threshold=None, min_area_m2=None, parameters=quick)
    fitted = model.fit(patches_nfyx)

    with pytest.raises(
        ModelError, match=r"device = 'cuda' needs a GPU, and torch .* on this worker; set device"
    ):
        fitted.on("cuda")
    assert fitted.on("cpu") == fitted
    rule = build_model("rdndvi", threshold=None, min_area_m2=None, parameters={})
    assert rule.on("cuda") is rule, "a rule has no network"


def test_the_way_to_another_device_gives_the_same_features(weights, monkeypatch):
    """No GPU is needed for the way there and back: torch takes "cpu:0" for a device of its own."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    planes = np.random.default_rng(1).random((5, 70, 70), np.float32)

    assert np.array_equal(encode_dense(weights, planes, device="cpu:0"), encode_dense(weights, planes))
    assert pinned == [(1, 5, 70, 70)]
