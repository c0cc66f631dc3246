"""Manifests that the API server must refuse, with the words that the refusal must hold."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tandem_operator.api.refusal import MARK, Refusal, is_quantity
from tandem_operator.crds.kinds import KINDS

FOLDER = Path(__file__).parent / "bad_manifests"


@dataclass(frozen=True)
class BadManifest:
    """One file: what is wrong, the field that the refusal names, words of its message."""

    name: str
    what: str
    field: str
    message: str
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "BadManifest":
        """Read a file whose first three lines are comments: what, `field:`, `message:`."""
        text = path.read_text()
        what, field, message = (line.removeprefix("# ") for line in text.splitlines()[:3])
        return cls(
            name=path.stem,
            what=what,
            field=field.removeprefix("field: "),
            message=message.removeprefix("message: "),
            manifest=yaml.safe_load(text),
        )


WRITTEN = [BadManifest.read(path) for path in sorted(FOLDER.glob("*.yaml"))]
"""Those that someone wrote."""

_LEAST: dict[str, dict[str, Any]] = {
    "InferenceService": {"model": {"uri": "hf://org/name"}, "prefill": {}, "decode": {}},
    "AutoscalingPolicy": {},
}
_OTHER_VALUES: dict[str, Any] = {
    "model.adapters": [{"name": "sql", "uri": "hf://org/a"}],
    "kvCache.disk.path": "/mnt/kv",
    "kvCache.disk.claimName": "kv",
}


def _other_value(path: str, schema: dict[str, Any], mark: Refusal) -> Any:
    if path in _OTHER_VALUES:
        return _OTHER_VALUES[path]
    if "enum" in schema:
        return next(value for value in schema["enum"] if value not in mark.accepts)
    if schema.get("type") == "boolean":
        return not mark.accepts[0]
    if is_quantity(schema):
        return "1Gi"
    if "maximum" in schema:
        return mark.accepts[0] + 1
    return "http://prometheus:9090"


def _marks(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if MARK in schema:
        yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from _marks(child, f"{path}.{name}".removeprefix("."))


def refused_values() -> Iterator[BadManifest]:
    """One manifest per marked field, with a value that is refused."""
    for kind in KINDS:
        for path, schema in _marks(kind.marked_schema()["properties"]["spec"]):
            mark = schema[MARK]
            spec = deepcopy(_LEAST[kind.kind])
            *parents, name = path.split(".")
            place = spec
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = _other_value(path, schema, mark)
            yield BadManifest(
                name=f"{kind.short_name}-{path}",
                what=f"{path} has a value for which there is no code.",
                field=f"spec.{path}",
                message=mark.message(path),
                manifest={
                    "apiVersion": "tandem.dev/v1alpha1",
                    "kind": kind.kind,
                    "metadata": {"name": "bad"},
                    "spec": spec,
                },
            )


BAD_MANIFESTS = [*WRITTEN, *refused_values()]
