"""Places: what is written, listed and raced for comes out alike in a folder and in a bucket."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from obstore.exceptions import PermissionDeniedError

from slidecube.cluster.faults import fault_of
from slidecube.pipeline import storage
from slidecube.pipeline.errors import PipelineError
from slidecube.pipeline.storage import (
    ObjectPath,
    Place,
    StorageError,
    below,
    create,
    fetched,
    kept_file,
    made_once,
    matching,
    names,
    place_of,
    read_many,
    read_tagged,
    relative_href,
    remove_many,
    remove_tree,
    replaced,
    require_reachable,
    size_of,
    sizes,
    staged,
    stamp,
    swap,
    write_atomic,
    zarr_store,
)
from slidecube.pipeline.store import Workspace


@pytest.fixture(params=["folder", "bucket"])
def root(request, tmp_path) -> Place:
    """An empty place."""
    return place_of(request.getfixturevalue("s3") if request.param == "bucket" else tmp_path / "ws")


def filled(root: Place) -> Place:
    """A small tree."""
    for name in ("a.json", "b.json", "sub/c.json", "sub/deep/d.txt", "other/c.json"):
        place = root.joinpath(*name.split("/"))
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, f"content of {name}")
    return root


def test_addresses():
    assert place_of("s3://bucket/a/b/") == ObjectPath("bucket", "a/b")
    assert place_of(Path("s3://bucket/a")) == ObjectPath("bucket", "a"), "a Path swallows a slash"
    assert str(place_of("s3://bucket")) == "s3://bucket"
    assert place_of("ws") == Path("ws").absolute()
    assert place_of(ObjectPath("b", "k")) == ObjectPath("b", "k")


@pytest.mark.parametrize(
    "address", ["gs://bucket/a", "s3://", "s3://B_/x", "s3://bucket/a/../b", "s3://bucket//a"]
)
def test_addresses_that_are_refused(address):
    with pytest.raises(PipelineError):
        place_of(address)


def test_words_of_pathlib_mean_the_same():
    for pure in (Path("/x/a/b.zarr"), Path("/x/a"), Path("/x/a/b.tar.gz")):
        place = ObjectPath("x", str(pure)[3:])
        for word in ("name", "stem", "suffix"):
            assert getattr(place, word) == getattr(pure, word)
        assert str(place.with_suffix(".ledger")) == f"s3:/{pure.with_suffix('.ledger')}"
        assert str(place.parent) == f"s3:/{pure.parent}"
        assert str(place / "c" / "d") == f"s3:/{pure / 'c' / 'd'}"
    assert ObjectPath("x", "a/b").is_relative_to(ObjectPath("x", "a"))
    assert not ObjectPath("x", "ab").is_relative_to(ObjectPath("x", "a"))
    with pytest.raises(TypeError):
        open(ObjectPath("x", "a"))  # noqa: PTH123, SIM115


def test_a_tree_reads_alike(root):
    filled(root)

    assert (root / "a.json").read_text() == "content of a.json"
    assert names(root / "sub") == (["c.json"] if isinstance(root, ObjectPath) else ["c.json", "deep"])
    assert sizes(root) == {"a.json": 17, "b.json": 17}
    assert sorted(sizes(root, deep=True)) == [
        "a.json",
        "b.json",
        "other/c.json",
        "sub/c.json",
        "sub/deep/d.txt",
    ]
    assert [below(p, root) for p in matching(root, "*/c.json", "*.json")] == [
        "a.json",
        "b.json",
        "other/c.json",
        "sub/c.json",
    ]
    assert [below(p, root) for p in matching(root, "sub/*")] == ["sub/c.json", "sub/deep"]
    assert sorted(p.name for p in root.rglob("*.txt")) == ["d.txt"]
    assert (root / "sub").is_dir()
    assert (root / "sub").exists()
    assert not (root / "sub").is_file()
    assert (root / "a.json").is_file()
    assert not (root / "a.jso").exists()
    assert size_of(root / "a.json") == 17
    assert size_of(root / "none") == 0
    with (root / "a.json").open("rb") as file:
        assert file.read(7) == b"content"


def test_what_is_not_there(root):
    assert names(root / "x") == []
    assert sizes(root / "x") == sizes(root / "x", deep=True) == {}
    assert matching(root / "x", "*/y", "*") == []
    assert stamp(root / "x") is None
    assert read_tagged(root / "x") is None
    assert not swap(root / "x", b"1", '"none"')
    remove_tree(root / "x")
    remove_many([root / "x", root / "y"])
    (root / "x").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (root / "x").read_bytes()


def test_many_are_read_in_their_order_and_removed(root):
    filled(root)
    for n in range(150):
        write_atomic(root / f"n{n}", str(n))

    wanted = [root / f"n{n}" for n in range(149, -1, -1)]
    assert list(read_many([*wanted, root / "none"])) == [*(str(n).encode() for n in range(149, -1, -1)), None]

    remove_many(wanted)
    remove_tree(root / "sub")
    assert sorted(sizes(root, deep=True)) == ["a.json", "b.json", "other/c.json"]
    remove_tree(root / "a.json")
    assert sizes(root) == {"b.json": 17}


def test_of_many_creators_exactly_one_wins(root):
    place = root / "locks" / "one.json"

    with ThreadPoolExecutor(24) as pool:
        won = list(pool.map(lambda n: create(place, f"mine {n}".encode()), range(48)))

    assert sum(won) == 1
    assert place.read_text() == f"mine {won.index(True)}"
    assert not create(place, b"later")


def test_of_many_swaps_exactly_one_wins(root):
    place = root / "locks" / "one.json"
    create(place, b"first")
    found = read_tagged(place)
    assert found is not None
    content, tag = found
    assert content == b"first"

    with ThreadPoolExecutor(24) as pool:
        won = list(pool.map(lambda n: swap(place, f"next {n}".encode(), tag), range(48)))

    assert sum(won) == 1
    assert place.read_text() == f"next {won.index(True)}"
    assert not swap(place, b"late", tag)


def test_another_content_has_another_stamp(root):
    root.mkdir(parents=True, exist_ok=True)
    write_atomic(root / "a", "one")
    first = stamp(root / "a")
    assert stamp(root / "a") == first
    write_atomic(root / "a", "two")

    assert stamp(root / "a") != first


def test_a_staged_folder_arrives(root):
    with staged(root / "products" / "p", root=root) as local:
        assert local.parts[-2:] == ("products", "p")
        (local / "cog").mkdir()
        (local / "cog" / "big.tif").write_bytes(b"x" * 12_000_000)
        (local / "a.json").write_text("a")

    assert sizes(root / "products" / "p", deep=True) == {"a.json": 1, "cog/big.tif": 12_000_000}
    with fetched(root / "products" / "p") as local:
        assert (local / "cog" / "big.tif").read_bytes() == b"x" * 12_000_000
    with fetched(root / "products" / "p" / "a.json") as local:
        assert (local.name, local.read_text()) == ("a.json", "a")


def test_a_folder_is_replaced_whole_or_stays(root):
    for n in (1, 2):
        with replaced(root / "sheet") as local:
            (local / "img").mkdir()
            (local / "img" / f"{n}.png").write_text("x")
            (local / "index.html").write_text(str(n))
    with contextlib.suppress(ZeroDivisionError), replaced(root / "sheet") as local:
        (local / "index.html").write_text("3")
        raise ZeroDivisionError

    assert sorted(sizes(root, deep=True)) == ["sheet/img/2.png", "sheet/index.html"]
    assert (root / "sheet" / "index.html").read_text() == "2"


def test_a_folder_is_made_once(root):
    def make(text):
        with made_once(root / "plans" / "p", "plan.json") as local:
            (local / "rest").write_text("rest")
            (local / "plan.json").write_text(text)

    make("first")
    make("second")

    assert (root / "plans" / "p" / "plan.json").read_text() == "first"


def test_half_made_folders_of_others_stay_for_hours_and_our_own_dead_go_at_once(tmp_path):
    """The plan of another host, whose process numbers say nothing here; one of a process of ours that was killed."""
    plans = tmp_path / "plans"
    gone = subprocess.Popen(["true"])
    gone.wait()
    space = storage.pid_space()
    stay = [
        f".p.{space}-{os.getpid()}-01.partial",
        f".p.feed-{gone.pid}-01.partial",
        f".q.{gone.pid}.partial",
    ]
    go = [f".p.{space}-{gone.pid}-01.partial", ".p.feed-1-02.partial", f".p.{space}-{os.getpid()}-02.partial"]
    for name in stay + go:
        (plans / name).mkdir(parents=True)
        (plans / name / "rest").write_text("")
    for name in go[1:]:
        os.utime(plans / name, (time.time() - 7 * 3600,) * 2)

    with made_once(plans / "p", "plan.json") as one, made_once(plans / "p", "plan.json") as other:
        for local in (one, other):
            (local / "plan.json").write_text(local.name)
        assert one != other, "of one process, or of two containers in which all are number 1"
        assert sorted(p.name for p in plans.glob("*.partial")) == sorted([*stay, one.name, other.name])

    assert (plans / "p" / "plan.json").read_text() == other.name
    assert sorted(p.name for p in plans.glob("*.partial")) == sorted(stay)


def test_a_kept_file_goes_on_where_it_was(root):
    root.mkdir(parents=True, exist_ok=True)
    for n in range(2):
        with contextlib.suppress(ZeroDivisionError), kept_file(root / "c.safetensors") as (local, keep):
            assert (local.read_text() if local.exists() else None) == (None if n == 0 else "epoch 0")
            keep()
            local.write_text(f"epoch {n}")
            keep()
            raise ZeroDivisionError

    assert (root / "c.safetensors").read_text() == "epoch 1"


def test_links_between_places_are_relative(root):
    assert relative_href(root / "inventories" / "x.zarr", root / "products" / "p" / "stac") == (
        "../../../inventories/x.zarr"
    )


def test_the_same_array_has_the_same_bytes_anywhere(root, tmp_path):
    values = np.random.default_rng(1).integers(0, 9, (128, 128)).astype("u2")
    for place in (root / "g.zarr", tmp_path / "reference.zarr"):
        group = zarr.open_group(zarr_store(place), mode="a", zarr_format=3)
        array = group.create_array("a", shape=(256, 128), shards=(128, 128), chunks=(64, 64), dtype="u2")
        array[128:] = values

    made, reference = sizes(root / "g.zarr", deep=True), sizes(tmp_path / "reference.zarr", deep=True)
    assert made == reference
    assert "a/c/1/0" in made
    for name in made:
        assert (root / "g.zarr" / name).read_bytes() == (tmp_path / "reference.zarr" / name).read_bytes()
    again = pickle.loads(pickle.dumps(zarr.open_group(zarr_store(root / "g.zarr"), mode="r")["a"]))
    np.testing.assert_array_equal(again[128:], values)


def test_no_secret_travels(s3):
    place = place_of(s3)
    write_atomic(place / "a", "x")
    group = zarr.open_group(zarr_store(place / "g.zarr"), mode="a", zarr_format=3)

    for what in (place, group, group.store, storage._store(place.bucket)):
        assert b"secret-of-the-test" not in pickle.dumps(what)
        assert "secret-of-the-test" not in repr(what)
        assert "AKIATEST" not in repr(what)


def test_credentials_may_lie_in_a_profile(s3, tmp_path, monkeypatch):
    (tmp_path / "credentials").write_text("[maps]\naws_access_key_id = A\naws_secret_access_key = B\n")
    (tmp_path / "config").write_text(
        f"[profile maps]\nregion = eu-west-1\nendpoint_url = {storage.os.environ['AWS_ENDPOINT_URL']}\n"
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "maps")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    place = place_of(s3)

    write_atomic(place / "a", "x")

    assert (place / "a").read_text() == "x"
    assert storage._endpoint(storage._settings())[1] == "eu-west-1"


def refusal(address) -> str:
    with pytest.raises(PipelineError) as refused:
        Workspace.at(address)
    line = str(refused.value)
    assert "\n" not in line
    assert len(line) < 400
    assert "secret-of-the-test" not in line
    return line


def test_a_bucket_that_is_not_there_is_named(s3):
    require_reachable(place_of(s3))

    assert re.search(r"no bucket 'nowhere-at-all' at http://127", refusal("s3://nowhere-at-all/x"))


def test_an_endpoint_that_is_down_is_named(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    assert re.search(r"http://127\.0\.0\.1:9 does not answer for s3://.*check AWS_ENDPOINT_URL", refusal(s3))


@pytest.mark.parametrize("number", ["404", "403", "401"])
def test_a_number_that_is_no_answer_says_nothing(s3, monkeypatch, number):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{number}")  # nobody listens there

    assert f"127.0.0.1:{number} does not answer" in refusal(f"s3://bucket-{number}.{number}/some/{number}")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("AWS_PROFILE", "nobody", r"profile \(nobody\) could not be found"),
        ("AWS_ENDPOINT_URL", "not an address", "not an address"),
    ],
)
def test_settings_that_cannot_be_used_are_named(s3, monkeypatch, name, value, told):
    monkeypatch.setenv(name, value)

    assert re.search(f"^The AWS settings cannot be used: .*{told}.*; check AWS_PROFILE", refusal(s3))


def test_missing_credentials_are_named(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    line = refusal(s3)

    assert line.startswith(f"For {s3} there are no credentials; set AWS_ACCESS_KEY_ID")
    assert "AWS_ENDPOINT_URL" not in line


def test_credentials_that_fail_are_told(s3, tmp_path, monkeypatch):
    (tmp_path / "config").write_text("[profile maps]\nregion = eu-west-1\ncredential_process = /bin/false\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "maps")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))

    line = refusal(s3)

    assert line.startswith(f"For {s3} the credentials cannot be had: Error when retrieving credentials")
    assert line.endswith("; check AWS_PROFILE and its files")
    assert "end)" not in line


def test_who_holds_a_file_and_does_not_go_on_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "GUARD_S", 0.3)
    refused = pytest.raises(PipelineError, match=r"has held .*\.a\.guard for 0 s and does not go on; end it")
    with storage.guard(tmp_path / "a"), refused:
        storage.create(tmp_path / "a", b"1")
    assert storage.create(tmp_path / "a", b"1")


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuses(_fd, _operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(storage.fcntl, "flock", refuses)
    with pytest.raises(PipelineError, match=r"has no file locks \(Function not implemented\).*-o flock"):
        storage.create(tmp_path / "a", b"1")


def test_credentials_that_may_only_read_are_told_when_something_is_written(s3):
    place = place_of(s3)

    def denied(*_, **__):
        raise PermissionDeniedError("Generic S3 error: status code: 403 Forbidden: <Code>AccessDenied</Code>")

    with pytest.raises(StorageError, match="403 Forbidden AccessDenied") as told:
        storage.asked(place, denied)
    assert told.value.errno == errno.EACCES
    assert fault_of(told.value) == "transient"
