"""The STAC item of a network, by the Machine Learning Model extension (MLM 1.4.0): what it reads, gives, and is."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pystac

from slidecube.models.network_card import CARD_FILE, NetworkCard, headline, model_card, read_members
from slidecube.models.registry import verify_files
from slidecube.pipeline.model_registry import require_adopted
from slidecube.pipeline.run_plan import RunPlan
from slidecube.pipeline.stac import item_text, multihash
from slidecube.pipeline.storage import Place, fetched, relative_href, write_atomic

MLM = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"
EXTENSIONS = (
    MLM,
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
    "https://stac-extensions.github.io/version/v1.2.0/schema.json",
)

ALWAYS = {"start_datetime": "1900-01-01T00:00:00Z", "end_datetime": "9999-12-31T23:59:59Z"}
"""A network may be tried on any day's images: MLM's way to say so."""

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

_CLASSES = [
    {"value": 0, "name": "no_landslide", "description": "No landslide"},
    {"value": 1, "name": "landslide", "description": "Landslide"},
]


def model_item(folder: Path, *, at: Path, lies: Path | None = None) -> pystac.Item:
    """Describe the network or the ensemble of a folder; nothing is written.

    at : where the item will lie, to which hrefs are relative; lies : where the folder does, if this is a copy of it
    Raises ModelError for a folder that does not hold what its card says.
    """
    card = verify_files(folder)
    members = read_members(folder, card)
    files = _weights_files(folder, card, members)
    item = pystac.Item(
        id=card.address,
        geometry=None,
        bbox=None,
        datetime=None,
        properties={"datetime": None, **ALWAYS, **_properties(card, members, list(files.values()))},
        stac_extensions=list(EXTENSIONS),
    )
    for key, path in files.items():
        item.add_asset(key, _weights_asset(path, card))
    item.add_asset(
        "card",
        _asset(folder / CARD_FILE, title="Card", roles=["metadata"], media_type="application/toml"),
    )
    for asset in item.assets.values():
        path = (lies or folder).absolute() / Path(asset.href).relative_to(folder)
        asset.href = Path(os.path.relpath(path, at.parent)).as_posix()
    item.set_self_href(str(at))
    return item


def model_item_text(folder: Path, *, at: Path, lies: Path | None = None) -> str:
    """JSON of the item, the same for the same model."""
    return item_text(model_item(folder, at=at, lies=lies))


def write_model_item(plan: RunPlan, out_dir: Path, folder: Place) -> Path | None:
    """Write the item of a run's network among the products; None where a rule detects.

    out_dir : folder of the products on this machine; folder : where they will lie
    """
    if plan.network is None:
        return None
    place = require_adopted(plan.workspace, plan.network)
    at = out_dir / "stac" / f"{plan.network.address}.json"
    at.parent.mkdir(parents=True, exist_ok=True)
    with fetched(place) as local:
        write_atomic(at, model_item_text(local, at=at, lies=out_dir / relative_href(place, folder)))
    return at


def model_properties(card: NetworkCard, members: tuple[NetworkCard, ...] = ()) -> dict[str, Any]:
    """MLM's fields of a network that need no file."""
    inputs, window_px = card.inputs, _window_px(card, members)
    arguments = dict(card.architecture.arguments) if card.architecture else {}
    return {
        # '@' is not allowed in it, and a digit not at its start
        "mlm:name": f"slidecube {card.name} {card.version}",
        "mlm:architecture": model_card(card, members=members).architecture,
        "mlm:tasks": ["semantic-segmentation"],
        "mlm:framework": "ONNX" if card.architecture and card.architecture.name == "onnx" else "PyTorch",
        "mlm:accelerator": None,
        "mlm:accelerator_constrained": False,
        "mlm:input": [
            {
                "name": "features",
                "bands": list(inputs.names),
                "input": _shape(len(inputs.names), window_px, "bands"),
                "value_scaling": [
                    {"type": "z-score", "mean": mean, "stddev": std}
                    for mean, std in zip(inputs.mean, inputs.std, strict=True)
                ],
                "resize_type": None,
                "description": "Unknown values are 0 after scaling; pixels of which one is unknown have no answer"
                + (", and each member has a scaling of its own" if members else ""),
            }
        ],
        "mlm:output": [
            {
                "name": "probability",
                "tasks": ["semantic-segmentation"],
                "result": _shape(1, window_px, "channel"),
                "classification:classes": _CLASSES,
                "post_processing_function": {"format": "text", "expression": _post_processing(card)},
            }
        ],
        "mlm:hyperparameters": {
            **{key: value for key, value in arguments.items() if re.fullmatch(r"[0-9a-zA-Z_.-]+", key)},
            "threshold": card.output.threshold,
            "min_area_m2": card.output.min_area_m2,
            "window_px": window_px,
        },
        "bands": [
            {"name": name, "unit": unit} for name, unit in zip(inputs.names, inputs.units, strict=True)
        ],
        "gsd": inputs.resolution_m,
        "version": str(card.version),
        "license": card.licence if re.fullmatch(r"[\w\-.+]+", card.licence) else "other",
        "slidecube:simulated": card.simulated,
        "slidecube:identity": card.identity,
        "slidecube:licence": card.licence,
        "slidecube:source": card.source,
        "slidecube:metrics": dict(card.metrics),
        "slidecube:null_run": dict(card.null_run),
        "slidecube:training": dict(card.training),
    }


def _properties(card: NetworkCard, members: tuple[NetworkCard, ...], files: list[Path]) -> dict[str, Any]:
    simulated = " Trained on SIMULATED scenes." if card.simulated else ""
    said = f" {headline(card)}." if headline(card) else ""
    counts = [_parameters(path) for path in files]
    known = [count for count in counts if count is not None]
    return {
        "title": f"Landslide network {card.address}",
        "description": f"{card.description.rstrip('.')}.{simulated}{said}",
        **({"created": card.created} if re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", card.created) else {}),
        **({"mlm:total_parameters": sum(known)} if len(known) == len(counts) else {}),
        **model_properties(card, members),
    }


def _post_processing(card: NetworkCard) -> str:
    calibration = card.calibration
    if card.members:
        return f"mean of the members' probabilities; landslide from {card.output.threshold:g}"
    of = {
        "none": "sigmoid(logit)",
        "temperature": f"sigmoid(logit / {calibration.temperature:g})",
        "isotonic": "linear between the points of [calibration] in the card",
    }[calibration.method]
    by = f", of each {calibration.by} another temperature" if calibration.strata else ""
    return f"probability = {of}{by}; landslide from {card.output.threshold:g}"


def _window_px(card: NetworkCard, members: tuple[NetworkCard, ...]) -> int:
    return max(one.architecture.window_px for one in (card, *members) if one.architecture is not None)


def _shape(count: int, side_px: int, name: str) -> dict[str, Any]:
    return {
        "shape": [-1, count, side_px, side_px],
        "dim_order": ["batch", name, "height", "width"],
        "data_type": "float32",
    }


def _weights_files(folder: Path, card: NetworkCard, members: tuple[NetworkCard, ...]) -> Mapping[str, Path]:
    if card.weights is not None:
        return {"weights": folder / card.weights.file}
    return {
        f"weights-{k + 1}": folder / member.folder / one.weights.file
        for k, (member, one) in enumerate(zip(card.members, members, strict=True))
        if one.weights is not None
    }


def _parameters(path: Path) -> int | None:
    """Count what was learnt of a safetensors file by its header alone; None of an ONNX.

    Means and variances of batch normalisation are kept with it, and are no parameters.
    """
    if path.suffix != ".safetensors":
        return None
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    count = 0
    for name, tensor in header.items():
        if name != "__metadata__" and name.rpartition(".")[2] not in _BUFFERS:
            count += math.prod(tensor["shape"])
    return count


def _weights_asset(path: Path, card: NetworkCard) -> pystac.Asset:
    onnx = path.suffix == ".onnx"
    asset = _asset(
        path,
        title="Weights",
        roles=["mlm:model", "mlm:weights", "data"],
        media_type="application/octet-stream; application=onnx"
        if onnx
        else "application/octet-stream; application=safetensors",
    )
    asset.extra_fields["mlm:artifact_type"] = "onnx" if onnx else "safetensors.torch.save_file"
    asset.extra_fields["description"] = card.description
    # MLM wants them in the properties, where the core allows them only if an asset names some
    asset.extra_fields["bands"] = [{"name": name} for name in card.inputs.names]
    return asset


def _asset(path: Path, *, title: str, roles: list[str], media_type: str) -> pystac.Asset:
    return pystac.Asset(
        href=str(path),
        title=title,
        media_type=media_type,
        roles=roles,
        extra_fields={"file:size": path.stat().st_size, "file:checksum": multihash(path)},
    )
