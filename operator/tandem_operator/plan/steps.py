"""What a pass wants to be done. `execute` does it, in the order of the fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem_operator.api.autoscaling_policy import PolicyTarget
from tandem_operator.api.status import ScalingDecision
from tandem_operator.facts.scaling import ScalingMemory


@dataclass(frozen=True)
class PodMark:
    """Annotations to set (None: to remove) on a pod that is still the one with this uid."""

    name: str
    uid: str
    annotations: Mapping[str, str | None]


@dataclass(frozen=True)
class Adoption:
    """A worker pod without an owner, and the reference to the WorkerPool that owns it again."""

    name: str
    uid: str
    owner: Mapping[str, Any]


@dataclass(frozen=True)
class EngineCall:
    """A request to a worker's /admin/*."""

    action: Literal["drain", "undrain", "probe", "role"]
    pod: str
    ip: str
    port: int
    token: str = field(repr=False)
    body: Mapping[str, Any] = field(default_factory=dict)
    peer: str = ""  # for a probe: the other pod
    revision: str = ""
    nodes: tuple[str, str] = ("", "")  # for a probe: of the prefill and of the decode worker


@dataclass(frozen=True)
class Deletion:
    """A pod to delete. `grace_seconds` None: the grace period in the pod's spec.

    With `replaced_by` the pod stays, as evidence and for its back-off, if that one isn't created.
    """

    name: str
    uid: str
    grace_seconds: int | None = None
    replaced_by: str = ""


@dataclass(frozen=True)
class Removal:
    """A child that isn't wanted any more."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True)
class Note:
    """An event for `kubectl describe`. With `created` it is posted only if that pod was created."""

    reason: str
    message: str
    warning: bool = False
    created: str = ""


@dataclass(frozen=True)
class PolicyTargets:
    """What the status of an AutoscalingPolicy should list, if nobody changed the policy since."""

    name: str
    resource_version: str
    targets: tuple[PolicyTarget, ...]


@dataclass(frozen=True)
class Plan:
    """One pass over one service.

    `hand_over` are fields that are applied in another manager's name, so that the operator can
    leave them to others. `scaling` are the decisions that status.scaling shows for the first time.
    `memory` is what scaling hands on to the next pass; None: nothing, because the service is being
    deleted or its spec can't be read.
    """

    claim: str = ""  # what to write to status.operator before anything else is done
    drop_finalizer: bool = False  # that of an earlier version
    hand_over: tuple[dict[str, Any], ...] = ()
    apply: tuple[dict[str, Any], ...] = ()
    remove: tuple[Removal, ...] = ()
    adopt: tuple[Adoption, ...] = ()
    create_once: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """Secrets, which are made where they are missing, and never read nor changed."""
    create_once_again: bool = False  # something needs them now: try, though they were made before
    create: tuple[dict[str, Any], ...] = ()
    mark: tuple[PodMark, ...] = ()
    engine_calls: tuple[EngineCall, ...] = ()
    delete: tuple[Deletion, ...] = ()
    status: Mapping[str, Any] | None = None
    pool_status: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    policy_status: tuple[PolicyTargets, ...] = ()
    events: tuple[Note, ...] = ()
    scaling: tuple[ScalingDecision, ...] = ()
    memory: ScalingMemory | None = None
    requeue_after: float = 30.0

    @property
    def quiet(self) -> bool:
        """Whether the plan changes no pod and calls no worker."""
        return not (self.adopt or self.create or self.mark or self.engine_calls or self.delete)
