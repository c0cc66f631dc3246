"""The KV cache of one worker on the host: one tensor."""

import contextlib
import mmap
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from tandem_engine.memory import MemoryRegion
from tandem_engine.step import KVStore
from tandem_wire.handoff import KVLayout

LEAST_VIEW_BYTES: Final = 16 << 10
"""Smaller pieces are packed: numpy does that faster than the kernel takes them one by one."""


class HostKVStore(KVStore):
    """KV as [layer, K/V, block, head, token, dim] in host memory.

    The memory is zero at first, so that padding never holds NaN. The scheduler's thread writes
    through `cache`, the hand-off's through `import_blocks`, each to blocks of its own, so neither
    needs a lock.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, dtype: torch.dtype) -> None:
        self.layout = layout
        self._memory = _map(num_blocks * layout.block_bytes)
        shape = (layout.num_layers, layout.num_planes, num_blocks)
        self._pages = np.frombuffer(self._memory, np.uint8).reshape(*shape, layout.page_bytes)
        self.cache = torch.frombuffer(self._memory, dtype=dtype).view(
            *shape, layout.num_kv_heads, layout.page_size, layout.head_dim
        )
        """[layers, planes, N, K, P, D]."""

    def regions(self) -> tuple[MemoryRegion, ...]:
        return (MemoryRegion("host", self._pages.ctypes.data, self._pages.nbytes),)

    def export_blocks(self, blocks: Sequence[int], layers: range) -> memoryview:
        packed = np.empty(len(layers) * len(blocks) * self.layout.layer_bytes, np.uint8)
        self.export_into(blocks, layers, packed.data)
        return packed.data

    def export_into(self, blocks: Sequence[int], layers: range, out: memoryview) -> None:
        shape = (len(layers), self.layout.num_planes, len(blocks), self.layout.page_bytes)
        target = np.frombuffer(out, np.uint8).reshape(shape)
        # With another mode than "raise", numpy packs into `target` itself.
        assert max(blocks) < self._pages.shape[2]
        chosen = self._pages[layers.start : layers.stop]
        chosen.take(np.asarray(blocks, np.int64), axis=2, out=target, mode="clip")

    def views(self, blocks: Sequence[int], layers: range) -> list[memoryview] | None:
        size, num_planes = self.layout.page_bytes, self.layout.num_planes
        runs = _runs(blocks)
        if len(blocks) * size < len(runs) * LEAST_VIEW_BYTES:
            return None
        whole, row = memoryview(self._memory), self._pages.shape[2] * size
        return [
            whole[plane * row + run.start * size : plane * row + run.stop * size]
            for plane in range(layers.start * num_planes, layers.stop * num_planes)
            for run in runs
        ]

    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        chosen = self._pages[layers.start : layers.stop]
        expected = len(layers) * len(blocks) * self.layout.layer_bytes
        if data.nbytes != expected:
            raise ValueError(f"got {data.nbytes} bytes for pages of {expected} bytes")
        packed = np.frombuffer(data, np.uint8)
        chosen[:, :, np.asarray(blocks, np.int64)] = packed.reshape(
            len(layers), self.layout.num_planes, len(blocks), self.layout.page_bytes
        )

    def copy_block(self, source: int, destination: int) -> None:
        """Copy all layers of one block."""
        self._pages[:, :, destination] = self._pages[:, :, source]


def _map(num_bytes: int) -> mmap.mmap:
    """Memory in huge pages, where the kernel has some: a copy needs few entries of the TLB."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _runs(blocks: Sequence[int]) -> list[range]:
    """Blocks that follow each other, taken together."""
    runs: list[range] = []
    for block in blocks:
        if runs and runs[-1].stop == block:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs
