"""Pages that tcp moves where they lie, and how a push is cut into writes."""

import asyncio
import itertools
import mmap
import socket
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from deadlines import patience

from tandem_engine.handoff.events import FetchDone
from tandem_engine.handoff.pages import KVPages, payload_checksum, place_seed
from tandem_engine.handoff.prefill.push import PageCount, Pusher
from tandem_engine.handoff.tests.scripted import (
    DEADLINE,
    FAST,
    LAYOUT,
    BytesStore,
    eventually,
    make,
)
from tandem_engine.handoff.transports import tcp
from tandem_engine.handoff.transports.base import Link, Outbound, PageWrite, Written
from tandem_engine.handoff.transports.landing import Landing
from tandem_engine.handoff.transports.ring import HostStaging
from tandem_engine.handoff.transports.tcp import TcpTransport
from tandem_wire.connection import Connection
from tandem_wire.handoff import HandoffMessage


@pytest.mark.parametrize("through_buffer", ["", "p", "d", "pd"])
@pytest.mark.parametrize("checksum", [True, False])
def test_either_side_may_have_its_pages_in_place(
    stack: ExitStack, through_buffer: str, checksum: bool
) -> None:
    p, d = (make(stack, name, transport="tcp", checksum=checksum) for name in "pd")
    for worker in (p, d):
        worker.kv.is_seen_in_place = worker.name not in through_buffer
    before = d.kv.data.copy()
    d.fetch("r", [p], 40)
    arrived = p.arrived()
    source, target = p.push(arrived, chunks=3), arrived.request.blocks
    done = d.outcome("r")
    assert isinstance(done, FetchDone), done
    before[:, :, target] = p.kv.data[:, :, source]
    assert np.array_equal(d.kv.data, before)


def test_a_byte_that_flips_on_its_way_to_its_place_is_caught(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good, d = (make(stack, name, transport="tcp") for name in ("bad", "good", "d"))
    receive, times = tcp._receive_some, itertools.count()

    def corrupt(stream: socket.socket, views: list[memoryview]) -> int:
        received = receive(stream, views)
        if received and not next(times):
            views[0][0] ^= 4
        return received

    monkeypatch.setattr(tcp, "_receive_some", corrupt)
    d.fetch("r", [bad, good], 40)
    bad.push(bad.arrived())
    good.push(good.arrived())
    done = d.outcome("r")
    assert isinstance(done, FetchDone), done
    assert done.worker_id == "good"
    assert d.handoff.counters()["kv_checksum_errors_total"] == 1


def frame(epoch: int, blocks: Sequence[int], layers: range, payload: bytes) -> bytes:
    """One write as P sends it."""
    head = struct.pack("<QIHHQ", epoch, len(blocks), layers.start, len(layers), len(payload))
    return head + struct.pack(f"<{len(blocks)}I", *blocks) + payload


async def test_a_fence_in_the_middle_of_a_write_waits_for_no_byte_and_lets_none_in() -> None:
    layers, kv = range(LAYOUT.num_layers), BytesStore(LAYOUT, 8)
    payload = bytes(index % 251 + 1 for index in range(2 * LAYOUT.block_bytes))
    half = len(payload) // 2
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = replace(FAST, num_streams=1)
        link = Link(
            session="s",
            address=server.getsockname(),
            connection=cast("Connection[HandoffMessage]", None),
            settings=settings,
            kv=kv,
            on_lost=lambda _: None,
        )
        inbound = TcpTransport(settings, kv).offer(link)
        first, second = (
            Landing(KVPages(kv), blocks, checksum=True, on_progress=lambda: None)
            for blocks in ([2, 5], [1, 3])
        )
        await inbound.open()
        peer, _ = server.accept()
    with peer:
        inbound.register(1, first)
        inbound.register(2, second)
        peer.sendall(frame(1, [2, 5], layers, payload)[: half - len(payload)])
        await asyncio.to_thread(eventually, lambda: np.count_nonzero(kv.data) == half)
        async with asyncio.timeout(patience(DEADLINE)):
            await inbound.fence(1)
        peer.sendall(payload[half:] + frame(2, [1, 3], layers, payload))
        await asyncio.to_thread(eventually, lambda: second.num_bytes == len(payload))
        assert bytes(kv.export_blocks([1, 3], layers)) == payload
        assert second.checksum == payload_checksum([1, 3], layers, payload)
        assert np.count_nonzero(kv.data[:, :, [2, 5]]) == half
        assert (first.num_bytes, inbound.num_stale_writes) == (0, 1)
        await inbound.close()


def test_a_staged_write_has_the_checksum_of_its_bytes_however_it_is_cut() -> None:
    kv = BytesStore(LAYOUT, 8)
    kv.fill(np.random.default_rng(1).integers(0, 256, kv.data.shape, np.uint8))
    blocks, layers = [6, 1], range(LAYOUT.num_layers)
    packed = bytes(kv.export_blocks(blocks, layers))
    other = BytesStore(LAYOUT, 8)
    for write_bytes in (1, 2 * 2 * LAYOUT.layer_bytes, len(packed)):
        kv.write_bytes = other.write_bytes = write_bytes
        memory = mmap.mmap(-1, 16 + len(packed))
        seed = place_seed([3, 4], layers)
        made = HostStaging(kv, memory, 16).stage(blocks, layers, 0, seed)
        found = HostStaging(other, memory, 16).unstage([3, 4], layers, 0, seed)
        assert made == found == payload_checksum([3, 4], layers, packed)
        assert memory[16:] == packed == bytes(other.export_blocks([3, 4], layers))
        other.data[:] = 0


class Sizes:
    """What a pusher wants to know of P's end."""

    def __init__(self, num_lanes: int, least: int, most: int) -> None:
        self.num_lanes, self.least_write_bytes, self.write_bytes = num_lanes, least, most
        self.writes: list[PageWrite] = []

    async def write(self, write: PageWrite) -> Written:
        self.writes.append(write)
        return Written(write.num_bytes, 0)


@pytest.mark.parametrize("num_blocks", [1, 2, 7, 40])
@pytest.mark.parametrize(
    ("least", "most"),
    [(1, 10**9), (LAYOUT.layer_bytes, LAYOUT.block_bytes), (10**4, 10**4), (1, 1)],
)
async def test_every_page_is_in_one_write_and_the_writes_grow_smaller(
    num_blocks: int, least: int, most: int
) -> None:
    sizes = Sizes(2, least, most)
    source = range(100, 100 + num_blocks)
    pusher = Pusher(cast("Outbound", sizes), KVPages(BytesStore(LAYOUT, 1)))
    parts = [(range(num_blocks), range(LAYOUT.num_layers))]
    await pusher.push(1, source, [block - 50 for block in source], parts, PageCount())
    moved = sorted(
        (block, layer) for write in sizes.writes for block in write.source_blocks
        for layer in write.layers
    )  # fmt: skip
    assert moved == [(block, layer) for block in source for layer in range(LAYOUT.num_layers)]
    for write in sizes.writes:
        assert [block - 50 for block in write.source_blocks] == list(write.target_blocks)
        assert write.num_bytes <= max(most, LAYOUT.layer_bytes)
    if (least, most) == (1, 10**9):
        counts = [len(write.source_blocks) for write in sizes.writes]
        assert counts == sorted(counts, reverse=True)
        assert num_blocks < 40 or 1 < counts[0] <= num_blocks / 4
        assert counts[-1] == 1
