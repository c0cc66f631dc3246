"""The KV cache of one worker on the host: one tensor."""

import mmap
from collections.abc import Sequence

import numpy as np
import torch

from tandem_engine.memory import MemoryRegion
from tandem_engine.step import KVStore
from tandem_wire.handoff import KVLayout


class HostKVStore(KVStore):
    """KV as [layer, K/V, block, head, token, dim] in host memory.

    The memory is zero at first, so that padding never holds NaN. The scheduler's thread writes
    through `cache`, the hand-off's through `import_blocks`, each to blocks of its own, so neither
    needs a lock.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, dtype: torch.dtype) -> None:
        self.layout = layout
        self._memory = mmap.mmap(-1, num_blocks * layout.block_bytes)
        shape = (layout.num_layers, layout.num_planes, num_blocks)
        self._pages = np.frombuffer(self._memory, np.uint8).reshape(*shape, layout.page_bytes)
        self.cache = torch.frombuffer(self._memory, dtype=dtype).view(
            *shape, layout.num_kv_heads, layout.page_size, layout.head_dim
        )
        """[layers, planes, N, K, P, D]."""

    def regions(self) -> tuple[MemoryRegion, ...]:
        return (MemoryRegion("host", self._pages.ctypes.data, self._pages.nbytes),)

    def export_blocks(self, blocks: Sequence[int], layers: range) -> memoryview:
        chosen = self._pages[layers.start : layers.stop]
        return chosen.take(np.asarray(blocks, np.int64), axis=2).data.cast("B")

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
