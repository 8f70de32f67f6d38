"""Files that stay open between blocks: never another file's pixels, never another thread's dataset."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from slidecube.catalog import open_files
from slidecube.catalog.open_files import OpenFiles


def write(path, value):
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=8,
        height=8,
        count=1,
        dtype="uint8",
        transform=Affine(1, 0, 0, 0, -1, 0),
    ) as file:
        file.write(np.full((8, 8), value, np.uint8), 1)
    return str(path)


@pytest.fixture
def opened():
    """Open by rasterio, and count it."""
    made = []

    def opener(path):
        made.append(rasterio.open(path))
        return made[-1]

    opener.made = made
    return opener


def value(files, path, opener):
    with files.opened(path, opener) as dataset:
        return int(dataset.read(1)[0, 0])


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_file_is_opened_once_and_again_where_it_is_another_one(tmp_path, opened):
    files, path = OpenFiles(4), write(tmp_path / "a.tif", 1)
    assert [value(files, path, opened) for _ in range(3)] == [1, 1, 1]
    assert len(opened.made) == 1

    other = write(tmp_path / "b.tif", 2)
    Path(other).replace(path)
    assert value(files, path, opened) == 2
    assert opened.made[0].closed

    Path(path).unlink()
    with pytest.raises(rasterio.errors.RasterioIOError):
        value(files, path, opened)
    assert all(dataset.closed for dataset in opened.made)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_what_failed_is_not_used_again(tmp_path, opened):
    files, path = OpenFiles(4), write(tmp_path / "a.tif", 1)
    with pytest.raises(ZeroDivisionError), files.opened(path, opened):
        raise ZeroDivisionError
    assert opened.made[0].closed
    assert value(files, path, opened) == 1
    assert len(opened.made) == 2


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_each_thread_has_its_own_and_leaves_room_when_it_is_not_used(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(open_files, "_STALE_S", 0.0)
    files, path = OpenFiles(1), write(tmp_path / "a.tif", 1)
    thread = threading.Thread(target=value, args=(files, path, opened))
    thread.start()
    thread.join()
    assert value(files, path, opened) == 1
    first, second = opened.made
    assert first is not second
    assert first.closed, "nobody used it any more"
    assert not second.closed
    assert len(files) == 1


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_one_more_than_are_kept_is_closed_after_its_use(tmp_path, opened):
    files = OpenFiles(2)
    paths = [write(tmp_path / f"{i}.tif", i) for i in range(3)]
    for _ in range(2):
        assert [value(files, path, opened) for path in paths] == [0, 1, 2]
    assert len(files) == 2
    assert [dataset.closed for dataset in opened.made] == [False, False, True, True]
    assert value(OpenFiles(0), paths[0], opened) == 0, "none may be kept"
    assert opened.made[-1].closed


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_what_nobody_uses_is_closed_though_there_is_room(tmp_path, opened, monkeypatch):
    files = OpenFiles(9)
    paths = [write(tmp_path / f"{i}.tif", i) for i in range(3)]
    for path in paths[:2]:
        value(files, path, opened)
    monkeypatch.setattr(open_files, "_STALE_S", 0.0)
    value(files, paths[2], opened)
    assert [dataset.closed for dataset in opened.made] == [True, True, False]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_file_within_its_own_use_is_another_dataset_and_one_is_kept(tmp_path, opened):
    files, path = OpenFiles(4), write(tmp_path / "a.tif", 1)
    with files.opened(path, opened) as outer:
        assert value(files, path, opened) == 1
        assert int(outer.read(1)[0, 0]) == 1
    assert [dataset.closed for dataset in opened.made] == [False, True]
    assert len(files) == 1
