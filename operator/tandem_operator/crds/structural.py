"""From pydantic's JSON schema to the structural OpenAPI v3 schema that Kubernetes takes.

Kubernetes wants every node to have a type, no `$ref`, no nullable unions, and defaults that are
complete once nested defaults are applied. So references are inlined, `X | None` becomes X without a
default, and the default of an object keeps only what differs from its fields' own defaults. Where
the object has CEL rules its default is whole, because the API server tries the rules on the default
alone, before nested defaults are applied.
"""

from typing import Any

from pydantic import TypeAdapter

from tandem_operator.api.api_object import ApiObject

Schema = dict[str, Any]
_INT32_MAX = 2**31 - 1
_DROPPED = frozenset({"title", "$defs", "discriminator"})


def structural_schema(model: type[ApiObject]) -> Schema:
    """The structural schema of `model`, descriptions and CEL rules included."""
    root = TypeAdapter(model).json_schema(by_alias=True, mode="validation")
    definitions = root.get("$defs", {})
    return _order(_convert(root, definitions))


def _convert(node: Schema, definitions: dict[str, Schema]) -> Schema:
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        # The field's own description and default win over those of the class.
        return _convert({**target, **{k: v for k, v in node.items() if k != "$ref"}}, definitions)
    if "anyOf" in node and "x-kubernetes-int-or-string" not in node:
        (variant,) = [option for option in node["anyOf"] if option.get("type") != "null"]
        rest = {k: v for k, v in node.items() if k != "anyOf" and (k, v) != ("default", None)}
        return _convert({**variant, **rest}, definitions)
    schema = {key: value for key, value in node.items() if key not in _DROPPED}
    if "description" in schema:
        schema["description"] = " ".join(str(schema["description"]).split())
    _convert_children(schema, definitions)
    _add_format(schema)
    if "default" in schema:
        schema["default"] = _sparse(schema["default"], schema)
    return schema


def _convert_children(schema: Schema, definitions: dict[str, Schema]) -> None:
    if "properties" in schema:
        schema["properties"] = {
            name: _convert(child, definitions) for name, child in schema["properties"].items()
        }
    additional = schema.pop("additionalProperties", None)
    if isinstance(additional, dict) and additional:
        schema["additionalProperties"] = _convert(additional, definitions)
    if "items" in schema:
        schema["items"] = _convert(schema["items"], definitions)
    if "propertyNames" in schema:
        raise ValueError("structural schemas can't constrain property names: use a CEL rule")


def _add_format(schema: Schema) -> None:
    if schema.get("type") == "integer":
        small = schema.get("maximum", 2**63) <= _INT32_MAX
        schema["format"] = "int32" if small else "int64"


def _sparse(default: Any, schema: Schema) -> Any:
    """`default` without what the nested schema's own defaults would fill in."""
    if isinstance(default, dict) and "properties" in schema:
        if "x-kubernetes-validations" in schema:
            return _without_nulls(default)
        fields = schema["properties"]
        return {
            name: _sparse(value, fields.get(name, {}))
            for name, value in default.items()
            if value is not None
            and _sparse(value, fields.get(name, {})) != fields.get(name, {}).get("default")
        }
    if isinstance(default, list | tuple):
        return [_sparse(item, schema.get("items", {})) for item in default]
    return default


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


_ORDER = (
    "description",
    "type",
    "format",
    "default",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "required",
    "properties",
    "additionalProperties",
    "items",
)


def _order(schema: Schema) -> Schema:
    """The same schema with its keywords in one fixed order, so that diffs are small."""
    rank = {keyword: index for index, keyword in enumerate(_ORDER)}
    ordered: Schema = {}
    for key in sorted(schema, key=lambda k: (rank.get(k, len(rank)), k)):
        value = schema[key]
        if key == "properties":
            value = {name: _order(child) for name, child in value.items()}
        elif key in ("items", "additionalProperties"):
            value = _order(value)
        ordered[key] = value
    return ordered
