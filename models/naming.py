"""Which clusters are landslides: a rule from physics and the literature, without a label and without a fit to one.

A cluster is named when it meets every condition of `CONDITIONS`, all of them or none: each gives a logistic membership
that is 0.5 at its limit, and the score is the smallest (a fuzzy AND, as in `rdndvi`). So rivers and lakes fall out as
flat or wet, fields and towns as flat, forest as green, its shadow as dark, cloud and snow as bright, and rock above the
trees as unchanged where there is an image of before, or as one huge body. What the rule cannot tell apart from
landslides are clear-cuts and roads on slopes, and, without an image of before, small outcrops and old scars.

The limits were set from the sources beside them before the rule was run on anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from slidecube.models.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvidence:
    """What is known of a cluster, over its pixels in the blocks that were looked at; None = not known.

    cluster : its number; share : of the area's known pixels that it holds, 0 to 1
    ndvi_pre, ndvi_post, dndvi : medians of NDVI before and after, and of its change (post - pre) pixel by pixel; None
        where there is no image of before
    ndwi : median of (green - near infrared) / (green + near infrared) after (McFeeters 1996)
    brightness : median of the mean reflectance of blue, green and red after
    slope_deg : median slope; share_below_5_deg : share of its pixels on flatter ground than 5 degrees, 0 to 1
    objects : connected groups of its pixels (eight neighbours) from the model's smallest area on
    object_area_m2 : half of these objects' area lies in objects of at least this size: their median by area, which
        speckle does not move
    largest_object_share : of its area in its largest object, 0 to 1
    elongation : median by area of the objects' long to short axis, 1 = round
    downslope : median by area of |cos| of the angle between long axis and fall line, 1 = straight down

    The last four are looked at by people; of them the rule reads `object_area_m2` alone: slides are as long as rivers
    and roads (the paper's are 8 to 17 times as long as wide), and an area may hold but one.
    """

    cluster: int
    share: float
    ndvi_post: float | None
    slope_deg: float | None
    share_below_5_deg: float | None
    objects: int
    object_area_m2: float | None
    ndvi_pre: float | None = None
    dndvi: float | None = None
    ndwi: float | None = None
    brightness: float | None = None
    largest_object_share: float | None = None
    elongation: float | None = None
    downslope: float | None = None

    def __post_init__(self) -> None:
        for name in ("share", "share_below_5_deg", "largest_object_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ModelError(f"Evidence {name}={value} of cluster {self.cluster} is no share from 0 to 1")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not math.isfinite(value):
                raise ModelError(
                    f"Evidence {field.name}={value} of cluster {self.cluster} is not finite; None means unknown"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """Which clusters are landslides, ascending, and why: score and reasons of every cluster."""

    clusters: tuple[int, ...]
    scores: Mapping[int, float]
    reasons: Mapping[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One condition: what is measured, its limit, and how fast belief changes around it.

    measure : of a cluster and the others, None = not known
    at_least : whether more is more likely a landslide
    width : of the logistic, in units of the measure, or in powers of ten (`decades`)
    needed : whether a cluster of which it is not known can be no landslide; otherwise it does not count
    words : the number in a sentence; source : of the limit
    """

    measure: Callable[[ClusterEvidence, Sequence[ClusterEvidence]], float | None]
    limit: float
    width: float
    at_least: bool
    words: str
    source: str
    needed: bool = False
    decades: bool = False

    def membership(self, value: float) -> float:
        """Logistic membership: 0.5 at the limit."""
        away = math.log10(max(value, 1e-9) / self.limit) if self.decades else value - self.limit
        x = away / self.width
        return 1 / (1 + math.exp(-max(min(x if self.at_least else -x, 500.0), -500.0)))

    def sentence(self, value: float) -> str:
        """The number, and the limit where it fails."""
        said = self.words.format(value)
        if self.membership(value) >= 0.5:
            return said
        return f"{said}, but {'at least' if self.at_least else 'at most'} {self.limit:g} is expected"


def _beside_others(e: ClusterEvidence, others: Sequence[ClusterEvidence]) -> float | None:
    """Change of NDVI beside that of the other clusters: the season changes all."""
    if e.dndvi is None:
        return None
    known = sorted((o.dndvi, o.share) for o in others if o.dndvi is not None and o.share > 0)
    return e.dndvi - (_median(known) if known else 0.0)


def _median(weighted: Sequence[tuple[float, float]]) -> float:
    """Median of ascending values with weights."""
    half, total = sum(weight for _, weight in weighted) / 2, 0.0
    for value, weight in weighted:
        total += weight
        if total >= half:
            return value
    return weighted[-1][0]


def _below_greenest(e: ClusterEvidence, others: Sequence[ClusterEvidence]) -> float | None:
    """How much greener the greenest other cluster of some extent is; only without an image of before."""
    green = [o.ndvi_post for o in others if o.ndvi_post is not None and o.share >= 0.05]
    if e.dndvi is not None or e.ndvi_post is None or not green:
        return None
    return max(green) - e.ndvi_post


CONDITIONS: Mapping[str, Condition] = {
    "extent": Condition(
        measure=lambda e, _: 100 * e.share,
        limit=20.0,
        width=3.0,
        at_least=False,
        words="{:.2g} % of the area",
        source="the paper's sites are slid on 2.3, 3.9 and 7.1 % (Table 1), and clusters hold more than slides",
        needed=True,
    ),
    "loss": Condition(
        measure=_beside_others,
        limit=-0.15,
        width=0.03,
        at_least=False,
        words="NDVI changed by {:+.2f} beside the rest of the area",
        source="a canopy of .8 that loses 20 to 25 % (rdndvi), less for pixels of which a part is bare",
    ),
    "own loss": Condition(
        measure=lambda e, _: e.dndvi,
        limit=-0.05,
        width=0.02,
        at_least=False,
        words="NDVI itself changed by {:+.2f}",
        source="less is within the noise of two composites",
    ),
    "bare": Condition(
        measure=lambda e, _: e.ndvi_post,
        limit=0.5,
        width=0.04,
        at_least=False,
        words="NDVI {:.2f} after",
        source="fresh soil .1 to .3, grass .3 to .5, closed canopy above .6",
        needed=True,
    ),
    "contrast": Condition(
        measure=_below_greenest,
        limit=0.2,
        width=0.03,
        at_least=True,
        words="NDVI {:.2f} below the greenest cluster",
        source="the single-image method sees slides only where vegetation surrounds them",
    ),
    "dry": Condition(
        measure=lambda e, _: e.ndwi,
        limit=0.0,
        width=0.03,
        at_least=False,
        words="NDWI {:+.2f}",
        source="McFeeters 1996: water is above 0",
    ),
    "lit": Condition(
        measure=lambda e, _: e.brightness,
        limit=0.04,
        width=0.005,
        at_least=True,
        words="visible reflectance {:.3f}",
        source="soil .08 to .25; canopy in shadow and water below .03",
    ),
    "not cloud": Condition(
        measure=lambda e, _: e.brightness,
        limit=0.35,
        width=0.02,
        at_least=False,
        words="visible reflectance {:.3f}",
        source="cloud and snow above .4",
    ),
    "steep": Condition(
        measure=lambda e, _: e.slope_deg,
        limit=10.0,
        width=2.0,
        at_least=True,
        words="median slope {:.0f} degrees",
        source="as rdndvi; the paper's slides lie on 17, 42 and 32 degrees in the mean (Table 1)",
        needed=True,
    ),
    "not flat": Condition(
        measure=lambda e, _: None if e.share_below_5_deg is None else 100 * e.share_below_5_deg,
        limit=40.0,
        width=5.0,
        at_least=False,
        words="{:.0f} % of it below 5 degrees",
        source="rivers, fields and towns; the paper's slides begin at 5, 12 and 16 degrees (Table 1)",
        needed=True,
    ),
    "scattered": Condition(
        measure=lambda e, _: None if e.object_area_m2 is None else e.object_area_m2 / 1e4,
        limit=100.0,
        width=0.2,
        decades=True,
        at_least=False,
        words="half its area in objects of {:.3g} ha or more",
        source="the paper's slides have .45 to 12.4 ha (Table 1); 100 ha leave room for clusters of touching slides",
        needed=True,
    ),
}
"""The conditions, by name."""


def name_landslide_clusters(evidence: Sequence[ClusterEvidence]) -> Naming:
    """Name the clusters that are landslides: several, one, or none.

    The order of the evidence does not matter. Where `dndvi` is known, vegetation must have been lost; where it is not,
    the cluster must be much barer than the greenest one.
    Raises ModelError when a cluster occurs twice.
    """
    clusters = [e.cluster for e in evidence]
    if len(set(clusters)) != len(clusters):
        raise ModelError(
            f"Evidence of each cluster is wanted once; got clusters {', '.join(map(str, clusters))}"
        )
    scores, reasons = {}, {}
    for e in sorted(evidence, key=lambda e: e.cluster):
        scores[e.cluster], reasons[e.cluster] = _judge(e, [o for o in evidence if o.cluster != e.cluster])
    named = tuple(cluster for cluster, score in scores.items() if score >= 0.5)
    return Naming(clusters=named, scores=scores, reasons=reasons)


def _judge(e: ClusterEvidence, others: Sequence[ClusterEvidence]) -> tuple[float, str]:
    """Score of a cluster, and its reasons."""
    if e.share == 0:
        return 0.0, "not a landslide: it holds no pixel"
    score = 1.0
    met: list[str] = []
    failed: list[str] = []
    for name, condition in CONDITIONS.items():
        value = condition.measure(e, others)
        if value is None:
            if condition.needed:
                score = 0.0
                failed.append(f"whether it is {name} is not known")
            continue
        member = condition.membership(value)
        score = min(score, member)
        (met if member >= 0.5 else failed).append(condition.sentence(value))
    if failed:
        return score, f"not a landslide: {'; '.join(failed)}"
    return score, f"landslide: {'; '.join(dict.fromkeys(met))}"
