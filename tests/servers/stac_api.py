"""A full STAC API on this machine: stac-fastapi-pgstac on PostgreSQL with PostGIS, in a folder of its own.

Everything listens on loopback at free ports and ends by its process id. The Python packages live in an environment of
their own, since they pin what our environment pins otherwise.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("postgresql-15", "postgresql-15-postgis-3")
_BIN = Path("/usr/lib/postgresql/15/bin")
_POSTGIS = Path("/usr/share/postgresql/15/extension/postgis.control")
_REQUIREMENTS = Path(__file__).with_name("stac_api_requirements.txt")
_START_S = 30.0


class CannotStart(Exception):
    """What the server needs is not on this machine and cannot be put there; the message says what."""


@dataclass
class StacApi:
    """A running STAC API.

    folder : of the database and the logs; python : of the environment of its packages
    database : PostgreSQL's variables
    """

    folder: Path
    python: Path
    database: dict[str, str]
    port: int
    process: subprocess.Popen[bytes] | None = None
    _log: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the API at its port, and wait until it answers."""
        assert self.process is None
        program = [
            self.python, "-m", "uvicorn", "--factory", "stac_fastapi.pgstac.app:create_app",
            "--host", "127.0.0.1", "--port", str(self.port), "--log-level", "warning",
        ]  # fmt: skip
        environment = _without_ours() | self.database | {"DB_MIN_CONN_SIZE": "1", "DB_MAX_CONN_SIZE": "2"}
        self.process = _start(program, self.folder / "api.log", environment)
        _await(lambda: _answers(f"{self.url}/_mgmt/ping"), self.process, self.folder / "api.log")

    def kill(self) -> None:
        """End the API at once, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self.process = None

    def load(self, collection: dict[str, Any], items: Iterable[dict[str, Any]]) -> None:
        """Put a collection and its items into the database."""
        for table, documents in (("collections", [collection]), ("items", items)):
            path = self.folder / f"{table}.ndjson"
            path.write_text("".join(json.dumps(document) + "\n" for document in documents))
            _run(
                [self.python.with_name("pypgstac"), "load", table, path, "--method", "insert"], self.database
            )


@contextmanager
def stac_api() -> Iterator[StacApi]:
    """Start an empty STAC API, and end it with all its processes.

    Raises CannotStart where packages of the system are missing and cannot be installed.
    """
    _require_system_packages()
    folder = Path(tempfile.mkdtemp(prefix="stac-api-"))
    database: subprocess.Popen[bytes] | None = None
    api: StacApi | None = None
    try:
        python = _environment(folder / "venv")
        port = _free_port()
        variables = {
            "PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "stac", "PGPASSWORD": "stac",
            "PGDATABASE": "postgres", "PGSSLMODE": "disable",
        }  # fmt: skip
        database = _start_database(folder / "database", port)
        _run([python.with_name("pypgstac"), "migrate"], variables)
        api = StacApi(folder=folder, python=python, database=variables, port=_free_port())
        api.start()
        yield api
    finally:
        if api is not None and api.process is not None:
            api.kill()
        if database is not None:
            database.send_signal(signal.SIGINT)  # closes its connections, and its own processes
            database.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _require_system_packages() -> None:
    if (_BIN / "postgres").exists() and _POSTGIS.exists():
        return
    names = " ".join(PACKAGES)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise CannotStart(
            f"the packages {names} are not installed, and only root can install them by apt-get"
        )
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    for command in (["apt-get", "update", "-qq"], install):
        done = subprocess.run(
            command,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise CannotStart(f"apt-get cannot install {names}: {done.stderr.decode()[-200:]}")


def _environment(folder: Path) -> Path:
    uv = Path(sys.executable).with_name("uv")
    python = folder / "bin" / "python"
    _run([uv, "venv", "--quiet", "--python", sys.executable, folder])
    _run([uv, "pip", "install", "--quiet", "--python", python, "-r", _REQUIREMENTS])
    return python


def _start_database(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Make a cluster and start it; as root by its own user, since PostgreSQL refuses to be root."""
    folder.mkdir()
    before: list[str] = []
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        folder.parent.chmod(0o711)
        before = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]
    data = folder / "data"
    _run([*before, _BIN / "initdb", "-D", data, "-A", "trust", "-U", "stac", "-E", "UTF8", "--no-sync"])
    options = {
        "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "max_connections": "20",
    }  # fmt: skip
    settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    program = [*before, _BIN / "postgres", "-D", data, "-p", str(port), *settings]
    process = _start(program, folder.parent / "database.log", _without_ours())
    ready = [_BIN / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    _await(
        lambda: subprocess.run(ready, check=False).returncode == 0, process, folder.parent / "database.log"
    )
    return process


def _without_ours() -> dict[str, str]:
    """The environment without what a developer's shell may say of PostgreSQL or Python."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PG", "POSTGRES", "PYTHON"))}


def _run(command: list[Any], variables: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        env=_without_ours() | (variables or {}),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"


def _start(command: list[Any], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            [str(word) for word in command], env=environment, stdout=out, stderr=out, cwd="/"
        )


def _await(ready: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _START_S
    while not ready():
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < until, f"not ready within {_START_S:.0f} s: {log.read_text()[-2000:]}"
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
