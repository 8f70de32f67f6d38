"""What the documents tell people to type exists, and the quick ones work; their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from slidecube.pipeline.cli import cli

ROOT = Path(__file__).resolve().parents[2]

DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)

QUICK = {("slidecube", "init"), ("slidecube", "doctor"), ("slidecube", "--version"), ("slidecube", "--help")}


def commands(document: str) -> list[list[str]]:
    blocks = re.findall(
        r"^```console\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line, comments=True) for line in lines]


ALL = [(document, command) for document in DOCUMENTS for command in commands(document)]


def test_the_readme_gives_commands():
    assert ["make", "demo"] in commands("README.md")
    assert ["make", "test"] in commands("README.md")


@pytest.mark.parametrize(("document", "command"), ALL, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_every_command_exists(document, command):
    known = {"make": check_make, "slidecube": check_slidecube}
    assert command[0] in known, f"{document} names {command[0]!r}, which no test knows"
    known[command[0]](command[1:])


def check_make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for argument in arguments:
        assert argument in targets or re.match(r"[A-Z_]+=", argument), (
            f"the Makefile has no target {argument!r}"
        )


def check_slidecube(arguments: list[str]) -> None:
    if arguments[0].startswith("-"):
        assert arguments[0] in {"--version", "--help"}
        return
    verb = cli.commands.get(arguments[0])
    assert verb is not None, f"slidecube has no verb {arguments[0]!r}"
    # parsing refuses unknown options and a wrong number of arguments
    try:
        verb.make_context(arguments[0], arguments[1:], resilient_parsing=False).close()
    except click.exceptions.Exit:
        assert "--help" in arguments


@pytest.mark.parametrize(
    "command", [c for c in sorted({tuple(command) for _, command in ALL}) if c[:2] in QUICK], ids=" ".join
)
def test_the_quick_ones_work(command, tmp_path):
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    missing = [
        target
        for target in re.findall(r"!?\[[^\]]*\]\(([^)#\s]+)[^)]*\)", text)
        if "://" not in target and not ((ROOT / document).parent / target).exists()
    ]

    assert missing == []
