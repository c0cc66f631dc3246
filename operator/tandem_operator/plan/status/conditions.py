"""Writes conditions: all of them in the first pass; their time changes only with their status."""

from datetime import datetime

from tandem_operator.api.conditions import Condition, ConditionStatus, ConditionType, Judgement


def write_conditions(
    old: tuple[Condition, ...],
    judgements: dict[ConditionType, Judgement],
    generation: int,
    now: datetime,
) -> tuple[Condition, ...]:
    """All conditions, in the order of `ConditionType`. Each of them must be judged."""
    assert judgements.keys() == set(ConditionType), "every condition is judged"
    return write_some_conditions(old, judgements, generation, now)


def write_some_conditions(
    old: tuple[Condition, ...],
    judgements: dict[ConditionType, Judgement],
    generation: int,
    now: datetime,
) -> tuple[Condition, ...]:
    """The judged conditions and no others, in the order of `ConditionType`."""
    before = {condition.type: condition for condition in old}
    return tuple(
        _write(before.get(kind), kind, judgements[kind], generation, now)
        for kind in ConditionType
        if kind in judgements
    )


def _write(
    old: Condition | None, kind: str, judged: Judgement, generation: int, now: datetime
) -> Condition:
    status = {
        True: ConditionStatus.TRUE,
        False: ConditionStatus.FALSE,
        None: ConditionStatus.UNKNOWN,
    }[judged.holds]
    flipped = old is None or old.status is not status
    return Condition(
        type=str(kind),
        status=status,
        reason=judged.reason,
        message=judged.message[:32768],
        last_transition_time=now if flipped or old is None else old.last_transition_time,
        observed_generation=generation,
    )
