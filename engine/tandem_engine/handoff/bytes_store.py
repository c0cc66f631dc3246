"""A KV store of plain bytes, in the packed order of the hand-off: for tests and benchmarks."""

from collections.abc import Sequence

import numpy as np

from tandem_engine.step import KVStore
from tandem_wire.handoff import KVLayout


class BytesKVStore(KVStore):
    """The cache as an array [layer, K/V, block, page bytes]."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        shape = (layout.num_layers, layout.num_planes, num_blocks, layout.page_bytes)
        self.data = np.zeros(shape, np.uint8)

    def _pages(self, blocks: Sequence[int], layers: range) -> tuple[int, int, int, int]:
        return (len(layers), self.layout.num_planes, len(blocks), self.layout.page_bytes)

    def export_blocks(self, blocks: Sequence[int], layers: range) -> memoryview:
        return self.data[layers.start : layers.stop, :, list(blocks)].reshape(-1).data

    def export_into(self, blocks: Sequence[int], layers: range, out: memoryview) -> None:
        target = np.frombuffer(out, np.uint8).reshape(self._pages(blocks, layers))
        source = self.data[layers.start : layers.stop]
        # Page by page: large copies that release the interpreter, and no temporary array.
        np.take(source, list(blocks), axis=2, out=target, mode="clip")

    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        pages = np.frombuffer(data, np.uint8).reshape(self._pages(blocks, layers))
        self.data[layers.start : layers.stop, :, list(blocks)] = pages
