"""How a new revision replaces the old one."""

import re
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, StrictInt, WithJsonSchema

from tandem_operator.api.api_object import ApiObject, Rule

INT_OR_PERCENT_PATTERN = r"^(100|[1-9]?[0-9])%$"


def _checked(value: int | str) -> int | str:
    if isinstance(value, int):
        if not 0 <= value <= 1024:
            raise ValueError(f"{value} is out of range: write 0 to 1024, or a percentage")
    elif not re.match(INT_OR_PERCENT_PATTERN, value):
        raise ValueError(f"{value!r} is not a count or a percentage: write it like 2 or 25%")
    return value


IntOrPercent = Annotated[
    StrictInt | Annotated[str, Field(max_length=4)],
    AfterValidator(_checked),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "minimum": 0,
            "maximum": 1024,
            "pattern": INT_OR_PERCENT_PATTERN,
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


class Rollout(ApiObject):
    """How a new revision replaces the old one, in both pools at once and in their ratio.

    A worker counts as available if it is ready and its revision has a ready worker of the other
    role, because KV never crosses a revision. A change of the model is different: routers work with
    one model, so all new workers come up beside the old ones, whatever maxSurge says.
    """

    max_surge: IntOrPercent = "25%"
    """Workers above the desired number, per pool: a count or a percentage (rounded up). Those that
    drain or end count. The default needs free GPUs for a quarter of each pool."""
    max_unavailable: IntOrPercent = 0
    """Available workers below the desired number, per pool: a count or a percentage (rounded down).
    Before the new revision serves, it is used only where maxSurge is 0 or no node is free. The
    default loses no capacity; set it to 1 or more where no GPUs are free."""
    paused: bool = False
    """Whether the roll-out is paused in its current state."""
    drain_seconds: Annotated[int, Field(ge=0, le=86_400)] = 600
    """How long a draining worker may take to finish or move its streams."""
    progress_deadline_seconds: Annotated[int, Field(ge=30, le=86_400)] = 1800
    """How long a roll-out may go without progress before it stops and reports why."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(string(self.maxSurge) in ['0', '0%'] && string(self.maxUnavailable) in ['0', '0%'])",
            "rollout.maxSurge and rollout.maxUnavailable are both 0, so no worker could ever be"
            " replaced: set one of them to 1",
            ".maxSurge",
        ),
    )
