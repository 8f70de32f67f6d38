"""Differences of sensors on a block: medians of what both saw, in whatever order the dates come."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field

import dask.array as da
import numpy as np
import pytest

from slidecube.pipeline.quality import _chosen_sensor
from slidecube.pipeline.sensors import (
    FEWEST_PX,
    STEP_PX,
    differences,
    gap_numbers,
    gaps_in,
    optical_gaps,
    sensor_of,
    sensor_pairs,
)

A, B, C = "sentinel-1a", "sentinel-1b", "sentinel-1c"


@dataclass
class Offset:
    value: float = 0.0


@dataclass
class Seen:
    """What of a scene the comparison looks at."""

    platform: str | None
    day: int
    offset: Offset = field(default_factory=Offset)

    @property
    def item(self):
        return {"properties": {"platform": self.platform}}

    @property
    def datetime(self):
        return dt.datetime(2018, 6, self.day, 10, tzinfo=dt.UTC)

    def __getattr__(self, name):
        if name in ("id", "identity", "datatake"):
            return f"scene {self.day}"
        raise AttributeError(name)


def stack(values, shape=(16, 16)):
    return np.stack([np.full(shape, value, np.uint16) for value in values])


def test_the_median_of_each_sensor_is_compared_where_both_saw():
    stored = stack([1000, 1010, 1500, 1040])
    stored[3, :8] = 0  # C saw the lower half only
    one, px = differences(stored, [A, A, B, C], [0] * 4, [(A, C)])
    assert (one / 2, px) == (1040 - 1005, 128)


def test_only_observations_of_one_view_are_compared():
    stored = stack([1000, 1200, 1300])
    assert differences(stored, [A, C, C], ["east", "east", "west"], [(A, C)]).tolist() == [400, 256]
    assert differences(stored, [A, C, C], ["east", "west", "west"], [(A, C)]).tolist() == [0, 0]


def test_too_few_pixels_have_no_number():
    stored = stack([1000, 1100])
    stored[1].flat[FEWEST_PX:] = 0
    assert differences(stored, [A, C], [0, 0], [(A, C)]).tolist() == [200, FEWEST_PX]
    stored[1].flat[FEWEST_PX - 1] = 0
    assert differences(stored, [A, C], [0, 0], [(A, C)]).tolist() == [0, 0]


def test_the_order_of_dates_changes_nothing():
    rng = np.random.default_rng(3)
    stored = rng.integers(0, 3000, (6, 20, 20)).astype(np.uint16)
    sensors, views = [A, C, A, C, B, B], [0, 0, 1, 1, 0, 1]
    pairs = [(A, B), (A, C), (B, C)]
    want = differences(stored, sensors, views, pairs)
    assert want.all()
    for _ in range(5):
        order = rng.permutation(6)
        again = differences(stored[order], [sensors[i] for i in order], [views[i] for i in order], pairs)
        assert again.tolist() == want.tolist()


def test_blocks_of_optical_dates_are_compared_each_by_itself():
    seen = [Seen("Sentinel-2A", 1), Seen("Sentinel-2B", 2), Seen("Sentinel-2A", 3, Offset(-0.1))]
    dn = np.stack([np.full((128, 64), n, np.uint16) for n in (2000, 2300, 3000)])
    dn[1, 64:] += 100
    clear = np.ones(dn.shape, bool)
    clear[2, :64] = False
    lazy = optical_gaps(
        da.from_array(dn, chunks=(3, 64, 64)), da.from_array(clear, chunks=(3, 64, 64)), scenes=seen
    )
    assert lazy is not None
    found = lazy.compute()
    assert found.shape == (2, 2, 1)
    assert found[1].ravel().tolist() == [(64 // STEP_PX) ** 2] * 2
    numbers = gap_numbers(found, sensor_pairs(seen), variables=["B08"], first_block=(6, 4), step=1e-4)
    upper, lower = gaps_in({"px": 5, **numbers})
    assert (upper.row, upper.col, upper.first, upper.second) == (6, 4, "sentinel-2a", "sentinel-2b")
    assert upper.difference == pytest.approx(0.03)
    assert (lower.row, lower.difference) == (7, pytest.approx(0.04))


def test_of_one_sensor_and_of_nameless_ones_nothing_is_computed():
    blank = da.zeros((2, 8, 8), np.uint16)
    for one, two in (("Sentinel-2A", "SENTINEL-2A"), ("Sentinel-2A", None)):
        scenes = [Seen(one, 1), Seen(two, 2)]
        assert optical_gaps(blank, blank > 0, scenes=scenes) is None


def test_a_name_is_one_word_whatever_an_item_says():
    assert sensor_of(Seen("Sentinel 1  A" + "x" * 99, 1)) == ("sentinel-1-a" + "x" * 28)
    assert sensor_pairs([Seen(C, 1), Seen(A, 2), Seen(B, 3)]) == [(A, B), (A, C), (B, C)]


def test_the_chosen_day_tells_the_sensor_where_one_alone_saw_it():
    day = (dt.date(2018, 6, 1) - dt.date(1970, 1, 1)).days
    scenes = [Seen("s2b", 1), Seen("s2a", 2), Seen("s2a", 3), Seen("s2b", 3)]
    codes, names = _chosen_sensor(np.array([[day, day + 1, day + 2, 0]]), scenes)
    assert [names.get(int(code)) for code in codes[0]] == ["s2b", "s2a", None, None]
