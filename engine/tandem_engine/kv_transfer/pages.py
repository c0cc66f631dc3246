"""Whole blocks as packed bytes: the KV cache, or the pattern of a probe."""

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

import xxhash

from tandem_engine.runner.base import KVStore

MAX_PROBE_BYTES: Final = 1 << 30


class Pages(ABC):
    """Blocks by number. Called from the transports' threads; the caller owns the blocks."""

    block_bytes: int

    @abstractmethod
    def export(self, blocks: Sequence[int]) -> bytes | memoryview:
        """Packed bytes of `blocks`."""

    @abstractmethod
    def export_into(self, blocks: Sequence[int], out: memoryview) -> None:
        """The same into `out`, which has exactly the room."""

    @abstractmethod
    def take(self, blocks: Sequence[int], data: memoryview) -> None:
        """Put packed bytes into `blocks`. ValueError when they don't fit."""


class KVPages(Pages):
    """The blocks of a KV store, all layers."""

    def __init__(self, kv: KVStore) -> None:
        self._kv = kv
        self._layers = range(kv.layout.num_layers)
        self.block_bytes = kv.layout.block_bytes

    def export(self, blocks: Sequence[int]) -> bytes | memoryview:
        return self._kv.export_blocks(blocks, self._layers)

    def export_into(self, blocks: Sequence[int], out: memoryview) -> None:
        self._kv.export_into(blocks, self._layers, out)

    def take(self, blocks: Sequence[int], data: memoryview) -> None:
        self._kv.import_blocks(blocks, self._layers, data)


class PatternPages(Pages):
    """Bytes that follow from the block number: a probe's pages, of which none is stored."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes

    def _block(self, block: int) -> bytes:
        word = struct.pack("<QQ", xxhash.xxh3_64_intdigest(b"probe", block), block)
        return (word * (self.block_bytes // len(word) + 1))[: self.block_bytes]

    def export(self, blocks: Sequence[int]) -> bytes:
        return b"".join(self._block(block) for block in blocks)

    def export_into(self, blocks: Sequence[int], out: memoryview) -> None:
        out[:] = self.export(blocks)

    def take(self, blocks: Sequence[int], data: memoryview) -> None:
        if data != self.export(blocks):
            raise ValueError(f"the pattern of blocks {blocks[0]}… came out changed")


def payload_checksum(blocks: Sequence[int], payload: bytes | memoryview) -> int:
    """Checksum of one write, to be summed modulo 2**64; `blocks` are D's."""
    seed = xxhash.xxh3_64_intdigest(struct.pack(f"<{len(blocks)}I", *blocks))
    return xxhash.xxh3_64_intdigest(payload, seed)
