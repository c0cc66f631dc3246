"""A hand-off without sockets or threads for tests: pages are copied between cores by hand."""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tandem_engine.frames import (
    LeaseQuery,
    LeaseReport,
    Pairing,
    PairTrouble,
    ProbeRequest,
    ProbeResult,
)
from tandem_engine.handoff.events import (
    FetchCancelled,
    FetchDone,
    FetchFailed,
    FetchRequest,
    FromHandoff,
    PrefillArrived,
    PrefillDropped,
    PushChunk,
    PushDone,
    PushFailed,
    ToHandoff,
)
from tandem_engine.handoff.pages import travelling_parts
from tandem_engine.step import KVStore
from tandem_wire.handoff import Prefill


@dataclass
class Fetch:
    """One fetch of D: whom it asks, under which epoch."""

    request: FetchRequest
    peers: list[str]
    epoch: int = 0
    num_bytes: int = 0

    def key(self, owner: str) -> str:
        return f"{owner}/{self.request.rid}/{self.epoch}"


@dataclass
class Network:
    """All hand-offs of a test, and how they misbehave."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))
    refuse_share: float = 0.0  # of prefills that P's hand-off loses before they reach the core
    drop_share: float = 0.0  # of pushes after which the peer "dies"
    handoffs: dict[str, "LoopbackHandoff"] = field(default_factory=dict)

    def chance(self, share: float) -> bool:
        return share > 0 and self.rng.random() < share


class LoopbackHandoff:
    """Both sides of the hand-off for one core; call `poll` and everything moves."""

    bootstrap_port = 0

    def __init__(self, name: str, kv: KVStore, network: Network) -> None:
        self.name = name
        self.kv = kv
        self.network = network
        self.closed = False
        self.draining = False
        self.posted: list[ToHandoff] = []
        self._events: deque[FromHandoff] = deque()
        self._fetches: dict[str, Fetch] = {}
        self._prefills: dict[str, tuple[LoopbackHandoff, Prefill]] = {}
        self._wake: Any = None
        network.handoffs[name] = self

    # --- the Handoff protocol ---

    def post(self, event: ToHandoff) -> None:
        self.posted.append(event)
        match event:
            case FetchRequest():
                fetch = Fetch(event, [peer.worker_id for peer in event.peers])
                self._fetches[event.rid] = fetch
                self._try_next(fetch, "no peers")
            case FetchCancelled(rid):
                cancelled = self._fetches.get(rid)
                if cancelled is not None:
                    self._fence(cancelled)
                    self._fail(cancelled, "cancelled")
            case PushChunk():
                self._push(event)
            case LeaseQuery(number):
                self.tell(LeaseReport(number=number))
            case ProbeRequest(number=number):
                self.tell(ProbeResult(number=number, transport="tcp", num_bytes=1))
            case PushFailed():
                owner, prefill = self._prefills.pop(event.key, (None, None))
                if owner is not None and prefill is not None:
                    self.tell(PushDone(event.key))
                    owner._lost(prefill.rid, prefill.epoch, event.message)

    def poll(self) -> list[FromHandoff]:
        events = list(self._events)
        self._events.clear()
        return events

    def wake_on_event(self, wake: Any) -> None:
        self._wake = wake

    def num_leases(self) -> int:
        return len(self._fetches) + len(self._prefills)

    def counters(self) -> dict[str, float]:
        return {"kv_fences_total": 1.0}

    def gauges(self) -> dict[str, float]:
        return {'kv_sessions{backend="loopback",side="in"}': 1.0}

    def pairings(self) -> list[Pairing]:
        return []

    def troubles(self) -> list[PairTrouble]:
        return []

    def set_draining(self, draining: bool) -> None:
        self.draining = draining

    def close(self) -> None:
        self.closed = True

    # --- the inside ---

    def tell(self, event: FromHandoff) -> None:
        self._events.append(event)
        if self._wake is not None:
            self._wake.set()

    def _try_next(self, fetch: Fetch, message: str) -> None:
        while fetch.peers:
            peer = self.network.handoffs.get(fetch.peers.pop(0))
            fetch.epoch += 1
            if peer is None or peer.closed or peer.draining:
                message = "no such peer"
                continue
            if self.network.chance(self.network.refuse_share):
                message = "lost"
                continue
            request = fetch.request
            prefill = Prefill(
                rid=request.rid,
                epoch=fetch.epoch,
                tokens=list(request.tokens),
                num_prompt_tokens=request.num_prompt_tokens,
                num_skip_tokens=request.num_skip_tokens,
                blocks=list(request.blocks),
                params=request.params,
                priority=request.priority,
                cache_salt=request.cache_salt,
            )
            key = fetch.key(self.name)
            peer._prefills[key] = (self, prefill)
            peer.tell(PrefillArrived(key, prefill))
            return
        self._fail(fetch, message)

    def _fail(self, fetch: Fetch, message: str) -> None:
        del self._fetches[fetch.request.rid]
        self.tell(FetchFailed(fetch.request.rid, message))

    def _fence(self, fetch: Fetch) -> None:
        key = fetch.key(self.name)
        for peer in self.network.handoffs.values():
            if peer._prefills.pop(key, None) is not None:
                peer.tell(PrefillDropped(key))

    def _lost(self, rid: str, epoch: int, message: str) -> None:
        fetch = self._fetches.get(rid)
        if fetch is not None and fetch.epoch == epoch:
            self._try_next(fetch, message)

    def _push(self, chunk: PushChunk) -> None:
        owner, prefill = self._prefills.get(chunk.key, (None, None))
        if owner is None or prefill is None:
            return  # fenced meanwhile
        if self.network.chance(self.network.drop_share):
            del self._prefills[chunk.key]
            self.tell(PrefillDropped(chunk.key))
            owner._lost(prefill.rid, prefill.epoch, "peer died")
            return
        fetch = owner._fetches[prefill.rid]
        assert fetch.epoch == prefill.epoch
        page = self.kv.layout.page_size
        assert chunk.start % page == 0
        assert chunk.last or chunk.end % page == 0
        first = (chunk.start - prefill.num_skip_tokens) // page
        targets = prefill.blocks[first : first + len(chunk.blocks)]
        assert len(targets) == len(chunk.blocks)
        start = chunk.start // page
        for places, layers in travelling_parts(
            self.kv.layout, len(prefill.tokens), start, start + len(targets)
        ):
            here, there = places.start - start, places.stop - start
            data = self.kv.export_blocks(chunk.blocks[here:there], layers)
            owner.kv.import_blocks(targets[here:there], layers, memoryview(data))
            fetch.num_bytes += len(data)
        if chunk.last:
            assert chunk.end == len(prefill.tokens)
            del self._prefills[chunk.key]
            del owner._fetches[prefill.rid]
            self.tell(PushDone(chunk.key))
            owner.tell(
                FetchDone(
                    rid=prefill.rid,
                    first_token=chunk.first_token,
                    first_logprobs=chunk.first_logprobs,
                    worker_id=self.name,
                    num_cached_tokens=chunk.num_cached_tokens,
                    num_bytes=fetch.num_bytes,
                    seconds=0.0,
                )
            )
