"""Models come and go: from elsewhere into the user's own folder, and out to others."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from slidecube.models.errors import ModelError
from slidecube.models.network_card import Inputs, NetworkCard, read_members, read_weights
from slidecube.models.onnx_files import ONNX_FILE
from slidecube.models.registry import (
    WEIGHTS_FILE,
    card_of,
    copy_model,
    files_of,
    free_version,
    save_network,
    user_root,
    verify_files,
)
from slidecube.models.weights import write_whole
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.feature_sets import require_known
from slidecube.pipeline.features import FEATURES, feature, is_built_in
from slidecube.pipeline.model_registry import find, is_rule, require_units
from slidecube.pipeline.published import FEATURE_SETS
from slidecube.pipeline.refusals import did_you_mean
from slidecube.pipeline.storage import fetched
from slidecube.pipeline.store import Workspace

_NO_SHA = "0" * 64
_DEFAULT_WINDOW_PX, _DEFAULT_MARGIN_PX = 128, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedModel:
    """A model that was imported; told : what was done to its weights, a line each."""

    folder: Path
    card: NetworkCard
    told: tuple[str, ...]


def tables_of(file: Path, *, card: Path | None, **said: Any) -> dict[str, Any]:
    """Return the tables of a card without weights: of a card.toml, or put together from the command's options.

    Raises ModelError for a card that cannot be read, and for options beside it.
    """
    given = sorted(k for k, v in said.items() if v not in (None, (), False) and k not in {"output", "layers"})
    if card is not None:
        if given:
            raise ModelError(f"--card says all of a model; leave --{given[0].replace('_', '-')} out")
        return _read_tables(card)
    names = _names(said["features"])
    onnx = file.suffix.lower() == ".onnx"
    if onnx and said["architecture"] not in (None, "onnx"):
        raise ModelError(f"{file} is an ONNX, which is its own architecture; leave --architecture out")
    return _without_none(
        {
            "name": said["name"],
            "version": said["version"],
            "description": said["description"],
            "licence": said["licence"],
            "source": said["source"],
            "simulated": said["simulated"],
            "inputs": {
                "names": names,
                "units": [feature(name).unit for name in names],
                "mean": _numbers(said["mean"], "mean", len(names)),
                "std": _numbers(said["std"], "std", len(names)),
                "resolution_m": said["resolution_m"],
            },
            "architecture": {
                "name": "onnx" if onnx else said["architecture"],
                "arguments": _arguments(said["arguments"]),
                "window_px": said["window_px"] or _DEFAULT_WINDOW_PX,
                "margin_px": _DEFAULT_MARGIN_PX if said["margin_px"] is None else said["margin_px"],
            },
            "output": {"threshold": said["threshold"], "chosen": "given when it was imported"},
        }
    )


def import_model(
    file: Path, tables: Mapping[str, Any], *, output: str | None, layers: Sequence[str] = ()
) -> ImportedModel:
    """Take a network from elsewhere into the user's own folder, whole or not at all.

    tables : of its card, without weights; output : what an ONNX gives; layers : features that a TOML brings
    Raises ModelError or PipelineError, in one line, for a card, a feature, or a file that cannot be taken.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    root, onnx = user_root(), file.suffix.lower() == ".onnx"
    name = str(tables.get("name", ""))
    fields = {"version": free_version(root, name), **tables}
    draft = card_of(fields, weights={"file": ONNX_FILE if onnx else WEIGHTS_FILE, "sha256": _NO_SHA})
    architecture = draft.architecture
    assert architecture is not None
    if is_rule(draft.name):
        raise ModelError(f"Name {draft.name!r} is that of a rule of slidecube; give the network another one")
    if onnx != (architecture.name == "onnx"):
        raise ModelError(
            f"{file}: architecture.name is {architecture.name!r}; 'onnx' is that of .onnx files alone"
        )
    require_known_features(draft.inputs, layers)
    require_units(draft.inputs, draft.address)
    content, told, changes = (_onnx if onnx else _state)(file, draft, output)
    training = {
        **draft.training,
        "imported_from": file.name,
        "imported_sha256": sha256(file.read_bytes()).hexdigest(),
    }
    made = {**fields, "architecture": {**architecture.model_dump(), **changes}, "training": training}
    folder = root / draft.address
    card = save_network(folder, made, content, file=draft.weights.file if draft.weights else "")
    return ImportedModel(folder=folder, card=card, told=tuple(told))


def require_known_features(inputs: Inputs, layers: Sequence[str] = ()) -> None:
    """Refuse features that this build does not make; layers : names of those that a TOML brings."""
    from slidecube.models.card import FeatureSpec  # noqa: PLC0415

    for name in inputs.names:
        if not is_built_in(name) and name not in layers:
            raise PipelineError(
                f"No feature {name!r}{did_you_mean(name, FEATURES)}: `slidecube features` lists those of this build; "
                f"of a [[layer]] of the runs that will use the network, say --layer {name}"
            )
    require_known(FeatureSpec(names=inputs.names, version=inputs.version), tuple(layers))


def _state(file: Path, card: NetworkCard, output: str | None) -> tuple[bytes, Sequence[str], dict[str, Any]]:
    from slidecube.models.importing import import_state  # noqa: PLC0415  torch is slow to import
    from slidecube.models.judging import windows_of  # noqa: PLC0415

    if output is not None:
        raise ModelError(
            f"{file}: output says what an ONNX gives; networks of slidecube give logits, leave it out"
        )
    own = card.architecture
    assert own is not None
    channels = len(card.inputs.names)
    found = import_state(file, architecture=own.name, channels=channels, arguments=own.arguments)
    _, _, field = windows_of(own.name, own.arguments, channels, patch_px=own.window_px)
    told = list(found.told)
    if own.margin_px < field // 2:
        told.append(
            f"warning: margin_px = {own.margin_px} is below half of the receptive field that was measured, {field} px: "
            f"windows may show in the map; say --margin-px {field // 2} or more"
        )
    return found.content, told, {"receptive_px": field}


def _onnx(file: Path, card: NetworkCard, output: str | None) -> tuple[bytes, Sequence[str], dict[str, Any]]:
    from slidecube.models.onnx_files import MEANINGS, import_onnx  # noqa: PLC0415

    meaning = next((m for m in MEANINGS if m == output), None)
    if meaning is None:
        raise ModelError(
            f"{file}: nothing says what its numbers are; give --output, one of {', '.join(MEANINGS)}"
        )
    assert card.architecture is not None
    found = import_onnx(
        file, channels=len(card.inputs.names), output=meaning, window_px=card.architecture.window_px
    )
    return found.content, found.told, {}


def export_model(
    name: str,
    workspace: str | None,
    *,
    out: Path | None = None,
    onnx_file: Path | None = None,
    stac_file: Path | None = None,
) -> Iterator[str]:
    """Write a model for others, and say what was written, a line each; what is there is left as it is."""
    from slidecube.pipeline.model_stac import model_item_text  # noqa: PLC0415

    if is_rule(name):
        raise PipelineError(f"Model {name!r} is a rule, which is code and no file; nothing can be exported")
    for path in (out, onnx_file, stac_file):
        if path is not None and path.exists():
            raise PipelineError(f"{path} is there already, and is left as it is; name another place")
    place = find(name, None if workspace is None else Workspace.at(workspace))
    with fetched(place) as folder:
        card = verify_files(folder)
        if out is not None:
            copy_model(folder, out, files_of(card, read_members(folder, card)))
            yield f"wrote {card.address} to {out}"
        if onnx_file is not None:
            write_whole(onnx_file, _onnx_of(folder, card))
            yield f"wrote {onnx_file}: float32 features, scaled as the card says -> logits"
        if stac_file is not None:
            # links lead to the copy, where one was made
            write_whole(stac_file, model_item_text(out or folder, at=stac_file.absolute()).encode())
            yield f"wrote {stac_file}"


def _onnx_of(folder: Path, card: NetworkCard) -> bytes:
    from slidecube.models.onnx_files import export_onnx  # noqa: PLC0415  torch is slow to import

    if card.members:
        names = ", ".join(one.address for one in read_members(folder, card))
        raise ModelError(f"Model {card.address} is an ensemble of {names}; export its members one by one")
    return export_onnx(card, read_weights(folder, card))


def _read_tables(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: not valid TOML: {' '.join(str(error).split())}") from None
    for key in ("weights", "members"):
        if key in tables:
            raise ModelError(f"{path}: {key}: is written when weights are imported; leave it out")
    return tables


def _names(text: str | None) -> list[str]:
    if text is None:
        raise ModelError("Nothing says what the network reads; give --card, or --features A,B,...")
    if text in FEATURE_SETS:
        return list(FEATURE_SETS[text].names)
    return [name.strip() for name in text.split(",")]


def _numbers(text: str | None, key: str, count: int) -> list[float] | None:
    """Read numbers between commas; one alone is that of every feature."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ModelError(
            f"--{key}: got {text!r}; numbers between commas are allowed, one a feature"
        ) from None
    return found * count if len(found) == 1 else found


def _arguments(pairs: Sequence[str]) -> dict[str, Any]:
    from slidecube.models.importing import parse_arguments  # noqa: PLC0415

    return dict(parse_arguments(pairs))


def _without_none(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in tables.items()
        if value is not None
    }
