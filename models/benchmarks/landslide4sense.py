"""Landslide4Sense: 128 x 128 patches of Sentinel-2 Level 1C, slope and elevation with landslides as labels.

Source: Ghorbanzadeh et al. 2022, doi:10.1109/TGRS.2022.3215209. Its values are digital numbers without the offset of
2022, degrees and metres, each divided by a fixed number: multiplied back, the real patches are whole numbers.

The paper learns from "the first quarter generated patches" of each of four areas (959) and tests on the others (2,840).
The archive's files are numbered across the areas and carry neither area nor place, so this split cannot be made from
them: whoever has the list of the 959 numbers puts it beside them. The competition's split is that of its folders.

Axes in names: n patch, e edge pixel, c channel.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidecube.models.card import FeatureSpec
from slidecube.models.errors import ModelError
from slidecube.models.splits import PARTS, Part, Subset, cut_touching

PATCH_PX = 128
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12")
"""Bands of its channels, in order; there is no B8A (Landslide4Sense-2022, issue 3). Slope and elevation follow."""
DIVISORS = (
    1111.81, 824.63, 663.42, 445.17, 645.86, 1547.74, 1960.44, 1941.32, 674.08, 9.048, 1113.98, 519.90, 20.292, 772.83,
)  # fmt: skip
"""What the authors divided each channel by (Landslide4Sense-2022, issue 4)."""
SLOPE, ELEVATION = 12, 13
FOLDERS: dict[Part, str] = {"train": "TrainData", "validation": "ValidData", "test": "TestData"}
PAPER_LIST = "paper_train.txt"
"""File beside the patches that lists the numbers of the paper's 959, one a line."""
PAPER_VALIDATION = 0.15
"""Share of the paper's training patches that validate; it names none itself."""

_SCALE = 10_000.0
_NUMBER = re.compile(r"image_(\d+)\.h5")


def _channels() -> dict[str, tuple[int, float, str]]:
    """Name of a feature -> channel, factor and unit; as published (l4s_...), and in the pipeline's units."""
    found: dict[str, tuple[int, float, str]] = {}
    for channel, band in enumerate(BANDS):
        found[f"l4s_{band}"] = (channel, 1.0, "1")
        found[f"{band}_post"] = (channel, DIVISORS[channel] / _SCALE, "1")
    for channel, name, own, unit in (
        (SLOPE, "slope", "slope_deg", "degree"),
        (ELEVATION, "elevation", "elevation", "m"),
    ):
        found[f"l4s_{name}"] = (channel, 1.0, "1")
        found[own] = (channel, DIVISORS[channel], unit)
    return found


CHANNELS = _channels()
"""Features that its patches hold."""


@dataclass(frozen=True, kw_only=True)
class Landslide4Sense:
    """Labelled patches of a folder, see `Patches`.

    folder : holds img/ and mask/; numbers : of the patches, as in their names
    """

    folder: Path
    features: FeatureSpec
    numbers: tuple[int, ...]
    region: str

    @property
    def units(self) -> tuple[str, ...]:
        """Units of the features."""
        return tuple(CHANNELS[name][2] for name in self.features.names)

    @property
    def resolution_m(self) -> float:
        """Side of a pixel."""
        return 10.0

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        return PATCH_PX

    @property
    def regions(self) -> tuple[str, ...]:
        """One for all: the files do not say which of the four areas they are of."""
        return (self.region,) * len(self)

    @cached_property
    def digest(self) -> str:
        """Of the files' content and of the features."""
        whole = hashlib.sha256(f"{self.features}{self.region}".encode())
        for number in self.numbers:
            whole.update(f"{number}".encode())
            for path in (self.image(number), self.mask(number)):
                with path.open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()[:16]

    @cached_property
    def landslide_px(self) -> tuple[int, ...]:
        """Landslide pixels of each patch; reads all labels."""
        return tuple(int(_labels(self.mask(number)).sum()) for number in self.numbers)

    def image(self, number: int) -> Path:
        """File of a patch."""
        return self.folder / "img" / f"image_{number}.h5"

    def mask(self, number: int) -> Path:
        """File of its labels."""
        return self.folder / "mask" / f"mask_{number}.h5"

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:  # noqa: ARG002  patches are fixed
        """Read a patch: (f, y, x) float32 and (y, x) uint8 labels, 0 or 1.

        Raises ModelError for a damaged file, another shape, and labels other than 0 and 1.
        """
        number = self.numbers[index]
        image_yxc = _read(self.image(number), "img", (PATCH_PX, PATCH_PX, len(DIVISORS)))
        labels_yx = _labels(self.mask(number))
        chosen = [CHANNELS[name] for name in self.features.names]
        factors = np.array([factor for _, factor, _ in chosen])
        x_fyx = (image_yxc[:, :, [channel for channel, _, _ in chosen]] * factors).transpose(2, 0, 1)
        x_fyx[~np.isfinite(x_fyx)] = np.nan
        return np.ascontiguousarray(x_fyx, np.float32), labels_yx


def open_landslide4sense(
    folder: Path,
    features: FeatureSpec,
    *,
    use: str = "split",
    split: str = "competition",
    shares: tuple[float, float, float] = (0.7, 0.15, 0.15),
    region: str = "landslide4sense",
) -> dict[Part, Subset]:
    """Open an archive, or one folder of it with img/ and mask/.

    use : a part of `PARTS` that all patches of one folder go to, "blocks" (they are shared so that none touches one of
        another part), or "split", the benchmark's own: split "competition" or "paper"
    shares : of training, validation and test with "blocks"
    Returns patches by part. Raises ModelError for what is missing, damaged or no feature of it.
    """
    unknown = [name for name in features.names if name not in CHANNELS]
    if unknown:
        raise ModelError(
            f"Landslide4Sense has no feature {', '.join(unknown)}: it is one Level 1C image after the event; it has "
            f"{', '.join(CHANNELS)}"
        )
    if use == "split" and split == "competition":
        return _competition(folder, features, region)
    whole = _folder(folder, features, region)
    if use == "split":
        return _paper(whole)
    if use == "blocks":
        return _apart(whole, shares)
    return {part: Subset(of=whole, indices=tuple(range(len(whole)))) for part in PARTS if part == use}


def _competition(folder: Path, features: FeatureSpec, region: str) -> dict[Part, Subset]:
    missing = [name for name in FOLDERS.values() if not (folder / name).is_dir()]
    if missing:
        raise ModelError(
            f"{folder} has no {', '.join(missing)}, the folders of the competition's split; name the archive's folder, "
            'or with use = "blocks", "train", "validation" or "test" a folder with img and mask'
        )
    opened = {part: _folder(folder / name, features, region) for part, name in FOLDERS.items()}
    return {part: Subset(of=whole, indices=tuple(range(len(whole)))) for part, whole in opened.items()}


def _paper(whole: Landslide4Sense) -> dict[Part, Subset]:
    path = whole.folder / PAPER_LIST
    if not path.is_file():
        raise ModelError(
            f"{path}: no such file; the paper's 959 patches cannot be told from the archive, whose files carry neither "
            'area nor place; list their numbers there, one a line, or use split = "competition"'
        )
    words = path.read_text(encoding="utf-8").split()
    position = {number: i for i, number in enumerate(whole.numbers)}
    strange = next((word for word in words if not word.isdigit() or int(word) not in position), None)
    if strange is not None:
        raise ModelError(f"{path}: {strange!r} is no number of a patch of {whole.folder}")
    learnt = {position[int(word)] for word in words}
    inner = Subset(of=whole, indices=tuple(sorted(learnt)))
    parts = _parts_of(whole, inner.indices, (1 - PAPER_VALIDATION, PAPER_VALIDATION, 0.0))
    return parts | {"test": Subset(of=whole, indices=tuple(i for i in range(len(whole)) if i not in learnt))}


def _apart(whole: Landslide4Sense, shares: tuple[float, float, float]) -> dict[Part, Subset]:
    return _parts_of(whole, tuple(range(len(whole))), shares)


def _parts_of(
    whole: Landslide4Sense, indices: tuple[int, ...], shares: tuple[float, float, float]
) -> dict[Part, Subset]:
    """Share some patches so that none touches one of another part."""
    edges = [read_edges(whole.image(whole.numbers[i])) for i in indices]
    hash_n = np.array([_hash(whole.numbers[i]) for i in indices], np.uint64)
    part_n = cut_touching(touching(edges), hash_n, shares)
    return {
        part: Subset(of=whole, indices=tuple(i for i, of in zip(indices, part_n, strict=True) if of == at))
        for at, part in enumerate(PARTS)
    }


def _hash(number: int) -> int:
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big")


def _folder(folder: Path, features: FeatureSpec, region: str) -> Landslide4Sense:
    images, masks = folder / "img", folder / "mask"
    if not images.is_dir():
        inside = [name for name in FOLDERS.values() if (folder / name).is_dir()]
        hint = f"; it holds {', '.join(inside)}: name one of them" if inside else ""
        raise ModelError(f"{folder} has no folder img with image_1.h5, ...{hint}")
    numbers = sorted(int(m[1]) for m in map(_NUMBER.fullmatch, (p.name for p in images.iterdir())) if m)
    if not numbers:
        raise ModelError(f"{images} holds no image_1.h5, image_2.h5, ...; unpack the archive there")
    if not masks.is_dir():
        raise ModelError(
            f"{folder} has images and no folder mask; the labels of ValidData and TestData were published later: add "
            'them, or share TrainData with use = "blocks"'
        )
    made = Landslide4Sense(folder=folder, features=features, numbers=tuple(numbers), region=region)
    lacking = [number for number in numbers if not made.mask(number).is_file()]
    if lacking:
        raise ModelError(
            f"{made.mask(lacking[0])}: no such file, and image_{lacking[0]}.h5 is there ({len(lacking)} masks are "
            "missing); bring it back, or remove the image"
        )
    return made


def _labels(path: Path) -> NDArray[np.uint8]:
    raw = _read(path, "mask", (PATCH_PX, PATCH_PX))
    strange = sorted(set(np.unique(raw).tolist()) - {0, 1})
    if strange:
        raise ModelError(
            f"{path}: holds class {', '.join(f'{value:g}' for value in strange[:5])}; allowed: 0 (no landslide) and 1 "
            "(landslide)"
        )
    return raw.astype(np.uint8)


def _read(path: Path, key: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Read one array of a file; raises ModelError naming it."""
    try:
        import h5py  # noqa: PLC0415  an extra that only benchmarks need
    except ImportError:
        raise ModelError(f"{path}: to read HDF5 h5py is needed; pip install 'slidecube[nets]'") from None
    try:
        with h5py.File(path, "r") as file:
            if key not in file:
                raise ModelError(f"{path}: has no array {key!r}; it has {', '.join(file) or 'nothing'}")
            if file[key].shape != shape:
                raise ModelError(f"{path}: {key} has the shape {file[key].shape}; allowed: {shape}")
            values: NDArray[np.float64] = np.asarray(file[key][()], np.float64)
            return values
    except (OSError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{path}: damaged, or no HDF5 file ({' '.join(str(error).split())[:120]}); fetch it again"
        ) from None


# --- patches that touch

_COMPARED = (3, 7, 10, ELEVATION)
"""Channels by which edges are compared: red, near and short-wave infrared, elevation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """Outermost pixels of a patch and three more within on each side, (4, e, c) float64."""

    north: NDArray[np.float64]
    south: NDArray[np.float64]
    west: NDArray[np.float64]
    east: NDArray[np.float64]


def edges_of(image_yxc: NDArray[np.float64]) -> Edges:
    """Take the edges of a patch in the benchmark's channels."""
    chosen = image_yxc[:, :, _COMPARED] * np.array(DIVISORS)[list(_COMPARED)]
    return Edges(
        north=chosen[:4],
        south=chosen[:-5:-1],
        west=chosen[:, :4].swapaxes(0, 1),
        east=chosen[:, :-5:-1].swapaxes(0, 1),
    )


def read_edges(path: Path) -> Edges:
    """Read the edges of a patch."""
    return edges_of(_read(path, "img", (PATCH_PX, PATCH_PX, len(DIVISORS))))


def touching(edges: Sequence[Edges]) -> list[tuple[int, int]]:
    """Find pairs of patches that share an edge: nothing in the files says so, but the ground goes on.

    The step from one patch to the next is no larger than the steps within them, in every compared channel, and the two
    edges are alike. Found in the real patches cut into four: see the tests.
    """
    from scipy.spatial import cKDTree  # noqa: PLC0415  made once, and planning imports this module

    found: set[tuple[int, int]] = set()
    for one, other in (("east", "west"), ("south", "north")):
        ends = [getattr(edge, one) for edge in edges]
        starts = [getattr(edge, other) for edge in edges]
        if not ends:
            continue
        near = cKDTree(_heights(starts)).query_ball_point(_heights(ends), _NEAR_M, p=np.inf)
        found |= {
            (min(i, j), max(i, j))
            for i, js in enumerate(near)
            for j in js
            if i != j and _go_on(ends[i], starts[j])
        }
    return sorted(found)


_NEAR_M = 25.0
"""Edges whose heights, as means of eighths of them, differ by more do not touch."""
_STEPS = 4.0
"""How many times the mean step within the patches the step between them may be."""
_ALIKE = 0.4
"""Least mean correlation of the channels along two edges."""


def _heights(edges: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Mean heights of eighths of edges, (n, 8)."""
    heights = np.stack([edge[0, :, -1] for edge in edges])
    eighths: NDArray[np.float64] = np.nan_to_num(heights.reshape(len(edges), 8, -1).mean(axis=2))
    return eighths


def _go_on(end: NDArray[np.float64], start: NDArray[np.float64]) -> bool:
    """Tell whether one edge goes on in another, each (4, e, c), the outermost pixels first.

    The largest step within counts: bands of 20 m and the DEM are resampled, and every other step of theirs is small.
    """
    step_c = np.abs(end[0] - start[0]).mean(axis=0)
    within_c = np.max(
        [np.abs(np.diff(edge, axis=0)).mean(axis=1).max(axis=0) for edge in (end, start)], axis=0
    )
    floor_c = np.array([10.0, 20.0, 20.0, 1.5])  # digital numbers and metres: less is noise
    if (step_c > _STEPS * np.maximum(within_c, floor_c)).any():
        return False
    a_ec, b_ec = end[0] - end[0].mean(axis=0), start[0] - start[0].mean(axis=0)
    norm_c = np.sqrt((a_ec**2).sum(axis=0) * (b_ec**2).sum(axis=0))
    alike_c = np.where(norm_c > 0, (a_ec * b_ec).sum(axis=0) / np.maximum(norm_c, 1e-9), 1.0)
    return bool(alike_c.mean() >= _ALIKE)
