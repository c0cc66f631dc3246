"""The status of a service and of its pools: every field and condition, from facts alone."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tandem_operator.api import InferenceServiceSpec, InferenceServiceStatus, WorkerPoolStatus
from tandem_operator.api.conditions import (
    Condition,
    ConditionStatus,
    ConditionType,
    condition_of,
    holds,
)
from tandem_operator.api.kv_transfer import VerifyMode
from tandem_operator.api.status import (
    MAX_DECISIONS,
    Failure,
    PoolStatus,
    RouterStatus,
    ScalingDecision,
    SloStatus,
)
from tandem_operator.facts.observed import Observed, WorkerPod
from tandem_operator.manifests.fleet import POOL_ROLES
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.names.labels import selector
from tandem_operator.pair import Role
from tandem_operator.plan.rollout.failures import failing_node
from tandem_operator.plan.rollout.probe import FELL_BACK, judge_transport
from tandem_operator.plan.rollout.stage import RolloutStep, Stage
from tandem_operator.plan.scale.targets import Targets
from tandem_operator.plan.status.conditions import Judgement, write_conditions
from tandem_operator.plan.support import find_unused

POOL_READY = {
    Role.PREFILL: ConditionType.PREFILL_READY,
    Role.DECODE: ConditionType.DECODE_READY,
}


@dataclass(frozen=True)
class StatusInput:
    """What the status is made from, beside the facts."""

    spec: InferenceServiceSpec
    target: str
    step: RolloutStep
    targets: Targets
    wiring: Wiring
    blockers: list[str]
    failures: tuple[Failure, ...]


def build_status(observed: Observed, made: StatusInput, now: datetime) -> InferenceServiceStatus:
    """The whole status."""
    spec, old = made.spec, observed.status
    pools = tuple(_pool_status(observed, role, made) for role in Role)
    transport_judged, transport = judge_transport(
        observed, spec, _serving(observed, made), made.wiring
    )
    judgements = _judge(observed, made, now)
    judgements[ConditionType.TRANSPORT_VERIFIED] = transport_judged
    judgements[ConditionType.DEGRADED] = _degraded(observed, made, transport_judged, now)
    judgements[ConditionType.READY] = _ready(judgements, spec)
    router = observed.router
    port = spec.router.service.port
    return InferenceServiceStatus(
        observed_generation=observed.generation,
        revision=_serving(observed, made),
        updated_revision=None if made.step.stage is Stage.STEADY else made.target,
        url=f"http://{observed.name}.{observed.namespace}.svc:{port}",
        model=spec.model.name or observed.name,
        pools=pools,
        router=RouterStatus(replicas=router.replicas, ready=router.ready)
        if router is not None
        else RouterStatus(),
        ratio=f"{pools[0].ready}:{pools[1].ready}",
        slo=_slo(observed),
        transport=transport,
        scaling=(*_decisions(observed), *old.scaling)[:MAX_DECISIONS],
        failures=made.failures,
        conditions=write_conditions(old.conditions, judgements, observed.generation, now),
    )


def build_unreadable_status(observed: Observed, now: datetime) -> InferenceServiceStatus:
    """The status of a service whose spec can't be read: every condition, with the reason."""
    judged = Judgement(None, "InvalidSpec", observed.spec_error)
    judgements = dict.fromkeys(ConditionType, judged)
    judgements[ConditionType.READY] = Judgement(False, "InvalidSpec", observed.spec_error)
    judgements[ConditionType.DEGRADED] = Judgement(True, "InvalidSpec", observed.spec_error)
    conditions = write_conditions(observed.status.conditions, judgements, observed.generation, now)
    return observed.status.model_copy(
        update={"observed_generation": observed.generation, "conditions": conditions}
    )


def build_pool_status(
    observed: Observed, role: Role, status: InferenceServiceStatus, now: datetime
) -> dict[str, Any]:
    """The status of one WorkerPool, as it goes to the API server."""
    pool = next(item for item in status.pools if item.role is POOL_ROLES[role])
    judged = condition_of(status.conditions, POOL_READY[role])
    assert judged is not None, "every condition is written before"
    seen = observed.pools.get(role)
    old = WorkerPoolStatus.model_validate(seen.status).conditions if seen is not None else ()
    before = condition_of(old, ConditionType.READY)
    kept = before is not None and before.status is judged.status
    condition = Condition(
        type="Ready",
        status=judged.status,
        reason=judged.reason,
        message=judged.message,
        last_transition_time=before.last_transition_time if kept and before else now,
        observed_generation=judged.observed_generation,
    )
    return WorkerPoolStatus(
        replicas=pool.replicas - pool.draining,
        ready_replicas=pool.ready,
        selector=selector(observed.name, role),
        desired_replicas=pool.desired,
        conditions=(condition,),
    ).to_manifest()


def _slo(observed: Observed) -> SloStatus | None:
    # Without requests there is no latency: the last one stands, beside a rate of zero.
    if not observed.measured:
        return observed.status.slo
    return (observed.status.slo or SloStatus()).model_copy(update=dict(observed.measured))


def _decisions(observed: Observed) -> tuple[ScalingDecision, ...]:
    return observed.decision.decisions if observed.decision is not None else ()


def _serving(observed: Observed, made: StatusInput) -> str:
    router = observed.router
    return router.revision if router is not None and router.revision else made.target


def _pool_status(observed: Observed, role: Role, made: StatusInput) -> PoolStatus:
    pods = [pod for pod in observed.pods_of(role) if pod.failure is None and not pod.deleting]
    target = made.targets.pools[role]
    return PoolStatus(
        role=POOL_ROLES[role],
        replicas=len(pods),
        ready=len(_serving_pods(observed, role, made)),
        updated=sum(pod.revision == made.target and pod.live for pod in pods),
        draining=sum(pod.draining_since is not None for pod in pods),
        pending=sum(not pod.started for pod in pods),
        desired=target.desired,
        scaled_by=target.scaled_by,
        ignored_replicas=target.ignored_replicas,
    )


def _serving_pods(observed: Observed, role: Role, made: StatusInput) -> list[WorkerPod]:
    revision = _serving(observed, made)
    return [
        pod for pod in observed.pods_of(role) if pod.ready and pod.live and pod.revision == revision
    ]


def _judge(observed: Observed, made: StatusInput, now: datetime) -> dict[ConditionType, Judgement]:
    judged = {POOL_READY[role]: _pool_ready(observed, role, made) for role in Role}
    judged[ConditionType.ROUTER_READY] = _router_ready(observed, made)
    judged[ConditionType.MODEL_READY] = _model_ready(observed, made)
    judged[ConditionType.PROGRESSING] = _progressing(observed, made, now)
    judged[ConditionType.CAPACITY_UNAVAILABLE] = _capacity(observed, made)
    judged.update(_scaling(observed))
    return judged


def _pool_ready(observed: Observed, role: Role, made: StatusInput) -> Judgement:
    ready = len(_serving_pods(observed, role, made))
    desired = made.targets.desired.of(role)
    said = f"{ready} of {desired} workers are ready"
    if made.blockers:
        return Judgement(False, "Unsupported", "; ".join(made.blockers))
    if desired == 0:
        # Decode workers prefill by themselves, so an empty prefill pool still serves.
        return Judgement(role is Role.PREFILL, "ScaledToZero", "no worker is wanted")
    if ready >= desired:
        return Judgement(True, "WorkersReady", said)
    if ready and holds(observed.status.conditions, POOL_READY[role]):
        return Judgement(True, "WorkersStarting", said)
    if made.wiring.problem:
        return Judgement(False, "FabricUnavailable", f"{said}: {made.wiring.problem}")
    failed = next((pod for pod in observed.pods_of(role) if pod.failure is not None), None)
    if failed is not None and failed.failure is not None:
        why = f"{failed.name} failed ({failed.failure.reason}); see status.failures"
        return Judgement(False, "WorkersFailing", f"{said}: {why}")
    troubled = next((pod for pod in observed.pods_of(role) if pod.trouble), None)
    if troubled is not None:
        reason = troubled.trouble_reason or "WorkersPending"
        return Judgement(False, reason, f"{said}: {troubled.name}: {troubled.trouble}")
    return Judgement(False, "WorkersStarting", said)


def _router_ready(observed: Observed, made: StatusInput) -> Judgement:
    router, wanted = observed.router, made.spec.router.replicas
    if router is None:
        return Judgement(False, "RoutersStarting", "the router Deployment is being made")
    said = f"{router.ready} of {wanted} routers are ready"
    if router.ready >= wanted:
        return Judgement(True, "RoutersReady", said)
    if router.ready and holds(observed.status.conditions, ConditionType.ROUTER_READY):
        return Judgement(True, "RoutersStarting", said)
    detail = f": {router.message}" if router.message else ""
    return Judgement(False, "RoutersStarting", said + detail)


def _model_ready(observed: Observed, made: StatusInput) -> Judgement:
    ready = [pod for pod in observed.pods if pod.ready and pod.live]
    if ready:
        name = made.spec.model.name or observed.name
        return Judgement(True, "Loaded", f"{name} is loaded in {len(ready)} workers")
    if any(pod.failure is not None for pod in observed.pods):
        return Judgement(False, "LoadFailed", "workers fail; see status.failures")
    started = sum(pod.started for pod in observed.pods)
    return Judgement(False, "Loading", f"{started} workers load {made.spec.model.uri}")


def _progressing(observed: Observed, made: StatusInput, now: datetime) -> Judgement:
    step = made.step
    if step.stage is Stage.PAUSED:
        return Judgement(False, "Paused", "rollout.paused is true: set it to false to go on")
    busy = ""
    if step.stage is not Stage.STEADY:
        busy = f"roll-out to {made.target}: {step.stage}"
    for role in Role:
        desired = made.targets.desired.of(role)
        ready = sum(
            pod.ready and pod.live and pod.revision == made.target for pod in observed.pods_of(role)
        )
        draining = sum(pod.draining_since is not None for pod in observed.pods_of(role))
        if not busy and (ready < desired or draining):
            busy = f"{role}: {ready} of {desired} ready, {draining} draining"
    if not busy:
        return Judgement(False, "Stable", "everything is as wanted")
    limit = timedelta(seconds=made.spec.rollout.progress_deadline_seconds)
    old = condition_of(observed.status.conditions, ConditionType.PROGRESSING)
    if old is not None and old.observed_generation == observed.generation:
        stuck = old.reason == "ProgressDeadlineExceeded"
        late = old.status is ConditionStatus.TRUE and now - old.last_transition_time > limit
        if stuck or late:
            message = f"no success within {limit}: {busy}; the old workers keep serving"
            return Judgement(False, "ProgressDeadlineExceeded", message)
    reason = "RollingOut" if step.stage is not Stage.STEADY else "Scaling"
    return Judgement(True, reason, busy)


def _capacity(observed: Observed, made: StatusInput) -> Judgement:
    if made.wiring.problem:
        return Judgement(True, "FabricUnavailable", made.wiring.problem)
    decision = observed.decision
    if decision is not None and str(ConditionType.CAPACITY_UNAVAILABLE) in decision.conditions:
        return Judgement(*decision.conditions[str(ConditionType.CAPACITY_UNAVAILABLE)])
    for pod in observed.pods:
        if pod.live and pod.trouble_reason == "Unschedulable":
            return Judgement(True, "Unschedulable", f"{pod.name}: {pod.trouble}")
    return Judgement(False, "CapacityFound", "every worker has a node")


def _scaling(observed: Observed) -> dict[ConditionType, Judgement]:
    kinds = (
        ConditionType.SCALING_ACTIVE,
        ConditionType.SLO_INFEASIBLE,
        ConditionType.METRICS_STALE,
        ConditionType.GATED_BY_PEER,
    )
    decision = observed.decision
    if decision is None:
        judged = Judgement(False, "NoPolicy", "spec.autoscaling names no policy")
        return dict.fromkeys(kinds, judged)
    default = (False, "NotSeen", "")
    given = {kind: decision.conditions.get(str(kind), default) for kind in kinds}
    return {kind: Judgement(*parts) for kind, parts in given.items()}


def _degraded(
    observed: Observed, made: StatusInput, transport: Judgement, now: datetime
) -> Judgement:
    node = failing_node(made.failures, now)
    if made.blockers:
        return Judgement(True, "Unsupported", "; ".join(made.blockers))
    if observed.last_error:
        return Judgement(True, "StepFailed", observed.last_error)
    if node:
        message = f"workers keep failing on node {node}: look at it, or cordon it"
        return Judgement(True, "NodeFailing", message)
    failed = [pod.name for pod in observed.pods if pod.failure is not None]
    if failed:
        return Judgement(True, "WorkersFailing", f"{', '.join(failed)}; see status.failures")
    if made.wiring.problem:
        return Judgement(True, "FabricUnavailable", made.wiring.problem)
    if transport.holds is False:
        return Judgement(True, transport.reason, transport.message)
    for pod in observed.pods:
        if pod.memlock not in ("", "unlimited"):
            message = (
                f"{pod.name} may lock only {pod.memlock} KiB of memory, too little for RDMA: raise"
                " LimitMEMLOCK of the container runtime on its node to infinity"
            )
            return Judgement(True, "MemlockTooLow", message)
    unused = find_unused(made.spec)
    if unused:
        message = f"without effect in this release: {', '.join(unused)}"
        return Judgement(True, "FieldsWithoutEffect", message)
    return Judgement(False, "Healthy", made.wiring.note)


def _ready(judged: dict[ConditionType, Judgement], spec: InferenceServiceSpec) -> Judgement:
    needed = [
        ConditionType.PREFILL_READY,
        ConditionType.DECODE_READY,
        ConditionType.ROUTER_READY,
    ]
    if spec.kv_transfer.verify.mode is VerifyMode.REQUIRED and spec.prefill.replicas:
        needed.append(ConditionType.TRANSPORT_VERIFIED)
    for kind in needed:
        if judged[kind].reason == FELL_BACK:
            # KV moves, fast enough, over what backend Auto could get: degraded, but serving.
            continue
        if not judged[kind].holds:
            return Judgement(False, f"Not{kind}", f"{kind}: {judged[kind].message}")
    return Judgement(True, "Serving", "requests are served")
