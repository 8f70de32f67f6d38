"""Windows of several spans, and pre-event seasons derived from the one after the event."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidecube.catalog.errors import CatalogError
from slidecube.catalog.scenes import Window
from slidecube.pipeline.config import load_config
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.plan import plan

DAYS = st.dates(dt.date(2000, 1, 1), dt.date(2030, 1, 1))


@st.composite
def spans(draw):
    """One to four spans, none of which shares a day with another."""
    days = sorted(draw(st.sets(DAYS, min_size=2, max_size=8)))
    days = days[: len(days) // 2 * 2]
    return [Window(start=a, end=b) for a, b in zip(days[::2], days[1::2], strict=True)]


def noon(day):
    return dt.datetime(day.year, day.month, day.day, 12, tzinfo=dt.UTC)


@given(spans(), DAYS, st.randoms())
def test_a_window_holds_what_its_spans_hold_in_whatever_order(given_spans, day, random):
    window = Window.of(given_spans)
    shuffled = list(given_spans)
    random.shuffle(shuffled)
    assert Window.of(shuffled) == window
    assert (noon(day) in window) == any(noon(day) in span for span in given_spans)
    assert list(window.spans) == given_spans
    assert (window.start, window.end) == (given_spans[0].start, given_spans[-1].end)
    assert Window.parse(str(window)) == window


def test_a_window_of_one_span_is_written_as_ever():
    window = Window(start=dt.date(2018, 5, 1), end=dt.date(2018, 9, 5))
    assert Window.of([window]) is window
    assert str(window) == "2018-05-01_2018-09-05"


def test_spans_that_share_a_day_are_refused():
    one, two = (Window(start=dt.date(2018, m, 1), end=dt.date(2018, m + 1, 1)) for m in (5, 6))
    with pytest.raises(CatalogError, match="share days"):
        Window.of([two, one])


def test_the_leap_day_has_a_day_in_every_year():
    leap = Window(start=dt.date(2020, 2, 29), end=dt.date(2020, 3, 31))
    assert str(leap.years_back(1)) == "2019-02-28_2019-03-31"
    assert str(leap.years_back(4)) == "2016-02-29_2016-03-31"


@pytest.fixture
def written(tmp_path):
    def make(epoch):
        path = tmp_path / "run.toml"
        path.write_text(f'[area]\nbbox = [6.4, 0.0, 6.8, 0.4]\n[[epoch]]\nname = "e"\n{epoch}\n')
        return load_config(path)

    return make


POST = 'post = ["2018-09-07", "2018-11-15"]'


def test_the_same_days_of_earlier_years(written):
    config = written(f"pre_years_back = [2, 1]\n{POST}")
    (epoch,) = config.epochs
    assert str(epoch.before) == "2016-09-07_2016-11-15.2017-09-07_2017-11-15"
    same = written(f'pre = [["2017-09-07", "2017-11-15"], ["2016-09-07", "2016-11-15"]]\n{POST}')
    assert same.science() == config.science()
    assert same.search_terms() == config.search_terms()
    assert written(f"pre_years_back = [1]\n{POST}").science() != config.science()


@pytest.mark.parametrize(
    ("epoch", "says"),
    [
        (f'pre = ["2018-05-01", "2018-09-05"]\npre_years_back = [1]\n{POST}', "both pre and pre_years_back"),
        (f'pre = [["2018-05-01", "2018-09-05"], ["2018-07-01", "2018-08-05"]]\n{POST}', "share days"),
        (f'pre = [["2018-05-01"]]\n{POST}', "or a list of such pairs"),
        (f"pre = []\n{POST}", "or a list of such pairs"),
        (f"pre_years_back = [0]\n{POST}", "1 to 20"),
        (f"pre_years_back = [1, 1]\n{POST}", "twice"),
        ('pre_years_back = [1, 2]\npost = ["2017-09-07", "2018-11-15"]', "share days"),
        (
            f'pre = [["2016-05-01", "2016-09-05"], ["2018-07-01", "2018-09-08"]]\n{POST}',
            "not before post starts",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(written, epoch, says):
    with pytest.raises(PipelineError, match=says) as refused:
        written(epoch)
    assert "\n" not in str(refused.value)


def test_a_plan_reads_the_spans_and_nothing_between_them(desk):
    """Of six simulated overpasses before the event, those of two spans; found again in the plan as written."""
    whole = plan(load_config(desk.toml))
    days = sorted(
        {s.datetime.date() for s in whole.scenes.role("optical") if s.datetime.date() < dt.date(2018, 9, 5)}
    )
    assert len(days) >= 3
    first, last = days[0], days[-1]
    pairs = [[str(first), str(first)], [str(last), str(last)]]
    desk.write(epoch={"pre": pairs})
    made = plan(load_config(desk.toml))
    (name,) = [e.pre for e in made.epochs]
    read = {made.scenes.scenes[i].datetime.date() for at in made.reads[name].values() for i in at}
    assert read == {first, last}
    again = plan(load_config(desk.toml))
    assert again.reused_scenes
    assert again.by_layer[name].window == made.by_layer[name].window
    assert len(again.by_layer[name].window.spans) == 2
