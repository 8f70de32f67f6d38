"""docs/add-a-model.md is done as it says: its file, its line, its card, and every command, in order."""

from __future__ import annotations

import re
import shlex
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from slidecube.models import architectures
from slidecube.models.registry import held_in
from slidecube.pipeline.config import load_config
from slidecube.pipeline.plan import plan


@pytest.fixture
def page(repo_root):
    text = (repo_root / "docs" / "add-a-model.md").read_text(encoding="utf-8")

    def blocks(language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)

    return blocks


@pytest.fixture
def reader(page, tmp_path, monkeypatch):
    """A reader who has done sections 1 and 2, and has weights, a card and somebody's ONNX in the folder."""
    the_file, the_builder, the_row = page("python")
    module = types.ModuleType("slidecube.models.nets.plain")
    exec(compile(the_file, "plain.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    line = {"Architecture": architectures.Architecture}
    text = f"from __future__ import annotations\n{the_builder}\nROWS = {{{the_row}}}"
    exec(compile(text, "architectures.py", "exec"), line)
    monkeypatch.setitem(architectures.ARCHITECTURES, "plain", line["ROWS"]["plain"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIDECUBE_MODELS", str(tmp_path / "mine"))
    network = module.plain(2, width=8)
    torch.save({"model": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "plain.pt")
    (tmp_path / "card.toml").write_text(page("toml")[0], encoding="utf-8")
    theirs = nn.Sequential(nn.Conv2d(2, 1, 5, padding=2), nn.Sigmoid()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(theirs, (torch.zeros(1, 2, 64, 64),), tmp_path / "theirs.onnx", dynamo=False)
    return tmp_path


def test_every_command_does_what_the_page_says(page, reader, command, desk):
    said = {}
    for line in (
        line[2:] for block in page("console") for line in block.splitlines() if line.startswith("$ ")
    ):
        words = shlex.split(line)
        assert words[0] == "slidecube"
        done = command(*words[1:])
        assert (done.code, done.err) == (0, ""), f"{line}: {done.err}"
        said[line] = done.out

    assert held_in(reader / "mine") == ("plain@1", "plain-2@1", "theirs@1")
    assert "plain " in said["slidecube models architectures"]
    assert "took 'module.' off" in said["slidecube models import plain.pt --card card.toml"]
    assert "simulated" in said["slidecube models list"]
    assert said["slidecube models verify ./plain-for-you"].startswith("ok ")
    assert (reader / "plain-for-you.stac.json").is_file()

    # section 5: the table of the page, and its two comments
    table = page("toml")[1]
    assert 'model = "plain@1"' in table
    made = plan(load_config(desk.write(detect={"model": "plain@1"}).toml))
    assert (desk.workspace / "models" / "plain@1" / "card.toml").is_file()
    assert made.model.card == made.card
    both = plan(load_config(desk.write(detect={"model": ["plain@1", "theirs@1"]}).toml))
    assert both.card.name.startswith("mean-")
    assert {layer.key for layer in both.layers} == {layer.key for layer in made.layers}
