"""Keys written down: what a run does not read is not in them, and what was made is still done."""

from __future__ import annotations

import datetime as dt

import pytest

from slidecube.catalog.grid import TileGrid
from slidecube.catalog.scenes import SceneTable, Window
from slidecube.pipeline.config import load_config
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.plan_keys import optical_layer_plan, radar_layer_plan

PRE = Window(start=dt.date(2018, 6, 1), end=dt.date(2018, 9, 6))
POST = Window(start=dt.date(2018, 9, 8), end=dt.date(2018, 11, 20))
NONE = SceneTable(scenes=())
GRID = TileGrid(crs="EPSG:32632", resolution_m=10.0, tile_px=512)


@pytest.fixture
def config(tmp_path):
    def make(sources='optical = "mine"\ndem = "mine"', more=""):
        (tmp_path / "run.toml").write_text(
            '[area]\nbbox = [6.4, 0.0, 6.8, 0.4]\ncrs = "EPSG:32632"\n'
            f'[[epoch]]\nname = "e"\npre = ["{PRE.start}", "{PRE.end}"]\npost = ["{POST.start}", "{POST.end}"]\n'
            f"[sources]\n{sources}\n[cube]\ntile_px = 512\n{more}"
        )
        return load_config(tmp_path / "run.toml")

    return make


def test_layers(config):
    made = config()
    assert optical_layer_plan(made, GRID, PRE, NONE, side="pre").key == "603ec1fc0ab5854b"
    assert optical_layer_plan(made, GRID, POST, NONE, side="post").key == "3967679d23d29dde"


def test_a_method_is_keyed_by_what_it_looks_at_and_by_no_more(config):
    def keys(more):
        made = config(more=more)
        return [optical_layer_plan(made, GRID, PRE, NONE, side=side).key for side in ("pre", "post")]

    plain = keys("")
    assert plain[0] == plain[1], "last year's post is this year's pre"
    assert keys("greenest_of = 2\n") == plain
    assert keys("greenest_of = 0\n")[0] != plain[0]
    medoid = keys('composite = "medoid"\n')
    assert medoid == keys('composite = "medoid"\ngreenest_of = 5\n')
    assert medoid[0] == medoid[1] != plain[0]
    nearest = keys('composite = "nearest-clear"\n')
    assert nearest[0] != nearest[1], "the event lies at another end"


def test_what_decides_the_results(config):
    assert content_key(config().science()) == "f7761ac3be3d8155"
    assert content_key(config().search_terms()) == "13689b53a393f6b8"


def test_settings_of_radar_decide_nothing_without_it_and_everything_of_it_with_it(config):
    settings = '[cube.radar]\norbit = "ascending"\nspeckle_window_px = 7\n'
    assert config(more='[cube.radar]\norbit = "descending"\n').science() == config().science()
    sources = 'optical = "mine"\ndem = "mine"\nradar = "mine"'
    plain, other = config(sources), config(sources, more=settings)
    assert plain.science() != other.science()
    one, two = (radar_layer_plan(c, GRID, PRE, NONE) for c in (plain, other))
    assert one.name.startswith("radar-2018-06-01_2018-09-06-descending-")
    assert two.name.startswith("radar-2018-06-01_2018-09-06-ascending-")
    assert (one.orbit, two.orbit) == ("descending", "ascending")
    assert optical_layer_plan(plain, GRID, PRE, NONE, side="pre") == optical_layer_plan(
        other, GRID, PRE, NONE, side="pre"
    )
