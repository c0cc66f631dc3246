"""Puts the faults of a `FaultPlan` into the hand-off: between its sessions and what carries them.

An injector stands at two places of one worker, and the sessions know of neither: it makes the
control connections, and it stands around the lanes that write pages. Without a plan there is none.
"""

import itertools
import logging
import os
import random
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import msgspec

from tandem_engine.faults import Clause, Fault, FaultPlan, Step
from tandem_engine.handoff.events import Counters
from tandem_engine.handoff.pages import Pages, payload_checksum
from tandem_engine.handoff.transports.base import Lane, PageWrite, Written
from tandem_engine.memory import Gate, OpenCache, PeerCache, Staging
from tandem_wire.connection import Connection
from tandem_wire.endpoint import Make
from tandem_wire.handoff import (
    Beat,
    ChunkPushed,
    Commit,
    Fence,
    Fenced,
    HandoffMessage,
    Handshake,
    HandshakeReply,
    PagesReady,
    PagesWritten,
    Prefill,
    PrefillFailed,
    Probe,
    SlotFreed,
)

log = logging.getLogger(__name__)

STEPS: Final[dict[type[msgspec.Struct], Step]] = {
    Handshake: "handshake",
    HandshakeReply: "handshake",
    Prefill: "prefill",
    PagesReady: "slots",
    PagesWritten: "slots",
    SlotFreed: "slots",
    ChunkPushed: "chunk",
    Commit: "commit",
    PrefillFailed: "refusal",
    Fence: "fence",
    Fenced: "fenced",
    Probe: "probe",
    Beat: "beat",
}
"""The step of every message that a connection's `send` carries; `pages` are a lane's."""

_POLL_SECONDS: Final = 0.02


class _Trigger:
    """One clause at work. Used from several threads: `itertools.count` and `random` are atomic."""

    def __init__(self, clause: Clause, seed: str) -> None:
        self.clause = clause
        self._random = random.Random(seed)
        self._times = itertools.count(1)

    def strikes(self) -> bool:
        """Whether it strikes this time."""
        clause, time_ = self.clause, next(self._times)
        if clause.nth:
            return time_ == clause.nth
        if clause.every:
            return time_ % clause.every == 0
        return self._random.random() < clause.probability


class Injector:
    """The faults of one worker. At each step the first clause that strikes is the one."""

    def __init__(self, plan: FaultPlan, worker_id: str, counters: Counters) -> None:
        self._counters = counters
        self._triggers: dict[Step, list[_Trigger]] = {}
        for number, clause in enumerate(plan.clauses):
            trigger = _Trigger(clause, f"{plan.seed}/{worker_id}/{number}")
            self._triggers.setdefault(clause.step, []).append(trigger)

    def strike(self, step: Step) -> Clause | None:
        """What goes wrong at this step now; a process that is to be killed ends here."""
        for trigger in self._triggers.get(step, ()):
            if trigger.strikes():
                clause = trigger.clause
                self._counters.add("kv_faults_injected_total", step=step, fault=clause.fault)
                if clause.fault == "kill":
                    log.warning("injected: kill at %s", step)
                    os.kill(os.getpid(), signal.SIGKILL)
                return clause
        return None

    def connection(
        self, decoder: msgspec.msgpack.Decoder[HandoffMessage], **options: Any
    ) -> Connection[HandoffMessage]:
        """Make a connection whose sending side has faults."""
        return FaultyConnection(self, decoder, checked=True, **options)

    def around(self, lane: Lane, is_closed: Callable[[], bool]) -> Lane:
        """A lane whose writes have faults. `is_closed`: its session has ended."""

        def send(write: PageWrite) -> Written:
            clause = self.strike("pages")
            if clause is None:
                return lane(write)
            return _spoil(clause, lane, write, is_closed)

        return send


def make_connection(injector: Injector | None) -> Make[HandoffMessage]:
    """What makes the hand-off's connections."""
    return injector.connection if injector else partial(Connection, checked=True)


class FaultyConnection(Connection[HandoffMessage]):
    """A control connection, some of whose messages don't arrive as they were sent."""

    def __init__(
        self,
        injector: Injector,
        decoder: msgspec.msgpack.Decoder[HandoffMessage],
        **options: Any,
    ) -> None:
        super().__init__(decoder, **options)
        self._injector = injector
        self._held: deque[msgspec.Struct] = deque()
        self._holds_until = 0.0
        self._silent = False

    def send(self, message: msgspec.Struct) -> None:
        if self._silent and self.is_open:
            return
        if self._held or self._holds_until:
            self._held.append(message)
            return
        step = STEPS.get(type(message))
        clause = self._injector.strike(step) if step else None
        if clause is None:
            super().send(message)
        else:
            self._spoil(clause, message)

    def _spoil(self, clause: Clause, message: msgspec.Struct) -> None:
        fault: Fault = clause.fault
        if fault == "duplicate":
            super().send(message)
            super().send(message)
        elif fault in ("delay", "stall") and clause.seconds < float("inf"):
            self._held.append(message)
            self._holds_until = self._loop.time() + clause.seconds
            self._loop.call_later(clause.seconds, self._let_go)
        elif fault == "stall":
            self._silent = True
        elif fault in ("corrupt", "truncate"):
            self._cut(fault, message)
        elif fault == "half-close" and self._transport is not None:
            self._silent = True
            self._flush()
            self._transport.write_eof()

    def _cut(self, fault: Fault, message: msgspec.Struct) -> None:
        """Send the frame with one bit changed, or the first half of it and the end."""
        self._flush()
        super().send(message)
        middle = len(self._out) // 2
        if fault == "corrupt":
            self._out[middle] ^= 1 << middle % 8
            return
        del self._out[middle:]
        self._silent = True
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _let_go(self) -> None:
        self._holds_until = 0.0
        held, self._held = self._held, deque()
        for message in held:
            if self.is_open:
                super().send(message)


def _spoil(clause: Clause, lane: Lane, write: PageWrite, is_closed: Callable[[], bool]) -> Written:
    """Make one write with a fault."""
    fault = clause.fault
    if fault in ("delay", "stall"):
        end = time.monotonic() + clause.seconds
        while time.monotonic() < end:
            if is_closed():
                raise ConnectionResetError("the session ended in an injected pause")
            time.sleep(_POLL_SECONDS)
        return lane(write)
    if fault == "half-close":
        raise ConnectionResetError("injected: the lane ends")
    if fault == "duplicate":
        lane(write)
        return lane(write)
    if fault == "drop":
        return Written(write.num_bytes, _true_checksum(write))
    spoilt = SpoiltPages(write.pages, truncates=fault == "truncate")
    written = lane(replace(write, pages=spoilt))
    # Of what should have been sent: the damage is the link's, not the cache's.
    if written.checksum and not spoilt.was_staged:
        return Written(write.num_bytes, _true_checksum(write))
    return Written(write.num_bytes, written.checksum)


def _true_checksum(write: PageWrite) -> int:
    payload = write.pages.export(write.source_blocks, write.layers)
    return payload_checksum(write.target_blocks, write.layers, payload)


class SpoiltPages(Pages):
    """Pages that change, or lose their second half, after their checksum has been made."""

    def __init__(self, pages: Pages, *, truncates: bool) -> None:
        self.num_layers = pages.num_layers
        self.layer_bytes = pages.layer_bytes
        self.block_bytes = pages.block_bytes
        self.are_of_a_cache = pages.are_of_a_cache
        self.was_staged = False
        self._pages = pages
        self._truncates = truncates

    def _spoil(self, data: bytes) -> bytes:
        middle = len(data) // 2
        if self._truncates:
            return data[:middle]
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]

    def export(self, blocks: Sequence[int], layers: range) -> bytes:
        return self._spoil(bytes(self._pages.export(blocks, layers)))

    def export_into(self, blocks: Sequence[int], layers: range, out: memoryview) -> None:
        self._pages.export_into(blocks, layers, out)
        spoilt = self._spoil(bytes(out))
        out[:] = spoilt + bytes(len(out) - len(spoilt))

    def stage(
        self, blocks: Sequence[int], layers: range, staging: Staging, at: int, seed: int | None
    ) -> int:
        self.was_staged = True
        checksum = self._pages.stage(blocks, layers, staging, at, seed)
        num_bytes = len(blocks) * len(layers) * self.layer_bytes
        data, _ = staging.get(num_bytes, at, None)
        spoilt = self._spoil(data)
        # What was there before the write is as good as anything: not these pages.
        staging.put(spoilt + b"\xa5" * (num_bytes - len(spoilt)), at, None)
        return checksum

    def unstage(
        self, blocks: Sequence[int], layers: range, staging: Staging, at: int, seed: int | None
    ) -> int:
        return self._pages.unstage(blocks, layers, staging, at, seed)

    def push(
        self,
        cache: PeerCache,
        gate: Gate,
        source: Sequence[int],
        target: Sequence[int],
        layers: range,
        seed: int | None,
    ) -> int:
        """What the peer has is spoilt or what it is told of it: either way they don't agree."""
        self.was_staged = True
        checksum = self._pages.push(cache, gate, source, target, layers, seed)
        return checksum if seed is None else checksum ^ 1

    def check(
        self, cache: OpenCache, blocks: Sequence[int], layers: range, seed: int | None
    ) -> int:
        return self._pages.check(cache, blocks, layers, seed)

    def are_settled(self, blocks: Collection[int]) -> bool:
        return self._pages.are_settled(blocks)

    def take(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        self._pages.take(blocks, layers, data)
