"""A worker's HTTP: the paths, what the operator sends there, and what it is answered."""

from enum import StrEnum
from typing import Any

import msgspec

from tandem_engine.frames import HeldFetch, HeldPush, HeldRequest, Pairing, PairTrouble, ProbeResult
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
    LEASES = "/admin/leases"


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
    faults: str  # TANDEM_FAULTS of a test worker; empty: none
    pairings: list[Pairing]  # open sessions that move KV, and over what
    troubles: list[PairTrouble]  # prefill workers whose KV came damaged or not at all
    checks: list[dict[str, Any]]  # what is not well here for the transport, and the remedy
    running: list[str]  # requests that have not ended, by rid
    routers: list[str]  # who is connected
    fabric: dict[str, Any]  # the NICs that were chosen, and how near each GPU is to which
    pid: int
    core_pid: int
    ports: dict[str, int]


class ProbeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """POST /admin/probe: what was seen of the KV that was moved; 502 when it failed.

    `latencySeconds` is the median time from asking for one block to having it. Of `seconds`, the
    prefill worker wrote during `sendSeconds`; this worker's threads spent `landSeconds` on what
    came, all of them together. `slow` are sentences: which better transports can't be used and why.
    """

    ok: bool
    peer: str  # worker id of the prefill worker
    transport: str
    passed_over: dict[str, str] = msgspec.field(name="passedOver")
    num_bytes: int = msgspec.field(name="bytes")
    seconds: float
    megabytes_per_second: float = msgspec.field(name="megabytesPerSecond")
    latency_seconds: float = msgspec.field(name="latencySeconds")
    send_seconds: float = msgspec.field(name="sendSeconds")
    land_seconds: float = msgspec.field(name="landSeconds")
    slow: list[str]
    error: str

    @classmethod
    def of(cls, result: ProbeResult) -> "ProbeAnswer":
        """The answer that tells of `result`."""
        better: dict[str, str] = {str(name): why for name, why in result.passed_over.items()}
        better |= result.shortfalls
        return cls(
            ok=not result.error,
            peer=result.worker_id,
            transport=result.transport,
            passed_over=better,
            num_bytes=result.num_bytes,
            seconds=result.seconds,
            megabytes_per_second=result.num_bytes / result.seconds / 1e6 if result.seconds else 0.0,
            latency_seconds=result.latency_seconds,
            send_seconds=result.send_seconds,
            land_seconds=result.land_seconds,
            slow=[
                f"{name} would be better than {result.transport}, but {why}"
                for name, why in better.items()
            ],
            error=result.error,
        )


class LeasesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """GET /admin/leases: everything that this worker holds, and for whom."""

    worker_id: str
    boot_id: str
    role: Role
    blocks: dict[str, int]  # by use, as `ledger` of /state
    requests: list[HeldRequest]
    fetches: list[HeldFetch]  # as decode worker
    pushes: list[HeldPush]  # as prefill worker
