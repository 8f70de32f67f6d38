"""Sentinel-1 items: from which track the ground was seen, in which polarisations, and what their numbers are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from slidecube.catalog.errors import CatalogError
from slidecube.catalog.scenes import Scene
from slidecube.catalog.sources import RADAR_BANDS, SOURCES, Quantity

OrbitState = Literal["ascending", "descending"]

# relative orbit = (absolute orbit - first) % 175 + 1. Source: ESA, Sentinel-1 product definition
_FIRST_ORBIT = {"S1A": 73, "S1B": 27, "S1C": 172}
_CYCLE = 175
_INTEGERS = ("uint8", "uint16", "int16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquisition:
    """How a radar scene was taken, as far as its item tells.

    orbit_state : None where the item does not say it; relative_orbit : 1 to 175, from the properties, else the name
    polarisations : that it has bands of, such as ("VH", "VV")
    quantity : "gamma0" (terrain corrected), "sigma0" (calibrated), "dn" (amplitudes that nobody calibrated)
    looks : equivalent number of looks, None where the item does not say it
    incidence_deg : of its centre, None where the item does not say it
    """

    orbit_state: OrbitState | None
    relative_orbit: int
    polarisations: tuple[str, ...]
    quantity: Quantity
    looks: float | None = None
    incidence_deg: float | None = None


def acquisition_of(scene: Scene) -> Acquisition:
    """Read how a radar scene was taken.

    Raises CatalogError where an item does not say its relative orbit, or what its numbers are.
    """
    said = scene.item.get("properties") or {}
    state = str(said.get("sat:orbit_state") or "").lower()
    return Acquisition(
        orbit_state=cast("OrbitState", state) if state in ("ascending", "descending") else None,
        relative_orbit=_relative_orbit(scene, said),
        polarisations=tuple(sorted(band for band in scene.bands if band in RADAR_BANDS)),
        quantity=_quantity(scene, said),
        looks=_number(said.get("sar:looks_equivalent_number")),
        incidence_deg=_number(said.get("view:incidence_angle")),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _relative_orbit(scene: Scene, said: Mapping[str, Any]) -> int:
    stated = said.get("sat:relative_orbit")
    if isinstance(stated, int) and 1 <= stated <= _CYCLE:
        return stated
    if match := re.search(r"_T(\d{3})-\d{6}-IW\d_", scene.id):  # OPERA counts bursts along the track
        return int(match[1])
    absolute = said.get("sat:absolute_orbit")
    match = re.search(r"(S1[A-C])_.*_(\d{6})_[0-9A-F]{6}", scene.id)
    if match:
        number = absolute if isinstance(absolute, int) else int(match[2])
        return (number - _FIRST_ORBIT[match[1]]) % _CYCLE + 1
    raise CatalogError(
        f"Item {scene.id!r} does not say its relative orbit, from which its geometry follows; add sat:relative_orbit "
        "(1 to 175) to it, or leave it out"
    )


def _quantity(scene: Scene, said: Mapping[str, Any]) -> Quantity:
    known = SOURCES.get(scene.source)
    if known is not None and known.quantity:
        return known.quantity
    words = f"{said.get('sar:product_type') or ''} {scene.item.get('collection') or ''} {scene.id}".lower()
    if re.search(r"rtc|nrb|gamma0", words):
        return "gamma0"
    if re.search(r"grd|sigma0", words):
        kinds = {str(_data_type(scene.item["assets"][key])) for key in scene.bands.values()}
        return "dn" if kinds & set(_INTEGERS) else "sigma0"
    raise CatalogError(
        f"Item {scene.id!r} does not say whether its backscatter is gamma0 or sigma0; set sar:product_type to 'RTC' or "
        "'GRD', or leave it out"
    )


def _data_type(asset: Mapping[str, Any]) -> Any:
    bands = asset.get("raster:bands") or asset.get("bands") or [{}]
    return bands[0].get("data_type") or asset.get("data_type")
