"""NIXL from GPU to GPU: what a lost peer writes late, and what a pairing tells. Needs `-m gpu`."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tandem_engine.errors import StagingUnavailableError
from tandem_engine.handoff.service import HandoffService
from tandem_engine.handoff.tests import scripted, test_remote_ring
from tandem_engine.handoff.tests.children import Pipe, Start, starter
from tandem_engine.handoff.tests.conftest import stack_fixture
from tandem_engine.handoff.tests.scripted import eventually, make
from tandem_engine.handoff.tests.test_remote_ring import (
    OPTIONS,
    be_stopped_prefill,
    test_a_sender_that_wakes_from_a_write_finds_the_ring_still_there,
    test_a_write_that_fails_is_no_answer_to_a_fence,
    transport_of,
)
from tandem_engine.handoff.transports.nixl import IN_GPU_MEMORY
from tandem_engine.tests.test_device_handoff import DeviceBytes
from tandem_engine.tests.test_device_kv import HEADS, LATENTS, NUM_BLOCKS, make_store
from tandem_kernels.checksum.reference import checksum
from tandem_wire.handoff import KVLayout

pytestmark = pytest.mark.gpu

__all__ = [
    "stack_fixture",
    "test_a_sender_that_wakes_from_a_write_finds_the_ring_still_there",
    "test_a_write_that_fails_is_no_answer_to_a_fence",
]

ROOM = 1 << 20


def be_stopped_prefill_on_a_gpu(pipe: Pipe) -> None:
    scripted.BytesStore = DeviceBytes  # type: ignore[misc]
    be_stopped_prefill(pipe)


@pytest.fixture(autouse=True)
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "BytesStore", DeviceBytes)
    monkeypatch.setattr(test_remote_ring, "be_stopped_prefill", be_stopped_prefill_on_a_gpu)


@pytest.fixture(name="start")
def start_fixture() -> Iterator[Start]:
    with ExitStack() as stack:
        yield starter(stack)


def words(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]


@pytest.mark.parametrize("layout", [HEADS, LATENTS])
@pytest.mark.parametrize("checked", [False, True])
def test_pages_go_through_memory_of_its_own(layout: KVLayout, checked: bool) -> None:
    store, target = make_store(layout, filled=True), make_store(layout, filled=False)
    ours, theirs = store.make_own_staging(2 * ROOM), target.make_own_staging(2 * ROOM)
    seed = 99 if checked else None
    for at, count, layers in ((0, 1, range(5)), (ROOM, 7, range(2, 3)), (4096, 5, range(1, 5))):
        ours.put(b"\xff" * ROOM, at, None)
        blocks = torch.randperm(NUM_BLOCKS)[:count].tolist()
        places = torch.randperm(NUM_BLOCKS)[:count].tolist()
        expected = target.cache.clone()
        some = slice(layers.start, layers.stop)
        expected[some, :, places] = store.cache[some, :, blocks]
        packed = bytes(store.export_blocks(blocks, layers))
        sent = ours.stage(blocks, layers, at, seed)
        assert sent == (checksum(words(packed), 99) if checked else 0)
        assert ours.get(len(packed), at, seed) == (packed, sent)
        assert theirs.put(packed, at, seed) == sent
        assert theirs.unstage(places, layers, at, seed) == sent
        assert torch.equal(target.cache, expected)
    for staging in (ours, theirs):
        staging.close()
        staging.close()


def test_no_room_is_said() -> None:
    store = make_store(HEADS, filled=False)
    with pytest.raises(StagingUnavailableError, match="cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"):
        store.make_own_staging(1 << 50)


def test_rings_are_on_the_gpus_and_outlive_their_sessions(stack: ExitStack) -> None:
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **OPTIONS)
    assert d.takes(p)
    for worker in (p, d):
        eventually(lambda handoff=worker.handoff: bool(handoff.pairings()))  # type: ignore[misc]
        (pairing,) = worker.handoff.pairings()
        assert (pairing.memory, pairing.shortfalls) == ("device", {})
    sessions = p.handoff._prefill._sessions
    (session,) = sessions.values()
    ring = session.outbound._ring  # type: ignore[attr-defined]
    assert ring.kind == "cuda"
    p.handoff._loop.call_soon_threadsafe(session._link.connection.abort)
    eventually(lambda: session not in list(sessions.values()))
    assert d.takes(p)
    (new,) = sessions.values()
    assert new.outbound._ring == ring, "the same ring"  # type: ignore[attr-defined]
    assert not transport_of(d).unused
    assert not transport_of(d).kept


def test_a_worker_that_keeps_to_the_host_says_so(stack: ExitStack) -> None:
    """Its peer takes pages from the host's memory too."""
    options: dict[str, Any] = OPTIONS | {"nixl_memory": "host"}
    p, d = make(stack, "p", **OPTIONS), make(stack, "d", **options)
    assert d.takes(p)

    def pairing_of(handoff: HandoffService) -> tuple[str, dict[str, str]]:
        eventually(lambda: bool(handoff.pairings()))
        (pairing,) = handoff.pairings()
        return pairing.memory, pairing.shortfalls

    told = {IN_GPU_MEMORY: "NIXL_RING_MEMORY is host"}
    assert pairing_of(d.handoff) == ("host", told)
    assert pairing_of(p.handoff) == ("host", {})
