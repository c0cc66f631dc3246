"""Kubernetes quantities ("64Gi", "500m", 4) and their values."""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

PATTERN = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
_SUFFIX = re.compile(r"(?:[KMGTPE]i|[numkMGTPE])$")
_BINARY = {f"{letter}i": Decimal(1024) ** (i + 1) for i, letter in enumerate("KMGTPE")}
_DECIMAL = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal("1e3"),
    "M": Decimal("1e6"),
    "G": Decimal("1e9"),
    "T": Decimal("1e12"),
    "P": Decimal("1e15"),
    "E": Decimal("1e18"),
}


def _as_text(value: Any) -> Any:
    # YAML writes `nvidia.com/gpu: 1` as an integer; a bool is an int in Python but no quantity.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _checked(value: str) -> str:
    if not re.match(PATTERN, value):
        raise ValueError(f"{value!r} is not a quantity: write it like 64Gi, 500m or 4")
    return value


Quantity = Annotated[
    str,
    BeforeValidator(_as_text),
    AfterValidator(_checked),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": PATTERN,
            "x-kubernetes-int-or-string": True,
        }
    ),
]


def parse_quantity(quantity: str) -> Decimal:
    """The value of a quantity in its base unit (bytes, cores, pieces).

    Raises ValueError for text that is not a quantity.
    """
    _checked(quantity)
    match = _SUFFIX.search(quantity)
    if match is None:
        return Decimal(quantity)
    factor = _BINARY.get(match[0]) or _DECIMAL[match[0]]
    return Decimal(quantity[: match.start()]) * factor
