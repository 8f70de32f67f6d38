"""The command line as a user meets it: verbs, one line an error, exit codes."""

from __future__ import annotations

import errno
import importlib
import json
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from slidecube.catalog.errors import AssetReadError, CatalogError, OffsetError
from slidecube.cluster.errors import ClusterError
from slidecube.models.errors import ModelError
from slidecube.pipeline import cli, doctor
from slidecube.pipeline.config import load_config
from slidecube.pipeline.errors import IncompleteError, PipelineError
from slidecube.pipeline.storage import StorageError

VERBS = [
    "init",
    "plan",
    "run",
    "status",
    "cube",
    "fit",
    "detect",
    "mosaic",
    "submit",
    "train",
    "evaluate",
    "publish",
    "report",
    "simulate",
    "demo",
    "cluster",
    "features",
    "models",
    "doctor",
    "clean",
]


@pytest.fixture
def slidecube(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command line here: exit code, output, errors."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test's process keeps its own

    def _run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return _run


def refused(outcome: tuple[int, str, str], code: int) -> str:
    """The one line of a refusal."""
    assert outcome[0] == code, outcome
    lines = outcome[2].lstrip("\n").splitlines()  # after Ctrl-C a new line ends the terminal's "^C"
    assert len(lines) == 1, outcome[2]
    assert lines[0].startswith("slidecube: ")
    return lines[0].removeprefix("slidecube: ")


def test_help_lists_the_verbs_in_the_order_of_the_work(slidecube):
    code, out, _ = slidecube("--help")

    assert code == 0
    assert re.findall(r"^  ([a-z]+)  ", out.split("Commands:")[1], flags=re.MULTILINE) == VERBS
    assert "..." not in out.split("Commands:")[1], "a verb's line is cut off"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(slidecube, verb):
    code, out, err = slidecube(verb, "--help")

    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: slidecube {verb}")


def test_version_is_the_distributions(slidecube):
    assert slidecube("--version") == (0, f"slidecube {metadata.version('slidecube')}\n", "")


def test_version_waits_for_no_library():
    probe = "import sys, slidecube.pipeline.cli; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    ).stdout.split()

    assert {"click", "slidecube"} <= set(loaded)
    assert not {"dask", "numpy", "odc", "pandas", "pydantic", "rasterio", "torch", "xarray", "zarr"} & set(
        loaded
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run"], "Missing argument 'FILE' (see `slidecube run --help`)"),
        (["run", "x.toml", "--fast"], "No such option '--fast'"),
        (["demo", "--out", "d", "--seed", "one"], "'one' is not a valid integer"),
        (["plan", "missing.toml"], "missing.toml: no such file"),
        (["status", "no-workspace"], "not a workspace"),
        (["clean", "no-workspace"], "not a workspace"),
        *(
            ([*verb, address, *rest], f"Address '{address}' is neither a folder nor an s3://bucket/prefix")
            for verb, rest in (
                (["status"], []),
                (["clean"], []),
                (["report"], []),
                (["evaluate"], ["t.geojson"]),
            )
            for address in ("http://x/y", "s3://")
        ),
    ],
)
def test_user_errors_are_one_line_and_code_1(slidecube, tmp_path, monkeypatch, args, expected):
    monkeypatch.chdir(tmp_path)

    assert expected in refused(slidecube(*args), 1)
    assert list(tmp_path.iterdir()) == [], "a refusal leaves nothing behind"


def wrapped(cause: Exception) -> Exception:
    error = RuntimeError("the library's own words")
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "/data/x")
QUOTA = OSError(errno.EDQUOT, "Disk quota exceeded")
READ_ONLY = OSError(errno.EROFS, "Read-only file system", "/w")
NO_ANSWER = StorageError(errno.EIO, "Storage failed: 503", "s3://b/k")
DENIED = StorageError(errno.EACCES, "Storage failed: 403", "s3://b/k")
STALE = OSError(errno.ESTALE, "Stale file handle", "/w/x")
FORBIDDEN = PermissionError(errno.EACCES, "Permission denied", "/w")
ANSWERS = "when the storage answers again, run the same command to resume"
MAKE_ROOM = "free some space and run the same command to resume"

ENDINGS = {
    "catalog": (CatalogError("no scene"), 1, "no scene"),
    "asset": (
        AssetReadError("S2A_X", "red", "truncated"),
        1,
        "Cannot read asset 'red' of item 'S2A_X': truncated",
    ),
    "offset": (OffsetError("which offset?"), 1, "which offset?"),
    "model": (ModelError("no model"), 1, "no model"),
    "cluster": (ClusterError("no profile"), 1, "no profile"),
    "pipeline": (PipelineError("over\n  two lines."), 1, "over two lines"),
    "an ellipsis": (
        PipelineError("write gdal_edit.py -a_srs EPSG:..."),
        1,
        "write gdal_edit.py -a_srs EPSG:...",
    ),
    "incomplete": (IncompleteError("3 tiles failed"), 2, "3 tiles failed"),
    "full disk": (FULL, 2, f"/data/x: No space left on device; {MAKE_ROOM}"),
    "full disk, wrapped": (wrapped(FULL), 2, f"/data/x: No space left on device; {MAKE_ROOM}"),
    "quota": (QUOTA, 2, f"Disk quota exceeded; {MAKE_ROOM}"),
    "read-only": (READ_ONLY, 1, "/w: Read-only file system; name a folder that you may write to"),
    "forbidden": (FORBIDDEN, 1, "/w: Permission denied; name a folder that you may write to"),
    "no answer": (NO_ANSWER, 2, f"s3://b/k: Storage failed: 503; {ANSWERS}"),
    "stale": (STALE, 2, f"/w/x: Stale file handle; {ANSWERS}"),
    "denied": (
        DENIED,
        1,
        "s3://b/k: Storage failed: 403; check the credentials and their rights to list, read, write and delete",
    ),
    "memory": (
        MemoryError(),
        2,
        "out of memory; lower workers in [cluster] or tile_px in [cube] and run again",
    ),
    "interrupt": (KeyboardInterrupt(), 130, "stopped; run the same command to resume"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_errors_end_in_one_place(slidecube, monkeypatch, ending):
    error, code, line = ENDINGS[ending]

    def fail():
        raise error

    monkeypatch.setattr(doctor, "checks", fail)

    assert refused(slidecube("doctor"), code) == line


def test_a_bug_is_70_and_leaves_its_traceback(slidecube, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(doctor, "checks", lambda: {}["tile"])

    line = refused(slidecube("doctor"), 70)

    where = Path(line.split("traceback in ")[1])
    assert "KeyError: 'tile'" in line
    assert where.parent == tmp_path
    assert where.read_text().rstrip().endswith("KeyError: 'tile'")


@pytest.mark.parametrize("args", [("--debug", "doctor"), ("doctor", "--debug")])
def test_debug_shows_the_traceback(slidecube, monkeypatch, args):
    def fail():
        raise PipelineError("no plan")

    monkeypatch.setattr(doctor, "checks", fail)
    code, _, err = slidecube(*args)

    assert code == 1
    assert err.startswith("slidecube: no plan\nTraceback (most recent call last):")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_without_a_traceback(number):
    script = (
        "import time\n"
        "from slidecube.pipeline import cli, doctor\n"
        "def checks():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "doctor.checks = checks\n"
        "cli.main(['doctor'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)

    assert process.returncode == 130
    assert err.strip() == "slidecube: stopped; run the same command to resume"


def test_simulate_ends_with_a_toml_that_maps_its_archive(slidecube, tmp_path):
    out = tmp_path / "small"
    code, said, _ = slidecube("simulate", "--out", out, "--size", "small")

    assert code == 0
    toml = re.findall(r"map it: slidecube run (\S+);", said)[0]
    assert load_config(toml).workspace == out
    assert slidecube("plan", toml)[0] == 0


def test_help_lists_every_exit_code_of_the_readme(slidecube, repo_root):
    _, out, _ = slidecube("--help")
    listed = re.findall(r"Exit codes: (.*)", (repo_root / "README.md").read_text())[0].partition(". ")[0]
    said = " ".join(out.split()).partition("Exit codes: ")[2]

    assert [int(n) for n in re.findall(r"(?:^|, )(\d+) ", listed)] == [0, 1, 2, 70, 75, 130]
    assert [int(n) for n in re.findall(r"(?:^|, )(\d+) ", said.partition(". ")[0])] == [0, 1, 2, 70, 75, 130]


def test_init_writes_a_toml_that_loads_and_never_overwrites(slidecube, tmp_path):
    file = tmp_path / "hokkaido.toml"

    code, out, _ = slidecube("init", file)
    assert code == 0
    assert f"slidecube plan {file}" in out
    assert load_config(file).epochs[0].name == "iburi-2018"

    file.write_text("mine")
    assert "is there already" in refused(slidecube("init", file), 1)
    assert file.read_text() == "mine"
    assert "is not a folder" in refused(slidecube("init", tmp_path / "no" / "x.toml"), 1)


def test_doctor_has_a_line_for_each_check(slidecube):
    code, out, err = slidecube("doctor")

    assert (code, err) == (0, "")
    found = dict(re.findall(r"^(?:ok|warn)\s+(\S+(?: \S+)*)\s{2,}(\S.*)$", out, flags=re.MULTILINE))
    assert len(found) == len(out.splitlines())
    assert {"python", "GDAL rasters", "GDAL vectors", "disk", "memory", "cores", "extra nets"} <= set(found)
    assert found["zarr"] == metadata.version("zarr")


def test_doctor_fails_when_something_essential_is_missing(slidecube, monkeypatch):
    monkeypatch.setattr(doctor, "LIBRARIES", ("no-such-distribution",))
    monkeypatch.setattr(doctor, "RASTER_DRIVERS", {"GTiff": "fail", "NoSuchDriver": "fail"})

    code, out, _ = slidecube("doctor")

    assert code == 1
    assert re.search(r"^fail  no-such-distribution", out, flags=re.MULTILINE)
    assert re.search(r"^fail  GDAL rasters .* lacks NoSuchDriver$", out, flags=re.MULTILINE)


STATE = {
    "run": "hokkaido-1a2b3c4d",
    "inventory": "hokkaido-rdndvi-1a2b3c4d",
    "tiles": {
        "cube": {"done": 11, "due": 0, "failed": 1, "running": 0},
        "detect": {"done": 3, "due": 6, "failed": 0, "running": 2},
    },
    "scene_reads": 48,
    "observability": {"not_processed": 0, "outside_aoi": 25, "not_observable": 25, "observed": 50},
    "not_observable": {"no clear pre-event observation": 25, "no terrain": 0},
    "failures": [{"stage": "cube", "what": "w", "tile": "r001c002", "reason": "disk on fire"}] * 12,
    "lost": [{"scene": "S2A_X", "asset": "red", "reason": "truncated"}],
    "substituted": [{"scene": "S2A_Y", "asset": "nir", "source": "other/l2a", "reason": "HTTP 503"}],
    "statistics": [
        {
            "epoch": "event",
            "key": "0123456789abcdef",
            "frozen": True,
            "clusters": [1, 3],
            "named_by": "person",
            "reasons": {"1": "landslide: steep"},
            "repaired_tiles": ["r001c002"],
            "strata": {},
            "sheet": "statistics/0123456789abcdef/sheet/index.html",
        }
    ],
    "land_cover": [],
    "shifts": {},
    "complete": False,
    "jobs": [],
    "running": "hokkaido-1a2b3c4d",
    "drivers": 1,
    "dashboards": ["http://127.0.0.1:8787/status"],
    "silent": [],
    "pace": {"cube": 4.0},
    "minutes_left": 30.0,
    "used": {"task_hours": 1.5, "bytes": 2e9, "peak_mem_gb": 1.1},
    "predicted": {"cpu_hours": 2.0, "bytes": 3e9, "peak_mem_gb": 1.2},
}


def test_status_for_machines_and_for_people(slidecube, monkeypatch, tmp_path):
    monkeypatch.setattr(
        importlib.import_module("slidecube.pipeline.status"), "status", lambda where, **_: STATE
    )

    assert json.loads(slidecube("status", tmp_path, "--json")[1]) == STATE
    out = slidecube("status", tmp_path)[1]
    assert re.search(r"^cube +11 +0 +0 +1$", out, flags=re.MULTILINE)
    assert re.search(r"^detect +3 +6 +2 +0$", out, flags=re.MULTILINE)
    assert "pixels: outside aoi 25.0 %, not observable 25.0 %, observed 50.0 %" in out
    assert out.count("failed: cube r001c002: disk on fire") == 10
    assert "failed: and 2 more" in out
    assert "unreadable: S2A_X red: truncated" in out
    assert "read elsewhere: S2A_Y nir: from other/l2a, HTTP 503" in out
    assert "event: landslide = 1, 3 (named by person)" in out
    assert "sheet       statistics/0123456789abcdef/sheet/index.html" in out
    assert "1 tile made or mended after the freeze took no part in it" in out
    assert "running     1 driver: cube 4 tiles a minute; 30 minutes left" in out
    assert "dashboard   http://127.0.0.1:8787/status" in out
    assert out.endswith("incomplete: run the same command to go on\n")


def test_a_place_where_nothing_can_be_written_is_the_users_error(slidecube, monkeypatch, tmp_path):
    monkeypatch.setattr(
        importlib.import_module("slidecube.pipeline.status"), "status", lambda where, **_: STATE
    )
    line = refused(slidecube("status", "ws", "--prometheus", str(tmp_path / "nofolder" / "x.prom")), 1)
    assert f"{tmp_path}/nofolder/x.prom cannot be written: No such file or directory" in line
    assert "Is a directory" in refused(slidecube("status", "ws", "--prometheus", str(tmp_path)), 1)

    profile = tmp_path / "site.toml"
    profile.write_text(
        'extends = "kubernetes"\n[kubernetes]\nimage = "registry.example.org/slidecube:0.1.0"\n'
    )
    assert "/proc/x cannot be written" in refused(
        slidecube("cluster", "manifests", str(profile), "--out", "/proc/x"), 1
    )


def test_a_broken_profile_of_the_users_own_stands_in_the_list(slidecube, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "slidecube" / "profiles"
    folder.mkdir(parents=True)
    (folder / "broken.toml").write_text("runner = ")
    (folder / "mine.toml").write_text('runner = "threads"\n')
    (folder / "unknown.toml").write_text('runner = "threads"\nspeed = 9\n')

    code, out, _ = slidecube("cluster", "list")

    assert code == 0
    said = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines()}
    assert said["mine"] == f"threads ({folder / 'mine.toml'})"
    assert said["broken"].startswith(
        f"cannot be read: Profile {folder / 'broken.toml'} cannot be read: Invalid value"
    )
    assert "unknown key speed" in said["unknown"]
    assert said["slurm-array"] == "array"


def test_an_incomplete_run_is_2_and_says_what_failed(slidecube, monkeypatch, tmp_path):
    run_module = importlib.import_module("slidecube.pipeline.run")
    report = run_module.RunReport(
        run="a-1",
        complete=False,
        done={"cube": 3},
        failed={"cube": 1},
        reasons=(("cube r001c002", "disk on fire"),),
    )
    monkeypatch.setattr(run_module, "run", lambda plan, **_: report)
    monkeypatch.setattr(importlib.import_module("slidecube.pipeline.plan"), "plan", lambda config, **_: None)
    slidecube("init", tmp_path / "a.toml")

    outcome = slidecube("run", tmp_path / "a.toml")

    line = refused(outcome, 2)
    assert line.startswith("incomplete: 1 tile failed, first cube r001c002: disk on fire; `slidecube status ")
    assert "done        cube 3" in outcome[1]


def test_a_complete_run_is_0_and_names_the_report(slidecube, monkeypatch, tmp_path):
    run_module = importlib.import_module("slidecube.pipeline.run")
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.touch()
    asked = {}
    report = run_module.RunReport(run="a-1", complete=True, done={}, failed={}, products=tmp_path)
    monkeypatch.setattr(run_module, "run", lambda plan, **kw: asked.update(kw) or report)
    monkeypatch.setattr(importlib.import_module("slidecube.pipeline.plan"), "plan", lambda config, **_: None)
    slidecube("init", tmp_path / "a.toml")

    code, out, err = slidecube("detect", tmp_path / "a.toml", "--quiet")

    assert (code, err) == (0, "")
    assert f"report      {page}" in out
    assert (asked.pop("part"), asked.pop("drain").asked) == (run_module.Part(), False)
    assert asked == {"stages": ("detect",), "profile": None, "progress": False}


def test_clean_says_what_it_would_remove(slidecube, monkeypatch, tmp_path):
    removed = [(tmp_path / "layers" / "old.zarr", 2_000_000_000)]
    monkeypatch.setattr(
        importlib.import_module("slidecube.pipeline.status"),
        "clean",
        lambda where, *, dry_run: removed if dry_run else [],
    )

    assert slidecube("clean", tmp_path, "--dry-run")[1].splitlines() == [
        f"would remove {removed[0][0]}",
        "would remove 2.000 GB",
    ]
    assert slidecube("clean", tmp_path)[1] == "nothing is superseded\n"


def test_the_package_offers_the_four_functions(repo_root):
    """Whatever was imported before: `plan` and `run` are the functions, not the modules of the same name."""
    probe = (
        "import slidecube.pipeline.run, slidecube.pipeline.plan\n"
        "from slidecube.pipeline.run import RunReport\n"
        "from slidecube.pipeline import load_config, plan, run\n"
        "print(load_config.__module__, plan.__module__, run.__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)

    assert done.stdout.split() == [f"slidecube.pipeline.{name}" for name in ("config", "plan", "run")]
