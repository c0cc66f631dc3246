"""Faults of a library's remote write: nothing hangs, and no memory is unmapped too early."""

import os
import signal
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deadlines import patience

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.events import FetchCancelled, FetchDone, FetchFailed, PrefillDropped
from tandem_engine.handoff.tests.children import Pipe, Start
from tandem_engine.handoff.tests.scripted import FAST, LAYOUT, BytesStore, Worker, eventually, make
from tandem_engine.handoff.transports import nixl
from tandem_engine.handoff.transports.nixl import NixlInbound, NixlOutbound, NixlTransport
from tandem_engine.handoff.transports.remote_ring import MAX_KEPT
from tandem_wire.handoff import TransportOffer
from tandem_wire.messages import PrefillPeer

OPTIONS: dict[str, Any] = {"transport": "nixl"}
PUT = NixlOutbound._put


def transport_of(worker: Worker) -> NixlTransport:
    transport = worker.handoff._transports._usable["nixl"]
    assert isinstance(transport, NixlTransport)
    return transport


def be_stopped_prefill(pipe: Pipe) -> None:
    """Push what is asked for; stop in the second push, when a part of it is written."""
    worker = Worker("child", **OPTIONS)
    pipe.send((worker.peer, os.getpid()))
    worker.push(worker.arrived())
    arrived = worker.arrived()

    def put(self: NixlOutbound, source: int, target: int, num_bytes: int) -> None:
        PUT(self, source, target, num_bytes // 2)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._interrupted = threading.Event()  # this thread wakes up before the loop's
        PUT(self, source, target, num_bytes)
        pipe.send("written")

    NixlOutbound._put = put  # type: ignore[method-assign]
    worker.push(arrived, finish=False)
    threading.Event().wait()


def be_stopped_decode(pipe: Pipe, peer: PrefillPeer) -> None:
    """Fetch twice; the parent stops this process in the second one."""
    worker = Worker("child", **OPTIONS)
    pipe.send(os.getpid())
    stand_in: Any = type("P", (), {"peer": peer})()
    worker.fetch("first", [stand_in])
    worker.outcome("first")
    worker.fetch("second", [stand_in], 40)
    threading.Event().wait()


def test_a_sender_that_wakes_from_a_write_finds_the_ring_still_there(
    stack: ExitStack, start: Start
) -> None:
    """D has given the pages to another request; what comes late lands in memory of no one."""
    good, d = make(stack, "good", **OPTIONS), make(stack, "d", **OPTIONS)
    pipe = start(be_stopped_prefill)
    assert pipe.poll(patience(30))
    peer, pid = pipe.recv()
    child: Any = type("P", (), {"peer": peer})()
    d.fetch("first", [child])
    assert isinstance(d.outcome("first"), FetchDone)
    before = d.kv.data.copy()
    d.fetch("second", [child, good], 40)
    arrived = good.arrived()
    source = good.push(arrived)
    done = d.outcome("second")
    assert isinstance(done, FetchDone)
    assert done.worker_id == "good"
    before[:, :, arrived.request.blocks] = good.kv.data[:, :, source]
    assert len(transport_of(d).kept) == 1
    os.kill(pid, signal.SIGCONT)
    assert pipe.poll(patience(30)), "the late write is made"
    assert np.array_equal(d.kv.data, before)
    assert d.takes(good)


def test_a_receiver_that_stops_in_a_write_holds_no_one_up(
    stack: ExitStack, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TCP such a write never ends: P gives it up when D is silent, and keeps its memory."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    p = make(stack, "p", **OPTIONS)
    pipe = start(be_stopped_decode, p.peer)
    assert pipe.poll(patience(30))
    pid = pipe.recv()
    p.push(p.arrived())
    second = p.arrived()

    def put(self: NixlOutbound, source: int, target: int, num_bytes: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        PUT(self, source, target, num_bytes)

    monkeypatch.setattr(NixlOutbound, "_put", put)
    p.push(second)
    p.wait(PrefillDropped)
    eventually(lambda: not p.handoff.pairings())
    assert p.handoff.num_leases() == 0
    assert len(transport_of(p).kept) == 1
    monkeypatch.setattr(NixlOutbound, "_put", PUT)
    os.kill(pid, signal.SIGKILL)
    assert make(stack, "d", **OPTIONS).takes(p)


def test_a_write_that_fails_is_no_answer_to_a_fence(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may land yet: the session ends, D keeps the ring."""
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **OPTIONS)
    assert d.takes(p)
    held, release = threading.Event(), threading.Event()

    def fail(*_: object) -> None:
        held.set()
        assert release.wait(patience(20))
        raise ConnectionError("no route")

    monkeypatch.setattr(NixlOutbound, "_put", fail)
    d.fetch("r", [p])
    p.push(p.arrived(), finish=False)
    assert held.wait(patience(20))
    d.handoff.post(FetchCancelled("r"))
    eventually(lambda: p.handoff.counters().get("kv_fences_total", 0) == 1)
    monkeypatch.setattr(NixlOutbound, "_put", PUT)
    release.set()
    assert isinstance(d.outcome("r"), FetchFailed)
    p.wait(PrefillDropped)
    assert len(transport_of(d).kept) == 1
    assert d.takes(p)


def test_a_peer_that_can_not_write_is_left_for_the_next_one(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = make(stack, "bad", **OPTIONS), make(stack, "good", **OPTIONS)
    d = make(stack, "d", **OPTIONS)
    assert d.takes(bad)

    def fail(self: NixlOutbound, source: int, target: int, num_bytes: int) -> None:
        if self._transport is transport_of(bad):
            raise ConnectionError("NIXL_ERR_REMOTE_DISCONNECT")
        PUT(self, source, target, num_bytes)

    monkeypatch.setattr(NixlOutbound, "_put", fail)
    d.fetch("r", [bad, good])
    bad.push(bad.arrived())
    good.push(good.arrived())
    done = d.outcome("r")
    assert isinstance(done, FetchDone)
    assert (done.worker_id, done.transport) == ("good", "nixl")


def test_auto_goes_on_when_the_first_page_does_not_come(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "uverbs0").touch()
    monkeypatch.setattr(nixl, "RDMA_DIRECTORY", tmp_path)

    def fail(*_: object) -> None:
        raise ConnectionError("no route to the card")

    monkeypatch.setattr(NixlOutbound, "_put", fail)
    p, d = make(stack, "p"), make(stack, "d")
    assert d.takes(p)
    eventually(lambda: bool(d.handoff.pairings()))
    (pairing,) = d.handoff.pairings()
    assert pairing.transport == "tcp"
    assert "the first page did not come" in pairing.passed_over["nixl"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metadata": "no base64!"}, "metadata of nixl is broken"),
        ({"metadata": "bml4bFNlckRlcw=="}, "it is not what it sent"),
        ({"metadata": "Z2FyYmFnZQ==", "digest": "9c5fb0c5b6ab8d4f"}, "metadata of nixl is broken"),
        ({"address": "0"}, "it is not what it sent"),
        ({"version": "1.4.0"}, "the peer has nixl 1.4.0, this worker"),
        ({"version": ""}, "(it does not say)"),
        ({"slot_bytes": 0}, "slots of 0 bytes"),
    ],
)
def test_an_offer_that_is_not_whole_is_refused(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | int], told: str
) -> None:
    """Nothing of it gets into the library."""
    whole = NixlInbound.offer
    assert isinstance(whole, property)
    assert whole.fget is not None
    make_offer = whole.fget

    def broken(inbound: NixlInbound) -> TransportOffer:
        offer: TransportOffer = make_offer(inbound)
        return TransportOffer(offer.name, offer.details | changes)

    monkeypatch.setattr(NixlInbound, "offer", property(broken))
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **OPTIONS)
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "no common transport (nixl: " in failed.message
    assert told in failed.message


def test_what_the_library_refuses_is_the_reason(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **OPTIONS)
    agent = transport_of(d).agent
    monkeypatch.setattr(agent, "describe", lambda *_: b"garbage")
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "nixl can't reach the peer's agent: NIXL_ERR_MISMATCH" in failed.message


def test_kept_rings_are_used_again_only_with_checksums() -> None:
    transport = NixlTransport(replace(FAST, transport="nixl"), BytesStore(LAYOUT, 1))
    careless = NixlTransport(replace(FAST, transport="nixl", checksum=False), BytesStore(LAYOUT, 1))
    addresses = []
    for owner in (transport, careless):
        rings = [owner.make_ring(4096) for _ in range(MAX_KEPT)]
        for ring in rings:
            ring.keep()
            ring.close()
            ring.close()
        assert len(owner.kept) == MAX_KEPT
        addresses.append([ring.address for ring in rings])
    again = transport.make_ring(4096)
    assert again.address == addresses[0][0], "the oldest"
    assert len(transport.kept) == MAX_KEPT - 1
    with pytest.raises(TransportError, match="can't be used again without checksums"):
        careless.make_ring(4096)
    assert careless.make_outgoing(4096).address == addresses[1][0], "P's: it only reads there"
    careless.make_ring(8192).close()
    again.close()
    for owner in (transport, careless):
        owner.close()
        assert not owner.kept


def test_an_agent_is_forgotten_with_its_last_session(stack: ExitStack) -> None:
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **OPTIONS)
    assert d.takes(p)
    name = transport_of(d).agent.name
    agent = transport_of(p).agent
    assert agent.knows(name)
    d.close()
    eventually(lambda: not agent.knows(name))
    assert make(stack, "d", **OPTIONS).takes(p)
