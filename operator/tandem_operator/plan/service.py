"""One pass over one service: a pure function from facts to a plan."""

from datetime import datetime
from typing import Any

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.status import TransportStatus
from tandem_operator.facts.observed import Claim, Observed
from tandem_operator.manifests.fleet import build_admin_secret
from tandem_operator.manifests.host_network import used_ports
from tandem_operator.manifests.revision import model_id_of, revision_of
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import (
    Blueprint,
    build_pool_owner,
    build_worker_like,
    build_worker_pod,
)
from tandem_operator.names.annotations import ANNOTATION_MODEL
from tandem_operator.names.objects import pool_name, stable_number
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.children import plan_children
from tandem_operator.plan.notes import note_conditions, note_invalid_spec, note_links, note_scaling
from tandem_operator.plan.ownership import plan_claim, plan_leaving
from tandem_operator.plan.rollout.failures import keep_evidence
from tandem_operator.plan.rollout.probe import plan_probe
from tandem_operator.plan.rollout.revisions import RevisionStep, plan_revisions
from tandem_operator.plan.rollout.workers import PoolSteps, PoolTask, plan_pool
from tandem_operator.plan.scale.policy import plan_scaling
from tandem_operator.plan.scale.targets import plan_targets
from tandem_operator.plan.status.basis import StatusBasis
from tandem_operator.plan.status.policy import plan_policy_status
from tandem_operator.plan.status.pool import build_pool_status
from tandem_operator.plan.status.service import build_status, build_unreadable_status
from tandem_operator.plan.steps import Adoption, Plan, PodMark
from tandem_operator.plan.support import find_blockers
from tandem_operator.plan.wiring import choose_wiring

_NOT_MOUNTED = "FailedMount"
"""The kubelet's reason for a pod that waits for a Secret, among others."""
MEASURE_SECONDS = 15.0
"""How often a settled service gets a pass, which also renews status.slo."""


def reconcile(observed: Observed, now: datetime) -> Plan:
    """What to do about a service, given all facts about it."""
    second = now.replace(microsecond=0)
    if observed.ownership.claim is not Claim.MINE:
        return plan_claim(observed)
    if observed.deleting_since is not None or observed.namespace_ends:
        return plan_leaving(observed, plan_policy_status(observed, None, second))
    if observed.spec is None:
        status = build_unreadable_status(observed, second)
        return Plan(
            drop_finalizer=observed.has_former_finalizer,
            status=status.to_manifest(),
            events=note_invalid_spec(observed),
        )
    return _plan_service(observed, observed.spec, now)


def _plan_service(observed: Observed, spec: InferenceServiceSpec, moment: datetime) -> Plan:
    memory = plan_scaling(observed, spec, moment)
    now = moment.replace(microsecond=0)
    revision = revision_of(spec, observed.images)
    targets = plan_targets(spec, observed, memory.decision)
    wiring = _wiring(observed, spec)
    blockers = find_blockers(spec)
    desired = targets.map(lambda pool: pool.desired)
    step = plan_revisions(observed, spec, revision, desired)
    blocked = bool(blockers) or wiring.blocked
    steps = _plan_pools(observed, spec, step, revision, blocked=blocked, now=now)
    failures, failure_notes = keep_evidence(observed)
    basis = StatusBasis(
        observed, spec, revision, step, targets, wiring, blockers, failures, memory, now
    )
    status = build_status(basis)
    probe = plan_probe(observed, spec, step.probed, now)
    children = plan_children(observed, spec, targets, wiring, step, revision)
    new_pods = _new_pods(observed, spec, steps, revision, wiring)
    return Plan(
        drop_finalizer=observed.has_former_finalizer,
        adopt=_orphans(observed),
        hand_over=children.hand_over,
        apply=children.apply,
        remove=children.remove,
        create_once=(build_admin_secret(observed),),
        create_once_again=bool(new_pods)
        or any(pod.trouble_reason == _NOT_MOUNTED for pod in observed.pods),
        create=new_pods,
        mark=(
            *_name_models(observed, spec, revision),
            *(mark for pool in steps for mark in pool.mark),
        ),
        engine_calls=(
            *(call for pool in steps for call in pool.calls),
            *([probe] if probe else []),
        ),
        delete=tuple(item for pool in steps for item in pool.delete),
        status=status.to_manifest(),
        pool_status={
            pool_name(observed.name, role): build_pool_status(pool, role, basis, status)
            for role, pool in observed.pools.items()
            if pool is not None
        },
        policy_status=plan_policy_status(observed, memory, now),
        events=(
            *failure_notes,
            *(note for pool in steps for note in pool.notes),
            *note_scaling(observed, targets, memory.entries),
            *note_links(observed, status.transport or TransportStatus()),
            *note_conditions(observed, status.conditions),
        ),
        scaling=memory.entries,
        memory=memory,
        requeue_after=_requeue(observed, steps, probing=probe is not None),
    )


def _wiring(observed: Observed, spec: InferenceServiceSpec) -> Wiring:
    num_gpus = max(spec.pools.map(lambda pool: pool.gpus_per_pod))
    recorded = observed.status.transport.wiring if observed.status.transport else None
    fresh = observed.status.observed_generation != observed.generation
    return choose_wiring(
        spec.rdma,
        observed.nodes,
        num_gpus,
        None if fresh else recorded,
        claimable=observed.claimable,
        seed=stable_number(observed.uid),
    )


def _plan_pools(
    observed: Observed,
    spec: InferenceServiceSpec,
    step: RevisionStep,
    target: str,
    *,
    blocked: bool,
    now: datetime,
) -> Pair[PoolSteps]:
    def plan(role: Role) -> PoolSteps:
        pool = observed.pools.of(role)
        if blocked or pool is None or pool.deleting:
            return PoolSteps(requeue_after=30.0 if blocked else 0.5)
        drain_seconds = spec.rollout.drain_seconds
        return plan_pool(PoolTask(observed, role, step, target, drain_seconds, now))

    return Pair.build(plan)


def _new_pods(
    observed: Observed,
    spec: InferenceServiceSpec,
    steps: Pair[PoolSteps],
    revision: str,
    wiring: Wiring,
) -> tuple[dict[str, Any], ...]:
    made: list[dict[str, Any]] = []
    taken = frozenset(port for pod in observed.pods for port in pod.ports.numbers)
    for role, pool in steps.items():
        for new in pool.create:
            if new.like is not None:
                pod = build_worker_like(observed, new.like, new.name, new.restarts, taken)
            else:
                blueprint = Blueprint(role, new.name, revision, wiring, new.restarts, taken)
                pod = build_worker_pod(observed, spec, blueprint)
            made.append(pod)
            taken |= used_ports(pod)
    return tuple(made)


def _orphans(observed: Observed) -> tuple[Adoption, ...]:
    return tuple(
        Adoption(pod.name, pod.uid, build_pool_owner(pool))
        for pod in observed.pods
        # The owner that is about to go would take them with it.
        if pod.orphan and (pool := observed.pools.of(pod.role)) is not None and not pool.deleting
    )


def _name_models(observed: Observed, spec: InferenceServiceSpec, target: str) -> list[PodMark]:
    """Tell routers the model of workers that an earlier release made."""
    named: dict[str, str | None] = {ANNOTATION_MODEL: model_id_of(spec)}
    return [
        PodMark(pod.name, pod.uid, named)
        for pod in observed.pods
        if pod.revision == target and not pod.model_id and not pod.deleting
    ]


def _requeue(observed: Observed, steps: Pair[PoolSteps], *, probing: bool) -> float:
    soonest = min(pool.requeue_after for pool in steps)
    if probing or not any(observed.pools):
        return min(soonest, 0.5)
    waits = observed.router is None or not observed.router.rolled_out
    waits = waits or any(not pod.ready or pod.deleting for pod in observed.pods)
    # A policy looks at fresh measurements every few seconds.
    waits = waits or (observed.spec is not None and observed.spec.autoscaling is not None)
    return min(soonest, 5.0 if waits else MEASURE_SECONDS)
