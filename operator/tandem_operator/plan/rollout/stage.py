"""How a change of the model rolls out: a pure step function, replace-all.

A whole new revision comes up beside the old one; when all of it is ready the routers change over;
when the routers have changed over, the old workers drain. A router works with one model, and uses
no worker of another one. Until the routers change over, the
revision that serves keeps its numbers: its workers that fail are replaced by workers like them.
"""

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """The stage of a roll-out."""

    STEADY = "Steady"
    ROLL = "Roll"  # workers of the new revision take the places of old ones
    SURGE = "Surge"  # workers of the new revision come up beside the old ones
    SWITCH = "Switch"  # the routers change over
    RETIRE = "Retire"  # the old workers drain
    PAUSED = "Paused"


@dataclass(frozen=True)
class RolloutView:
    """What the next step depends on. Revisions are ids; "" means that there is none."""

    target: str
    routed: str  # revision of the router Deployment
    routed_served: bool  # `routed` has workers that served, or that replace such
    routers_changed: bool  # every router is of `routed`, ready, and no other is left
    target_ready: bool  # the target's workers are all ready
    old_workers: bool  # workers of other revisions than the target exist
    paused: bool = False


@dataclass(frozen=True)
class RolloutStep:
    """What to do now.

    `grow`: the revisions whose workers are kept at the desired number. `route`: the one
    that routers use. `keep`: revisions whose workers stay; None: all of them, because a router that
    is being replaced may still have streams on any of them.
    """

    stage: Stage
    grow: tuple[str, ...]
    route: str
    keep: frozenset[str] | None


def plan_rollout(view: RolloutView) -> RolloutStep:
    """The next step. Idempotent: the same view gives the same step."""
    target, routed = view.target, view.routed
    serving = bool(routed) and view.routed_served
    if routed == target or not (serving or view.paused):
        return _routed_to_target(view)
    keep = frozenset({routed, target}) if view.routers_changed else None
    if view.paused:
        return RolloutStep(Stage.PAUSED, (routed or target,), routed or target, keep)
    if view.target_ready:
        return RolloutStep(Stage.SWITCH, (target,), target, keep)
    return RolloutStep(Stage.SURGE, (routed, target), routed, keep)


def _routed_to_target(view: RolloutView) -> RolloutStep:
    target = view.target
    if not view.old_workers:
        stage = Stage.STEADY if view.routed == target and view.routers_changed else Stage.SWITCH
        return RolloutStep(stage, (target,), target, frozenset({target}))
    if (view.routed == target and view.routers_changed) or not view.routed_served:
        return RolloutStep(Stage.RETIRE, (target,), target, frozenset({target}))
    return RolloutStep(Stage.SWITCH, (target,), target, None)
