"""Protocol bugs, each planted into the real code as a variant of one of its methods.

The machine has to find every one of them: a model that finds nothing proves nothing.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

import msgspec

from tandem_engine.handoff.decode.exchange import Exchange
from tandem_engine.handoff.decode.session import DecodeSession
from tandem_engine.handoff.decode.side import DecodeSide
from tandem_engine.handoff.prefill.session import PrefillSession
from tandem_engine.handoff.transports.base import Inbound, Outbound
from tandem_engine.handoff.transports.landing import Landing
from tandem_wire.handoff import Commit, Fence, Prefill

Plant = Callable[[], Any]


@contextmanager
def _swap(owner: type, **methods: Any) -> Iterator[None]:
    with mock.patch.multiple(owner, **methods):
        yield


def pages_freed_before_the_fence_is_acknowledged() -> Any:
    """D asks for the fence, and takes its pages back without P's answer."""

    async def end(self: DecodeSession, rid: str, epoch: int) -> None:
        if not self.attempts[epoch].over_at_peer:
            self._link.send(Fence(rid, epoch))
        await self.inbound.fence(epoch)
        del self.attempts[epoch]

    return _swap(DecodeSession, end=end)


class _TaskEpochs:
    """One epoch for each task, which is one for each fetch."""

    def __init__(self) -> None:
        self._epochs: dict[Any, int] = {}

    def __next__(self) -> int:
        return self._epochs.setdefault(asyncio.current_task(), len(self._epochs) + 1)


def epoch_not_bumped_on_retry() -> Any:
    """All attempts of a fetch have the same epoch."""
    init = DecodeSide.__init__

    def begin(self: DecodeSide, *args: Any) -> None:
        init(self, *args)
        self._epochs = _TaskEpochs()  # type: ignore[assignment]

    return _swap(DecodeSide, __init__=begin)


def commit_not_checked_for_its_tokens() -> Any:
    """D takes a commit whose bytes are right, for however many tokens."""
    receive = Exchange.receive

    async def trust(self: Exchange, session: Any, question: Any, *rest: Any) -> Commit:
        commit = await receive(self, session, question, *rest)
        if isinstance(question, Prefill):
            commit = msgspec.structs.replace(commit, num_tokens=len(question.tokens))
        return commit

    return _swap(Exchange, receive=trust)


def stale_write_not_dropped() -> Any:
    """D's end forgets an epoch only a while after its fence, and takes what comes meanwhile."""

    async def fence(self: Inbound, epoch: int) -> None:
        asyncio.get_running_loop().call_later(1.0, self._landings.pop, epoch, None)

    return _swap(Inbound, fence=fence)


def write_that_is_being_made_not_waited_for() -> Any:
    """D's fence refuses what comes later, but not what one of its threads has begun."""

    async def fence(self: Landing) -> None:
        self._fenced = True

    return _swap(Landing, fence=fence)


def lease_kept_after_connection_loss() -> Any:
    """P tells no one that the prompts of a lost decode worker are not wanted any more."""

    async def end(self: PrefillSession) -> None:
        for task in [*self._tasks.values(), *self._chores]:
            task.cancel()
        await self.outbound.close()

    return _swap(PrefillSession, _end=end)


def fence_answered_while_a_write_is_under_way() -> Any:
    """P gives up the writes that wait, and doesn't wait for those that a lane is making."""

    async def fence(self: Outbound, epoch: int) -> None:
        for job in self._jobs.pop(epoch, ()):
            if job.claim():
                job.future.cancel()

    return _swap(Outbound, fence=fence)


def second_fence_not_waiting_for_the_first() -> Any:
    """P's fences of one epoch hand its writes to the first of them. (Was in 0.1.)"""

    async def fence(self: Outbound, epoch: int) -> None:
        jobs = list(self._jobs.pop(epoch, ()))
        for job in jobs:
            if job.claim():
                job.future.cancel()
        under_way = [job.future for job in jobs if not job.future.done()]
        if under_way:
            await asyncio.wait(under_way)
        for job in jobs:
            if not job.future.cancelled():
                job.future.exception()

    return _swap(Outbound, fence=fence)


def drop_cut_short_by_the_end_of_its_session() -> Any:
    """A push that is being dropped belongs to no one but the drop. (Was in 0.1.)"""
    drop, end = PrefillSession._drop, PrefillSession._end

    async def forget_and_drop(self: PrefillSession, epoch: int) -> None:
        push = self.pushes.pop(epoch, None)
        task = self._tasks.get(epoch)
        if push is None or task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        await self.outbound.fence(epoch)
        self.pushes[epoch] = push
        await drop(self, epoch)

    async def cut_short(self: PrefillSession) -> None:
        for task in self._chores:
            task.cancel()
        await end(self)

    return _swap(PrefillSession, _drop=forget_and_drop, _end=cut_short)


PLANTED: Final[tuple[Plant, ...]] = (
    pages_freed_before_the_fence_is_acknowledged,
    epoch_not_bumped_on_retry,
    commit_not_checked_for_its_tokens,
    stale_write_not_dropped,
    write_that_is_being_made_not_waited_for,
    lease_kept_after_connection_loss,
    fence_answered_while_a_write_is_under_way,
    second_fence_not_waiting_for_the_first,
    drop_cut_short_by_the_end_of_its_session,
)
