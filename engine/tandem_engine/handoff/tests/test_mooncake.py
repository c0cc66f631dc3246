"""The transport mooncake beyond what all have in common: completion, revocation, its engines."""

import asyncio
import ctypes
import importlib.metadata
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deadlines import patience

from tandem_engine.handoff.errors import HandoffUnavailable, TransportError
from tandem_engine.handoff.events import FetchCancelled, FetchFailed, PrefillDropped
from tandem_engine.handoff.tests.children import Pipe, Start
from tandem_engine.handoff.tests.scripted import (
    FAST,
    LAYOUT,
    BytesStore,
    eventually,
    make,
)
from tandem_engine.handoff.tests.transport_list import HAS_MOONCAKE
from tandem_engine.handoff.transports import transfer_engine
from tandem_engine.handoff.transports.base import Link
from tandem_engine.handoff.transports.mooncake import (
    MooncakeInbound,
    MooncakeOutbound,
    MooncakeTransport,
    SealedMemory,
)
from tandem_engine.handoff.transports.registry import Transports
from tandem_engine.handoff.transports.transfer_engine import Engine, borrow, give_back
from tandem_wire.handoff import TransportOffer

pytestmark = pytest.mark.skipif(not HAS_MOONCAKE, reason="mooncake has no wheel")

HOST = "127.0.0.1"
LARGE = 256 << 20


def make_memory(engine: Engine, num_bytes: int = LARGE) -> SealedMemory:
    return SealedMemory(engine, BytesStore(LAYOUT, 1), num_bytes)


def be_a_target(pipe: Pipe) -> None:
    """Register memory and tell where."""
    engine = Engine(HOST)
    memory = make_memory(engine)
    pipe.send((os.getpid(), engine.name, engine.identity, memory.address))
    threading.Event().wait()


def be_a_writer(pipe: Pipe, peer: str, target: int) -> None:
    """Write without a pause until it fails."""
    engine = Engine(HOST)
    memory = make_memory(engine)
    ctypes.memset(memory.address, 0x5A, LARGE)
    pipe.send(os.getpid())
    try:
        while True:
            engine.write(peer, memory.address, target, LARGE, threading.Event())
    except OSError as error:
        pipe.send(str(error))


def hear(pipe: Pipe) -> Any:
    assert pipe.poll(patience(30))
    return pipe.recv()


def state(process: int) -> str:
    """The letter that `ps` shows."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def stop(process: int) -> None:
    os.kill(process, signal.SIGSTOP)
    eventually(lambda: state(process) == "T")


def rights(address: int) -> str:
    """What this process may do at an address, as the system writes it; empty: nothing there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line)
        assert found is not None
        if int(found[1], 16) <= address < int(found[2], 16):
            return found[3]
    return ""


def first_byte(address: int) -> int:
    return ctypes.c_ubyte.from_address(address).value


def test_what_comes_after_the_end_of_a_session_lands_nowhere(
    start: Start,
) -> None:
    """P is stopped in a write and taken for dead; D seals its ring; P wakes and goes on."""
    engine = Engine(HOST)
    memory = make_memory(engine)
    address = memory.address
    pipe = start(be_a_writer, engine.name, address)
    writer = hear(pipe)
    eventually(lambda: first_byte(address) == 0x5A)
    stop(writer)
    memory.keep()
    memory.close()
    os.kill(writer, signal.SIGCONT)
    assert "refused the write or was lost in it" in hear(pipe)
    assert rights(address) == rights(address + LARGE - 1) == "---p"
    with Path("/proc/self/mem").open("rb", buffering=0) as pages, suppress(OSError):
        pages.seek(address)
        assert not any(pages.read(1 << 20))
    fresh = make_memory(engine, 1 << 20)
    assert not address <= fresh.address < address + LARGE, "the addresses are not used again"
    fresh.close()


def num_sealed() -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(" ---p " in line for line in lines)


def test_sealed_addresses_become_few_entries() -> None:
    engine = Engine(HOST)
    before, num_open = num_sealed(), len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        memory = make_memory(engine, 1 << 20)
        memory.keep()
        memory.close()
    assert num_sealed() < before + 50
    assert len(os.listdir("/proc/self/fd")) < num_open + 10


def test_memory_of_a_clean_end_is_unmapped() -> None:
    memory = make_memory(Engine(HOST))
    assert rights(memory.address) == "rw-p"
    address = memory.address
    memory.close()
    memory.close()
    assert rights(address) != "---p"
    with pytest.raises(ValueError, match="mmap closed"):
        memory.put(b"x", 0, None)


def test_a_write_to_a_stopped_peer_is_left_when_the_session_ends(
    start: Start,
) -> None:
    """What the library still reads is sealed, and the engine serves the next peer at once."""
    target, peer, _, address = hear(start(be_a_target))
    engine = Engine(HOST)
    memory = make_memory(engine)
    stopped = threading.Event()
    engine.write(peer, memory.address, address, 1 << 20, stopped)
    stop(target)
    failures: list[str] = []

    def write() -> None:
        try:
            engine.write(peer, memory.address, address, LARGE, stopped)
        except OSError as error:
            failures.append(str(error))

    lane = threading.Thread(target=write)
    lane.start()
    stopped.set()
    lane.join(patience(20))
    assert failures == ["the session has ended"]
    sealed = memory.address
    memory.keep()
    memory.close()
    assert rights(sealed) == "---p"
    other = Engine(HOST)
    here, there = make_memory(engine, 1 << 20), make_memory(other, 1 << 20)
    ctypes.memset(here.address, 7, 1 << 20)
    engine.write(other.name, here.address, there.address, 1 << 20, threading.Event())
    assert first_byte(there.address + (1 << 20) - 1) == 7
    os.kill(target, signal.SIGCONT)
    engine.write(other.name, here.address, there.address, 1 << 20, threading.Event())


def test_a_write_to_a_peer_that_dies_fails(start: Start) -> None:
    target, peer, _, address = hear(start(be_a_target))
    engine = Engine(HOST)
    memory = make_memory(engine)
    engine.write(peer, memory.address, address, 1 << 20, threading.Event())
    os.kill(target, signal.SIGKILL)
    eventually(lambda: state(target) == "Z")
    with pytest.raises(OSError, match="refused the write or was lost in it"):
        engine.write(peer, memory.address, address, LARGE, threading.Event())


def make_link(**changes: Any) -> Link:
    connection: Any = SimpleNamespace(local_host=HOST)
    return Link(
        session="s",
        address=(HOST, 0),
        connection=connection,
        settings=replace(FAST, transport="mooncake", **changes),
        kv=BytesStore(LAYOUT, 1),
        on_lost=lambda _: None,
    )


async def test_a_peer_that_is_stopped_before_the_first_write_holds_up_no_one_else(
    start: Start,
) -> None:
    """Its engine stays away until the thread inside has come back."""
    target, name, identity, address = hear(start(be_a_target))
    link = make_link(dial_seconds=0.9)
    transport = MooncakeTransport(link.settings, link.kv)
    healthy = transport.offer(link)
    stop(target)
    offer = TransportOffer(
        "mooncake",
        healthy.offer.details | {"engine": name, "id": identity, "address": address},
    )
    with pytest.raises(TransportError, match=r"can't reach the peer's engine at .* within 0\.3 s"):
        await transport.accept(offer, link)
    assert not any(engine._peers.get(name) for engine in transfer_engine._free)
    outbound = await transport.accept(healthy.offer, make_link())
    await outbound.close()
    await healthy.close()
    os.kill(target, signal.SIGCONT)
    end = time.monotonic() + patience(20)
    while not any(engine._peers.get(name) for engine in transfer_engine._free):
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_a_peer_that_speaks_another_protocol_is_refused() -> None:
    link = make_link()
    transport = MooncakeTransport(link.settings, link.kv)
    inbound = transport.offer(link)
    offer = TransportOffer("mooncake", inbound.offer.details | {"protocol": "rdma"})
    with pytest.raises(TransportError, match="speaks rdma, and this worker's tcp"):
        await transport.accept(offer, link)
    with pytest.raises(TransportError, match="names no engine"):
        await transport.accept(TransportOffer("mooncake", {"slot_bytes": 1, "num_slots": 2}), link)
    await inbound.close()


def test_an_engine_never_meets_two_peers_of_one_name() -> None:
    """A new process may have the address and port of an old one, whose place the engine knows."""
    one = borrow(HOST, "10.0.0.1:15000", "old")
    give_back(one)
    other = borrow(HOST, "10.0.0.1:15000", "new")
    assert other is not one
    give_back(one)
    give_back(other)
    again = borrow(HOST, "10.0.0.1:15000", "old")
    assert again is not other
    give_back(again)


def test_an_engine_that_can_not_be_reached_is_the_reason(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("10.0.0.1:15000 does not answer (error -102)")

    monkeypatch.setattr(Engine, "reach", fail)
    p, d = make(stack, "p", transport="mooncake"), make(stack, "d", transport="mooncake")
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    told = "no common transport (mooncake: can't reach the peer's engine: 10.0.0.1:15000 does not"
    assert told in failed.message
    assert "blocks ports 15000 to 17000" in failed.message


def test_a_write_that_fails_while_d_fences_leaves_a_sealed_ring(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may land yet, so it is no answer to the fence."""
    p, d = make(stack, "p", transport="mooncake"), make(stack, "d", transport="mooncake")
    assert d.takes(p)
    (peer,) = d.handoff._decode._peers._peers.values()
    assert peer.session is not None
    assert isinstance(peer.session.inbound, MooncakeInbound)
    ring = peer.session.inbound._ring.address
    held, release = threading.Event(), threading.Event()

    def fail(*_: object) -> None:
        held.set()
        assert release.wait(patience(20))
        raise OSError("no route")

    with monkeypatch.context() as changed:
        changed.setattr(MooncakeOutbound, "_put", fail)
        d.fetch("r", [p])
        p.push(p.arrived(), finish=False)
        assert held.wait(patience(20))
        d.handoff.post(FetchCancelled("r"))
        eventually(lambda: p.handoff.counters().get("kv_fences_total", 0) == 1)
    release.set()
    assert isinstance(d.outcome("r"), FetchFailed)
    p.wait(PrefillDropped)
    eventually(lambda: rights(ring) == "---p")
    assert d.takes(p)


def unavailable() -> str:
    with pytest.raises(HandoffUnavailable) as caught:
        Transports(replace(FAST, transport="mooncake"), BytesStore(LAYOUT, 1))
    return str(caught.value)


@pytest.fixture(name="_unchecked")
def unchecked_fixture() -> Iterator[None]:
    transfer_engine._check.cache_clear()
    yield
    transfer_engine._check.cache_clear()


@pytest.mark.usefixtures("_unchecked")
def test_what_is_missing_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        changed.setitem(sys.modules, "mooncake.engine", None)
        assert "not installed; install tandem-inference[mooncake]" in unavailable()
    with monkeypatch.context() as changed:
        changed.setattr(importlib.metadata, "version", lambda _: "0.3.12.post2")
        assert "is 0.3.12.post2; install 0.3.13 or newer" in unavailable()
    with monkeypatch.context() as changed:
        changed.setenv("MOONCAKE_PROTOCOL", "rdma")
        assert "finds no RDMA device; give this worker one" in unavailable()
    with monkeypatch.context() as changed:
        changed.setenv("MOONCAKE_PROTOCOL", "ucx")
        assert "MOONCAKE_PROTOCOL is ucx; set it to tcp or rdma" in unavailable()
    with monkeypatch.context() as changed:
        changed.setenv("MC_USE_TENT", "1")
        assert "MC_USE_TENT is set" in unavailable()


def test_connections_are_pooled_and_writes_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_TCP_ENABLE_CONNECTION_POOL", "0")
    monkeypatch.setenv("MC_TCP_PROTO", "1")
    transfer_engine.load()
    assert os.environ["MC_TCP_ENABLE_CONNECTION_POOL"] == "1"
    assert "MC_TCP_PROTO" not in os.environ


def test_auto_leaves_it_out() -> None:
    names = str(Transports(FAST, BytesStore(LAYOUT, 1)))
    assert "tcp (" in names
    assert "mooncake" not in names
