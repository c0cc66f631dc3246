"""A worker's HTTP: the paths, what the operator sends there, and what it is answered."""

from enum import StrEnum
from typing import Any

import msgspec

from tandem_engine.frames import Pairing, PairTrouble
from tandem_wire.messages import Role, WorkerState


class Path(StrEnum):
    """Everything that is served. What is under /admin needs the token, without exception."""

    HEALTH = "/health"
    READY = "/ready"
    METRICS = "/metrics"
    STATE = "/state"
    DRAIN = "/admin/drain"
    UNDRAIN = "/admin/undrain"
    ROLE = "/admin/role"
    PROBE = "/admin/probe"


# --- bodies ---------------------------------------------------------------------------------------


class DrainBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /admin/drain. `move_streams`: give running requests back instead of finishing them."""

    move_streams: bool = False


class EmptyBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /admin/undrain."""


class RoleBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /admin/role."""

    role: Role


class ProbeBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /admin/probe: the prefill worker's bootstrap address and the amount of KV."""

    host: str
    port: int
    num_blocks: int = 16


# --- answers --------------------------------------------------------------------------------------


class HealthAnswer(msgspec.Struct, frozen=True):
    """GET /health: the process is alive. An error takes its place when it isn't well."""

    status: str = "ok"


class ReadyAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """GET /ready; 503 with a reason when new work should go elsewhere."""

    ready: bool
    reason: str = ""


class LoadingState(msgspec.Struct, frozen=True):
    """What the core is doing before it is ready, and how far it has come (0 to 1)."""

    stage: str
    fraction: float


class StateAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """GET /state, and the answer to a change of drain or role."""

    worker_id: str
    boot_id: str
    model: str
    served_model_name: str
    revision: str
    compatibility_hash: str  # empty until the core is ready
    role: Role
    draining: bool
    ready: bool
    reason: str  # why it isn't ready
    loading: LoadingState
    startup: dict[str, Any] | None  # where the time of the start went
    reports: int  # grows with every report of the core that the figures come from
    leases: int  # fetches and pushes that are not finished
    load: WorkerState
    ledger: dict[str, int]  # KV blocks by their use
    counters: dict[str, float]
    gauges: dict[str, float]
    pairings: list[Pairing]  # open sessions that move KV, and over what
    troubles: list[PairTrouble]  # prefill workers whose KV came damaged or not at all
    running: list[str]  # requests that have not ended, by rid
    routers: list[str]  # who is connected
    pid: int
    core_pid: int
    ports: dict[str, int]


class ProbeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """POST /admin/probe: what was seen of the KV that was moved; 502 when it failed."""

    ok: bool
    transport: str
    passed_over: dict[str, str] = msgspec.field(name="passedOver")
    num_bytes: int = msgspec.field(name="bytes")
    seconds: float
    megabytes_per_second: float = msgspec.field(name="megabytesPerSecond")
    error: str
