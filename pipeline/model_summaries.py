"""What `slidecube models` says of models: a line each, the whole card, and whether they work."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from slidecube.models.errors import ModelError
from slidecube.models.network_card import (
    NetworkCard,
    card_text,
    headline,
    model_card,
    read_card,
    read_members,
)
from slidecube.models.registry import load_model, verify_files
from slidecube.models.zoo import ZOO, build_model
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.model_registry import find, is_rule, listing, require_units
from slidecube.pipeline.storage import Place, fetched
from slidecube.pipeline.store import Workspace

_PROBE_PX = 16
"""Side of the pixels whose probability is computed to see whether a network works."""


def listed(workspace: str | None) -> list[dict[str, Any]]:
    """One row a model: rules and what learns from the cube, then the networks of each place, as JSON types."""
    rows = [_rule_row(name) for name in ZOO]
    for where, found in listing(_opened(workspace)).items():
        for folder, card in found:
            rows.append(
                _row(card, where, folder) if isinstance(card, NetworkCard) else _broken(card, where, folder)
            )
    return rows


def _opened(workspace: str | None) -> Workspace | None:
    return None if workspace is None else Workspace.at(workspace)


def _rule_row(name: str) -> dict[str, Any]:
    card = build_model(name).card
    return {
        "model": card.address,
        "architecture": card.architecture,
        "inputs": list(card.inputs.names),
        "score": "",
        "simulated": False,
        "licence": card.licence,
        "where": "slidecube",
        "folder": "",
    }


def _row(card: NetworkCard, where: str, folder: Place) -> dict[str, Any]:
    return {
        "model": card.address,
        "architecture": model_card(card, members=()).architecture,
        "inputs": list(card.inputs.names),
        "score": headline(card) or ("simulated" if card.simulated else ""),
        "simulated": card.simulated,
        "licence": card.licence,
        "where": where,
        "folder": str(folder),
    }


def _broken(said: str, where: str, folder: Place) -> dict[str, Any]:
    empty = {"architecture": "", "inputs": [], "score": "", "simulated": False, "licence": ""}
    return {"model": folder.name, **empty, "where": where, "folder": str(folder), "error": said}


def list_text(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows out as a table; what cannot be read says why."""
    head = ("model", "architecture", "inputs", "score", "licence", "where")
    cells = [
        (
            row["model"],
            row["architecture"],
            _inputs(row["inputs"]),
            row["score"],
            row["licence"],
            row["where"],
        )
        for row in rows
        if "error" not in row
    ]
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (head, *cells)
    ]
    return "\n".join(
        [*lines, *(f"{row['model']} ({row['where']}): {row['error']}" for row in rows if "error" in row)]
    )


def _inputs(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} features ({names[0]}, ...)"


def shown(name: str, workspace: str | None) -> dict[str, Any]:
    """Return the card of a model as JSON types, with where it lies. Raises ModelError where there is none."""
    if is_rule(name):
        card = build_model(name).card
        return {
            "name": card.name,
            "version": card.version,
            "architecture": card.architecture,
            "inputs": {"names": list(card.inputs.names)},
            "output": {"threshold": card.threshold, "min_area_m2": card.min_area_m2},
            "parameters": dict(card.parameters),
            "training": card.training,
            "metrics": card.metrics,
            "licence": card.licence,
            "source": card.source,
        }
    place = find(name, _opened(workspace))
    with fetched(place) as folder:
        card_of = read_card(folder)
        tables = tomllib.loads(card_text(card_of))
        members = [one.address for one in read_members(folder, card_of)]
    return {
        "null_run": {},
        **tables,
        "folder": str(place),
        "identity": card_of.identity,
        "members_are": members,
    }


def short_text(card: dict[str, Any]) -> str:
    """Lay out what a user asks first of a network's card."""
    simulated = "trained on simulated scenes; its scores say nothing about real ones"
    null, metrics, output = card["null_run"], card.get("metrics", {}), card["output"]
    said = [
        ("model", f"{card['name']}@{card['version']}"),
        ("SIMULATED", simulated if card.get("simulated") else ""),
        ("", card["description"]),
        ("reads", ", ".join(card["inputs"]["names"])),
        ("resolution", f"{card['inputs']['resolution_m']:g} m"),
        *_computes(card),
        *_learnt(card.get("training", {})),
        ("F1 test", _f1(metrics)),
        ("F1 valid.", _f1(metrics.get("validation", {}))),
        ("threshold", f"{output['threshold']:.3g}, {output.get('chosen') or 'not said how it was chosen'}"),
        ("smallest", f"{output.get('min_area_m2', 0):g} m2"),
        ("calibration", card.get("calibration", {}).get("method", "none")),
        ("null run", _facts(null) or "no null run: how much it maps where nothing happened is not known"),
        ("licence", card["licence"]),
        ("folder", card["folder"]),
        ("", "everything: --all; for programs: --json"),
    ]
    return "\n".join(f"{key:<12} {text}" for key, text in said if text)


def _computes(card: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows on what computes, and in which windows."""
    if "architecture" not in card:
        return [("members", ", ".join(card["members_are"]))]
    own = card["architecture"]
    arguments = ", ".join(f"{key} = {value}" for key, value in own.get("arguments", {}).items())
    field = own.get("receptive_px", 0)
    looks = (
        f"{field} px"
        if field
        else "not measured"
        if own["name"] == "onnx"
        else "whole window, or not measured"
    )
    return [
        ("network", f"{own['name']}{f' ({arguments})' if arguments else ''}"),
        ("windows", f"{own['window_px']} px, margins of {own['margin_px']} px; receptive field: {looks}"),
    ]


def _learnt(training: dict[str, Any]) -> list[tuple[str, str]]:
    """A row for each set of patches."""
    return [
        (
            row["part"],
            f"{row['patches']:,} patches of {', '.join(row['regions'])}"
            + (f", landslide polygons: {row['landslides']:,}" if "landslides" in row else ""),
        )
        for row in training.get("patches", ())
    ]


def _f1(scores: dict[str, Any]) -> str:
    """F1 and its interval, and how many landslides it counts."""
    if "f1" not in scores:
        return ""
    pair = scores.get("f1_interval")
    objects = [scores[key] for key in ("truth_found", "truth_missed") if key in scores]
    counted = f", groups of connected landslide pixels: {sum(objects):,}" if objects else ""
    return f"{scores['f1']:.3f}{f' ({pair[0]:.3f} to {pair[1]:.3f})' if pair else ''}{counted}"


def _facts(table: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in table.items()
        if isinstance(value, int | float | str) and value != ""
    )


def shown_text(card: dict[str, Any]) -> str:
    """Lay a card out as lines, keys to the left."""
    simulated = ["SIMULATED    trained on simulated scenes; its scores say nothing about real ones"]
    lines = [f"model        {card['name']}@{card['version']}", *(simulated if card.get("simulated") else [])]
    for key, value in card.items():
        if key not in {"name", "version", "schema", "simulated", "members"} and value not in ("", {}, []):
            lines += _lines(key, value)
    if card.get("null_run") == {}:
        lines.append("null_run     no null run: how much it maps where nothing happened is not known")
    return "\n".join(lines)


def _lines(key: str, value: Any, indent: int = 0) -> list[str]:
    pad = " " * indent
    if isinstance(value, dict):
        return [f"{pad}{key}", *(line for k, v in value.items() for line in _lines(k, v, indent + 2))]
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return [f"{pad}{key}", *(f"{pad}  {_row_text(one)}" for one in value)]
    if value in ("", [], {}):
        return []
    if isinstance(value, list):
        value = ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in value)
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return [f"{pad}{key:<{max(1, 12 - indent)}} {text}"]


def _row_text(row: Any) -> str:
    """A table of a list in one line, without braces."""
    if not isinstance(row, dict):
        return str(row)
    return ", ".join(
        f"{key} {' '.join(f'{k} ({n})' for k, n in value.items()) if isinstance(value, dict) else value}"
        for key, value in row.items()
    )


def verified(name: str | None, workspace: str | None) -> Iterator[tuple[str, str, str]]:
    """Yield "ok" or "fail", the model, and what was found, of one model or of all networks of all places."""
    if name is not None and is_rule(name):
        yield "ok", build_model(name).card.address, "a rule of slidecube: nothing to verify"
        return
    places = [find(name, _opened(workspace))] if name is not None else _all(workspace)
    if not places:
        yield "ok", "none", "no network in any place"
    for place in places:
        try:
            yield "ok", place.name, _verify(place)
        except (ModelError, PipelineError) as error:
            yield "fail", place.name, str(error)


def _all(workspace: str | None) -> list[Place]:
    return [folder for found in listing(_opened(workspace)).values() for folder, _ in found]


def _verify(place: Place) -> str:
    """Check one model, in a sentence of what holds. Raises ModelError or PipelineError."""
    with fetched(place) as folder:
        card = verify_files(folder)
        require_units(card.inputs, card.address)
        detector = load_model(folder)
    side = _PROBE_PX + 2 * (detector.card.window_px // 2)
    found = detector.predict_block(np.zeros((len(detector.card.inputs.names), side, side), np.float32))
    if not (np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1):
        raise ModelError(f"Model {card.address} gives no probabilities, of zeros {found.ravel()[0]}")
    return f"files are those of the card ({card.identity[:12]}...), it loads and computes"


def architectures_text() -> str:
    """List the architectures, a line each, with the arguments that may be set."""
    from slidecube.models.architectures import ARCHITECTURES  # noqa: PLC0415  it imports torch

    wide = max(map(len, ARCHITECTURES))
    return "\n".join(
        f"{name:<{wide}}  {', '.join(f'{k}={v}' for k, v in row.arguments.items())}  {row.source}".rstrip()
        for name, row in ARCHITECTURES.items()
    )
