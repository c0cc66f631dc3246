"""Why something is not ready: the first cause that is known, of workers, routers or creations."""

from typing import Final

from tandem_operator.api.conditions import Judgement
from tandem_operator.facts.observed import QUOTA_WORDS
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.status.basis import StatusBasis

QUOTA_EXCEEDED: Final = "QuotaExceeded"


def find_worker_cause(
    basis: StatusBasis, revision: str, roles: tuple[Role, ...] = tuple(Role)
) -> Judgement | None:
    """Why workers of a revision are not ready, or None if nothing is known to hold them up."""
    pods = [
        pod
        for pod in basis.observed.pods
        if pod.role in roles and pod.revision == revision and not pod.deleting
    ]
    for pod in pods:
        if pod.failure is not None:
            why = f"{pod.name} failed ({pod.failure.reason}): see status.failures"
            return Judgement(False, "WorkersFailing", why)
    for pod in pods:
        if pod.trouble:
            reason = pod.trouble_reason or "WorkersPending"
            return Judgement(False, reason, f"{pod.name}: {pod.trouble}")
    if any(count_missing(basis, role, revision) for role in roles):
        return find_refusal(basis)
    return None


def count_missing(basis: StatusBasis, role: Role, revision: str) -> int:
    """How many workers of a revision should exist and don't."""
    live = sum(pod.live and pod.revision == revision for pod in basis.observed.pods_of(role))
    return max(basis.step.wanted.get(revision, Pair(0, 0)).of(role) - live, 0)


def find_refusal(basis: StatusBasis) -> Judgement | None:
    """What the API server refused in the last pass, or None."""
    error = basis.observed.last_error
    if not error:
        return None
    reason = QUOTA_EXCEEDED if QUOTA_WORDS in error else basis.observed.last_reason
    return Judgement(False, reason, error)


def find_router_cause(basis: StatusBasis) -> Judgement | None:
    """Why routers are not ready, or None if nothing is known to hold them up."""
    for trouble in basis.observed.router_troubles:
        return Judgement(False, trouble.reason, f"{trouble.pod}: {trouble.message}")
    router = basis.observed.router
    if router is not None and router.message:
        quota = QUOTA_WORDS in router.message
        return Judgement(False, QUOTA_EXCEEDED if quota else "RoutersRefused", router.message)
    return find_refusal(basis) if router is None else None
