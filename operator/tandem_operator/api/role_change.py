"""Whether workers may change role without a restart."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tandem_operator.api.api_object import ApiObject


class RoleChangeMode(StrEnum):
    """Whether workers may change role."""

    NONE = "None"
    WARM = "Warm"


class RoleChange(ApiObject):
    """Moving running workers between the pools, weights still loaded."""

    mode: RoleChangeMode = RoleChangeMode.WARM
    """Warm: a drained worker may change role in place; None: pools change by pods only."""
    min_prefill: Annotated[int, Field(ge=0, le=1024)] = 1
    """Prefill workers that a role change must leave."""
    min_decode: Annotated[int, Field(ge=0, le=1024)] = 1
    """Decode workers that a role change must leave."""
