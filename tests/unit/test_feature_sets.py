"""Feature sets of the papers: their order, their scaling on real patches, and what is said where one cannot be had."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

from slidecube.catalog.sources import SOURCES, find_source
from slidecube.models.card import FeatureSpec
from slidecube.models.rules import rdndvi
from slidecube.models.unsupervised import POST_INPUTS
from slidecube.models.zoo import ZOO
from slidecube.pipeline.cli import cli
from slidecube.pipeline.config import load_config
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.feature_sets import (
    FEATURE_SETS,
    feature_set,
    layers_of,
    listing,
    listing_text,
    require_known,
    require_source,
)
from slidecube.pipeline.features import FEATURES, Layers, build_features, feature, is_built_in
from slidecube.pipeline.run_plan import model_of

L1C, L2A = "earth-search/sentinel-2-l1c", "earth-search/sentinel-2-l2a"
# as the authors published it (Landslide4Sense-2022, issue 4), channel by channel of their patches
PUBLISHED = [
    1111.81, 824.63, 663.42, 445.17, 645.86, 1547.74, 1960.44, 1941.32, 674.08, 9.048, 1113.98, 519.90, 20.292, 772.83
]  # fmt: skip
CHANNELS = [
    "B01",
    "B02",
    "B03",
    "B04",
    "B05",
    "B06",
    "B07",
    "B08",
    "B09",
    "B10",
    "B11",
    "B12",
    "slope",
    "elevation",
]


def test_the_sets_of_the_issue_are_there_and_no_others():
    assert list(FEATURE_SETS) == ["cae", "l4s", "l4s-l2a", "ens-s1", "ens-s2", "ens-s1s2", "ens-all", "fstf"]


def test_cae_is_what_the_models_of_that_paper_read():
    assert feature_set("cae").names == POST_INPUTS


def test_l4s_is_the_published_order_without_b8a_and_l2a_the_same_without_b10():
    assert [name.removeprefix("l4s_") for name in feature_set("l4s").names] == CHANNELS
    assert [name.removeprefix("l4s_") for name in feature_set("l4s-l2a").names] == [
        c for c in CHANNELS if c != "B10"
    ]


def test_l4s_is_the_digital_number_without_offset_by_the_published_vector():
    """Stored is the number + 1000: what an item of baseline 04.00 holds, and of an older one after harmonising."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(1, 9000, (12, 5, 6))
    slope, height = rng.uniform(0, 60, (5, 6)), rng.uniform(0, 4000, (5, 6))
    layers = Layers(
        pre=xr.Dataset(),
        post=xr.Dataset(
            {b: (("y", "x"), (n + 1000).astype(np.uint16)) for b, n in zip(CHANNELS, numbers, strict=False)}
        ),
        terrain=xr.Dataset(
            {
                "slope_deg": (("y", "x"), np.rint(slope * 100).astype(np.uint16)),
                "elevation": (("y", "x"), height.astype(np.float32)),
            }
        ),
    )

    made = build_features(feature_set("l4s"), layers)

    want = np.stack([*numbers, np.rint(slope * 100) / 100, height]) / np.array(PUBLISHED)[:, None, None]
    np.testing.assert_allclose(made.to_dataarray().values, want, rtol=2e-5)


def test_the_scale_is_that_of_the_real_patches(shared_data):
    """Real channels lie about one: a channel in reflectance, or scaled by another's divisor, would not."""
    h5py = pytest.importorskip("h5py")
    files = sorted((shared_data / "landslide4sense_samples/images").glob("*.h5"))
    patches = np.concatenate([h5py.File(file)["img"][:].reshape(-1, 14) for file in files])
    middle = np.median(patches, axis=0)

    # what our features make of a usual pixel: reflectance of 9 % in B04 .. and of a slope of 20 degrees
    assert ((middle > 0.05) & (middle < 3)).all()
    real_reflectance = middle[:12] * np.array(PUBLISHED[:12]) / 10_000
    assert 0.02 < real_reflectance[3] < 0.15
    assert 0.1 < real_reflectance[7] < 0.4
    assert real_reflectance[9] < 0.005, "B10 sees cirrus only"
    assert 5 < middle[12] * PUBLISHED[12] < 40
    order = [np.corrcoef(patches[:, i], patches[:, 7])[0, 1] for i in (5, 6, 8)]
    assert order[2] < min(order[:2]), "the ninth is B09 and not B8A"


@pytest.mark.parametrize("name", FEATURE_SETS)
def test_what_a_set_wants_beside_this_build_s_features_are_layers_of_the_toml(name):
    found, spec = FEATURE_SETS[name], feature_set(name)

    assert spec == FeatureSpec(names=found.names)
    assert all(is_built_in(one) for one in found.names if one not in layers_of(found))
    require_known(spec, layers_of(found))
    for lacking in layers_of(found):
        rest = [one for one in layers_of(found) if one != lacking]
        with pytest.raises(PipelineError, match=f"^No feature '{lacking}'.*add a .*layer") as caught:
            require_known(spec, rest)
        assert "\n" not in str(caught.value)


def test_the_layers_of_ens_are_those_of_the_paper():
    assert layers_of(FEATURE_SETS["ens-s2"]) == layers_of(FEATURE_SETS["ens-s1s2"]) == ("land_cover",)
    assert layers_of(FEATURE_SETS["ens-all"]) == ("land_cover", "climate", "canopy_height")
    assert not any(layers_of(FEATURE_SETS[name]) for name in ("cae", "l4s", "l4s-l2a", "ens-s1", "fstf"))


def test_a_layer_may_not_have_the_name_of_a_feature():
    for name in ("ndvi_post", "elevation", "mnf3_change", "vv_pre"):
        with pytest.raises(PipelineError, match=f"Layer '{name}' has the name of a feature"):
            require_known(FeatureSpec(names=()), [name])


def test_an_unknown_set_is_refused_with_the_known_ones():
    with pytest.raises(PipelineError, match="No feature set 'l5s'; sets: cae, l4s, l4s-l2a, ens-s1, "):
        feature_set("l5s")


MADE = (
    '[area]\nbbox = [6, 0, 7, 1]\n[[epoch]]\nname = "a"\npre = ["2019-01-01", "2019-02-01"]\n'
    'post = ["2020-01-01", "2020-02-01"]\n'
)
CLASSES = '[[layer]]\nname = "land_cover"\nhref = "c.tif"\nkind = "categorical"\n'


def detecting(folder, features, more=""):
    (folder / "c.tif").write_bytes(b"classes")
    toml = folder / "run.toml"
    toml.write_text(f'{MADE}{more}[detect]\nmodel = "kmeans-change"\nfeatures = {json.dumps(features)}\n')
    return load_config(toml)


def test_a_set_among_the_features_is_its_features_in_the_model_and_in_the_keys(tmp_path):
    mixed = detecting(tmp_path, ["slope_deg", "ens-s2"], CLASSES)
    written = detecting(tmp_path, ["slope_deg", "land_cover", "dndvi"], CLASSES)

    assert model_of(mixed).card.inputs.names == ("slope_deg", "land_cover", "dndvi")
    assert mixed.science() == written.science()
    assert mixed.science() != detecting(tmp_path, ["ens-s2"], CLASSES).science()


def test_a_feature_is_not_named_twice_by_a_set(tmp_path):
    with pytest.raises(PipelineError, match=r"features: dndvi is named twice \(it is in the set 'ens-s2'\)$"):
        detecting(tmp_path, ["dndvi", "ens-s2"])
    with pytest.raises(PipelineError, match="in the sets 'ens-s1' and 'ens-all'"):
        detecting(tmp_path, ["ens-s1", "ens-all"])
    with pytest.raises(
        PipelineError, match=r"detect.features: got \['dndvi', 3\]; allowed: a list of features"
    ):
        detecting(tmp_path, ["dndvi", 3])


def test_a_misspelt_set_is_told_from_a_layer_that_is_lacking(tmp_path):
    with pytest.raises(PipelineError, match=r"No feature 'ens-s3' \(did you mean 'ens-s"):
        model_of(detecting(tmp_path, ["dndvi", "ens-s3"]))
    with pytest.raises(PipelineError, match=r"add a \[\[layer\]\] of this name, or \[land_cover\]$"):
        model_of(detecting(tmp_path, ["ens-s2"]))
    with pytest.raises(PipelineError, match=r"^Layer 'cae' has the name of a feature set"):
        require_known(FeatureSpec(names=()), ["cae"])


def test_the_list_says_that_land_cover_may_be_classified():
    text = listing_text()
    assert "wants [land_cover] or [[layer]] land_cover\n" in text
    assert "wants [land_cover] or [[layer]] land_cover, and [[layer]] climate, canopy_height\n" in text


def test_level_1c_is_asked_for_by_the_name_of_the_set_to_take_instead():
    with pytest.raises(
        PipelineError, match=f"'l4s' needs B10 of Level 1C, and source '{L2A}'.*take the set 'l4s-l2a'"
    ):
        require_source(feature_set("l4s"), L2A, SOURCES[L2A].bands)
    require_source(feature_set("l4s"), L1C, SOURCES[L1C].bands)
    require_source(feature_set("l4s-l2a"), L2A, SOURCES[L2A].bands)
    require_source(feature_set("cae"), L2A, SOURCES[L2A].bands)
    with pytest.raises(
        PipelineError, match=f"Features need B10, and source '{L2A}' has no such band; it has"
    ):
        require_source(FeatureSpec(names=("B10_pre", "slope_deg")), L2A, find_source(L2A).bands)


def test_a_plan_of_a_model_that_needs_level_1c_is_refused_before_it_searches(tmp_path, monkeypatch):
    def of_l1c(**settings):
        made = rdndvi(**settings)
        return replace(made, card=replace(made.card, inputs=feature_set("l4s")))

    monkeypatch.setattr("slidecube.models.zoo.ZOO", {**ZOO, "rdndvi": of_l1c})
    toml = tmp_path / "run.toml"
    toml.write_text(
        '[area]\nbbox = [6, 0, 7, 1]\n[[epoch]]\nname = "a"\npost = ["2020-01-01", "2020-02-01"]\n'
    )

    with pytest.raises(PipelineError, match="take the set 'l4s-l2a'"):
        model_of(load_config(toml))


def test_the_list_says_formula_unit_and_source_of_everything():
    said = listing()

    assert {one["name"] for one in said["features"]} == set(FEATURES)
    for one in (*said["features"], *said["families"]):
        made = feature(one["name"])
        assert (one["formula"], one["unit"], one["source"]) == (made.formula, made.unit, made.source)
        assert all((one["formula"], one["unit"], one["source"], one["reads"])), one["name"]
    assert {one["name"]: one["layers"] for one in said["sets"]} == {
        n: list(layers_of(s)) for n, s in FEATURE_SETS.items()
    }
    text = listing_text()
    for name, made in FEATURES.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
        assert all(part in line for part in (made.formula, made.unit, made.source))


def test_the_command_lists_checks_and_refuses():
    run = CliRunner().invoke

    assert run(cli, ["features", "--list"]).output == run(cli, ["features"]).output == listing_text() + "\n"
    assert json.loads(run(cli, ["features", "--json"]).output) == listing()
    assert run(cli, ["features", "--set", "cae", "--source", L2A]).output.split() == list(POST_INPUTS)
    assert "take the set 'l4s-l2a'" in str(run(cli, ["features", "--set", "l4s", "--source", L2A]).exception)
    assert run(cli, ["features", "--source", L2A]).exit_code == 2
    assert run(cli, ["features", "--list", "--json"]).exit_code == 2
