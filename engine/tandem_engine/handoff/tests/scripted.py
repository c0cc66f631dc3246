"""A hand-off with a scripted core: it computes nothing and sends the pages of a random store."""

import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from deadlines import patience

from tandem_engine.errors import StagingUnavailableError
from tandem_engine.handoff.events import (
    FetchDone,
    FetchFailed,
    FetchRequest,
    FromHandoff,
    PrefillArrived,
    PushChunk,
)
from tandem_engine.handoff.service import HandoffService, start_handoff
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.tests.host_cache import HostOpenCache, HostPeerCache, SharedFile
from tandem_engine.handoff.transports.ring import HostStaging
from tandem_engine.memory import MemoryRegion, OpenCache, PeerCache, Staging
from tandem_engine.step import KVStore
from tandem_wire.handoff import KVLayout, Prefill
from tandem_wire.messages import PrefillPeer, SamplingParams

E = TypeVar("E")
PAGE = 4
LAYOUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_dim=8, page_size=PAGE, dtype="uint8", itemsize=1
)
LATENTS = KVLayout(
    num_layers=3, num_kv_heads=1, head_dim=20, page_size=PAGE, dtype="uint8", itemsize=1,
    num_planes=1,
)  # fmt: skip
FAST = HandoffSettings(
    worker_id="w",
    boot_id="b",
    host="127.0.0.1",
    heartbeat_seconds=1.0,
    lease_seconds=20.0,
    stall_seconds=20.0,
    dial_seconds=10.0,
    blacklist_seconds=0.5,
    write_bytes=2 * LAYOUT.block_bytes,
    shm_ring_bytes=8 * LAYOUT.block_bytes,
    device_ring_bytes=8 * LAYOUT.block_bytes,
    nixl_ring_bytes=8 * LAYOUT.block_bytes,
)
DEADLINE = 20.0


class BytesStore(KVStore):
    """Plain bytes, as an array [layer, K/V, block, page bytes]."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        shape = (layout.num_layers, layout.num_planes, num_blocks, layout.page_bytes)
        self.data = np.zeros(shape, np.uint8)
        self.is_seen_in_place = True
        """Else as on a GPU: pages are packed."""

    def fill(self, values: npt.NDArray[np.uint8]) -> None:
        """Give every block its content."""
        self.data[:] = values

    def regions(self) -> tuple[MemoryRegion, ...]:
        return (MemoryRegion("host", self.data.ctypes.data, self.data.nbytes),)

    def export_blocks(self, blocks: Sequence[int], layers: range) -> memoryview:
        return self.data[layers.start : layers.stop, :, list(blocks)].reshape(-1).data

    def views(self, blocks: Sequence[int], layers: range) -> list[memoryview] | None:
        if not self.is_seen_in_place:
            return None
        planes = range(self.layout.num_planes)
        return [
            self.data[layer, plane, block].data
            for layer in layers
            for plane in planes
            for block in blocks
        ]

    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        shape = (len(layers), self.layout.num_planes, len(blocks), self.layout.page_bytes)
        pages = np.frombuffer(data, np.uint8).reshape(shape)
        self.data[layers.start : layers.stop, :, list(blocks)] = pages


class MemfdStaging(HostStaging):
    """What stands in for a GPU's memory: shared by a descriptor too, but of the host."""

    def __init__(self, kv: KVStore, descriptor: int, num_bytes: int) -> None:
        if os.fstat(descriptor).st_size < num_bytes:
            raise StagingUnavailableError(f"the memory has less than {num_bytes} bytes")
        super().__init__(kv, mmap.mmap(descriptor, num_bytes), 0)
        self._descriptor = os.dup(descriptor)

    def descriptor(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        super().close()


class SharingStore(BytesStore):
    """Stages pages as a store of a GPU does, and opens its cache to other processes."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        super().__init__(layout, num_blocks)
        self._file = SharedFile("cache", self.data.nbytes)
        self.data = np.frombuffer(self._file.map, np.uint8).reshape(self.data.shape)

    def open_cache(self) -> OpenCache:
        return HostOpenCache(self, self._file)

    def map_cache(self, descriptors: Sequence[int], details: Mapping[str, str | int]) -> PeerCache:
        return HostPeerCache(self, descriptors, details)

    def make_staging(self, num_bytes: int) -> Staging:
        descriptor = os.memfd_create("ring")
        try:
            os.ftruncate(descriptor, num_bytes)
            return MemfdStaging(self, descriptor, num_bytes)
        finally:
            os.close(descriptor)

    def map_staging(self, descriptor: int, num_bytes: int) -> Staging:
        return MemfdStaging(self, descriptor, num_bytes)


def eventually(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds."""
    end = time.monotonic() + patience(DEADLINE)
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Worker:
    """One side: a store with random bytes, the service, and what it reported."""

    def __init__(self, name: str, hash_: str = "h", layout: KVLayout = LAYOUT, **changes: Any):
        shares = changes.get("transport") in ("cudaIpc", "cudaIpcRing")
        self.kv = (SharingStore if shares else BytesStore)(layout, 64)
        random = np.random.default_rng(abs(hash(name)) % 2**32)
        self.kv.fill(random.integers(0, 256, self.kv.data.shape, np.uint8))
        self.name = name
        self.wake = threading.Event()
        self.handoff: HandoffService = start_handoff(
            replace(FAST, worker_id=name, **changes), self.kv, hash_
        )
        self.handoff.wake_on_event(self.wake)
        self.seen: list[FromHandoff] = []
        self.num_tried = 0

    @property
    def peer(self) -> PrefillPeer:
        return PrefillPeer(self.name, "127.0.0.1", self.handoff.bootstrap_port)

    def wait(self, kind: type[E], where: Callable[[E], bool] = lambda _: True) -> E:
        """The first reported event of `kind`; it is taken out of `seen`."""
        event = self.wait_until(lambda event: isinstance(event, kind) and where(event))
        assert isinstance(event, kind)
        return event

    def wait_until(self, is_it: Callable[[FromHandoff], bool]) -> FromHandoff:
        """The first reported event for which that holds; it is taken out of `seen`."""
        deadline = time.monotonic() + patience(DEADLINE)
        while True:
            self.seen += self.handoff.poll()
            for number, event in enumerate(self.seen):
                if is_it(event):
                    return self.seen.pop(number)
            left = deadline - time.monotonic()
            assert left > 0, f"not reported in time; saw {self.seen}"
            self.wake.wait(left)
            self.wake.clear()

    def fetch(
        self, rid: str, peers: list["Worker"], num_tokens: int = 10, skip: int = 0
    ) -> Prefill:
        """Ask for KV into blocks 10, 11, ..."""
        num_blocks = -(-(num_tokens - skip) // PAGE)
        request = FetchRequest(
            rid=rid,
            tokens=tuple(range(num_tokens)),
            num_prompt_tokens=num_tokens,
            num_skip_tokens=skip,
            blocks=tuple(range(10, 10 + num_blocks)),
            params=SamplingParams(max_tokens=4),
            peers=tuple(worker.peer for worker in peers),
        )
        self.handoff.post(request)
        return Prefill(
            rid=rid,
            epoch=0,
            tokens=list(request.tokens),
            num_prompt_tokens=num_tokens,
            num_skip_tokens=skip,
            blocks=list(request.blocks),
            params=request.params,
        )

    def arrived(self) -> PrefillArrived:
        return self.wait(PrefillArrived)

    def push(self, arrived: PrefillArrived, *, chunks: int = 2, finish: bool = True) -> list[int]:
        """Send blocks 30, 31, ... in `chunks` chunks; without `finish` the last stays away."""
        request = arrived.request
        count = len(request.blocks)
        blocks = list(range(30, 30 + count))
        step = -(-count // chunks)
        for first in range(0, count, step):
            last = first + step >= count
            start = request.num_skip_tokens + first * PAGE
            end = len(request.tokens) if last else start + step * PAGE
            if last and not finish:
                break
            self.handoff.post(
                PushChunk(
                    arrived.key,
                    start,
                    end,
                    tuple(blocks[first : first + step]),
                    last=last,
                    first_token=77 if last else -1,
                )
            )
        return blocks

    def outcome(self, rid: str) -> FetchDone | FetchFailed:
        event = self.wait_until(
            lambda event: isinstance(event, FetchDone | FetchFailed) and event.rid == rid
        )
        assert isinstance(event, FetchDone | FetchFailed)
        return event

    def takes(self, p: "Worker") -> bool:
        """Whether a fetch from `p` succeeds now."""
        self.num_tried += 1
        rid = f"takes-{self.num_tried}"
        self.fetch(rid, [p])
        end = time.monotonic() + patience(DEADLINE)
        while time.monotonic() < end:
            for event in p.handoff.poll():
                if isinstance(event, PrefillArrived):
                    p.push(event)
            for outcome in self.handoff.poll():
                if isinstance(outcome, FetchDone | FetchFailed) and outcome.rid == rid:
                    return isinstance(outcome, FetchDone)
            self.wake.wait(0.01)
        raise AssertionError("no outcome")

    def close(self) -> None:
        self.handoff.close()


def make(stack: ExitStack, name: str, **changes: Any) -> Worker:
    worker = Worker(name, **changes)
    stack.callback(worker.close)
    return worker
