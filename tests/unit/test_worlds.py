"""Worlds of networks share no ground, and their document says what its tables say."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import shapely

from slidecube.models.network_card import Architecture, Inputs, NetworkCard, Output, Weights
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import feature
from slidecube.pipeline.simulate import networks, networks_page, worlds
from slidecube.pipeline.simulate.parameters import load_parameters
from slidecube.pipeline.simulate.terrain import scene_geobox
from slidecube.pipeline.train_config import load_train_config


def test_terrains_share_no_ground_and_no_shadow():
    p = load_parameters()
    boxes = {}
    for terrain in worlds.CENTRES_M:
        own = worlds._centred(terrain, 8.4)
        assert own.model_copy(update={"area": p.area}) == p, "nothing but the place is another"
        boxes[terrain] = shapely.box(*scene_geobox(own.area, own.area.sizes[terrain]).boundingbox)

    for one, other in itertools.combinations(boxes.values(), 2):
        assert one.distance(other) >= p.area.margin_m


def test_what_is_judged_was_not_learnt():
    uses = {world.terrain: world.use for world in worlds.WORLDS}
    seeds = [world.seed for world in worlds.WORLDS]

    assert all(world.use == uses[world.terrain] for world in worlds.WORLDS)
    assert set(uses.values()) == {"train", "validation", "test"}
    for one, other in itertools.combinations(worlds.WORLDS, 2):
        assert one.use == other.use or one.seed != other.seed
    assert len(set(seeds)) == 7


@pytest.mark.parametrize(("terrain", "extent_km", "message"), [
    ("nowhere", 4.0, "No terrain 'nowhere'; terrains: north, west, east, south"),
    ("north", 9.0, "extent_km=9.0 is not allowed; use 1.2 to 8.4"),
])  # fmt: skip
def test_a_world_that_is_not_there_is_refused(tmp_path, terrain, extent_km, message):
    with pytest.raises(PipelineError, match=message):
        worlds.make_world(tmp_path, worlds.World(terrain=terrain, seed=1, use="test"), extent_km=extent_km)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [networks.FULL, networks.SMALL], ids=["full", "small"])
def test_its_trainings_are_valid_and_read_known_features(tmp_path, scale):
    sweep = networks._sweep(scale, "greedy")
    for name, features, own in (("a", networks.CHANGE, sweep), ("b", networks.POST, None)):
        toml = tmp_path / f"{name}.toml"
        tables = networks.training_tables(
            scale, name, features=features, sweep=own, whole_maps=own is None, workers=2
        )
        toml.write_bytes(networks.tomli_w.dumps(tables).encode())

        read = load_train_config(toml).tables

        assert read.features.names == features
        assert [table.use for table in read.data] == [world.use for world in scale.worlds]
    assert all(feature(name) for name in (*networks.CHANGE, *networks.POST))


# --- the document -----------------------------------------------------------------------------------------------------


def single(architecture: str, loss: str, validation: float, test: float) -> dict[str, object]:
    scores = {"validation_f1": validation, "test_f1": test, "test_precision": 0.5, "test_recall": 0.25}
    return {"kind": "single", "architecture": architecture, "loss": loss, **scores}


SINGLES = pd.DataFrame(
    [
        single("unet", "bce", 0.61, 0.40),
        single("unet", "dice", 0.60, 0.50),
        single("fpn", "bce", 0.30, np.nan),
    ]
)


def test_the_best_on_validation_and_on_the_test_are_marked():
    text = networks_page.single_table(SINGLES).splitlines()

    assert text[0] == "| architecture | bce | dice |"
    assert text[2] == "| unet | **0.610** / 0.400 | 0.600 / **0.500** |"
    assert text[3] == "| fpn | 0.300 / - | - / - |"


def test_ensembles_stand_against_the_best_on_validation_whatever_the_sign():
    rows = pd.DataFrame([{"size": k, **single("", "", 0.6, f1)} for k, f1 in ((3, 0.45), (2, 0.35))])

    text = networks_page.ensemble_table(SINGLES, {"the K best": rows}).splitlines()

    assert "| single (unet, bce) | 1 | 0.610 | 0.400 |" in text[2]
    assert "| the K best | 2 | 0.600 | 0.350 | -0.050 |" in text[3]
    assert "| the K best | 3 | 0.600 | 0.450 | +0.050 |" in text[4]


def test_a_detector_without_a_map_has_no_precision():
    scores = dict.fromkeys(networks_page._HEADS, 0.25)
    rows = [
        {"detector": "mute", "world": "south-1", **scores, "px_precision": np.nan},
        {"detector": "loud", "world": "south-1", **scores},
        {"detector": "loud", "world": "south-2", **scores, "px_precision": 0.75, "null_per_100_km2": 12.0},
    ]

    text = networks_page.detector_table(pd.DataFrame(rows)).splitlines()

    assert text[2].startswith("| mute | - | 0.250 |")
    assert text[3].startswith("| loud | 0.500 (0.250 to 0.750) | 0.250 (0.250 to 0.250) |")
    assert "| 6 (0 to 12) |" in text[3]
    assert "nothing was mapped by mute." in networks_page._shipped(pd.DataFrame(rows))


def test_the_reading_of_a_person_is_kept(tmp_path):
    page = tmp_path / "networks.md"
    networks.write_page(page, "# one\n")
    page.write_text(page.read_text() + "\n## Reading\n\nBy hand.\n", encoding="utf-8")

    networks.write_page(page, "# two\n")

    assert page.read_text(encoding="utf-8") == "# two\n\n## Reading\n\nBy hand.\n"


def test_a_shipped_card_has_another_name_and_decides_the_same():
    card = NetworkCard(
        schema=1, name="sim", version=1, description="Made up.", licence="Apache-2.0", simulated=True,
        inputs=Inputs(names=("slope_deg",), units=("degree",), mean=(0.0,), std=(1.0,)),
        architecture=Architecture(name="resunet", window_px=64, margin_px=8),
        output=Output(threshold=0.5), weights=Weights(file="weights.safetensors", sha256="0" * 64),
        metrics={"f1": 0.5},
    )  # fmt: skip
    detectors = pd.DataFrame(
        [
            {"detector": "sim-small", "world": "south-1", "px_f1": 0.5, "px_precision": np.nan},
            {"detector": "sim-small", "world": "south-2", "px_f1": 0.25, "px_precision": np.nan},
            {"detector": "rdndvi", "world": "south-2", "px_f1": 0.1, "px_precision": 0.1},
        ]
    )

    made = networks._shipped(card, "sim-small", detectors)

    assert (made.name, made.identity) == ("sim-small", card.identity)
    assert made.metrics["f1"] == 0.5
    assert made.metrics["whole_maps"] == {"worlds": ["south-1", "south-2"], "mean": {"px_f1": 0.375}}
