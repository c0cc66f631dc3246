"""What is told of a decision: new entries for status.scaling, and conditions."""

from datetime import datetime

from tandem_operator.api import AutoscalingPolicySpec
from tandem_operator.api.conditions import ConditionType
from tandem_operator.api.status import MAX_DECISIONS, ScalingDecision, ScalingStep
from tandem_operator.facts.observed import PolicyDecision
from tandem_operator.manifests.fleet import POOL_ROLES
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.scale.decision import Decision
from tandem_operator.plan.support import find_unused_in_policy

Judged = tuple[bool, str, str]

SCALING_CONDITIONS = (
    ConditionType.SCALING_ACTIVE,
    ConditionType.METRICS_STALE,
    ConditionType.SLO_INFEASIBLE,
    ConditionType.GATED_BY_PEER,
)


def tell_changes(
    decision: Decision, last: Pair[int], told: Pair[int], at: datetime, *, active: bool
) -> tuple[ScalingDecision, ...]:
    """An entry for each pool that moves away from `last`; advice that was `told` only once."""
    wanted = Pair(decision.prefill, decision.decode)
    because = {
        Role.PREFILL: decision.because_prefill,
        Role.DECODE: decision.because_decode,
    }
    entries = []
    for role in Role:
        number = wanted.of(role)
        if number == last.of(role) or (not active and number == told.of(role)):
            continue
        step = ScalingStep.START if number > last.of(role) else ScalingStep.DRAIN
        entries.append(
            ScalingDecision(
                at=at,
                pool=POOL_ROLES[role],
                from_=last.of(role),
                to=number,
                how=step if active else ScalingStep.ADVISED,
                because=because[role][:1024],
            )
        )
    return tuple(entries)


def untold(
    entries: tuple[ScalingDecision, ...], in_status: tuple[ScalingDecision, ...]
) -> tuple[ScalingDecision, ...]:
    """The entries that a failed pass has kept out of the status."""
    known = {(entry.at, entry.pool) for entry in in_status}
    fresh = (entry for entry in entries if (entry.at, entry.pool) not in known)
    return tuple(fresh)[:MAX_DECISIONS]


def judge_decision(
    decision: Decision, policy: AutoscalingPolicySpec, *, active: bool, measured: bool
) -> dict[str, Judged]:
    """The conditions of a tick, by type. `measured`: there was a complete reading some time."""
    stale = decision.metrics_stale
    said = f"prefill: {decision.because_prefill}; decode: {decision.because_decode}"
    unused = find_unused_in_policy(policy)
    if unused:
        said = f"{said}; without effect in this release: {', '.join(unused)}"
    reason = "MetricsStale" if stale else ("Active" if active else "Advisory")
    judged: dict[ConditionType, Judged] = {
        ConditionType.SCALING_ACTIVE: (active and not stale, reason, said),
        ConditionType.METRICS_STALE: (
            stale,
            ("NoMetrics" if measured else "NotYetMeasured") if stale else "Fresh",
            f"{decision.because_prefill}: look at the routers and workers" if stale else "",
        ),
        ConditionType.SLO_INFEASIBLE: _flag(decision.slo_infeasible, "Infeasible", "Feasible"),
        ConditionType.GATED_BY_PEER: _flag(decision.gated_by_peer, "Gated", "NotGated"),
    }
    if decision.capacity_unavailable:
        judged[ConditionType.CAPACITY_UNAVAILABLE] = (
            True,
            "PendingTooLong",
            decision.capacity_unavailable,
        )
    return {str(kind): parts for kind, parts in judged.items()}


def unusable(reason: str, problem: str) -> PolicyDecision:
    """No decision, because of what is wrong with the policy: the numbers stay with their owner."""
    judged = (False, reason, problem)
    return PolicyDecision(
        Pair(0, 0),
        problem,
        active=False,
        conditions={str(kind): judged for kind in SCALING_CONDITIONS},
    )


def _flag(message: str, when_set: str, when_not: str) -> Judged:
    return bool(message), when_set if message else when_not, message
