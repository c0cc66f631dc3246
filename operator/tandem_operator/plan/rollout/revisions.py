"""How many workers of each revision there should be now, and which revision the routers are of.

Revisions of one model share the routers, and one replaces the other worker by worker (`rolling`).
A router works with one model. So a change of the model brings all new workers up beside the old
ones, and then the routers change over (`stage`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.rollout import resolve_int_or_percent
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.worker import WorkerPod
from tandem_operator.manifests.revision import model_id_of
from tandem_operator.names.objects import CONTROLLER_REVISION, record_name
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.rollout.counts import Counts, Goal, Workers, is_paired
from tandem_operator.plan.rollout.drain import can_return
from tandem_operator.plan.rollout.rolling import needed, plan_rolling, serves
from tandem_operator.plan.rollout.stage import RolloutView, Stage, plan_rollout


@dataclass(frozen=True)
class RevisionStep:
    """What to do now.

    `wanted`: how many live workers of a revision there should be. Those of other revisions drain if
    `keep` is given and lacks them, and else stay. `serving`: the revisions that requests may use.
    `probed`: the one whose workers KV should be seen to move between. `follow`: whether the routers
    take what the spec says.
    """

    stage: Stage
    wanted: Mapping[str, Pair[int]]
    route: str
    probed: str
    serving: frozenset[str]
    follow: bool = True
    keep: frozenset[str] | None = None
    waits: str = ""  # what holds a roll-out up, after what it does


def plan_revisions(
    observed: Observed, spec: InferenceServiceSpec, target: str, desired: Pair[int]
) -> RevisionStep:
    """The next step of a roll-out; the same one again while nothing has changed."""
    if changes_model(observed, spec, target):
        return _change_over(observed, spec, target, desired)
    return _roll(observed, spec, target, desired)


def changes_model(observed: Observed, spec: InferenceServiceSpec, target: str) -> bool:
    """Whether the routers that there are work with another model than the target."""
    router, mine = observed.router, model_id_of(spec)
    if router is None or not _has_served(observed, router.revision):
        return False
    if router.revision == target:
        # The last routers of the old model may still have streams on its workers.
        others = any(pod.model_id not in (mine, "") for pod in observed.pods)
        return others and not router.rolled_out
    return router.model_id != mine


def build_goal(
    observed: Observed, spec: InferenceServiceSpec, target: str, desired: Pair[int]
) -> Goal:
    """What a roll-out has to reach, with its bounds as counts."""
    rollout = spec.rollout
    surge = desired.map(lambda n: resolve_int_or_percent(rollout.max_surge, n, round_up=True))
    loss = desired.map(lambda n: resolve_int_or_percent(rollout.max_unavailable, n, round_up=False))
    # As for a Deployment: two percentages that come to nothing let one worker go.
    loss = Pair.build(lambda role: loss.of(role) if surge.of(role) else max(loss.of(role), 1))
    if observed.over_quota:
        surge = Pair(0, 0)  # there is no place for more: old workers have to go first
    routed = observed.router.revision if observed.router is not None else ""
    stays = routed != target and _has_served(observed, routed)
    return Goal(target, desired, surge, loss, routed if stays else "", spec.rollout.paused)


def count_workers(observed: Observed, model_id: str) -> Counts:
    """The workers of each revision. Those of another model are never ready: no router uses them."""
    revisions = dict.fromkeys(pod.revision for pod in observed.pods)
    return Counts({name: _count_revision(observed, name, model_id) for name in revisions})


def _count_revision(observed: Observed, revision: str, model_id: str) -> Pair[Workers]:
    def count(role: Role) -> Workers:
        mine = [pod for pod in observed.pods_of(role) if pod.revision == revision]
        return _count(mine, model_id)

    return Pair.build(count)


def _count(pods: list[WorkerPod], model_id: str) -> Workers:
    live = [pod for pod in pods if pod.live]
    ready = [pod for pod in live if pod.ready and pod.model_id in (model_id, "")]
    held = [pod for pod in pods if not pod.live and (pod.failure is None or pod.deleting)]
    return Workers(
        ready=len(ready),
        pending=len(live) - len(ready),
        draining=len(held),
        returnable=sum(can_return(pod) for pod in held),
        unplaced=sum(pod.unplaced for pod in live),
        failed=sum(pod.failure is not None and not pod.deleting for pod in pods),
        youngest=max((int(pod.created.timestamp()) for pod in ready), default=0),
    )


def _has_served(observed: Observed, revision: str) -> bool:
    return bool(revision) and (
        any(pod.served and pod.revision == revision for pod in observed.pods)
        or observed.owns(CONTROLLER_REVISION, record_name(observed.name, revision))
    )


def _roll(
    observed: Observed, spec: InferenceServiceSpec, target: str, desired: Pair[int]
) -> RevisionStep:
    counts = count_workers(observed, model_id_of(spec))
    goal = build_goal(observed, spec, target, desired)
    step = plan_rolling(counts, goal)
    router = observed.router
    routed = router.revision if router is not None else ""
    old = any(each.live for name, pair in counts.of.items() if name != target for each in pair)
    done = not old and (serves(counts.get(target), goal) or not any(desired))
    route = target if done or not goal.fallback else routed
    if any(pod.revision != target for pod in observed.pods) or route != target:
        stage = Stage.PAUSED if goal.paused else Stage.ROLL
    else:
        changed = router is not None and routed == target and router.rolled_out
        stage = Stage.STEADY if changed else Stage.SWITCH
    serving = {name for name, pair in counts.of.items() if is_paired(pair, needed(goal))}
    return RevisionStep(
        stage=stage,
        wanted=step.live,
        route=route,
        probed=target if serves(counts.get(target), goal) else route,
        serving=frozenset(serving or {route}),
        waits=_explain(counts, goal) if stage is Stage.ROLL else "",
    )


def _explain(counts: Counts, goal: Goal) -> str:
    """What holds a roll-out up, with the remedy."""
    target = counts.get(goal.target)
    for role, each in target.items():
        if each.unplaced and not goal.unavailable.of(role):
            return (
                f"; {each.unplaced} new {role} workers find no node, and rollout.maxUnavailable"
                " lets no old one go first: add GPUs, or set rollout.maxUnavailable to 1"
            )
    in_place = goal.desired.decode and not goal.floor.decode and not goal.surge.decode
    if in_place and not any(pair.decode.ready for pair in counts.of.values()):
        return (
            "; no decode worker serves until the new one is ready: set rollout.maxSurge to 1 to"
            " start it beside the old one"
        )
    return ""


def _change_over(
    observed: Observed, spec: InferenceServiceSpec, target: str, desired: Pair[int]
) -> RevisionStep:
    router = observed.router
    assert router is not None, "only routers that there are change over"
    present = [pod for pod in observed.pods if not pod.deleting and pod.failure is None]
    ready = Pair.build(
        lambda role: sum(
            pod.ready and pod.live and pod.revision == target and pod.role is role
            for pod in present
        )
    )
    step = plan_rollout(
        RolloutView(
            target=target,
            routed=router.revision,
            routed_served=_has_served(observed, router.revision),
            routers_changed=router.rolled_out,
            target_ready=all(number >= wanted for number, wanted in ready.zip(desired)),
            old_workers=any(pod.revision != target for pod in observed.pods),
            paused=spec.rollout.paused,
        )
    )
    # Other revisions of the old model share its routers: an earlier roll-out may be half done.
    counts = count_workers(observed, router.model_id)
    shared = {name for name, pair in counts.of.items() if is_paired(pair, Pair(0, 1))}
    shared -= {router.revision, target}
    wanted = dict.fromkeys(step.grow, desired)
    if shared and router.revision in wanted:
        others = Pair.build(lambda role: sum(counts.get(name).of(role).live for name in shared))
        wanted[router.revision] = Pair.build(
            lambda role: max(
                counts.get(router.revision).of(role).live, desired.of(role) - others.of(role)
            )
        )
    return RevisionStep(
        stage=step.stage,
        wanted=wanted,
        route=step.route,
        probed=step.route,
        serving=frozenset({router.revision} | shared),
        follow=step.route == target,
        keep=None if step.keep is None else step.keep | shared,
    )
