"""One tick of an autoscaling policy: from the facts to what scaling hands on to the next pass."""

from dataclasses import replace
from datetime import datetime

from tandem_operator.api import AutoscalingPolicySpec, InferenceServiceSpec
from tandem_operator.api.autoscaling_policy import PolicyMode
from tandem_operator.api.conditions import ConditionType, Judgement
from tandem_operator.api.status import MAX_DECISIONS, ScalingDecision, ScalingStep
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.scaling import (
    TICK_SECONDS,
    PolicyDecision,
    Reading,
    ScalerState,
    ScalingMemory,
)
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.scale.decide import Decision, decide
from tandem_operator.plan.scale.need import PoolSize, Situation, Sizes
from tandem_operator.plan.scale.ratio import describe, hold_ratio, reachable
from tandem_operator.plan.support import find_unused_in_policy

SCALING_CONDITIONS = (
    ConditionType.SCALING_ACTIVE,
    ConditionType.METRICS_STALE,
    ConditionType.SLO_INFEASIBLE,
    ConditionType.GATED_BY_PEER,
)


def plan_scaling(observed: Observed, spec: InferenceServiceSpec, now: datetime) -> ScalingMemory:
    """What scaling knows after this pass: a new decision if a tick is due, else the last one.

    A tick is due when there is a reading that is `TICK_SECONDS` younger than the one behind the
    last decision. A service without a policy has no decision.
    """
    memory, reading = observed.scaling.memory, observed.scaling.reading
    if spec.autoscaling is None:
        return ScalingMemory()
    if memory.policy_name != spec.autoscaling.policy_name:
        memory = replace(memory, policy_name="")
    if reading is not None and _is_due(reading, memory):
        memory = _tick(observed, spec, reading, memory, now)
    return replace(memory, entries=_unpublished(memory.entries, observed.status.scaling))


def _is_due(reading: Reading, memory: ScalingMemory) -> bool:
    if memory.decision is None or memory.decided_at is None:
        return True
    return reading.at - memory.decided_at >= TICK_SECONDS


def _tick(
    observed: Observed,
    spec: InferenceServiceSpec,
    reading: Reading,
    memory: ScalingMemory,
    now: datetime,
) -> ScalingMemory:
    memory = replace(memory, decided_at=reading.at)
    view = observed.scaling.policy
    assert view is not None, "the policy is read with every measurement"
    policy = view.spec
    if policy is None:
        return replace(memory, decision=_unusable("PolicyUnusable", view.problem))
    memory = replace(memory, policy_name=view.name)
    problem = _ratio_problem(spec, policy)
    if problem:
        return replace(memory, decision=_unusable("RatioUnreachable", problem))
    last = _worked_towards(observed, spec)
    situation = _situation(observed, spec, policy, reading, last, now)
    return _remember(decide(situation, reading.at), policy, reading, last, memory, now)


def _situation(
    observed: Observed,
    spec: InferenceServiceSpec,
    policy: AutoscalingPolicySpec,
    reading: Reading,
    last: Pair[int],
    now: datetime,
) -> Situation:
    default, goal = spec.slo.default_class, policy.objectives
    return Situation(
        policy=policy,
        objectives=Pair(
            (goal.ttft_milliseconds or default.ttft_milliseconds) / 1000,
            (goal.tbt_milliseconds or default.tbt_milliseconds) / 1000,
        ),
        sizes=_sizes(observed, last, now),
        signals=reading.signals,
        state=observed.scaling.memory.state,
        constrain=lambda sizes: hold_ratio(spec.ratio, sizes, last),
        gpus=spec.pools.map(lambda pool: pool.gpus_per_pod),
    )


def _remember(
    decision: Decision,
    policy: AutoscalingPolicySpec,
    reading: Reading,
    last: Pair[int],
    memory: ScalingMemory,
    now: datetime,
) -> ScalingMemory:
    active = policy.mode is PolicyMode.ACTIVE
    published = last if active else memory.advised or last
    entries = _new_entries(decision, last, published, now.replace(microsecond=0), active=active)
    measured = reading.signals.age_seconds < float("inf")
    return replace(
        memory,
        decision=PolicyDecision(
            desired=decision.desired,
            because=decision.sentence,
            active=active,
            conditions=_judge(decision, policy, active=active, measured=measured),
        ),
        state=decision.state if active else _advisory_state(decision, last, memory.state),
        advised=None if active else decision.desired,
        entries=(*entries, *memory.entries)[:MAX_DECISIONS],
    )


def _advisory_state(decision: Decision, last: Pair[int], before: ScalerState) -> ScalerState:
    # Advice to shrink is not followed at once: it stands, and the time that it has stood goes on.
    spare_since = Pair.build(
        lambda role: (
            before if decision.desired.of(role) < last.of(role) else decision.state
        ).spare_since.of(role)
    )
    return replace(decision.state, spare_since=spare_since)


def _new_entries(
    decision: Decision, last: Pair[int], published: Pair[int], at: datetime, *, active: bool
) -> tuple[ScalingDecision, ...]:
    """An entry for each pool that moves away from `last`. Advice is given only once."""
    entries = []
    for role, number in decision.desired.items():
        if number == last.of(role) or (not active and number == published.of(role)):
            continue
        step = ScalingStep.START if number > last.of(role) else ScalingStep.DRAIN
        entries.append(
            ScalingDecision(
                at=at,
                pool=role,
                from_=last.of(role),
                to=number,
                how=step if active else ScalingStep.ADVISED,
                because=decision.because.of(role)[:1024],
            )
        )
    return tuple(entries)


def _unpublished(
    entries: tuple[ScalingDecision, ...], in_status: tuple[ScalingDecision, ...]
) -> tuple[ScalingDecision, ...]:
    """The entries that the status doesn't show yet, because they are new or a write failed."""
    known = {(entry.at, entry.pool) for entry in in_status}
    fresh = (entry for entry in entries if (entry.at, entry.pool) not in known)
    return tuple(fresh)[:MAX_DECISIONS]


def _judge(
    decision: Decision, policy: AutoscalingPolicySpec, *, active: bool, measured: bool
) -> dict[ConditionType, Judgement]:
    """The conditions of a tick. `measured`: there was a complete reading at some time."""
    stale = decision.metrics_stale
    message = decision.sentence
    unused = find_unused_in_policy(policy)
    if unused:
        message = f"{message}; these fields have no effect in this release: {', '.join(unused)}"
    reason = "MetricsStale" if stale else ("Active" if active else "Advisory")
    stale_reason = "NoMetrics" if measured else "NotYetMeasured"
    judged = {
        ConditionType.SCALING_ACTIVE: Judgement(active and not stale, reason, message),
        ConditionType.METRICS_STALE: Judgement(
            stale,
            stale_reason if stale else "Fresh",
            f"{decision.because.prefill}: check the routers and workers" if stale else "",
        ),
        ConditionType.SLO_INFEASIBLE: _flag(decision.slo_infeasible, "Infeasible", "Feasible"),
        ConditionType.GATED_BY_PEER: _flag(decision.gated_by_peer, "Gated", "NotGated"),
    }
    if decision.capacity_unavailable:
        judged[ConditionType.CAPACITY_UNAVAILABLE] = Judgement(
            True, "PendingTooLong", decision.capacity_unavailable
        )
    return judged


def _flag(message: str, when_set: str, when_not: str) -> Judgement:
    return Judgement(bool(message), when_set if message else when_not, message)


def _unusable(reason: str, problem: str) -> PolicyDecision:
    """No decision, because of what is wrong with the policy: the numbers stay with their owner."""
    judged = Judgement(False, reason, problem)
    conditions = dict.fromkeys(SCALING_CONDITIONS, judged)
    return PolicyDecision(Pair(0, 0), problem, active=False, conditions=conditions)


def _ratio_problem(spec: InferenceServiceSpec, policy: AutoscalingPolicySpec) -> str:
    pools = policy.pools.pair
    low, high = pools.map(lambda pool: pool.min), pools.map(lambda pool: pool.max)
    if reachable(spec.ratio, low, high):
        return ""
    return (
        f"the policy's bounds, pools.prefill {low.prefill} to {high.prefill} and pools.decode"
        f" {low.decode} to {high.decode}, allow no sizes that keep {describe(spec.ratio)}:"
        " widen the bounds or change spec.ratio"
    )


def _worked_towards(observed: Observed, spec: InferenceServiceSpec) -> Pair[int]:
    """The numbers that the last pass worked towards; before it, those of the spec."""

    def desired(role: Role) -> int:
        pool = observed.pools.of(role)
        if pool is None or pool.desired is None:
            return spec.pool(role).replicas
        return pool.desired

    return Pair.build(desired)


def _sizes(observed: Observed, last: Pair[int], now: datetime) -> Sizes:
    waiting = [
        (now - pod.created).total_seconds() for pod in observed.pods if pod.live and not pod.started
    ]
    draining = [pod for pod in observed.pods if pod.draining_since and pod.failure is None]
    return Sizes(
        pools=Pair.build(lambda role: _pool_size(observed, role, last.of(role), now)),
        oldest_pending_seconds=max(waiting, default=0.0),
        startup_seconds=observed.scaling.startup_seconds,
        num_draining=len(draining),
    )


def _pool_size(observed: Observed, role: Role, last: int, now: datetime) -> PoolSize:
    pods = [pod for pod in observed.pods_of(role) if pod.ready and pod.live]
    # A worker that crashed is on its way back: it is pending, not capacity to give up.
    ready = min(len(pods), last)
    since = [pod.ready_since for pod in pods if pod.ready_since is not None]
    age = (now - max(since)).total_seconds() if since else float("inf")
    return PoolSize(ready, last - ready, age)
