"""The steps that a roll-out has before it, if every new worker becomes ready."""

from dataclasses import replace

from tandem_operator.pair import Pair
from tandem_operator.plan.rollout.counts import Counts, Goal, Workers
from tandem_operator.plan.rollout.rolling import plan_rolling

MAX_STEPS = 10_000
"""No roll-out of the pools that the API allows has more."""


def preview(seen: Counts, goal: Goal) -> list[Counts]:
    """The workers after each step: those that were created are ready, and drains are over."""
    states: list[Counts] = []
    counts = _settle(seen)
    for _ in range(MAX_STEPS):
        live = plan_rolling(counts, goal).live
        after = Counts(
            {name: pair.map(lambda number: Workers(ready=number)) for name, pair in live.items()}
        )
        if live == {name: pair.map(lambda each: each.live) for name, pair in counts.of.items()}:
            return states
        counts = after
        states.append(after)
    raise AssertionError(f"the planner never ends for {goal}")


def preview_next(seen: Counts, goal: Goal, revision: str) -> list[Counts]:
    """The steps of a roll-out to a new revision, once the present one is complete."""
    full = Counts({goal.target: goal.desired.map(lambda number: Workers(ready=number))})
    counts = preview(seen, goal)[-1:] or [full]
    return preview(counts[0], replace(goal, target=revision, fallback=goal.target))


def _settle(seen: Counts) -> Counts:
    def settle(pair: Pair[Workers]) -> Pair[Workers]:
        return pair.map(lambda each: Workers(ready=each.live))

    return Counts({name: settle(pair) for name, pair in seen.of.items()})
