"""Readers of Landslide4Sense and Sen12Landslides, on small archives in their published layouts."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import xarray as xr

from slidecube.models.benchmarks.landslide4sense import DIVISORS, edges_of, open_landslide4sense, touching
from slidecube.models.benchmarks.sen12landslides import CHANNELS, open_sen12landslides
from slidecube.models.benchmarks.sen12landslides import touching as touching_places
from slidecube.models.card import FeatureSpec
from slidecube.models.errors import ModelError
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.feature_sets import feature_set
from slidecube.pipeline.features import feature
from slidecube.pipeline.training_data import explain, explain_text, open_all_data, open_data
from slidecube.pipeline.training_tables import DataTable, PatchTable

ALL = feature_set("l4s")


def write_h5(path, key, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[key] = values


def ground(seed, height=128, width=128):
    """A smooth surface in the benchmark's 14 channels, in its own numbers."""
    drawn = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 128
    phase = drawn.uniform(0, 6, (14, 3))
    waves = [np.sin(5 * y + a) + np.cos(7 * x + b) + np.sin(3 * (x + y) + c) for a, b, c in phase]
    dn = 400 + 80 * np.stack(waves, axis=-1) + drawn.uniform(0, 3, (height, width, 14))
    dn[..., 13] = 200 * seed + 50 * waves[13] + 300
    return dn.round() / np.array(DIVISORS)


def write_l4s(folder, numbers, images=None):
    for number in numbers:
        labels = np.zeros((128, 128), np.uint8)
        labels[10 : 10 + number, 20:30] = 1
        image = ground(number) if images is None else images[number]
        write_h5(folder / "img" / f"image_{number}.h5", "img", image)
        write_h5(folder / "mask" / f"mask_{number}.h5", "mask", labels)


@pytest.fixture
def l4s(tmp_path):
    for name, numbers in (("TrainData", (1, 2, 10)), ("ValidData", (1,)), ("TestData", (1, 2))):
        write_l4s(tmp_path / name, numbers)
    return tmp_path


def test_l4s_channels_are_those_of_the_feature_set_and_units_are_the_pipelines(l4s):
    raw = ground(2)
    published = open_landslide4sense(l4s, ALL)["train"]
    x_fyx, labels_yx = published.read(1)
    np.testing.assert_array_equal(x_fyx, raw.transpose(2, 0, 1).astype(np.float32))
    assert labels_yx.sum() == 20
    assert published.units == tuple(feature(name).unit for name in ALL.names)

    names = ("B04_post", "B8A_post")
    with pytest.raises(ModelError, match="no feature B8A_post"):
        open_landslide4sense(l4s, FeatureSpec(names=names))
    own = FeatureSpec(names=("B04_post", "slope_deg", "elevation", "B10_post"))
    physical = open_landslide4sense(l4s, own)["train"]
    dn = raw * np.array(DIVISORS)
    x_fyx, _ = physical.read(1)
    np.testing.assert_allclose(x_fyx[0], dn[..., 3] / 10_000, rtol=1e-6)
    np.testing.assert_allclose(x_fyx[1:3], dn[..., 12:].transpose(2, 0, 1), rtol=1e-6)
    np.testing.assert_allclose(x_fyx[3], dn[..., 9] / 10_000, rtol=1e-6)
    assert physical.units == tuple(feature(name).unit for name in own.names)


def test_l4s_splits_are_the_folders_or_blocks_or_a_list(l4s):
    parts = open_landslide4sense(l4s, ALL)
    assert {part: len(found) for part, found in parts.items()} == {"train": 3, "validation": 1, "test": 2}
    train = l4s / "TrainData"
    alone = open_landslide4sense(train, ALL, use="validation")
    assert {part: len(found) for part, found in alone.items()} == {"validation": 3}

    with pytest.raises(ModelError, match=r"paper_train\.txt: no such file"):
        open_landslide4sense(train, ALL, split="paper")
    (train / "paper_train.txt").write_text("1\n10\n")
    paper = open_landslide4sense(train, ALL, split="paper")
    assert paper["test"].indices == (1,)
    assert len(paper["train"]) + len(paper["validation"]) == 2
    (train / "paper_train.txt").write_text("1\n11\n")
    with pytest.raises(ModelError, match="'11' is no number"):
        open_landslide4sense(train, ALL, split="paper")


def test_l4s_patches_that_share_an_edge_stay_together(tmp_path):
    wide = ground(3, 128, 5 * 128)
    images = {1 + i: wide[:, 128 * i : 128 * (i + 1)] for i in range(5)}
    images |= {6 + i: ground(20 + i) for i in range(5)}
    write_l4s(tmp_path, images, images)
    edges = [edges_of(images[number]) for number in sorted(images)]
    assert touching(edges) == [(0, 1), (1, 2), (2, 3), (3, 4)]

    parts = open_landslide4sense(tmp_path, ALL, use="blocks", shares=(0.5, 0.3, 0.2))
    owner = {i: part for part, found in parts.items() for i in found.indices}
    assert all(owner.get(i, 0) == owner.get(i + 1, 0) or {i, i + 1} - set(owner) for i in range(4))
    assert all(len(found) for found in parts.values())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "mask/mask_2.h5").unlink(), r"mask_2\.h5: no such file, and image_2\.h5 is there"),
        (lambda d: (d / "img/image_2.h5").write_bytes(b"\x89HDF\r\n"), r"image_2\.h5: damaged, or no HDF5"),
        (lambda d: write_h5(d / "img/image_2.h5", "image", ground(1)), r"image_2\.h5: has no array 'img'"),
        (lambda d: write_h5(d / "img/image_2.h5", "img", ground(1)[:64]), r"image_2\.h5: img has the shape \(64"),
        (lambda d: write_h5(d / "mask/mask_2.h5", "mask", np.zeros((64, 64))), r"mask_2\.h5: mask has the shape"),
        (lambda d: write_h5(d / "mask/mask_2.h5", "mask", np.full((128, 128), 255)), r"mask_2\.h5: holds class 255;"),
        (lambda d: write_h5(d / "mask/mask_2.h5", "mask", np.full((128, 128), 2)), r"mask_2\.h5: holds class 2;"),
    ],
)  # fmt: skip
def test_l4s_bad_files_are_one_line_that_names_them(tmp_path, spoil, message):
    write_l4s(tmp_path, (1, 2))
    for old in (tmp_path / "img/image_2.h5", tmp_path / "mask/mask_2.h5"):
        assert old.exists()
    spoil(tmp_path)
    with pytest.raises(ModelError, match=message) as refused:
        open_landslide4sense(tmp_path, ALL, use="train")["train"].read(1)
    assert "\n" not in str(refused.value)


def test_l4s_folders_that_are_none_say_what_to_do(l4s, tmp_path):
    with pytest.raises(ModelError, match=r"has no folder img.*it holds TrainData"):
        open_landslide4sense(l4s, ALL, use="train")
    with pytest.raises(ModelError, match="folders of the competition"):
        open_landslide4sense(l4s / "TrainData", ALL)
    (l4s / "ValidData/mask/mask_1.h5").unlink()
    (l4s / "ValidData/mask").rmdir()
    with pytest.raises(ModelError, match="published later"):
        open_landslide4sense(l4s, ALL)


def test_l4s_nan_is_unknown_and_the_digest_is_of_the_content(l4s, tmp_path):
    image = ground(2)
    image[5, 6, 7] = np.inf
    before = open_landslide4sense(l4s, ALL)["train"].digest
    (l4s / "TrainData").rename(tmp_path / "TrainDataMoved")
    assert open_landslide4sense(tmp_path / "TrainDataMoved", ALL, use="train")["train"].digest == before
    write_h5(tmp_path / "TrainDataMoved/img/image_2.h5", "img", image)
    changed = open_landslide4sense(tmp_path / "TrainDataMoved", ALL, use="train")["train"]
    assert changed.digest != before
    assert np.isnan(changed.read(1)[0][7, 5, 6])


def test_features_of_cubes_are_made_of_benchmarks(l4s):
    table = DataTable(kind="landslide4sense", folder=".")
    wanted = FeatureSpec(names=("ndvi_post", "l4s_B04", "slope_deg"))
    data = open_data(table, PatchTable(), wanted, base=l4s)
    x_fyx, labels_yx = data.training.read(1)
    dn = (ground(2) * np.array(DIVISORS)).round()
    red, near = dn[..., 3], dn[..., 7]
    np.testing.assert_allclose(x_fyx[0], (near - red) / (near + red), atol=1e-6)
    np.testing.assert_allclose(x_fyx[1], red / DIVISORS[3], rtol=1e-5)
    assert labels_yx.sum() == 20
    assert data.training.features == wanted
    rows = explain(data)
    assert [(row["part"], row["patches"], row["landslide pixels"]) for row in rows] == [
        ("train", 3, 130), ("validation", 1, 10), ("test", 2, 30),
    ]  # fmt: skip
    assert "landslide pixels 130" in explain_text(data)

    with pytest.raises(PipelineError, match=r"'dndvi' needs B04_pre, B08_pre, and landslide4sense has only"):
        open_data(table, PatchTable(), FeatureSpec(names=("dndvi",)), base=l4s)
    with pytest.raises(PipelineError, match="fitted to one run"):
        open_data(table, PatchTable(), FeatureSpec(names=("mnf1_post",)), base=l4s)
    with pytest.raises(PipelineError, match="is no folder"):
        open_data(DataTable(kind="landslide4sense", folder="nowhere"), PatchTable(), ALL, base=l4s)
    with pytest.raises(PipelineError, match="none is given"):
        open_all_data([], PatchTable(), ALL, base=l4s)


# --- Sen12Landslides


def series(seed, x0=500_000.0, y0=4_000_000.0, dates=5):
    drawn = np.random.default_rng(seed)
    shape = (dates, 128, 128)
    bands = {name: (("time", "y", "x"), drawn.integers(1, 9000, shape, dtype=np.int16)) for name in
             ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")}  # fmt: skip
    mask = np.zeros(shape, np.uint8)
    mask[:, 3:9, 4:8] = 1
    return xr.Dataset(
        {
            **bands,
            "SCL": (("time", "y", "x"), np.full(shape, 4, np.int16)),
            "DEM": (("time", "y", "x"), np.full(shape, 321, np.int16)),
            "MASK": (("time", "y", "x"), mask),
            "spatial_ref": ((), 0),
        },
        coords={
            "x": x0 + 10 * np.arange(128),
            "y": y0 - 10 * np.arange(128),
            "time": np.arange(dates).astype("datetime64[D]").astype("datetime64[ns]"),
        },
        attrs={"pre_post_dates": "{'pre': 1, 'post': 3}", "event_date": "1970-01-03", "crs": "EPSG:32632"},
    )


def write_s12(folder, patches, modality="s2", parts=("train", "val", "test")):
    data = folder / "data/data_harmonized" / modality
    data.mkdir(parents=True, exist_ok=True)
    split = {part: [] for part in ("train", "val", "test")}
    for i, (name, patch) in enumerate(patches.items()):
        region, number = name.rsplit("_", 1)
        file = f"{region}_{modality}_{number}.nc"
        patch.to_netcdf(data / file, engine="h5netcdf")
        split[parts[i % len(parts)]].append(
            {"id": name, modality: f"{modality}/{file}", "pixel_annotated": 24, "inventory": region}
        )
    where = folder / "tasks/S12LS-LD/harmonized" / modality / "splits.json"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(split))
    return folder


PAIR = FeatureSpec(names=("B04_pre", "B04_post", "elevation"))


def test_s12_is_a_pair_around_the_event_in_the_pipelines_units(tmp_path):
    patch = series(1)
    patch["SCL"].values[1, :64] = 9  # the last date before the event is half under clouds
    patch["B04"].values[3, 0, 0] = 0
    write_s12(tmp_path, {"italy_1": patch, "japan_2": patch[["MASK"]], "italy_3": patch[["MASK"]]})
    red = patch["B04"].values / 10_000

    near = open_sen12landslides(tmp_path, PAIR, pairing="nearest")
    x_fyx, labels_yx = near["train"].read(0)
    np.testing.assert_allclose(x_fyx[0, 64:], red[1, 64:], rtol=1e-6)
    assert np.isnan(x_fyx[0, :64]).all()
    assert np.isnan(x_fyx[1, 0, 0])
    assert (x_fyx[2] == 321).all()
    assert (labels_yx[:64] == 255).all()
    assert set(np.unique(labels_yx[64:])) == {0}
    clear, _ = open_sen12landslides(tmp_path, PAIR, pairing="clearest")["train"].read(0)
    np.testing.assert_allclose(clear[0], red[0], rtol=1e-6)
    assert {part: found.regions for part, found in near.items()} == {
        "train": ("italy",), "validation": ("japan",), "test": ("italy",),
    }  # fmt: skip
    assert near["train"].units == tuple(feature(name).unit for name in PAIR.names)


def test_s12_greenest_is_the_clear_date_of_the_highest_ndvi(tmp_path):
    patch = series(4)
    patch["SCL"].values[3, 5, 5] = 9
    write_s12(tmp_path, {"italy_1": patch})
    spec = FeatureSpec(names=("B04_post", "B08_post", "B04_pre"))
    x_fyx, labels_yx = open_sen12landslides(tmp_path, spec)["train"].read(0)
    red, near = (patch[band].values.astype(float) for band in ("B04", "B08"))
    ndvi = (near - red) / (near + red)
    best = 3 + ndvi[3:].argmax(axis=0)
    best[5, 5] = 4
    wanted = np.take_along_axis(red, best[None], axis=0)[0] / 10_000
    np.testing.assert_allclose(x_fyx[0], wanted, rtol=1e-6)
    first = np.take_along_axis(red, ndvi[:2].argmax(axis=0)[None], axis=0)[0] / 10_000
    np.testing.assert_allclose(x_fyx[2], first, rtol=1e-6)
    assert set(np.unique(labels_yx)) == {0, 1}


def test_s12_dates_are_put_in_order_first(tmp_path):
    patch = series(5)
    write_s12(tmp_path / "a", {"italy_1": patch})
    write_s12(tmp_path / "b", {"italy_1": patch.isel(time=[4, 0, 3, 1, 2])})
    one, other = (open_sen12landslides(tmp_path / f, PAIR, pairing="nearest")["train"].read(0) for f in "ab")
    np.testing.assert_array_equal(one[0], other[0])


def radar(seed):
    drawn = np.random.default_rng(seed)
    whole = series(seed)
    shape = whole["B04"].shape
    kept = whole[["DEM", "MASK"]]
    return kept.assign(
        {n: (("time", "y", "x"), drawn.uniform(-25, -5, shape).astype(np.float32)) for n in ("VV", "VH")}
    )


def test_s12_radar_is_the_median_in_decibels(tmp_path):
    patch = radar(6)
    write_s12(tmp_path, {"italy_1": patch}, "s1dsc")
    spec = FeatureSpec(names=("vv_pre", "vh_post"))
    x_fyx, _ = open_sen12landslides(tmp_path, spec, modality="s1dsc")["train"].read(0)
    np.testing.assert_allclose(x_fyx[0], np.median(patch["VV"].values[:2], axis=0), rtol=1e-6)
    np.testing.assert_allclose(x_fyx[1], np.median(patch["VH"].values[3:], axis=0), rtol=1e-6)

    table = DataTable(kind="sen12landslides", folder=".", modality="s1dsc", use="train")
    data = open_data(table, PatchTable(), FeatureSpec(names=("dvv", "vhvv_post")), base=tmp_path)
    change = np.median(patch["VV"].values[3:], axis=0) - np.median(patch["VV"].values[:2], axis=0)
    np.testing.assert_allclose(data.training.read(0)[0][0], change, atol=0.011)  # layers hold steps of .01 dB

    linear = patch.assign(VV=10 ** (patch["VV"] / 10), VH=10 ** (patch["VH"] / 10))
    write_s12(tmp_path / "raw", {"italy_1": linear}, "s1dsc")
    with pytest.raises(ModelError, match="linear power"):
        open_sen12landslides(tmp_path / "raw", spec, modality="s1dsc")["train"].read(0)


def test_s12_change_of_ndvi_is_made_of_its_bands(tmp_path):
    patch = series(7)
    write_s12(tmp_path, {"italy_1": patch})
    table = DataTable(kind="sen12landslides", folder=".", use="test", pairing="nearest")
    data = open_data(table, PatchTable(), FeatureSpec(names=("dndvi",)), base=tmp_path)
    red, near = (patch[band].values.astype(float) for band in ("B04", "B08"))
    ndvi = (near - red) / (near + red)
    np.testing.assert_allclose(data.test.read(0)[0][0], ndvi[3] - ndvi[1], atol=1e-5)
    assert explain(data)[0]["landslide pixels"] == 24


def test_s12_blocks_keep_neighbours_together(tmp_path):
    at = {f"italy_{i}": series(i, x0=500_000 + 1280 * i)[["MASK"]] for i in range(4)}
    at |= {f"japan_{i}": series(i, y0=3_000_000 - 50_000 * i)[["MASK"]] for i in range(4, 8)}
    write_s12(tmp_path, at)
    parts = open_sen12landslides(tmp_path, PAIR, use="blocks", shares=(0.5, 0.25, 0.25))
    whole = parts["train"].of
    pairs = touching_places(whole.files)
    numbers = [int(path.stem.rsplit("_", 1)[1]) for path in whole.files]
    assert {tuple(sorted((numbers[a], numbers[b]))) for a, b in pairs} == {(0, 1), (1, 2), (2, 3)}
    owner = {i: part for part, found in parts.items() for i in found.indices}
    assert all(owner[a] == owner[b] for a, b in pairs if a in owner and b in owner)
    assert all(len(found) for found in parts.values())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.drop_vars("MASK"), "has no MASK"),
        (lambda p: p.drop_vars("B04"), "has no variable B04"),
        (lambda p: p.isel(x=slice(64)), "of 128 x 128"),
        (lambda p: p.assign(MASK=p["MASK"] * 255), "MASK holds class 255; allowed"),
        (lambda p: p.assign_attrs(pre_post_dates="soon"), "says no pre_post_dates"),
        (lambda p: p.assign_attrs(pre_post_dates="{'pre': 3, 'post': 1}"), "names dates 3 and 1 of 5"),
    ],
)
def test_s12_bad_files_are_one_line_that_names_them(tmp_path, spoil, message):
    write_s12(tmp_path, {"italy_1": spoil(series(8))})
    with pytest.raises(ModelError, match=message) as refused:
        open_sen12landslides(tmp_path, PAIR)["train"].read(0)
    assert "italy_s2_1.nc" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_s12_archives_that_are_not_whole_say_so(tmp_path):
    write_s12(tmp_path, {"italy_1": series(9)})
    file = tmp_path / "data/data_harmonized/s2/italy_s2_1.nc"
    file.write_bytes(b"no netcdf")
    with pytest.raises(ModelError, match=r"italy_s2_1\.nc: damaged, or no NetCDF"):
        open_sen12landslides(tmp_path, PAIR)["train"].read(0)
    file.unlink()
    with pytest.raises(ModelError, match=r"italy_s2_1\.nc: no such file.*1 are missing"):
        open_sen12landslides(tmp_path, PAIR)
    (tmp_path / "tasks/S12LS-LD/harmonized/s2/splits.json").write_text("[]")
    with pytest.raises(ModelError, match="no split as published"):
        open_sen12landslides(tmp_path, PAIR)
    with pytest.raises(ModelError, match="no feature slope_deg"):
        open_sen12landslides(tmp_path, FeatureSpec(names=("slope_deg",)))
    with pytest.raises(ModelError, match=r"splits\.json: no such file"):
        open_sen12landslides(tmp_path / "data", PAIR)


@pytest.mark.parametrize("modality", CHANNELS)
def test_s12_features_are_known_to_the_pipeline(modality):
    for name, (_, _, unit) in CHANNELS[modality].items():
        assert feature(name).unit == unit
