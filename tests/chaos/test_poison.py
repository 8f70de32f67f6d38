"""A tile that ends its worker each time, and one that never ends: they are given up, and the rest is done.

The sabotage comes from outside, when a worker's process imports the product.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("how", "attempts", "said"),
    [
        ("kill", 3, "its worker died 3 times, each time alone with this tile"),
        pytest.param(
            "hang", 2, "2 times, and its worker was ended; raise deadline_min", marks=pytest.mark.slow
        ),
    ],
)
def test_a_poisoned_tile(desk_in, tmp_path, witness, sabotage, monkeypatch, how, attempts, said):
    monkeypatch.setenv("SABOTAGE_HOW", how)
    deadline = {"deadline_min": 0.25} if how == "hang" else {}
    cluster = {**witness.cluster("dask-local"), **deadline}
    desk = desk_in(tmp_path / "desk", cluster=cluster, **witness.settings)
    tile = min(Path(name).stem for name in witness.records(witness.desk))
    sabotage.write_text(tile)

    spoilt = desk.cli("run", desk.toml, "--quiet")

    assert spoilt.code == 2, spoilt
    assert tile in spoilt.refusal
    taken = sabotage.with_suffix(".taken").read_text().split()
    assert len(taken) == len(set(taken)) == attempts, "it went to a worker that lived on"
    assert not [pid for pid in taken if Path(f"/proc/{pid}").exists() and int(pid) != os.getpid()]
    state = witness.status(desk)
    assert [f["tile"] for f in state["failures"] if f["stage"] == "cube"] == [tile]
    assert said in state["failures"][0]["reason"]
    assert state["tiles"]["cube"]["failed"] == 1
    assert state["tiles"]["cube"]["due"] == 0, "the rest is done"
    retries = [e for e in desk.events() if e["event"] == "retry"]
    assert {e["tile"] for e in retries} == {tile}
    assert len(retries) == attempts - 1
    assert list(desk.workspace.glob("products/*/landslides.parquet")), "what could be detected is there"

    sabotage.unlink()
    last = desk.cli("run", desk.toml, "--quiet")

    assert last.code == 0, last
    assert [e["tile"] for e in desk.events() if e["event"] == "task" and e["stage"] == "cube"].count(
        tile
    ) >= 2
    state = witness.status(desk)
    assert state["complete"]
    witness.assert_same(desk)
