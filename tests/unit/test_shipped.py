"""Networks that ship: small, whole, honest about where they learnt, and ready."""

from __future__ import annotations

import numpy as np
import pytest

from slidecube.models.network_card import read_card, read_members
from slidecube.models.registry import files_of, held_in, load_model, shipped_root, verify_files
from slidecube.pipeline.features import feature
from slidecube.pipeline.model_registry import find
from slidecube.pipeline.simulate.networks import CHANGE, ENSEMBLE, POST, SINGLE, SINGLE_IMAGE

NAMES = (SINGLE, ENSEMBLE, SINGLE_IMAGE)
MOST_BYTES = {SINGLE: 2.5e6, SINGLE_IMAGE: 2.5e6, ENSEMBLE: 9e6}


def test_what_ships_is_what_is_said_to():
    assert held_in(shipped_root()) == tuple(sorted(f"{name}@1" for name in NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_found_by_name_whole_and_small(name):
    folder = find(name)

    card = verify_files(folder)

    assert card.address == f"{name}@1"
    own = {folder / file for file in files_of(card, read_members(folder, card))}
    assert own == {path for path in folder.rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in own) < MOST_BYTES[name]


@pytest.mark.parametrize("name", NAMES)
def test_its_card_says_that_it_never_saw_the_earth(name):
    card = read_card(find(name))

    assert card.simulated
    assert card.description.startswith("Trained on simulated scenes.")
    assert card.licence == "Apache-2.0"
    assert card.inputs.names == (POST if name == SINGLE_IMAGE else CHANGE)
    assert card.inputs.units == tuple(feature(one).unit for one in card.inputs.names)
    assert card.null_run["slopes_deg"] == 10
    assert card.null_run["min_area_m2"] == 1000
    assert card.null_run["km2"] > 5
    low, high = card.metrics["f1_interval"]
    assert 0 < low <= card.metrics["f1"] <= high < 1
    at = [card.metrics[f"precision_at_{percent}_pct"] for percent in ("1", "0.1", "0.01")]
    assert at == sorted(at, reverse=True)
    assert "whole_maps" in card.metrics


@pytest.mark.parametrize("name", NAMES)
def test_it_predicts_finite_numbers_and_nothing_where_nothing_is_known(name):
    detector = load_model(find(name))
    inputs = read_card(find(name)).inputs
    side = 128 + 2 * (detector.card.window_px // 2)
    noise = np.random.default_rng(0).standard_normal((len(inputs.names), side, side))
    mean, std = (np.array(values)[:, None, None] for values in (inputs.mean, inputs.std))
    features_fyx = (mean + std * noise).astype(np.float32)
    middle = side // 2
    features_fyx[0, middle - 3 : middle + 3, middle - 3 : middle + 3] = np.nan

    probability_yx = detector.predict_block(features_fyx)

    unknown = np.zeros((128, 128), bool)
    unknown[61:67, 61:67] = True
    assert np.array_equal(np.isnan(probability_yx), unknown)
    known = probability_yx[~unknown]
    assert ((known >= 0) & (known <= 1)).all()
    assert np.ptp(known) > 0


def test_members_of_the_ensemble_differ_and_the_single_one_is_among_what_was_trained():
    cards = read_members(find(ENSEMBLE), read_card(find(ENSEMBLE)))

    assert 3 <= len(cards) <= 4
    assert len({card.weights.sha256 for card in cards}) == len(cards)
    assert all(card.architecture.name == "resunet" for card in cards)
    # the K best hold the best
    assert read_card(find(SINGLE)).weights.sha256 in {card.weights.sha256 for card in cards}
