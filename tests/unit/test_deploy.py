"""Images, and the pages of one screen: what they name is there, and what they tell people to type is understood."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from slidecube.cluster import kubernetes
from slidecube.cluster.resources import load_profile
from slidecube.pipeline.cli import cli

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PAGES = sorted(path.name for path in DEPLOY.glob("*.md"))
PLACES = ("laptop.md", "gpu.md", "slurm.md", "pbs.md", "kubernetes.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions():
    """Instructions of the Dockerfile with their arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def arguments(name):
    return [rest for instruction, rest in instructions() if instruction == name]


def sections():
    """Sections of the definition for Apptainer, the header under ''."""
    parts = re.split(r"^%(\w+)\n", (DEPLOY / "apptainer.def").read_text(), flags=re.MULTILINE)
    assert len(set(parts[1::2])) == len(parts[1::2])
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def sources():
    """What the Dockerfile copies out of the checkout."""
    copies = [rest.split() for rest in arguments("COPY") if not rest.startswith("--from")]
    return {source for words in copies for source in words[:-1]}


def lint(path, text):
    return subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), path],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


# --- images -----------------------------------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say():
    text = (DEPLOY / "Dockerfile").read_text()
    done = lint("-", text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    spoilt = lint("-", text.replace("--no-install-recommends ", ""))
    assert spoilt.returncode == 1
    assert "DL3015" in spoilt.stdout


def test_the_image_is_made_of_what_the_wheel_is_made_of():
    wanted = {"catalog", "models", "cluster", "pipeline", "README.md", "LICENSE", "pyproject.toml"}
    assert sources() == wanted | {"constraints.txt"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == sources()
    assert "*" in ignored
    copied = [line.split() for line in sections()["files"].splitlines() if line.strip()]
    assert dict(copied) == {name: f"/build/{name}" for name in sources()}


def test_the_image_runs_as_the_user_of_the_pods():
    final = instructions()[max(i for i, (name, _) in enumerate(instructions()) if name == "FROM") :]
    assert dict(final)["USER"] == f"{kubernetes._USER}:{kubernetes._USER}"
    assert dict(final)["ENTRYPOINT"] == '["slidecube"]'  # as process 1 it hears what a pod is told
    assert "--version" in dict(final)["HEALTHCHECK"]
    assert dict(final)["ENV"].split()[1] == f"HOME={kubernetes._SCRATCH}"


def test_both_images_are_of_this_version_on_one_base():
    labels = dict(
        line.split(maxsplit=1) for line in sections()["labels"].strip().splitlines() if line.strip()
    )
    version = labels["org.opencontainers.image.version"]
    assert version == PROJECT["version"]
    assert f'image.version="{version}"' in arguments("LABEL")[0]
    assert re.search(r"^Bootstrap: docker$", sections()[""], re.MULTILINE)
    [base] = re.findall(r"^From: (\S+)$", sections()[""], re.MULTILINE)
    assert f"BASE={base}" in arguments("ARG")
    assert set(arguments("FROM")) == {"${BASE} AS build", "${BASE}"}


def test_the_extras_exist():
    [extras] = [rest.removeprefix("EXTRAS=") for rest in arguments("ARG") if rest.startswith("EXTRAS=")]
    defined = dict(re.findall(r"^ *(\w+)=(.*)$", sections()["arguments"], re.MULTILINE))
    text = "".join((DEPLOY / page).read_text() for page in PAGES)
    asked = re.findall(r"EXTRAS=([\w,]+)", text) + re.findall(r"'\.\[([\w,]+)\]'", text)
    assert asked
    named = {extra for found in (extras, defined["EXTRAS"], *asked) for extra in found.split(",")}
    assert named <= set(PROJECT["optional-dependencies"])


def test_the_definition_for_apptainer_is_whole():
    found = sections()
    known = {"arguments", "files", "post", "environment", "runscript", "test", "labels", "help"}
    assert set(found) - {""} == known
    defined = set(re.findall(r"^ *(\w+)=", found["arguments"], re.MULTILINE))
    assert set(re.findall(r"\{\{ *(\w+) *\}\}", found["post"])) == defined
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=found[name], text=True, check=True)


def test_both_images_are_installed_alike():
    """The same commands in both, as far as they are the same commands."""
    post = sections()["post"].replace("{{ TORCH }}", "${TORCH}")
    run = " ".join(arguments("RUN") + arguments("ENV"))
    for step in (
        "python3 -m venv /opt/uv",
        "/opt/uv/bin/pip install --no-cache-dir --constraint constraints.txt uv",
        '/opt/uv/bin/uv venv --quiet --python "$(command -v python3)" /opt/slidecube',
        "UV_NO_CACHE=1 UV_LINK_MODE=copy UV_SYSTEM_CERTS=1 UV_PYTHON=/opt/slidecube/bin/python",
        'if [ -n "${TORCH}" ]; then export UV_TORCH_BACKEND="${TORCH}"; fi',
        "/opt/uv/bin/uv pip install --compile-bytecode --constraint constraints.txt",
        "/opt/uv/bin/uv pip uninstall triton",
        "apt-get install --yes --no-install-recommends libexpat1",
    ):
        assert step in post
        assert step in " ".join(run.split())


def test_the_build_is_tried_by_a_target():
    subprocess.run(["bash", "-n", DEPLOY / "image-test"], check=True)
    assert (DEPLOY / "image-test").stat().st_mode & 0o111
    assert re.search(r"^image-test:.*\n\t@deploy/image-test$", (ROOT / "Makefile").read_text(), re.MULTILINE)


# --- pages ------------------------------------------------------------------------------------------------------------


def blocks(page, language):
    text = (DEPLOY / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def console_lines(page):
    return [
        line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")
    ]


def slidecube_commands(page):
    """Arguments of slidecube wherever a line to type runs it: here, or in an image."""
    found = []
    for line in console_lines(page):
        words = shlex.split(line, comments=True)
        image = r"|slidecube:\S+" if words[:2] == ["docker", "run"] else ""
        starts = [i for i, word in enumerate(words) if re.fullmatch(rf"(.*/bin/)?slidecube{image}", word)]
        found += [words[i + 1 :] for i in starts if i == 0 or image]
    return found


def mentions(page):
    """Arguments of slidecube in the running text: placeholders stand in them."""
    text = (DEPLOY / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(found) for found in re.findall(r"`(?:\S*/)?slidecube ([^`]+)`", prose)]


def resolve(words):
    """Find the verb that some words begin with, and what follows it."""
    verb, rest = cli, list(words)
    while isinstance(verb, click.Group):
        assert rest, f"{words}: a verb is missing"
        assert rest[0] in verb.commands, f"{words}: no verb {rest[0]!r}"
        verb = verb.commands[rest.pop(0)]
    return verb, rest


def test_there_are_five_pages_and_the_way_to_them():
    assert sorted(PAGES) == sorted(("README.md", *PLACES))
    listed = re.findall(r"^\| \[(\S+)\]\(\1\) \|", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PLACES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_one_screen(page):
    assert len((DEPLOY / page).read_text(encoding="utf-8").splitlines()) <= 70


@pytest.mark.parametrize("page", PLACES)
def test_what_is_typed_is_understood(page):
    given = slidecube_commands(page)
    assert given
    for words in given:
        verb, rest = resolve(words)
        verb.make_context(verb.name, rest).close()  # refuses unknown options and a wrong number of arguments


@pytest.mark.parametrize("page", PAGES)
def test_what_is_mentioned_exists(page):
    for words in mentions(page):
        verb, rest = resolve(words)
        known = {option for parameter in verb.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known, words


def test_mentions_are_found_and_slips_refused():
    assert ["cluster", "list"] in mentions("README.md")
    with pytest.raises(AssertionError, match="no verb 'chck'"):
        resolve(["cluster", "chck", "threads"])


@pytest.mark.parametrize("page", PAGES)
def test_profiles_on_a_page_are_profiles(page, tmp_path):
    found = [block for block in blocks(page, "toml") if "extends" in tomllib.loads(block)]
    for block in found:
        (tmp_path / "page.toml").write_text(block)
        load_profile(str(tmp_path / "page.toml"))
    assert bool(found)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_on_a_page_exist(page):
    text = (DEPLOY / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        assert (DEPLOY / path).exists(), target
        headings = re.findall(r"^#+ (.+)$", (DEPLOY / (path or page)).read_text(), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}
    for path in re.findall(r"\bdeploy/[\w.-]+[\w]", text):
        assert (ROOT / path).is_file(), path
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_page_applies_the_manifests_that_are_written():
    text = (DEPLOY / "kubernetes.md").read_text()
    [block] = blocks("kubernetes.md", "toml")
    options = tomllib.loads(block)["kubernetes"]
    written = {
        f"manifests/{n}-{stage}.yaml".replace("/", "/stages/") for n, stage in enumerate(kubernetes.STAGES, 1)
    }
    written |= {f"manifests/{name}.yaml" for name in ("setup", "cluster", "run")}
    applied = set(re.findall(r"manifests/\S+\.yaml", text))
    assert {"manifests/setup.yaml", "manifests/run.yaml"} <= applied <= written
    assert f"create secret generic {options['secret']} " in text
    assert f"create namespace {options['namespace']}\n" in text
    assert text.count(f"-n {options['namespace']} ") == text.count("kubectl -n ")
