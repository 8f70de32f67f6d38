"""What is shipped is what is here, under one import name, and the rules of imports do refuse what breaks them."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

PACKAGES = ("catalog", "cluster", "models", "pipeline")


@pytest.fixture(scope="session")
def tree(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what would be committed, so that builds and violations touch nothing here."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=repo_root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    copy = tmp_path_factory.mktemp("tree")
    for name in listed:
        source, target = repo_root / name, copy / name
        if name.startswith(("tests/", "docs/")) or not (source.is_symlink() or source.is_file()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    return copy


@pytest.fixture(scope="session")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_every_file_of_the_packages(tree, wheel):
    here = {
        f"slidecube/{path.relative_to(tree).as_posix()}"
        for package in PACKAGES
        for path in (tree / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    shipped = {name for name in wheel.namelist() if name.startswith("slidecube/")}

    assert sorted(here - shipped) == [], (
        "add the folder to packages or the file to package-data in pyproject.toml"
    )
    assert sorted(shipped - here) == []


def test_the_wheel_puts_one_name_into_site_packages(wheel):
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"slidecube"}


def test_the_wheel_carries_licence_and_command(wheel):
    info = f"slidecube-{metadata.version('slidecube')}.dist-info"
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    assert "slidecube = slidecube.pipeline.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_a_new_folder_does_not_slip_out_of_the_wheel(tree):
    """Editable installs find any folder; the wheel only those that are listed."""
    listed = set(tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(("slidecube", *init.parent.relative_to(tree).parts))
        for package in PACKAGES
        for init in (tree / package).rglob("__init__.py")
    }

    assert folders == listed


@pytest.mark.parametrize("package", PACKAGES)
def test_bare_names_cannot_be_imported(package):
    assert importlib.util.find_spec(package) is None, (
        "run `pytest`, not `python -m pytest`, from the checkout"
    )
    assert importlib.util.find_spec(f"slidecube.{package}") is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_are_told(repo_root, wheel, package):
    link = repo_root / ".types" / "slidecube" / package

    assert link.is_symlink()
    assert link.resolve() == repo_root / package
    assert f"slidecube/{package}/py.typed" in wheel.namelist()


VIOLATIONS = {
    # the contract's name -> the module that breaks it, and how
    "catalog imports none of ours": ("catalog/grid.py", "import slidecube.pipeline.errors"),
    "models imports none of ours": ("models/errors.py", "from slidecube.catalog import grid"),
    "cluster imports none of ours": ("cluster/errors.py", "import slidecube.models.errors"),
    "torch is imported only in models": ("pipeline/keys.py", "import torch"),
    "distributed and dask-jobqueue are imported only in cluster": (
        "pipeline/errors.py",
        "import distributed",
    ),
    "pystac-client is imported only in catalog.search": ("catalog/aoi.py", "import pystac_client"),
    "stackstac is imported only in catalog.load": ("pipeline/config.py", "import stackstac"),
    "zarr is written only in pipeline": ("catalog/load.py", "import zarr"),
}


def test_import_rule_refuses_each_violation(tree, tmp_path):
    """One violation a contract, hidden in a function, in a copy: each contract must break, and none without it."""
    root = tmp_path / "copy"
    shutil.copytree(tree, root, symlinks=True)
    kept = _lint_imports(root)
    assert kept == dict.fromkeys(VIOLATIONS, "KEPT")

    for name, statement in VIOLATIONS.values():
        with (root / name).open("a") as file:
            file.write(f"\n\ndef _violation():\n    {statement}\n")

    assert _lint_imports(root) == dict.fromkeys(VIOLATIONS, "BROKEN")


def _lint_imports(root: Path) -> dict[str, str]:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"],
        cwd=root,
        env={"PYTHONPATH": str(root / ".types"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return dict(re.findall(r"^(.+?) (KEPT|BROKEN)\b", done.stdout, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("file", "statement", "rule"),
    [
        ("pipeline/run.py", "import models\n", "TID251"),
        ("models/zoo.py", "from catalog.grid import Tile\n", "TID251"),
        ("pipeline/run.py", "import dask.distributed\n", "TID251"),
        ("pipeline/run.py", "from odc.stac import load\n", "TID251"),
        ("pipeline/run.py", "from .keys import content_key\n", "TID252"),
    ],
)
def test_ruff_refuses_other_names_of_the_same_module(repo_root, file, statement, rule):
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ruff")),
            "check",
            "--stdin-filename",
            file,
            "--output-format",
            "concise",
            "-",
        ],
        cwd=repo_root,
        input=statement,
        capture_output=True,
        text=True,
        check=False,
    )

    assert rule in done.stdout


def test_mypy_follows_the_links(repo_root, tmp_path):
    """A type error across packages is found, so the links and the strict mode are at work."""
    probe = tmp_path / "probe.py"
    probe.write_text("from slidecube.cluster.limits import cores\n\nname: str = cores()\n")
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("mypy")),
            "--follow-imports=silent",
            f"--cache-dir={tmp_path}",
            str(probe),
        ],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
    )

    assert 'expression has type "int", variable has type "str"' in done.stdout


def test_pins_are_exact_and_name_no_address(repo_root):
    lines = (repo_root / "constraints.txt").read_text().splitlines()

    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[^\s/:]+( ; .+)?", line)] == []
    assert not any("://" in line for line in lines)


def test_every_dependency_is_pinned(repo_root):
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    names = declared(project, *project["optional-dependencies"])
    pinned = {line.split("==")[0] for line in (repo_root / "constraints.txt").read_text().splitlines()}

    assert sorted(names - pinned) == [], "run `make constraints`"


def test_every_import_is_declared(repo_root):
    """What is imported is in pyproject.toml: it would otherwise work only where something else happened to bring it."""
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    ours = declared(project, "nets", "gpu", "hpc", "kubernetes")
    tests, benchmarks = declared(project, "dev"), declared(project, "dev", "bench")
    homes = metadata.packages_distributions()
    undeclared = set()
    for package in (*PACKAGES, "tests"):
        for path in (repo_root / package).rglob("*.py"):
            beside = {
                sibling.stem for sibling in path.parent.glob("*.py")
            }  # a benchmark uses another's nation
            for name in top_level_imports(path) - set(sys.stdlib_module_names) - beside - {"slidecube"}:
                found = {home.lower().replace("_", "-") for home in homes.get(name, [name])}
                allowed = benchmarks if "benchmarks" in path.parts else tests if package == "tests" else ours
                if not found & allowed:
                    undeclared.add(f"{path.relative_to(repo_root)} imports {name}")

    assert sorted(undeclared) == []


def declared(project, *extras):
    """Names of what a plain installation and some extras bring; an extra may bring another."""
    wanted = [
        *project["dependencies"],
        *(d for name in extras for d in project["optional-dependencies"][name]),
    ]
    names = set()
    for want in wanted:
        if own := re.fullmatch(r"slidecube\[([a-z,]+)\]", want):
            names |= declared(project, *own[1].split(","))
        else:
            names.add(re.split(r"[\[<>=~! ]", want)[0].lower().replace("_", "-"))
    return names


def top_level_imports(path: Path) -> set[str]:
    """Names of the packages that a file imports at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_rasters_are_written_only_in_pipeline(repo_root):
    """`catalog` ends at a lazy cube: it opens rasters to read, and stores none."""
    for package in ("catalog", "models", "cluster"):
        for path in (repo_root / package).rglob("*.py"):
            found = re.findall(
                r"\.(?:to_zarr|to_raster|to_netcdf)\(|rasterio\.open\([^)]*[\"'][wa]\+?[\"']",
                path.read_text(),
            )
            assert found == [], path


@pytest.mark.parametrize("module", ["slidecube.pipeline.status", "slidecube.pipeline.run"])
def test_what_few_need_is_imported_when_needed(module):
    """Every worker and every look at a workspace would wait for them."""
    asked = f"import sys, {module}; print(*{{'stackstac', 'matplotlib', 'torch'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
