"""Every option of every benchmark reaches its `Options`, and the benchmark reads it there.

`pytest -s` prints the list.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from tandem_bench.catalog import BENCHMARKS, Benchmark
from tandem_bench.options import REST_SETTINGS, build_command, takes_rest
from tests.reading import last_name

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Case:
    """One option of one benchmark."""

    benchmark: Benchmark
    field: Field[Any]

    @property
    def module(self) -> Any:
        """Where the benchmark is."""
        return import_module(f"tandem_bench.{self.benchmark.module}")

    @property
    def flag(self) -> str:
        """What one writes; empty for a word without a flag."""
        said = self.field.metadata[COMMAND_LINE]
        if said.positional or said.rest:
            return ""
        return said.name.split("/")[0] or f"--{self.field.name.replace('_', '-')}"

    @property
    def is_required(self) -> bool:
        """Whether the benchmark doesn't run without it."""
        missing = type(self.field.default).__name__ == "_MISSING_TYPE"
        return missing and not self.field.metadata[COMMAND_LINE].rest

    def words(self, value: str = "") -> list[str]:
        """The option with a value other than its default."""
        kind = get_type_hints(self.module.Options)[self.field.name]
        default = self.field.default
        if self.field.metadata[COMMAND_LINE].rest:
            return ["--of-the-worker=1"]
        if kind is bool:
            return [f"--no-{self.flag[2:]}" if default else self.flag]
        parts = get_args(kind) or (kind,)
        pair = next((part for part in parts if get_origin(part) is tuple), None)
        if not value:
            numeric = int in parts or float in parts
            value = str(default + 1 if isinstance(default, int | float) else 7)
            value = value if numeric else "sample"
        given = [value] * (2 if pair else 1)
        return [self.flag, *given] if self.flag else given


CASES = [
    Case(benchmark, each)
    for benchmark in BENCHMARKS
    for each in fields(import_module(f"tandem_bench.{benchmark.module}").Options)
]
each_case = pytest.mark.parametrize(
    "case", CASES, ids=[f"{case.benchmark.name}-{case.field.name}" for case in CASES]
)


def parsed(case: Case, words: list[str]) -> Any:
    """The options that the command line makes of the words."""
    called: list[Any] = []
    app = typer.Typer(pretty_exceptions_enable=False)
    settings = REST_SETTINGS if takes_rest(case.module.Options) else {}
    app.command(context_settings=settings)(build_command(case.module.Options, called.append))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return called[0]


@each_case
def test_every_option_changes_the_options(case: Case) -> None:
    needed = [other for other in CASES if other.benchmark is case.benchmark and other.is_required]
    before, after = (
        # In the order of the fields, which is that of words without a flag.
        [word for other in needed for word in other.words(value if other == case else "")]
        for value in ("", "9")
    )
    after += [] if case.is_required else case.words()
    options = [parsed(case, words) for words in (before, after)]
    first, second = (
        {each.name: getattr(made, each.name) for each in fields(made)} for made in options
    )
    assert {name for name in first if first[name] != second[name]} == {case.field.name}


def arguments(tree: ast.AST) -> Iterator[ast.arg]:
    """Every parameter whose type is `Options`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and getattr(node.annotation, "id", "") == "Options":
            yield node


@cache
def read_in(path: Path) -> Counter[str]:
    """What a module reads of its options: of a parameter of that type, or as a method of it."""
    tree = ast.parse(path.read_text())
    holders = {node.arg.lstrip("_") for node in arguments(tree)}
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and last_name(node.value) in holders:
            found[node.attr] += 1
        if isinstance(node, ast.ClassDef) and node.name == "Options":
            found.update(
                inner.attr
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute) and last_name(inner.value) == "self"
            )
    return found


@each_case
def test_every_option_is_read_by_its_benchmark(case: Case) -> None:
    assert read_in(Path(case.module.__file__))[case.field.name]


def test_the_options_are_counted() -> None:
    counted = Counter(case.benchmark.name for case in CASES)
    for name, number in counted.items():
        print(f"{name}: {number}")
    print(len(counted), "benchmarks,", len(CASES), "options")
    assert counted.keys() <= {benchmark.name for benchmark in BENCHMARKS}
    assert all(case.field.metadata[COMMAND_LINE].says for case in CASES)
