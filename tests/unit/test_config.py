"""The one TOML: what it accepts, the one line it gives for anything else, and what enters keys."""

from __future__ import annotations

import dataclasses
import datetime as dt
import inspect
import json
import re
from pathlib import Path
from typing import get_args

import pydantic
import pytest

from slidecube.catalog.scenes import Window
from slidecube.pipeline import train_config
from slidecube.pipeline.config import (
    BANDS,
    DEFAULT_BANDS,
    Area,
    Cluster,
    Coregistration,
    Cube,
    Detect,
    Epoch,
    Fit,
    Ground,
    LandCover,
    Layer,
    Mask,
    Output,
    Radar,
    Sections,
    Sources,
    SunSettings,
    load_config,
)
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.keys import content_key
from slidecube.pipeline.training_tables import DataTable, PatchTable

AREA = "[area]\nbbox = [6.4, 0.0, 6.8, 0.4]\n"
EPOCH = '[[epoch]]\nname = "iburi-2018"\npre = ["2018-05-01", "2018-09-05"]\npost = ["2018-09-07", "2018-11-15"]\n'
MINIMAL = AREA + EPOCH


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "run.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def refusal(path: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        load_config(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


def test_minimal_fills_in_the_defaults(write):
    config = load_config(write(MINIMAL))

    assert config.epochs[0].pre == Window(start=dt.date(2018, 5, 1), end=dt.date(2018, 9, 5))
    assert config.cube.bands == DEFAULT_BANDS
    assert config.cube.mask.scl_classes == (0, 1, 3, 8, 9, 10, 11)
    assert (config.cube.composite, config.cube.tile_px, config.area.resolution_m) == ("greenest", 2048, 10.0)
    assert config.detect.threshold is None
    assert config.cluster.failure_budget == 0


def test_paths_start_from_the_folder_of_the_toml(write, tmp_path):
    path = write('[area]\naoi = "shapes/area.gpkg"\n' + EPOCH + '[output]\nworkspace = "../ws"\n')

    config = load_config(path)

    assert config.aoi == tmp_path / "shapes" / "area.gpkg"
    assert config.workspace == tmp_path.parent / "ws"


def test_a_copy_keeps_the_paths_of_the_original(write, tmp_path):
    original = write('[area]\naoi = "area.gpkg"\n' + EPOCH)
    copy = tmp_path / "plans" / "run.toml"
    copy.parent.mkdir()
    copy.write_text(load_config(original).text, encoding="utf-8")

    assert load_config(copy, base=tmp_path).aoi == load_config(original).aoi
    assert copy.read_bytes() == original.read_bytes()


@pytest.mark.parametrize("wkt", ["POLYGON ((0 0, 1 0, 1 1, 0 0))", "multipolygon(((0 0, 1 0, 1 1, 0 0)))"])
def test_wkt_is_kept_as_text(write, wkt):
    assert load_config(write(f'[area]\naoi = "{wkt}"\n' + EPOCH)).aoi == wkt


def test_toml_dates_equal_quoted_dates(write):
    quoted = load_config(write(MINIMAL))
    dates = load_config(write(re.sub(r'"(\d{4}-\d\d-\d\d)"', r"\1", MINIMAL), "dates.toml"))

    assert dates.epochs == quoted.epochs
    assert dates.science() == quoted.science()


def test_is_frozen(write):
    config = load_config(write(MINIMAL))

    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.cube.tile_px = 512


REFUSED = {
    # what is written -> what the one line must say, in order
    "bboxx": (
        MINIMAL.replace("bbox", "bboxx"),
        ["area.bboxx: unknown key", "did you mean 'bbox'", "aoi, bbox, crs"],
    ),
    "section": (
        MINIMAL + "[cubes]\n",
        ["cubes: unknown section", "did you mean 'cube'", "area, epoch, sources"],
    ),
    "nested": (
        MINIMAL + "[cube]\nmask = {dilate = 3}\n",
        ["cube.mask.dilate: unknown key", "scl_classes, dilation_px"],
    ),
    "fallback on itself": (
        MINIMAL + '[sources]\noptical = "a"\nfallback = ["b", "a"]\n',
        ["sources", "fallback names 'a', which is asked first already"],
    ),
    "fallback twice": (
        MINIMAL + '[sources]\nfallback = ["b", "b"]\n',
        ["sources.fallback", "b is named twice"],
    ),
    "fallback of one": (
        MINIMAL + '[sources]\nfallback = "b"\n',
        ["sources.fallback: got 'b'", "a list of sources"],
    ),
    "dem's fallback": (
        MINIMAL + '[sources]\nfallback_dem = ["earth-search/cop-dem-glo-30"]\n',
        ["fallback_dem names 'earth-search/cop-dem-glo-30'"],
    ),
    "loader": (
        MINIMAL + '[cluster]\nloader = "gdal"\n',
        ["cluster.loader: got 'gdal'", '"odc-stac" or "stackstac"'],
    ),
    "reserved": ('path = "x"\n' + MINIMAL, ["path: unknown section"]),
    "python name": (
        MINIMAL.replace("[[epoch]]", "[[epochs]]"),
        ["epochs: unknown section", "did you mean 'epoch'"],
    ),
    "no area": (EPOCH, ["area: missing", "aoi or bbox"]),
    "no epoch": (AREA, ["epoch: missing", "[[epoch]]"]),
    "empty epochs": ("epoch = []\n" + AREA, ["epoch: got []"]),
    "neither": ("[area]\n" + EPOCH, ["area: got neither of aoi and bbox", "exactly one"]),
    "both": ('[area]\naoi = "a.gpkg"\nbbox = [1, 2, 3, 4]\n' + EPOCH, ["area: got both of aoi and bbox"]),
    "bbox order": (
        MINIMAL.replace("0.0, 6.8, 0.4", "0.4, 6.8, 0.0"),
        ["area.bbox: got [6.4, 0.4, 6.8, 0.0]", "south below"],
    ),
    "bbox metres": (MINIMAL.replace("6.4", "512300"), ["area.bbox: got [512300", "degrees of WGS84"]),
    "bbox of three": (MINIMAL.replace(", 0.4]", "]"), ["area.bbox: got [6.4, 0.0, 6.8]"]),
    "geographic crs": (
        MINIMAL.replace("[area]", '[area]\ncrs = "EPSG:4326"'),
        ["area.crs:", "degree", "metres"],
    ),
    "unknown crs": (MINIMAL.replace("[area]", '[area]\ncrs = "EPSG:1"'), ["area.crs:", "'EPSG:1'"]),
    "no resolution": (
        MINIMAL.replace("[area]", "[area]\nresolution_m = 0"),
        ["area.resolution_m: got 0", "0.1 to 1000"],
    ),
    "nan": (MINIMAL.replace("[area]", "[area]\nresolution_m = nan"), ["area.resolution_m: got nan"]),
    "slug": (
        MINIMAL.replace("iburi-2018", "Iburi 2018"),
        ["epoch.name (epoch 1, 'Iburi 2018')", "lower-case"],
    ),
    "no such day": (
        MINIMAL.replace("2018-11-15", "2018-11-31"),
        ["epoch.post (epoch 1, 'iburi-2018')", "no day '2018-11-31'"],
    ),
    "one date": (
        MINIMAL.replace('["2018-05-01", "2018-09-05"]', '"2018-05-01"'),
        ["epoch.pre", "got '2018-05-01'", "two days"],
    ),
    "date and time": (MINIMAL.replace('"2018-05-01"', "2018-05-01T00:00:00"), ["epoch.pre", "two days"]),
    "backward": (MINIMAL.replace("2018-09-05", "2018-04-05"), ["epoch.pre", "swap"]),
    "shared day": (
        MINIMAL.replace("2018-09-05", "2018-09-07"),
        ["pre ends 2018-09-07", "not before post starts"],
    ),
    "event outside": (MINIMAL + 'event = "2018-12-01"\n', ["event 2018-12-01 does not lie between"]),
    "name twice": (MINIMAL + EPOCH, ["epoch.name: got 'iburi-2018' 2 times", "each name once"]),
    "composite": (
        MINIMAL + '[cube]\ncomposite = "mean"\n',
        ["cube.composite: got 'mean'", "greenest, median, medoid, geomedian, nearest-clear"],
    ),
    "quoted number": (
        MINIMAL + '[cube]\nmax_cloud_pct = "80"\n',
        ["cube.max_cloud_pct: got '80'", "per cent"],
    ),
    "band": (
        MINIMAL + '[cube]\nbands = ["B04", "B13"]\n',
        ["cube.bands: got ['B04', 'B13']", ", ".join(BANDS)],
    ),
    "band twice": (MINIMAL + '[cube]\nbands = ["B04", "B04"]\n', ["cube.bands: B04 is named twice"]),
    "no bands": (MINIMAL + "[cube]\nbands = []\n", ["cube.bands: got []"]),
    "tile": (MINIMAL + "[cube]\ntile_px = 1000\n", ["cube.tile_px: got 1000", "512, 1024, 2048, 4096"]),
    "true is no number": (MINIMAL + "[cube]\nmax_lost_scenes = true\n", ["cube.max_lost_scenes: got True"]),
    "scene class": (
        MINIMAL + "[cube.mask]\nscl_classes = [3, 12]\n",
        ["cube.mask.scl_classes: got [3, 12]", "0 to 11"],
    ),
    "a threshold between no two kept probabilities": (
        MINIMAL + "[detect]\nthreshold = 0.99995\n",
        ["detect.threshold: got 0.99995", "0.0001 to 0.9999"],
    ),
    "per cent": (MINIMAL + "[detect]\nthreshold = 50\n", ["detect.threshold: got 50", "0.0001 to 0.9999"]),
    "text parameter": (
        MINIMAL + '[detect]\nparameters = {loss_pct = "25"}\n',
        ["detect.parameters", "numbers"],
    ),
    "bucket": (
        MINIMAL + '[output]\nworkspace = "gs://b/w"\n',
        ["output.workspace", "neither a folder nor an s3://bucket/prefix"],
    ),
    "moved without a look": (
        MINIMAL + "[cube.coregistration]\ncheck = false\ncorrect = true\n",
        ["cube.coregistration: correct = true moves nothing with check = false"],
    ),
    "settings of no radar": (
        MINIMAL + '[cube.radar]\norbit = "ascending"\n',
        ["cube.radar: sets how Sentinel-1 is read, and none is; name a source of it as radar in [sources]"],
    ),
    "a table of cube at the top": (
        MINIMAL + "[mask]\ndilation_px = 3\n",
        ["mask: unknown section (did you mean [cube.mask]?); allowed: area, epoch"],
    ),
    "the sun at the top": (MINIMAL + "[sun]\n", ["sun: unknown section (did you mean [cube.sun]?)"]),
    "reversed heights": (
        MINIMAL + "[cube.mask]\ncloud_heights_m = [3000, 200]\n",
        [
            "cube.mask.cloud_heights_m: got [3000.0, 200.0]; allowed: two heights in metres, ascending, or [] for"
        ],
    ),
    "format": (MINIMAL + '[output]\nformats = ["pdf"]\n', ["output.formats: got ['pdf']", "gpkg"]),
    "profile": (
        MINIMAL + '[cluster]\nprofile = "moon"\n',
        ["cluster.profile:", "'moon'", "dask-local", "threads"],
    ),
    "no workers": (MINIMAL + "[cluster]\nworkers = 0\n", ["cluster.workers: got 0", "1 or more"]),
    "section is a number": ("cube = 3\n" + MINIMAL, ["cube: got 3", "a table"]),
    "two problems": (
        MINIMAL + "[cube]\ntile_px = 1\n[cluster]\nworkers = 0\n",
        ["cube.tile_px", "(and 1 more problem)"],
    ),
    "syntax": (MINIMAL + "[cube\n", ["not valid TOML", "at line 7"]),
    "syntax at the end": (MINIMAL + "x =", ["not valid TOML", "at line 7"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(write, case):
    text, expected = REFUSED[case]

    line = refusal(write(text))

    position = 0
    for part in expected:
        assert part in line[position:], f"{part!r} is not in {line!r}"
        position = line.index(part, position) + len(part)


def test_refuses_a_missing_file_and_names_its_neighbour(write, tmp_path):
    write(MINIMAL, "hokkaido.toml")

    assert "did you mean 'hokkaido.toml'?" in refusal(tmp_path / "hokaido.toml")


def test_refuses_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes('[area]\naoi = "größe.gpkg"\n'.encode("latin-1"))

    assert "not UTF-8" in refusal(path)


def test_refuses_a_folder(tmp_path):
    assert "cannot be read" in refusal(tmp_path)


def test_a_byte_order_mark_is_no_syntax_error(tmp_path):
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())

    assert load_config(path).epochs[0].name == "iburi-2018"


def test_machine_and_product_settings_enter_no_key(write):
    plain = load_config(write(MINIMAL)).science()
    elsewhere = (
        MINIMAL
        + '[output]\nworkspace = "w"\nformats = ["cog"]\n[cluster]\nloader = "stackstac"\nworkers = 7\nmem_gb = 3\n'
    )

    assert load_config(write(elsewhere, "other-name.toml")).science() == plain


def test_a_default_written_out_changes_no_key(write):
    written = MINIMAL + '[cube]\ncomposite = "greenest"\nmax_cloud_pct = 80\n[detect]\nmodel = "rdndvi"\n'

    first, second = (load_config(write(t, n)) for t, n in ((MINIMAL, "a.toml"), (written, "b.toml")))

    assert content_key(first.science()) == content_key(second.science())


@pytest.mark.parametrize(
    ("addition", "searches_again"),
    [
        ("[cube]\nmax_cloud_pct = 50\n", True),
        ('[sources]\ndem = "dem"\n', True),
        ('[sources]\nfallback = ["other"]\n', True),
        ('[sources]\nfallback_dem = ["other"]\n', True),
        ('[cube]\ncomposite = "median"\n', False),
        ("[detect]\nthreshold = 0.4\n", False),
        ('event = "2018-09-06"\n', False),
    ],
)
def test_what_decides_the_search_and_what_decides_the_result(write, addition, searches_again):
    before, after = load_config(write(MINIMAL)), load_config(write(MINIMAL + addition, "after.toml"))

    assert before.science() != after.science()
    assert (before.search_terms() != after.search_terms()) is searches_again


def test_no_fallback_is_what_it_was_before_there_were_any(write):
    """Plans that were made before keep their names."""
    config = load_config(write(MINIMAL + "[sources]\nfallback = []\n"))

    assert config.science()["sources"] == {
        "optical": "earth-search/sentinel-2-l2a",
        "dem": "earth-search/cop-dem-glo-30",
    }


def test_a_moved_aoi_is_the_same_area_and_an_edited_one_is_not(write, tmp_path):
    for name, content in (("a.geojson", "one"), ("b.geojson", "one"), ("c.geojson", "two")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    a, b, c = (
        load_config(write(f'[area]\naoi = "{n}.geojson"\n{EPOCH}', f"{n}.toml")).science() for n in "abc"
    )

    assert a == b
    assert a != c


def test_an_aoi_that_is_not_there_is_one_line(write):
    config = load_config(write('[area]\naoi = "hokaido.geojson"\n' + EPOCH))

    with pytest.raises(PipelineError, match=r"area\.aoi: got 'hokaido\.geojson', which cannot be read"):
        config.science()


def test_every_key_says_what_it_allows():
    """The description is the error's sentence: a field without one would refuse without a reason."""
    for section in (
        Sections,
        Area,
        Epoch,
        Sources,
        Cube,
        Mask,
        Layer,
        LandCover,
        Ground,
        Detect,
        Output,
        Cluster,
    ):
        assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_the_template_loads_and_its_comments_are_the_defaults(write, repo_root):
    text = (repo_root / "pipeline" / "init_template.toml").read_text(encoding="utf-8")
    keys = (
        "resolution_m optical dem fallback fallback_dem composite max_cloud_pct bands mask tile_px max_lost_scenes "
        "model formats profile loader failure_budget"
    )
    shown = re.sub(rf"^# (?=({'|'.join(keys.split())}) =)", "", text, flags=re.MULTILINE)
    assert text.count("\n#") - shown.count("\n#") == len(keys.split())

    template, uncommented = load_config(write(text)), load_config(write(shown, "shown.toml"))

    assert dataclasses.replace(uncommented, path=template.path, text=template.text) == template


def fields_of(section: type[pydantic.BaseModel]) -> set[str]:
    """Names of the keys of a section and of the tables within it, as a TOML writes them."""
    names = set()
    for name, field in section.model_fields.items():
        names.add(str(field.validation_alias or name))
        for kind in (field.annotation, *get_args(field.annotation)):
            for inner in (kind, *get_args(kind)):
                if isinstance(inner, type) and issubclass(inner, pydantic.BaseModel):
                    names |= {f"{field.validation_alias or name}.{key}" for key in fields_of(inner)}
    return names


def test_every_key_occurs_in_the_template(repo_root):
    text = (repo_root / "pipeline" / "init_template.toml").read_text(encoding="utf-8")
    parts = re.split(r"^(?:# )?\[+(\w+)\]+.*$", text, flags=re.MULTILINE)
    written = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(written) == {key for key in fields_of(Sections) if "." not in key}
    lacking = []
    for key in sorted(key for key in fields_of(Sections) if "." in key):
        section, _, inner = key.partition(".")
        table, _, name = inner.rpartition(".")
        lines = (
            re.findall(rf"^# {table} = .*(?:\n#  .*)*", written[section], re.MULTILINE)
            if table
            else [written[section]]
        )
        if not any(re.search(rf"\b{name} = |\b{name}: |; {name} |or {name} = ", line) for line in lines):
            lacking.append(key)
    assert lacking == []


def documented(title: str, section: type[pydantic.BaseModel]) -> str:
    """A section of docs/configuration.md, as the code has it."""
    rows = []
    for name, field in section.model_fields.items():
        if not isinstance(default := field.get_default(call_default_factory=True), pydantic.BaseModel):
            shown = "required" if field.is_required() else "left out"
            if not field.is_required() and default is not None:
                shown = f"`{json.dumps(default)}`"
            rows.append(f"| `{name}` | {shown} | {field.description} |")
    return (
        f"## {title}\n\n{inspect.cleandoc(section.__doc__ or '')}\n\n| key | default | allowed |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def test_the_documented_keys_are_those_of_the_code(repo_root):
    text = (repo_root / "docs" / "configuration.md").read_text(encoding="utf-8")
    sections = {
        "[area]": Area,
        "[[epoch]]": Epoch,
        "[sources]": Sources,
        "[cube]": Cube,
        "[cube.mask]": Mask,
        "[cube.radar]": Radar,
        "[cube.sun]": SunSettings,
        "[cube.coregistration]": Coregistration,
        "[[layer]]": Layer,
        "[land_cover]": LandCover,
        "[ground]": Ground,
        "[fit]": Fit,
        "[detect]": Detect,
        "[output]": Output,
        "[cluster]": Cluster,
    }

    assert text.split("\n## ", 1)[1] == "\n".join(documented(*s) for s in sections.items()).removeprefix(
        "## "
    )


def test_the_documented_keys_of_trainings_are_those_of_the_code(repo_root):
    text = (repo_root / "docs" / "training.md").read_text(encoding="utf-8")
    sections = {
        "[[data]]": DataTable,
        "[patches]": PatchTable,
        "[features]": train_config.Features,
        "[network]": train_config.NetworkTable,
        "[training]": train_config.Training,
        "[training.augment]": train_config.Augment,
        "[calibration]": train_config.CalibrationTable,
        "[threshold]": train_config.Threshold,
        "[sweep]": train_config.Sweep,
        "[null_run]": train_config.NullRunTable,
        "[cluster]": train_config.ClusterTable,
    }

    assert text.split("\n## ", 1)[1] == "\n".join(documented(*s) for s in sections.items()).removeprefix(
        "## "
    )
    tables = {
        name for name, field in train_config.TrainSections.model_fields.items() if field.annotation is not str
    }
    assert {title.strip("[]").partition(".")[0] for title in sections} == tables - {"version"}
