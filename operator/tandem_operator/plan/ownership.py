"""Who serves a service: a free one is claimed first, another operator's is left alone."""

from tandem_operator.facts.observed import Claim, Observed
from tandem_operator.plan.steps import Note, Plan, PolicyTargets

OTHERS_SECONDS = 10.0
"""How often to look whether the operator that serves a service is still there."""


def plan_claim(observed: Observed) -> Plan:
    """What to do about a service that is not this operator's: claim it, or say whose it is."""
    own = observed.ownership
    if own.claim is Claim.FREE:
        return Plan(claim=own.me, requeue_after=0.0)
    note = Note(
        "ServedByOther",
        f"{own.me} does not serve this service, because {own.holder} does ({own.why}): uninstall "
        "one of the two operators, or give each its own namespaces (watchNamespaces)",
        warning=True,
    )
    return Plan(events=() if own.told else (note,), requeue_after=OTHERS_SECONDS)


def plan_leaving(observed: Observed, policy_status: tuple[PolicyTargets, ...]) -> Plan:
    """A service that waits for the end of its children: the garbage collector deletes them, their
    pods drain by themselves, and the service only leaves the policy that lists it."""
    return Plan(drop_finalizer=observed.has_former_finalizer, policy_status=policy_status)
