"""Statistics: what is fitted once to the layers of an epoch, then frozen, and versioned like a model.

The manifest is written last. What it does not vouch for, by name and checksum, does not count.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slidecube.models.predict import Detector
from slidecube.models.unsupervised import Kmeans
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import mnf_images
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.mnf_strata import StratifiedMnf
from slidecube.pipeline.storage import Place, below, fetched, matching, write_atomic

MANIFEST = "statistics.json"
MODEL = "model"
SHEET = "sheet/index.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What was fitted.

    key : stat_key; digest : of all that was frozen, "" where nothing had to be fitted
    mnf : image ("post", "change") -> its MNF, strata included; detector : as fitted
    clusters : landslide clusters as the rule named them, None for a model that does not cluster
    contributed : tiles whose layers were whole when it was fitted; pixels : that were counted
    """

    key: str
    digest: str
    mnf: Mapping[str, StratifiedMnf]
    detector: Detector
    clusters: tuple[int, ...] | None = None
    contributed: frozenset[str] = frozenset()
    pixels: int = 0

    def with_clusters(self, clusters: tuple[int, ...] | None) -> Statistics:
        """Take a person's landslide clusters; None keeps what the rule named."""
        if clusters is None or not isinstance(self.detector, Kmeans):
            return self
        return replace(
            self, detector=self.detector.with_landslide(tuple(sorted(clusters))), clusters=clusters
        )


def mnf_file(folder: Place, image: str) -> Place:
    """File of the MNF of an image."""
    return folder / f"mnf-{image}.json"


def strata_file(folder: Place, image: str) -> Place:
    """File of the MNF of an image's strata."""
    return folder / f"mnf-{image}.strata.json"


def read_mnf(folder: Place, image: str) -> StratifiedMnf:
    """Read the MNF of an image, and those of its strata where there are some."""
    strata = strata_file(folder, image)
    return StratifiedMnf.from_json(
        mnf_file(folder, image).read_text(encoding="utf-8"),
        strata.read_text(encoding="utf-8") if strata.is_file() else "",
    )


def freeze(
    folder: Place, *, key: str, model: Detector, files: Iterable[Place], facts: Mapping[str, Any]
) -> None:
    """Write the manifest: from now on this is what the key means."""
    manifest = {
        "key": key,
        "model": model.card.address,
        "inputs": list(model.card.inputs.names),
        "files": {below(path, folder): sha256_of(path) for path in files},
        **facts,
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))


def read_manifest(folder: Place) -> dict[str, Any]:
    """Read the manifest of frozen statistics, {} where nothing is frozen."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        raise PipelineError(
            f"{folder / MANIFEST} is damaged; remove {folder}, and run `slidecube fit`"
        ) from None
    return manifest


def frozen_digest(folder: Place) -> str:
    """Digest of what decides a pixel in frozen statistics, "" where nothing is frozen."""
    manifest = read_manifest(folder)
    if not manifest:
        return ""
    return content_key(_deciding(manifest), manifest.get("clusters"), manifest["model"], manifest["inputs"])


def _deciding(manifest: dict[str, Any]) -> dict[str, str]:
    """Files that decide a pixel, with their checksums; tables, pictures and the sheet do not."""
    return {
        name: checksum
        for name, checksum in manifest["files"].items()
        if name.startswith(f"{MODEL}/") or (name.startswith("mnf-") and name.endswith(".json"))
    }


def load_statistics(folder: Place, model: Detector) -> Statistics:
    """Read frozen statistics for a model.

    model : as built, not fitted
    Raises PipelineError when there are none, when a file is not what was frozen, or when they belong to another model.
    """
    manifest = read_manifest(folder)
    if not manifest:
        raise PipelineError(_missing(folder))
    card = model.card
    if (manifest["model"], tuple(manifest["inputs"])) != (card.address, card.inputs.names):
        raise PipelineError(
            f"Statistics {folder.name} were fitted for {manifest['model']} on {', '.join(manifest['inputs'])}; "
            f"{card.address} reads {', '.join(card.inputs.names)}; leave [fit] statistics out, or name others"
        )
    for name, checksum in _deciding(manifest).items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != checksum:
            raise PipelineError(
                f"{path} is not what was frozen; bring it back, or remove {folder} and run `slidecube fit`"
            )
    clusters = manifest.get("clusters")
    fitted = model
    if card.sample_patches:
        with fetched(folder / MODEL) as local:
            fitted = model.restore(local)
    if clusters is not None and isinstance(fitted, Kmeans):
        fitted = fitted.with_landslide(tuple(clusters))
    return Statistics(
        key=manifest["key"],
        digest=frozen_digest(folder),
        mnf={image: read_mnf(folder, image) for image in mnf_images(card.inputs)},
        detector=fitted,
        clusters=None if clusters is None else tuple(clusters),
        contributed=frozenset(manifest["contributed"]),
        pixels=manifest["pixels"],
    )


def cached_statistics(folder: Place, digest: str, model: Detector) -> Statistics:
    """Read statistics once a process; digest : of what is frozen now, so that another freeze is read anew."""
    place = (folder, digest, repr(model.card))
    with _reading:  # tiles on several threads ask at once
        if place not in _read:
            if len(_read) >= _KEPT:
                _read.clear()
            _read[place] = load_statistics(folder, model)
        return _read[place]


_KEPT = 8
_read: dict[tuple[Place, str, str], Statistics] = {}
_reading = threading.Lock()


def _missing(folder: Place) -> str:
    known = [place.parent.name for place in matching(folder.parent, f"*/{MANIFEST}")]
    there = f"there are: {', '.join(known)}" if known else "there are none"
    return f"No fitted statistics {folder.name} in {folder.parent}; {there}; `slidecube fit` makes those of a plan"


def sha256_of(path: Place) -> str:
    """Checksum of a file, "" where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
