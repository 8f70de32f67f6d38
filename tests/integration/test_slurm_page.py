"""The page for Slurm, typed line by line as a new user would, on a Slurm of two nodes with a simulated archive."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "deploy" / "slurm.md"


def typed() -> list[str]:
    """What the page says to type, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines()]


def profile() -> str:
    """The page's profile, as a user of these two small nodes would change it."""
    (text,) = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    text = text.replace('["module load python/3.11"]', "[]").replace('"cpu"', '"normal"')
    text = re.sub(r"^(cpus|mem_gb|shards) = .*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^(\[array\.\w+\].*)", r"\1\ncpus = 1\nmem_gb = 3\nshards = 2", text, flags=re.MULTILINE)


def edit(toml: Path, archive: Path) -> None:
    """Change what `init` wrote: an archive of our own in place of the search, and small tiles."""
    text = toml.read_text()
    for old, new in {
        r"^bbox = .*": f'aoi = "{archive}/truth/area.geojson"',
        r"^# optical = .*": f'optical = "{archive}/archive/catalog.json"',
        r"^# dem = .*": f'dem = "{archive}/archive/dem/collection.json"',
        r"^# tile_px = .*": "tile_px = 512",
    }.items():
        text, n = re.subn(old, new, text, flags=re.MULTILINE)
        assert n == 1, old
    toml.write_text(text)


def test_the_page_leads_from_a_clone_to_the_products(slurm, small_archive, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    clone, own = tmp_path / "clone", tmp_path / "config" / "slidecube" / "profiles"
    clone.mkdir()
    (clone / ".venv").symlink_to(sys.prefix)
    own.mkdir(parents=True)
    (own / "mysite.toml").write_text(profile())
    lines = typed()
    assert [line.split()[0] for line in lines[:2]] == ["python3", ".venv/bin/pip"], "the environment is there"
    verbs = []

    for line in lines[2:]:
        done = subprocess.run(
            ["bash", "-c", line], cwd=clone, env=dict(os.environ), capture_output=True, text=True, check=False,
            timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        verbs.append(line.split()[1])
        if verbs[-1] == "init":
            edit(clone / "hokkaido.toml", small_archive)

    assert verbs == ["doctor", "cluster", "init", "plan", "submit", "submit", "status"]
    slurm.wait(timeout_s=400)
    logs = [path.read_text()[-1000:] for path in clone.glob("workspace/submits/*/*/logs/*.log")]
    assert {job["state"] for job in slurm.jobs()} <= {"COMPLETED", "CANCELLED"}, logs
    said = subprocess.run(
        ["bash", "-c", lines[-1]], cwd=clone, capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout.splitlines()[-1] == "complete", (said.stdout, logs)
    (table,) = clone.glob("workspace/products/*/landslides.parquet")
    assert table.stat().st_size
    assert shutil.which("sbatch")
