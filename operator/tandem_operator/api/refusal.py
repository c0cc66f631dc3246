"""Values that the API has but this release can't act on: refused at admission, with the reason.

A field says so by itself: `Annotated[bool, refused_unless(False, because="…")] = False`. The rule
in the CRD, the column in `docs/api.md`, and what the operator reports about objects that were
stored before are all made from that mark. It goes when the code comes that the field is for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from tandem_operator.api.quantity import parse_quantity

MARK: Final = "x-tandem-refused"
"""The key of a mark in a schema. It never gets into a CRD."""


@dataclass(frozen=True)
class Refusal:
    """All values but `accepts` are refused. Without any, the field must not be set.

    `because` completes the sentence "must be … in this release, because …".
    """

    accepts: tuple[Any, ...]
    because: str

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(core_schema), MARK: self}

    def takes(self, value: Any, *, quantity: bool = False) -> bool:
        """Whether `value` is accepted. An unset field is."""
        if value is None:
            return True
        if quantity:
            return any(parse_quantity(value) == parse_quantity(text) for text in self.accepts)
        return value in self.accepts

    def describe(self) -> str:
        """What the field must be, like "None or Auto"."""
        if not self.accepts:
            return "unset"
        return " or ".join(_spell(value) for value in self.accepts)

    def message(self, path: str) -> str:
        """What the API server says about a refused value."""
        remedy = f"remove it, or set it to {self.describe()}"
        if not self.accepts or self.accepts[0] in ((), ""):
            remedy = "remove it"
        return f"{path} must be {self.describe()} in this release, because {self.because}: {remedy}"

    def rule(self, schema: dict[str, Any]) -> str:
        """The CEL rule for a field with this schema."""
        if not self.accepts:
            return "false"
        if schema.get("type") == "array":
            return "size(self) == 0"
        if is_quantity(schema):
            (amount,) = self.accepts
            return f"quantity(string(self)).compareTo(quantity('{amount}')) == 0"
        own = "string(self)" if "x-kubernetes-int-or-string" in schema else "self"
        texts = own != "self" or schema.get("type") == "string"
        listed = [f"'{value}'" if texts else str(value).lower() for value in self.accepts]
        return f"{own} in [{', '.join(listed)}]"


def refused_unless(*accepts: Any, because: str) -> Refusal:
    """The mark of a field of which only these values work in this release; put it outermost."""
    return Refusal(accepts, because)


def is_quantity(schema: dict[str, Any]) -> bool:
    """Whether a schema is that of a quantity, and not that of a count or percentage."""
    return "x-kubernetes-int-or-string" in schema and "maximum" not in schema


def refusal_of(model: type[BaseModel], field: str) -> Refusal | None:
    """The mark of a field, by its name in Python."""
    marks = (item for item in model.model_fields[field].metadata if isinstance(item, Refusal))
    return next(marks, None)


def find_refused(value: BaseModel, path: str = "") -> Iterator[str]:
    """The fields of an object whose values would be refused now, such as "model.quantization".

    An object can have them if it was stored by another release.
    """
    for name, info in type(value).model_fields.items():
        child, where = getattr(value, name), f"{path}{info.alias or name}"
        mark = refusal_of(type(value), name)
        if mark is not None:
            quantity = isinstance(info.default, str) and any(
                is_quantity(getattr(item, "json_schema", None) or {}) for item in info.metadata
            )
            if not mark.takes(child, quantity=quantity):
                yield where
        elif isinstance(child, BaseModel):
            yield from find_refused(child, f"{where}.")


def _spell(value: Any) -> str:
    if value in ((), ""):
        return "empty"
    if isinstance(value, Enum):
        return str(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
