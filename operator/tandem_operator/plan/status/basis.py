"""What a status is made from: the facts, and what this pass decided about them."""

from dataclasses import dataclass
from datetime import datetime

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.status import Failure
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.scaling import ScalingMemory
from tandem_operator.facts.worker import WorkerPod
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.rollout.revisions import RevisionStep
from tandem_operator.plan.scale.targets import PoolTarget


@dataclass(frozen=True)
class StatusBasis:
    """The facts and the decisions of one pass. `target` is the revision of the spec."""

    observed: Observed
    spec: InferenceServiceSpec
    target: str
    step: RevisionStep
    targets: Pair[PoolTarget]
    wiring: Wiring
    blockers: list[str]
    failures: tuple[Failure, ...]
    scaling: ScalingMemory
    now: datetime

    @property
    def serving(self) -> str:
        """The revision that the routers use; before there are any, the target."""
        router = self.observed.router
        return router.revision if router is not None and router.revision else self.target

    @property
    def model_name(self) -> str:
        """The name under which requests choose the model."""
        return self.spec.model.name or self.observed.name

    def workers(self, role: Role, *revisions: str) -> list[WorkerPod]:
        """The ready workers of one role and of these revisions."""
        return [
            pod
            for pod in self.observed.pods_of(role)
            if pod.ready and pod.live and pod.revision in revisions
        ]

    def available(self, role: Role) -> list[WorkerPod]:
        """The ready workers of one role that requests may use, of whatever revision."""
        return self.workers(role, *self.step.serving)
