"""A count or a percentage of a pool, as in `maxSurge: 1` and `maxSurge: 25%`."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, StrictInt, WithJsonSchema

PATTERN = r"^(100|[1-9]?[0-9])%$"


def _checked(value: int | str) -> int | str:
    if isinstance(value, int):
        if not 0 <= value <= 1024:
            raise ValueError(f"{value} is out of range; write 0 to 1024, or a percentage")
    elif not re.match(PATTERN, value):
        raise ValueError(f"{value!r} is neither a count nor a percentage from 0% to 100%")
    return value


IntOrPercent = Annotated[
    StrictInt | Annotated[str, Field(max_length=4)],
    AfterValidator(_checked),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "minimum": 0,
            "maximum": 1024,
            "pattern": PATTERN,
            "x-kubernetes-int-or-string": True,
        }
    ),
]


def resolve_int_or_percent(value: int | str, total: int, *, round_up: bool) -> int:
    """The count that `value` means for a pool of `total` workers (surge rounds up, loss down)."""
    if isinstance(value, int):
        return value
    hundredths = total * int(value.removesuffix("%"))
    return -(-hundredths // 100) if round_up else hundredths // 100
