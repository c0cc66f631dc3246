"""What goes wrong while pages are staged: neither cache ever sees it. On a GPU too, see below."""

import contextlib
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deadlines import patience

from tandem_engine.handoff.events import FetchCancelled, FetchDone, FetchFailed, PrefillDropped
from tandem_engine.handoff.pages import KVPages
from tandem_engine.handoff.tests.scripted import LAYOUT, Worker, eventually, make
from tandem_engine.handoff.tests.sleeping import wake_after_cut_off
from tandem_engine.handoff.tests.transport_list import RINGS
from tandem_engine.handoff.transports.base import Link, Outbound
from tandem_engine.handoff.transports.remote_ring import RemoteRingOutbound
from tandem_engine.handoff.transports.ring import RingOutbound
from tandem_wire.handoff import PagesWritten, SlotFreed

SLOTS = 4  # of two blocks each


class Gate:
    """Holds the writes of one worker's cache, before or after they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, worker: Worker, way: str) -> None:
        self.held = threading.Event()
        self.release = threading.Event()
        self.num_held = 0
        move = getattr(KVPages, way)

        def wait(pages: KVPages, *args: Any) -> int:
            if pages._kv is worker.kv:
                self.num_held += 1
                self.held.set()
                assert self.release.wait(patience(20))
            moved: int = move(pages, *args)
            return moved

        monkeypatch.setattr(KVPages, way, wait)


def count_writes(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[int]]:
    """The blocks of every write of a cache's pages that was made, from now on."""
    staged: list[Sequence[int]] = []
    stage = KVPages.stage

    def count(pages: KVPages, blocks: Sequence[int], *rest: Any) -> int:
        checksum = stage(pages, blocks, *rest)
        staged.append(blocks)
        return checksum

    monkeypatch.setattr(KVPages, "stage", count)
    return staged


def scribble(outbound: Outbound) -> None:
    """Write to every slot of D's ring, without a word."""
    assert isinstance(outbound, RingOutbound)
    junk = b"\xee" * (2 * LAYOUT.block_bytes)
    for slot in range(SLOTS):
        at = slot * len(junk)
        if isinstance(outbound, RemoteRingOutbound):
            outbound._staging.put(junk, 0, None)
            outbound._put(outbound._outgoing.address, at, len(junk))
        else:
            outbound._staging.put(junk, at, None)


@pytest.fixture(name="options", params=RINGS)
def options_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {"transport": request.param, "shm_dir": str(tmp_path)}


def test_a_peer_that_wakes_after_it_was_cut_off_writes_to_the_ring_alone(
    stack: ExitStack, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps in a copy, doesn't answer the fence, and finishes when its pages are another's."""
    wake_after_cut_off(stack, monkeypatch, options, lambda bad: Gate(monkeypatch, bad, "stage"))


def test_a_cancelled_request_waits_for_the_copy_that_is_under_way(
    stack: ExitStack, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    assert d.takes(p)
    gate = Gate(monkeypatch, p, "stage")
    before = d.kv.data.copy()
    d.fetch("r", [p])
    p.push(p.arrived(), finish=False)
    assert gate.held.wait(patience(20))
    d.handoff.post(FetchCancelled("r"))
    eventually(lambda: p.handoff.counters().get("kv_fences_total", 0) == 1)
    assert not d.handoff.poll()
    gate.release.set()
    assert isinstance(d.outcome("r"), FetchFailed)
    p.wait(PrefillDropped)
    assert np.array_equal(d.kv.data, before)
    assert d.takes(p), "the session goes on"
    assert d.handoff.counters()["kv_dials_total"] == 1


def test_what_comes_for_a_fenced_epoch_is_dropped_and_its_slot_freed(
    stack: ExitStack, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P has written and said so, but D gives up before it has looked: the ring stays whole."""
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    assert d.takes(p)
    gate = Gate(monkeypatch, d, "unstage")
    staged = count_writes(monkeypatch)
    before = d.kv.data.copy()
    d.fetch("r", [p], 8 * SLOTS)
    p.push(p.arrived(), finish=False)
    assert gate.held.wait(patience(20))
    eventually(lambda: len(staged) == 2)
    d.handoff.post(FetchCancelled("r"))
    p.wait(PrefillDropped)
    (peer,) = d.handoff._decode._peers._peers.values()
    assert peer.session is not None
    landings = peer.session.inbound._landings
    eventually(lambda: not landings)  # D has P's word, and waits for its own first read
    gate.release.set()
    assert isinstance(d.outcome("r"), FetchFailed)
    eventually(lambda: d.handoff.counters()["kv_stale_writes_total"] >= 1)
    for number in range(SLOTS):
        d.fetch(f"next {number}", [p], 8 * SLOTS)
        arrived = p.arrived()
        source = p.push(arrived)
        assert isinstance(d.outcome(f"next {number}"), FetchDone)
    blocks = arrived.request.blocks
    before[:, :, blocks] = p.kv.data[:, :, source]
    assert np.array_equal(d.kv.data, before)


def test_a_full_ring_holds_the_sender_back(
    stack: ExitStack, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    assert d.takes(p)
    gate = Gate(monkeypatch, d, "unstage")
    staged = count_writes(monkeypatch)
    d.fetch("r", [p], 80)
    arrived = p.arrived()
    source = p.push(arrived, chunks=1)
    eventually(lambda: len(staged) == SLOTS)
    eventually(lambda: gate.num_held == 1)
    assert not d.handoff.poll()
    assert len(staged) == SLOTS
    gate.release.set()
    assert isinstance(d.outcome("r"), FetchDone)
    assert len(staged) == 10
    assert np.array_equal(d.kv.data[:, :, arrived.request.blocks], p.kv.data[:, :, source])


def test_a_session_ends_though_many_wait_for_a_slot(
    stack: ExitStack, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D is gone and the ring is full: no lane goes on to wait for the next request's slot."""
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    assert d.takes(p)
    gate = Gate(monkeypatch, d, "unstage")
    staged = count_writes(monkeypatch)
    for number in range(4):
        d.fetch(f"r{number}", [p], 80)
        p.push(p.arrived(), chunks=1)
    eventually(lambda: len(staged) == SLOTS)
    eventually(lambda: gate.num_held == 1)
    (session,) = p.handoff._prefill._sessions.values()
    p.handoff._call(session._link.connection.abort)
    try:
        for _ in range(4):
            p.wait(PrefillDropped)
        assert p.handoff.num_leases() == 0
    finally:
        gate.release.set()


@pytest.mark.parametrize(
    ("side", "message", "told"),
    [
        ("p", PagesWritten(1, 0, [10, 11], 2 * LAYOUT.block_bytes, 0, 3), "was not its own"),
        ("p", PagesWritten(1, SLOTS, [10], LAYOUT.block_bytes, 0, 3), "of a ring of 4 slots"),
        ("p", PagesWritten(1, 1, [10], 7, 0, 3), "7 bytes for pages of 384 bytes"),
        ("d", SlotFreed(3), "freed slot 3, which was not full"),
    ],
)
def test_a_slot_that_is_not_the_writers_ends_the_session(
    stack: ExitStack,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    message: Any,
    told: str,
) -> None:
    """The first message is right, and comes twice; every other one is wrong by itself."""
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    send = Link.send
    sent: list[Any] = []

    def twice(link: Link, real: Any) -> None:
        send(link, real)
        kind = PagesWritten if side == "p" else SlotFreed
        if isinstance(real, kind) and getattr(real, "epoch", None) != 0 and not sent:
            sent.append(real)
            send(link, real if told == "was not its own" else message)

    assert d.takes(p)
    gate = Gate(monkeypatch, d, "unstage")
    if side == "d":
        gate.release.set()
    monkeypatch.setattr(Link, "send", twice)
    d.fetch("r", [p], 8)
    p.push(p.arrived(), finish=side == "d", chunks=1 if side == "d" else 2)
    gate.held.wait(patience(20))
    eventually(lambda: bool(sent))
    gate.release.set()
    outcome = d.outcome("r")
    if side == "p":
        assert isinstance(outcome, FetchFailed)
        assert told in outcome.message
    eventually(lambda: d.handoff.counters()["kv_dials_total"] == 2)
    assert d.takes(p)


def test_a_ring_is_unmapped_by_both_when_they_part(
    stack: ExitStack, options: dict[str, Any]
) -> None:
    def num_rings() -> int:
        """Mappings, and descriptors: the second are not closed by forgetting an object."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                lines.append(os.readlink(f"/proc/self/fd/{number}"))
        return sum("tandem-ring" in line or "memfd:ring" in line for line in lines)

    before = num_rings()
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    assert d.takes(p)
    # Mappings and descriptors of both sides, of one process here; mooncake's memory has no name.
    expected = {"cudaIpcRing": 6, "mooncake": 0}.get(options["transport"], 4)
    assert num_rings() == before + expected
    d.close()
    eventually(lambda: num_rings() == before)
    new = make(stack, "d", **options)
    assert new.takes(p), "the next one at the same place"
    p.close()
    new.close()
    eventually(lambda: num_rings() == before)
    assert not list(Path(options["shm_dir"]).iterdir())


def test_staging_is_not_the_cache(stack: ExitStack, options: dict[str, Any]) -> None:
    """What a peer writes to a ring whenever it likes changes no block."""
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    assert d.takes(p)
    (session,) = p.handoff._prefill._sessions.values()
    before = d.kv.data.copy()
    scribble(session.outbound)
    assert np.array_equal(d.kv.data, before)
    assert d.takes(p)
