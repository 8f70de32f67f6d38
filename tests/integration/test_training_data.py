"""Patches of cubes: labels against rasterio, crops that hold what they should, parts that share no ground."""

from __future__ import annotations

import pickle
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pytest
import rasterio.features
import shapely

from slidecube.models.card import FeatureSpec
from slidecube.models.patches import IGNORE, LANDSLIDE, STABLE, UNLABELLED
from slidecube.pipeline import load_config, plan, run
from slidecube.pipeline.confusers import CONFUSERS, confuser
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.inventory import Observability
from slidecube.pipeline.open import open_detected
from slidecube.pipeline.pixels import PixelWindow, features_of, read_layers
from slidecube.pipeline.simulate import simulate_archive
from slidecube.pipeline.training_data import explain, explain_text, leave_one_out, open_all_data, open_data
from slidecube.pipeline.training_tables import DataTable, PatchTable

FEATURES = FeatureSpec(names=("rdndvi", "slope_deg", "B04_post"))
BLOCKS = PatchTable(px=32, count=90, block_px=64, gap_px=8, confusers=("flat-loss", "flat-bare"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(
        tmp_path_factory.mktemp("training"), seed=10, size="small", extent_km=1.8, overpasses=2
    )


def write_toml(archive, name="run.toml", epoch="event", workspace="ws", cube='bands = ["B02", "B04", "B08"]'):
    path = archive.root / name
    path.write_text(
        f'[area]\naoi = "truth/area.geojson"\n[[epoch]]\nname = "{epoch}"\n'
        f'pre = ["{archive.pre[0]}", "{archive.pre[1]}"]\npost = ["{archive.post[0]}", "{archive.post[1]}"]\n'
        f'[sources]\noptical = "{archive.optical}"\ndem = "{archive.dem}"\n[cube]\ntile_px = 512\n{cube}\n'
        f'[output]\nworkspace = "{workspace}"\n'
    )
    return path


@pytest.fixture(scope="module")
def made(archive):
    """A run whose layers are made, and its detection, which says what could be seen."""
    report = run(plan(load_config(write_toml(archive))), progress=False)
    assert report.complete, report.reasons
    return plan(load_config(archive.root / "run.toml"))


@pytest.fixture(scope="module")
def truth(archive):
    return gpd.read_parquet(archive.landslides)


def table(**changes):
    return DataTable(
        **{"kind": "cube", "run": "run.toml", "reference": "truth/landslides.parquet", **changes}
    )


def whole(patches):
    """Places, values and labels of all patches."""
    read = [(*patches.places.at(i, 0), *patches.read(i)) for i in range(len(patches))]
    return [np.array(column) for column in zip(*read, strict=True)]


def test_labels_are_the_polygons_where_the_ground_was_seen(made, archive, truth):
    data = open_data(table(use="test"), PatchTable(px=64), FEATURES, base=archive.root)
    assert (len(data.training), len(data.validation)) == (0, 0)
    rows, cols, x_nfyx, labels_nyx = whole(data.test.members[0])
    grid = made.grid
    shapes = truth.to_crs(grid.crs).geometry
    inventory = open_detected(made)
    corner = grid.offset_px(inventory.odc.geobox)
    seen = inventory["observability"].isel(epoch=0).to_numpy()
    counted, loose, compared = dict.fromkeys((STABLE, LANDSLIDE, IGNORE), 0), 0, 0
    for row, col, x_fyx, labels_yx in zip(rows, cols, x_nfyx, labels_nyx, strict=True):
        box = PixelWindow(row=row, col=col, height=64, width=64).geobox(grid)
        inside = (
            rasterio.features.rasterize(shapes, out_shape=(64, 64), transform=box.affine, dtype="uint8") == 1
        )
        known = np.isfinite(x_fyx).all(axis=0)
        assert ((labels_yx == IGNORE) == ~known).all()
        assert (labels_yx[inside & known] == LANDSLIDE).all()
        assert set(np.unique(labels_yx[~inside & known])) <= {STABLE, LANDSLIDE}  # a slide without a centre
        loose += int((labels_yx[~inside & known] == LANDSLIDE).sum())
        at = np.ix_(np.arange(row, row + 64) - corner[0], np.arange(col, col + 64) - corner[1])
        if min(ix.min() for ix in at) >= 0 and at[0].max() < seen.shape[0] and at[1].max() < seen.shape[1]:
            # what a rule on the same features could judge is what may be learnt
            np.testing.assert_array_equal(known, seen[at] == Observability.OBSERVED)
            compared += 1
        for value in counted:
            counted[value] += int((labels_yx == value).sum())
    assert all(counted.values()), counted
    assert compared
    assert loose <= (shapes.area < 200).sum()
    assert explain(data)[0]["landslide pixels"] == counted[LANDSLIDE]


def test_values_are_those_that_a_detector_reads(made, archive):
    data = open_data(table(use="test"), PatchTable(px=64), FEATURES, base=archive.root)
    rows, cols, x_nfyx, _ = whole(data.test.members[0])
    middle = len(rows) // 2
    window = PixelWindow(row=int(rows[middle]), col=int(cols[middle]), height=64, width=64)
    built = features_of(
        FEATURES,
        read_layers(made, "event", window, inputs=FEATURES),
        window,
        block_px=made.grid.block_px,
        threads=1,
    )
    wanted = np.stack([built[name].values for name in FEATURES.names])
    got = x_nfyx[middle]
    inside = np.isfinite(got)
    assert inside.any()
    np.testing.assert_array_equal(got[inside], wanted[inside])


def test_an_incomplete_reference_leaves_the_rest_unlabelled(made, archive):
    sure, unsure = (
        open_data(table(use="train", complete=c), PatchTable(px=64, count=20), FEATURES, base=archive.root)
        for c in (True, False)
    )
    for i in range(20):
        whole_yx, part_yx = sure.training.read(i)[1], unsure.training.read(i)[1]
        np.testing.assert_array_equal(part_yx, np.where(whole_yx == STABLE, UNLABELLED, whole_yx))
    assert sure.training.digest != unsure.training.digest


def test_crops_hold_what_they_were_taken_for_whatever_the_seed(made, archive):
    data = open_data(table(use="train"), PatchTable(**{**BLOCKS.model_dump(), "px": 64, "block_px": None}), FEATURES,
                     base=archive.root)  # fmt: skip
    facts = explain(data)[0]
    assert [facts[f"on {what}"] for what in ("landslides", "confusers")] == [45, 22]
    rules = [confuser(name) for name in BLOCKS.confusers]
    spec = FeatureSpec(names=tuple(dict.fromkeys(name for rule in rules for name in rule.reads)))
    patches = data.training.members[0]
    for seed in (0, 1, 2):
        for i in range(45):
            assert (patches.read(i, seed=seed)[1] == LANDSLIDE).any()
        for i in range(45, 67, 4):
            row, col = patches.places.at(i, seed)
            window = PixelWindow(row=row, col=col, height=64, width=64)
            values = features_of(spec, read_layers(made, "event", window, inputs=spec), window,
                                 block_px=made.grid.block_px, threads=1)  # fmt: skip
            held = [rule.holds({name: values[name].values for name in spec.names}) for rule in rules]
            stable = patches.read(i, seed=seed)[1] == STABLE
            assert (np.any(held, axis=0) & stable).any()


def test_polygons_of_confusers_count_as_one_each_where_they_were_seen(made, archive, truth, tmp_path):
    """A field of many pixels and a track of few are taken equally often, and neither where a landslide lies."""
    west, south, east, north = shapely.bounds(made.aoi_shape)
    slide = truth.to_crs(made.grid.crs).geometry.buffer(0).loc[lambda shapes: shapes.area.idxmax()]
    x, y = (west + east) / 2, (south + north) / 2
    far = shapely.box(6, 50, 7, 51)

    def opened(shapes, crs, *, count=200):
        gpd.GeoDataFrame(geometry=shapes, crs=crs).to_file(tmp_path / "confusers.gpkg")
        settings = PatchTable(
            px=64, count=count, positive=0.0, hard=1.0, confusers=(str(tmp_path / "confusers.gpkg"),)
        )
        return open_data(table(use="train"), settings, FEATURES, base=archive.root).training.members[0]

    large = shapely.box(x - 600, y - 600, x + 600, y + 600)
    seen = opened([large], made.grid.crs, count=1).places
    at = made.grid.frame.affine @ (seen.cols_k[seen.starts_n[0]] + 0.5, seen.rows_k[seen.starts_n[0]] + 0.5)
    small = shapely.Point(at).buffer(8)
    patches = opened([large, small], made.grid.crs)
    assert patches.facts["on confusers"] == 200
    sizes = patches.places.ends_n - patches.places.starts_n
    assert sorted(np.unique(sizes, return_counts=True)[1]) == [100, 100]
    rows, cols = patches.places.rows_k, patches.places.cols_k
    held = patches.cube.labels_at(replace(patches.cube.landslides, rows=rows, cols=cols))
    assert set(held[patches.places.starts_n.min() : patches.places.ends_n.max()]) == {STABLE}
    whole_px = round(1200**2 / made.grid.resolution_m**2)
    assert 0 < sizes.max() < whole_px, "the landslides in it are left out"

    with pytest.raises(PipelineError, match=r"\[patches\] confusers: .* in the area of any cube"):
        opened([far], 4326)
    assert opened([slide], made.grid.crs, count=4).facts["on confusers"] == 0


def test_equal_seeds_give_equal_bits_also_elsewhere(made, archive, tmp_path):
    one = open_data(table(), BLOCKS, FEATURES, base=archive.root)
    other = pickle.loads(pickle.dumps(open_data(table(), BLOCKS, FEATURES, base=archive.root)))
    small = open_data(table(), BLOCKS.model_copy(update={"cache_mb": 1}), FEATURES, base=archive.root)
    moved = False
    for i in range(0, len(one.training), 7):
        for seed in (0, 5):
            x, labels = one.training.read(i, seed=seed)
            for again in (other, small):
                np.testing.assert_array_equal(x, again.training.read(i, seed=seed)[0])
                np.testing.assert_array_equal(labels, again.training.read(i, seed=seed)[1])
            moved |= not np.array_equal(labels, one.training.read(i, seed=seed + 1)[1])
    assert moved
    assert one.training.digest == other.training.digest == small.training.digest
    assert small.training.members[0].cube.cache.held_bytes < 7_000_000  # one block, whatever it takes
    path = tmp_path / "known.gpkg"
    gpd.read_parquet(archive.landslides).to_file(path)
    copy = open_data(table(reference=str(path)), BLOCKS, FEATURES, base=archive.root)
    assert copy.training.digest == one.training.digest  # content decides, and not where it lies
    fewer = gpd.read_file(path).iloc[1:]
    fewer.to_file(path)
    assert (
        open_data(table(reference=str(path)), BLOCKS, FEATURES, base=archive.root).training.digest
        != one.training.digest
    )
    changed = open_data(table(), BLOCKS.model_copy(update={"seed": 1}), FEATURES, base=archive.root)
    assert changed.training.digest != one.training.digest


def test_parts_of_blocks_share_no_pixel_nor_a_neighbour(made, archive):
    data = open_data(table(), BLOCKS, FEATURES, base=archive.root)
    assert all(len(part) for part in (data.training, data.validation, data.test))
    owner = {}
    for name, part in (("train", data.training), ("validation", data.validation), ("test", data.test)):
        patches = part.members[0]
        for i in range(len(patches)):
            for seed in range(3):
                row, col = patches.places.at(i, seed)
                at = {(r, c) for r in range(row - 2, row + 34) for c in range(col - 2, col + 34)}
                assert all(owner.setdefault(pixel, name) == name for pixel in at)
    blocks = [set(part.blocks) for part in (data.training, data.validation, data.test)]
    assert sum(map(len, blocks)) == len(set.union(*blocks))  # each is in one part alone
    text = explain_text(data)
    assert text.count("\n") == 2
    assert "landslides" in text


def test_the_choice_of_what_is_judged_keeps_landslides(made, archive):
    settings = PatchTable(px=32, judged=12, positive=0.2)
    data = open_data(table(use="validation"), settings, FEATURES, base=archive.root)
    row = explain(data)[0]
    holds = [(data.validation.read(i)[1] == LANDSLIDE).any() for i in range(len(data.validation))]
    assert len(holds) == 12 < row["of"]
    assert sum(holds) == row["with landslides"] == 2


def test_one_ground_in_two_parts_is_refused(made, archive):
    def refused(*uses, **changes):
        tables = [table(use=use, region=f"r{i}", **changes) for i, use in enumerate(uses)]
        with pytest.raises(PipelineError) as error:
            open_all_data(tables, BLOCKS, FEATURES, base=archive.root)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "'r0' (train) and 'r1' (test) share ground" in refused("train", "test")
    assert "share ground" in refused("blocks", "validation")
    both = open_all_data(
        [table(use="blocks"), table(use="blocks", region="again")], BLOCKS, FEATURES, base=archive.root
    )
    assert set(both.training.regions) == {"run", "again"}
    places = [{m.places.at(i, 0) for i in range(len(m))} for m in both.test.members]
    assert places[0] == places[1]  # the blocks are shared out once
    worlds = [table(use="train", world="one"), table(use="test", world="two")]
    apart = open_all_data(worlds, BLOCKS, FEATURES, base=archive.root)
    assert len(apart.training) == 90
    assert len(apart.test)


def test_what_cannot_be_opened_is_one_line(made, archive, tmp_path):
    def refused(expected, *, features=FEATURES, settings=BLOCKS, **changes):
        with pytest.raises(PipelineError, match=expected) as error:
            open_data(table(**changes), settings, features, base=archive.root)
        assert "\n" not in str(error.value)

    refused("has no plan as it stands", run=str(write_toml(archive, "new.toml", workspace="other")))
    plan(load_config(archive.root / "new.toml"))
    refused(r"is made on 0 of \d+ tiles; run `slidecube cube new.toml` first", run="new.toml")
    refused("no such file", run="none.toml")
    refused("epoch: got 'other'; allowed: one of event", epoch="other")
    refused("do not hold B11", features=FeatureSpec(names=("B11_post",)))
    refused("do not hold ndvi_mean", features=FeatureSpec(names=("aldi",)))
    refused("need Sentinel-1", features=FeatureSpec(names=("dvv",)))
    refused("fitted to one run", features=FeatureSpec(names=("mnf1_change",)))
    refused("No feature 'nvdi_post'", features=FeatureSpec(names=("nvdi_post",)))
    refused("No confuser 'flat-los' .did you mean 'flat-loss'", settings=PatchTable(confusers=("flat-los",)))
    refused("no such file", settings=PatchTable(confusers=("nothing.gpkg",)))
    far = tmp_path / "far.gpkg"
    gpd.GeoDataFrame(geometry=[shapely.box(6, 50, 7, 51)], crs=4326).to_file(far)
    refused("no polygon in the area of the run", reference=str(far))


def test_regions_are_left_out_whole():
    def named(region, use):
        return DataTable(kind="cube", run="a.toml", reference="b.gpkg", region=region, use=use)

    tables = [named("a", "train"), named("b", "blocks"), named("c", "test"), named("a", "train")]
    folds = {held: [t.used for t in turned] for held, turned in leave_one_out(tables)}
    assert folds == {
        "a": ["test", "validation", "train", "test"],
        "b": ["train", "test", "validation", "train"],
        "c": ["validation", "train", "test", "validation"],
    }
    tables[1] = named("b", "validation")
    folds = {held: [t.used for t in turned] for held, turned in leave_one_out(tables)}
    assert folds["a"] == ["test", "validation", "train", "test"]
    assert folds["b"] == ["train", "test", "validation", "train"]
    with pytest.raises(PipelineError, match="names 2: a, b"):
        list(leave_one_out(tables[:2]))


@pytest.mark.parametrize("name", CONFUSERS)
def test_rules_hold_nowhere_without_knowledge(name):
    rule = CONFUSERS[name]
    unknown = {feature: np.full((3, 3), np.nan, np.float32) for feature in rule.reads}
    assert not rule.holds(unknown).any()
