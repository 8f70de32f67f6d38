"""Networks of a run: found by name or path, checked against the run, and adopted into the workspace.

Where a network came from is looked at once, when the plan is made. From then on the workspace's own copy counts, and
only that: workers look nowhere else, and refuse any bytes that the plan did not pin.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from slidecube.models import zoo
from slidecube.models.card import ModelCard
from slidecube.models.errors import ModelError
from slidecube.models.network_card import (
    CARD_FILE,
    Inputs,
    NetworkCard,
    parse_card,
    read_members,
    spec_of,
)
from slidecube.models.predict import Detector
from slidecube.models.registry import (
    choose,
    copy_model,
    files_of,
    held_in,
    is_address,
    load_model,
    save_ensemble,
    shipped_root,
    user_root,
    verify_files,
    versions_in,
)
from slidecube.models.thresholds import on_step
from slidecube.pipeline.config import Config, is_path
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.feature_sets import require_known
from slidecube.pipeline.features import feature, is_built_in
from slidecube.pipeline.storage import Place, fetched, made_once
from slidecube.pipeline.store import Workspace

RESOLUTION_TOLERANCE = 0.01
"""Part by which a run's pixels may be larger or smaller than those that a network was trained on."""


def is_rule(text: str) -> bool:
    """Tell models of the zoo, which are code alone, from networks."""
    return text.partition("@")[0] in zoo.ZOO


def roots(workspace: Workspace | None = None) -> dict[str, Place]:
    """Places that hold networks, by what they are called; the first counts most."""
    own: dict[str, Place] = {} if workspace is None else {"workspace": workspace.models}
    return {**own, "yours": user_root(), "shipped": shipped_root()}


def held(root: Place) -> tuple[str, ...]:
    """Names of the folders of a root that hold a model."""
    if isinstance(root, Path):
        return held_in(root)
    cards = {place.parent.name for place in root.glob(f"*/{CARD_FILE}")}
    known = versions_in(cards)
    return tuple(sorted(known, key=known.__getitem__))


def find(text: str, workspace: Workspace | None = None) -> Place:
    """Return the folder of a network by its name, its name and version, or its path.

    Raises ModelError where there is none.
    """
    if is_path(text):
        return Path(text)
    places = roots(workspace)
    if not is_address(text) and (Path(text) / CARD_FILE).is_file():
        raise ModelError(f"{text!r} is no address of a model; write the path of a folder as './{text}'")
    root, folder = choose(text, {name: held(place) for name, place in places.items()}, others=zoo.ZOO)
    return places[root] / folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The network that a configuration names, before it is adopted; folder : where it lies now."""

    folder: Path
    card: NetworkCard
    detector: Detector


@contextmanager
def chosen_network(config: Config, workspace: Workspace) -> Iterator[Chosen | None]:
    """Find the networks of a configuration, check that they fit the run, and load them; None for a rule.

    Its folder is there while the block runs: several networks are put together in one that goes away.
    Raises PipelineError or ModelError.
    """
    rules = [text for text in config.models if is_rule(text)]
    if rules and len(config.models) > 1:
        raise PipelineError(
            f"Model {rules[0]!r} is a rule and has no place among networks that are averaged; leave it out of the list"
        )
    if rules:
        yield None
        return
    with ExitStack() as stack:
        folders = [stack.enter_context(fetched(find(text, workspace))) for text in config.models]
        folder = folders[0] if len(folders) == 1 else stack.enter_context(_mean_of(folders))
        card = verify_files(folder)
        require_fitting(card, config)
        detect = config.detect
        yield Chosen(
            folder=folder,
            card=card,
            detector=load_model(folder, threshold=detect.threshold, min_area_m2=detect.min_area_m2),
        )


def card_at_paths(config: Config, workspace: Workspace) -> NetworkCard | None:
    """Card of the network that a configuration names by paths, as it is now.

    None where only names are given, and where a folder is gone: the copy in the workspace counts then.
    """
    cards = [_card_at(Path(text)) for text in config.models if is_path(text)]
    if not cards or None in cards:
        return None
    if len(config.models) == 1:
        return cards[0]
    try:
        with chosen_network(config, workspace) as chosen:
            return chosen.card if chosen else None
    except ModelError:  # one that is given by its name is gone
        return None


def require_fitting(card: NetworkCard, config: Config) -> None:
    """Refuse a network that cannot work on a run, in one line each."""
    detect, fit = config.detect, config.fit
    for key in ("parameters", "features", "landslide_clusters"):
        if getattr(detect, key):
            raise PipelineError(
                f"Model {card.address} is a network, and its card says all that it reads; leave {key} out of [detect]"
            )
    if fit.mnf_components is not None or fit.mnf_variance is not None:
        raise PipelineError(
            f"Model {card.address} is a network, and its card says how many MNF components it reads; leave "
            "mnf_components and mnf_variance out of [fit]"
        )
    require_known(spec_of(card), config.layer_names)
    require_units(card.inputs, card.address)
    trained_m, here_m = card.inputs.resolution_m, config.area.resolution_m
    if abs(here_m / trained_m - 1) > RESOLUTION_TOLERANCE:
        raise PipelineError(
            f"Model {card.address} was trained on pixels of {trained_m:g} m, and those of the run have {here_m:g} m; "
            f"set resolution_m = {trained_m:g} in [area], or choose another model"
        )


def require_units(inputs: Inputs, address: str) -> None:
    """Refuse a feature in another unit than a network was trained on; layers of a TOML have their own."""
    for name, unit in zip(inputs.names, inputs.units, strict=True):
        made = feature(name).unit
        if unit != made and is_built_in(name):
            raise PipelineError(
                f"Model {address} reads {name} in {unit!r}, and this build makes it in {made!r}; correct the card "
                "where it is wrong, or choose another model"
            )


def adopt(workspace: Workspace, folder: Path, card: NetworkCard) -> Place:
    """Copy a model into the workspace, whole or not at all; one that is there already stays.

    Raises ModelError for weights that do not fit its architecture, and PipelineError where the workspace holds another
    one of this name and version.
    """
    place = workspace.models / card.address
    if not _holds(place, card):
        require_fitting_weights(folder)
        with made_once(place, CARD_FILE) as local:
            copy_model(folder, local, files_of(card, read_members(folder, card)))
        _holds(place, card)  # another one may have been faster
    return place


def require_fitting_weights(folder: Path) -> None:
    """Build what a folder holds, once; every tile would say the same of it later. Raises ModelError."""
    from slidecube.models.ensembles import Ensemble  # noqa: PLC0415  torch is slow to import
    from slidecube.models.network import Network, require_computable  # noqa: PLC0415

    detector = load_model(folder)
    parts = detector.members if isinstance(detector, Ensemble) else (detector,)
    require_computable(part for part in parts if isinstance(part, Network))


def _holds(place: Place, card: NetworkCard) -> bool:
    there = _card_at(place)
    if there is not None and (there.identity, there.address) != (card.identity, card.address):
        raise PipelineError(
            f"The workspace holds another model {card.address} already ({place}, {there.identity[:12]}..., not "
            f"{card.identity[:12]}...); save yours as another version, or use the workspace's by its name"
        )
    return there is not None


def _card_at(place: Place) -> NetworkCard | None:
    try:
        content = (place / CARD_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_card(content, str(place / CARD_FILE))


def require_adopted(workspace: Workspace, card: ModelCard) -> Place:
    """Return the folder of the network that a plan pinned by its card.

    Raises PipelineError, in one line, where it is missing or another one.
    """
    place = workspace.models / card.address
    there = _card_at(place)
    if there is None:
        raise PipelineError(f"Model {card.address} is not in the workspace any more; put {place} back")
    if there.identity != card.content_sha256:
        raise PipelineError(
            f"Model {card.address} of the workspace is not the one that was planned with: {place / CARD_FILE} was "
            f"changed ({there.identity[:12]}..., not {card.content_sha256[:12]}...); put it back as it was"
        )
    return place


def load_adopted(workspace: Workspace, card: ModelCard) -> Detector:
    """Load a network from the workspace alone, and only if it is the one that a plan pinned by its card.

    Raises PipelineError, in one line, for what is missing, damaged, or was changed since.
    """
    place = require_adopted(workspace, card)
    try:
        with fetched(place) as local:
            return load_model(local, threshold=card.threshold, min_area_m2=card.min_area_m2)
    except ModelError as error:
        # a bucket's copy has a name of its own on this machine
        said = re.sub(rf"\S*{re.escape(card.address)}(?=/)", lambda _: str(place), str(error))
        raise PipelineError(said) from None


@contextmanager
def _mean_of(folders: Sequence[Path]) -> Iterator[Path]:
    """Give a folder with the ensemble of some networks, named after what it is made of."""
    cards = [verify_files(folder) for folder in folders]
    fields = mean_card(cards)
    with tempfile.TemporaryDirectory(prefix="slidecube-") as scratch:
        folder = Path(scratch) / f"{fields['name']}@1"
        save_ensemble(folder, folders, fields)
        yield folder


def mean_card(cards: Sequence[NetworkCard]) -> dict[str, Any]:
    """Fields of the card of an ensemble of networks which nobody judged as one."""
    together = ", ".join(card.address for card in cards)
    digest = sha256("".join(card.identity for card in cards).encode()).hexdigest()
    outputs = [card.output for card in cards]
    return {
        "name": f"mean-{digest[:8]}",
        "version": 1,
        "description": f"Mean of {together}, put together by [detect] model; never judged as a whole",
        "licence": " AND ".join(dict.fromkeys(card.licence for card in cards)),
        "simulated": any(card.simulated for card in cards),
        "inputs": united_inputs(cards),
        "output": {
            "threshold": on_step(sum(output.threshold for output in outputs) / len(outputs)),
            "chosen": "mean of the members' thresholds, rounded up to what maps keep",
            "min_area_m2": max(output.min_area_m2 for output in outputs),
        },
    }


def united_inputs(cards: Sequence[NetworkCard]) -> Inputs:
    """Features that any of some networks reads, each once; the normalisation is each member's own.

    Raises PipelineError where they were trained on other units, pixels or definitions.
    """
    first = cards[0]
    rows: dict[str, tuple[str, float, float]] = {}
    for card in cards:
        inputs = card.inputs
        for key in ("resolution_m", "version"):
            if getattr(inputs, key) != getattr(first.inputs, key):
                raise PipelineError(
                    f"Models {first.address} and {card.address} cannot be averaged: their {key} is "
                    f"{getattr(first.inputs, key):g} and {getattr(inputs, key):g}"
                )
        for name, unit, mean, std in zip(inputs.names, inputs.units, inputs.mean, inputs.std, strict=True):
            known = rows.setdefault(name, (unit, mean, std))
            if known[0] != unit:
                raise PipelineError(
                    f"Models {first.address} and {card.address} cannot be averaged: {name} is in {known[0]!r} and in "
                    f"{unit!r}"
                )
    return Inputs(
        names=tuple(rows),
        units=tuple(unit for unit, _, _ in rows.values()),
        mean=tuple(mean for _, mean, _ in rows.values()),
        std=tuple(std for _, _, std in rows.values()),
        resolution_m=first.inputs.resolution_m,
        version=first.inputs.version,
    )


def listing(workspace: Workspace | None = None) -> Mapping[str, list[tuple[Place, NetworkCard | str]]]:
    """Networks of every root, with their cards, or what is wrong with them."""
    found: dict[str, list[tuple[Place, NetworkCard | str]]] = {}
    for name, root in roots(workspace).items():
        found[name] = []
        for folder in held(root):
            try:
                card = _card_at(root / folder)
                assert card is not None
                found[name].append((root / folder, card))
            except ModelError as error:
                found[name].append((root / folder, str(error)))
    return found
