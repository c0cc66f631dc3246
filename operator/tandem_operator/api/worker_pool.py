"""WorkerPool: one role of one service; written by the operator, scaled by users."""

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from tandem_operator.api.api_object import ApiObject, Rule
from tandem_operator.api.conditions import Conditions
from tandem_operator.pair import Role


def _read_role(value: object) -> Role:
    if isinstance(value, Role):
        return value
    for role in Role:
        if value == _write_role(role):
            return role
    raise ValueError(f"{value!r} is not a role: write Prefill or Decode")


def _write_role(role: Role) -> str:
    return role.title()


ApiRole = Annotated[
    Role,
    BeforeValidator(_read_role),
    PlainSerializer(_write_role, return_type=str),
    WithJsonSchema({"type": "string", "enum": [_write_role(role) for role in Role]}),
]
"""A `Role` as the API writes it: Prefill, Decode."""


class WorkerPoolSpec(ApiObject):
    """One role of one service."""

    service_name: Annotated[str, Field(min_length=1, max_length=63)]
    """The InferenceService that this pool belongs to; it can't be changed."""
    role: ApiRole
    """The role of the pool's workers; it can't be changed."""
    replicas: Annotated[int, Field(ge=0, le=1024)] = 1
    """The wanted number of workers, which `kubectl scale` writes. It has no effect while an
    autoscaling policy is active."""
    revision: Annotated[str, Field(max_length=63)] = ""
    """The revision that the pool's workers should have; written by the operator."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.serviceName == oldSelf.serviceName",
            "spec.serviceName can't be changed: delete the pool, and the operator creates it again",
            ".serviceName",
        ),
        Rule(
            "self.role == oldSelf.role",
            "spec.role can't be changed: delete the pool, and the operator creates it again",
            ".role",
        ),
    )


class WorkerPoolStatus(ApiObject):
    """The state of the pool."""

    replicas: Annotated[int, Field(ge=0, le=4096)] = 0
    """Workers that exist, without those that drain."""
    ready_replicas: Annotated[int, Field(ge=0, le=4096)] = 0
    """Workers that take work."""
    selector: Annotated[str, Field(max_length=1024)] = ""
    """Label selector of the pool's pods, for HPA and KEDA."""
    desired_replicas: Annotated[int, Field(ge=0, le=4096)] = 0
    """Workers that the operator is working towards."""
    conditions: Conditions = ()
    """What holds for this pool."""
