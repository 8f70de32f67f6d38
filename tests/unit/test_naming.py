"""Clusters as they occur: which are landslides, why, and what may not change that."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidecube.models.errors import ModelError
from slidecube.models.naming import CONDITIONS, ClusterEvidence, name_landslide_clusters

DEFAULTS = {"objects": 40, "ndwi": -0.4, "brightness": 0.1, "object_area_m2": 2e4, "share_below_5_deg": 0.05}
FOREST = {
    "share": 0.6, "ndvi_pre": 0.85, "ndvi_post": 0.84, "dndvi": -0.01, "slope_deg": 28.0, "object_area_m2": 5e7,
    "ndwi": -0.7, "brightness": 0.03,
}  # fmt: skip
FIELD = {
    "share": 0.25, "ndvi_pre": 0.6, "ndvi_post": 0.35, "dndvi": -0.25, "slope_deg": 3.0, "share_below_5_deg": 0.8,
    "object_area_m2": 2e6,
}  # fmt: skip
RIVER = {
    "share": 0.02, "ndvi_pre": -0.1, "ndvi_post": -0.1, "dndvi": 0.0, "slope_deg": 4.0, "share_below_5_deg": 0.6,
    "ndwi": 0.2, "brightness": 0.05,
}  # fmt: skip
SLIDE = {"share": 0.03, "ndvi_pre": 0.8, "ndvi_post": 0.25, "dndvi": -0.5, "slope_deg": 30.0}


def cluster(number, **known):
    return ClusterEvidence(cluster=number, **{**DEFAULTS, **known})


def forest(number=3, **known):
    return cluster(number, **{**FOREST, **known})


def field(number=2, **known):
    return cluster(number, **{**FIELD, **known})


def river(number=1, **known):
    return cluster(number, **{**RIVER, **known})


def slide(number=0, **known):
    return cluster(number, **{**SLIDE, **known})


def single(evidence):
    """The same without an image of before."""
    return dataclasses.replace(evidence, ndvi_pre=None, dndvi=None)


def test_the_slides_of_a_wooded_valley_are_named_and_the_others_told_why_not():
    found = name_landslide_clusters([slide(), river(), field(), forest()])

    assert found.clusters == (0,)
    assert found.scores[0] > 0.9
    assert found.reasons[0].startswith(
        "landslide: 3 % of the area; NDVI changed by -0.49 beside the rest of the area"
    )
    assert "median slope 3 degrees, but at least 10 is expected" in found.reasons[2]
    assert "80 % of it below 5 degrees, but at most 40 is expected" in found.reasons[2]
    assert "NDWI +0.20, but at most 0 is expected" in found.reasons[1]
    assert "60 % of the area, but at most 20 is expected" in found.reasons[3]
    assert all(reason.startswith("not a landslide: ") for k, reason in found.reasons.items() if k)


def test_without_an_image_of_before_bare_steep_ground_among_green_is_named():
    found = name_landslide_clusters([single(e) for e in (slide(), river(), field(), forest())])

    assert found.clusters == (0,)
    assert "NDVI 0.59 below the greenest cluster" in found.reasons[0]


def test_several_clusters_may_be_landslides():
    evidence = [slide(), slide(1, ndvi_post=0.35, dndvi=-0.35, share=0.05, slope_deg=22.0), forest(), field()]
    assert name_landslide_clusters(evidence).clusters == (0, 1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (slide(dndvi=-0.01, ndvi_pre=0.26), "NDVI changed by +0.00 beside the rest"),  # rock, as bare before
        (slide(slope_deg=2.0, share_below_5_deg=0.9), "median slope 2 degrees"),  # harvest
        (slide(share=0.35), "35 % of the area"),
        (slide(object_area_m2=9e6), "objects of 900 ha or more, but at most 100"),  # a burnt hillside
        (slide(ndvi_post=0.6, dndvi=-0.25), "NDVI 0.60 after"),  # leaves turning
        (slide(brightness=0.5), "visible reflectance 0.500, but at most 0.35"),  # snow
        (slide(brightness=0.02), "visible reflectance 0.020, but at least 0.04"),  # shadow
        (slide(ndwi=0.3), "NDWI +0.30"),  # a reservoir that fills
        (slide(share=0.0), "holds no pixel"),
        (slide(slope_deg=None), "whether it is steep is not known"),
        (slide(ndvi_post=None), "whether it is bare is not known"),
        (single(slide(ndvi_post=0.7)), "NDVI 0.70 after"),
    ],
)
def test_what_is_no_landslide_is_not_named_and_nothing_may_be(kind, reason):
    found = name_landslide_clusters([kind, river(), field(), forest()])

    assert found.clusters == ()
    assert found.scores[0] < 0.5
    assert reason in found.reasons[0]


def test_in_a_bare_country_nothing_is_named_from_one_image():
    desert = [single(slide(i, share=0.25, ndvi_post=0.1 + 0.02 * i, object_area_m2=1e4)) for i in range(4)]
    desert = [
        dataclasses.replace(e, share=share) for e, share in zip(desert, (0.1, 0.1, 0.1, 0.7), strict=True)
    ]
    assert name_landslide_clusters(desert).clusters == ()


def test_a_season_that_takes_the_leaves_of_all_names_nothing_and_hides_nothing():
    autumn = [forest(dndvi=-0.3, ndvi_post=0.5), field(dndvi=-0.3), slide(dndvi=-0.35, ndvi_post=0.45)]
    assert name_landslide_clusters(autumn).clusters == ()
    assert name_landslide_clusters([*autumn[:2], slide(dndvi=-0.6)]).clusters == (0,)


def test_a_cluster_alone_is_judged_by_itself():
    assert name_landslide_clusters([slide(share=0.1)]).clusters == (0,)
    assert name_landslide_clusters([]).clusters == ()


def test_what_is_not_needed_may_be_unknown():
    known = slide(ndwi=None, brightness=None)
    assert name_landslide_clusters([known, forest()]).clusters == (0,)


# --- laws --------------------------------------------------------------------------------------------------------

share = st.floats(0, 1)
ndvi = st.floats(-0.3, 0.95)


@st.composite
def evidences(draw):
    return {
        "share": draw(share),
        "ndvi_post": draw(ndvi),
        "dndvi": draw(st.none() | st.floats(-0.9, 0.5)),
        "slope_deg": draw(st.floats(0, 60)),
        "share_below_5_deg": draw(share),
        "object_area_m2": draw(st.floats(100, 1e8)),
        "ndwi": draw(st.none() | st.floats(-0.9, 0.9)),
        "brightness": draw(st.none() | st.floats(0, 1)),
    }


@st.composite
def areas(draw):
    return [
        cluster(i, **known) for i, known in enumerate(draw(st.lists(evidences(), min_size=1, max_size=5)))
    ]


@given(areas(), st.randoms())
def test_the_order_of_the_evidence_does_not_matter(area, rng: random.Random):
    shuffled = rng.sample(area, len(area))

    assert name_landslide_clusters(shuffled) == name_landslide_clusters(area)


@given(areas())
def test_named_are_those_whose_conditions_are_all_met(area):
    found = name_landslide_clusters(area)

    assert set(found.scores) == set(found.reasons) == {e.cluster for e in area}
    assert found.clusters == tuple(sorted(k for k, score in found.scores.items() if score >= 0.5))
    for e in area:
        others = [o for o in area if o is not e]
        values = [(c, c.measure(e, others)) for c in CONDITIONS.values()]
        met = all(v is not None or not c.needed for c, v in values) and all(
            (v >= c.limit if c.at_least else v <= c.limit) for c, v in values if v is not None
        )
        assert (e.cluster in found.clusters) == (met and e.share > 0)
        assert found.reasons[e.cluster].startswith("landslide: " if e.cluster in found.clusters else "not a ")


@settings(max_examples=300)
@given(
    areas(),
    st.sampled_from(
        [
            ("dndvi", -1),
            ("slope_deg", 1),
            ("ndvi_post", -1),
            ("share_below_5_deg", -1),
            ("object_area_m2", -1),
        ]
    ),
    st.floats(0, 1),
)
def test_more_loss_slope_and_bareness_and_smaller_objects_never_lower_a_score(area, change, by):
    name, sign = change
    first = area[0]
    value = getattr(first, name)
    if value is None:
        return
    low, high = {"slope_deg": (0, 90), "share_below_5_deg": (0, 1), "object_area_m2": (1, 1e9)}.get(
        name, (-1, 1)
    )
    moved = value + by * ((high - value) if sign > 0 else (low - value))

    more = [dataclasses.replace(first, **{name: moved}), *area[1:]]

    assert name_landslide_clusters(more).scores[0] >= name_landslide_clusters(area).scores[0] - 1e-12


def test_every_condition_has_a_source_and_words():
    for condition in CONDITIONS.values():
        assert condition.source
        assert condition.width > 0
        assert condition.membership(condition.limit) == 0.5
        assert condition.sentence(condition.limit) == condition.words.format(condition.limit)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_cluster_that_occurs_twice_is_refused():
    with pytest.raises(ModelError, match="wanted once; got clusters 0, 0"):
        name_landslide_clusters([slide(), slide()])


@pytest.mark.parametrize(
    ("name", "value"), [("share", 1.5), ("share", -0.1), ("share", float("nan")), ("share_below_5_deg", 40.0)]
)
def test_impossible_shares_are_refused(name, value):
    with pytest.raises(ModelError, match=f"Evidence {name}=.* of cluster 0 is no share from 0 to 1"):
        slide(**{name: value})


def test_nan_is_not_unknown():
    with pytest.raises(
        ModelError, match="Evidence ndvi_post=nan of cluster 0 is not finite; None means unknown"
    ):
        slide(ndvi_post=float("nan"))
