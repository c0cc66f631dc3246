"""Frames between a worker's processes: 4 bytes of length, big-endian, then MessagePack.

The server owns connections and HTTP; the core owns the scheduler, the cache, the runner and the
hand-off. Every frame is a msgspec struct from here or, inside `RoutedSubmit`, from the wire.
"""

import socket
import struct
from typing import Final, Literal

import msgspec

from tandem_engine.startup import StartReport
from tandem_wire.handoff import TransportName
from tandem_wire.messages import Cancel, KvEvents, Refused, Role, StepItem, Submit, WorkerState

HEADER: Final = struct.Struct(">I")


class RoutedSubmit(msgspec.Struct, frozen=True, tag="submit"):
    """A router's `Submit`; `router` is the server's number for the connection it came on."""

    router: int
    submit: Submit


class RouterGone(msgspec.Struct, frozen=True, tag="router_gone"):
    """The connection ended: cancel everything that came on it."""

    router: int


class SetMode(msgspec.Struct, frozen=True, kw_only=True, tag="mode"):
    """Admin: change the role or the drain mark; None leaves it as it is.

    `move_streams`: while draining, running requests are given back to their routers as `moved`
    instead of being finished here.
    """

    role: Role | None = None
    draining: bool | None = None
    move_streams: bool = False


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the core after giving every request back."""


class CoreReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The first frame from the core, once the model is loaded and the bootstrap port is open."""

    max_model_len: int
    page_size: int
    num_blocks: int
    vocab_size: int
    eos_token_ids: list[int]
    compatibility_hash: str
    bootstrap_port: int
    salt_parts: list[str] = []
    startup: StartReport | None = None


class CoreLoading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress before `CoreReady`: what is being done and how far (0 to 1)."""

    stage: str
    fraction: float


class CoreFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The core can't start or go on; the worker exits with this message."""

    message: str


class RoutedItems(msgspec.Struct, frozen=True, array_like=True):
    """One router's share of a step."""

    router: int
    items: list[StepItem]


class CoreStep(msgspec.Struct, frozen=True, tag="step"):
    """New tokens of one step, by router."""

    routed: list[RoutedItems]


class CoreRefused(msgspec.Struct, frozen=True, tag="refused"):
    """A request that will not be run, for one router."""

    router: int
    refused: Refused


class Pairing(msgspec.Struct, frozen=True, kw_only=True):
    """An open session with another worker: what moves KV, and why nothing better does."""

    worker_id: str
    side: Literal["prefill", "decode"]  # this worker's
    transport: TransportName
    passed_over: dict[TransportName, str] = {}  # reasons, of the better transports
    memory: Literal["host", "device"] = "host"  # where it stages pages
    shortfalls: dict[str, str] = {}  # better ways of this transport that can't be used, and why


class PairTrouble(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill worker whose KV came damaged or not at all, and whether it is used all the same."""

    worker_id: str
    address: str
    transport: TransportName | None  # of the last session
    num_faults: int  # since the first session with that worker
    out_of_use: bool  # until a check has passed
    reason: str  # the last fault


class CoreStats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Load, ledger and counters; at least once a second, and at once when the mode changes.

    `counters` are monotonic totals and `gauges` current values, by metric name without the
    `tandem_` prefix; `observations` are new samples since the last frame (seconds unless named
    otherwise), for histograms. `ledger` is the block ledger's own account: free, cached, owned,
    leased, leaked (always 0 unless an invariant is broken). `pairings` are the open sessions of the
    hand-off, `troubles` the prefill workers whose KV didn't arrive whole.
    """

    state: WorkerState
    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    observations: dict[str, list[float]] = {}
    ledger: dict[str, int] = {}
    pairings: list[Pairing] = []
    troubles: list[PairTrouble] = []


class ProbeRequest(msgspec.Struct, frozen=True, kw_only=True, tag="probe"):
    """Admin: move `num_blocks` blocks of checksummed KV from the prefill worker at host:port."""

    number: int
    host: str
    port: int
    num_blocks: int


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True, tag="probe_result"):
    """What the probe saw; `error` is empty when the KV arrived and its checksum held.

    `latency_seconds` is the median time from asking for one block to having it. Of `seconds`,
    `send_seconds` went by while the prefill worker wrote, and `land_seconds` is the time that this
    worker's threads spent on what came, all of them together.
    """

    number: int
    worker_id: str = ""  # of the prefill worker
    transport: str = ""
    passed_over: dict[TransportName, str] = {}
    shortfalls: dict[str, str] = {}
    num_bytes: int = 0
    seconds: float = 0.0
    latency_seconds: float = 0.0
    send_seconds: float = 0.0
    land_seconds: float = 0.0
    error: str = ""


class HeldRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has not ended, or whose blocks the hand-off still has."""

    rid: str
    kind: str  # routed: a router's; remote: a decode worker's
    state: str  # waiting, fetching, prefill, decode, pushing, abandoned
    num_tokens: int
    num_blocks: int
    leased: bool  # the hand-off reads or writes some of the blocks: they are pinned


FetchState = Literal["filling", "fencing", "quarantined"]
"""Fencing: given up; waits until nothing can land. Quarantined: the prefill worker is cut off, but
something of it on a GPU may still write; waits until that is out, or its process has ended."""


class HeldFetch(msgspec.Struct, frozen=True, kw_only=True):
    """D's side: an epoch that a prefill worker may write to."""

    rid: str  # empty: a probe
    epoch: int
    worker_id: str  # the prefill worker
    transport: TransportName
    blocks: list[int]
    num_bytes: int  # that have landed
    state: FetchState
    idle_seconds: float  # since the last progress


class HeldPush(msgspec.Struct, frozen=True, kw_only=True):
    """P's side: pages that are pinned for a decode worker."""

    rid: str
    epoch: int
    worker_id: str  # the decode worker
    transport: TransportName
    num_bytes: int  # that have been written
    state: Literal["pushing", "fencing"]  # fencing: waits until no write is under way
    lease_seconds: float  # that are left, unless the decode worker gives a sign of life


class LeaseQuery(msgspec.Struct, frozen=True, tag="lease_query"):
    """Admin: say what is held, and for whom."""

    number: int


class LeaseReport(msgspec.Struct, frozen=True, kw_only=True, tag="leases"):
    """Everything that is held: blocks by their use, and what holds them."""

    number: int
    blocks: dict[str, int] = {}
    requests: list[HeldRequest] = []
    fetches: list[HeldFetch] = []
    pushes: list[HeldPush] = []


ToCore = RoutedSubmit | Cancel | RouterGone | SetMode | ProbeRequest | LeaseQuery | Shutdown
FromCore = (
    CoreLoading
    | CoreReady
    | CoreFailed
    | CoreStep
    | CoreRefused
    | CoreStats
    | KvEvents
    | ProbeResult
    | LeaseReport
)


def pack_frame(payload: bytes) -> bytes:
    """`payload` with its length before it."""
    return HEADER.pack(len(payload)) + payload


def read_frame(connection: socket.socket) -> bytes | None:
    """The next payload from a blocking socket, or None at its end."""
    header = _read_exactly(connection, HEADER.size)
    if header is None:
        return None
    (size,) = HEADER.unpack(header)
    return _read_exactly(connection, size)


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view.nbytes:
        try:
            count = connection.recv_into(view)
        except ConnectionResetError:
            return None
        if count == 0:
            return None
        view = view[count:]
    return bytes(buffer)
