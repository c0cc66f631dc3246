"""How a new revision replaces the old one."""

from typing import Annotated, ClassVar

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule
from tandem_operator.api.int_or_percent import IntOrPercent


class Rollout(ApiObject):
    """How a new revision replaces the old one, in both pools."""

    max_surge: IntOrPercent = 1
    """Workers above the desired number, per pool: a count or a percentage (rounded up)."""
    max_unavailable: IntOrPercent = 0
    """Workers below the desired number, per pool: a count or a percentage (rounded down)."""
    paused: bool = False
    """Whether the roll-out holds where it is."""
    drain_seconds: Annotated[int, Field(ge=0, le=86_400)] = 600
    """How long a draining worker may take to finish or move its streams."""
    progress_deadline_seconds: Annotated[int, Field(ge=30, le=86_400)] = 1800
    """How long a roll-out may make no progress before it stops and says why."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(string(self.maxSurge) in ['0', '0%'] && string(self.maxUnavailable) in ['0', '0%'])",
            "rollout.maxSurge and rollout.maxUnavailable are both 0, so no worker could ever be"
            " replaced: set one of them to 1",
            ".maxSurge",
        ),
    )
