"""`[detect] model` names networks: they are found, checked, copied into the workspace, and pinned by the plan."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pystac
import pytest

from slidecube.models.network_card import read_card, write_card
from slidecube.models.registry import save_network, verify_files
from slidecube.pipeline import model_registry, storage
from slidecube.pipeline.config import load_config
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.model_stac import write_model_item
from slidecube.pipeline.open import open_inventory
from slidecube.pipeline.plan import named_plan, plan
from slidecube.pipeline.run import run
from slidecube.pipeline.storage import place_of, sizes
from slidecube.pipeline.summaries import plan_summary


@pytest.fixture(scope="module")
def small(servers):
    return servers("small_networks")


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """The user's own folder."""
    folder = tmp_path / "mine"
    monkeypatch.setenv("SLIDECUBE_MODELS", str(folder))
    return folder


def naming(desk, *models: object):
    desk.write(detect={"model": [str(m) for m in models] if len(models) > 1 else str(models[0])})
    return load_config(desk.toml)


def held(workspace) -> dict[str, int]:
    """Files of the workspace's models; a lock beside them is none."""
    found = sizes(place_of(workspace) / "models", deep=True)
    return {name: size for name, size in found.items() if not name.startswith(".")}


def test_a_network_is_adopted_and_its_own_folder_is_needed_no_more(desk, mine, small):
    card = small.save(mine)
    desk.write(output={"formats": ["parquet", "stac"]})
    made = plan(naming(desk, "small"))

    assert made.card.address == "small@1"
    assert made.card.content_sha256 == card.identity
    assert set(held(desk.workspace)) == {"small@1/card.toml", "small@1/weights.safetensors"}
    shutil.rmtree(mine)
    again = plan(load_config(desk.toml))
    assert (again.run, again.card) == (made.run, made.card)
    report = run(load_config(desk.toml), progress=False)
    assert report.complete, report.reasons
    found = open_inventory(str(desk.workspace))["probability"].isel(epoch=0)
    assert int(found.notnull().sum()) > 0
    assert named_plan(load_config(desk.toml), made.run).card == made.card
    item = pystac.Item.from_file(
        desk.workspace / "products" / made.inventory / "stac" / f"{made.inventory}.json"
    )
    (network,) = [link for link in item.links if link.rel == "derived_from" and link.title == "small@1"]
    of_network = pystac.Item.from_file(network.get_absolute_href())
    assert of_network.properties["slidecube:identity"] == card.identity
    for asset in of_network.assets.values():
        assert Path(asset.get_absolute_href()).parent == desk.workspace / "models" / "small@1"
        assert Path(asset.get_absolute_href()).is_file()
    assert item.properties["slidecube:model"]["content_sha256"] == card.identity
    assert "SIMULATED" in item.properties["slidecube:model"]["training"]


def test_weights_of_another_architecture_are_refused_before_they_are_adopted(desk, mine, small):
    """The card vouches for its file, which holds what three features need; no tile is made to find that out."""
    said = small.fields()
    save_network(mine / "small@1", said, small.weights(channels=3))

    with pytest.raises(
        PipelineError, match=r"Weights of model small@1: tensor \S+ has the shape .* and not"
    ) as refused:
        plan(naming(desk, "small"))
    assert "\n" not in str(refused.value)
    assert held(desk.workspace) == {}


def test_a_network_is_adopted_into_a_bucket(desk, mine, small, s3):
    small.save(mine)
    desk.write(output={"workspace": s3})
    made = plan(naming(desk, "small"))
    shutil.rmtree(mine)

    assert set(held(s3)) == {"small@1/card.toml", "small@1/weights.safetensors"}
    found = plan(load_config(desk.toml))
    assert found.card == made.card
    assert found.model.card == made.card  # loaded from the bucket
    # another run finds it there by its name
    desk.write(detect={"threshold": 0.6})
    other = plan(load_config(desk.toml))
    assert other.card.content_sha256 == made.card.content_sha256
    assert other.card.threshold == 0.6
    assert [e.detect_key for e in other.epochs] != [e.detect_key for e in made.epochs]


def test_the_item_of_a_bucket_s_network_leads_to_the_bucket(desk, mine, small, s3, tmp_path):
    small.save(mine)
    desk.write(output={"workspace": s3})
    made = plan(naming(desk, "small"))
    out = tmp_path / "scratch" / "products" / made.inventory
    at = write_model_item(made, out, made.workspace.products(made.inventory))

    assets = json.loads(at.read_text())["assets"].values()
    assert {asset["href"] for asset in assets} == {
        "../../../models/small@1/card.toml",
        "../../../models/small@1/weights.safetensors",
    }
    assert re.search(
        rf"^network +small@1, {made.card.content_sha256[:12]}: resunet",
        plan_summary(made, newest=""),
        re.MULTILINE,
    )


@pytest.mark.parametrize("form", ["path", "relative", "version", "name"])
def test_a_network_is_named_in_four_ways(desk, mine, small, form):
    small.save(mine)
    small.save(mine, version=2, seed=1)
    shutil.copytree(mine / "small@1", desk.folder / "nets" / "kept")
    said = {"path": mine / "small@1", "relative": "./nets/kept", "version": "small@1", "name": "small"}[form]
    made = plan(naming(desk, said))

    assert made.card.address == ("small@2" if form == "name" else "small@1")


def test_another_network_of_the_same_name_is_another_plan_and_key(desk, mine, small):
    small.save(mine)
    first = plan(naming(desk, "small"))
    small.save(mine, version=2, seed=1)

    assert plan(load_config(desk.toml)).run == first.run  # a plan is frozen
    second = plan(load_config(desk.toml), refresh=True)
    assert second.card.address == "small@2"
    assert second.run != first.run
    assert [e.detect_key for e in second.epochs] != [e.detect_key for e in first.epochs]
    assert second.inventory != first.inventory
    assert [layer.key for layer in second.layers] == [layer.key for layer in first.layers]


def test_a_folder_that_holds_another_network_now_is_no_longer_what_was_planned_with(
    command, desk, mine, small
):
    """The TOML is the same to the letter; the map must not be that of the weights that lay there before."""
    folder = mine / "here"
    small.save(mine)
    shutil.move(mine / "small@1", folder)
    first = plan(naming(desk, folder))
    assert plan(load_config(desk.toml)).run == first.run

    shutil.rmtree(folder)
    small.save(mine, seed=1)
    shutil.move(mine / "small@1", folder)
    assert "The workspace holds another model small@1 already" in command("plan", desk.toml).refusal

    shutil.rmtree(folder)
    small.save(mine, seed=1, version=2)
    shutil.move(mine / "small@2", folder)
    second = plan(load_config(desk.toml))
    assert second.card.address == "small@2"
    assert [e.detect_key for e in second.epochs] != [e.detect_key for e in first.epochs]
    assert [layer.key for layer in second.layers] == [layer.key for layer in first.layers]


def test_a_list_of_folders_is_looked_at_again(desk, mine, small):
    for name, seed in (("one", 0), ("two", 1)):
        small.save(mine, name=name, seed=seed)
    first = plan(naming(desk, mine / "one@1", mine / "two@1"))
    assert plan(load_config(desk.toml)).run == first.run
    shutil.rmtree(mine / "two@1")
    assert plan(load_config(desk.toml)).run == first.run, "what is gone lies in the workspace"
    small.save(mine, name="two", seed=2)

    assert plan(load_config(desk.toml)).card.address != first.card.address


def test_networks_in_a_list_are_averaged(desk, mine, small):
    small.save(mine, name="one")
    small.save(mine, name="two", seed=1, names=["ndvi_pre", "slope_deg"], output={"threshold": 0.7})
    made = plan(naming(desk, "one", mine / "two@1"))
    shutil.rmtree(mine)
    card = verify_files(desk.workspace / "models" / made.card.address)

    assert re.fullmatch(r"mean-[0-9a-f]{8}@1", made.card.address)
    assert made.card.inputs.names == ("rdndvi", "slope_deg", "ndvi_pre")
    assert made.card.threshold == pytest.approx(0.6)
    assert card.simulated
    assert card.description.startswith("Mean of one@1, two@1")
    assert plan(load_config(desk.toml)).model.card == made.card


REFUSED = {
    "unknown name": (
        "smal",
        {},
        r"No model 'smal' \(did you mean 'small'\?\); models: rdndvi, aldi, .*small",
    ),
    "unknown version": ("small@9", {}, r"No version 9 of model 'small'; versions: 1"),
    "no folder": ("./none", {}, r"none/card\.toml: cannot be read"),
    "parameters": ("small", {"detect": {"parameters": {"k": 3}}}, "is a network, .* leave parameters out of"),
    "features": ("small", {"detect": {"features": ["dndvi"]}}, "is a network, .* leave features out of"),
    "clusters": (
        "small",
        {"detect": {"landslide_clusters": {"0" * 16: [1]}}},
        "is a network, .* leave landslide_clusters out of",
    ),
    "components": ("small", {"fit": {"mnf_components": 3}}, "is a network, .* leave mnf_components"),
    "resolution": (
        "small",
        {"area": {"resolution_m": 20}},
        "pixels of 10 m, and those of the run have 20 m",
    ),
    "bands": (
        "small",
        {"cube": {"bands": ["B02", "B03"]}},
        r"Model small@1 needs band B0[48]; \[cube\] bands holds",
    ),
}


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_fit_is_refused_in_one_line_and_not_adopted(
    command, desk, mine, small, name, changes, said
):
    small.save(mine)
    desk.write(**changes)
    naming(desk, name)
    done = command("plan", desk.toml)

    assert done.code == 1
    assert re.search(said, done.refusal), done.refusal
    assert done.refusal.startswith(f"{desk.toml}: ")
    assert held(desk.workspace) == {}


def test_features_and_units_of_another_build_are_refused(command, desk, mine, small):
    inputs = {**small.fields()["inputs"], "names": ["rdndvi", "sloppy"]}
    small.save(mine, inputs=inputs)
    small.save(mine, name="other", inputs={**inputs, "names": ["rdndvi", "slope_deg"], "units": ["%", "rad"]})

    naming(desk, "small")
    assert "No feature 'sloppy'" in command("plan", desk.toml).refusal
    naming(desk, "other")
    assert (
        "reads slope_deg in 'rad', and this build makes it in 'degree'" in command("plan", desk.toml).refusal
    )
    assert held(desk.workspace) == {}


def test_a_list_of_what_cannot_be_averaged_is_refused(command, desk, mine, small):
    small.save(mine, name="one")
    small.save(mine, name="far", seed=1, inputs={**small.fields()["inputs"], "resolution_m": 20.0})
    for models, said in (
        (("one", "rdndvi"), "'rdndvi' is a rule and has no place among networks that are averaged"),
        (("one", "far"), "one@1 and far@1 cannot be averaged: their resolution_m is 10 and 20"),
        (("one", "one@1"), "one@1 is named twice in an ensemble"),
    ):
        naming(desk, *models)
        assert said in command("plan", desk.toml).refusal
    desk.write(detect={"model": []})
    assert "detect.model: got []; allowed: a model's name" in command("plan", desk.toml).refusal
    desk.write(detect={"model": ["one", "one"]})
    assert "one is named twice" in command("plan", desk.toml).refusal
    assert held(desk.workspace) == {}


def test_another_network_of_the_same_address_is_refused(command, desk, mine, small, tmp_path):
    small.save(mine)
    plan(naming(desk, "small"))
    small.save(tmp_path / "theirs", seed=1)
    naming(desk, tmp_path / "theirs" / "small@1")

    assert "The workspace holds another model small@1 already" in command("plan", desk.toml).refusal
    assert verify_files(desk.workspace / "models/small@1").identity == read_card(mine / "small@1").identity


def spoil_weights(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"1234")


def spoil_card(folder: Path) -> None:
    card = read_card(folder)
    inputs = card.inputs.model_copy(update={"mean": (5.0, 5.0)})
    write_card(folder, card.model_copy(update={"inputs": inputs}))


def swap(folder: Path) -> None:
    other = folder.parents[2] / "other"
    shutil.copytree(other, folder, dirs_exist_ok=True)


SPOILT = {
    "weights": (
        spoil_weights,
        "Weights of model small@1 are damaged or were changed: {ws}/models/small@1/weights",
    ),
    "card": (
        spoil_card,
        "small@1 of the workspace is not the one that was planned with: {ws}/models/small@1/card",
    ),
    "gone": (shutil.rmtree, "Model small@1 is not in the workspace any more; put {ws}/models/small@1 back"),
    "card alone": (lambda f: (f / "card.toml").unlink(), "Model small@1 is not in the workspace any more"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=list(SPOILT))
def test_what_is_not_what_was_planned_with_is_refused(command, desk, mine, small, spoil, said):
    small.save(mine)
    made = plan(naming(desk, "small"))
    spoil(desk.workspace / "models" / "small@1")

    with pytest.raises(PipelineError, match=re.escape(said.format(ws=desk.workspace))):
        model_registry.load_adopted(made.workspace, made.card)
    if spoil is not spoil_weights:  # which only those read that compute
        assert said.format(ws=desk.workspace) in command("run", desk.toml, "--quiet").refusal


def test_a_bucket_s_model_is_checked_as_well_and_named_by_its_place(desk, mine, small, s3):
    small.save(mine)
    desk.write(output={"workspace": s3})
    made = plan(naming(desk, "small"))
    storage.write_atomic(place_of(s3) / "models" / "small@1" / "weights.safetensors", b"0" * 100)
    with pytest.raises(
        PipelineError, match=re.escape(f"changed: {s3}/models/small@1/weights.safetensors has")
    ):
        model_registry.load_adopted(made.workspace, made.card)


@pytest.mark.parametrize("bucket", [False, True], ids=["folder", "bucket"])
def test_adoption_that_is_broken_off_is_nowhere_and_may_be_repeated(
    desk, mine, small, request, monkeypatch, bucket
):
    """Broken off between the weights and the card: no reader sees a model, and the next plan adopts it."""
    small.save(mine)
    workspace = request.getfixturevalue("s3") if bucket else desk.workspace
    desk.write(output={"workspace": str(workspace)})

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(*((storage, "create", dies) if bucket else (Path, "rename", dies)))
        with pytest.raises(KeyboardInterrupt):
            plan(naming(desk, "small"))
    assert "small@1/card.toml" not in held(workspace)
    assert model_registry.held(place_of(workspace) / "models") == ()
    assert plan(load_config(desk.toml)).card.address == "small@1"
    assert set(held(workspace)) == {"small@1/card.toml", "small@1/weights.safetensors"}


def test_workers_look_into_no_other_place(desk, mine, small, monkeypatch):
    small.save(mine)
    made = plan(naming(desk, "small"))
    monkeypatch.setattr(
        model_registry, "user_root", lambda: pytest.fail("a worker looked into the user's folder")
    )
    monkeypatch.setattr(
        model_registry, "shipped_root", lambda: pytest.fail("a worker looked into the package")
    )

    assert plan(load_config(desk.toml)).model.card == made.card
    assert os.environ["SLIDECUBE_MODELS"]


def test_the_list_shows_the_workspace_s_own(command, desk, mine, small):
    small.save(mine)
    plan(naming(desk, "small"))
    shutil.rmtree(mine)
    done = command("models", "list", "--workspace", desk.workspace)

    assert re.search(r"^small@1 .* workspace$", done.out, re.MULTILINE)
    assert command("models", "verify", "small", "--workspace", desk.workspace).code == 0
