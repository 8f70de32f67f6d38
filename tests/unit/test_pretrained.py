"""Weights to begin with: files of smp's and timm's names, other channels, and what fits nowhere."""

from __future__ import annotations

from functools import lru_cache

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import torch

from slidecube.models.architectures import build_network
from slidecube.models.errors import ModelError
from slidecube.models.pretrained import adapt_channels, cached_weights, load_pretrained

ENCODER = "tu-mobilenetv3_small_050"


def content(tensors):
    return safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})


@lru_cache
def unet(channels=5, encoder=ENCODER):
    torch.manual_seed(3)
    return build_network("unet", channels, {"encoder": encoder, "width": 4})


def test_a_timm_encoder_fills_ours_with_its_classes_left_out():
    torch.manual_seed(0)
    photos = timm.create_model("mobilenetv3_small_050")
    module = unet()
    decoder = module.decoder.blocks[0].conv1[0].weight.clone()
    report = load_pretrained(module, content(photos.state_dict()))
    assert report.adapted == ("encoder.model.conv_stem.weight",)
    assert report.fresh
    assert all(name.startswith(("decoder.", "segmentation_head.")) for name in report.fresh)
    assert torch.equal(module.encoder.model.blocks[0][0].conv_dw.weight, photos.blocks[0][0].conv_dw.weight)
    assert torch.equal(module.decoder.blocks[0].conv1[0].weight, decoder)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 13])
def test_first_layers_are_adapted_as_timm_does(channels):
    """timm's own rule, where it has the numbers of a pretrained network."""
    weight = torch.randn(8, 3, 3, 3)
    expected = timm.models.adapt_input_conv(channels, weight)
    torch.testing.assert_close(adapt_channels(weight, channels), expected)


def test_an_encoder_of_smp_fills_ours():
    torch.manual_seed(0)
    peer = smp.encoders.get_encoder("mobilenet_v2", in_channels=3, weights=None)
    module = unet(3, "mobilenet_v2")
    report = load_pretrained(module, content(peer.state_dict()))
    assert report.adapted == report.unused == ()
    x_bcyx = torch.randn(1, 3, 64, 64)
    module.eval()
    for ours, theirs in zip(module.encoder(x_bcyx), peer.eval()(x_bcyx), strict=True):
        assert torch.equal(ours, theirs)


def test_a_whole_network_is_taken_up_and_fits_more_channels():
    torch.manual_seed(0)
    before = build_network("resunet", 4, {"width": 4})
    same, more = build_network("resunet", 4, {"width": 4}), build_network("resunet", 6, {"width": 4})
    report = load_pretrained(same, content(before.state_dict()))
    assert report.fresh == report.unused == report.adapted == ()
    assert all(torch.equal(tensor, before.state_dict()[key]) for key, tensor in same.state_dict().items())
    report = load_pretrained(more, content(before.state_dict()))
    assert report.adapted == ("encoder.units.0.body.0.weight", "encoder.units.0.around.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: b"\x80\x04pickle", "are a pickle that is called safetensors"),
        (lambda tensors: b"nothing", "no safetensors file"),
        (lambda tensors: content({"a": torch.ones(1)}), "fit nowhere: the file holds a, the network encoder"),
        (lambda tensors: content({**tensors, "conv_stem.weight": torch.ones(16, 3, 5, 5)}), "the shape of"),
        (
            lambda tensors: content({**tensors, "blocks.0.1.conv.weight": torch.ones(1)}),
            "hold what the network has not",
        ),
        (lambda tensors: content(dict(list(tensors.items())[:-30])), "leave a part of the encoder out"),
        (
            lambda tensors: content({**tensors, "conv_stem.weight": torch.full((16, 3, 3, 3), torch.nan)}),
            "is not finite",
        ),
        (
            lambda tensors: content({**tensors, "blocks.0.0.se.conv_reduce.weight": torch.ones(8, 15, 1, 1)}),
            "has other channels, and is no first layer",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change, message):
    module = unet(3)
    kept = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    tensors = {
        key.removeprefix("encoder.model."): tensor
        for key, tensor in kept.items()
        if key.startswith("encoder.model.")
    }
    with pytest.raises(ModelError, match=message) as caught:
        load_pretrained(module, change(tensors))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, module.state_dict()[key]) for key, tensor in kept.items())


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
def test_the_hub_cache_is_read_and_nothing_downloaded(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not in the hub cache of this machine, and nothing is downloaded"):
        cached_weights(encoder)
    with pytest.raises(ModelError, match="No encoder 'resnet19'"):
        cached_weights("resnet19")
    if encoder == "tu-resnet18":
        repository, revision = timm.get_pretrained_cfg("resnet18").hf_hub_id, "0" * 40
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(revision)
    else:
        settings = smp.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]
        revision = settings["revision"]
        folder = tmp_path / f"models--{settings['repo_id'].replace('/', '--')}"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "snapshots" / revision / "model.safetensors").write_bytes(b"weights")
    assert cached_weights(encoder) == b"weights"


def test_encoders_that_were_never_published_with_weights_are_said():
    name = next(name for name in timm.list_models() if not timm.models.is_model_pretrained(name))
    with pytest.raises(ModelError, match=f"Encoder 'tu-{name}' has no published weights"):
        cached_weights(f"tu-{name}")
