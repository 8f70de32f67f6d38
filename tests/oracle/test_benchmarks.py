"""The readers of benchmarks against their real files: too few to train on, enough to be read right."""

from __future__ import annotations

import geopandas as gpd
import h5py
import numpy as np
import pytest
from scipy.spatial import cKDTree

from slidecube.models.benchmarks.landslide4sense import DIVISORS, edges_of, open_landslide4sense, touching
from slidecube.models.card import FeatureSpec
from slidecube.pipeline.feature_sets import feature_set


@pytest.fixture(scope="module")
def samples(shared_data):
    return shared_data / "landslide4sense_samples"


@pytest.fixture(scope="module")
def images(samples):
    found = {}
    for path in (samples / "image_1.h5", *sorted((samples / "images").glob("*.h5"))):
        with h5py.File(path) as file:
            found[path.stem] = file["img"][()]
    assert len(found) == 12
    return found


def test_the_vector_brings_whole_numbers_back(images):
    """What the authors divided by: with any other number the products would not be whole."""
    for name, image in images.items():
        off = abs(image * np.array(DIVISORS) - (image * np.array(DIVISORS)).round())
        assert off.max() < 0.06, name
        assert (image[..., 12] * DIVISORS[12] <= 90).all()
    wrong = np.array(DIVISORS) * 1.01
    assert max(abs(i * wrong - (i * wrong).round()).max() for i in images.values()) > 0.4


def test_the_labelled_real_patch_reads_in_both_units(samples, tmp_path):
    for kind, key in (("image", "img"), ("mask", "mask")):
        (tmp_path / key).mkdir()
        (tmp_path / key / f"{kind}_1.h5").symlink_to(samples / f"{kind}_1.h5")
    own = FeatureSpec(names=("B04_post", "B08_post", "slope_deg", "elevation"))
    x_fyx, labels_yx = open_landslide4sense(tmp_path, own, use="train")["train"].read(0)
    published, _ = open_landslide4sense(tmp_path, feature_set("l4s"), use="train")["train"].read(0)
    assert published.shape == (14, 128, 128)
    np.testing.assert_allclose(x_fyx[0] * 10_000, published[3] * DIVISORS[3], rtol=1e-5)
    red, near, slope = x_fyx[:3]
    assert 0 < red.min() < red.max() < 1
    ndvi, slide = (near - red) / (near + red), labels_yx == 1
    assert 0 < slide.mean() < 0.5
    # scars are bare and steep: a flipped or transposed mask would lose this
    assert ndvi[slide].mean() < ndvi[~slide].mean()
    assert slope[slide].mean() > 10


def test_quarters_of_real_patches_touch_where_they_do_and_nowhere_else(images):
    quarters, true = [], set()
    for image in images.values():
        first = len(quarters)
        quarters += [edges_of(image[r : r + 64, c : c + 64]) for r in (0, 64) for c in (0, 64)]
        true |= {(first + a, first + b) for a, b in ((0, 1), (2, 3), (0, 2), (1, 3))}
    assert set(touching(quarters)) == true
    assert (
        touching([edges_of(image) for image in images.values()]) == []
    )  # no two of the twelve are neighbours


def test_the_published_split_of_sen12landslides_is_no_spatial_one(shared_data):
    """What the reader's page says: nearly all of its test patches touch one to learn from."""
    table = gpd.read_file(
        shared_data / "sen12landslides_footprints" / "LD_harmonized_s2_patch_locations.geojson"
    )
    touched = 0
    for crs, zone in table.groupby("crs_original"):
        places = zone.to_crs(crs).geometry
        xy, part = np.column_stack([places.x, places.y]), zone["split"].to_numpy()
        if {"train", "test"} <= set(part):
            near, _ = cKDTree(xy[part == "train"]).query(xy[part == "test"], p=np.inf)
            touched += int((near < 1285).sum())
    assert (touched, int((table["split"] == "test").sum())) == (922, 998)
