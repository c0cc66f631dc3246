"""How pages get from a prefill worker (P) to a decode worker (D): the two ends of a session.

`Outbound` lives on P, `Inbound` on D, one pair per session (a control connection). Who owns what:

- P's source blocks are pinned by P's core from `Outbound.write` until its result is there: a write
  reads them in one of the transport's threads, and has finished with them when it returns.
- D's destination blocks belong to the attempt's `Landing`. Only D's own code writes them, after it
  has looked the epoch up: bytes of an epoch that D has fenced are dropped wherever they still are.
- `Outbound.fence` returns when no write of the epoch is under way on P; `Inbound.fence` returns
  when none will be made on D. Either is enough to keep D's pages safe; both are done.
- `close` ends the session's threads and may be called in any state.
"""

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem_engine.handoff.errors import TransportError
from tandem_engine.handoff.pages import Pages
from tandem_engine.handoff.transports.landing import Landing


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

    max_write_bytes: int = 1 << 30
    """What the other side takes at once."""

    def __init__(self, on_lost: Callable[[Exception], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_lost = on_lost
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: dict[int, set[_Job]] = {}
        self._lanes: list[asyncio.Future[None]] = []
        self._closed = False

    async def write(self, write: PageWrite) -> Written:
        """Move pages; returns when P's blocks are no longer needed. TransportError."""
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
        """Give the epoch's waiting writes up and return when none is under way."""
        jobs = list(self._jobs.pop(epoch, ()))
        for job in jobs:
            if job.claim():
                job.future.cancel()
        under_way = [job.future for job in jobs if not job.future.done()]
        if under_way:
            await asyncio.wait(under_way)
        for job in jobs:
            if not job.future.cancelled():
                job.future.exception()  # seen: nobody else waits for it

    def start_lane(self, send: Callable[[PageWrite], Written], name: str) -> None:
        """Start a thread that makes writes, one at a time, by `send` (OSError: session lost)."""
        ended: asyncio.Future[None] = self._loop.create_future()
        self._lanes.append(ended)
        thread = threading.Thread(
            target=self._run_lane, args=(send, ended), name=f"kv-out-{name}", daemon=True
        )
        thread.start()

    def _run_lane(self, send: Callable[[PageWrite], Written], ended: asyncio.Future[None]) -> None:
        while (job := self._queue.get()) is not None:
            if not job.claim():
                continue
            try:
                written = send(job.write)
            except Exception as error:
                failure = TransportError(f"a write failed: {error}")
                failure.__cause__ = error
                self._post(self._finish, job.future, None, failure)
                if isinstance(error, OSError):
                    self._post(self._on_lost, failure)
                    break
            else:
                self._post(self._finish, job.future, written, None)
        self._post(ended.set_result, None)

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


class Inbound(ABC):
    """D's end: finds the landing of what arrives. Everything but `_land` is called on the loop."""

    name: str

    def __init__(self) -> None:
        self._landings: dict[int, Landing] = {}
        self.num_stale_writes = 0

    def register(self, epoch: int, landing: Landing) -> None:
        """From now on writes of `epoch` go there."""
        self._landings[epoch] = landing

    async def fence(self, epoch: int) -> None:
        """Drop what still comes for `epoch`; returns when nothing of it is being written."""
        landing = self._landings.pop(epoch, None)
        if landing is not None:
            await landing.fence()

    def _land(self, epoch: int, blocks: Sequence[int], layers: range, payload: memoryview) -> None:
        """Called by the transport's threads for everything that arrives."""
        landing = self._landings.get(epoch)
        if landing is None or not landing.write(blocks, layers, payload):
            self.num_stale_writes += 1

    @abstractmethod
    async def open(self) -> None:
        """Make ready to receive, once P has agreed to this transport. Raises TransportError."""

    @abstractmethod
    async def close(self) -> None:
        """End every thread; nothing lands after it has returned. Safe to call twice."""
