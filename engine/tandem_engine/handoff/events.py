"""What the core thread and the hand-off thread exchange: plain values in two queues, and counters.

D is the decode side (asks for KV, owns the destination blocks), P the prefill side (computes and
pushes). The core owns the block ledger; the hand-off never frees or allocates a block.
"""

import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

from tandem_engine.frames import (
    LeaseQuery,
    LeaseReport,
    Pairing,
    PairTrouble,
    ProbeRequest,
    ProbeResult,
)
from tandem_wire.handoff import Prefill, TransportName
from tandem_wire.messages import PrefillPeer, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """D core → hand-off: fill `blocks` with the KV of tokens[num_skip_tokens:].

    The hand-off tries `peers` in order, each attempt under a new epoch, and in the end reports
    exactly one `FetchDone` or `FetchFailed`. Until then the blocks belong to the hand-off.
    """

    rid: str
    tokens: tuple[int, ...]
    num_prompt_tokens: int
    num_skip_tokens: int
    blocks: tuple[int, ...]
    params: SamplingParams
    peers: tuple[PrefillPeer, ...]
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class FetchDone:
    """Hand-off → D core: the pages hold the KV and have been checked."""

    rid: str
    first_token: int
    first_logprobs: TokenLogprobs | None
    worker_id: str
    num_cached_tokens: int
    num_bytes: int
    seconds: float
    transport: TransportName | None = None


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """Hand-off → D core: every peer failed and every epoch is fenced; the blocks are D's again."""

    rid: str
    message: str


@dataclass(frozen=True, slots=True)
class PrefillArrived:
    """Hand-off → P core: compute this prompt. `key` names (session, rid, epoch) from here on."""

    key: str
    request: Prefill


@dataclass(frozen=True, slots=True)
class PrefillDropped:
    """Hand-off → P core: no one wants `key` any longer (fence, dead peer, expired lease).

    The core stops computing it and unpins its blocks: the hand-off's exports of them have ended.
    """

    key: str


@dataclass(frozen=True, slots=True)
class PushChunk:
    """P core → hand-off: KV of tokens [start, end) is final in `blocks` (P's block numbers).

    `blocks[i]` pairs with `Prefill.blocks[i + (start - num_skip_tokens) // page_size]`; all chunks
    but the last end on a page boundary. The last one carries the sampled token. The blocks stay
    pinned until `PushDone` or `PrefillDropped`.
    """

    key: str
    start: int
    end: int
    blocks: tuple[int, ...]
    last: bool = False
    first_token: int = -1
    first_logprobs: TokenLogprobs | None = None
    num_cached_tokens: int = 0
    prefill_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PushFailed:
    """P core → hand-off: this prompt will not be computed (no room, too long, draining)."""

    key: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class PushDone:
    """Hand-off → P core: the commit was sent, or the push failed for good; unpin the blocks."""

    key: str


@dataclass(frozen=True, slots=True)
class FetchCancelled:
    """D core → hand-off: the client left; fence, then report `FetchFailed`."""

    rid: str


ToHandoff = FetchRequest | FetchCancelled | PushChunk | PushFailed | ProbeRequest | LeaseQuery
FromHandoff = (
    FetchDone | FetchFailed | PrefillArrived | PrefillDropped | PushDone | ProbeResult | LeaseReport
)
"""A `ProbeRequest` is answered by one `ProbeResult`; it touches no block of either side. A
`LeaseQuery` is answered by one `LeaseReport` with the fetches and pushes. Every
`PrefillArrived` ends in exactly one `PushDone` or `PrefillDropped`, also after a `PushFailed`."""


class Counters:
    """Monotonic totals by metric name (without the `tandem_` prefix, labels included).

    Written on the hand-off's loop, read from any thread.
    """

    def __init__(self) -> None:
        self._totals: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add `amount`; labels become part of the name in Prometheus's form."""
        if labels:
            name += "{" + ",".join(f'{key}="{labels[key]}"' for key in sorted(labels)) + "}"
        self._totals[name] += amount

    def totals(self) -> dict[str, float]:
        """Return a copy of all totals."""
        return dict(self._totals)


class Handoff(Protocol):
    """The hand-off as the core sees it; every method is thread-safe and returns at once."""

    def post(self, event: ToHandoff) -> None:
        """Give the hand-off something to do."""

    def poll(self) -> list[FromHandoff]:
        """Take everything that has happened since the last call."""

    def wake_on_event(self, wake: threading.Event) -> None:
        """Have `wake` set whenever `poll` has something new."""

    def num_leases(self) -> int:
        """Count the fetches and pushes that are not finished; a drain waits for zero."""

    def counters(self) -> dict[str, float]:
        """Return totals since the start, by metric name without prefix, with any labels."""

    def gauges(self) -> dict[str, float]:
        """Return current values, by metric name without prefix, with any labels."""

    def pairings(self) -> list[Pairing]:
        """Return the open sessions with other workers."""

    def troubles(self) -> list[PairTrouble]:
        """Return the prefill workers whose KV came damaged or not at all."""

    def set_draining(self, draining: bool) -> None:
        """Refuse new `Prefill` messages with `draining` while set."""

    def close(self) -> None:
        """Stop the thread; every open lease is reported as failed first."""
