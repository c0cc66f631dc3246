"""The base of every API model: camelCase outside, frozen inside, CEL rules carried along."""

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


@dataclass(frozen=True)
class Rule:
    """One CEL validation: what must hold, what to say when it doesn't, which field to blame.

    `message` names the field and the remedy. `field_path` is relative to the object that carries
    the rule (".replicas"); without it the API server blames the object itself.
    """

    rule: str
    message: str
    field_path: str = ""

    def to_schema(self) -> dict[str, str]:
        """The entry for `x-kubernetes-validations`."""
        entry = {"rule": " ".join(self.rule.split()), "message": self.message}
        if self.field_path:
            entry["fieldPath"] = self.field_path
        return entry


class ApiObject(BaseModel):
    """A frozen object of the API. Unknown fields are errors; every field has a description."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    schema_extra: ClassVar[dict[str, Any]] = {}
    # Fields that the models require but whose absence a rule reports better than `required`.
    ruled_presence: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        if cls.rules:
            schema["x-kubernetes-validations"] = [rule.to_schema() for rule in cls.rules]
        if cls.ruled_presence:
            left = [name for name in schema.get("required", []) if name not in cls.ruled_presence]
            schema.pop("required", None)
            schema |= {"required": left} if left else {}
        schema.update(cls.schema_extra)
        return schema

    def to_manifest(self) -> dict[str, Any]:
        """The object as it goes to the API server: camelCase, JSON types, unset optionals left
        out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


ATOMIC: dict[str, Any] = {"x-kubernetes-list-type": "atomic"}
SET: dict[str, Any] = {"x-kubernetes-list-type": "set"}


def keyed_by(*keys: str) -> dict[str, Any]:
    """A list whose entries are merged by these keys (`x-kubernetes-list-type: map`)."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}
