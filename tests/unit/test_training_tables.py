"""[[data]] and [patches]: what is allowed, and what is refused in one line."""

from __future__ import annotations

import pydantic
import pytest
from pydantic import BaseModel

from slidecube.pipeline.confusers import CONFUSERS, confuser, is_polygons
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.refusals import refusal
from slidecube.pipeline.training_tables import DataTable, PatchTable

CUBE = {"kind": "cube", "run": "a.toml", "reference": "known.gpkg"}
FOLDER = {"kind": "landslide4sense", "folder": "l4s"}


class Toml(BaseModel):
    data: tuple[DataTable, ...]
    patches: PatchTable


def refused(data, patches=None):
    tables = {"data": [data], "patches": patches or {}}
    with pytest.raises(pydantic.ValidationError) as error:
        Toml.model_validate(tables)
    line = refusal(error.value, tables, Toml)
    assert "\n" not in line
    return line


def test_tables_are_what_a_toml_says():
    cube = DataTable(**CUBE)
    assert (cube.used, cube.named, cube.complete) == ("blocks", "a", True)
    assert DataTable(**CUBE, epoch="iburi").named == "iburi"
    assert DataTable(**FOLDER).used == "split"
    assert DataTable(**FOLDER).named == "landslide4sense"
    patches = PatchTable.model_validate({"shares": [0.5, 0.5, 0], "confusers": ["shadow", "fields.gpkg"]})
    assert patches.side_px == 4 * 128 + 2 * 16
    assert patches.confusers == ("shadow", "fields.gpkg")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**CUBE, "kind": "cubes"}, "data.kind (data 1): got 'cubes'; allowed: \"cube\""),
        ({"kind": "cube", "run": "a.toml"}, "reference is missing"),
        ({**CUBE, "folder": "x"}, "folder is nothing of kind 'cube'"),
        ({**CUBE, "use": "split"}, 'use = "split" is a benchmark\'s own'),
        ({**FOLDER, "run": "x"}, "run is nothing of kind 'landslide4sense'"),
        ({**FOLDER, "complete": False}, "complete = false is nothing of kind"),
        ({"kind": "sen12landslides"}, "folder is missing"),
        ({**CUBE, "epoc": "x"}, "data.epoc (data 1): unknown key (did you mean 'epoch'?)"),
        ({**CUBE, "use": "learn"}, 'allowed: "train", "validation"'),
    ],
)
def test_data_that_makes_no_sense_is_one_line(data, message):
    assert message in refused(data)


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        ({"px": 16}, "patches.px: got 16; allowed: the side of a patch, 32 to 512"),
        ({"positive": 0.8, "hard": 0.3}, "positive = 0.8 and hard = 0.3 are more than 1"),
        ({"shares": [0.5, 0.2, 0.2]}, "three that add up to 1"),
        ({"shares": [0.0, 0.5, 0.5]}, "the first above 0"),
        ({"shares": [0.5, 0.5]}, "patches.shares: got [0.5, 0.5]; allowed: three shares"),
        (
            {"px": 64, "block_px": 64},
            "block_px = 64 holds no patch of 64 px with gaps of 16 px; allowed: at least 96",
        ),
        ({"gap_px": 0}, "patches.gap_px: got 0"),
    ],
)
def test_patches_that_make_no_sense_are_one_line(patches, message):
    assert message in refused(CUBE, patches)


def test_rules_and_files_are_told_apart():
    assert not any(is_polygons(name) for name in CONFUSERS)
    assert is_polygons("Fields.GPKG")
    with pytest.raises(PipelineError, match=r"did you mean 'shadow'"):
        confuser("shadows")
