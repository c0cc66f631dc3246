"""What a named test does, with all that it calls in its module: the names it uses, its asserts."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@cache
def definitions(path: Path) -> dict[str, Definition]:
    """The functions, classes and constants of a module, by name."""
    found: dict[str, Definition] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {each.id: node for each in targets if isinstance(each, ast.Name)}
    return found


def reachable(module: Any, test: str) -> list[Definition]:
    """The test and, however indirectly, all of its module that it uses; fixtures too."""
    known = definitions(Path(module.__file__))
    waiting, found = [test], dict[str, Definition]()
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found[name] = known[name]
            for node in ast.walk(known[name]):
                if isinstance(node, ast.Name):
                    waiting.append(node.id)
                elif isinstance(node, ast.arg):
                    waiting.append(node.arg)
    return list(found.values())


def words(nodes: list[Definition]) -> Iterator[str]:
    """Whole names in any spelling: keywords, attributes, names, texts and parts of dotted texts."""
    for top in nodes:
        for node in ast.walk(top):
            text = ""
            if isinstance(node, ast.keyword):
                text = node.arg or ""
            elif isinstance(node, ast.Attribute):
                text = node.attr
            elif isinstance(node, ast.Name):
                text = node.id
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            yield from (part.replace("_", "").lower() for part in text.split("."))


def asserts(nodes: list[Definition]) -> int:
    """How often something is asserted, or an error is expected."""
    return sum(
        isinstance(node, ast.Assert) or (isinstance(node, ast.Attribute) and node.attr == "raises")
        for top in nodes
        for node in ast.walk(top)
    )
