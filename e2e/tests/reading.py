"""Finds in the sources who reads an attribute, a parameter or an environment variable."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("operator", "engine", "kernels", "e2e")


@cache
def modules(package: str) -> dict[Path, ast.Module]:
    """The parsed sources of a package, such as `engine/tandem_router`; its tests aside."""
    found = (path for path in sorted((ROOT / package).rglob("*.py")) if "tests" not in path.parts)
    return {path: ast.parse(path.read_text()) for path in found}


def last_name(node: ast.AST) -> str:
    """`config` of `config`, and of `self.config` and `self._config`."""
    if isinstance(node, ast.Attribute):
        return node.attr.lstrip("_")
    return node.id.lstrip("_") if isinstance(node, ast.Name) else ""


def reads(package: str, holders: frozenset[str]) -> dict[str, set[Path]]:
    """Where attributes of something called like a holder are read, by the attribute's name."""
    found: dict[str, set[Path]] = {}
    for path, tree in modules(package).items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
                continue
            if last_name(node.value) in holders:
                found.setdefault(node.attr, set()).add(path)
    return found


def properties(package: str, name: str) -> dict[str, set[str]]:
    """What each method or property of a class reads of itself."""
    (made,) = (
        node
        for tree in modules(package).values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    return {
        method.name: {
            node.attr
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute) and last_name(node.value) == "self"
        }
        for method in made.body
        if isinstance(method, ast.FunctionDef)
    }


def unread_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Parameters that a function never looks at."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    loaded = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    return {each.arg for each in named} - loaded - {"self", "cls"}


def definition(module: Any, name: str) -> ast.FunctionDef:
    """The source of a function, or of a class's `__init__`."""
    tree = ast.parse(Path(module.__file__).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.ClassDef) and node.name == name:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    return method
    raise AssertionError(f"{module.__name__} has no {name}")


def texts(package: str) -> Iterator[tuple[Path, str]]:
    """Every string of a package's code; docstrings aside."""
    for path, tree in modules(package).items():
        statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and id(node) not in statements:
                yield path, value
