"""One pass over one service: facts in, plan out. Pure."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.conditions import ConditionType, condition_of
from tandem_operator.api.status import ScalingStep
from tandem_operator.facts.observed import Observed
from tandem_operator.manifests.fleet import build_fleet, build_owner, build_pool
from tandem_operator.manifests.revision import revision_of
from tandem_operator.manifests.router import build_router
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import build_worker_pod
from tandem_operator.names.objects import pool_name
from tandem_operator.pair import Role
from tandem_operator.plan.rollout.drain import DrainStep, continue_drain, start_drain
from tandem_operator.plan.rollout.failures import keep_evidence
from tandem_operator.plan.rollout.probe import plan_probe
from tandem_operator.plan.rollout.stage import RolloutStep, RolloutView, plan_rollout
from tandem_operator.plan.rollout.workers import PoolSteps, plan_pool
from tandem_operator.plan.scale.targets import Targets, plan_targets
from tandem_operator.plan.status.service import (
    StatusInput,
    build_pool_status,
    build_status,
    build_unreadable_status,
)
from tandem_operator.plan.steps import Deletion, Note, Plan
from tandem_operator.plan.support import find_blockers
from tandem_operator.plan.wiring import choose_wiring

DELETE_DRAIN_SECONDS = 10
"""Streams of a service that the user deletes get this long to end."""
DELETE_GRACE_SECONDS = 5
NOT_YET_MEASURED = "NotYetMeasured"
UNUSABLE = ("PolicyUnusable", "RatioUnreachable")
"""Reasons of ScalingActive that the user has to do something about."""
MEASURE_SECONDS = 15.0
"""How often status.slo of a settled service is measured anew."""
DELETE_LIMIT_SECONDS = 25
"""After this long the finalizer goes even if pods still hang: their owner's end removes them."""


def reconcile(observed: Observed, now: datetime) -> Plan:
    """What to do about a service, given all facts."""
    now = now.replace(microsecond=0)
    if observed.deleting_since is not None:
        return _plan_deletion(observed, now)
    if observed.spec is None:
        status = build_unreadable_status(observed, now)
        return Plan(status=status.to_manifest(), events=_invalid(observed))
    return _plan_service(observed, observed.spec, now)


def _plan_service(observed: Observed, spec: InferenceServiceSpec, now: datetime) -> Plan:
    revision = revision_of(spec, observed.images)
    targets = plan_targets(spec, observed)
    wiring = _wiring(observed, spec)
    blockers = find_blockers(spec)
    if wiring.problem and "not supported" in wiring.problem:
        blockers.append(wiring.problem)
    step = plan_rollout(_rollout_view(observed, spec, revision, targets))
    steps = _plan_pools(observed, spec, step, targets, blockers, now)
    failures, failure_notes = keep_evidence(observed)
    made = StatusInput(spec, revision, step, targets, wiring, blockers, failures)
    status = build_status(observed, made, now)
    probe = plan_probe(observed, spec, step.route, now)
    owner = build_owner(observed)
    notes = [note for pool in steps.values() for note in pool.notes]
    return Plan(
        finalizer="keep" if observed.has_finalizer else "add",
        apply=(
            *_changed_pools(observed, targets, revision),
            *build_fleet(observed, spec, owner),
            *_routers(observed, spec, step.route, revision, owner),
        ),
        create=_new_pods(observed, spec, steps, revision, wiring),
        mark=tuple(mark for pool in steps.values() for mark in pool.mark),
        engine_calls=(
            *(call for pool in steps.values() for call in pool.calls),
            *([probe] if probe else []),
        ),
        delete=tuple(item for pool in steps.values() for item in pool.delete),
        status=status.to_manifest(),
        pool_status={
            pool_name(observed.name, role): build_pool_status(observed, role, status, now)
            for role in Role
            if role in observed.pools
        },
        events=(
            *failure_notes,
            *notes,
            *_target_notes(observed, targets),
            *_condition_notes(observed, status.conditions),
        ),
        requeue_after=_requeue(observed, steps, probe is not None),
    )


def _routers(
    observed: Observed,
    spec: InferenceServiceSpec,
    route: str,
    target: str,
    owner: dict[str, Any],
) -> list[dict[str, Any]]:
    children = build_router(observed, spec, target, owner)
    if route == target:
        return children
    # Until the routers change over, their Deployment stays as the old spec made it.
    return [child for child in children if child["kind"] != "Deployment"]


def _wiring(observed: Observed, spec: InferenceServiceSpec) -> Wiring:
    num_gpus = max(spec.prefill.gpus_per_pod, spec.decode.gpus_per_pod)
    recorded = observed.status.transport.wiring if observed.status.transport else None
    fresh = observed.status.observed_generation != observed.generation
    return choose_wiring(spec.rdma, observed.nodes, num_gpus, None if fresh else recorded)


def _rollout_view(
    observed: Observed, spec: InferenceServiceSpec, target: str, targets: Targets
) -> RolloutView:
    router = observed.router
    routed = router.revision if router is not None else ""
    present = [pod for pod in observed.pods if not pod.deleting and pod.failure is None]
    ready = {
        role: sum(p.ready and p.live and p.revision == target and p.role is role for p in present)
        for role in Role
    }
    return RolloutView(
        target=target,
        routed=routed,
        routed_live=any(pod.started and pod.revision == routed for pod in present),
        routers_changed=router is not None and router.rolled_out,
        target_ready=all(ready[role] >= targets.desired.of(role) for role in Role),
        old_workers=any(pod.revision != target for pod in observed.pods),
        paused=spec.rollout.paused,
    )


def _plan_pools(
    observed: Observed,
    spec: InferenceServiceSpec,
    step: RolloutStep,
    targets: Targets,
    blockers: list[str],
    now: datetime,
) -> dict[Role, PoolSteps]:
    steps = {}
    for role in Role:
        pool = observed.pools.get(role)
        if blockers or pool is None or pool.deleting:
            steps[role] = PoolSteps(requeue_after=30.0 if blockers else 0.5)
            continue
        steps[role] = plan_pool(
            observed,
            role,
            targets.desired.of(role),
            step.grow,
            step.keep,
            spec.rollout.drain_seconds,
            now,
        )
    return steps


def _new_pods(
    observed: Observed,
    spec: InferenceServiceSpec,
    steps: dict[Role, PoolSteps],
    revision: str,
    wiring: Wiring,
) -> tuple[dict[str, Any], ...]:
    return tuple(
        build_worker_pod(
            observed, spec, observed.pools[role], role, new.name, revision, wiring, new.restarts
        )
        for role in Role
        for new in steps[role].create
    )


def _changed_pools(observed: Observed, targets: Targets, revision: str) -> list[dict[str, Any]]:
    changed = []
    for role in Role:
        pool, target = observed.pools.get(role), targets.pools[role]
        wanted = (target.replicas, target.spec_replicas, target.ignored, revision)
        if pool is not None and wanted == (
            pool.replicas,
            pool.spec_replicas,
            pool.ignored_scale,
            pool.revision,
        ):
            continue
        changed.append(build_pool(observed, role, target, revision))
    return changed


def _target_notes(observed: Observed, targets: Targets) -> list[Note]:
    decided = observed.decision.decisions if observed.decision is not None else ()
    notes = [
        Note(
            "ScalingAdvised" if item.how is ScalingStep.ADVISED else "ScalingDecided",
            f"{item.pool}: {item.from_} to {item.to}: {item.because}",
        )
        for item in decided
    ]
    for role in Role:
        pool, target = observed.pools.get(role), targets.pools[role]
        if pool is None:
            continue
        if target.ignored and target.ignored != pool.ignored_scale:
            notes.append(Note("ScaleHeldBack", f"{role}: {target.ignored}", warning=True))
        if pool.desired is not None and pool.desired != target.desired:
            who = f"by {target.scaled_by}"
            notes.append(Note("Scaling", f"{role}: {pool.desired} to {target.desired} {who}"))
    return notes


def _condition_notes(observed: Observed, conditions: tuple[Any, ...]) -> list[Note]:
    told = {
        ConditionType.READY: (True, False),
        ConditionType.DEGRADED: (True,),
        ConditionType.TRANSPORT_VERIFIED: (True, False),
        ConditionType.CAPACITY_UNAVAILABLE: (True,),
        ConditionType.METRICS_STALE: (True, False),
        ConditionType.SLO_INFEASIBLE: (True,),
        ConditionType.GATED_BY_PEER: (True,),
    }
    troubles = set(told) - {ConditionType.READY, ConditionType.TRANSPORT_VERIFIED}
    notes = _policy_notes(observed, conditions)
    for kind, tell in told.items():
        new, old = condition_of(conditions, kind), condition_of(observed.status.conditions, kind)
        if new is None or (old is not None and old.status is new.status):
            continue
        is_true = str(new.status) == "True"
        if str(new.status) == "Unknown" or is_true not in tell or (old is None and not is_true):
            continue
        if NOT_YET_MEASURED in (new.reason, old.reason if old is not None else ""):
            continue  # a service that starts
        bad = is_true is (kind in troubles)
        reason = str(kind) if is_true else f"Not{kind}"
        notes.append(Note(reason, new.message or new.reason, warning=bad))
    return notes


def _policy_notes(observed: Observed, conditions: tuple[Any, ...]) -> list[Note]:
    kind = ConditionType.SCALING_ACTIVE
    new, old = condition_of(conditions, kind), condition_of(observed.status.conditions, kind)
    if new is None or new.reason not in UNUSABLE or (old is not None and old.reason == new.reason):
        return []
    return [Note(new.reason, new.message, warning=True)]


def _requeue(observed: Observed, steps: dict[Role, PoolSteps], probing: bool) -> float:
    soonest = min(pool.requeue_after for pool in steps.values())
    if probing or not observed.pools:
        return min(soonest, 0.5)
    waits = observed.router is None or not observed.router.rolled_out
    waits = waits or any(not pod.ready or pod.deleting for pod in observed.pods)
    # A policy looks at fresh measurements every few seconds.
    waits = waits or (observed.spec is not None and observed.spec.autoscaling is not None)
    return min(soonest, 5.0 if waits else MEASURE_SECONDS)


def _plan_deletion(observed: Observed, now: datetime) -> Plan:
    since = observed.deleting_since
    assert since is not None, "only a service that is being deleted gets here"
    if not observed.has_finalizer:
        return Plan(requeue_after=30.0)
    left = [pod for pod in observed.pods if not pod.deleting]
    overdue = now - since >= timedelta(seconds=DELETE_LIMIT_SECONDS)
    if not observed.pods or overdue:
        return Plan(finalizer="remove")
    drains: list[DrainStep] = []
    for pod in left:
        if pod.live:
            drains.append(start_drain(pod, now, move=False))
        elif pod.draining_since is None or pod.load is None:
            drains.append(DrainStep(delete=Deletion(pod.name, pod.uid)))
        else:
            drains.append(continue_drain(pod, now, DELETE_DRAIN_SECONDS, move=False))
    deletions = (step.delete for step in drains if step.delete)
    return Plan(
        mark=tuple(step.mark for step in drains if step.mark),
        engine_calls=tuple(step.call for step in drains if step.call),
        delete=tuple(replace(item, grace_seconds=DELETE_GRACE_SECONDS) for item in deletions),
        events=(Note("Deleting", "draining every worker, then removing everything"),)
        if any(pod.live for pod in left)
        else (),
        requeue_after=1.0,
    )


def _invalid(observed: Observed) -> tuple[Note, ...]:
    if observed.status.observed_generation == observed.generation:
        return ()
    return (Note("InvalidSpec", observed.spec_error, warning=True),)
