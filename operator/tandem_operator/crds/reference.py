"""`docs/api.md`: every field of every kind with its type, default, bounds and rules."""

from collections.abc import Iterable, Iterator
from typing import Any

from tandem_operator.api.refusal import MARK, Refusal
from tandem_operator.crds.kinds import Kind
from tandem_operator.names import objects

_COLUMNS = "| field | type | default | meaning | in this release only |\n|---|---|---|---|---|"
_HEAD = f"""# API reference

<!-- Generated from operator/tandem_operator/api by `make gen`; don't edit. -->

Group `{objects.GROUP}`, version `{objects.VERSION}`; all kinds are namespaced. A field without a
default is optional unless it says *required*. Rules are checked by the API server: `kubectl apply`
refuses a manifest that breaks one, with the message given here. *In this release only*: other
values of the field are refused too, until there is code for them. Limits between objects (the
bounds of a policy that a service names, claims, networks, node resources) can't be seen at
admission; the operator reports them as conditions.
"""


def render_reference(kinds: Iterable[Kind]) -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(_render_kind(kind) for kind in kinds)])


def _render_kind(kind: Kind) -> str:
    schema, marked = kind.object_schema(), kind.marked_schema()
    parts = [f"## {kind.kind}\n", f"`kubectl get {kind.short_name}`. {kind.description}\n"]
    for section in ("spec", "status"):
        rows = list(_rows(marked["properties"][section], section))
        parts.append(f"### {kind.kind} {section}\n")
        parts.append(_COLUMNS)
        parts += rows
        parts.append("")
    rules = list(_rules(schema, kind.kind))
    if rules:
        parts += [f"### {kind.kind} rules\n", *rules, ""]
    return "\n".join(parts)


def _rows(schema: dict[str, Any], path: str, inherited: str = "") -> Iterator[str]:
    required = set(schema.get("required", ()))
    for name, child in schema.get("properties", {}).items():
        where = f"{path}.{name}"
        default = "*required*" if name in required else _default(child)
        said = _refusal(child) or inherited
        description = str(child.get("description", "")).replace("|", "\\|")
        yield f"| `{where}` | {_type(child)} | {default} | {description} | {said} |"
        below = said and f"as `{where}`"
        yield from _rows(child, where, below or inherited)
        if "items" in child:
            yield from _rows(child["items"], f"{where}[]", below or inherited)


def _refusal(schema: dict[str, Any]) -> str:
    mark = schema.get(MARK)
    return f"{mark.describe()}: {mark.because}" if isinstance(mark, Refusal) else ""


def _type(schema: dict[str, Any]) -> str:
    if "x-kubernetes-int-or-string" in schema:
        return "integer or percentage" if "maximum" in schema else "quantity"
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object" and "additionalProperties" in schema:
        return f"map to {_type(schema['additionalProperties'])}"
    bounds = [str(schema[key]) for key in ("minimum", "maximum") if key in schema]
    return f"{kind}, {' to '.join(bounds)}" if len(bounds) == 2 else kind


def _default(schema: dict[str, Any]) -> str:
    default = schema.get("default")
    # The default of an object is what its fields' rows say.
    if default is None or isinstance(default, dict):
        return ""
    if default == []:
        return "none"
    if isinstance(default, list):
        return ", ".join(f"`{item.get('name', item)}`" for item in default)
    text = str(default).lower() if isinstance(default, bool) else str(default)
    return f"`{text}`" if text else "empty"


def _rules(schema: dict[str, Any], path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        yield f"- `{path}`: {rule['message']}."
    for name, child in schema.get("properties", {}).items():
        yield from _rules(child, name if path in ("InferenceService", "") else f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        yield from _rules(schema["items"], f"{path}[]")
