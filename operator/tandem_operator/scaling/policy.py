"""The seam to autoscaling: who turns measurements into numbers for both pools."""

from typing import Protocol

from tandem_operator.observed import Observed, PolicyDecision


class PolicySource(Protocol):
    """Decides for a service that names a policy. Called once per pass, before `reconcile`."""

    async def decide(self, observed: Observed) -> PolicyDecision | None:
        """What the policy wants now; None when the service has no policy.

        It must not raise for missing measurements: it holds, and says so in the conditions.
        """
