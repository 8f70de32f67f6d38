"""Models are found, saved whole or not at all, never changed, and refused when they are not what their card says."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from slidecube.models import registry
from slidecube.models.errors import ModelError
from slidecube.models.network_card import Calibration, read_card, write_card
from slidecube.models.registry import (
    find_model,
    free_version,
    held_in,
    load_model,
    save_ensemble,
    shipped_root,
    user_root,
    verify_files,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def small(servers):
    return servers("small_networks")


def test_the_newest_version_is_taken_unless_one_is_named(tmp_path, small):
    for version in (1, 2, 10):
        small.save(tmp_path / "a", version=version)

    assert find_model("small", [tmp_path / "a"]).name == "small@10"
    assert find_model("small@2", [tmp_path / "a"]).name == "small@2"
    assert held_in(tmp_path / "a") == ("small@1", "small@2", "small@10")
    assert free_version(tmp_path / "a", "small") == 11
    assert free_version(tmp_path / "a", "other") == 1


def test_the_first_root_counts_and_a_newer_version_elsewhere_counts_more(tmp_path, small):
    a, b = tmp_path / "a", tmp_path / "b"
    small.save(a)
    small.save(b)
    small.save(b, version=2)

    assert find_model("small@1", [a, b]) == a / "small@1"
    assert find_model("small", [a, b]) == b / "small@2"
    assert find_model("small", [a, tmp_path / "none"]) == a / "small@1"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("smal", r"No model 'smal' \(did you mean 'small'\?\); models: small"),
        ("small@3", r"No version 3 of model 'small'; versions: 1"),
        ("Small Net", r"'Small Net' is no address of a model"),
        ("small@0", r"'small@0' is no address of a model"),
        ("../small", r"is no address of a model"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest_name(tmp_path, small, address, said):
    small.save(tmp_path)

    with pytest.raises(ModelError, match=said):
        find_model(address, [tmp_path])


def test_what_was_saved_is_loaded(tmp_path, small):
    card = small.save(tmp_path)
    detector = load_model(tmp_path / "small@1", threshold=0.7)
    shutil.rmtree(tmp_path / "small@1")  # all was read at once

    assert detector.card.content_sha256 == card.identity
    assert detector.card.threshold == 0.7
    assert detector.card.window_px == 127
    side = 16 + 2 * (127 // 2)
    zeros = detector.predict_block(np.zeros((2, side, side), np.float32))
    ones = detector.predict_block(np.ones((2, side, side), np.float32) * 30)
    assert zeros.shape == (16, 16)
    assert np.isfinite(zeros).all()
    assert not np.array_equal(zeros, ones)


def test_a_saved_version_never_changes(tmp_path, small):
    card = small.save(tmp_path)

    assert small.save(tmp_path) == card  # the same again is no change
    with pytest.raises(ModelError, match=r"holds another model already .*; save this one as small@2"):
        small.save(tmp_path, seed=1)
    assert verify_files(tmp_path / "small@1") == card
    assert names_in(tmp_path) == ["small@1"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": {"threshold": 0.9, "min_area_m2": 500.0}}, r"output\.threshold"),
        ({"output": {"threshold": 0.5, "min_area_m2": 900.0}}, r"output\.min_area_m2"),
        ({"licence": "CC-BY-4.0"}, "licence"),
        ({"metrics": {"f1": 0.5, "iou": 0.3}}, r"metrics\.f1, metrics\.iou"),
    ],
)
def test_the_same_weights_under_another_card_are_another_model(tmp_path, small, changes, said):
    card = small.save(tmp_path)
    small.save(tmp_path, version=2)

    with pytest.raises(ModelError, match=rf"other {said}\), .*; save this one as small@3$"):
        small.save(tmp_path, **changes)
    assert read_card(tmp_path / "small@1") == card


def test_who_saves_again_is_given_the_card_that_lies_there(tmp_path, small):
    first = small.save(tmp_path, created="2026-01-01T00:00:00")

    assert small.save(tmp_path, created="2026-02-02T00:00:00", slidecube="99") == first
    assert read_card(tmp_path / "small@1") == first


def test_a_folder_of_something_else_stays_as_it_is(tmp_path, small):
    (tmp_path / "small@1").mkdir()
    (tmp_path / "small@1" / "thesis.doc").write_text("mine")

    with pytest.raises(ModelError, match="holds no model; remove it"):
        small.save(tmp_path)
    assert names_in(tmp_path) == ["small@1"]
    assert names_in(tmp_path / "small@1") == ["thesis.doc"]


def test_a_card_that_is_not_allowed_leaves_nothing(tmp_path, small):
    with pytest.raises(
        ModelError,
        match=r"Card of model 'small': output\.threshold: got 2; allowed: less than or equal to 0.9999",
    ):
        small.save(tmp_path, output={"threshold": 2})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("at", ["write_card", "rename"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child does nothing but write and die
def test_killed_on_the_way_nothing_is_there(tmp_path, small, at):
    """SIGKILL between the weights and the card, and between the card and the rename."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    said, content = small.fields(), small.weights()
    child = os.fork()
    if child == 0:
        try:
            if at == "rename":
                Path.rename = die
            else:
                registry.write_card = die
            registry.save_network(tmp_path / "small@1", said, content)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)

    assert os.WTERMSIG(status) == signal.SIGKILL
    assert any(tmp_path.rglob("weights.safetensors"))  # it was on its way
    assert held_in(tmp_path) == ()
    with pytest.raises(ModelError, match="No model 'small'; models: none"):
        find_model("small", [tmp_path])


def test_after_a_kill_the_same_is_saved(tmp_path, small, monkeypatch):
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "write_card", dies)
    with pytest.raises(KeyboardInterrupt):
        small.save(tmp_path)
    monkeypatch.undo()
    stale = tmp_path / ".small@1.00000000.partial"
    stale.mkdir()
    os.utime(stale, (0, 0))

    small.save(tmp_path)
    assert names_in(tmp_path) == ["small@1"]


DAMAGES = {
    "corrupted": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_weights_that_are_not_the_card_s_are_refused(tmp_path, small, damage):
    small.save(tmp_path)
    file = tmp_path / "small@1" / "weights.safetensors"
    file.write_bytes(damage(file.read_bytes()))

    for use in (verify_files, load_model):
        with pytest.raises(
            ModelError, match=r"Weights of model small@1 are damaged or were changed: .*SHA-256"
        ):
            use(tmp_path / "small@1")


def test_weights_swapped_between_two_networks_are_refused(tmp_path, small):
    small.save(tmp_path, name="one")
    small.save(tmp_path, name="two", seed=1)
    shutil.copy(tmp_path / "one@1/weights.safetensors", tmp_path / "two@1/weights.safetensors")

    with pytest.raises(ModelError, match="Weights of model two@1 are damaged or were changed"):
        load_model(tmp_path / "two@1")


def test_missing_weights_are_named(tmp_path, small):
    small.save(tmp_path)
    (tmp_path / "small@1/weights.safetensors").unlink()

    with pytest.raises(ModelError, match=r"Weights of model small@1 cannot be read from .*No such file"):
        load_model(tmp_path / "small@1")


@pytest.fixture
def pair(tmp_path, small):
    small.save(tmp_path, name="one")
    small.save(tmp_path, name="two", seed=1)
    return [tmp_path / "one@1", tmp_path / "two@1"]


def ensemble_fields(small) -> dict:
    said = small.fields(name="both")
    return {key: value for key, value in said.items() if key != "architecture"}


def test_an_ensemble_holds_its_members(tmp_path, small, pair):
    card = save_ensemble(tmp_path / "both@1", pair, ensemble_fields(small))
    for folder in pair:
        shutil.rmtree(folder)

    assert [member.folder for member in card.members] == ["one@1", "two@1"]
    assert verify_files(tmp_path / "both@1") == card
    detector = load_model(tmp_path / "both@1")
    assert detector.card.window_px == 127
    assert detector.card.content_sha256 == card.identity
    assert held_in(tmp_path) == ("both@1",)


def test_members_that_were_changed_are_refused(tmp_path, small, pair):
    save_ensemble(tmp_path / "both@1", pair, ensemble_fields(small))
    inside = tmp_path / "both@1" / "two@1"
    write_card(inside, read_card(inside).model_copy(update={"calibration": Calibration(temperature=3.0)}))

    for use in (verify_files, load_model):
        with pytest.raises(ModelError, match=r"both@1 was not made of the member that lies in .*two@1"):
            use(tmp_path / "both@1")


def test_an_ensemble_of_an_ensemble_or_of_one_twice_is_refused(tmp_path, small, pair):
    save_ensemble(tmp_path / "both@1", pair, ensemble_fields(small))

    with pytest.raises(ModelError, match="both@1 is an ensemble itself"):
        save_ensemble(tmp_path / "more@1", [tmp_path / "both@1", pair[0]], ensemble_fields(small))
    with pytest.raises(ModelError, match="one@1 is named twice"):
        save_ensemble(tmp_path / "more@1", [pair[0], pair[0]], ensemble_fields(small))
    with pytest.raises(ModelError, match="neither a network"):
        save_ensemble(tmp_path / "more@1", [], ensemble_fields(small))
    assert held_in(tmp_path) == ("both@1", "one@1", "two@1")


def test_two_networks_of_one_address_are_kept_apart(tmp_path, small):
    small.save(tmp_path / "a")
    small.save(tmp_path / "b", seed=1)
    folders = [tmp_path / "a/small@1", tmp_path / "b/small@1"]
    card = save_ensemble(tmp_path / "both@1", folders, ensemble_fields(small))

    assert len({member.folder for member in card.members}) == 2
    verify_files(tmp_path / "both@1")


def test_the_user_s_folder_is_told_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIDECUBE_MODELS", str(tmp_path / "mine"))
    assert user_root() == tmp_path / "mine"
    monkeypatch.delenv("SLIDECUBE_MODELS")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert user_root() == tmp_path / "slidecube" / "models"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert user_root() == Path.home() / ".local/share/slidecube/models"


def test_what_ships_is_what_its_cards_say():
    for name in held_in(shipped_root()):
        card = verify_files(shipped_root() / name)
        assert card.address == name
