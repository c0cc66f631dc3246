"""What is known for scaling: the policy, the last measurement, and what earlier decisions left."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tandem_operator.api import AutoscalingPolicySpec
from tandem_operator.api.autoscaling_policy import PolicyTarget
from tandem_operator.api.conditions import ConditionType, Judgement
from tandem_operator.api.status import ScalingDecision
from tandem_operator.facts.signals import Signals
from tandem_operator.pair import Pair

TICK_SECONDS: Final = 4.0
"""Passes come more often than this. Between two ticks the last decision stands."""
MEASURE_SECONDS: Final = 10.0
"""How often a service without a policy is measured, for status.slo."""


@dataclass(frozen=True)
class Reading:
    """One measurement of a service, at a time of the observer's clock, which never goes back."""

    signals: Signals
    at: float


@dataclass(frozen=True)
class PolicyView:
    """The policy of a service: one written inline (`name` is empty), or an AutoscalingPolicy.

    `spec` is None when it can't be used; `problem` then says why and what to do. `targets` are
    the services that its status lists.
    """

    spec: AutoscalingPolicySpec | None
    problem: str = ""
    name: str = ""
    resource_version: str = ""
    targets: tuple[PolicyTarget, ...] = ()


@dataclass(frozen=True)
class ScalerState:
    """What one decision leaves for the next. Times are those of the observer's clock.

    `spare_since`: since when each pool could have been smaller, None: it couldn't.
    `no_growth_until`: pods found no place, so nothing grows before this time.
    """

    spare_since: Pair[float | None] = Pair(None, None)
    no_growth_until: float | None = None


@dataclass(frozen=True)
class PolicyDecision:
    """What the policy wants for both pools, and the conditions that it sets.

    `active` is False in Advisory mode and when the policy can't be used: the numbers then stay with
    their other owner.
    """

    desired: Pair[int]
    because: str
    active: bool = True
    conditions: Mapping[ConditionType, Judgement] = field(default_factory=dict)


@dataclass(frozen=True)
class ScalingMemory:
    """What a plan hands on to the next pass; the observer keeps it.

    `decided_at` is the time of the reading behind `decision`. `advised` is the advice that was last
    published. `entries` are decisions, newest first, that status.scaling doesn't show yet.
    `policy_name` is the AutoscalingPolicy whose status lists this service.
    """

    decided_at: float | None = None
    decision: PolicyDecision | None = None
    state: ScalerState = field(default_factory=ScalerState)
    advised: Pair[int] | None = None
    entries: tuple[ScalingDecision, ...] = ()
    policy_name: str = ""


@dataclass(frozen=True)
class Scaling:
    """The facts about scaling one service.

    `policy` is read again for each tick and None between two ticks. `left_policy` is the policy
    that lists this service in its status although the service no longer names it.
    `startup_seconds` is the measured p90 of start-up times; 0: unknown.
    """

    reading: Reading | None = None
    policy: PolicyView | None = None
    left_policy: PolicyView | None = None
    startup_seconds: float = 0.0
    memory: ScalingMemory = field(default_factory=ScalingMemory)
