"""`slidecube models`: what it prints, what it takes and gives, and what it refuses in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pystac
import pystac.validation
import pytest
import torch
from pystac.extensions.mlm import MLMExtension

from slidecube.models.architectures import build_network
from slidecube.models.network_card import read_card
from slidecube.models.registry import save_ensemble, verify_files


@pytest.fixture(scope="module")
def small(servers):
    return servers("small_networks")


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """The user's own folder."""
    folder = tmp_path / "mine"
    monkeypatch.setenv("SLIDECUBE_MODELS", str(folder))
    return folder


def test_the_list_holds_rules_and_networks_and_says_simulated(command, mine, small):
    small.save(mine)
    small.save(mine, version=2, simulated=False, licence="CC-BY-4.0")
    lines = command("models", "list").out.splitlines()

    assert lines[0].split() == ["model", "architecture", "inputs", "score", "licence", "where"]
    assert any(line.startswith("rdndvi@1 ") and line.endswith("slidecube") for line in lines)
    (one,) = [line for line in lines if line.startswith("small@1 ")]
    assert re.fullmatch(
        r"small@1 +resunet \(depth=2, width=8\) +rdndvi, slope_deg +F1 0\.250 \(simulated\) +CC0-1\.0 +yours",
        one,
    )
    (two,) = [line for line in lines if line.startswith("small@2 ")]
    assert "F1 0.250 " in two
    assert "simulated" not in two


def test_a_broken_card_does_not_hide_the_others(command, mine, small):
    small.save(mine)
    small.save(mine, name="broken")
    (mine / "broken@1" / "card.toml").write_text("x = ")
    done = command("models", "list")

    assert done.code == 0
    assert "small@1 " in done.out
    assert re.search(r"^broken@1 \(yours\): .*card\.toml: not valid TOML", done.out, re.MULTILINE)
    rows = {row["model"]: row for row in json.loads(command("models", "list", "--json").out)}
    assert rows["small@1"]["simulated"] is True
    assert "not valid TOML" in rows["broken@1"]["error"]


def test_the_receptive_field_is_measured_on_import_and_a_narrow_margin_is_told(command, mine, tmp_path):
    module = build_network("resunet", 1, {"width": 4, "depth": 1})
    torch.save(module.state_dict(), tmp_path / "w.pt")
    words = ["models", "import", tmp_path / "w.pt", "--architecture", "resunet", "--arguments", "width=4"]
    words += [
        "--arguments",
        "depth=1",
        "--features",
        "rdndvi",
        "--mean",
        "0",
        "--std",
        "1",
        "--threshold",
        "0.5",
    ]
    words += ["--licence", "MIT", "--description", "random"]
    assert (
        "warning: margin_px = 0 is below half of the receptive field"
        in command(*words, "--name", "narrow", "--margin-px", "0").out
    )
    assert "warning" not in command(*words, "--name", "wide", "--margin-px", "32").out
    shown = json.loads(command("models", "show", "wide", "--json").out)
    assert shown["architecture"]["receptive_px"] % 2 == 1
    short, whole = command("models", "show", "wide").out, command("models", "show", "wide", "--all").out
    assert len(short.splitlines()) < 20
    assert "weights" not in short
    assert "sha256" in whole
    refused = command(
        *words[: words.index("rdndvi")], "rdndvj", *words[words.index("rdndvi") + 1 :], "--name", "x"
    ).refusal
    assert "did you mean 'rdndvi'" in refused
    assert "say --layer rdndvj" in refused


def test_a_card_is_shown(command, mine, small):
    card = small.save(mine)
    text = command("models", "show", "small").out
    shown = json.loads(command("models", "show", "small@1", "--json").out)

    assert "SIMULATED" in text
    assert "rdndvi, slope_deg" in text
    assert shown["identity"] == card.identity
    assert shown["inputs"]["names"] == ["rdndvi", "slope_deg"]
    assert json.loads(command("models", "show", "rdndvi", "--json").out)["version"] == 1
    assert command("models", "show", "smal").refusal.startswith("No model 'smal' (did you mean 'small'?)")
    assert command("models", "show", mine / "none").refusal.startswith(
        f"{mine}/none/card.toml: cannot be read"
    )


def test_verify_says_which_fail(command, mine, small):
    small.save(mine)
    small.save(mine, name="spoilt")
    file = mine / "spoilt@1" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"1234")
    done = command("models", "verify", "--all")

    assert done.code == 1
    assert re.search(r"^ok +small@1  files are those of the card", done.out, re.MULTILINE)
    assert re.search(r"^fail +spoilt@1  Weights of model spoilt@1 are damaged", done.out, re.MULTILINE)
    assert command("models", "verify", "small").code == 0
    assert command("models", "verify", mine / "small@1").code == 0
    assert command("models", "verify", "rdndvi").code == 0
    assert "name one model, or say --all" in command("models", "verify").refusal


def test_verify_refuses_units_that_this_build_does_not_make(command, mine, small):
    inputs = {**small.fields()["inputs"], "units": ["1", "degree"]}
    small.save(mine, inputs=inputs)

    assert "reads rdndvi in '1', and this build makes it in '%'" in command("models", "verify", "small").out


OPTIONS = {
    "--name": "theirs",
    "--architecture": "resunet",
    "--arguments": ["width=8", "depth=2"],
    "--features": "rdndvi,slope_deg",
    "--mean": "0,12.5",
    "--std": "10",
    "--window-px": "64",
    "--margin-px": "8",
    "--threshold": "0.4",
    "--licence": "CC-BY-4.0",
    "--description": "Somebody's network",
}


def options(**changes: object) -> list[str]:
    said = OPTIONS | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
    return [
        word
        for key, value in said.items()
        if value is not None
        for one in (value if isinstance(value, list) else [value])
        for word in (key, str(one))
    ]


@pytest.fixture
def weights(tmp_path, small) -> Path:
    path = tmp_path / "theirs.pt"
    torch.save({f"module.{k}": v for k, v in small.module().state_dict().items()}, path)
    return path


def test_a_state_dict_is_imported_and_works(command, mine, small, weights):
    done = command("models", "import", weights, *options())
    card = verify_files(mine / "theirs@1")

    assert done.code == 0, done.err
    assert "took 'module.' off the names" in done.out
    assert "imported theirs@1 into" in done.out
    assert card.inputs.units == ("%", "degree")
    assert card.inputs.mean == (0.0, 12.5)
    assert card.inputs.std == (10.0, 10.0)
    assert card.training["imported_from"] == "theirs.pt"
    assert command("models", "verify", "theirs").code == 0
    # the same file again is the next version, and not another model of the same name
    assert "imported theirs@2" in command("models", "import", weights, *options()).out
    assert "imported theirs@1" in command("models", "import", weights, *options(version=1)).out


def test_a_card_without_weights_serves_as_well(command, mine, small, weights, tmp_path):
    assert command("models", "import", weights, *options()).code == 0
    text = (mine / "theirs@1" / "card.toml").read_text()
    draft = text[: text.index("[weights]")] + text[text.index("[training]") :]
    (tmp_path / "draft.toml").write_text(draft)
    shutil.rmtree(mine)

    assert command("models", "import", weights, "--card", tmp_path / "draft.toml").code == 0
    assert read_card(mine / "theirs@1").identity
    both = command("models", "import", weights, "--card", tmp_path / "draft.toml", "--threshold", "0.5")
    assert both.refusal == "--card says all of a model; leave --threshold out"
    (tmp_path / "draft.toml").write_text(text)
    assert "draft.toml: weights: is written when weights are imported" in (
        command("models", "import", weights, "--card", tmp_path / "draft.toml").refusal
    )


REFUSED = {
    "unknown feature": (
        {"features": "rdndvi,slop_deg"},
        r"No feature 'slop_deg' \(did you mean 'slope_deg'\?\)",
    ),
    "one channel more": (
        {"features": "rdndvi,slope_deg,ndvi_pre", "mean": "0"},
        "reads 2 channels; name 2 features",
    ),
    "no mean": ({"mean": None}, r"missing: inputs\.mean$"),
    "means of another number": ({"mean": "1,2,3"}, "has 2 names and 3 of mean"),
    "no number": ({"std": "a,b"}, "--std: got 'a,b'; numbers between commas are allowed"),
    "no threshold": ({"threshold": None}, r"missing: output\.threshold$"),
    "no licence": ({"licence": None}, "missing: licence$"),
    "another network": ({"arguments": ["width=8", "depth=3"]}, "check architecture and arguments"),
    "unknown argument": ({"arguments": ["wide=8"]}, "wide"),
    "unknown architecture": ({"architecture": "resnet"}, "No architecture 'resnet'"),
    "name of a rule": ({"name": "rdndvi"}, "Name 'rdndvi' is that of a rule of slidecube"),
    "name with a space": ({"name": "The Net"}, "name: got 'The Net'"),
    "output of a state dict": ({"output": "logit"}, "output says what an ONNX gives"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(command, mine, weights, changes, said):
    done = command("models", "import", weights, *options(**changes))

    assert done.code == 1
    assert re.search(said, done.refusal), done.refusal
    assert not mine.exists()


def test_a_feature_that_a_toml_brings_is_named_as_such(command, mine, small, tmp_path):
    torch.save(small.module().state_dict(), tmp_path / "w.pt")
    said = options(features="rdndvi,climate")

    assert "No feature 'climate'" in command("models", "import", tmp_path / "w.pt", *said).refusal
    assert command("models", "import", tmp_path / "w.pt", *said, "--layer", "climate").code == 0
    assert read_card(mine / "theirs@1").inputs.units[1] == "its own"


def test_an_onnx_goes_out_and_comes_in_again(command, mine, small, tmp_path):
    small.save(mine)
    assert command("models", "export", "small", "--onnx", tmp_path / "small.onnx").code == 0
    model = onnx.load(tmp_path / "small.onnx")
    x = np.random.default_rng(0).standard_normal((2, 2, 64, 64)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = small.module()(torch.from_numpy(x)).numpy()

    np.testing.assert_allclose(session.run(None, {"x": x})[0], wanted, atol=1e-4)
    assert {prop.key: prop.value for prop in model.metadata_props}["slidecube"] == "small@1"
    said = options(name="again", architecture=None, arguments=None)
    assert "nothing says what its numbers are; give --output" in (
        command("models", "import", tmp_path / "small.onnx", *said).refusal
    )
    done = command("models", "import", tmp_path / "small.onnx", *said, "--output", "logit")
    assert done.code == 0, done.err
    card = verify_files(mine / "again@1")
    assert card.architecture.name == "onnx"
    assert card.weights.file == "model.onnx"
    assert command("models", "verify", "again").code == 0


def test_export_copies_a_model_that_works_elsewhere(command, mine, small, tmp_path):
    small.save(mine, name="one")
    small.save(mine, name="two", seed=1)
    fields = {k: v for k, v in small.fields(name="both").items() if k != "architecture"}
    save_ensemble(mine / "both@1", [mine / "one@1", mine / "two@1"], fields)
    (mine / "both@1" / "notes.txt").write_text("private")
    out = tmp_path / "out"

    assert command("models", "export", "both", "--out", out).code == 0
    shutil.rmtree(mine)
    assert command("models", "verify", out).code == 0
    assert not (out / "notes.txt").exists()
    assert "is there already, and is left as it is" in command("models", "export", out, "--out", out).refusal
    assert (
        "is an ensemble of one@1, two@1"
        in command("models", "export", out, "--onnx", tmp_path / "x.onnx").refusal
    )
    assert "is a rule" in command("models", "export", "rdndvi", "--out", tmp_path / "y").refusal
    assert "say what to write" in command("models", "export", out).refusal


@pytest.mark.parametrize("kind", ["network", "ensemble"])
def test_the_item_is_an_mlm_item(command, mine, small, tmp_path, kind):
    """pystac's own MLM extension, 1.4, is the oracle; the core schema ships with it."""
    card = small.save(mine, metrics={"f1": 0.25, "f1_interval": [0.1, 0.3]}, created="2026-01-02T03:04:05Z")
    name = "small"
    if kind == "ensemble":
        small.save(mine, name="two", seed=1)
        fields = {k: v for k, v in small.fields(name="both").items() if k != "architecture"}
        card, name = save_ensemble(mine / "both@1", [mine / "small@1", mine / "two@1"], fields), "both"
    at = tmp_path / "out" / "item.json"
    assert command("models", "export", name, "--stac", at).code == 0
    body = json.loads(at.read_text())
    pystac.validation.validate_dict({**body, "stac_extensions": []})
    item = pystac.Item.from_file(at)
    mlm = MLMExtension.ext(item)

    assert mlm.mlm_name == f"slidecube {card.name} 1"
    assert mlm.architecture
    assert mlm.tasks == ["semantic-segmentation"]
    (reads,) = mlm.input
    assert reads.bands == ["rdndvi", "slope_deg"]
    assert reads.input.shape == [-1, 2, 64, 64]
    # pystac takes one scaling for all; the published schema wants a list, one a band
    scaling = body["properties"]["mlm:input"][0]["value_scaling"]
    assert scaling == [{"type": "z-score", "mean": 0.0, "stddev": 10.0}] * 2
    (gives,) = mlm.output
    assert [c.name for c in gives.classes] == ["no_landslide", "landslide"]
    members = 2 if kind == "ensemble" else 1
    assert mlm.total_parameters == members * sum(p.numel() for p in small.module().parameters())
    assert "SIMULATED" in item.properties["description"]
    assert item.properties["slidecube:simulated"] is True
    models = [asset for asset in item.assets.values() if "mlm:model" in asset.roles]
    assert len(models) == members
    for asset in item.assets.values():
        assert Path(asset.get_absolute_href()).is_file()
    assert str(tmp_path) not in at.read_text()


def test_architectures_are_listed_with_their_arguments(command):
    lines = command("models", "architectures").out.splitlines()
    assert any(re.match(r"resunet +width=16, depth=3  Zhang", line) for line in lines)
