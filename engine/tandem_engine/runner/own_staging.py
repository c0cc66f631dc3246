"""Staging in memory of a GPU that a library registers, and reads or writes.

The memory comes from `cuMemAlloc`. UCX maps only such memory, or torch's, into another process; of
`cuMemCreate` it copies through the host, at 0.3 GB/s (`docs/benchmarks/2026-11-30-nixl-h200.md`).
Torch's may be of `cuMemCreate` too, by its settings, so this memory is not torch's.
"""

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import torch
from cuda.bindings import driver

from tandem_engine.memory import MemoryRegion, OwnStaging
from tandem_engine.runner.shared_memory import bytes_at, done
from tandem_kernels.checked_transfer.kernel import CheckedMover
from tandem_kernels.checksum import checksum_parts

WORD_BYTES: Final = 8
_MASK: Final = (1 << 64) - 1


class PagedStore(Protocol):
    """What staging needs of the store whose pages it holds."""

    @property
    def mover(self) -> CheckedMover:
        """Packs and unpacks the pages."""

    def await_steps(self, blocks: Sequence[int], stream: torch.cuda.Stream) -> None:
        """Have `stream` wait for the steps that may still write to `blocks`."""


class _Lane:
    """A stream, and pinned memory for the numbers of the blocks and the parts of the checksum.

    The device reads and writes them where they are: a copy would be one call more each way.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.blocks = self.parts = torch.empty(0, dtype=torch.int64)

    def fit(self, num_blocks: int, num_parts: int) -> None:
        """Have room for so many."""
        if self.blocks.numel() < num_blocks:
            self.blocks = torch.empty(2 * num_blocks, dtype=torch.int64, pin_memory=True)
        if self.parts.numel() < num_parts:
            self.parts = torch.empty(2 * num_parts, dtype=torch.int64, pin_memory=True)


class DeviceOwnStaging(OwnStaging):
    """Pages are packed here, and unpacked from here, with their checksum in the same pass."""

    kind = "cuda"

    def __init__(self, store: PagedStore, device: torch.device, num_bytes: int) -> None:
        """Raises StagingUnavailableError when the GPU has no room."""
        torch.cuda.set_device(device)
        self.num_bytes = num_bytes
        self._store = store
        self._device = device
        self._pointer = int(done(driver.cuMemAlloc(num_bytes), "cuMemAlloc"))
        self._bytes: torch.Tensor | None = bytes_at(self._pointer, num_bytes)
        self._words: dict[int, torch.Tensor] = {}
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for _ in range(self.num_lanes):
            self._lanes.put(_Lane(device))
        self.region = MemoryRegion("cuda", self._pointer, num_bytes, device.index or 0)

    def stage(self, blocks: Sequence[int], layers: range, at: int, seed: int | None) -> int:
        return self._move(blocks, layers, at, seed, pack=True)

    def unstage(self, blocks: Sequence[int], layers: range, at: int, seed: int | None) -> int:
        return self._move(blocks, layers, at, seed, pack=False)

    def _move(
        self, blocks: Sequence[int], layers: range, at: int, seed: int | None, *, pack: bool
    ) -> int:
        num_blocks, mover = len(blocks), self._store.mover
        num_parts = mover.num_parts(num_blocks, layers)
        torch.cuda.set_device(self._device)
        with self._lane() as lane:
            lane.fit(num_blocks, num_parts)
            lane.blocks.numpy()[:num_blocks] = blocks
            if not pack:
                self._store.await_steps(blocks, lane.stream)
            mover.move(
                self._words_at(at), lane.blocks, num_blocks, layers, lane.parts, seed,
                pack=pack, stream=lane.stream.cuda_stream,
            )  # fmt: skip
            lane.stream.synchronize()
            return 0 if seed is None else int(lane.parts.numpy()[:num_parts].sum()) & _MASK

    def put(self, data: bytes, at: int, seed: int | None) -> int:
        with self._copying():
            packed = self._view(at, len(data))
            packed.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            return _checksum(packed, seed)

    def get(self, num_bytes: int, at: int, seed: int | None) -> tuple[bytes, int]:
        with self._copying():
            packed = self._view(at, num_bytes)
            return packed.cpu().numpy().tobytes(), _checksum(packed, seed)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """In a lane's stream."""
        with self._lane() as lane, torch.cuda.device(self._device), torch.cuda.stream(lane.stream):
            yield

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """A lane of one's own. Its stream has ended its work when the context ends."""
        lane = self._lanes.get()
        try:
            yield lane
        finally:
            lane.stream.synchronize()
            self._lanes.put(lane)

    def _words_at(self, at: int) -> torch.Tensor:
        """What is there from byte `at` on. There are few such places: a ring's slots."""
        words = self._words.get(at)
        if words is None:
            whole = (self.num_bytes - at) // WORD_BYTES * WORD_BYTES
            words = self._words[at] = self._view(at, whole).view(torch.int64)
        return words

    def _view(self, at: int, num_bytes: int) -> torch.Tensor:
        assert self._bytes is not None, "the staging memory is closed"
        return self._bytes[at : at + num_bytes]

    def close(self) -> None:
        self._bytes = None
        self._words.clear()
        if self._pointer:
            driver.cuMemFree(self._pointer)
            self._pointer = 0


def _checksum(packed: torch.Tensor, seed: int | None) -> int:
    if seed is None:
        return 0
    return int(checksum_parts(packed.view(torch.int64), seed).sum()) & _MASK
