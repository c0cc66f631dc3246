"""The deletion of a service: its workers drain briefly, then the finalizer is removed."""

from dataclasses import replace
from datetime import datetime, timedelta

from tandem_operator.facts.observed import Observed
from tandem_operator.plan.rollout.drain import DrainStep, continue_drain, start_drain
from tandem_operator.plan.steps import Deletion, Note, Plan, PolicyTargets

DELETE_DRAIN_SECONDS = 10
"""The streams of a deleted service may run for this time before their workers are stopped."""
DELETE_GRACE_SECONDS = 5
DELETE_LIMIT_SECONDS = 25
"""After this time the finalizer is removed: pods that remain are deleted with their owner."""


def plan_deletion(
    observed: Observed, policy_status: tuple[PolicyTargets, ...], now: datetime
) -> Plan:
    """Drain every worker for a short time, then remove the finalizer.

    With --cascade=orphan the workers go on. `policy_status` takes the service out of the policy
    that lists it.
    """
    since = observed.deleting_since
    assert since is not None, "only a service that is being deleted gets here"
    if not observed.has_finalizer:
        return Plan(policy_status=policy_status, requeue_after=30.0)
    left = [pod for pod in observed.pods if not pod.deleting]
    overdue = now - since >= timedelta(seconds=DELETE_LIMIT_SECONDS)
    if not observed.pods or overdue or observed.orphaning:
        return Plan(finalizer="remove", policy_status=policy_status)
    drains: list[DrainStep] = []
    for pod in left:
        if pod.live:
            drains.append(start_drain(pod, now, move=False))
        elif pod.draining_since is None or pod.state is None:
            drains.append(DrainStep(delete=Deletion(pod.name, pod.uid)))
        else:
            drains.append(continue_drain(pod, now, DELETE_DRAIN_SECONDS, move=False))
    deletions = (step.delete for step in drains if step.delete)
    return Plan(
        mark=tuple(step.mark for step in drains if step.mark),
        engine_calls=tuple(step.call for step in drains if step.call),
        delete=tuple(replace(item, grace_seconds=DELETE_GRACE_SECONDS) for item in deletions),
        events=(Note("Deleting", "draining all workers, then deleting everything"),)
        if any(pod.live for pod in left)
        else (),
        policy_status=policy_status,
        requeue_after=1.0,
    )
