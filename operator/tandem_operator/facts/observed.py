"""What the operator knows about one service at one moment: frozen facts, no decisions.

`observe` fills these from the API server and from the workers; `reconcile` reads nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, Final

from tandem_operator.api import InferenceServiceSpec, InferenceServiceStatus
from tandem_operator.facts.admin import AdminAccess
from tandem_operator.facts.child import ChildView
from tandem_operator.facts.scaling import Scaling
from tandem_operator.facts.worker import ProbeResult, WorkerPod
from tandem_operator.pair import Pair, Role

QUOTA_WORDS: Final = "exceeded quota"
"""What the API server says when it refuses a pod for that."""


@dataclass(frozen=True)
class PoolView:
    """A WorkerPool as it is in the API server."""

    name: str
    uid: str
    replicas: int
    spec_replicas: int | None  # the service's number that was last carried over
    desired: int | None  # what the operator last worked towards
    ignored_scale: str = ""
    revision: str = ""
    resource_version: str = ""
    deleting: bool = False
    status: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterView:
    """The router Deployment and its state. `model_id` is "" if an earlier release made it.

    `held` says that only the operator has set `wanted`: if the operator leaves the number out of
    what it applies, the API server puts it back to 1.
    """

    revision: str
    replicas: int
    ready: int
    rolled_out: bool  # all router pods have the latest template and are ready; no others are left
    message: str = ""
    wanted: int = 1
    held: bool = False
    resource_version: str = ""
    model_id: str = ""


@dataclass(frozen=True)
class RouterTrouble:
    """Why one router pod is not ready: the reason as Kubernetes gives it, and a sentence."""

    pod: str
    reason: str
    message: str


@dataclass(frozen=True)
class PodAddress:
    """Where one ready pod answers."""

    uid: str
    ip: str
    port: int


@dataclass(frozen=True)
class NodeView:
    """What a node offers. `resources` are the extended resources in its allocatable, in pieces.

    `networks` are the networks besides the pods' own that GKE's annotation names.
    """

    name: str
    schedulable: bool
    resources: Mapping[str, int]
    networks: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeviceView:
    """A device in a ResourceSlice of a node; its attributes have their full names."""

    node: str
    driver: str
    name: str
    attributes: Mapping[str, str | int | bool]


@dataclass(frozen=True)
class Claimable:
    """What pods could claim: the devices in ResourceSlices, and the names of DeviceClasses."""

    devices: tuple[DeviceView, ...] = ()
    classes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Images:
    """What runs when the service names no image, and when the kubelet pulls it.

    An empty pull policy leaves the choice to Kubernetes.
    """

    router: str
    engine: str
    router_pull_policy: str = ""
    engine_pull_policy: str = ""


class Claim(Enum):
    """Whose a service is, by its `status.operator`."""

    MINE = "mine"
    FREE = "free"  # nobody's, or that of an operator that is gone: this operator may take it
    OTHERS = "others"


@dataclass(frozen=True)
class Ownership:
    """Who serves a service. `me` and `holder` are names of Leases, like `namespace/name`."""

    claim: Claim
    me: str
    holder: str = ""
    why: str = ""  # why the claim of another operator stands, or doesn't
    told: bool = False  # whether an earlier pass of this process said so


@dataclass(frozen=True)
class Observed:
    """All facts about one service. `spec` is None when it can't be read (`spec_error` says why)."""

    name: str
    namespace: str
    uid: str
    generation: int
    spec: InferenceServiceSpec | None
    spec_error: str = ""
    status: InferenceServiceStatus = field(default_factory=InferenceServiceStatus)
    deleting_since: datetime | None = None
    namespace_ends: bool = False  # nothing can be made in it any more
    has_former_finalizer: bool = False
    resource_version: str = ""
    ownership: Ownership = Ownership(Claim.MINE, "")
    pools: Pair[PoolView | None] = Pair(None, None)
    pods: tuple[WorkerPod, ...] = ()
    router: RouterView | None = None
    router_pods: tuple[PodAddress, ...] = ()
    router_troubles: tuple[RouterTrouble, ...] = ()
    recorded: Pair[WorkerPod | None] = Pair(None, None)  # what the routed revision's workers are
    children: tuple[ChildView, ...] = ()  # what has the service's label, whoever owns it
    nodes: tuple[NodeView, ...] | None = None  # None: not allowed to read nodes
    claimable: Claimable | None = None  # None: not allowed to read it
    probe: ProbeResult | None = None
    last_error: str = ""  # what went wrong in the last pass
    last_reason: str = "StepFailed"  # the same in one PascalCase word
    scaling: Scaling = field(default_factory=Scaling)
    images: Images = Images("", "")
    admin: AdminAccess = field(default_factory=AdminAccess)

    @property
    def over_quota(self) -> bool:
        """Whether a ResourceQuota refused something in the last pass."""
        return QUOTA_WORDS in self.last_error

    def owns(self, kind: str, name: str) -> bool:
        """Whether there is such a child, and it is the service's own."""
        return any(
            (child.kind, child.name) == (kind, name) and self.uid in child.owners
            for child in self.children
        )

    def pods_of(self, role: Role) -> tuple[WorkerPod, ...]:
        """The pods of one role, oldest first."""
        return tuple(pod for pod in self.pods if pod.role is role)
