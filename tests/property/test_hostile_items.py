"""Any field of any type: a broken item is left out with its reason, and the sound one beside it is found."""

from __future__ import annotations

import copy
import json

import pytest
import shapely

from slidecube.catalog.aoi import Aoi
from slidecube.catalog.errors import CatalogError
from slidecube.catalog.search import find

WORLD = Aoi(name="world", geometry=shapely.box(-180, -85, 180, 85))
BROKEN = [5, "x", None, [], {}, [5], "//[bad", float("-inf")]


@pytest.fixture(scope="module")
def item(repo_root):
    path = repo_root / "tests" / "data" / "stac_items" / "planetary-computer-sentinel-2-l2a.json"
    found = json.loads(path.read_text())
    one = found["features"][0] if "features" in found else found
    for asset in one["assets"].values():
        asset["href"] = "B04.tif"
    return one


def places(value, before=()):
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield (*before, key)
        yield from places(inner, (*before, key))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("broken", BROKEN, ids=repr)
def test_one_broken_field_never_stops_a_search(item, tmp_path, broken):
    path = tmp_path / "items.json"
    for place in places(item):
        bad = copy.deepcopy(item)
        inner = bad
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = broken
        sound = {**item, "id": "SOUND_" + item["id"]}
        path.write_text(json.dumps({"type": "FeatureCollection", "features": [bad, sound]}))
        try:
            found = find(str(path), WORLD, None)
        except CatalogError:
            continue  # an address that leads elsewhere stops the whole catalogue, in one line
        assert len(found.scenes) >= 1, place


@pytest.mark.parametrize(
    "document",
    [
        {"type": "Catalog", "links": 5},
        {"type": "Catalog", "links": [5]},
        {"type": "FeatureCollection", "features": 5},
    ],
)
def test_a_broken_list_is_empty(tmp_path, document):
    path = tmp_path / "catalog.json"
    path.write_text(json.dumps(document))
    assert not find(str(path), WORLD, None).scenes


def test_a_link_that_is_no_address_is_refused(tmp_path):
    path = tmp_path / "catalog.json"
    path.write_text(json.dumps({"type": "Catalog", "links": [{"rel": "child", "href": "//[bad"}]}))
    with pytest.raises(CatalogError, match="is no address"):
        find(str(path), WORLD, None)
