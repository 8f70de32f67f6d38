"""The report's numbers: plain values out of an inventory and its objects, no drawing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import geopandas as gpd
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from scipy.special import gamma

from slidecube.pipeline.evaluate import SIZE_EDGES_M2, size_label
from slidecube.pipeline.inventory import REASONS, Observability, stored

WINDOW_PX = 2048

MALAMUD_RHO, MALAMUD_A_M2, MALAMUD_S_M2 = 1.40, 1.28e3, -1.32e2
"""Three-parameter inverse gamma of landslide areas. Source: Malamud et al. 2004, eq. 3; a, s from km2 to m2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the area of interest; share : of the whole of it, 0 when there is none."""

    value: int
    label: str
    n_px: int
    km2: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What of the area of interest could be seen. parts : by observability; reasons : of what was not observable.

    bounds : left, bottom, right, top of the area of interest's pixels, on the map; of all pixels when there are none
    """

    parts: tuple[Part, ...]
    reasons: tuple[Part, ...]
    aoi_km2: float
    bounds: tuple[float, float, float, float]

    @property
    def share(self) -> float:
        """Observed share of the area of interest."""
        return sum(p.share for p in self.parts if p.value == Observability.OBSERVED)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRow:
    """One size class: how many objects, and their area together."""

    label: str
    n: int
    share: float
    area_m2: float
    area_share: float


def observed_parts(inventory: xr.Dataset, geobox: GeoBox, *, epoch: int = 0) -> Observed:
    """Count observability and reasons, window by window; areas are those of the map's pixels."""
    seen = np.zeros(256, np.int64)
    why = np.zeros(256, np.int64)
    rows_in = np.zeros(inventory.sizes["y"], bool)
    cols_in = np.zeros(inventory.sizes["x"], bool)
    observability = stored(inventory, "observability", epoch=epoch)
    reason = stored(inventory, "reason", epoch=epoch) if "reason" in inventory else None
    for rows, cols in windows(*observability.shape):
        values = np.asarray(observability[rows, cols].to_numpy())
        seen += np.bincount(values.ravel(), minlength=256)
        inside = values != Observability.OUTSIDE_AOI
        rows_in[rows] |= inside.any(axis=1)
        cols_in[cols] |= inside.any(axis=0)
        if reason is not None:
            hidden = np.asarray(reason[rows, cols].to_numpy())[values == Observability.NOT_OBSERVABLE]
            why += np.bincount(hidden.ravel(), minlength=256)
    px_km2 = abs(geobox.affine.a * geobox.affine.e) / 1e6
    aoi = int(seen.sum() - seen[Observability.OUTSIDE_AOI])

    def part(value: int, label: str, n: int) -> Part:
        return Part(value=value, label=label, n_px=n, km2=n * px_km2, share=n / aoi if aoi else 0.0)

    labels = {
        Observability.OBSERVED: "observed",
        Observability.NOT_OBSERVABLE: "not observable",
        Observability.NOT_PROCESSED: "not processed",
    }
    return Observed(
        parts=tuple(part(int(o), label, int(seen[o])) for o, label in labels.items()),
        reasons=tuple(part(v, label, int(why[v])) for v, label in REASONS.items() if v and why[v]),
        aoi_km2=aoi * px_km2,
        bounds=_bounds(geobox, rows_in, cols_in),
    )


def _bounds(
    geobox: GeoBox, rows_in: NDArray[np.bool_], cols_in: NDArray[np.bool_]
) -> tuple[float, float, float, float]:
    rows, cols = np.flatnonzero(rows_in), np.flatnonzero(cols_in)
    r0, r1 = (rows[0], rows[-1] + 1) if len(rows) else (0, len(rows_in))
    c0, c1 = (cols[0], cols[-1] + 1) if len(cols) else (0, len(cols_in))
    a = geobox.affine
    return float(a.c + c0 * a.a), float(a.f + r1 * a.e), float(a.c + c1 * a.a), float(a.f + r0 * a.e)


def size_rows(
    areas_m2: NDArray[np.float64], edges_m2: Sequence[float] = SIZE_EDGES_M2
) -> tuple[SizeRow, ...]:
    """Objects by size class, low <= area < high."""
    rows = []
    total = float(areas_m2.sum())
    for low, high in pairwise(edges_m2):
        inside = areas_m2[(areas_m2 >= low) & (areas_m2 < high)]
        rows.append(
            SizeRow(
                label=size_label(low, high),
                n=len(inside),
                share=len(inside) / len(areas_m2) if len(areas_m2) else 0.0,
                area_m2=float(inside.sum()),
                area_share=float(inside.sum()) / total if total else 0.0,
            )
        )
    return tuple(rows)


def size_density(
    areas_m2: NDArray[np.float64], *, per_decade: int = 5
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Probability density of areas in equal logarithmic bins, as landslide inventories are compared.

    Returns centres in m2 (geometric), density in 1/m2, and counts; bins without objects are left out.
    Source: Malamud et al. 2004, eq. 1.
    """
    areas = areas_m2[areas_m2 > 0]
    if not len(areas):
        return np.empty(0), np.empty(0), np.empty(0, np.int64)
    low = np.floor(np.log10(areas.min()) * per_decade)
    high = np.floor(np.log10(areas.max()) * per_decade) + 1
    edges = 10 ** (np.arange(low, high + 1) / per_decade)
    counts = np.histogram(areas, edges)[0]
    some = counts > 0
    density = counts / (np.diff(edges) * len(areas))
    return np.sqrt(edges[:-1] * edges[1:])[some], density[some], counts[some]


def malamud_density(areas_m2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Density of the inverse-gamma law, 1/m2. Source: Malamud et al. 2004, eq. 3."""
    x = MALAMUD_A_M2 / (areas_m2 - MALAMUD_S_M2)
    density: NDArray[np.float64] = x ** (MALAMUD_RHO + 1) * np.exp(-x) / (MALAMUD_A_M2 * gamma(MALAMUD_RHO))
    return density


def largest(objects: gpd.GeoDataFrame, n: int) -> gpd.GeoDataFrame:
    """The n largest objects, largest first; of equal ones the first id."""
    return objects.sort_values(["area_m2", "id"], ascending=[False, True], kind="stable").head(n)


def densest_box(
    objects: gpd.GeoDataFrame, bounds: tuple[float, float, float, float], side_m: float
) -> tuple[float, float, float, float]:
    """Square with most landslide area in it, within the bounds, in steps of half its side.

    Without objects it lies at the centre.
    """
    left, bottom, right, top = bounds
    side_x, side_y = min(side_m, right - left), min(side_m, top - bottom)
    if not len(objects):
        x, y = (left + right) / 2, (bottom + top) / 2
        return x - side_x / 2, y - side_y / 2, x + side_x / 2, y + side_y / 2
    points = objects.geometry.representative_point()
    px, py = points.x.to_numpy(), points.y.to_numpy()
    weight = np.sqrt(objects.geometry.area.to_numpy())  # one giant must not outweigh a hundred slides
    best, where = -1.0, (left, bottom)
    for x0 in np.arange(left, max(right - side_x, left) + 1e-6, side_x / 2):
        column = (px >= x0) & (px < x0 + side_x)
        if not column.any():
            continue
        for y0 in np.arange(bottom, max(top - side_y, bottom) + 1e-6, side_y / 2):
            sum_ = float(weight[column & (py >= y0) & (py < y0 + side_y)].sum())
            if sum_ > best:
                best, where = sum_, (float(x0), float(y0))
    return where[0], where[1], where[0] + side_x, where[1] + side_y


def windows(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Cut an array into windows that fit in memory."""
    for r in range(0, height, WINDOW_PX):
        for c in range(0, width, WINDOW_PX):
            yield slice(r, min(r + WINDOW_PX, height)), slice(c, min(c + WINDOW_PX, width))
