"""docs/handoff-failures.md tells the truth: its tests exist, and run over what it says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
PAGE = (ROOT / "docs/handoff-failures.md").read_text()
NUM_ROWS = 20
CELL = re.compile(r"`(\w+)/(\w+\.py)::(\w+)`")
EVERY = "every transport"


def rows(heading: str, num_columns: int) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    text = PAGE.partition(heading)[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(cells) == num_columns for cells in found)
    return found


FOLDERS = {
    short.strip("`/"): folder.strip("`") for folder, short in rows("# Failures of a hand-off", 2)
}
TABLE = rows("## The table", 4)


@cache
def functions(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """The tests of a file."""
    return {
        node.name: node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def runs_over_every_transport(test: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """By the fixture `over`, or by parameters from the list."""
    parameters = {argument.arg for argument in test.args.args}
    decorators = " ".join(ast.unparse(each) for each in test.decorator_list)
    return "over" in parameters or "TRANSPORTS" in decorators


def test_every_failure_has_a_row() -> None:
    assert len(TABLE) == NUM_ROWS
    assert len({cells[0] for cells in TABLE}) == NUM_ROWS


@pytest.mark.parametrize("cells", TABLE, ids=[cells[0][:40] for cells in TABLE])
def test_the_tests_of_a_row_exist_and_run_over_what_it_says(cells: list[str]) -> None:
    failure, answer, tests, over = cells
    assert failure
    assert answer
    named = CELL.findall(tests)
    assert named
    assert len(named) == tests.count("::"), "a test is written in another form than the others"
    found = []
    for short, file, name in named:
        path = ROOT / FOLDERS[short] / file
        assert path.is_file(), f"{path} doesn't exist"
        assert name in functions(path), f"{path} has no {name}"
        found.append(functions(path)[name])
    assert over in (EVERY, "once")
    assert any(map(runs_over_every_transport, found)) == (over == EVERY), over
