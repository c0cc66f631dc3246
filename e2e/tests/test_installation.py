"""What a fresh machine gets: pins for every package, from the index that pip is configured with."""

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = ["constraints.txt", "constraints-gpu.txt"]


def load_pins(name: str) -> dict[str, tuple[str, int]]:
    """The version of each package in a file of pins, and how many hashes it has."""
    blocks = re.findall(
        r"^([a-z0-9._-]+)==(\S+)[^\n]*\\\n((?:    --hash=.*\n)+)",
        (ROOT / name).read_text(),
        re.MULTILINE,
    )
    return {package: (version, hashes.count("--hash=")) for package, version, hashes in blocks}


def requirements(*, gpu: bool) -> list[Requirement]:
    extras: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    texts = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["install"]]
    texts += PROJECT["build-system"]["requires"]
    texts += [text for name, extra in extras.items() if gpu or name != "gpu" for text in extra]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", FILES)
def test_every_requirement_is_pinned_to_a_version_that_it_allows(name: str) -> None:
    pins = load_pins(name)
    for requirement in requirements(gpu="gpu" in name):
        version, _ = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement}, but {version}: make pins"


@pytest.mark.parametrize("name", FILES)
def test_every_pin_has_hashes_and_no_address(name: str) -> None:
    text = (ROOT / name).read_text()
    assert len(load_pins(name)) == len(re.findall(r"^\S+==", text, re.MULTILINE)) > 100
    assert not re.search(r"://|--index|--find-links|--extra-index|@ ", text)


def test_a_gpu_gets_the_torch_that_its_kernels_were_measured_with() -> None:
    pins = load_pins("constraints-gpu.txt")
    assert pins["torch"][0].startswith("2.11.")
    assert pins["triton"][0].startswith("3.6.")


@pytest.fixture(scope="module")
def uv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("uv_of_ci", ROOT / ".ci" / "uv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_uv_asks_the_index_that_pip_is_configured_with(uv: ModuleType, tmp_path: Path) -> None:
    lines = [
        "global.index-url='https://mirror.invalid/simple'",
        ":env:.index-url='https://nearer.invalid/simple'",
        "install.extra-index-url='https://a.invalid\\nhttps://b.invalid'",
        "global.cert='/etc/ca.crt'",
        f"global.find-links='{tmp_path} /not/there https://wheels.invalid'",
        "global.timeout='60'",
        "download.index-url='https://other.invalid'",
    ]
    settings = uv.read_settings(lines)
    assert uv.build_environment(settings, {}) == {
        "UV_DEFAULT_INDEX": "https://nearer.invalid/simple",
        "UV_INDEX": "https://a.invalid https://b.invalid",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "SSL_CERT_FILE": "/etc/ca.crt",
        "UV_FIND_LINKS": f"{tmp_path},https://wheels.invalid",
    }
    assert uv.build_environment({}, {}) == {}


def test_what_uv_is_told_itself_stays(uv: ModuleType) -> None:
    settings = {"index-url": "https://mirror.invalid", "cert": "/etc/ca.crt"}
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        own = {name: "https://own.invalid", "SSL_CERT_FILE": "/own.crt"}
        assert uv.build_environment(settings, own) == {}
