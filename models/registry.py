"""The registry: folders `<name>@<version>` with a card and its weights, in a few places that are looked at in turn.

Saved is saved: a version never changes. A folder comes into being whole, by one rename, so that what was killed on the
way is nowhere.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import pydantic

from slidecube.models.errors import ModelError
from slidecube.models.network_card import (
    CARD_FILE,
    Member,
    NetworkCard,
    Weights,
    card_refusal,
    read_card,
    read_members,
    read_weights,
    write_card,
)
from slidecube.models.predict import Detector
from slidecube.models.weights import write_whole

WEIGHTS_FILE = "weights.safetensors"

_ADDRESS = re.compile(r"([a-z0-9][a-z0-9_-]{0,62})(?:@([1-9]\d*))?")
_ABANDONED_S = 86_400.0
"""A model is copied within minutes; what was half made a day ago belongs to nobody."""


def user_root() -> Path:
    """Folder of the user's own models."""
    named = os.environ.get("SLIDECUBE_MODELS")
    share = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(named).expanduser().absolute() if named else Path(share) / "slidecube" / "models"


def shipped_root() -> Path:
    """Folder of the models that come with slidecube."""
    return Path(__file__).parent / "shipped"


def is_address(text: str) -> bool:
    """Tell "name" and "name@version" from a path."""
    return _ADDRESS.fullmatch(text) is not None


def versions_in(folders: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Names of folders that are models' -> name and version."""
    matches = {folder: _ADDRESS.fullmatch(folder) for folder in folders}
    return {folder: (m[1], int(m[2])) for folder, m in matches.items() if m is not None and m[2] is not None}


def held_in(root: Path) -> tuple[str, ...]:
    """Names of the folders of a root that hold a model, sorted by name and version."""
    try:
        folders = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    except OSError:
        return ()
    held = {name: at for name, at in versions_in(folders).items() if (root / name / CARD_FILE).is_file()}
    return tuple(sorted(held, key=held.__getitem__))


def choose(address: str, held: Mapping[str, Sequence[str]], *, others: Iterable[str] = ()) -> tuple[str, str]:
    """Choose a model among those that the roots hold: the version that was named, or the newest.

    held : root -> names of its folders, in the order in which roots count; others : names that exist beside them
    Returns the root and the name of the folder. Raises ModelError, with the nearest name, where there is none.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ModelError(
            f"{address!r} is no address of a model; write a name or name@version, such as 'rdndvi'"
        )
    found = [(version, root, folder) for root, folder, name, version in _models(held) if name == match[1]]
    wanted = [one for one in found if match[2] is None or one[0] == int(match[2])]
    if wanted:
        newest = max(version for version, _, _ in wanted)
        return next((root, folder) for version, root, folder in wanted if version == newest)
    if found:
        versions = ", ".join(str(version) for version in sorted({version for version, _, _ in found}))
        raise ModelError(f"No version {match[2]} of model {match[1]!r}; versions: {versions}")
    known = [*others, *sorted({name for _, _, name, _ in _models(held)})]
    near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ModelError(f"No model {address!r}{hint}; models: {', '.join(known) or 'none'}")


def _models(held: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str, str, int]]:
    for root, folders in held.items():
        for folder, (name, version) in versions_in(folders).items():
            yield root, folder, name, version


def find_model(address: str, roots: Sequence[Path]) -> Path:
    """Return the folder of a model, "name" (its newest version) or "name@version"; roots : the first counts most.

    Raises ModelError, with the nearest name, where there is none.
    """
    root, folder = choose(address, {str(root): held_in(root) for root in roots})
    return Path(root) / folder


def load_model(folder: Path, *, threshold: float | None = None, min_area_m2: float | None = None) -> Detector:
    """Load the network or the ensemble of a folder; None = the card's own.

    Everything is read at once: the folder may go. Raises ModelError for what is missing, damaged or was changed.
    """
    if read_card(folder).members:
        from slidecube.models.ensembles import Ensemble  # noqa: PLC0415  torch is slow to import

        return Ensemble.from_folder(folder, threshold=threshold, min_area_m2=min_area_m2)
    from slidecube.models.network import Network  # noqa: PLC0415  torch is slow to import

    return Network.from_folder(folder, threshold=threshold, min_area_m2=min_area_m2)


def verify_files(folder: Path) -> NetworkCard:
    """Check that a folder holds what its card says, members too; nothing is computed. Raises ModelError."""
    card = read_card(folder)
    if card.members:
        for member, one in zip(card.members, read_members(folder, card), strict=True):
            read_weights(folder / member.folder, one)
    else:
        read_weights(folder, card)
    return card


def files_of(card: NetworkCard, members: Sequence[NetworkCard] = ()) -> tuple[str, ...]:
    """Paths of a model's files within its folder, the card last; members : their cards, in its order."""
    if card.weights is not None:
        return card.weights.file, CARD_FILE
    inside = [
        f"{member.folder}/{name}"
        for member, one in zip(card.members, members, strict=True)
        for name in files_of(one)
    ]
    return *inside, CARD_FILE


def save_network(
    folder: Path, card: Mapping[str, Any], content: bytes, *, file: str = WEIGHTS_FILE
) -> NetworkCard:
    """Save a network, whole or not at all.

    card : fields of a NetworkCard without `weights`, which is made here; content : of the file of weights
    Raises ModelError for a card that is not allowed, and where the folder holds another model already.
    """
    weights = Weights(file=file, sha256=sha256(content).hexdigest())
    made = card_of(card, weights=weights)

    def fill(partial: Path) -> None:
        write_whole(partial / file, content)

    return _save(folder, made, fill)


def save_ensemble(folder: Path, members: Sequence[Path], card: Mapping[str, Any]) -> NetworkCard:
    """Save an ensemble, whole or not at all; its members are copied into it.

    members : folders of two or more networks; card : fields of a NetworkCard without `members`, which are made here
    Raises ModelError for members or a card that are not allowed, and where the folder holds another model already.
    """
    cards = [verify_files(member) for member in members]
    for one in cards:
        if one.members:
            raise ModelError(f"Model {one.address} is an ensemble itself; name its members")
    twice = [one.address for k, one in enumerate(cards) if one.identity in {c.identity for c in cards[:k]}]
    if twice:
        raise ModelError(f"Model {twice[0]} is named twice in an ensemble; name each once")
    addresses = [one.address for one in cards]
    names = [
        address if addresses.count(address) == 1 else f"{address}-{one.identity[:8]}"
        for address, one in zip(addresses, cards, strict=True)
    ]
    made = card_of(
        card,
        members=tuple(
            Member(folder=name, identity=one.identity) for name, one in zip(names, cards, strict=True)
        ),
    )

    def fill(partial: Path) -> None:
        for name, source, one in zip(names, members, cards, strict=True):
            copy_model(source, partial / name, files_of(one))

    return _save(folder, made, fill)


def copy_model(source: Path, folder: Path, files: Sequence[str]) -> None:
    """Copy a model's own files, and no others that lie beside them."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def free_version(root: Path, name: str) -> int:
    """Lowest version above all that a root holds of a name."""
    held = versions_in(held_in(root)).values()
    return 1 + max((version for other, version in held if other == name), default=0)


def require_same(card: NetworkCard, there: NetworkCard, folder: Path) -> None:
    """Raise ModelError where a folder holds another card than the one to be saved, whenever and by what it was made."""
    other = _differing(card, there)
    if not other:
        return
    free = max(free_version(folder.parent, card.name), card.version + 1)
    raise ModelError(
        f"{folder} holds another model already ({there.address}, {there.identity[:12]}...; other {', '.join(other)}), "
        f"and a saved version never changes; save this one as {card.name}@{free}"
    )


def _differing(card: NetworkCard, there: NetworkCard) -> list[str]:
    """Keys in which two cards differ."""
    one, two = (_flat(c.model_dump(mode="json", exclude={"created", "slidecube"})) for c in (card, there))
    return [key for key in dict.fromkeys((*one, *two)) if one.get(key) != two.get(key)]


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a card, and those within its tables."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        inner = value if isinstance(value, dict) else None
        found |= {key: value} if inner is None else {f"{key}.{name}": one for name, one in inner.items()}
    return found


def card_of(fields: Mapping[str, Any], **made: Any) -> NetworkCard:
    """Make a card of fields as a user or a training gives them. Raises ModelError, in one line, for what is wrong."""
    tables = {"slidecube": metadata.version("slidecube"), **fields, **made}
    try:
        return NetworkCard(**tables)
    except pydantic.ValidationError as error:
        raise ModelError(f"Card of model {fields.get('name', '')!r}: {card_refusal(error, tables)}") from None


def _save(folder: Path, card: NetworkCard, fill: Callable[[Path], None]) -> NetworkCard:
    """Make a folder of a card and what `fill` writes; one that holds the same model stays as it is.

    Returns the card that lies there.
    """
    while True:
        if (folder / CARD_FILE).is_file():
            there = read_card(folder)
            require_same(card, there, folder)
            return there
        with _partial(folder) as partial:
            fill(partial)
            write_card(partial, card)
            try:
                partial.rename(folder)
            except OSError:
                if (folder / CARD_FILE).is_file():  # another one was faster
                    continue
                raise ModelError(
                    f"{folder} is there already and holds no model; remove it, or name another folder"
                ) from None
            return card


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside another one; it is removed unless it was renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.*.partial"):
        if time.time() - stale.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(stale, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
