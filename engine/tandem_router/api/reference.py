"""The API described from its own routes: /openapi.json for programs, /docs for people."""

import html
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

from pydantic import BaseModel

from tandem_router.api.exchange import Handler
from tandem_router.api.fields import HARMLESS
from tandem_router.api.schema import Sampling

_REF: Final = "#/components/schemas/"
_ERROR: Final = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """A method and a path, and what answers there; the handler's docstring says what it does."""

    method: str
    path: str
    handler: Handler
    body: type[BaseModel] | None = None
    """What a request's body must be."""
    public: bool = False
    """Answered without an API key, and not logged."""
    direct: bool = False
    """It generates: its requests don't pass through Starlette."""

    @property
    def summary(self) -> str:
        """The first line of the docstring, without method and path."""
        line = (inspect.getdoc(self.handler) or "").split("\n", 1)[0]
        return line.rpartition(": ")[2].rstrip(".")


def build_document(routes: Iterable[RouteSpec]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem router", "version": metadata.version("tandem-inference")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: RouteSpec, path: str, schemas: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {}}
    if route.direct:
        content["text/event-stream"] = {}
    error = {"application/json": {"schema": {"$ref": f"{_REF}Error"}}}
    operation: dict[str, Any] = {
        "operationId": getattr(route.handler, "__name__", path),
        "summary": route.summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            "default": {"description": "What is wrong, and what to do", "content": error},
        },
        "security": [] if route.public else [{"key": []}, {}],
    }
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if route.body is not None:
        _add_schema(route.body, schemas)
        body = {"application/json": {"schema": {"$ref": f"{_REF}{route.body.__name__}"}}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def _add_schema(model: type[BaseModel], schemas: dict[str, Any]) -> None:
    schema = model.model_json_schema(ref_template=f"{_REF}{{model}}")
    schemas |= schema.pop("$defs", {})
    if issubclass(model, Sampling):
        schema["additionalProperties"] = False  # an unknown field is refused
        accepted = {"description": "Accepted; has no effect on the answer."}
        schema["properties"] |= dict.fromkeys(sorted(HARMLESS), accepted)
    schemas[model.__name__] = schema


# --- the page -------------------------------------------------------------------------------------

_PAGE: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px sans-serif; margin: 2em auto; max-width: 60em }}
table {{ border-collapse: collapse }} td {{ border: 1px solid #ccc; padding: .2em .6em }}</style>
<h1>{title}</h1><p>For programs: <a href="openapi.json">openapi.json</a>.
A field that is not listed is refused by its name.</p>
{body}</html>
"""


def build_page(document: Mapping[str, Any]) -> str:
    """The same as a page that loads nothing from elsewhere."""
    parts: list[str] = []
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            if "requestBody" in operation:
                body = operation["requestBody"]["content"]["application/json"]["schema"]
                parts.append(_table(schemas[body["$ref"].removeprefix(_REF)]))
    title = f"Tandem router {document['info']['version']}"
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def _table(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        f"<tr><td><code>{html.escape(name)}</code>{' *' if name in required else ''}</td>"
        f"<td>{html.escape(_forms(field))}</td></tr>"
        for name, field in schema["properties"].items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _forms(field: Mapping[str, Any]) -> str:
    """What a field takes, in words."""
    if "anyOf" in field:
        found = [_forms(option) for option in field["anyOf"] if option != {"type": "null"}]
        return " or ".join(dict.fromkeys(found))
    if "$ref" in field:
        return str(field["$ref"].removeprefix(_REF))
    if "enum" in field or "const" in field:
        return ", ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", field.get("description", "any value")))
    if kind == "array":
        return f"list of {_forms(field.get('items', {}))}"
    bounds = [
        f"{sign} {field[name]}"
        for name, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if name in field
    ]
    return " ".join([kind, *bounds])
