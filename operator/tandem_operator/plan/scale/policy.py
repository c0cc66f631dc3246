"""The seam to autoscaling: who turns measurements into numbers for both pools."""

from collections.abc import Mapping
from typing import Protocol

from tandem_operator.facts.observed import Observed, PolicyDecision


class PolicySource(Protocol):
    """Measures every service, and decides for one that names a policy."""

    async def decide(self, observed: Observed) -> PolicyDecision | None:
        """What the policy wants now; None when the service has no policy.

        Called once per pass, before `reconcile`. It must not raise for missing measurements: it
        holds, and says so in the conditions.
        """

    def measured(self, observed: Observed) -> Mapping[str, int]:
        """status.slo by snake_case field, as of the last `decide`; empty while nothing is known."""
