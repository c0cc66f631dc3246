"""How pages get from a prefill worker (P) to a decode worker (D): the interface of a transport.

A `Transport` makes the two ends of a session: `Inbound` on D, `Outbound` on P, one pair per control
connection. The registry knows the transports; sessions know only what stands here. A transport is
*staged* when D's own code puts the bytes into D's blocks, *one-sided* when P writes them there.
Who owns what:

- P's source blocks are pinned by P's core from `Outbound.write` until its result is there: a write
  reads them in one of the transport's threads, and has finished with them when it returns.
- D's destination blocks belong to the attempt's `Landing`. Staged: only D's own code writes them,
  after it has looked the epoch up, so bytes of an epoch that D has fenced are dropped wherever they
  still are. One-sided: P may write them from `Inbound.register` on, until the epoch is fenced.
- `Outbound.fence` returns when no write of the epoch is under way on P; `Inbound.fence` returns
  when none will be made on D. Staged: either is enough to keep D's pages safe; both are done.
- One-sided: D can't drop what P writes, so one of two things must hold before D's pages are used
  again. *Completion*: `send` returns only when its bytes are in D's memory or never will be, so
  that `Outbound.fence`, which P acknowledges, covers the network too. *Revocation*: P has lost the
  right to write, by D's own act and without P's help. The session calls `Inbound.fence` only after
  P has acknowledged the fence, has said its last word on the epoch, or is cut off; in the last case
  `Inbound.close` comes first and must revoke, however long P sleeps. A plain memory mapping can't
  be revoked: a P that was stopped in a copy finishes the copy when it wakes. A transport by mapped
  memory is therefore staged, or has every writer pass a gate of D's (`cuda_ipc`).
- A probe's pages (`PatternPages`) are part of no cache. A one-sided transport gives them room of
  its own between `Inbound.register` and `Inbound.fence`.
- `close` ends the session's threads and may be called in any state.
"""

import asyncio
import contextlib
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import msgspec

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.pages import Pages
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.landing import Landing
from tandem_engine.memory import OpenCache, Staging
from tandem_engine.step import KVStore
from tandem_wire.connection import Connection
from tandem_wire.errors import WireError
from tandem_wire.handoff import HandoffMessage, TransportName, TransportOffer

MAX_WRITE_BYTES: Final = 1 << 30
"""No transport moves more than this in one write."""

Placement = Literal["staged", "one-sided"]
"""Who puts bytes into D's blocks: D's own code, or P."""

Memory = Literal["host", "device"]
"""Where the transport reads and writes pages; a device's pages go through the host otherwise."""


@dataclass(frozen=True, slots=True)
class Link:
    """One session as its transport sees it, on either side. Used on the loop."""

    session: str
    address: tuple[str, int]
    """P's bootstrap port: on D, where D reached it; on P, what P was configured with."""
    connection: Connection[HandoffMessage]
    settings: HandoffSettings
    kv: KVStore
    on_lost: Callable[[Exception], None]
    """The transport can't go on: ends the session."""
    around_lane: "Callable[[Lane, Callable[[], bool]], Lane] | None" = None
    """Stands around every lane and sees whether it is closed; for injected faults."""

    def send(self, message: msgspec.Struct) -> None:
        """Send on the control connection. Once that has ended, the session ends: nothing to do."""
        with contextlib.suppress(WireError):
            self.connection.send(message)


class Transport(ABC):
    """One way for pages from P to D, on one worker, for as long as its hand-off runs.

    It has what all sessions share; a session's own state is in its two ends. A transport that needs
    the cache's memory registered does that when it is made, and undoes it in `close`.
    """

    name: ClassVar[TransportName]
    placement: ClassVar[Placement]
    memory: Memory
    is_automatic: ClassVar[bool] = True
    """Whether `--transfer Auto` may take it."""

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        """TransportError says what this worker lacks to use the transport, and what to do."""
        self._kv = kv
        self.shortfalls: dict[str, str] = {}
        """Better ways of this transport that this worker can't use, each with the reason."""

    @abstractmethod
    def offer(self, link: Link) -> "Inbound":
        """Make D's end; its `offer` goes into the handshake. TransportError says why there is none.

        P may take another offer: the end is then closed without ever having been opened.
        """

    @abstractmethod
    async def accept(self, offer: TransportOffer, link: Link) -> "Outbound":
        """Make P's end for D's offer. TransportError says why this side can't."""

    def close(self) -> None:
        """Give back what the sessions shared, once they have all ended."""
        return None


class Inbound(ABC):
    """D's end: finds the landing of what arrives. Its threads call only the methods with `_`."""

    def __init__(self, transport: Transport) -> None:
        self.name = transport.name
        self.memory = transport.memory
        self.shortfalls = transport.shortfalls
        self.num_stale_writes = 0
        self.in_quarantine = False
        """`close` waits for a writer that may still write, although P is cut off."""
        self._landings: dict[int, Landing] = {}

    @property
    @abstractmethod
    def offer(self) -> TransportOffer:
        """What P needs to reach this end."""

    @abstractmethod
    async def open(self) -> None:
        """Make ready to receive, once P has agreed to this transport. Raises TransportError."""

    def handle(self, message: HandoffMessage) -> None:
        """Take a message of the transport's own, which P's end sent on the control connection."""
        return None

    def register(self, epoch: int, landing: Landing) -> None:
        """Let writes of `epoch` go to `landing` from now on."""
        self._landings[epoch] = landing

    async def fence(self, epoch: int) -> None:
        """Drop what still comes for `epoch`; return when nothing of it is being written."""
        landing = self._landings.pop(epoch, None)
        if landing is not None:
            await landing.fence()

    def _land(self, epoch: int, blocks: Sequence[int], layers: range, payload: memoryview) -> None:
        """Staged: put one write's bytes into place, unless the epoch is fenced."""
        landing = self._landings.get(epoch)
        if landing is None or not landing.write(blocks, layers, payload):
            self.num_stale_writes += 1

    def _land_staged(
        self, epoch: int, blocks: Sequence[int], layers: range, staging: Staging, at: int
    ) -> None:
        """Staged: put one write's bytes from staging memory into place, unless it is fenced."""
        landing = self._landings.get(epoch)
        if landing is None or not landing.unstage(blocks, layers, staging, at):
            self.num_stale_writes += 1

    def _placed(self, epoch: int, blocks: Sequence[int], layers: range) -> None:
        """One-sided: check and count one write that is complete in D's memory."""
        landing = self._landings.get(epoch)
        if landing is None or not landing.placed(blocks, layers):
            self.num_stale_writes += 1

    def _check(self, epoch: int, blocks: Sequence[int], layers: range, cache: OpenCache) -> None:
        """One-sided: check on D's device and count one write that is complete in D's memory."""
        landing = self._landings.get(epoch)
        if landing is None or not landing.check(blocks, layers, cache):
            self.num_stale_writes += 1

    @abstractmethod
    async def close(self) -> None:
        """End every thread; nothing lands after it has returned. Safe to call twice."""


@dataclass(frozen=True, slots=True)
class PageWrite:
    """Move some layers of `source_blocks` of `pages` into D's `target_blocks`."""

    epoch: int
    pages: Pages
    source_blocks: Sequence[int]
    target_blocks: Sequence[int]
    layers: range

    @property
    def num_bytes(self) -> int:
        """Size of the payload."""
        return len(self.source_blocks) * len(self.layers) * self.pages.layer_bytes


@dataclass(frozen=True, slots=True)
class Written:
    """What one write came to: payload bytes, and their checksum (0: off)."""

    num_bytes: int
    checksum: int


Lane = Callable[[PageWrite], Written]
"""Makes one write, in a thread of the transport's; OSError: the session is lost."""


class _Job:
    """A write that waits or is under way; exactly one of lane and fence claims it."""

    __slots__ = ("claimed", "future", "write")

    def __init__(self, write: PageWrite, future: "asyncio.Future[Written]") -> None:
        self.write = write
        self.future = future
        self.claimed = threading.Lock()

    def claim(self) -> bool:
        return self.claimed.acquire(blocking=False)


class Outbound(ABC):
    """P's end. Everything but a lane's own work is called on the loop."""

    def __init__(self, transport: Transport, link: Link) -> None:
        self.name = transport.name
        self.memory = transport.memory
        self.shortfalls = transport.shortfalls
        self._loop = asyncio.get_running_loop()
        self.write_bytes = min(link.settings.write_bytes or link.kv.write_bytes, MAX_WRITE_BYTES)
        """The size of write to aim for; D's end takes no larger ones."""
        self.probe_bytes = MAX_WRITE_BYTES
        """The same for a probe's pages, if that is less."""
        self.least_write_bytes = self.write_bytes
        """That of the pages of a small prompt."""
        self.num_lanes = 1
        """Writes at a time that fill the link."""
        self._on_lost = link.on_lost
        self._around_lane = link.around_lane
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: dict[int, set[_Job]] = {}
        self._lanes: list[asyncio.Future[None]] = []
        self._closed = False

    def handle(self, message: HandoffMessage) -> None:
        """Take a message of the transport's own, which D's end sent on the control connection."""
        return None

    def attach(self, connection: Connection[HandoffMessage]) -> None:
        """Take over a data connection that D's end opened for this session.

        A transport without data connections leaves it alone; it is closed then.
        """
        return None

    async def write(self, write: PageWrite) -> Written:
        """Move pages; returns when P's blocks are no longer needed. Raises TransportError."""
        if self._closed:
            raise TransportError("the session has ended")
        job = _Job(write, self._loop.create_future())
        self._jobs.setdefault(write.epoch, set()).add(job)
        self._queue.put(job)
        try:
            # A cancelled caller leaves the write to `fence`, which knows when it has ended.
            return await asyncio.shield(job.future)
        finally:
            if job.future.done():
                self._forget(job)

    def _forget(self, job: _Job) -> None:
        jobs = self._jobs.get(job.write.epoch)
        if jobs is not None:
            jobs.discard(job)
            if not jobs:
                del self._jobs[job.write.epoch]

    async def fence(self, epoch: int) -> None:
        """Give up the epoch's waiting writes and return when none is under way.

        So does a second call, while the first one still waits or after it was cancelled.
        """
        jobs = list(self._jobs.get(epoch, ()))
        for job in jobs:
            if job.claim():
                job.future.cancel()
            # Also when this call is cancelled while it waits: no one else looks at them.
            job.future.add_done_callback(_take_note)
        under_way = [job.future for job in jobs if not job.future.done()]
        if under_way:
            await asyncio.wait(under_way)
        for job in jobs:
            self._forget(job)

    def forget(self, epoch: int) -> None:
        """The epoch is over: no write of it comes any more."""
        return None

    def start_lane(self, send: Lane, name: str) -> None:
        """Start a thread that makes writes, one at a time, by `send`."""
        if self._around_lane is not None:
            send = self._around_lane(send, lambda: self._closed)
        ended: asyncio.Future[None] = self._loop.create_future()
        self._lanes.append(ended)
        thread = threading.Thread(
            target=self._run_lane, args=(send, ended), name=f"kv-out-{name}", daemon=True
        )
        thread.start()

    def _run_lane(self, send: Lane, ended: asyncio.Future[None]) -> None:
        while (job := self._queue.get()) is not None:
            if job.claim() and not self._make(job, send):
                break
        self._post(ended.set_result, None)

    def _make(self, job: _Job, send: Lane) -> bool:
        """Make a write that a lane has claimed; False when the lane can make no more."""
        try:
            written = send(job.write)
        except Exception as error:
            failure = TransportError(f"a write failed: {error}")
            failure.__cause__ = error
            lost = isinstance(error, OSError)
            if lost:
                # First: a write that may still land must not be followed by an answer.
                self._post(self._on_lost, failure)
            self._post(self._finish, job.future, None, failure)
            return not lost
        else:
            self._post(self._finish, job.future, written, None)
        return True

    def _post(self, call: Callable[..., None], *args: object) -> None:
        self._loop.call_soon_threadsafe(call, *args)

    @staticmethod
    def _finish(
        future: "asyncio.Future[Written]", written: Written | None, failure: TransportError | None
    ) -> None:
        if future.done():
            return
        if written is None:
            assert failure is not None
            future.set_exception(failure)
        else:
            future.set_result(written)

    async def close(self) -> None:
        """End every write and every thread. Safe to call twice."""
        self._closed = True
        # Before the lanes wake up, so that none begins another write.
        for job in [job for jobs in self._jobs.values() for job in jobs]:
            if job.claim():
                job.future.cancel()
        self._interrupt()
        for _ in self._lanes:
            self._queue.put(None)
        for epoch in list(self._jobs):
            await self.fence(epoch)
        if self._lanes:
            await asyncio.wait(self._lanes)

    @abstractmethod
    def _interrupt(self) -> None:
        """Make a `send` that is blocked return soon, by an error."""


def _take_note(future: "asyncio.Future[Written]") -> None:
    """Look at how a write that was given up ended, so that asyncio doesn't complain."""
    if not future.cancelled():
        future.exception()
