"""D's side of one control connection: the attempts that one prefill worker is working on."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from tandem_engine.frames import FetchState, HeldFetch, Pairing
from tandem_engine.handoff.errors import AttemptFailed, LinkFault
from tandem_engine.handoff.transports.base import Inbound, Link
from tandem_engine.handoff.transports.landing import Landing
from tandem_wire.endpoint import keep_alive
from tandem_wire.errors import ConnectionLost, WireError
from tandem_wire.handoff import (
    Beat,
    ChunkPushed,
    Commit,
    Fence,
    Fenced,
    HandoffMessage,
    PrefillFailed,
)


class Attempt:
    """The course of one epoch: progress, then a commit or a failure."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self.progress_at = self._loop.time()
        self.commit: Commit | None = None
        self.failure: AttemptFailed | None = None
        self.over_at_peer = False  # P has said its last word, so no fence is needed
        self.fenced = asyncio.Event()
        self.is_ending = False  # the session waits until nothing can land any more
        self.rid = ""
        self.landing: Landing | None = None

    def expire_after(self, seconds: float) -> None:
        """Fail the attempt unless it is complete by then."""
        late = AttemptFailed(f"it took longer than {seconds:g} s")
        self._loop.call_later(seconds, self.fail, late)

    def progress(self) -> None:
        """Note that pages landed, or that P reported some progress."""
        self.progress_at = self._loop.time()
        if self.landing is not None and self.landing.error:
            self.fail(LinkFault(self.landing.error))
        self._changed.set()

    def fail(self, failure: AttemptFailed) -> None:
        """End the attempt by `failure`, unless it has failed already."""
        if self.failure is None:
            self.failure = failure
        self._changed.set()

    async def complete(self, stall_seconds: float) -> Commit:
        """Wait for the commit and for all its bytes. Raises AttemptFailed."""
        assert self.landing is not None
        while True:
            if self.failure is not None:
                raise self.failure
            if self.commit is not None and self.landing.num_bytes >= self.commit.num_bytes:
                return self.commit
            left = self.progress_at + stall_seconds - self._loop.time()
            if left <= 0 and self.commit is not None:
                missing = self.commit.num_bytes - self.landing.num_bytes
                raise LinkFault(
                    f"{missing} of {self.commit.num_bytes} committed bytes did not come "
                    f"within {stall_seconds:g} s"
                )
            if left <= 0:
                raise AttemptFailed(f"the prefill worker made no progress for {stall_seconds:g} s")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()


class DecodeSession:
    """One paired prefill worker. `lost` is done when the session has ended and nothing can land."""

    def __init__(
        self,
        link: Link,
        inbound: Inbound,
        pairing: Pairing,
        on_ended: Callable[["DecodeSession"], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        connection, settings = link.connection, link.settings
        self.connection = connection
        self.inbound = inbound
        self.pairing = pairing
        self.worker_id = pairing.worker_id
        self.draining = False
        self._link = link
        self._num_chunks = 0
        self.attempts: dict[int, Attempt] = {}
        self.lost: asyncio.Future[None] = loop.create_future()
        self._on_ended = on_ended
        self._fence_seconds = settings.stall_seconds
        self._beats = loop.create_task(keep_alive(connection, Beat, settings.heartbeat_seconds))
        self._reader = loop.create_task(self._run())

    @property
    def is_open(self) -> bool:
        """False once the connection has begun to end."""
        return self.connection.is_open

    def held(self) -> list[HeldFetch]:
        """The epochs of this session that are not over."""
        now = asyncio.get_running_loop().time()
        return [
            HeldFetch(
                rid=attempt.rid,
                epoch=epoch,
                worker_id=self.worker_id,
                transport=self.inbound.name,
                blocks=sorted(attempt.landing.blocks) if attempt.landing else [],
                num_bytes=attempt.landing.num_bytes if attempt.landing else 0,
                state=self._state(attempt),
                idle_seconds=now - attempt.progress_at,
            )
            for epoch, attempt in self.attempts.items()
        ]

    def _state(self, attempt: Attempt) -> FetchState:
        if self.inbound.in_quarantine:
            return "quarantined"
        return "fencing" if attempt.is_ending else "filling"

    def begin(self, rid: str, epoch: int, landing: Landing, attempt: Attempt) -> None:
        """Expect pages and messages of `epoch`."""
        attempt.rid = rid
        attempt.landing = landing
        self.attempts[epoch] = attempt
        self.inbound.register(epoch, landing)

    async def end(self, rid: str, epoch: int) -> None:
        """Make sure that nothing of `epoch` can land any more, here and at P, and forget it.

        Unless P has said its last word, waits for P's acknowledgement or for the session's end.
        When P beats but doesn't acknowledge, this side ends the session.
        """
        attempt = self.attempts[epoch]
        attempt.is_ending = True
        if not attempt.over_at_peer:
            self._link.send(Fence(rid, epoch))
            fenced = asyncio.ensure_future(attempt.fenced.wait())
            either: list[asyncio.Future[Any]] = [fenced, self.lost]
            try:
                await asyncio.wait(
                    either, timeout=self._fence_seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if not fenced.done() and not self.lost.done():
                    self.connection.abort(
                        ConnectionLost(
                            f"{self.worker_id} did not acknowledge a fence "
                            f"within {self._fence_seconds:g} s"
                        )
                    )
                    await asyncio.wait([self.lost])
            finally:
                fenced.cancel()
        await self.inbound.fence(epoch)
        del self.attempts[epoch]

    async def _run(self) -> None:
        reason = "it closed the connection"
        try:
            async for message in self.connection:
                self._handle(message)
        except WireError as error:
            reason = str(error)
        finally:
            self._beats.cancel()
            await self.inbound.close()
            for attempt in self.attempts.values():
                attempt.fail(AttemptFailed(f"lost the prefill worker: {reason}"))
            self.lost.set_result(None)
            self._on_ended(self)

    def _handle(self, message: HandoffMessage) -> None:
        match message:
            case Beat():
                self._take_beat(message)
            case ChunkPushed() | Commit() | PrefillFailed() | Fenced():
                attempt = self.attempts.get(message.epoch)
                if attempt is not None:  # else the epoch is over
                    self._advance(attempt, message)
            case _:
                self.inbound.handle(message)

    def _take_beat(self, beat: Beat) -> None:
        self.draining = beat.draining
        if beat.num_chunks != self._num_chunks:
            # P is busy with other prompts: ours wait for their turn, they don't stall.
            self._num_chunks = beat.num_chunks
            for waiting in self.attempts.values():
                waiting.progress()

    @staticmethod
    def _advance(attempt: Attempt, message: ChunkPushed | Commit | PrefillFailed | Fenced) -> None:
        match message:
            case Commit():
                attempt.commit = message
                attempt.over_at_peer = True
            case PrefillFailed():
                attempt.over_at_peer = True
                kind = LinkFault if message.code == "transport" else AttemptFailed
                attempt.fail(kind(f"{message.code}: {message.message}"))
            case Fenced():
                attempt.fenced.set()
        attempt.progress()

    async def close(self) -> None:
        """End the session; its attempts fail."""
        await self.connection.close()
        await asyncio.shield(self.lost)
