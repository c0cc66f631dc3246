"""Conditions: what holds, since when, and why."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, keyed_by


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class ConditionType(StrEnum):
    """The conditions of an InferenceService. The operator sets all of them in its first pass."""

    READY = "Ready"
    PROGRESSING = "Progressing"
    DEGRADED = "Degraded"
    PREFILL_READY = "PrefillReady"
    DECODE_READY = "DecodeReady"
    ROUTER_READY = "RouterReady"
    MODEL_READY = "ModelReady"
    TRANSPORT_VERIFIED = "TransportVerified"
    SCALING_ACTIVE = "ScalingActive"
    SLO_INFEASIBLE = "SLOInfeasible"
    METRICS_STALE = "MetricsStale"
    CAPACITY_UNAVAILABLE = "CapacityUnavailable"
    GATED_BY_PEER = "GatedByPeer"


class Condition(ApiObject):
    """One condition, as Kubernetes writes them."""

    type: Annotated[
        str,
        Field(min_length=1, max_length=316, pattern=r"^[A-Za-z0-9]([A-Za-z0-9_./-]*[A-Za-z0-9])?$"),
    ]
    """Name of the condition."""
    status: ConditionStatus
    """Whether the condition holds."""
    reason: Annotated[
        str,
        Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"),
    ]
    """Why the condition has this status, in one PascalCase word."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """Why the condition has this status, in a sentence that names the remedy."""
    last_transition_time: datetime
    """When status last changed."""
    observed_generation: Annotated[int, Field(ge=0, le=2**53)]
    """The metadata.generation that the condition is about; `kubectl wait` ignores older ones."""


Conditions = Annotated[
    tuple[Condition, ...], Field(max_length=32, json_schema_extra=keyed_by("type"))
]


@dataclass(frozen=True)
class Judgement:
    """What a condition should say: a condition without its times. `holds` None: unknown."""

    holds: bool | None
    reason: str
    message: str = ""


def condition_of(conditions: tuple[Condition, ...], kind: ConditionType) -> Condition | None:
    """The condition of a type, or None before the operator's first pass."""
    return next((item for item in conditions if item.type == kind), None)


def holds(conditions: tuple[Condition, ...], kind: ConditionType) -> bool:
    """Whether a condition is known to be true."""
    found = condition_of(conditions, kind)
    return found is not None and found.status is ConditionStatus.TRUE
