"""A worker: its pod, its own report, how it failed, and what a probe between two showed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from tandem_operator.names.annotations import ANNOTATION_MODEL
from tandem_operator.names.labels import LABEL_FAULTS
from tandem_operator.names.pods import (
    ENGINE_CONTAINER,
    PORT_WORKER_BOOTSTRAP,
    PORT_WORKER_HTTP,
    PORT_WORKER_WIRE,
)
from tandem_operator.pair import Role

UNSCHEDULABLE: Final = "Unschedulable"
"""The scheduler's reason for a pod that has no node."""


@dataclass(frozen=True)
class WorkerPorts:
    """The ports of one worker: health and admin, routers, and the hand-off's handshake."""

    http: int = PORT_WORKER_HTTP
    wire: int = PORT_WORKER_WIRE
    bootstrap: int = PORT_WORKER_BOOTSTRAP

    @property
    def numbers(self) -> frozenset[int]:
        """All of them."""
        return frozenset({self.http, self.wire, self.bootstrap})


@dataclass(frozen=True)
class WorkerFigures:
    """The measurements in `/state`, for scaling. `num_prefilled` counts prompt tokens since the
    worker started; `queued_prompt_seconds` is the time that the waiting prompts will take."""

    prefill_tokens_per_second: float
    queued_prompt_seconds: float
    num_free_blocks: float
    num_blocks: float
    num_running: float
    num_waiting: float
    num_prefilled: float


@dataclass(frozen=True)
class LinkTrouble:
    """A prefill worker whose KV reached a decode worker damaged or not at all."""

    peer: str
    num_faults: int
    out_of_use: bool  # until the decode worker has seen a pattern arrive whole
    reason: str


@dataclass(frozen=True)
class Links:
    """What a decode worker says of its prefill workers: what moves their KV, and what fails."""

    transports: Mapping[str, str] = field(default_factory=dict)  # by the prefill worker's name
    troubles: tuple[LinkTrouble, ...] = ()


@dataclass(frozen=True)
class WorkerState:
    """What a worker reports at `/state`. `figures` is None when one of them is missing."""

    num_running: int
    num_leases: int
    draining: bool
    role: str = ""
    figures: WorkerFigures | None = None
    links: Links = Links()

    @property
    def idle(self) -> bool:
        """Whether neither streams nor leased KV pages are left."""
        return self.num_running == 0 and self.num_leases == 0


@dataclass(frozen=True)
class PodFailure:
    """How the engine container of a pod ended, or an init container without which it never ran."""

    exit_code: int | None
    reason: str
    at: datetime
    log: str = ""
    container: str = ENGINE_CONTAINER


@dataclass(frozen=True)
class WorkerPod:
    """One worker pod. `state` is None when nobody asked for it or the worker didn't answer.

    `manifest` is the pod as the API server has it: what another worker of its revision is made of.
    """

    name: str
    uid: str
    role: Role
    revision: str
    group: str
    created: datetime
    node: str = ""
    ip: str = ""
    ports: WorkerPorts = WorkerPorts()
    ready: bool = False
    ready_since: datetime | None = None
    deleting: bool = False
    draining_since: datetime | None = None
    moving: bool = False
    cost: int = 0
    restarts: int = 0
    orphan: bool = False  # its WorkerPool was deleted with --cascade=orphan
    started: bool = False
    served: bool = False  # it, or the worker that it was made like, has been ready
    trouble: str = ""  # why it is not ready: "ErrImagePull: …", "the container proxy ended …"
    trouble_reason: str = ""
    failure: PodFailure | None = None
    admin_secret: str = ""  # the Secret with its admin token
    # Empty: the operator doesn't know it, since another operator or an older release made the pod.
    admin_token: str = field(default="", repr=False)
    memlock: str = ""  # what the memlock check printed: "unlimited" or KiB
    state: WorkerState | None = None
    links: Links | None = None  # the last look at them; None: there was none
    told_role: str = ""  # what it said at the last look; empty: nothing
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def live(self) -> bool:
        """Whether it counts as a worker: it neither ended nor drains nor is being deleted."""
        return not self.deleting and self.failure is None and self.draining_since is None

    @property
    def model_id(self) -> str:
        """What routers know of its model; "" if an earlier release made the pod."""
        notes = self.manifest.get("metadata", {}).get("annotations") or {}
        return str(notes.get(ANNOTATION_MODEL, ""))

    @property
    def unplaced(self) -> bool:
        """Whether the scheduler finds no node for it."""
        return self.live and self.trouble_reason == UNSCHEDULABLE

    @property
    def injects_faults(self) -> bool:
        """Whether it is a test worker, which may fail on purpose."""
        labels = self.manifest.get("metadata", {}).get("labels") or {}
        return bool(labels.get(LABEL_FAULTS) == "true")


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
    passed_over: str = ""
    latency_seconds: float = 0.0  # of one block
    prefill_node: str = ""
    decode_node: str = ""
