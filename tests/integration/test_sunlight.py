"""Snow, a low sun, the shadow of ridges and the light on slopes, from the TOML to the inventory."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import rasterio

from slidecube.pipeline.config import load_config
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.inventory import LANDSLIDE_NODATA, Observability, Reason
from slidecube.pipeline.open import open_inventory, open_plan
from slidecube.pipeline.plan import plan
from slidecube.pipeline.run import run
from slidecube.pipeline.simulate import simulate_archive
from slidecube.pipeline.status import status
from slidecube.pipeline.store import open_layer
from slidecube.pipeline.sunlight import cos_incidence, required_sun
from slidecube.pipeline.terrain import TERRAIN_VARIABLES
from slidecube.pipeline.visibility import CAST_SHADOW

pytestmark = pytest.mark.slow

TOML = """
[area]
aoi = "{root}/truth/area.geojson"
[[epoch]]
name = "event"
pre = ["{pre[0]}", "{pre[1]}"]
post = ["{post[0]}", "{post[1]}"]
[sources]
optical = "{optical}/catalog.json"
dem = "{root}/archive/dem/collection.json"
[cube]
tile_px = {tile_px}
bands = ["B04", "B08"]
sun = {{ {settings} }}
[output]
workspace = "{workspace}"
formats = ["parquet"]
[cluster]
workers = 2
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Sao Tome's relief under an invented season: the sun after the event stands at 31 degrees."""
    return simulate_archive(tmp_path_factory.mktemp("archive"), seed=3, extent_km=6.0, overpasses=3)


@pytest.fixture(scope="module")
def configured(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def make(name, settings="", *, optical=None, tile_px=512):
        toml = folder / f"{name}.toml"
        toml.write_text(
            TOML.format(
                root=archive.root, optical=optical or archive.root / "archive", pre=archive.pre, post=archive.post,
                tile_px=tile_px, settings=settings, workspace=name,
            )
        )  # fmt: skip
        return load_config(toml)

    return make


@pytest.fixture(scope="module")
def mapped(configured):
    made = {}

    def of(name, settings="", **how):
        if name not in made:
            config = configured(name, settings, **how)
            report = run(config, progress=False)
            assert report.complete, report.reasons
            made[name] = config.workspace
        return made[name]

    return of


def _reasons(workspace):
    cube = open_inventory(workspace).isel(epoch=0)
    return cube["reason"].values, cube["landslide"].values, cube["observability"].values


def test_a_low_sun_is_its_own_reason_and_no_absence_of_landslides(mapped):
    why, landslide, seen = _reasons(mapped("low", "min_elevation_deg = 40"))
    low = why == Reason.LOW_SUN
    assert low.sum() > 10_000
    assert not (seen == Observability.OBSERVED).any()  # every scene after the event has a lower one
    assert (landslide[low] == LANDSLIDE_NODATA).all()
    assert status(mapped("low"))["not_observable"]["no clear date on one side of the event: sun too low"]
    assert not (_reasons(mapped("plain"))[0] == Reason.LOW_SUN).any()


def test_snow_on_one_side_is_its_own_reason(mapped, archive, tmp_path):
    """All of the ground after the event is snow; the scenes' pixels are simulated, the classification is changed."""
    shutil.copytree(archive.root / "archive", tmp_path / "snow")
    for item in (tmp_path / "snow").glob("sentinel-2-l2a/*/*.json"):
        body = json.loads(item.read_text())
        if body["properties"]["datetime"][:10] > str(archive.pre[1]):
            (scl,) = item.parent.glob("*SCL*.tif")
            with rasterio.open(scl, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
                values = file.read(1)
                file.write(np.where(values == 0, 0, 11).astype(values.dtype), 1)
    why, landslide, seen = _reasons(mapped("snow", optical=tmp_path / "snow"))
    assert (why[seen == Observability.NOT_OBSERVABLE] == Reason.SNOW).mean() > 0.95
    assert not (seen == Observability.OBSERVED).any()
    assert (landslide == LANDSLIDE_NODATA).all()


def test_shadow_of_ridges_lies_behind_them_and_is_its_own_reason(mapped):
    workspace = mapped("shadow", "cast_shadow = true")
    made = open_plan(workspace)
    epoch = made.epochs[0]
    layer = _layer(workspace, epoch.post)
    dark = (layer["hidden"].values & CAST_SHADOW) > 0
    assert 500 < dark.sum() < 0.2 * dark.size
    slope, aspect = (_degrees(workspace, epoch.terrain, name) for name in ("slope_deg", "aspect_deg"))
    suns = [required_sun(s) for s in made.scenes.role("optical") if s.datetime in made.config.epochs[0].post]
    lightest = np.max([cos_incidence(slope, aspect, sun) for sun in suns], axis=0)
    known = ~np.isnan(lightest)
    # it begins on ground that turns away from the sun, and reaches some of the rest
    assert np.median(lightest[dark & known]) < 0.5 * np.median(lightest[known & ~dark])

    why, landslide, _ = _reasons(workspace)
    hidden = why == Reason.CAST_SHADOW
    assert hidden.sum() > 300
    assert (landslide[hidden] == LANDSLIDE_NODATA).all()
    before = _reasons(mapped("plain"))
    # seen before, or dark under the projection of a cloud, or without a clear date on the other side
    clouded = {Reason.NO_CLEAR_PRE, Reason.NO_CLEAR_POST, Reason.NO_CLEAR_PRE_NOR_POST}
    assert set(np.unique(before[0][hidden])) <= {Reason.NONE, Reason.INDEX_UNDEFINED, *clouded}
    assert (before[2][hidden] == Observability.OBSERVED).any()
    # ground called cloud that the bands would have admitted is dark, too, and keeps the reason of clouds
    other = (why != before[0]) & ~hidden
    assert other.sum() < 0.01 * hidden.sum()
    assert set(np.unique(why[other])) <= clouded


def _layer(workspace, name):
    made = open_plan(workspace)
    return open_layer(made.workspace.layer(made.grid, name), tiles=list(made.tiles)).load()


def _degrees(workspace, layer, name):
    return TERRAIN_VARIABLES[name].values(_layer(workspace, layer)[name]).values


@pytest.mark.parametrize("method", ["c", "scs+c"])
def test_correction_parts_brightness_from_light(mapped, method):
    """Band 8 of each date against cos i, from .3 and more to a fifth of it at most."""
    found = {}
    for name, settings in (("plain", ""), (method, f'correction = "{method}"')):
        workspace = mapped(name, settings)
        made = open_plan(workspace)
        epoch = made.epochs[0]
        slope, aspect = (_degrees(workspace, epoch.terrain, n) for n in ("slope_deg", "aspect_deg"))
        layer = _layer(workspace, epoch.post)
        assert ("illumination" in layer) == (name != "plain")
        for scene in made.scenes.role("optical"):
            day = scene.datetime.date().toordinal() - 719_163
            here = (layer["date"].values == day) & (slope > 5) & (layer["B08"].values > 0)
            if here.sum() > 20_000:
                cos_i = cos_incidence(slope, aspect, required_sun(scene))
                found.setdefault(name, []).append(np.corrcoef(cos_i[here], layer["B08"].values[here])[0, 1])
    assert min(found["plain"]) > 0.5
    assert max(map(abs, found[method])) < 0.4 * min(found["plain"])


def test_layers_do_not_depend_on_the_tiles(mapped):
    settings = 'cast_shadow = true, correction = "scs+c"'
    one, other = mapped("t512", settings), mapped("t2048", settings, tile_px=2048)
    for side in ("pre", "post", "terrain"):
        a, b = (_layer(w, getattr(open_plan(w).epochs[0], side)) for w in (one, other))
        y, x = (np.intersect1d(a[dim], b[dim]) for dim in ("y", "x"))
        assert len(y) > 1000
        for name in a.data_vars:
            if name != "spatial_ref":
                np.testing.assert_array_equal(a[name].sel(y=y, x=x).values, b[name].sel(y=y, x=x).values)


def test_keys_follow_what_is_read(configured):
    def made(settings):
        return plan(configured("keys", settings))

    plain, low, shadow, c = (
        made(s) for s in ("", "min_elevation_deg = 10", "cast_shadow = true", 'correction = "c"')
    )
    names = {p.epochs[0].post for p in (plain, low, shadow, c)}
    assert len(names) == 4
    assert len({p.epochs[0].terrain for p in (plain, low, shadow, c)}) == 1

    def heights(p):
        return {p.scenes.scenes[i].role for read in p.reads[p.epochs[0].post].values() for i in read}

    assert heights(plain) == heights(low) == {"optical"}
    assert heights(shadow) == heights(c) == {"optical", "dem"}
    assert shadow.estimate.cpu_hours > plain.estimate.cpu_hours


def test_items_that_do_not_say_where_the_sun_stood_are_refused_only_where_it_matters(
    configured, archive, tmp_path
):
    shutil.copytree(archive.root / "archive", tmp_path / "sunless")
    for item in (tmp_path / "sunless").glob("sentinel-2-l2a/*/*.json"):
        body = json.loads(item.read_text())
        body["properties"] = {
            k: v for k, v in body["properties"].items() if "sun" not in k and "solar" not in k
        }
        item.write_text(json.dumps(body))
    assert plan(configured("sunless", optical=tmp_path / "sunless")).tiles
    with pytest.raises(PipelineError, match="does not say where the sun stood"):
        plan(configured("sunless2", 'correction = "c"', optical=tmp_path / "sunless"))
