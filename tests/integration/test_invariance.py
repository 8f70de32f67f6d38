"""The result does not depend on the tiling, the runner, the threads or the Dask chunks: bit for bit."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
from geopandas.testing import assert_geodataframe_equal

from slidecube.models.card import FeatureSpec
from slidecube.models.predict import predict
from slidecube.models.rules import RdNdvi, rdndvi
from slidecube.models.zoo import ZOO
from slidecube.pipeline.config import load_config
from slidecube.pipeline.features import Layers, build_features
from slidecube.pipeline.masks import MaskRule
from slidecube.pipeline.open import open_inventory, open_plan
from slidecube.pipeline.report_stage import read_objects
from slidecube.pipeline.run import run
from slidecube.pipeline.run_plan import compositing
from slidecube.pipeline.simulate import simulate_archive
from slidecube.pipeline.statistics import read_manifest
from slidecube.pipeline.store import open_layer
from slidecube.pipeline.terrain import TERRAIN_VARIABLES
from slidecube.pipeline.tile import optical_layer

SLOW = pytest.mark.slow
DASK = {"profile": "dask-local", "workers": 2}
TOML = """
[area]
aoi = "{archive}/truth/area.geojson"
[[epoch]]
name = "event"
pre = ["{pre[0]}", "{pre[1]}"]
post = ["{post[0]}", "{post[1]}"]
[sources]
optical = "{archive}/archive/catalog.json"
dem = "{archive}/archive/dem/collection.json"
[cube]
composite = "{composite}"
tile_px = {tile_px}
[detect]
min_area_m2 = 2000
{model}
[output]
workspace = "."
formats = ["parquet"]
[cluster]
profile = "{profile}"
workers = {workers}
threads_per_worker = {threads}
loader = "{loader}"
"""


NETWORKS = {
    "resunet-small": {"window_px": 128, "margin_px": 16},
    "pspnet-small": {
        "architecture": "pspnet", "arguments": {"width": 32}, "names": ("rdndvi", "dndvi", "slope_deg"),
        "window_px": 224, "margin_px": 16, "seed": 1,
    },
}  # fmt: skip
"""Networks that nobody trained; another with global pooling, of which each pixel depends on the whole window."""

MODELS = {
    "rdndvi": 'model = "rdndvi"',
    "everything": 'model = "everything"',
    "cae-kmeans": 'model = "cae-kmeans"\nparameters = { sample = 6000, epochs = 4, batch = 1000 }',
    "cae-kmeans-change": 'model = "cae-kmeans-change"\nparameters = { sample = 6000, epochs = 4, batch = 1000 }',
    **{f"network-{name}": f'model = "{name}"' for name in NETWORKS},
    "network-ensemble": 'model = ["resunet-small", "pspnet-small"]',
    "kmeans-strata": 'model = "kmeans"\nparameters = { sample = 6000 }\n'
    '[fit]\nstrata = "zones.geojson"\nstrata_field = "zone"\nstrata_blend_m = 300\nmnf_variance = 0.9',
}
"""What a TOML says of a model, short of a long training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything(RdNdvi):
    """The rule, which reads all that layers can hold beside: whatever a tile stores is compared."""

    def predict_block(self, features_fyx):
        return RdNdvi.predict_block(self, features_fyx[:2])


def everything(**settings):
    card = rdndvi(**settings).card
    also = ("ndvi_mean_pre", "ndvi_mean_post", *(name for name in TERRAIN_VARIABLES if name != "slope_deg"))
    inputs = FeatureSpec(names=(*card.inputs.names, *also))
    return Everything(card=replace(card, name="everything", inputs=inputs))


@pytest.fixture(autouse=True)
def zoo(monkeypatch):
    monkeypatch.setattr("slidecube.models.zoo.ZOO", {**ZOO, "everything": everything})


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An area of 8 km: two tiles of 512 px and more each way, one or two of 2048."""
    return simulate_archive(tmp_path_factory.mktemp("archive"), seed=3, extent_km=8.0, overpasses=4)


@pytest.fixture(autouse=True)
def networks(tmp_path_factory, monkeypatch, save_untrained):
    """Networks with drawn weights where a user keeps them, made once."""
    root = tmp_path_factory.getbasetemp() / "networks"
    for name, settings in NETWORKS.items():
        if not (root / f"{name}@1").exists():
            save_untrained(root / f"{name}@1", **settings)
    monkeypatch.setenv("SLIDECUBE_MODELS", str(root))


def _run(
    archive, folder: Path, *, tile_px=512, profile="threads", workers=1, threads=1, composite="greenest",
    model="rdndvi", loader="odc-stac",
):  # fmt: skip
    folder.mkdir()
    toml = folder / "run.toml"
    toml.write_text(
        TOML.format(
            archive=os.path.relpath(archive.root, folder), pre=archive.pre, post=archive.post,
            tile_px=tile_px, profile=profile, workers=workers, threads=threads, composite=composite,
            model=MODELS[model], loader=loader,
        )
    )  # fmt: skip
    if "strata" in model:
        _write_zones(folder / "zones.geojson", archive)
    if (
        "kmeans" in model
    ):  # a person names a cluster: the rule may find none here, and nothing would be compared
        assert run(load_config(toml), stages=("cube", "fit"), progress=False).complete
        key = open_plan(folder).epochs[0].stat_key
        text = toml.read_text()
        toml.write_text(text.replace("[detect]", f'[detect]\nlandslide_clusters = {{ "{key}" = [0] }}'))
    report = run(load_config(toml), progress=False)
    assert report.complete, report.reasons
    return folder


def _write_zones(path: Path, archive) -> None:
    """Two zones that meet aslant across tiles and blocks, a small one in no block alone, and what lies in none."""
    area = gpd.read_file(archive.root / "truth" / "area.geojson").to_crs("EPSG:32632")
    left, bottom, right, top = area.total_bounds
    width, height = right - left, top - bottom
    first = shapely.Polygon(
        [(left, bottom), (left + 0.35 * width, bottom), (left + 0.75 * width, top), (left, top)]
    )
    small = shapely.Point(left + 0.8 * width, bottom + 0.5 * height).buffer(300)
    second = shapely.box(left, bottom, right, bottom + 0.8 * height).difference(first).difference(small)
    zones = gpd.GeoDataFrame({"zone": ["a", "b", "c"]}, geometry=[first, second, small], crs="EPSG:32632")
    zones.to_crs("EPSG:4326").to_file(path)


@pytest.fixture(scope="module")
def references(archive, tmp_path_factory):
    """512 px tiles on one thread, once for each composite and model."""
    made: dict[tuple[str, str], Path] = {}

    def of(composite: str, model: str) -> Path:
        if (composite, model) not in made:
            folder = tmp_path_factory.mktemp("w") / "a"
            made[composite, model] = _run(archive, folder, composite=composite, model=model)
        return made[composite, model]

    return of


@pytest.mark.parametrize(
    ("composite", "model", "other"),
    [
        pytest.param("greenest", "rdndvi", {"tile_px": 1024, "threads": 2}, id="1024px-2threads", marks=SLOW),
        pytest.param("greenest", "rdndvi", {"tile_px": 2048}, id="2048px", marks=SLOW),
        pytest.param("greenest", "rdndvi", DASK, id="512px-2processes"),
        pytest.param("greenest", "everything", {"tile_px": 1024, "threads": 2}, id="everything", marks=SLOW),
        pytest.param("greenest", "rdndvi", {"workers": 2}, id="512px-2tiles-at-once", marks=SLOW),
        pytest.param(
            "median", "rdndvi", {"tile_px": 2048, "threads": 2}, id="median-2048px-2threads", marks=SLOW
        ),
        pytest.param(
            "greenest",
            "rdndvi",
            {"tile_px": 1024, "threads": 2, "loader": "stackstac"},
            id="stackstac",
            marks=SLOW,
        ),
        pytest.param(
            "greenest", "cae-kmeans", {"tile_px": 1024, "threads": 2}, id="cae-1024px-2threads", marks=SLOW
        ),
        pytest.param("greenest", "cae-kmeans", DASK, id="cae-512px-2processes", marks=SLOW),
        pytest.param(
            "greenest", "kmeans-strata", {"tile_px": 1024, "threads": 2}, id="strata-1024px", marks=SLOW
        ),
        pytest.param("greenest", "kmeans-strata", DASK, id="strata-2processes", marks=SLOW),
        pytest.param(
            "greenest", "cae-kmeans-change", {"tile_px": 2048, "workers": 2}, id="cae-change", marks=SLOW
        ),
        pytest.param(
            "greenest", "network-resunet-small", {"tile_px": 1024, "threads": 2}, id="network-1024px-2threads"
        ),
        pytest.param("greenest", "network-ensemble", DASK, id="ensemble-512px-2processes", marks=SLOW),
        pytest.param(
            "greenest",
            "network-pspnet-small",
            {"tile_px": 1024, "threads": 2},
            id="network-pooling",
            marks=SLOW,
        ),
    ],
)
def test_stored_arrays_and_objects_are_equal(references, archive, tmp_path, composite, model, other):
    one = references(composite, model)
    two = _run(archive, tmp_path / "b", composite=composite, model=model, **other)
    _equal_layers(one, two)
    _equal_statistics(one, two)
    _equal_inventories(one, two)
    # the grid's key, and with it the detection's, names the tile size; nothing else may differ
    a, b = (read_objects(open_plan(w)).drop(columns="detect_key") for w in (one, two))
    assert len(a) > 20
    assert_geodataframe_equal(a, b)
    assert a.geometry.to_wkb().tolist() == b.geometry.to_wkb().tolist()


def _equal_layers(one: Path, two: Path) -> None:
    a, b = open_plan(one), open_plan(two)
    extent = a.tiles[0].geobox
    for tile in a.tiles:
        extent = extent | tile.geobox
    row, col = a.grid.offset_px(extent)
    window = {"y": slice(row, row + extent.shape[0]), "x": slice(col, col + extent.shape[1])}
    for la, lb in zip(a.layers, b.layers, strict=True):
        da = open_layer(a.workspace.layer(a.grid, la.name)).isel(window)
        db = open_layer(b.workspace.layer(b.grid, lb.name)).isel(window)
        assert set(da.data_vars) == set(db.data_vars)
        for name in da.data_vars:
            x, y = da[name].values, db[name].values
            empty = name in {"snow_pct", "hidden", "spread"} or (  # none falls, the sun is high, few dates
                (name == "date" and a.config.cube.composite in {"median", "geomedian"})
                or (name == "ndvi_std" and da["clear_count"].max() < 2)
            )
            assert np.unique(x[::7, ::7]).size > 1 or empty, (la.name, name)
            np.testing.assert_array_equal(x, y, err_msg=f"{la.name} {name}")


def _equal_statistics(one: Path, two: Path) -> None:
    """What was fitted is equal, byte for byte; only what names tiles and keys of the tile's size differs."""
    a, b = open_plan(one), open_plan(two)
    for ea, eb in zip(a.epochs, b.epochs, strict=True):
        if not ea.stat_key:
            continue
        fa, fb = (p.workspace.statistics(e.stat_key) for p, e in ((a, ea), (b, eb)))
        names = {*read_manifest(fa)["files"]}
        assert {"model/weights.safetensors", "mnf-post.json"} <= {n.replace("change", "post") for n in names}
        assert names == {*read_manifest(fb)["files"]}
        for name in sorted(names):
            if not name.startswith("sheet/"):
                assert (fa / name).read_bytes() == (fb / name).read_bytes(), name


def _equal_inventories(one: Path, two: Path) -> None:
    a, b = open_inventory(one), open_inventory(two)
    shared = np.intersect1d(a.x, b.x), np.intersect1d(a.y, b.y)
    for name in ("probability", "landslide", "observability", "reason", "spread"):
        x, y = (d[name].sel(x=shared[0], y=shared[1]).values for d in (a, b))
        inside = a["observability"].sel(x=shared[0], y=shared[1]).values >= 2
        assert inside.any()
        np.testing.assert_array_equal(x[inside], y[inside], err_msg=name)


@SLOW
def test_any_dask_chunk_gives_the_same_composite(archive, tmp_path):
    """The lazy functions on one big cube, whatever its chunks, equal what the batch run stored."""
    workspace = _run(archive, tmp_path / "a", tile_px=1024)
    plan = open_plan(workspace)
    tile = plan.tiles[0]
    epoch = plan.epochs[0]
    mask = MaskRule(
        scl_classes=plan.config.cube.mask.scl_classes, dilation_px=plan.config.cube.mask.dilation_px
    )
    layers = {}
    for side, name in (("pre", epoch.pre), ("post", epoch.post)):
        lazy = optical_layer(
            plan.scenes_of(name, tile.key),
            tile.geobox,
            plan.config.cube.bands,
            how=compositing(plan.config, event_at=None),
            mask=mask,
            block_px=512,
        )
        stored = open_layer(plan.workspace.layer(plan.grid, name), tiles=[tile])
        for variable in ("B04", "B08", "clear_count", "date"):
            np.testing.assert_array_equal(lazy[variable].values, stored[variable].values)
        layers[side] = stored
    terrain = open_layer(plan.workspace.layer(plan.grid, epoch.terrain), tiles=[tile])
    whole = [
        predict(
            plan.model,
            build_features(
                plan.model.card.inputs,
                Layers(pre=layers["pre"].chunk(n), post=layers["post"].chunk(n), terrain=terrain.chunk(n)),
            ),
        )["probability"].values
        for n in (100, 333, 1024)
    ]
    np.testing.assert_array_equal(whole[0], whole[2])
    np.testing.assert_array_equal(whole[1], whole[2])
