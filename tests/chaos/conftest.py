"""What all chaos is held to: a run that nobody disturbed."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slidecube.pipeline.ledger import VOLATILE
from slidecube.pipeline.status import status
from slidecube.pipeline.tasks import FIT_STAGES

FORMATS = {"formats": ["parquet", "gpkg", "cog", "stac"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """A run that nobody disturbed, and how another one is held to it.

    desk : of that run; span_s : from its first file to its last; scene_reads : what it read
    settings : under which a desk does the same work
    """

    desk: Any
    span_s: float
    scene_reads: int
    settings: dict[str, Any]

    @staticmethod
    def cluster(profile: str) -> dict[str, Any]:
        """Section of a desk for a profile, with two workers where it has processes."""
        wide = {"workers": 2, "mem_gb": 4.0} if profile == "dask-local" else {}
        return {"profile": profile, **wide}

    @staticmethod
    def started(desk: Any, **popen: Any) -> tuple[subprocess.Popen[str], float]:
        """Start a run, and wait until it has begun to plan: what comes before leaves nothing behind."""
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = desk.start("run", desk.toml, "--quiet", **{**pipes, **popen})
        while not (desk.workspace / "locks").exists() and process.poll() is None:
            time.sleep(0.01)
        return process, time.monotonic()

    @staticmethod
    def status(desk: Any) -> dict[str, Any]:
        """What `slidecube status` says."""
        return status(desk.workspace)

    @staticmethod
    def records(desk: Any) -> dict[str, bytes]:
        """The finished records as they lie on the disk."""
        found = desk.files("layers", "inventories")
        return {
            name: text
            for name, text in found.items()
            if name.endswith(".json") and ".ledger/" in name and json.loads(text)["state"] != "failed"
        }

    @staticmethod
    def told(desk: Any) -> Counter[tuple[str, ...]]:
        """How often each task was told to be done."""
        return Counter(
            (e["layer"], e["epoch"], e["tile"], e["key"])
            for e in desk.events()
            if e["event"] == "task" and e["status"] != "failed" and e["stage"] not in FIT_STAGES
        )

    def assert_told_once(self, desk: Any) -> None:
        """Each task was done once, and told once, whoever was killed before telling.

        A fit's tasks are told once or, where their driver died before, not at all: nobody counts scenes by them.
        """
        fit = [
            (e["stage"], e["tile"], e["key"])
            for e in desk.events()
            if e.get("stage") in FIT_STAGES and "tile" in e
        ]
        assert len(fit) == len(set(fit))
        told = self.told(desk)
        assert told
        assert {task: n for task, n in told.items() if n != 1} == {}
        assert len(told) == len(self.records(desk))

    def assert_same(self, desk: Any, reference: Any = None) -> None:
        """Every array, record, object and file name as if nothing had happened. reference : another desk than ours."""
        reference = reference or self.desk
        for folders in (("layers",), ("statistics",), ("inventories",)):
            found, expected = desk.files(*folders), reference.files(*folders)
            assert sorted(found) == sorted(expected)
            for name, data in expected.items():
                if ".ledger/" in name:
                    assert _lasting(found[name]) == _lasting(data), name
                else:
                    assert found[name] == data, name
        found, expected = desk.files("products", "plans"), reference.files("products", "plans")
        assert sorted(found) == sorted(expected)
        exact = [name for name in expected if name.endswith((".parquet", ".tif", ".qml"))]
        assert any(name.endswith("landslides.parquet") for name in exact)
        assert not [name for name in exact if found[name] != expected[name]]
        assert not list(desk.workspace.rglob("*.partial"))
        assert not list((desk.workspace / "locks").glob("*.json"))

    def assert_whole(self, desk: Any) -> None:
        """Complete, the same work, told once, and every scene that was read is counted once."""
        state = self.status(desk)
        assert state["complete"], state
        assert state["running"] is None
        self.assert_same(desk)
        self.assert_told_once(desk)
        assert state["scene_reads"] == sum(e.get("scene_reads", 0) for e in desk.events())
        assert state["scene_reads"] == self.scene_reads > 0


def _lasting(record: bytes) -> dict[str, object]:
    return {key: value for key, value in json.loads(record).items() if key not in VOLATILE}


@pytest.fixture(scope="session")
def witness(desk_in, tmp_path_factory):
    """A run that nobody disturbed, on threads."""
    desk = desk_in(tmp_path_factory.mktemp("undisturbed") / "desk", output=FORMATS)
    process, began = Witness.started(desk)
    assert process.wait(120) == 0
    span_s = time.monotonic() - began
    reads = Witness.status(desk)["scene_reads"]
    return Witness(desk=desk, span_s=span_s, scene_reads=reads, settings={"output": FORMATS})


@pytest.fixture
def sabotage(tmp_path, monkeypatch) -> Path:
    """File with the key of the tile that is sabotaged, in processes that start from now on; without it none is."""
    hook = tmp_path / "hook"
    hook.mkdir()
    shutil.copy(Path(__file__).parent / "hooks" / "sabotage.py", hook / "sitecustomize.py")
    monkeypatch.setenv("PYTHONPATH", str(hook))
    monkeypatch.setenv("SABOTAGE", str(tmp_path / "sabotage"))
    return tmp_path / "sabotage"
