"""The status of an AutoscalingPolicy: what it does for each service that names it."""

from datetime import datetime

from tandem_operator.api.autoscaling_policy import PolicyTarget
from tandem_operator.api.status import ScalingDecision, ScalingStep
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.scaling import PolicyDecision, PolicyView, ScalingMemory
from tandem_operator.plan.scale.policy import SCALING_CONDITIONS
from tandem_operator.plan.status.conditions import write_some_conditions
from tandem_operator.plan.steps import PolicyTargets

MAX_TARGETS = 256
MAX_SENTENCE = 1024
NO_DECISION = "none yet"


def plan_policy_status(
    observed: Observed, memory: ScalingMemory | None, now: datetime
) -> tuple[PolicyTargets, ...]:
    """The statuses to write: of the policy read in this pass, and of the one that was left.

    Services that share a policy write in turn: each write names the version that was read, and a
    write that is lost is repeated at the next tick.
    """
    left, read = observed.scaling.left_policy, observed.scaling.policy
    plans = [leave_policy(left, observed.name)] if left is not None else []
    if memory is not None and memory.decision is not None and read is not None and read.spec:
        plans.append(_with(read, memory.decision, memory.entries, observed, now))
    return tuple(plan for plan in plans if plan is not None)


def leave_policy(policy: PolicyView, name: str) -> PolicyTargets | None:
    """The status of a policy without a service that no longer names it, or is gone."""
    kept = tuple(target for target in policy.targets if target.name != name)
    return _write(policy, kept) if len(kept) < len(policy.targets) else None


def _with(
    policy: PolicyView,
    decision: PolicyDecision,
    entries: tuple[ScalingDecision, ...],
    observed: Observed,
    now: datetime,
) -> PolicyTargets | None:
    if not policy.name:
        return None  # written inline
    mine = next((target for target in policy.targets if target.name == observed.name), None)
    newest = next(iter((*entries, *observed.status.scaling)), None)
    conditions = write_some_conditions(
        mine.conditions if mine is not None else (),
        {kind: decision.conditions[kind] for kind in SCALING_CONDITIONS},
        observed.generation,
        now,
    )
    fresh = PolicyTarget(
        name=observed.name,
        last_decision=_sentence(newest, decision, mine)[:MAX_SENTENCE],
        conditions=conditions,
    )
    if mine is not None and _gist(mine) == _gist(fresh):
        return None
    others = tuple(target for target in policy.targets if target.name != observed.name)
    return _write(policy, (*others, fresh))


def _sentence(
    newest: ScalingDecision | None, decision: PolicyDecision, mine: PolicyTarget | None
) -> str:
    if newest is not None:
        text = f"{newest.pool.title()} {newest.from_} to {newest.to}: {newest.because}"
        return f"advised: {text}" if newest.how is ScalingStep.ADVISED else text
    last = mine.last_decision if mine is not None else None
    if last is not None and last.startswith(NO_DECISION):
        return last  # measurements change all the time
    return f"{NO_DECISION}; {decision.because}"


def _write(policy: PolicyView, targets: tuple[PolicyTarget, ...]) -> PolicyTargets:
    return PolicyTargets(policy.name, policy.resource_version, targets[-MAX_TARGETS:])


def _gist(target: PolicyTarget) -> tuple[str | None, list[tuple[str, str, str]]]:
    # Messages hold measurements, which change all the time: they are in the service's own status.
    judged = [(item.type, str(item.status), item.reason) for item in target.conditions]
    return target.last_decision, judged
