"""Sen12Landslides: series of 15 dates of Sentinel-2, or Sentinel-1, over 128 x 128 patches of 13 inventories.

Source: Hoehn et al. 2025, doi:10.1038/s41597-025-06167-2, its harmonised files: reflectances without the offset of
2022, backscatter in dB. Of a series one pair is made, before and after the event.

Its own split of landslide patches is random: of the 998 test patches of Sentinel-2 922 touch a patch to learn from
(counted in its published footprints; the tests count again). "blocks" and whole inventories left out have no such leak.

Axes in names: t date, n patch.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slidecube.models.card import FeatureSpec
from slidecube.models.errors import ModelError
from slidecube.models.patches import IGNORE
from slidecube.models.splits import PARTS, Part, Subset, cut_touching

PATCH_PX = 128
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
SCL_HIDDEN = (0, 1, 3, 8, 9, 10, 11)
"""Scene classes that hide the ground: nodata, saturated, shadow, clouds, cirrus, snow."""
SPLITS = ("tasks/S12LS-LD/harmonized/{0}/splits.json", "tasks/S12LS-LD/{0}/splits.json")
"""Where the split lies in its repository, the newest layout first."""
DATA = ("data/data_harmonized", "data")

Modality = Literal["s2", "s1asc", "s1dsc"]
Pairing = Literal["nearest", "clearest", "greenest"]
"""How a series becomes a pair.

nearest : the last date before the event and the first one after it, as the files name them
clearest : on each side the date with the fewest hidden pixels, of equal ones the nearest
greenest : on each side, pixel by pixel, the clear date of the highest NDVI; of Sentinel-1 the median
"""

_SPLIT_NAMES: dict[Part, str] = {"train": "train", "validation": "val", "test": "test"}
_SCALE = 10_000.0
_PIECES, _PIECE_BYTES = 16, 8_192
"""Of a file's content, evenly spread, that its digest looks at."""


def _channels(modality: Modality) -> dict[str, tuple[str, str, str]]:
    """Name of a feature -> variable, side and unit."""
    names = BANDS if modality == "s2" else ("VV", "VH")
    found = {}
    for name in names:
        for side in ("pre", "post"):
            own = f"{name}_{side}" if modality == "s2" else f"{name.lower()}_{side}"
            found[own] = (name, side, "1" if modality == "s2" else "dB")
    return {**found, "elevation": ("DEM", "", "m")}


CHANNELS: Mapping[Modality, Mapping[str, tuple[str, str, str]]] = {
    "s2": _channels("s2"),
    "s1asc": _channels("s1asc"),
    "s1dsc": _channels("s1dsc"),
}
"""Features that its patches hold, by modality."""


@dataclass(frozen=True, kw_only=True)
class Sen12Landslides:
    """Labelled pairs of one modality, see `Patches`.

    files, regions, landslide_px : of each patch its file, its inventory, and its landslide pixels as its split says
    """

    files: tuple[Path, ...]
    regions: tuple[str, ...]
    landslide_px: tuple[int, ...]
    features: FeatureSpec
    modality: Modality
    pairing: Pairing

    @property
    def units(self) -> tuple[str, ...]:
        """Units of the features."""
        return tuple(CHANNELS[self.modality][name][2] for name in self.features.names)

    @property
    def resolution_m(self) -> float:
        """Side of a pixel."""
        return 10.0

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        return PATCH_PX

    @cached_property
    def digest(self) -> str:
        """Of the files' names and sizes and of some of their content: to read all 30 GB would take minutes."""
        whole = hashlib.sha256(f"{self.features}{self.modality}{self.pairing}".encode())
        for path, region in zip(self.files, self.regions, strict=True):
            size = path.stat().st_size
            whole.update(f"{path.name} {region} {size}".encode())
            with path.open("rb") as file:
                for piece in range(_PIECES):
                    file.seek(size * piece // _PIECES)
                    whole.update(file.read(_PIECE_BYTES))
        return whole.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:  # noqa: ARG002  patches are fixed
        """Read a pair: (f, y, x) float32, NaN = unknown, and (y, x) uint8 labels, 255 where anything is unknown.

        Raises ModelError for a damaged file, another layout, and labels other than 0 and 1.
        """
        path = self.files[index]
        with _opened(path) as data:
            sides = _sides(path, data, self.modality)
            values = {}
            for name in self.features.names:
                variable, side, _ = CHANNELS[self.modality][name]
                values[name] = sides.of(variable, side, self.pairing) if side else _elevation(path, data)
            labels_yx = _labels(path, data)
        x_fyx = np.stack([values[name] for name in self.features.names]).astype(np.float32)
        labels_yx[~np.isfinite(x_fyx).all(axis=0)] = IGNORE
        return x_fyx, labels_yx


def open_sen12landslides(
    folder: Path,
    features: FeatureSpec,
    *,
    modality: Modality = "s2",
    pairing: Pairing = "greenest",
    use: str = "split",
    shares: tuple[float, float, float] = (0.7, 0.15, 0.15),
    region: str | None = None,
) -> dict[Part, Subset]:
    """Open its repository's folder, with data/ and tasks/ as published.

    use : a part of `PARTS` that all of its patches go to, "blocks" (they are shared so that none touches one of another
        part), or "split", its own; shares : of the parts with "blocks"
    region : one name for all in place of their inventories
    Returns patches by part. Raises ModelError for what is missing, damaged or no feature of it.
    """
    known = CHANNELS[modality]
    unknown = [name for name in features.names if name not in known]
    if unknown:
        raise ModelError(
            f"Sen12Landslides ({modality}) has no feature {', '.join(unknown)}; it has {', '.join(known)}"
        )
    entries = _entries(folder, modality)
    flat = [(part, entry) for part in PARTS for entry in entries[part]]
    whole = Sen12Landslides(
        files=tuple(entry.path for _, entry in flat),
        regions=tuple(region or entry.inventory for _, entry in flat),
        landslide_px=tuple(entry.landslide_px for _, entry in flat),
        features=features,
        modality=modality,
        pairing=pairing,
    )
    if use == "blocks":
        hash_n = np.array([_hash(path.name) for path in whole.files], np.uint64)
        parts = [PARTS[at] if at >= 0 else None for at in cut_touching(touching(whole.files), hash_n, shares)]
    else:
        parts = [part if use == "split" else None for part, _ in flat]
        if use in PARTS:
            parts = [next(part for part in PARTS if part == use)] * len(flat)
    return {
        part: Subset(of=whole, indices=tuple(i for i, of in enumerate(parts) if of == part)) for part in PARTS
    }


def touching(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Find pairs of patches that touch or overlap, by the places in their files; zones of one CRS each."""
    from scipy.spatial import cKDTree  # noqa: PLC0415  made once, and planning imports this module

    by_crs: dict[str, list[int]] = {}
    places = []
    for n, path in enumerate(files):
        with _opened(path) as data:
            places.append((float(np.mean(data["x"].values)), float(np.mean(data["y"].values))))
            by_crs.setdefault(str(data.attrs.get("crs", "")), []).append(n)
    found: set[tuple[int, int]] = set()
    for members in by_crs.values():
        tree = cKDTree(np.array([places[n] for n in members]))
        side_m = PATCH_PX * 10.0
        pairs = tree.query_pairs(
            side_m + 15.0, p=np.inf
        )  # half a pixel of rounding on each side, and one between
        found |= {(min(members[i], members[j]), max(members[i], members[j])) for i, j in pairs}
    return sorted(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One patch of a split."""

    path: Path
    inventory: str
    landslide_px: int


def _entries(folder: Path, modality: Modality) -> dict[Part, list[_Entry]]:
    """Patches of each part of its own split."""
    tried = [folder / where.format(modality) for where in SPLITS]
    path = next((place for place in tried if place.is_file()), None)
    if path is None:
        raise ModelError(
            f"{tried[0]}: no such file; name the folder of the repository, with data/ and tasks/"
        )
    data = next((folder / where for where in DATA if (folder / where / modality).is_dir()), None)
    if data is None:
        raise ModelError(
            f"{folder / DATA[0] / modality}: no such folder; unpack the harmonised archives there"
        )
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        found = {
            part: [
                _Entry(
                    path=data / entry[modality],
                    inventory=str(entry["inventory"]),
                    landslide_px=int(entry.get("pixel_annotated", 0)),
                )
                for entry in said[name]
            ]
            for part, name in _SPLIT_NAMES.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: no split as published, lists train, val and test of {modality} and inventory ({error}); fetch it "
            "again"
        ) from None
    lacking = [entry.path for entries in found.values() for entry in entries if not entry.path.is_file()]
    if lacking:
        raise ModelError(
            f"{lacking[0]}: no such file, and {path.name} names it ({len(lacking)} are missing); unpack all archives"
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """A series in the order of its dates; last_pre, first_post : around the event; hidden_tyx : not the ground."""

    path: Path
    data: Any
    order: NDArray[np.int64]
    last_pre: int
    first_post: int
    hidden_tyx: NDArray[np.bool_]

    def of(self, variable: str, side: str, pairing: Pairing) -> NDArray[np.float64]:
        """Values of a variable before or after the event, (y, x), NaN = unknown."""
        radar = variable in ("VV", "VH")
        values_tyx = _decibels if radar else _reflectances
        made: NDArray[np.float64] = values_tyx(self.path, _series(self.path, self.data, variable)[self.order])
        made[self.hidden_tyx] = np.nan
        steps = np.arange(self.last_pre + 1) if side == "pre" else np.arange(self.first_post, len(made))
        nearest_first = steps[::-1] if side == "pre" else steps
        if pairing != "greenest":
            hidden = self.hidden_tyx[nearest_first].mean(axis=(1, 2))
            chosen: NDArray[np.float64] = made[
                nearest_first[int(np.argmin(hidden)) if pairing == "clearest" else 0]
            ]
            return chosen
        if radar:
            return _median(made[steps])
        best_yx = self._greenest(nearest_first)
        picked = np.take_along_axis(made[nearest_first], best_yx[None], axis=0)[0]
        return np.where(self.hidden_tyx[nearest_first].all(axis=0), np.nan, picked)

    def _greenest(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position in the steps of the clear date of the highest NDVI, (y, x)."""
        red, near = (
            _reflectances(self.path, _series(self.path, self.data, band)[self.order])[steps]
            for band in ("B04", "B08")
        )
        total = near + red
        ndvi = np.where(total > 0, (near - red) / np.where(total > 0, total, 1), -2.0)
        ndvi = np.where(self.hidden_tyx[steps] | ~np.isfinite(ndvi), -np.inf, ndvi)
        best: NDArray[np.int64] = ndvi.argmax(axis=0)
        return best


def _median(values_tyx: NDArray[np.float64]) -> NDArray[np.float64]:
    unknown = np.isnan(values_tyx).all(axis=0)
    filled = np.where(unknown, 0.0, values_tyx)  # numpy warns of pixels without any value
    return np.where(unknown, np.nan, np.nanmedian(filled, axis=0))


def _sides(path: Path, data: Any, modality: Modality) -> _Sides:
    order = np.argsort(data["time"].values, kind="stable")
    try:
        said = data.attrs["pre_post_dates"]
        pair = said if isinstance(said, Mapping) else ast.literal_eval(str(said))
        last_pre, first_post = int(pair["pre"]), int(pair["post"])
    except (KeyError, ValueError, SyntaxError, TypeError):
        raise ModelError(
            f"{path}: says no pre_post_dates, such as {{'pre': 7, 'post': 8}}: it has no event, and is no pair"
        ) from None
    if not 0 <= last_pre < first_post < len(order):
        raise ModelError(
            f"{path}: pre_post_dates names dates {last_pre} and {first_post} of {len(order)}; allowed: one before "
            "another"
        )
    if modality == "s2":
        hidden = np.isin(_series(path, data, "SCL")[order], SCL_HIDDEN)
    else:
        hidden = np.zeros((len(order), PATCH_PX, PATCH_PX), bool)
    return _Sides(
        path=path, data=data, order=order, last_pre=last_pre, first_post=first_post, hidden_tyx=hidden
    )


def _series(path: Path, data: Any, variable: str) -> NDArray[Any]:
    if variable not in data:
        raise ModelError(f"{path}: has no variable {variable}; it has {', '.join(map(str, data.data_vars))}")
    values = data[variable]
    shape = (data.sizes.get("time", 0), PATCH_PX, PATCH_PX)
    if values.dims != ("time", "y", "x") or values.shape != shape:
        raise ModelError(
            f"{path}: {variable} is {values.dims} of {values.shape}; allowed: (time, y, x) of {PATCH_PX} x {PATCH_PX}"
        )
    found: NDArray[Any] = values.values
    return found


def _reflectances(_path: Path, dn_tyx: NDArray[Any]) -> NDArray[np.float64]:
    """Reflectance of digital numbers without offset; 0 = unknown."""
    return np.where(dn_tyx > 0, dn_tyx / _SCALE, np.nan)


def _decibels(path: Path, db_tyx: NDArray[Any]) -> NDArray[np.float64]:
    known = np.isfinite(db_tyx)
    if known.any() and float(np.min(db_tyx[known])) >= 0:
        raise ModelError(
            f"{path}: its backscatter is no dB, but linear power: of the raw files; use the harmonised ones"
        )
    return np.where(known, db_tyx, np.nan).astype(np.float64)


def _elevation(path: Path, data: Any) -> NDArray[np.float64]:
    """Heights in metres; they are stored for every date, and the same."""
    if "DEM" not in data or data["DEM"].shape[-2:] != (PATCH_PX, PATCH_PX):
        raise ModelError(f"{path}: has no DEM of {PATCH_PX} x {PATCH_PX} pixels")
    values = np.asarray(data["DEM"].values, np.float64)
    found: NDArray[np.float64] = values[0] if values.ndim == 3 else values
    return found


def _labels(path: Path, data: Any) -> NDArray[np.uint8]:
    """Labels of the first date; they are stored for every one, and the same."""
    if "MASK" not in data or data["MASK"].shape[-2:] != (PATCH_PX, PATCH_PX):
        raise ModelError(f"{path}: has no MASK of {PATCH_PX} x {PATCH_PX} pixels")
    values = np.asarray(data["MASK"].values)
    first = values[0] if values.ndim == 3 else values
    strange = sorted(set(np.unique(first).tolist()) - {0, 1})
    if strange:
        raise ModelError(
            f"{path}: MASK holds class {', '.join(f'{value:g}' for value in strange[:5])}; allowed: 0 (no landslide) "
            "and 1 (landslide)"
        )
    return np.array(first, np.uint8)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file; raises ModelError naming it."""
    import xarray as xr  # noqa: PLC0415  planning imports this module

    try:
        data = xr.open_dataset(path, engine="h5netcdf", mask_and_scale=False, decode_times=False)
    except ModuleNotFoundError:
        raise ModelError(
            f"{path}: to read NetCDF h5netcdf is needed; pip install 'slidecube[nets]'"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"{path}: damaged, or no NetCDF file ({' '.join(str(error).split())[:120]}); fetch it again"
        ) from None
    try:
        yield data
    except (OSError, KeyError) as error:
        raise ModelError(f"{path}: damaged ({' '.join(str(error).split())[:120]}); fetch it again") from None
    finally:
        data.close()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
