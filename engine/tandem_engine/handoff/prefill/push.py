"""One prompt that a prefill worker computes for a decode worker: chunks in, pages out."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, cast, get_args

import msgspec

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.events import PushChunk, PushFailed
from tandem_engine.handoff.pages import Pages, Part, PatternPages, travelling_parts
from tandem_engine.handoff.transports.base import Outbound, PageWrite
from tandem_wire.handoff import (
    ChunkPushed,
    Commit,
    FailureCode,
    KVLayout,
    Prefill,
    PrefillFailed,
    Probe,
)

_MASK = (1 << 64) - 1
_CODES: Final = frozenset(get_args(FailureCode))


class PageCount:
    """The totals of an epoch's writes so far."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.checksum = 0
        self.seconds = 0.0


class Pusher:
    """Splits pages into writes of a good size and adds up their results."""

    def __init__(self, outbound: Outbound, pages: Pages) -> None:
        self._outbound = outbound
        self._pages = pages

    async def push(
        self,
        epoch: int,
        source: Sequence[int],
        target: Sequence[int],
        parts: Iterable[Part],
        count: PageCount,
    ) -> None:
        """Write `parts`, whose blocks are places in both lists, from `source` into D's `target`.

        Raises TransportError; the epoch's other writes may still be under way then.
        """
        started = time.perf_counter()  # a loop's clock moves by whole milliseconds
        writes = [
            self._outbound.write(
                PageWrite(
                    epoch,
                    self._pages,
                    source[places.start : places.stop],
                    target[places.start : places.stop],
                    layers,
                )
            )
            for part in parts
            for places, layers in self._pieces(*part)
        ]
        for written in await asyncio.gather(*writes):
            count.num_bytes += written.num_bytes
            count.checksum = (count.checksum + written.checksum) & _MASK
        count.seconds += time.perf_counter() - started

    def _pieces(self, places: range, layers: range) -> Iterator[Part]:
        """Cut a part: all its layers of some blocks when they are small, else some of one block.

        Each piece is a share of what is left: few pages make small writes, so that no lane waits
        for another one, neither at the start nor at the end (guided self-scheduling,
        Polychronopoulos and Kuck, 1987).
        """
        outbound, layer_bytes = self._outbound, self._pages.layer_bytes
        block_bytes, first = len(layers) * layer_bytes, 0
        most = outbound.write_bytes
        if not self._pages.are_of_a_cache:
            most = min(most, outbound.probe_bytes)
        while first < len(places):
            share = (len(places) - first) * block_bytes // (2 * outbound.num_lanes)
            write_bytes = min(most, max(outbound.least_write_bytes, share))
            num_blocks = max(1, write_bytes // block_bytes)
            num_layers = min(len(layers), max(1, write_bytes // layer_bytes))
            for layer in range(0, len(layers), num_layers):
                yield places[first : first + num_blocks], layers[layer : layer + num_layers]
            first += num_blocks


class Push:
    """The life of one `Prefill` on P; `run` is its task, which the session cancels to drop it."""

    def __init__(
        self,
        key: str,
        request: Prefill,
        pusher: Pusher,
        layout: KVLayout,
        send: Callable[[msgspec.Struct], None],
    ) -> None:
        self.key = key
        self.request = request
        self.count = PageCount()
        self._pusher = pusher
        self._layout = layout
        self._send = send
        self._chunks: asyncio.Queue[PushChunk | PushFailed] = asyncio.Queue()

    def feed(self, event: PushChunk | PushFailed) -> None:
        """Take what the core has computed, or its failure."""
        self._chunks.put_nowait(event)

    async def run(self) -> None:
        """Push until the commit (or the failure) is sent. Raises TransportError."""
        while True:
            event = await self._chunks.get()
            if isinstance(event, PushFailed):
                self.fail(event.code, event.message)
                return
            await self._push(event)
            if event.last:
                self._commit(event)
                return
            self._send(ChunkPushed(self.request.rid, self.request.epoch, event.end))

    async def _push(self, chunk: PushChunk) -> None:
        request, page = self.request, self._layout.page_size
        first = (chunk.start - request.num_skip_tokens) // page
        target = request.blocks[first : first + len(chunk.blocks)]
        if first < 0 or len(target) != len(chunk.blocks):
            raise TransportError(
                f"a chunk of {len(chunk.blocks)} blocks at token {chunk.start} is not part of "
                f"the {len(request.blocks)} blocks that were asked for"
            )
        start = chunk.start // page
        parts = (
            (range(blocks.start - start, blocks.stop - start), layers)
            for blocks, layers in travelling_parts(
                self._layout, len(request.tokens), start, start + len(target)
            )
        )
        await self._pusher.push(request.epoch, chunk.blocks, target, parts, self.count)

    def _commit(self, last: PushChunk) -> None:
        self._send(
            Commit(
                rid=self.request.rid,
                epoch=self.request.epoch,
                num_tokens=last.end,
                num_bytes=self.count.num_bytes,
                checksum=self.count.checksum,
                first_token=last.first_token,
                first_logprobs=last.first_logprobs,
                num_cached_tokens=last.num_cached_tokens,
                prefill_seconds=last.prefill_seconds,
                transfer_seconds=self.count.seconds,
            )
        )

    def fail(self, code: str, message: str) -> None:
        """Tell D that this epoch will not be delivered."""
        self._send(refusal(self.request, code, message))


def refusal(request: Prefill | Probe, code: str, message: str) -> PrefillFailed:
    """Build the frame that says why a request fails; unknown codes become `internal`."""
    known = cast(FailureCode, code if code in _CODES else "internal")
    return PrefillFailed(rid=request.rid, epoch=request.epoch, code=known, message=message)


async def push_pattern(
    request: Probe,
    outbound: Outbound,
    layout: KVLayout,
    send: Callable[[msgspec.Struct], None],
) -> None:
    """Answer a probe: pattern pages through the same writes, then the commit."""
    count = PageCount()
    blocks = range(request.num_blocks)
    pusher = Pusher(outbound, PatternPages(layout))
    everything = [(blocks, range(layout.num_layers))]
    await pusher.push(request.epoch, blocks, blocks, everything, count)
    send(
        Commit(
            rid="",
            epoch=request.epoch,
            num_tokens=0,
            num_bytes=count.num_bytes,
            checksum=count.checksum,
            first_token=-1,
            transfer_seconds=count.seconds,
        )
    )
