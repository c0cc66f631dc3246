"""P's side of one control connection: the prompts that one decode worker asked for."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from tandem_engine.handoff.counters import Counters
from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.events import (
    PrefillArrived,
    PrefillDropped,
    PushChunk,
    PushDone,
    PushFailed,
    ToCore,
)
from tandem_engine.handoff.pages import MAX_PROBE_BYTES, KVPages
from tandem_engine.handoff.prefill.push import Push, Pusher, push_pattern, refusal
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Outbound
from tandem_engine.handoff.transports.shm import ShmOutbound
from tandem_engine.step import KVStore
from tandem_wire.connection import Connection
from tandem_wire.errors import WireError
from tandem_wire.handoff import Fence, Fenced, HandoffMessage, Prefill, Probe, SlotFreed


class PrefillSession:
    """Pushes by epoch. A push's blocks stay pinned until `PushDone` or `PrefillDropped`.

    Every push ends in exactly one of the two: in the push's own task when the commit or the
    failure has been sent, in `_drop` when nobody wants it any more.
    """

    def __init__(
        self,
        name: str,
        connection: Connection[HandoffMessage],
        outbound: Outbound,
        kv: KVStore,
        settings: HandoffSettings,
        report: Callable[[ToCore], None],
        counters: Counters,
        is_draining: Callable[[], bool],
    ) -> None:
        self.name = name
        self.connection = connection
        self.outbound = outbound
        self.pushes: dict[int, Push] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._layout = kv.layout
        self._settings = settings
        self._write_bytes = settings.write_bytes or kv.write_bytes
        self._pusher = Pusher(outbound, KVPages(kv), self._write_bytes)
        self._report = report
        self._counters = counters
        self._is_draining = is_draining

    async def run(self) -> None:
        """Serve the connection until it ends; then free everything at once."""
        try:
            async for message in self.connection:
                self._handle(message)
        finally:
            await self._end()

    def _handle(self, message: HandoffMessage) -> None:
        match message:
            case Prefill():
                self._prefill(message)
            case Fence():
                self._spawn(self._fence(message))
            case SlotFreed() if isinstance(self.outbound, ShmOutbound):
                self.outbound.freed(message)
            case Probe():
                self._probe(message)
            case _:
                pass  # a Beat: the connection has noted the time

    def feed(self, epoch: int, event: PushChunk | PushFailed) -> None:
        """The core has news for a push; late news of a dropped one are of no interest."""
        push = self.pushes.get(epoch)
        if push is not None:
            push.feed(event)

    def _spawn(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def _send(self, message: msgspec.Struct) -> None:
        # A lost connection ends `run`, which drops everything; there is no one else to tell.
        with contextlib.suppress(WireError):
            self.connection.send(message)

    def _prefill(self, request: Prefill) -> None:
        layout = self._layout
        num_pages = -(-(len(request.tokens) - request.num_skip_tokens) // layout.page_size)
        if self._is_draining():
            self._send(refusal(request, "draining", "this worker takes no new work"))
            return
        if (
            request.epoch in self._tasks
            or request.num_skip_tokens % layout.page_size
            or num_pages < 1
            or num_pages != len(request.blocks)
        ):
            self._send(refusal(request, "invalid", "epoch, skip or blocks make no sense"))
            return
        key = f"{self.name}/{request.epoch}"
        push = Push(key, request, self._pusher, layout.page_size, self._send)
        self.pushes[request.epoch] = push
        self._tasks[request.epoch] = asyncio.get_running_loop().create_task(self._run_push(push))
        self._report(PrefillArrived(key, request))

    async def _run_push(self, push: Push) -> None:
        epoch = push.request.epoch
        try:
            await push.run()
        except Exception as error:
            # Not a word to D before the attempt's other writes have ended.
            await self.outbound.fence(epoch)
            self._counters.add("kv_push_failures_total")
            code = "transport" if isinstance(error, TransportError) else "internal"
            push.fail(code, f"{type(error).__name__}: {error}")
        self._forget(epoch)
        self._counters.add(
            "kv_transfer_bytes_total",
            push.count.num_bytes,
            direction="out",
            backend=self.transport_name,
        )
        self._report(PushDone(push.key))

    def _forget(self, epoch: int) -> None:
        self.pushes.pop(epoch, None)
        self._tasks.pop(epoch, None)

    @property
    def transport_name(self) -> str:
        """For metrics."""
        return "shm" if isinstance(self.outbound, ShmOutbound) else "tcp"

    async def _drop(self, epoch: int) -> None:
        """End a push whose result nobody wants; returns when its blocks are no longer read."""
        push = self.pushes.pop(epoch, None)
        task = self._tasks.get(epoch)
        if push is None or task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        await self.outbound.fence(epoch)
        self._forget(epoch)
        self._report(PrefillDropped(push.key))

    async def _fence(self, fence: Fence) -> None:
        self._counters.add("kv_fences_total")
        await self._drop(fence.epoch)
        await self.outbound.fence(fence.epoch)  # a probe's writes
        self._send(Fenced(fence.rid, fence.epoch))

    def _probe(self, request: Probe) -> None:
        if not 0 < request.num_blocks * self._layout.block_bytes <= MAX_PROBE_BYTES:
            self._send(refusal(request, "invalid", "a probe of that size is not run"))
            return
        self._spawn(self._run_probe(request))

    async def _run_probe(self, request: Probe) -> None:
        try:
            await push_pattern(
                request,
                self.outbound,
                self._layout,
                self._write_bytes,
                self._send,
            )
        except TransportError as error:
            await self.outbound.fence(request.epoch)
            self._send(refusal(request, "transport", str(error)))
        except asyncio.CancelledError:
            # Fenced: the answer is the `Fenced` frame.
            return

    async def expire(self, now: float) -> None:
        """Drop the pushes whose lease has run out; called at every tick, work or no work."""
        silent = now - self.connection.last_received
        for epoch, push in list(self.pushes.items()):
            if silent > push.request.lease_seconds:
                self._counters.add("kv_expired_leases_total")
                await self._drop(epoch)
                push.fail("transport", f"the lease ran out after {silent:.1f} s of silence")

    async def _end(self) -> None:
        for task in [*self._tasks.values(), *self._chores]:
            task.cancel()
        await self.outbound.close()
        tasks = [*self._tasks.values(), *self._chores]
        if tasks:
            await asyncio.wait(tasks)
        for push in list(self.pushes.values()):
            self._counters.add("kv_lost_leases_total")
            self._report(PrefillDropped(push.key))
        self.pushes.clear()
        self._tasks.clear()
