"""KV pages of the mock: 8 bytes per token, layer and K/V that depend on the whole prefix."""

import mmap
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from tandem_engine.errors import CorruptKVError
from tandem_engine.step import KVStore
from tandem_wire.handoff import KVLayout

BYTES_PER_TOKEN: Final = 8
Words = npt.NDArray[np.uint64]


class MockKV(KVStore):
    """[layer, K/V, block, token] of 64-bit words.

    The word of token i in plane p (layer * 2 + K/V) is prefix_hash(tokens[: i + 1]) + p modulo
    2**64, so a page can't be mistaken for another page, layer or K/V. With a window every second
    layer has it.
    """

    def __init__(
        self, *, num_blocks: int, page_size: int, num_layers: int, window: int = 0
    ) -> None:
        self.layout = KVLayout(
            num_layers=num_layers,
            num_kv_heads=1,
            head_dim=BYTES_PER_TOKEN,
            page_size=page_size,
            dtype="uint8",
            itemsize=1,
            windows=tuple(window * (layer % 2) for layer in range(num_layers)) if window else (),
        )
        self._memory = mmap.mmap(-1, num_blocks * self.layout.block_bytes)
        flat: Words = np.frombuffer(self._memory, dtype=np.uint64)
        self._words = flat.reshape(2 * num_layers, num_blocks, page_size)
        self._planes = np.arange(2 * num_layers, dtype=np.uint64)[:, None]
        self._has_window = np.arange(2 * num_layers) // 2 % 2 == 1

    def export_blocks(self, blocks: Sequence[int], layers: range) -> bytes | memoryview:
        planes = self._words[2 * layers.start : 2 * layers.stop]
        return planes[:, list(blocks)].tobytes()

    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        expected = 2 * len(layers) * len(blocks) * self.layout.page_bytes
        if data.nbytes != expected:
            raise ValueError(f"{data.nbytes} bytes of KV came, but {expected} were expected")
        words = np.frombuffer(data, dtype=np.uint64)
        shape = (2 * len(layers), len(blocks), self.layout.page_size)
        self._words[2 * layers.start : 2 * layers.stop, list(blocks)] = words.reshape(shape)

    def write(self, block_table: Sequence[int], start: int, hashes: list[int]) -> None:
        """Store the prefix hashes of positions [start, start + len(hashes))."""
        blocks, offsets = self._places(block_table, start, start + len(hashes))
        words = np.array(hashes, dtype=np.uint64)
        self._words[:, blocks, offsets] = words[None, :] + self._planes

    def write_cells(self, cells: list[int], hashes: list[int]) -> None:
        """Store prefix hashes of single positions; a cell is block * page_size + offset."""
        flat = self._words.reshape(len(self._planes), -1)
        flat[:, cells] = np.array(hashes, dtype=np.uint64)[None, :] + self._planes

    def wrong_cells(self, cells: list[int], hashes: list[int]) -> list[int]:
        """Indexes into `cells` of those that don't hold their hash in every layer, K and V."""
        flat = self._words.reshape(len(self._planes), -1)
        expected = np.array(hashes, dtype=np.uint64)[None, :] + self._planes
        wrong = (flat[:, cells] != expected).any(axis=0)
        return [int(index) for index in np.flatnonzero(wrong)]

    def copy(self, source: int, destination: int) -> None:
        """Copy one block."""
        self._words[:, destination] = self._words[:, source]

    def verify(self, rid: str, block_table: Sequence[int], start: int, hashes: list[int]) -> None:
        """Raise CorruptKVError unless positions [start, start + len(hashes)) hold `hashes`.

        Where a layer has a window, only what the token behind them sees is looked at.
        """
        end = start + len(hashes)
        blocks, offsets = self._places(block_table, start, end)
        expected = np.array(hashes, dtype=np.uint64)[None, :] + self._planes
        different = self._words[:, blocks, offsets] != expected
        if self.layout.window:
            unseen = np.arange(start, end) <= end - self.layout.window
            different &= ~(self._has_window[:, None] & unseen)
        wrong = np.argwhere(different)
        if len(wrong):
            plane, position = (int(number) for number in wrong[0])
            raise CorruptKVError(
                f"request {rid}: KV of position {start + position} (block "
                f"{int(blocks[position])}, layer {plane // 2}, {'KV'[plane % 2]}) is not the KV of "
                f"its tokens; {len(wrong)} wrong cells of {expected.size}"
            )

    def _places(
        self, block_table: Sequence[int], start: int, end: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        positions = np.arange(start, end)
        page = self.layout.page_size
        first = start // page
        table = np.array(block_table[first : -(-end // page)], dtype=np.int64)
        return table[positions // page - first], positions % page
