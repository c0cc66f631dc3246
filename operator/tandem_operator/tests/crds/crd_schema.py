"""What the API server does with a schema: fill in defaults, list rules. For tests only."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

Schema = dict[str, Any]


def with_defaults(value: Any, schema: Schema) -> Any:
    """`value` with the schema's defaults filled in, as apiextensions does it."""
    if isinstance(value, dict):
        filled = dict(value)
        for name, child in schema.get("properties", {}).items():
            if name not in filled and "default" in child:
                filled[name] = deepcopy(child["default"])
            if name in filled:
                filled[name] = with_defaults(filled[name], child)
        return filled
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every node of a schema with its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], path + mark)


def rule_messages(schema: Schema) -> set[str]:
    """The messages of all CEL rules."""
    return {
        rule["message"]
        for _, node in nodes(schema)
        for rule in node.get("x-kubernetes-validations", ())
    }
