"""What the operator knows about one service at one moment: frozen facts, no decisions.

`observe` fills these from the API server and from the workers; `reconcile` reads nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tandem_operator.api import InferenceServiceSpec, InferenceServiceStatus
from tandem_operator.api.status import ScalingDecision
from tandem_operator.pair import Pair, Role


@dataclass(frozen=True)
class WorkerLoad:
    """What a worker says about itself at `/state`."""

    num_running: int
    num_leases: int
    draining: bool
    role: str = ""

    @property
    def idle(self) -> bool:
        """Neither streams nor leased KV pages are left."""
        return self.num_running == 0 and self.num_leases == 0


@dataclass(frozen=True)
class PodFailure:
    """How the engine container of a pod ended."""

    exit_code: int | None
    reason: str
    at: datetime
    log: str = ""


@dataclass(frozen=True)
class WorkerPod:
    """One worker pod. `load` is None when nobody asked or the worker didn't answer."""

    name: str
    uid: str
    role: Role
    revision: str
    group: str
    created: datetime
    node: str = ""
    ip: str = ""
    bootstrap_port: int = 8998
    ready: bool = False
    ready_since: datetime | None = None
    deleting: bool = False
    draining_since: datetime | None = None
    moving: bool = False
    cost: int = 0
    restarts: int = 0
    started: bool = False
    trouble: str = ""  # why it is not started: "Unschedulable: …", "ErrImagePull: …"
    trouble_reason: str = ""
    failure: PodFailure | None = None
    admin_token: str = field(default="", repr=False)
    memlock: str = ""  # what the memlock check printed: "unlimited" or KiB
    load: WorkerLoad | None = None

    @property
    def live(self) -> bool:
        """It counts as a worker: neither ended nor on its way out."""
        return not self.deleting and self.failure is None and self.draining_since is None


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
    """The router Deployment and its state."""

    revision: str
    replicas: int
    ready: int
    rolled_out: bool  # every router pod is of the latest template, ready, and no other is left
    message: str = ""


@dataclass(frozen=True)
class RouterPod:
    """One ready router pod, to read its metrics."""

    uid: str
    ip: str


@dataclass(frozen=True)
class NodeView:
    """What a node offers. `resources` are the extended resources in its allocatable, in pieces."""

    name: str
    schedulable: bool
    resources: Mapping[str, int]


@dataclass(frozen=True)
class ProbeResult:
    """What moving KV between two workers showed."""

    revision: str
    decode: str
    prefill: str
    at: datetime
    transport: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class PolicyDecision:
    """What the autoscaling policy wants for both pools, in one decision.

    `conditions` maps a condition type (ScalingActive, MetricsStale …) to (status, reason, message);
    `decisions` are new entries for status.scaling, newest first. `active` is False in advisory mode
    and while metrics are stale: then the numbers stay with their other owner.
    """

    desired: Pair[int]
    because: str
    active: bool = True
    conditions: Mapping[str, tuple[bool, str, str]] = field(default_factory=dict)
    decisions: tuple[ScalingDecision, ...] = ()


@dataclass(frozen=True)
class Images:
    """What runs when the service names no image."""

    router: str
    engine: str


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
    has_finalizer: bool = False
    pools: Mapping[Role, PoolView] = field(default_factory=dict)
    pods: tuple[WorkerPod, ...] = ()
    router: RouterView | None = None
    router_pods: tuple[RouterPod, ...] = ()
    nodes: tuple[NodeView, ...] | None = None  # None: not allowed to read nodes
    probe: ProbeResult | None = None
    last_error: str = ""  # what went wrong in the last pass
    decision: PolicyDecision | None = None
    measured: Mapping[str, int] = field(default_factory=dict)  # status.slo, snake_case keys
    images: Images = Images("", "")
    entropy: str = ""  # fresh randomness for the admin tokens of new pods

    def pods_of(self, role: Role) -> tuple[WorkerPod, ...]:
        """The pods of one role, oldest first."""
        return tuple(pod for pod in self.pods if pod.role is role)
