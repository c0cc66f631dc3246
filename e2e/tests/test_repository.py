"""Traps in this repository's layout, and what its checks must cover."""

import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import grimp
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
    assert "import-mode=importlib" not in (ROOT / "pyproject.toml").read_text()


def settings() -> dict[str, Any]:
    """The tool sections of pyproject.toml."""
    tools: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    return tools


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


def test_ruff_reads_every_file() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files", str(ROOT)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    read = {Path(line) for line in shown.splitlines()}
    assert [path for path in tracked("*.py") if path.exists() and path not in read] == []


def test_mypy_reads_every_file() -> None:
    """Tests and benchmarks too."""
    mypy = settings()["mypy"]
    assert "exclude" not in mypy
    places = [ROOT / place for place in mypy["files"]]
    outside = [
        path
        for path in tracked("*.py")
        if not any(path == place or place in path.parents for place in places)
    ]
    assert outside == []


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    """All imports between our modules, those for type checking too; tests aside."""
    first, *others = settings()["importlinter"]["root_packages"]
    graph = grimp.build_graph(first, *others, cache_dir=None)
    for module in list(graph.modules):
        if "tests" in module.split("."):
            graph.remove_module(module)
    return graph


@pytest.mark.parametrize(
    ("what", "depth"), [("packages", 1), ("rooms", 2), ("rooms of rooms", 3), ("modules", None)]
)
def test_there_are_no_circles(what: str, depth: int | None, imports: grimp.ImportGraph) -> None:
    """Counted without the exceptions that a contract of layers may list."""
    found = find_circles(edges_at(depth, imports))
    print(f"{len(found)} circles between {what}")
    for circle in found:
        print(" -> ".join(circle))
    assert found == []


def test_a_circle_would_be_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert sorted(len(circle) for circle in find_circles(edges)) == [3, 4]


def edges_at(depth: int | None, graph: grimp.ImportGraph) -> dict[str, set[str]]:
    """What imports what, with module names cut after `depth` parts; None: whole names."""
    edges: dict[str, set[str]] = {}
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            names = importer.split("."), imported.split(".")
            if depth is None or all(len(parts) >= depth for parts in names):
                one, other = (".".join(parts[:depth]) for parts in names)
                if one != other:
                    edges.setdefault(one, set()).add(other)
    return edges


def find_circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Circles, each broken at one import before the next is looked for; first name last again."""
    edges = {name: set(others) for name, others in edges.items()}
    found = []
    while True:
        try:
            TopologicalSorter(edges).prepare()
        except CycleError as error:
            circle: list[str] = error.args[1]
            found.append(circle[::-1])
            edges[circle[1]].discard(circle[0])
        else:
            return found
