"""What the clusters of a model are, counted block by block: spectra, vegetation, slope, objects and their surroundings.

Axes in names: k cluster, b band, n object, y row, x column.

Distributions are kept as counts of every value that can occur: medians are exact, and what is kept does not grow with
the blocks, but for three numbers an object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import scipy.ndimage
import xarray as xr
from odc.geo.geobox import GeoBox

from slidecube.models.unsupervised import UNKNOWN_CLUSTER
from slidecube.pipeline.composite import SCALE, SHIFT, reflectance
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.indices import ndvi
from slidecube.pipeline.terrain import SLOPE_NODATA, SLOPE_SCALE

SPECTRUM = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
"""Bands in the order of their wavelengths."""

AROUND_PX = 3
"""How far the surroundings of a cluster's objects reach: beyond mixed pixels, and still the same hillside."""

SHAPED_PX = 8
"""Fewest pixels of an object whose shape is measured: smaller ones are all squares and dashes."""

_STEP = 0.001
_STORED, _SLOPES = 65536, 9001
_INDEX = {"ndvi": (-1.0, 2001), "change": (-2.0, 4001), "ndwi": (-1.0, 2001), "brightness": (-0.1, 6701)}
_EIGHT = np.ones((3, 3), int)
_DISC = np.hypot(*np.mgrid[-AROUND_PX : AROUND_PX + 1, -AROUND_PX : AROUND_PX + 1]) <= AROUND_PX + 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterBlock:
    """One block of the area with its clusters.

    geobox : its pixels; clusters_yx : uint8, 255 = unknown
    pre, post : layers as stored, uint16 bands with 0 = nodata; pre is None where no scene from before is read
    terrain : slope_deg, uint16 hundredths of a degree, 65535 = nodata
    """

    geobox: GeoBox
    clusters_yx: np.ndarray
    pre: xr.Dataset | None
    post: xr.Dataset
    terrain: xr.Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Counts of the values that a quantity took.

    counts : int64, of each step; first : value of the first step; step : between two
    """

    counts: np.ndarray
    first: float
    step: float

    @property
    def n(self) -> int:
        """How many values were known."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float | None:
        """Smallest value that is at least as large as this share of all; None where none was known."""
        if not self.n:
            return None
        rank = max(math.ceil(share * self.n), 1)
        return round(self.first + self.step * int(np.searchsorted(np.cumsum(self.counts), rank)), 6)

    @property
    def median(self) -> float | None:
        """The middle value."""
        return self.quantile(0.5)

    def share_below(self, value: float) -> float | None:
        """Share of all values that are smaller; None where none was known."""
        if not self.n:
            return None
        smaller = math.ceil((value - self.first) / self.step - 1e-6)
        return int(self.counts[: max(smaller, 0)].sum()) / self.n

    def binned(self, edges: np.ndarray) -> np.ndarray:
        """Shares of all values in bins, low <= value < high; what lies beyond counts in the first or the last."""
        at = self.first + self.step * (np.arange(len(self.counts)) + 1e-6)
        bins = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, len(edges) - 2)
        counts = np.bincount(bins, weights=self.counts, minlength=len(edges) - 1)
        shares: np.ndarray = counts / max(self.n, 1)
        return shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """Connected parts (8-connected) of one cluster.

    size_px_n : pixels of each that lies whole in the known window of its block
    weight_n : for how many of the area's objects each of these stands
    elongation_n : their length over width; downslope_n : |cos| of the angle between their long axis and the fall line,
        1 = straight down; NaN below `SHAPED_PX` pixels, and downslope where no height is known
    cut_px_m : pixels, as far as they are seen, of each part that the window's edge cuts; it has no part in the above
    """

    size_px_n: np.ndarray
    weight_n: np.ndarray
    elongation_n: np.ndarray
    downslope_n: np.ndarray
    cut_px_m: np.ndarray

    @property
    def cut_share(self) -> float:
        """Share of the cluster's pixels in parts that are cut."""
        whole, cut = int(self.size_px_n.sum()), int(self.cut_px_m.sum())
        return cut / max(whole + cut, 1)

    @property
    def largest_px(self) -> int:
        """Pixels of the largest part, cut or not."""
        return max((int(a.max()) for a in (self.size_px_n, self.cut_px_m) if len(a)), default=0)

    def size_px(self, share: float = 0.5) -> float | None:
        """Pixels that this share of the area's objects does not exceed; None without objects."""
        return _weighted_quantile(self.size_px_n, self.weight_n, share)

    def count(self, minimum_px: int) -> int:
        """How many parts of so many pixels there are, cut ones with what is seen of them."""
        return int((self._all() >= minimum_px).sum())

    def area_px(self, minimum_px: int) -> float | None:
        """Half of the area of the parts of at least `minimum_px` lies in parts of at least this many pixels.

        What is cut counts as large as it is seen: a background that fills whole blocks must not look like its crumbs.
        So the true number is at least this one.
        """
        large = self._all()
        large = large[large >= minimum_px]
        negative = _weighted_quantile(-large, large, 0.5)
        return None if negative is None else -negative

    def shape(self, name: str) -> float | None:
        """Median by area of "elongation" or "downslope"; None where no object is large enough."""
        values_n = self.elongation_n if name == "elongation" else self.downslope_n
        shaped = ~np.isnan(values_n)
        return _weighted_quantile(values_n[shaped], (self.weight_n * self.size_px_n)[shaped], 0.5)

    def _all(self) -> np.ndarray:
        return np.concatenate([self.size_px_n, self.cut_px_m])


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSummary:
    """One cluster over all blocks.

    pixels : of it; share : of all pixels that have a cluster
    spectra : side ("pre", "post") -> band -> distribution of the stored values
    ndvi : "pre", "post", "change" -> distribution; "pre" and "change" are missing without a pre-event image
    around : the same of the pixels of other clusters within `AROUND_PX` pixels of it
    slope_deg : distribution, degrees; colour : "ndwi" and "brightness" after the event, "brightness" being the mean
        reflectance of blue, green and red; empty where a layer lacks them
    """

    cluster: int
    pixels: int
    share: float
    spectra: Mapping[str, Mapping[str, Distribution]]
    ndvi: Mapping[str, Distribution]
    around: Mapping[str, Distribution]
    slope_deg: Distribution
    colour: Mapping[str, Distribution]
    objects: Objects

    def reflectance(self, side: str, band: str, share: float = 0.5) -> float | None:
        """Quantile of the reflectance; None where it was never known."""
        stored = self.spectra[side][band].quantile(share)
        return None if stored is None else (stored - SHIFT) / SCALE


@dataclass(slots=True)
class ClusterStatistics:
    """Counts that grow block by block; `summaries` reads them.

    clusters : how many there are
    """

    clusters: int
    pixels_k: np.ndarray = field(init=False)
    _counts: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    _parts: list[list[Objects]] = field(init=False)

    def __post_init__(self) -> None:
        self.pixels_k = np.zeros(self.clusters, np.int64)
        self._parts = [[] for _ in range(self.clusters)]

    def add(self, block: ClusterBlock) -> None:
        """Count one block."""
        require_whole(block, self.clusters)
        self.pixels_k += np.bincount(block.clusters_yx.ravel(), minlength=256)[: self.clusters]
        for side, layer in (("pre", block.pre), ("post", block.post)):
            for band in bands_of(layer):
                stored_yx = layer[band].values if layer is not None else None
                assert stored_yx is not None
                self._count(f"{side} {band}", block.clusters_yx, stored_yx, stored_yx != 0, _STORED)
        slope_yx = block.terrain["slope_deg"].values
        self._count("slope", block.clusters_yx, slope_yx, slope_yx != SLOPE_NODATA, _SLOPES)
        index = ndvi_of(block)
        for name, values_yx in index.items():
            self._count_index(f"ndvi {name}", block.clusters_yx, values_yx)
        for name, values_yx in colour_of_ground(block.post).items():
            self._count_index(f"colour {name}", block.clusters_yx, values_yx)
        known = known_window(block.clusters_yx)
        height_m_yx = block.terrain["elevation"].values[known] if "elevation" in block.terrain else None
        for k in range(self.clusters):
            mask_yx = block.clusters_yx == k
            if not mask_yx.any():
                continue
            self._parts[k].append(objects_of(mask_yx[known], height_m_yx))
            near_yx = scipy.ndimage.binary_dilation(mask_yx, _DISC) & ~mask_yx
            near_yx &= block.clusters_yx != UNKNOWN_CLUSTER
            beside_yx = np.where(near_yx, np.uint8(k), np.uint8(UNKNOWN_CLUSTER))
            for name, values_yx in index.items():
                self._count_index(f"around {name}", beside_yx, values_yx)

    def summaries(self) -> tuple[ClusterSummary, ...]:
        """Return each cluster over all blocks that were added."""
        total = max(int(self.pixels_k.sum()), 1)
        return tuple(
            ClusterSummary(
                cluster=k,
                pixels=int(self.pixels_k[k]),
                share=int(self.pixels_k[k]) / total,
                spectra={
                    side: {
                        name.removeprefix(f"{side} "): Distribution(counts=counts[k], first=0.0, step=1.0)
                        for name, counts in self._counts.items()
                        if name.startswith(f"{side} ")
                    }
                    for side in ("pre", "post")
                },
                ndvi=self._indices("ndvi", k),
                around=self._indices("around", k),
                slope_deg=Distribution(counts=self._of("slope", k, _SLOPES), first=0.0, step=SLOPE_SCALE),
                colour=self._indices("colour", k),
                objects=_joined(self._parts[k]),
            )
            for k in range(self.clusters)
        )

    def _indices(self, kind: str, k: int) -> dict[str, Distribution]:
        return {
            name.removeprefix(f"{kind} "): Distribution(counts=counts[k], first=_scale(name)[0], step=_STEP)
            for name, counts in self._counts.items()
            if name.startswith(f"{kind} ")
        }

    def _of(self, name: str, k: int, size: int) -> np.ndarray:
        return self._counts[name][k] if name in self._counts else np.zeros(size, np.int64)

    def _count_index(self, name: str, clusters_yx: np.ndarray, values_yx: np.ndarray) -> None:
        first, size = _scale(name)
        known_yx = ~np.isnan(values_yx)
        steps_yx = np.rint((np.where(known_yx, values_yx, 0) - first) / _STEP).astype(np.int64)
        self._count(name, clusters_yx, steps_yx, known_yx, size)

    def _count(
        self, name: str, clusters_yx: np.ndarray, values_yx: np.ndarray, known_yx: np.ndarray, size: int
    ) -> None:
        use = known_yx & (clusters_yx != UNKNOWN_CLUSTER)
        code_n = clusters_yx[use].astype(np.int64) * size + values_yx[use]
        counts = np.bincount(code_n, minlength=self.clusters * size).reshape(self.clusters, size)
        if name not in self._counts:
            self._counts[name] = np.zeros((self.clusters, size), np.uint32)
        self._counts[name] += counts.astype(np.uint32)


def bands_of(layer: xr.Dataset | None) -> list[str]:
    """Bands that a layer holds, by wavelength."""
    return [band for band in SPECTRUM if layer is not None and band in layer]


def ndvi_of(block: ClusterBlock) -> dict[str, np.ndarray]:
    """NDVI of a block after the event and, with a pre-event image, before it and its change: (y, x), NaN = unknown."""
    post = ndvi(reflectance(block.post["B04"]), reflectance(block.post["B08"])).values
    if block.pre is None:
        return {"post": post}
    pre = ndvi(reflectance(block.pre["B04"]), reflectance(block.pre["B08"])).values
    return {"pre": pre, "post": post, "change": post - pre}


def known_window(clusters_yx: np.ndarray) -> tuple[slice, slice]:
    """Smallest window that holds all known pixels of a block: at the rim of the area it is much less than a block."""
    known_yx = clusters_yx != UNKNOWN_CLUSTER
    rows, cols = (np.flatnonzero(known_yx.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)


def colour_of_ground(post: xr.Dataset) -> dict[str, np.ndarray]:
    """NDWI (McFeeters 1996) and visible brightness after the event: (y, x), NaN = unknown; {} without the bands."""
    if not {"B02", "B03", "B04", "B08"} <= set(post.data_vars):
        return {}
    blue, green, red, nir = (reflectance(post[band]) for band in ("B02", "B03", "B04", "B08"))
    # the same form as NDVI, with green for near infrared and near infrared for red
    return {"ndwi": ndvi(nir, green).values, "brightness": ((blue + green + red) / 3).values}


def _scale(name: str) -> tuple[float, int]:
    """First value and number of steps of an index."""
    return _INDEX.get(name.rsplit(maxsplit=1)[-1], _INDEX["ndvi"])


def require_whole(block: ClusterBlock, clusters: int) -> None:
    """Raise PipelineError for a block whose parts differ in shape, or that holds a cluster that there is not."""
    shape = block.clusters_yx.shape
    layers = [layer for layer in (block.pre, block.post, block.terrain) if layer is not None]
    if tuple(block.geobox.shape) != shape or any(
        (layer.sizes.get("y"), layer.sizes.get("x")) != shape for layer in layers
    ):
        raise PipelineError(
            f"The clusters of a block are {shape} pixels, and its layers or its geobox are not"
        )
    known = block.clusters_yx[block.clusters_yx != UNKNOWN_CLUSTER]
    if known.size and int(known.max()) >= clusters:
        raise PipelineError(f"A block holds cluster {int(known.max())}; there are 0 to {clusters - 1}")


# --- objects --------------------------------------------------------------------------------------------------------


def objects_of(mask_yx: np.ndarray, height_m_yx: np.ndarray | None) -> Objects:
    """Measure the objects of a mask.

    mask_yx : of the window of a block's known pixels; height_m_yx : metres, NaN = unknown, None where there are none

    An object that touches the window's edge is cut: its size is unknown, and large ones are cut more often. Left out,
    the rest would look too small. So each whole one counts by how seldom one of its extent lies whole in a window of
    this size, which makes the distribution of sizes that of the area, up to what never fits into a block.
    Source: Miles 1974 and Lantuejoul 1980, in Serra 1982, "Image analysis and mathematical morphology", ch. VIII.
    """
    labels_yx, n = scipy.ndimage.label(mask_yx, _EIGHT)
    spans = np.array([[r.start, r.stop, c.start, c.stop] for r, c in scipy.ndimage.find_objects(labels_yx)])
    height, width = mask_yx.shape
    top, bottom, left, right = spans.reshape(n, 4).T
    whole_n = (top > 0) & (left > 0) & (bottom < height) & (right < width)
    size_px_n = np.bincount(labels_yx.ravel(), minlength=n + 1)[1:]
    elongation_n, downslope_n = _shapes(labels_yx, size_px_n, height_m_yx)
    places = (height - 1 - (bottom - top)) * (width - 1 - (right - left))
    weight_n = height * width / np.maximum(places, 1)
    return Objects(
        size_px_n=size_px_n[whole_n],
        weight_n=weight_n[whole_n],
        elongation_n=elongation_n[whole_n],
        downslope_n=downslope_n[whole_n],
        cut_px_m=size_px_n[~whole_n],
    )


def _shapes(
    labels_yx: np.ndarray, size_px_n: np.ndarray, height_m_yx: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Elongation, of the ellipse of the same second moments, and downslope; NaN for small objects.

    Each pixel is a square. The fall line is that of the mean gradient over the object.
    """
    n = len(size_px_n)
    y_m, x_m = np.nonzero(labels_yx)
    at = labels_yx[y_m, x_m]

    def mean(values: np.ndarray) -> np.ndarray:
        means: np.ndarray = np.bincount(at, weights=values, minlength=n + 1)[1:] / size_px_n
        return means

    dy, dx = y_m - mean(y_m.astype(float))[at - 1], x_m - mean(x_m.astype(float))[at - 1]
    yy, xx, xy = mean(dy * dy) + 1 / 12, mean(dx * dx) + 1 / 12, mean(dy * dx)
    half, root = (yy + xx) / 2, np.hypot((yy - xx) / 2, xy)
    large_n = size_px_n >= SHAPED_PX
    elongation_n = np.where(large_n, np.sqrt((half + root) / (half - root)), np.nan)
    if height_m_yx is None or min(height_m_yx.shape) < 2:
        return elongation_n, np.full(n, np.nan)
    angle_n = np.arctan2(2 * xy, xx - yy) / 2  # of the long axis, from x towards y
    down_y, down_x = (mean(np.gradient(height_m_yx.astype(np.float64), axis=i)[y_m, x_m]) for i in (0, 1))
    steep = np.hypot(down_y, down_x)
    with np.errstate(invalid="ignore"):
        downslope_n = np.abs(np.cos(angle_n) * down_x + np.sin(angle_n) * down_y) / steep
    return elongation_n, np.where(large_n, downslope_n, np.nan)


def _joined(parts: list[Objects]) -> Objects:
    return Objects(
        **{
            name: np.concatenate([getattr(part, name) for part in parts]) if parts else np.zeros(0)
            for name in Objects.__slots__
        }
    )


def _weighted_quantile(values_n: np.ndarray, weight_n: np.ndarray, share: float) -> float | None:
    if not len(values_n):
        return None
    order = np.argsort(values_n, kind="stable")
    reached = np.cumsum(weight_n[order])
    return float(values_n[order][np.searchsorted(reached, share * reached[-1] * (1 - 1e-12))])
