"""The null run finds what the whole chain finds before any event, writes nothing, and refuses windows of an event."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slidecube.models.zoo import build_model
from slidecube.pipeline.config import load_config
from slidecube.pipeline.demo import archive_toml
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.null_run import NullRun, null_run, require_ready
from slidecube.pipeline.open import open_inventory
from slidecube.pipeline.pixels import PixelWindow, read_stored
from slidecube.pipeline.plan import plan
from slidecube.pipeline.report_stage import read_objects
from slidecube.pipeline.run import run
from slidecube.pipeline.simulate.archive import simulate_archive
from slidecube.pipeline.simulate.parameters import Size, load_parameters

QUIET = """
[[epoch]]
name = "quiet"
pre = ["2018-06-01", "2018-07-10"]
post = ["2018-07-11", "2018-09-06"]
"""
LOOSE = 'model = "rdndvi"\nparameters = { loss_pct = 1.0, slope_deg = 1.0 }\nmin_area_m2 = 300.0'


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    p = load_parameters()
    edge = Size(centre_m=(230400.0, 33280.0), extent_m=1800.0)  # two tiles meet there
    sizes = p.area.model_copy(update={"sizes": {"edge": edge}})
    own = p.model_copy(update={"area": sizes})
    folder = tmp_path_factory.mktemp("null")
    return simulate_archive(folder, seed=77, size="edge", overpasses=6, parameters=own)


def write(archive, name: str, *changes: tuple[str, str], event: bool = False):
    text = archive_toml(archive)
    start, end = text.index("[[epoch]]"), text.index("[sources]")
    text = text[:start] + (text[start:end] if event else "") + QUIET + text[end:]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    toml = archive.root / f"{name}.toml"
    toml.write_text(text + 'formats = ["parquet"]\n', encoding="utf-8")
    return load_config(toml)


@pytest.fixture(scope="module")
def made(archive):
    plan_ = plan(write(archive, "loose", ('model = "rdndvi"', LOOSE)))
    assert run(plan_, progress=False).complete
    return plan_


def listing(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def found(archive, made):
    before = listing(archive.root)
    counted = null_run(made)
    assert listing(archive.root) == before, "a null run writes nothing"
    return counted


def test_it_counts_what_the_whole_chain_finds(made, found):
    objects = read_objects(made)
    own = objects[objects["epoch"] == "quiet"]
    false = own[(own["area_m2"] >= 1_000) & (own["slope_deg"] > 10)]
    assert 0 < len(false) < len(own)  # small and gentle ones are there, and do not count
    assert found.false_objects == len(false)
    assert len(made.tiles) == 2
    edge_m = 230400.0
    assert ((own.bounds["minx"] < edge_m) & (own.bounds["maxx"] > edge_m)).any()


def test_its_area_is_that_of_the_observed_slopes(archive, made, found):
    inventory = open_inventory(archive.root)
    seen = inventory["observability"].isel(epoch=[e.name for e in made.epochs].index("quiet")).to_numpy() == 3
    px = made.grid.tile_px
    first = PixelWindow.of_tile(made.grid, min(made.tiles, key=lambda t: (t.row, t.col)))
    window = PixelWindow(
        row=int(made.tiles.rows.min()) * px, col=first.col, height=seen.shape[0], width=seen.shape[1]
    )
    slope = read_stored(made, made.epochs[0].terrain, ["slope_deg"], window)["slope_deg"].values

    assert found.km2 == pytest.approx((seen & (slope != 65535) & (slope > 1000)).sum() * 1e-4, rel=1e-12)
    assert found.per_100_km2 == pytest.approx(100 * found.false_objects / found.km2)
    assert found.to_dict()["per_100_km2"] == round(found.per_100_km2, 3)


def test_another_detector_maps_as_if_the_run_had_named_it(archive, made, found):
    strict = 'model = "rdndvi"\nparameters = { loss_pct = 14.0 }'
    other = plan(write(archive, "other", ('model = "rdndvi"', strict)))
    detector = build_model("rdndvi", parameters={"loss_pct": 14.0})

    replaced = null_run(made, detector)

    assert replaced == null_run(other)
    assert replaced != found


def test_windows_of_an_event_are_refused(archive):
    both = plan(write(archive, "both", event=True))
    with pytest.raises(PipelineError, match=r"needs the name of its epoch; epochs: event, quiet"):
        null_run(both)
    with pytest.raises(PipelineError, match=r"no epoch 'calm'; epochs: event, quiet"):
        null_run(both, epoch="calm")
    with pytest.raises(
        PipelineError, match=r"looks until 2018-11-20, and epoch 'event' has an event on 2018-09-07"
    ):
        null_run(both, epoch="event")
    long = plan(
        write(archive, "long", ('"2018-07-11", "2018-09-06"', '"2018-07-11", "2018-09-20"'), event=True)
    )
    with pytest.raises(
        PipelineError, match=r"'quiet' looks until 2018-09-20, and epoch 'event' has an event"
    ):
        null_run(long, epoch="quiet")


def test_ground_that_was_not_looked_at_is_not_quiet(archive, made):
    other = plan(write(archive, "unmade", ("[cube]\n", "[cube]\ngreenest_of = 0\n")))

    with pytest.raises(
        PipelineError, match=r"is not done on \d+ of \d+ tiles, such as r\d+c\d+; run `slidecube cube`"
    ):
        null_run(other)


def test_a_detector_of_what_the_layers_do_not_hold_is_refused(made):
    with pytest.raises(
        PipelineError, match=r"aldi@\d+ reads ndvi_mean, ndvi_std \(pre\), which the layers of run"
    ):
        null_run(made, build_model("aldi"))
    with pytest.raises(PipelineError, match=r"kmeans@\d+ learns from a cube; name it as \[detect\] model"):
        null_run(made, build_model("kmeans"))


def test_it_is_known_before_a_training_whether_its_null_run_can_be_made(archive, made):
    reads = build_model("rdndvi").card.inputs
    require_ready(made, reads)
    with pytest.raises(
        PipelineError, match=r"The network reads ndvi_mean, ndvi_std \(pre\), which the layers"
    ):
        require_ready(made, build_model("aldi").card.inputs)
    with pytest.raises(PipelineError, match=r"no epoch 'calm'"):
        require_ready(made, reads, epoch="calm")
    unmade = plan(write(archive, "unmade", ("[cube]\n", "[cube]\ngreenest_of = 0\n")))
    with pytest.raises(PipelineError, match=r"is not done on \d+ of \d+ tiles"):
        require_ready(unmade, reads)


def test_no_slope_has_no_rate():
    nothing = NullRun(false_objects=0, km2=0.0, epoch="quiet")

    assert nothing.per_100_km2 is None
    assert "per_100_km2" not in nothing.to_dict()
    assert replace(nothing, km2=50.0).per_100_km2 == 0
    assert all(np.isfinite(v) for v in nothing.to_dict().values() if isinstance(v, float))
