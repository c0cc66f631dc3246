"""Every condition of a service, judged from the facts and the decisions of a pass."""

from datetime import datetime, timedelta

from tandem_operator.api.conditions import (
    ConditionStatus,
    ConditionType,
    Judgement,
    condition_of,
    holds,
)
from tandem_operator.api.inference_service import InferenceServiceSpec
from tandem_operator.api.kv_transfer import VerifyMode
from tandem_operator.facts.scaling import PolicyDecision
from tandem_operator.facts.worker import UNSCHEDULABLE
from tandem_operator.names.labels import LABEL_FAULTS
from tandem_operator.pair import Role
from tandem_operator.plan.rollout.failures import failing_node
from tandem_operator.plan.rollout.stage import Stage
from tandem_operator.plan.scale.policy import SCALING_CONDITIONS
from tandem_operator.plan.status.basis import StatusBasis
from tandem_operator.plan.status.causes import (
    QUOTA_EXCEEDED,
    count_missing,
    find_refusal,
    find_router_cause,
    find_worker_cause,
)
from tandem_operator.plan.status.pool import POOL_READY
from tandem_operator.plan.status.transport import PARTIAL
from tandem_operator.plan.support import find_unused


def judge_service(basis: StatusBasis, transport: Judgement) -> dict[ConditionType, Judgement]:
    """Every condition. `transport` is what TransportVerified says."""
    judged = {condition: _pool_ready(basis, role) for role, condition in POOL_READY.items()}
    judged[ConditionType.ROUTER_READY] = _router_ready(basis)
    judged[ConditionType.MODEL_READY] = _model_ready(basis)
    judged[ConditionType.PROGRESSING] = _progressing(basis)
    judged[ConditionType.CAPACITY_UNAVAILABLE] = _capacity(basis)
    judged.update(_scaling(basis.scaling.decision))
    judged[ConditionType.TRANSPORT_VERIFIED] = transport
    judged[ConditionType.DEGRADED] = _degraded(basis, transport)
    judged[ConditionType.READY] = _ready(judged, basis.spec)
    return judged


def _pool_ready(basis: StatusBasis, role: Role) -> Judgement:
    ready = len(basis.available(role))
    desired = basis.targets.of(role).desired
    said = f"{ready} of {desired} workers are ready"
    if basis.blockers:
        return Judgement(False, "Unsupported", "; ".join(basis.blockers))
    if desired == 0:
        # Decode workers prefill by themselves, so an empty prefill pool still serves.
        return Judgement(role is Role.PREFILL, "ScaledToZero", "the pool is scaled to zero")
    if ready >= desired:
        return Judgement(True, "WorkersReady", said)
    if ready and holds(basis.observed.status.conditions, POOL_READY.of(role)):
        return Judgement(True, "WorkersStarting", said)
    if basis.wiring.problem:
        return Judgement(False, "FabricUnavailable", f"{said}: {basis.wiring.problem}")
    for revision in (basis.serving, basis.target):
        cause = find_worker_cause(basis, revision, (role,))
        if cause is not None:
            return Judgement(False, cause.reason, f"{said}: {cause.message}")
    return Judgement(False, "WorkersStarting", said)


def _router_ready(basis: StatusBasis) -> Judgement:
    router = basis.observed.router
    cause = find_router_cause(basis)
    if router is None:
        if cause is not None:
            return Judgement(False, cause.reason, f"there is no Deployment: {cause.message}")
        return Judgement(False, "RoutersStarting", "the router Deployment is being created")
    wanted = basis.spec.router.replicas or router.wanted
    if wanted == 0:
        message = "the routers are scaled to zero: scale their Deployment to 1 or more"
        return Judgement(False, "ScaledToZero", message)
    said = f"{router.ready} of {wanted} routers are ready"
    if router.ready >= wanted:
        return Judgement(True, "RoutersReady", said)
    if router.ready and holds(basis.observed.status.conditions, ConditionType.ROUTER_READY):
        return Judgement(True, "RoutersStarting", said)
    if cause is not None:
        return Judgement(False, cause.reason, f"{said}: {cause.message}")
    return Judgement(False, "RoutersStarting", f"{said}: the others are starting")


def _model_ready(basis: StatusBasis) -> Judgement:
    ready = [pod for pod in basis.observed.pods if pod.ready and pod.live]
    if ready:
        name = basis.model_name
        return Judgement(True, "Loaded", f"{name} is loaded in {len(ready)} workers")
    if any(pod.failure is not None for pod in basis.observed.pods):
        return Judgement(False, "LoadFailed", "workers fail to load the model: see status.failures")
    if not any(target.desired for target in basis.targets):
        return Judgement(False, "ScaledToZero", "both pools are scaled to zero")
    started = sum(pod.started for pod in basis.observed.pods)
    return Judgement(False, "Loading", f"{started} workers are loading {basis.spec.model.uri}")


def _progressing(basis: StatusBasis) -> Judgement:
    step = basis.step
    if step.stage is Stage.PAUSED:
        message = "rollout.paused is true: set it to false to continue"
        return Judgement(False, "Paused", message + _count_revisions(basis))
    busy = ""
    if step.stage is not Stage.STEADY:
        busy = f"roll-out to {basis.target}: {step.stage}{_count_revisions(basis)}"
    for role in Role:
        desired = basis.targets.of(role).desired
        ready = len(basis.workers(role, basis.target))
        draining = sum(pod.draining_since is not None for pod in basis.observed.pods_of(role))
        if not busy and (ready < desired or draining):
            busy = f"{role}: {ready} of {desired} ready, {draining} draining"
    if not busy:
        return Judgement(False, "Stable", "both pools and the routers are as specified")
    cause = find_worker_cause(basis, basis.target) or find_router_cause(basis)
    if cause is not None:
        busy = f"{busy}: {cause.message}"
    limit = timedelta(seconds=basis.spec.rollout.progress_deadline_seconds)
    old = condition_of(basis.observed.status.conditions, ConditionType.PROGRESSING)
    if old is not None and old.observed_generation == basis.observed.generation:
        last = _last_progress(basis, old.last_transition_time)
        stuck = old.reason == "ProgressDeadlineExceeded" and last == old.last_transition_time
        late = old.status is ConditionStatus.TRUE and basis.now - last > limit
        if stuck or late:
            message = f"no progress within {limit}: {busy}{_who_serves(basis)}"
            return Judgement(False, "ProgressDeadlineExceeded", message)
    reason = "RollingOut" if step.stage is not Stage.STEADY else "Scaling"
    return Judgement(True, reason, busy)


def _last_progress(basis: StatusBasis, began: datetime) -> datetime:
    """When the last new worker became ready, or the last drain began; `began` if before that."""
    pods = basis.observed.pods
    ready = [pod.ready_since for pod in pods if pod.ready and pod.revision == basis.target]
    return max(filter(None, [began, *ready, *(pod.draining_since for pod in pods)]))


def _count_revisions(basis: StatusBasis) -> str:
    """How many workers of each pool are new, and how many old ones still serve or drain."""
    if basis.step.stage not in (Stage.ROLL, Stage.PAUSED):
        return ""
    parts = []
    for role in Role:
        pods = [pod for pod in basis.observed.pods_of(role) if pod.failure is None]
        old = [pod for pod in pods if pod.revision != basis.target]
        draining = sum(not pod.live for pod in old)
        parts.append(
            f"{role}: {len(basis.workers(role, basis.target))} of"
            f" {basis.targets.of(role).desired} new ready, {len(old) - draining} old,"
            f" {draining} old draining"
        )
    return f" ({'; '.join(parts)}){basis.step.waits}"


def _who_serves(basis: StatusBasis) -> str:
    """What an unfinished roll-out means for requests."""
    if basis.serving == basis.target:
        return ""
    if basis.workers(Role.DECODE, basis.serving):
        return f"; the workers of revision {basis.serving} continue to serve"
    return f"; no decode worker of revision {basis.serving} is ready either"


def _capacity(basis: StatusBasis) -> Judgement:
    if basis.wiring.problem:
        return Judgement(True, "FabricUnavailable", basis.wiring.problem)
    decision = basis.scaling.decision
    if decision is not None and ConditionType.CAPACITY_UNAVAILABLE in decision.conditions:
        return decision.conditions[ConditionType.CAPACITY_UNAVAILABLE]
    for pod in basis.observed.pods:
        if pod.live and pod.trouble_reason == UNSCHEDULABLE:
            return Judgement(True, UNSCHEDULABLE, f"{pod.name}: {pod.trouble}")
    refusal = find_refusal(basis)
    if refusal is not None and refusal.reason == QUOTA_EXCEEDED:
        return Judgement(True, QUOTA_EXCEEDED, refusal.message)
    missing = sum(count_missing(basis, role, basis.target) for role in Role)
    if missing:
        return Judgement(False, "WorkersMissing", f"{missing} workers don't exist yet")
    homeless = sum(pod.live and not (pod.node or pod.started) for pod in basis.observed.pods)
    if homeless:
        return Judgement(False, "Scheduling", f"{homeless} workers have no node yet")
    return Judgement(False, "CapacityFound", "every worker has a node")


def _scaling(decision: PolicyDecision | None) -> dict[ConditionType, Judgement]:
    if decision is None:
        judged = Judgement(False, "NoPolicy", "spec.autoscaling names no policy")
        return dict.fromkeys(SCALING_CONDITIONS, judged)
    return {kind: decision.conditions[kind] for kind in SCALING_CONDITIONS}


def _degraded(basis: StatusBasis, transport: Judgement) -> Judgement:
    node = failing_node(basis.observed, basis.failures, basis.serving, basis.now)
    if basis.blockers:
        return Judgement(True, "Unsupported", "; ".join(basis.blockers))
    refusal = find_refusal(basis)
    if refusal is not None:
        return Judgement(True, refusal.reason, refusal.message)
    if node:
        message = f"workers keep failing on node {node}: check the node, or cordon it"
        return Judgement(True, "NodeFailing", message)
    failed = [pod.name for pod in basis.observed.pods if pod.failure is not None]
    if failed:
        return Judgement(True, "WorkersFailing", f"{', '.join(failed)} failed: see status.failures")
    if basis.wiring.problem:
        return Judgement(True, "FabricUnavailable", basis.wiring.problem)
    troubled = _troubled(basis)
    if troubled is not None:
        return troubled
    if transport.holds is False:
        return Judgement(True, transport.reason, transport.message)
    for pod in basis.observed.pods:
        if pod.memlock not in ("", "unlimited"):
            message = (
                f"{pod.name} may lock only {pod.memlock} KiB of memory, which is too little for"
                " RDMA: set LimitMEMLOCK=infinity for the container runtime on its node"
            )
            return Judgement(True, "MemlockTooLow", message)
    testing = [pod.name for pod in basis.observed.pods if pod.injects_faults]
    if testing:
        message = (
            f"{', '.join(testing)} may inject faults into hand-offs: remove the label"
            f" {LABEL_FAULTS} from podTemplate.metadata.labels when the test is over"
        )
        return Judgement(True, "FaultInjection", message)
    unused = find_unused(basis.spec)
    if unused:
        message = f"these fields have no effect in this release: {', '.join(unused)}"
        return Judgement(True, "FieldsWithoutEffect", message)
    return Judgement(False, "Healthy", basis.wiring.note)


def _troubled(basis: StatusBasis) -> Judgement | None:
    """What keeps any pod from being ready; CapacityUnavailable tells of workers' nodes."""
    for pod in basis.observed.pods:
        if pod.trouble and pod.trouble_reason != UNSCHEDULABLE and not pod.deleting:
            reason = pod.trouble_reason or "WorkersPending"
            return Judgement(True, reason, f"{pod.name}: {pod.trouble}")
    for trouble in basis.observed.router_troubles:
        return Judgement(True, trouble.reason, f"{trouble.pod}: {trouble.message}")
    return None


def _ready(judged: dict[ConditionType, Judgement], spec: InferenceServiceSpec) -> Judgement:
    needed = [*POOL_READY, ConditionType.ROUTER_READY]
    if spec.kv_transfer.verify.mode is VerifyMode.REQUIRED and spec.prefill.replicas:
        needed.append(ConditionType.TRANSPORT_VERIFIED)
    for kind in needed:
        if judged[kind].reason in PARTIAL:
            continue  # degraded, but KV moves
        if not judged[kind].holds:
            return Judgement(False, f"Not{kind}", f"{kind}: {judged[kind].message}")
    return Judgement(True, "Serving", "requests are served")
