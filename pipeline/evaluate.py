"""Evaluate: an inventory against reference polygons, as pixels and as objects.

Only what was observed is judged; how much of the reference was not is said apart. A score whose denominator is zero is
None, never NaN, and never a flattering 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import rasterio.features
import shapely
import xarray as xr
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from shapely.geometry.base import BaseGeometry

from slidecube.pipeline.config import Ground
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.ground import Stratum, strata
from slidecube.pipeline.inventory import Observability, geobox_of, stored
from slidecube.pipeline.polygons import geodesic_areas_m2

MIN_OVERLAP = 0.2
"""Share of an object's own area that the other side must cover for the object to count as matched."""

MIN_OBSERVED = 0.5
"""Share of an object's pixels that must be observed for the object to be judged at all."""

SIZE_EDGES_M2 = (0.0, 1_000.0, 3_000.0, 10_000.0, 30_000.0, math.inf)
"""Size classes. Below 1,000 m2 lie 48 % of slides and 9 % of their area (Malamud 2004)."""

PREVALENCES = (0.01, 0.002, 0.001, 0.0005, 0.0001)
"""Shares of land under landslides at which precision is quoted; a nation's is .001 to .0001."""

WINDOW_PX = 2048

_STRATUM_HEADS = ("reference", "recall", "mapped", "precision")
_SIZE_HEADS = ("reference", "found", "recall", "mapped", "right", "precision")

Status = Literal["tp", "fp", "fn", "unobserved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelScores:
    """Counts over observed pixels; a pixel is reference landslide when its centre lies in a polygon."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def precision(self) -> float | None:
        """TP / (TP + FP)."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float | None:
        """TP / (TP + FN)."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN)."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou_landslide(self) -> float | None:
        """Intersection over union of the landslide class."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def miou(self) -> float | None:
        """Mean of the intersections over union of landslide and of everything else.

        CAE's "mIOU" column mixes this with `iou_landslide` (METHODS section 2), so both are given.
        """
        background = _ratio(self.tn, self.tn + self.fp + self.fn)
        if self.iou_landslide is None or background is None:
            return None
        return (self.iou_landslide + background) / 2

    @property
    def false_positive_rate(self) -> float | None:
        """FP / (FP + TN)."""
        return _ratio(self.fp, self.fp + self.tn)

    @property
    def prevalence(self) -> float | None:
        """Share of reference landslide among the observed pixels."""
        return _ratio(self.tp + self.fn, self.tp + self.fn + self.fp + self.tn)

    def precision_at(self, prevalence: float) -> float | None:
        """Precision that the same recall and false-positive rate give where landslides have another share.

        Source: Bayes; METHODS section 5.
        """
        if self.recall is None or self.false_positive_rate is None:
            return None
        hits = prevalence * self.recall
        return _ratio(hits, hits + (1 - prevalence) * self.false_positive_rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectScores:
    """Counts of objects, from both directions.

    truth_found, truth_missed : reference objects of which at least the rule's share is, or is not, covered by the
        prediction (FSTF: LTP, LFN)
    predicted_right, predicted_wrong : predicted objects of which at least that share is, or is not, covered by the
        reference (the latter is FSTF's LFP). A huge object that swallows a small slide finds it and is itself wrong.
    """

    truth_found: int
    truth_missed: int
    predicted_right: int
    predicted_wrong: int

    @property
    def precision(self) -> float | None:
        """Share of the predicted objects that are right."""
        return _ratio(self.predicted_right, self.predicted_right + self.predicted_wrong)

    @property
    def recall(self) -> float | None:
        """Share of the reference objects that were found; DP of FSTF, LTP / (LTP + LFN)."""
        return _ratio(self.truth_found, self.truth_found + self.truth_missed)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of object precision and object recall; 0 when both are 0."""
        p, r = self.precision, self.recall
        if p is None or r is None:
            return None
        return 0.0 if p + r == 0 else 2 * p * r / (p + r)

    @property
    def omission(self) -> float | None:
        """OE of FSTF, LFN / (LTP + LFN)."""
        return _ratio(self.truth_missed, self.truth_found + self.truth_missed)

    @property
    def commission(self) -> float | None:
        """CE of FSTF, LFP / (LTP + LFN): false objects for each reference object, so it may exceed 1."""
        return _ratio(self.predicted_wrong, self.truth_found + self.truth_missed)

    @property
    def quality(self) -> float | None:
        """Quality percentage, LTP / (LTP + LFN + LFP).

        Our definition: FSTF prints DP's formula under this name, and its values follow neither (METHODS section 3).
        """
        return _ratio(self.truth_found, self.truth_found + self.truth_missed + self.predicted_wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeScores:
    """Object counts of one size class, low <= area < high, each object by its own area."""

    low_m2: float
    high_m2: float
    objects: ObjectScores


@dataclass(frozen=True, slots=True, kw_only=True)
class StratumScores:
    """Accuracy on one kind of ground; an object belongs where most of its known pixels do.

    observed_km2 : area of its observed pixels, on the map
    """

    stratum: Stratum
    pixels: PixelScores
    objects: ObjectScores
    observed_km2: float

    @property
    def false_per_100_km2(self) -> float | None:
        """Predicted objects without a reference, for each 100 km2 observed of it."""
        return _ratio(100.0 * self.objects.predicted_wrong, self.observed_km2)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {
            "name": self.stratum.name,
            "label": self.stratum.label,
            "observed_km2": self.observed_km2,
            "false_objects_per_100_km2": self.false_per_100_km2,
            "pixels": {**asdict(self.pixels), **_scores(self.pixels, "precision recall f1 iou_landslide")},
            "objects": {**asdict(self.objects), **_scores(self.objects, "precision recall f1")},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TruthShares:
    """Where the reference's pixels lie, as counts."""

    observed: int
    not_observable: int
    outside_aoi: int
    not_processed: int

    @property
    def unobserved_share(self) -> float | None:
        """Share of the reference's pixels that could not be judged."""
        total = self.observed + self.not_observable + self.outside_aoi + self.not_processed
        return _ratio(total - self.observed, total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    truth_unobserved, predicted_unobserved : objects left out because less than half of them was observed
    observed_km2 : area of the observed pixels, on the map
    by_stratum : accuracy on each kind of ground that was observed; empty where the inventory does not say
    predicted, truth : the objects with a column `status` ("tp", "fp" or "fn", or "unobserved") and `overlap`, the
        share of the object that the other side covers
    """

    pixels: PixelScores
    objects: ObjectScores
    by_size: tuple[SizeScores, ...]
    by_stratum: tuple[StratumScores, ...]
    shares: TruthShares
    truth_unobserved: int
    predicted_unobserved: int
    observed_km2: float
    min_overlap: float
    simulated: bool
    prevalences: tuple[float, ...]
    predicted: gpd.GeoDataFrame
    truth: gpd.GeoDataFrame

    @property
    def rule(self) -> str:
        """The rule of matching, in words."""
        return (
            f"an object counts as matched when at least {self.min_overlap:.0%} of its own area is covered by the "
            f"other side; objects of which less than {MIN_OBSERVED:.0%} was observed are left out"
        )

    @property
    def false_per_100_km2(self) -> float | None:
        """Predicted objects without a reference, for each 100 km2 observed."""
        return _ratio(100.0 * self.objects.predicted_wrong, self.observed_km2)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON; infinite edges are None."""
        p, o = self.pixels, self.objects
        return {
            "simulated": self.simulated,
            "rule": self.rule,
            "min_overlap": self.min_overlap,
            "pixels": {**asdict(p), **_scores(p, "precision recall f1 iou_landslide miou prevalence")},
            "precision_at_prevalence": {f"{x:g}": p.precision_at(x) for x in self.prevalences},
            "objects": {**asdict(o), **_scores(o, "precision recall f1 omission commission quality")},
            "false_objects_per_100_km2": self.false_per_100_km2,
            "by_size": [
                {
                    "low_m2": s.low_m2,
                    "high_m2": s.high_m2 if math.isfinite(s.high_m2) else None,
                    **asdict(s.objects),
                    **_scores(s.objects, "precision recall"),
                }
                for s in self.by_size
            ],
            "by_stratum": [s.to_dict() for s in self.by_stratum],
            "truth_pixels": {**asdict(self.shares), "unobserved_share": self.shares.unobserved_share},
            "truth_unobserved": self.truth_unobserved,
            "predicted_unobserved": self.predicted_unobserved,
            "observed_km2": self.observed_km2,
        }

    def table(self) -> str:
        """The numbers as text, for a terminal."""
        p, o = self.pixels, self.objects
        lines = [
            f"Against {'SIMULATED truth' if self.simulated else 'reference polygons'}; {self.rule}.",
            "",
            f"{'':22}{'precision':>10}{'recall':>10}{'F1':>10}{'IoU':>10}",
            f"{'pixels':22}{_f(p.precision)}{_f(p.recall)}{_f(p.f1)}{_f(p.iou_landslide)}",
            f"{'objects':22}{_f(o.precision)}{_f(o.recall)}{_f(o.f1)}{_f(o.quality)}",
            f"mean IoU of pixels {_f(p.miou).strip()}; for objects the last column is the quality percentage",
            "",
            f"{'size, m2':22}" + "".join(f"{head:>10}" for head in _SIZE_HEADS),
        ]
        for s in self.by_size:
            c = s.objects
            lines.append(
                f"{size_label(s.low_m2, s.high_m2):22}{c.truth_found + c.truth_missed:>10}{c.truth_found:>10}"
                f"{_f(c.recall)}{c.predicted_right + c.predicted_wrong:>10}{c.predicted_right:>10}{_f(c.precision)}"
            )
        if self.by_stratum:
            lines += [
                "",
                f"{'ground, objects':46}" + "".join(f"{head:>10}" for head in ("km2", *_STRATUM_HEADS)),
            ]
        for row in self.by_stratum:
            c = row.objects
            lines.append(
                f"{row.stratum.label:46}{row.observed_km2:>10.2f}{c.truth_found + c.truth_missed:>10}{_f(c.recall)}"
                f"{c.predicted_right + c.predicted_wrong:>10}{_f(c.precision)}"
            )
        hidden = _percent(self.shares.unobserved_share)
        at = ", ".join(f"{_f(p.precision_at(x)).strip()} at {x:.2%}" for x in self.prevalences)
        lines += [
            "",
            f"Landslides cover {_percent(p.prevalence)} of the observed area here; pixel precision would be {at}.",
            f"False objects per 100 km2: {_f(self.false_per_100_km2).strip()}; observed {self.observed_km2:,.1f} km2.",
            f"Not observed: {hidden} of the reference's pixels, {self.truth_unobserved} of its objects.",
        ]
        return "\n".join(lines)


def evaluate(
    predicted: gpd.GeoDataFrame,
    truth: gpd.GeoDataFrame,
    *,
    inventory: xr.Dataset,
    epoch: int = 0,
    min_overlap: float = MIN_OVERLAP,
    size_edges_m2: Sequence[float] = SIZE_EDGES_M2,
    prevalences: Sequence[float] = PREVALENCES,
    simulated: bool = False,
    ground: Ground | None = None,
) -> Evaluation:
    """Judge predicted polygons against reference polygons where the inventory could see.

    predicted, truth : polygons in any CRS; each is carried to the inventory's, and repaired where invalid
    inventory : has `observability`, and may have `ground`; read window by window; epoch : its index
    ground : settings of the strata, for their labels; the default's when left out
    Raises PipelineError when a table has no CRS or holds other things than polygons, or the rule makes no sense.
    """
    if not 0 < min_overlap <= 1:
        raise PipelineError(f"min_overlap={min_overlap} is not allowed; use a share above 0 and up to 1")
    geobox = geobox_of(inventory)
    observability = stored(inventory, "observability", epoch=epoch)
    ours = _prepared(predicted, geobox, "predicted")
    theirs = _prepared(truth, geobox, "reference")
    kinds = strata(ground or Ground()) if "ground" in inventory else ()
    bytes_yx = stored(inventory, "ground", epoch=epoch) if kinds else None
    counts = _count_pixels(
        ours.geometry.to_numpy(),
        theirs.geometry.to_numpy(),
        geobox,
        observability,
        bytes_yx=bytes_yx,
        kinds=kinds,
    )
    for frame, seen in ((ours, counts.predicted_seen), (theirs, counts.truth_seen)):
        frame["observed_share"] = seen
    ours["overlap"] = covered_shares(ours.geometry.to_numpy(), theirs.geometry.to_numpy())
    theirs["overlap"] = covered_shares(theirs.geometry.to_numpy(), ours.geometry.to_numpy())
    ours["status"] = _status(ours, min_overlap, "fp")
    theirs["status"] = _status(theirs, min_overlap, "fn")
    edges = list(pairwise(size_edges_m2))
    pixel_km2 = abs(geobox.affine.a * geobox.affine.e) / 1e6
    return Evaluation(
        pixels=counts.pixels,
        objects=_count_objects(ours, theirs, 0.0, math.inf),
        by_size=tuple(
            SizeScores(low_m2=a, high_m2=b, objects=_count_objects(ours, theirs, a, b)) for a, b in edges
        ),
        by_stratum=tuple(_by_stratum(counts, kinds, ours, theirs, pixel_km2)),
        shares=counts.shares,
        truth_unobserved=int((theirs["status"] == "unobserved").sum()),
        predicted_unobserved=int((ours["status"] == "unobserved").sum()),
        observed_km2=counts.n_observed * pixel_km2,
        min_overlap=min_overlap,
        simulated=simulated,
        prevalences=tuple(prevalences),
        predicted=ours,
        truth=theirs,
    )


def covered_shares(shapes: NDArray[np.object_], others: NDArray[np.object_]) -> NDArray[np.float64]:
    """Share of each shape's area that the others cover together; others that overlap each other count once."""
    shares = np.zeros(len(shapes))
    if not len(shapes) or not len(others):
        return shares
    of, other = shapely.STRtree(others).query(shapes, predicate="intersects")
    order = np.argsort(of, kind="stable")
    of, other = of[order], other[order]
    hit, starts, sizes = np.unique(of, return_index=True, return_counts=True)
    cover = others[other[starts]]
    for i in np.flatnonzero(sizes > 1):
        cover[i] = shapely.union_all(others[other[starts[i] : starts[i] + sizes[i]]])
    shares[hit] = shapely.area(shapely.intersection(shapes[hit], cover)) / shapely.area(shapes[hit])
    return np.clip(shares, 0.0, 1.0)


def size_label(low_m2: float, high_m2: float) -> str:
    """A size class in words."""
    if not math.isfinite(high_m2):
        return f"{low_m2:,.0f} and more"
    return f"below {high_m2:,.0f}" if low_m2 == 0 else f"{low_m2:,.0f} to {high_m2:,.0f}"


@dataclass(slots=True, kw_only=True)
class _Counts:
    """Counts over all windows.

    confusion : (byte of the ground, truth, predicted) observed pixels
    predicted_on, truth_on : (stratum, object) pixels
    """

    pixels: PixelScores
    shares: TruthShares
    n_observed: int
    confusion: NDArray[np.int64]
    predicted_on: NDArray[np.int64]
    truth_on: NDArray[np.int64]
    predicted_seen: NDArray[np.float64]
    truth_seen: NDArray[np.float64]


def _prepared(table: gpd.GeoDataFrame, geobox: GeoBox, what: str) -> gpd.GeoDataFrame:
    """Objects in the inventory's CRS, valid, polygons only, with their geodesic areas."""
    if table.crs is None:
        raise PipelineError(f"The {what} polygons have no CRS; set it in their file")
    table = table[~(table.geometry.isna() | table.geometry.is_empty)].reset_index(drop=True)
    kinds = sorted(set(table.geom_type) - {"Polygon", "MultiPolygon"})
    if kinds:
        raise PipelineError(
            f"The {what} objects hold {kinds[0]}; only polygons and multipolygons can be judged"
        )
    moved: gpd.GeoDataFrame = table.to_crs(str(geobox.crs))
    shapes = np.array([_areal(s) for s in moved.geometry], dtype=object)
    moved = moved.assign(**{moved.geometry.name: gpd.GeoSeries(shapes, crs=moved.crs)})
    moved = moved[shapely.area(shapes) > 0].reset_index(drop=True)
    moved["area_m2"] = geodesic_areas_m2(shapely.normalize(moved.geometry.to_numpy()), str(geobox.crs))
    return moved


def _areal(shape: BaseGeometry) -> BaseGeometry:
    """The valid, areal part of a shape; lines and points that repair leaves behind have no area."""
    if shape.is_valid:
        return shape
    parts = shapely.get_parts(shapely.make_valid(shape))
    parts = np.concatenate([shapely.get_parts(p) for p in parts]) if len(parts) else parts
    return shapely.union_all([p for p in parts if p.geom_type == "Polygon"])


def _count_pixels(
    ours: NDArray[np.object_],
    theirs: NDArray[np.object_],
    geobox: GeoBox,
    observability: xr.DataArray,
    *,
    bytes_yx: xr.DataArray | None,
    kinds: Sequence[Stratum],
) -> _Counts:
    by_ground = np.zeros((256, 2, 2), np.int64)  # [ground, truth, predicted], observed pixels
    on = {
        name: np.zeros((len(kinds), len(shapes)), np.int64)
        for name, shapes in (("ours", ours), ("theirs", theirs))
    }
    shares = np.zeros(len(Observability), np.int64)  # truth pixels by observability
    seen = {
        name: np.zeros((2, len(shapes)), np.int64) for name, shapes in (("ours", ours), ("theirs", theirs))
    }
    trees = {"ours": shapely.STRtree(ours), "theirs": shapely.STRtree(theirs)}
    n_observed = 0
    for rows, cols in _windows(*geobox.shape):
        values = np.asarray(observability[rows, cols].to_numpy())
        observed = values == Observability.OBSERVED
        ground = np.zeros(values.shape, np.uint8) if bytes_yx is None else bytes_yx[rows, cols].to_numpy()
        box = geobox[rows, cols]
        burnt = {name: _burn(tree, box) for name, tree in trees.items()}
        for name, ids in burnt.items():
            n = seen[name].shape[1]
            seen[name][0] += np.bincount(ids[ids > 0] - 1, minlength=n)[:n]
            seen[name][1] += np.bincount(ids[(ids > 0) & observed] - 1, minlength=n)[:n]
            own, lies = ids[ids > 0] - 1, ground[ids > 0]
            for i, kind in enumerate(kinds):
                on[name][i] += np.bincount(own[kind.holds(lies)], minlength=n)[:n]
        is_truth, is_ours = burnt["theirs"] > 0, burnt["ours"] > 0
        cells = ground[observed].astype(np.int64) * 4 + is_truth[observed] * 2 + is_ours[observed]
        by_ground += np.bincount(cells, minlength=1024).reshape(256, 2, 2)
        shares += np.bincount(values[is_truth], minlength=len(shares))[: len(shares)]
        n_observed += int(observed.sum())
    return _Counts(
        pixels=_pixel_scores(by_ground.sum(axis=0)),
        confusion=by_ground,
        predicted_on=on["ours"],
        truth_on=on["theirs"],
        shares=TruthShares(
            observed=int(shares[Observability.OBSERVED]),
            not_observable=int(shares[Observability.NOT_OBSERVABLE]),
            outside_aoi=int(shares[Observability.OUTSIDE_AOI]),
            not_processed=int(shares[Observability.NOT_PROCESSED]),
        ),
        n_observed=n_observed,
        predicted_seen=_seen_shares(seen["ours"], ours, geobox, observability),
        truth_seen=_seen_shares(seen["theirs"], theirs, geobox, observability),
    )


def _pixel_scores(confusion: NDArray[np.int64]) -> PixelScores:
    """Scores of a table [truth, predicted]."""
    return PixelScores(
        tp=int(confusion[1, 1]), fp=int(confusion[0, 1]), fn=int(confusion[1, 0]), tn=int(confusion[0, 0])
    )


def _by_stratum(
    counts: _Counts,
    kinds: Sequence[Stratum],
    ours: gpd.GeoDataFrame,
    theirs: gpd.GeoDataFrame,
    pixel_km2: float,
) -> Iterator[StratumScores]:
    every = np.arange(256, dtype=np.uint8)
    for kind in kinds:
        confusion = counts.confusion[kind.holds(every)].sum(axis=0)
        if not confusion.sum():
            continue
        yield StratumScores(
            stratum=kind,
            pixels=_pixel_scores(confusion),
            objects=_count_objects(
                ours[_most(counts.predicted_on, kinds, kind)],
                theirs[_most(counts.truth_on, kinds, kind)],
                0.0,
                math.inf,
            ),
            observed_km2=float(confusion.sum()) * pixel_km2,
        )


def _most(on: NDArray[np.int64], kinds: Sequence[Stratum], kind: Stratum) -> NDArray[np.bool_]:
    """Objects that lie on a stratum more than on the others of its factor; of equal ones the first counts."""
    rows = [i for i, other in enumerate(kinds) if other.factor == kind.factor]
    own = rows.index(kinds.index(kind))
    most: NDArray[np.bool_] = (on[rows].argmax(axis=0) == own) & (on[rows].sum(axis=0) > 0)
    return most


def _burn(tree: shapely.STRtree, box: GeoBox) -> NDArray[np.int32]:
    """Number from 1 of the shape whose inside holds the pixel's centre; 0 = none. Of overlapping ones the last wins."""
    near = np.sort(tree.query(shapely.box(*box.boundingbox.bbox)))
    if not len(near):
        return np.zeros(box.shape, np.int32)
    shapes = ((tree.geometries[i], int(i) + 1) for i in near)
    burnt: NDArray[np.int32] = rasterio.features.rasterize(
        shapes, out_shape=box.shape, transform=box.affine, dtype="int32"
    )
    return burnt


def _seen_shares(
    seen: NDArray[np.int64], shapes: NDArray[np.object_], geobox: GeoBox, observability: xr.DataArray
) -> NDArray[np.float64]:
    """Observed share of each shape's pixels; a shape too small to hold a centre takes the pixel it lies in."""
    total, observed = seen
    shares: NDArray[np.float64] = observed / np.maximum(total, 1)
    small = np.flatnonzero(total == 0)
    if not len(small):
        return shares
    x, y = shapely.get_coordinates(shapely.point_on_surface(shapes[small])).T
    cols = np.floor((x - geobox.affine.c) / geobox.affine.a).astype(np.int64)
    rows = np.floor((y - geobox.affine.f) / geobox.affine.e).astype(np.int64)
    inside = (rows >= 0) & (rows < geobox.shape[0]) & (cols >= 0) & (cols < geobox.shape[1])
    at = {"y": xr.DataArray(rows[inside], dims="i"), "x": xr.DataArray(cols[inside], dims="i")}
    shares[small[inside]] = observability.isel(at).to_numpy() == Observability.OBSERVED
    return shares


def _windows(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    for r in range(0, height, WINDOW_PX):
        for c in range(0, width, WINDOW_PX):
            yield slice(r, min(r + WINDOW_PX, height)), slice(c, min(c + WINDOW_PX, width))


def _status(table: gpd.GeoDataFrame, min_overlap: float, unmatched: Status) -> NDArray[np.object_]:
    status = np.where(table["overlap"] >= min_overlap, "tp", unmatched).astype(object)
    status[table["observed_share"].to_numpy() < MIN_OBSERVED] = "unobserved"
    return status


def _count_objects(
    ours: gpd.GeoDataFrame, theirs: gpd.GeoDataFrame, low_m2: float, high_m2: float
) -> ObjectScores:
    def count(table: gpd.GeoDataFrame, status: Status) -> int:
        inside = (table["area_m2"] >= low_m2) & (table["area_m2"] < high_m2)
        return int(((table["status"] == status) & inside).sum())

    return ObjectScores(
        truth_found=count(theirs, "tp"),
        truth_missed=count(theirs, "fn"),
        predicted_right=count(ours, "tp"),
        predicted_wrong=count(ours, "fp"),
    )


def _scores(of: PixelScores | ObjectScores, names: str) -> dict[str, float | None]:
    return {name: getattr(of, name) for name in names.split()}


def _ratio(part: float, whole: float) -> float | None:
    return None if whole == 0 else part / whole


def _f(score: float | None) -> str:
    return f"{'-':>10}" if score is None else f"{score:>10.3f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.3%}"
