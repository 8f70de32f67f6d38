"""Cards of networks: what is written is what is read, and what is wrong is said in one line."""

from __future__ import annotations

import re
import tomllib
from dataclasses import asdict

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from slidecube.models.errors import ModelError
from slidecube.models.network_card import (
    Architecture,
    Calibration,
    Inputs,
    Member,
    NetworkCard,
    Output,
    Weights,
    card_text,
    model_card,
    parse_card,
    read_card,
    write_card,
)

SHA = "0123456789abcdef" * 4

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORDS = TEXT.filter(bool)
NUMBER = st.floats(-1e12, 1e12)
POSITIVE = st.floats(1e-9, 1e9)
PLAIN = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
FACTS = st.dictionaries(TEXT, PLAIN, max_size=3)
NAME = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True)


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    names = draw(st.lists(WORDS, min_size=1, max_size=5, unique=True))
    n = len(names)
    return Inputs(
        names=tuple(names),
        units=tuple(draw(st.lists(TEXT, min_size=n, max_size=n))),
        mean=tuple(draw(st.lists(NUMBER, min_size=n, max_size=n))),
        std=tuple(draw(st.lists(POSITIVE, min_size=n, max_size=n))),
        resolution_m=draw(POSITIVE),
        version=draw(st.integers(1, 9)),
    )


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    window_px = draw(st.integers(32, 513))
    return Architecture(
        name=draw(WORDS),
        arguments=draw(
            st.dictionaries(WORDS, st.booleans() | st.integers(-9, 9) | NUMBER | TEXT, max_size=3)
        ),
        window_px=window_px,
        margin_px=draw(st.integers(0, (window_px - 1) // 2)),
        receptive_px=draw(st.integers(0, 999)),
    )


MEMBERS = st.lists(
    st.builds(Member, folder=st.from_regex(r"[a-z0-9][a-z0-9@._-]*", fullmatch=True), identity=st.just(SHA)),
    min_size=2,
    max_size=4,
)


@st.composite
def calibrations(draw: st.DrawFn, names: tuple[str, ...]) -> Calibration:
    points = draw(st.lists(NUMBER, min_size=1, max_size=4, unique=True).map(sorted))
    shares = draw(st.lists(st.floats(0, 1), min_size=len(points), max_size=len(points)).map(sorted))
    by = draw(st.sampled_from(("", *names)))
    classes = st.integers(-9, 9999).map(str)
    return Calibration(
        method=draw(st.sampled_from(["none", "temperature", "isotonic"])),
        temperature=draw(POSITIVE),
        logits=points,
        probabilities=shares,
        by=by,
        strata=draw(st.dictionaries(classes, POSITIVE, max_size=2)) if by else {},
    )


@st.composite
def cards(draw: st.DrawFn) -> NetworkCard:
    single = draw(st.booleans())
    parts = (
        {"architecture": draw(architectures()), "weights": Weights(file="weights.safetensors", sha256=SHA)}
        if single
        else {"members": tuple(draw(MEMBERS))}
    )
    read = draw(inputs())
    return NetworkCard(
        name=draw(NAME),
        version=draw(st.integers(1, 99)),
        description=draw(WORDS),
        licence=draw(WORDS),
        simulated=draw(st.booleans()),
        source=draw(TEXT),
        created=draw(TEXT),
        inputs=read,
        calibration=draw(calibrations(read.names)),
        output=draw(
            st.builds(Output, threshold=st.floats(0.001, 0.999), chosen=TEXT, min_area_m2=st.floats(0, 1e6))
        ),
        training=draw(FACTS),
        metrics=draw(FACTS),
        null_run=draw(FACTS),
        **parts,
    )


@given(card=cards())
def test_what_is_written_is_what_is_read(card):
    back = parse_card(card_text(card).encode(), "card.toml")

    assert back == card
    assert back.identity == card.identity
    assert card_text(back) == card_text(card)


def a_card(**changes: object) -> NetworkCard:
    tables = {
        "schema": 1,
        "name": "small",
        "version": 1,
        "description": "a network of a test",
        "licence": "CC-BY-4.0",
        "inputs": {"names": ["dndvi", "slope_deg"], "units": ["1", "deg"], "mean": [0, 1], "std": [1, 2]},
        "architecture": {"name": "resunet", "window_px": 128, "margin_px": 16},
        "output": {"threshold": 0.4},
        "weights": {"file": "weights.safetensors", "sha256": SHA},
    }
    return NetworkCard.model_validate(tables | changes)


def test_a_card_lies_whole_in_its_folder(tmp_path):
    write_card(tmp_path / "small@1", a_card())

    assert read_card(tmp_path / "small@1") == a_card()
    assert [path.name for path in (tmp_path / "small@1").iterdir()] == ["card.toml"]


def test_what_is_not_known_is_left_out(tmp_path):
    card = a_card(metrics={"f1": None, "ece": float("nan"), "by": {"iburi": 0.5, "noto": None}})
    write_card(tmp_path, card)

    assert card.metrics == {"by": {"iburi": 0.5}}
    assert read_card(tmp_path) == card


@pytest.mark.parametrize("bad", [{"f1": {1, 2}}, {"per": [0.1, None]}, {"of": b"x"}], ids=str)
def test_facts_are_plain(bad):
    with pytest.raises(ValueError, match=r"f1 is a set|per holds something unknown|of is a bytes"):
        a_card(metrics=bad)


BROKEN = {
    # what is edited by hand -> what the one line says
    (
        "threshold = 0.4",
        "treshold = 0.4",
    ): "output.treshold: unknown key (did you mean 'threshold'?); allowed: thresh",
    (
        "threshold = 0.4",
        "threshold = 1.5",
    ): "output.threshold: got 1.5; allowed: less than or equal to 0.9999",
    ("version = 1\n", "version = 'one'\n"): "version: got 'one'; allowed: a valid integer",
    ('licence = "CC-BY-4.0"\n', ""): "missing: licence",
    ('name = "small"', 'name = "Small Net"'): "name: got 'Small Net'; allowed: ",
    ("schema = 1", "schema = 2"): "schema: got 2; allowed: 1",
    (
        "window_px = 128",
        "window_px = 20",
    ): "architecture.window_px: got 20; allowed: greater than or equal to 32",
    ("margin_px = 16", "margin_px = 64"): "architecture: has margins of 64 px, which leave nothing of 128 px",
    (SHA, "abc"): "weights.sha256: got 'abc'; allowed: ",
    ("weights.safetensors", "weights.pt"): "weights.file: got 'weights.pt'; allowed: ",
    (
        "weights.safetensors",
        "../weights.safetensors",
    ): "weights.file: got '../weights.safetensors'; allowed: ",
    ('"slope_deg"', '"dndvi"'): "inputs: names a feature twice",
    ("[output]", "[output"): "not valid TOML: ",
    ("[output]", "[surprise]\na = 1\n\n[output]"): "surprise: unknown key; allowed: schema, name, version, ",
}


@pytest.mark.parametrize(("edit", "said"), BROKEN.items(), ids=lambda v: v if isinstance(v, str) else v[1])
def test_a_card_edited_by_hand_is_refused_in_one_line(tmp_path, edit, said):
    write_card(tmp_path, a_card())
    text = (tmp_path / "card.toml").read_text()
    assert edit[0] in text
    (tmp_path / "card.toml").write_text(text.replace(*edit))

    with pytest.raises(ModelError, match=re.escape(f"{tmp_path / 'card.toml'}: {said}")) as refused:
        read_card(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"method": "isotonic"}, "calibration: is isotonic and has no points"),
        ({"logits": [0, 1], "probabilities": [0.5]}, "calibration: has 2 logits and 1 probabilities"),
        ({"logits": [1, 0], "probabilities": [0.1, 0.2]}, "calibration: has logits that do not rise"),
        ({"logits": [1, 1], "probabilities": [0.1, 0.2]}, "calibration: has logits that do not rise"),
        ({"logits": [0, 1], "probabilities": [0.2, 0.1]}, "calibration: has probabilities that fall"),
        ({"logits": [0, 1], "probabilities": [0.2, 1.1]}, "calibration: has probabilities that fall"),
        ({"logits": [0], "probabilities": [-0.1]}, "calibration: has probabilities that fall"),
        ({"by": "dndvi", "strata": {"7": 0.0}}, "calibration: has the temperature 0 in stratum 7; above 0"),
        (
            {"by": "dndvi", "strata": {"forest": 2.0}},
            "calibration: has a stratum 'forest'; strata are the numbers",
        ),
        ({"by": "dndvi", "strata": {"1.5": 2.0}}, "calibration: has a stratum '1.5'; strata are the numbers"),
        ({"strata": {"7": 2.0}}, "calibration: has strata and no by"),
        (
            {"by": "land_cover"},
            "is calibrated by 'land_cover', which is none of its inputs; allowed: dndvi, slope_deg",
        ),
    ],
)
def test_a_calibration_that_is_no_rising_line_or_of_no_classes_is_refused_in_one_line(tables, said):
    text = card_text(a_card())
    assert "[calibration]" in text
    edited = tomllib.loads(text) | {"calibration": tables}
    with pytest.raises(ModelError, match=re.escape(said)) as refused:
        parse_card(tomli_w.dumps(edited).encode(), "card.toml")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["weights", "architecture"])
def test_half_a_network_is_none(missing):
    with pytest.raises(ValueError, match="neither a network"):
        a_card(**{missing: None})


def test_a_folder_without_a_card_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"card\.toml: cannot be read \(No such file"):
        read_card(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x = " + b"[" * 20_000], ids=["bytes", "nested"])
def test_what_is_no_text_is_no_card(content):
    with pytest.raises(ModelError, match=r"card\.toml: not (UTF-8 text|valid TOML)"):
        parse_card(content, "card.toml")


def test_the_pipeline_learns_what_it_needs():
    card = a_card(metrics={"f1": 0.6, "precision": 0.7}, simulated=True)
    found = model_card(card, threshold=None, min_area_m2=80.0)

    assert asdict(found) | {"inputs": None} == {
        "name": "small",
        "version": 1,
        "architecture": "resunet",
        "inputs": None,
        "window_px": 2 * 127 + 1,
        "threshold": 0.4,
        "min_area_m2": 80.0,
        "sample_patches": 0,
        "parameters": {},
        "weights_sha256": SHA,
        "content_sha256": card.identity,
        "training": "SIMULATED scenes. a network of a test",
        "metrics": "F1 0.600 (simulated)",
        "licence": "CC-BY-4.0",
        "source": "",
    }
    assert found.inputs.names == ("dndvi", "slope_deg")


def test_an_ensemble_looks_as_far_as_its_widest_member():
    narrow = a_card()
    wide = a_card(architecture={"name": "unet", "window_px": 256, "margin_px": 16})
    members = [{"folder": f"m{k}", "identity": one.identity} for k, one in enumerate((narrow, wide))]
    card = a_card(architecture=None, weights=None, members=members)
    found = model_card(card, members=(narrow, wide))

    assert found.window_px == 2 * 255 + 1
    assert found.architecture == "mean of 2 networks (resunet, unet)"
    assert found.content_sha256 == card.identity


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": {"temperature": 1.5}},
        {"weights": {"file": "weights.safetensors", "sha256": SHA[::-1]}},
        {"inputs": {"names": ["dndvi", "slope_deg"], "units": ["1", "deg"], "mean": [0, 2], "std": [1, 2]}},
        {"architecture": {"name": "resunet", "window_px": 128, "margin_px": 32}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_probabilities_decides_the_identity(change):
    assert a_card(**change).identity != a_card().identity
    assert a_card(metrics={"f1": 0.9}, description="other words").identity == a_card().identity
