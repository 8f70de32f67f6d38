"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
import urllib3

ROOT = Path(__file__).resolve().parents[1]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # of a job that a shell put into the background; tests send it, to themselves and to commands that inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


# a busy machine is no failure, and equal code is tested by equal examples
hypothesis.settings.register_profile("slidecube", deadline=None, derandomize=True)
hypothesis.settings.load_profile("slidecube")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real fixtures beside the checkout; tests that read it skip where it is missing."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real fixtures (../shared/data) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated archive (3.6 km, four tiles of 512 px, six overpasses) with its truth; not to be changed."""
    from slidecube.pipeline.simulate import simulate_archive  # noqa: PLC0415  few tests need it

    root = tmp_path_factory.mktemp("small")
    simulate_archive(root, size="small", overpasses=6)
    return root


@pytest.fixture(scope="session")
def save_untrained() -> Callable[..., Path]:
    """Save a network with drawn weights, (folder, names, **settings) -> folder; equal settings give equal bytes."""
    import safetensors.torch  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from slidecube.models.architectures import build_network, complete_arguments  # noqa: PLC0415
    from slidecube.models.registry import save_network  # noqa: PLC0415
    from slidecube.pipeline.features import feature  # noqa: PLC0415

    def save(
        folder: Path,
        names: tuple[str, ...] = ("rdndvi", "slope_deg"),
        *,
        architecture: str = "resunet",
        arguments: dict[str, Any] | None = None,
        window_px: int = 64,
        margin_px: int = 8,
        seed: int = 0,
        **fields: Any,
    ) -> Path:
        small = {"width": 4, "depth": 2} if architecture == "resunet" else {}
        complete = {**complete_arguments(architecture, names, arguments), **small, **(arguments or {})}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build_network(architecture, len(names), complete)
            for statistic in (b for n, b in module.named_buffers() if n.endswith("running_mean")):
                statistic.normal_(0, 0.1)
        tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        name, _, version = folder.name.partition("@")
        card = {
            "name": name,
            "version": int(version or 1),
            "description": "drawn weights, of a test",
            "licence": "CC0-1.0",
            "inputs": {
                "names": names,
                "units": tuple(feature(n).unit for n in names),
                "mean": tuple(UNTRAINED.get(n, (0.0, 1.0))[0] for n in names),
                "std": tuple(UNTRAINED.get(n, (0.0, 1.0))[1] for n in names),
            },
            "architecture": {
                "name": architecture,
                "arguments": complete,
                "window_px": window_px,
                "margin_px": margin_px,
            },
            "output": {"threshold": 0.5, "min_area_m2": 2000.0},
            **fields,
        }
        save_network(folder, card, safetensors.torch.save(tensors))
        return folder

    return save


UNTRAINED = {"rdndvi": (0.0, 30.0), "slope_deg": (20.0, 10.0)}
"""Mean and standard deviation of features of a network that nobody trained."""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a real S3 server on this machine, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests" / "servers" / "s3.py"), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            assert server.poll() is None, "the S3 server ended"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a prefix in an empty bucket; the environment says how to get there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in (
        "AWS_PROFILE",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL_S3",
    ):
        monkeypatch.delenv(name, raising=False)
    bucket = f"bucket-{secrets.token_hex(6)}"
    urllib3.request("PUT", f"{s3_server}/{bucket}")
    return f"s3://{bucket}/some/where"


@pytest.fixture(scope="session")
def servers() -> Callable[[str], ModuleType]:
    """Import a module of tests/servers by its name."""

    def load(name: str) -> ModuleType:
        known = sys.modules.get(f"slidecube_test_servers_{name}")
        if known is not None:
            return known
        spec = importlib.util.spec_from_file_location(
            f"slidecube_test_servers_{name}", ROOT / "tests" / "servers" / f"{name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # a dataclass looks its own module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB that can be made larger or read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def slurm_server(servers: Callable[[str], ModuleType]) -> Iterator[Any]:
    """A real Slurm of two nodes on this machine, one for each test process that asks for it."""
    module = servers("slurm")
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(module.slurm())
        except module.SlurmMissingError as error:
            pytest.skip(str(error))
        yield server


@pytest.fixture
def slurm(slurm_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The same with its nodes up and its queue empty; the environment says where it is."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_server.configuration))
    yield slurm_server
    slurm_server.clear()


@pytest.fixture(scope="session")
def assert_same_work(servers: Callable[[str], ModuleType]) -> Callable[[Any, Any], None]:
    """Hold two workspaces, folders or buckets, to the same work: see `tests/servers/sameness.py`."""
    compare: Callable[[Any, Any], None] = servers("sameness").assert_same_work
    return compare


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line of `slidecube:` on the error stream; beside it stand at most lines of progress."""
        lines = [line for line in self.err.splitlines() if line.startswith("slidecube: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err, self.err
        return lines[0].removeprefix("slidecube: ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """A folder with a TOML over an archive, and a workspace of its own.

    sections : of the TOML; `write` changes them
    """

    folder: Path
    archive: Path
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def toml(self) -> Path:
        return self.folder / "small.toml"

    @property
    def workspace(self) -> Path:
        return self.folder / "ws"

    def write(self, **changes: dict[str, Any]) -> Desk:
        """Write the TOML with some keys of some sections changed; None removes a key."""
        for section, keys in changes.items():
            table = {**self.sections.get(section, {}), **keys}
            self.sections[section] = {key: value for key, value in table.items() if value is not None}
        self.toml.write_text(_toml(self.sections), encoding="utf-8")
        return self

    def start(self, *args: object, **popen: Any) -> subprocess.Popen[str]:
        """Start the real command line in a process group of its own."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("slidecube")), *map(str, args)],
            text=True,
            cwd=self.folder,
            start_new_session=True,
            **{**pipes, **popen},
        )

    def cli(self, *args: object, timeout_s: float = 180) -> Outcome:
        """Run the real command line to its end."""
        process = self.start(*args)
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return Outcome(code=process.returncode, out=out, err=err)

    def files(self, *folders: str) -> dict[str, bytes]:
        """Contents of all files below some folders of the workspace."""
        return {
            str(path.relative_to(self.workspace)): path.read_bytes()
            for folder in folders
            for path in sorted((self.workspace / folder).rglob("*"))
            if path.is_file()
        }

    def events(self) -> list[dict[str, Any]]:
        """Everything that was told of all runs, by run and line, without the halves that a killed driver left."""
        from slidecube.pipeline.events import read_events  # noqa: PLC0415  few tests need it

        found = sorted((self.workspace / "events").glob("*.jsonl"))
        return [event for path in found for event in read_events(path)]


def _toml(sections: dict[str, Any]) -> str:
    lines = []
    for name, table in sections.items():
        plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
        lines += [f"[[{name}]]" if name == "epoch" else f"[{name}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
        for key, inner in table.items():
            if isinstance(inner, dict):
                lines += [f"[{name}.{key}]", *(f"{k} = {json.dumps(v)}" for k, v in inner.items())]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def desk_in(small_archive: Path) -> Callable[..., Desk]:
    """Make desks: `desk_in(folder, archive=..., cube={"composite": "median"})`; the folder must be new."""

    def make(folder: Path, *, archive: Path | None = None, **changes: dict[str, Any]) -> Desk:
        folder.mkdir(parents=True)
        return _desk(folder, archive or small_archive).write(**changes)

    return make


def _desk(folder: Path, archive: Path) -> Desk:
    """A desk in a folder; the products are the table alone, which every test can afford."""
    sections = {
        "area": {"aoi": str(archive / "truth" / "area.geojson")},
        "epoch": {
            "name": "event",
            "pre": ["2018-05-01", "2018-09-05"],
            "post": ["2018-09-07", "2018-11-15"],
        },
        "sources": {
            "optical": str(archive / "archive" / "catalog.json"),
            "dem": str(archive / "archive" / "dem" / "collection.json"),
        },
        "cube": {"tile_px": 512, "bands": ["B02", "B03", "B04", "B08"]},
        "output": {"workspace": "ws", "formats": ["parquet"]},
        "cluster": {"profile": "threads"},
    }
    return Desk(folder=folder, archive=archive, sections=sections)


@pytest.fixture
def desk(desk_in: Callable[..., Desk], tmp_path: Path) -> Desk:
    """One desk over the small archive."""
    return desk_in(tmp_path / "desk")


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in this process, which is quicker than `Desk.cli`."""
    from slidecube.pipeline import cli  # noqa: PLC0415

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test's process keeps its own

    def run(*args: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Outcome(code=left.value.code, out=out, err=err)

    return run
