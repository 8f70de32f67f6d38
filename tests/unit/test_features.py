"""Features by name: from stored integers to what a model reads, by hand."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from slidecube.models.card import FeatureSpec
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.features import (
    FEATURES,
    SIDES,
    Layers,
    build_features,
    feature,
    required_variables,
)
from slidecube.pipeline.indices import INDICES


def plane(*values, dtype=np.uint16):
    return (("y", "x"), np.array([values], dtype))


def masks(*values):
    """A radar layer's masks, shadow where layover is not, and its angle, unknown where nothing looked."""
    shadow = [v if v == 255 else 1 - v for v in values]
    return {
        "layover": plane(*values, dtype=np.uint8),
        "shadow": plane(*shadow, dtype=np.uint8),
        "lia_deg": plane(*[4123 if v != 255 else 65535 for v in values]),
    }


@pytest.fixture
def layers():
    """Three pixels: a loss on a slope; the same without a clear look afterwards; and one without terrain."""
    pre = {band: plane(value, value, value) for band, value in PRE.items()}
    pre["B01"] = plane(2000, 1, 0)
    pre |= {
        "ndvi_mean": plane(18_001, 18_001, 0),
        "ndvi_std": plane(501, 501, 0),
        "clear_count": plane(5, 5, 0),
    }
    post = {band: plane(value, 0, value) for band, value in POST.items()}
    post |= {
        "ndvi_mean": plane(14_001, 14_001, 9001),
        "ndvi_std": plane(1001, 0, 1),
        "clear_count": plane(4, 1, 2),
    }
    terrain = {
        "elevation": plane(812.5, 3.0, np.nan, dtype=np.float32),
        "slope_deg": plane(3021, 0, 65535),
        "aspect_deg": plane(35_999, 65535, 65535),
        "profile_curvature": plane(-120, 32_767, -32_768, dtype=np.int16),
        "plan_curvature": plane(3000, 0, -32_768, dtype=np.int16),
        "relief_m": plane(1234, 0, 65535),
        "tpi_m": plane(-56, 0, -32_768, dtype=np.int16),
        "hand_m": plane(7, 0, 65535),
    }
    radar_pre = {"VV": plane(9000, 9000, 0), "VH": plane(8400, 8400, 0), **masks(0, 1, 255)}
    radar_post = {"VV": plane(9150, 0, 9150), "VH": plane(8100, 0, 8100), **masks(0, 1, 0)}
    return Layers(
        pre=xr.Dataset(pre),
        post=xr.Dataset(post),
        terrain=xr.Dataset(terrain),
        radar_pre=xr.Dataset(radar_pre),
        radar_post=xr.Dataset(radar_post),
    )


PRE = {"B02": 1300, "B03": 1600, "B04": 1500, "B08": 5500, "B11": 3000, "B12": 1900}
POST = {"B02": 1700, "B03": 1900, "B04": 2000, "B08": 4000, "B11": 3600, "B12": 2900}
NDVI_PRE, NDVI_POST = 0.4 / 0.5, 0.2 / 0.4
WANT = {
    "B04_pre": [0.05, 0.05, 0.05],
    "B01_pre": [0.1, -0.0999, np.nan],
    "B08_post": [0.3, np.nan, 0.3],
    "ndvi_pre": [NDVI_PRE] * 3,
    "ndvi_post": [NDVI_POST, np.nan, NDVI_POST],
    "dndvi": [-0.3, np.nan, -0.3],
    "rdndvi": [-30 / np.sqrt(1.3), np.nan, -30 / np.sqrt(1.3)],
    "ndvi_mean_pre": [0.8, 0.8, np.nan],
    "ndvi_mean_post": [0.4, 0.4, -0.1],
    "ndvi_std_pre": [0.05, 0.05, np.nan],
    "ndvi_std_post": [0.1, np.nan, 0.0],
    # t = .4 / sqrt(.05^2 / 5 + .1^2 / 4) = 7.30 at 4.20 degrees of freedom
    "ndvi_loss_p": [0.99922356, np.nan, np.nan],
    "aldi": [0.4 * 0.6 * 0.99922356, np.nan, np.nan],
    "vv_pre": [-10, -10, np.nan],
    "vv_post": [-8.5, np.nan, -8.5],
    "dvv": [1.5, np.nan, np.nan],
    "vh_pre": [-16, -16, np.nan],
    "vh_post": [-19, np.nan, -19],
    "dvh": [-3, np.nan, np.nan],
    "vhvv_pre": [-6, -6, np.nan],
    "vhvv_post": [-10.5, np.nan, -10.5],
    "layover": [0, 1, np.nan],
    "shadow": [1, 0, np.nan],
    "lia_deg": [41.23, 41.23, 41.23],
    "elevation": [812.5, 3, np.nan],
    "slope_deg": [30.21, 0, np.nan],
    "aspect_deg": [359.99, np.nan, np.nan],
    "profile_curvature": [-0.0012, 0.32767, np.nan],
    "plan_curvature": [0.03, 0, np.nan],
    "relief_m": [123.4, 0, np.nan],
    "tpi_m": [-5.6, 0, np.nan],
    "hand_m": [0.7, 0, np.nan],
}
for _name, _index in INDICES.items():
    _pre, _post = (
        eval(_index.formula, {}, {band: (v - 1000) / 1e4 for band, v in side.items()}) for side in (PRE, POST)
    )
    _relative = 100 * (_post - _pre) / np.sqrt(_pre + _post) if _pre + _post > 0 else np.nan
    WANT.setdefault(f"{_name}_pre", [_pre] * 3)
    WANT.setdefault(f"{_name}_post", [_post, np.nan, _post])
    WANT.setdefault(f"d{_name}", [_post - _pre, np.nan, _post - _pre])
    WANT.setdefault(f"rd{_name}", [_relative, np.nan, _relative])


def test_every_feature_by_hand(layers):
    # those of Landslide4Sense have a test of their own
    assert {name for name in FEATURES if not name.startswith("l4s_")} <= set(WANT)

    made = build_features(FeatureSpec(names=tuple(WANT)), layers)

    assert list(made.data_vars) == list(WANT), "in the order of the spec"
    for name, want in WANT.items():
        assert made[name].dtype == np.float32
        np.testing.assert_allclose(
            made[name].values[0], np.array(want, np.float32), rtol=2e-6, atol=1e-7, err_msg=name
        )


def test_lazy_layers_stay_lazy_and_give_the_same(layers):
    names = FeatureSpec(names=tuple(WANT))
    lazy = Layers(**{side: d.chunk(x=2) if (d := getattr(layers, side)) else d for side in SIDES})

    made = build_features(names, lazy)

    assert all(isinstance(array.data, da.Array) for array in made.data_vars.values())
    xr.testing.assert_identical(made.compute(), build_features(names, layers))


def test_what_a_spec_reads_is_what_it_needs(layers):
    """The layers cut down to `required_variables` are enough, and without any one of them it is refused by name."""
    for name in WANT:
        spec = FeatureSpec(names=(name,))
        needed = required_variables(spec)
        cut = {side: getattr(layers, side)[variables] for side, variables in needed.items()}
        build_features(spec, Layers(**cut))
        for side, variables in needed.items():
            for variable in variables:
                less = {**cut, side: cut[side].drop_vars(variable)}
                with pytest.raises(
                    PipelineError, match=rf"{name}.*needs.*{side}\.{variable}.*\[cube\] bands"
                ):
                    build_features(spec, Layers(**less))


def test_rdndvi_reads_two_bands_a_side_and_the_slope():
    assert required_variables(FeatureSpec(names=("rdndvi", "slope_deg"))) == {
        "pre": ["B04", "B08"],
        "post": ["B04", "B08"],
        "terrain": ["slope_deg"],
        "radar_pre": [],
        "radar_post": [],
        "auxiliary": [],
    }


@pytest.mark.parametrize("name", ["B04", "B4_pre", "B04_during", "_pre", "", "Slope", "slope-deg"])
def test_an_unknown_feature_is_refused_with_the_known_ones(name):
    with pytest.raises(PipelineError, match=f"No feature '{name}'; features: ndvi_pre, .*B04_pre"):
        feature(name)


def test_any_other_name_is_a_layer_of_the_toml_and_its_nodata_is_unknown():
    stored = xr.Dataset(
        {
            "lithology": (("y", "x"), np.array([[3, 65535]], np.uint16)),
            "canopy_height": (("y", "x"), np.array([[2.5, np.nan]], np.float32)),
        }
    )
    layers = Layers(pre=xr.Dataset(), post=xr.Dataset(), terrain=xr.Dataset(), auxiliary=stored)

    made = build_features(FeatureSpec(names=("canopy_height", "lithology")), layers)

    np.testing.assert_array_equal(made["lithology"], np.array([[3, np.nan]], np.float32))
    np.testing.assert_array_equal(made["canopy_height"], np.array([[2.5, np.nan]], np.float32))
    with pytest.raises(PipelineError, match=r"'roads' needs auxiliary\.roads, .*add a \[\[layer\]\]"):
        build_features(FeatureSpec(names=("roads",)), layers)


def test_each_feature_says_its_unit_and_source():
    for name, made in FEATURES.items():
        assert made.formula, name
        assert made.unit, name
        assert made.source, name
        assert all(read.split(".")[0] in SIDES for read in made.reads), name
