"""The events of a pass: scaling, and conditions that turned."""

from typing import Final

from tandem_operator.api.conditions import Condition, ConditionStatus, ConditionType, condition_of
from tandem_operator.api.status import ScalingDecision, ScalingStep, TransportStatus
from tandem_operator.facts.observed import Observed
from tandem_operator.pair import Pair
from tandem_operator.plan.scale.targets import PoolTarget
from tandem_operator.plan.steps import Note

NOT_YET_MEASURED: Final = "NotYetMeasured"
UNUSABLE: Final = ("PolicyUnusable", "RatioUnreachable")
"""Reasons of ScalingActive that the user has to do something about."""
_REPORTED: Final = {
    ConditionType.READY: (True, False),
    ConditionType.DEGRADED: (True,),
    ConditionType.TRANSPORT_VERIFIED: (True, False),
    ConditionType.CAPACITY_UNAVAILABLE: (True,),
    ConditionType.METRICS_STALE: (True, False),
    ConditionType.SLO_INFEASIBLE: (True,),
    ConditionType.GATED_BY_PEER: (True,),
}
"""Conditions whose turns become events, and the values that are reported."""
_GOOD: Final = (ConditionType.READY, ConditionType.TRANSPORT_VERIFIED)
"""Conditions that are good news when they are true; the others are bad news."""


def note_scaling(
    observed: Observed, targets: Pair[PoolTarget], entries: tuple[ScalingDecision, ...]
) -> list[Note]:
    """New decisions of the policy, writes that are held back, and numbers that change."""
    notes = [
        Note(
            "ScalingAdvised" if item.how is ScalingStep.ADVISED else "ScalingDecided",
            f"{item.pool.title()}: {item.from_} to {item.to}: {item.because}",
        )
        for item in entries
    ]
    for role, target in targets.items():
        pool = observed.pools.of(role)
        if pool is None:
            continue
        if target.ignored and target.ignored != pool.ignored_scale:
            notes.append(Note("ScaleHeldBack", f"{role}: {target.ignored}", warning=True))
        if pool.desired is not None and pool.desired != target.desired:
            change = f"{role}: {pool.desired} to {target.desired} by {target.scaled_by}"
            notes.append(Note("Scaling", change))
    return notes


def note_conditions(observed: Observed, conditions: tuple[Condition, ...]) -> list[Note]:
    """Conditions that turned since the last pass, and a policy that can't be used."""
    notes = _note_policy(observed, conditions)
    for kind, values in _REPORTED.items():
        new, old = condition_of(conditions, kind), condition_of(observed.status.conditions, kind)
        if new is None or (old is not None and old.status is new.status):
            continue
        if new.status is ConditionStatus.UNKNOWN:
            continue
        is_true = new.status is ConditionStatus.TRUE
        if is_true not in values or (old is None and not is_true):
            continue
        if NOT_YET_MEASURED in (new.reason, old.reason if old is not None else ""):
            continue  # a service that starts
        reason = str(kind) if is_true else f"Not{kind}"
        bad = is_true is (kind not in _GOOD)
        notes.append(Note(reason, new.message or new.reason, warning=bad))
    return notes


def note_links(observed: Observed, transport: TransportStatus) -> list[Note]:
    """Pairs of workers that were taken out of use since the last pass, and those that are back."""
    old = observed.status.transport.out_of_use if observed.status.transport is not None else ()
    before = {(pair.prefill, pair.decode) for pair in old}
    now = {(pair.prefill, pair.decode): pair.because for pair in transport.out_of_use}
    notes = [
        Note("PairOutOfUse", f"{decode} takes no KV from {prefill}: {because}", warning=True)
        for (prefill, decode), because in now.items()
        if (prefill, decode) not in before
    ]
    live = {pod.name for pod in observed.pods if pod.live}
    notes += [
        Note("PairInUse", f"{decode} takes KV from {prefill} again")
        for prefill, decode in sorted(before - now.keys())
        if {prefill, decode} <= live
    ]
    return notes


def note_invalid_spec(observed: Observed) -> tuple[Note, ...]:
    """That the spec can't be read, once for each edit."""
    if observed.status.observed_generation == observed.generation:
        return ()
    return (Note("InvalidSpec", observed.spec_error, warning=True),)


def _note_policy(observed: Observed, conditions: tuple[Condition, ...]) -> list[Note]:
    kind = ConditionType.SCALING_ACTIVE
    new, old = condition_of(conditions, kind), condition_of(observed.status.conditions, kind)
    if new is None or new.reason not in UNUSABLE or (old is not None and old.reason == new.reason):
        return []
    return [Note(new.reason, new.message, warning=True)]
