"""From the marks of refused values to rules of the CRDs."""

from typing import Any

from tandem_operator.api.api_object import Rule
from tandem_operator.api.refusal import MARK, Refusal


def refuse(schema: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A copy of `schema` in which every mark is a rule of its field.

    `path` is where the schema is, as messages name it: without "spec".
    """
    made = {key: value for key, value in schema.items() if key != MARK}
    if "properties" in made:
        made["properties"] = {
            name: refuse(child, name if path in ("", "spec") else f"{path}.{name}")
            for name, child in made["properties"].items()
        }
    if isinstance(made.get("items"), dict):
        made["items"] = refuse(made["items"], f"{path}[]")
    mark = schema.get(MARK)
    if isinstance(mark, Refusal):
        rule = Rule(mark.rule(made), mark.message(path)).to_schema()
        made["x-kubernetes-validations"] = [*made.get("x-kubernetes-validations", ()), rule]
    return made
