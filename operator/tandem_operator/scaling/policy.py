"""The seam to autoscaling: who turns measurements into numbers for both pools."""

from collections.abc import Mapping
from typing import Protocol

from tandem_operator.observed import Observed, PolicyDecision


class PolicySource(Protocol):
    """Measures every service and decides for those that name a policy, once per pass."""

    async def measure(self, observed: Observed) -> Mapping[str, int]:
        """What the routers measured lately, in the fields of `SloStatus`; empty: nothing yet."""

    async def decide(self, observed: Observed) -> PolicyDecision | None:
        """What the policy wants now; None when the service has no policy.

        It must not raise for missing measurements: it holds, and says so in the conditions.
        """
