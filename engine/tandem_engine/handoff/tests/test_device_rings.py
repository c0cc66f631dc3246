"""NIXL's rings in a GPU's memory: who has which, and what a pairing tells of it.

Memory of the host stands in for the GPU's; UCX writes to it all the same. With a GPU's own memory:
`tandem_engine/tests/test_device_nixl.py`.
"""

import ctypes
import mmap
import re
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from tandem_engine.config import WorkerConfig
from tandem_engine.doctor.check import Check
from tandem_engine.doctor.devices import PEER_MEMORY
from tandem_engine.errors import StagingUnavailableError
from tandem_engine.frames import Pairing, ProbeRequest, ProbeResult
from tandem_engine.handoff import settings
from tandem_engine.handoff.errors import HandoffUnavailable
from tandem_engine.handoff.events import FetchFailed
from tandem_engine.handoff.settings import HandoffSettings, read_nixl_ring
from tandem_engine.handoff.tests import scripted
from tandem_engine.handoff.tests.scripted import FAST, LAYOUT, BytesStore, Worker, eventually, make
from tandem_engine.handoff.tests.test_remote_ring import (
    OPTIONS,
    test_a_peer_that_can_not_write_is_left_for_the_next_one,
    test_a_write_that_fails_is_no_answer_to_a_fence,
    transport_of,
)
from tandem_engine.handoff.tests.test_staged_faults import (
    test_a_cancelled_request_waits_for_the_copy_that_is_under_way,
    test_a_full_ring_holds_the_sender_back,
    test_a_peer_that_wakes_after_it_was_cut_off_writes_to_the_ring_alone,
    test_staging_is_not_the_cache,
    test_what_comes_for_a_fenced_epoch_is_dropped_and_its_slot_freed,
)
from tandem_engine.handoff.transports.nixl import IN_GPU_MEMORY, NixlOutbound, NixlTransport
from tandem_engine.handoff.transports.nixl_agent import Agent
from tandem_engine.handoff.transports.remote_ring import MAX_KEPT, RegisteredDeviceMemory
from tandem_engine.handoff.transports.ring import HostStaging
from tandem_engine.memory import MemoryRegion, OwnStaging
from tandem_engine.server.api import ProbeAnswer

__all__ = [
    "test_a_cancelled_request_waits_for_the_copy_that_is_under_way",
    "test_a_full_ring_holds_the_sender_back",
    "test_a_peer_that_can_not_write_is_left_for_the_next_one",
    "test_a_peer_that_wakes_after_it_was_cut_off_writes_to_the_ring_alone",
    "test_a_write_that_fails_is_no_answer_to_a_fence",
    "test_staging_is_not_the_cache",
    "test_what_comes_for_a_fenced_epoch_is_dropped_and_its_slot_freed",
]


class MappedStaging(HostStaging, OwnStaging):
    """What stands in for memory of a GPU."""

    def __init__(self, store: BytesStore, num_bytes: int) -> None:
        super().__init__(store, mmap.mmap(-1, num_bytes), 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.region = MemoryRegion("cuda", address, num_bytes, 3)

    def close(self) -> None:
        """UCX may still write there; the process ends soon."""


class GpuStore(BytesStore):
    """A cache that is said to be on a GPU."""

    room = 1 << 30

    def regions(self) -> tuple[MemoryRegion, ...]:
        return (MemoryRegion("cuda", self.data.ctypes.data, self.data.nbytes),)

    def make_own_staging(self, num_bytes: int) -> OwnStaging:
        if num_bytes > self.room:
            raise StagingUnavailableError("cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2)")
        return MappedStaging(self, num_bytes)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "BytesStore", GpuStore)
    monkeypatch.setattr(Agent, "_segment", lambda self, _: self._library.DRAM_SEG)


@pytest.fixture(name="options")
def options_fixture() -> dict[str, Any]:
    return OPTIONS


def pairing_of(worker: Worker) -> Pairing:
    eventually(lambda: bool(worker.handoff.pairings()))
    (pairing,) = worker.handoff.pairings()
    return pairing


def outbound_of(worker: Worker) -> NixlOutbound:
    (session,) = worker.handoff._prefill._sessions.values()
    assert isinstance(session.outbound, NixlOutbound)
    return session.outbound


def test_both_rings_are_on_the_gpu(stack: ExitStack) -> None:
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **OPTIONS)
    assert d.takes(p)
    for worker in (p, d):
        assert pairing_of(worker).memory == "device"
        assert pairing_of(worker).shortfalls == {}
        assert str(worker.handoff._transports) == "nixl (staged, device memory)"
    outbound = outbound_of(p)
    assert (outbound._ring.kind, outbound._ring.device) == ("cuda", 3)
    assert isinstance(outbound._outgoing, RegisteredDeviceMemory)


def test_a_ring_on_the_gpu_is_never_freed_but_goes_to_the_next_session(stack: ExitStack) -> None:
    """A peer's library may have it mapped for longer than any session."""
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **OPTIONS)
    assert d.takes(p)
    ring = outbound_of(p)._ring
    session = p.handoff._prefill._sessions
    (name,) = session
    p.handoff._loop.call_soon_threadsafe(session[name]._link.connection.abort)
    eventually(lambda: name not in session)
    assert d.takes(p)
    assert outbound_of(p)._ring == ring
    p.close()
    unused = transport_of(d).unused
    eventually(lambda: [memory.address for memory in unused] == [ring.address])
    assert not transport_of(d).kept


def no_gpu(store: GpuStore, num_bytes: int) -> OwnStaging:
    raise StagingUnavailableError("no module named cuda; pip install cuda-bindings")


def refuse(agent: Agent, region: MemoryRegion) -> object:
    if region.kind == "cuda":
        raise RuntimeError("NIXL_ERR_BACKEND")
    return REGISTER(agent, region)


REGISTER = Agent.register


@pytest.mark.parametrize(
    ("owner", "name", "stand_in", "told"),
    [
        (GpuStore, "make_own_staging", no_gpu, "no module named cuda; pip install cuda-bindings"),
        (Agent, "register", refuse, "of cuda memory: NIXL_ERR_BACKEND; see this worker's log"),
    ],
)
def test_without_memory_of_the_gpu_it_goes_through_the_host_and_says_why(
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    stand_in: Any,
    told: str,
) -> None:
    monkeypatch.setattr(owner, name, stand_in)
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **OPTIONS)
    assert d.takes(p)
    for worker in (p, d):
        pairing = pairing_of(worker)
        assert pairing.memory == "host"
        assert list(pairing.shortfalls) == [IN_GPU_MEMORY]
        assert told in pairing.shortfalls[IN_GPU_MEMORY]
        assert str(worker.handoff._transports) == "nixl (staged, host memory)"


def test_a_probe_tells_of_it(stack: ExitStack) -> None:
    """From there it gets into the service's status."""
    options: dict[str, Any] = OPTIONS | {"nixl_memory": "host"}
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **options)
    port = p.handoff.bootstrap_port
    d.handoff.post(ProbeRequest(number=1, host="127.0.0.1", port=port, num_blocks=2))
    answer = ProbeAnswer.of(d.wait(ProbeResult))
    assert answer.ok
    assert answer.passed_over == {IN_GPU_MEMORY: "NIXL_RING_MEMORY is host"}
    assert answer.slow == [
        "nixl in GPU memory would be better than nixl, but NIXL_RING_MEMORY is host"
    ]
    assert pairing_of(p).memory == "host", "P does as D's offer says"
    assert pairing_of(p).shortfalls == {}


def test_a_session_without_room_on_the_gpu_goes_through_the_host(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **OPTIONS)
    monkeypatch.setattr(GpuStore, "room", 1)
    assert d.takes(p)
    pairing = pairing_of(d)
    assert pairing.memory == pairing_of(p).memory == "host"
    assert "CUDA_ERROR_OUT_OF_MEMORY" in pairing.shortfalls[IN_GPU_MEMORY]


def test_without_a_way_from_cards_to_gpus_it_goes_through_the_host(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(PEER_MEMORY, "nvidia_peermem", "warn", "no way to GPU memory", "run `modprobe`")
    monkeypatch.setattr(settings, "look_around", lambda *_: [check])
    why = HandoffSettings.from_worker(WorkerConfig(model="mock://h100-8b")).no_peer_memory
    assert why == "no way to GPU memory: run `modprobe`"
    p, d = make(stack, "p", no_peer_memory=why, **OPTIONS), make(stack, "d", **OPTIONS)
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert why in failed.message
    assert p.takes(d), "the other way round D's own ring is what is offered"
    assert pairing_of(p).shortfalls == {IN_GPU_MEMORY: why}


def test_a_peer_that_can_not_use_the_ring_says_what_to_do(stack: ExitStack) -> None:
    options: dict[str, Any] = OPTIONS | {"nixl_memory": "host"}
    p, d = make(stack, "p", **options), make(stack, "d", **OPTIONS)
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert (
        "the peer's ring is in a GPU's memory, and this worker's can't be: NIXL_RING_MEMORY is "
        "host; set NIXL_RING_MEMORY=host for the peer"
    ) in failed.message


def test_a_ring_that_may_still_be_written_is_kept_apart_from_the_unused_ones() -> None:
    owner = NixlTransport(replace(FAST, transport="nixl"), GpuStore(LAYOUT, 1))
    rings = [owner.make_ring(4096, "cuda") for _ in range(MAX_KEPT + 1)]
    for ring in rings[:MAX_KEPT]:
        ring.keep()
        ring.close()
    rings[MAX_KEPT].close()
    kept = [ring.address for ring in rings[:MAX_KEPT]]
    assert [ring.address for ring in owner.kept] == kept
    assert [ring.address for ring in owner.unused] == [rings[MAX_KEPT].address]
    assert owner.make_ring(4096, "host").kind == "host", "of the other kind there is none"
    assert owner.make_ring(4096, "cuda").address == kept[0], "too many are kept: the oldest"
    assert owner.make_ring(4096, "cuda").address == rings[MAX_KEPT].address
    owner.close()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        ({"NIXL_RING_MEMORY": "host"}, {"nixl_memory": "host"}),
        ({"NIXL_RING_MEMORY": "auto"}, {"nixl_memory": "auto"}),
        ({"NIXL_RING_MIB": "64"}, {"nixl_ring_bytes": 64 << 20, "nixl_slot_bytes": 16 << 20}),
    ],
)
def test_the_environment_says_how_large_rings_are_and_where(
    environ: dict[str, str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_nixl_ring(environ) == expected
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    read = HandoffSettings.from_worker(WorkerConfig(model="mock://h100-8b"))
    assert {name: getattr(read, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"NIXL_RING_MEMORY": "gpu"}, "NIXL_RING_MEMORY is gpu; set it to auto or host"),
        ({"NIXL_RING_MIB": "4"}, "NIXL_RING_MIB is 4; set it to a number of MiB from 8 on"),
        ({"NIXL_RING_MIB": "1.5"}, "NIXL_RING_MIB is 1.5; set it to"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environ: dict[str, str], told: str) -> None:
    with pytest.raises(HandoffUnavailable, match=re.escape(told)):
        read_nixl_ring(environ)
