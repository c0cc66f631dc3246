"""The status of one pool: in the service's status, and of the WorkerPool itself."""

from typing import Any, Final

from tandem_operator.api import InferenceServiceStatus, WorkerPoolStatus
from tandem_operator.api.conditions import Condition, ConditionType, condition_of
from tandem_operator.api.status import PoolStatus
from tandem_operator.facts.observed import PoolView
from tandem_operator.names.labels import selector
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.status.basis import StatusBasis

POOL_READY: Final = Pair(ConditionType.PREFILL_READY, ConditionType.DECODE_READY)
"""The condition of a service that says whether a pool is ready."""


def count_pool(basis: StatusBasis, role: Role) -> PoolStatus:
    """The pool's entry in status.pools."""
    pods = [pod for pod in basis.observed.pods_of(role) if pod.failure is None and not pod.deleting]
    target = basis.targets.of(role)
    return PoolStatus(
        role=role,
        replicas=len(pods),
        ready=len(basis.available(role)),
        updated=sum(pod.revision == basis.target and pod.live for pod in pods),
        draining=sum(pod.draining_since is not None for pod in pods),
        pending=sum(not pod.started for pod in pods),
        desired=target.desired,
        scaled_by=target.scaled_by,
        ignored_replicas=target.ignored_replicas,
    )


def build_pool_status(
    pool: PoolView, role: Role, basis: StatusBasis, status: InferenceServiceStatus
) -> dict[str, Any]:
    """The status of a WorkerPool, as it goes to the API server."""
    counted = next(item for item in status.pools if item.role is role)
    judged = condition_of(status.conditions, POOL_READY.of(role))
    assert judged is not None, "every condition is written before"
    old = WorkerPoolStatus.model_validate(pool.status).conditions
    before = condition_of(old, ConditionType.READY)
    kept = before if before is not None and before.status is judged.status else None
    condition = Condition(
        type=ConditionType.READY,
        status=judged.status,
        reason=judged.reason,
        message=judged.message,
        last_transition_time=kept.last_transition_time if kept is not None else basis.now,
        observed_generation=judged.observed_generation,
    )
    return WorkerPoolStatus(
        replicas=counted.replicas - counted.draining,
        ready_replicas=counted.ready,
        selector=selector(basis.observed.name, role),
        desired_replicas=counted.desired,
        conditions=(condition,),
    ).to_manifest()
