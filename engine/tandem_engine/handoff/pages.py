"""Whole blocks as packed bytes: the KV cache, or the pattern of a probe."""

import struct
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import xxhash

from tandem_engine.memory import Gate, OpenCache, PeerCache, Staging
from tandem_engine.step import KVStore
from tandem_engine.window import first_kept
from tandem_wire.handoff import KVLayout

MAX_PROBE_BYTES: Final = 1 << 30


class Pages(ABC):
    """Blocks by number. Called from the transports' threads; the caller owns the blocks."""

    are_of_a_cache: bool = True
    """Not a probe's."""

    def __init__(self, layout: KVLayout) -> None:
        self.num_layers = layout.num_layers
        self.layer_bytes = layout.layer_bytes  # of one block
        self.block_bytes = layout.block_bytes

    @abstractmethod
    def export(self, blocks: Sequence[int], layers: range) -> bytes | memoryview:
        """Return the packed bytes of some layers of `blocks`."""

    @abstractmethod
    def export_into(self, blocks: Sequence[int], layers: range, out: memoryview) -> None:
        """Pack some layers of `blocks` into `out`, which has exactly the room."""

    def views(self, blocks: Sequence[int], layers: range) -> list[memoryview] | None:
        """The packed bytes where they lie, piece by piece; None: use the other methods."""
        return None

    @abstractmethod
    def stage(
        self, blocks: Sequence[int], layers: range, staging: Staging, at: int, seed: int | None
    ) -> int:
        """Pack some layers of `blocks` into staging memory; their checksum."""

    @abstractmethod
    def unstage(
        self, blocks: Sequence[int], layers: range, staging: Staging, at: int, seed: int | None
    ) -> int:
        """Put packed bytes from staging memory into `blocks`; their checksum.

        Raises ValueError when they don't fit.
        """

    @abstractmethod
    def push(
        self,
        cache: PeerCache,
        gate: Gate,
        source: Sequence[int],
        target: Sequence[int],
        layers: range,
        seed: int | None,
    ) -> int:
        """Write some layers of `source` into a peer's cache; their checksum.

        Raises GateShutError.
        """

    @abstractmethod
    def check(
        self, cache: OpenCache, blocks: Sequence[int], layers: range, seed: int | None
    ) -> int:
        """The checksum of what a peer has written into our cache, for `blocks`.

        Raises ValueError when it is not what it should be.
        """

    @abstractmethod
    def are_settled(self, blocks: Collection[int]) -> bool:
        """Whether no step of this worker can still write to `blocks`."""

    @abstractmethod
    def take(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        """Put packed bytes into `blocks`. Raises ValueError when they don't fit."""


class KVPages(Pages):
    """The blocks of a KV store."""

    def __init__(self, kv: KVStore) -> None:
        super().__init__(kv.layout)
        self._kv = kv

    def export(self, blocks: Sequence[int], layers: range) -> bytes | memoryview:
        return self._kv.export_blocks(blocks, layers)

    def export_into(self, blocks: Sequence[int], layers: range, out: memoryview) -> None:
        self._kv.export_into(blocks, layers, out)

    def views(self, blocks: Sequence[int], layers: range) -> list[memoryview] | None:
        return self._kv.views(blocks, layers)

    def stage(
        self, blocks: Sequence[int], layers: range, staging: Staging, at: int, seed: int | None
    ) -> int:
        return staging.stage(blocks, layers, at, seed)

    def unstage(
        self, blocks: Sequence[int], layers: range, staging: Staging, at: int, seed: int | None
    ) -> int:
        return staging.unstage(blocks, layers, at, seed)

    def push(
        self,
        cache: PeerCache,
        gate: Gate,
        source: Sequence[int],
        target: Sequence[int],
        layers: range,
        seed: int | None,
    ) -> int:
        return cache.push(source, target, layers, gate, seed)

    def check(
        self, cache: OpenCache, blocks: Sequence[int], layers: range, seed: int | None
    ) -> int:
        return 0 if seed is None else cache.check(blocks, layers, seed)

    def are_settled(self, blocks: Collection[int]) -> bool:
        return self._kv.is_settled(blocks)

    def take(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        self._kv.import_blocks(blocks, layers, data)


class PatternPages(Pages):
    """A probe's pages: bytes that follow from block and layer. None is stored."""

    are_of_a_cache = False

    def _page(self, layer: int, block: int) -> bytes:
        word = struct.pack("<QQ", xxhash.xxh3_64_intdigest(b"probe", block), layer)
        return (word * (self.layer_bytes // len(word) + 1))[: self.layer_bytes]

    def export(self, blocks: Sequence[int], layers: range) -> bytes:
        return b"".join(self._page(layer, block) for layer in layers for block in blocks)

    def export_into(self, blocks: Sequence[int], layers: range, out: memoryview) -> None:
        out[:] = self.export(blocks, layers)

    def stage(
        self, blocks: Sequence[int], layers: range, staging: Staging, at: int, seed: int | None
    ) -> int:
        return staging.put(self.export(blocks, layers), at, seed)

    def unstage(
        self, blocks: Sequence[int], layers: range, staging: Staging, at: int, seed: int | None
    ) -> int:
        num_bytes = len(blocks) * len(layers) * self.layer_bytes
        data, checksum = staging.get(num_bytes, at, seed)
        self.take(blocks, layers, memoryview(data))
        return checksum

    def push(
        self,
        cache: PeerCache,
        gate: Gate,
        source: Sequence[int],
        target: Sequence[int],
        layers: range,
        seed: int | None,
    ) -> int:
        return cache.put(self.export(source, layers), gate, seed)

    def check(
        self, cache: OpenCache, blocks: Sequence[int], layers: range, seed: int | None
    ) -> int:
        num_bytes = len(blocks) * len(layers) * self.layer_bytes
        data, checksum = cache.read_scratch(num_bytes, seed)
        self.take(blocks, layers, memoryview(data))
        return checksum

    def are_settled(self, blocks: Collection[int]) -> bool:
        return True

    def take(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        # As bytes: two memoryviews are compared value by value, which takes ten times as long.
        if bytes(data) != self.export(blocks, layers):
            raise ValueError(f"the probe's pattern changed on its way, from block {blocks[0]} on")


Part = tuple[range, range]
"""Blocks, and the layers of them that travel."""


def travelling_parts(layout: KVLayout, num_tokens: int, first: int, end: int) -> Iterator[Part]:
    """What travels of the blocks [first, end) of a prompt, which count from the prompt's start.

    Layers with a window travel only from the block on that decoding, or computing the same prompt
    again, needs (`window.first_kept`); all other layers travel of every block.
    """
    kept = first_kept(num_tokens, layout.window, layout.page_size)
    split = min(max(first, kept), end)
    if first < split:
        yield from ((range(first, split), run) for run in _runs_without_window(layout))
    if split < end:
        yield range(split, end), range(layout.num_layers)


def travelling_bytes(layout: KVLayout, num_tokens: int, first: int) -> int:
    """Bytes that travel of a prompt from its block `first` on."""
    end = -(-num_tokens // layout.page_size)
    parts = travelling_parts(layout, num_tokens, first, end)
    return layout.layer_bytes * sum(len(blocks) * len(layers) for blocks, layers in parts)


def _runs_without_window(layout: KVLayout) -> Iterator[range]:
    """The layers that see all tokens, as ranges of neighbours."""
    start = 0
    for layer, window in enumerate((*layout.windows, 1)):
        if window:
            if start < layer:
                yield range(start, layer)
            start = layer + 1


def place_seed(blocks: Sequence[int], layers: range) -> int:
    """Return the seed of one write's checksum, which says where it belongs; `blocks` are D's."""
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(blocks) + 1}I", layers.start, *blocks))


def payload_checksum(blocks: Sequence[int], layers: range, payload: bytes | memoryview) -> int:
    """Return the checksum of one write, to be summed modulo 2**64; `blocks` are D's."""
    return xxhash.xxh3_64_intdigest(payload, place_seed(blocks, layers))
