"""Traps in this repository's layout, each of which once cost somebody an hour."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("folder", ["operator", "kernels", "engine", "e2e"])
@pytest.mark.parametrize("name", ["__init__.py", "conftest.py"])
def test_top_folders_are_not_packages(folder: str, name: str) -> None:
    """operator/__init__.py would shadow the standard library's operator, and so on."""
    assert not (ROOT / folder / name).exists()


def test_the_standard_operator_wins_from_the_root() -> None:
    script = "import operator, collections; print(operator.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in done.stdout


def test_pytest_keeps_its_default_import_mode() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    assert "import-mode=importlib" not in settings


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_source_files_stay_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked("*.py", "*.go")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


def test_no_catch_all_modules() -> None:
    names = {"utils.py", "helpers.py", "common.py", "utils.go", "helpers.go", "common.go"}
    assert [path for path in tracked("*.py", "*.go") if path.name in names] == []


def test_no_download_addresses_are_recorded() -> None:
    pattern = re.compile(r"--(extra-)?index" + r"-url|(GOPROXY|registry)=http")
    found = [
        path.name
        for path in tracked()
        if path.suffix not in {".sum"}
        and path.name != Path(__file__).name
        and pattern.search(path.read_text(errors="ignore"))
    ]
    assert found == []


def test_the_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make up" in readme
    assert "make test" in readme
