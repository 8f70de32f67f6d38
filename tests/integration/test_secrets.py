"""No signature, token or key of a run lies anywhere afterwards, and no item of a hostile catalogue does anything."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from slidecube.catalog.scenes import SceneTable
from slidecube.pipeline import storage
from slidecube.pipeline.open import open_plan
from slidecube.pipeline.storage import place_of

OLD_SIGNATURE = "0ldSignatureInTheCatalogue"
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "sEsSiOnToKeNoFtHeRuN",
    "PC_SDK_SUBSCRIPTION_KEY": "sUbScRiPtIoNkEy",
}
ALL_FORMATS = ["parquet", "gpkg", "cog", "stac", "report"]


def said_in(path: Path) -> bytes:
    """All that a file says: its bytes, the rows and metadata of a table, and what lies compressed in it."""
    raw = path.read_bytes()
    parts = [raw]
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        parts += [repr(table.to_pylist()).encode(), repr(table.schema.metadata).encode()]
        parts += [repr(f.metadata).encode() for f in table.schema]
    for start in (m.start() for m in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x9c\xda]", raw[:2_000_000])):
        try:
            parts.append(zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(raw[start:]))
        except zlib.error:
            continue
    return b"\n".join(parts)


def found_in(folder: Path, secrets: list[str]) -> dict[str, list[str]]:
    """File -> the secrets that it tells."""
    told = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            said = said_in(path)
            if here := [s for s in secrets if s.encode() in said]:
                told[str(path.relative_to(folder))] = here
    return told


def test_the_search_for_secrets_finds_them(tmp_path):
    (tmp_path / "plain.json").write_text('{"href": "https://x/y.tif?sig=' + OLD_SIGNATURE + '"}')
    (tmp_path / "packed.bin").write_bytes(b"head" + gzip.compress(OLD_SIGNATURE.encode()))
    (tmp_path / "deflated.bin").write_bytes(b"head" + zlib.compress(OLD_SIGNATURE.encode()))
    (tmp_path / "clean.txt").write_text("nothing")
    assert found_in(tmp_path, [OLD_SIGNATURE]).keys() == {"plain.json", "packed.bin", "deflated.bin"}


def test_a_whole_run_tells_no_secret(servers, small_archive, desk_in, s3, tmp_path):
    """Signatures in the catalogue and given in mid-run, keys by which the workspace is reached, files that fail."""
    module = servers("signed_files")
    provider = module.SignedFiles(small_archive / "archive" / "sentinel-2-l2a", life_s=3.0)
    saved = module.publish(small_archive, tmp_path, query=f"?se=2019-01-01&sig={OLD_SIGNATURE}")
    provider.broken = {
        "S2A_SIMULATED_T32NKF_20180926T100031_N0500/B04": 404,
        "S2B_SIMULATED_T32NLF_20180901T100031_N0208/B08": 403,
    }
    environment = {**os.environ, **provider.environment, **KEYS, "CPL_DEBUG": "OFF"}
    desk = desk_in(
        tmp_path / "desk", sources={"optical": str(saved)}, output={"workspace": s3, "formats": ALL_FORMATS}
    )
    said = ""
    try:
        for words in (("plan", desk.toml), ("run", desk.toml), ("status", s3)):
            process = desk.start(*words, env=environment)
            out, err = process.communicate(timeout=300)
            said += out + err
            assert process.returncode == 0, err
    finally:
        provider.close()
    assert provider.refused, "no signature was ever refused: its errors were not seen"
    with storage.fetched(place_of(s3)) as workspace:
        assert_clean(workspace, said, [OLD_SIGNATURE, module.WORD, *KEYS.values()])


def assert_clean(workspace: Path, said: str, secrets: list[str]) -> None:
    lost = [
        entry
        for path in workspace.glob("layers/*/*.ledger/*.json")
        for entry in json.loads(path.read_text()).get("lost", [])
    ]
    assert {asset for _, asset, _ in lost} == {"B04", "B08"}, "no file failed: its errors were not seen"
    assert [secret for secret in secrets if secret in said] == []
    assert found_in(workspace, secrets) == {}
    assert all("?" not in a["href"] for s in open_plan(workspace).scenes for a in s.item["assets"].values())


# --- a hostile catalogue ---------------------------------------------------------------------------------------------

SCRIPT = '</script><script>alert("h0stile")</script><img src=x onerror=alert(1)>'
NAMES = ("../../../escaped", "/etc/passwd", SCRIPT, "..\\..\\x", "a'b\"c")


@pytest.fixture
def hostile(small_archive, tmp_path):
    """The archive, whose items say hostile things wherever text is free, under ids that look like paths and tags."""
    root = tmp_path / "hostile"
    shutil.copytree(small_archive, root)
    names = set()
    for n, path in enumerate(sorted((root / "archive" / "sentinel-2-l2a").glob("*/*.json"))):
        item = json.loads(path.read_text())
        item["id"] = f"{NAMES[n % len(NAMES)]}{n}"
        names.add(item["id"])
        item["properties"] |= {"title": SCRIPT, "description": SCRIPT, SCRIPT: SCRIPT, "../../x": "../../x"}
        path.write_text(json.dumps(item))
    return root, names


def test_hostile_names_and_texts_do_nothing(hostile, desk_in, tmp_path):
    archive, names = hostile
    before = {path for path in tmp_path.rglob("*") if "hostile" in path.parts}
    desk = desk_in(tmp_path / "outer" / "inner" / "desk", archive=archive, output={"formats": ALL_FORMATS})
    outcome = desk.cli("run", desk.toml)
    assert outcome.code == 0, outcome.err
    scenes = open_plan(desk.workspace).scenes
    assert {scene.id for scene in scenes.role("optical")} <= names
    table = SceneTable.read_parquet(next(desk.workspace.glob("plans/*/scenes.parquet")))
    assert table == scenes

    outside = {path for path in tmp_path.rglob("*") if desk.workspace not in (path, *path.parents)}
    own = {desk.toml, desk.folder, *desk.folder.parents}
    assert outside - before - own == set(), "something was written beside the workspace"
    assert not list(desk.workspace.rglob("*escaped*")) + list(desk.workspace.rglob("*h0stile*"))
    for page in desk.workspace.glob("products/*/report/**/*"):
        if page.suffix in (".html", ".js", ".svg"):
            assert '<script>alert("h0stile' not in page.read_text(), page
            assert "<img src=x" not in page.read_text(), page
