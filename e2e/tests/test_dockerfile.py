"""The Dockerfile, read and not built: layers, pins, labels, user, environment, extras.

`make images` builds it. What the embedded cluster's images are is checked against it here.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tandem_local.components.images import (
    ENGINE_ENVIRONMENT,
    ENTRYPOINTS,
    ENVIRONMENT,
    HOME,
    IMAGE_USER,
)
from tandem_operator.manifests.worker import USER_ID

ROOT = Path(__file__).resolve().parents[2]
FINAL = ("operator", "router", "engine")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclass(frozen=True)
class Step:
    """One instruction."""

    name: str
    text: str


def read_stages() -> tuple[dict[str, str], dict[str, tuple[str, list[Step]]]]:
    """The arguments before the first stage, and each stage: its base and its own steps."""
    lines = [x for x in (ROOT / "Dockerfile").read_text().splitlines() if not x.startswith("#")]
    steps = [
        Step(*line.split(maxsplit=1))
        for line in "\n".join(lines).replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    arguments: dict[str, str] = {}
    stages: dict[str, tuple[str, list[Step]]] = {}
    current: list[Step] = []
    for step in steps:
        if step.name == "FROM":
            base, _, stage = step.text.split()
            stages[stage] = (base, current := [])
        elif not stages:
            name, value = step.text.split("=", 1)
            arguments[name] = value
        else:
            current.append(step)
    return arguments, stages


ARGUMENTS, STAGES = read_stages()
every_image = pytest.mark.parametrize("stage", FINAL)


def steps_of(stage: str) -> list[Step]:
    """All steps of an image, from its base image on."""
    base, own = STAGES[stage]
    return steps_of(base) + own if base in STAGES else own


def texts(stage: str, name: str) -> list[str]:
    return [step.text for step in steps_of(stage) if step.name == name]


def environment_of(stage: str) -> dict[str, str]:
    pairs = [pair for text in texts(stage, "ENV") for pair in shlex.split(text)]
    return dict(pair.split("=", 1) for pair in pairs)


def first(stage: str, words: str) -> int:
    """The place of the first step with these words."""
    return next(i for i, step in enumerate(steps_of(stage)) if words in step.text)


def last(stage: str, words: str) -> int:
    return max(i for i, step in enumerate(steps_of(stage)) if words in step.text)


def requirements(extras: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / ".ci/requirements.py"), extras],
        stdin=(ROOT / "pyproject.toml").open(),
        capture_output=True,
        text=True,
        check=check,
    )


def test_the_base_is_an_exact_version_by_digest() -> None:
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", ARGUMENTS["BASE"])
    assert ARGUMENTS["ENGINE_BASE"] == "${BASE}"
    bases = {base for base, _ in STAGES.values()} - set(STAGES)
    assert bases == {"${BASE}", "${ENGINE_BASE}"}


@every_image
def test_dependencies_come_before_all_that_changes_with_the_sources(stage: str) -> None:
    """An edit of README.md would otherwise make gigabytes of dependencies anew."""
    installed = last(stage, "install-requirements.sh ")
    before = steps_of(stage)[:installed]
    copied = [step.text for step in before if step.name == "COPY"]
    for text in copied:
        sources = [word for word in text.split()[:-1] if not word.startswith("--")]
        allowed = r"constraints(-gpu)?\.txt|/requirements/(\w+\.txt|install-requirements\.sh)"
        assert all(re.fullmatch(allowed, source) for source in sources), text
    assert not any(re.match(r"(VERSION|REVISION)\b", s.text) for s in before if s.name == "ARG")
    assert first(stage, "--from=wheel") > installed
    assert first(stage, "REVISION") > last(stage, "pip install")


def test_the_lists_of_dependencies_are_all_that_comes_of_the_project() -> None:
    steps = STAGES["requirements"][1]
    [copied] = [step.text.split()[:-1] for step in steps if step.name == "COPY"]
    assert set(copied) == {
        *(".ci/requirements.py", ".ci/install-requirements.sh", "pyproject.toml"),
    }
    # Builders compare the times of files too.
    assert steps[-1].text.endswith("touch -d @0 ./*")


def test_every_package_is_pinned_with_its_hashes() -> None:
    script = (ROOT / ".ci/install-requirements.sh").read_text()
    commands = [step.text for _, steps in STAGES.values() for step in steps if step.name == "RUN"]
    installs = re.findall(r"(?:uv )?(?:pip install|build) [^&|\n]*", "\n".join([*commands, script]))
    assert len(installs) >= 6
    for command in installs:
        pinned = ("--require-hashes", "--constraint ", "--build-constraint ", "--no-index")
        assert any(flag in command for flag in pinned), command
    for pins in ("constraints.txt", "constraints-gpu.txt"):
        text = (ROOT / pins).read_text()
        for name in ("uv", "hatchling", "torch"):
            assert re.search(rf"^{name}==\S+.*\\\n    --hash=sha256:", text, re.MULTILINE), name


@every_image
def test_labels_say_what_an_image_is(stage: str) -> None:
    [text] = texts(stage, "LABEL")
    labels = dict(pair.split("=", 1) for pair in shlex.split(text))
    prefix = "org.opencontainers.image."
    assert set(labels) == {
        *(prefix + name for name in ("title", "description", "source", "licenses")),
        *(prefix + name for name in ("version", "revision")),
    }
    assert labels[f"{prefix}title"] == f"tandem-{stage}"
    assert labels[f"{prefix}licenses"] == PROJECT["license"]
    assert labels[f"{prefix}version"] == "${VERSION}"
    assert f"VERSION={PROJECT['version']}" in texts(stage, "ARG")


@every_image
def test_user_home_and_environment_are_those_of_the_embedded_cluster(stage: str) -> None:
    assert texts(stage, "USER") == [f"{IMAGE_USER}:{IMAGE_USER}"] == [f"{USER_ID}:{USER_ID}"]
    assert steps_of(stage)[-1].name == "LABEL"
    environment = environment_of(stage)
    assert environment.pop("PATH") == "/opt/tandem/bin:$PATH"
    assert environment == (ENGINE_ENVIRONMENT if stage == "engine" else ENVIRONMENT)
    made = steps_of(stage)[first(stage, "useradd")].text
    assert f"--uid {IMAGE_USER}" in made
    assert f"--home-dir {HOME}" in made
    assert f"install -d -m 1777 {HOME}" in made
    assert texts(stage, "ENTRYPOINT") == [f'["{ENTRYPOINTS[f"tandem-{stage}"]}"]']


def test_only_the_engine_has_the_compiler_that_triton_needs() -> None:
    for stage in FINAL:
        installed = " ".join(texts(stage, "RUN"))
        assert ("gcc libc6-dev" in installed) == (stage == "engine")


@pytest.mark.parametrize("extras", ["", "engine", "engine,gpu", "engine,gpu,nixl,demo"])
def test_extras_are_the_projects(extras: str) -> None:
    lines = requirements(extras).stdout.splitlines()
    base, optional = PROJECT["dependencies"], PROJECT["optional-dependencies"]
    assert lines == base + [x for name in extras.split(",") if name for x in optional[name]]


def test_an_unknown_extra_is_refused_by_name() -> None:
    done = requirements("engine,gpus", check=False)
    assert done.returncode == 1
    assert "there is no extra 'gpus': choose from engine, gpu, nixl" in done.stderr


def test_the_quickstarts_model_is_in_the_images_that_read_it() -> None:
    manifest = yaml.safe_load((ROOT / "examples/quickstart.yaml").read_text())
    package = manifest["spec"]["model"]["uri"].removeprefix("package://")
    steps = STAGES["requirements"][1]
    defaults = dict(step.text.split("=", 1) for step in steps if step.name == "ARG")
    assert set(defaults) == {"ROUTER_EXTRAS", "ENGINE_EXTRAS"}
    for extras in defaults.values():
        assert package in requirements(extras).stdout
    assert f"ENGINE_EXTRAS={defaults['ENGINE_EXTRAS']}" in texts("engine", "ARG")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for _, steps in STAGES.values():
        for step in steps:
            if step.name == "COPY" and not step.text.startswith("--from"):
                for source in step.text.split()[:-1]:
                    assert (ROOT / source).exists(), source
                    assert source.split("/")[0] not in ignored


def test_make_builds_every_image() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "images", "BUILDER=builder", "IMAGE_TAG=7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    commands = done.stdout.replace("\\\n", " ")
    built = re.findall(r"builder build --target (\w+) .*--tag (\S+) \.", commands)
    assert built == [(name, f"ghcr.io/tandem-inference/tandem-{name}:7") for name in FINAL]
