"""P's side of one control connection: the prompts that one decode worker asked for."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tandem_engine.frames import HeldPush, Pairing
from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.events import (
    Counters,
    FromHandoff,
    PrefillArrived,
    PrefillDropped,
    PushChunk,
    PushDone,
    PushFailed,
)
from tandem_engine.handoff.pages import MAX_PROBE_BYTES, KVPages
from tandem_engine.handoff.prefill.push import Push, Pusher, push_pattern, refusal
from tandem_engine.handoff.transports.base import Link, Outbound
from tandem_wire.handoff import Beat, Fence, Fenced, HandoffMessage, Prefill, Probe


class PrefillSession:
    """Pushes by epoch. A push's blocks stay pinned until `PushDone` or `PrefillDropped`.

    Every push ends in exactly one of the two: in the push's own task when the commit or the
    failure has been sent, in `_drop` when no one wants it any longer.
    """

    def __init__(
        self,
        link: Link,
        outbound: Outbound,
        pairing: Pairing,
        report: Callable[[FromHandoff], None],
        counters: Counters,
        is_draining: Callable[[], bool],
    ) -> None:
        self.outbound = outbound
        self.pairing = pairing
        self.pushes: dict[int, Push] = {}
        self._link = link
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._layout = link.kv.layout
        self._pusher = Pusher(outbound, KVPages(link.kv))
        self._report = report
        self._counters = counters
        self._is_draining = is_draining
        self._newest_epoch = -1
        self._expired: set[int] = set()

    async def run(self) -> None:
        """Serve the connection until it ends; then free everything at once."""
        try:
            async for message in self._link.connection:
                self._handle(message)
        finally:
            await self._end()

    def _handle(self, message: HandoffMessage) -> None:
        match message:
            case Prefill() | Probe():
                self._begin(message)
            case Fence():
                self._spawn(self._fence(message))
            case Beat():
                pass  # the connection has noted the time
            case _:
                self.outbound.handle(message)

    def _begin(self, request: Prefill | Probe) -> None:
        """Take a new epoch. One that comes twice is under way already, or over: say nothing.

        A refusal would tell D that nothing of the epoch will be written any more.
        """
        if request.epoch <= self._newest_epoch:
            return
        self._newest_epoch = request.epoch
        if isinstance(request, Prefill):
            self._prefill(request)
            if request.epoch not in self.pushes:  # it was refused
                self.outbound.forget(request.epoch)
        else:
            self._probe(request)

    def feed(self, epoch: int, event: PushChunk | PushFailed) -> None:
        """Pass the core's news to a push; those of a dropped one come too late to matter."""
        push = self.pushes.get(epoch)
        if push is not None:
            push.feed(event)

    def held(self, now: float) -> list[HeldPush]:
        """The pushes that have not ended."""
        silent = now - self._link.connection.last_received
        return [
            HeldPush(
                rid=push.request.rid,
                epoch=epoch,
                worker_id=self.pairing.worker_id,
                transport=self.outbound.name,
                num_bytes=push.count.num_bytes,
                state="fencing" if self._tasks[epoch].cancelling() else "pushing",
                lease_seconds=push.request.lease_seconds - silent,
            )
            for epoch, push in self.pushes.items()
        ]

    def _spawn(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def _prefill(self, request: Prefill) -> None:
        layout = self._layout
        num_pages = -(-(len(request.tokens) - request.num_skip_tokens) // layout.page_size)
        if self._is_draining():
            self._link.send(refusal(request, "draining", "this worker takes no new work"))
            return
        if (
            request.num_skip_tokens % layout.page_size
            or num_pages < 1
            or num_pages != len(request.blocks)
        ):
            message = (
                f"{len(request.tokens)} tokens after {request.num_skip_tokens} "
                f"don't fit {len(request.blocks)} blocks"
            )
            self._link.send(refusal(request, "invalid", message))
            return
        key = f"{self._link.session}/{request.epoch}"
        push = Push(key, request, self._pusher, layout, self._link.send)
        self.pushes[request.epoch] = push
        self._tasks[request.epoch] = asyncio.get_running_loop().create_task(self._run_push(push))
        self._report(PrefillArrived(key, request))

    async def _run_push(self, push: Push) -> None:
        epoch = push.request.epoch
        try:
            await push.run()
        except Exception as error:
            # D must not hear of it before the attempt's other writes have ended.
            await self.outbound.fence(epoch)
            self._counters.add("kv_push_failures_total")
            code = "transport" if isinstance(error, TransportError) else "internal"
            push.fail(code, f"{type(error).__name__}: {error}")
        self._forget(epoch)
        self._counters.add(
            "kv_transfer_bytes_total",
            push.count.num_bytes,
            direction="out",
            backend=self.outbound.name,
        )
        self._report(PushDone(push.key))

    def _forget(self, epoch: int) -> None:
        self.pushes.pop(epoch, None)
        self._tasks.pop(epoch, None)
        self._expired.discard(epoch)
        self.outbound.forget(epoch)

    async def _drop(self, epoch: int) -> None:
        """End a push whose result no one wants; return when its blocks are no longer read.

        Until then the push stays known: a fence, the sweep and the session's end may all want to
        drop it, each may be cut short by the last, and one of them reports it.
        """
        push = self.pushes.get(epoch)
        task = self._tasks.get(epoch)
        if push is None or task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        await self.outbound.fence(epoch)
        if self.pushes.get(epoch) is push:
            self._forget(epoch)
            self._report(PrefillDropped(push.key))

    async def _fence(self, fence: Fence) -> None:
        self._counters.add("kv_fences_total")
        await self._drop(fence.epoch)
        await self.outbound.fence(fence.epoch)  # a probe's writes
        self._link.send(Fenced(fence.rid, fence.epoch))

    def _probe(self, request: Probe) -> None:
        if not 0 < request.num_blocks * self._layout.block_bytes <= MAX_PROBE_BYTES:
            message = (
                f"a probe of {request.num_blocks} blocks is not possible; "
                f"ask for at least 1 and at most {MAX_PROBE_BYTES} bytes"
            )
            self._link.send(refusal(request, "invalid", message))
            return
        self._spawn(self._run_probe(request))

    async def _run_probe(self, request: Probe) -> None:
        try:
            await push_pattern(request, self.outbound, self._layout, self._link.send)
        except TransportError as error:
            await self.outbound.fence(request.epoch)
            self._link.send(refusal(request, "transport", str(error)))
        except asyncio.CancelledError:
            # Fenced: D gets a `Fenced` frame instead.
            return
        finally:
            self.outbound.forget(request.epoch)

    def expire(self, now: float) -> None:
        """Drop the pushes whose lease has run out; called at every tick, work or no work.

        A write to a peer that doesn't read may hang, so nothing is waited for here.
        """
        silent = now - self._link.connection.last_received
        for epoch, push in self.pushes.items():
            if silent > push.request.lease_seconds and epoch not in self._expired:
                self._expired.add(epoch)
                self._counters.add("kv_expired_leases_total")
                self._spawn(self._expire(push, silent))

    async def _expire(self, push: Push, silent: float) -> None:
        await self._drop(push.request.epoch)
        push.fail("expired", f"the lease ran out: nothing came for {silent:.1f} s")

    async def _end(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        # Chores end with their writes. A fence has then to report its push, so none is cancelled.
        await self.outbound.close()
        tasks = [*self._tasks.values(), *self._chores]
        if tasks:
            await asyncio.wait(tasks)
        for push in list(self.pushes.values()):
            self._counters.add("kv_lost_leases_total")
            self._report(PrefillDropped(push.key))
        self.pushes.clear()
        self._tasks.clear()
