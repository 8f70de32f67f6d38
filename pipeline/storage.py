"""Places: a local folder or `s3://bucket/prefix`, and the few things that are done differently in the two.

Everything else works with a `Place`: a `pathlib.Path`, or an `ObjectPath`, which speaks as much of pathlib's language
as a workspace needs. An `ObjectPath` is no `os.PathLike`: a library that knows files only refuses it at once, and is
given a folder by `staged` or a file by `fetched` instead (ADR 10).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import hashlib
import os
import random
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from slidecube.pipeline.errors import PipelineError

if TYPE_CHECKING:
    from obstore.store import S3Store
    from zarr.abc.store import Store

T = TypeVar("T")

SCHEME = "s3://"
AT_ONCE = 64
"""Requests in flight when many objects are read or removed."""

CONNECT_S, SILENT_S, REQUEST_S = 5.0, 20.0, 300.0
"""A request is given up, and tried again, when it does not connect, falls silent, or takes so long in all."""

RETRIES = 10
"""Of requests that were answered with 5xx or 429, broken off or given up; with back-off and jitter."""

_ABANDONED_S = 6 * 3600.0
"""A plan is written within minutes; what was half made so long ago belongs to nobody."""

GUARD_S = 600.0
"""How long a local file may be held by another process; making the stores of a nation takes seconds."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

_LOOK_S = 0.01

_BACKOFF_S, _MAX_BACKOFF_S, _RETRY_S = 0.1, 15.0, 180.0
_SETTINGS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CONFIG_FILE",
)

_FAILING_CREDENTIALS = "the credentials cannot be had"
_END = " (end)"  # of what was said; the library puts its own words around it
_NO_CREDENTIALS = "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


@dataclass(frozen=True, slots=True, order=True)
class ObjectPath:
    """A place in a bucket, in pathlib's words; folders are prefixes, and exist while there is something in them.

    bucket : its name; key : without a slash at either end, "" for the bucket itself
    """

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, other: str) -> ObjectPath:
        return self.joinpath(other)

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.key)

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """Name without its ending."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """Ending of the name."""
        return self._pure.suffix

    @property
    def parent(self) -> ObjectPath:
        """The folder that holds it."""
        return self._at(self._pure.parent)

    @property
    def parents(self) -> tuple[ObjectPath, ...]:
        """All folders that hold it, the nearest first."""
        return tuple(self._at(parent) for parent in self._pure.parents)

    def joinpath(self, *parts: str) -> ObjectPath:
        """Place below."""
        return self._at(self._pure.joinpath(*parts))

    def with_name(self, name: str) -> ObjectPath:
        """Place beside."""
        return self._at(self._pure.with_name(name))

    def with_suffix(self, suffix: str) -> ObjectPath:
        """Place beside with another ending."""
        return self._at(self._pure.with_suffix(suffix))

    def relative_to(self, other: ObjectPath) -> PurePosixPath:
        """Path from a folder above; raises ValueError when it is none."""
        if self.bucket != other.bucket:
            raise ValueError(f"{self} does not lie in {other}")
        return self._pure.relative_to(other.key or ".")

    def is_relative_to(self, other: ObjectPath) -> bool:
        """Tell whether it lies in a folder."""
        return self.bucket == other.bucket and self._pure.is_relative_to(other.key or ".")

    def exists(self) -> bool:
        """Tell whether there is an object here, or one below."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Tell whether there is an object here."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Tell whether there is an object below."""
        return asked(self, lambda: any(_store(self.bucket).list(self._prefix, chunk_size=1)))

    def stat(self) -> ObjectStat:
        """Size of the object; raises FileNotFoundError."""
        meta = asked(self, lambda: _store(self.bucket).head(self.key))
        return ObjectStat(st_size=int(meta["size"]))

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: folders come with what is in them."""

    def read_bytes(self) -> bytes:
        """Content of the object; raises FileNotFoundError."""
        return asked(self, lambda: bytes(_store(self.bucket).get(self.key).bytes()))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Content of the object as text; raises FileNotFoundError."""
        return self.read_bytes().decode(encoding, errors)

    def open(self, mode: str = "rb") -> BytesIO:
        """Content of the object as a file in memory."""
        assert mode == "rb"
        return BytesIO(self.read_bytes())

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove the object; S3 does not say whether there was one."""
        assert missing_ok or self.is_file()
        asked(self, lambda: _store(self.bucket).delete(self.key))

    def iterdir(self) -> Iterator[ObjectPath]:
        """Yield what lies in the folder, objects and folders."""
        found = asked(self, lambda: _store(self.bucket).list_with_delimiter(self._prefix))
        for prefix in found["common_prefixes"]:
            yield ObjectPath(self.bucket, prefix.rstrip("/"))
        for meta in found["objects"]:
            yield ObjectPath(self.bucket, meta["path"])

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield what matches a pattern of names with `*`, one level a name."""
        first, _, rest = pattern.partition("/")
        if "*" not in first:
            found = self / first
            yield from found.glob(rest) if rest else ([found] if found.exists() else ())
            return
        for place in self.iterdir():
            if fnmatchcase(place.name, first):
                yield from place.glob(rest) if rest else (place,)

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield all objects below whose name matches a pattern."""
        for name in sizes(self, deep=True):
            found = self / name
            if fnmatchcase(found.name, pattern):
                yield found

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def _at(self, path: PurePosixPath) -> ObjectPath:
        return ObjectPath(self.bucket, "" if str(path) == "." else str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStat:
    """What is known of an object; st_size : bytes."""

    st_size: int


class StorageError(OSError):
    """A server that keeps objects did not do what was asked; what is refused today may be granted with other keys."""

    fault = "transient"


Place = Path | ObjectPath
"""Where something lies."""


def place_of(where: str | Path | ObjectPath) -> Place:
    """Take an address, a local path or `s3://bucket/prefix`; nothing is asked of the disk or a server.

    Raises PipelineError for another scheme, or a bucket without a name.
    """
    text = str(where)
    if isinstance(where, ObjectPath):
        return where
    text = re.sub(r"^s3:/+", SCHEME, text)  # a Path swallows a slash
    scheme = re.match(r"[a-z][a-z0-9+.-]*://", text)
    if scheme is None:
        return Path(text).absolute()
    bucket, _, key = text.removeprefix(SCHEME).partition("/")
    if scheme[0] != SCHEME or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,62}", bucket):
        raise PipelineError(
            f"Address {text!r} is neither a folder nor an s3://bucket/prefix; give one of these"
        )
    parts = PurePosixPath(key).parts
    if ".." in parts or "//" in key or key.startswith("/"):
        raise PipelineError(f"Address {text!r} has an empty or a '..' part; write the prefix plainly")
    return ObjectPath(bucket, "/".join(parts))


def require_reachable(place: Place) -> None:
    """Raise PipelineError, in one line, when a bucket cannot be asked: no such bucket, no rights, nobody there."""
    if isinstance(place, Path):
        return
    store = _open(place.bucket, _settings(), retries=2)
    try:
        list(store.list(place._prefix, chunk_size=1))  # noqa: SLF001
    except Exception as error:  # noqa: BLE001  the library's own classes do not tell these apart
        raise PipelineError(_unreachable(place, str(error))) from None


def _unreachable(place: ObjectPath, said: str) -> str:
    endpoint = _endpoint(_settings())[0] or "AWS"
    # the numbers of an address or of a time taken say nothing of what was answered
    answered = re.search(r"status code: (\d{3})", said)
    status = answered[1] if answered else ""
    if "NoSuchBucket" in said or status == "404":
        return f"There is no bucket {place.bucket!r} at {endpoint}; make it, or name another in [output] workspace"
    if _NO_CREDENTIALS in said:
        return f"For {place} {_NO_CREDENTIALS}"
    if _FAILING_CREDENTIALS in said:
        why = said.partition(_FAILING_CREDENTIALS)[2].partition(_END)[0]
        return f"For {place} {_FAILING_CREDENTIALS}{' '.join(why.split())}; check AWS_PROFILE and its files"
    if status in {"401", "403"} or re.search(r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch", said):
        return (
            f"{endpoint} refuses access to {place} with these credentials; check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and the rights to list, read, write and delete"
        )
    return f"{endpoint} does not answer for {place} ({_brief(said)}); check AWS_ENDPOINT_URL and the network"


def write_atomic(place: Place, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, and nothing else, whatever dies.

    Locally under a temporary name, flushed to the disk, then renamed; in a bucket by one PUT.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if isinstance(place, ObjectPath):
        asked(place, lambda: _store(place.bucket).put(place.key, data))
        return
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def create(place: Place, content: bytes) -> bool:
    """Write a file that is not there yet; returns whether we made it: of many who try, exactly one does.

    content : no other's, such as one with a token. A request that was answered with a fault may have been obeyed, and
        then only the content tells whose it was.
    """
    if isinstance(place, Path):
        with guard(place):
            if place.exists():
                return False
            write_atomic(place, content)
            return True
    return _put_if(place, content, "create")


def read_tagged(place: Place) -> tuple[bytes, str] | None:
    """Content of a file and the tag by which `swap` knows it, None where there is none."""
    try:
        if isinstance(place, Path):
            content = place.read_bytes()
            return content, _tag(content)
        return asked(place, lambda: _tagged(place))
    except FileNotFoundError:
        return None


def _tagged(place: ObjectPath) -> tuple[bytes, str]:
    got = _store(place.bucket).get(place.key)
    return bytes(got.bytes()), str(got.meta["e_tag"])


def stamp(place: Place) -> str | None:
    """Say which version of a file is there, None where there is none; another one for another content."""
    try:
        if isinstance(place, Path):
            found = place.stat()
            return f"{found.st_mtime_ns} {found.st_ino} {found.st_size}"
        return str(asked(place, lambda: _store(place.bucket).head(place.key))["e_tag"])
    except FileNotFoundError:
        return None


def modified_s(place: Place) -> float | None:
    """When a file was written last, None where there is none; seconds since 1970 by the clock of its disk or server."""
    try:
        if isinstance(place, Path):
            return place.stat().st_mtime
        return float(asked(place, lambda: _store(place.bucket).head(place.key))["last_modified"].timestamp())
    except FileNotFoundError:
        return None


def swap(place: Place, content: bytes, tag: str) -> bool:
    """Write a file if it is still the one of the tag; returns whether it was. content : no other's, see `create`."""
    if isinstance(place, Path):
        with guard(place):
            found = read_tagged(place)
            if found is None or found[1] != tag:
                return False
            write_atomic(place, content)
            return True
    return _put_if(place, content, {"e_tag": tag})


def release(place: Place, tag: str) -> None:
    """Remove a file if it is still the one of the tag.

    A bucket cannot remove on a condition: there it is left empty, for `swap` to take; whoever reads it finds nothing.
    """
    if isinstance(place, ObjectPath):
        swap(place, b"", tag)
        return
    with guard(place):
        found = read_tagged(place)
        if found is not None and found[1] == tag:
            place.unlink()


def _put_if(place: ObjectPath, content: bytes, mode: Any) -> bool:
    from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415

    try:
        asked(place, lambda: _store(place.bucket).put(place.key, content, mode=mode))
    except (AlreadyExistsError, PreconditionError, FileNotFoundError):
        found = read_tagged(place)
        return found is not None and found[0] == content
    return True


def _tag(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@contextmanager
def guard(place: Path) -> Iterator[None]:
    """Hold a local file for the moment of looking and writing, among all processes that ask so.

    Raises PipelineError when another one holds it for minutes, such as a frozen one.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    held = place.with_name(f".{place.name}.guard")
    fd, until = os.open(held, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + GUARD_S
    try:
        while not _locked(fd, place):
            if time.monotonic() > until:
                raise PipelineError(
                    f"Another process has held {held} for {GUARD_S:.0f} s and does not go on; end it (`fuser {held}` "
                    "names it), and run the same command"
                )
            time.sleep(_LOOK_S)
        yield
    finally:
        os.close(fd)


def _locked(fd: int, place: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise PipelineError(
                f"The file system of {place.parent} has no file locks ({error.strerror}), by which drivers keep out of "
                "each other's way; have it mounted with them (Lustre: -o flock), or choose a workspace elsewhere or on "
                "s3://"
            ) from None
        raise
    return True


def sizes(folder: Place, *, deep: bool = False) -> dict[str, int]:
    """Files of a folder by name, with their bytes; {} where there is no folder. deep : also those below, by path."""
    if isinstance(folder, ObjectPath):
        return _object_sizes(folder, deep=deep)
    if not deep:
        try:
            with os.scandir(folder) as found:
                return {entry.name: entry.stat().st_size for entry in found if entry.is_file()}
        except FileNotFoundError:
            return {}
    return {
        str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }


def _object_sizes(folder: ObjectPath, *, deep: bool) -> dict[str, int]:
    prefix = folder._prefix  # noqa: SLF001
    store = _store(folder.bucket)
    if deep:
        found = asked(folder, lambda: [meta for part in store.list(prefix, chunk_size=1000) for meta in part])
    else:
        found = asked(folder, lambda: list(store.list_with_delimiter(prefix)["objects"]))
    return {meta["path"].removeprefix(prefix): int(meta["size"]) for meta in found}


def matching(folder: Place, *patterns: str) -> list[Place]:
    """Places below a folder that match patterns of names with `*`, one level a name, sorted."""
    found: list[Place] = [place for pattern in patterns for place in folder.glob(pattern)]
    return sorted(found, key=str)


def below(place: Place, folder: Place) -> str:
    """Path from a folder to a place in it; raises ValueError when it does not lie there."""
    if isinstance(place, ObjectPath) and isinstance(folder, ObjectPath):
        return str(place.relative_to(folder))
    assert isinstance(place, Path)
    assert isinstance(folder, Path)
    return str(place.relative_to(folder))


def size_of(file: Place) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def names(folder: Place) -> list[str]:
    """Names of the files of a folder, sorted; nothing else is asked of them."""
    if isinstance(folder, ObjectPath):
        return sorted(_object_sizes(folder, deep=False))
    try:
        with os.scandir(folder) as found:
            return sorted(entry.name for entry in found)
    except FileNotFoundError:
        return []


def read_many(places: Iterable[Place]) -> Iterator[bytes | None]:
    """Yield the contents of many files in their order, None where there is none; objects are read side by side."""
    if isinstance(first := next(iter(wanted := list(places)), None), ObjectPath):
        _store(first.bucket)  # one connection for all
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(_read_or_none, wanted)
        return
    for place in wanted:
        yield _read_or_none(place)


def _read_or_none(place: Place) -> bytes | None:
    try:
        return place.read_bytes()
    except FileNotFoundError:
        return None


def remove_many(places: Iterable[Place]) -> None:
    """Remove many files; those that are gone already are no error."""
    by_bucket: dict[str, list[str]] = {}
    for place in places:
        if isinstance(place, Path):
            place.unlink(missing_ok=True)
        else:
            by_bucket.setdefault(place.bucket, []).append(place.key)
    for bucket, keys in by_bucket.items():
        asked(ObjectPath(bucket, ""), functools.partial(_store(bucket).delete, keys))


def remove_tree(folder: Place) -> None:
    """Remove a folder and what is in it, or a file; nothing there is no error."""
    if isinstance(folder, ObjectPath):
        remove_many([folder, *(folder / name for name in sizes(folder, deep=True))])
    elif folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.unlink(missing_ok=True)


def zarr_store(group: Place) -> Store:
    """Store of a Zarr group, which Dask may send to other processes; it carries no secret."""
    if isinstance(group, Path):
        from zarr.storage import LocalStore  # noqa: PLC0415

        return LocalStore(group)
    from slidecube.pipeline.bucket_store import BucketStore  # noqa: PLC0415  a local workspace needs none of it

    return BucketStore(_open(group.bucket, _settings(), prefix=group.key))


@contextmanager
def staged(folder: Place, *, root: Place | None = None) -> Iterator[Path]:
    """Give a local folder to libraries that write files; for a bucket it is uploaded when the block ends well.

    root : folder above, such as the workspace; the local folder then lies as deep below one of its own, so that
        relative links come out alike
    """
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="slidecube-") as scratch:
        below = folder.relative_to(root).parts if isinstance(root, ObjectPath) else (folder.name,)
        local = Path(scratch).joinpath(*below)
        local.mkdir(parents=True)
        yield local
        upload(local, folder)


@contextmanager
def replaced(folder: Place) -> Iterator[Path]:
    """Give an empty local folder which takes the place of another one when the block ends well."""
    if isinstance(folder, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="slidecube-") as scratch:
            yield Path(scratch)
            made = sizes(Path(scratch), deep=True)
            upload(Path(scratch), folder)
            remove_many(folder / name for name in sizes(folder, deep=True) if name not in made)
        return
    for stale in folder.parent.glob(f".{folder.name}.*.partial"):  # of a writer that was killed
        shutil.rmtree(stale, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def made_once(folder: Place, last: str) -> Iterator[Path]:
    """Give an empty local folder which becomes another one when the block ends well and nobody was faster.

    last : name of the file that tells that the folder is whole; never seen before the others are there
    """
    if isinstance(folder, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="slidecube-") as scratch:
            yield Path(scratch)
            for name in sorted(sizes(Path(scratch), deep=True)):
                if name != last:
                    put_file(Path(scratch) / name, folder / name)
            create(folder / last, (Path(scratch) / last).read_bytes())
        return
    partial = folder.with_name(f".{folder.name}.{pid_space()}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        _remove_abandoned(partial)
        yield partial
        with guard(folder.parent / "index.json"):
            if not (folder / last).exists():
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(ours: Path) -> None:
    """Remove what was left half made beside our own folder: by processes of this machine that are gone, and hours ago.

    Two login nodes, or two containers, may make a plan of one workspace at the same time: of the other's processes
    nothing is known. Ages are taken from our own folder's time, since the disk may have another clock than we.
    """
    now_s = ours.stat().st_mtime
    for stale in ours.parent.glob(".*.partial"):
        space, _, rest = stale.name.split(".")[-2].partition("-")
        pid = rest.partition("-")[0]
        try:
            gone = space == pid_space() and pid.isdigit() and not psutil.pid_exists(int(pid))
            if gone or now_s - stale.stat().st_mtime > _ABANDONED_S:
                remove_tree(stale)
        except FileNotFoundError:  # its maker is through, or another one removed it
            continue


@functools.lru_cache(maxsize=1)
def pid_space() -> str:
    """Name the space in which process numbers mean something: this host, since it was started, or this container."""
    space = socket.gethostname()
    with suppress(OSError):  # not Linux
        space += Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        space += str(Path("/proc/self/ns/pid").readlink())
    return hashlib.blake2b(space.encode(), digest_size=6).hexdigest()


def upload(local: Path, folder: Place) -> None:
    """Copy the files of a local folder into another, in the order of their names; large ones in parts."""
    for name in sorted(sizes(local, deep=True)):
        put_file(local / name, folder.joinpath(*PurePosixPath(name).parts))


def put_file(local: Path, place: Place) -> None:
    """Copy a local file to a place, whole or not at all."""
    if isinstance(place, ObjectPath):
        asked(place, lambda: _store(place.bucket).put(place.key, local))
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    try:
        shutil.copyfile(local, partial)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def fetched(place: Place) -> Iterator[Path]:
    """Give a local file, or a folder, to libraries that read files; one of a bucket is there while the block runs.

    Raises FileNotFoundError.
    """
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="slidecube-") as scratch:
        local = Path(scratch) / place.name
        below = sizes(place, deep=True)
        if below:
            for name, content in zip(below, read_many(place / name for name in below), strict=True):
                file = local / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content or b"")
        else:
            local.write_bytes(place.read_bytes())
        yield local


@contextmanager
def kept_file(place: Place) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Give a local file that is written again and again, such as a checkpoint, and what brings it to its place.

    Yields the file, as it was left there before if it was, and a function that uploads it when it has changed.
    """
    if isinstance(place, Path):
        yield place, lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="slidecube-") as scratch:
        local = Path(scratch) / place.name
        before = _read_or_none(place)
        if before is not None:
            local.write_bytes(before)
        seen = [local.stat().st_mtime_ns if local.exists() else 0]

        def keep() -> None:
            now = local.stat().st_mtime_ns if local.exists() else 0
            if now != seen[0]:
                put_file(local, place)
                seen[0] = now

        yield local, keep


def relative_href(to: Place, at: Place) -> str:
    """Relative link from a folder to a place of the same workspace."""
    start, end = (f"/{p.bucket}/{p.key}" if isinstance(p, ObjectPath) else str(p) for p in (at, to))
    return Path(os.path.relpath(end, start)).as_posix()


def _store(bucket: str) -> S3Store:
    return _open(bucket, _settings())


def _settings() -> tuple[str, ...]:
    """What of the environment decides which server is asked; part of the key under which a connection is kept."""
    return tuple(os.environ.get(name, "") for name in _SETTINGS)


@functools.lru_cache(maxsize=64)
def _open(bucket: str, settings: tuple[str, ...], *, prefix: str = "", retries: int = RETRIES) -> S3Store:
    from obstore.store import S3Store  # noqa: PLC0415  a local workspace needs none of it

    endpoint, region = _endpoint(settings)
    where: dict[str, Any] = {"endpoint": endpoint, "virtual_hosted_style_request": False} if endpoint else {}
    return S3Store(
        bucket,
        prefix=prefix or None,
        region=region,
        credential_provider=_credentials,
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "read_timeout": timedelta(seconds=SILENT_S),
            "timeout": timedelta(seconds=REQUEST_S),
        },
        retry_config={
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=_RETRY_S),
            "backoff": {
                "init_backoff": timedelta(seconds=_BACKOFF_S),
                "max_backoff": timedelta(seconds=_MAX_BACKOFF_S),
                "base": 2,
            },
        },
        **where,
    )


@functools.lru_cache(maxsize=8)
def _endpoint(settings: tuple[str, ...]) -> tuple[str, str]:
    """Endpoint, "" for AWS itself, and region, from the environment and the profile files.

    Raises PipelineError when these contradict themselves: a profile that is not there, a file that cannot be read.
    """
    del settings  # what it depends on; botocore reads it itself
    import botocore.exceptions  # noqa: PLC0415
    import botocore.session  # noqa: PLC0415

    session = botocore.session.Session()
    try:
        region = session.get_config_variable("region") or "us-east-1"
        client = session.create_client(
            "s3",
            region_name=region,
            aws_access_key_id="x",
            aws_secret_access_key="x",  # noqa: S106
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise PipelineError(
            f"The AWS settings cannot be used: {' '.join(str(error).split())}; check AWS_PROFILE, AWS_ENDPOINT_URL, "
            "AWS_REGION and the files that AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE name"
        ) from None
    url = str(client.meta.endpoint_url)
    return ("" if re.search(r"\.amazonaws\.com(\.cn)?$", url) else url), str(region)


def _credentials() -> Any:
    """Credentials of the standard chain: environment, profile files, web identity, container, instance.

    Asked for by the library when those it has run out; they are held in memory and never told.
    """
    import botocore.exceptions  # noqa: PLC0415
    import botocore.session  # noqa: PLC0415

    try:
        found = botocore.session.Session().get_credentials()
        frozen = None if found is None else found.get_frozen_credentials()
    except (
        botocore.exceptions.BotoCoreError
    ) as error:  # of a process, a role or a profile that another one names
        raise PermissionError(errno.EACCES, f"{_FAILING_CREDENTIALS}: {error}{_END}") from None
    if frozen is None:
        raise PermissionError(errno.EACCES, _NO_CREDENTIALS)
    return {
        "access_key_id": frozen.access_key,
        "secret_access_key": frozen.secret_key,
        "token": frozen.token,
        "expires_at": datetime.now(UTC)
        + timedelta(minutes=10),  # those of a role change; asking costs little
    }


def asked(place: ObjectPath, ask: Callable[[], T]) -> T:
    """Ask a server, again after faults that pass, and say in one line what it did; missing objects stay missing.

    The library tries again what it knows to be harmless: no conditional PUT, no list of deletions, no second half of a
    body. All that is asked here may be asked twice.
    Raises OSError; and what a condition that is not met raises.
    """
    for pause_s in _pauses_s():
        try:
            return ask()
        except Exception as error:  # noqa: BLE001  the library's own classes; what is not, is raised
            give_up(place, error, last=pause_s is None)
        time.sleep(pause_s or 0.0)
    raise AssertionError


async def asked_async(place: ObjectPath, ask: Callable[[], Awaitable[T]]) -> T:
    """Do as `asked` does, for Zarr."""
    for pause_s in _pauses_s():
        try:
            return await ask()
        except Exception as error:  # noqa: BLE001  the library's own classes; what is not, is raised
            give_up(place, error, last=pause_s is None)
        await asyncio.sleep(pause_s or 0.0)
    raise AssertionError


def _pauses_s() -> Iterator[float | None]:
    """Seconds before the next attempt, growing, with jitter; None after the last one."""
    until = time.monotonic() + _RETRY_S
    for attempt in range(RETRIES):
        if time.monotonic() > until:
            break
        yield min(_BACKOFF_S * 2**attempt, _MAX_BACKOFF_S) * random.uniform(0.5, 1.0)  # noqa: S311
    yield None


def give_up(place: ObjectPath, error: Exception, *, last: bool) -> None:
    """Raise an error that another attempt does not mend, as an OSError of one line when it is a server's."""
    from obstore.exceptions import (  # noqa: PLC0415
        AlreadyExistsError,
        BaseError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )

    conditions = (FileNotFoundError, AlreadyExistsError, PreconditionError)
    if isinstance(error, conditions) or not isinstance(error, (BaseError, OSError)):
        raise error
    said = str(error)
    lasting = isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or re.search(
        r"status code: 4(?!08|09|29)\d\d", said
    )
    if last or lasting:
        denied = re.search(r"status code: 40[13]\b", said)
        number = errno.EACCES if denied else errno.EIO
        raise StorageError(number, f"Storage failed: {_brief(said)}", str(place)) from None


def _brief(said: str) -> str:
    """First line of what the library says, without the body of the answer and without any query."""
    line = " ".join(said.partition("Debug source")[0].split())
    code = re.search(r"<Code>([A-Za-z]+)</Code>", line)
    line = re.sub(r"\?[^ ]*", "", line.partition("<")[0]).strip(" :")
    return f"{line[:200]}{f' {code[1]}' if code else ''}"
